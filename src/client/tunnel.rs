//! The tunnel process: its loss of privilege, then its life.
//!
//! ```text
//!   waiting --retry_at--> dialling --> connecting --> configuring --> established
//!      ^                     |             |               |              |
//!      +---------------------+-------------+---------------+--- lost -----+
//! ```
//! The session before stays and carries packets until the next one is established (make before break), and receives
//! what is still on its way a little longer. Packets
//! that come before there is any session wait in the device's queue.

mod demand;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::prctl;
use openssl::ssl::SslContext;

use super::attempts::{Attempts, Failed, Next};
use super::carry::{Buffers, Link, Tokens, Word};
use super::connect::{Connecting, Wanted, take_over, without_sockets};
use super::ipc::{CarrierName, Progress, Reply, Report, Request, Setup, Ticket, TunnelEnd, Wishes, pack};
use super::nats::Nats;
use super::settings::{Configuring, Purpose};
use super::{role, tunnel_log};
use crate::exit::{Exit, Failure, Outcome};
use crate::rigged::point;
use crate::sys::jail;
use crate::sys::poller::{Interest, Poller};
use crate::sys::seccomp::Filter;
use crate::sys::seccomp::tunnel::{Newborn, life};
use crate::sys::seqpacket::Incoming;
use crate::sys::tun::Tun;
use crate::sys::{clock, memfd, signals, spawn};
use crate::time::Time;
use crate::wire::control::Reason;
use crate::{VERSION, random, seal, tls};

/// The tunnel process: `client-tunnel VERSION`, descriptor 3 its channel to the supervisor, 4 the device, 5 a
/// sealed memory file with its [`Setup`].
pub fn main() -> ExitCode {
    let Ok([channel, tun, setup]) = spawn::inherited::<3>() else {
        eprintln!("tunguard: {} is started by tunguard client, not by hand", role::TUNNEL);
        return Exit::Usage.into();
    };
    let supervisor = tunnel_log::install(TunnelEnd::from_fd(channel));
    let held = Newborn { supervisor: supervisor.as_fd(), tun: tun.as_fd() };
    let over = match start(setup, held) {
        Ok(setup) => Tunnel::new(setup, supervisor, Tun::from_fd(tun))
            .map_err(Over::from)
            .and_then(Tunnel::run)
            .map_or_else(|over| over, |never| match never {}),
        Err(failure) => Over::ForGood(failure),
    };
    let (failure, permanent) = match over {
        Over::Told => (None, false),
        Over::Failed(failure) => (Some(failure), false),
        Over::ForGood(failure) => (Some(failure), true),
    };
    let code = failure.as_ref().map_or(ExitCode::SUCCESS, |f| f.exit.into());
    // If the supervisor doesn't read any more, it learns the rest from the exit code.
    let _ = supervisor.send(&Request::Ended { failure: failure.as_ref().map(pack), permanent }, &[]);
    code
}

/// The tunnel process's loss of privilege, in order. Nothing from the network is read before it is over.
fn start(setup: OwnedFd, held: Newborn<'_>) -> Outcome<Setup> {
    // 1. Only this version's supervisor starts us.
    let version = std::env::args().nth(2).unwrap_or_default();
    if version != VERSION {
        let text = format!("the tunnel process is version {VERSION}, its supervisor {version:?}");
        return Err(Failure::new(Exit::Version, text));
    }
    let _ = prctl::set_name(c"tunguard-tunnel");
    // 2. Ctrl-C reaches the whole terminal, and a service's stop its whole group: the supervisor hears it, and
    //    tells us to say goodbye.
    signals::block_stops()?;
    // 3. What we were told; the file is closed with this.
    let bytes = memfd::read(setup).map_err(|e| Failure::system("read the tunnel's setup", e))?;
    let setup = Setup::decode(&bytes)
        .ok_or_else(|| Failure::new(Exit::Malformed, "the tunnel's setup doesn't decode"))?;
    tunnel_log::set_level(setup.log_level);
    // 4. The cipher library works, or no traffic is touched.
    seal::self_test()?;
    // 5. The configured user, no capabilities, empty root, no dumps, bound to the supervisor's life.
    let jail = jail::Jail {
        uid: setup.uid,
        gid: setup.gid,
        root: &setup.root,
        descriptors: DESCRIPTORS,
        address_space: ADDRESS_SPACE,
        parent: setup.supervisor,
    };
    jail::enter(&jail)?;
    // 6. No files, ports or other processes.
    jail::give_up_the_rest(setup.landlock)?;
    // 7. The C library looks for the host's time zone at the first date it handles, once, and the next call wouldn't be
    //    allowed any more. (It finds none, and all our dates are in UTC.)
    tls::time::first_date();
    // 8. The system calls of the tunnel process.
    jail::filter_calls(|| Filter::compile(&life(held)))?;
    point("tunnel.locked-in");
    Ok(setup)
}

