//! The workers and their sessions, as the guard sees them.

use std::collections::HashMap;
use std::net::SocketAddr;

use ipnet::IpNet;

use tunguard::escape::Escaped;
use tunguard::ipc::{GuardEnd, QueueNames, Report};
use tunguard::rate::Rates;
use tunguard::resume::ResumeSecret;
use tunguard::sys::mq::Reader;
use tunguard::sys::shared::Filler;
use tunguard::time::Time;
use tunguard::tls::{CertId, TicketId};
use tunguard::wire::data::SessionId;

use crate::gate::Stage;
use crate::outbox::Outbox;
use crate::spawn::Started;
use crate::tickets::Holder;

/// How far a worker is. It only moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The client hasn't proved anything yet.
    Handshake,
    /// It has a lease and a slot; its queue isn't there yet.
    Granted,
    /// Packets flow.
    Established,
    /// A newer session of its client took over; what is on its way in this one still arrives.
    Draining,
    /// It was told to end.
    Ending,
    /// Its last word came.
    Over,
}

/// One worker process.
pub struct Worker {
    /// Its process.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Names of its queues.
    pub queues: QueueNames,
    /// The channel to it.
    pub channel: GuardEnd,
    /// The number of its channel to the key holder.
    pub signing: u64,
    /// Where its TCP connection comes from.
    pub tcp_peer: SocketAddr,
    /// How far it is.
    pub phase: Phase,
    /// When it was started.
    pub started: Time,
    /// When it is killed if it still runs.
    pub kill_at: Option<Time>,
    /// What it carries, from `Granted` on.
    pub session: Option<Session>,
    /// Log lines it may still send.
    pub log_budget: Budget,
    /// Requests it may still send.
    pub request_budget: Budget,
    /// Reports it was asked for and has not sent.
    pub asked: u32,
    /// It has asked for what a ticket stands for.
    pub redeemed: bool,
    /// Whose ticket its client has shown.
    pub resumes: Option<Holder>,
    /// The ticket that it has given us to keep.
    pub ticketed: Option<TicketId>,
    /// Its last word came, so its exit needs no line of its own.
    pub explained: bool,
    /// What it counts as at the gate.
    pub stage: Stage,
}

/// One session.
pub struct Session {
    /// Its ID, with its slot.
    pub id: SessionId,
    /// Whose.
    pub name: String,
    /// Which of the sessions that its identity may have it is: one that takes over has the same. Counted from 0.
    pub seat: u16,
    /// With which certificate.
    pub cert: CertId,
    /// What its client proves to have when it resumes it.
    pub resume_secret: ResumeSecret,
    /// Inner addresses with their network's prefix length.
    pub addresses: Vec<IpNet>,
    /// Subnets behind the client.
    pub subnets: Vec<IpNet>,
    /// When it was granted.
    pub since: Time,
    /// Memory of the queue to the worker, until that is there.
    pub memory: Option<Filler>,
    /// Packets to the client, from `Established` on.
    pub outbox: Option<Outbox>,
    /// Packets and super-packets that went there.
    pub queued_packets: u64,
    /// What its client may send and be sent.
    pub rates: Rates,
    /// Packets that were too many for that.
    pub over_rate: OverRate,
    /// Packets from the client, where the guard writes them to the device.
    pub uplink: Option<Reader>,
    /// Where the client is.
    pub peer: Option<SocketAddr>,
    /// Its control connection is up.
    pub control: bool,
    /// It is established, and an older session of its client carries the packets: until when at most.
    pub waits_until: Option<Time>,
    /// Whether its client is there.
    pub presence: Presence,
    /// What its worker last reported.
    pub report: Report,
}

/// Packets that the guard dropped as more than a client may be sent or send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OverRate {
    /// To the client.
    pub down: u64,
    /// From the client.
    pub up: u64,
}

/// Whether a client is there, as far as its worker was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Presence {
    /// Nobody has asked.
    #[default]
    Unknown,
    /// It was asked then, and not heard since.
    Asked(Time),
    /// It was asked then, and answered.
    Answered(Time),
}

