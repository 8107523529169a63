//! The guard's life.
//!
//! 1. `tun_to_worker`: reads the device until it is empty, sorts packets by inner destination into batches, one
//!    per session, and posts each batch to its session's queue
//! 2. `worker_to_tun`: with `tun_write = "guard"`, takes workers' packets, checks their source, writes them
//! 3. connections become workers, workers' requests are answered ([`crate::grants`]), workers' ends are cleaned up
//! 4. on SIGINT or SIGTERM every session gets a goodbye, and the host is put back as it was

use std::io::{ErrorKind, IoSlice};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use tunguard::batch::{BatchReader, BatchWriter};
use tunguard::config::server::ServerConfig;
use tunguard::exit::{Failure, Outcome};
use tunguard::ipc::HANDSHAKE_SECONDS;
use tunguard::segment::{addresses, pieces};
use tunguard::sys::clock;
use tunguard::sys::mq::{QueueLimits, QueueSize, unlink};
use tunguard::sys::poller::{Interest, Poller, Ready};
use tunguard::sys::signals::Signals;
use tunguard::sys::tun::Tun;
use tunguard::time::Time;
use tunguard::tls;
use tunguard::wire::control::Reason;
use tunguard::wire::vnet::{VNET_LEN, VnetHeader};

use crate::accounts::{Accounts, GuardDrop};
use crate::admin::Admin;
use crate::clients::{Budget, Phase, Worker, Workers};
use crate::host::Host;
use crate::leases::Leases;
use crate::outbox::{Pool, Posted};
use crate::routes::Routes;
use crate::slots::Slots;
use crate::spawn::Spawner;
use crate::trust::Trust;

/// The server.
pub struct Guard {
    pub(crate) config: ServerConfig,
    pub(crate) trust: Trust,
    pub(crate) spawner: Spawner,
    pub(crate) listener: TcpListener,
    pub(crate) listen: SocketAddr,
    pub(crate) slots: Slots,
    pub(crate) host: Host,
    pub(crate) queue_limits: QueueLimits,
    pub(crate) queue_size: QueueSize,
    pub(crate) leases: Leases,
    pub(crate) admin: Admin,
    pub(crate) poller: Poller,
    pub(crate) workers: Workers,
    pub(crate) routes: Routes,
    pub(crate) accounts: Accounts,
    pub(crate) started: Time,
    signals: Signals,
    /// The batches of one turn: each session's packets together, a bounded number of sessions at once.
    open: Vec<(u64, BatchWriter)>,
    pool: Pool,
    uplink: Vec<u8>,
    /// New connections are accepted; otherwise from then on again.
    accepting: Accepting,
    leases_written: Time,
    next_kill: Option<Time>,
    /// Log lines about connections that came to nothing.
    pub(crate) strangers: Budget,
    certificates_checked: Time,
    stopping: Option<Time>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accepting {
    Yes,
    /// Too many handshakes; again when one is over.
    Full,
    /// Out of descriptors or processes; again at that time.
    Paused(Time),
    /// The server stops.
    No,
}

/// Who an event is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The TUN device.
    Tun,
    /// The TCP listener.
    Listener,
    /// A signal.
    Signal,
    /// The admin socket.
    Admin,
    /// The revocation list's watch.
    Trust,
    /// A worker's channel.
    Worker(u64),
    /// A session's queue has room again.
    Queue(u64),
    /// A session's packets for the device.
    Uplink(u64),
    /// Somebody on the admin socket.
    Conversation(u64),
}

impl Source {
    /// As an epoll token: the kind in the low four bits, the number above.
    pub fn token(self) -> u64 {
        match self {
            Source::Tun => 0,
            Source::Listener => 1,
            Source::Signal => 2,
            Source::Admin => 3,
            Source::Trust => 4,
            Source::Worker(key) => 5 | key << 4,
            Source::Queue(key) => 6 | key << 4,
            Source::Uplink(key) => 7 | key << 4,
            Source::Conversation(key) => 8 | key << 4,
        }
    }