/// Why the process ends.
enum Over {
    /// The supervisor said so.
    Told,
    /// A new process may do better.
    Failed(Failure),
    /// It would not.
    ForGood(Failure),
}

impl From<Failure> for Over {
    fn from(failure: Failure) -> Over {
        Over::Failed(failure)
    }
}

type Turn<T> = Result<T, Over>;

struct Tunnel<'a> {
    setup: Setup,
    context: SslContext,
    supervisor: &'a TunnelEnd,
    tun: Tun,
    poller: Poller,
    buffers: Buffers,
    attempts: Attempts,
    /// The session that carries packets.
    link: Option<Link>,
    /// The session before it, which only receives, and until when.
    draining: Option<(Link, Time)>,
    attempt: Option<Attempt>,
    /// When the next attempt starts, if one is due.
    retry_at: Option<Time>,
    configuring: Configuring,
    /// What sessions learned of NATs.
    nats: Nats,
    /// Inner addresses to ask for.
    want: Vec<IpAddr>,
    /// We have asked for a session since the one in use was made: if it is replaced, then by our own.
    asked_since: bool,
    /// The server refuses to resume the session in use: the next one will be an ordinary one.
    resume_refused: bool,
    serial: u64,
    /// A TLS session to take up again.
    ticket: Option<Ticket>,
    /// Nobody needs the session any more: only what is on its way to us is waited for, until then.
    leaving: Option<Time>,
    /// Something has come by a session.
    answered: bool,
    /// Of the packets that are held, the first ones as they may be sent before there is a session.
    early: Vec<Vec<u8>>,
}

struct Attempt {
    serial: u64,
    deadline: Time,
    stage: Stage,
}

enum Stage {
    Dialling,
    Connecting(Box<Connecting>),
    Configuring(Box<Link>),
}

/// Nothing of this type exists: the loop ends only by an [`Over`].
enum Never {}

