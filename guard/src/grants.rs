//! What workers ask for, and what they get. A worker counts as hostile: a request its phase doesn't permit, or
//! one too many, ends that worker and nobody else.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::stat::fstat;

use tunguard::config::server::{ClientEntry, TunWrite};
use tunguard::escape::Escaped;
use tunguard::exit::{Failure, Outcome};
use tunguard::ipc::{Cause, Claim, Grant, MAX_LOG_LINE, QueueNames, Reply, Request};
use tunguard::random;
use tunguard::resume::ResumeSecret;
use tunguard::rigged::point;
use tunguard::sys::clock;
use tunguard::sys::mq::{QueueSize, Reader, Writer};
use tunguard::sys::poller::Interest;
use tunguard::sys::seqpacket::Incoming;
use tunguard::sys::shared::Filler;
use tunguard::tls::identity::acceptable;
use tunguard::tls::tickets::LONGEST_CHAIN;
use tunguard::tls::{SavedSession, TicketId, time};
use tunguard::wire::control::Reason;

use crate::clients::{Phase, Presence, Session};
use crate::events::Heard;
use crate::gate::{Failed, Stage};
use crate::leases;
use crate::outbox::{self, Outbox};
use crate::run::{Guard, Source};
use crate::succession::{self, Seating};
use crate::tickets::Holder;

/// Which requests a phase permits. `Claim`, `Register` and `Ended` are consumed: each moves the phase on, a refusal
/// to the end. A `Report` must have been asked for.
fn permitted(phase: Phase, asked: u32, request: &Request) -> bool {
    match request {
        Request::Redeem(_) | Request::Claim(_) => phase == Phase::Handshake,
        Request::Register { .. } => phase == Phase::Granted,
        Request::Ticket { .. } | Request::Moved { .. } | Request::ControlLost | Request::Heard => {
            matches!(phase, Phase::Established | Phase::Draining | Phase::Ending)
        }
        Request::Report(_) => asked > 0,
        Request::Ended { .. } => phase != Phase::Over,
        Request::Log { .. } => true,
    }
}

impl Guard {
    /// A worker's channel can be read: takes what it sent, up to a share of the guard's time.
    pub fn answer_worker(&mut self, key: u64) {
        let now = clock::now();
        for _ in 0..REQUESTS_PER_TURN {
            let Some(worker) = self.workers.get_mut(key) else { return };
            match worker.channel.receive(false) {
                Ok(Incoming::Message(request, _)) => {
                    if worker.request_budget.spend(now).is_none() {
                        return self.punish(key, "more requests than its budget allows");
                    }
                    // Asked before it read that it is to end: the end is the answer.
                    let overtaken =
                        matches!(request, Request::Redeem(_) | Request::Claim(_) | Request::Register { .. });
                    if worker.phase == Phase::Ending && overtaken {
                        continue;
                    }
                    if !permitted(worker.phase, worker.asked, &request) {
                        return self.punish(key, &format!("a request out of place: {}", kind(&request)));
                    }
                    self.handle_request(key, request);
                }
                Ok(Incoming::Nothing) => return,
                // Its end is seen as a process, soon, or it is killed.
                Ok(Incoming::Closed) => {
                    let _ = self.poller.remove(worker.channel.as_fd());
                    return self.expect_end(key);
                }
                Err(violation) => return self.punish(key, &violation.to_string()),
            }
        }
    }

    /// What a worker that has ended said last: lines for the log. Nothing is granted to the dead.
    pub fn hear_last_words(&mut self, key: u64) {
        for _ in 0..REQUESTS_PER_TURN {
            let Some(worker) = self.workers.get_mut(key) else { return };
            let Ok(Incoming::Message(request, _)) = worker.channel.receive(false) else { return };
            match request {
                Request::Log { level, text } => self.show_log_line(key, level, &text),
                Request::Ended { reason, cause, text } if worker.phase != Phase::Over => {
                    self.take_last_word(key, reason, cause, &text);
                }
                _ => {}
            }
        }
    }

