//! Time as the cores see it: an argument, never read inside.

use std::ops::{Add, Sub};
use std::time::Duration;

/// A point in time, in nanoseconds since boot, suspend included (`CLOCK_BOOTTIME`); tests start at zero and
/// advance it by hand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    /// The point `nanos` nanoseconds after boot.
    pub const fn from_nanos(nanos: u64) -> Time {
        Time(nanos)
    }

    /// Time since `earlier`, zero if `earlier` is later.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Time;

    fn add(self, by: Duration) -> Time {
        Time(self.0.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Time> for Time {
    type Output = Duration;

    fn sub(self, earlier: Time) -> Duration {
        self.since(earlier)
    }
}
