//! How large a datagram may be on each path ([`crate::pmtu`]). Probes are challenges padded to the size in question.
//! They are sent on proven paths only, and only after data: an idle session is silent, but for what data that was sent
//! last makes it look into.

use std::time::Duration;

use super::known::Known;
use super::{PathEvent, Paths, Say};
use crate::path::INSIDE;
use crate::pmtu::{BASE, Search, State};
use crate::time::Time;
use crate::wire::data::OVERHEAD;
use crate::wire::inband::InBand;

/// A path's search, from the first data on it.
#[derive(Clone, Debug)]
pub(super) struct Sizing {
    search: Search,
    /// Latest probes: nonce, size, when they were sent.
    probes: Vec<([u8; 8], usize, Time)>,
    /// Data was sent since the last probe.
    due: bool,
    /// The search has come to an end once; before, nothing is said of the size.
    known: bool,
}

impl Paths {
    /// The ends have devices with this MTU: datagrams needn't be larger than such packets.
    pub fn set_mtu(&mut self, mtu: usize) {
        self.inner_mtu = Some(mtu);
    }

    /// The largest packet that goes in one piece wherever data goes now; `None` where nobody knows yet.
    pub fn mtu(&self) -> Option<usize> {
        self.mtu
    }

    /// The same, where it is less than what the device sends.
    pub fn narrow(&self) -> Option<usize> {
        self.narrow
    }

    /// The same again, for senders to be told: they remember it for long, so that nothing provisional is said.
    pub fn announced(&self) -> Option<usize> {
        self.narrow.filter(|_| self.settled)
    }

    /// Datagrams with data of up to `size` bytes were sent where data goes now.
    pub fn handle_sent(&mut self, now: Time, size: usize) {
        let Some(inner_mtu) = self.inner_mtu else { return };
        for at in 0..self.list.len() {
            let in_use = self.targets.contains(&at) || self.shared().any(|shared| shared == at);
            if !in_use && !self.is_usable(at) {
                continue;
            }
            let known = &mut self.list[at];
            if !known.proven || known.path.carrier == INSIDE {
                continue;
            }
            let sizing = known.sizing.get_or_insert_with(|| Sizing {
                search: Search::new(now, inner_mtu + OVERHEAD),
                probes: Vec::new(),
                due: false,
                known: false,
            });
            // A spare path is to be known before it is needed; after that it costs nothing.
            if !in_use && sizing.known {
                continue;
            }
            sizing.due = true;
            sizing.search.handle_sent(now, if in_use { size } else { 0 });
            if sizing.search.state() == State::Error && now.since(known.heard) < HEARD_LATELY {
                // It may just have been away.
                sizing.search.confirm(now);
            }
            self.ask_size(now, at);
        }
    }

    /// Our own kernel refused this probe as too large: it counts as never sent.
    pub fn handle_refused(&mut self, now: Time, say: &Say) {
        let InBand::PathChallenge(nonce) = say.message else { return };
        let Some(at) = self.find(say.path.key()) else { return };
        let Some(sizing) = &mut self.list[at].sizing else { return };
        if let Some(probe) = sizing.probes.iter().position(|(n, ..)| *n == nonce) {
            let (_, size, _) = sizing.probes.swap_remove(probe);
            sizing.search.handle_refused(now, size);
            sizing.due = true;
            self.know_size(now, at);
        }
    }

    /// An answer came, perhaps to one of our probes.
    pub(super) fn hear_size(&mut self, now: Time, at: usize, nonce: [u8; 8]) {
        let Some(sizing) = &mut self.list[at].sizing else { return };
        if let Some(probe) = sizing.probes.iter().position(|(n, ..)| *n == nonce) {
            let (_, size, sent) = sizing.probes.swap_remove(probe);
            sizing.search.handle_answer(now, size, now.since(sent));
            self.know_size(now, at);
        }
    }

