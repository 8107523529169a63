use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn limits() -> Limits {
    Limits { handshakes: 64, per_source: 8, penalty: Some(Duration::from_secs(600)), exempt: vec![] }
}

fn at(seconds: u64) -> Time {
    Time::from_nanos(seconds * 1_000_000_000)
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

/// Host `n` of an IPv4 network.
fn host(n: u16) -> IpAddr {
    IpAddr::from([198, 18, (n >> 8) as u8, n as u8])
}

/// The unluckiest and the luckiest lot.
const UNLUCKY: u16 = 0;
const LUCKY: u16 = u16::MAX;

impl Gate {
    fn knocks(&mut self, from: IpAddr, now: Time) -> Verdict {
        self.handle_connection(from, UNLUCKY, now)
    }

    /// A whole handshake that fails.
    fn fails(&mut self, from: IpAddr, how: Failed, now: Time) -> Verdict {
        let verdict = self.handle_connection(from, LUCKY, now);
        if verdict == Verdict::Serve {
            self.handle_failed(from, how, now);
            self.handle_gone(from, Stage::Handshake, now);
        }
        verdict
    }

    /// A whole session.
    fn visits(&mut self, from: IpAddr, now: Time) -> Verdict {
        let verdict = self.handle_connection(from, LUCKY, now);
        if verdict == Verdict::Serve {
            self.handle_established(from, now);
            self.handle_gone(from, Stage::Session, now);
        }
        verdict
    }
}

const PENALISED: Verdict = Verdict::Refuse(Refusal::Penalised);
const EARLY: Verdict = Verdict::Refuse(Refusal::Early);

#[test]
fn a_source_is_an_ipv4_address_or_what_a_customer_has_of_ipv6() {
    for (a, b, same) in [
        ("192.0.2.1", "192.0.2.1", true),
        ("192.0.2.1", "::ffff:192.0.2.1", true),
        ("192.0.2.1", "192.0.2.2", false),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", true),
        ("2001:db8::1", "2001:db8:0:1::1", false),
    ] {
        assert_eq!(Source::of(ip(a)) == Source::of(ip(b)), same, "{a} {b}");
    }
    assert_eq!(Source::of(ip("::ffff:192.0.2.1")).to_string(), "192.0.2.1");
    assert_eq!(Source::of(ip("2001:db8::7")).to_string(), "2001:db8::/64");
}

#[test]
fn while_it_is_shut_everybody_waits_and_then_is_served_in_turn() {
    let mut gate = Gate::new(Limits { exempt: vec!["192.0.2.0/24".parse().expect("a network")], ..limits() });
    gate.set_shut(true);
    for (number, from) in [(0, host(1)), (1, host(2)), (2, ip("192.0.2.1"))] {
        assert_eq!(gate.knocks(from, at(0)), Verdict::Wait(number), "{from}");
    }
    assert_eq!((gate.poll_next(at(0)), gate.waiting(), gate.handshakes()), (None, 3, 0));
    gate.set_shut(false);
    let served: Vec<u64> = std::iter::from_fn(|| gate.poll_next(at(1))).collect();
    assert_eq!((served, gate.handshakes()), (vec![2, 0, 1], 3));
    // Not for ever, and nobody's source is charged for it.
    gate.set_shut(true);
    assert_eq!(gate.knocks(host(3), at(10)), Verdict::Wait(3));
    assert_eq!(gate.poll_timeout(), Some(at(10) + WAIT));
    assert_eq!(gate.poll_dropped(at(10) + WAIT), Some((3, Refusal::Late)));
    gate.set_shut(false);
    assert_eq!(gate.knocks(host(3), at(20)), Verdict::Serve);
}

#[test]
fn one_host_takes_its_share_and_others_get_in_at_once() {
    let mut gate = Gate::new(limits());
    let attacker = host(1);
    let verdicts: Vec<Verdict> = (0..300).map(|_| gate.knocks(attacker, at(0))).collect();
    assert_eq!(verdicts.iter().filter(|v| **v == Verdict::Serve).count(), 8);
    assert_eq!(gate.waiting(), 64);
    assert_eq!(gate.refused(Refusal::Crowded), 300 - 8 - 64);
    assert_eq!(gate.knocks(host(2), at(0)), Verdict::Serve);
    // Its connections fail at their deadline, and then it is refused.
    for _ in 0..8 {
        gate.handle_failed(attacker, Failed::Deadline, at(10));
        gate.handle_gone(attacker, Stage::Handshake, at(10));
    }
    while gate.poll_dropped(at(10)).is_some() {}
    assert_eq!((gate.poll_next(at(10)), gate.waiting(), gate.handshakes()), (None, 0, 1));
    assert_eq!(gate.knocks(attacker, at(10)), PENALISED);
    assert_eq!(gate.penalised(at(10)), [(Source::of(attacker), Duration::from_secs(50))]);
    // For as long as it held places more than once; then one at a time, until that has passed, too.
    assert_eq!(gate.knocks(attacker, at(59)), PENALISED);
    assert_eq!(gate.knocks(attacker, at(60)), Verdict::Serve);
    assert_eq!(gate.knocks(attacker, at(60)), Verdict::Wait(64));
    assert_eq!(gate.poll_next(at(61)), None);
    assert_eq!(gate.poll_dropped(at(64)), Some((64, Refusal::Late)));
}

#[test]
fn a_class_behind_one_address_gets_in_in_turn() {
    let mut gate = Gate::new(limits());
    let school = host(1);
    let verdicts: Vec<Verdict> = (0..30).map(|_| gate.knocks(school, at(0))).collect();
    let waiting: Vec<u64> =
        verdicts.iter().filter_map(|v| if let Verdict::Wait(n) = v { Some(*n) } else { None }).collect();
    assert_eq!((gate.handshakes(), waiting.len()), (8, 22));
    let mut turns = Vec::new();
    for _ in 0..30 {
        assert_eq!(gate.poll_next(at(1)), None, "the share is taken");
        gate.handle_established(school, at(1));
        turns.extend(gate.poll_next(at(1)));
    }
    assert_eq!(turns, waiting, "first come, first served");
    assert_eq!((gate.handshakes(), gate.waiting(), gate.poll_timeout()), (0, 0, None));
    assert!(Refusal::ALL.iter().all(|why| gate.refused(*why) == 0));
}

#[test]
fn mistakes_never_lock_a_source_out() {
    let mut gate = Gate::new(limits());
    let school = host(1);
    // A laptop with an expired certificate, started again every second all weekend, and nobody known.
    for second in 0..100_000 {
        assert_eq!(gate.fails(school, Failed::Certificate, at(second)), Verdict::Serve);
    }
    let now = at(100_000);
    assert_eq!(gate.penalised(now), []);
    // Its neighbours have one place at a time until the first of them is through, then their share.
    assert_eq!(gate.knocks(school, now), Verdict::Serve);
    let Verdict::Wait(second) = gate.knocks(school, now) else { panic!("two at once") };
    let Verdict::Wait(third) = gate.knocks(school, now) else { panic!("three at once") };
    assert_eq!(gate.poll_next(now), None);
    gate.handle_established(school, now);
    assert_eq!((gate.poll_next(now), gate.poll_next(now)), (Some(second), Some(third)));
}

#[test]
fn garbage_has_strangers_refused_and_neighbours_of_sessions_not() {
    let mut gate = Gate::new(limits());
    let (stranger, known) = (host(1), host(2));
    assert_eq!(gate.visits(known, at(0)), Verdict::Serve);
    let served = |gate: &mut Gate, from, how| {
        (0..1_000).take_while(|_| gate.fails(from, how, at(1)) == Verdict::Serve).count()
    };
    assert_eq!(served(&mut gate, stranger, Failed::Garbage), 7);
    assert_eq!(served(&mut gate, known, Failed::Garbage), 1_000);
    // Who takes workers over is refused whoever lives next door; but not for ever.
    assert_eq!(served(&mut gate, known, Failed::Violation), 1);
    assert_eq!(gate.knocks(known, at(1)), PENALISED);
    assert_eq!(gate.knocks(known, at(1 + 40)), Verdict::Serve);
    gate.handle_gone(known, Stage::Handshake, at(1 + 40));
    // A day after its last session it is a stranger.
    let later = at(2 * 86_400);
    assert_eq!((0..10).filter(|_| gate.fails(known, Failed::Garbage, later) == Verdict::Serve).count(), 7);
}

#[test]
fn a_penalty_is_bounded_decays_and_can_be_switched_off() {
    let mut gate = Gate::new(Limits { penalty: Some(Duration::from_secs(60)), ..limits() });
    let from = host(1);
    for _ in 0..8 {
        gate.knocks(from, at(0));
    }
    let turned: Vec<bool> = (0..100).map(|_| gate.handle_failed(from, Failed::Violation, at(0))).collect();
    assert_eq!(turned.iter().filter(|news| **news).count(), 1, "it is news once");
    assert_eq!(gate.penalised(at(0)), [(Source::of(from), Duration::from_secs(60))]);
    assert_eq!(gate.knocks(from, at(59)), PENALISED);
    assert_ne!(gate.knocks(from, at(61)), PENALISED);
    gate.set_limits(Limits { penalty: None, ..limits() });
    assert_ne!(gate.knocks(from, at(0)), PENALISED);
    assert!(!gate.handle_failed(from, Failed::Violation, at(0)));
}

#[test]
fn exempt_sources_have_no_share_and_no_penalties_but_only_the_places_there_are() {
    let exempt = vec!["10.0.0.0/8".parse().expect("a network")];
    let mut gate = Gate::new(Limits { exempt, ..limits() });
    let from = ip("::ffff:10.1.2.3");
    for _ in 0..64 {
        assert_eq!(gate.knocks(from, at(0)), Verdict::Serve);
        assert!(!gate.handle_failed(from, Failed::Violation, at(0)));
    }
    assert!(matches!(gate.knocks(from, at(0)), Verdict::Wait(_)));
}

#[test]
fn many_sources_leave_the_last_quarter_to_those_who_had_sessions() {
    let mut gate = Gate::new(limits());
    let (known, failed) = (host(1), host(2));
    assert_eq!(gate.visits(known, at(0)), Verdict::Serve);
    gate.fails(failed, Failed::Garbage, at(1));
    let spray = (1_000..5_000).filter(|n| gate.handle_connection(host(*n), LUCKY, at(1)) == Verdict::Serve);
    assert_eq!(spray.count(), 48);
    assert_eq!(gate.handle_connection(failed, LUCKY, at(1)), EARLY);
    let mine = (0..8).filter(|_| gate.knocks(known, at(1)) == Verdict::Serve);
    assert_eq!(mine.count(), 8);
    // Whoever failed comes after those who never did.
    let mut gate = Gate::new(limits());
    gate.fails(failed, Failed::Garbage, at(1));
    for n in 0..32 {
        assert_eq!(gate.handle_connection(host(1_000 + n), LUCKY, at(1)), Verdict::Serve);
    }
    assert_eq!(gate.handle_connection(failed, LUCKY, at(1)), EARLY);
    assert_eq!(gate.handle_connection(host(7), LUCKY, at(1)), Verdict::Serve);
}

#[test]
fn the_longest_line_gives_way_to_a_shorter_one() {
    let mut gate = Gate::new(Limits { handshakes: 4_096, per_source: 1, ..limits() });
    let waits = |gate: &mut Gate, from| match gate.knocks(from, at(0)) {
        Verdict::Wait(number) => Some(number),
        _ => None,
    };
    let mut last = None;
    for n in 0..4 {
        assert_eq!(gate.knocks(host(n), at(0)), Verdict::Serve);
        last = (0..64).map(|_| waits(&mut gate, host(n)).expect("room")).last();
    }
    assert_eq!(waits(&mut gate, host(0)), None, "a line has its end");
    assert_eq!(gate.knocks(host(9), at(0)), Verdict::Serve);
    assert!(waits(&mut gate, host(9)).is_some());
    assert_eq!(gate.poll_dropped(at(0)), last.map(|number| (number, Refusal::Crowded)));
    assert_eq!((gate.poll_dropped(at(0)), gate.waiting()), (None, MOST_WAITING));
    // And who has waited least is served first.
    gate.handle_gone(host(9), Stage::Handshake, at(0));
    gate.handle_gone(host(0), Stage::Handshake, at(0));
    assert_eq!(gate.poll_next(at(0)), Some(0));
    assert!(gate.poll_next(at(0)).is_some_and(|number| number > last.unwrap_or(0)));
}

#[test]
fn an_honest_stranger_gets_in_at_some_time_whoever_else_knocks() {
    // Others take every place they can get, all the time; a handshake of theirs lasts ten seconds.
    let mut gate = Gate::new(limits());
    let honest = ip("2001:db8:ffff::1");
    let mut held: VecDeque<(u64, IpAddr)> = VecDeque::new();
    let mut noise = 88_172_645_463_325_252_u64;
    let mut lot = move || {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        noise as u16
    };
    let (mut tries, mut waits) = (0, 0);
    for millisecond in 0..600_000 {
        let now = Time::from_nanos(millisecond * 1_000_000);
        while held.front().is_some_and(|(until, _)| *until <= millisecond) {
            let (_, from) = held.pop_front().expect("there is one");
            gate.handle_failed(from, Failed::Deadline, now);
            gate.handle_gone(from, Stage::Handshake, now);
        }
        // A fresh /64 each time, twenty a second.
        if millisecond % 50 == 0 {
            let from = IpAddr::from(Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(millisecond) << 64));
            if gate.handle_connection(from, lot(), now) == Verdict::Serve {
                held.push_back((millisecond + 10_000, from));
            }
        }
        // Once in two seconds.
        if millisecond % 2_000 == 999 {
            tries += 1;
            match gate.handle_connection(honest, lot(), now) {
                Verdict::Serve => {
                    gate.handle_gone(honest, Stage::Handshake, now);
                    waits += 1;
                }
                Verdict::Wait(_) => panic!("its share is free"),
                Verdict::Refuse(why) => assert_eq!(why, Refusal::Early),
            }
        }
    }
    assert!(waits * 10 >= tries, "it got in {waits} times of {tries}");
}