    fn handle_request(&mut self, key: u64, request: Request) {
        match request {
            Request::Redeem(id) => self.answer_redeem(key, &id),
            Request::Claim(claim) => self.answer_claim(key, claim),
            Request::Register { size } => self.answer_register(key, size),
            Request::Ticket { id, session, until } => self.keep_ticket(key, id, session, until),
            Request::Moved { new, after_ms, inside } => {
                if let Some(session) = self.session_mut(key) {
                    let from = session.peer.replace(new);
                    let (name, session) = (session.name.clone(), session.id.to_string());
                    self.tell_watchers(Heard {
                        name: &name,
                        session: &session,
                        from,
                        to: new,
                        after_ms,
                        inside,
                    });
                }
                point("guard.client-heard");
                let orders = succession::heard(&mut self.workers, &mut self.routes, key);
                if !orders.is_empty() {
                    point("guard.switching");
                    self.carry_out(orders);
                }
            }
            Request::ControlLost => {
                if let Some(session) = self.session_mut(key) {
                    session.control = false;
                }
            }
            Request::Heard => {
                if let Some(session) = self.session_mut(key)
                    && let Presence::Asked(since) = session.presence
                {
                    session.presence = Presence::Answered(since);
                }
            }
            Request::Report(report) => {
                if let Some(worker) = self.workers.get_mut(key) {
                    worker.asked -= 1;
                }
                self.take_report(key, *report);
            }
            Request::Log { level, text } => self.show_log_line(key, level, &text),
            Request::Ended { reason, cause, text } => self.take_last_word(key, reason, cause, &text),
        }
    }

    /// A client shows a ticket.
    fn answer_redeem(&mut self, key: u64, id: &TicketId) {
        let Some(worker) = self.workers.get_mut(key) else { return };
        if std::mem::replace(&mut worker.redeemed, true) {
            return self.punish(key, "a second ticket on one connection");
        }
        let found = self.tickets.redeem(id, clock::now(), time::wall_clock());
        let (holder, session) = found.unzip();
        worker.resumes = holder;
        self.reply(key, &Reply::Redeemed(session));
    }

    fn keep_ticket(&mut self, key: u64, id: TicketId, session: SavedSession, until: i64) {
        if !session.is_plausible() {
            return self.punish(key, "a TLS session of impossible length");
        }
        let Some(worker) = self.workers.get_mut(key) else { return };
        if worker.ticketed.replace(id).is_some() {
            return self.punish(key, "a second ticket for one session");
        }
        // Made while others were trusted: its next connection shows a certificate again.
        if worker.started <= self.trusted_since {
            return;
        }
        let Some(own) = &worker.session else { return };
        let until = ticket_end(until, worker.resumes.as_ref(), time::wall_clock());
        let holder = Holder { name: own.name.clone(), cert: own.cert.clone(), until };
        if !self.tickets.keep(holder, id, session, clock::now()) {
            worker.ticketed = None;
            self.punish(key, "a ticket with another one's number");
        }
    }

    /// The client proved who it is: addresses, a slot and a session, or a reason why not.
    fn answer_claim(&mut self, key: u64, claim: Claim) {
        if !is_possible(&claim) {
            return self.punish(key, "a claim that no certificate makes");
        }
        let Some(worker) = self.workers.get_mut(key) else { return };
        // A ticket that was shown may have led to a full handshake all the same, and to whomever.
        worker.resumes = worker.resumes.take().filter(|_| claim.resumed);
        if !is_covered(&claim, worker.resumes.as_ref()) {
            return self.punish(key, "it claims to be another than the ticket's holder");
        }
        // Judged by certificates and lists that are not in force any more: the next try is judged by those that are.
        if worker.started <= self.trusted_since {
            let text = "what decides whom to trust has changed meanwhile".to_owned();
            self.reply(key, &Reply::Refused { reason: Reason::Internal, text });
            return self.expect_end(key);
        }
        let name = claim.name.clone();
        match self.grant(key, claim) {
            Ok((grant, memory)) => {
                point("guard.granted");
                let session = grant.session;
                let slot = self.slots.socket(session);
                let fds: &[BorrowedFd<'_>] = match self.config.tun_write {
                    TunWrite::Direct => &[slot, memory.as_fd(), self.host.tun.as_fd()],
                    TunWrite::Guard => &[slot, memory.as_fd()],
                };
                let Some(worker) = self.workers.get_mut(key) else { return };
                worker.phase = Phase::Granted;
                if !matches!(worker.channel.send(&Reply::Granted(Box::new(grant)), fds), Ok(true)) {
                    self.punish(key, "it doesn't read its answer");
                }
            }
            Err((reason, text)) => {
                log::warn!("{} refused: {text}", Escaped(&name));
                self.reply(key, &Reply::Refused { reason, text });
                self.expect_end(key);
            }
        }
    }

