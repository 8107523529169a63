//! The session's packets on their way to the guard, where the guard is the one that writes to the device.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, poll};

use tunguard::batch::BatchWriter;
use tunguard::drops::DropReason;
use tunguard::segment::pieces;
use tunguard::sys::mq::Writer;
use tunguard::wire::vnet::VnetHeader;

/// The queue to the guard, and the batch being filled for it.
pub struct Uplink {
    queue: Writer,
    batch: BatchWriter,
    /// In the batch: packets as the client sent them.
    filled: Count,
    /// In batches the queue had no room for.
    lost: Count,
}

/// Packets and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Uplink {
    /// Batches for `queue`, whose messages have `message_bytes` at most.
    pub fn new(queue: Writer, message_bytes: usize) -> Uplink {
        let (filled, lost) = Default::default();
        Uplink { queue, batch: BatchWriter::new(message_bytes), filled, lost }
    }

    /// Appends one super-packet to the batch, which goes out first where it is full; in pieces where it doesn't even
    /// fit an empty one (the kernel's default message size).
    pub fn worker_to_guard(&mut self, parts: &[IoSlice<'_>]) -> Result<(), DropReason> {
        // Virtio header, merged header (empty for a single packet), then each packet's payload.
        let (vnet, packet) = parts.split_first().ok_or(DropReason::BadInner)?;
        let vnet = VnetHeader::parse(vnet).ok_or(DropReason::BadInner)?;
        let mut whole = Vec::with_capacity(packet.iter().map(|part| part.len()).sum());
        packet.iter().for_each(|part| whole.extend_from_slice(part));
        let members = packet.len().saturating_sub(1) as u64;
        let merged_header = packet.first().map_or(0, |head| head.len()) as u64;
        let room = self.batch.room_for_packet();
        let cut = pieces(vnet, &whole, room, |vnet, head, payload| {
            if !self.batch.push(&vnet, head, payload) {
                self.send();
                self.batch.push(&vnet, head, payload);
            }
        });
        cut.map_err(|_| DropReason::TooBig)?;
        self.filled.packets += members;
        // Each member had the header that now stands for all.
        self.filled.bytes += whole.len() as u64 + merged_header * members.saturating_sub(1);
        Ok(())
    }

    /// Sends what is there; says what was lost since the last call.
    pub fn flush(&mut self) -> Count {
        self.send();
        std::mem::take(&mut self.lost)
    }

    fn send(&mut self) {
        if !self.batch.is_empty() && !self.posted() {
            self.lost.packets += self.filled.packets;
            self.lost.bytes += self.filled.bytes;
        }
        self.batch.clear();
        self.filled = Count::default();
    }

    /// Whether the batch is in the queue. A full one is waited for, briefly: meanwhile the client's packets wait in
    /// our socket, and only ours do.
    fn posted(&self) -> bool {
        let mut sent = self.queue.send(self.batch.message());
        if matches!(sent, Ok(false)) {
            let mut room = [PollFd::new(self.queue.as_fd(), PollFlags::POLLOUT)];
            let _ = poll(&mut room, WAIT_MS);
            sent = self.queue.send(self.batch.message());
        }
        matches!(sent, Ok(true))
    }
}

impl AsFd for Uplink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

/// How long a full queue may hold this session up.
const WAIT_MS: u8 = 20;
