//! What a datagram from somewhere does to where the peer is taken to be.

use super::*;

const MS: Duration = Duration::from_millis(1);
const PACKET: usize = 100;

fn at(text: &str) -> Path {
    Path::new(text.parse().expect("an address"), None)
}

fn start() -> Time {
    Time::default() + Duration::from_secs(1)
}

/// What is said, in order.
fn said(paths: &mut Paths) -> Vec<(Path, InBand)> {
    std::iter::from_fn(|| paths.poll_say()).map(|say| (say.path, say.message)).collect()
}

/// The peer answers what was asked by `path`.
fn answer(paths: &mut Paths, now: Time, path: Path) {
    let asked = said(paths).into_iter().rev().find_map(|(by, message)| match message {
        InBand::PathChallenge(nonce) if by == path => Some(nonce),
        _ => None,
    });
    let nonce = asked.expect("a challenge");
    paths.heard(now, path, true, PACKET, Some(InBand::PathResponse(nonce, path.remote)));
}

/// A server whose client is at `here`, and has answered there.
fn server(here: Path) -> Paths {
    let mut paths = Paths::following(Secret::from_bytes([1; 32]), None);
    paths.heard(start(), here, true, PACKET, None);
    answer(&mut paths, start() + 20 * MS, here);
    said(&mut paths);
    paths
}

fn here(paths: &Paths) -> Path {
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
fn server_with(statuses: &[Option<PathStatus>], lost: &[Option<known::Lost>]) -> Paths {
    let mut paths = server(at("192.0.2.1:4000"));
    for (n, (status, lost)) in statuses.iter().zip(lost).enumerate() {
        paths.add(start(), Path::new(([203, 0, 113, 1], 1_000 + n as u16).into(), None));
        let known = paths.list.last_mut().expect("one");
        (known.proven, known.status, known.lost) = (n + 1 < statuses.len(), *status, *lost);
    }
    paths.refresh();
    paths
}

const SILENT: Option<known::Lost> =
    Some(known::Lost { ask_at: Time::from_nanos(0), wait: Duration::from_secs(1), back: None });
const BACK: Option<known::Lost> = Some(known::Lost {
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
