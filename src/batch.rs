//! What one queue message carries: packets of one session, one after the other.
//!
//! ```text
//! | length (2) | virtio header (10) | packet | length (2) | virtio header | packet | ...
//! ```
//! The length is the packet's, in the machine's byte order, as is the virtio header: both ends are on one host.
//!
//! A batch that is longer than a message lies in the session's memory ([`crate::sys::shared`]), and the message says
//! where, by its length no batch:
//!
//! ```text
//! | at (4) | length (4) |
//! ```

use crate::wire::vnet::{VNET_LEN, VnetHeader};

/// Bytes in front of each packet.
pub const RECORD_LEN: usize = LENGTH_LEN + VNET_LEN;
/// The largest packet of the device, as a record.
pub const MAX_RECORD: usize = RECORD_LEN + u16::MAX as usize;
const LENGTH_LEN: usize = 2;
/// Less than any record.
const PLACE_LEN: usize = 8;

/// Where in the session's memory a batch lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its first byte.
    pub at: u32,
    /// Bytes.
    pub len: u32,
}

impl Place {
    /// As a message.
    pub fn emit(self) -> [u8; PLACE_LEN] {
        let mut message = [0; PLACE_LEN];
        message[..4].copy_from_slice(&self.at.to_ne_bytes());
        message[4..].copy_from_slice(&self.len.to_ne_bytes());
        message
    }

    /// The place a message names; `None` where the message is itself a batch.
    pub fn parse(message: &[u8]) -> Option<Place> {
        let message: &[u8; PLACE_LEN] = message.try_into().ok()?;
        let [a, b, c, d, rest @ ..] = *message;
        Some(Place { at: u32::from_ne_bytes([a, b, c, d]), len: u32::from_ne_bytes(rest) })
    }
}

/// A batch being filled.
pub struct BatchWriter {
    bytes: Vec<u8>,
    len: usize,
    limit: usize,
}

impl BatchWriter {
    /// An empty message of at most `limit` bytes.
    pub fn new(limit: usize) -> BatchWriter {
        // Room for one packet beyond the limit: the device is read straight into the message, and only then
        // is it known how long the packet is.
        BatchWriter { bytes: vec![0; limit + MAX_RECORD], len: 0, limit }
    }

    /// Where the next packet can be read into, its virtio header first.
    pub fn spare(&mut self) -> &mut [u8] {
        &mut self.bytes[self.len + LENGTH_LEN..]
    }

    /// Takes in the `len` bytes (virtio header and packet) that were read into [`BatchWriter::spare`]; `false`
    /// where they don't fit the message any more.
    pub fn commit(&mut self, len: usize) -> bool {
        let end = self.len + LENGTH_LEN + len;
        let Some(packet) = len.checked_sub(VNET_LEN).and_then(|n| u16::try_from(n).ok()) else {
            return false;
        };
        if end > self.limit {
            return false;
        }
        self.bytes[self.len..][..LENGTH_LEN].copy_from_slice(&packet.to_ne_bytes());
        self.len = end;
        true
    }

    /// Appends a packet; `false` where it doesn't fit any more.
    pub fn push(&mut self, vnet: &VnetHeader, head: &[u8], payload: &[u8]) -> bool {
        let len = VNET_LEN + head.len() + payload.len();
        if self.len + LENGTH_LEN + len > self.limit {
            return false;
        }
        let spare = self.spare();
        spare[..VNET_LEN].copy_from_slice(&vnet.emit());
        spare[VNET_LEN..][..head.len()].copy_from_slice(head);
        spare[VNET_LEN + head.len()..][..payload.len()].copy_from_slice(payload);
        self.commit(len)
    }

    /// The longest packet an empty message takes.
    pub fn room_for_packet(&self) -> usize {
        self.limit.saturating_sub(RECORD_LEN)
    }

    /// The message so far.
    pub fn message(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Starts the next message.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

/// The packets of a message, in order.
#[derive(Clone, Debug)]
pub struct BatchReader<'a>(&'a [u8]);

/// The rest of a message is no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRecord;

impl<'a> BatchReader<'a> {
    /// Reads `message`.
    pub fn new(message: &'a [u8]) -> BatchReader<'a> {
        BatchReader(message)
    }
}

impl<'a> Iterator for BatchReader<'a> {
    type Item = Result<(VnetHeader, &'a [u8]), BadRecord>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let record = split(self.0);
        self.0 = record.map_or(&[], |(_, _, rest)| rest);
        Some(record.map(|(vnet, packet, _)| (vnet, packet)).ok_or(BadRecord))
    }
}

fn split(bytes: &[u8]) -> Option<(VnetHeader, &[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<LENGTH_LEN>()?;
    let vnet = VnetHeader::parse(rest)?;
    let (packet, rest) = rest[VNET_LEN..].split_at_checked(u16::from_ne_bytes(*length).into())?;
    Some((vnet, packet, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_message_takes_no_more() {
        let mut batch = BatchWriter::new(2 * RECORD_LEN + 5);
        let vnet = VnetHeader { flags: 1, ..VnetHeader::default() };
        assert!(batch.push(&vnet, b"he", b"ad"));
        assert!(!batch.push(&vnet, b"to", b"o"));
        assert!(batch.push(&vnet, b"!", b""));
        let packets: Vec<_> = BatchReader::new(batch.message()).collect();
        assert_eq!(packets, [Ok((vnet, &b"head"[..])), Ok((vnet, &b"!"[..]))]);
        assert!(!batch.commit(VNET_LEN - 1), "no room for a header, no packet");
        batch.clear();
        assert!(batch.is_empty());
    }

    #[test]
    fn a_place_is_no_batch() {
        let place = Place { at: 0x0001_0203, len: 70_000 };
        assert_eq!(Place::parse(&place.emit()), Some(place));
        const { assert!(PLACE_LEN < RECORD_LEN) };
        assert_eq!(Place::parse(&[0; RECORD_LEN]), None);
    }

    proptest! {
        #[test]
        fn round_trip(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20)) {
            let mut batch = BatchWriter::new(67_000);
            for packet in &packets {
                let vnet = VnetHeader { gso_size: packet.len() as u16, ..VnetHeader::default() };
                prop_assert!(batch.push(&vnet, &[], packet));
            }
            let back: Vec<_> = BatchReader::new(batch.message()).map(|r| r.expect("a record").1.to_vec()).collect();
            prop_assert_eq!(back, packets);
        }

        #[test]
        fn random_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(BatchReader::new(&bytes).count() <= bytes.len());
        }
    }
}