impl Session {
    /// One that is granted at `since`, without addresses yet.
    pub fn new(
        id: SessionId,
        name: String,
        seat: u16,
        cert: CertId,
        resume_secret: ResumeSecret,
        since: Time,
    ) -> Session {
        Session {
            id,
            name,
            seat,
            cert,
            resume_secret,
            addresses: vec![],
            subnets: vec![],
            since,
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
        }
    }

    /// Whether another one is of the same seat: one takes over from the other.
    pub fn shares_seat(&self, other: &Session) -> bool {
        self.name == other.name && self.seat == other.seat
    }

    /// Everything routed to this session.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.addresses.iter().map(|a| IpNet::from(a.addr())).chain(self.subnets.iter().copied())
    }
}

impl Worker {
    /// One that was started at `now` for a connection from `tcp_peer`.
    pub fn new(started: Started, tcp_peer: SocketAddr, now: Time) -> Worker {
        Worker {
            pid: started.pid,
            uid: started.uid,
            queues: started.queues,
            channel: started.channel,
            signing: started.signing,
            tcp_peer,
            phase: Phase::Handshake,
            started: now,
            // The worker keeps its own deadline; this one is for a worker that doesn't.
            kill_at: None,
            session: None,
            log_budget: Budget::of_log_lines(now),
            request_budget: Budget::of_requests(now),
            asked: 0,
            redeemed: false,
            resumes: None,
            ticketed: None,
            explained: false,
            stage: Stage::Handshake,
        }
    }

    /// Who it is in log lines.
    pub fn label(&self) -> String {
        match &self.session {
            Some(session) => format!("{} ({})", Escaped(&session.name), session.id),
            None => format!("{}", self.tcp_peer),
        }
    }
}

/// The workers by number; a number is never used twice.
#[derive(Default)]
pub struct Workers {
    next: u64,
    by_key: HashMap<u64, Worker>,
    by_pid: HashMap<i32, u64>,
}

impl Workers {
    /// Takes in a worker and says its number.
    pub fn insert(&mut self, worker: Worker) -> u64 {
        let key = self.next;
        self.next += 1;
        self.by_pid.insert(worker.pid, key);
        self.by_key.insert(key, worker);
        key
    }

    /// The worker of this number, if it is still there.
    pub fn get(&self, key: u64) -> Option<&Worker> {
        self.by_key.get(&key)
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, key: u64) -> Option<&mut Worker> {
        self.by_key.get_mut(&key)
    }

    /// Its session's way out, where packets may go already.
    pub fn outbox(&mut self, key: u64) -> Option<&mut Outbox> {
        self.by_key.get_mut(&key)?.session.as_mut()?.outbox.as_mut()
    }

    /// The ways out of all sessions.
    pub fn outboxes(&mut self) -> impl Iterator<Item = &mut Outbox> {
        self.by_key.values_mut().filter_map(|worker| worker.session.as_mut()?.outbox.as_mut())
    }

    /// Whether two workers have sessions of which one takes over from the other.
    pub fn same_seat(&self, a: u64, b: u64) -> bool {
        let session = |key| self.get(key).and_then(|worker| worker.session.as_ref());
        session(a).zip(session(b)).is_some_and(|(a, b)| a.shares_seat(b))
    }

    /// The number of the worker whose process this is.
    pub fn key_of(&self, pid: i32) -> Option<u64> {
        self.by_pid.get(&pid).copied()
    }

    /// Takes out the worker whose process this was.
    pub fn remove_pid(&mut self, pid: i32) -> Option<(u64, Worker)> {
        let key = self.by_pid.remove(&pid)?;
        Some((key, self.by_key.remove(&key)?))
    }

    /// All of them, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Worker)> {
        self.by_key.iter().map(|(key, worker)| (*key, worker))
    }

    /// All of them, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Worker)> {
        self.by_key.iter_mut().map(|(key, worker)| (*key, worker))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }
}

/// How much of something a worker may do: a burst, then a trickle.
pub struct Budget {
    left: f64,
    burst: f64,
    per_second: f64,
    updated: Time,
    refused: u64,
}

