//! The supervisor: the client's privileged half. It holds the device, routes and resolvers, starts the tunnel
//! process, does for it what needs privilege, and starts it again when it dies. It reads nothing from the network;
//! the device only while it connects on demand and sleeps.

mod demand;

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;

use nix::unistd::{Uid, geteuid};

use demand::Demand;

use super::admin::{Desk, Facts};
use super::consent::{Policy, judge};
use super::dial::{Connected, Dial, Dialling, Known};
use super::host::{Footing, Host};
use super::ipc::{
    CarrierName, Phase, Progress, Reply, Request, Setup, SupervisorEnd, Ticket, Verdict, Wishes, truncate,
};
use super::lookup::Confines;
use super::moves::{self, Connection, Settle};
use super::role;
use crate::VERSION;
use crate::budget::Budget;
use crate::config::client::{ClientConfig, Remote};
use crate::config::common::DeviceName;
use crate::escape::Escaped;
use crate::exit::{Exit, Failure, Outcome};
use crate::net::Monitor;
use crate::rigged;
use crate::sandbox::Means;
use crate::sys::capabilities::{self, Capability, Kept};
use crate::sys::ids::{self, IdMap};
use crate::sys::poller::{Interest, Poller};
use crate::sys::seccomp::FORBIDDEN_CALL;
use crate::sys::seqpacket::{self, Incoming};
use crate::sys::signals::Signals;
use crate::sys::tun::{Offloads, Tun};
use crate::sys::{clock, memfd, spawn, udp};
use crate::time::Time;
use crate::tls::Credentials;

/// `tunguard client`: runs until it is told to stop, or until there is no use in going on. After
/// [`require_root`].
pub fn run(config: &ClientConfig) -> Outcome<()> {
    // 1. Of root only what is needed.
    capabilities::keep(PRIVILEGES)?;
    // 2. Everything that can be wrong with the configuration, before anything is touched.
    let credentials = Credentials::read_client(&config.tls)?;
    let user = User::look_up(&config.user)?;
    user.must_be_possible()?;
    let root = empty_root(&config.state_dir)?;
    let sandbox = Means::find(config.sandbox)?;
    let signals = Signals::install().map_err(|e| Failure::system("listen for signals", e))?;
    // 3. The device, which is there until we exit, and what a killed run left behind.
    let (tun, offloads) = Tun::create(&config.device)?;
    rigged::point("supervisor.device-made");
    let host = Host::new(config)?;
    // 4. The tunnel process, again and again.
    let monitor = Monitor::open(host.index())?;
    let events = (signals, monitor);
    let mut supervisor =
        Supervisor::new(config, (credentials, user, root, sandbox), (tun, offloads), events)?;
    let result = supervisor.supervise(host);
    log::debug!("client ends: {result:?}");
    result
}

/// The client needs root, and says so before it stumbles over files only root can read.
pub fn require_root() -> Outcome<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    let text = "tunguard client sets up a device and routes: run it as root";
    Err(Failure::new(Exit::Privilege, text))
}

/// An unprivileged user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub uid: u32,
    /// Its group's.
    pub gid: u32,
}

impl User {
    /// The user called or numbered `name`; never root.
    pub fn look_up(name: &str) -> Outcome<User> {
        let found = match name.parse::<u32>() {
            Ok(uid) => nix::unistd::User::from_uid(Uid::from_raw(uid)),
            Err(_) => nix::unistd::User::from_name(name),
        };
        let found = found.map_err(|e| Failure::system(format!("look up the user {name:?}"), e))?;
        let user = match (found, name.parse::<u32>()) {
            (Some(user), _) => User { uid: user.uid.as_raw(), gid: user.gid.as_raw() },
            // A number needs no name.
            (None, Ok(uid)) => User { uid, gid: uid },
            (None, Err(_)) => {
                return Err(Failure::usage(format!("there is no user {name:?}: set another `user`")));
            }
        };
        if user.uid == 0 || user.gid == 0 {
            let text = format!("the user {name:?} is root, or in its group: set an unprivileged `user`");
            return Err(Failure::usage(text));
        }
        Ok(user)
    }

