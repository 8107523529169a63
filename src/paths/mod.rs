//! Following the peer: the paths it was heard on, which of them carry data, and how that changes. After RFC 9000
//! section 9 (migration), RFC 9146 section 6 and RFC 9853 (which packets may move a peer). No I/O and no clock.
//!
//! The server follows. An authenticated packet that is newer than all before and comes from another address
//! *nominates* it ([`Paths::heard`]). Until challenges have shown who is where, data goes both ways, to the new
//! address no more than three times of what came from it.
//!
//! ```text
//!   nominated --answers, and it was a REBIND or the old one doesn't--> in use
//!       |  \--the old one answers, or nobody within 3 s------------> forgotten
//!       +--answered before in this session--> in use at once, challenged meanwhile
//! ```
//!
//! The client leads: its shell says which ways to the server there are, best first ([`Paths::set_ways`]), and the
//! server is told by REBIND and PATH_STATUS.
//!
//! Both ends look whether a path that carries data still answers, where there is another to go over to.

mod alive;
mod balance;
mod follow;
mod keep;
mod known;
mod lead;
mod mtu;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use balance::Flows;
use follow::{NOMINATED_FOR, NOMINATION_EVERY, NOMINATIONS, Nomination, REBINDS};
pub use keep::{Keepalive, Silence};
pub use known::Known;

use crate::budget::Budget;
use crate::keys::{Role, Secret};
use crate::path::{INSIDE, Path};
use crate::time::Time;
use crate::wire::inband::{InBand, PathStatus};

/// How the client uses several ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The best one, and another when that fails.
    #[default]
    Failover,
    /// Every packet by each of them.
    Redundant,
    /// Each inner flow by one of them.
    Balance,
}

type Key = (SocketAddr, u8);

/// Something to send on a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Say {
    /// What.
    pub message: InBand,
    /// Where.
    pub path: Path,
    /// Bytes of the whole datagram at the least.
    pub pad: usize,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathEvent {
    /// Data goes to another path.
    Moved {
        /// The one before.
        old: Option<Path>,
        /// The one now.
        new: Path,
    },
    /// The path in use answered.
    Proven {
        /// Round trip.
        rtt: Duration,
    },
    /// The server sees the client somewhere else than before, or for the first time.
    Seen {
        /// Where it saw it before.
        before: Option<SocketAddr>,
        /// Where it sees it.
        seen: SocketAddr,
    },
    /// There is a NAT on a path of the client's.
    Translated {
        /// Where the server sees the client.
        seen: SocketAddr,
        /// The client sends after so much silence, to begin with.
        silence: Duration,
    },
    /// The path in use is slow to answer, and there is no other: is there none at all?
    Suspect,
    /// The path in use doesn't answer, and there is no other.
    Unreachable,
    /// So large packets go in one piece where data goes now.
    Mtu {
        /// Bytes, IP header included.
        mtu: usize,
    },
}

/// Where the peer is.
///
/// After every call with a time: drain `poll_say` and `poll_event`, then wait until `poll_timeout`.
pub struct Paths {
    role: Role,
    mode: Mode,
    keepalive: Keepalive,
    /// The one in use is first.
    list: Vec<Known>,
    /// Places in `list` that data is sent to.
    targets: Vec<usize>,
    nomination: Option<Nomination>,
    nominations: Budget,
    rebinds: Budget,
    /// An address that the control connection comes from.
    vouched: Option<IpAddr>,
    /// The path in use is the control connection, and only because packets came with the client's Hello.
    early: bool,
    /// Key and number of challenges.
    nonces: (Secret, u64),
    /// Data was last sent.
    sent: Time,
    /// Of the device, where paths are to be measured.
    inner_mtu: Option<usize>,
    /// What [`Paths::mtu`] and [`Paths::narrow`] say.
    mtu: Option<usize>,
    narrow: Option<usize>,
    /// No search is under way.
    settled: bool,
    said: VecDeque<Say>,
    events: VecDeque<PathEvent>,
    flows: Flows,
}

impl Paths {
    /// Of the server: the peer is wherever it is heard. `vouched` is the address of its control connection, which
    /// the TCP handshake has proven.
    pub fn following(nonces: Secret, vouched: Option<IpAddr>) -> Paths {
        Paths::new(Role::Server, nonces, vouched)
    }

    /// Of the client: the server is where it was dialled.
    pub fn dialled(nonces: Secret, path: Path, now: Time) -> Paths {
        let mut paths = Paths::new(Role::Client, nonces, None);
        paths.list.push(Known::dialled(path, now, 0));
        paths.refresh();
        paths
    }

