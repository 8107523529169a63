//! Starting workers, each with a user of its own.

use std::collections::VecDeque;
use std::fs;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};
use serde::Serialize;
use serde::de::DeserializeOwned;

use tunguard::config::server::ServerConfig;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::{GuardEnd, NurseryGuardEnd, NurseryReply, NurseryRequest, QueuePlan, Setup};
use tunguard::sandbox::Means;
use tunguard::sys::mq::unlink;
use tunguard::sys::seqpacket::{Channel, Incoming};
use tunguard::sys::{clock, memfd, seqpacket, spawn};
use tunguard::wire::control::Settings;
use tunguard::{VERSION, random};

use crate::holder::KeyHolder;
use crate::host::Queues;
use crate::trust::Trust;
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
    astray: VecDeque<(String, Option<String>)>,
    /// Workers that were ordered so far.
    ordered: u64,
    setup: Option<OwnedFd>,
    nursery: Option<Nursery>,
}

/// The process that forks the workers.
struct Nursery {
    pid: i32,
    channel: NurseryGuardEnd,
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
    /// Names of its queues, to the worker and, where the guard writes to the device, from it.
    pub queues: (String, Option<String>),
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
            nursery: None,
        })
    }

    /// Writes down what workers started from now on are told. Where that fails, there are none.
    pub fn prepare(&mut self, config: &ServerConfig, trust: &mut Trust, uso: bool) -> Outcome<()> {
        // Before anything can fail: what was told before doesn't hold any more.
        self.setup = None;
        self.renew();
        let setup = Setup {
            guard: getpid().as_raw(),
            certificates: trust.certificates.clone(),
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
        self.nursery(&mut trust.holder).map(drop)
    }

    /// Gives the nursery up: the next worker comes from a new one, with the newest setup, and with code and data at
    /// other places in memory.
    pub fn renew(&mut self) {
        // It ends when its channel does.
        self.nursery = None;
    }

    /// A process has ended that nobody knows: it may be a worker whose nursery ended before it could tell. Its queues lose
    /// their names, which nobody else ever has.
    pub fn forget_astray(&mut self) {
        self.astray.retain(|(down, up)| {
            let removed = std::iter::once(down).chain(up).filter(|name| unlink(name).is_ok()).count();
            removed == 0
        });
    }

    /// A process has ended: whether it was the nursery.
    pub fn ended(&mut self, pid: i32) -> bool {
        let ours = self.nursery.as_ref().is_some_and(|n| n.pid == pid);
        if ours {
            self.nursery = None;
        }
        ours
    }

    fn nursery(&mut self, holder: &mut KeyHolder) -> Outcome<&Nursery> {
        if self.nursery.is_none() {
            self.nursery = Some(self.start_nursery(holder)?);
        }
        self.nursery.as_ref().ok_or_else(|| Failure::system("start a worker", "there is no nursery"))
    }

    fn start_nursery(&self, holder: &mut KeyHolder) -> Outcome<Nursery> {
        let setup = self.setup.as_ref().ok_or_else(|| Failure::system("start a worker", "no setup yet"))?;
        let failed = |e| Failure::system(format!("start {}", self.program.display()), e);
        let (channel, theirs) = seqpacket::pair().map_err(failed)?;
        let signing = holder.channel()?;
        let fds = [theirs.as_fd(), setup.as_fd(), signing.worker.as_fd()];
        let mut child = spawn::spawn(&self.program, &[VERSION], &fds).map_err(failed)?;
        drop(theirs);
        let nursery = Nursery { pid: child.id() as i32, channel };
        drop(signing);
        match nursery.answer(READY_WAIT) {
            Ok(NurseryReply::Ready) => Ok(nursery),
            answer => {
                // One that says why it fails ends by itself, with the exit code that fits.
                if !matches!(answer, Ok(NurseryReply::Failed { .. })) {
                    let _ = child.kill();
                }
                let exit = exit_of(&mut child);
                let text = match answer {
                    Ok(NurseryReply::Failed { text }) => text,
                    Ok(other) => format!("it answered {other:?}"),
                    Err(failure) => failure.text,
                };
                Err(Failure::new(exit, format!("start {}: {text}", self.program.display())))
            }
        }
    }

    /// Starts a worker for a connection, with a channel to `holder`.
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
        let nursery = self.nursery(holder)?;
        let signing = holder.channel()?;
        let order = NurseryRequest::Start { uid, number };
        let fds = [theirs.as_fd(), tcp.as_fd(), signing.worker.as_fd()];
        let sent = nursery.channel.send(&order, &fds);
        let answer = match sent {
            Ok(true) => nursery.answer(FORK_WAIT),
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
                if let Some(stuck) = self.nursery.take() {
                    let _ = kill(Pid::from_raw(stuck.pid), Signal::SIGKILL);
                }
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

impl Nursery {
    fn answer(&self, patience: Duration) -> Outcome<NurseryReply> {
        answer(&self.channel, "the nursery", patience)
    }
}

/// What a process of ours says, within `patience`. It is our own code on our own host, and has nothing else to do: the
/// guard waits for it as it would for a fork of its own.
pub fn answer<Tx: Serialize, Rx: DeserializeOwned>(
    channel: &Channel<Tx, Rx>,
    who: &str,
    patience: Duration,
) -> Outcome<Rx> {
    let failed = |why: &str| Failure::system(format!("wait for {who}"), why);
    match channel.wait(clock::now() + patience) {
        Ok(Incoming::Message(reply, _)) => Ok(reply),
        Ok(Incoming::Nothing) => Err(failed("it doesn't answer")),
        Ok(Incoming::Closed) => Err(failed("it is gone")),
        Err(violation) => Err(failed(&format!("it sent {violation}"))),
    }
}

/// What a process of ours that is ending had to say by its exit code.
pub fn exit_of(child: &mut Child) -> Exit {
    // It is on its way: nobody waits for one that isn't.
    let until = clock::now() + EXIT_WAIT;
    while matches!(child.try_wait(), Ok(None)) && clock::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    let code = child.wait().ok().and_then(|status| status.code()).and_then(|code| u8::try_from(code).ok());
    code.and_then(Exit::from_code).unwrap_or(Exit::System)
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
/// From the nursery's exec to its first word: the cipher library starts, and certificates are read.
const READY_WAIT: Duration = Duration::from_secs(10);
/// From a process's last word to its end.
const EXIT_WAIT: Duration = Duration::from_secs(1);
/// Workers that nobody knows of, at once.
const MOST_ASTRAY: usize = 64;
/// For one fork.
const FORK_WAIT: Duration = Duration::from_secs(1);
