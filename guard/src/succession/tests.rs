use super::*;
use proptest::prelude::*;

use tunguard::ipc::Resumption;
use tunguard::resume::ResumeSecret;

use crate::clients::samples;

/// The sessions of one client, and where its packets go.
#[derive(Default)]
struct House {
    workers: Workers,
    routes: Routes,
    now: u64,
}

impl House {
    /// A connection is accepted, and its session granted.
    fn granted(&mut self, name: &str) -> u64 {
        self.granted_at(name, 0)
    }

    /// The same on another seat than the first.
    fn granted_at(&mut self, name: &str, seat: u16) -> u64 {
        let now = Time::from_nanos(self.now);
        let pid = self.workers.len() as i32 + 1;
        let key = self.workers.insert(samples::worker(pid, now));
        let mut session = samples::session(SessionId::new(key as u16, [7; 6]), name, seat, now);
        session.cert = cert(1);
        session.resume_secret = secret();
        session.addresses = vec![IpNet::new(address_of(seat), 24).expect("a network")];
        session.subnets = vec![format!("192.168.{}.0/24", 7 + seat).parse().expect("a network")];
        let worker = self.workers.get_mut(key).expect("just inserted");
        (worker.phase, worker.session) = (Phase::Granted, Some(session));
        key
    }

    fn enter(&mut self, key: u64) -> Result<Vec<Order>, Reason> {
        self.workers.get_mut(key).expect("a worker").phase = Phase::Established;
        let entered = enter(&mut self.workers, &mut self.routes, key, Time::from_nanos(self.now));
        self.obey(entered.as_deref().unwrap_or_default());
        if entered.is_err() {
            self.set(key, Phase::Ending);
        }
        entered
    }

    fn heard(&mut self, key: u64) -> Vec<Order> {
        let orders = heard(&mut self.workers, &mut self.routes, key);
        self.obey(&orders);
        orders
    }

    fn ends(&mut self, key: u64) -> Vec<Order> {
        self.set(key, Phase::Ending);
        let (name, seat) = (self.session(key).name.clone(), self.session(key).seat);
        let orders = relieve(&mut self.workers, &mut self.routes, &name, seat);
        self.obey(&orders);
        let nets: Vec<IpNet> = self.session(key).nets().collect();
        nets.into_iter().for_each(|net| self.routes.remove(net, key));
        orders
    }

    fn obey(&mut self, orders: &[Order]) {
        for order in orders {
            match order {
                Order::Drain(key) => self.set(*key, Phase::Draining),
                Order::End(key, _) => self.set(*key, Phase::Ending),
            }
        }
    }

    fn set(&mut self, key: u64, phase: Phase) {
        let worker = self.workers.get_mut(key).expect("a worker");
        assert!(worker.phase <= phase, "it only moves forward");
        worker.phase = phase;
    }

    fn session(&mut self, key: u64) -> &mut Session {
        self.workers.get_mut(key).and_then(|w| w.session.as_mut()).expect("a session")
    }

    fn carrier(&mut self) -> Option<u64> {
        self.carrier_at(0)
    }

    fn carrier_at(&mut self, seat: u16) -> Option<u64> {
        let address = self.routes.lookup(address_of(seat));
        assert_eq!(self.routes.lookup(IpAddr::from([192, 168, 7 + seat as u8, 9])), address);
        address
    }

    fn seat(&self, wanted: Option<u16>, seats: u16, policy: OnTooMany) -> Seating {
        seat(&self.workers, "ann", wanted, seats, policy, Time::from_nanos(self.now))
    }

    /// Sessions that are there, with their seats.
    fn here(&self) -> Vec<(u64, u16)> {
        let mut here: Vec<_> = established(&self.workers).map(|(key, s)| (key, s.seat)).collect();
        here.sort();
        here
    }

    fn pass(&mut self, time: Duration) {
        self.now += time.as_nanos() as u64;
        for key in late(&self.workers, Time::from_nanos(self.now)) {
            let orders = carry(&mut self.workers, &mut self.routes, key);
            self.obey(&orders);
        }
    }
}

fn address_of(seat: u16) -> IpAddr {
    IpAddr::from([10, 9, 0, 2 + seat as u8])
}

fn cert(serial: u8) -> CertId {
    CertId { issuer: [1; 32], serial: vec![serial], not_after: 0 }
}

fn secret() -> ResumeSecret {
    ResumeSecret::from_bytes([3; 32])
}