    fn grant(&mut self, key: u64, claim: Claim) -> Result<(Grant, OwnedFd), (Reason, String)> {
        let internal = |f: Failure| (Reason::Internal, f.text);
        if self.trust.is_revoked(&claim.cert) {
            return Err((Reason::Revoked, "its certificate is revoked".into()));
        }
        let resumed = succession::judge(&self.workers, &claim).map_err(|text| (Reason::Forbidden, text))?;
        let seat = match resumed {
            Some((_, seat)) => seat,
            None => self.seat(&claim)?,
        };
        let others = succession::taken_beside(&self.workers, &claim.name, seat);
        if others >= usize::from(self.config.max_clients) {
            return Err((Reason::NoRoom, format!("max_clients = {others} sessions are there already")));
        }
        let resume_secret = ResumeSecret::from_bytes(random::bytes().map_err(internal)?);
        let holder = leases::holder(&claim.name, seat);
        // What is fixed is the first one's.
        let entry = self.config.clients.get(&*holder).cloned().unwrap_or_default();
        let rates = self.config.rates_of(&claim.name);
        let id = match self.slots.take().map_err(internal)? {
            Some(id) => id,
            None => return Err((Reason::NoRoom, "every UDP slot is taken".into())),
        };
        let addresses = match self.leases.grant(&holder, &claim.want) {
            Ok(addresses) => addresses,
            Err(exhausted) => {
                self.slots.release(id);
                return Err((Reason::NoRoom, format!("every address of {} is leased", exhausted.0)));
            }
        };
        let ClientEntry { subnets, .. } = entry;
        let (memory, file) = match Filler::create("tunguard-queue", outbox::MEMORY) {
            Ok(made) => made,
            Err(error) => {
                self.slots.release(id);
                self.leases.release(&holder);
                return Err(internal(Failure::system("make the memory of a session's queue", error)));
            }
        };
        let grant = Grant {
            session: id,
            addresses: addresses.clone(),
            subnets: subnets.clone(),
            resume_secret: resume_secret.clone(),
            rate_up: rates.up,
        };
        if let Some((old, _)) = resumed {
            log::info!("{} resumes session {old} as {id}", Escaped(&claim.name));
        }
        let now = clock::now();
        self.meters.enter(&claim.name, rates, now);
        let session = Session {
            addresses,
            subnets,
            memory: Some(memory),
            rates,
            ..Session::new(id, claim.name, seat, claim.cert, resume_secret, now)
        };
        if let Some(worker) = self.workers.get_mut(key) {
            worker.session = Some(session);
        }
        Ok((grant, file))
    }

    /// Where a client sits down that resumes nothing; or, where every seat of its identity is taken, why not.
    fn seat(&mut self, claim: &Claim) -> Result<u16, (Reason, String)> {
        let seats = self.config.sessions_of(&claim.name);
        let wanted = self.leases.seat_with(&claim.name, &claim.want, seats);
        let now = clock::now();
        match succession::seat(&self.workers, &claim.name, wanted, seats, self.config.on_too_many, now) {
            Seating::At(seat) => Ok(seat),
            Seating::Full { ask } => {
                // By the time it comes again it is known which of them are still there.
                for key in ask {
                    self.reply(key, &Reply::Ask);
                    if let Some(session) = self.session_mut(key) {
                        session.presence = Presence::Asked(now);
                    }
                }
                let many = match seats {
                    1 => "it has a session already".to_owned(),
                    _ => format!("it has {seats} sessions already"),
                };
                Err((Reason::TooMany, many))
            }
        }
    }