    /// Refuses a user that doesn't exist in our user namespace, or groups that can't be left: no process could become it.
    fn must_be_possible(&self) -> Outcome<()> {
        let failed = |e: io::Error| Failure::system("read which user IDs are mapped here", e);
        let maps = [("user", self.uid, IdMap::users()), ("group", self.gid, IdMap::groups())];
        for (what, id, map) in maps {
            let map = map.map_err(failed)?;
            if !map.lacks(id, id).is_empty() {
                let text = format!(
                    "the {what} {id} of the tunnel process isn't mapped in this user namespace, mapped are {map}: \
                     set a `user` that is, with its group, and not root"
                );
                return Err(Failure::usage(text));
            }
        }
        let failed = |e| Failure::system("drop the tunnel process's supplementary groups", e);
        ids::groups_can_be_left().map_err(failed)
    }
}

/// The directory the tunnel process is locked into: empty, and nobody's to write to but root's.
fn empty_root(state_dir: &Path) -> Outcome<PathBuf> {
    let root = state_dir.join("empty");
    let failed = |what: &str, e| Failure::system(format!("{what} {}", root.display()), e);
    fs::create_dir_all(state_dir)
        .map_err(|e| Failure::system(format!("make the state_dir {}", state_dir.display()), e))?;
    match DirBuilder::new().mode(0o555).create(&root) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed("make", e)),
        _ => {}
    }
    let there = fs::symlink_metadata(&root).map_err(|e| failed("look at", e))?;
    let ours = there.is_dir() && there.uid() == 0 && there.mode() & 0o222 & 0o077 == 0;
    let empty = fs::read_dir(&root).map_err(|e| failed("look into", e))?.next().is_none();
    if ours && empty {
        Ok(root)
    } else {
        let text = format!("{} must be an empty directory that only root can write to", root.display());
        Err(Failure::new(Exit::System, text))
    }
}

struct Supervisor<'a> {
    config: &'a ClientConfig,
    credentials: Credentials,
    user: User,
    root: PathBuf,
    /// What the tunnel process is locked in with.
    sandbox: Means,
    tun: Tun,
    offloads: Offloads,
    signals: Signals,
    poller: Poller,
    known: HashMap<usize, Known>,
    process: Option<Process>,
    /// The dial under way, and the places it goes by.
    dial: Option<(Dial, Vec<usize>)>,
    /// The connection made last, until it leads to a session.
    dialled: Option<Connection>,
    /// The connection of the session in use.
    in_use: Option<Connection>,
    monitor: Monitor,
    settle: Settle,
    /// What the attempt under way, or the last one, found.
    footing: Option<Footing>,
    /// Addresses of remotes, by their places, that were found last.
    found: HashMap<usize, Vec<SocketAddr>>,
    /// What was wrong with the network when it was last looked at.
    complaint: Option<String>,
    restart_at: Option<Time>,
    /// Tunnel processes that died young, one after the other.
    crashes: u32,
    established: bool,
    want: Vec<IpAddr>,
    /// What the next tunnel process may take up again.
    ticket: Option<Ticket>,
    /// When a tunnel process that was told to stop is killed.
    stop_by: Option<Time>,
    desk: Desk,
    /// Place of the remote that the last session was with.
    first_remote: usize,
    demand: Option<Demand>,
}

/// A running tunnel process.
struct Process {
    child: Child,
    channel: SupervisorEnd,
    phase: Phase,
    started: Time,
    requests: Budget,
    lines: Budget,
    last_word: Option<LastWord>,
}

struct LastWord {
    failure: Option<Failure>,
    permanent: bool,
}

/// Whether to go on.
enum Flow {
    On,
    Stop(Outcome<()>),
}

