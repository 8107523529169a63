//! The server follows its client.

use std::time::Duration;

use super::known::Known;
use super::{Key, PathEvent, Paths};
use crate::keys::Role;
use crate::path::Path;
use crate::time::Time;
use crate::wire::inband::PathStatus;

#[derive(Clone, Copy, Debug)]
pub(super) struct Nomination {
    pub(super) key: Key,
    /// The one before, where the peer was taken to be at the new one already.
    pub(super) before: Option<Key>,
    /// The peer itself said that it moved.
    pub(super) rebind: bool,
    pub(super) since: Time,
    /// Until then the old path may still answer.
    pub(super) grace: Time,
    /// That time is over.
    pub(super) graced: bool,
}

impl Paths {
    /// Inner packets came with the client's Hello, inside the control connection that is `path`: what there is for the
    /// client goes there, too, until it is heard on the data channel. Nothing is asked there: the client doesn't take it
    /// for a path yet.
    pub fn heard_early(&mut self, now: Time, path: Path) {
        if !self.list.is_empty() {
            return;
        }
        self.early = true;
        self.list.push(Known { proven: true, ..Known::new(path, now, 0) });
        self.events.push_back(PathEvent::Moved { old: None, new: path });
        self.refresh();
    }

    /// The first datagram after that came by `path`. There the client is; but where nothing vouches for that address,
    /// data goes to both until it has answered.
    pub(super) fn hear_after_early(&mut self, now: Time, path: Path) {
        self.early = false;
        if self.list.first().is_some_and(|inside| inside.path.key() == path.key()) {
            return self.ask(now, 0, false);
        }
        self.add(now, path);
        let at = self.list.len() - 1;
        self.list[at].proven = self.vouched == Some(path.remote.ip());
        self.nominate(now, at, true);
    }

    pub(super) fn hear_status(&mut self, now: Time, at: usize, status: PathStatus) {
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
                // A spare isn't where the client is; of several in use one may be, if it says so.
                let spare = status == PathStatus::Standby;
                let key = self.list[at].path.key();
                self.nomination.take_if(|n| n.key == key && n.before.is_none() && (spare || !n.rebind));
                if !self.list[at].proven && self.list[at].asked.is_none() {
                    self.ask(now, at, false);
                }
            }
        }
        self.refresh();
    }

    pub(super) fn hear_rebind(&mut self, now: Time, at: usize) {
        if at == 0 {
            // It is here, whatever somebody else nominated.
            self.nomination = None;
            self.refresh();
        } else {
            if self.list[at].status == Some(PathStatus::Standby) {
                self.list[at].status = Some(PathStatus::Preferred);
            }
            self.nominate(now, at, true);
        }
    }

    pub(super) fn nominate(&mut self, now: Time, at: usize, rebind: bool) {
        let (key, old) = (self.list[at].path.key(), self.list[0].path.key());
        if let Some(pending) = self.nomination.as_mut().filter(|n| n.key == key) {
            pending.rebind |= rebind;
            return;
        }
        let grace = self.list[0].rtt.map_or(GRACE_BLIND, |rtt| rtt * 3 / 2 + GRACE);
        let mut nomination =
            Nomination { key, before: None, rebind, since: now, grace: now + grace, graced: false };
        if self.list[at].proven && !self.list[at].is_lost() {
            nomination.before = Some(old);
            // Data goes to both, so there is time for an answer that queues behind it.
            nomination.grace = now + GRACE_BEFORE;
            self.switch(now, at);
        }
        self.nomination = Some(nomination);
        // Whoever says that it moved isn't at the old place.
        let asked = [Some(key), Some(old).filter(|_| !rebind)];
        for at in asked.into_iter().flatten().filter_map(|key| self.find(key)).collect::<Vec<_>>() {
            if self.list[at].asked.is_none() {
                self.ask(now, at, false);
            }
        }
        self.refresh();
    }

    pub(super) fn answered_since(&self, key: Key, since: Time) -> bool {
        self.find(key).is_some_and(|at| self.list[at].answered.is_some_and(|answered| answered >= since))
    }

    /// Who answered, and what follows.
    pub(super) fn decide(&mut self, now: Time) {
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
            } else if n.graced && !n.rebind && self.answered_since(before, n.since) && !self.left(before) {
                self.nomination = None;
                // It has to answer first next time.
                self.list[0].proven = false;
                if let Some(back) = self.find(before) {
                    self.switch(now, back);
                }
            } else if over {
                self.nomination = None;
            }
            return;
        }
        let old = self.list[0].path.key();
        let left = self.left(old);
        let old_answers = self.answered_since(old, n.since) && !left;
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

    /// Its client has said that it is somewhere else, too.
    fn left(&self, key: Key) -> bool {
        let status = self.find(key).and_then(|at| self.list[at].status);
        status.is_some_and(|status| status != PathStatus::Preferred)
    }

    pub(super) fn switch(&mut self, now: Time, at: usize) {
        let old = self.list[0].path;
        // Left by its client.
        if self.list[0].lost.is_none() && !self.list[0].is_further() {
            self.list[0].status = None;
        }
        self.bring_first(now, at, old);
        (self.list[at].waiting, self.list[at].asked) = (None, None);
    }

    pub(super) fn add(&mut self, now: Time, path: Path) {
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
    pub(super) fn forget_strangers(&mut self) {
        let mut first = true;
        self.list.retain(|known| std::mem::take(&mut first) || known.proven || known.is_further());
        self.refresh();
    }
}