const NOBODY: [u64; 0] = [];
const BINDING: [u8; 32] = [9; 32];

fn claim(name: &str, serial: u8, session: SessionId, proof: [u8; 32]) -> Claim {
    let resume = Some(Resumption { session, proof, binding: BINDING });
    Claim { name: name.into(), cert: cert(serial), resumed: false, want: vec![], resume }
}

#[test]
fn the_first_session_carries_at_once() {
    let mut house = House::default();
    let one = house.granted("ann");
    assert_eq!(house.carrier(), None);
    assert_eq!(house.enter(one), Ok(vec![]));
    assert_eq!(house.carrier(), Some(one));
    assert_eq!(house.heard(one), []);
}

#[test]
fn a_newer_session_takes_over_when_it_is_heard() {
    let mut house = House::default();
    let (one, two) = (house.granted("ann"), house.granted("ann"));
    assert_eq!(house.enter(one), Ok(vec![]));
    assert_eq!(house.enter(two), Ok(vec![]));
    assert_eq!(house.carrier(), Some(one));
    assert_eq!(house.heard(two), [Order::Drain(one)]);
    assert_eq!(house.carrier(), Some(two));
    assert_eq!(house.heard(two), [], "once");
    assert_eq!(house.ends(one), []);
    assert_eq!(house.carrier(), Some(two));
}

#[test]
fn of_several_that_wait_the_newest_wins_and_no_route_is_lost() {
    let mut house = House::default();
    let (one, two, three) = (house.granted("ann"), house.granted("ann"), house.granted("ann"));
    let bob = house.granted("bob");
    for key in [one, two] {
        assert_eq!(house.enter(key), Ok(vec![]));
    }
    assert_eq!(house.enter(three), Ok(vec![Order::End(two, Reason::Replaced)]));
    assert_eq!(house.carrier(), Some(one));
    assert_eq!(house.ends(two), []);
    assert_eq!(house.carrier(), Some(one));
    assert_eq!(house.heard(three), [Order::Drain(one)]);
    assert_eq!(house.carrier(), Some(three));
    assert_eq!(house.workers.get(bob).map(|w| w.phase), Some(Phase::Granted));
}

#[test]
fn an_older_connection_that_comes_later_replaces_nobody() {
    let mut house = House::default();
    let (one, late, two) = (house.granted("ann"), house.granted("ann"), house.granted("ann"));
    assert_eq!(house.enter(one), Ok(vec![]));
    assert_eq!(house.enter(two), Ok(vec![]));
    assert_eq!(house.heard(two), [Order::Drain(one)]);
    assert_eq!(house.enter(late), Err(Reason::Replaced));
    assert_eq!(house.heard(late), []);
    assert_eq!(house.carrier(), Some(two));
}

#[test]
fn the_end_of_either_leaves_the_other() {
    for heir_ends in [false, true] {
        let mut house = House::default();
        let (one, two) = (house.granted("ann"), house.granted("ann"));
        assert_eq!(house.enter(one), Ok(vec![]));
        assert_eq!(house.enter(two), Ok(vec![]));
        let (ends, stays) = if heir_ends { (two, one) } else { (one, two) };
        assert_eq!(house.ends(ends), []);
        assert_eq!(house.carrier(), Some(stays));
        assert_eq!(late(&house.workers, Time::from_nanos(u64::MAX)), NOBODY, "nobody waits");
    }
}

#[test]
fn a_silent_session_waits_five_seconds_unless_its_connection_is_lost() {
    let mut house = House { now: 1_000, ..House::default() };
    let (one, two) = (house.granted("ann"), house.granted("ann"));
    assert_eq!(house.enter(one), Ok(vec![]));
    assert_eq!(next_late(&house.workers), None);
    assert_eq!(house.enter(two), Ok(vec![]));
    let end = Time::from_nanos(1_000) + WAIT;
    assert_eq!(next_late(&house.workers), Some(end));
    assert_eq!(late(&house.workers, Time::from_nanos(1_000)), NOBODY);
    assert_eq!(late(&house.workers, end), [two]);
    house.session(two).control = false;
    assert_eq!(late(&house.workers, end), NOBODY);
    assert_eq!(next_late(&house.workers), None);
    assert_eq!(house.heard(two), [Order::Drain(one)], "heard in the end");
}

