//! The life of a worker once it is locked in.
//!
//! 1. [`admit`]: TLS, identity, grant, queues, welcome
//! 2. `lock_in_further`: what only admission needed is given up
//! 3. [`Carrying`]: `guard_to_client` seals what comes out of the queue, `client_to_guard` opens what comes from
//!    the network, control messages and orders in between, until the session ends
//! 4. the client is told, and the guard learns why from the last word and the exit code

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::time::Duration;

use tunguard::batch::BatchReader;
use tunguard::channel::{Broken, ControlChannel};
use tunguard::drops::DropReason;
use tunguard::early::Early;
use tunguard::egress::{self, Egress};
use tunguard::exit::{Failure, Outcome};
use tunguard::ingress::Ingress;
use tunguard::inside::{self, WithInside};
use tunguard::ipc::{Cause, DRAIN_SECONDS, Reply, Report, Request, Setup, WorkerEnd};
use tunguard::keys::Role;
use tunguard::path::INSIDE;
use tunguard::paths::PathEvent;
use tunguard::rigged::point;
use tunguard::session::{Event, Session};
use tunguard::sys::clock;
use tunguard::sys::jail::{self, Layer};
use tunguard::sys::poller::{Interest, Poller};
use tunguard::sys::seccomp::{Filter, worker as seccomp};
use tunguard::sys::seqpacket::Incoming;
use tunguard::sys::udp::{Carrier, RECEIVE_BUFFERS, ReceiveBuffers, Received};
use tunguard::time::Time;
use tunguard::wire::control::{Message, Reason, Settings};
use tunguard::wire::vnet::VnetHeader;

use crate::admission::{Admitted, Connection, NoSession, TunExit, admit};
use crate::downlink::Downlink;
use crate::nursery::Prepared;

/// Serves one client from its accepted connection to the end of its session; the result is the last word to
/// the guard.
pub fn serve(prepared: &Prepared, connection: Connection) -> Result<Request, NoSession> {
    let guard = connection.guard;
    let admitted = admit(prepared, connection)?;
    let carrying = Carrying::new(&prepared.setup, guard, admitted)?;
    carrying.lock_in_further()?;
    #[cfg(feature = "rigged")]
    let carrying = carrying.turn();
    Ok(carrying.carry()?)
}

/// An established session with everything it moves packets between.
struct Carrying<'a> {
    guard: &'a WorkerEnd,
    session: Session,
    /// `None` once it was lost.
    control: Option<ControlChannel>,
    control_interest: Interest,
    data: Data,
    poller: Poller,
    egress: Egress,
    ingress: Ingress,
    uso: bool,
    /// The client comes and goes by itself, as its tunnel is used.
    on_demand: bool,
    /// Packets that came with the client's Hello.
    early: Early,
    /// A newer session of the client took over: until when this one still takes in what is on its way.
    drain_until: Option<Time>,
    /// The guard asked whether the client is there: since when nothing was heard that says so.
    asked: Option<Time>,
    ended: Option<Reason>,
}

/// The data path's ends and buffers.
struct Data {
    net: WithInside<Carrier>,
    downlink: Downlink,
    exit: TunExit,
    name: String,
    buffers: ReceiveBuffers,
    received: Vec<Received>,
}

impl<'a> Carrying<'a> {
    fn new(setup: &Setup, guard: &'a WorkerEnd, mut admitted: Admitted) -> Outcome<Carrying<'a>> {
        let poller = Poller::new(EVENTS).map_err(|e| Failure::system("make an epoll set", e))?;
        let add = |fd: std::os::fd::BorrowedFd<'_>, token, interest| {
            poller.add(fd, token, interest).map_err(|e| Failure::system("fill the epoll set", e))
        };
        add(guard.as_fd(), GUARD, Interest::Read)?;
        add(admitted.control.as_fd(), CONTROL, admitted.control.interest())?;
        add(admitted.carrier.as_fd(), UDP, Interest::Read)?;
        add(admitted.downlink.as_fd(), DOWNLINK, Interest::Read)?;
        admitted.session.set_mtu(setup.mtu);
        if admitted.on_demand {
            admitted.session.set_idle(setup.settings.idle_limit().map(patience));
        }
        Ok(Carrying {
            guard,
            session: admitted.session,
            control_interest: admitted.control.interest(),
            control: Some(admitted.control),
            data: Data {
                net: WithInside::new(admitted.carrier),
                downlink: admitted.downlink,
                exit: admitted.exit,
                name: admitted.name,
                buffers: ReceiveBuffers::default(),
                received: Vec::with_capacity(RECEIVE_BUFFERS),
            },
            poller,
            egress: Egress::default(),
            ingress: Ingress::limited(admitted.rate_up, clock::now()),
            uso: setup.uso,
            on_demand: admitted.on_demand,
            early: Early::default(),
            drain_until: None,
            asked: None,
            ended: None,
        })
    }

