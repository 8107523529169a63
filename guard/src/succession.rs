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

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
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

/// How many seats are taken but for this one of `name`, by anybody: what counts for `max_clients`. One that takes over
/// from another on the same seat counts once, and who drains not at all.
pub fn taken_beside(workers: &Workers, name: &str, seat: u16) -> usize {
    let sessions =
        workers.iter().filter(|(_, w)| w.phase < Phase::Draining).filter_map(|(_, w)| w.session.as_ref());
    let seats: HashSet<(&str, u16)> = sessions.map(|s| (s.name.as_str(), s.seat)).collect();
    seats.into_iter().filter(|other| *other != (name, seat)).count()
}

/// Whether a worker's packets may come from `source`: only from what is routed to it, or, while one session takes over
/// from another and packets come from both, to another one of its seat.
pub fn may_send_from(workers: &Workers, routes: &mut Routes, key: u64, source: IpAddr) -> bool {
    routes.lookup(source).is_some_and(|carrier| carrier == key || workers.same_seat(carrier, key))
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
mod tests;