impl<'a> Supervisor<'a> {
    fn new(
        config: &'a ClientConfig,
        (credentials, user, root, sandbox): (Credentials, User, PathBuf, Means),
        (tun, offloads): (Tun, Offloads),
        (signals, monitor): (Signals, Monitor),
    ) -> Outcome<Supervisor<'a>> {
        let poller = Poller::new(EVENTS).map_err(|e| Failure::system("make an epoll set", e))?;
        for fd in signals.fds() {
            poller.add(fd, SIGNALS, Interest::Read).map_err(full)?;
        }
        poller.add(&monitor, NETWORK, Interest::Read).map_err(full)?;
        let desk = Desk::open(config, &poller, clock::now());
        Ok(Supervisor {
            config,
            credentials,
            user,
            root,
            sandbox,
            tun,
            offloads,
            signals,
            poller,
            known: HashMap::new(),
            process: None,
            dial: None,
            dialled: None,
            in_use: None,
            monitor,
            settle: Settle::default(),
            footing: None,
            found: HashMap::new(),
            complaint: None,
            restart_at: Some(clock::now()),
            crashes: 0,
            established: false,
            want: Vec::new(),
            ticket: None,
            stop_by: None,
            desk,
            first_remote: 0,
            demand: Demand::new(config, clock::now())?,
        })
    }

    /// The event loop, and then the host as it was.
    fn supervise(&mut self, mut host: Host) -> Outcome<()> {
        let begun = self.begin_asleep(&mut host);
        let result = loop {
            if let Err(failure) = &begun {
                break Err(failure.clone());
            }
            match self.turn(&mut host) {
                Ok(Flow::On) => {}
                Ok(Flow::Stop(result)) => break result,
                Err(failure) => break Err(failure),
            }
        };
        self.dial = None;
        self.kill_process();
        rigged::point("supervisor.tunnel-gone");
        let cleared = host.clear();
        rigged::point("supervisor.cleared");
        if result.is_ok() {
            log::info!("tunnel down, routes and resolvers restored");
        }
        result.and(cleared)
    }

    fn turn(&mut self, host: &mut Host) -> Outcome<Flow> {
        let timeout = self.poll_timeout().map(|at| at.since(clock::now()));
        let waited = self.poller.wait(timeout);
        let ready: Vec<_> = waited.map_err(|e| Failure::system("wait for events", e))?.collect();
        for event in ready {
            match event.token {
                SIGNALS => {
                    if let Flow::Stop(result) = self.hear_signals() {
                        return Ok(Flow::Stop(result));
                    }
                }
                CHANNEL => self.hear_tunnel(host),
                NETWORK => self.hear_network(host)?,
                DEVICE => self.hear_device(clock::now())?,
                token if Desk::owns(token) => self.hear_admin(token),
                // Dials are looked at below, whatever woke us.
                _ => {}
            }
        }
        let now = clock::now();
        if self.settle.handle_timeout(now) {
            self.look_at_network(host);
        }
        self.step_dial(host, now);
        self.answer_admin(host, now);
        if self.stop_by.is_some_and(|by| by <= now) {
            log::warn!("the tunnel process doesn't stop: it is killed");
            return Ok(Flow::Stop(Ok(())));
        }
        if let Flow::Stop(result) = self.reap(host, now) {
            return Ok(Flow::Stop(result));
        }
        self.step_demand(host, now)?;
        if self.restart_at.is_some_and(|at| at <= now) {
            self.restart_at = None;
            if let Err(failure) = self.start_process(now) {
                // Out of processes or memory for the moment: no reason to let traffic go out in clear.
                log::error!("{failure}");
                self.restart_later(now);
            }
        }
        Ok(Flow::On)
    }

    fn poll_timeout(&self) -> Option<Time> {
        let dial = self.dial.as_ref().map(|(dial, _)| dial.poll_timeout());
        let settle = self.settle.poll_timeout();
        let (desk, demand) = (self.desk.poll_timeout(), self.poll_demand());
        let dues = [self.stop_by, dial, settle, demand, desk];
        self.restart_at.into_iter().chain(dues.into_iter().flatten()).min()
    }

    fn hear_signals(&mut self) -> Flow {
        let arrived = self.signals.take();
        if arrived.reload {
            log::info!("SIGHUP: the client reads its configuration only when it starts");
        }
        if !arrived.stop {
            return Flow::On;
        }
        let hurry = self.stop_by.is_some();
        let Some(process) = self.process.as_mut().filter(|_| !hurry) else { return Flow::Stop(Ok(())) };
        log::info!("stopping");
        rigged::read_orders();
        process.phase = Phase::Stopping;
        self.dial = None;
        self.stop_by = Some(clock::now() + STOP_WITHIN);
        let told = process.channel.send(&Reply::Stop, &[]);
        rigged::point("supervisor.stopping");
        match told {
            Ok(true) => Flow::On,
            _ => Flow::Stop(Ok(())),
        }
    }

    // The tunnel process's life.

    fn start_process(&mut self, now: Time) -> Outcome<()> {
        let failed = |e| Failure::system("start the tunnel process", e);
        let (channel, theirs) = seqpacket::pair().map_err(failed)?;
        let setup = memfd::sealed("tunguard-setup", &self.setup().encode()).map_err(failed)?;
        let fds = [theirs.as_fd(), self.tun.as_fd(), setup.as_fd()];
        // What can fail comes before there is a child to forget.
        self.poller.add(&channel, CHANNEL, Interest::Read).map_err(full)?;
        let spawned = spawn::spawn(Path::new("/proc/self/exe"), &[role::TUNNEL, VERSION], &fds);
        let child = match spawned {
            Ok(child) => child,
            Err(error) => {
                let _ = self.poller.remove(&channel);
                return Err(failed(error));
            }
        };
        self.process = Some(Process {
            child,
            channel,
            phase: Phase::Fresh,
            started: now,
            requests: Budget::new(REQUESTS, REQUEST_EVERY, now),
            lines: Budget::new(LINES, LINE_EVERY, now),
            last_word: None,
        });
        rigged::point("supervisor.tunnel-started");
        Ok(())
    }

    fn setup(&mut self) -> Setup {
        let config = self.config;
        Setup {
            supervisor: std::process::id() as i32,
            uid: self.user.uid,
            gid: self.user.gid,
            root: self.root.clone(),
            credentials: self.credentials.clone(),
            server_name: config.tls.server_name.clone(),
            device: config.device.to_string(),
            remotes: config.remote.len().min(u16::MAX.into()) as u16,
            suites: config.data.suites.clone(),
            rekey_ms: config.data.rekey.as_millis() as u64,
            rekey_packets: config.data.rekey_packets,
            mode: config.mobility.mode,
            keepalive: config.mobility.keepalive,
            uso: self.offloads.uso,
            established: self.established,
            want: self.want.clone(),
            // Good for one connection.
            ticket: self.ticket.take(),
            first_remote: self.first_remote as u16,
            on_demand: self.demand_setup(),
            landlock: self.sandbox.landlock,
            log_level: log::max_level() as u8,
        }
    }

    /// Looks whether the tunnel process is over, and what that means.
    fn reap(&mut self, host: &mut Host, now: Time) -> Flow {
        let Some(process) = &mut self.process else { return Flow::On };
        let status = match process.child.try_wait() {
            Ok(None) => return Flow::On,
            Ok(Some(status)) => status,
            Err(error) => return Flow::Stop(Err(Failure::system("wait for the tunnel process", error))),
        };
        let process = self.forget_process();
        let stopping = self.stop_by.is_some();
        let last_word = process.and_then(|mut process| {
            for progress in process.drain_last_word() {
                let _ = self.heed_progress(progress, now);
            }
            if now.since(process.started) > LIVED_WELL {
                self.crashes = 0;
            }
            process.last_word
        });
        if stopping {
            return Flow::Stop(Ok(()));
        }
        if last_word.is_none() {
            // If somebody had taken it over, the ticket may be his: the next process asks for certificates.
            self.ticket = None;
        }
        let for_good = last_word.as_ref().is_some_and(|last| last.permanent && last.failure.is_some());
        if !for_good && !self.demand_ended(host, now) {
            return Flow::On;
        }
        match last_word {
            Some(LastWord { failure: Some(failure), permanent: true }) => return Flow::Stop(Err(failure)),
            Some(LastWord { failure: Some(failure), .. }) => {
                log::error!("the tunnel process gave up: {failure}")
            }
            _ => log::error!("the tunnel process died: {}", describe(status)),
        }
        self.restart_later(now);
        Flow::On
    }

    fn restart_later(&mut self, now: Time) {
        let wait = restart_wait(self.crashes);
        self.crashes = self.crashes.saturating_add(1);
        log::info!("starting it again in {:.1} s; routes stay as they are", wait.as_secs_f64());
        self.restart_at = Some(now + wait);
    }

    fn forget_process(&mut self) -> Option<Process> {
        self.desk.handle_gone();
        self.dial = None;
        self.dialled = None;
        self.in_use = None;
        let process = self.process.take()?;
        let _ = self.poller.remove(&process.channel);
        Some(process)
    }

    fn kill_process(&mut self) {
        if let Some(mut process) = self.forget_process() {
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }

    // Its requests.

    fn hear_tunnel(&mut self, host: &mut Host) {
        for _ in 0..REQUESTS_PER_TURN {
            let Some(process) = &mut self.process else { return };
            match process.channel.receive(false) {
                Ok(Incoming::Message(request, _)) => {
                    if let Err(what) = self.admit(request, host) {
                        self.end_violator(&what);
                        return;
                    }
                }
                Ok(Incoming::Nothing) => return,
                // It is exiting, which nothing changes any more, or has no use without a channel; reap() says
                // how it ended.
                Ok(Incoming::Closed) => {
                    let _ = process.child.kill();
                    let _ = self.poller.remove(&process.channel);
                    return;
                }
                Err(violation) => {
                    self.end_violator(&violation.to_string());
                    return;
                }
            }
        }
    }

    fn end_violator(&mut self, what: &str) {
        log::error!("the tunnel process broke its rules ({what}): it is killed");
        self.ticket = None;
        if let Some(process) = &mut self.process {
            let _ = process.child.kill();
            let _ = self.poller.remove(&process.channel);
            process.phase = Phase::Ended;
        }
    }

    /// Checks one request against phase and budget, and does it. An error is a violation.
    fn admit(&mut self, request: Request, host: &mut Host) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let now = clock::now();
        match process.phase.allows(&request) {
            Verdict::Allowed => {}
            Verdict::Ignored => return Ok(()),
            Verdict::Violation => return Err(format!("a request out of place: {}", name_of(&request))),
        }
        match request {
            Request::Log { level, text } => process.show(level, &text, now),
            Request::Ended { failure, permanent } => process.note_end(failure, permanent),
            Request::Report(report) => self.desk.take_report(*report)?,
            _ if !process.requests.take(now) => return Err("too many requests".to_owned()),
            Request::Dial { remote } => return self.start_dial(remote.into(), host, now),
            Request::Configure(wishes) => self.configure(&wishes, host)?,
            Request::Ticket(ticket) => self.ticket = Some(ticket).filter(|t| t.session.is_plausible()),
            Request::Progress(progress) => return self.heed_progress(progress, now),
        }
        Ok(())
    }

    fn start_dial(&mut self, place: usize, host: &mut Host, now: Time) -> Result<(), String> {
        let remotes = &self.config.remote;
        if place >= remotes.len() {
            return Err("a remote that isn't there".to_owned());
        }
        let places: Vec<usize> = (place..remotes.len()).chain(0..place).collect();
        let started = self.dial_these(&places, now);
        // Good again only when this leads to a session.
        self.known.entry(place).or_default().good = false;
        self.footing = host.footing(&self.servers()).ok();
        let Some(process) = &mut self.process else { return Ok(()) };
        process.phase = process.phase.dialling();
        match started {
            Ok(dial) => self.dial = Some((dial, places)),
            Err(failure) => self.dial_failed(failure.text),
        }
        rigged::point("supervisor.dialling");
        Ok(())
    }

    fn dial_these(&self, places: &[usize], now: Time) -> Outcome<Dial> {
        let remotes = places.iter().map(|place| {
            let known = self.known.get(place).cloned().unwrap_or_default();
            (*place, self.config.remote[*place].clone(), known)
        });
        let confines = Confines { user: self.user, sandbox: self.sandbox };
        Dial::start(remotes, confines, (&self.poller, DIAL), now)
    }

    /// Where servers are, as far as anybody knows.
    fn servers(&self) -> Vec<SocketAddr> {
        let literal = |remote: &Remote| Some(SocketAddr::new(remote.host.parse().ok()?, remote.port));
        let mut servers: Vec<SocketAddr> = self.config.remote.iter().filter_map(literal).collect();
        servers.extend(self.found.values().flatten());
        servers.sort_unstable();
        servers.dedup();
        servers
    }

    fn step_dial(&mut self, host: &mut Host, now: Time) {
        let Some((dial, _)) = &mut self.dial else { return };
        let step = dial.step(now, &self.poller, |address| host.ways_out(address));
        if !matches!(step, Dialling::Pending) {
            let mut found: HashMap<usize, Vec<SocketAddr>> = HashMap::new();
            for (place, address) in dial.addresses() {
                found.entry(place).or_default().push(address);
            }
            self.found.extend(found);
        }
        match step {
            Dialling::Pending => {}
            Dialling::Failed(text) => {
                self.dial = None;
                self.dial_failed(text);
            }
            Dialling::Connected(connected) => {
                self.dial = None;
                if let Err(error) = self.hand_over(&connected, host) {
                    let address = connected.address;
                    self.dial_failed(format!("can't hand over the connection to {address}: {error}"));
                }
            }
        }
    }

    /// Gives the tunnel process the connection, and a UDP socket for each link that leads to the server.
    fn hand_over(&mut self, connected: &Connected, host: &mut Host) -> io::Result<()> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let address = connected.address;
        let ways = host.ways_to(address).unwrap_or_else(|failure| {
            log::warn!("{failure}");
            Vec::new()
        });
        let (ways, mut sockets) = moves::open(ways, address);
        let mut carriers = moves::names(&ways);
        if sockets.is_empty() {
            if let Some(wanted) = &self.config.mobility.carriers {
                let wanted: Vec<&str> = wanted.iter().map(DeviceName::as_str).collect();
                log::warn!("none of the carriers leads to {}: {}", address.ip(), wanted.join(", "));
            }
            // Wherever the kernel sends it.
            sockets.push(udp::bind_towards(address)?);
            carriers.push(CarrierName::any());
        }
        self.dialled = Some(Connection::new(connected, ways)?);
        process.phase = process.phase.dialled(true);
        let fds: Vec<BorrowedFd<'_>> =
            [connected.stream.as_fd()].into_iter().chain(sockets.iter().map(AsFd::as_fd)).collect();
        let (remote, host) = (connected.place as u16, self.config.remote[connected.place].host.clone());
        process.tell(&Reply::Dialled { remote, host, address: address.into(), carriers }, &fds);
        rigged::point("supervisor.dialled");
        Ok(())
    }

    fn dial_failed(&mut self, mut text: String) {
        truncate(&mut text);
        if let Some(process) = &mut self.process {
            process.phase = process.phase.dialled(false);
            process.tell(&Reply::DialFailed { text }, &[]);
        }
    }

    // The network.

    fn hear_network(&mut self, host: &mut Host) -> Outcome<()> {
        let changed = self.monitor.changed()?;
        if changed {
            self.demand_moved();
        }
        if changed && self.settle.handle_event(clock::now()) {
            self.look_at_network(host);
        }
        Ok(())
    }

    /// Something changed: first the routes to the servers, then the sockets that follow them.
    fn look_at_network(&mut self, host: &mut Host) {
        let looked = host
            .follow_network()
            .and_then(|()| self.tell_carriers(host))
            .and_then(|()| self.move_attempt(host, clock::now()));
        let complaint = looked.err().map(|failure| failure.text);
        if let Some(text) = &complaint {
            self.settle.handle_failed(clock::now());
            if self.complaint != complaint {
                log::warn!("{text}");
            }
        }
        self.complaint = complaint;
    }

    /// Hands fresh sockets to a tunnel process with a session, if other ways lead to its server than it knows of.
    fn tell_carriers(&mut self, host: &mut Host) -> Outcome<()> {
        let servers = self.servers();
        let (Some(process), Some(connection)) = (&mut self.process, &mut self.in_use) else { return Ok(()) };
        if !process.phase.has_connection() {
            return Ok(());
        }
        let ways = host.ways_to(connection.address)?;
        let control_gone = connection.control_gone(&ways, &host.holders(connection.local)?);
        let mut elsewhere = false;
        if ways.is_empty() {
            let others = servers.iter().filter(|server| **server != connection.address);
            for server in others {
                elsewhere |= !host.ways_to(*server)?.is_empty();
            }
        }
        if !connection.is_news(&ways, control_gone, elsewhere) {
            return Ok(());
        }
        let (ways, sockets) = moves::open(ways, connection.address);
        let fds: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
        let (server, carriers) = (connection.address.into(), moves::names(&ways));
        process.tell(&Reply::Carriers { server, carriers, control_gone, elsewhere }, &fds);
        connection.handle_told(ways, control_gone, elsewhere);
        Ok(())
    }

    /// An attempt under way begins anew from where this host is now, and one that waits may begin at once.
    fn move_attempt(&mut self, host: &mut Host, now: Time) -> Outcome<()> {
        let Some(before) = &self.footing else { return Ok(()) };
        // What a dial found meanwhile is no move.
        let moved = host.footing(&before.servers)? != *before;
        self.footing = Some(host.footing(&self.servers())?);
        if !moved {
            return Ok(());
        }
        self.known.values_mut().for_each(Known::trust);
        if let Some((_, places)) = &self.dial {
            log::info!("the network changed: connecting anew");
            let places = places.clone();
            match self.dial_these(&places, now) {
                Ok(dial) => self.dial = Some((dial, places)),
                Err(failure) => {
                    self.dial = None;
                    self.dial_failed(failure.text);
                }
            }
            return Ok(());
        }
        let mut cut_off = false;
        if let Some(latest) = &self.dialled {
            cut_off = latest.control_gone(&host.ways_to(latest.address)?, &host.holders(latest.local)?);
        }
        if let Some(process) = &mut self.process {
            process.tell(&Reply::Moved { cut_off }, &[]);
        }
        Ok(())
    }

    /// Sets the host up as far as the configuration agrees. What the server may not ask for is refused; naming a
    /// server that was not dialled is the tunnel process's own violation.
    fn configure(&mut self, wishes: &Wishes, host: &mut Host) -> Result<(), String> {
        let is_it = |connection: &Connection| connection.address.ip() == wishes.server;
        if !self.dialled.iter().chain(&self.in_use).any(is_it) {
            return Err("a server that was not dialled".to_owned());
        }
        let policy = Policy::of(self.config);
        let done = host
            .lans()
            .map_err(|failure| failure.text)
            .and_then(|lans| judge(&policy, wishes, &lans).map_err(|refused| refused.to_string()))
            .and_then(|plan| host.apply(&plan).map(|()| plan).map_err(|failure| failure.text));
        let reply = match done {
            Ok(plan) => {
                self.want = plan.addresses;
                self.established = true;
                if let Some(latest) = self.dialled.take_if(|latest| is_it(latest)) {
                    self.known.insert(latest.place, Known { addresses: vec![latest.address], good: true });
                    self.in_use = Some(latest);
                }
                let mut keep = self.kept_servers();
                keep.extend(self.dialled.iter().chain(&self.in_use).map(|c| c.address.ip()));
                if self.dial.is_none()
                    && let Err(failure) = host.protect_only(&keep)
                {
                    log::warn!("{failure}");
                }
                Reply::Configured
            }
            Err(mut text) => {
                truncate(&mut text);
                Reply::ConfigureFailed { text }
            }
        };
        if let Some(process) = &mut self.process {
            process.tell(&reply, &[]);
        }
        rigged::point("supervisor.configured");
        if reply == Reply::Configured {
            self.remember(wishes);
        }
        // It may have changed while the session was being made.
        self.look_at_network(host);
        Ok(())
    }
}

