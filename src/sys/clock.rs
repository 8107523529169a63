//! The clock the shells read.

use nix::time::{ClockId, clock_gettime};

use crate::time::Time;

/// Now, by `CLOCK_BOOTTIME`: goes on during suspend, never jumps.
pub fn now() -> Time {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every Linux since 2.6.39 has CLOCK_BOOTTIME");
    Time::from_nanos(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}
