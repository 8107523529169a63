//! Workers' lives: a connection that was let in ([`crate::entrance`]) has a worker, a worker that has ended gives back
//! what it held, and one that doesn't end in time is ended.
//!
//! ```text
//! accept -> Handshake -> Granted -> Established -> Draining -> Ending -> Over -> reaped
//!              |  own deadline, then ours |           |          | GOODBYE |
//!              +--------------------------+-----------+----------+---------+--> killed -> reaped
//! ```

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use tunguard::ipc::HANDSHAKE_SECONDS;
use tunguard::rigged;
use tunguard::sys::clock;
use tunguard::sys::poller::Interest;
use tunguard::sys::seccomp::FORBIDDEN_CALL;
use tunguard::time::Time;
use tunguard::tls;
use tunguard::wire::control::Reason;

use crate::clients::{Phase, Worker};
use crate::gate::Failed;
use crate::leases;
use crate::run::{Guard, Source};

impl Guard {
    /// A connection has its worker.
    pub(crate) fn take_in(&mut self, started: crate::spawn::Started, peer: SocketAddr) {
        let now = clock::now();
        log::debug!("{peer} connected, worker {}", started.pid);
        let key = self.workers.insert(Worker::new(started, peer, now));
        self.note_deadline(now + Duration::from_secs(HANDSHAKE_SECONDS) + HANDSHAKE_GRACE);
        let Some(worker) = self.workers.get_mut(key) else { return };
        if let Err(error) =
            self.poller.add(worker.channel.as_fd(), Source::Worker(key).token(), Interest::Read)
        {
            log::error!("can't watch a worker: {error}");
            self.kill(key);
        }
        rigged::point("guard.worker-started");
    }