impl<'a> Tunnel<'a> {
    fn new(mut setup: Setup, supervisor: &'a TunnelEnd, tun: Tun) -> Outcome<Tunnel<'a>> {
        let context = tls::client_context(&setup.credentials)?;
        let poller = Poller::new(EVENTS).map_err(|e| Failure::system("make an epoll set", e))?;
        let full = |e| Failure::system("fill the epoll set", e);
        poller.add(supervisor, SUPERVISOR, Interest::Read).map_err(full)?;
        poller.add(&tun, TUN, Interest::Nothing).map_err(full)?;
        Ok(Tunnel {
            context,
            supervisor,
            tun,
            poller,
            buffers: Buffers::new(setup.uso),
            attempts: Attempts::new(setup.remotes.into(), setup.established, clock::now())
                .starting_at(setup.first_remote.into()),
            link: None,
            draining: None,
            attempt: None,
            retry_at: Some(clock::now()),
            configuring: Configuring::default(),
            nats: Nats::default(),
            want: setup.want.clone(),
            asked_since: false,
            resume_refused: false,
            serial: 0,
            ticket: setup.ticket.take(),
            leaving: None,
            answered: false,
            early: setup.on_demand.as_ref().map(|demand| demand::early(&demand.held)).unwrap_or_default(),
            setup,
        })
    }

    fn run(mut self) -> Turn<Never> {
        loop {
            let idle = self.link.is_none();
            let timeout = self.poll_timeout().map(|at| at.since(clock::now()));
            let waited = self.poller.wait(timeout);
            let ready: Vec<_> = waited.map_err(|e| Failure::system("wait for events", e))?.collect();
            for event in ready {
                match event.token {
                    SUPERVISOR => self.hear_supervisor()?,
                    // Only an error can be reported while nothing is waited for.
                    TUN if idle => return Err(self.device_gone("it was removed")),
                    TUN => self.tun_to_server()?,
                    token => self.hear_network(token)?,
                }
            }
            self.handle_timeout(clock::now())?;
            self.heed_link()?;
        }
    }

    fn poll_timeout(&self) -> Option<Time> {
        // A dial is the supervisor's to bound.
        let attempt = self.attempt.as_ref().filter(|a| !matches!(a.stage, Stage::Dialling));
        let link = self.link.as_ref().and_then(Link::poll_timeout);
        // Nobody asks for them any more while we leave.
        let settings = self.configuring.poll_timeout().filter(|_| self.leaving.is_none());
        let draining = self.draining.as_ref().map(|(_, until)| *until);
        let leaving = self.poll_leave();
        attempt
            .map(|a| a.deadline)
            .into_iter()
            .chain(link)
            .chain(self.retry_at)
            .chain(settings)
            .chain(draining)
            .chain(leaving)
            .min()
    }

    fn handle_timeout(&mut self, now: Time) -> Turn<()> {
        if let Some(link) = &mut self.link {
            link.handle_timeout(now, &self.poller);
        }
        if let Some((old, _)) = self.draining.take_if(|(_, until)| *until <= now) {
            old.end(&self.poller);
        }
        if self.retry_at.is_some_and(|at| at <= now) && self.attempt.is_none() {
            self.retry_at = None;
            self.dial(now)?;
        }
        let late = |a: &Attempt| {
            a.deadline <= now && matches!(a.stage, Stage::Connecting(_) | Stage::Configuring(_))
        };
        if self.attempt.as_ref().is_some_and(late) {
            let text = format!("no session within {} s", ATTEMPT_WITHIN.as_secs());
            self.attempt_failed(Failed::passing(Failure::new(Exit::Tls, text)), Reason::Timeout)?;
        }
        self.leave_if_idle(now)
    }

    fn tun_to_server(&mut self) -> Turn<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        link.tun_to_server(&self.tun, &mut self.buffers).map_err(|e| self.device_gone(&e.to_string()))
    }

    fn device_gone(&self, why: &str) -> Over {
        Over::ForGood(Failure::system(
            format!("the device {} can't be read any more", self.setup.device),
            why,
        ))
    }

    fn hear_network(&mut self, token: u64) -> Turn<()> {
        if let Some(link) = &mut self.link {
            let tokens = link.tokens();
            if token == tokens.udp {
                return Ok(link.server_to_tun(&self.tun, &mut self.buffers)?);
            }
            if token == tokens.control {
                link.talk_to_server(&self.poller);
                return Ok(());
            }
        }
        if let Some((old, _)) = self.draining.as_mut().filter(|(old, _)| token == old.tokens().udp) {
            old.server_to_tun(&self.tun, &mut self.buffers)?;
            // It answers challenges; what else it has to say is of no interest any more.
            old.drain(&self.poller);
            return Ok(());
        }
        match &self.attempt {
            Some(attempt) if token == tokens_of(attempt.serial).control => self.advance(),
            // Of a link or an attempt that ended in this very turn.
            _ => Ok(()),
        }
    }

    // The way to a session, step by step.

    fn dial(&mut self, now: Time) -> Turn<()> {
        self.serial += 1;
        self.attempt =
            Some(Attempt { serial: self.serial, deadline: now + ATTEMPT_WITHIN, stage: Stage::Dialling });
        self.ask(&Request::Dial { remote: self.attempts.remote() as u16 })?;
        point("tunnel.dialling");
        Ok(())
    }