#[test]
fn a_spray_of_sources_is_forgotten_and_those_known_are_not() {
    let mut gate = Gate::new(limits());
    let known: Vec<IpAddr> = (0..100).map(host).collect();
    for from in &known {
        assert_eq!(gate.visits(*from, at(1)), Verdict::Serve);
    }
    for n in 0..20_000 {
        let from = IpAddr::from(Ipv6Addr::from_bits(0x2001_0db8 << 96 | n << 64));
        assert_eq!(gate.fails(from, Failed::Garbage, at(2)), Verdict::Serve);
        assert!(gate.sources() <= MOST_IDLE + 1);
    }
    assert!(gate.sources() > MOST_IDLE / 2);
    assert!(known.iter().all(|from| gate.standing(*from, at(3)) == Standing::Known));
    // If they are all known, the one that left first is forgotten first.
    for n in 0..10_000_u16 {
        assert_eq!(gate.visits(host(1_000 + n), at(3 + u64::from(n))), Verdict::Serve);
        assert!(gate.sources() <= MOST_IDLE + 1);
    }
    assert_eq!(gate.standing(host(10_999), at(20_000)), Standing::Known);
    assert_eq!(gate.standing(known[0], at(20_000)), Standing::Clean);
}

#[test]
fn what_a_worker_says_counts_as_what_it_is_and_our_own_faults_against_nobody() {
    for (cause, failed) in [
        (Cause::Ours, None),
        (Cause::Refused, None),
        (Cause::Left, Some(Failed::Left)),
        (Cause::Certificate, Some(Failed::Certificate)),
        (Cause::Garbage, Some(Failed::Garbage)),
        (Cause::Deadline, Some(Failed::Deadline)),
    ] {
        assert_eq!(Failed::of(cause), failed, "{cause:?}");
    }
}

