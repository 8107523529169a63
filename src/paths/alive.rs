//! Looking whether a path is alive: challenges, and what their answers say.

use std::net::SocketAddr;
use std::time::Duration;

use super::known::{Asked, Known, Lost};
use super::{Mode, PathEvent, Paths, REBIND_BYTES, Say};
use crate::keys::Role;
use crate::path::INSIDE;
use crate::time::Time;
use crate::wire::inband::{InBand, PathStatus};

impl Paths {
    /// When something is to be done about the path at `at`.
    pub(super) fn due(&self, at: usize) -> Option<Time> {
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

    pub(super) fn look_at(&mut self, now: Time, at: usize) {
        if self.due(at).is_none_or(|due| due > now) {
            return;
        }
        let known = &mut self.list[at];
        if let Some(asked) = &known.asked {
            if now < asked.since + ASKED_FOR {
                let rebind = asked.rebind;
                self.ask(now, at, rebind);
                if at == 0 {
                    self.suspect(now);
                }
                // Its flows can't wait for the last try.
                if self.spreads() && self.list[at].asked.as_ref().is_some_and(|a| a.tries.len() > SHARE_TRIES)
                {
                    self.lose(now, at);
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
    pub(super) fn patience(&self, at: usize) -> Option<Duration> {
        // One that was lost a moment ago may be back when it is needed.
        let hopeful = |known: &Known| known.lost.is_none_or(|lost| lost.wait <= LOST_ASK_FIRST * 8);
        let other = |known: &Known| known.proven && known.path.carrier != INSIDE && hopeful(known);
        let mut others = (0..self.list.len()).filter(|other| *other != at && self.is_other(*other));
        match self.role {
            _ if others.clone().any(|at| other(&self.list[at])) => Some(PATIENCE),
            _ if others.any(|at| self.list[at].proven) => Some(PATIENCE_INSIDE),
            Role::Client => Some(SILENCE),
            Role::Server => None,
        }
    }

    /// The path in use has left a challenge unanswered: what of the others?
    pub(super) fn suspect(&mut self, now: Time) {
        let others = (1..self.list.len()).any(|other| self.is_usable(other));
        let doubt = if self.list[0].proven { DOUBT } else { DOUBT_BLIND };
        let Some(asked) = &mut self.list[0].asked else { return };
        let tries = asked.tries.len();
        if now >= asked.since + doubt && !asked.doubted && !others {
            asked.doubted = true;
            self.events.push_back(PathEvent::Suspect);
        }
        for at in 1..self.list.len() {
            // One that is lost may be asked too seldom for this.
            let anew = tries == 2 || self.list[at].asked.is_none();
            if self.list[at].proven && self.is_other(at) && anew {
                self.list[at].asked = None;
                self.ask(now, at, false);
            }
        }
        self.refresh();
    }

    pub(super) fn lose(&mut self, now: Time, at: usize) {
        let known = &mut self.list[at];
        known.waiting = None;
        known.keep.forget();
        let wait = LOST_ASK_FIRST;
        known.lost.get_or_insert(Lost { ask_at: now + wait, wait, back: None });
        if at == 0 && !(1..self.list.len()).any(|other| self.is_spare(other)) {
            self.list[0].lost = None;
            self.events.push_back(PathEvent::Unreachable);
        }
    }

    pub(super) fn ask(&mut self, now: Time, at: usize, rebind: bool) {
        let nonce = self.nonce();
        let others = (0..self.list.len()).any(|other| other != at && self.is_usable(other));
        let announce = self.role == Role::Client && (self.list.len() > 1 || self.mode != Mode::Failover);
        let status = self.word_on(at);
        let known = &mut self.list[at];
        let wait = match known.rtt {
            Some(rtt) if others => rtt * 3 / 2 + PATIENCE,
            Some(rtt) => (rtt * 2).max(ASK_SOON),
            None => ASK_BLIND,
        };
        let asked = known.asked.get_or_insert(Asked {
            since: now,
            tries: Vec::new(),
            again: now,
            rebind,
            doubted: false,
        });
        let doublings = asked.tries.len().min(6) as u32;
        asked.again = now + (wait * 2u32.pow(doublings)).min(ASK_MOST);
        asked.rebind |= rebind;
        asked.tries.push((nonce, now));
        known.last_asked = now;
        known.keep.sent(now);
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

    /// What nobody else can know.
    pub(super) fn nonce(&mut self) -> [u8; 8] {
        self.nonces.1 += 1;
        let mut nonce = [0; 8];
        nonce.copy_from_slice(&self.nonces.0.derive(&self.nonces.1.to_be_bytes())[..8]);
        nonce
    }

    /// What the client tells the server of a path.
    pub(super) fn word_on(&self, at: usize) -> PathStatus {
        let inside = self.list[at].path.carrier == INSIDE;
        match self.mode {
            _ if at == 0 && (inside || self.mode == Mode::Failover) => PathStatus::Preferred,
            _ if inside => PathStatus::Standby,
            Mode::Failover => PathStatus::Standby,
            Mode::Redundant => PathStatus::Copy,
            Mode::Balance => PathStatus::Share,
        }
    }

    pub(super) fn hear_response(&mut self, now: Time, at: usize, nonce: [u8; 8], seen: SocketAddr) {
        if self.hear_later(now, at, nonce, seen) {
            return;
        }
        let known = &mut self.list[at];
        let tries = known.asked.as_ref().map(|asked| asked.tries.iter().enumerate());
        let found = tries.and_then(|mut tries| tries.find(|(_, (n, _))| *n == nonce));
        let Some((number, (_, sent))) = found else { return self.hear_size(now, at, nonce) };
        let sample = now.since(*sent);
        known.rtt = Some(known.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        known.asked = None;
        known.proven = true;
        known.answered = Some(now);
        known.waiting = None;
        if let Some(lost) = &mut known.lost {
            lost.back = Some(now);
        }
        self.settle_doubt(now, at, number == 0, seen);
        if at == 0 {
            self.events.push_back(PathEvent::Proven { rtt: sample });
        } else if self.list[0].asked.as_ref().is_some_and(|a| a.tries.len() > 1) && self.is_spare(at) {
            // This one answers and the one in use doesn't.
            self.lose(now, 0);
        }
        self.decide(now);
        self.choose(now);
    }
}

/// Data that was sent is unanswered for so long: time to ask, where there is another path.
const PATIENCE: Duration = Duration::from_millis(30);
/// The same where the other is the control connection.
const PATIENCE_INSIDE: Duration = Duration::from_secs(1);
/// The same where there is none (the client's).
const SILENCE: Duration = Duration::from_secs(3);
/// A path without another is in doubt when it hasn't answered for so long; one that never did earlier.
const DOUBT: Duration = Duration::from_millis(1_500);
const DOUBT_BLIND: Duration = Duration::from_millis(700);
/// Tries after which flows leave a path, where they are shared out.
const SHARE_TRIES: usize = 2;
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
