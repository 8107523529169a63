//! The window against replays, beside a set of everything that was seen.

use std::collections::BTreeSet;

use tunguard::replay::{Replayed, WINDOW, Window};

use super::input::Input;

/// Counters near the newest, far ahead, far behind and at the ends.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let mut window = Window::default();
    let (mut seen, mut next) = (BTreeSet::new(), 0u64);
    while !input.is_empty() {
        let step = input.u8();
        let by = u64::from(input.u16());
        let counter = match step & 7 {
            0..3 => next,
            3 => next.saturating_add(by),
            4 => next.saturating_sub(by),
            5 => next.saturating_sub(WINDOW - 8).saturating_add(by & 15),
            6 => next.saturating_add(by << (step >> 3)),
            _ => input.u64(),
        };
        // What is never sent; COUNTER_LIMIT is far below.
        if counter == u64::MAX {
            continue;
        }
        let expected = if counter >= next {
            Ok(())
        } else if next - counter > WINDOW {
            Err(Replayed::TooOld)
        } else if seen.contains(&counter) {
            Err(Replayed::Duplicate)
        } else {
            Ok(())
        };
        assert_eq!(window.check(counter), expected, "{counter} after {next}");
        // A check alone changes nothing: the tag may be wrong.
        if expected.is_ok() && step & 0x80 == 0 {
            assert_eq!(window.commit(counter), counter >= next);
            seen.insert(counter);
            next = next.max(counter + 1);
        }
    }
}
