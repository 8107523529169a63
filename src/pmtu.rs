//! How large a datagram may be on one path: path MTU discovery by probing (RFC 8899), with no I/O and no clock.
//!
//! ```text
//!            answered               all tried
//!   Base ------------> Searching <-------------> SearchComplete
//!    | ^                   |      raise timer          |
//!    | +--- 3 confirmations of the size unanswered ----+
//!    v
//!  Error  (not even BASE is answered; its answer leads to Searching)
//! ```
//!
//! Sizes are UDP payloads in bytes. A probe is a datagram of exactly that size which nobody may fragment, and which
//! the peer answers with a short one.

use std::time::Duration;

use crate::time::Time;

/// The search on one path; a new path gets a new one.
///
/// - getters: [`current`](Search::current), [`state`](Search::state)
/// - `handle_*`: [`handle_answer`](Search::handle_answer), [`handle_sent`](Search::handle_sent),
///   [`handle_too_big`](Search::handle_too_big), [`handle_refused`](Search::handle_refused),
///   [`handle_timeout`](Search::handle_timeout)
/// - command: [`confirm`](Search::confirm)
/// - `poll_*`: [`poll_probe`](Search::poll_probe), [`poll_timeout`](Search::poll_timeout)
///
/// After [`new`](Search::new) and each `handle_*` or command, send what `poll_probe` asks for until it returns
/// `None`, then wait until `poll_timeout`.
#[derive(Clone, Debug)]
pub struct Search {
    max: usize,
    current: usize,
    state: State,
    /// The smallest size that failed in this search; `max + 1` where none did.
    too_large: usize,
    /// What to try before anything else.
    first: Option<usize>,
    /// What a Packet Too Big message said.
    hint: Option<usize>,
    /// Looks for more than `current`, or for BASE.
    probe: Option<Probe>,
    /// Looks whether `current` still goes.
    check: Option<Probe>,
    /// SearchComplete: when to look for more. Error: when to try BASE again.
    again: Option<Time>,
    /// How long to wait in Error.
    pause: Duration,
    /// When `current` was last proven, or BASE last given up.
    settled: Time,
    /// When Base was last entered: answers to probes sent before say nothing of the path as it is.
    restarted: Time,
    rtt: Option<Duration>,
    /// Large datagrams were sent since `current` was last proven.
    large: bool,
    /// `current` turned out not to go any more, and what goes isn't known yet.
    doubted: bool,
}

/// How far the search is (RFC 8899, section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Asking whether [`BASE`] goes.
    Base,
    /// It does; asking for more.
    Searching,
    /// The largest size is known.
    SearchComplete,
    /// Not even [`BASE`] is answered. It is used all the same, as data may be fragmented, and asked for again after
    /// 5 s, 10 s and so on, at most 600 s.
    Error,
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    size: usize,
    tries: u32,
    /// Until when the answer is waited for; `None`: to be sent.
    until: Option<Time>,
}

impl Probe {
    fn of(size: usize) -> Option<Probe> {
        Some(Probe { size, tries: 0, until: None })
    }

    /// Whether this was the last try. Otherwise it is to be sent again, if its time is over.
    fn is_lost(&mut self, now: Time) -> bool {
        let late = self.until.is_some_and(|until| now >= until);
        if late && self.tries < MAX_PROBES {
            self.until = None;
        }
        late && self.tries >= MAX_PROBES
    }
}

impl Search {
    /// A search on a path whose first link carries datagrams of `max` bytes: its MTU without IP and UDP header. Taken
    /// as [`BASE`] to 65,507.
    pub fn new(now: Time, max: usize) -> Search {
        let max = max.clamp(BASE, MOST);
        Search {
            max,
            current: BASE,
            state: State::Base,
            too_large: max + 1,
            first: None,
            hint: None,
            probe: Probe::of(BASE),
            check: None,
            again: None,
            pause: ERROR_AGAIN,
            settled: now,
            restarted: now,
            rtt: None,
            large: false,
            doubted: false,
        }
    }

    /// The largest size known to go; [`BASE`] as long as nothing is known. Never less.
    pub fn current(&self) -> usize {
        self.current
    }

    /// How far the search is.
    pub fn state(&self) -> State {
        self.state
    }