    /// Collects workers that have ended, and gives back what they held.
    pub(crate) fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => self.worker_gone(pid, End::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => self.worker_gone(pid, End::Signal(signal)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    log::error!("can't wait for workers: {errno}");
                    return;
                }
            }
        }
    }

    /// A process has ended.
    fn worker_gone(&mut self, pid: Pid, how: End) {
        let (raw, code) = (pid.as_raw(), how.code());
        if self.spawner.ended(raw, how, code)
            || self.trust.holder.ended(raw, how, code, &self.poller)
            || self.reloads.ended(raw, code)
        {
            return self.see_to_starts(clock::now());
        }
        // Its last words may still be in the channel.
        if let Some(key) = self.workers.key_of(pid.as_raw()) {
            self.hear_last_words(key);
        }
        let Some((key, worker)) = self.workers.remove_pid(pid.as_raw()) else {
            return self.spawner.forget_astray();
        };
        let (from, now) = (worker.tcp_peer.ip(), clock::now());
        match how.is_expected(worker.explained) {
            true => log::debug!("worker {pid} of {} is gone: {how}", worker.label()),
            false => {
                log::error!("worker {pid} of {} died: {how}", worker.label());
                if how.is_crash() {
                    self.charge(from, Failed::Crash);
                }
                if let Some(id) = worker.ticketed {
                    self.tickets.forget(&id);
                }
                // If somebody is trying to take workers over, each try finds another one.
                self.spawner.renew();
            }
        }
        self.gate.handle_gone(from, worker.stage, now);
        let _ = self.poller.remove(worker.channel.as_fd());
        // They have their names until the worker registers them.
        worker.queues.unlink();
        self.spawner.release(worker.uid);
        if let Some(session) = worker.session {
            for net in session.nets() {
                self.routes.remove(net, key);
            }
            self.leases.release(&leases::holder(&session.name, session.seat));
            self.meters.leave(&session.name, session.rates, key);
            self.slots.release(session.id);
            if worker.phase == Phase::Established {
                self.relieve(&session.name, session.seat);
            }
        }
        self.serve_waiting();
    }

    /// Kills a worker; its end is then seen like any other.
    pub(crate) fn kill(&mut self, key: u64) {
        if let Some(worker) = self.workers.get_mut(key) {
            worker.kill_at = None;
            let _ = kill(Pid::from_raw(worker.pid), Signal::SIGKILL);
        }
    }

    pub(crate) fn kill_all(&mut self) {
        let all: Vec<u64> = self.workers.iter().map(|(key, _)| key).collect();
        for key in all {
            self.kill(key);
        }
    }

    pub(crate) fn end_all_workers(&mut self) {
        self.kill_all();
        while self.workers.len() > 0 {
            match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => {
                    self.worker_gone(pid, End::ServerStops);
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Ends sessions whose certificate is not valid any more.
    pub(crate) fn end_expired(&mut self) {
        let today = tls::time::wall_clock();
        let expired: Vec<u64> = self
            .workers
            .iter()
            .filter(|(_, w)| w.session.as_ref().is_some_and(|s| s.cert.not_after < today))
            .map(|(key, _)| key)
            .collect();
        for key in expired {
            self.end_worker(key, Reason::Expired);
        }
    }

    /// Kills workers whose time is over, and notes when to look again.
    pub(crate) fn kill_late(&mut self, now: Time) {
        let mut late = Vec::new();
        for (_, worker) in self.workers.iter_mut().filter(|(_, w)| kill_time(w).is_some_and(|at| now >= at)) {
            log::warn!("worker {} of {} doesn't end in time: killed", worker.pid, worker.label());
            if worker.phase == Phase::Handshake {
                late.push(worker.tcp_peer.ip());
            }
            worker.explained = true;
            worker.phase = Phase::Over;
            worker.kill_at = None;
            let _ = kill(Pid::from_raw(worker.pid), Signal::SIGKILL);
        }
        self.next_kill = self.workers.iter().filter_map(|(_, w)| kill_time(w)).min();
        for from in late {
            self.charge(from, Failed::Deadline);
        }
    }

    /// A worker got a deadline: the earliest is kept, so that not all have to be looked through at each turn.
    pub(crate) fn note_deadline(&mut self, at: Time) {
        self.next_kill = Some(self.next_kill.map_or(at, |earliest| earliest.min(at)));
    }
}

/// How a process of ours ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Code(i32),
    Signal(Signal),
    /// With all others.
    ServerStops,
}

impl End {
    fn code(self) -> Option<i32> {
        match self {
            End::Code(code) => Some(code),
            End::Signal(_) | End::ServerStops => None,
        }
    }

    /// Whether that is the end of one that was `explained`, if it was. Whatever was said before: nothing of ours makes a
    /// call that its sandbox forbids.
    fn is_expected(self, explained: bool) -> bool {
        explained && self != End::Signal(Signal::SIGSYS)
    }

    /// Whether that was its own doing: one killed by somebody else, as when memory runs out, did nothing.
    fn is_crash(self) -> bool {
        match self {
            End::Code(_) => true,
            End::Signal(signal) => signal != Signal::SIGKILL,
            End::ServerStops => false,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Code(code) => write!(f, "exit code {code}"),
            End::Signal(Signal::SIGSYS) => write!(f, "signal SIGSYS, {FORBIDDEN_CALL}"),
            End::Signal(signal) => write!(f, "signal {}", signal.as_str()),
            End::ServerStops => f.write_str("the server stops"),
        }
    }
}

/// When a worker is killed: when its goodbye takes too long, or its handshake far longer than its own deadline.
fn kill_time(worker: &Worker) -> Option<Time> {
    match worker.phase {
        Phase::Handshake | Phase::Granted => {
            Some(worker.started + Duration::from_secs(HANDSHAKE_SECONDS) + HANDSHAKE_GRACE)
        }
        Phase::Established => None,
        Phase::Draining | Phase::Ending | Phase::Over => worker.kill_at,
    }
}

const HANDSHAKE_GRACE: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clients::samples;

    #[test]
    fn who_died_of_itself_crashed_and_who_was_killed_did_not() {
        assert!(End::Code(0).is_crash() && End::Code(1).is_crash());
        assert!(End::Signal(Signal::SIGSEGV).is_crash() && End::Signal(Signal::SIGSYS).is_crash());
        assert!(!End::Signal(Signal::SIGKILL).is_crash() && !End::ServerStops.is_crash());
        assert_eq!(End::ServerStops.to_string(), "the server stops");
    }

    #[test]
    fn nothing_explains_a_forbidden_call_and_silence_no_end_at_all() {
        for how in [End::Code(0), End::Code(1), End::Signal(Signal::SIGKILL), End::ServerStops] {
            assert!(how.is_expected(true) && !how.is_expected(false), "{how}");
        }
        let forbidden = End::Signal(Signal::SIGSYS);
        assert!(!forbidden.is_expected(true) && !forbidden.is_expected(false));
    }

    #[test]
    fn a_worker_without_a_session_has_its_handshakes_time_and_one_that_is_to_end_its_own() {
        let at = |seconds| Time::from_nanos(seconds * 1_000_000_000);
        let mut worker = samples::worker(1, at(100));
        for (phase, own, expected) in [
            (Phase::Handshake, None, Some(at(100 + HANDSHAKE_SECONDS + 3))),
            (Phase::Granted, Some(at(1)), Some(at(100 + HANDSHAKE_SECONDS + 3))),
            (Phase::Established, Some(at(1)), None),
            (Phase::Draining, Some(at(200)), Some(at(200))),
            (Phase::Ending, Some(at(201)), Some(at(201))),
            (Phase::Over, Some(at(202)), Some(at(202))),
            (Phase::Over, None, None),
        ] {
            (worker.phase, worker.kill_at) = (phase, own);
            assert_eq!(kill_time(&worker), expected, "{phase:?}");
        }
    }

    #[test]
    fn a_forbidden_call_is_called_that() {
        let told = End::Signal(Signal::SIGSYS).to_string();
        assert!(told.starts_with("signal SIGSYS, a system call that its sandbox forbids"), "{told}");
        assert_eq!(End::Signal(Signal::SIGSEGV).to_string(), "signal SIGSEGV");
        assert_eq!(End::Code(7).to_string(), "exit code 7");
    }
}
