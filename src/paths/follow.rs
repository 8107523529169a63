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