    fn from_token(token: u64) -> Option<Source> {
        let key = token >> 4;
        Some(match token & 15 {
            0 => Source::Tun,
            1 => Source::Listener,
            2 => Source::Signal,
            3 => Source::Admin,
            4 => Source::Trust,
            5 => Source::Worker(key),
            6 => Source::Queue(key),
            7 => Source::Uplink(key),
            8 => Source::Conversation(key),
            _ => return None,
        })
    }
}

impl Guard {
    /// Puts the parts together and starts to listen to all of them.
    #[expect(clippy::too_many_arguments, reason = "the parts of the start-up function, once each")]
    pub fn new(
        config: ServerConfig,
        trust: Trust,
        mut spawner: Spawner,
        listener: TcpListener,
        slots: Slots,
        host: Host,
        (queue_limits, queue_size): (QueueLimits, QueueSize),
        leases: Leases,
        admin: Admin,
    ) -> Outcome<Guard> {
        let failed = |e| Failure::system("prepare to wait for events", e);
        let signals = Signals::install().map_err(failed)?;
        spawner.prepare(&config, &trust, host.offloads.uso)?;
        let poller = Poller::new(EVENTS).map_err(failed)?;
        poller.add(host.tun.as_fd(), Source::Tun.token(), Interest::Read).map_err(failed)?;
        poller.add(listener.as_fd(), Source::Listener.token(), Interest::Read).map_err(failed)?;
        poller.add(admin.listener.as_fd(), Source::Admin.token(), Interest::Read).map_err(failed)?;
        for fd in signals.fds() {
            poller.add(fd, Source::Signal.token(), Interest::Read).map_err(failed)?;
        }
        if let Some(watch) = trust.watch() {
            poller.add(watch, Source::Trust.token(), Interest::Read).map_err(failed)?;
        }
        let listen = listener.local_addr().map_err(failed)?;
        let now = clock::now();
        Ok(Guard {
            open: Vec::new(),
            pool: Pool::new(queue_size.bytes),
            uplink: vec![0; queue_size.bytes],
            config,
            trust,
            spawner,
            listener,
            listen,
            slots,
            host,
            queue_limits,
            queue_size,
            leases,
            admin,
            poller,
            workers: Workers::default(),
            routes: Routes::default(),
            accounts: Accounts::default(),
            started: now,
            signals,
            accepting: Accepting::Yes,
            leases_written: now,
            next_kill: None,
            strangers: Budget::of_log_lines(now),
            certificates_checked: now,
            stopping: None,
        })
    }

    /// Serves until a signal says stop.
    pub fn run(mut self) -> Outcome<()> {
        log::info!("tunguard {} is ready, pid {}", tunguard::VERSION, std::process::id());
        let result = self.serve();
        self.end_all_workers();
        if self.leases.is_dirty()
            && let Err(failure) = self.leases.save()
        {
            log::error!("{failure}");
        }
        self.host.restore();
        log::info!("stopped");
        result
    }

    fn serve(&mut self) -> Outcome<()> {
        while !self.finished(clock::now()) {
            let timeout = self.next_deadline().map(|at| at.since(clock::now()));
            let events = self.poller.wait(timeout).map_err(|e| Failure::system("wait for events", e))?;
            let ready: Vec<Ready> = events.collect();
            for event in ready {
                match Source::from_token(event.token) {
                    Some(Source::Tun) => self.tun_to_worker()?,
                    Some(Source::Uplink(key)) => self.worker_to_tun(key),
                    Some(Source::Queue(key)) => self.resume_queue(key),
                    Some(Source::Worker(key)) => self.answer_worker(key),
                    Some(Source::Listener) => self.accept_clients(),
                    Some(Source::Signal) => self.take_signals(),
                    Some(Source::Admin) => self.accept_admin(),
                    Some(Source::Conversation(key)) => self.converse(key),
                    Some(Source::Trust) if self.trust.list_changed() => {
                        self.reload("the revocation list changed");
                    }
                    Some(Source::Trust) => {}
                    None => {}
                }
            }
            self.do_what_is_due(clock::now());
        }
        Ok(())
    }

