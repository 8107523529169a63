//! The client leads: which of its ways is used.

use super::known::Known;
use super::{Mode, Paths};
use crate::keys::Role;
use crate::path::Path;
use crate::time::Time;
use crate::wire::inband::PathStatus;

impl Paths {
    /// The client may be somewhere else, although it uses the same path.
    pub fn rebind(&mut self, now: Time) {
        if !self.list.is_empty() {
            self.list[0].asked = None;
            // If the server sees us elsewhere now, it isn't for the silence.
            self.list[0].keep.forget();
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
        let left = self.list.first().filter(|active| gone(active)).map(|active| active.path);
        self.list.retain(|known| !gone(known));
        if let Some(before) = left {
            // Whatever is first now: the best one has its turn below.
            self.go_over(now, self.best(), before);
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

    /// Place of the best way.
    pub(super) fn best(&self) -> usize {
        let order = |at: &usize| {
            let known = &self.list[*at];
            let silent = known.lost.is_some_and(|lost| lost.back.is_none());
            (silent, known.lost.is_some(), !known.proven, known.rank)
        };
        (0..self.list.len()).min_by_key(order).unwrap_or(0)
    }

    /// Goes over to a better way.
    pub(super) fn choose(&mut self, now: Time) {
        match self.role {
            Role::Server => {
                let Some(active) = self.list.first() else { return };
                let usable = || (1..self.list.len()).filter(|at| self.is_usable(*at));
                let spare = || (1..self.list.len()).filter(|at| self.is_spare(*at));
                let preferred = |at: &usize| self.list[*at].status == Some(PathStatus::Preferred);
                let other = match active.lost {
                    Some(_) => {
                        usable().find(preferred).or_else(|| usable().next()).or_else(|| spare().next())
                    }
                    // What the client wants, where that was only lost for a while.
                    None if active.is_further() => usable().find(preferred),
                    None => None,
                };
                if let Some(other) = other {
                    self.switch(now, other);
                }
            }
            // Which has one path at the least.
            Role::Client => {
                let best = self.best();
                let active = &self.list[0];
                // The one dialled gets the time of a round trip.
                let tried = active.proven || active.asked.as_ref().is_none_or(|asked| asked.tries.len() > 1);
                if best > 0 && self.list[best].proven && tried {
                    self.go_over(now, best, active.path);
                    // The server may go on with it as a spare.
                    if self.list[best].lost.is_none() {
                        self.list[best].asked = None;
                        self.ask(now, best, false);
                    }
                }
            }
        }
        self.refresh();
    }

    /// The way at `at` is the one in use from now on.
    fn go_over(&mut self, now: Time, at: usize, before: Path) {
        self.bring_first(now, at, before);
        self.list[0].asked = None;
        self.ask(now, 0, true);
    }
}
