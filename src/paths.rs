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

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use crate::keys::{Role, Secret};
use crate::path::{INSIDE, Path};
use crate::time::Time;
use crate::wire::inband::{InBand, PathStatus};

/// What is known of a path.
#[derive(Clone, Debug)]
pub struct Known {
    /// The path.
    pub path: Path,
    /// When it became the one in use, or was first heard of.
    pub since: Time,
    /// Round trip, smoothed; `None` until a challenge was answered.
    pub rtt: Option<Duration>,
    /// A challenge was answered on it in this session, or its address is vouched for.
    proven: bool,
    /// When a challenge was last answered on it.
    answered: Option<Time>,
    /// What the peer said of it (to the server), or what we said of it (of the client).
    status: Option<PathStatus>,
    /// Nothing answers any more.
    lost: Option<Lost>,
    /// Bytes that may be sent to it before it is proven (RFC 9000 section 8.1).
    credit: u64,
    /// Place in the client's order.
    rank: usize,
    heard: Time,
    /// Data was sent then, and nothing was heard by it since.
    waiting: Option<Time>,
    asked: Option<Asked>,
    last_asked: Time,
}

#[derive(Clone, Copy, Debug)]
struct Lost {
    ask_at: Time,
    wait: Duration,
    /// It answers again since then; it has to do so for a while.
    back: Option<Time>,
}

/// A challenge, sent again and again with fresh bytes.
#[derive(Clone, Debug)]
struct Asked {
    since: Time,
    tries: Vec<([u8; 8], Time)>,
    again: Time,
    /// A REBIND goes with it.
    rebind: bool,
}

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

#[derive(Clone, Copy, Debug)]
struct Nomination {
    key: Key,
    /// The one before, where the peer was taken to be at the new one already.
    before: Option<Key>,
    /// The peer itself said that it moved.
    rebind: bool,
    since: Time,
    /// Until then the old path may still answer.
    grace: Time,
    /// That time is over.
    graced: bool,
}

type Key = (std::net::SocketAddr, u8);

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
    /// The path in use is slow to answer, and there is no other: is there none at all?
    Suspect,
    /// The path in use doesn't answer, and there is no other.
    Unreachable,
}

