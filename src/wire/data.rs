//! The data channel's datagram.
//!
//! ```text
//! 0        8        9        10           16
//! | session ID (8) | epoch | flags | counter (6) | ciphertext ... | tag (16) |
//! ```
//! All fields are big-endian; the whole header is authenticated.

use std::fmt;
use std::ops::Range;

/// Bytes in front of the ciphertext.
pub const HEADER_LEN: usize = 16;
/// Bytes behind it.
pub const TAG_LEN: usize = 16;
/// What a datagram adds to the packet inside.
pub const OVERHEAD: usize = HEADER_LEN + TAG_LEN;
/// The counter has 48 bits; this value is never sent.
pub const COUNTER_LIMIT: u64 = (1 << 48) - 1;

/// Flag: the packet's checksum field holds only the pseudo-header's sum.
pub const PARTIAL_CSUM: u8 = 0x01;
/// Flag: an in-band message (see [`super::inband`]) instead of a packet.
pub const CONTROL: u8 = 0x02;
const KNOWN_FLAGS: u8 = PARTIAL_CSUM | CONTROL;

/// Where each field is.
pub const SESSION_ID: Range<usize> = 0..8;
const EPOCH: usize = 8;
const FLAGS: usize = 9;
const COUNTER: Range<usize> = 10..16;

/// Names a session on the wire: the first two bytes are the server's slot, the other six random.
#[derive(Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct SessionId(pub [u8; 8]);

impl SessionId {
    /// The ID made of a slot and six random bytes.
    pub fn new(slot: u16, random: [u8; 6]) -> SessionId {
        let mut id = [0; 8];
        id[..2].copy_from_slice(&slot.to_be_bytes());
        id[2..].copy_from_slice(&random);
        SessionId(id)
    }

    /// The slot the kernel steers by.
    pub fn slot(self) -> u16 {
        u16::from_be_bytes([self.0[0], self.0[1]])
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A header as values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which session.
    pub session: SessionId,
    /// Low byte of the key epoch.
    pub epoch: u8,
    /// [`PARTIAL_CSUM`] or [`CONTROL`].
    pub flags: u8,
    /// Below [`COUNTER_LIMIT`], never used twice in one epoch and direction.
    pub counter: u64,
}

/// Why bytes are no datagram of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Shorter than header and tag.
    TooShort,
    /// A flag this version doesn't know, or PARTIAL_CSUM on an in-band message.
    Flags,
}

impl Header {
    /// Reads the header of a whole datagram.
    pub fn parse(datagram: &[u8]) -> Result<Header, Malformed> {
        if datagram.len() < OVERHEAD {
            return Err(Malformed::TooShort);
        }
        let flags = datagram[FLAGS];
        if flags & !KNOWN_FLAGS != 0 || flags == KNOWN_FLAGS {
            return Err(Malformed::Flags);
        }
        let mut session = [0; 8];
        session.copy_from_slice(&datagram[SESSION_ID]);
        let mut counter = [0; 8];
        counter[2..].copy_from_slice(&datagram[COUNTER]);
        Ok(Header {
            session: SessionId(session),
            epoch: datagram[EPOCH],
            flags,
            counter: u64::from_be_bytes(counter),
        })
    }

    /// The header as bytes. The counter's upper 16 bits are not sent; [`COUNTER_LIMIT`] keeps them zero.
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        debug_assert!(self.counter < COUNTER_LIMIT);
        let mut out = [0; HEADER_LEN];
        out[SESSION_ID].copy_from_slice(&self.session.0);
        out[EPOCH] = self.epoch;
        out[FLAGS] = self.flags;
        out[COUNTER].copy_from_slice(&self.counter.to_be_bytes()[2..]);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 16] =
        [0x01, 0x02, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 7, PARTIAL_CSUM, 0, 0, 0, 1, 2, 3];

    fn header() -> Header {
        Header {
            session: SessionId::new(0x0102, [0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6]),
            epoch: 7,
            flags: PARTIAL_CSUM,
            counter: 0x010203,
        }
    }

    #[test]
    fn literal_bytes() {
        assert_eq!(header().emit(), BYTES);
        let mut datagram = BYTES.to_vec();
        datagram.extend([0; TAG_LEN]);
        assert_eq!(Header::parse(&datagram), Ok(header()));
        assert_eq!(header().session.slot(), 0x0102);
        assert_eq!(header().session.to_string(), "0102a1a2a3a4a5a6");
    }

    #[test]
    fn refuses_what_is_short_or_from_the_future() {
        let mut datagram = BYTES.to_vec();
        datagram.extend([0; TAG_LEN - 1]);
        assert_eq!(Header::parse(&datagram), Err(Malformed::TooShort));
        datagram.push(0);
        for flags in 0..=255u8 {
            datagram[9] = flags;
            let good = matches!(flags, 0 | PARTIAL_CSUM | CONTROL);
            assert_eq!(Header::parse(&datagram).is_ok(), good, "flags {flags:#x}");
        }
    }
}
