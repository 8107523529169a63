//! One client, several sessions: which of them gets its packets. A newer session takes over only when its client is
//! heard on it, so no packet goes where nobody can be reached yet.
//!
//! ```text
//! registered --nobody carries------------------------------------> carries --a newer one carries--> drains -> ends
//!     |                                                              ^
//!     +--an older one carries--> waits --heard, 5 s, or no older one-+
//!                                  +--a newer one waits, or its client leaves--> ends
//! ```
//! Newer is whose connection was accepted later, so a request that was long on its way undoes nothing.

use std::time::Duration;

use ipnet::IpNet;

use tunguard::escape::Escaped;
use tunguard::ipc::{Claim, DRAIN_SECONDS, Reply};
use tunguard::sys::clock;
use tunguard::time::Time;
use tunguard::tls::CertId;
use tunguard::wire::control::Reason;
use tunguard::wire::data::SessionId;

use crate::clients::{Phase, Session, Workers};
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

/// Whether a claim resumes a session: which, or none where it doesn't ask, or asks for one that isn't there (any
/// more, or was taken over already): that is a claim like any other. An error is a claim to be refused.
pub fn judge(workers: &Workers, claim: &Claim) -> Result<Option<SessionId>, String> {
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
    Ok(Some(id))
}

/// A session is ready for packets. Others of its client may be there already; the error is for one that comes after
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

/// A session of `name` is over, or about to be: one that waited for it waits no longer.
pub fn relieve(workers: &mut Workers, routes: &mut Routes, name: &str) -> Vec<Order> {
    let mut heir = None;
    for (key, session) in established(workers).filter(|(_, session)| session.name == name) {
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
        .filter(|(other, s)| *other != key && s.name == session.name && !s.control)
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

/// Another session of the same client, ready for packets and not on its way out.
struct Other {
    key: u64,
    nets: Vec<IpNet>,
    waits: bool,
}

fn others(workers: &Workers, key: u64) -> Vec<Other> {
    let session = workers.get(key).and_then(|worker| worker.session.as_ref());
    let Some(name) = session.map(|session| &session.name) else { return Vec::new() };
    established(workers)
        .filter(|(other, session)| *other != key && session.name == *name)
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

    /// A session of `name` is over, or about to be.
    pub(crate) fn relieve(&mut self, name: &str) {
        let orders = relieve(&mut self.workers, &mut self.routes, name);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    use tunguard::ipc::{Report, Resumption};
    use tunguard::resume::ResumeSecret;
    use tunguard::sys::seqpacket;

    use crate::clients::{Budget, Worker};

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
            let now = Time::from_nanos(self.now);
            let pid = self.workers.len() as i32 + 1;
            let key = self.workers.insert(Worker {
                pid,
                uid: 0,
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
            });
            self.workers.get_mut(key).expect("just inserted").session = Some(Session {
                id: SessionId::new(key as u16, [7; 6]),
                name: name.to_owned(),
                cert: cert(1),
                resume_secret: secret(),
                addresses: vec!["10.9.0.2/24".parse().expect("a network")],
                subnets: vec!["192.168.7.0/24".parse().expect("a network")],
                queues: (String::new(), None),
                since: now,
                memory: None,
                outbox: None,
                queued_packets: 0,
                uplink: None,
                peer: None,
                control: true,
                waits_until: None,
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
            let name = self.session(key).name.clone();
            let orders = relieve(&mut self.workers, &mut self.routes, &name);
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
            let address = self.routes.lookup(IpAddr::from([10, 9, 0, 2]));
            assert_eq!(self.routes.lookup(IpAddr::from([192, 168, 7, 9])), address);
            address
        }
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
        assert_eq!(judge(&house.workers, &claim("ann", 1, id, good)), Ok(Some(id)));
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
}
