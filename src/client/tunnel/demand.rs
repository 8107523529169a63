//! What the tunnel process does beyond its usual where a session is made on demand: it sends first what woke it, tells
//! the supervisor how it is doing, and leaves when nobody needs the session any more.

use std::time::Duration;

use super::{Tunnel, Turn};
use crate::client::carry::{Link, Word};
use crate::client::ipc::{Progress, Request};
use crate::early::Early;
use crate::rigged::point;
use crate::segment::checksum;
use crate::sys::poller::Interest;
use crate::time::Time;
use crate::wire::control::Reason;
use crate::wire::vnet::{GSO_NONE, VNET_LEN, VnetHeader};

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

    /// The server has the packets that went ahead of the session.
    pub(super) fn early_arrived(&mut self, link: &mut Link) -> Turn<()> {
        let arrived = std::mem::take(&mut self.early);
        let Some(demand) = self.setup.on_demand.as_mut().filter(|_| !arrived.is_empty()) else {
            return Ok(());
        };
        demand.held.drain(..arrived.len());
        arrived.iter().for_each(|packet| link.went_early(packet.len() as u64));
        point("tunnel.early-arrived");
        if demand.held.is_empty() { self.tell(Progress::HeldSent) } else { Ok(()) }
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
        point("tunnel.idle");
        self.retry_at = None;
        if let Some(attempt) = self.attempt.take() {
            self.drop_attempt(attempt, Reason::Leaving);
        }
        self.leaving = Some(now + LEAVE_FOR);
        if let Some(link) = &mut self.link {
            link.say_goodbye(&self.poller, Reason::Idle);
        }
        self.wait_for_packets(Interest::Nothing)
    }

    /// Nothing more comes when the server has closed the control connection.
    pub(super) fn heed_last_words(&mut self) -> Turn<()> {
        let words = self.link.as_mut().map(|link| link.drain(&self.poller)).unwrap_or_default();
        let is_last =
            |word: &Word| matches!(word, Word::ControlLost(_) | Word::Ended { .. } | Word::Failed(_));
        if words.iter().any(is_last) { Err(self.leave()) } else { Ok(()) }
    }

    /// Whether the server ended the session because nobody needs it, which is no reason for another one.
    pub(super) fn hung_up(&mut self, reason: Reason, by_peer: bool) -> Turn<bool> {
        if !by_peer || self.setup.on_demand.is_none() || reason != Reason::Idle {
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

/// The first of these packets as they are inside the tunnel, as far as they may go ahead of a session.
pub(super) fn early(held: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut bounds = Early::default();
    held.iter().map_while(|read| plain(read).filter(|packet| bounds.take(packet.len()).is_ok())).collect()
}

/// The packet with its checksum complete; none that has to be cut.
fn plain(read: &[u8]) -> Option<Vec<u8>> {
    let vnet = VnetHeader::parse(read).filter(|vnet| vnet.gso_type == GSO_NONE)?;
    let mut packet = read.get(VNET_LEN..)?.to_vec();
    if vnet.needs_csum() {
        checksum::complete(&mut packet, vnet.csum_start.into(), vnet.csum_offset.into())?;
    }
    Some(packet)
}

/// The server answers a goodbye by closing the connection, a round trip later.
const LEAVE_FOR: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::MAX_EARLY;
    use crate::wire::vnet::{GSO_UDP_L4, NEEDS_CSUM};

    fn read(vnet: VnetHeader, len: usize) -> Vec<u8> {
        [&vnet.emit()[..], &vec![0x45; len]].concat()
    }

    #[test]
    fn the_first_packets_go_ahead_in_order() {
        let plain = read(VnetHeader::default(), 100);
        assert_eq!(early(&[plain.clone(), plain.clone()]), [vec![0x45; 100], vec![0x45; 100]]);
        let large = read(VnetHeader { gso_type: GSO_UDP_L4, gso_size: 50, ..VnetHeader::default() }, 100);
        assert_eq!(early(&[plain.clone(), large, plain.clone()]).len(), 1, "what comes later stays behind");
        assert_eq!(early(&vec![plain; 20]).len(), MAX_EARLY);
        assert_eq!(early(&[read(VnetHeader::default(), 2_000)]).len(), 0);
        assert_eq!(early(&[vec![0; 5]]).len(), 0);
    }

    #[test]
    fn checksums_are_completed() {
        let vnet = VnetHeader { flags: NEEDS_CSUM, csum_start: 20, csum_offset: 6, ..VnetHeader::default() };
        let packet = early(&[read(vnet, 28)]);
        assert_eq!(checksum::fold(checksum::sum(&[&packet[0][20..26], &[0x45, 0x45]].concat())), {
            !u16::from_be_bytes([packet[0][26], packet[0][27]])
        });
        let outside = VnetHeader { csum_start: 27, ..vnet };
        assert_eq!(early(&[read(outside, 28)]).len(), 0);
    }
}
