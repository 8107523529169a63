//! How much a client may send or be sent: a rate, and the token bucket that holds to it.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::time::Time;

/// Bits per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rate(u64);

/// Limits of one client, either way; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// To the client.
    pub down: Option<Rate>,
    /// From the client.
    pub up: Option<Rate>,
}

impl Rate {
    /// So many bits per second, from [`Rate::LEAST`] to [`Rate::MOST`].
    pub fn from_bits(bits: u64) -> Option<Rate> {
        (Rate::LEAST.0..=Rate::MOST.0).contains(&bits).then_some(Rate(bits))
    }

    /// Bits per second.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Bytes that pass in `time`.
    pub fn bytes_in(self, time: Duration) -> u64 {
        u64::try_from(u128::from(self.0) * time.as_nanos() / BYTE as u128).unwrap_or(u64::MAX)
    }

    /// How long `bytes` take.
    pub fn time_of(self, bytes: u64) -> Duration {
        Duration::from_nanos(
            u64::try_from(u128::from(bytes) * BYTE as u128 / u128::from(self.0)).unwrap_or(u64::MAX),
        )
    }

    /// What may pass at once after a pause: what passes in 100 ms, and never less than 64 KiB.
    pub fn burst(self) -> u64 {
        self.bytes_in(BURST_TIME).max(BURST_LEAST)
    }

    /// A slower client could hardly finish a handshake.
    pub const LEAST: Rate = Rate(64_000);
    /// Beyond what a device here carries.
    pub const MOST: Rate = Rate(100_000_000_000);
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) =
            UNITS.into_iter().rev().find(|(unit, _)| self.0.is_multiple_of(*unit)).unwrap_or((1, "bit/s"));
        write!(f, "{}{name}", self.0 / unit)
    }
}

/// A token bucket. What is passed may be larger than what is left: the rest is owed, and nothing passes until it is
/// paid. So no packet is too large to pass, and none waits behind smaller ones for more than its turn.
///
/// Within any time `t` there pass at most the burst, `t` times the rate, and one packet. Counted in whole units of a
/// bit's billionth, so that nothing is lost in rounding however often it is asked.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: Rate,
    /// The most there can be.
    full: i128,
    /// What is left; below zero it is owed.
    left: i128,
    updated: Time,
}

impl Bucket {
    /// A full one, with this burst in bytes.
    pub fn new(rate: Rate, burst: u64, now: Time) -> Bucket {
        let full = i128::from(burst.max(1)) * BYTE;
        Bucket { rate, full, left: full, updated: now }
    }

    /// Whether something may pass now.
    pub fn is_ready(&mut self, now: Time) -> bool {
        self.refill(now);
        self.left > 0
    }

    /// Whether nothing is owed, and the whole burst is there.
    pub fn is_full(&mut self, now: Time) -> bool {
        self.refill(now);
        self.left == self.full
    }

    /// `bytes` pass.
    pub fn take(&mut self, bytes: usize) {
        self.left -= bytes as i128 * BYTE;
    }

    /// Lets `bytes` pass if they may.
    pub fn pass(&mut self, now: Time, bytes: usize) -> bool {
        let ready = self.is_ready(now);
        if ready {
            self.take(bytes);
        }
        ready
    }

    /// When something may pass again: where it may now, that was in the past.
    pub fn ready_at(&self) -> Time {
        let owed = u128::try_from(1 - self.left).unwrap_or(0);
        let nanos = owed.div_ceil(u128::from(self.rate.0));
        self.updated + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn refill(&mut self, now: Time) {
        let earned = i128::try_from(now.since(self.updated).as_nanos()).unwrap_or(i128::MAX);
        self.left = earned.saturating_mul(i128::from(self.rate.0)).saturating_add(self.left).min(self.full);
        // A clock that stands still or is read out of order earns nothing twice.
        self.updated = self.updated.max(now);
    }
}

/// Units of a rate, as files spell them.
pub const UNITS: [(u64, &str); 4] =
    [(1, "bit/s"), (1_000, "Kbit/s"), (1_000_000, "Mbit/s"), (1_000_000_000, "Gbit/s")];
/// A byte, in a bit's billionths.
const BYTE: i128 = 8 * 1_000_000_000;
/// A few round trips: a TCP flow that is policed with less gets less than its rate.
const BURST_TIME: Duration = Duration::from_millis(100);
/// A super-packet.
const BURST_LEAST: u64 = 65_536;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rate(bits: u64) -> Rate {
        Rate::from_bits(bits).expect("a rate")
    }