// Those who ask.
impl Supervisor<'_> {
    fn hear_admin(&mut self, token: u64) {
        let now = clock::now();
        let Some(key) = self.desk.hear(token, &self.poller, now) else { return };
        let tunnel = self.process.as_ref().filter(|p| p.phase.is_at_work() && self.desk.may_ask());
        let asked = tunnel.is_some_and(|p| matches!(p.channel.send(&Reply::Query, &[]), Ok(true)));
        self.desk.wait_for(key, asked, now);
    }

    fn answer_admin(&mut self, host: &Host, now: Time) {
        while let Some(key) = self.desk.due(now, &self.poller) {
            let facts = Facts {
                config: self.config,
                sandbox: self.sandbox,
                addresses: host.addresses(),
                tunnel: self.process.as_ref().map(|process| process.child.id()),
                connection: self.in_use.as_ref(),
                on_demand: self.demand.as_ref().map(Demand::shown),
            };
            let status = self.desk.status(&facts, now);
            self.desk.answer(key, &status, &self.poller);
        }
    }
}

impl Process {
    fn tell(&mut self, reply: &Reply, fds: &[std::os::fd::BorrowedFd<'_>]) {
        if !matches!(self.channel.send(reply, fds), Ok(true)) {
            // It waits for this for ever: better a new one. If it is dead already, reap() says so.
            let _ = self.child.kill();
        }
    }

    /// A line of the tunnel process, made harmless for a terminal.
    fn show(&mut self, level: u8, text: &str, now: Time) {
        if !self.lines.take(now) {
            return;
        }
        let level = log::Level::iter().nth(usize::from(level).saturating_sub(1)).unwrap_or(log::Level::Info);
        log::log!(level, "{}", harmless(text));
    }

    fn note_end(&mut self, failure: Option<(Exit, String)>, permanent: bool) {
        self.phase = Phase::Ended;
        let failure = failure.map(|(exit, text)| Failure::new(exit, harmless(&text)));
        self.last_word = Some(LastWord { failure, permanent });
    }

    /// What is still in the channel of a dead process; its progress is handed out.
    fn drain_last_word(&mut self) -> Vec<Progress> {
        let mut made = Vec::new();
        for _ in 0..REQUESTS_PER_TURN {
            match self.channel.receive(false) {
                Ok(Incoming::Message(Request::Ended { failure, permanent }, _))
                    if self.last_word.is_none() =>
                {
                    self.note_end(failure, permanent);
                }
                Ok(Incoming::Message(Request::Log { level, text }, _)) => {
                    self.show(level, &text, clock::now());
                }
                Ok(Incoming::Message(request @ Request::Progress(progress), _))
                    if self.phase.allows(&request) == Verdict::Allowed =>
                {
                    made.push(progress);
                }
                Ok(Incoming::Message(..)) => {}
                _ => break,
            }
        }
        made
    }
}

/// How long to wait before a tunnel process is started after `crashes` that died young or didn't start.
fn restart_wait(crashes: u32) -> Duration {
    (FIRST_RESTART * 2u32.pow(crashes.min(6))).min(LAST_RESTART)
}

/// One line, not longer than it should be, that a terminal takes for nothing but text.
fn harmless(text: &str) -> String {
    let mut text = text.to_owned();
    truncate(&mut text);
    Escaped(&text).to_string()
}

fn name_of(request: &Request) -> &'static str {
    match request {
        Request::Dial { .. } => "Dial",
        Request::Configure(_) => "Configure",
        Request::Ticket(_) => "Ticket",
        Request::Report(_) => "Report",
        Request::Progress(_) => "Progress",
        Request::Log { .. } => "Log",
        Request::Ended { .. } => "Ended",
    }
}