#[test]
fn a_client_that_leaves_takes_along_what_nobody_comes_back_to() {
    let mut house = House::default();
    let (one, two) = (house.granted("ann"), house.granted("ann"));
    assert_eq!(house.enter(one), Ok(vec![]));
    assert_eq!(left(&house.workers, one), [], "there is no other");
    assert_eq!(house.enter(two), Ok(vec![]));
    assert_eq!(left(&house.workers, two), [], "somebody is at the other's end");
    house.session(one).control = false;
    assert_eq!(left(&house.workers, two), [Order::End(one, Reason::Leaving)]);
    assert_eq!(left(&house.workers, one), []);
}

#[test]
fn only_the_same_certificate_with_the_right_proof_resumes() {
    let mut house = House::default();
    let one = house.granted("ann");
    let id = house.session(one).id;
    let good = secret().proof(id, &BINDING);
    assert_eq!(judge(&house.workers, &claim("ann", 1, id, good)), Ok(None), "not there yet");
    assert_eq!(house.enter(one), Ok(vec![]));
    assert_eq!(judge(&house.workers, &claim("ann", 1, id, good)), Ok(Some((id, 0))));
    let elsewhere = secret().proof(id, &[8; 32]);
    for (claim, why) in [
        (claim("bob", 1, id, good), "of ann"),
        (claim("ann", 2, id, good), "another certificate"),
        (claim("ann", 1, id, elsewhere), "is wrong"),
        (claim("ann", 1, id, [0; 32]), "is wrong"),
    ] {
        let refusal = judge(&house.workers, &claim).expect_err(why);
        assert!(refusal.contains(why), "{refusal}");
    }
    // Unknown, and taken over already: a claim like any other.
    let unknown = SessionId::new(9, [9; 6]);
    assert_eq!(judge(&house.workers, &claim("ann", 1, unknown, good)), Ok(None));
    house.set(one, Phase::Draining);
    assert_eq!(judge(&house.workers, &claim("ann", 1, id, good)), Ok(None));
    let without = Claim { resume: None, ..claim("ann", 2, id, good) };
    assert_eq!(judge(&house.workers, &without), Ok(None));
}

#[test]
fn a_free_seat_is_taken_first_and_the_wanted_one_among_them() {
    let mut house = House::default();
    for policy in [OnTooMany::Newest, OnTooMany::Refuse] {
        assert_eq!(house.seat(None, 3, policy), Seating::At(0));
        assert_eq!(house.seat(Some(2), 3, policy), Seating::At(2));
        for none in [3, 7] {
            assert_eq!(house.seat(Some(none), 3, policy), Seating::At(0), "there is none");
        }
    }
    let one = house.granted_at("ann", 0);
    assert_eq!(house.seat(Some(0), 3, OnTooMany::Newest), Seating::At(1), "granted is taken");
    assert_eq!(house.enter(one), Ok(vec![]));
    let two = house.granted_at("ann", 1);
    assert_eq!(house.enter(two), Ok(vec![]));
    assert_eq!((house.carrier_at(0), house.carrier_at(1)), (Some(one), Some(two)), "both carry");
    assert_eq!(house.heard(two), [], "and replace nobody");
    house.granted("bob");
    assert_eq!(house.seat(None, 3, OnTooMany::Newest), Seating::At(2), "others have seats of their own");
    assert_eq!(house.ends(one), []);
    assert_eq!((house.carrier_at(0), house.carrier_at(1)), (None, Some(two)));
    assert_eq!(house.seat(Some(1), 2, OnTooMany::Refuse), Seating::At(0));
}

#[test]
fn the_newest_takes_the_place_of_the_oldest_or_of_who_has_no_connection() {
    let mut house = House::default();
    for seat in [1, 0] {
        let key = house.granted_at("ann", seat);
        assert_eq!(house.enter(key), Ok(vec![]));
    }
    assert_eq!(house.seat(None, 2, OnTooMany::Newest), Seating::At(1), "the oldest");
    house.session(1).control = false;
    assert_eq!(house.seat(None, 2, OnTooMany::Newest), Seating::At(0), "rather that one");
    let three = house.granted_at("ann", 0);
    assert_eq!(house.enter(three), Ok(vec![]));
    assert_eq!(house.carrier_at(0), Some(1), "not heard yet");
    assert_eq!(house.heard(three), [Order::Drain(1)]);
    assert_eq!((house.carrier_at(0), house.carrier_at(1)), (Some(three), Some(0)));
}

