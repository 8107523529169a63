//! Which session of a client gets its packets.
//!
//! An identity has one seat or several, each with addresses of its own. Who resumes a session comes back to its seat;
//! anybody else sits down on a free one ([`seat`]). On one seat a newer session takes over from an older one, but only
//! when its client is heard on it, so no packet goes where nobody can be reached yet.
//!
//! ```text
//! registered --nobody carries------------------------------------> carries --a newer one carries--> drains -> ends
//!     |                                                              ^
//!     +--an older one carries--> waits --heard, 5 s, or no older one-+
//!                                  +--a newer one waits, or its client leaves--> ends
//! ```
//! Newer is whose connection was accepted later, so a request that was long on its way undoes nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;

use tunguard::config::server::OnTooMany;
use tunguard::escape::Escaped;
use tunguard::ipc::{Claim, DRAIN_SECONDS, Reply};
use tunguard::sys::clock;
use tunguard::time::Time;
use tunguard::tls::CertId;
use tunguard::wire::control::Reason;
use tunguard::wire::data::SessionId;

use crate::clients::{Phase, Presence, Session, Workers};
use crate::grants::GOODBYE;
use crate::routes::Routes;
use crate::run::Guard;

/// What is to become of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// A newer session carries its client's packets from now on.
    Drain(u64),
    /// Its session is over.
    End(u64, Reason),
}

/// Where a client may sit down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seating {
    /// Here, and whoever sits there is taken over from.
    At(u16),
    /// Nowhere. The sessions that are to be asked whether their clients are still there.
    Full {
        /// By their workers' numbers.
        ask: Vec<u64>,
    },
}

/// A seat for a client of `name` that resumes nothing: the one whose addresses it wants or any other that is free, else
/// that of a client which was asked for and isn't there any more, else what `policy` says.
///
/// Silence alone says nothing: an idle client may have no reason to speak for hours. So it is asked, by a worker that
/// knows it, and one that a newcomer can't make silent.
pub fn seat(
    workers: &Workers,
    name: &str,
    wanted: Option<u16>,
    seats: u16,
    policy: OnTooMany,
    now: Time,
) -> Seating {
    let mut taken: BTreeMap<u16, Taken> = BTreeMap::new();
    let here = workers.iter().filter(|(_, w)| matches!(w.phase, Phase::Granted | Phase::Established));
    let sessions: Vec<(u64, &Session)> = here
        .filter_map(|(key, w)| Some((key, w.session.as_ref()?)))
        .filter(|(_, s)| s.name == name)
        .collect();
    for (key, session) in &sessions {
        let taken = taken.entry(session.seat).or_insert(Taken { gone: true, control: false, newest: *key });
        taken.gone &= is_gone(session, now);
        taken.control |= session.control;
        taken.newest = taken.newest.max(*key);
    }
    let free = |seat: &u16| *seat < seats && !taken.contains_key(seat);
    if let Some(seat) = wanted.filter(free).or_else(|| (0..seats).find(free)) {
        return Seating::At(seat);
    }
    let mine = || taken.iter().filter(|(seat, _)| **seat < seats);
    let gone = mine().filter(|(_, t)| t.gone).min_by_key(|(_, t)| t.newest);
    let oldest = || match policy {
        OnTooMany::Newest => mine().min_by_key(|(_, t)| (t.control, t.newest)),
        OnTooMany::Refuse => None,
    };
    match gone.or_else(oldest) {
        Some((seat, _)) => Seating::At(*seat),
        None => {
            // Those that are only granted are being heard just now.
            let ask = established(workers).filter(|(_, s)| s.name == name && may_ask(s, now));
            let ask = ask.map(|(key, _)| key).collect();
            Seating::Full { ask }
        }
    }
}

/// A seat with somebody on it.
struct Taken {
    /// Nobody is at the other end of any of its sessions.
    gone: bool,
    /// One of them has its control connection.
    control: bool,
    /// The one whose connection was accepted last.
    newest: u64,
}

/// It was asked for, and there was time enough for an answer.
fn is_gone(session: &Session, now: Time) -> bool {
    matches!(session.presence, Presence::Asked(since) if now.since(since) >= ANSWER_WITHIN)
}

/// One that waits for an answer isn't asked again, nor one that gave it a moment ago: a newcomer that comes again and
/// again costs those who are here next to nothing.
fn may_ask(session: &Session, now: Time) -> bool {
    match session.presence {
        Presence::Unknown => true,
        Presence::Asked(_) => false,
        Presence::Answered(since) => now.since(since) >= ASK_AGAIN,
    }
}