    /// When the search on the path at `at` has something to do.
    pub(super) fn size_due(&self, at: usize) -> Option<Time> {
        let known = &self.list[at];
        if is_in_doubt(known) { None } else { known.sizing.as_ref()?.search.poll_timeout() }
    }

    pub(super) fn look_at_size(&mut self, now: Time, at: usize) {
        if self.size_due(at).is_some_and(|due| due <= now)
            && let Some(sizing) = &mut self.list[at].sizing
        {
            sizing.search.handle_timeout(now);
            self.know_size(now, at);
        }
    }

    /// The search went on: takes in what it says, and goes on.
    fn know_size(&mut self, now: Time, at: usize) {
        if let Some(sizing) = &mut self.list[at].sizing {
            sizing.known |= matches!(sizing.search.state(), State::SearchComplete | State::Error);
        }
        self.weigh();
        self.ask_size(now, at);
    }

    /// Sends the probes that are due.
    fn ask_size(&mut self, now: Time, at: usize) {
        let known = &mut self.list[at];
        let ready = !is_in_doubt(known);
        let Some(sizing) = &mut known.sizing else { return };
        let mut probes = Vec::new();
        while (sizing.due || sizing.search.is_urgent())
            && ready
            && let Some(size) = sizing.search.poll_probe(now)
        {
            probes.push(size);
        }
        sizing.due &= probes.is_empty();
        let path = known.path;
        for size in probes {
            let nonce = self.nonce();
            // A NAT sees it as it sees any other.
            self.list[at].keep.sent(now);
            if let Some(sizing) = &mut self.list[at].sizing {
                if sizing.probes.len() >= MOST_PROBES {
                    sizing.probes.remove(0);
                }
                sizing.probes.push((nonce, size, now));
            }
            self.said.push_back(Say { message: InBand::PathChallenge(nonce), path, pad: size });
        }
    }

    /// Works out what goes on every path that data is sent to.
    pub(super) fn weigh(&mut self) {
        let Some(inner_mtu) = self.inner_mtu else { return };
        let sizings = || {
            let places = self.targets.iter().copied().chain(self.shared());
            let targets = places.filter_map(|at| self.list.get(at)?.sizing.as_ref());
            targets.filter(|sizing| sizing.known)
        };
        let mtu = sizings().map(|sizing| (sizing.search.current() - OVERHEAD).min(inner_mtu)).min();
        let settled = sizings().all(|sizing| sizing.search.state() == State::SearchComplete);
        self.settled = settled;
        self.narrow = mtu.filter(|mtu| *mtu < inner_mtu);
        if mtu.is_some() && mtu != self.mtu {
            self.events.extend(mtu.map(|mtu| PathEvent::Mtu { mtu }));
        }
        self.mtu = mtu;
    }
}

impl Say {
    /// Whether it has to arrive whole or not at all: a challenge with padding asks for nothing but the path's MTU.
    pub fn is_probe(&self) -> bool {
        matches!(self.message, InBand::PathChallenge(_)) && self.pad >= BASE
    }
}

/// Whether it answers at all is what has to be found out first: a probe would say nothing.
fn is_in_doubt(known: &Known) -> bool {
    known.is_lost() || known.asked.as_ref().is_some_and(|asked| asked.tries.len() > 1)
}