    /// Device to queues. Packets are read straight into the batch of the session that got the last one, as most
    /// packets come in trains; only those of others are copied.
    fn tun_to_worker(&mut self) -> Outcome<()> {
        let mut last: Option<u64> = None;
        let mut reading = self.pool.take();
        for _ in 0..PACKETS_PER_TURN {
            let len = match self.host.tun.read(reading.spare()) {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(error) if Tun::is_gone(&error) => {
                    return Err(Failure::system(
                        format!("read the device {}", self.config.device),
                        "it was deleted",
                    ));
                }
                // One packet that can't be read must not end everybody's session.
                Err(_) => {
                    self.accounts.drop(GuardDrop::Unreadable);
                    break;
                }
            };
            self.accounts.read_packets += 1;
            self.accounts.read_bytes += len.saturating_sub(VNET_LEN) as u64;
            let Some(key) = self.route(&reading.spare()[..len]) else { continue };
            if last != Some(key) {
                let mine = self.batch_of(key);
                reading = self.change_batch(reading, last, mine, len);
                last = Some(key);
            }
            if !reading.commit(len) {
                self.make_room(key, &mut reading, len);
            }
        }
        match last {
            Some(key) => self.open.push((key, reading)),
            None => self.pool.give(reading),
        }
        while let Some((key, mut batch)) = self.open.pop() {
            self.post(key, &mut batch);
            self.pool.give(batch);
        }
        Ok(())
    }

    /// Which worker a packet behind its virtio header goes to; what goes nowhere is counted.
    fn route(&mut self, read: &[u8]) -> Option<u64> {
        let Some((_, destination)) = read.get(VNET_LEN..).and_then(addresses) else {
            self.accounts.drop(GuardDrop::BadInner);
            return None;
        };
        let key = self.routes.lookup(destination);
        if key.is_none() {
            self.accounts.drop(GuardDrop::NoRoute);
        }
        key
    }

    /// The open batch of `key`, or a fresh one.
    fn batch_of(&mut self, key: u64) -> BatchWriter {
        match self.open.iter().position(|(k, _)| *k == key) {
            Some(at) => self.open.swap_remove(at).1,
            None => self.pool.take(),
        }
    }

    /// Goes over from the batch of `last` to `mine`, and takes the packet along that was just read.
    fn change_batch(
        &mut self,
        reading: BatchWriter,
        last: Option<u64>,
        mut mine: BatchWriter,
        len: usize,
    ) -> BatchWriter {
        let mut reading = reading;
        mine.spare()[..len].copy_from_slice(&reading.spare()[..len]);
        match last {
            Some(key) => self.open.push((key, reading)),
            None => self.pool.give(reading),
        }
        if self.open.len() > OPEN_BATCHES {
            let (key, mut oldest) = self.open.swap_remove(0);
            self.post(key, &mut oldest);
            self.pool.give(oldest);
        }
        mine
    }

    /// The message is full: sends it, and starts the next with the packet just read, in pieces where even a
    /// message of its own is too small for it.
    fn make_room(&mut self, key: u64, batch: &mut BatchWriter, len: usize) {
        let packet = batch.spare()[..len].to_vec();
        self.post(key, batch);
        batch.spare()[..len].copy_from_slice(&packet);
        if batch.commit(len) {
            return;
        }
        let Some(vnet) = VnetHeader::parse(&packet) else { return };
        let most = batch.room_for_packet();
        let mut cut = Vec::new();
        let whole = pieces(vnet, &packet[VNET_LEN..], most, |vnet, head, payload| {
            cut.push((vnet, [head, payload].concat()));
        });
        if whole.is_err() {
            self.accounts.drop(GuardDrop::TooLong);
        }
        for (vnet, piece) in cut {
            if !batch.push(&vnet, &piece, &[]) {
                self.post(key, batch);
                batch.push(&vnet, &piece, &[]);
            }
        }
    }

