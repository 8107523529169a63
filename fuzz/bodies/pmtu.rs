//! The search for a path's MTU: whatever answers, refusals and lies come, it stays within its bounds, asks a bounded
//! number of times, and ends at what the path carries when the network is honest again.

use std::time::Duration;

use tunguard::pmtu::{BASE, Search, State};
use tunguard::time::Time;

use super::input::Input;

/// Events on one path.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let mut now = Time::default() + Duration::from_secs(1);
    let max = usize::from(input.u16());
    let most = max.clamp(BASE, 65_507);
    let mut search = Search::new(now, max);
    let mut asked: Vec<(usize, Time)> = Vec::new();
    let mut width = most;
    while !input.is_empty() {
        let step = input.u8();
        match step & 7 {
            0 | 1 if !asked.is_empty() => {
                let (size, sent) = asked.remove(input.place(asked.len()));
                if size <= width {
                    search.handle_answer(now, size, now - sent);
                }
            }
            2 => search.handle_sent(now, usize::from(input.u16())),
            3 => search.handle_too_big(now, usize::from(input.u16())),
            4 => {
                let size = asked.last().map_or(0, |(size, _)| *size);
                search.handle_refused(now, size);
            }
            5 => search.confirm(now),
            6 => width = usize::from(input.u16()),
            _ => {
                let wait = Duration::from_millis(u64::from(input.u16()) << (step >> 5));
                now = search.poll_timeout().filter(|_| step & 8 != 0).unwrap_or(now + wait).max(now);
            }
        }
        settle(&mut search, now, most, &mut asked);
    }
    // From now on every probe that fits is answered.
    let width = width.clamp(BASE, most);
    asked.clear();
    for _ in 0..400 {
        now = search.poll_timeout().unwrap_or(now + Duration::from_secs(1)).max(now);
        search.handle_sent(now, most);
        settle(&mut search, now, most, &mut asked);
        let sent = now;
        now = now + Duration::from_millis(10);
        for (size, _) in std::mem::take(&mut asked) {
            if size <= width {
                search.handle_answer(now, size, now - sent);
            }
        }
        settle(&mut search, now, most, &mut asked);
    }
    assert!(search.current() <= width, "{} of {width}", search.current());
    assert!(matches!(search.state(), State::SearchComplete | State::Searching), "{:?}", search.state());
    // Less than a percent isn't worth a probe, nor is it before ten minutes are over.
    assert!(search.current() + width / 100 + 1 > width, "{} of {width}", search.current());
}

fn settle(search: &mut Search, now: Time, most: usize, asked: &mut Vec<(usize, Time)>) {
    for round in 0.. {
        assert!(round < 16, "its deadline stays in the past");
        if search.poll_timeout().is_some_and(|at| at <= now) {
            search.handle_timeout(now);
        }
        let mut probes = 0;
        while let Some(size) = search.poll_probe(now) {
            probes += 1;
            assert!(probes <= 2, "more probes than it can have");
            assert!((BASE..=most).contains(&size), "a probe of {size} bytes");
            asked.push((size, now));
        }
        assert!((BASE..=most).contains(&search.current()));
        if search.poll_timeout().is_none_or(|at| at > now) {
            return;
        }
    }
}
