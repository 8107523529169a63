//! The guard's life.
//!
//! 1. `tun_to_worker`: reads the device until it is empty, sorts packets by inner destination into batches, one
//!    per session, and posts each batch to its session's queue
//! 2. `worker_to_tun`: with `tun_write = "guard"`, takes workers' packets, checks their source, writes them
//! 3. connections are let in ([`crate::entrance`]) and become workers, workers' ends are cleaned up ([`crate::lives`]),
//!    workers' requests are answered ([`crate::grants`]); the configuration is read again ([`crate::reload`])
//! 4. on SIGINT or SIGTERM every session gets a goodbye, and the host is put back as it was

use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::Duration;

use tunguard::admin::Admin;
use tunguard::batch::{BatchReader, BatchWriter};
use tunguard::config::server::ServerConfig;
use tunguard::exit::{Failure, Outcome};
use tunguard::rigged;
use tunguard::segment::{addresses, unreachable};
use tunguard::sys::clock;
use tunguard::sys::poller::{Interest, Poller, Ready};
use tunguard::sys::signals::Signals;
use tunguard::sys::tun::Tun;
use tunguard::time::Time;
use tunguard::wire::control::Reason;
use tunguard::wire::vnet::{VNET_LEN, VnetHeader};

use crate::accounts::{Accounts, GuardDrop};
use crate::away::{self, News};
use crate::clients::{Budget, Session, Workers};
use crate::entrance::{Accepting, Tries, Waiting};
use crate::events::Events;
use crate::gate::{Gate, Limits};
use crate::host::{Host, Queues};
use crate::leases::Leases;
use crate::meters::Meters;
use crate::notify;
use crate::outbox::{FULL_AT, Outbox, Pool, Posted, Resumed, Valve};
use crate::reload::Reloads;
use crate::routes::Routes;
use crate::slots::Slots;
use crate::spawn::Spawner;
use crate::succession;
use crate::tickets::Tickets;
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
    pub(crate) queues: Queues,
    pub(crate) leases: Leases,
    pub(crate) admin: Admin,
    pub(crate) poller: Poller,
    pub(crate) workers: Workers,
    pub(crate) routes: Routes,
    pub(crate) accounts: Accounts,
    news: News,
    pub(crate) started: Time,
    signals: Signals,
    /// The batches of one turn: each session's packets together, a bounded number of sessions at once.
    open: Vec<(u64, BatchWriter)>,
    pool: Pool,
    uplink: Vec<u8>,
    /// New connections are accepted; otherwise from then on again.
    pub(crate) accepting: Accepting,
    /// Limits who is let in.
    pub(crate) gate: Gate,
    /// Accepted, without a worker yet.
    pub(crate) waiting: Waiting,
    /// To start workers.
    pub(crate) starts: Tries,
    leases_written: Time,
    pub(crate) next_kill: Option<Time>,
    /// When a session has waited long enough for its client's first datagram.
    pub(crate) next_switch: Option<Time>,
    /// Log lines about connections that came to nothing.
    pub(crate) strangers: Budget,
    certificates_checked: Time,
    /// What clients with a limit may send and be sent.
    pub(crate) meters: Meters,
    /// What happened lately.
    pub(crate) events: Events,
    /// TLS sessions to be taken up again.
    pub(crate) tickets: Tickets,
    /// Since when the present certificates and lists decide whom to trust.
    pub(crate) trusted_since: Time,
    /// Since when clients are pushed what they are.
    pub(crate) pushed_since: Time,
    /// `max_clients` when slots and queues were made.
    pub(crate) room_for: u16,
    /// New configurations, and new lists.
    pub(crate) reloads: Reloads,
    stopping: Option<Time>,
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
    /// The key holder, about misuse.
    KeyHolder,
    /// A process that starts.
    Starting,
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
            Source::KeyHolder => 9,
            Source::Starting => 10,
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
            9 => Source::KeyHolder,
            10 => Source::Starting,
            _ => return None,
        })
    }
}

