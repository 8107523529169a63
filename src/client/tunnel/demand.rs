//! What the tunnel process does beyond its usual where a session is made on demand: it sends first what woke it, tells
//! the supervisor how it is doing, and leaves when nobody needs the session any more.

use std::time::Duration;

use super::{Tunnel, Turn};
use crate::client::carry::{Link, Word};
use crate::client::ipc::{Progress, Request};
use crate::sys::poller::Interest;
use crate::time::Time;
use crate::wire::control::Reason;

impl Tunnel<'_> {
    /// Sends what was held, before anything of the device, and begins to look for idleness.
    pub(super) fn send_held(&mut self, link: &mut Link) -> Turn<()> {
        let Some(demand) = &mut self.setup.on_demand else { return Ok(()) };
        let limit = Duration::from_millis(demand.idle_ms);
        link.set_idle(limit);
        let held = std::mem::take(&mut demand.held);
        if !held.is_empty() {
            link.send_held(&held, &mut self.buffers);
            self.tell(Progress::HeldSent)?;
        }
        self.tell(Progress::Established)
    }

    /// When [`leave_if_idle`](Tunnel::leave_if_idle) has something to do.
    pub(super) fn poll_leave(&self) -> Option<Time> {
        self.leaving.or_else(|| self.link.as_ref()?.idle_at())
    }

    /// Says goodbye to the server if nothing passed for long enough. What comes to the device from then on waits there;
    /// what is on its way to us is still taken in.
    pub(super) fn leave_if_idle(&mut self, now: Time) -> Turn<()> {
        if self.poll_leave().is_none_or(|at| at > now) {
            return Ok(());
        }
        if self.leaving.is_some() {
            return Err(self.leave());
        }
        self.tell(Progress::Leaving { by_server: false })?;
        self.retry_at = None;
        if let Some(attempt) = self.attempt.take() {
            self.drop_attempt(attempt, Reason::Leaving);
        }
        self.leaving = Some(now + LEAVE_FOR);
        if let Some(link) = &mut self.link {
            link.say_goodbye(&self.poller, Reason::Leaving);
        }
        self.wait_for_packets(Interest::Nothing)
    }

    /// Nothing more comes when the server has closed the control connection.
    pub(super) fn heed_last_words(&mut self) -> Turn<()> {
        let words = self.link.as_mut().map(|link| link.drain(&self.poller)).unwrap_or_default();
        let is_last = |word: &Word| {
            matches!(word, Word::ControlLost(_) | Word::Ended { .. } | Word::Failed(_))
        };
        if words.iter().any(is_last) { Err(self.leave()) } else { Ok(()) }
    }

    /// Whether the server ended the session because nobody needs it, which is no reason for another one.
    pub(super) fn hung_up(&mut self, reason: Reason, by_peer: bool) -> Turn<bool> {
        if !by_peer || self.setup.on_demand.is_none() || reason != Reason::Leaving {
            return Ok(false);
        }
        self.tell(Progress::Leaving { by_server: true })?;
        self.leave();
        Ok(true)
    }

    /// Tells the supervisor, where it wants to know.
    pub(super) fn tell(&self, progress: Progress) -> Turn<()> {
        match self.setup.on_demand {
            Some(_) => self.ask(&Request::Progress(progress)),
            None => Ok(()),
        }
    }
}

/// The server answers a goodbye by closing the connection, a round trip later.
const LEAVE_FOR: Duration = Duration::from_secs(1);