    #[test]
    fn what_is_larger_than_the_burst_passes_and_is_paid_for() {
        let start = Time::default();
        let mut bucket = Bucket::new(rate(8_000_000), 1_000, start);
        assert!(bucket.pass(start, 65_000), "more than there is");
        assert!(!bucket.pass(start, 1));
        // 64,000 bytes are owed, at a byte each microsecond, and then something has to be there.
        assert_eq!(bucket.ready_at(), start + Duration::from_nanos(64_000_001));
        assert!(!bucket.is_ready(start + Duration::from_micros(64_000)));
        assert!(bucket.pass(start + Duration::from_nanos(64_000_001), 1));
        assert!(!bucket.is_full(start + Duration::from_millis(65)));
        assert!(bucket.is_full(start + Duration::from_secs(1)));
    }

    #[test]
    fn a_pause_earns_one_burst_and_an_old_time_nothing() {
        let mut bucket = Bucket::new(rate(8_000_000), 10_000, Time::default());
        let late = Time::from_nanos(u64::MAX);
        let passed = (0..100).filter(|_| bucket.pass(late, 1_000)).count();
        assert_eq!(passed, 10);
        assert!(!bucket.pass(Time::default(), 1) && !bucket.pass(late, 1));
    }

    #[test]
    fn rates_are_shown_as_they_are_written() {
        for (bits, text) in [
            (64_000, "64Kbit/s"),
            (64_001, "64001bit/s"),
            (20_000_000, "20Mbit/s"),
            (1_500_000, "1500Kbit/s"),
            (Rate::MOST.0, "100Gbit/s"),
        ] {
            assert_eq!(rate(bits).to_string(), text);
        }
        assert_eq!((Rate::from_bits(63_999), Rate::from_bits(Rate::MOST.0 + 1)), (None, None));
    }

    proptest! {
        /// Whatever is offered and when: what passes within any time is bounded, and where enough is offered the rate
        /// is reached, however often and at whatever odd moments it is asked.
        #[test]
        fn the_rate_is_held_and_reached(
            bits in 64_000u64..10_000_000_000,
            burst in 1u64..1_000_000,
            steps in prop::collection::vec((0u64..30_000_000, 1usize..66_000), 1..400),
        ) {
            let rate = rate(bits);
            let mut bucket = Bucket::new(rate, burst, Time::default());
            let mut now = 0u64;
            // Of each that passed: when, and bytes.
            let mut passed: Vec<(u64, u64)> = Vec::new();
            let largest = steps.iter().map(|(_, bytes)| *bytes as u64).max().unwrap_or(0);
            for (wait, bytes) in &steps {
                now += wait;
                let at = Time::from_nanos(now);
                let was_due = bucket.ready_at() <= at;
                let passes = bucket.pass(at, *bytes);
                prop_assert_eq!(passes, was_due, "it passes when it was said to");
                if passes {
                    passed.push((now, *bytes as u64));
                }
            }
            for first in 0..passed.len() {
                let mut sum = 0u128;
                for (at, bytes) in &passed[first..] {
                    sum += u128::from(*bytes) * BYTE as u128;
                    let earned = u128::from(at - passed[first].0) * u128::from(bits);
                    prop_assert!(sum <= earned + u128::from(burst + largest) * BYTE as u128);
                }
            }
        }

        #[test]
        fn who_always_wants_more_gets_the_rate_without_drift(
            bits in 64_000u64..1_000_000_000,
            burst in 1u64..100_000,
            sizes in prop::collection::vec(1usize..66_000, 1..20),
        ) {
            let mut bucket = Bucket::new(rate(bits), burst, Time::default());
            let mut now = Time::default();
            let mut sum = 0u128;
            // Each at the very moment that was named: at most a nanosecond is lost each time.
            for size in sizes.iter().cycle().take(2_000) {
                now = now.max(bucket.ready_at());
                prop_assert!(bucket.pass(now, *size), "nobody starves");
                sum += *size as u128 * BYTE as u128;
            }
            let paid = u128::from(now.since(Time::default()).as_nanos() as u64) * u128::from(bits) + u128::from(burst) * BYTE as u128;
            let last = *sizes.iter().max().expect("some") as u128 * BYTE as u128;
            prop_assert!(sum <= paid + last);
            prop_assert!(sum + 2_000 * u128::from(bits) >= paid.saturating_sub(u128::from(burst) * BYTE as u128), "it loses no time");
        }
    }
}