#[test]
fn a_seat_that_there_is_no_more_is_nobodys_to_take_over() {
    for policy in [OnTooMany::Newest, OnTooMany::Refuse] {
        let mut house = House::default();
        for seat in [1, 0] {
            let key = house.granted_at("ann", seat);
            assert_eq!(house.enter(key), Ok(vec![]));
        }
        // There were two, now there is one: who sits on the second is older, has lost its connection and is gone.
        house.session(0).control = false;
        house.session(0).presence = Presence::Asked(Time::from_nanos(house.now));
        house.pass(ANSWER_WITHIN);
        let expected = match policy {
            OnTooMany::Newest => Seating::At(0),
            OnTooMany::Refuse => Seating::Full { ask: vec![1] },
        };
        assert_eq!(house.seat(Some(1), 1, policy), expected);
    }
}

#[test]
fn one_too_many_is_refused_while_somebody_is_there() {
    let mut house = House::default();
    let one = house.granted("ann");
    let full = |ask: &[u64]| Seating::Full { ask: ask.to_vec() };
    assert_eq!(house.seat(Some(0), 1, OnTooMany::Refuse), full(&[]), "not even registered");
    assert_eq!(house.enter(one), Ok(vec![]));
    assert_eq!(house.seat(Some(0), 1, OnTooMany::Refuse), full(&[one]));
    house.session(one).control = false;
    assert_eq!(house.seat(Some(0), 1, OnTooMany::Refuse), full(&[one]), "it may be on its way elsewhere");
    let asked = Time::from_nanos(house.now);
    house.session(one).presence = Presence::Asked(asked);
    assert_eq!(house.seat(None, 1, OnTooMany::Refuse), full(&[]), "asked once");
    house.session(one).presence = Presence::Answered(asked);
    house.pass(ANSWER_WITHIN);
    assert_eq!(house.seat(None, 1, OnTooMany::Refuse), full(&[]), "it said so a moment ago");
    house.pass(ASK_AGAIN);
    assert_eq!(house.seat(None, 1, OnTooMany::Refuse), full(&[one]));
    house.session(one).presence = Presence::Asked(Time::from_nanos(house.now));
    house.pass(ANSWER_WITHIN - Duration::from_nanos(1));
    assert_eq!(house.seat(None, 1, OnTooMany::Refuse), full(&[]));
    house.pass(Duration::from_nanos(1));
    assert_eq!(house.seat(None, 1, OnTooMany::Refuse), Seating::At(0), "nobody answers");
    // It is taken over from like any other, and resumes nothing then.
    let two = house.granted("ann");
    assert_eq!(house.enter(two), Ok(vec![]));
    assert_eq!(house.seat(None, 1, OnTooMany::Refuse), full(&[two]));
    assert_eq!(house.heard(two), [Order::Drain(one)]);
}

#[test]
fn each_seat_counts_once_and_who_drains_not_at_all() {
    let mut house = House::default();
    let one = house.granted_at("ann", 0);
    house.granted_at("ann", 1);
    house.granted("bob");
    let taken = |house: &House, name, seat| taken_beside(&house.workers, name, seat);
    assert_eq!(taken(&house, "cid", 0), 3);
    assert_eq!(taken(&house, "ann", 0), 2, "who comes back takes no place");
    assert_eq!(taken(&house, "ann", 2), 3);
    house.granted_at("ann", 0);
    assert_eq!(taken(&house, "cid", 0), 3, "two of one seat");
    house.set(one, Phase::Established);
    assert_eq!(taken(&house, "cid", 0), 3);
    for phase in [Phase::Draining, Phase::Ending, Phase::Over] {
        house.set(2, phase);
        assert_eq!(taken(&house, "cid", 0), 2, "{phase:?}");
    }
}

#[test]
fn a_session_sends_from_what_is_routed_to_its_seat_only() {
    let mut house = House::default();
    let (one, beside, bob) = (house.granted("ann"), house.granted_at("ann", 1), house.granted_at("bob", 2));
    for key in [one, beside, bob] {
        assert_eq!(house.enter(key), Ok(vec![]));
    }
    let two = house.granted("ann");
    assert_eq!(house.enter(two), Ok(vec![]));
    let may_send =
        |house: &mut House, key, source| may_send_from(&house.workers, &mut house.routes, key, source);
    let behind = |seat: u8| IpAddr::from([192, 168, 7 + seat, 99]);
    // Before it takes over and after that both may.
    for _ in 0..2 {
        for (source, owners) in [
            (address_of(0), &[one, two][..]),
            (behind(0), &[one, two]),
            (address_of(1), &[beside]),
            (behind(1), &[beside]),
            (address_of(2), &[bob]),
            (behind(2), &[bob]),
            (address_of(3), &[]),
            (IpAddr::from([192, 0, 2, 1]), &[]),
        ] {
            for key in [one, two, beside, bob, 77] {
                assert_eq!(may_send(&mut house, key, source), owners.contains(&key), "{key} {source}");
            }
        }
        house.heard(two);
    }
    assert_eq!(house.carrier(), Some(two));
}