#[test]
fn everything_is_counted_under_its_name() {
    let mut gate = Gate::new(limits());
    for (n, how) in (1..).zip(Failed::ALL) {
        for from in 0..n {
            gate.fails(host(n << 8 | from), how, at(0));
        }
    }
    let failed = Failed::ALL.map(|how| (how.name(), gate.failed(how)));
    let expected =
        [("left", 1), ("certificate", 2), ("garbage", 3), ("deadline", 4), ("crash", 5), ("violation", 6)];
    assert_eq!(failed, expected);
    // Eight of ten have their places, and the two that wait give way with the first violation.
    let mut gate = Gate::new(limits());
    for _ in 0..10 {
        gate.knocks(host(1), at(0));
    }
    gate.handle_failed(host(1), Failed::Violation, at(0));
    assert_eq!(gate.knocks(host(1), at(0)), PENALISED);
    let refused = Refusal::ALL.map(|why| (why.name(), gate.refused(why)));
    assert_eq!(refused, [("penalised", 3), ("early", 0), ("crowded", 0), ("late", 0)]);
    let told: HashSet<String> = Refusal::ALL.map(|why| why.to_string()).into();
    assert!(told.len() == 4 && told.iter().all(|why| !why.is_empty()), "{told:?}");
}

#[test]
fn a_line_is_not_shortened_for_one_that_would_be_as_long() {
    let mut gate = Gate::new(Limits { handshakes: 4_096, per_source: 1, ..limits() });
    for n in 0..MOST_WAITING as u16 {
        assert_eq!(gate.knocks(host(n), at(0)), Verdict::Serve);
        assert!(matches!(gate.knocks(host(n), at(0)), Verdict::Wait(_)));
    }
    let newcomer = host(9_999);
    assert_eq!(gate.knocks(newcomer, at(0)), Verdict::Serve);
    assert_eq!(gate.knocks(newcomer, at(0)), Verdict::Refuse(Refusal::Crowded), "all lines have one");
    assert_eq!((gate.poll_dropped(at(0)), gate.waiting()), (None, MOST_WAITING));
    // One gives up, and a line of two takes its place: that one gives way.
    gate.handle_gone(host(0), Stage::Handshake, at(0));
    assert_eq!(gate.poll_next(at(0)), Some(0));
    let Verdict::Wait(second) = gate.knocks(host(1), at(0)) else { panic!("there is room") };
    assert!(matches!(gate.knocks(newcomer, at(0)), Verdict::Wait(_)));
    assert_eq!(gate.poll_dropped(at(0)), Some((second, Refusal::Crowded)));
}