    fn dialled(
        &mut self,
        remote: usize,
        place: (String, SocketAddr),
        (carriers, fds): (Vec<CarrierName>, Vec<OwnedFd>),
    ) -> Turn<()> {
        let Some(attempt) = self.attempt.as_mut().filter(|a| matches!(a.stage, Stage::Dialling)) else {
            return Err(out_of_place("Dialled"));
        };
        self.attempts.handle_connected(remote);
        // Looking for the address and the way took its time already.
        attempt.deadline = clock::now() + ATTEMPT_WITHIN;
        let token = tokens_of(attempt.serial).control;
        let ticket = self.ticket.take();
        let sockets = (carriers, fds);
        let made =
            Connecting::new(&self.setup, &self.context, place, sockets, ticket).and_then(|connecting| {
                self.poller
                    .add(&connecting, token, Interest::Both)
                    .map_err(|e| Failure::system("fill the epoll set", e))?;
                Ok(connecting)
            });
        match made {
            Ok(connecting) => attempt.stage = Stage::Connecting(Box::new(connecting)),
            Err(failure) => return self.attempt_failed(Failed::passing(failure), Reason::Internal),
        }
        self.advance()
    }

    fn advance(&mut self) -> Turn<()> {
        let Some(Attempt { serial, stage: Stage::Connecting(connecting), .. }) = &mut self.attempt else {
            return Ok(());
        };
        let token = tokens_of(*serial).control;
        let resume = self.link.as_ref().filter(|_| !self.resume_refused).map(Link::resumable);
        let (on_demand, early) = (self.setup.on_demand.is_some(), &self.early[..]);
        let wanted = Wanted { addresses: &self.want, resume, on_demand, early };
        let advanced = connecting.advance(&self.setup, wanted);
        self.asked_since |= connecting.greeted();
        self.resume_refused |= connecting.resume_refused();
        match advanced {
            Ok(None) => {
                point("tunnel.connecting");
                let _ = self.poller.modify(&**connecting, token, connecting.interest());
                Ok(())
            }
            Ok(Some(welcome)) => self.welcomed(welcome),
            Err(failed) => self.attempt_failed(failed, Reason::Protocol),
        }
    }

    fn welcomed(&mut self, welcome: crate::wire::control::Welcome) -> Turn<()> {
        let Some(Attempt { serial, deadline, stage: Stage::Connecting(connecting) }) = self.attempt.take()
        else {
            return Ok(());
        };
        // For our next connection, or the next process's.
        self.ticket = connecting.take_ticket().or(self.ticket.take());
        if let Some(ticket) = &self.ticket {
            let _ = self.supervisor.send(&Request::Ticket(ticket.clone()), &[]);
        }
        // Silent until the host is set up. An end of the connection can't be silenced, so out of the set it goes.
        let _ = self.poller.remove(&*connecting);
        match connecting.into_link(&self.setup, welcome, clock::now()) {
            Ok(mut link) => {
                self.early_arrived(&mut link)?;
                let wishes = wishes_of(&link);
                self.attempt = Some(Attempt { serial, deadline, stage: Stage::Configuring(Box::new(link)) });
                self.configure(wishes, Purpose::Attempt(serial))
            }
            Err(failure) => self.attempt_failed(Failed::passing(failure), Reason::Internal),
        }
    }

    fn configure(&mut self, wishes: Wishes, purpose: Purpose) -> Turn<()> {
        self.configuring.handle_asked(purpose, clock::now());
        self.ask(&Request::Configure(wishes))?;
        point("tunnel.configuring");
        Ok(())
    }