impl Guard {
    /// Puts the parts together and starts to listen to all of them.
    #[expect(clippy::too_many_arguments, reason = "the parts of the start-up function, once each")]
    pub fn new(
        config: ServerConfig,
        mut trust: Trust,
        mut spawner: Spawner,
        listener: TcpListener,
        slots: Slots,
        host: Host,
        queues: Queues,
        leases: Leases,
        admin: Admin,
    ) -> Outcome<Guard> {
        let failed = |e| Failure::system("prepare to wait for events", e);
        let signals = Signals::install().map_err(failed)?;
        spawner.prepare(&config, &trust.certificates, host.offloads.uso)?;
        spawner.wait_for_nursery(&mut trust.holder)?;
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
        poller.add(trust.holder.misuse_fd(), Source::KeyHolder.token(), Interest::Read).map_err(failed)?;
        let listen = listener.local_addr().map_err(failed)?;
        let now = clock::now();
        let tickets = Tickets::new(config.max_clients.into(), config.max_sessions_per_identity.into());
        Ok(Guard {
            open: Vec::new(),
            pool: Pool::default(),
            uplink: vec![0; queues.uplink.map_or(0, |size| size.bytes)],
            gate: Gate::new(Limits::of(&config, queues.shared())),
            waiting: Waiting::new(),
            starts: Tries::default(),
            room_for: config.max_clients,
            config,
            trust,
            spawner,
            listener,
            listen,
            slots,
            host,
            queues,
            leases,
            admin,
            poller,
            workers: Workers::default(),
            routes: Routes::default(),
            accounts: Accounts::default(),
            news: News::new(now),
            started: now,
            signals,
            accepting: Accepting::Yes,
            leases_written: now,
            next_kill: None,
            next_switch: None,
            strangers: Budget::of_log_lines(now),
            certificates_checked: now,
            meters: Meters::default(),
            events: Events::default(),
            tickets,
            trusted_since: now,
            pushed_since: now,
            reloads: Reloads::default(),
            stopping: None,
        })
    }

