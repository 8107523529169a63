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
use crate::wire::control::Message;

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
        if self.bytes.get() + datagrams.len() > WAITING_BYTES {
            return Err(Unsent {
                reason: DropReason::SocketFull,
                datagrams: datagrams.len().div_ceil(stride),
            });
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

/// What may wait; more is dropped, so that TCP inside the tunnel notices.
const WAITING_BYTES: usize = 256 << 10;
/// What the connection may have taken without having sent it.
const AHEAD_BYTES: usize = 32 << 10;
