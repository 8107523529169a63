//! The window against replays (RFC 6479): which counters of one epoch and direction were seen.
//!
//! ```text
//!            newest - WINDOW              newest
//!   too old  |  seen or not: one bit each |  new
//! ```

/// Counters this far behind the newest, or farther, are refused unseen.
pub const WINDOW: u64 = (WORDS as u64 - 1) * 64;
const WORDS: usize = 256;

/// The window. Call [`Window::check`] before authenticating, [`Window::commit`] only after.
#[derive(Clone)]
pub struct Window {
    /// One above the newest counter committed; 0 where there is none.
    next: u64,
    /// A ring of bits: counter c is bit c mod 64 of word (c / 64) mod WORDS.
    seen: Box<[u64; WORDS]>,
}

/// Why a counter is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replayed {
    /// Seen before.
    Duplicate,
    /// Behind the window: can't be told.
    TooOld,
}

impl Default for Window {
    fn default() -> Window {
        Window { next: 0, seen: Box::new([0; WORDS]) }
    }
}

impl Window {
    /// Whether `counter` may be new. Changes nothing.
    pub fn check(&self, counter: u64) -> Result<(), Replayed> {
        if counter >= self.next {
            return Ok(());
        }
        if self.next - counter > WINDOW {
            return Err(Replayed::TooOld);
        }
        if self.seen[word(counter)] & bit(counter) != 0 {
            return Err(Replayed::Duplicate);
        }
        Ok(())
    }

    /// Notes an authenticated `counter` that [`Window::check`] let pass, and says whether it is above all
    /// before it.
    pub fn commit(&mut self, counter: u64) -> bool {
        let newest = counter >= self.next;
        if newest {
            // Words between the old newest and this one hold bits of long ago.
            let old = self.next.wrapping_sub(1) / 64;
            let fresh = counter / 64;
            let from = if self.next == 0 { 0 } else { old + 1 };
            if fresh >= from {
                let count = (fresh - from + 1).min(WORDS as u64);
                for w in 0..count {
                    self.seen[((fresh - w) % WORDS as u64) as usize] = 0;
                }
            }
            self.next = counter + 1;
        }
        self.seen[word(counter)] |= bit(counter);
        newest
    }
}

fn word(counter: u64) -> usize {
    (counter / 64) as usize % WORDS
}

fn bit(counter: u64) -> u64 {
    1 << (counter % 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// What the window must agree with: every counter ever, and the newest.
    #[derive(Default)]
    struct Naive {
        seen: HashSet<u64>,
        next: u64,
    }

    impl Naive {
        fn accept(&mut self, counter: u64) -> Result<bool, Replayed> {
            if counter < self.next && self.next - counter > WINDOW {
                return Err(Replayed::TooOld);
            }
            if !self.seen.insert(counter) {
                return Err(Replayed::Duplicate);
            }
            let newest = counter >= self.next;
            self.next = self.next.max(counter + 1);
            Ok(newest)
        }
    }

    fn agree(counters: impl IntoIterator<Item = u64>) {
        let (mut window, mut naive) = (Window::default(), Naive::default());
        for counter in counters {
            let got = window.check(counter).map(|()| window.commit(counter));
            assert_eq!(got, naive.accept(counter), "counter {counter}");
        }
    }

    #[test]
    fn it_is_as_long_as_the_protocol_says() {
        assert_eq!(WINDOW, 16_320);
    }

    #[test]
    fn edges() {
        agree([0, 0, 1, 1, 63, 64, 64, 65, WINDOW, WINDOW, 0, 2, WINDOW + 1, 2, 3, 1]);
        agree([WINDOW * 3, 0, WINDOW * 2, WINDOW * 2 + 1, WINDOW * 2 + 1, WINDOW * 3 - WINDOW + 1]);
        let top = crate::wire::data::COUNTER_LIMIT - 1;
        agree([top, top, top - WINDOW, top - WINDOW + 1, top - 1]);
        agree((0..WINDOW * 2).step_by(64).chain(0..WINDOW * 2));
    }

    #[test]
    fn a_word_that_is_used_again_is_empty() {
        let lap = WINDOW + 64;
        for ahead in [0, 64, 640, lap] {
            // Every bit is set; then one in a word of the next lap, with room before it.
            agree((0..lap).chain([lap + ahead + 10, lap + ahead + 5, lap + ahead, lap + ahead + 5]));
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_model(
            steps in prop::collection::vec((any::<bool>(), 0u64..40_000), 1..400),
        ) {
            let mut base = 0u64;
            let mut counters = Vec::new();
            for (forward, by) in steps {
                if forward { base += by / 8 } ;
                counters.push(base.saturating_sub(if forward { 0 } else { by }));
            }
            agree(counters);
        }
    }
}
