//! Starting workers, each with a user of its own.

use std::collections::VecDeque;
use std::fmt;
use std::fs;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use tunguard::config::server::ServerConfig;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::{GuardEnd, NurseryGuardEnd, NurseryReply, NurseryRequest, QueueNames, QueuePlan, Setup};
use tunguard::sandbox::Means;
use tunguard::sys::poller::Poller;
use tunguard::sys::seqpacket::Incoming;
use tunguard::sys::{clock, memfd, seqpacket};
use tunguard::time::Time;
use tunguard::tls::Certificates;
use tunguard::wire::control::Settings;
use tunguard::{VERSION, random};

use crate::holder::KeyHolder;
use crate::host::Queues;
use crate::starting::Starting;
use crate::uids::Uids;

/// Starts workers.
pub struct Spawner {
    program: PathBuf,
    root: PathBuf,
    uids: Uids,
    /// What workers are locked in with.
    pub sandbox: Means,
    queues: QueuePlan,
    /// Queues of workers that may be there, though the nursery never said so.
    astray: VecDeque<QueueNames>,
    /// Workers that were ordered so far.
    ordered: u64,
    setup: Option<OwnedFd>,
    nursery: Nursery,
}

/// The process that forks the workers.
enum Nursery {
    /// There is none: one is started when somebody comes.
    Down,
    Starting(Starting<NurseryRequest, NurseryReply>),
    Running {
        pid: i32,
        channel: NurseryGuardEnd,
    },
}

/// A worker that was started.
pub struct Started {
    /// Its process.
    pub pid: i32,
    /// Our end of the channel to it.
    pub channel: GuardEnd,
    /// Its user.
    pub uid: u32,
    /// The number of its channel to the key holder.
    pub signing: u64,
    /// Names of its queues.
    pub queues: QueueNames,
}

impl Spawner {
    /// Finds the worker's program and the empty directory workers are locked into, by `sandbox`.
    pub fn new(config: &ServerConfig, sandbox: Means, queues: &Queues) -> Outcome<Spawner> {
        let random: [u8; 16] = random::bytes()?;
        let prefix = format!("/tunguard-{}", random.map(|b| format!("{b:02x}")).concat());
        Ok(Spawner {
            program: worker_program()?,
            root: empty_root()?,
            uids: Uids::new(config)?,
            sandbox,
            queues: QueuePlan { prefix, downlink: queues.downlink, uplink: queues.uplink },
            astray: VecDeque::new(),
            ordered: 0,
            setup: None,
            nursery: Nursery::Down,
        })
    }

    /// Writes down what workers started from now on are told: they come from a nursery that is started afterwards. Where
    /// that fails, there are none.
    pub fn prepare(&mut self, config: &ServerConfig, certificates: &Certificates, uso: bool) -> Outcome<()> {
        // Before anything can fail: what was told before doesn't hold any more.
        self.setup = None;
        self.abandon();
        let setup = Setup {
            guard: getpid().as_raw(),
            certificates: certificates.clone(),
            root: self.root.clone(),
            suites: config.data.suites.clone(),
            mtu: config.mtu,
            settings: settings(config),
            rekey_ms: config.data.rekey.as_millis() as u64,
            rekey_packets: config.data.rekey_packets,
            linger_ms: config.linger.as_millis() as u64,
            uso,
            queues: self.queues.clone(),
            landlock: self.sandbox.landlock,
            log_level: log::max_level() as u8,
        };
        let bytes = memfd::sealed("tunguard-setup", &setup.encode());
        self.setup = Some(bytes.map_err(|e| Failure::system("write down the workers' setup", e))?);
        Ok(())
    }

    /// Gives the nursery up: the next worker comes from a new one, with the newest setup, and with code and data at
    /// other places in memory. One that only starts has no workers that could know those.
    pub fn renew(&mut self) {
        // It would end when its channel does, unless it hangs. Nothing is under way in it: an order is answered before
        // anything else is done. Until its end is known to us, nobody else can have its number.
        if let Nursery::Running { pid, .. } = self.nursery {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            self.nursery = Nursery::Down;
        }
    }

    /// No nursery is needed any more, not even one that starts.
    pub fn abandon(&mut self) {
        self.renew();
        if let Nursery::Starting(start) = std::mem::replace(&mut self.nursery, Nursery::Down) {
            start.abandon();
        }
    }