/// As long as the gate is shut everybody waits, and nobody's line is longer than another's: what counts is who they are.
#[test]
fn strangers_who_wait_give_way_to_known_and_exempt_sources_while_it_is_shut() {
    let mut gate = Gate::new(Limits { exempt: vec!["192.0.2.0/24".parse().expect("a network")], ..limits() });
    let (known, marked, exempt) = (ip("203.0.113.1"), ip("203.0.113.2"), ip("192.0.2.1"));
    assert_eq!(gate.visits(known, at(0)), Verdict::Serve);
    assert_eq!(gate.fails(marked, Failed::Garbage, at(0)), Verdict::Serve);
    gate.set_shut(true);
    assert_eq!(gate.knocks(marked, at(1)), Verdict::Wait(0));
    let verdicts: Vec<Verdict> = (0..300).map(|n| gate.knocks(host(n), at(1))).collect();
    // The marked one makes way for the last of those that have room, and nobody for the others.
    let (waits, refused) = verdicts.split_at(MOST_WAITING);
    assert!((1..).zip(waits).all(|(number, verdict)| *verdict == Verdict::Wait(number)));
    assert_eq!(refused, [Verdict::Refuse(Refusal::Crowded); 300 - MOST_WAITING]);
    assert_eq!((gate.poll_dropped(at(1)), gate.poll_dropped(at(1))), (Some((0, Refusal::Crowded)), None));
    assert_eq!(gate.knocks(marked, at(1)), Verdict::Refuse(Refusal::Crowded));
    // The latest strangers go first, and are forgotten; whatever line those have for whom they do.
    let last = MOST_WAITING as u64;
    let sources = gate.sources();
    for (number, from) in (last + 1..).zip([known, exempt, known, exempt]) {
        assert_eq!(gate.knocks(from, at(2)), Verdict::Wait(number), "{from}");
        let gone = 2 * last + 1 - number;
        assert_eq!(gate.poll_dropped(at(2)), Some((gone, Refusal::Crowded)));
    }
    // The known one was one of them before.
    assert_eq!(
        (gate.poll_dropped(at(2)), gate.waiting(), gate.sources()),
        (None, MOST_WAITING, sources - 4 + 1)
    );
    gate.set_shut(false);
    let served: Vec<u64> = std::iter::from_fn(|| gate.poll_next(at(2))).take(5).collect();
    assert_eq!(served, [last + 2, last + 4, last + 1, last + 3, 1]);
}

