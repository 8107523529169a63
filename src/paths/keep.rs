//! Keeping a way open that leads through a NAT, whose mappings expire in silence.
//!
//! The client knows a NAT by the server's answers: the address that they say a challenge came from isn't its own.
//! Only there it speaks without anything to say. After some silence it asks whether its address is still the same,
//! and then sends KEEPALIVEs, which the server answers as much later as the client wants to know about:
//!
//! ```text
//!   client  --KEEPALIVE(31 s)-->          --KEEPALIVE(39 s)-->              --PATH_CHALLENGE-->
//!   server      31 s of silence  --answer-->    39 s of silence  --answer--X     --answer-->
//!                  it lived through 31 s: try 39          39 s were too long, 31 weren't
//! ```
//!
//! Other traffic meanwhile keeps the mapping as well, and the trial says nothing. An answer at once wouldn't tell
//! either: most NATs give a new mapping the port that the old one had.

use std::net::SocketAddr;
use std::time::Duration;

use super::{PathEvent, Paths, Say};
use crate::keys::Role;
use crate::path::INSIDE;
use crate::time::Time;
use crate::wire::inband::InBand;

/// When the client sends only to keep a NAT's mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Keepalive {
    /// Where a NAT was seen, as often as it turns out to be needed.
    #[default]
    Auto,
    /// Never.
    Off,
    /// After so much silence, NAT or not.
    Every(Duration),
}

/// What is known of a NAT: silences that its mappings live through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// So much, as far as we know.
    pub good: Duration,
    /// We have seen that they do.
    pub verified: bool,
    /// So much was too long, and until when that counts.
    pub limit: Option<(Duration, Time)>,
}

/// Of one path, what is known of a NAT on it.
#[derive(Clone, Debug)]
pub(super) struct Keep {
    /// Where the server saw us.
    seen: Option<SocketAddr>,
    /// That isn't our own address.
    nat: bool,
    /// How long it remembers.
    silence: Silence,
    /// What was seen to be short enough failed once all the same: an answer may get lost.
    failed: bool,
    trial: Option<Trial>,
    /// The answer to a trial of this length is missing; a challenge says whether the path works at all.
    doubt: Option<Duration>,
    /// A challenge was sent after this silence: is the mapping still the same?
    after: Option<Duration>,
    /// Datagrams so far, in both directions.
    datagrams: u64,
    /// When we sent the last one. What comes in doesn't count: not every NAT takes that for a sign of life (RFC 4787,
    /// REQ-6).
    sent: Time,
    /// The server's: a challenge to be answered then.
    later: Option<(Time, [u8; 8])>,
}

#[derive(Clone, Copy, Debug)]
struct Trial {
    nonce: [u8; 8],
    length: Duration,
    /// Datagrams by then: another one means that it wasn't silent.
    datagrams: u64,
    /// The answer is missing then.
    until: Time,
}

impl Keep {
    pub(super) fn new(now: Time) -> Keep {
        Keep {
            seen: None,
            nat: false,
            silence: Silence { good: FIRST, verified: false, limit: None },
            failed: false,
            trial: None,
            doubt: None,
            after: None,
            datagrams: 0,
            sent: now,
            later: None,
        }
    }

    /// A datagram was sent.
    pub(super) fn sent(&mut self, now: Time) {
        self.datagrams += 1;
        self.sent = now;
    }

    /// A datagram came.
    pub(super) fn heard(&mut self) {
        self.datagrams += 1;
    }

    /// The path itself failed, which says nothing of a NAT.
    pub(super) fn forget(&mut self) {
        (self.trial, self.doubt, self.after) = (None, None, None);
    }

    /// What was learned, if anything was.
    pub(super) fn learned(&self) -> Option<Silence> {
        Some(self.silence).filter(|silence| silence.verified || silence.limit.is_some())
    }

    /// What to try next.
    fn length(&self, now: Time) -> Duration {
        if !self.silence.verified {
            return self.silence.good;
        }
        let known = self.silence.limit.filter(|(_, until)| now < *until).map(|(length, _)| length * 3 / 4);
        (self.silence.good * 5 / 4).min(known.unwrap_or(MOST)).min(MOST).max(self.silence.good)
    }

    fn lived(&mut self, length: Duration) {
        self.silence.good = self.silence.good.max(length);
        (self.silence.verified, self.failed) = (true, false);
    }

    /// A mapping didn't live through that: surely, or an answer is missing.
    fn expired(&mut self, now: Time, length: Duration, surely: bool) {
        if !surely
            && self.silence.verified
            && length <= self.silence.good
            && !std::mem::replace(&mut self.failed, true)
        {
            return;
        }
        self.silence.limit = Some((length, now + LIMITED_FOR));
        if self.silence.verified && length > self.silence.good {
            self.silence.good = self.silence.good.min(length * 3 / 4);
        } else {
            self.silence.good = length / 2;
            self.silence.verified = false;
        }
        self.silence.good = self.silence.good.max(LEAST);
        self.failed = false;
    }
}

impl Paths {
    /// What was learned of the NATs on the paths, by carrier.
    pub fn silences(&self) -> impl Iterator<Item = (u8, Silence)> {
        self.list.iter().filter_map(|known| Some((known.path.carrier, known.keep.learned()?)))
    }

    /// A session before this one learned so much of the NAT behind a carrier.
    pub fn expect_silence(&mut self, carrier: u8, silence: Silence) {
        for known in self.list.iter_mut().filter(|known| known.path.carrier == carrier) {
            known.keep.silence = silence;
        }
    }

    /// When the client sends only to keep a NAT's mapping.
    pub fn set_keepalive(&mut self, keepalive: Keepalive) {
        self.keepalive = keepalive;
    }

