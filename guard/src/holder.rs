//! The key holder, as the guard sees it: started with the key's file, asked for a channel for each connection, watched,
//! and replaced when there is another key. The guard opens that file and never reads it.

use std::collections::VecDeque;
use std::fmt;
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
    CHANNEL_LIFE, HolderGuardEnd, HolderReply, HolderRequest, HolderSetup, KEY_HOLDER, Misuse, MisuseGuardEnd,
};
use tunguard::sandbox::Means;
use tunguard::sys::poller::Poller;
use tunguard::sys::seqpacket::{self, Incoming};
use tunguard::sys::{clock, memfd};
use tunguard::time::Time;
use tunguard::tls::server_key::KeyNames;
use tunguard::tls::{Certificates, KeySource};

use crate::spawn::{empty_root, worker_program};
use crate::starting::Starting;

/// The process that signs for the server.
pub struct KeyHolder {
    program: PathBuf,
    jail: Jail,
    /// With what it is started again.
    told: Told,
    state: State,
    rest: Rest,
    replaced: Replaced,
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

/// One that starts, to take over.
pub struct Heir {
    told: Told,
    start: Start,
}

type Start = Starting<HolderRequest, HolderReply>;

enum State {
    /// There is none, or not for long: [`Rest`] says when the next one is started.
    Down,
    Starting(Start),
    Running(Running),
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
    /// Starts it, with the key of `certificates`, and waits for it; what is wrong with that key is its failure. A key that
    /// stands in the configuration itself is taken out of there.
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
            state: State::Down,
            rest: Rest::default(),
            replaced: Replaced::default(),
            next: 0,
            told,
            misuse,
        };
        let (pid, channel) = holder.exec(&holder.told)?.wait()?;
        holder.run(pid, channel);
        Ok(holder)
    }

    /// Starts another one, with the key of `certificates` as `config` names it now; when it is ready it may
    /// [`KeyHolder::follow`].
    pub fn heir(
        &self,
        config: &mut ServerConfig,
        certificates: &Certificates,
        poller: &Poller,
    ) -> Outcome<Heir> {
        let key = match &config.tls.key {
            // It was read before, and its text isn't there any more.
            Pem::Inline { text, .. } if text.is_empty() => self.told.key.try_clone()?,
            _ => KeySource::open(&mut config.tls.key)?,
        };
        let told = Told::new(key, config, certificates, &self.jail)?;
        let start = self.exec(&told)?.watched_by(poller)?;
        Ok(Heir { told, start })
    }

    /// One that is ready takes the place of the old one, which finishes what it has begun, and is killed where it isn't
    /// gone then.
    pub fn follow(&mut self, heir: Heir) {
        match std::mem::replace(&mut self.state, State::Down) {
            State::Starting(start) => start.abandon(),
            State::Running(running) => self.replaced.add(running.pid, clock::now()),
            State::Down => {}
        }
        self.told = heir.told;
        self.rest = Rest::default();
        self.run(heir.start.pid(), heir.start.into_channel());
    }

    /// None is needed any more that isn't at work: those that start or were replaced are killed.
    pub fn abandon(&mut self) {
        if let State::Starting(start) = &self.state {
            start.kill();
        }
        self.replaced.take_all().into_iter().for_each(end_at_once);
    }

    /// Whether there is one to give channels to.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Running(_))
    }

    /// A channel for one signature, known to the key holder.
    pub fn channel(&mut self) -> Outcome<Signing> {
        let failed = |e| Failure::system("make a channel to the key holder", e);
        let (theirs, ours) = seqpacket::pair::<(), ()>().map_err(failed)?;
        let State::Running(running) = &self.state else {
            return Err(Failure::system("ask the key holder for a channel", "there is none"));
        };
        let channel = self.next;
        self.next += 1;
        match running.channel.send(&HolderRequest::Serve { channel }, &[theirs.as_fd()]) {
            Ok(true) => Ok(Signing { channel, worker: ours }),
            Ok(false) => {
                // Stuck: its end is seen as a process, and the next one is started then.
                end_at_once(running.pid);
                Err(Failure::system("ask the key holder for a channel", "it doesn't read"))
            }
            Err(error) => Err(Failure::system("ask the key holder for a channel", error)),
        }
    }

    /// A process has ended, with `code` if with any: whether it was the key holder. Another one is started at once, or
    /// after a pause where they die one after the other. [`KeyHolder::poll`] comes next.
    pub fn ended(&mut self, pid: i32, how: impl fmt::Display, code: Option<i32>, poller: &Poller) -> bool {
        match &mut self.state {
            State::Starting(start) if start.pid() == pid => start.ended(code),
            State::Running(running) if running.pid == pid => {
                let now = clock::now();
                let why = match running.channel.receive(false) {
                    Ok(Incoming::Message(HolderReply::Failed { text }, _)) => format!(": {text}"),
                    _ => String::new(),
                };
                log::error!(
                    "the key holder, process {pid}, died: {how}{why}; handshakes that waited for it fail"
                );
                self.rest.fell(now, now.since(running.since));
                self.state = State::Down;
                self.handle_timeout(now, poller);
            }
            _ => return self.replaced.ended(pid),
        }
        true
    }

    /// Looks after one that starts, if there is one: whether it is ready is to be seen by [`KeyHolder::is_ready`].
    pub fn poll(&mut self, now: Time, poller: &Poller) {
        let State::Starting(start) = &mut self.state else { return };
        let Some(outcome) = start.poll(now, poller) else { return };
        match (outcome, std::mem::replace(&mut self.state, State::Down)) {
            (Ok(()), State::Starting(start)) => self.run(start.pid(), start.into_channel()),
            (Err(failure), _) => self.could_not_start(now, failure),
            _ => {}
        }
    }

    /// Starts another one where there is none and the pause is over, and kills those that should be gone.
    pub fn handle_timeout(&mut self, now: Time, poller: &Poller) {
        for pid in self.replaced.late(now) {
            log::warn!("the key holder that was replaced, process {pid}, doesn't end in time: killed");
            end_at_once(pid);
        }
        if self.rests_until().is_none_or(|until| now < until) {
            return;
        }
        match self.exec(&self.told).and_then(|start| start.watched_by(poller)) {
            Ok(start) => self.state = State::Starting(start),
            Err(failure) => self.could_not_start(now, failure),
        }
    }

    /// When [`KeyHolder::poll`] or [`KeyHolder::handle_timeout`] is due.
    pub fn deadline(&self) -> Option<Time> {
        let next = match &self.state {
            State::Starting(start) => Some(start.deadline()),
            _ => self.rests_until(),
        };
        [next, self.replaced.deadline()].into_iter().flatten().min()
    }

    /// Where key holders don't live: until when no other one is started.
    pub fn rests_until(&self) -> Option<Time> {
        self.rest.until.filter(|_| matches!(self.state, State::Down))
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

    fn run(&mut self, pid: i32, channel: HolderGuardEnd) {
        log::debug!("the key holder is process {pid}");
        self.state = State::Running(Running { pid, channel, since: clock::now() });
    }

    fn could_not_start(&mut self, now: Time, failure: Failure) {
        log::error!(
            "{}",
            failure.context("start the key holder again (SIGHUP reads key and certificate anew)")
        );
        // However long it took: it never stood.
        self.rest.fell(now, Duration::ZERO);
    }

    fn exec(&self, told: &Told) -> Outcome<Start> {
        let fds = [told.setup.as_fd(), told.key.as_fd(), self.misuse.1.as_fd()];
        Starting::exec("the key holder", &self.program, &[VERSION, KEY_HOLDER], &fds)
            .map_err(|e| Failure::system(format!("start {} as the key holder", self.program.display()), e))
    }
}