#[test]
fn nobody_gives_way_to_an_equal_with_as_long_a_line_or_to_one_of_worse_standing() {
    let mut gate = Gate::new(Limits { exempt: vec!["192.0.2.0/24".parse().expect("a network")], ..limits() });
    let (known, other, exempt) = (host(1), host(2), ip("192.0.2.1"));
    for from in [known, other] {
        assert_eq!(gate.visits(from, at(0)), Verdict::Serve);
    }
    gate.set_shut(true);
    // Exempt ones may have all of it, who is known may have his share, and others what is left.
    for _ in 0..MOST_WAITING - MOST_WAITING_OF_ONE {
        assert!(matches!(gate.knocks(exempt, at(1)), Verdict::Wait(_)));
    }
    let mine: Vec<Verdict> = (0..MOST_WAITING_OF_ONE + 1).map(|_| gate.knocks(known, at(1))).collect();
    assert_eq!(mine.iter().filter(|v| matches!(v, Verdict::Wait(_))).count(), MOST_WAITING_OF_ONE);
    assert_eq!((gate.waiting(), gate.poll_dropped(at(1))), (MOST_WAITING, None));
    // However long the lines of better ones are.
    assert_eq!(gate.knocks(host(3), at(1)), Verdict::Refuse(Refusal::Crowded));
    let crowded = |gate: &mut Gate| matches!(gate.poll_dropped(at(1)), Some((_, Refusal::Crowded)));
    let shorter =
        (0..MOST_WAITING_OF_ONE).take_while(|_| matches!(gate.knocks(other, at(1)), Verdict::Wait(_)));
    assert_eq!(shorter.count(), MOST_WAITING_OF_ONE / 2, "until both have half");
    for _ in 0..MOST_WAITING_OF_ONE {
        assert!(matches!(gate.knocks(exempt, at(1)), Verdict::Wait(_)));
    }
    assert_eq!(
        (0..).take_while(|_| crowded(&mut gate)).count(),
        MOST_WAITING_OF_ONE / 2 + MOST_WAITING_OF_ONE
    );
    assert_eq!(gate.knocks(exempt, at(1)), Verdict::Refuse(Refusal::Crowded), "the line is full of its own");
    assert!(matches!(gate.knocks(ip("192.0.2.2"), at(1)), Verdict::Wait(_)), "a shorter line of its equal");
}