    /// The peer answered the probe of `size` that was sent `rtt` ago. Late answers are welcome, too.
    pub fn handle_answer(&mut self, now: Time, size: usize, rtt: Duration) {
        if !(BASE..=self.max).contains(&size) || now.since(self.restarted) < rtt {
            return;
        }
        // Rises at once and falls slowly: waiting too long is the smaller mistake.
        self.rtt = Some(self.rtt.map_or(rtt, |old| rtt.max((old * 7 + rtt) / 8)));
        if size >= self.current {
            self.settled = now;
            self.large = false;
        }
        if self.check.take_if(|check| check.size <= size).is_some() {
            self.hint = None;
        }
        self.probe.take_if(|probe| probe.size <= size);
        let larger = size > self.current;
        if larger {
            self.current = size;
            if size >= self.too_large {
                self.too_large = self.max + 1;
            }
        }
        match self.state {
            State::Base | State::Error => {
                self.first = self.after_hint();
                self.pause = ERROR_AGAIN;
                self.search(now);
            }
            State::Searching => {
                if larger && self.hint == Some(size) {
                    self.first = self.after_hint();
                }
                self.search(now);
            }
            State::SearchComplete if larger => self.search(now),
            State::SearchComplete => {}
        }
    }

    /// A datagram with data of `size` bytes was sent. Has the size confirmed every 5 s while there are large ones: data
    /// is not acknowledged, so nothing else tells that they vanish.
    pub fn handle_sent(&mut self, now: Time, size: usize) {
        self.large |= size > BASE;
        if self.confirm_at().is_some_and(|at| at <= now) {
            self.confirm(now);
        }
    }

    /// When the size in use is to be confirmed. That doesn't wait for more data: where large datagrams vanish, TCP
    /// sends less and less of them.
    fn confirm_at(&self) -> Option<Time> {
        let knows = matches!(self.state, State::Searching | State::SearchComplete);
        (self.large && knows && self.check.is_none()).then(|| self.settled + CONFIRM_EVERY)
    }

    /// The size in use may not go any more: finding out doesn't wait for data either.
    pub fn is_urgent(&self) -> bool {
        self.check.is_some() || self.doubted
    }

    /// Asks whether the size in use still goes, because there is reason to doubt it: at most once a second. Three
    /// tries without an answer mean a black hole (RFC 8899, section 4.3), and the search starts anew.
    pub fn confirm(&mut self, now: Time) {
        let calm = now.since(self.settled);
        match self.state {
            State::Searching | State::SearchComplete if self.check.is_none() && calm >= CONFIRM_LEAST => {
                self.check = Probe::of(self.current);
            }
            State::Error if self.probe.is_none() && calm >= ERROR_AGAIN => self.try_base(),
            _ => {}
        }
    }

    /// A Packet Too Big message (or the kernel's word on one) says that only `size` bytes go. Anyone may have sent it,
    /// so it only says what to probe next (RFC 8899, section 4.6.1): the size in use, where that is larger; `size`
    /// itself in place of a larger probe.
    pub fn handle_too_big(&mut self, now: Time, size: usize) {
        let size = size.max(BASE);
        if self.hint.is_some_and(|hint| hint <= size) {
            return;
        }
        if size < self.current {
            self.hint = Some(size);
            self.confirm(now);
        } else if self.state == State::Searching && self.probe.take_if(|probe| size < probe.size).is_some() {
            self.hint = Some(size);
            self.first = self.after_hint();
            self.search(now);
        }
    }

    /// Our own kernel refused to send the probe of `size` (EMSGSIZE): the link is narrower. No need to try again.
    pub fn handle_refused(&mut self, now: Time, size: usize) {
        if self.check.is_some_and(|check| check.size == size) {
            self.restart(now);
        } else if self.probe.take_if(|probe| probe.size == size).is_some() {
            self.give_up(now, size);
        }
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.check.take_if(|check| check.is_lost(now)).is_some() {
            return self.restart(now);
        }
        if let Some(lost) = self.probe.take_if(|probe| probe.is_lost(now)) {
            self.give_up(now, lost.size);
        }
        if self.confirm_at().is_some_and(|at| at <= now) {
            self.confirm(now);
        }
        if self.again.take_if(|again| now >= *again).is_some() {
            match self.state {
                State::Error => self.try_base(),
                _ => {
                    // The least gain first: where that doesn't go, nothing does, and three probes were enough.
                    self.too_large = self.max + 1;
                    self.first = Some(self.step());
                    self.search(now);
                }
            }
        }
    }

