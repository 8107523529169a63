//! Bounds on what a peer or a process can make us do.

use std::time::Duration;

use crate::time::Time;

/// How many of something there may be: so many at once, and one more every so often.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    left: u32,
    burst: u32,
    every: Duration,
    since: Time,
}

impl Budget {
    /// A full budget.
    pub fn new(burst: u32, every: Duration, now: Time) -> Budget {
        Budget { left: burst, burst, every, since: now }
    }

    /// Takes one; `false` where none is left.
    pub fn take(&mut self, now: Time) -> bool {
        let earned = now.since(self.since).as_nanos() / self.every.as_nanos().max(1);
        if earned > 0 {
            self.left = self.left.saturating_add(u32::try_from(earned).unwrap_or(u32::MAX)).min(self.burst);
            self.since = now;
        }
        let any = self.left > 0;
        self.left -= u32::from(any);
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_refills_with_time() {
        let start = Time::default();
        let mut budget = Budget::new(2, Duration::from_secs(1), start);
        assert!(budget.take(start) && budget.take(start) && !budget.take(start));
        assert!(!budget.take(start + Duration::from_millis(999)));
        assert!(budget.take(start + Duration::from_secs(1)));
        assert!(!budget.take(start + Duration::from_secs(1)));
        let much_later = start + Duration::from_secs(1000);
        assert!(budget.take(much_later) && budget.take(much_later) && !budget.take(much_later));
    }
}