    fn new(role: Role, nonces: Secret, vouched: Option<IpAddr>) -> Paths {
        Paths {
            role,
            mode: Mode::default(),
            keepalive: Keepalive::default(),
            list: Vec::new(),
            targets: Vec::new(),
            nomination: None,
            nominations: Budget::new(NOMINATIONS, NOMINATION_EVERY, Time::default()),
            rebinds: Budget::new(REBINDS, NOMINATION_EVERY, Time::default()),
            vouched,
            early: false,
            nonces: (nonces, 0),
            sent: Time::default(),
            inner_mtu: None,
            mtu: None,
            narrow: None,
            settled: false,
            said: VecDeque::new(),
            events: VecDeque::new(),
            flows: Flows::default(),
        }
    }

    /// The path in use.
    pub fn active(&self) -> Option<&Known> {
        self.list.first()
    }

    /// All paths known, the one in use first.
    pub fn known(&self) -> &[Known] {
        &self.list
    }

    /// On how many paths the next data goes out.
    pub fn targets(&self) -> usize {
        self.targets.len()
    }

    /// The `n`th of them, if `bytes` may be sent there; takes them as sent.
    pub fn target(&mut self, now: Time, n: usize, bytes: usize) -> Option<Path> {
        self.sent = now;
        let known = self.list.get_mut(*self.targets.get(n)?)?;
        if !known.spend(bytes) {
            return None;
        }
        known.carries(now);
        Some(known.path)
    }

    /// Another path, for data that none of the targets' sockets took.
    pub fn way_out(&mut self, now: Time) -> Option<Path> {
        let at = (0..self.list.len()).find(|at| self.is_spare(*at) && !self.targets.contains(at))?;
        self.list[at].carries(now);
        Some(self.list[at].path)
    }

    /// Takes `bytes` of an in-band message as sent on `path`; `false` where they may not be.
    pub fn spend(&mut self, path: Path, bytes: usize) -> bool {
        match self.find(path.key()) {
            Some(at) => self.list[at].spend(bytes),
            // Forgotten since: nobody knows any more what came from there. The client's ways are all its own choice.
            None => self.role == Role::Client,
        }
    }

    /// An authenticated datagram of `len` bytes came by `path`, with the in-band message `said` or a packet; `newest`
    /// says whether its counter is above all before it.
    pub fn heard(&mut self, now: Time, path: Path, newest: bool, len: usize, said: Option<InBand>) {
        if self.early {
            self.hear_after_early(now, path);
        }
        let known = self.find(path.key());
        let Some(at) = known.or_else(|| self.remember(now, path, newest, said)) else { return };
        self.list[at].heard(now, path, len);
        match said {
            Some(InBand::PathStatus(status)) => self.hear_status(now, at, status),
            Some(InBand::PathReport { packets, bytes }) => self.hear_report(now, at, packets, bytes),
            Some(InBand::PathResponse(nonce, seen)) => self.hear_response(now, at, nonce, seen),
            Some(InBand::PathChallenge(nonce)) => {
                self.respond(at, nonce);
                self.hear_elsewhere(now, at, newest);
            }
            Some(InBand::Keepalive(nonce, millis)) => {
                self.respond_later(now, at, nonce, millis);
                self.hear_elsewhere(now, at, newest);
            }
            Some(InBand::Rebind) if newest && self.role == Role::Server => self.hear_rebind(now, at),
            Some(_) => self.hear_elsewhere(now, at, newest),
            None => {
                self.list[at].load.heard(len);
                self.hear_elsewhere(now, at, newest);
            }
        }
    }

    /// A place for a path that wasn't heard before, if it gets one.
    fn remember(&mut self, now: Time, path: Path, newest: bool, said: Option<InBand>) -> Option<usize> {
        // The server is one of those we dialled; nothing else is remembered.
        if self.role == Role::Client {
            return None;
        }
        if self.list.is_empty() {
            let proven = self.vouched == Some(path.remote.ip());
            self.list.push(Known { proven, ..Known::new(path, now, 0) });
            self.events.push_back(PathEvent::Moved { old: None, new: path });
            self.ask(now, 0, false);
            self.refresh();
            return Some(0);
        }
        let budget = match said {
            Some(InBand::Rebind) => &mut self.rebinds,
            _ => &mut self.nominations,
        };
        // An older one may be a copy that somebody delayed.
        if !newest || !budget.take(now) {
            return None;
        }
        self.add(now, path);
        Some(self.list.len() - 1)
    }

