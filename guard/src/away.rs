//! Packets from the device that no session carries: whose they would be, and whether their sender is told that nobody
//! is there.
//!
//! The news comes in the name of the packet's destination, as it goes through the device: a packet with an address of
//! this host's would be a martian there, and the kernel would drop it.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use tunguard::budget::Budget;
use tunguard::time::Time;

use crate::accounts::GuardDrop;
use crate::leases::{Leases, Owner};

/// What becomes of a packet to `destination` that no session carries: as what it is counted, and whether its sender is
/// told.
pub fn judge(leases: &mut Leases, destination: IpAddr) -> (GuardDrop, bool) {
    match leases.miss(destination) {
        Owner::Away => (GuardDrop::Away, true),
        // It is about to have a session, or just had one: the next try may find it.
        Owner::Connecting => (GuardDrop::NoRoute, false),
        Owner::Nobody => (GuardDrop::NoRoute, true),
        Owner::Unknown => (GuardDrop::NoRoute, false),
    }
}

/// How many senders may be told, and how often: so many at all, and so many of each, so that none takes all of it.
pub struct News<Places = RandomState> {
    all: Budget,
    /// Of the senders that fall there.
    senders: Vec<Budget>,
    /// Nobody can choose where he falls.
    places: Places,
}

impl<Places: BuildHasher + Default> News<Places> {
    /// Nobody was told yet.
    pub fn new(now: Time) -> News<Places> {
        News {
            all: Budget::new(ALL_AT_ONCE, ALL_EVERY, now),
            senders: vec![Budget::new(AT_ONCE, EVERY, now); PLACES],
            places: Places::default(),
        }
    }

    /// Whether `sender` may be told now.
    pub fn take(&mut self, now: Time, sender: IpAddr) -> bool {
        // Whoever has an IPv6 address has a network of them.
        let sender = match sender {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
        };
        let place = self.places.hash_one(sender) as usize % PLACES;
        self.senders[place].take(now) && self.all.take(now)
    }
}

const ALL_AT_ONCE: u32 = 200;
const ALL_EVERY: Duration = Duration::from_millis(2);
const AT_ONCE: u32 = 10;
const EVERY: Duration = Duration::from_millis(100);
const PLACES: usize = 256;

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasherDefault, DefaultHasher};

    use super::*;

    /// The same places every time.
    type Fixed = BuildHasherDefault<DefaultHasher>;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn one_sender_has_a_few_at_once_and_ten_a_second() {
        let start = Time::default();
        let mut news = News::<Fixed>::new(start);
        let told = |news: &mut News<Fixed>, now, sender: &str, tries: usize| {
            (0..tries).filter(|_| news.take(now, ip(sender))).count()
        };
        assert_eq!(told(&mut news, start, "192.0.2.1", 1_000), 10);
        let later = start + Duration::from_secs(1);
        assert_eq!(told(&mut news, later, "192.0.2.1", 1_000), 10);
        // A network of IPv6 addresses counts as one.
        assert_eq!(told(&mut news, start, "fd01::1", 10) + told(&mut news, start, "fd01::2", 10), 10);
        assert!(news.take(start, ip("fd01:0:0:1::1")));
    }

    #[test]
    fn a_flood_of_one_leaves_enough_for_others_and_one_of_many_is_bounded() {
        let start = Time::default();
        let mut news = News::<Fixed>::new(start);
        for millis in 0..1_000 {
            news.take(start + Duration::from_millis(millis), ip("192.0.2.1"));
        }
        let later = start + Duration::from_secs(1);
        let others = (0..100u8).filter(|n| news.take(later, IpAddr::from([10, 9, 0, *n]))).count();
        assert!(others >= 98, "{others}: but for those that fall where the flood does");
        let all = (0..10_000u32).filter(|n| news.take(later, IpAddr::from(n.to_be_bytes()))).count();
        assert!(all + others <= 200, "{all}");
    }
}
