//! Whether a tunnel is in use: how long ago it last carried an inner packet of somebody's, either way.

use std::time::Duration;

use ipnet::IpNet;

use crate::segment::{is_broadcast, is_from, is_noise};
use crate::time::Time;

/// Measures how long nothing was carried, to a second: what it calls over has been idle for the limit, and a second at
/// the most.
///
/// The usual packet of a busy tunnel costs it one comparison: for a second after one that counts, no other is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    limit: Option<Duration>,
    /// One that counts came then; for a [`GRAIN`] others may have come.
    last: Time,
}

impl Idle {
    /// In use just now; over after `limit` without use, or never.
    pub fn new(limit: Option<Duration>, now: Time) -> Idle {
        Idle { limit, last: now }
    }

    /// From now on this is the limit.
    pub fn set_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// An inner packet or super-packet came from either end. What hosts and routers send of themselves doesn't count
    /// ([`is_noise`]), nor what goes to everybody in one of `networks`.
    #[inline]
    pub fn carried(&mut self, now: Time, packet: &[u8], networks: &[IpNet]) {
        if now.since(self.last) >= GRAIN && !is_noise(packet) && !is_broadcast(packet, networks) {
            self.last = now;
        }
    }

    /// A client sends one: it counts only if it comes from one of the client's `own` networks. The server drops all others,
    /// such as what the kernel says to strangers who try other addresses of the host.
    #[inline]
    pub fn sent(&mut self, now: Time, packet: &[u8], networks: &[IpNet], own: &[IpNet]) {
        if now.since(self.last) >= GRAIN && is_from(packet, own) {
            self.carried(now, packet, networks);
        }
    }

    /// It is in use, whatever it carries.
    pub fn touch(&mut self, now: Time) {
        self.last = self.last.max(now);
    }

    /// When it was last known to be in use.
    pub fn last(&self) -> Time {
        self.last
    }

    /// When it will be over if nothing comes.
    pub fn poll_timeout(&self) -> Option<Time> {
        Some(self.last + self.limit? + GRAIN)
    }

    /// It has been idle for the limit.
    pub fn is_over(&self, now: Time) -> bool {
        self.poll_timeout().is_some_and(|at| now >= at)
    }
}

const GRAIN: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: [u8; 28] = [
        0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 192, 0, 2, 1, 0x12, 0x34, 0, 53, 0, 8, 0, 0,
    ];

    fn at(millis: u64) -> Time {
        Time::default() + Duration::from_millis(millis)
    }

    fn noise() -> [u8; 28] {
        let mut packet = DATA;
        packet[16..20].copy_from_slice(&[224, 0, 0, 251]);
        packet
    }

    #[test]
    fn over_after_the_limit_and_a_second_at_the_most() {
        let mut idle = Idle::new(Some(Duration::from_secs(10)), at(0));
        assert_eq!(idle.poll_timeout(), Some(at(11_000)));
        // This one is taken for granted, so the limit counts from it.
        idle.carried(at(999), &DATA, &[]);
        assert_eq!(idle.poll_timeout(), Some(at(11_000)));
        idle.carried(at(1_000), &DATA, &[]);
        assert_eq!(idle.poll_timeout(), Some(at(12_000)));
        assert!(!idle.is_over(at(11_999)));
        assert!(idle.is_over(at(12_000)));
        // Late, but in time.
        idle.carried(at(60_000), &DATA, &[]);
        assert!(!idle.is_over(at(70_999)));
    }

    #[test]
    fn noise_doesnt_count_and_hides_nothing() {
        let mut idle = Idle::new(Some(Duration::from_secs(10)), at(0));
        for second in 1..30 {
            idle.carried(at(second * 1_000), &noise(), &[]);
        }
        assert_eq!(idle.poll_timeout(), Some(at(11_000)));
        idle.carried(at(30_000), &noise(), &[]);
        idle.carried(at(30_000), &DATA, &["192.0.2.0/31".parse().expect("a network")]);
        let mut broadcast = DATA;
        broadcast[19] = 255;
        idle.carried(at(35_000), &broadcast, &["192.0.2.0/24".parse().expect("a network")]);
        assert_eq!(idle.poll_timeout(), Some(at(41_000)));
    }

    #[test]
    fn without_a_limit_it_is_never_over_and_measures_all_the_same() {
        let own = |net: &str| [net.parse().expect("a network")];
        let mut idle = Idle::new(Some(Duration::from_secs(10)), at(0));
        idle.sent(at(2_000), &DATA, &[], &own("10.9.0.3/32"));
        idle.sent(at(2_000), &noise(), &[], &own("0.0.0.0/0"));
        assert_eq!(idle.poll_timeout(), Some(at(11_000)), "of strangers");
        idle.sent(at(3_000), &DATA, &[], &own("10.9.0.2/32"));
        assert_eq!(idle.poll_timeout(), Some(at(14_000)));

        let mut idle = Idle::new(None, at(0));
        assert_eq!(idle.poll_timeout(), None);
        assert!(!idle.is_over(at(1 << 40)));
        idle.carried(at(5_000), &DATA, &[]);
        idle.set_limit(Some(Duration::from_secs(1)));
        assert_eq!(idle.poll_timeout(), Some(at(7_000)));
        idle.touch(at(6_000));
        idle.touch(at(5_500));
        assert_eq!(idle.last(), at(6_000));
    }
}