    /// Sends a batch to its session's queue and empties it.
    fn post(&mut self, key: u64, batch: &mut BatchWriter) {
        if !batch.is_empty() {
            let posted = self.workers.outbox(key).map(|outbox| outbox.post(batch, &mut self.pool));
            match posted {
                Some(Ok(Posted::Sent)) => {}
                Some(Ok(Posted::Waiting)) => self.watch_queue(key, Interest::Write),
                // Full, or a queue that broke: its worker's end is seen elsewhere.
                Some(Ok(Posted::Dropped) | Err(_)) | None => {
                    for _ in BatchReader::new(batch.message()) {
                        self.accounts.drop(GuardDrop::QueueFull);
                    }
                }
            }
        }
        batch.clear();
    }

    fn resume_queue(&mut self, key: u64) {
        let empty =
            self.workers.outbox(key).is_none_or(|outbox| outbox.resume(&mut self.pool).unwrap_or(true));
        if empty {
            self.watch_queue(key, Interest::Nothing);
        }
    }

    fn watch_queue(&mut self, key: u64, interest: Interest) {
        if let Some(outbox) = self.workers.outbox(key) {
            let _ = self.poller.modify(outbox.queue().as_fd(), Source::Queue(key).token(), interest);
        }
    }

    /// Workers' packets to the device, each only from an address of its session.
    fn worker_to_tun(&mut self, key: u64) {
        for _ in 0..MESSAGES_PER_TURN {
            let uplink = self.workers.get_mut(key).and_then(|w| w.session.as_mut()?.uplink.as_mut());
            let Some(uplink) = uplink else { return };
            let Ok(Some(len)) = uplink.receive(&mut self.uplink) else { return };
            for record in BatchReader::new(&self.uplink[..len]) {
                let packet =
                    record.ok().and_then(|(vnet, p)| addresses(p).map(|(source, _)| (vnet, p, source)));
                let Some((vnet, packet, source)) = packet else {
                    self.accounts.drop(GuardDrop::BadRecord);
                    continue;
                };
                if self.routes.lookup(source) != Some(key) {
                    self.accounts.drop(GuardDrop::SourceNotOurs);
                    continue;
                }
                let header = vnet.emit();
                if self.host.tun.write(&[IoSlice::new(&header), IoSlice::new(packet)]).is_err() {
                    self.accounts.drop(GuardDrop::TunRefused);
                }
            }
        }
    }