#[test]
fn who_waited_while_it_was_shut_was_held_up_and_who_came_later_was_not() {
    let mut gate = Gate::new(limits());
    for _ in 0..8 {
        assert_eq!(gate.knocks(host(1), at(0)), Verdict::Serve);
    }
    let waits = |gate: &mut Gate| match gate.knocks(host(1), at(0)) {
        Verdict::Wait(number) => number,
        other => panic!("{other:?}"),
    };
    // Its share is taken: that is no fault of ours.
    let early = waits(&mut gate);
    gate.set_shut(false);
    assert!(!gate.was_held_up(early));
    gate.set_shut(true);
    let amid = waits(&mut gate);
    gate.set_shut(true);
    assert!(gate.was_held_up(early) && gate.was_held_up(amid));
    gate.set_shut(false);
    let late = waits(&mut gate);
    gate.set_shut(false);
    assert_eq!([early, amid, late].map(|number| gate.was_held_up(number)), [true, true, false]);
}

#[test]
fn a_standing_follows_from_what_is_owed_and_for_how_long_a_source_is_known() {
    let day = KNOWN_FOR.as_secs();
    let mut gate = Gate::new(limits());
    let (known, stranger) = (host(1), host(2));
    for from in [known, stranger] {
        gate.knocks(from, at(0));
    }
    gate.handle_established(known, at(0));
    // As long as its session lasts, and a day: to the second.
    assert_eq!(gate.standing(known, at(3 * day)), Standing::Known);
    gate.handle_gone(known, Stage::Session, at(3 * day));
    assert_eq!(gate.standing(known, at(4 * day - 1)), Standing::Known);
    assert_eq!(gate.standing(known, at(4 * day)), Standing::Clean);
    // Both fail: three garbled handshakes are 15 s, the fourth is more, the seventh more than is borne of a stranger.
    let now = at(3 * day);
    let seen: Vec<_> = (0..7)
        .map(|_| {
            for from in [known, stranger] {
                gate.handle_failed(from, Failed::Garbage, now);
            }
            let [known, stranger] = [known, stranger].map(|from| {
                let standing = gate.standing(from, now);
                (standing, gate.share(from, standing, now))
            });
            (known, stranger)
        })
        .collect();
    use Standing::*;
    assert_eq!(seen[..3], [((Known, 8), (Marked, 8)); 3]);
    assert_eq!(seen[3..6], [((Clean, 8), (Marked, 1)); 3]);
    assert_eq!(seen[6], ((Clean, 8), (Refused, 0)));
    // And it passes.
    let after = |seconds| gate.standing(stranger, at(3 * day + seconds));
    assert_eq!([0, 4, 5, 34, 35].map(after), [Refused, Refused, Marked, Marked, Clean]);
}

#[test]
fn refusal_by_chance_begins_at_half_of_the_places_and_is_sure_at_three_quarters() {
    let chances = |standing, handshakes: &[usize]| -> Vec<u32> {
        handshakes.iter().map(|n| chance_of_refusal(standing, *n, 64) * 100 / SURE).collect()
    };
    assert_eq!(
        chances(Standing::Clean, &[31, 32, 36, 40, 44, 47, 48, 64]),
        [0, 29, 47, 64, 82, 95, 100, 100]
    );
    assert_eq!(chances(Standing::Marked, &[15, 16, 20, 24, 31, 32]), [0, 29, 47, 64, 95, 100]);
    assert_eq!(chances(Standing::Known, &[0, 63, 64]), [0, 0, 100]);
}

/// So many sources of which one handshake failed.
fn remember(gate: &mut Gate, sources: std::ops::Range<u128>, now: Time) {
    for n in sources {
        let from = IpAddr::from(Ipv6Addr::from_bits(0x2001_0db8 << 96 | n << 64));
        assert_eq!(gate.fails(from, Failed::Garbage, now), Verdict::Serve);
    }
}

