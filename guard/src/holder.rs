//! The key holder, as the guard sees it: started with the key's file, asked for a channel for each connection, watched,
//! and replaced when there is another key. The guard opens that file and never reads it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use tunguard::VERSION;
use tunguard::config::common::Pem;
use tunguard::config::server::ServerConfig;
use tunguard::exit::{Failure, Outcome};
use tunguard::key_ipc::{
    HolderGuardEnd, HolderReply, HolderRequest, HolderSetup, KEY_HOLDER, Misuse, MisuseGuardEnd,
};
use tunguard::sandbox::Means;
use tunguard::sys::seqpacket::{self, Incoming};
use tunguard::sys::{clock, memfd, spawn};
use tunguard::time::Time;
use tunguard::tls::server_key::KeyNames;
use tunguard::tls::{Certificates, KeySource};

use crate::spawn::{answer, empty_root, exit_of, worker_program};

/// The process that signs for the server.
pub struct KeyHolder {
    program: PathBuf,
    jail: Jail,
    /// With what it is started again.
    told: Told,
    running: Option<Running>,
    rest: Rest,
    next: u64,
    /// Where it tells of misuse, one after the other: our end, and theirs.
    misuse: (MisuseGuardEnd, OwnedFd),
}

/// What it is locked in with.
struct Jail {
    uid: u32,
    root: PathBuf,
    landlock: Option<i32>,
}

/// What a key holder is given.
struct Told {
    setup: OwnedFd,
    /// Open from when it was checked: a file that is put in its place later is looked at when all are read again.
    key: KeySource,
}

/// One that is ready to take over.
pub struct Heir {
    told: Told,
    running: Running,
}

struct Running {
    pid: i32,
    channel: HolderGuardEnd,
    since: Time,
}

/// A connection's way to a signature.
pub struct Signing {
    /// Its number.
    pub channel: u64,
    /// The worker's end.
    pub worker: OwnedFd,
}

impl KeyHolder {
    /// Starts it, with the key of `certificates`; what is wrong with that key is its failure. A key that stands in the
    /// configuration itself is taken out of there.
    pub fn start(
        config: &mut ServerConfig,
        certificates: &Certificates,
        sandbox: Means,
    ) -> Outcome<KeyHolder> {
        let key = KeySource::open(&mut config.tls.key)?;
        let misuse = seqpacket::pair().map_err(|e| Failure::system("listen to the key holder", e))?;
        // The last user of the range is no worker's; where all of them share one, it is theirs.
        let uid = config.single_uid.unwrap_or(config.worker_uids.1);
        let jail = Jail { uid, root: empty_root()?, landlock: sandbox.landlock };
        let told = Told::new(key, config, certificates, &jail)?;
        let mut holder = KeyHolder {
            program: worker_program()?,
            jail,
            running: None,
            rest: Rest::default(),
            next: 0,
            told,
            misuse,
        };
        holder.running = Some(holder.exec(&holder.told)?);
        Ok(holder)
    }

    /// Starts another one, with the key of `certificates` as `config` names it now; it has nothing to do before
    /// [`KeyHolder::follow`], and ends where that isn't called.
    pub fn heir(&self, config: &mut ServerConfig, certificates: &Certificates) -> Outcome<Heir> {
        let key = match &config.tls.key {
            // It was read before, and its text isn't there any more.
            Pem::Inline { text, .. } if text.is_empty() => self.told.key.try_clone()?,
            _ => KeySource::open(&mut config.tls.key)?,
        };
        let told = Told::new(key, config, certificates, &self.jail)?;
        let running = self.exec(&told)?;
        Ok(Heir { told, running })
    }

    /// It takes the place of the old one, which finishes what it has begun.
    pub fn follow(&mut self, heir: Heir) {
        (self.running, self.told) = (Some(heir.running), heir.told);
        self.rest = Rest::default();
    }

    /// A channel for one signature, known to the key holder, which is started where there is none.
    pub fn channel(&mut self) -> Outcome<Signing> {
        let failed = |e| Failure::system("make a channel to the key holder", e);
        let (theirs, ours) = seqpacket::pair::<(), ()>().map_err(failed)?;
        if self.running.is_none() {
            self.start_again()?;
        }
        let channel = self.next;
        self.next += 1;
        let order = HolderRequest::Serve { channel };
        let sent = self.running.as_ref().map(|running| running.channel.send(&order, &[theirs.as_fd()]));
        match sent {
            Some(Ok(true)) => Ok(Signing { channel, worker: ours }),
            Some(Ok(false)) => {
                // Stuck: its end is seen as a process, and the next one is started then.
                self.kill();
                Err(Failure::system("ask the key holder for a channel", "it doesn't read"))
            }
            Some(Err(error)) => Err(Failure::system("ask the key holder for a channel", error)),
            None => Err(Failure::system("ask the key holder for a channel", "there is none")),
        }
    }