    fn configured(&mut self, result: Result<(), String>) -> Turn<()> {
        let Some(purpose) = self.configuring.handle_answer() else { return Err(out_of_place("Configured")) };
        match (purpose, result) {
            (Purpose::Attempt(serial), result)
                if self.attempt.as_ref().is_some_and(|a| a.serial == serial) =>
            {
                match result {
                    Ok(()) => self.established(),
                    Err(text) => {
                        let failed = Failed::passing(Failure::new(Exit::Refused, text));
                        self.attempt_failed(failed, Reason::Internal)
                    }
                }
            }
            (Purpose::Settings, Ok(())) => {
                log::info!("the server's new settings are in place");
                Ok(())
            }
            (Purpose::Settings, Err(text)) => {
                log::warn!("the server's new settings are not used: {text}");
                Ok(())
            }
            // The attempt is given up already.
            (Purpose::Attempt(_), _) => Ok(()),
        }
    }

    fn established(&mut self) -> Turn<()> {
        let Some(Attempt { serial, stage: Stage::Configuring(mut link), .. }) = self.attempt.take() else {
            return Ok(());
        };
        let tokens = tokens_of(serial);
        log::info!("{}", link.summary(&self.setup.device));
        if let Some(old) = &self.link {
            old.teach(&mut self.nats);
        }
        link.start(&self.poller, tokens, &self.nats)?;
        self.send_held(&mut link)?;
        self.want = link.inner();
        if let Some(mut old) = self.link.replace(*link) {
            old.hush(&self.poller);
            if let Some((older, _)) = self.draining.replace((old, clock::now() + DRAIN_FOR)) {
                older.end(&self.poller);
            }
        }
        self.configuring.handle_replaced();
        self.asked_since = false;
        self.resume_refused = false;
        self.retry_at = None;
        self.attempts.handle_established(clock::now());
        point("tunnel.established");
        self.wait_for_packets(Interest::Read)
    }

    fn attempt_failed(&mut self, failed: Failed, word: Reason) -> Turn<()> {
        if let Some(attempt) = self.attempt.take() {
            self.drop_attempt(attempt, word);
        }
        match self.attempts.handle_failed(&failed, clock::now(), jitter()?) {
            Next::GiveUp(failure) => Err(Over::ForGood(failure)),
            Next::RetryIn(wait) => {
                let text = failed.failure.text;
                let number = self.attempts.number();
                log::warn!("{text}; next attempt in {:.1} s (attempt {number})", wait.as_secs_f64());
                self.retry_at = Some(clock::now() + wait);
                Ok(())
            }
        }
    }

    fn drop_attempt(&self, attempt: Attempt, word: Reason) {
        match attempt.stage {
            Stage::Dialling => {}
            Stage::Connecting(connecting) => {
                let _ = self.poller.remove(&*connecting);
                connecting.give_up(word);
            }
            Stage::Configuring(link) => link.leave(&self.poller, word),
        }
    }

    // The session in use.

