//! One path, and what may be sent on it.

use std::time::Duration;

use super::balance::Load;
use super::keep::Keep;
use super::mtu::Sizing;
use crate::path::Path;
use crate::time::Time;
use crate::wire::inband::PathStatus;

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
    pub(super) proven: bool,
    /// When a challenge was last answered on it.
    pub(super) answered: Option<Time>,
    /// What the peer said of it (to the server), or what we said of it (of the client).
    pub(super) status: Option<PathStatus>,
    /// Nothing answers any more.
    pub(super) lost: Option<Lost>,
    /// Bytes that may be sent to it before it is proven (RFC 9000 section 8.1).
    pub(super) credit: u64,
    /// Place in the client's order.
    pub(super) rank: usize,
    pub(super) heard: Time,
    /// Data was sent then, and nothing was heard by it since.
    pub(super) waiting: Option<Time>,
    pub(super) asked: Option<Asked>,
    pub(super) last_asked: Time,
    pub(super) load: Load,
    pub(super) keep: Keep,
    /// How large datagrams may be.
    pub(super) sizing: Option<Sizing>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Lost {
    pub(super) ask_at: Time,
    pub(super) wait: Duration,
    /// It answers again since then; it has to do so for a while.
    pub(super) back: Option<Time>,
}

/// A challenge, sent again and again with fresh bytes.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) since: Time,
    pub(super) tries: Vec<([u8; 8], Time)>,
    pub(super) again: Time,
    /// A REBIND goes with it.
    pub(super) rebind: bool,
    /// It was said that nothing answers.
    pub(super) doubted: bool,
}

impl Known {
    pub(super) fn new(path: Path, now: Time, rank: usize) -> Known {
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
            load: Load::default(),
            keep: Keep::new(now),
            sizing: None,
        }
    }

    /// Of a server we chose ourselves: nobody can be flooded by it.
    pub(super) fn dialled(path: Path, now: Time, rank: usize) -> Known {
        Known { credit: u64::MAX, ..Known::new(path, now, rank) }
    }

    /// What the peer thinks of it, as it said.
    pub fn status(&self) -> Option<PathStatus> {
        self.status
    }

    /// When anything was last heard on it.
    pub fn last_heard(&self) -> Time {
        self.heard
    }

    /// A challenge was answered on it.
    pub fn is_proven(&self) -> bool {
        self.proven
    }

    /// Nothing answers on it.
    pub fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    pub(super) fn heard(&mut self, now: Time, path: Path, len: usize) {
        self.path.local = path.local;
        self.heard = now;
        self.waiting = None;
        self.keep.heard();
        self.credit = self.credit.saturating_add(len as u64 * AMPLIFICATION);
    }

    /// Data is sent by it.
    pub(super) fn carries(&mut self, now: Time) {
        self.waiting.get_or_insert(now);
        self.keep.sent(now);
    }

    pub(super) fn spend(&mut self, bytes: usize) -> bool {
        if self.proven {
            return true;
        }
        let left = self.credit.checked_sub(bytes as u64);
        self.credit = left.unwrap_or(self.credit);
        left.is_some()
    }

    /// The client uses it beside another.
    pub(super) fn is_further(&self) -> bool {
        matches!(self.status, Some(PathStatus::Standby | PathStatus::Copy | PathStatus::Share))
    }
}

/// Of bytes received from an address that hasn't answered yet (RFC 9000 section 8.1).
const AMPLIFICATION: u64 = 3;