    /// A process has ended: whether it was the key holder. Another one is started at once, or after a pause where they
    /// die one after the other.
    pub fn ended(&mut self, pid: i32, how: &str) -> bool {
        let Some(running) = self.running.take_if(|running| running.pid == pid) else { return false };
        let now = clock::now();
        let why = match running.channel.receive(false) {
            Ok(Incoming::Message(HolderReply::Failed { text }, _)) => format!(": {text}"),
            _ => String::new(),
        };
        log::error!("the key holder, process {pid}, died: {how}{why}; handshakes that waited for it fail");
        self.rest.fell(now, now.since(running.since));
        self.handle_timeout(now);
        true
    }

    /// Starts another one where there is none and the pause is over.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.deadline().is_some_and(|at| now >= at)
            && let Err(failure) = self.start_again()
        {
            log::error!("{failure}");
        }
    }

    /// When another one is to be started.
    pub fn deadline(&self) -> Option<Time> {
        self.rest.until.filter(|_| self.running.is_none())
    }

    /// Until when nobody can be let in, as key holders don't live.
    pub fn rests_until(&self, now: Time) -> Option<Time> {
        self.deadline().filter(|until| now < *until)
    }

    /// Where misuse is told.
    pub fn misuse_fd(&self) -> BorrowedFd<'_> {
        self.misuse.0.as_fd()
    }

    /// The next report of misuse.
    pub fn misused(&self) -> Option<Misuse> {
        match self.misuse.0.receive(false) {
            Ok(Incoming::Message(misuse, _)) => Some(misuse),
            // Ours on both ends: nothing else can be in it.
            _ => None,
        }
    }

    fn start_again(&mut self) -> Outcome<()> {
        let started = clock::now();
        match self.exec(&self.told) {
            Ok(running) => {
                self.running = Some(running);
                Ok(())
            }
            Err(failure) => {
                self.rest.fell(clock::now(), clock::now().since(started));
                Err(failure.context("start the key holder again (SIGHUP reads key and certificate anew)"))
            }
        }
    }

    fn exec(&self, told: &Told) -> Outcome<Running> {
        let failed = |e| Failure::system(format!("start {} as the key holder", self.program.display()), e);
        let (channel, theirs) = seqpacket::pair().map_err(failed)?;
        let fds = [theirs.as_fd(), told.setup.as_fd(), told.key.as_fd(), self.misuse.1.as_fd()];
        let mut child = spawn::spawn(&self.program, &[VERSION, KEY_HOLDER], &fds).map_err(failed)?;
        drop(theirs);
        match answer(&channel, "the key holder", READY_WAIT) {
            Ok(HolderReply::Ready) => {
                let pid = child.id() as i32;
                log::debug!("the key holder is process {pid}");
                Ok(Running { pid, channel, since: clock::now() })
            }
            Ok(HolderReply::Failed { text }) => Err(Failure::new(exit_of(&mut child), text)),
            Err(failure) => {
                let _ = child.kill();
                Err(Failure::new(exit_of(&mut child), failure.text))
            }
        }
    }

    fn kill(&self) {
        if let Some(running) = &self.running {
            let _ = kill(Pid::from_raw(running.pid), Signal::SIGKILL);
        }
    }
}

impl Told {
    fn new(key: KeySource, config: &ServerConfig, certificates: &Certificates, jail: &Jail) -> Outcome<Told> {
        let setup = HolderSetup {
            guard: getpid().as_raw(),
            uid: jail.uid,
            root: jail.root.clone(),
            cert: certificates.cert.clone(),
            names: KeyNames { key: key.name().to_owned(), cert: config.tls.cert.name("tls.cert") },
            channels: channels_for(config),
            landlock: jail.landlock,
        };
        let setup = memfd::sealed("tunguard-key-holder", &setup.encode());
        let setup = setup.map_err(|e| Failure::system("write down the key holder's setup", e))?;
        Ok(Told { setup, key })
    }
}

/// A worker has its handshake behind it, and its channel still open, for as long as the handshake's time; the nursery
/// needs one too.
fn channels_for(config: &ServerConfig) -> usize {
    2 * usize::from(config.max_handshakes) + 2
}

/// How long to wait before the next one is started.
#[derive(Debug, Default)]
struct Rest {
    pause: Duration,
    until: Option<Time>,
}

impl Rest {
    /// One has fallen, after it stood for `stood`.
    fn fell(&mut self, now: Time, stood: Duration) {
        self.pause = match stood >= STEADY {
            true => Duration::ZERO,
            false => (2 * self.pause).clamp(SHORTEST_PAUSE, LONGEST_PAUSE),
        };
        self.until = Some(now + self.pause);
    }
}

/// From its exec to its first word.
const READY_WAIT: Duration = Duration::from_secs(10);
/// Who stood for so long isn't followed by a pause.
const STEADY: Duration = Duration::from_secs(5);
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_falls_again_and_again_rests_longer_and_longer() {
        let now = clock::now();
        let mut rest = Rest::default();
        rest.fell(now, Duration::from_secs(3600));
        assert_eq!(rest.until, Some(now), "at once");
        let mut pauses = Vec::new();
        for _ in 0..8 {
            rest.fell(now, Duration::from_secs(1));
            pauses.push(rest.pause.as_millis());
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 3200, 5000]);
        rest.fell(now, STEADY);
        assert_eq!(rest.until, Some(now));
    }
}