/// Where the peer is.
///
/// After every call with a time: drain `poll_say` and `poll_event`, then wait until `poll_timeout`.
pub struct Paths {
    role: Role,
    mode: Mode,
    /// The one in use is first.
    list: Vec<Known>,
    /// Places in `list` that data is sent to.
    targets: Vec<usize>,
    nomination: Option<Nomination>,
    bucket: Bucket,
    /// An address that the control connection comes from.
    vouched: Option<IpAddr>,
    /// Key and number of challenges.
    nonces: (Secret, u64),
    /// Data was last sent.
    sent: Time,
    said: VecDeque<Say>,
    events: VecDeque<PathEvent>,
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
            list: Vec::new(),
            targets: Vec::new(),
            nomination: None,
            bucket: Bucket { left: NOMINATIONS, since: Time::default() },
            vouched,
            nonces: (nonces, 0),
            sent: Time::default(),
            said: VecDeque::new(),
            events: VecDeque::new(),
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
        known.waiting.get_or_insert(now);
        Some(known.path)
    }

    /// Takes `bytes` of an in-band message as sent on `path`; `false` where they may not be.
    pub fn spend(&mut self, path: Path, bytes: usize) -> bool {
        let key = path.key();
        self.list.iter_mut().find(|k| k.path.key() == key).is_none_or(|known| known.spend(bytes))
    }

    /// An authenticated datagram of `len` bytes came by `path`, with the in-band message `said` or a packet; `newest`
    /// says whether its counter is above all before it.
    pub fn heard(&mut self, now: Time, path: Path, newest: bool, len: usize, said: Option<InBand>) {
        let at = self.find(path.key());
        match at {
            Some(at) => self.list[at].heard(now, path, len),
            // The server is one of those we dialled; nothing else is remembered.
            None if self.role == Role::Client => return,
            None if self.list.is_empty() => {
                let proven = self.vouched == Some(path.remote.ip());
                self.list.push(Known { proven, ..Known::new(path, now, 0) });
                self.list[0].heard(now, path, len);
                self.events.push_back(PathEvent::Moved { old: None, new: path });
                self.ask(now, 0, false);
                self.refresh();
            }
            // An older one may be a copy that somebody delayed.
            None if !newest => return,
            None => {
                if !self.bucket.take(now) {
                    return;
                }
                self.add(now, path);
                let last = self.list.len() - 1;
                self.list[last].heard(now, path, len);
            }
        }
        let Some(at) = self.find(path.key()) else { return };
        match said {
            Some(InBand::PathStatus(status)) => self.hear_status(now, at, status),
            Some(InBand::PathResponse(nonce)) => self.hear_response(now, at, nonce),
            Some(InBand::PathChallenge(nonce)) => {
                self.respond(at, nonce);
                self.hear_elsewhere(now, at, newest);
            }
            Some(InBand::Rebind) if newest && self.role == Role::Server => self.hear_rebind(now, at),
            _ => self.hear_elsewhere(now, at, newest),
        }
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
        self.said.push_back(Say { message: InBand::PathResponse(nonce), path, pad: 0 });
    }

    /// Asks on the path in use whether the peer is there.
    pub fn probe(&mut self, now: Time) {
        if self.list.first().is_some_and(|active| active.asked.is_none()) {
            self.ask(now, 0, false);
        }
    }

    /// The client may be somewhere else, although it uses the same path.
    pub fn rebind(&mut self, now: Time) {
        if !self.list.is_empty() {
            self.list[0].asked = None;
            self.ask(now, 0, true);
        }
    }

    /// The client's ways to the server are now these, best first. Sockets of a carrier that changed have new numbers,
    /// so that a way that is in the list already is one that didn't change. With none at all everything stays.
    pub fn set_ways(&mut self, now: Time, ways: &[Path]) {
        if ways.is_empty() {
            return;
        }
        for (rank, way) in ways.iter().enumerate() {
            match self.find(way.key()) {
                Some(at) => self.list[at].rank = rank,
                None => self.list.push(Known::dialled(*way, now, rank)),
            }
        }
        let gone = |known: &Known| !ways.iter().any(|way| way.key() == known.path.key());
        let moved = self.list.first().is_some_and(gone);
        let before = self.list.first().map(|active| active.path);
        self.list.retain(|known| !gone(known));
        if moved {
            // Whatever is first now: the best one has its turn below.
            let best = self.best();
            self.list.swap(0, best);
            self.use_first(now, before);
        }
        // The server is to know of each, and what it is for.
        for at in 0..self.list.len() {
            let known = &self.list[at];
            let news = known.answered.is_none() || known.status.is_none() && self.list.len() > 1;
            if news && known.asked.is_none() {
                self.ask(now, at, false);
            }
        }
        self.choose(now);
    }

    /// How the client uses several ways.
    pub fn set_mode(&mut self, now: Time, mode: Mode) {
        self.mode = mode;
        self.refresh();
        (1..self.list.len()).for_each(|at| self.ask(now, at, false));
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Time) {
        for at in 0..self.list.len() {
            self.look_at(now, at);
        }
        if let Some(n) = &mut self.nomination {
            n.graced |= now >= n.grace;
        }
        self.decide(now);
        self.choose(now);
        self.refresh();
    }

    /// When [`Paths::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        let each = (0..self.list.len()).filter_map(|at| self.due(at));
        let nomination = self.nomination.map(|n| match n.graced {
            false => n.grace.min(n.since + NOMINATED_FOR),
            true => n.since + NOMINATED_FOR,
        });
        each.chain(nomination).min()
    }

    /// The next thing to send.
    pub fn poll_say(&mut self) -> Option<Say> {
        self.said.pop_front()
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<PathEvent> {
        self.events.pop_front()
    }

    // Looking whether a path is alive.

    /// When something is to be done about the path at `at`.
    fn due(&self, at: usize) -> Option<Time> {
        let known = &self.list[at];
        if let Some(asked) = &known.asked {
            return Some(asked.again);
        }
        let waiting = known.waiting.and_then(|since| Some(since + self.patience(at)?));
        let lost = known.lost.map(|lost| match lost.back {
            Some(back) => back + BACK_FOR,
            None => lost.ask_at,
        });
        let warm =
            (at > 0 && known.lost.is_none() && self.role == Role::Client && self.sent > known.last_asked)
                .then(|| known.last_asked + WARM_EVERY);
        [waiting.filter(|_| known.lost.is_none()), lost, warm].into_iter().flatten().min()
    }

    fn look_at(&mut self, now: Time, at: usize) {
        if self.due(at).is_none_or(|due| due > now) {
            return;
        }
        let known = &mut self.list[at];
        if let Some(asked) = &known.asked {
            // With another to go over to, three tries say enough.
            if now < asked.since + ASKED_FOR {
                let rebind = asked.rebind;
                self.ask(now, at, rebind);
                if at == 0 {
                    self.suspect(now);
                }
            } else {
                known.asked = None;
                self.lose(now, at);
            }
        } else if let Some(lost) = &mut known.lost {
            match lost.back {
                Some(_) => known.lost = None,
                None => {
                    lost.wait = (lost.wait * 2).min(LOST_ASK_MOST);
                    lost.ask_at = now + lost.wait;
                    self.ask(now, at, false);
                }
            }
        } else {
            self.ask(now, at, false);
        }
    }

    /// How long data may be sent by a path without anything coming back.
    fn patience(&self, at: usize) -> Option<Duration> {
        let others = || (0..self.list.len()).filter(|other| *other != at && self.is_usable(*other));
        match self.role {
            _ if others().any(|other| self.list[other].path.carrier != INSIDE) => Some(PATIENCE),
            _ if others().count() > 0 => Some(PATIENCE_INSIDE),
            Role::Client => Some(SILENCE),
            Role::Server => None,
        }
    }

    /// The path in use has left a challenge unanswered: what of the others?
    fn suspect(&mut self, now: Time) {
        let tries = self.list[0].asked.as_ref().map_or(0, |asked| asked.tries.len());
        if tries == SUSPECT_TRIES && !(1..self.list.len()).any(|other| self.is_usable(other)) {
            self.events.push_back(PathEvent::Suspect);
        }
        for at in 1..self.list.len() {
            if self.is_usable(at) && self.list[at].asked.is_none() {
                self.ask(now, at, false);
            }
        }
        self.refresh();
    }

    fn lose(&mut self, now: Time, at: usize) {
        let known = &mut self.list[at];
        known.waiting = None;
        let wait = LOST_ASK_FIRST;
        known.lost.get_or_insert(Lost { ask_at: now + wait, wait, back: None });
        if at == 0 && !(1..self.list.len()).any(|other| self.is_usable(other)) {
            self.list[0].lost = None;
            self.events.push_back(PathEvent::Unreachable);
        }
    }

    fn ask(&mut self, now: Time, at: usize, rebind: bool) {
        self.nonces.1 += 1;
        let mut nonce = [0; 8];
        nonce.copy_from_slice(&self.nonces.0.derive(&self.nonces.1.to_be_bytes())[..8]);
        let others = (0..self.list.len()).any(|other| other != at && self.is_usable(other));
        let announce = self.role == Role::Client && (self.list.len() > 1 || self.mode != Mode::Failover);
        let status = self.word_on(at);
        let known = &mut self.list[at];
        let wait = match known.rtt {
            Some(rtt) if others => rtt * 3 / 2 + PATIENCE,
            Some(rtt) => (rtt * 2).max(ASK_SOON),
            None => ASK_BLIND,
        };
        let asked = known.asked.get_or_insert(Asked { since: now, tries: Vec::new(), again: now, rebind });
        let doublings = asked.tries.len().min(6) as u32;
        asked.again = now + (wait * 2u32.pow(doublings)).min(ASK_MOST);
        asked.rebind |= rebind;
        asked.tries.push((nonce, now));
        known.last_asked = now;
        let (path, rebind) = (known.path, asked.rebind);
        if rebind {
            self.said.push_back(Say { message: InBand::Rebind, path, pad: REBIND_BYTES });
        }
        if announce {
            self.list[at].status = Some(status);
            self.said.push_back(Say { message: InBand::PathStatus(status), path, pad: 0 });
        }
        self.said.push_back(Say { message: InBand::PathChallenge(nonce), path, pad: 0 });
    }

    /// What the client tells the server of a path.
    fn word_on(&self, at: usize) -> PathStatus {
        let inside = self.list[at].path.carrier == INSIDE;
        match self.mode {
            _ if at == 0 && (inside || self.mode == Mode::Failover) => PathStatus::Preferred,
            _ if inside => PathStatus::Standby,
            Mode::Failover => PathStatus::Standby,
            Mode::Redundant => PathStatus::Copy,
            Mode::Balance => PathStatus::Share,
        }
    }

    fn hear_response(&mut self, now: Time, at: usize, nonce: [u8; 8]) {
        let known = &mut self.list[at];
        let sent = known.asked.as_ref().and_then(|a| a.tries.iter().find(|(n, _)| *n == nonce));
        let Some((_, sent)) = sent else { return };
        let sample = now.since(*sent);
        known.rtt = Some(known.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        known.asked = None;
        known.proven = true;
        known.answered = Some(now);
        known.waiting = None;
        if let Some(lost) = &mut known.lost {
            lost.back = Some(now);
        }
        if at == 0 {
            self.events.push_back(PathEvent::Proven { rtt: sample });
        } else if self.list[0].asked.as_ref().is_some_and(|a| a.tries.len() > 1) && self.is_usable(at) {
            // This one answers and the one in use doesn't.
            self.lose(now, 0);
        }
        self.decide(now);
        self.choose(now);
        self.refresh();
    }

    // The server follows.

    fn hear_status(&mut self, now: Time, at: usize, status: PathStatus) {
        if self.role == Role::Client {
            return;
        }
        self.list[at].status = Some(status);
        match status {
            PathStatus::Preferred if at > 0 => return self.hear_rebind(now, at),
            PathStatus::Dropped if at == 0 => {
                if let Some(other) = (1..self.list.len()).find(|at| self.is_usable(*at)) {
                    self.switch(now, other);
                }
            }
            PathStatus::Dropped | PathStatus::Preferred => {}
            PathStatus::Standby | PathStatus::Copy | PathStatus::Share => {
                self.nomination.take_if(|n| n.key == self.list[at].path.key() && n.before.is_none());
                if !self.list[at].proven && self.list[at].asked.is_none() {
                    self.ask(now, at, false);
                }
            }
        }
        self.refresh();
    }

    fn hear_rebind(&mut self, now: Time, at: usize) {
        if at == 0 {
            // It is here, whatever somebody else nominated.
            self.nomination = None;
            self.refresh();
        } else {
            if self.list[at].is_further() && self.list[at].status == Some(PathStatus::Standby) {
                self.list[at].status = Some(PathStatus::Preferred);
            }
            self.nominate(now, at, true);
        }
    }

    fn nominate(&mut self, now: Time, at: usize, rebind: bool) {
        let key = self.list[at].path.key();
        if let Some(pending) = self.nomination.as_mut().filter(|n| n.key == key) {
            pending.rebind |= rebind;
            return;
        }
        let old = &self.list[0];
        let grace = old.rtt.map_or(GRACE_BLIND, |rtt| rtt * 3 / 2 + GRACE);
        let mut nomination =
            Nomination { key, before: None, rebind, since: now, grace: now + grace, graced: false };
        if self.list[at].proven && !self.list[at].is_lost() {
            nomination.before = Some(old.path.key());
            self.switch(now, at);
        }
        self.nomination = Some(nomination);
        for key in [Some(key), nomination.before.or(self.list.first().map(|k| k.path.key()))] {
            let Some(at) = key.and_then(|key| self.find(key)) else { continue };
            // Whoever says that it moved isn't at the old place.
            if (key == Some(nomination.key) || !rebind) && self.list[at].asked.is_none() {
                self.ask(now, at, false);
            }
        }
        self.refresh();
    }

    fn answered_since(&self, key: Key, since: Time) -> bool {
        self.find(key).is_some_and(|at| self.list[at].answered.is_some_and(|answered| answered >= since))
    }

    /// Who answered, and what follows.
    fn decide(&mut self, now: Time) {
        let Some(n) = self.nomination else { return };
        let Some(at) = self.find(n.key) else {
            self.nomination = None;
            return;
        };
        let new_answers = self.answered_since(n.key, n.since);
        let over = now >= n.since + NOMINATED_FOR;
        if let Some(before) = n.before {
            if new_answers {
                self.nomination = None;
            } else if n.graced && !n.rebind && self.answered_since(before, n.since) {
                self.nomination = None;
                if let Some(back) = self.find(before) {
                    self.switch(now, back);
                }
            } else if over {
                self.nomination = None;
            }
            return;
        }
        let old = &self.list[0];
        let left = matches!(old.status, Some(PathStatus::Dropped | PathStatus::Standby));
        let old_answers = old.answered.is_some_and(|answered| answered >= n.since) && !left;
        if old_answers && !n.rebind {
            // It is where it was: somebody else sent that.
            self.nomination = None;
            self.forget_strangers();
        } else if new_answers && (n.rebind || left || n.graced) {
            self.nomination = None;
            self.switch(now, at);
        } else if over {
            self.nomination = None;
            self.forget_strangers();
        }
    }

    fn switch(&mut self, now: Time, at: usize) {
        let old = self.list[0].path;
        // Left by its client.
        if self.list[0].lost.is_none() && !self.list[0].is_further() {
            self.list[0].status = None;
        }
        self.list.swap(0, at);
        self.list[0].since = now;
        (self.list[at].waiting, self.list[at].asked) = (None, None);
        self.events.push_back(PathEvent::Moved { old: Some(old), new: self.list[0].path });
        self.refresh();
    }

    fn add(&mut self, now: Time, path: Path) {
        if self.list.len() >= MOST_KNOWN {
            let nominated = self.nomination.map(|n| n.key);
            let oldest = (1..self.list.len())
                .filter(|at| nominated != Some(self.list[*at].path.key()))
                .min_by_key(|at| (self.list[*at].is_further(), self.list[*at].proven, self.list[*at].heard));
            if let Some(oldest) = oldest {
                self.list.remove(oldest);
            }
        }
        self.list.push(Known::new(path, now, 0));
        self.refresh();
    }

    /// Candidates that came to nothing.
    fn forget_strangers(&mut self) {
        let mut first = true;
        self.list.retain(|known| std::mem::take(&mut first) || known.proven || known.is_further());
        self.refresh();
    }

    // The client leads.

    /// Place of the best way.
    fn best(&self) -> usize {
        let order = |at: &usize| {
            let known = &self.list[*at];
            (known.lost.is_some(), !known.proven, known.rank)
        };
        (0..self.list.len()).min_by_key(order).unwrap_or(0)
    }

    /// Goes over to a better way.
    fn choose(&mut self, now: Time) {
        match self.role {
            Role::Server => {
                let Some(active) = self.list.first() else { return };
                let usable = || (1..self.list.len()).filter(|at| self.is_usable(*at));
                let preferred = |at: &usize| self.list[*at].status == Some(PathStatus::Preferred);
                let other = match active.lost {
                    Some(_) => usable().find(preferred).or_else(|| usable().next()),
                    // What the client wants, where that was only lost for a while.
                    None if active.is_further() => usable().find(preferred),
                    None => None,
                };
                if let Some(other) = other {
                    self.switch(now, other);
                }
            }
            Role::Client if !self.list.is_empty() => {
                let best = self.best();
                let active = &self.list[0];
                // The one dialled gets the time of a round trip.
                let tried = active.proven || active.asked.as_ref().is_none_or(|asked| asked.tries.len() > 1);
                if best > 0 && self.list[best].proven && tried {
                    let before = active.path;
                    self.list.swap(0, best);
                    self.use_first(now, Some(before));
                    // The server may go on with it as a spare.
                    if self.list[best].lost.is_none() {
                        self.list[best].asked = None;
                        self.ask(now, best, false);
                    }
                }
            }
            Role::Client => {}
        }
        self.refresh();
    }

    /// The first way is the one in use from now on.
    fn use_first(&mut self, now: Time, before: Option<Path>) {
        self.list[0].since = now;
        self.list[0].asked = None;
        self.events.push_back(PathEvent::Moved { old: before, new: self.list[0].path });
        self.refresh();
        self.ask(now, 0, true);
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
        let known = &self.list[at];
        known.proven && known.lost.is_none() && (at == 0 || self.is_other(at))
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
            if !self.is_usable(at) || self.targets.contains(&at) {
                continue;
            }
            let copy = match self.role {
                Role::Client => copies && self.list[at].path.carrier != INSIDE,
                Role::Server => self.list[at].status == Some(PathStatus::Copy),
            };
            if copy || std::mem::take(&mut spare) {
                self.targets.push(at);
            }
        }
    }
}