impl Budget {
    /// Log lines.
    pub fn of_log_lines(now: Time) -> Budget {
        Budget::new(40.0, 2.0, now)
    }

    /// Requests of any kind: far more than an honest worker sends with the most talkative log.
    pub fn of_requests(now: Time) -> Budget {
        Budget::new(1_000.0, 200.0, now)
    }

    fn new(burst: f64, per_second: f64, now: Time) -> Budget {
        Budget { left: burst, burst, per_second, updated: now, refused: 0 }
    }

    /// Whether one more is within the budget; with it, how many before it were not.
    pub fn spend(&mut self, now: Time) -> Option<u64> {
        let refilled = self.left + now.since(self.updated).as_secs_f64() * self.per_second;
        self.left = refilled.min(self.burst);
        self.updated = now;
        if self.left < 1.0 {
            self.refused += 1;
            return None;
        }
        self.left -= 1.0;
        Some(std::mem::take(&mut self.refused))
    }
}

/// Workers and sessions for tests.
#[cfg(test)]
pub mod samples {
    use super::*;
    use tunguard::sys::seqpacket;

    /// One that was just started, without a process.
    pub fn worker(pid: i32, now: Time) -> Worker {
        let channel = seqpacket::pair().expect("a channel").0;
        let started = Started { pid, channel, uid: 0, signing: 0, queues: QueueNames::default() };
        Worker::new(started, ([192, 0, 2, 1], 1).into(), now)
    }

    /// One that was just granted, without addresses.
    pub fn session(id: SessionId, name: &str, seat: u16, now: Time) -> Session {
        let cert = CertId { issuer: [0; 32], serial: vec![1], not_after: 0 };
        Session::new(id, name.to_owned(), seat, cert, ResumeSecret::from_bytes([0; 32]), now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_worker_has_a_number_of_its_own_as_long_as_it_is_there() {
        let mut workers = Workers::default();
        assert_eq!((workers.len(), workers.key_of(70)), (0, None));
        let keys = [70, 71, 72].map(|pid| workers.insert(samples::worker(pid, Time::default())));
        assert_eq!(workers.len(), 3);
        assert_eq!(
            [70, 71, 72, 73].map(|pid| workers.key_of(pid)),
            [Some(keys[0]), Some(keys[1]), Some(keys[2]), None]
        );
        assert_eq!(keys.map(|key| workers.get(key).map(|w| w.pid)), [Some(70), Some(71), Some(72)]);
        let gone = workers.remove_pid(71).map(|(key, worker)| (key, worker.pid));
        assert_eq!(gone, Some((keys[1], 71)));
        assert!(workers.remove_pid(71).is_none() && workers.get(keys[1]).is_none());
        assert_eq!((workers.len(), workers.key_of(71)), (2, None));
        // The same process number again is another worker.
        let again = workers.insert(samples::worker(71, Time::default()));
        assert!(!keys.contains(&again));
        let mut all: Vec<u64> = workers.iter().map(|(key, _)| key).collect();
        all.sort();
        assert_eq!(all, [keys[0], keys[2], again]);
        for (_, worker) in workers.iter_mut() {
            worker.asked += 1;
        }
        assert!(workers.iter().all(|(_, worker)| worker.asked == 1));
    }

    #[test]
    fn a_worker_is_called_after_its_client_as_soon_as_that_is_known() {
        let mut worker = samples::worker(70, Time::default());
        assert_eq!(worker.label(), "192.0.2.1:1");
        let id = SessionId::new(1, [7; 6]);
        worker.session = Some(samples::session(id, "ann", 0, Time::default()));
        assert_eq!(worker.label(), format!("ann ({id})"));
    }

    #[test]
    fn a_flood_of_lines_is_cut_and_counted() {
        let mut now = Time::default();
        let mut budget = Budget::of_log_lines(now);
        let shown = (0..100).filter(|_| budget.spend(now).is_some()).count();
        assert_eq!(shown, 40);
        now = now + Duration::from_secs(1);
        assert_eq!(budget.spend(now), Some(60));
        assert_eq!(budget.spend(now), Some(0));
        assert_eq!(budget.spend(now), None);
    }
}