#[test]
fn those_with_something_under_way_take_no_place_among_the_remembered() {
    let mut gate = Gate::new(Limits { handshakes: 4_096, ..limits() });
    for n in 0..5 {
        gate.knocks(host(n), at(0));
        gate.handle_established(host(n), at(0));
    }
    for n in 5..8 {
        gate.knocks(host(n), at(0));
    }
    // Eight more, and three that wait.
    for _ in 0..11 {
        gate.knocks(host(8), at(0));
    }
    assert_eq!((gate.handshakes(), gate.sessions, gate.waiting(), gate.sources()), (11, 5, 3, 9));
    let bound = MOST_IDLE + 11 + 5 + 3;
    let room = (bound - gate.sources()) as u128;
    remember(&mut gate, 0..room, at(0));
    assert_eq!(gate.sources(), bound);
    // Those remembered come again, which changes nothing.
    let again = IpAddr::from(Ipv6Addr::from_bits(0x2001_0db8 << 96));
    gate.fails(again, Failed::Garbage, at(0));
    assert_eq!(gate.sources(), bound);
    // One more, and many go.
    remember(&mut gate, room..room + 1, at(0));
    assert_eq!(gate.sources(), bound - FORGOTTEN_AT_ONCE + 1);
    assert!((0..9).all(|n| gate.records.contains_key(&Source::of(host(n)))), "none that is here");
    assert!(gate.records.contains_key(&Source::of(again)), "nor who owes most");
}

#[test]
fn what_passed_is_forgotten_first_and_only_where_room_is_needed() {
    let mut gate = Gate::new(Limits { handshakes: 4_096, ..limits() });
    for n in 0..10 {
        gate.knocks(host(n), at(0));
    }
    remember(&mut gate, 0..5, at(0));
    // What these owe has passed when the others come.
    let later = at(1_000);
    remember(&mut gate, 5..MOST_IDLE as u128, later);
    assert_eq!(gate.sources(), MOST_IDLE + 10, "there is room: nobody is looked for");
    remember(&mut gate, 10_000..10_001, later);
    assert_eq!(gate.sources(), MOST_IDLE + 10 - 5 + 1, "those, and no others");
}

