//! A process of ours between its exec and its first word, which is that it is ready, or why it isn't.
//!
//! ```text
//! exec --> says that it is ready ------------------------> ready
//!   \----> says why not, or closes its channel --> ends -> failed, with its exit code
//!   \----> says nothing until the deadline --> killed ---> failed
//! ```
//! The guard serves its sessions meanwhile: the channel is in its epoll set, the end comes as that of any process, and
//! the deadline is among its deadlines. Each of them is followed by [`Starting::poll`].

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;

use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::NurseryReply;
use tunguard::key_ipc::HolderReply;
use tunguard::sys::poller::{Interest, Poller};
use tunguard::sys::seqpacket::{Channel, Incoming, Violation};
use tunguard::sys::{clock, seqpacket, spawn};
use tunguard::time::Time;

use crate::run::Source;

/// What a process says first.
pub trait FirstWord {
    /// That it is ready, or why it can't be.
    fn judge(self) -> Result<(), String>;
}

impl FirstWord for HolderReply {
    fn judge(self) -> Result<(), String> {
        match self {
            HolderReply::Ready => Ok(()),
            HolderReply::Failed { text } => Err(text),
        }
    }
}

impl FirstWord for NurseryReply {
    fn judge(self) -> Result<(), String> {
        match self {
            NurseryReply::Ready => Ok(()),
            NurseryReply::Failed { text } => Err(text),
            other @ NurseryReply::Started { .. } => Err(format!("it answered {other:?}")),
        }
    }
}

/// One that isn't ready yet, with our end of the channel to it.
pub struct Starting<Tx, Rx> {
    pid: i32,
    channel: Channel<Tx, Rx>,
    who: &'static str,
    deadline: Time,
    /// It won't be ready, and why: its exit code is to come, until the deadline.
    fails: Option<String>,
    /// It has ended, with this exit code if with any.
    ended: Option<Option<i32>>,
}

impl<Tx: Serialize, Rx: DeserializeOwned + FirstWord> Starting<Tx, Rx> {
    /// Starts `program`, called `who` in failures, with the other end of the channel as its first descriptor and `fds`
    /// behind that.
    pub fn exec<A: AsRef<OsStr>>(
        who: &'static str,
        program: &Path,
        args: &[A],
        fds: &[BorrowedFd<'_>],
    ) -> std::io::Result<Starting<Tx, Rx>> {
        let (channel, theirs) = seqpacket::pair()?;
        let child = spawn::spawn(program, args, &[&[theirs.as_fd()], fds].concat())?;
        let deadline = clock::now() + READY_WAIT;
        Ok(Starting { pid: child.id() as i32, channel, who, deadline, fails: None, ended: None })
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Has `poller` tell of what it says.
    pub fn watched_by(self, poller: &Poller) -> Outcome<Starting<Tx, Rx>> {
        match poller.add(self.channel.as_fd(), Source::Starting.token(), Interest::Read) {
            Ok(()) => Ok(self),
            Err(error) => {
                self.abandon();
                Err(Failure::system("watch a process that starts", error))
            }
        }
    }

    /// When [`Starting::poll`] is due at the latest.
    pub fn deadline(&self) -> Time {
        self.deadline
    }

    /// Takes in that it has ended; [`Starting::poll`] comes next.
    pub fn ended(&mut self, code: Option<i32>) {
        self.ended = Some(code);
    }

    /// What has become of it; `None`: it isn't known yet. With `Ok`, [`Starting::into_channel`] comes next, with a failure
    /// there is no more to it.
    pub fn poll(&mut self, now: Time, poller: &Poller) -> Option<Outcome<()>> {
        if self.fails.is_none() {
            let heard = self.channel.receive(false);
            if self.hear(heard, now) {
                let _ = poller.remove(self.channel.as_fd());
                // Ready, and gone: all the same to whoever needs it.
                return Some(if self.ended.is_some() {
                    Err(self.failure(&self.waited("it is gone")))
                } else {
                    Ok(())
                });
            }
            if self.fails.is_some() {
                let _ = poller.remove(self.channel.as_fd());
            }
        }
        if self.ended.is_none() && now < self.deadline {
            return None;
        }
        Some(Err(self.give_up()))
    }

    /// Waits for it, and serves nobody meanwhile: before there is anybody.
    pub fn wait(mut self) -> Outcome<(i32, Channel<Tx, Rx>)> {
        let heard = self.channel.wait(self.deadline);
        if self.hear(heard, clock::now()) {
            return Ok((self.pid, self.channel));
        }
        while self.ended.is_none() && clock::now() < self.deadline {
            match waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(5)),
                Ok(WaitStatus::Exited(_, code)) => self.ended(Some(code)),
                _ => self.ended(None),
            }
        }
        Err(self.give_up())
    }

    /// The channel of one that is ready.
    pub fn into_channel(self) -> Channel<Tx, Rx> {
        self.channel
    }

    /// Nobody needs it any more.
    pub fn abandon(self) {
        self.kill();
    }

    /// Whether it is ready.
    fn hear(&mut self, heard: Result<Incoming<Rx>, Violation>, now: Time) -> bool {
        let why = match heard {
            Ok(Incoming::Message(word, _)) => match word.judge() {
                Ok(()) => return true,
                Err(why) => why,
            },
            Ok(Incoming::Nothing) => return false,
            Ok(Incoming::Closed) => self.waited("it is gone"),
            Err(violation) => self.waited(&format!("it sent {violation}")),
        };
        self.fails = Some(why);
        self.deadline = now + EXIT_WAIT;
        false
    }