    /// When something is to be done about the path at `at`.
    fn keep_due(&self, at: usize) -> Option<Time> {
        let known = &self.list[at];
        let keep = &known.keep;
        if let Some((at, _)) = keep.later {
            return Some(at);
        }
        let idle = self.role == Role::Client && known.asked.is_none() && self.is_usable(at);
        if !idle || known.path.carrier == INSIDE {
            return None;
        }
        match self.keepalive {
            Keepalive::Off => None,
            Keepalive::Every(silence) => Some(keep.sent + silence),
            Keepalive::Auto if !keep.nat => None,
            Keepalive::Auto => match keep.trial.filter(|trial| trial.datagrams == keep.datagrams) {
                Some(trial) => Some(trial.until),
                None => Some(keep.sent + keep.silence.good),
            },
        }
    }

    pub(super) fn keep_timeout(&self) -> Option<Time> {
        (0..self.list.len()).filter_map(|at| self.keep_due(at)).min()
    }

    /// Keeps open what would close.
    pub(super) fn keep_up(&mut self, now: Time) {
        for at in 0..self.list.len() {
            let Some(due) = self.keep_due(at).filter(|due| *due <= now) else { continue };
            let known = &mut self.list[at];
            if let Some((_, nonce)) = known.keep.later.take() {
                let (path, seen) = (known.path, known.path.remote);
                self.said.push_back(Say { message: InBand::PathResponse(nonce, seen), path, pad: 0 });
                continue;
            }
            if let Keepalive::Every(_) = self.keepalive {
                self.ask(now, at, false);
                continue;
            }
            let silent = known.keep.trial.take().filter(|trial| trial.datagrams == known.keep.datagrams);
            known.keep.forget();
            // A host that slept meanwhile learns nothing from that.
            if now.since(due) < ANSWER_WITHIN {
                match silent {
                    Some(trial) => known.keep.doubt = Some(trial.length),
                    None => known.keep.after = Some(known.keep.silence.good),
                }
            }
            self.ask(now, at, false);
        }
    }

    fn try_silence(&mut self, now: Time, at: usize) {
        let nonce = self.nonce();
        let known = &mut self.list[at];
        let keep = &mut known.keep;
        let length = keep.length(now);
        let until = now + length + known.rtt.unwrap_or_default() * 2 + ANSWER_WITHIN;
        keep.sent(now);
        keep.trial = Some(Trial { nonce, length, datagrams: keep.datagrams, until });
        let message = InBand::Keepalive(nonce, length.as_millis() as u32);
        self.said.push_back(Say { message, path: known.path, pad: 0 });
    }

    /// Answers later, on the path the challenge came by.
    pub(super) fn respond_later(&mut self, now: Time, at: usize, nonce: [u8; 8], millis: u32) {
        let after = Duration::from_millis(millis.into());
        if self.role == Role::Server && after <= LATEST {
            self.list[at].keep.later = Some((now + after, nonce));
        }
    }

    /// `nonce` was answered: was it a trial?
    pub(super) fn hear_later(&mut self, now: Time, at: usize, nonce: [u8; 8], seen: SocketAddr) -> bool {
        let keep = &mut self.list[at].keep;
        let Some(trial) = keep.trial.take_if(|trial| trial.nonce == nonce) else { return false };
        // The answer itself is the only one since.
        let silent = keep.datagrams == trial.datagrams + 1;
        if silent {
            keep.lived(trial.length);
        }
        self.hear_seen(at, seen);
        if silent && self.keepalive == Keepalive::Auto && self.list[at].asked.is_none() {
            self.try_silence(now, at);
        }
        true
    }

    /// The path works: it was the first try that was answered, or a later one.
    pub(super) fn settle_doubt(&mut self, now: Time, at: usize, first: bool, seen: SocketAddr) {
        let keep = &mut self.list[at].keep;
        let another = keep.seen.is_some_and(|before| before != seen);
        let (doubt, silence) = (keep.doubt.take(), keep.after.take());
        self.hear_seen(at, seen);
        let keep = &mut self.list[at].keep;
        match (doubt, silence) {
            (Some(length), _) if first || another => keep.expired(now, length, another),
            (_, Some(length)) if another => keep.expired(now, length, true),
            (_, Some(_)) => self.try_silence(now, at),
            _ => {}
        }
    }

    /// Takes in where the server saw us.
    pub(super) fn hear_seen(&mut self, at: usize, seen: SocketAddr) {
        let Some(known) = self.list.get_mut(at).filter(|known| known.path.carrier != INSIDE) else { return };
        if self.role == Role::Server {
            return;
        }
        let keep = &mut known.keep;
        let before = keep.seen.replace(seen);
        if before != Some(seen) {
            self.events.push_back(PathEvent::Seen { before, seen });
        }
        let nat =
            known.path.local.is_some_and(|local| local != seen.ip()) || before.is_some_and(|b| b != seen);
        if nat && !std::mem::replace(&mut keep.nat, true) {
            let silence = match self.keepalive {
                Keepalive::Auto => keep.silence.good,
                Keepalive::Every(silence) => silence,
                Keepalive::Off => return,
            };
            self.events.push_back(PathEvent::Translated { seen, silence });
        }
    }
}

/// Silence that a NAT should bear: RFC 4787 asks for 2 min, many give 30 s.
const FIRST: Duration = Duration::from_secs(25);
const LEAST: Duration = Duration::from_secs(15);
const MOST: Duration = Duration::from_secs(600);
/// What was too long isn't tried again for so long.
const LIMITED_FOR: Duration = Duration::from_secs(3_600);
/// An answer may come so much, and two round trips, after its time.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// The server answers no later than this.
const LATEST: Duration = Duration::from_secs(3_600);