    /// The last of the worker's loss of privilege: from here on everything it holds is good for one thing.
    fn lock_in_further(&self) -> Outcome<()> {
        // The system calls of a session, each on the descriptors it is for. Nothing is left to ask the kernel with whether
        // it is in force: installing it has to succeed, or the worker ends.
        let Some(control) = &self.control else {
            return Err(Failure::system("lock in", "the control connection is gone"));
        };
        let held = seccomp::Carrying {
            guard: self.guard.as_fd(),
            tcp: control.as_fd(),
            udp: self.data.net.udp.as_fd(),
            downlink: self.data.downlink.as_fd(),
            exit: match &self.data.exit {
                TunExit::Device(tun) => seccomp::Exit::Device(tun.as_fd()),
                TunExit::Guard(uplink) => seccomp::Exit::Queue(uplink.as_fd()),
            },
            epoll: self.poller.as_fd(),
        };
        jail::put_on(Layer::CarryingFilter, || Filter::compile(&seccomp::carrying(held))?.install())
    }

    /// The worker comes under foreign control, where a test orders it.
    #[cfg(feature = "rigged")]
    fn turn(mut self) -> Carrying<'a> {
        use crate::red_team::{Carried, Stage, perform};
        if let Some(control) = &self.control {
            let carried = Carried {
                udp: self.data.net.udp.as_fd(),
                queue: self.data.downlink.as_fd(),
                epoll: self.poller.as_fd(),
                exit: &mut self.data.exit,
            };
            perform(Stage::carrying(self.guard, control.as_fd(), carried));
        }
        self
    }

    fn carry(mut self) -> Outcome<Request> {
        while self.ended.is_none() {
            // Messages that were read from the socket with earlier ones make no event of their own.
            let more = self.control.as_ref().is_some_and(|c| c.has_message());
            let timeout = match more {
                true => Some(Duration::ZERO),
                false => {
                    let due = self.session.poll_timeout().into_iter().chain(self.drain_until).min();
                    due.map(|at| at.since(clock::now()))
                }
            };
            let ready: Vec<_> =
                self.poller.wait(timeout).map_err(|e| Failure::system("wait for events", e))?.collect();
            for event in ready {
                match event.token {
                    DOWNLINK => self.guard_to_client()?,
                    UDP => self.client_to_guard()?,
                    CONTROL => self.talk_to_client(),
                    GUARD => self.obey_guard()?,
                    _ => {}
                }
            }
            if more {
                self.talk_to_client();
            }
            let now = clock::now();
            if self.session.poll_timeout().is_some_and(|at| at <= now) || self.session.rekey_due(now) {
                self.session.handle_timeout(now);
            }
            self.drain_session();
            if self.asked.take_if(|asked| self.session.last_heard() > *asked).is_some() {
                let _ = self.guard.send(&Request::Heard, &[]);
            }
            if self.drain_until.is_some_and(|until| until <= now) {
                self.ended.get_or_insert(Reason::Replaced);
            }
        }
        Ok(self.end())
    }

    /// Queue to network: each message's packets, sealed and sent in runs.
    fn guard_to_client(&mut self) -> Outcome<()> {
        let data = &mut self.data;
        for _ in 0..MESSAGES_PER_TURN {
            let Some(batch) = data.downlink.take()? else { break };
            let now = clock::now();
            for record in BatchReader::new(batch) {
                match record {
                    Ok((vnet, packet)) => {
                        self.egress.push(&mut self.session, &data.net, now, vnet, packet);
                    }
                    Err(_) => Egress::refuse(&mut self.session),
                }
            }
            self.egress.flush(&mut self.session, &data.net);
        }
        self.tell_senders();
        Ok(())
    }

    /// News for those behind the device whose packets are too large. The next such packet brings the next one, so
    /// that a loss needn't be counted.
    fn tell_senders(&mut self) {
        while let Some(packet) = self.egress.poll_told() {
            let vnet = VnetHeader::default().emit();
            match &mut self.data.exit {
                TunExit::Device(tun) => {
                    let _ = tun.write(&[IoSlice::new(&vnet), IoSlice::new(&packet)]);
                }
                TunExit::Guard(uplink) => {
                    let parts = [IoSlice::new(&vnet), IoSlice::new(&[]), IoSlice::new(&packet)];
                    let _ = uplink.worker_to_guard(&parts);
                    uplink.flush();
                }
            }
        }
    }

    /// Network to device, or to the guard that writes to it.
    fn client_to_guard(&mut self) -> Outcome<()> {
        for _ in 0..RECEIVES_PER_TURN {
            let data = &mut self.data;
            let received = data.net.udp.receive(&mut data.buffers, &mut data.received);
            received.map_err(|e| Failure::system("read the UDP slot", e))?;
            if data.received.is_empty() {
                break;
            }
            let now = clock::now();
            point("worker.first-datagram");
            for run in &data.received {
                let buffer = &mut data.buffers[run.buffer];
                self.ingress.open(&mut self.session, Role::Server, now, run, buffer);
            }
            // The guard is to know where the client is before answers to its packets come.
            self.note_events();
            self.worker_to_tun();
        }
        Ok(())
    }

    /// Inside the control connection to device, or to the guard that writes to it.
    fn inside_to_guard(&mut self, datagram: &[u8]) {
        let Some(peer) = self.control.as_ref().and_then(ControlChannel::peer) else { return };
        let run = inside::receive(peer, datagram, &mut self.data.buffers);
        self.session.came_inside();
        let buffer = &mut self.data.buffers[run.buffer];
        self.ingress.open(&mut self.session, Role::Server, clock::now(), &run, buffer);
        self.worker_to_tun();
    }

    /// A packet that came with the client's Hello, to device or guard. What answers it needn't wait until the client is
    /// heard by UDP.
    fn early_to_guard(&mut self, packet: &[u8]) {
        let Some(peer) = self.control.as_ref().and_then(ControlChannel::peer) else { return };
        let now = clock::now();
        self.session.heard_early(now, inside::path(peer));
        let len = inside::receive_early(packet, &mut self.data.buffers);
        self.ingress.take_early(&mut self.session, now, len, &mut self.data.buffers);
        self.note_events();
        self.worker_to_tun();
    }

    fn worker_to_tun(&mut self) {
        let Carrying { session, ingress, data, uso, .. } = self;
        match &mut data.exit {
            TunExit::Device(tun) => ingress.write_out(session, &data.buffers, *uso, |parts| {
                tun.write(parts).map_err(|_| DropReason::TunRefused)
            }),
            TunExit::Guard(uplink) => {
                ingress.write_out(session, &data.buffers, *uso, |parts| uplink.worker_to_guard(parts));
                let lost = uplink.flush();
                session.take_back(lost.packets, lost.bytes);
                session.drops.add(DropReason::UplinkFull, lost.packets);
            }
        }
    }

    fn talk_to_client(&mut self) {
        let now = clock::now();
        for _ in 0..CONTROL_PER_TURN {
            let Some(control) = &mut self.control else { return };
            match control.receive() {
                Ok(Some(Message::Early(packet))) => match self.early.take(packet.len()) {
                    Ok(()) => self.early_to_guard(&packet),
                    Err(fault) => {
                        log::warn!("{}: {fault}", self.data.name);
                        return self.finish(Reason::Protocol);
                    }
                },
                Ok(Some(Message::Datagram(datagram))) => {
                    self.early.close();
                    self.inside_to_guard(&datagram);
                }
                // The session has said its own goodbye, and doesn't listen to another.
                Ok(Some(Message::Bye(reason))) if self.drain_until.is_some() => {
                    self.ended.get_or_insert(reason);
                    return;
                }
                Ok(Some(message)) => {
                    self.early.close();
                    if let Err(reason) = self.session.handle_message(now, message) {
                        log::warn!("{}: a message out of place", self.data.name);
                        return self.finish(reason);
                    }
                }
                Ok(None) => break,
                Err(broken) => return self.control_broken(broken),
            }
        }
        self.flush_control();
    }

    fn flush_control(&mut self) {
        let Some(control) = &mut self.control else { return };
        if let Err(broken) = control.flush().and_then(|()| self.data.net.flush(control)) {
            return self.control_broken(broken);
        }
        let interest = control.interest();
        if interest != self.control_interest && self.poller.modify(control.as_fd(), CONTROL, interest).is_ok()
        {
            self.control_interest = interest;
        }
    }

    fn control_broken(&mut self, broken: Broken) {
        if let Some(mut control) = self.control.take() {
            let _ = self.poller.remove(control.as_fd());
            if matches!(broken, Broken::Refused(_)) {
                let _ = control.send(&Message::Bye(Reason::Protocol));
                control.close();
            }
        }
        match broken {
            Broken::Refused(failure) => {
                log::warn!("{}: {}", self.data.name, failure.text);
                self.finish(Reason::Protocol);
            }
            // Only a Bye ends a session; without one the client may be on its way to another address.
            Broken::Lost(text) => {
                log::info!("{}: control connection lost: {text}", self.data.name);
                self.lose_control();
            }
            Broken::Closed => self.lose_control(),
        }
    }

    fn lose_control(&mut self) {
        self.session.handle_control_lost(clock::now());
        self.session.left_inside(self.data.net.clear());
        let _ = self.guard.send(&Request::ControlLost, &[]);
    }

    fn obey_guard(&mut self) -> Outcome<()> {
        loop {
            match self.guard.receive(false) {
                Ok(Incoming::Message(Reply::Query, _)) => {
                    let _ = self.guard.send(&Request::Report(Box::new(self.report())), &[]);
                }
                Ok(Incoming::Message(Reply::Ask, _)) => self.ask_client(),
                Ok(Incoming::Message(Reply::Update(settings), _)) => self.update(settings),
                Ok(Incoming::Message(Reply::Drain, _)) => self.drain(),
                Ok(Incoming::Message(Reply::End(reason), _)) => {
                    self.finish(reason);
                    return Ok(());
                }
                Ok(Incoming::Message(other, _)) => {
                    return Err(Failure::new(
                        tunguard::exit::Exit::Malformed,
                        format!("the guard's order is out of place: {other:?}"),
                    ));
                }
                Ok(Incoming::Nothing) => return Ok(()),
                Ok(Incoming::Closed) => return Err(Failure::system("listen to the guard", "it is gone")),
                Err(violation) => {
                    return Err(Failure::system("listen to the guard", violation));
                }
            }
        }
    }

    /// Sends what the session wants sent and notes what it has to say.
    fn drain_session(&mut self) {
        let now = clock::now();
        self.note_events();
        while let Some(say) = self.session.poll_in_band() {
            egress::say(&mut self.session, &self.data.net, now, &say);
        }
        while let Some(message) = self.session.poll_message() {
            let sent = self.control.as_mut().map_or(Ok(()), |control| control.send(&message));
            if let Err(broken) = sent {
                self.control_broken(broken);
            }
            if matches!(message, Message::Rekey { .. }) {
                point("worker.rekeying");
            }
        }
        self.flush_control();
    }

    fn note_events(&mut self) {
        while let Some(event) = self.session.poll_event() {
            self.note(event);
        }
    }

    fn note(&mut self, event: Event) {
        let name = &self.data.name;
        match event {
            Event::Path(PathEvent::Moved { old, new }) => {
                match old {
                    None if new.carrier == INSIDE => {
                        log::info!(
                            "{name}: packets came with its Hello, and are answered inside the connection"
                        )
                    }
                    None => log::info!("{name}: data channel up, client at {}", new.remote),
                    Some(_) if new.carrier == INSIDE => {
                        log::info!(
                            "{name}: UDP doesn't get through, packets go inside the control connection"
                        )
                    }
                    Some(old) => log::info!("{name}: moved from {} to {}", old.remote, new.remote),
                }
                let before = |old: tunguard::path::Path| {
                    self.session.paths().iter().find(|known| known.path.key() == old.key())
                };
                let silent = old.and_then(before).map(|known| clock::now().since(known.last_heard()));
                let after_ms = silent.map(|silent| silent.as_millis() as u64);
                let inside = new.carrier == INSIDE;
                let _ = self.guard.send(&Request::Moved { new: new.remote, after_ms, inside }, &[]);
            }
            Event::Path(PathEvent::Proven { rtt }) => log::debug!("{name}: round trip {rtt:?}"),
            Event::Path(PathEvent::Mtu { mtu }) => {
                log::debug!("{name}: the path carries packets of {mtu} bytes")
            }
            Event::Rekeyed { epoch } => {
                log::info!("{name}: new keys, epoch {epoch}");
                point("worker.rekeyed");
            }
            // The client's.
            Event::Path(PathEvent::Suspect)
            | Event::Path(PathEvent::Seen { .. })
            | Event::Path(PathEvent::Translated { .. }) => {}
            Event::Path(PathEvent::Unreachable) => log::debug!("{name}: no answer on the path"),
            // A server takes no settings from a client: Session refuses them.
            Event::Settings(_) | Event::Notice(_) => {}
            Event::Ended { reason, .. } => self.ended = Some(reason),
        }
    }

    /// Is the client there?
    fn ask_client(&mut self) {
        let now = clock::now();
        self.asked.get_or_insert(now);
        self.session.ask(now);
    }

    /// What is pushed has changed. A client whose control connection is lost learns of it by its next session.
    fn update(&mut self, settings: Settings) {
        if self.on_demand {
            self.session.set_idle(settings.idle_limit().map(patience));
        }
        let sent = self.control.as_mut().map_or(Ok(()), |control| control.send(&Message::Update(settings)));
        if let Err(broken) = sent {
            self.control_broken(broken);
        }
    }

    /// The client has a newer session. Its packets are on their way from both ends in this one.
    fn drain(&mut self) {
        log::debug!("{}: a newer session took over", self.data.name);
        // Whoever still listens here is not the one who made the newer session.
        self.session.leave(Reason::Replaced);
        self.drain_until.get_or_insert(clock::now() + Duration::from_secs(DRAIN_SECONDS));
        point("worker.draining");
    }

    fn finish(&mut self, reason: Reason) {
        self.session.leave(reason);
        self.ended.get_or_insert(reason);
    }

    /// Tells the client, if it didn't tell us, and sums up.
    fn end(mut self) -> Request {
        self.drain_session();
        point("worker.ending");
        if let Some(control) = self.control.take() {
            control.close();
        }
        log::info!("{}: {}; dropped: {}", self.data.name, self.session.traffic(), self.session.drops);
        let reason = self.ended.unwrap_or(Reason::Internal);
        Request::Ended { reason: Some(reason), cause: Cause::Left, text: reason.to_string() }
    }

    fn report(&self) -> Report {
        let now = clock::now();
        let active = self.session.path();
        Report {
            traffic: self.session.traffic(),
            drops: self.session.drops,
            epoch: self.session.epoch(),
            suite: Some(self.session.suite()),
            peer: active.map(|a| a.path.remote),
            rtt_us: active.and_then(|a| a.rtt).map(|rtt| rtt.as_micros() as u64),
            path_mtu: self.session.mtu(),
            silent_ms: now.since(self.session.last_heard()).as_millis() as u64,
        }
    }
}

/// A client with a limit goes first.
fn patience(limit: Duration) -> Duration {
    limit + limit / 10
}

const GUARD: u64 = 0;
const CONTROL: u64 = 1;
const UDP: u64 = 2;
const DOWNLINK: u64 = 3;
const EVENTS: usize = 8;

// How long one source may keep the others waiting.
const MESSAGES_PER_TURN: usize = 16;
const RECEIVES_PER_TURN: usize = 16;
const CONTROL_PER_TURN: usize = 32;