/// Whether a claim resumes a session: which and on which seat, or none where it doesn't ask, or asks for one that isn't there (any
/// more, or was taken over already): that is a claim like any other. An error is a claim to be refused.
pub fn judge(workers: &Workers, claim: &Claim) -> Result<Option<(SessionId, u16)>, String> {
    let Some(asked) = &claim.resume else { return Ok(None) };
    let session = established(workers).map(|(_, session)| session).find(|s| s.id == asked.session);
    let Some(session) = session else { return Ok(None) };
    let (id, owner) = (session.id, Escaped(&session.name));
    if session.name != claim.name {
        return Err(format!("it asks to resume session {id} of {owner}"));
    }
    if !same(&session.cert, &claim.cert) {
        return Err(format!("it asks to resume session {id}, which {owner} made with another certificate"));
    }
    if !session.resume_secret.proves(id, &asked.binding, &asked.proof) {
        return Err(format!("its proof for session {id} is wrong"));
    }
    Ok(Some((id, session.seat)))
}

/// A session is ready for packets. Others of its seat may be there already; the error is for one that comes after
/// a newer one.
pub fn enter(workers: &mut Workers, routes: &mut Routes, key: u64, now: Time) -> Result<Vec<Order>, Reason> {
    let others = others(workers, key);
    if others.iter().any(|other| other.key > key) {
        return Err(Reason::Replaced);
    }
    let replaced = others.iter().filter(|other| other.waits);
    let mut orders: Vec<Order> = replaced.map(|other| Order::End(other.key, Reason::Replaced)).collect();
    if others.iter().any(|other| !other.waits) {
        if let Some(session) = session_mut(workers, key) {
            session.waits_until = Some(now + WAIT);
        }
    } else {
        orders.extend(carry(workers, routes, key));
    }
    Ok(orders)
}

/// A session's client was heard.
pub fn heard(workers: &mut Workers, routes: &mut Routes, key: u64) -> Vec<Order> {
    match session_mut(workers, key).is_some_and(|session| session.waits_until.is_some()) {
        true => carry(workers, routes, key),
        false => Vec::new(),
    }
}

/// A session on this seat of `name` is over, or about to be: one that waited for it waits no longer.
pub fn relieve(workers: &mut Workers, routes: &mut Routes, name: &str, seat: u16) -> Vec<Order> {
    let mut heir = None;
    let sits = |session: &Session| session.name == name && session.seat == seat;
    for (key, session) in established(workers).filter(|(_, session)| sits(session)) {
        if session.waits_until.is_none() {
            return Vec::new();
        }
        heir = Some(key);
    }
    heir.map_or_else(Vec::new, |key| carry(workers, routes, key))
}

/// A session's client has left. If it waited to take over from one whose connection is lost, nobody will come back
/// to that one.
pub fn left(workers: &Workers, key: u64) -> Vec<Order> {
    let session = workers.get(key).and_then(|worker| worker.session.as_ref());
    let Some(session) = session.filter(|session| session.waits_until.is_some()) else { return Vec::new() };
    established(workers)
        .filter(|(other, s)| *other != key && s.shares_seat(session) && !s.control)
        .map(|(other, _)| Order::End(other, Reason::Leaving))
        .collect()
}

/// Sessions that have waited long enough: UDP seems to be blocked, and their client is better off with a session
/// whose control channel works. One that has none either has nothing to offer.
pub fn late(workers: &Workers, now: Time) -> Vec<u64> {
    waiting(workers).filter(|(_, until)| *until <= now).map(|(key, _)| key).collect()
}

/// When to look for them again.
pub fn next_late(workers: &Workers) -> Option<Time> {
    waiting(workers).map(|(_, until)| until).min()
}

/// Gives a session its client's packets.
fn carry(workers: &mut Workers, routes: &mut Routes, key: u64) -> Vec<Order> {
    let others = others(workers, key);
    let Some(session) = session_mut(workers, key) else { return Vec::new() };
    session.waits_until = None;
    for net in session.nets() {
        routes.insert(net, key);
    }
    let mut orders = Vec::new();
    for other in others.into_iter().filter(|other| !other.waits) {
        other.nets.into_iter().for_each(|net| routes.remove(net, other.key));
        orders.push(Order::Drain(other.key));
    }
    orders
}

/// Another session of the same seat, ready for packets and not on its way out.
struct Other {
    key: u64,
    nets: Vec<IpNet>,
    waits: bool,
}

