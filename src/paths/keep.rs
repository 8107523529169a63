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

    /// When the last one was.
    #[cfg(test)]
    pub(super) fn last_sent(&self) -> Time {
        self.sent
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::Path;
    use crate::paths::tests::{MS, PACKET, SILENT, at, client, said, server, start};

    const S: Duration = Duration::from_secs(1);

    fn keep(good: u64, verified: bool, limit: Option<(Duration, Time)>) -> Keep {
        let silence = Silence { good: Duration::from_secs(good), verified, limit };
        Keep { silence, ..Keep::new(start()) }
    }

    #[test]
    fn the_next_trial_is_a_quarter_longer_but_not_near_what_was_too_long() {
        let limit = |length: u64, after| Some((Duration::from_secs(length), start() + after));
        for (good, verified, limit, length) in [
            (40, false, None, 40),
            (40, true, None, 50),
            (40, true, limit(60, S), 45),
            (40, true, limit(48, S), 40),
            (40, true, limit(60, Duration::ZERO), 50),
            (40, true, limit(400, S), 50),
            (500, true, None, 600),
            (600, true, None, 600),
        ] {
            let trial = keep(good, verified, limit).length(start());
            assert_eq!(trial, Duration::from_secs(length), "{good}, {verified}, {limit:?}");
        }
    }

    #[test]
    fn what_too_long_a_silence_teaches() {
        let surely = true;
        // Known before; how long, and whether that is sure; known then.
        for (good, verified, length, sure, good_then, verified_then) in [
            (40, false, 40, !surely, 20_000, false),
            (25, false, 25, !surely, 15_000, false),
            (40, true, 40, surely, 20_000, false),
            (40, true, 30, surely, 15_000, false),
            (40, true, 50, !surely, 37_500, true),
            (40, true, 50, surely, 37_500, true),
            (40, true, 60, surely, 40_000, true),
            (16, true, 17, surely, 15_000, true),
        ] {
            let mut keep = keep(good, verified, None);
            keep.failed = true;
            let length = Duration::from_secs(length);
            keep.expired(start(), length, sure);
            let limit = Some((length, start() + 3_600 * S));
            let then = Silence { good: good_then as u32 * MS, verified: verified_then, limit };
            assert_eq!((keep.silence, keep.failed), (then, false), "{length:?} after {good}, {verified}");
        }
    }

    #[test]
    fn an_answer_may_get_lost_once() {
        for length in [40 * S, 30 * S] {
            let mut keep = keep(40, true, None);
            let known = keep.silence;
            keep.expired(start(), length, false);
            assert_eq!((keep.silence, keep.failed), (known, true));
            keep.lived(40 * S);
            assert_eq!((keep.silence, keep.failed), (known, false));
            keep.expired(start(), length, false);
            assert_eq!(keep.silence, known);
            keep.expired(start(), length, false);
            assert_eq!((keep.silence.good, keep.silence.verified), ((length / 2).max(LEAST), false));
        }
    }

    #[test]
    fn what_is_learned_is_what_was_seen() {
        let limit = Some((60 * S, start()));
        for (verified, limit, learned) in
            [(false, None, false), (true, None, true), (false, limit, true), (true, limit, true)]
        {
            let mut paths = client(&[3]);
            paths.list[0].keep = keep(40, verified, limit);
            let silence = Silence { good: 40 * S, verified, limit };
            assert_eq!(paths.silences().collect::<Vec<_>>(), Vec::from_iter(learned.then_some((3, silence))));
        }
        let mut keep = keep(40, false, None);
        keep.lived(30 * S);
        assert_eq!((keep.silence.good, keep.silence.verified), (40 * S, true));
        keep.lived(41 * S);
        assert_eq!(keep.silence.good, 41 * S);
        // The next session takes it for that carrier.
        let mut paths = client(&[0, 1]);
        paths.expect_silence(1, keep.silence);
        assert_eq!(paths.list[0].keep.silence, Keep::new(start()).silence);
        assert_eq!(paths.list[1].keep.silence, keep.silence);
    }

    /// A client behind a NAT that has sent at the start.
    fn translated() -> Paths {
        let mut paths = client(&[0]);
        (paths.list[0].keep.nat, paths.list[0].keep.sent) = (true, start());
        paths
    }

    #[test]
    fn when_a_client_speaks_without_anything_to_say() {
        let due = |change: fn(&mut Paths)| {
            let mut paths = translated();
            change(&mut paths);
            assert_eq!(paths.keep_timeout(), paths.keep_due(0));
            paths.keep_due(0).map(|due| due - start())
        };
        assert_eq!(due(|_| ()), Some(FIRST));
        assert_eq!(due(|paths| paths.list[0].keep.nat = false), None);
        assert_eq!(due(|paths| paths.set_keepalive(Keepalive::Off)), None);
        assert_eq!(due(|paths| paths.set_keepalive(Keepalive::Every(7 * S))), Some(7 * S));
        assert_eq!(due(|paths| paths.ask(start(), 0, false)), None, "an answer is awaited");
        assert_eq!(due(|paths| paths.list[0].lost = SILENT), None);
        assert_eq!(due(|paths| paths.list[0].proven = false), None);
        assert_eq!(due(|paths| paths.list[0].path.carrier = INSIDE), None);
        assert_eq!(due(|paths| paths.role = Role::Server), None);
        assert_eq!(due(|paths| paths.list[0].keep.sent(start() + 5 * S)), Some(FIRST + 5 * S));
        assert_eq!(due(|paths| paths.list[0].keep.heard()), Some(FIRST), "only what is sent counts");
        // A trial runs as long as nothing else does.
        assert_eq!(due(|paths| paths.try_silence(start(), 0)), Some(FIRST + 40 * MS + S));
        let disturbed = |paths: &mut Paths| {
            paths.try_silence(start(), 0);
            paths.list[0].keep.heard();
        };
        assert_eq!(due(disturbed), Some(FIRST));
        // The server's word is due when it was asked for, and nothing else of its own.
        let mut paths = server(at("192.0.2.1:4000"));
        assert_eq!(paths.keep_timeout(), None);
        paths.respond_later(start(), 0, [5; 8], 31_000);
        assert_eq!(paths.keep_timeout(), Some(start() + 31 * S));
    }

    #[test]
    fn after_the_silence_it_asks_and_knows_why() {
        // How late it is; what the silence was.
        for (late, trial, after, doubt) in [
            (Duration::ZERO, false, Some(FIRST), None),
            (999 * MS, false, Some(FIRST), None),
            (S, false, None, None),
            (Duration::ZERO, true, None, Some(FIRST)),
            (S, true, None, None),
        ] {
            let mut paths = translated();
            if trial {
                paths.try_silence(start(), 0);
                said(&mut paths);
            }
            let due = paths.keep_due(0).expect("some time");
            paths.keep_up(due + late);
            let keep = &paths.list[0].keep;
            assert_eq!((keep.after, keep.doubt, keep.trial.is_some()), (after, doubt, false), "{late:?}");
            assert!(matches!(said(&mut paths)[..], [(_, InBand::PathChallenge(_))]));
        }
        let mut paths = translated();
        paths.keep_up(start() + (FIRST - MS));
        assert_eq!(said(&mut paths), []);
        // Where the interval is given nothing is to be learned.
        paths.set_keepalive(Keepalive::Every(7 * S));
        paths.keep_up(start() + 7 * S);
        assert_eq!((paths.list[0].keep.after, said(&mut paths).len()), (None, 1));
    }

    #[test]
    fn a_server_answers_as_late_as_it_is_asked_to_and_once() {
        for (millis, answers) in [(31_000, true), (3_600_000, true), (3_600_001, false)] {
            let client = at("192.0.2.1:4000");
            let mut paths = server(client);
            let length = millis * MS;
            let asked = InBand::Keepalive([5; 8], millis);
            paths.heard(start(), client, true, PACKET, Some(asked));
            paths.keep_up(start() + (length - MS));
            assert_eq!(said(&mut paths), []);
            paths.keep_up(start() + length);
            let answer = (client, InBand::PathResponse([5; 8], client.remote));
            assert_eq!(said(&mut paths), Vec::from_iter(answers.then_some(answer)));
            paths.keep_up(start() + length * 2);
            assert_eq!(said(&mut paths), []);
        }
        let mut paths = translated();
        paths.respond_later(start(), 0, [5; 8], 1);
        assert!(paths.list[0].keep.later.is_none(), "a client does not");
    }

    /// A client that asked for an answer after 25 s, which came when nothing else had come but so many datagrams.
    fn tried(disturbed: usize, change: impl Fn(&mut Paths)) -> (Paths, bool) {
        let mut paths = translated();
        paths.try_silence(start(), 0);
        let [(path, InBand::Keepalive(nonce, 25_000))] = said(&mut paths)[..] else { panic!("no trial") };
        change(&mut paths);
        (0..disturbed).for_each(|_| paths.list[0].keep.heard());
        paths.list[0].keep.heard();
        let found = paths.hear_later(start() + FIRST, 0, nonce, path.remote);
        assert!(!paths.hear_later(start() + FIRST, 0, nonce, path.remote), "once");
        (paths, found)
    }

    #[test]
    fn an_answer_after_silence_says_that_the_nat_bore_it() {
        let again = |paths: &mut Paths| match said(paths)[..] {
            [(_, InBand::Keepalive(_, millis))] => Some(millis),
            _ => None,
        };
        let (mut paths, found) = tried(0, |_| ());
        assert_eq!(
            (found, paths.list[0].keep.silence.verified, again(&mut paths)),
            (true, true, Some(31_250))
        );
        let (mut paths, found) = tried(1, |_| ());
        assert_eq!((found, paths.list[0].keep.silence.verified, again(&mut paths)), (true, false, None));
        let (mut paths, found) = tried(0, |paths| paths.set_keepalive(Keepalive::Every(7 * S)));
        assert_eq!((found, paths.list[0].keep.silence.verified, again(&mut paths)), (true, true, None));
        let (mut paths, _) = tried(0, |paths| {
            paths.ask(start(), 0, false);
            paths.list[0].keep.datagrams -= 1;
            said(paths);
        });
        assert_eq!((paths.list[0].keep.silence.verified, again(&mut paths)), (true, None), "it is asking");
        let mut paths = translated();
        paths.try_silence(start(), 0);
        let path = paths.list[0].path;
        assert!(!paths.hear_later(start() + S, 0, [0; 8], path.remote));
        assert!(paths.list[0].keep.trial.is_some(), "it waits for its own");
    }

    #[test]
    fn what_the_answer_to_a_doubt_says() {
        let (seen, elsewhere) = (at("203.0.113.1:4000").remote, at("203.0.113.1:4001").remote);
        // A trial's answer is missing, or a challenge was sent after silence; the first try is answered; the address
        // is another. Whether the silence was too long, and whether another trial follows.
        for (doubt, after, first, another, expired, trial) in [
            (true, false, true, false, true, false),
            (true, false, true, true, true, false),
            (true, false, false, true, true, false),
            (true, false, false, false, false, false),
            (false, true, true, false, false, true),
            (false, true, false, false, false, true),
            (false, true, true, true, true, false),
            (false, false, true, true, false, false),
        ] {
            let mut paths = translated();
            let keep = &mut paths.list[0].keep;
            keep.seen = Some(seen);
            keep.doubt = doubt.then_some(40 * S);
            keep.after = after.then_some(30 * S);
            paths.settle_doubt(start(), 0, first, if another { elsewhere } else { seen });
            let keep = &paths.list[0].keep;
            let limit = keep.silence.limit.map(|(length, _)| length);
            assert_eq!(
                limit,
                expired.then_some(if doubt { 40 * S } else { 30 * S }),
                "{doubt}, {first}, {another}"
            );
            assert_eq!((keep.trial.is_some(), keep.doubt, keep.after), (trial, None, None));
        }
        // Where nobody saw it before it is at no other place.
        let mut paths = translated();
        paths.list[0].keep.after = Some(30 * S);
        paths.settle_doubt(start(), 0, true, seen);
        assert_eq!(paths.list[0].keep.silence.limit, None);
    }

    #[test]
    fn a_nat_is_where_the_server_sees_another_address() {
        let (own, other) = (at("192.168.1.7:5000").remote, at("203.0.113.1:4000").remote);
        let another_port = at("192.168.1.7:5001").remote;
        let own_ip = Some(own.ip());
        for (local, seen, translated) in [
            (own_ip, &[own][..], None),
            (own_ip, &[other], Some(other)),
            (own_ip, &[other, other], Some(other)),
            (None, &[other, other], None),
            (None, &[other, own], Some(own)),
            (own_ip, &[own, another_port], Some(another_port)),
            (own_ip, &[other, own, other], Some(other)),
        ] {
            for (keepalive, silence) in [
                (Keepalive::Auto, Some(FIRST)),
                (Keepalive::Every(7 * S), Some(7 * S)),
                (Keepalive::Off, None),
            ] {
                let mut paths = client(&[0]);
                paths.list[0].path = Path { local, ..paths.list[0].path };
                paths.set_keepalive(keepalive);
                seen.iter().for_each(|seen| paths.hear_seen(0, *seen));
                let mut expected = Vec::new();
                let mut before = None;
                for seen in seen.iter().copied() {
                    if before != Some(seen) {
                        expected.push(PathEvent::Seen { before, seen });
                    }
                    let once = !expected.iter().any(|event| matches!(event, PathEvent::Translated { .. }));
                    if let Some(silence) = silence.filter(|_| translated == Some(seen) && once) {
                        expected.push(PathEvent::Translated { seen, silence });
                    }
                    before = Some(seen);
                }
                let events: Vec<_> = std::iter::from_fn(|| paths.poll_event()).collect();
                assert_eq!(events, expected, "{local:?} seen at {seen:?}");
                assert_eq!(paths.list[0].keep.nat, translated.is_some());
            }
        }
        // Inside the control connection there is no such address, and a server isn't told.
        let mut inside = client(&[INSIDE]);
        inside.hear_seen(0, other);
        let mut server = server(at("192.0.2.1:4000"));
        std::iter::from_fn(|| server.poll_event()).for_each(drop);
        server.hear_seen(0, other);
        assert_eq!((inside.poll_event(), server.poll_event()), (None, None));
    }

    #[test]
    fn a_path_that_failed_says_nothing_of_its_nat() {
        let mut paths = translated();
        paths.try_silence(start(), 0);
        let keep = &mut paths.list[0].keep;
        (keep.after, keep.doubt) = (Some(S), Some(S));
        keep.forget();
        assert!(keep.trial.is_none() && keep.after.is_none() && keep.doubt.is_none());
    }

    #[test]
    fn only_the_answer_to_the_first_try_says_that_the_path_worked_all_along() {
        for (number, expired) in [(0, true), (1, false)] {
            let mut paths = translated();
            paths.list[0].keep.doubt = Some(40 * S);
            (0..2).for_each(|_| paths.ask(start(), 0, false));
            let (path, message) = said(&mut paths)[number];
            let InBand::PathChallenge(nonce) = message else { panic!("{message:?}") };
            paths.heard(start() + MS, path, true, PACKET, Some(InBand::PathResponse(nonce, path.remote)));
            assert_eq!(paths.list[0].keep.silence.limit.is_some(), expired, "try {number}");
        }
    }
}