    /// Serves until a signal says stop.
    pub fn run(mut self) -> Outcome<()> {
        log::info!("tunguard {} is ready, pid {}", tunguard::VERSION, std::process::id());
        notify::ready();
        let result = self.serve();
        // Whatever it ended by: nobody new comes in.
        self.accept_later(Accepting::No);
        self.end_all_workers();
        // What starts may hang before it is bound to our life.
        self.spawner.abandon();
        self.trust.holder.abandon();
        rigged::point("guard.workers-gone");
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
                    Some(Source::Trust) => self.reload_list(),
                    Some(Source::KeyHolder) => self.punish_misuse(),
                    Some(Source::Starting) => self.see_to_starts(clock::now()),
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
            // Always: a batch has room for the largest record up to FULL_AT bytes.
            reading.commit(len);
            if reading.message().len() >= FULL_AT {
                self.post(key, &mut reading);
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

    /// Which worker a packet behind its virtio header goes to; what goes nowhere is counted, and its sender told.
    fn route(&mut self, read: &[u8]) -> Option<u64> {
        let Some((source, destination)) = read.get(VNET_LEN..).and_then(addresses) else {
            self.accounts.drop(GuardDrop::BadInner);
            return None;
        };
        let key = self.routes.lookup(destination);
        if key.is_none() {
            let (reason, tell) = away::judge(&mut self.leases, destination);
            self.accounts.drop(reason);
            if tell && self.news.take(clock::now(), source) {
                self.tell(&read[VNET_LEN..], destination);
            }
        }
        key
    }

    /// Tells a packet's sender that nobody is there, by way of the device: the kernel knows the way back.
    fn tell(&mut self, packet: &[u8], destination: IpAddr) {
        let Some(message) = unreachable(packet, destination) else { return };
        let vnet = VnetHeader::default().emit();
        if self.host.tun.write(&[IoSlice::new(&vnet), IoSlice::new(&message)]).is_ok() {
            self.accounts.told += 1;
        }
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

    /// Sends a batch to its session's queue and empties it.
    fn post(&mut self, key: u64, batch: &mut BatchWriter) {
        if !batch.is_empty() {
            let packets = BatchReader::new(batch.message()).count() as u64;
            let session = self.workers.get_mut(key).and_then(|w| w.session.as_mut());
            let Some(Session { outbox: Some(outbox), rates, name, queued_packets, over_rate, .. }) = session
            else {
                self.accounts.drop_many(GuardDrop::QueueFull, packets);
                return batch.clear();
            };
            let valve = match rates.down {
                Some(_) => self.meters.valve(name, key),
                None => Valve::Open,
            };
            match outbox.post(clock::now(), batch.message(), valve) {
                Ok(posted @ (Posted::Sent | Posted::Waiting | Posted::Held)) => {
                    self.accounts.queued_packets += packets;
                    *queued_packets += packets;
                    match posted {
                        Posted::Held => self.meters.hold(name, key),
                        Posted::Waiting => self.watch_queue(key, Interest::Write),
                        _ => {}
                    }
                }
                Ok(Posted::Late | Posted::Full) if outbox.is_held() => {
                    self.accounts.drop_many(GuardDrop::RateDown, packets);
                    over_rate.down += packets;
                }
                Ok(Posted::Late) => self.accounts.drop_many(GuardDrop::Codel, packets),
                // Full, or a queue that broke: its worker's end is seen elsewhere.
                Ok(Posted::Full) | Err(_) => self.accounts.drop_many(GuardDrop::QueueFull, packets),
            }
        }
        batch.clear();
    }

    /// A session's queue has room again.
    fn resume_queue(&mut self, key: u64) {
        self.resume(key, false);
    }

    /// Those held back go on whose limit allows it by now.
    fn release(&mut self, now: Time) {
        while let Some(key) = self.meters.poll_release(now) {
            self.resume(key, true);
        }
    }

    /// Hands on what waits for a session, whose turn it may be.
    fn resume(&mut self, key: u64, turn: bool) {
        let Some(session) = self.workers.get_mut(key).and_then(|w| w.session.as_mut()) else { return };
        let Session { outbox: Some(outbox), rates, name, .. } = session else { return };
        let valve = match rates.down {
            Some(_) if turn => self.meters.turn(name),
            Some(_) => self.meters.valve(name, key),
            None => Valve::Open,
        };
        let resumed = outbox.resume(clock::now(), valve);
        if matches!(resumed, Ok(Resumed::Held)) {
            self.meters.hold(name, key);
        }
        // Whose turn it was isn't watched yet, and whose queue had room is.
        match (resumed, turn) {
            (Ok(Resumed::Full), true) => self.watch_queue(key, Interest::Write),
            (Ok(Resumed::Full), false) | (_, true) => {}
            (_, false) => self.watch_queue(key, Interest::Nothing),
        }
    }

    fn watch_queue(&mut self, key: u64, interest: Interest) {
        if let Some(outbox) = self.workers.outbox(key) {
            let _ = self.poller.modify(outbox.queue().as_fd(), Source::Queue(key).token(), interest);
        }
    }

    /// Workers' packets to the device, each only from an address of its session, and no more than its client may send.
    fn worker_to_tun(&mut self, key: u64) {
        for _ in 0..MESSAGES_PER_TURN {
            let session = self.workers.get_mut(key).and_then(|w| w.session.as_mut());
            let Some(session) = session else { return };
            let Some(Ok(Some(len))) = session.uplink.as_mut().map(|up| up.receive(&mut self.uplink)) else {
                return;
            };
            let limited = session.rates.up.map(|_| (session.name.clone(), clock::now()));
            for record in BatchReader::new(&self.uplink[..len]) {
                let packet =
                    record.ok().and_then(|(vnet, p)| addresses(p).map(|(source, _)| (vnet, p, source)));
                let Some((vnet, packet, source)) = packet else {
                    self.accounts.drop(GuardDrop::BadRecord);
                    continue;
                };
                if !succession::may_send_from(&self.workers, &mut self.routes, key, source) {
                    self.accounts.drop(GuardDrop::SourceNotOurs);
                    continue;
                }
                if let Some((name, now)) = &limited
                    && !self.meters.pass_up(name, *now, packet.len())
                {
                    self.accounts.drop(GuardDrop::RateUp);
                    if let Some(session) = self.workers.get_mut(key).and_then(|w| w.session.as_mut()) {
                        session.over_rate.up += 1;
                    }
                    continue;
                }
                let header = vnet.emit();
                if self.host.tun.write(&[IoSlice::new(&header), IoSlice::new(packet)]).is_err() {
                    self.accounts.drop(GuardDrop::TunRefused);
                }
            }
        }
    }

    fn take_signals(&mut self) {
        let arrived = self.signals.take();
        if arrived.child {
            self.reap();
        }
        if arrived.reload {
            self.reload_by_signal();
        }
        if arrived.stop {
            self.stop();
        }
    }

    fn stop(&mut self) {
        if self.stopping.is_some() {
            return self.kill_all();
        }
        log::info!("stopping");
        rigged::read_orders();
        self.stopping = Some(clock::now() + STOP_WAIT);
        self.accept_later(Accepting::No);
        self.stop_reloading();
        let all: Vec<u64> = self.workers.iter().map(|(key, _)| key).collect();
        for key in all {
            self.end_worker(key, Reason::Shutdown);
        }
        notify::stopping();
        rigged::point("guard.stopping");
    }

    fn finished(&self, now: Time) -> bool {
        self.stopping.is_some_and(|until| self.workers.len() == 0 || now >= until)
    }

    fn next_deadline(&self) -> Option<Time> {
        let resume = match self.accepting {
            Accepting::Paused(until) => Some(until),
            _ => None,
        };
        let save = self.leases.is_dirty().then(|| self.leases_written + self.leases.rest());
        // Only while somebody is there: an idle server sleeps.
        let expiry = (self.workers.len() > 0 || !self.tickets.is_empty())
            .then(|| self.certificates_checked + CERTIFICATES_EVERY);
        [
            self.next_kill,
            self.next_switch,
            self.meters.poll_timeout(),
            self.gate.poll_timeout(),
            self.next_start(),
            expiry,
            resume,
            save,
            self.admin.deadline(),
            self.stopping,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn do_what_is_due(&mut self, now: Time) {
        if self.next_kill.is_some_and(|at| now >= at) {
            self.kill_late(now);
        }
        self.release(now);
        if self.next_switch.is_some_and(|at| now >= at) {
            self.switch_late(now);
        }
        if self.next_start().is_some_and(|at| now >= at) {
            self.trust.holder.handle_timeout(now, &self.poller);
            self.see_to_starts(now);
        }
        if matches!(self.accepting, Accepting::Paused(until) if now >= until) {
            self.open_listener();
        }
        if self.gate.poll_timeout().is_some_and(|at| now >= at) {
            self.close_waiting();
        }
        if self.leases.is_dirty() && now >= self.leases_written + self.leases.rest() {
            self.leases_written = now;
            if let Err(failure) = self.leases.save() {
                log::error!("{failure}");
            }
        }
        if now.since(self.certificates_checked) >= CERTIFICATES_EVERY {
            self.certificates_checked = now;
            self.tickets.handle_timeout(now);
            self.end_expired();
            self.workers.outboxes().for_each(Outbox::rest);
            self.meters.handle_timeout(now);
        }
        self.continue_conversations(now);
    }
}

const EVENTS: usize = 256;
/// How long one source may keep the others waiting.
const PACKETS_PER_TURN: usize = 128;
const MESSAGES_PER_TURN: usize = 16;
/// Sessions whose batches are filled at the same time.
const OPEN_BATCHES: usize = 16;
/// How often certificates' ends are looked at.
const CERTIFICATES_EVERY: Duration = Duration::from_secs(60);
const STOP_WAIT: Duration = Duration::from_secs(3);

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
            Source::KeyHolder,
            Source::Starting,
        ] {
            assert_eq!(Source::from_token(source.token()), Some(source));
        }
    }
}