impl Heir {
    /// Its process has ended, with `code` if with any; `false`: it was another one.
    pub fn ended(&mut self, pid: i32, code: Option<i32>) -> bool {
        let ours = self.start.pid() == pid;
        if ours {
            self.start.ended(code);
        }
        ours
    }

    /// Whether it is ready, or why it won't be; `None`: it isn't known yet.
    pub fn poll(&mut self, now: Time, poller: &Poller) -> Option<Outcome<()>> {
        self.start.poll(now, poller)
    }

    /// When [`Heir::poll`] is due at the latest.
    pub fn deadline(&self) -> Time {
        self.start.deadline()
    }

    /// It won't take over.
    pub fn abandon(self) {
        self.start.abandon();
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

/// Those that finish what they have begun, by age: process, and until when.
#[derive(Debug, Default)]
struct Replaced(VecDeque<(i32, Time)>);

impl Replaced {
    fn add(&mut self, pid: i32, now: Time) {
        self.0.push_back((pid, now + CHANNEL_LIFE + END_GRACE));
    }

    /// Whether it was one of these that has ended.
    fn ended(&mut self, pid: i32) -> bool {
        let before = self.0.len();
        self.0.retain(|(one, _)| *one != pid);
        self.0.len() < before
    }

    /// Those whose time is over; they are forgotten.
    fn late(&mut self, now: Time) -> Vec<i32> {
        let late = self.0.partition_point(|(_, until)| *until <= now);
        self.0.drain(..late).map(|(pid, _)| pid).collect()
    }

    fn take_all(&mut self) -> Vec<i32> {
        self.0.drain(..).map(|(pid, _)| pid).collect()
    }

    fn deadline(&self) -> Option<Time> {
        self.0.front().map(|(_, until)| *until)
    }
}

/// Ends a process whose end isn't known to us yet: until then nobody else can have its number.
fn end_at_once(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
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

/// From the end of the last channel to that of the process.
const END_GRACE: Duration = Duration::from_secs(2);
/// Who stood for so long isn't followed by a pause.
const STEADY: Duration = Duration::from_secs(5);
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_was_replaced_has_the_time_of_its_last_channel() {
        let (now, second) = (clock::now(), Duration::from_secs(1));
        let mut replaced = Replaced::default();
        assert_eq!((replaced.deadline(), replaced.late(now)), (None, vec![]));
        for (pid, at) in [(1, now), (2, now + second), (3, now + second * 2)] {
            replaced.add(pid, at);
        }
        let due = now + CHANNEL_LIFE + END_GRACE;
        assert_eq!((replaced.deadline(), replaced.late(now + CHANNEL_LIFE)), (Some(due), vec![]));
        assert_eq!((replaced.ended(2), replaced.ended(2), replaced.ended(4)), (true, false, false));
        assert_eq!(replaced.late(due + second), [1]);
        assert_eq!(replaced.deadline(), Some(due + second * 2));
        assert!(!replaced.ended(1), "it is forgotten");
        assert_eq!((replaced.take_all(), replaced.deadline()), (vec![3], None));
    }

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