    /// The size of the next probe to send, if there is one.
    pub fn poll_probe(&mut self, now: Time) -> Option<usize> {
        let until = now + self.probe_timer();
        let mut probes = [&mut self.check, &mut self.probe].into_iter().flatten();
        let probe = probes.find(|probe| probe.until.is_none())?;
        probe.tries += 1;
        probe.until = Some(until);
        Some(probe.size)
    }

    /// When [`Search::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        let answer = |probe: &Option<Probe>| probe.and_then(|probe| probe.until);
        let due = [answer(&self.check), answer(&self.probe), self.again, self.confirm_at()];
        due.into_iter().flatten().min()
    }

    /// Goes on with the search, or ends it.
    fn search(&mut self, now: Time) {
        if self.probe.is_some() {
            return;
        }
        self.again = None;
        if let Some(size) = self.candidate() {
            self.state = State::Searching;
            self.probe = Probe::of(size);
        } else {
            self.state = State::SearchComplete;
            (self.hint, self.doubted) = (None, false);
            self.again = (self.current < self.max).then_some(now + RAISE_TIMER);
        }
    }

    /// The next size to try, above `current` and below `too_large`. The largest first, as most paths are as wide as
    /// their first link; then the common sizes and the gap between two of them by halves.
    fn candidate(&mut self) -> Option<usize> {
        let between = self.current + 1..self.too_large;
        if let Some(first) = self.first.take().filter(|size| between.contains(size)) {
            return Some(first);
        }
        if self.too_large > self.max {
            return (self.current < self.max).then_some(self.max);
        }
        let from = COMMON.partition_point(|size| *size < between.start);
        let to = COMMON.partition_point(|size| *size < between.end);
        if let Some(common) = COMMON.get(from..to).filter(|common| !common.is_empty()) {
            return Some(common[common.len() / 2]);
        }
        let gap = self.too_large - self.current;
        (gap > least_gain(self.current)).then(|| self.current + gap / 2)
    }

    /// What to try first because of the hint: what it says, and where that is known to go, the next size, which should
    /// not.
    fn after_hint(&self) -> Option<usize> {
        self.hint.map(|hint| if hint > self.current { hint } else { self.step() })
    }

    /// The smallest size above `current` that is worth a probe.
    fn step(&self) -> usize {
        let gain = (self.current + least_gain(self.current)).min(self.max);
        let next = COMMON.partition_point(|size| *size <= self.current);
        COMMON.get(next).map_or(gain, |common| gain.min(*common))
    }

    fn give_up(&mut self, now: Time, size: usize) {
        if matches!(self.state, State::Base | State::Error) {
            self.state = State::Error;
            (self.settled, self.doubted) = (now, false);
            self.again = Some(now + self.pause);
            self.pause = (self.pause * 2).min(RAISE_TIMER);
        } else {
            self.too_large = size;
            self.search(now);
        }
    }

    fn try_base(&mut self) {
        self.again = None;
        self.probe = Probe::of(BASE);
    }

    fn restart(&mut self, now: Time) {
        let fresh = Search::new(now, self.max);
        *self = Search { hint: self.hint, rtt: self.rtt, doubted: true, ..fresh };
    }

    /// From the round trip where it is known, as RFC 8899, section 5.1.1 allows. Several times as long: a queue that
    /// fills makes the next one longer, and a size given up by mistake is missed for ten minutes. The least covers a
    /// peer that is slow to be scheduled or a radio to wake.
    fn probe_timer(&self) -> Duration {
        self.rtt.map_or(PROBE_TIMER_UNKNOWN, |rtt| (rtt * 4).clamp(PROBE_TIMER_LEAST, PROBE_TIMER_MOST))
    }
}

/// The least difference between two sizes worth a probe: below one percent.
fn least_gain(size: usize) -> usize {
    size / 128
}

/// What every path is assumed to carry: BASE_PLPMTU of RFC 8899, section 5.1.2.
pub const BASE: usize = 1_200;
/// The largest UDP payload in IPv4.
const MOST: usize = 65_507;
/// MAX_PROBES of RFC 8899, section 5.1.2.
const MAX_PROBES: u32 = 3;
/// PMTU_RAISE_TIMER of RFC 8899, section 5.1.1.
const RAISE_TIMER: Duration = Duration::from_secs(600);

