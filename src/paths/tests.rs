//! What a datagram from somewhere does to where the peer is taken to be.

use super::follow::MOST_KNOWN;
use super::*;

pub(super) const MS: Duration = Duration::from_millis(1);
pub(super) const PACKET: usize = 100;

pub(super) fn at(text: &str) -> Path {
    Path::new(text.parse().expect("an address"), None)
}

pub(super) fn start() -> Time {
    Time::default() + Duration::from_secs(1)
}

/// What is said, in order.
pub(super) fn said(paths: &mut Paths) -> Vec<(Path, InBand)> {
    std::iter::from_fn(|| paths.poll_say()).map(|say| (say.path, say.message)).collect()
}

/// The peer answers what was asked by `path`.
pub(super) fn answer(paths: &mut Paths, now: Time, path: Path) {
    let asked = said(paths).into_iter().rev().find_map(|(by, message)| match message {
        InBand::PathChallenge(nonce) if by == path => Some(nonce),
        _ => None,
    });
    let nonce = asked.expect("a challenge");
    paths.heard(now, path, true, PACKET, Some(InBand::PathResponse(nonce, path.remote)));
}

/// A server whose client is at `here`, and has answered there.
pub(super) fn server(here: Path) -> Paths {
    let mut paths = Paths::following(Secret::from_bytes([1; 32]), None);
    paths.heard(start(), here, true, PACKET, None);
    answer(&mut paths, start() + 20 * MS, here);
    said(&mut paths);
    paths
}

pub(super) fn here(paths: &Paths) -> Path {
    paths.active().expect("a path").path
}

#[test]
fn a_rebind_moves_as_soon_as_it_is_answered_and_an_older_one_never() {
    let (old, new) = (at("192.0.2.1:4000"), at("203.0.113.5:6000"));
    let now = start() + 30 * MS;
    for (message, moves) in [(Some(InBand::Rebind), true), (None, false)] {
        let mut paths = server(old);
        paths.heard(now, new, true, REBIND_BYTES, message);
        assert_eq!(here(&paths), old);
        // Within the time that the old path has to answer in.
        answer(&mut paths, now + MS, new);
        assert_eq!(here(&paths) == new, moves, "{message:?}");
        if moves {
            said(&mut paths);
            // One that was delayed, from where the client was before.
            paths.heard(now + 2 * MS, old, false, REBIND_BYTES, message);
            assert_eq!((here(&paths), said(&mut paths)), (new, vec![]));
        }
    }
}

#[test]
fn an_address_that_is_vouched_for_needs_no_answer() {
    let client = at("192.0.2.1:4000");
    for (vouched, proven) in [("192.0.2.1", true), ("192.0.2.2", false)] {
        let vouched = Some(vouched.parse().expect("an address"));
        let mut paths = Paths::following(Secret::from_bytes([1; 32]), vouched);
        paths.heard(start(), client, true, PACKET, None);
        assert_eq!(paths.active().map(Known::is_proven), Some(proven));
        assert_eq!(paths.target(start(), 0, 3 * PACKET + 1).is_some(), proven);
        assert_eq!(paths.target(start(), 0, 3 * PACKET), Some(client));
    }
}

#[test]
fn strangers_leave_the_clients_own_word_its_place() {
    let mut paths = server(at("192.0.2.1:4000"));
    let stranger = |n: u16| Path::new(([198, 18, 0, 1], 1_000 + n).into(), None);
    let now = start() + 30 * MS;
    for n in 0..100 {
        paths.heard(now, stranger(n), true, PACKET, None);
    }
    assert_eq!(paths.known().len(), 1 + NOMINATIONS as usize);
    let new = at("203.0.113.5:6000");
    paths.heard(now, new, true, REBIND_BYTES, Some(InBand::Rebind));
    assert!(paths.find(new.key()).is_some(), "{:?}", paths.known());
    // That has an end, too.
    for n in 0..100 {
        paths.heard(now, stranger(500 + n), true, REBIND_BYTES, Some(InBand::Rebind));
    }
    assert!(paths.known().len() <= 8);
    assert!(!paths.rebinds.take(now));
}