    fn accept_clients(&mut self) {
        // A few at a time: traffic goes on meanwhile.
        for _ in 0..CONNECTIONS_PER_TURN {
            if self.workers.handshakes() >= usize::from(self.config.max_handshakes) {
                return self.accept_later(Accepting::Full);
            }
            match self.listener.accept() {
                Ok((tcp, peer)) => {
                    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                    match self.spawner.start(&tcp) {
                        Ok(started) => self.take_in(started, peer),
                        Err(failure) => {
                            log::error!("{peer} turned away: {failure}");
                            return self.accept_later(Accepting::Paused(clock::now() + BREATHER));
                        }
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if matches!(e.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(e) => {
                    log::error!("can't accept connections for a moment: {e}");
                    return self.accept_later(Accepting::Paused(clock::now() + BREATHER));
                }
            }
        }
    }

    fn take_in(&mut self, started: crate::spawn::Started, peer: SocketAddr) {
        let now = clock::now();
        log::debug!("{peer} connected, worker {}", started.pid);
        let key = self.workers.insert(Worker {
            pid: started.pid,
            uid: started.uid,
            channel: started.channel,
            tcp_peer: peer,
            phase: Phase::Handshake,
            started: now,
            // The worker keeps its own deadline; this one is for a worker that doesn't.
            kill_at: None,
            session: None,
            log_budget: Budget::of_log_lines(now),
            request_budget: Budget::of_requests(now),
            asked: 0,
            explained: false,
        });
        self.note_deadline(now + Duration::from_secs(HANDSHAKE_SECONDS) + HANDSHAKE_GRACE);
        let Some(worker) = self.workers.get_mut(key) else { return };
        if let Err(error) =
            self.poller.add(worker.channel.as_fd(), Source::Worker(key).token(), Interest::Read)
        {
            log::error!("can't watch a worker: {error}");
            self.kill(key);
        }
    }

    fn accept_later(&mut self, when: Accepting) {
        self.accepting = when;
        let _ = self.poller.modify(self.listener.as_fd(), Source::Listener.token(), Interest::Nothing);
    }

    /// A handshake is over: there may be room for another.
    pub fn open_listener(&mut self) {
        if self.accepting == Accepting::Full {
            self.accepting = Accepting::Yes;
            let _ = self.poller.modify(self.listener.as_fd(), Source::Listener.token(), Interest::Read);
        }
    }

    fn take_signals(&mut self) {
        let arrived = self.signals.take();
        if arrived.child {
            self.reap();
        }
        if arrived.reload {
            self.reload("SIGHUP");
        }
        if arrived.stop {
            self.stop();
        }
    }

    fn reload(&mut self, why: &str) {
        match self.trust.reload() {
            Ok(()) => log::info!("{why}: certificates and revocation list are read again"),
            Err(failure) => {
                log::error!("{why}, but what was there before stays in force: {failure}");
                return;
            }
        }
        if let Err(failure) = self.spawner.prepare(&self.config, &self.trust, self.host.offloads.uso) {
            log::error!("{failure}");
        }
        let revoked: Vec<u64> = self
            .workers
            .iter()
            .filter(|(_, w)| w.session.as_ref().is_some_and(|s| self.trust.is_revoked(&s.cert)))
            .map(|(key, _)| key)
            .collect();
        for key in revoked {
            self.end_worker(key, Reason::Revoked);
        }
    }

    fn stop(&mut self) {
        if self.stopping.is_some() {
            return self.kill_all();
        }
        log::info!("stopping");
        self.stopping = Some(clock::now() + STOP_WAIT);
        self.accept_later(Accepting::No);
        let all: Vec<u64> = self.workers.iter().map(|(key, _)| key).collect();
        for key in all {
            self.end_worker(key, Reason::Shutdown);
        }
    }

    fn finished(&self, now: Time) -> bool {
        self.stopping.is_some_and(|until| self.workers.len() == 0 || now >= until)
    }

    /// Collects workers that have ended, and gives back what they held.
    fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => {
                    self.worker_gone(pid, &format!("exit code {code}"), code == 0)
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    self.worker_gone(pid, &format!("signal {}", signal.as_str()), false);
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    log::error!("can't wait for workers: {errno}");
                    return;
                }
            }
        }
    }

    fn worker_gone(&mut self, pid: Pid, how: &str, well: bool) {
        // Its last words may still be in the channel.
        if let Some(key) = self.workers.key_of(pid.as_raw()) {
            self.hear_last_words(key);
        }
        let Some((key, worker)) = self.workers.remove_pid(pid.as_raw()) else { return };
        match (worker.explained, well) {
            (true, _) => log::debug!("worker {pid} of {} is gone: {how}", worker.label()),
            (false, _) => log::error!("worker {pid} of {} died: {how}", worker.label()),
        }
        let _ = self.poller.remove(worker.channel.as_fd());
        self.spawner.release(worker.uid);
        if let Some(session) = worker.session {
            for net in session.nets() {
                self.routes.remove(net, key);
            }
            // Left where it died between creating and registering them.
            for name in std::iter::once(&session.queues.0).chain(&session.queues.1) {
                let _ = unlink(name);
            }
            self.leases.release(&session.name);
            self.slots.release(session.id);
        }
        self.open_listener();
    }

    /// Kills a worker; its end is then seen like any other.
    pub fn kill(&mut self, key: u64) {
        if let Some(worker) = self.workers.get_mut(key) {
            worker.kill_at = None;
            let _ = kill(Pid::from_raw(worker.pid), Signal::SIGKILL);
        }
    }

    fn kill_all(&mut self) {
        let all: Vec<u64> = self.workers.iter().map(|(key, _)| key).collect();
        for key in all {
            self.kill(key);
        }
    }