    fn give_up(&mut self) -> Failure {
        self.kill();
        match self.fails.take() {
            Some(why) => self.failure(&why),
            None if self.ended.is_some() => self.failure(&self.waited("it is gone")),
            None => self.failure(&self.waited("it doesn't answer")),
        }
    }

    fn waited(&self, why: &str) -> String {
        format!("wait for {}: {why}", self.who)
    }

    /// With the exit code that it ended with, where that says more than that it did.
    fn failure(&self, why: &str) -> Failure {
        let code = self.ended.flatten().and_then(|code| u8::try_from(code).ok());
        Failure::new(code.and_then(Exit::from_code).unwrap_or(Exit::System), why)
    }

    /// Kills it, if it hasn't ended.
    pub fn kill(&self) {
        // Until its end is known to us, nobody else can have its number.
        if self.ended.is_none() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

/// From a process's exec to its first word: the cipher library starts, certificates or a key are read.
const READY_WAIT: Duration = Duration::from_secs(10);
/// From its last word to its end.
const EXIT_WAIT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    /// One that is said to be a process that nobody has, with the other end of its channel.
    fn start(now: Time) -> (Starting<(), HolderReply>, Channel<HolderReply, ()>, Poller) {
        let (channel, theirs): (_, OwnedFd) = seqpacket::pair().expect("a pair");
        let starting = Starting {
            pid: i32::MAX,
            channel,
            who: "the key holder",
            deadline: now + READY_WAIT,
            fails: None,
            ended: None,
        };
        let poller = Poller::new(4).expect("an epoll set");
        let starting = starting.watched_by(&poller).expect("watched");
        (starting, Channel::from_fd(theirs), poller)
    }

    fn failure(exit: Exit, text: &str) -> Option<Outcome<()>> {
        Some(Err(Failure::new(exit, text)))
    }

    #[test]
    fn a_first_word_is_waited_for_until_the_deadline() {
        let now = clock::now();
        let (mut one, theirs, mut poller) = start(now);
        assert_eq!(one.poll(now, &poller), None);
        assert!(theirs.send(&HolderReply::Ready, &[]).expect("sent"));
        assert_eq!(poller.wait(Some(Duration::ZERO)).expect("waits").count(), 1);
        assert_eq!(one.poll(now, &poller), Some(Ok(())));

        let (mut one, _theirs, poller) = start(now);
        assert_eq!(one.poll(now + READY_WAIT / 2, &poller), None);
        let late = failure(Exit::System, "wait for the key holder: it doesn't answer");
        assert_eq!(one.poll(one.deadline(), &poller), late);
    }

    #[test]
    fn a_failure_has_the_exit_code_of_the_process_where_that_comes_in_time() {
        let now = clock::now();
        let text = || "gate.key: no".to_owned();
        for (code, exit) in [
            (Some(Some(Exit::KeyMismatch as i32)), Exit::KeyMismatch),
            (Some(Some(77)), Exit::System),
            (Some(None), Exit::System),
            (None, Exit::System),
        ] {
            let (mut one, theirs, mut poller) = start(now);
            assert!(theirs.send(&HolderReply::Failed { text: text() }, &[]).expect("sent"));
            drop(theirs);
            assert_eq!(one.poll(now, &poller), None);
            let ready = poller.wait(Some(Duration::ZERO)).expect("waits").count();
            assert_eq!(ready, 0, "it would be heard again and again");
            if let Some(code) = code {
                one.ended(code);
            }
            let then = if code.is_some() { now } else { one.deadline() };
            assert_eq!(one.poll(then, &poller), failure(exit, &text()), "{code:?}");
        }
    }

    #[test]
    fn one_that_ends_without_a_word_has_failed() {
        let now = clock::now();
        let gone = failure(Exit::System, "wait for the key holder: it is gone");
        let (mut one, theirs, poller) = start(now);
        drop(theirs);
        one.ended(None);
        assert_eq!(one.poll(now, &poller), gone);
        // Its end may be known before its channel's is.
        let (mut one, _theirs, poller) = start(now);
        one.ended(None);
        assert_eq!(one.poll(now, &poller), gone);
    }

    #[test]
    fn ready_is_one_word_and_all_others_say_why_not() {
        assert_eq!(HolderReply::Ready.judge(), Ok(()));
        assert_eq!(NurseryReply::Ready.judge(), Ok(()));
        let text = "no room".to_owned();
        assert_eq!(NurseryReply::Failed { text: text.clone() }.judge(), Err(text));
        assert!(
            NurseryReply::Started { pid: 7 }.judge().expect_err("no order was given").contains("Started")
        );
    }

    fn shell(script: &str) -> Starting<(), HolderReply> {
        Starting::exec("the key holder", Path::new("/bin/sh"), &["-c", script], &[]).expect("a shell")
    }

    #[test]
    fn waiting_goes_on_from_the_end_of_the_channel_to_the_exit_code() {
        let code = Exit::KeyMismatch as i32;
        let gone = Failure::new(Exit::KeyMismatch, "wait for the key holder: it is gone");
        let came = shell(&format!("exec 3>&-; sleep 0.1; exit {code}")).wait().map(drop);
        assert_eq!(came, Err(gone));
    }

    #[test]
    fn one_that_is_abandoned_is_killed() {
        let one = shell("exec sleep 5");
        let pid = Pid::from_raw(one.pid());
        one.abandon();
        let end = waitpid(pid, None).expect("a child of ours");
        assert_eq!(end, WaitStatus::Signaled(pid, Signal::SIGKILL, false));
    }
}