    fn heed_link(&mut self) -> Turn<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        link.inside_to_tun(&self.tun, &mut self.buffers);
        if self.leaving.is_some() {
            return self.heed_last_words();
        }
        if !self.answered && link.is_answered() {
            self.answered = true;
            self.tell(Progress::Answered)?;
        }
        let Some(link) = &mut self.link else { return Ok(()) };
        for word in link.drain(&self.poller) {
            match word {
                Word::ControlLost(text) => self.reconnect(&format!("control connection lost: {text}"))?,
                Word::Unreachable => self.reconnect("the server doesn't answer")?,
                Word::Settings => self.configuring.handle_change(),
                Word::Ended { reason, by_peer } => self.session_over(reason, by_peer)?,
                Word::Failed(failure) if failure.exit == Exit::CertificateRevoked => {
                    return Err(Over::ForGood(failure));
                }
                Word::Failed(failure) => {
                    self.end_link()?;
                    self.reconnect(&format!("control connection failed: {failure}"))?;
                }
            }
        }
        self.ask_for_settings(clock::now())
    }

    fn ask_for_settings(&mut self, now: Time) -> Turn<()> {
        if self.configuring.poll_timeout().is_none_or(|at| at > now) {
            return Ok(());
        }
        match self.link.as_ref().map(wishes_of) {
            Some(wishes) => self.configure(wishes, Purpose::Settings),
            None => Ok(()),
        }
    }

    fn session_over(&mut self, reason: Reason, by_peer: bool) -> Turn<()> {
        if self.hung_up(reason, by_peer)? {
            return Err(Over::Told);
        }
        self.end_link()?;
        match reason {
            Reason::Revoked if by_peer => {
                let text = "the server ended the session: our certificate is revoked; ask for another";
                Err(Over::ForGood(Failure::new(Exit::CertificateRevoked, text)))
            }
            Reason::Replaced if by_peer && !self.asked_since => {
                let text = "another client with the same certificate took over: give each machine its own \
                            certificate";
                Err(Over::ForGood(Failure::new(Exit::Refused, text)))
            }
            _ => self.reconnect(&format!("session ended: {reason}")),
        }
    }

    fn end_link(&mut self) -> Turn<()> {
        if let Some(link) = self.link.take() {
            link.teach(&mut self.nats);
            link.end(&self.poller);
            self.tell(Progress::Lost)?;
        }
        self.configuring.handle_replaced();
        self.wait_for_packets(Interest::Nothing)
    }

    /// Looks for the next session, unless that is under way.
    fn reconnect(&mut self, why: &str) -> Turn<()> {
        if self.attempt.is_some() || self.retry_at.is_some() {
            log::info!("{why}");
            return Ok(());
        }
        let now = clock::now();
        let wait = self.attempts.handle_lost(now, jitter()?);
        let number = self.attempts.number();
        log::warn!("{why}; reconnecting in {:.1} s (attempt {number})", wait.as_secs_f64());
        self.retry_at = Some(now + wait);
        Ok(())
    }

    /// The session goes on by what carriers there are, or is looked for elsewhere. An attempt that is under way is left
    /// alone; one that waits for better times may find them now.
    fn network_changed(
        &mut self,
        server: SocketAddr,
        carriers: Vec<(CarrierName, OwnedFd)>,
        control_gone: bool,
        elsewhere: bool,
    ) -> Turn<()> {
        let names: Vec<&str> = carriers.iter().map(|(name, _)| name.name.as_str()).collect();
        let reachable = !names.is_empty();
        match reachable {
            true => log::info!("the network changed: the server is reached by {}", names.join(", ")),
            false => log::warn!("the network changed: there is no way to the server for now"),
        }
        if let Some(link) = &self.link {
            link.teach(&mut self.nats);
        }
        self.nats.handle_carriers(carriers.iter().map(|(name, _)| name));
        let in_use = self.link.as_mut().filter(|link| link.address == server);
        let has_session = in_use.is_some();
        if let Some(link) = in_use {
            // What has come by those that go now is still of use.
            link.server_to_tun(&self.tun, &mut self.buffers)?;
            link.take_carriers(&self.poller, take_over(carriers)?)?;
            point("tunnel.moving");
        }
        let needed = match reachable {
            true => self.retry_at.is_some() || control_gone && has_session,
            false => elsewhere,
        };
        if needed && self.attempt.is_none() {
            self.attempt_at_once();
        }
        Ok(())
    }

    /// An attempt whose connection is cut off begins anew, and one that waits begins now.
    fn moved(&mut self, cut_off: bool) -> Turn<()> {
        let connecting = |attempt: &mut Attempt| cut_off && matches!(attempt.stage, Stage::Connecting(_));
        if let Some(attempt) = self.attempt.take_if(connecting) {
            self.drop_attempt(attempt, Reason::Internal);
            self.attempt_at_once();
        } else if self.attempt.is_none() && self.retry_at.is_some() {
            self.attempt_at_once();
        }
        Ok(())
    }

    fn attempt_at_once(&mut self) {
        self.attempts.handle_moved(clock::now());
        self.retry_at = Some(clock::now());
        let number = self.attempts.number();
        log::info!("a new control connection is made at once (attempt {number})");
    }

    fn wait_for_packets(&self, interest: Interest) -> Turn<()> {
        Ok(self
            .poller
            .modify(&self.tun, TUN, interest)
            .map_err(|e| Failure::system("change the epoll set", e))?)
    }

    // The supervisor.

    fn hear_supervisor(&mut self) -> Turn<()> {
        loop {
            match self.supervisor.receive(true) {
                Ok(Incoming::Message(reply, fds)) => self.obey(reply, fds)?,
                Ok(Incoming::Nothing) => return Ok(()),
                Ok(Incoming::Closed) => {
                    return Err(Failure::system("listen to the supervisor", "it is gone").into());
                }
                Err(violation) => return Err(Failure::system("listen to the supervisor", violation).into()),
            }
        }
    }

    fn obey(&mut self, reply: Reply, fds: Vec<OwnedFd>) -> Turn<()> {
        match reply {
            Reply::Stop => Err(self.leave()),
            Reply::Query => self.report(clock::now()),
            // What was asked for before isn't needed any more.
            _ if self.leaving.is_some() => Ok(()),
            Reply::Dialled { remote, host, address, carriers } => {
                self.dialled(remote.into(), (host, address.into()), (carriers, fds))
            }
            Reply::Moved { cut_off } => self.moved(cut_off),
            Reply::Carriers { server, carriers, control_gone, elsewhere } => {
                if carriers.len() != fds.len() {
                    return Err(without_sockets().into());
                }
                let carriers = carriers.into_iter().zip(fds).collect();
                self.network_changed(server.into(), carriers, control_gone, elsewhere)
            }
            Reply::DialFailed { text } => {
                self.attempt_failed(Failed::passing(Failure::new(Exit::System, text)), Reason::Internal)
            }
            Reply::Configured => self.configured(Ok(())),
            Reply::ConfigureFailed { text } => self.configured(Err(text)),
        }
    }

    fn report(&self, now: Time) -> Turn<()> {
        let session = self.link.as_ref().map(|link| link.report(now));
        let connecting = self.attempt.is_some() || self.retry_at.is_some();
        self.ask(&Request::Report(Box::new(Report { session, connecting })))
    }

    /// Says goodbye to every server that may know us.
    fn leave(&mut self) -> Over {
        point("tunnel.leaving");
        if let Some(attempt) = self.attempt.take() {
            self.drop_attempt(attempt, Reason::Leaving);
        }
        if let Some(link) = self.link.take() {
            link.leave(&self.poller, Reason::Leaving);
        }
        if let Some((old, _)) = self.draining.take() {
            old.end(&self.poller);
        }
        Over::Told
    }

    fn ask(&self, request: &Request) -> Turn<()> {
        match self.supervisor.send(request, &[]) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Failure::system("ask the supervisor", "it doesn't read").into()),
            Err(error) => Err(Failure::system("ask the supervisor", error).into()),
        }
    }
}

