//! The host moves: other links, addresses, routes. The supervisor learns of it from the kernel and hands the tunnel
//! process a fresh socket for each link that leads to the server now; the session goes on by those.
//!
//! ```text
//!   event --> look --> (more events) --> quiet for 50 ms --> look
//! ```
//! - [`Settle`] says when to look: at the first event, since the way may be a better one already, and when there were
//!   no more, since addresses and routes come one after the other.
//! - [`Connection`] says whether what was seen is news to the tunnel process.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use super::dial::Connected;
use super::ipc::CarrierName;
use crate::net::Way;
use crate::sys::udp;
use crate::time::Time;

/// When to look at the network.
#[derive(Clone, Debug, Default)]
pub struct Settle {
    look_at: Option<Time>,
    /// A look in between: what came with the first event.
    soon: Option<Time>,
    /// The first event since the last look that found quiet.
    since: Time,
}

impl Settle {
    /// Something changed. `true`: look now; in any case also later.
    pub fn handle_event(&mut self, now: Time) -> bool {
        let first = self.look_at.is_none();
        if first {
            self.since = now;
            self.soon = Some(now + TOGETHER);
        }
        // Where it never gets quiet, nobody waits for that.
        self.look_at = Some((now + QUIET).min(self.since + LONGEST));
        first
    }

    /// Looking failed.
    pub fn handle_failed(&mut self, now: Time) {
        self.since = now;
        self.look_at = Some(now + AGAIN);
    }

    /// When [`Settle::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.look_at.into_iter().chain(self.soon).min()
    }

    /// Whether to look now.
    pub fn handle_timeout(&mut self, now: Time) -> bool {
        let soon = self.soon.take_if(|at| *at <= now).is_some();
        self.look_at.take_if(|at| *at <= now).is_some() || soon
    }
}

/// A connection that the tunnel process was given.
#[derive(Debug)]
pub struct Connection {
    /// Place of the remote in the configuration.
    pub place: usize,
    /// Where it was reached.
    pub address: SocketAddr,
    /// The address that the control connection was made from.
    pub local: IpAddr,
    /// The link that it is bound to, if there was one when it was made.
    link: Option<String>,
    /// What the UDP sockets were made for last; empty where they are bound to no link.
    told: Vec<Way>,
    told_of_control: bool,
    told_of_others: bool,
}

impl Connection {
    /// A connection that was made, with sockets for these ways.
    pub fn new(connected: &Connected, told: Vec<Way>) -> io::Result<Connection> {
        let local = connected.stream.local_addr()?.ip().to_canonical();
        let (place, address, link) = (connected.place, connected.address, connected.link.clone());
        Ok(Connection { place, address, local, link, told, told_of_control: false, told_of_others: false })
    }

    /// Whether nothing can come of the control connection any more: its address is gone from this host, or its link
    /// leads to the server no longer. `holders` are the devices that have the address.
    pub fn control_gone(&self, ways: &[Way], holders: &[u32]) -> bool {
        let goes_by = |way: &Way| match &self.link {
            Some(link) => *link == way.name,
            None => holders.contains(&way.index) || way.source == self.local,
        };
        holders.is_empty() || !ways.iter().any(goes_by)
    }

    /// Whether the tunnel process should hear of this: other links than before, another order of them, another source
    /// address of one; or, with any way at all, that its control connection is cut off; or, without, that there is a
    /// way `elsewhere`.
    pub fn is_news(&self, ways: &[Way], control_gone: bool, elsewhere: bool) -> bool {
        let same = |(told, way): (&Way, &Way)| (told.index, told.source) == (way.index, way.source);
        let as_told = self.told.len() == ways.len() && self.told.iter().zip(ways).all(same);
        let cut_off = control_gone && !self.told_of_control && !ways.is_empty();
        !as_told || cut_off || elsewhere && !self.told_of_others && ways.is_empty()
    }

    /// The links that the tunnel process was told of, best first.
    pub fn ways(&self) -> &[Way] {
        &self.told
    }

    /// It was told so.
    pub fn handle_told(&mut self, ways: Vec<Way>, control_gone: bool, elsewhere: bool) {
        self.told_of_control = control_gone && !ways.is_empty();
        self.told_of_others = elsewhere && ways.is_empty();
        self.told = ways;
    }
}

/// UDP sockets for these ways; those of links that went meanwhile are left out.
pub fn open(ways: Vec<Way>, peer: SocketAddr) -> (Vec<Way>, Vec<UdpSocket>) {
    let open = |way: Way| match udp::bind_on(Some(&way.name), peer) {
        Ok(socket) => Some((way, socket)),
        Err(error) => {
            log::debug!("no UDP socket on {}: {error}", way.name);
            None
        }
    };
    ways.into_iter().filter_map(open).unzip()
}

/// What the tunnel process is told of them.
pub fn names(ways: &[Way]) -> Vec<CarrierName> {
    ways.iter()
        .map(|way| CarrierName { name: way.name.clone(), index: way.index, source: Some(way.source) })
        .collect()
}