    fn end_all_workers(&mut self) {
        self.kill_all();
        while self.workers.len() > 0 {
            match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => {
                    self.worker_gone(pid, "the server stops", true);
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    fn next_deadline(&self) -> Option<Time> {
        let resume = match self.accepting {
            Accepting::Paused(until) => Some(until),
            _ => None,
        };
        let save = self.leases.is_dirty().then(|| self.leases_written + LEASES_EVERY);
        // Only while somebody is there: an idle server sleeps.
        let expiry = (self.workers.len() > 0).then(|| self.certificates_checked + CERTIFICATES_EVERY);
        [self.next_kill, expiry, resume, save, self.admin.deadline(), self.stopping]
            .into_iter()
            .flatten()
            .min()
    }

    fn do_what_is_due(&mut self, now: Time) {
        if self.next_kill.is_some_and(|at| now >= at) {
            self.kill_late(now);
        }
        if matches!(self.accepting, Accepting::Paused(until) if now >= until) {
            self.accepting = Accepting::Full;
            self.open_listener();
        }
        if self.leases.is_dirty() && now >= self.leases_written + LEASES_EVERY {
            self.leases_written = now;
            if let Err(failure) = self.leases.save() {
                log::error!("{failure}");
            }
        }
        if now.since(self.certificates_checked) >= CERTIFICATES_EVERY {
            self.certificates_checked = now;
            self.end_expired();
        }
        self.continue_conversations(now);
    }

    /// Ends sessions whose certificate is not valid any more.
    fn end_expired(&mut self) {
        let today = tls::time::wall_clock();
        let expired: Vec<u64> = self
            .workers
            .iter()
            .filter(|(_, w)| w.session.as_ref().is_some_and(|s| s.cert.not_after < today))
            .map(|(key, _)| key)
            .collect();
        for key in expired {
            self.end_worker(key, Reason::Expired);
        }
    }

    /// Kills workers whose time is over, and notes when to look again.
    fn kill_late(&mut self, now: Time) {
        for (_, worker) in self.workers.iter_mut().filter(|(_, w)| kill_time(w).is_some_and(|at| now >= at)) {
            log::warn!("worker {} of {} doesn't end in time: killed", worker.pid, worker.label());
            worker.explained = true;
            worker.phase = Phase::Over;
            worker.kill_at = None;
            let _ = kill(Pid::from_raw(worker.pid), Signal::SIGKILL);
        }
        self.next_kill = self.workers.iter().filter_map(|(_, w)| kill_time(w)).min();
    }

    /// A worker got a deadline: the earliest is kept, so that not all have to be looked through at each turn.
    pub fn note_deadline(&mut self, at: Time) {
        self.next_kill = Some(self.next_kill.map_or(at, |earliest| earliest.min(at)));
    }
}

/// When a worker is killed: when its goodbye takes too long, or its handshake far longer than its own deadline.
fn kill_time(worker: &Worker) -> Option<Time> {
    match worker.phase {
        Phase::Handshake | Phase::Granted => {
            Some(worker.started + Duration::from_secs(HANDSHAKE_SECONDS) + HANDSHAKE_GRACE)
        }
        Phase::Established => None,
        Phase::Ending | Phase::Over => worker.kill_at,
    }
}

const EVENTS: usize = 256;
/// How long one source may keep the others waiting.
const PACKETS_PER_TURN: usize = 128;
const MESSAGES_PER_TURN: usize = 16;
const CONNECTIONS_PER_TURN: usize = 4;
/// Sessions whose batches are filled at the same time.
const OPEN_BATCHES: usize = 16;
/// Pause after the system ran out of descriptors or processes.
const BREATHER: Duration = Duration::from_millis(200);
/// How often certificates' ends are looked at.
const CERTIFICATES_EVERY: Duration = Duration::from_secs(60);
const HANDSHAKE_GRACE: Duration = Duration::from_secs(3);
const STOP_WAIT: Duration = Duration::from_secs(3);
/// The lease file is written at most this often.
const LEASES_EVERY: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_name_their_source() {
        for source in [
            Source::Tun,
            Source::Listener,
            Source::Signal,
            Source::Admin,
            Source::Trust,
            Source::Worker(7),
            Source::Queue(0),
            Source::Uplink(1 << 40),
            Source::Conversation(3),
        ] {
            assert_eq!(Source::from_token(source.token()), Some(source));
        }
    }
}