/// What may happen at a gate.
#[derive(Clone, Debug)]
enum Step {
    Knock(u16, u16),
    Fail(u8, usize),
    Establish(u8),
    End(u8),
    Next,
    Sleep(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..40u16, any::<u16>()).prop_map(|(who, luck)| Step::Knock(who, luck)),
        3 => (any::<u8>(), 0..Failed::ALL.len()).prop_map(|(which, how)| Step::Fail(which, how)),
        2 => any::<u8>().prop_map(Step::Establish),
        2 => any::<u8>().prop_map(Step::End),
        3 => Just(Step::Next),
        1 => (0..30_000u16).prop_map(Step::Sleep),
    ];
    prop::collection::vec(step, 1..400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn refusal_grows_with_the_handshakes_and_with_what_is_known_against_a_source(most in 1usize..300) {
        use Standing::*;
        for standing in [Exempt, Known, Clean, Marked, Refused] {
            let mut before = 0;
            for handshakes in 0..=most {
                let chance = chance_of_refusal(standing, handshakes, most);
                prop_assert!(chance >= before && chance <= SURE);
                before = chance;
            }
            prop_assert_eq!(before, SURE, "with every place taken");
            prop_assert_eq!(chance_of_refusal(standing, 0, most) == 0, standing != Refused);
        }
        for handshakes in 0..=most {
            let chances = [Exempt, Known, Clean, Marked].map(|s| chance_of_refusal(s, handshakes, most));
            prop_assert!(chances.is_sorted(), "{:?}", chances);
        }
    }

    #[test]
    fn it_counts_what_there_is_and_keeps_its_bounds(steps in steps(), most in 1usize..20, share in 1usize..20) {
        let limits = Limits { handshakes: most, per_source: share.min(most), ..limits() };
        let mut gate = Gate::new(limits);
        let mut now = Time::default();
        let mut waiting: HashMap<u64, IpAddr> = HashMap::new();
        let mut served: Vec<(IpAddr, Stage)> = Vec::new();
        for step in steps {
            match step {
                Step::Knock(who, luck) => match gate.handle_connection(host(who), luck, now) {
                    Verdict::Serve => served.push((host(who), Stage::Handshake)),
                    Verdict::Wait(number) => prop_assert_eq!(waiting.insert(number, host(who)), None),
                    Verdict::Refuse(_) => {}
                },
                Step::Fail(which, how) if !served.is_empty() => {
                    let (from, stage) = served.swap_remove(usize::from(which) % served.len());
                    gate.handle_failed(from, Failed::ALL[how], now);
                    gate.handle_gone(from, stage, now);
                }
                Step::Establish(which) => {
                    let handshakes: Vec<usize> =
                        (0..served.len()).filter(|n| served[*n].1 == Stage::Handshake).collect();
                    if let Some(n) = handshakes.get(usize::from(which) % handshakes.len().max(1)) {
                        served[*n].1 = Stage::Session;
                        gate.handle_established(served[*n].0, now);
                    }
                }
                Step::End(which) if !served.is_empty() => {
                    let (from, stage) = served.swap_remove(usize::from(which) % served.len());
                    gate.handle_gone(from, stage, now);
                }
                Step::Next => {
                    if let Some(number) = gate.poll_next(now) {
                        served.push((waiting.remove(&number).expect("one that waits"), Stage::Handshake));
                    }
                }
                Step::Sleep(ms) => now = now + Duration::from_millis(ms.into()),
                Step::Fail(..) | Step::End(_) => {}
            }
            while let Some((number, _)) = gate.poll_dropped(now) {
                prop_assert!(waiting.remove(&number).is_some());
            }
            let of = |from: IpAddr| served.iter().filter(|(f, s)| *f == from && *s == Stage::Handshake).count();
            let handshakes = served.iter().filter(|(_, stage)| *stage == Stage::Handshake).count();
            prop_assert_eq!(gate.handshakes(), handshakes);
            prop_assert!(handshakes <= most);
            prop_assert!((0..40).all(|n| of(host(n)) <= share.min(most)));
            prop_assert_eq!(gate.waiting(), waiting.len());
            prop_assert_eq!(gate.poll_timeout().is_some(), !waiting.is_empty());
            prop_assert!(gate.poll_timeout().is_none_or(|until| until > now && until <= now + WAIT));
            prop_assert!(gate.waiting() <= MOST_WAITING);
        }
        // Everybody leaves, and a week later nobody is remembered but for sessions' sake, and those not either.
        for (from, stage) in served {
            gate.handle_gone(from, stage, now);
        }
        let later = now + Duration::from_secs(7 * 86_400);
        while gate.poll_dropped(later).is_some() {}
        prop_assert_eq!((gate.handshakes(), gate.waiting()), (0, 0));
        gate.records.retain(|_, record| !record.is_blank(later));
        prop_assert_eq!(gate.sources(), 0);
    }

    #[test]
    fn whoever_is_crowded_out_has_no_worse_one_in_the_line(
        knocks in prop::collection::vec((0..320u16, 1..5usize), 120..200),
    ) {
        // A tenth each are exempt and known, and a quarter have failed.
        let exempt = vec![IpNet::new(host(0), 27).expect("a network")];
        let mut gate = Gate::new(Limits { exempt, ..limits() });
        for n in 32..64 {
            gate.visits(host(n), at(0));
        }
        for n in 64..144 {
            gate.fails(host(n), Failed::Garbage, at(0));
        }
        gate.set_shut(true);
        let mut waiting: HashMap<u64, IpAddr> = HashMap::new();
        for (who, times) in knocks {
            for _ in 0..times {
                let standing = gate.standing(host(who), at(1));
                let verdict = gate.knocks(host(who), at(1));
                match verdict {
                    Verdict::Wait(number) => drop(waiting.insert(number, host(who))),
                    // An exempt one: only exempt ones wait.
                    Verdict::Refuse(why) => {
                        let worse = waiting.values().filter(|from| gate.standing(**from, at(1)) > standing);
                        prop_assert_eq!((why, waiting.len(), worse.count()), (Refusal::Crowded, MOST_WAITING, 0));
                    }
                    Verdict::Serve => prop_assert!(false, "it is shut"),
                }
                while let Some((number, why)) = gate.poll_dropped(at(1)) {
                    let gone = waiting.remove(&number).expect("one that waited");
                    let gone = gate.standing(gone, at(1));
                    prop_assert_eq!(why, Refusal::Crowded);
                    prop_assert!(gone >= standing, "{:?} gave way to {:?}", gone, standing);
                }
                prop_assert_eq!(gate.waiting(), waiting.len());
            }
        }
    }

    #[test]
    fn a_penalty_only_grows_by_failures_and_passes_with_time(
        failures in prop::collection::vec((0..Failed::ALL.len(), 0u64..20), 1..60),
    ) {
        let mut gate = Gate::new(limits());
        let from = host(1);
        // Somebody is always there, so that nothing is forgotten.
        gate.knocks(from, at(0));
        let mut now = 0;
        let owed = |gate: &Gate, now| gate.records[&Source::of(from)].clear_at.since(at(now));
        for (how, wait) in failures {
            let before = owed(&gate, now);
            gate.handle_failed(from, Failed::ALL[how], at(now));
            let after = owed(&gate, now);
            prop_assert!(after >= before && after <= before + Failed::ALL[how].charge());
            prop_assert!(after <= FORBEARANCE + Duration::from_secs(600));
            now += wait;
            prop_assert_eq!(owed(&gate, now), after.saturating_sub(Duration::from_secs(wait)));
        }
        now += 630;
        prop_assert_eq!(gate.standing(from, at(now)), Standing::Clean);
    }
}