/// Probes whose answers are still welcome.
const MOST_PROBES: usize = 8;
/// A path that was heard within this time isn't gone.
const HEARD_LATELY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::Path;
    use crate::paths::Mode;
    use crate::paths::tests::{MS, PACKET, SILENT, client, start};

    const INNER: usize = 1_420;
    const MOST: usize = INNER + OVERHEAD;
    /// Of 1,300 bytes over IPv4.
    const NARROW: usize = 1_272;

    fn measured_client(carriers: &[u8]) -> Paths {
        let mut paths = client(carriers);
        paths.set_mtu(INNER);
        paths
    }

    /// Probes that are said: carrier and size.
    fn probes(paths: &mut Paths) -> Vec<(u8, usize)> {
        let said = std::iter::from_fn(|| paths.poll_say()).filter(Say::is_probe);
        said.map(|say| (say.path.carrier, say.pad)).collect()
    }

    fn sizes(paths: &mut Paths, now: Time) -> Vec<(u8, usize)> {
        paths.handle_sent(now, PACKET);
        probes(paths)
    }

    /// Data is sent for so many tenths of a second, and challenges up to a size are answered.
    fn run(paths: &mut Paths, now: &mut Time, tenths: usize, fits: impl Fn(Path) -> usize) {
        for _ in 0..tenths {
            paths.handle_sent(*now, PACKET);
            *now = *now + 100 * MS;
            let said: Vec<Say> = std::iter::from_fn(|| paths.poll_say()).collect();
            for say in said {
                if let InBand::PathChallenge(nonce) = say.message
                    && say.pad <= fits(say.path)
                {
                    let answer = InBand::PathResponse(nonce, say.path.remote);
                    paths.heard(*now, say.path, true, PACKET, Some(answer));
                }
            }
            paths.handle_timeout(*now);
        }
    }

    fn told(paths: &mut Paths) -> Vec<usize> {
        let events = std::iter::from_fn(|| paths.poll_event());
        events.filter_map(|event| if let PathEvent::Mtu { mtu } = event { Some(mtu) } else { None }).collect()
    }

    #[test]
    fn which_paths_are_measured() {
        let asked = |carriers: &[u8], change: fn(&mut Paths)| {
            let mut paths = measured_client(carriers);
            change(&mut paths);
            paths.refresh();
            let sizes = sizes(&mut paths, start());
            // None that isn't asked now is remembered for later.
            assert_eq!(sizes.len(), paths.list.iter().filter(|known| known.sizing.is_some()).count());
            sizes
        };
        assert_eq!(asked(&[0], |_| ()), [(0, BASE)]);
        assert_eq!(asked(&[0], |paths| paths.inner_mtu = None), []);
        assert_eq!(asked(&[0, 1], |_| ()), [(0, BASE), (1, BASE)], "a spare is to be known before");
        assert_eq!(asked(&[0, 1], |paths| paths.list[0].proven = false), [(1, BASE)]);
        assert_eq!(asked(&[0, 1], |paths| paths.list[1].proven = false), [(0, BASE)]);
        assert_eq!(asked(&[0, 1], |paths| paths.list[1].lost = SILENT), [(0, BASE)]);
        assert_eq!(asked(&[INSIDE, 1], |_| ()), [(1, BASE)]);
        assert_eq!(asked(&[0, INSIDE], |_| ()), [(0, BASE)]);
    }

    #[test]
    fn the_width_is_said_when_it_is_known_and_when_it_changes() {
        for (fits, mtu) in [(NARROW, NARROW - OVERHEAD), (MOST, INNER), (9_000, INNER)] {
            let (mut paths, mut now) = (measured_client(&[0]), start());
            run(&mut paths, &mut now, 1, |_| fits);
            assert_eq!(
                (paths.mtu(), paths.narrow(), paths.announced(), told(&mut paths)),
                (None, None, None, vec![])
            );
            run(&mut paths, &mut now, 300, |_| fits);
            let narrow = Some(mtu).filter(|mtu| *mtu < INNER);
            let mtu_said = paths.mtu().expect("it is known");
            assert!((mtu - mtu / 100..=mtu).contains(&mtu_said), "{mtu_said} of {mtu}");
            assert_eq!(
                (paths.narrow().is_some(), paths.announced().is_some()),
                (narrow.is_some(), narrow.is_some())
            );
            assert_eq!(told(&mut paths), [mtu_said]);
        }
    }

    #[test]
    fn of_all_that_data_goes_by_the_narrowest_counts() {
        for (mode, both) in [(Mode::Failover, false), (Mode::Redundant, true), (Mode::Balance, true)] {
            let (mut paths, mut now) = (measured_client(&[0, 1]), start());
            paths.set_mode(now, mode);
            run(&mut paths, &mut now, 300, |path| if path.carrier == 1 { BASE } else { MOST });
            assert_eq!(paths.mtu(), Some(if both { BASE - OVERHEAD } else { INNER }), "{mode:?}");
            assert_eq!(paths.announced(), both.then_some(BASE - OVERHEAD));
            // Of one that is measured anew nothing final can be said.
            let sizing = paths.list[1].sizing.as_mut().expect("measured");
            sizing.search = Search::new(now, MOST);
            paths.weigh();
            assert_eq!((paths.announced(), paths.narrow()), (None, both.then_some(BASE - OVERHEAD)));
        }
    }

    #[test]
    fn a_spare_that_is_known_costs_nothing_more() {
        for (first, mode, in_use) in [
            (0, Mode::Failover, [true, false]),
            (0, Mode::Balance, [true, true]),
            (0, Mode::Redundant, [true, true]),
            (INSIDE, Mode::Failover, [false, false]),
            (INSIDE, Mode::Balance, [false, true]),
        ] {
            let (mut paths, mut now) = (measured_client(&[first, 1]), start());
            paths.set_mode(now, mode);
            run(&mut paths, &mut now, 300, |_| NARROW);
            for sizing in paths.list.iter_mut().filter_map(|known| known.sizing.as_mut()) {
                assert!(sizing.known);
                sizing.due = false;
            }
            paths.handle_sent(now, PACKET);
            let due = |at: usize| paths.list[at].sizing.as_ref().is_some_and(|sizing| sizing.due);
            assert_eq!([due(0), due(1)], in_use, "{mode:?} beside {first}");
        }
    }

    #[test]
    fn a_path_that_was_away_is_measured_again_when_it_is_heard() {
        for (silent, again) in [(0, true), (999, true), (1_000, false), (3_000, false)] {
            let (mut paths, mut now) = (measured_client(&[0]), start());
            while paths.list[0].sizing.as_ref().is_none_or(|sizing| sizing.search.state() != State::Error) {
                run(&mut paths, &mut now, 1, |_| PACKET);
            }
            now = now + Duration::from_secs(6);
            paths.list[0].heard = Time::default() + (now - Time::default() - silent * MS);
            assert_eq!(
                sizes(&mut paths, now),
                Vec::from_iter(again.then_some((0, BASE))),
                "after {silent} ms"
            );
        }
        // One whose width is known isn't asked for every word that is heard.
        let (mut paths, mut now) = (measured_client(&[0]), start());
        run(&mut paths, &mut now, 100, |_| MOST);
        now = now + Duration::from_secs(3);
        paths.list[0].heard = now;
        assert_eq!(sizes(&mut paths, now), []);
    }

    #[test]
    fn what_may_not_answer_at_all_is_not_measured() {
        let asked = |change: fn(&mut Paths)| {
            let mut paths = measured_client(&[0]);
            change(&mut paths);
            let probes = sizes(&mut paths, start());
            (!probes.is_empty(), paths.size_due(0).is_some())
        };
        let ask = |paths: &mut Paths| paths.ask(start(), 0, false);
        assert_eq!(asked(|_| ()), (true, true));
        assert_eq!(asked(ask), (true, true), "nothing is wrong with the first try");
        assert_eq!(asked(|paths| (0..2).for_each(|_| paths.ask(start(), 0, false))), (false, false));
        assert_eq!(asked(|paths| paths.list[0].lost = SILENT), (false, false));
        // Nor looked at when its time has come.
        let mut paths = measured_client(&[0]);
        sizes(&mut paths, start());
        let due = paths.size_due(0).expect("an answer is awaited");
        paths.look_at_size(Time::default() + (due - Time::default() - MS), 0);
        paths.handle_sent(due, PACKET);
        assert_eq!(probes(&mut paths), [], "the answer may still come");
        paths.list[0].lost = SILENT;
        paths.look_at_size(due, 0);
        paths.list[0].lost = None;
        paths.handle_sent(due, PACKET);
        assert_eq!(probes(&mut paths), []);
        paths.look_at_size(due, 0);
        assert_eq!(probes(&mut paths), [(0, BASE)]);
    }

    #[test]
    fn there_is_one_probe_after_data_and_none_without() {
        let mut paths = measured_client(&[0]);
        assert_eq!(sizes(&mut paths, start()), [(0, BASE)]);
        assert_eq!(paths.list[0].keep.last_sent(), start());
        let mut now = start();
        for expected in [[(0, BASE)]; 2] {
            now = paths.size_due(0).expect("an answer is awaited");
            paths.look_at_size(now, 0);
            assert_eq!(probes(&mut paths), [], "nothing was sent since");
            paths.handle_sent(now, PACKET);
            assert_eq!(probes(&mut paths), expected);
            assert_eq!(paths.list[0].keep.last_sent(), now);
        }
        paths.handle_sent(now, PACKET);
        assert_eq!(probes(&mut paths), []);
    }

    #[test]
    fn a_refused_probe_was_never_sent() {
        let mut paths = measured_client(&[0]);
        paths.handle_sent(start(), PACKET);
        let base = paths.poll_say().expect("a probe");
        let InBand::PathChallenge(nonce) = base.message else { panic!("{base:?}") };
        paths.heard(
            start() + MS,
            base.path,
            true,
            PACKET,
            Some(InBand::PathResponse(nonce, base.path.remote)),
        );
        paths.handle_sent(start() + MS, PACKET);
        let largest = paths.poll_say().expect("a probe");
        assert_eq!(largest.pad, MOST);
        // Of another path, of another number, or of another kind.
        paths.handle_refused(start() + MS, &Say { path: largest.path.by(7), ..largest });
        paths.handle_refused(start() + MS, &Say { message: InBand::PathChallenge([0; 8]), ..largest });
        paths.handle_refused(start() + MS, &Say { message: InBand::Rebind, ..largest });
        assert_eq!(probes(&mut paths), []);
        paths.handle_refused(start() + MS, &largest);
        let next = probes(&mut paths);
        assert!(matches!(next[..], [(0, size)] if size < MOST), "{next:?}: without waiting for data");
        paths.handle_refused(start() + MS, &largest);
        assert_eq!(probes(&mut paths), [], "once");
    }

    #[test]
    fn answers_to_the_latest_probes_are_welcome() {
        let mut paths = measured_client(&[0]);
        paths.handle_sent(start(), PACKET);
        let sizing = paths.list[0].sizing.as_mut().expect("measured");
        sizing.probes = (1..=MOST_PROBES as u8).map(|n| ([n; 8], BASE, start())).collect();
        (sizing.search, sizing.due) = (Search::new(start(), MOST), true);
        paths.ask_size(start(), 0);
        let waits: Vec<_> =
            paths.list[0].sizing.iter().flat_map(|sizing| &sizing.probes).map(|probe| probe.0).collect();
        assert_eq!(waits.len(), MOST_PROBES);
        assert_eq!(waits[..MOST_PROBES - 1], [2, 3, 4, 5, 6, 7, 8].map(|n| [n; 8]));
        // One that is answered gets the next under way; one that was forgotten doesn't.
        let path = paths.list[0].path;
        probes(&mut paths);
        for (n, next) in [(1, vec![]), (5, vec![(0, MOST)]), (5, vec![])] {
            paths.heard(start() + MS, path, true, PACKET, Some(InBand::PathResponse([n; 8], path.remote)));
            paths.handle_sent(start() + MS, PACKET);
            assert_eq!(probes(&mut paths), next, "{n}");
        }
    }

    #[test]
    fn probes_are_challenges_of_some_size() {
        let path = client(&[0]).list[0].path;
        let is_probe = |message, pad| Say { message, path, pad }.is_probe();
        assert!(is_probe(InBand::PathChallenge([0; 8]), BASE));
        assert!(!is_probe(InBand::PathChallenge([0; 8]), BASE - 1));
        assert!(!is_probe(InBand::Rebind, BASE));
    }
}