impl Known {
    fn new(path: Path, now: Time, rank: usize) -> Known {
        Known {
            path,
            since: now,
            rtt: None,
            proven: false,
            answered: None,
            status: None,
            lost: None,
            credit: 0,
            rank,
            heard: now,
            waiting: None,
            asked: None,
            last_asked: now,
        }
    }

    /// Of a server we chose ourselves: nobody can be flooded by it.
    fn dialled(path: Path, now: Time, rank: usize) -> Known {
        Known { credit: u64::MAX, ..Known::new(path, now, rank) }
    }

    /// What the peer thinks of it, as it said.
    pub fn status(&self) -> Option<PathStatus> {
        self.status
    }

    /// A challenge was answered on it.
    pub fn is_proven(&self) -> bool {
        self.proven
    }

    /// Nothing answers on it.
    pub fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    fn heard(&mut self, now: Time, path: Path, len: usize) {
        self.path.local = path.local;
        self.heard = now;
        self.waiting = None;
        self.credit = self.credit.saturating_add(len as u64 * AMPLIFICATION);
    }

    fn spend(&mut self, bytes: usize) -> bool {
        if self.proven {
            return true;
        }
        let left = self.credit.checked_sub(bytes as u64);
        self.credit = left.unwrap_or(self.credit);
        left.is_some()
    }