fn others(workers: &Workers, key: u64) -> Vec<Other> {
    let session = workers.get(key).and_then(|worker| worker.session.as_ref());
    let Some(own) = session else { return Vec::new() };
    established(workers)
        .filter(|(other, session)| *other != key && session.shares_seat(own))
        .map(|(key, s)| Other { key, nets: s.nets().collect(), waits: s.waits_until.is_some() })
        .collect()
}

fn established(workers: &Workers) -> impl Iterator<Item = (u64, &Session)> {
    let here = workers.iter().filter(|(_, worker)| worker.phase == Phase::Established);
    here.filter_map(|(key, worker)| Some((key, worker.session.as_ref()?)))
}

fn waiting(workers: &Workers) -> impl Iterator<Item = (u64, Time)> {
    established(workers).filter(|(_, s)| s.control).filter_map(|(key, s)| Some((key, s.waits_until?)))
}

fn session_mut(workers: &mut Workers, key: u64) -> Option<&mut Session> {
    workers.get_mut(key)?.session.as_mut()
}

/// Whether two certificates are one, as issuers name them.
fn same(a: &CertId, b: &CertId) -> bool {
    (a.issuer, &a.serial) == (b.issuer, &b.serial)
}

impl Guard {
    /// Does what a change among a client's sessions asks for.
    pub(crate) fn carry_out(&mut self, orders: Vec<Order>) {
        for order in orders {
            match order {
                Order::Drain(key) => self.drain_worker(key),
                Order::End(key, reason) => self.end_worker(key, reason),
            }
        }
        self.next_switch = next_late(&self.workers);
    }

    /// Gives sessions packets that have waited long enough.
    pub(crate) fn switch_late(&mut self, now: Time) {
        for key in late(&self.workers, now) {
            let orders = carry(&mut self.workers, &mut self.routes, key);
            self.carry_out(orders);
        }
        self.next_switch = next_late(&self.workers);
    }

    /// A session on this seat of `name` is over, or about to be.
    pub(crate) fn relieve(&mut self, name: &str, seat: u16) {
        let orders = relieve(&mut self.workers, &mut self.routes, name, seat);
        if !orders.is_empty() {
            self.carry_out(orders);
        }
    }

    /// Tells a worker that its session has a successor; it is killed if it doesn't end in time.
    fn drain_worker(&mut self, key: u64) {
        let until = clock::now() + Duration::from_secs(DRAIN_SECONDS) + GOODBYE;
        let Some(worker) = self.workers.get_mut(key) else { return };
        worker.phase = Phase::Draining;
        worker.kill_at = Some(until);
        self.note_deadline(until);
        self.reply(key, &Reply::Drain);
    }
}

/// How long a session waits for its client's first datagram while an older one carries the packets.
const WAIT: Duration = Duration::from_secs(5);
/// How long a client that is asked for has to answer: several times what a lost packet or two take.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How often it is asked at most.
const ASK_AGAIN: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    use proptest::prelude::*;

    use tunguard::ipc::{QueueNames, Report, Resumption};
    use tunguard::rate::Rates;
    use tunguard::resume::ResumeSecret;
    use tunguard::sys::seqpacket;

    use crate::clients::{Budget, OverRate, Worker};

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
            let key = self.workers.insert(Worker {
                pid,
                uid: 0,
                queues: QueueNames::default(),
                channel: seqpacket::pair().expect("a channel").0,
                signing: 0,
                tcp_peer: ([192, 0, 2, 1], 1).into(),
                phase: Phase::Granted,
                started: now,
                kill_at: None,
                session: None,
                log_budget: Budget::of_log_lines(now),
                request_budget: Budget::of_requests(now),
                asked: 0,
                redeemed: false,
                resumes: None,
                ticketed: None,
                explained: false,
                stage: crate::gate::Stage::Session,
            });
            self.workers.get_mut(key).expect("just inserted").session = Some(Session {
                id: SessionId::new(key as u16, [7; 6]),
                name: name.to_owned(),
                seat,
                cert: cert(1),
                resume_secret: secret(),
                addresses: vec![IpNet::new(address_of(seat), 24).expect("a network")],
                subnets: vec![format!("192.168.{}.0/24", 7 + seat).parse().expect("a network")],
                since: now,
                memory: None,
                outbox: None,
                queued_packets: 0,
                rates: Rates::default(),
                over_rate: OverRate::default(),
                uplink: None,
                peer: None,
                control: true,
                waits_until: None,
                presence: Presence::default(),
                report: Report::default(),
            });
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
            assert_eq!(house.seat(Some(7), 3, policy), Seating::At(0), "there is none");
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
}