    /// The worker's queues are there: packets to its addresses may go into them, as soon as it has no older session
    /// of the same client to wait for.
    fn answer_register(&mut self, key: u64, size: QueueSize) {
        let opened = self.open_queues(key, size);
        let (outbox, uplink) = match opened {
            Ok(queues) => queues,
            Err(failure) => {
                log::error!("registration refused: {failure}");
                let reply = Reply::Refused { reason: Reason::Internal, text: failure.text };
                self.reply(key, &reply);
                return self.expect_end(key);
            }
        };
        point("guard.queues-opened");
        if let Some(uplink) = &uplink
            && let Err(error) = self.poller.add(uplink.as_fd(), Source::Uplink(key).token(), Interest::Read)
        {
            log::error!("can't watch a queue: {error}");
        }
        let interest = self.poller.add(outbox.queue().as_fd(), Source::Queue(key).token(), Interest::Nothing);
        if let Err(error) = interest {
            log::error!("can't watch a queue: {error}");
        }
        let Some(worker) = self.workers.get_mut(key) else { return };
        worker.phase = Phase::Established;
        worker.stage = Stage::Session;
        let (from, told) = (worker.tcp_peer.ip(), worker.started);
        let Some(session) = worker.session.as_mut() else { return };
        session.outbox = Some(outbox);
        session.uplink = uplink;
        self.gate.handle_established(from, clock::now());
        match succession::enter(&mut self.workers, &mut self.routes, key, clock::now()) {
            Ok(orders) => {
                point("guard.routes-entered");
                self.reply(key, &Reply::Registered);
                if told <= self.pushed_since {
                    self.push_to(key);
                }
                self.carry_out(orders);
            }
            Err(reason) => self.end_worker(key, reason),
        }
        self.serve_waiting();
    }

    /// Opens the queues that the worker made at its start, checks that they are this worker's and of the size agreed, and
    /// takes the names away.
    fn open_queues(&mut self, key: u64, size: QueueSize) -> Outcome<(Outbox, Option<Reader>)> {
        let Some(worker) = self.workers.get_mut(key) else {
            return Err(Failure::system("open the session's queues", "the worker is gone"));
        };
        let (uid, names) = (worker.uid, worker.queues.clone());
        let granted = worker.session.as_mut().and_then(|s| Some((s.memory.take()?, s.rates)));
        let Some((memory, rates)) = granted else {
            return Err(Failure::system("open the session's queues", "nothing was granted"));
        };
        let (writer, reader) = (Writer::open(&names.down), names.up.as_deref().map(Reader::open));
        names.unlink();
        let QueueNames { down, up } = names;
        let writer = writer.map_err(|e| Failure::system(format!("open the queue {down}"), e))?;
        let downlink = self.queues.downlink;
        check_queue(&down, writer.as_fd(), writer.attributes(), uid, size, downlink)?;
        let outbox = Outbox::new(writer, downlink.bytes, memory).with_rate(rates.down);
        let (Some(up), Some(reader), Some(uplink)) = (up, reader, self.queues.uplink) else {
            return Ok((outbox, None));
        };
        let reader = reader.map_err(|e| Failure::system(format!("open the queue {up}"), e))?;
        check_queue(&up, reader.as_fd(), reader.attributes(), uid, uplink, uplink)?;
        Ok((outbox, Some(reader)))
    }

    fn show_log_line(&mut self, key: u64, level: u8, text: &str) {
        let Some(worker) = self.workers.get_mut(key) else { return };
        let Some(suppressed) = worker.log_budget.spend(clock::now()) else { return };
        let level = log::Level::iter().nth(usize::from(level).saturating_sub(1)).unwrap_or(log::Level::Info);
        let text: String = text.chars().take(MAX_LOG_LINE).collect();
        if suppressed > 0 {
            log::warn!("[{}] {suppressed} lines left out", worker.pid);
        }
        log::log!(level, "[{}] {}", worker.pid, Escaped(&text));
    }

    fn take_last_word(&mut self, key: u64, reason: Option<Reason>, cause: Cause, text: &str) {
        self.expect_end(key);
        let Some(worker) = self.workers.get_mut(key) else { return };
        worker.explained = true;
        worker.phase = Phase::Over;
        let label = worker.label();
        let from = worker.tcp_peer.ip();
        if let (None, Stage::Handshake, Some(how)) = (reason, worker.stage, Failed::of(cause)) {
            self.charge(from, how);
        }
        match reason {
            Some(reason) => {
                log::info!("{label} ended: {reason}");
                // An idle session ends like one that its client left.
                if matches!(reason, Reason::Leaving | Reason::Idle) {
                    let orders = succession::left(&self.workers, key);
                    if !orders.is_empty() {
                        self.carry_out(orders);
                    }
                }
            }
            // Something here is broken, and the next client will meet it, too.
            None if cause == Cause::Ours => {
                log::error!("{label}: no session: {}", Escaped(text));
                self.spawner.change_users();
            }
            None => self.mention(format_args!("{label}: no session: {}", Escaped(text))),
        }
    }

