//! Starting workers, each with a user of its own.

use std::collections::HashSet;
use std::fs;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::getpid;

use tunguard::config::server::ServerConfig;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::{GuardEnd, Setup};
use tunguard::sys::{memfd, seqpacket, spawn};
use tunguard::wire::control::Settings;
use tunguard::{VERSION, random};

use crate::trust::Trust;

/// Starts workers.
pub struct Spawner {
    program: PathBuf,
    root: PathBuf,
    uids: Uids,
    setup: Option<OwnedFd>,
}

/// A worker that was started.
pub struct Started {
    /// Its process.
    pub pid: i32,
    /// Our end of the channel to it.
    pub channel: GuardEnd,
    /// Its user.
    pub uid: u32,
}

impl Spawner {
    /// Finds the worker's program and the empty directory workers are locked into.
    pub fn new(config: &ServerConfig) -> Outcome<Spawner> {
        Ok(Spawner {
            program: worker_program()?,
            root: empty_root()?,
            uids: Uids::new(config.worker_uids, random::bytes()?),
            setup: None,
        })
    }

    /// Writes down what workers started from now on are told.
    pub fn prepare(&mut self, config: &ServerConfig, trust: &Trust, uso: bool) -> Outcome<()> {
        let setup = Setup {
            guard: getpid().as_raw(),
            credentials: trust.credentials.clone(),
            root: self.root.clone(),
            suites: config.data.suites.clone(),
            mtu: config.mtu,
            settings: Settings { routes: config.push.routes.clone(), dns: config.push.dns.clone() },
            rekey_ms: config.data.rekey.as_millis() as u64,
            rekey_packets: config.data.rekey_packets,
            linger_ms: config.linger.as_millis() as u64,
            uso,
            log_level: log::max_level() as u8,
        };
        let bytes = memfd::sealed("tunguard-setup", &setup.encode());
        self.setup = Some(bytes.map_err(|e| Failure::system("write down the workers' setup", e))?);
        Ok(())
    }

    /// Starts a worker for a connection.
    pub fn start(&mut self, tcp: &TcpStream) -> Outcome<Started> {
        let setup = self.setup.as_ref().ok_or_else(|| Failure::system("start a worker", "no setup yet"))?;
        // Whoever cleans up below /run may have taken it away.
        if !self.root.is_dir() {
            empty_root()?;
        }
        let uid = self
            .uids
            .take()
            .ok_or_else(|| Failure::system("start a worker", "every user ID of worker_uids is in use"))?;
        let started = seqpacket::pair().and_then(|(channel, theirs)| {
            let fds = [theirs.as_fd(), tcp.as_fd(), setup.as_fd()];
            let child = spawn::spawn(&self.program, &[VERSION, &uid.to_string()], &fds)?;
            Ok(Started { pid: child.id() as i32, channel, uid })
        });
        started.map_err(|error| {
            self.uids.release(uid);
            Failure::system(format!("start {}", self.program.display()), error)
        })
    }

    /// Takes a user back. No process of it may be left.
    pub fn release(&mut self, uid: u32) {
        self.uids.release(uid);
    }
}

/// User IDs, used in turn, so that one rests as long as possible before it is used again.
struct Uids {
    first: u32,
    last: u32,
    next: u32,
    used: HashSet<u32>,
}

impl Uids {
    /// Starts anywhere: another guard of this host may have the same range, and RLIMIT_MSGQUEUE is charged by
    /// user across all of them.
    fn new((first, last): (u32, u32), random: [u8; 4]) -> Uids {
        let next = first + u32::from_le_bytes(random) % (last - first + 1);
        Uids { first, last, next, used: HashSet::new() }
    }

    fn take(&mut self) -> Option<u32> {
        for _ in 0..=self.last - self.first {
            let uid = self.next;
            self.next = if uid == self.last { self.first } else { uid + 1 };
            if self.used.insert(uid) {
                return Some(uid);
            }
        }
        None
    }

    fn release(&mut self, uid: u32) {
        self.used.remove(&uid);
    }
}

fn worker_program() -> Outcome<PathBuf> {
    let here = fs::read_link("/proc/self/exe").map_err(|e| Failure::system("find our own program", e))?;
    let program = here.with_file_name("tunguard-worker");
    if program.is_file() {
        return Ok(program);
    }
    let text = format!("{} is missing: it is installed beside tunguard-guard", program.display());
    Err(Failure::new(Exit::Version, text))
}

/// An empty directory that nobody but root can put anything into.
fn empty_root() -> Outcome<PathBuf> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_ids_rest_before_they_are_used_again() {
        let mut uids = Uids::new((70_000, 70_002), [0; 4]);
        assert_eq!([uids.take(), uids.take()], [Some(70_000), Some(70_001)]);
        uids.release(70_000);
        assert_eq!([uids.take(), uids.take(), uids.take()], [Some(70_002), Some(70_000), None]);
        uids.release(70_001);
        assert_eq!(uids.take(), Some(70_001));
    }
}
