//! The entrance: what [`Gate`](crate::gate::Gate) decides of a connection is done here, until it has a worker. Nothing is
//! read of it.

use std::collections::HashMap;
use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::libc::{POLLRDHUP, linger};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use tunguard::sys::clock;
use tunguard::sys::poller::Interest;
use tunguard::time::Time;
use tunguard::{random, rigged};

use crate::gate::{Failed, Refusal, Source as Origin, Stage, Verdict};
use crate::run::{Guard, Source};

/// When new connections are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepting {
    /// At once.
    Yes,
    /// No worker can be started; again at that time.
    Paused(Time),
    /// The server stops.
    No,
}

/// Connections without a worker, by the gate's numbers.
pub type Waiting = HashMap<u64, (TcpStream, SocketAddr)>;

impl Guard {
    pub(crate) fn accept_clients(&mut self) {
        // A few at a time: traffic goes on meanwhile.
        for _ in 0..CONNECTIONS_PER_TURN {
            // Nobody could show whom he talks to: connections wait where they are.
            if let Some(at) = self.trust.holder.rests_until() {
                return self.accept_later(Accepting::Paused(at));
            }
            match self.listener.accept() {
                Ok((tcp, peer)) => {
                    rigged::read_orders();
                    rigged::point("guard.accepted");
                    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                    self.judge(tcp, peer);
                    if self.accepting != Accepting::Yes {
                        return;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if matches!(e.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(e) => return self.pause(&format!("can't accept connections: {e}")),
            }
        }
    }

    fn judge(&mut self, tcp: TcpStream, peer: SocketAddr) {
        // Without randomness everybody is unlucky.
        let luck = random::bytes().map_or(0, u16::from_le_bytes);
        self.prepare_to_serve();
        match self.gate.handle_connection(peer.ip(), luck, clock::now()) {
            Verdict::Serve => self.serve_client(&tcp, peer),
            Verdict::Wait(number) => {
                self.waiting.insert(number, (tcp, peer));
            }
            Verdict::Refuse(why) => self.turn_away(&tcp, peer, why),
        }
        self.close_waiting();
    }

    /// Without key holder, nursery or a user there are no workers: the gate is shut until all are there. Key holder and
    /// nursery are started; a user is free again when a worker has ended, and those of sessions that drain soon do.
    fn prepare_to_serve(&mut self) {
        let holder = &mut self.trust.holder;
        let ready = match holder.is_ready() {
            true => self.spawner.has_nursery(holder, &self.poller),
            false => Ok(false),
        };
        let has_user = self.spawner.has_user();
        if !has_user && !self.gate.is_shut() {
            self.mention(format_args!(
                "every user ID of worker_uids is in use: whoever connects waits until a worker has ended"
            ));
        }
        self.gate.set_shut(!has_user || !matches!(ready, Ok(true)));
        if let Err(failure) = ready {
            self.pause(&failure.text);
        }
    }

    /// When the next key holder or nursery is to be started, or its time to start is over.
    pub(crate) fn next_start(&self) -> Option<Time> {
        let (holder, nursery) = (self.trust.holder.deadline(), self.spawner.deadline());
        [holder, nursery, self.reloads.deadline()].into_iter().flatten().min()
    }

    /// A process that starts has said something, or has ended, or its time may be over.
    pub(crate) fn see_to_starts(&mut self, now: Time) {
        self.trust.holder.poll(now, &self.poller);
        if let Some(started) = self.spawner.poll(now, &self.poller) {
            if let Err(failure) = &started {
                self.pause(&failure.text);
            }
            self.finish_reload(started);
        }
        self.go_on_reloading(now);
        self.serve_waiting();
    }

    /// Makes a worker for a connection that holds a place.
    fn serve_client(&mut self, tcp: &TcpStream, peer: SocketAddr) {
        match self.spawner.start(tcp, &mut self.trust.holder) {
            Ok(started) => {
                if self.starts.worked() {
                    log::info!("workers can be started again");
                }
                self.take_in(started, peer);
            }
            Err(failure) => {
                self.gate.handle_gone(peer.ip(), Stage::Handshake, clock::now());
                self.pause(&failure.text);
            }
        }
    }

    /// No worker can be started for a while, because of `why`.
    pub(crate) fn pause(&mut self, why: &str) {
        let (until, news) = self.starts.failed(why, clock::now());
        if news {
            log::error!("nobody is let in for the moment: {why}");
        }
        self.accept_later(Accepting::Paused(until));
    }

    pub(crate) fn accept_later(&mut self, when: Accepting) {
        if self.accepting == Accepting::No {
            return;
        }
        self.accepting = when;
        self.gate.set_shut(true);
        let _ = self.poller.modify(self.listener.as_fd(), Source::Listener.token(), Interest::Nothing);
        if when == Accepting::No {
            self.waiting.clear();
        }
    }

    /// A pause is over.
    pub(crate) fn open_listener(&mut self) {
        self.accepting = Accepting::Yes;
        let _ = self.poller.modify(self.listener.as_fd(), Source::Listener.token(), Interest::Read);
        self.serve_waiting();
    }

    /// A place may have become free: whoever has waited for one gets it.
    pub(crate) fn serve_waiting(&mut self) {
        while self.accepting == Accepting::Yes && self.gate.waiting() > 0 {
            // Each time: who was served just now may have got the last user.
            self.prepare_to_serve();
            let Some(number) = self.gate.poll_next(clock::now()) else { return };
            let Some((tcp, peer)) = self.waiting.remove(&number) else { continue };
            if hung_up(&tcp) {
                if !self.gate.was_held_up(number) {
                    self.charge(peer.ip(), Failed::Left);
                }
                self.gate.handle_gone(peer.ip(), Stage::Handshake, clock::now());
            } else {
                self.serve_client(&tcp, peer);
            }
        }
    }

    /// Closes what waits no longer.
    pub(crate) fn close_waiting(&mut self) {
        while let Some((number, why)) = self.gate.poll_dropped(clock::now()) {
            if let Some((tcp, peer)) = self.waiting.remove(&number) {
                self.turn_away(&tcp, peer, why);
            }
        }
    }

    /// A client failed, or its worker did.
    pub(crate) fn charge(&mut self, from: IpAddr, how: Failed) {
        if self.gate.handle_failed(from, how, clock::now()) {
            self.mention(format_args!("{} is refused for a while: {}", Origin::of(from), Refusal::Penalised));
        }
        self.close_waiting();
    }

    fn turn_away(&mut self, tcp: &TcpStream, peer: SocketAddr, why: Refusal) {
        // Closed by a reset: nothing of it stays, neither here nor in the kernel.
        let _ = setsockopt(tcp, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 });
        self.mention(format_args!("{peer} turned away: {why}"));
    }

    /// A line about a connection that came to nothing: strangers can make many, so these lines have a budget.
    pub(crate) fn mention(&mut self, line: fmt::Arguments<'_>) {
        if let Some(suppressed) = self.strangers.spend(clock::now()) {
            if suppressed > 0 {
                log::info!("{suppressed} more connections came to nothing");
            }
            log::info!("{line}");
        }
    }
}

/// Whether the other end is gone already; what it sent stays unread.
fn hung_up(tcp: &TcpStream) -> bool {
    // Not among nix's flags, so whatever comes is seen as none of them, or as POLLHUP or POLLERR.
    let mut fds = [PollFd::new(tcp.as_fd(), PollFlags::from_bits_retain(POLLRDHUP))];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    fds[0].revents().is_none_or(|seen| !seen.is_empty())
}

/// When something that doesn't work is tried again, and whether its failure is news.
#[derive(Debug, Default)]
pub struct Tries {
    /// What was said last, and how often it failed since.
    failing: Option<(String, u32)>,
}

impl Tries {
    /// It failed because of `why`: when to try again, and whether that cause is news.
    pub fn failed(&mut self, why: &str, now: Time) -> (Time, bool) {
        let times = self.failing.as_ref().map_or(0, |(_, times)| *times);
        let news = self.failing.as_ref().is_none_or(|(cause, _)| cause != why);
        self.failing = Some((why.to_owned(), times + 1));
        (now + (FIRST_PAUSE * 2_u32.pow(times.min(10))).min(LONGEST_PAUSE), news)
    }

    /// It works; `true` where it didn't before.
    pub fn worked(&mut self) -> bool {
        self.failing.take().is_some()
    }
}

const CONNECTIONS_PER_TURN: usize = 4;
/// After the system ran out of descriptors or processes, which may be over soon.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn who_hung_up_is_seen_by_it_without_reading() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let client = || {
            let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connects");
            (client, listener.accept().expect("a connection").0)
        };
        let ((mut one, at_one), (two, at_two)) = (client(), client());
        assert!(!hung_up(&at_one) && !hung_up(&at_two));
        one.write_all(b"hello").expect("sends");
        drop(two);
        // Each returns when what was done at the other end is here.
        assert_eq!(at_one.peek(&mut [0; 5]).expect("what was sent"), 5);
        assert_eq!(at_two.peek(&mut [0]).expect("the end"), 0);
        assert!(!hung_up(&at_one), "it only speaks");
        assert!(hung_up(&at_two));
    }

    #[test]
    fn what_fails_is_tried_less_and_less_and_each_cause_is_news_once() {
        let mut tries = Tries::default();
        let now = Time::default();
        let mut wait = |why| {
            let (at, news) = tries.failed(why, now);
            (at.since(now).as_millis(), news)
        };
        assert_eq!(wait("no memory"), (200, true));
        assert_eq!(wait("no memory"), (400, false));
        assert_eq!(wait("no file"), (800, true));
        assert_eq!((0..40).map(|_| wait("no file")).last(), Some((5_000, false)));
        assert!(tries.worked() && !tries.worked());
        assert_eq!(tries.failed("no file", now), (now + FIRST_PAUSE, true));
    }
}