/// Paths remembered.
pub(super) const MOST_KNOWN: usize = 8;
pub(super) const NOMINATIONS: u32 = 4;
/// The client's own word has a bucket of its own, that no copies of packets can empty.
pub(super) const REBINDS: u32 = 16;
pub(super) const NOMINATION_EVERY: Duration = Duration::from_secs(1);
/// Someone who nominated an address answers within this time.
pub(super) const NOMINATED_FOR: Duration = Duration::from_secs(3);
/// What the old path may take longer than one and a half of its round trips.
const GRACE: Duration = Duration::from_millis(10);
/// The same, where the peer is taken to be at the new one already.
const GRACE_BEFORE: Duration = Duration::from_secs(1);
const GRACE_BLIND: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Secret;
    use crate::path::INSIDE;
    use crate::paths::REBIND_BYTES;
    use crate::paths::tests::{MS, PACKET, at, here, said, server, server_with, start};
    use crate::wire::inband::InBand;

    /// A server whose client sent packets with its Hello.
    fn early(vouched: Option<&str>) -> (Paths, Path) {
        let inside = at("192.0.2.1:55555").by(INSIDE);
        let vouched = vouched.map(|ip| ip.parse().expect("an address"));
        let mut paths = Paths::following(Secret::from_bytes([1; 32]), vouched);
        paths.heard_early(start(), inside);
        (paths, inside)
    }

    #[test]
    fn what_answers_early_packets_goes_inside() {
        let (mut paths, inside) = early(None);
        assert_eq!(paths.poll_event(), Some(PathEvent::Moved { old: None, new: inside }));
        assert_eq!(paths.target(start(), 0, 100_000), Some(inside));
        assert!(said(&mut paths).is_empty(), "the client doesn't take it for a path yet");
        // Where the client is, is known already.
        let mut known = server(at("192.0.2.1:4000"));
        known.heard_early(start(), inside);
        assert_eq!((known.known().len(), known.early), (1, false));
    }

    #[test]
    fn the_first_datagram_after_early_packets_says_where_the_client_is() {
        let (mut paths, inside) = early(None);
        paths.heard(start() + MS, inside, true, PACKET, None);
        assert_eq!((paths.known().len(), paths.early), (1, false));
        assert!(matches!(said(&mut paths)[..], [(path, InBand::PathChallenge(_))] if path == inside));
        let client = at("192.0.2.1:4000");
        for (vouched, proven) in [(Some("192.0.2.1"), true), (Some("192.0.2.2"), false), (None, false)] {
            let (mut paths, inside) = early(vouched);
            paths.heard(start() + MS, client, true, PACKET, None);
            assert_eq!(here(&paths), if proven { client } else { inside }, "{vouched:?}");
            let at = paths.find(client.key()).expect("known");
            assert_eq!(paths.list[at].proven, proven);
            assert_eq!(paths.targets(), if proven { 1 } else { 2 });
        }
    }

    #[test]
    fn a_rebind_makes_more_of_a_nomination() {
        let new = at("203.0.113.5:6000");
        let mut paths = server(at("192.0.2.1:4000"));
        let nomination = |paths: &Paths| paths.nomination.map(|n| (n.key, n.rebind, n.since));
        for (ms, message, rebind) in [(30, None, false), (31, Some(InBand::Rebind), true), (32, None, true)] {
            paths.heard(start() + ms * MS, new, true, REBIND_BYTES, message);
            assert_eq!(nomination(&paths), Some((new.key(), rebind, start() + 30 * MS)), "{ms}");
        }
        let newer = at("203.0.113.6:6000");
        paths.heard(start() + 33 * MS, newer, true, PACKET, None);
        assert_eq!(nomination(&paths), Some((newer.key(), false, start() + 33 * MS)));
    }

    #[test]
    fn only_who_may_still_be_at_the_old_place_goes_back_there() {
        let standby = Some(PathStatus::Standby);
        // A REBIND's word stands; so does that of a client which uses the old path beside others.
        for (rebind, status, graced, back) in [
            (false, None, true, true),
            (false, None, false, false),
            (true, None, true, false),
            (false, standby, true, false),
        ] {
            let mut paths = server_with(&[None, None], &[None, None]);
            let (old, new) = (here(&paths), paths.list[1].path);
            paths.nominate(start() + 30 * MS, 1, rebind);
            assert_eq!(here(&paths), new);
            (paths.list[1].answered, paths.list[1].status) = (Some(start() + 40 * MS), status);
            let mut pending = paths.nomination.expect("one");
            pending.graced = graced;
            paths.nomination = Some(pending);
            paths.decide(start() + 50 * MS);
            assert_eq!(here(&paths), if back { old } else { new }, "{rebind}, {status:?}, {graced}");
        }
    }

    #[test]
    fn who_answers_at_the_old_place_never_left_it() {
        let new = at("203.0.113.5:6000");
        for (message, status, ends) in [
            (None, None, true),
            (None, Some(PathStatus::Preferred), true),
            (None, Some(PathStatus::Standby), false),
            (Some(InBand::Rebind), None, false),
        ] {
            let mut paths = server(at("192.0.2.1:4000"));
            paths.heard(start() + 30 * MS, new, true, REBIND_BYTES, message);
            (paths.list[0].answered, paths.list[0].status) = (Some(start() + 40 * MS), status);
            paths.decide(start() + 50 * MS);
            let forgotten = paths.find(new.key()).is_none();
            assert_eq!((paths.nomination.is_none(), forgotten), (ends, ends), "{message:?}, {status:?}");
        }
    }
}