    /// The client uses it beside another.
    fn is_further(&self) -> bool {
        matches!(self.status, Some(PathStatus::Standby | PathStatus::Copy | PathStatus::Share))
    }
}

/// How many nominations there may be: a few at once, then one a second.
struct Bucket {
    left: u32,
    since: Time,
}

impl Bucket {
    fn take(&mut self, now: Time) -> bool {
        let earned = now.since(self.since).as_millis() / NOMINATION_EVERY.as_millis();
        if earned > 0 {
            self.left = self.left.saturating_add(earned.min(NOMINATIONS.into()) as u32).min(NOMINATIONS);
            self.since = now;
        }
        let any = self.left > 0;
        self.left -= u32::from(any);
        any
    }
}

/// Of bytes received from an address that hasn't answered yet (RFC 9000 section 8.1).
const AMPLIFICATION: u64 = 3;
/// A REBIND is as long as this, so that data may follow it to where it came from before that is proven.
pub const REBIND_BYTES: usize = 1_200;
/// Messages that wait to be sent.
const MOST_SAID: usize = 32;
/// Paths remembered.
const MOST_KNOWN: usize = 8;
const NOMINATIONS: u32 = 4;
const NOMINATION_EVERY: Duration = Duration::from_secs(1);
/// Someone who nominated an address answers within this time.
const NOMINATED_FOR: Duration = Duration::from_secs(3);
/// What the old path may take longer than one and a half of its round trips.
const GRACE: Duration = Duration::from_millis(10);
const GRACE_BLIND: Duration = Duration::from_millis(200);
/// Data that was sent is unanswered for so long: time to ask, where there is another path.
const PATIENCE: Duration = Duration::from_millis(30);
/// The same where the other is the control connection.
const PATIENCE_INSIDE: Duration = Duration::from_secs(1);
/// The same where there is none (the client's).
const SILENCE: Duration = Duration::from_secs(3);
/// Tries after which a path without another is in doubt.
const SUSPECT_TRIES: usize = 3;
/// First wait for an answer; doubled for each further try.
const ASK_SOON: Duration = Duration::from_millis(50);
const ASK_BLIND: Duration = Duration::from_millis(250);
const ASK_MOST: Duration = Duration::from_secs(2);
const ASKED_FOR: Duration = Duration::from_millis(7_500);
/// A lost path is asked again, less and less often.
const LOST_ASK_FIRST: Duration = Duration::from_secs(1);
const LOST_ASK_MOST: Duration = Duration::from_secs(30);
/// It has to answer for so long before it is used again.
const BACK_FOR: Duration = Duration::from_secs(3);
/// A path that is only kept ready is asked so often while there is traffic.
const WARM_EVERY: Duration = Duration::from_secs(20);