fn wishes_of(link: &Link) -> Wishes {
    Wishes {
        addresses: link.addresses.clone(),
        mtu: link.mtu,
        subnets: link.subnets.clone(),
        settings: link.settings.clone(),
        server: link.address.ip(),
    }
}

fn tokens_of(serial: u64) -> Tokens {
    Tokens { control: FIRST_OF_SESSIONS + 2 * serial, udp: FIRST_OF_SESSIONS + 2 * serial + 1 }
}

fn jitter() -> Outcome<u32> {
    random::bytes().map(u32::from_ne_bytes)
}

fn out_of_place(what: &str) -> Over {
    Failure::new(Exit::Malformed, format!("the supervisor's answer is out of place: {what}")).into()
}

const SUPERVISOR: u64 = 0;
const TUN: u64 = 1;
const FIRST_OF_SESSIONS: u64 = 2;
const EVENTS: usize = 16;
/// From the connection to the session; the dial has its own time.
const ATTEMPT_WITHIN: Duration = Duration::from_secs(15);
/// Packets of the session before are on their way no longer than this.
const DRAIN_FOR: Duration = Duration::from_secs(3);
/// /dev/null three times, channel, TUN, epoll, two sessions with nine sockets each, the eight UDP sockets of one before, and
/// nine just handed over.
const DESCRIPTORS: u64 = 41;
/// A bound against runaway memory, far above what a session touches.
const ADDRESS_SPACE: u64 = 1 << 30;