#[test]
fn a_client_says_what_a_path_is_for_where_it_is_asked_on_another() {
    let way = |carrier| at("198.51.100.1:55555").by(carrier);
    let mut paths = Paths::dialled(Secret::from_bytes([1; 32]), way(0), start());
    paths.set_ways(start(), &[way(0), way(1)]);
    said(&mut paths);
    let nonce = [7; 8];
    let answer = InBand::PathResponse(nonce, way(0).remote);
    paths.heard(start(), way(0), true, PACKET, Some(InBand::PathChallenge(nonce)));
    assert_eq!(said(&mut paths), [(way(0), answer)]);
    paths.heard(start(), way(1), true, PACKET, Some(InBand::PathChallenge(nonce)));
    assert_eq!(said(&mut paths), [(way(1), InBand::PathStatus(PathStatus::Standby)), (way(1), answer)]);
}

/// A server that knows these paths beside the one in use, all of them proven but the last.
pub(super) fn server_with(statuses: &[Option<PathStatus>], lost: &[Option<known::Lost>]) -> Paths {
    let mut paths = server(at("192.0.2.1:4000"));
    for (n, (status, lost)) in statuses.iter().zip(lost).enumerate() {
        paths.add(start(), Path::new(([203, 0, 113, 1], 1_000 + n as u16).into(), None));
        let known = paths.list.last_mut().expect("one");
        (known.proven, known.status, known.lost) = (n + 1 < statuses.len(), *status, *lost);
    }
    paths.refresh();
    paths
}

pub(super) const SILENT: Option<known::Lost> =
    Some(known::Lost { ask_at: Time::from_nanos(0), wait: Duration::from_secs(1), back: None });
pub(super) const BACK: Option<known::Lost> = Some(known::Lost {
    ask_at: Time::from_nanos(0),
    wait: Duration::from_secs(1),
    back: Some(Time::from_nanos(0)),
});

#[test]
fn what_a_path_is_good_for() {
    let standby = Some(PathStatus::Standby);
    let lost = [None, BACK, SILENT, None, None, None];
    let paths = server_with(&[standby, standby, standby, None, Some(PathStatus::Dropped), standby], &lost);
    let of = |what: fn(&Paths, usize) -> bool| (0..7).filter(|at| what(&paths, *at)).collect::<Vec<_>>();
    assert_eq!(of(Paths::is_usable), [0, 1]);
    assert_eq!(of(Paths::is_spare), [0, 1, 2]);
    assert_eq!(of(Paths::is_other), [1, 2, 3, 6]);
}

#[test]
fn copies_go_wherever_something_answers() {
    let copy = Some(PathStatus::Copy);
    let paths = server_with(&[copy, copy, copy, None, copy], &[None, BACK, SILENT, None, None]);
    assert_eq!(paths.targets, [0, 1, 2]);
}

#[test]
fn one_other_path_helps_while_the_one_in_use_is_in_doubt() {
    let standby = Some(PathStatus::Standby);
    let mut paths = server_with(&[standby, standby, standby, standby], &[SILENT, BACK, None, None]);
    for (tries, targets) in [(0, &[0][..]), (1, &[0]), (2, &[0, 2]), (3, &[0, 2])] {
        if tries > 0 {
            paths.list[0].asked.take_if(|_| tries == 1);
            paths.ask(start(), 0, false);
        }
        paths.refresh();
        assert_eq!(paths.targets, targets, "after {tries} tries");
    }
}

#[test]
fn data_goes_to_both_until_a_move_is_proven_and_to_none_twice() {
    let (old, new) = (at("192.0.2.1:4000"), at("203.0.113.5:6000"));
    let mut paths = server(old);
    paths.heard(start() + 30 * MS, new, true, PACKET, None);
    assert_eq!(paths.targets, [0, 1]);
    answer(&mut paths, start() + 31 * MS, new);
    paths.handle_timeout(start() + 500 * MS);
    assert_eq!((here(&paths), paths.targets.as_slice()), (new, &[0][..]));
    // Where it was before it is at once, and the other gets its data for a while.
    paths.heard(start() + 600 * MS, old, true, PACKET, None);
    assert_eq!((here(&paths), paths.targets.as_slice()), (old, &[0, 1][..]));
    paths.switch(start() + 601 * MS, 1);
    assert_eq!((here(&paths), paths.targets.as_slice()), (new, &[0][..]));
}