    /// The path at `at` is the one in use from now on.
    fn bring_first(&mut self, now: Time, at: usize, before: Path) {
        self.list.swap(0, at);
        self.list[0].since = now;
        self.list[0].lost.take_if(|lost| lost.back.is_some());
        self.events.push_back(PathEvent::Moved { old: Some(before), new: self.list[0].path });
        self.refresh();
    }

    fn hear_elsewhere(&mut self, now: Time, at: usize, newest: bool) {
        // One that is lost may still lead here, but not back.
        let known = &self.list[at];
        if at > 0 && newest && self.role == Role::Server && !known.is_further() && !known.is_lost() {
            self.nominate(now, at, false);
        }
    }

    /// Answers on the path the challenge came by; bounded, as the peer may send more than we can.
    fn respond(&mut self, at: usize, nonce: [u8; 8]) {
        if self.said.len() >= MOST_SAID {
            return;
        }
        let path = self.list[at].path;
        // Whoever asks there takes it for the one we are at.
        if self.role == Role::Client && at > 0 {
            let status = self.word_on(at);
            self.said.push_back(Say { message: InBand::PathStatus(status), path, pad: 0 });
        }
        let seen = path.remote;
        self.said.push_back(Say { message: InBand::PathResponse(nonce, seen), path, pad: 0 });
    }

    /// Asks on the path in use whether the peer is there.
    pub fn probe(&mut self, now: Time) {
        if self.list.first().is_some_and(|active| active.asked.is_none()) {
            self.ask(now, 0, false);
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Time) {
        for at in 0..self.list.len() {
            self.look_at(now, at);
            self.look_at_size(now, at);
        }
        self.keep_up(now);
        if let Some(n) = &mut self.nomination {
            n.graced |= now >= n.grace;
        }
        self.decide(now);
        self.choose(now);
        self.report(now);
    }

    /// When [`Paths::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        let each = (0..self.list.len()).filter_map(|at| self.due(at));
        let nomination = self.nomination.map(|n| match n.graced {
            false => n.grace.min(n.since + NOMINATED_FOR),
            true => n.since + NOMINATED_FOR,
        });
        let sizes = (0..self.list.len()).filter_map(|at| self.size_due(at));
        let others = nomination.into_iter().chain(self.report_at()).chain(self.keep_timeout());
        each.chain(sizes).chain(others).min()
    }

    /// The next thing to send.
    pub fn poll_say(&mut self) -> Option<Say> {
        self.said.pop_front()
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<PathEvent> {
        self.events.pop_front()
    }

    // Who is who.

    fn find(&self, key: Key) -> Option<usize> {
        self.list.iter().position(|known| known.path.key() == key)
    }

    /// The client has it for more than one at a time to be used.
    fn is_other(&self, at: usize) -> bool {
        let status = self.list[at].status;
        self.role == Role::Client || status.is_some_and(|status| status != PathStatus::Dropped)
    }

    /// Data can go by it right away.
    fn is_usable(&self, at: usize) -> bool {
        self.is_spare(at) && !self.list[at].is_lost()
    }

    /// Better than nothing: it answers, if only since a moment ago.
    fn is_spare(&self, at: usize) -> bool {
        let known = &self.list[at];
        known.proven && known.lost.is_none_or(|lost| lost.back.is_some()) && (at == 0 || self.is_other(at))
    }

    /// Works out where data goes.
    fn refresh(&mut self) {
        self.targets.clear();
        if self.list.is_empty() {
            return;
        }
        self.targets.push(0);
        if let Some(n) = self.nomination {
            let both = if n.rebind && n.before.is_some() { None } else { Some(n.before.unwrap_or(n.key)) };
            self.targets.extend(both.and_then(|key| self.find(key)).filter(|at| *at > 0));
        }
        let copies = self.role == Role::Client && self.mode == Mode::Redundant;
        let suspect = self.list[0].asked.as_ref().is_some_and(|asked| asked.tries.len() > 1);
        let mut spare = suspect;
        for at in 1..self.list.len() {
            let copy = match self.role {
                Role::Client => copies && self.list[at].path.carrier != INSIDE,
                Role::Server => self.list[at].status == Some(PathStatus::Copy),
            };
            // A copy may go where something answered but a moment ago: it can't be worse than none.
            let wanted = self.is_usable(at) || (copy || spare) && self.is_spare(at);
            if wanted && !self.targets.contains(&at) && (copy || std::mem::take(&mut spare)) {
                self.targets.push(at);
            }
        }
        self.weigh();
    }
}

/// A REBIND is as long as this, so that data may follow it to where it came from before that is proven.
pub const REBIND_BYTES: usize = 1_200;
/// Messages that wait to be sent.
const MOST_SAID: usize = 32;
