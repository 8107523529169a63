//! What was learned of the NATs behind the carriers, for the sessions to come: a session that is made anew would begin
//! with guesses, and be unreachable for a while where they are wrong.

use super::ipc::CarrierName;
use crate::paths::Silence;

/// By carrier: the link and the address on it.
#[derive(Clone, Debug, Default)]
pub struct Nats(Vec<(CarrierName, Silence)>);

impl Nats {
    /// Takes in what a session learned on this carrier. One that isn't bound to a link may be in any network.
    pub fn learn(&mut self, carrier: &CarrierName, silence: Silence) {
        self.0.retain(|(name, _)| name != carrier);
        if carrier.source.is_some() {
            self.0.push((carrier.clone(), silence));
        }
    }

    /// What is known of the NAT behind this carrier.
    pub fn get(&self, carrier: &CarrierName) -> Option<Silence> {
        self.0.iter().find(|(name, _)| name == carrier).map(|(_, silence)| *silence)
    }

    /// The carriers are these now. Others may be in another network when they come back, with the same address as well.
    pub fn handle_carriers<'a>(&mut self, carriers: impl Iterator<Item = &'a CarrierName> + Clone) {
        self.0.retain(|(known, _)| carriers.clone().any(|carrier| carrier == known));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Time;
    use std::time::Duration;

    fn carrier(name: &str, source: [u8; 4]) -> CarrierName {
        CarrierName { name: name.to_owned(), index: 3, source: Some(source.into()) }
    }

    #[test]
    fn what_was_learned_lasts_as_long_as_the_carrier() {
        let (wifi, wire) = (carrier("wlan0", [192, 168, 1, 7]), carrier("eth0", [10, 0, 0, 7]));
        let [short, long] = [30, 120].map(|seconds| Silence {
            good: Duration::from_secs(seconds),
            verified: true,
            limit: Some((Duration::from_secs(seconds * 2), Time::from_nanos(0))),
        });
        let mut nats = Nats::default();
        nats.learn(&wifi, long);
        nats.learn(&wifi, short);
        nats.learn(&wire, long);
        nats.learn(&CarrierName::any(), long);
        assert_eq!((nats.get(&wifi), nats.get(&wire)), (Some(short), Some(long)));
        assert_eq!(nats.get(&CarrierName::any()), None);
        assert_eq!(nats.get(&carrier("wlan0", [192, 168, 1, 8])), None, "another address");
        nats.handle_carriers([&wire].into_iter());
        nats.handle_carriers([&wire, &wifi].into_iter());
        assert_eq!((nats.get(&wifi), nats.get(&wire)), (None, Some(long)));
    }
}