/// A client with ways of these carriers, all of them proven.
pub(super) fn client(carriers: &[u8]) -> Paths {
    let ways: Vec<Path> = carriers.iter().map(|carrier| at("198.51.100.1:55555").by(*carrier)).collect();
    let mut paths = Paths::dialled(Secret::from_bytes([1; 32]), ways[0], start());
    paths.set_ways(start(), &ways);
    for known in &mut paths.list {
        (known.proven, known.asked, known.rtt) = (true, None, Some(20 * MS));
    }
    paths.refresh();
    said(&mut paths);
    paths
}

#[test]
fn a_clients_spare_way_is_asked_now_and_then_while_there_is_traffic() {
    let mut paths = client(&[0, 1]);
    assert_eq!(paths.due(1), None, "nothing was sent");
    paths.sent = start();
    assert_eq!(paths.due(1), None, "it was asked since");
    paths.sent = start() + MS;
    assert_eq!((paths.due(0), paths.due(1)), (None, Some(start() + Duration::from_secs(20))));
    paths.list[1].lost = SILENT;
    assert_eq!(paths.due(1), Some(Time::default()), "when its turn is");
    let mut server = server_with(&[Some(PathStatus::Standby), None], &[None, None]);
    server.sent = start() + Duration::from_secs(60);
    assert_eq!(server.due(1), None);
}

#[test]
fn how_long_silence_is_borne_is_a_matter_of_what_else_there_is() {
    let second = Duration::from_secs(1);
    let lost = |wait| Some(known::Lost { ask_at: start(), wait, back: None });
    let with = |carrier, proven, lost| {
        let mut paths = client(&[0, carrier]);
        (paths.list[1].proven, paths.list[1].lost) = (proven, lost);
        paths.patience(0)
    };
    assert_eq!(with(1, true, None), Some(30 * MS));
    assert_eq!(with(1, true, lost(8 * second)), Some(30 * MS), "it may be back");
    assert_eq!(with(1, true, lost(16 * second)), Some(second));
    assert_eq!(with(INSIDE, true, None), Some(second));
    for carrier in [1, INSIDE] {
        assert_eq!(with(carrier, false, None), Some(3 * second), "it never answered");
    }
    assert_eq!(client(&[0]).patience(0), Some(3 * second));
    assert_eq!(server(at("192.0.2.1:4000")).patience(0), None);
}

#[test]
fn the_only_path_that_answers_nothing_is_suspected_once() {
    let suspected = |paths: &mut Paths| {
        let mut events = Vec::new();
        for ms in (0..2_000).step_by(10) {
            paths.handle_timeout(start() + ms * MS);
            let suspect = |event| (event == PathEvent::Suspect).then_some(ms);
            events.extend(std::iter::from_fn(|| paths.poll_event()).filter_map(suspect));
        }
        events
    };
    let mut alone = client(&[0]);
    alone.probe(start());
    let events = suspected(&mut alone);
    assert!(events.len() == 1 && events[0] >= 1_500, "{events:?}");
    let mut blind = client(&[0]);
    blind.list[0].proven = false;
    blind.probe(start());
    let events = suspected(&mut blind);
    assert!(events.len() == 1 && (700..1_500).contains(&events[0]), "{events:?}");
    let mut another = client(&[0, 1]);
    another.probe(start());
    assert!(suspected(&mut another).is_empty());
}

#[test]
fn shared_flows_leave_a_path_after_its_third_try() {
    for (mode, tries) in [(Mode::Balance, 3), (Mode::Failover, 8)] {
        let mut paths = client(&[0, 1]);
        paths.mode = mode;
        paths.ask(start(), 1, false);
        let mut most = 1;
        while !paths.list[1].is_lost() {
            let due = paths.due(1).expect("something to do");
            paths.look_at(due, 1);
            most = paths.list[1].asked.as_ref().map_or(most, |asked| most.max(asked.tries.len()));
        }
        assert_eq!(most, tries, "{mode:?}");
    }
}

