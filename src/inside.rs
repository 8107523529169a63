//! The data channel inside the control connection: where UDP doesn't get through, sealed datagrams travel as messages
//! between the others. To a session it is one more path.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::channel::{Broken, ControlChannel};
use crate::drops::DropReason;
use crate::egress::Outlet;
use crate::path::{INSIDE, Path};
use crate::sys::udp::{ReceiveBuffers, Received, Unsent};
use crate::wire::control::{MAX_MESSAGE, Message};

/// UDP sockets, and the way through the control connection beside them.
#[derive(Debug)]
pub struct WithInside<O> {
    /// The sockets.
    pub udp: O,
    waiting: RefCell<VecDeque<Vec<u8>>>,
    bytes: Cell<usize>,
}

impl<O: Outlet> WithInside<O> {
    /// Nothing waits.
    pub fn new(udp: O) -> WithInside<O> {
        WithInside { udp, waiting: RefCell::default(), bytes: Cell::new(0) }
    }

    /// Sends what waits, as far as the connection takes it without making other messages wait for long.
    pub fn flush(&self, control: &mut ControlChannel) -> Result<(), Broken> {
        let mut waiting = self.waiting.borrow_mut();
        while !waiting.is_empty() && control.unsent() < AHEAD_BYTES {
            let Some(datagram) = waiting.pop_front() else { break };
            self.bytes.set(self.bytes.get() - datagram.len());
            control.send(&Message::Datagram(datagram))?;
        }
        Ok(())
    }

    /// The connection is gone, and what waited with it; says how many datagrams.
    pub fn clear(&self) -> u64 {
        self.bytes.set(0);
        self.waiting.take().len() as u64
    }

    /// Something waits.
    pub fn is_waiting(&self) -> bool {
        self.bytes.get() > 0
    }
}

impl<O: Outlet> Outlet for WithInside<O> {
    fn send(&self, path: &Path, ecn: u8, datagrams: &[u8], stride: usize) -> Result<(), Unsent> {
        if path.carrier != INSIDE {
            return self.udp.send(path, ecn, datagrams, stride);
        }
        let unsent = |reason| Err(Unsent { reason, datagrams: datagrams.len().div_ceil(stride) });
        // All but the last are as long as the first.
        if stride.min(datagrams.len()) > MOST_BYTES {
            return unsent(DropReason::TooBig);
        }
        if self.bytes.get() + datagrams.len() > WAITING_BYTES {
            return unsent(DropReason::SocketFull);
        }
        self.bytes.set(self.bytes.get() + datagrams.len());
        self.waiting.borrow_mut().extend(datagrams.chunks(stride).map(<[u8]>::to_vec));
        Ok(())
    }

    fn send_whole(&self, path: &Path, datagram: &[u8]) -> Result<(), DropReason> {
        match path.carrier {
            // Nothing there is cut.
            INSIDE => self.send(path, 0, datagram, datagram.len()).map_err(|unsent| unsent.reason),
            _ => self.udp.send_whole(path, datagram),
        }
    }

    fn max_segments(&self) -> usize {
        self.udp.max_segments()
    }
}

/// The path through the control connection to `peer`.
pub fn path(peer: SocketAddr) -> Path {
    Path::new(peer, None).by(INSIDE)
}

/// Puts a datagram that came from `peer` where received ones are, to be opened like them.
pub fn receive(peer: SocketAddr, datagram: &[u8], buffers: &mut ReceiveBuffers) -> Received {
    buffers[0][..datagram.len()].copy_from_slice(datagram);
    Received { buffer: 0, len: datagram.len(), stride: datagram.len().max(1), path: path(peer), ecn: 0 }
}

/// Puts an inner packet that came with the client's Hello where [`crate::ingress::Ingress::take_early`] looks for it.
pub fn receive_early(packet: &[u8], buffers: &mut ReceiveBuffers) -> usize {
    buffers[0][..packet.len()].copy_from_slice(packet);
    packet.len()
}

/// Of a datagram that fits a message.
const MOST_BYTES: usize = MAX_MESSAGE - 12;
/// What may wait; more is dropped, so that TCP inside the tunnel notices.
const WAITING_BYTES: usize = 256 << 10;
/// What the connection may have taken without having sent it.
const AHEAD_BYTES: usize = 32 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::encode;

    /// A socket that nothing is to be sent by.
    struct Unused;

    impl Outlet for Unused {
        fn send(&self, _: &Path, _: u8, _: &[u8], _: usize) -> Result<(), Unsent> {
            panic!("sent by UDP");
        }

        fn send_whole(&self, _: &Path, _: &[u8]) -> Result<(), DropReason> {
            panic!("sent by UDP");
        }

        fn max_segments(&self) -> usize {
            64
        }
    }

    #[test]
    fn what_fits_no_message_is_dropped_alone() {
        let path = path("192.0.2.1:4000".parse().expect("an address"));
        let net = WithInside::new(Unused);
        let refused =
            |bytes: usize, stride| net.send(&path, 0, &vec![0; bytes], stride).map_err(|u| u.reason);
        assert_eq!(refused(MOST_BYTES + 1, MOST_BYTES + 1), Err(DropReason::TooBig));
        assert_eq!(refused(MOST_BYTES, MOST_BYTES), Ok(()));
        assert!(encode(&Message::Datagram(vec![0; MOST_BYTES])).is_ok());
        assert!(encode(&Message::Datagram(vec![0; MOST_BYTES + 1])).is_err());
        assert_eq!(refused(20_000, 1_000), Ok(()));
        assert_eq!(net.clear(), 21);
        assert_eq!(refused(WAITING_BYTES + 1, 1_000), Err(DropReason::SocketFull));
    }
}