fn describe(status: ExitStatus) -> String {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    match code.and_then(Exit::from_code) {
        Some(exit) => format!("{status} ({exit:?})"),
        None if status.signal() == Some(libc::SIGSYS) => format!("{status}, {FORBIDDEN_CALL}"),
        None => status.to_string(),
    }
}

fn full(error: std::io::Error) -> Failure {
    Failure::system("fill the epoll set", error)
}

/// Of root's capabilities, those that the supervisor keeps; programs that it starts get no more.
const PRIVILEGES: &[Kept] = &[
    Kept::used(Capability::CAP_NET_ADMIN, "the device, addresses, routes and resolvers"),
    // The kernel asks for it as well, when it kills the tunnel process of a supervisor that died (PR_SET_PDEATHSIG).
    Kept::used(Capability::CAP_KILL, "ending the tunnel process, which runs as another user"),
    Kept::used(
        Capability::CAP_DAC_OVERRIDE,
        "profiles, keys and directories that belong to other users, and files of name servers that resolvconf writes",
    ),
    // Not in force here: for what it starts.
    Kept::handed_on(Capability::CAP_SETUID, "the tunnel process, as a user of its own"),
    Kept::handed_on(Capability::CAP_SETGID, "the tunnel process, in a group of its own"),
    Kept::handed_on(Capability::CAP_SYS_CHROOT, "the tunnel process, in an empty root"),
    Kept::handed_on(Capability::CAP_SETPCAP, "the tunnel process, with an empty bounding set"),
];

