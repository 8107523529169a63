//! How large a datagram may be on each path ([`crate::pmtu`]). Probes are challenges padded to the size in question.
//! They are sent on proven paths only, and only after data: an idle session is silent, but for what data that was sent
//! last makes it look into.

use std::time::Duration;

use super::known::Known;
use super::{PathEvent, Paths, Say};
use crate::path::INSIDE;
use crate::pmtu::{BASE, Search, State};
use crate::time::Time;
use crate::wire::data::OVERHEAD;
use crate::wire::inband::InBand;

/// A path's search, from the first data on it.
#[derive(Clone, Debug)]
pub(super) struct Sizing {
    search: Search,
    /// Latest probes: nonce, size, when they were sent.
    probes: Vec<([u8; 8], usize, Time)>,
    /// Data was sent since the last probe.
    due: bool,
    /// The search has come to an end once; before, nothing is said of the size.
    known: bool,
}

impl Paths {
    /// The ends have devices with this MTU: datagrams needn't be larger than such packets.
    pub fn set_mtu(&mut self, mtu: usize) {
        self.inner_mtu = Some(mtu);
    }

    /// The largest packet that goes in one piece wherever data goes now; `None` where nobody knows yet.
    pub fn mtu(&self) -> Option<usize> {
        self.mtu
    }

    /// The same, where it is less than what the device sends.
    pub fn narrow(&self) -> Option<usize> {
        self.narrow
    }

    /// The same again, for senders to be told: they remember it for long, so that nothing provisional is said.
    pub fn announced(&self) -> Option<usize> {
        self.narrow.filter(|_| self.settled)
    }

    /// Datagrams with data of up to `size` bytes were sent where data goes now.
    pub fn handle_sent(&mut self, now: Time, size: usize) {
        let Some(inner_mtu) = self.inner_mtu else { return };
        for at in 0..self.list.len() {
            let in_use = self.targets.contains(&at) || self.shared().any(|shared| shared == at);
            if !in_use && !self.is_usable(at) {
                continue;
            }
            let known = &mut self.list[at];
            if !known.proven || known.path.carrier == INSIDE {
                continue;
            }
            let sizing = known.sizing.get_or_insert_with(|| Sizing {
                search: Search::new(now, inner_mtu + OVERHEAD),
                probes: Vec::new(),
                due: false,
                known: false,
            });
            // A spare path is to be known before it is needed; after that it costs nothing.
            if !in_use && sizing.known {
                continue;
            }
            sizing.due = true;
            sizing.search.handle_sent(now, if in_use { size } else { 0 });
            if sizing.search.state() == State::Error && now.since(known.heard) < HEARD_LATELY {
                // It may just have been away.
                sizing.search.confirm(now);
            }
            self.ask_size(now, at);
        }
    }

    /// Our own kernel refused this probe as too large: it counts as never sent.
    pub fn handle_refused(&mut self, now: Time, say: &Say) {
        let InBand::PathChallenge(nonce) = say.message else { return };
        let Some(at) = self.find(say.path.key()) else { return };
        let Some(sizing) = &mut self.list[at].sizing else { return };
        if let Some(probe) = sizing.probes.iter().position(|(n, ..)| *n == nonce) {
            let (_, size, _) = sizing.probes.swap_remove(probe);
            sizing.search.handle_refused(now, size);
            sizing.due = true;
            self.know_size(now, at);
        }
    }

    /// An answer came, perhaps to one of our probes.
    pub(super) fn hear_size(&mut self, now: Time, at: usize, nonce: [u8; 8]) {
        let Some(sizing) = &mut self.list[at].sizing else { return };
        if let Some(probe) = sizing.probes.iter().position(|(n, ..)| *n == nonce) {
            let (_, size, sent) = sizing.probes.swap_remove(probe);
            sizing.search.handle_answer(now, size, now.since(sent));
            self.know_size(now, at);
        }
    }

    /// When the search on the path at `at` has something to do.
    pub(super) fn size_due(&self, at: usize) -> Option<Time> {
        let known = &self.list[at];
        if is_in_doubt(known) { None } else { known.sizing.as_ref()?.search.poll_timeout() }
    }

    pub(super) fn look_at_size(&mut self, now: Time, at: usize) {
        if self.size_due(at).is_some_and(|due| due <= now)
            && let Some(sizing) = &mut self.list[at].sizing
        {
            sizing.search.handle_timeout(now);
            self.know_size(now, at);
        }
    }

    /// The search went on: takes in what it says, and goes on.
    fn know_size(&mut self, now: Time, at: usize) {
        if let Some(sizing) = &mut self.list[at].sizing {
            sizing.known |= matches!(sizing.search.state(), State::SearchComplete | State::Error);
        }
        self.weigh();
        self.ask_size(now, at);
    }

    /// Sends the probes that are due.
    fn ask_size(&mut self, now: Time, at: usize) {
        let known = &mut self.list[at];
        let ready = !is_in_doubt(known);
        let Some(sizing) = &mut known.sizing else { return };
        let mut probes = Vec::new();
        while (sizing.due || sizing.search.is_urgent())
            && ready
            && let Some(size) = sizing.search.poll_probe(now)
        {
            probes.push(size);
        }
        sizing.due &= probes.is_empty();
        let path = known.path;
        for size in probes {
            let nonce = self.nonce();
            // A NAT sees it as it sees any other.
            self.list[at].keep.sent(now);
            if let Some(sizing) = &mut self.list[at].sizing {
                if sizing.probes.len() >= MOST_PROBES {
                    sizing.probes.remove(0);
                }
                sizing.probes.push((nonce, size, now));
            }
            self.said.push_back(Say { message: InBand::PathChallenge(nonce), path, pad: size });
        }
    }

    /// Works out what goes on every path that data is sent to.
    pub(super) fn weigh(&mut self) {
        let Some(inner_mtu) = self.inner_mtu else { return };
        let sizings = || {
            let places = self.targets.iter().copied().chain(self.shared());
            let targets = places.filter_map(|at| self.list.get(at)?.sizing.as_ref());
            targets.filter(|sizing| sizing.known)
        };
        let mtu = sizings().map(|sizing| (sizing.search.current() - OVERHEAD).min(inner_mtu)).min();
        let settled = sizings().all(|sizing| sizing.search.state() == State::SearchComplete);
        self.settled = settled;
        self.narrow = mtu.filter(|mtu| *mtu < inner_mtu);
        if mtu.is_some() && mtu != self.mtu {
            self.events.extend(mtu.map(|mtu| PathEvent::Mtu { mtu }));
        }
        self.mtu = mtu;
    }
}

impl Say {
    /// Whether it has to arrive whole or not at all: a challenge with padding asks for nothing but the path's MTU.
    pub fn is_probe(&self) -> bool {
        matches!(self.message, InBand::PathChallenge(_)) && self.pad >= BASE
    }
}

/// Whether it answers at all is what has to be found out first: a probe would say nothing.
fn is_in_doubt(known: &Known) -> bool {
    known.is_lost() || known.asked.as_ref().is_some_and(|asked| asked.tries.len() > 1)
}

/// Probes whose answers are still welcome.
const MOST_PROBES: usize = 8;
/// A path that was heard within this time isn't gone.
const HEARD_LATELY: Duration = Duration::from_secs(1);