    /// A worker has nothing more to do but to end, in time.
    fn expect_end(&mut self, key: u64) {
        let until = clock::now() + GOODBYE;
        let Some(worker) = self.workers.get_mut(key) else { return };
        worker.kill_at = Some(worker.kill_at.map_or(until, |at| at.min(until)));
        let carried = worker.phase == Phase::Established;
        worker.phase = worker.phase.max(Phase::Ending);
        let session = worker.session.as_ref().filter(|_| carried);
        let seat = session.map(|session| (session.name.clone(), session.seat));
        self.note_deadline(until);
        if let Some((name, seat)) = seat {
            self.relieve(&name, seat);
        }
    }

    /// Tells a worker to end; it is killed if it doesn't in time.
    pub fn end_worker(&mut self, key: u64, reason: Reason) {
        let Some(worker) = self.workers.get_mut(key) else { return };
        if worker.phase >= Phase::Ending {
            return;
        }
        self.expect_end(key);
        self.reply(key, &Reply::End(reason));
    }

    /// Ends workers that asked the key holder for what they may not have.
    pub(crate) fn punish_misuse(&mut self) {
        while let Some(misuse) = self.trust.holder.misused() {
            let worker = self.workers.iter().find(|(_, w)| w.signing == misuse.channel).map(|(key, _)| key);
            match worker {
                Some(key) => self.punish(key, &format!("to the key holder: {}", misuse.what)),
                // It has ended, or was none: all the same, whoever comes next comes from another nursery.
                None => {
                    let what = Escaped(&misuse.what);
                    log::error!("somebody who is gone broke the rules with the key holder: {what}");
                    self.spawner.renew();
                }
            }
        }
    }

    /// Ends a worker that broke the rules, at once.
    fn punish(&mut self, key: u64, what: &str) {
        let Some(worker) = self.workers.get_mut(key) else { return };
        log::error!("{}: killed: the worker broke the rules: {}", worker.label(), Escaped(what));
        worker.explained = true;
        worker.phase = Phase::Over;
        if let Some(id) = worker.ticketed {
            self.tickets.forget(&id);
        }
        let _ = self.poller.remove(worker.channel.as_fd());
        let seat = worker.session.as_ref().map(|session| (session.name.clone(), session.seat));
        let from = worker.tcp_peer.ip();
        self.charge(from, Failed::Violation);
        self.kill(key);
        self.spawner.renew();
        if let Some((name, seat)) = seat {
            self.relieve(&name, seat);
        }
    }

    pub(crate) fn reply(&mut self, key: u64, reply: &Reply) {
        let Some(worker) = self.workers.get_mut(key) else { return };
        // A worker that doesn't read, or is gone, is dealt with by its deadline or its end.
        let _ = worker.channel.send(reply, &[]);
    }

    fn session_mut(&mut self, key: u64) -> Option<&mut Session> {
        self.workers.get_mut(key)?.session.as_mut()
    }
}

/// What is asked for, without what comes with it: that is a worker's text, and may be long, or a secret.
fn kind(request: &Request) -> String {
    format!("{request:?}").chars().take_while(|c| c.is_alphanumeric()).collect()
}

/// Whether a certificate can make such a claim at all.
fn is_possible(claim: &Claim) -> bool {
    acceptable(&claim.name) && (1..=20).contains(&claim.cert.serial.len())
}

/// Whether who shows no certificate is who showed it when the ticket was made, whose holder this is.
fn is_covered(claim: &Claim, ticket: Option<&Holder>) -> bool {
    !claim.resumed || ticket.is_some_and(|holder| holder.name == claim.name && holder.cert == claim.cert)
}