/// A machine with the certificate of them all.
#[derive(Default)]
struct Device {
    sessions: Vec<u64>,
    dead: bool,
}

#[derive(Clone, Debug)]
enum Step {
    Connect { want: Option<u16> },
    Resume,
    Heard,
    ControlLost,
    End,
    Die,
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::option::of(0u16..5).prop_map(|want| Step::Connect { want }),
        2 => Just(Step::Resume),
        4 => Just(Step::Heard),
        1 => Just(Step::ControlLost),
        1 => Just(Step::End),
        1 => Just(Step::Die),
        3 => (0u64..9_000).prop_map(Step::Pass),
    ]
}

proptest! {
    /// Several machines with one certificate, in any order: no more seats than there may be, each with one session
    /// that carries its addresses and no others, none without where somebody sits; with "refuse" nobody who is
    /// there loses his seat to another, and with "newest" nobody is refused.
    #[test]
    fn seats_are_never_shared(
        seats in 1u16..4,
        refuse: bool,
        steps in prop::collection::vec((0usize..4, step()), 1..120),
    ) {
        let policy = if refuse { OnTooMany::Refuse } else { OnTooMany::Newest };
        let mut house = House::default();
        let mut devices: Vec<Device> = (0..4).map(|_| Device::default()).collect();
        for (at, step) in steps {
            let own = devices[at].sessions.iter().rev().copied().find(|key| house.here().iter().any(|h| h.0 == *key));
            let seat = match (&step, own) {
                (Step::Connect { want }, _) if !devices[at].dead => match house.seat(*want, seats, policy) {
                    Seating::At(seat) => {
                        let theirs = house.here().into_iter().filter(|(_, s)| *s == seat).map(|(key, _)| key);
                        for key in theirs.filter(|_| refuse) {
                            let sitter = devices.iter().find(|d| d.sessions.contains(&key)).expect("somebody's");
                            prop_assert!(sitter.dead, "a seat was taken from somebody who is there");
                        }
                        Some(seat)
                    }
                    Seating::Full { ask } => {
                        prop_assert!(refuse, "the newest always finds a seat");
                        for key in ask {
                            let now = Time::from_nanos(house.now);
                            let dead = devices.iter().any(|d| d.dead && d.sessions.contains(&key));
                            let presence = if dead { Presence::Asked(now) } else { Presence::Answered(now) };
                            house.session(key).presence = presence;
                        }
                        None
                    }
                },
                (Step::Resume, Some(own)) if !devices[at].dead => Some(house.session(own).seat),
                (Step::Heard, Some(own)) if !devices[at].dead => { house.heard(own); None }
                (Step::ControlLost, Some(own)) => { house.session(own).control = false; None }
                (Step::End, Some(own)) => { house.ends(own); None }
                (Step::Die, _) => { devices[at].dead = true; None }
                (Step::Pass(millis), _) => { house.pass(Duration::from_millis(*millis)); None }
                _ => None,
            };
            if let Some(seat) = seat {
                let key = house.granted_at("ann", seat);
                prop_assert!(house.enter(key).is_ok());
                devices[at].sessions.push(key);
            }
            let here = house.here();
            prop_assert!(here.iter().all(|(_, seat)| *seat < seats));
            for seat in 0..seats {
                let carrier = house.carrier_at(seat);
                let sitting: Vec<u64> = here.iter().filter(|(_, s)| *s == seat).map(|(key, _)| *key).collect();
                prop_assert_eq!(carrier.is_some(), !sitting.is_empty(), "no route is lost or left");
                prop_assert!(carrier.is_none_or(|carrier| sitting.contains(&carrier)), "none leads elsewhere");
                prop_assert!(sitting.len() <= 2, "one that carries and one that waits");
            }
        }
    }
}