/// A link loses its routes and then its addresses, or gets them, within this time.
const TOGETHER: Duration = Duration::from_millis(5);
/// Addresses and routes of one move come within this time of each other.
const QUIET: Duration = Duration::from_millis(50);
/// For events that never end.
const LONGEST: Duration = Duration::from_millis(500);
/// Something was removed while it was looked at, or worse.
const AGAIN: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    const START: Time = Time::from_nanos(0);

    fn after(millis: u64) -> Time {
        START + Duration::from_millis(millis)
    }

    #[test]
    fn the_first_event_is_looked_at_what_came_with_it_and_the_quiet_after_the_last() {
        let mut settle = Settle::default();
        assert_eq!(settle.poll_timeout(), None);
        assert!(settle.handle_event(after(0)));
        assert!(!settle.handle_event(after(1)));
        assert_eq!(settle.poll_timeout(), Some(after(5)));
        assert!(settle.handle_timeout(after(5)));
        assert!(!settle.handle_event(after(30)));
        assert!(!settle.handle_timeout(after(50)), "30 ms ago there was another");
        assert_eq!(settle.poll_timeout(), Some(after(80)));
        assert!(settle.handle_timeout(after(80)));
        assert!(!settle.handle_timeout(after(200)));
        assert!(settle.handle_event(after(300)), "the next move");
    }

    #[test]
    fn events_without_end_are_looked_at_a_few_times_a_second() {
        let mut settle = Settle::default();
        let looks = (0..2_000).filter(|millis| {
            let timed = settle.handle_timeout(after(*millis));
            settle.handle_event(after(*millis)) || timed
        });
        assert!((6..=15).contains(&looks.count()));
        settle.handle_failed(after(3_000));
        assert_eq!(settle.poll_timeout(), Some(after(4_000)));
    }

    #[test]
    fn only_news_is_told() {
        let way = |index, source: &str, metric| Way {
            index,
            name: format!("eth{index}"),
            source: source.parse().expect("an address"),
            metric,
        };
        let (a, b) = (way(2, "192.0.2.2", 100), way(3, "198.51.100.3", 200));
        let address = SocketAddr::from(([203, 0, 113, 1], 55555));
        let told = vec![a.clone(), b.clone()];
        let mut connection = Connection {
            place: 0,
            address,
            local: a.source,
            link: None,
            told,
            told_of_control: false,
            told_of_others: false,
        };
        for (ways, control_gone, news) in [
            (vec![a.clone(), b.clone()], false, false),
            (vec![way(2, "192.0.2.2", 900), b.clone()], false, false),
            (vec![b.clone(), a.clone()], false, true),
            (vec![a.clone()], false, true),
            (vec![], false, true),
            (vec![way(2, "192.0.2.9", 100), b.clone()], false, true),
            (vec![a.clone(), b.clone()], true, true),
        ] {
            assert_eq!(connection.is_news(&ways, control_gone, false), news, "{ways:?}");
        }
        // Without a way there is nothing to be done about the control connection yet.
        connection.handle_told(vec![], true, false);
        assert!(!connection.is_news(&[], true, false));
        // But there may be another server.
        assert!(connection.is_news(&[], true, true));
        connection.handle_told(vec![], true, true);
        assert!(!connection.is_news(&[], true, true));
        let only_b = vec![b];
        assert!(connection.is_news(&only_b, true, true));
        connection.handle_told(only_b.clone(), true, true);
        assert!(!connection.is_news(&only_b, true, true));
        assert!(connection.is_news(&[], true, true));
    }

    #[test]
    fn a_control_connection_is_as_good_as_its_address_and_link() {
        let way = |index, source: [u8; 4]| Way {
            index,
            name: format!("eth{index}"),
            source: source.into(),
            metric: 0,
        };
        let ways = [way(2, [192, 0, 2, 2]), way(3, [198, 51, 100, 3])];
        let connection = |local: [u8; 4], link: Option<&str>| Connection {
            place: 0,
            address: SocketAddr::from(([203, 0, 113, 1], 55555)),
            local: local.into(),
            link: link.map(str::to_owned),
            told: Vec::new(),
            told_of_control: false,
            told_of_others: false,
        };
        for (local, link, holders, gone) in [
            ([192, 0, 2, 2], Some("eth2"), &[2][..], false),
            ([192, 0, 2, 2], Some("eth2"), &[], true),
            ([192, 0, 2, 9], Some("eth2"), &[2], false),
            ([192, 0, 2, 2], Some("eth4"), &[4], true),
            ([192, 0, 2, 9], None, &[2], false),
            ([192, 0, 2, 2], None, &[1], false),
            ([192, 0, 2, 9], None, &[4], true),
            ([192, 0, 2, 2], None, &[], true),
        ] {
            let said = connection(local, link).control_gone(&ways, holders);
            assert_eq!(said, gone, "{local:?} {link:?} {holders:?}");
        }
    }
}