/// Until when a ticket is good, in seconds since 1970 as all of these: a worker says when its client's certificates end,
/// and may be wrong. Of a session that was itself resumed it is the end of the one it began with.
fn ticket_end(said: i64, resumes: Option<&Holder>, now: i64) -> i64 {
    resumes.map_or(said.min(now + LONGEST_CHAIN), |before| before.until)
}

/// Whether a queue is the worker's of user `uid`, and of the size that was granted and registered.
fn check_queue(
    name: &str,
    fd: BorrowedFd<'_>,
    attributes: std::io::Result<(QueueSize, usize)>,
    uid: u32,
    registered: QueueSize,
    granted: QueueSize,
) -> Outcome<()> {
    let (size, _) = attributes.map_err(|e| Failure::system(format!("read the size of {name}"), e))?;
    let owner = fstat(fd).map_err(|e| Failure::system(format!("read the owner of {name}"), e))?.st_uid;
    if owner != uid || size != granted || registered != granted {
        let text = format!("{name} is {size:?} of user {owner}, {granted:?} of user {uid} was granted");
        return Err(Failure::new(tunguard::exit::Exit::Refused, text));
    }
    Ok(())
}

/// How long a worker may take to say goodbye.
pub const GOODBYE: Duration = Duration::from_secs(2);
const REQUESTS_PER_TURN: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tunguard::tls::CertId;

    #[test]
    fn each_phase_permits_its_own_requests_only() {
        let cert = CertId { issuer: [0; 32], serial: vec![1], not_after: 0 };
        let claim =
            Request::Claim(Claim { name: "ann".into(), cert, resumed: false, want: vec![], resume: None });
        let register = Request::Register { size: QueueSize::KERNEL_DEFAULT };
        let redeem = Request::Redeem([0; 32]);
        let ticket = Request::Ticket { id: [0; 32], session: SavedSession::from_bytes(vec![1]), until: 0 };
        let moved = Request::Moved { new: ([192, 0, 2, 1], 1).into(), after_ms: None, inside: false };
        let report = Request::Report(Box::default());
        let ended = Request::Ended { reason: None, cause: Cause::Left, text: String::new() };
        use Phase::*;
        for (request, phases) in [
            (&redeem, &[Handshake][..]),
            (&claim, &[Handshake]),
            (&ticket, &[Established, Draining, Ending]),
            (&register, &[Granted]),
            (&moved, &[Established, Draining, Ending]),
            (&Request::ControlLost, &[Established, Draining, Ending]),
            (&Request::Heard, &[Established, Draining, Ending]),
            (&ended, &[Handshake, Granted, Established, Draining, Ending]),
            (&report, &[]),
        ] {
            for phase in [Handshake, Granted, Established, Draining, Ending, Over] {
                assert_eq!(permitted(phase, 0, request), phases.contains(&phase), "{phase:?} {request:?}");
            }
        }
        assert!(permitted(Established, 1, &report));
    }

    fn cert(serial: &[u8]) -> CertId {
        CertId { issuer: [7; 32], serial: serial.to_vec(), not_after: 0 }
    }

    fn claim(name: &str, serial: &[u8], resumed: bool) -> Claim {
        Claim { name: name.into(), cert: cert(serial), resumed, want: vec![], resume: None }
    }

    #[test]
    fn a_claim_names_somebody_whom_a_certificate_can_name() {
        for (name, serial, possible) in [
            ("ann", vec![1], true),
            ("ann", vec![1; 20], true),
            ("ann", vec![1; 21], false),
            ("ann", vec![], false),
            ("", vec![1], false),
            // The name of a seat's lease.
            ("ann/2", vec![1], false),
            ("ann\n", vec![1], false),
        ] {
            assert_eq!(is_possible(&claim(name, &serial, false)), possible, "{name:?} {serial:?}");
        }
    }

    #[test]
    fn a_resumed_claim_is_the_tickets_holders_and_nobody_elses() {
        let holder = Holder { name: "ann".into(), cert: cert(&[1]), until: 0 };
        for (name, serial, own) in [("ann", 1, true), ("bob", 1, false), ("ann", 2, false), ("bob", 2, false)]
        {
            assert_eq!(is_covered(&claim(name, &[serial], true), Some(&holder)), own, "{name} {serial}");
            assert!(!is_covered(&claim(name, &[serial], true), None), "no ticket was shown");
            // Who shows a certificate needs none, and may be another than the ticket's holder.
            assert!(is_covered(&claim(name, &[serial], false), None));
            assert!(is_covered(&claim(name, &[serial], false), Some(&holder)));
        }
    }

    #[test]
    fn no_chain_of_tickets_is_longer_than_the_certificates_or_a_day() {
        let now = 1_000_000;
        assert_eq!(ticket_end(now + 60, None, now), now + 60);
        assert_eq!(ticket_end(i64::MAX, None, now), now + 86_400);
        let first = Holder { name: "ann".into(), cert: cert(&[1]), until: now + 60 };
        for said in [0, now + 61, i64::MAX] {
            assert_eq!(ticket_end(said, Some(&first), now), now + 60, "what it began with");
        }
    }

    #[test]
    fn a_queue_is_its_workers_and_of_the_size_agreed() {
        let file = tempfile::tempfile().expect("a file");
        let own = fstat(&file).expect("its owner").st_uid;
        let (size, other) =
            (QueueSize { messages: 10, bytes: 8_192 }, QueueSize { messages: 10, bytes: 8_193 });
        let check = |is: Option<QueueSize>, uid, registered, granted| {
            let attributes = is.map(|size| (size, 0)).ok_or_else(|| std::io::ErrorKind::Other.into());
            check_queue("/q", file.as_fd(), attributes, uid, registered, granted).is_ok()
        };
        assert!(check(Some(size), own, size, size));
        assert!(!check(None, own, size, size), "its size can't be read");
        assert!(!check(Some(size), own + 1, size, size), "somebody else's");
        assert!(!check(Some(other), own, size, size), "another size than it said");
        assert!(!check(Some(size), own, other, size), "it says another size");
        assert!(!check(Some(size), own, size, other), "another size than it got");
        assert!(!check(Some(other), own, other, size), "not what was granted, and it says so");
    }

    #[test]
    fn what_is_logged_of_a_request_is_its_kind_only() {
        assert_eq!(kind(&Request::Log { level: 1, text: "a secret".into() }), "Log");
        assert_eq!(kind(&Request::Redeem([0; 32])), "Redeem");
        assert_eq!(kind(&Request::Heard), "Heard");
    }

    proptest! {
        /// Whatever a worker says in whatever order: it is granted and registered once at most, in that order, and said
        /// its last word once.
        #[test]
        fn no_order_of_requests_gets_more_than_a_session(
            steps in prop::collection::vec((0u8..9, any::<bool>()), 0..60),
        ) {
            let cert = CertId { issuer: [0; 32], serial: vec![1], not_after: 0 };
            let claim = Claim { name: "ann".into(), cert, resumed: false, want: vec![], resume: None };
            let (mut phase, mut asked) = (Phase::Handshake, 0);
            let (mut claims, mut registrations, mut last_words) = (0, 0, 0);
            for (step, granted) in steps {
                let request = match step {
                    0 => Request::Redeem([0; 32]),
                    1 => Request::Claim(claim.clone()),
                    2 => Request::Register { size: QueueSize::KERNEL_DEFAULT },
                    3 => Request::ControlLost,
                    4 => Request::Report(Box::default()),
                    5 => Request::Ended { reason: None, cause: Cause::Left, text: String::new() },
                    6 => Request::Log { level: 3, text: String::new() },
                    // The guard's own doing.
                    7 => { asked += 1; continue }
                    _ => { phase = phase.max(Phase::Ending); continue }
                };
                if !permitted(phase, asked, &request) {
                    continue;
                }
                match request {
                    Request::Redeem(_) => prop_assert_eq!(claims, 0),
                    Request::Claim(_) => {
                        claims += 1;
                        phase = if granted { Phase::Granted } else { Phase::Ending };
                    }
                    Request::Register { .. } => {
                        prop_assert_eq!(claims, 1);
                        registrations += 1;
                        phase = if granted { Phase::Established } else { Phase::Ending };
                    }
                    Request::ControlLost => prop_assert!(phase == Phase::Ending || registrations == 1),
                    Request::Report(_) => asked -= 1,
                    Request::Ended { .. } => { last_words += 1; phase = Phase::Over }
                    _ => {}
                }
                prop_assert!(claims <= 1 && registrations <= claims && last_words <= 1);
            }
        }
    }
}