const SIGNALS: u64 = 0;
const CHANNEL: u64 = 1;
const DIAL: u64 = 2;
const NETWORK: u64 = 3;
const DEVICE: u64 = 4;
const EVENTS: usize = 16;

/// Requests of a tunnel process that may be read before signals and dials are looked at.
const REQUESTS_PER_TURN: usize = 32;
/// Dials and configurations: far more than a reconnecting client makes.
const REQUESTS: u32 = 20;
const REQUEST_EVERY: Duration = Duration::from_millis(200);
/// Log lines.
const LINES: u32 = 500;
const LINE_EVERY: Duration = Duration::from_millis(20);
/// A goodbye takes a round trip at most.
const STOP_WITHIN: Duration = Duration::from_secs(2);
/// A tunnel process that lived for so long was no crash at start.
const LIVED_WELL: Duration = Duration::from_secs(30);
const FIRST_RESTART: Duration = Duration::from_millis(500);
const LAST_RESTART: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_never_the_tunnels_user() {
        for name in ["root", "0"] {
            assert_eq!(User::look_up(name).expect_err(name).exit, Exit::Usage);
        }
        assert_eq!(User::look_up("no such user").expect_err("nobody").exit, Exit::Usage);
        assert_eq!(User::look_up("4000000001"), Ok(User { uid: 4_000_000_001, gid: 4_000_000_001 }));
    }

    #[test]
    fn a_state_dir_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let below = file.path().join("state");
        let failure = empty_root(&below).expect_err("below a file");
        let sentence = format!("make the state_dir {}: Not a directory (os error 20)", below.display());
        assert_eq!(failure.text, sentence);
    }

    #[test]
    fn restarts_back_off() {
        let waits: Vec<u128> = (0..8).map(|crashes| restart_wait(crashes).as_millis()).collect();
        assert_eq!(waits, [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        assert_eq!(restart_wait(u32::MAX), LAST_RESTART);
    }

    #[test]
    fn lines_are_harmless_to_a_terminal() {
        assert_eq!(harmless("a\x1b[31m\nb\té \"q\""), "a\\u{1b}[31m\\nb\\té \"q\"");
        assert_eq!(harmless(&"x".repeat(5_000)).len(), crate::client::ipc::MAX_TEXT);
    }
}