    /// Starts a nursery and waits for it, at the start of the server.
    pub fn wait_for_nursery(&mut self, holder: &mut KeyHolder) -> Outcome<()> {
        let (pid, channel) = self.exec(holder)?.wait().map_err(|failure| self.could_not_start(failure))?;
        self.nursery = Nursery::Running { pid, channel };
        Ok(())
    }

    /// Whether there is a nursery. Where there is none one is started, with `holder`, which must be ready; `poller` tells of
    /// it, and [`Spawner::poll`] what has become of it.
    pub fn has_nursery(&mut self, holder: &mut KeyHolder, poller: &Poller) -> Outcome<bool> {
        if let Nursery::Down = self.nursery {
            self.nursery = Nursery::Starting(self.exec(holder)?.watched_by(poller)?);
        }
        Ok(matches!(self.nursery, Nursery::Running { .. }))
    }

    /// Looks after a nursery that starts: `Some` when it is ready, or can't be.
    pub fn poll(&mut self, now: Time, poller: &Poller) -> Option<Outcome<()>> {
        let Nursery::Starting(start) = &mut self.nursery else { return None };
        let outcome = start.poll(now, poller)?;
        if let Nursery::Starting(start) = std::mem::replace(&mut self.nursery, Nursery::Down)
            && outcome.is_ok()
        {
            self.nursery = Nursery::Running { pid: start.pid(), channel: start.into_channel() };
        }
        Some(outcome.map_err(|failure| self.could_not_start(failure)))
    }

    /// When [`Spawner::poll`] is due.
    pub fn deadline(&self) -> Option<Time> {
        match &self.nursery {
            Nursery::Starting(start) => Some(start.deadline()),
            _ => None,
        }
    }

    /// A process has ended that nobody knows: it may be a worker whose nursery ended before it could tell. Its queues lose
    /// their names, which nobody else ever has.
    pub fn forget_astray(&mut self) {
        self.astray.retain(|queues| !queues.unlink());
    }

    /// A process has ended, with `code` if with any: whether it was the nursery. [`Spawner::poll`] comes next.
    pub fn ended(&mut self, pid: i32, how: impl fmt::Display, code: Option<i32>) -> bool {
        match &mut self.nursery {
            Nursery::Starting(start) if start.pid() == pid => start.ended(code),
            Nursery::Running { pid: ours, .. } if *ours == pid => {
                log::error!("the nursery, process {pid}, died: {how}; the next worker comes from a new one");
                self.nursery = Nursery::Down;
            }
            _ => return false,
        }
        true
    }

    fn exec(&self, holder: &mut KeyHolder) -> Outcome<Starting<NurseryRequest, NurseryReply>> {
        let setup = self.setup.as_ref().ok_or_else(|| Failure::system("start a worker", "no setup yet"))?;
        let signing = holder.channel()?;
        Starting::exec("the nursery", &self.program, &[VERSION], &[setup.as_fd(), signing.worker.as_fd()])
            .map_err(|e| Failure::system(format!("start {}", self.program.display()), e))
    }

    fn could_not_start(&self, failure: Failure) -> Failure {
        failure.context(format!("start {}", self.program.display()))
    }

    /// Whether there is a user for one more worker.
    pub fn has_user(&self) -> bool {
        self.uids.has_one()
    }

    /// Starts a worker for a connection, with a channel to `holder`; [`Spawner::has_nursery`] said that it can.
    pub fn start(&mut self, tcp: &TcpStream, holder: &mut KeyHolder) -> Outcome<Started> {
        // Whoever cleans up below /run may have taken it away.
        if !self.root.is_dir() {
            empty_root()?;
        }
        let uid = self
            .uids
            .take()
            .ok_or_else(|| Failure::system("start a worker", "every user ID of worker_uids is in use"))?;
        let started = self.order(tcp, uid, holder);
        if started.is_err() {
            self.uids.release(uid);
        }
        started
    }

