//! An even pace.

use std::time::{Duration, Instant};

/// How many are due, as time goes by.
pub struct Pace {
    start: Instant,
    rate: u64,
    time: Duration,
    done: u64,
}

impl Pace {
    /// `rate` per second, for `time`, from now on.
    pub fn new(rate: u64, time: Duration) -> Pace {
        Pace { start: Instant::now(), rate, time, done: 0 }
    }

    /// How many to send now, at most `most`; waits until there are some. `None` when the time is over. Who is too slow
    /// doesn't make up for it.
    pub fn next(&mut self, most: u64) -> Option<u64> {
        loop {
            let passed = self.start.elapsed();
            if passed >= self.time {
                return None;
            }
            let due = (passed.as_secs_f64() * self.rate as f64) as u64;
            if due > self.done {
                let now = (due - self.done).min(most);
                self.done = due;
                return Some(now);
            }
            std::thread::sleep(TICK);
        }
    }
}

const TICK: Duration = Duration::from_millis(1);