#[test]
fn a_lost_path_is_asked_less_and_less_often() {
    let mut paths = client(&[0, 1]);
    paths.lose(start(), 1);
    let mut waits = Vec::new();
    let mut now = start();
    for _ in 0..7 {
        let due = paths.due(1).expect("a turn");
        waits.push((due - now).as_secs());
        now = due;
        paths.look_at(now, 1);
        paths.list[1].asked = None;
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
}

#[test]
fn tries_follow_each_other_at_the_pace_of_the_path() {
    let waits = |mut paths: Paths, rtt: Option<Duration>| -> Vec<u128> {
        paths.list[0].rtt = rtt;
        let wait = |paths: &mut Paths| {
            paths.ask(start(), 0, false);
            paths.list[0].asked.as_ref().map(|asked| (asked.again - start()).as_millis())
        };
        (0..5).filter_map(|_| wait(&mut paths)).collect()
    };
    assert_eq!(waits(client(&[0]), None), [250, 500, 1_000, 2_000, 2_000]);
    assert_eq!(waits(client(&[0]), Some(10 * MS)), [50, 100, 200, 400, 800]);
    assert_eq!(waits(client(&[0]), Some(100 * MS)), [200, 400, 800, 1_600, 2_000]);
    // There is another: no time for a second round trip.
    assert_eq!(waits(client(&[0, 1]), Some(100 * MS)), [180, 360, 720, 1_440, 2_000]);
    let mut lost = client(&[0, 1]);
    lost.list[1].lost = SILENT;
    assert_eq!(waits(lost, Some(100 * MS)), [200, 400, 800, 1_600, 2_000]);
}

#[test]
fn a_path_in_doubt_has_the_others_asked() {
    let mut paths = client(&[0, 1, 2]);
    paths.list[2].proven = false;
    let asked = |paths: &Paths| -> Vec<usize> {
        let tries = |known: &Known| known.asked.as_ref().map_or(0, |asked| asked.tries.len());
        paths.list.iter().map(tries).collect()
    };
    let mut seen = vec![];
    paths.probe(start());
    for _ in 0..3 {
        seen.push(asked(&paths));
        let again = paths.due(0).expect("another try");
        paths.look_at(again, 0);
    }
    seen.push(asked(&paths));
    assert_eq!(seen, [[1, 0, 0], [2, 1, 0], [3, 1, 0], [4, 1, 0]]);
    // One that was asked before, and may have to wait long for its next turn, is asked anew with the second try.
    let mut paths = client(&[0, 1]);
    paths.probe(start());
    (0..3).for_each(|_| paths.ask(start(), 1, false));
    paths.look_at(start() + Duration::from_secs(1), 0);
    assert_eq!(asked(&paths), [2, 1]);
    // Of a server, what its client doesn't use beside the first is left alone.
    let mut paths = server_with(&[None, Some(PathStatus::Standby), None], &[None, None, None]);
    paths.probe(start());
    paths.look_at(start() + Duration::from_secs(1), 0);
    assert_eq!(asked(&paths), [2, 0, 1, 0]);
}

#[test]
fn every_try_of_a_rebind_is_one() {
    let mut paths = client(&[0]);
    paths.rebind(start());
    paths.ask(start(), 0, false);
    let rebinds = said(&mut paths).into_iter().filter(|(_, message)| *message == InBand::Rebind).count();
    assert_eq!(rebinds, 2);
}

#[test]
fn what_the_client_says_of_its_ways() {
    use PathStatus::{Copy, Preferred, Share, Standby};
    for (carriers, mode, words) in [
        ([0, 1, INSIDE], Mode::Failover, [Preferred, Standby, Standby]),
        ([0, 1, INSIDE], Mode::Redundant, [Copy, Copy, Standby]),
        ([0, 1, INSIDE], Mode::Balance, [Share, Share, Standby]),
        ([INSIDE, 0, 1], Mode::Failover, [Preferred, Standby, Standby]),
        ([INSIDE, 0, 1], Mode::Redundant, [Preferred, Copy, Copy]),
        ([INSIDE, 0, 1], Mode::Balance, [Preferred, Share, Share]),
    ] {
        let mut paths = client(&carriers);
        paths.mode = mode;
        assert_eq!([0, 1, 2].map(|at| paths.word_on(at)), words, "{mode:?} of {carriers:?}");
    }
}

#[test]
fn a_round_trip_is_smoothed() {
    let mut paths = client(&[0]);
    for (sample, rtt) in [(100, 30), (30, 30), (110, 40)] {
        paths.probe(start());
        answer(&mut paths, start() + sample * MS, at("198.51.100.1:55555"));
        assert_eq!(paths.list[0].rtt, Some(rtt * MS));
    }
}

#[test]
fn another_that_answers_takes_over_from_one_that_was_asked_twice() {
    for (tries, moves) in [(0, false), (1, false), (2, true), (3, true)] {
        let mut paths = client(&[0, 1]);
        (0..tries).for_each(|_| paths.ask(start(), 0, false));
        paths.ask(start(), 1, false);
        let other = paths.list[1].path;
        answer(&mut paths, start() + 20 * MS, other);
        assert_eq!(here(&paths) == other, moves, "after {tries} tries");
    }
}

#[test]
fn the_client_says_which_path_it_is_on() {
    let standby = Some(PathStatus::Standby);
    let fresh = || server_with(&[standby, standby, None], &[None, None, None]);
    let tell = |paths: &mut Paths, at: usize, status| {
        let path = paths.list[at].path;
        paths.heard(start() + 30 * MS, path, true, PACKET, Some(InBand::PathStatus(status)));
        path
    };
    let mut paths = fresh();
    let other = tell(&mut paths, 1, PathStatus::Preferred);
    assert_eq!((here(&paths), paths.nomination.is_some_and(|n| n.rebind)), (other, true));
    let mut paths = fresh();
    let same = tell(&mut paths, 0, PathStatus::Preferred);
    assert_eq!((here(&paths), paths.nomination.is_some()), (same, false));
    let mut paths = fresh();
    let left = tell(&mut paths, 0, PathStatus::Dropped);
    assert_eq!((here(&paths) != left, paths.list[1].path), (true, left));
    let mut paths = fresh();
    let same = here(&paths);
    tell(&mut paths, 1, PathStatus::Dropped);
    assert_eq!((here(&paths), paths.is_other(1)), (same, false));
    // Where there is no other it stays.
    let mut alone = server(at("192.0.2.1:4000"));
    let same = tell(&mut alone, 0, PathStatus::Dropped);
    assert_eq!(here(&alone), same);
}

#[test]
fn a_spare_that_is_heard_is_no_move() {
    use PathStatus::{Copy, Share, Standby};
    let (new, now) = (at("203.0.113.5:6000"), start() + 30 * MS);
    let tell = |paths: &mut Paths, path: Path, status| {
        paths.heard(now, path, true, PACKET, Some(InBand::PathStatus(status)));
    };
    for (status, message, stays) in [
        (Standby, None, false),
        (Standby, Some(InBand::Rebind), false),
        (Copy, None, false),
        (Copy, Some(InBand::Rebind), true),
        (Share, None, false),
        (Share, Some(InBand::Rebind), true),
    ] {
        let mut paths = server(at("192.0.2.1:4000"));
        paths.heard(now, new, true, REBIND_BYTES, message);
        tell(&mut paths, new, status);
        assert_eq!(paths.nomination.is_some(), stays, "{status:?} after {message:?}");
    }
    // That says nothing of another's move, nor of one that was made already.
    let mut paths = server_with(&[None, None], &[None, None]);
    paths.heard(now, new, true, PACKET, None);
    let other = paths.list[1].path;
    said(&mut paths);
    tell(&mut paths, other, Standby);
    assert_eq!(paths.nomination.map(|n| n.key), Some(new.key()));
    assert!(said(&mut paths).is_empty(), "it has answered");
    let unproven = paths.list[2].path;
    for asked in [true, false] {
        tell(&mut paths, unproven, Standby);
        assert_eq!(said(&mut paths).len(), usize::from(asked), "once is enough");
    }
    let mut paths = server_with(&[None, None], &[None, None]);
    let other = paths.list[1].path;
    paths.heard(now, other, true, PACKET, None);
    tell(&mut paths, other, Standby);
    assert_eq!((here(&paths), paths.nomination.is_some()), (other, true));
}

#[test]
fn of_too_many_paths_a_stranger_silent_for_longest_is_forgotten() {
    let standby = Some(PathStatus::Standby);
    let mut paths = server(at("192.0.2.1:4000"));
    let path = |n: u16| Path::new(([203, 0, 113, 1], 1_000 + n).into(), None);
    // As long ago as they were heard: (how long, proven, status).
    for (n, (ago, proven, status)) in [
        (900, false, standby),
        (800, true, standby),
        (700, true, None),
        (500, false, None),
        (600, false, None),
        (400, true, None),
        (300, true, None),
    ]
    .into_iter()
    .enumerate()
    {
        paths.add(start(), path(n as u16));
        let known = paths.list.last_mut().expect("one");
        (known.proven, known.status) = (proven, status);
        known.heard = Time::from_nanos(1_000 - ago);
    }
    let mut forgotten = Vec::new();
    for n in 7..12 {
        let before: Vec<Path> = paths.list.iter().map(|known| known.path).collect();
        paths.add(start(), path(n));
        assert_eq!(paths.list.len(), MOST_KNOWN);
        forgotten
            .extend((0..n).filter(|n| before.contains(&path(*n)) && paths.find(path(*n).key()).is_none()));
        // It has come to stay.
        paths.list.last_mut().expect("one").proven = true;
    }
    assert_eq!(forgotten, [4, 3, 2, 5, 6]);
    // The one that is being looked into stays.
    let mut paths = server(at("192.0.2.1:4000"));
    paths.heard(start(), path(0), true, PACKET, None);
    (1..20).for_each(|n| paths.add(start() + MS, path(n)));
    assert!(paths.find(path(0).key()).is_some());
}

#[test]
fn a_move_to_a_known_path_is_taken_back_if_only_the_old_one_answers() {
    let standby = Some(PathStatus::Standby);
    let now = start() + 30 * MS;
    // Where it is said to be by what; who answers; what the client said of the old one; when that is decided.
    for (message, [old_answers, new_answers], status, stays, decided) in [
        (None, [true, false], None, false, 1_000),
        (None, [true, false], Some(PathStatus::Preferred), false, 1_000),
        (None, [true, false], standby, true, 3_000),
        (None, [false, false], None, true, 3_000),
        (None, [true, true], None, true, 100),
        (Some(InBand::Rebind), [true, false], None, true, 3_000),
    ] {
        let mut paths = server_with(&[None, None], &[None, None]);
        let (old, new) = (here(&paths), paths.list[1].path);
        paths.heard(now, new, true, PACKET, message);
        assert_eq!(here(&paths), new);
        let answered = |paths: &mut Paths, path: Path| {
            let at = paths.find(path.key()).expect("known");
            (paths.list[at].answered, paths.list[at].asked) = (Some(now + 20 * MS), None);
        };
        if old_answers {
            answered(&mut paths, old);
        }
        if new_answers {
            answered(&mut paths, new);
        }
        let at = paths.find(old.key()).expect("known");
        paths.list[at].status = status;
        let mut when = 0;
        for ms in (100..4_000).step_by(100) {
            paths.handle_timeout(now + ms * MS);
            if paths.nomination.is_none() && when == 0 {
                when = ms;
            }
        }
        assert_eq!((here(&paths) == new, when), (stays, decided), "{message:?}, {status:?}");
        let at = paths.find(new.key()).expect("known");
        assert_eq!(paths.list[at].proven, stays, "it has to answer first next time");
    }
}

#[test]
fn who_left_the_old_path_moves_with_the_first_answer() {
    let (new, now) = (at("203.0.113.5:6000"), start() + 30 * MS);
    for (status, moves) in [
        (None, false),
        (Some(PathStatus::Preferred), false),
        (Some(PathStatus::Standby), true),
        (Some(PathStatus::Dropped), true),
    ] {
        let mut paths = server(at("192.0.2.1:4000"));
        paths.heard(now, new, true, PACKET, None);
        paths.list[0].status = status;
        answer(&mut paths, now + MS, new);
        assert_eq!(here(&paths) == new, moves, "{status:?}");
        if !moves {
            // One and a half round trips of 20 ms, and 10 more.
            assert_eq!(paths.nomination.map(|n| n.grace), Some(now + 40 * MS));
        }
    }
}

#[test]
fn what_the_client_left_has_no_word_of_it_any_more() {
    use PathStatus::{Preferred, Standby};
    for (status, lost, after) in [
        (Some(Preferred), None, None),
        (Some(Standby), None, Some(Standby)),
        (Some(Preferred), SILENT, Some(Preferred)),
    ] {
        let mut paths = server_with(&[None, None], &[None, None]);
        (paths.list[0].status, paths.list[0].lost) = (status, lost);
        paths.switch(start(), 1);
        assert_eq!(paths.list[1].status, after, "{status:?}, {lost:?}");
    }
    // A spare that a REBIND came by is the client's choice.
    for status in [Standby, PathStatus::Copy] {
        let mut paths = server_with(&[Some(status), None], &[None, None]);
        let path = paths.list[1].path;
        paths.heard(start() + 30 * MS, path, true, REBIND_BYTES, Some(InBand::Rebind));
        let expected = if status == Standby { Preferred } else { status };
        assert_eq!((here(&paths), paths.list[0].status), (path, Some(expected)));
    }
}

#[test]
fn a_client_that_may_have_moved_says_so_at_once() {
    let mut paths = client(&[0]);
    paths.rebind(start());
    let path = here(&paths);
    assert_eq!(said(&mut paths).first(), Some(&(path, InBand::Rebind)));
    // Where there is no path there is nothing to say.
    let mut nowhere = Paths::following(Secret::from_bytes([1; 32]), None);
    nowhere.rebind(start());
    nowhere.handle_timeout(start());
    assert!(said(&mut nowhere).is_empty());
}

#[test]
fn the_best_way_answers_is_trusted_and_comes_first_in_this_order() {
    for (first, second, best) in [
        ((true, None), (true, None), 0),
        ((false, None), (true, None), 1),
        ((true, BACK), (true, None), 1),
        ((true, SILENT), (false, BACK), 1),
        ((true, BACK), (true, SILENT), 0),
        ((false, None), (false, None), 0),
    ] {
        let mut paths = client(&[0, 1]);
        (paths.list[0].proven, paths.list[0].lost) = first;
        (paths.list[1].proven, paths.list[1].lost) = second;
        assert_eq!(paths.best(), best, "{first:?}, {second:?}");
    }
}

#[test]
fn a_way_that_was_just_dialled_has_a_try_before_another_is_used() {
    for (tries, moves) in [(0, true), (1, false), (2, true)] {
        let mut paths = client(&[0, 1]);
        paths.list[0].proven = false;
        (0..tries).for_each(|_| paths.ask(start(), 0, false));
        paths.choose(start());
        assert_eq!(here(&paths).carrier == 1, moves, "after {tries} tries");
    }
}

#[test]
fn the_server_goes_back_to_what_its_client_prefers() {
    let (preferred, standby) = (Some(PathStatus::Preferred), Some(PathStatus::Standby));
    for (status, moves) in [(standby, true), (preferred, false), (None, false)] {
        let mut paths = server_with(&[standby, preferred, None], &[None, None, None]);
        paths.list[0].status = status;
        let wanted = paths.list[2].path;
        paths.choose(start());
        assert_eq!(here(&paths) == wanted, moves, "{status:?}");
    }
}

#[test]
fn candidates_that_came_to_nothing_are_forgotten() {
    let standby = Some(PathStatus::Standby);
    let mut paths = server_with(&[None, standby, None, None], &[None, None, None, None]);
    paths.list[2].proven = false;
    paths.list[3].proven = false;
    let kept: Vec<Path> = paths.list[..3].iter().map(|known| known.path).collect();
    paths.forget_strangers();
    assert_eq!(paths.list.iter().map(|known| known.path).collect::<Vec<_>>(), kept);
}

#[test]
fn ways_that_are_known_already_are_no_news() {
    for carriers in [&[0][..], &[0, 1]] {
        let mut paths = client(carriers);
        let ways: Vec<Path> = paths.list.iter().map(|known| known.path).collect();
        for known in &mut paths.list {
            known.answered = Some(start());
            known.status = (ways.len() > 1).then_some(PathStatus::Standby);
        }
        paths.set_ways(start() + MS, &ways);
        assert_eq!(said(&mut paths), [], "{carriers:?}");
        // One that never answered is asked, but if it is being asked already.
        for asked in [1, 0] {
            paths.list[0].answered = None;
            paths.set_ways(start() + MS, &ways);
            let challenge = |(_, message): &(Path, InBand)| matches!(message, InBand::PathChallenge(_));
            assert_eq!(said(&mut paths).iter().filter(|said| challenge(said)).count(), asked, "{carriers:?}");
        }
    }
    // There is a second one now: the server is to hear what each is for.
    let mut paths = client(&[0]);
    let way = here(&paths);
    paths.list[0].answered = Some(start());
    paths.set_ways(start() + MS, &[way, way.by(1)]);
    let words: Vec<_> =
        said(&mut paths).into_iter().filter(|(_, said)| matches!(said, InBand::PathStatus(_))).collect();
    let word = |at: Path, status| (at, InBand::PathStatus(status));
    assert_eq!(words, [word(way, PathStatus::Preferred), word(way.by(1), PathStatus::Standby)]);
}

#[test]
fn others_hear_of_a_move_and_of_silence() {
    let mut paths = server(at("192.0.2.1:4000"));
    let known = |paths: &Paths| (paths.known()[0].last_heard(), paths.known()[0].is_lost());
    paths.heard(start() + 30 * MS, at("192.0.2.1:4000"), true, PACKET, None);
    assert_eq!(known(&paths), (start() + 30 * MS, false));
    paths.list[0].lost = SILENT;
    assert_eq!(known(&paths), (start() + 30 * MS, true));
}

#[test]
fn who_is_asked_whether_the_client_moved() {
    let (old, new) = (at("192.0.2.1:4000"), at("203.0.113.5:6000"));
    // Whoever says that it moved isn't at the old place.
    for (message, asked) in [(None, vec![new, old]), (Some(InBand::Rebind), vec![new])] {
        let mut paths = server(old);
        paths.heard(start() + 30 * MS, new, true, REBIND_BYTES, message);
        assert_eq!(said(&mut paths).iter().map(|said| said.0).collect::<Vec<_>>(), asked, "{message:?}");
    }
}

#[test]
fn a_word_on_the_path_in_use_ends_no_nomination() {
    let (old, new) = (at("192.0.2.1:4000"), at("203.0.113.5:6000"));
    let mut paths = server(old);
    paths.heard(start() + 30 * MS, new, true, PACKET, None);
    // It may have been delayed, as a REBIND that counts wasn't.
    for (newest, message, ends) in [
        (true, InBand::PathStatus(PathStatus::Preferred), false),
        (false, InBand::Rebind, false),
        (true, InBand::Rebind, true),
    ] {
        paths.heard(start() + 31 * MS, old, newest, PACKET, Some(message));
        assert_eq!(paths.nomination.is_none(), ends, "{message:?}");
    }
}

#[test]
fn bytes_are_spent_where_they_may_be() {
    let (client_at, other) = (at("192.0.2.1:4000"), at("192.0.2.1:4001"));
    let mut paths = Paths::following(Secret::from_bytes([1; 32]), None);
    paths.heard(start(), client_at, true, PACKET, None);
    for (path, bytes, may) in [(client_at, 3 * PACKET, true), (client_at, 1, false), (other, 1, false)] {
        assert_eq!(paths.spend(path, bytes), may, "{path:?}");
    }
    // The server is no stranger to its client, even before it has answered.
    let mut paths = Paths::dialled(Secret::from_bytes([1; 32]), client_at, start());
    assert!(paths.spend(client_at, 100_000) && paths.spend(other, 100_000));
}

#[test]
fn where_data_goes_and_where_else_it_can() {
    assert_eq!(Paths::following(Secret::from_bytes([1; 32]), None).targets(), 0);
    for (mode, lost, targets, another) in [
        (Mode::Failover, None, 1, true),
        (Mode::Failover, SILENT, 1, false),
        (Mode::Redundant, None, 2, false),
    ] {
        let mut paths = client(&[0, 1]);
        (paths.mode, paths.list[1].lost) = (mode, lost);
        paths.refresh();
        assert_eq!(paths.targets(), targets);
        let spare = paths.list[1].path;
        assert_eq!(paths.way_out(start()), another.then_some(spare), "{mode:?}, {lost:?}");
        assert_eq!(paths.list[1].waiting, another.then_some(start()));
    }
}

#[test]
fn the_next_deadline_is_the_earliest() {
    let mut paths = client(&[0, 1]);
    assert_eq!(paths.poll_timeout(), None);
    paths.ask(start() + MS, 1, false);
    paths.ask(start(), 0, false);
    assert_eq!(paths.poll_timeout(), paths.list[0].asked.as_ref().map(|asked| asked.again));
}

#[test]
fn a_path_is_given_up_where_there_is_another() {
    for (carriers, at, lost) in [(&[0][..], 0, false), (&[0, 1], 0, true), (&[0, 1], 1, true)] {
        let mut paths = client(carriers);
        paths.lose(start(), at);
        assert_eq!(
            (paths.list[at].is_lost(), paths.poll_event().is_none()),
            (lost, lost),
            "{at} of {carriers:?}"
        );
    }
}