    fn order(&mut self, tcp: &TcpStream, uid: u32, holder: &mut KeyHolder) -> Outcome<Started> {
        let failed = |e| Failure::system("start a worker", e);
        let (channel, theirs) = seqpacket::pair().map_err(failed)?;
        let number = self.ordered;
        self.ordered += 1;
        let Nursery::Running { pid: nursery, channel: orders } = &self.nursery else {
            return Err(Failure::system("start a worker", "there is no nursery"));
        };
        let signing = holder.channel()?;
        let order = NurseryRequest::Start { uid, number };
        let fds = [theirs.as_fd(), tcp.as_fd(), signing.worker.as_fd()];
        let answer = match orders.send(&order, &fds) {
            Ok(true) => answer(orders),
            Ok(false) => Err(Failure::system("start a worker", "the nursery doesn't read")),
            Err(error) => Err(failed(error)),
        };
        match answer {
            Ok(NurseryReply::Started { pid }) => {
                let queues = self.queues.names(number);
                Ok(Started { pid, channel, uid, signing: signing.channel, queues })
            }
            Ok(NurseryReply::Failed { text }) => Err(Failure::system("start a worker", text)),
            Ok(NurseryReply::Ready) | Err(_) => {
                // Stuck or gone: the next worker comes from a new one. This one may be there all the same.
                if self.astray.len() == MOST_ASTRAY {
                    self.astray.pop_front();
                }
                self.astray.push_back(self.queues.names(number));
                let _ = kill(Pid::from_raw(*nursery), Signal::SIGKILL);
                self.nursery = Nursery::Down;
                Err(answer
                    .err()
                    .unwrap_or_else(|| Failure::system("start a worker", "the nursery is confused")))
            }
        }
    }

    /// A worker failed by this host's fault, which may be its user's: another server of this host may have the same, and
    /// have used up what the kernel allows each for queues. The next ones are taken from somewhere else.
    pub fn change_users(&mut self) {
        if let Ok(random) = random::bytes() {
            self.uids.jump(random);
        }
    }

    /// Takes a user back. No process of it may be left.
    pub fn release(&mut self, uid: u32) {
        self.uids.release(uid);
    }
}

/// What the nursery says to an order. It is our own code on our own host, and has nothing else to do: the guard waits for
/// it as it would for a fork of its own.
fn answer(nursery: &NurseryGuardEnd) -> Outcome<NurseryReply> {
    let failed = |why: &str| Failure::system("wait for the nursery", why);
    match nursery.wait(clock::now() + FORK_WAIT) {
        Ok(Incoming::Message(reply, _)) => Ok(reply),
        Ok(Incoming::Nothing) => Err(failed("it doesn't answer")),
        Ok(Incoming::Closed) => Err(failed("it is gone")),
        Err(violation) => Err(failed(&format!("it sent {violation}"))),
    }
}

/// What clients are pushed.
pub fn settings(config: &ServerConfig) -> Settings {
    Settings {
        routes: config.push.routes.clone(),
        dns: config.push.dns.clone(),
        idle: config.idle.map(|idle| u32::try_from(idle.as_secs()).unwrap_or(u32::MAX)),
    }
}

/// The program that is nursery, worker and key holder.
pub fn worker_program() -> Outcome<PathBuf> {
    let here = fs::read_link("/proc/self/exe").map_err(|e| Failure::system("find our own program", e))?;
    let program = here.with_file_name("tunguard-worker");
    if program.is_file() {
        return Ok(program);
    }
    let text = format!("{} is missing: it is installed beside tunguard-guard", program.display());
    Err(Failure::new(Exit::Version, text))
}

/// An empty directory that nobody but root can put anything into.
pub fn empty_root() -> Outcome<PathBuf> {
    let root = Path::new(EMPTY_ROOT);
    let failed = |e| Failure::system(format!("prepare the workers' empty root {EMPTY_ROOT}"), e);
    fs::create_dir_all(root).map_err(failed)?;
    fs::set_permissions(root, fs::Permissions::from_mode(0o555)).map_err(failed)?;
    let meta = fs::symlink_metadata(root).map_err(failed)?;
    let empty = fs::read_dir(root).map_err(failed)?.next().is_none();
    if meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o022 == 0 && empty {
        return Ok(root.to_owned());
    }
    Err(Failure::system(
        format!("prepare the workers' empty root {EMPTY_ROOT}"),
        "it must be an empty directory of root's: empty or remove it",
    ))
}

const EMPTY_ROOT: &str = "/run/tunguard/empty";
/// Workers that nobody knows of, at once.
const MOST_ASTRAY: usize = 64;
/// For one fork.
const FORK_WAIT: Duration = Duration::from_secs(1);
