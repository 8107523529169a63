//! Whether a session's queue stands: CoDel (RFC 8289), asked when a batch comes rather than when it leaves, as what
//! leaves is not in our hands.

use std::time::Duration;

use tunguard::time::Time;

/// Watches the time that the oldest batch has waited.
#[derive(Debug)]
pub struct Codel {
    target: Duration,
    interval: Duration,
    /// The wait was above the target ever since.
    above_since: Option<Time>,
    dropping: bool,
    /// Batches dropped since it began to drop.
    count: u32,
    next: Time,
}

impl Default for Codel {
    fn default() -> Codel {
        Codel::with_target(TARGET)
    }
}

impl Codel {
    /// For a queue that leaves so slowly that one batch takes `batch`: what a single batch does is no standing queue
    /// (section 4.2 of the RFC).
    pub fn for_batches(batch: Duration) -> Codel {
        Codel::with_target(TARGET.max(batch * 3 / 2))
    }

    fn with_target(target: Duration) -> Codel {
        let interval = INTERVAL.max(target * 2);
        let (above_since, next) = (None, Time::default());
        Codel { target, interval, above_since, dropping: false, count: 0, next }
    }

    /// Whether a batch that comes now is to be dropped. `waited`: how long the oldest one has, if there is one.
    pub fn refuses(&mut self, now: Time, waited: Option<Duration>) -> bool {
        if waited.is_none_or(|waited| waited < self.target) {
            self.above_since = None;
            self.dropping = false;
            return false;
        }
        let since = *self.above_since.get_or_insert(now);
        if !self.dropping {
            if now.since(since) < self.interval {
                return false;
            }
            // Soon again after it dropped before: where it left off, nearly (section 5.4).
            let soon = now.since(self.next) < 16 * self.interval;
            self.count = if soon && self.count > 2 { self.count - 2 } else { 1 };
            self.dropping = true;
            self.next = now + self.pause();
            return true;
        }
        if now < self.next {
            return false;
        }
        self.count += 1;
        self.next = self.next + self.pause();
        true
    }

    fn pause(&self) -> Duration {
        self.interval.div_f64(f64::from(self.count).sqrt())
    }
}

/// Section 4.3 and 4.4 of the RFC.
const TARGET: Duration = Duration::from_millis(5);
const INTERVAL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    /// Drops within `millis`, a batch each millisecond, when the oldest has always waited for `waited`.
    fn drops(codel: &mut Codel, from: u64, millis: u64, waited: u64) -> u64 {
        let at = |ms: u64| Time::from_nanos((from + ms) * 1_000_000);
        (0..millis).filter(|ms| codel.refuses(at(*ms), Some(Duration::from_millis(waited)))).count() as u64
    }

    #[test]
    fn short_queues_and_bursts_are_left_alone() {
        let mut codel = Codel::default();
        assert_eq!(drops(&mut codel, 0, 10_000, 4), 0);
        // Long, but gone within the interval: a burst, or a worker that wasn't on a processor.
        for burst in 0..20 {
            assert_eq!(drops(&mut codel, 10_000 + burst * 100, 99, 80), 0);
            assert!(!codel.refuses(Time::from_nanos((10_000 + burst * 100 + 99) * 1_000_000), None));
        }
    }

    #[test]
    fn a_slow_queue_is_given_the_time_of_its_batches() {
        let mut codel = Codel::for_batches(Duration::from_millis(40));
        assert_eq!(drops(&mut codel, 0, 10_000, 59), 0);
        assert!(drops(&mut codel, 10_000, 2_000, 61) > 5);
        let mut fast = Codel::for_batches(Duration::from_micros(100));
        assert_eq!((fast.target, fast.interval), (TARGET, INTERVAL));
        assert!(drops(&mut fast, 0, 1_000, 20) > 5);
    }

    #[test]
    fn a_standing_queue_loses_more_and_more_until_it_is_gone() {
        let mut codel = Codel::default();
        let first = drops(&mut codel, 0, 1000, 20);
        let second = drops(&mut codel, 1000, 1000, 20);
        assert!((10..40).contains(&first), "{first} in the first second");
        assert!(second > first + 10, "{second} in the next, {first} in the one before");
        assert_eq!(drops(&mut codel, 2000, 1000, 1), 0);
        // Again soon: the rate goes on nearly where it was.
        let again = drops(&mut codel, 3000, 300, 20);
        assert!(again > 5, "{again} of 200 ms");
    }
}