const PROBE_TIMER_UNKNOWN: Duration = Duration::from_secs(1);
const PROBE_TIMER_LEAST: Duration = Duration::from_millis(200);
const PROBE_TIMER_MOST: Duration = Duration::from_secs(3);
const CONFIRM_EVERY: Duration = Duration::from_secs(5);
const CONFIRM_LEAST: Duration = Duration::from_secs(1);
const ERROR_AGAIN: Duration = Duration::from_secs(5);

/// What paths often carry: MTUs of 1,280 (least of IPv6), 1,400, 1,420 (WireGuard), 1,450 (VXLAN), 1,460 (a large
/// cloud), 1,480 (IP in IP), 1,492 (PPPoE), 1,500, 9,000 and 9,001 (jumbo frames), each less 28 (IPv4) and 48 (IPv6).
const COMMON: [usize; 17] = [
    1_232, 1_252, 1_352, 1_372, 1_392, 1_402, 1_412, 1_422, 1_432, 1_444, 1_452, 1_464, 1_472, 8_952, 8_953,
    8_972, 8_973,
];

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Both ends and the path between them, in virtual time.
    struct World {
        now: Time,
        search: Search,
        /// The largest size that goes.
        fits: usize,
        rtt: Duration,
        /// Probes or answers lost, in a thousand.
        loss: u64,
        random: u64,
        /// Answers under way.
        answers: VecDeque<(Time, usize)>,
        /// Probes sent.
        probes: Vec<usize>,
        /// Large datagrams are sent all the time.
        busy: bool,
        /// Since when more is claimed than fits.
        wrong_since: Option<Time>,
        longest_wrong: Duration,
        most_seen: usize,
    }

    impl World {
        fn new(max: usize, fits: usize, rtt: Duration) -> World {
            let now = Time::from_nanos(7_000_000_000);
            World {
                now,
                search: Search::new(now, max),
                fits,
                rtt,
                loss: 0,
                random: 1,
                answers: VecDeque::new(),
                probes: vec![],
                busy: false,
                wrong_since: None,
                longest_wrong: Duration::ZERO,
                most_seen: 0,
            }
        }

        fn lost(&mut self) -> bool {
            self.random =
                self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.random >> 33) % 1_000 < self.loss
        }

        fn run(&mut self, duration: Duration) {
            let end = self.now + duration;
            let mut data_at = self.now;
            loop {
                while let Some(size) = self.search.poll_probe(self.now) {
                    self.probes.push(size);
                    if size <= self.fits && !self.lost() {
                        self.answers.push_back((self.now + self.rtt, size));
                    }
                }
                self.look();
                let answer = self.answers.front().map(|(at, _)| *at);
                let data = self.busy.then_some(data_at);
                let next = [self.search.poll_timeout(), answer, data].into_iter().flatten().min();
                let Some(next) = next.filter(|next| *next < end) else { break };
                self.now = self.now.max(next);
                if answer == Some(next)
                    && let Some((_, size)) = self.answers.pop_front()
                {
                    self.search.handle_answer(self.now, size, self.rtt);
                } else if data == Some(next) {
                    self.search.handle_sent(self.now, self.search.current());
                    data_at = self.now + DATA_EVERY;
                } else {
                    self.search.handle_timeout(self.now);
                }
            }
            self.now = end;
            self.look();
        }

        fn look(&mut self) {
            let current = self.search.current();
            assert!((BASE..=self.search.max).contains(&current));
            self.most_seen = self.most_seen.max(current);
            if current <= self.fits.max(BASE) {
                self.wrong_since = None;
            } else {
                let since = *self.wrong_since.get_or_insert(self.now);
                self.longest_wrong = self.longest_wrong.max(self.now.since(since));
            }
        }

        /// The search is over, and no size that it would have tried goes beyond what it found.
        fn has_converged(&self) -> Result<(), TestCaseError> {
            let (found, goes) = (self.search.current(), self.fits.min(self.search.max));
            prop_assert_eq!(self.search.state(), State::SearchComplete);
            prop_assert!(found <= goes && goes - found < least_gain(found).max(1), "{found} of {goes}");
            if goes == self.search.max || COMMON.contains(&goes) {
                prop_assert_eq!(found, goes);
            }
            Ok(())
        }
    }

    const MINUTE: Duration = Duration::from_secs(60);
    const RTT: Duration = Duration::from_millis(30);
    const DATA_EVERY: Duration = Duration::from_millis(500);

    #[test]
    fn a_black_hole_is_found_out_without_more_data() {
        let mut world = World::new(1_472, 1_472, RTT);
        world.run(MINUTE);
        world.search.handle_sent(world.now, 1_472);
        world.fits = 1_300;
        world.run(Duration::from_secs(7));
        assert!(world.search.current() <= 1_300, "{}", world.search.current());
        assert!(!world.search.is_urgent(), "it is over");
        // One large datagram, one confirmation.
        let before = world.probes.len();
        world.run(MINUTE);
        assert_eq!(world.probes.len(), before);
        world.search.handle_sent(world.now, world.search.current());
        world.run(MINUTE);
        assert_eq!(world.probes.len(), before + 1);
    }

    #[test]
    fn a_wide_path_takes_two_probes() {
        let mut world = World::new(1_472, 1_472, RTT);
        assert_eq!((world.search.current(), world.search.state()), (BASE, State::Base));
        world.run(MINUTE);
        assert_eq!((world.search.current(), world.search.state()), (1_472, State::SearchComplete));
        assert_eq!(world.probes, [1_200, 1_472]);
        assert_eq!(world.search.poll_timeout(), None, "nothing more to find");
    }

    #[test]
    fn a_common_path_in_probes() {
        let mut world = World::new(1_472, 1_464, RTT);
        world.run(MINUTE);
        assert_eq!(world.probes, [1_200, 1_472, 1_472, 1_472, 1_412, 1_444, 1_464]);
        assert_eq!((world.search.current(), world.search.state()), (1_464, State::SearchComplete));
        // Ten minutes later, and each ten minutes.
        world.probes.clear();
        world.run(10 * MINUTE);
        assert_eq!(world.probes, [1_472; 3]);
        world.fits = 1_472;
        world.probes.clear();
        world.run(10 * MINUTE);
        assert_eq!(world.probes, [1_472]);
        assert_eq!(world.search.current(), 1_472);
    }

    #[test]
    fn a_black_hole_is_left_after_three_confirmations() {
        let mut world = World::new(1_472, 1_472, RTT);
        world.run(MINUTE);
        world.fits = 1_392;
        world.probes.clear();
        world.run(MINUTE);
        assert_eq!(world.probes, [0; 0], "nothing is sent, so nothing is lost");
        world.busy = true;
        world.run(3 * PROBE_TIMER_LEAST + Duration::from_millis(1));
        assert_eq!(world.probes, [1_472, 1_472, 1_472, 1_200]);
        assert_eq!((world.search.current(), world.search.state()), (BASE, State::Base));
        world.run(MINUTE);
        assert_eq!((world.search.current(), world.search.state()), (1_392, State::SearchComplete));
    }

    #[test]
    fn below_base_is_an_error_until_it_is_not() {
        let mut world = World::new(1_472, 1_100, RTT);
        world.run(Duration::from_secs(3) + RTT);
        assert_eq!((world.search.current(), world.search.state()), (BASE, State::Error));
        world.search.confirm(world.now);
        assert_eq!(world.search.poll_probe(world.now), None, "not so soon");
        world.probes.clear();
        // After 5 s, 10 s, 20 s, 40 s and 80 s, three each.
        world.run(Duration::from_secs(171));
        assert_eq!(world.probes, [BASE; 15]);
        // Traffic has it tried sooner.
        world.run(Duration::from_secs(10));
        world.probes.clear();
        world.search.confirm(world.now);
        world.search.confirm(world.now);
        world.fits = 1_472;
        world.run(Duration::from_secs(1));
        assert_eq!(world.probes, [BASE, 1_472]);
        assert_eq!((world.search.current(), world.search.state()), (1_472, State::SearchComplete));
    }

    #[test]
    fn a_hint_is_probed_and_not_believed() {
        // True: two sizes tell that it is.
        let mut world = World::new(1_472, 1_300, RTT);
        world.run(RTT + Duration::from_millis(10));
        assert_eq!(world.probes, [1_200, 1_472]);
        world.search.handle_too_big(world.now, 1_300);
        world.run(MINUTE);
        assert_eq!(world.probes[2..], [1_300, 1_310, 1_310, 1_310]);
        assert_eq!((world.search.current(), world.search.state()), (1_300, State::SearchComplete));

        // A lie about a size that is yet to be found costs a probe.
        let mut world = World::new(1_472, 1_472, RTT);
        world.run(RTT + Duration::from_millis(10));
        world.search.handle_too_big(world.now, 1_300);
        world.search.handle_too_big(world.now, 1_300);
        world.run(MINUTE);
        assert_eq!(world.search.current(), 1_472);

        // So does one about the size in use.
        world.probes.clear();
        for lie in [1_300, 68, 0, 1_250, 1_472, 9_000, usize::MAX] {
            world.search.handle_too_big(world.now, lie);
        }
        assert_eq!(world.search.current(), 1_472);
        world.run(MINUTE);
        assert_eq!(world.probes, [1_472]);
        assert_eq!((world.search.current(), world.search.state()), (1_472, State::SearchComplete));

        // The truth about it shortens the search behind the fall.
        world.fits = 1_300;
        world.probes.clear();
        world.search.handle_too_big(world.now, 1_300);
        world.run(MINUTE);
        assert_eq!(world.probes, [1_472, 1_472, 1_472, 1_200, 1_300, 1_310, 1_310, 1_310]);
        assert_eq!(world.search.current(), 1_300);
    }

    #[test]
    fn hints_without_end_keep_nothing_from_being_found() {
        for lie in [None, Some(BASE), Some(1_300)] {
            let mut world = World::new(1_472, 1_392, RTT);
            for _ in 0..1_000 {
                world.search.handle_too_big(world.now, lie.unwrap_or(world.search.current()));
                world.run(Duration::from_millis(5));
            }
            assert_eq!(world.search.current(), 1_392);
            assert!(world.probes.len() < 30, "{:?}", world.probes);
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_not_tried_again() {
        let mut world = World::new(8_972, 1_472, RTT);
        world.run(RTT + Duration::from_millis(10));
        world.search.handle_refused(world.now, 8_972);
        world.search.handle_refused(world.now, 8_972);
        world.run(MINUTE);
        assert_eq!(world.search.current(), 1_472);
        assert_eq!(world.probes.iter().filter(|size| **size == 8_972).count(), 1);
        // The link became narrower: no doubt about that either.
        world.search.confirm(world.now);
        world.search.handle_refused(world.now, 1_472);
        assert_eq!((world.search.current(), world.search.state()), (BASE, State::Base));
    }

    #[test]
    fn late_answers_count_unless_the_path_is_another_by_now() {
        let slow = Duration::from_millis(4_500);
        let mut world = World::new(1_472, 1_472, slow);
        world.run(MINUTE);
        world.has_converged().expect("found in spite of the wait");
        assert_eq!(world.search.current(), 1_472);

        let mut search = Search::new(Time::default(), 1_472);
        let at = |ms| Time::default() + Duration::from_millis(ms);
        assert_eq!(search.poll_probe(at(0)), Some(BASE));
        search.handle_answer(at(30), BASE, RTT);
        assert_eq!(search.poll_probe(at(30)), Some(1_472));
        search.handle_answer(at(60), 1_472, RTT);
        search.confirm(at(2_000));
        for (sent, lost) in [(2_000, 2_200), (2_200, 2_400), (2_400, 2_600)] {
            assert_eq!(search.poll_probe(at(sent)), Some(1_472));
            search.handle_timeout(at(lost));
        }
        assert_eq!(search.state(), State::Base);
        search.handle_answer(at(2_700), 1_472, Duration::from_millis(300));
        assert_eq!((search.current(), search.state()), (BASE, State::Base));
        // Sizes that were never asked for.
        search.handle_answer(at(2_700), 9_000, RTT);
        search.handle_answer(at(2_700), 1_000, RTT);
        assert_eq!((search.current(), search.state()), (BASE, State::Base));
    }

    #[test]
    fn a_late_answer_to_a_size_given_up_counts() {
        for (wait, state, late, found) in [
            (700, State::Searching, 1_472, 1_472),
            // 1,472 was given up alone, and this says nothing of it.
            (700, State::Searching, 1_412, 1_464),
            (60_000, State::SearchComplete, 1_472, 1_472),
            (60_000, State::SearchComplete, 1_412, 1_472),
        ] {
            let mut world = World::new(1_472, BASE, RTT);
            world.run(Duration::from_millis(wait));
            assert_eq!((world.search.current(), world.search.state()), (BASE, state));
            world.fits = 1_472;
            world.search.handle_answer(world.now, late, Duration::from_millis(600));
            assert_eq!(world.search.current(), late);
            world.run(MINUTE);
            assert_eq!((world.search.current(), world.search.state()), (found, State::SearchComplete));
        }
    }

    #[test]
    fn confirmations_are_few() {
        let mut world = World::new(1_452, 1_452, RTT);
        world.run(MINUTE);
        world.probes.clear();
        for _ in 0..1_000 {
            world.search.confirm(world.now);
            world.run(Duration::from_millis(10));
        }
        assert!(world.probes.len() <= 10, "{}", world.probes.len());
    }

    fn maxima() -> impl Strategy<Value = usize> {
        prop_oneof![Just(1_472), Just(1_452), Just(8_972), Just(MOST), 0usize..70_000]
    }

    fn sizes() -> impl Strategy<Value = usize> {
        prop_oneof![proptest::sample::select(&COMMON[..]), BASE..1_600usize, BASE..=MOST]
    }

    fn rtts() -> impl Strategy<Value = Duration> {
        (1u64..2_000).prop_map(Duration::from_millis)
    }

    proptest! {
        #[test]
        fn finds_the_largest_size_that_goes_and_finds_it_again(
            max in maxima(),
            widths in proptest::collection::vec(sizes(), 1..6),
            rtt in rtts(),
            busy in any::<bool>(),
        ) {
            let mut world = World::new(max, widths[0], rtt);
            for fits in widths {
                let shrinks = fits < world.fits;
                world.fits = fits;
                world.busy = busy || shrinks;
                // A raise, and the longest search.
                world.run(RAISE_TIMER + 5 * MINUTE);
                let found = world.search.current();
                if world.search.state() == State::Searching {
                    // The next raise, which finds nothing.
                    world.run(PROBE_TIMER_MOST * MAX_PROBES);
                }
                world.has_converged()?;
                prop_assert_eq!(world.search.current(), found);
            }
        }

        /// Whatever is lost: too much is claimed for no longer than the next confirmation and its three tries.
        #[test]
        fn never_claims_too_much_for_long(
            max in maxima(),
            widths in proptest::collection::vec((sizes(), 1u64..400), 1..8),
            rtt in rtts(),
            loss in 0u64..400,
            random in any::<u64>(),
        ) {
            let mut world = World::new(max, widths[0].0, rtt);
            (world.loss, world.random, world.busy) = (loss, random, true);
            let timer = (rtt * 4).clamp(PROBE_TIMER_UNKNOWN, PROBE_TIMER_MOST);
            let bound = rtt + CONFIRM_EVERY + timer * MAX_PROBES + DATA_EVERY;
            for (fits, seconds) in widths {
                world.fits = fits;
                world.run(Duration::from_secs(seconds));
                prop_assert!(world.longest_wrong <= bound, "{:?} > {bound:?}", world.longest_wrong);
            }
        }

        #[test]
        fn loss_delays_and_hides_nothing(
            max in maxima(),
            fits in sizes(),
            loss in 0u64..200,
            random in any::<u64>(),
        ) {
            let mut world = World::new(max, fits, RTT);
            (world.loss, world.random) = (loss, random);
            world.run(180 * MINUTE);
            let goes = fits.min(world.search.max);
            prop_assert!(world.most_seen <= goes);
            prop_assert!(goes - world.most_seen < least_gain(goes).max(1), "{} of {goes}", world.most_seen);
        }

        #[test]
        fn few_probes_once_it_is_found(max in maxima(), fits in sizes(), rtt in rtts(), busy in any::<bool>()) {
            let mut world = World::new(max, fits, rtt);
            world.run(10 * MINUTE);
            world.probes.clear();
            world.busy = busy;
            world.run(60 * MINUTE);
            let raises = 7 * MAX_PROBES as usize;
            prop_assert!(world.probes.len() <= raises + if busy { 721 } else { 0 }, "{}", world.probes.len());
        }
    }
}
