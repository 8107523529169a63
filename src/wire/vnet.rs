//! The virtio-net header in front of every packet of the TUN device (`IFF_VNET_HDR`, header size 10).
//!
//! Source: `struct virtio_net_hdr` in include/uapi/linux/virtio_net.h; fields are in the machine's byte
//! order, as the TUN driver has them by default.

use std::ops::Range;

/// Bytes of the header on the TUN device.
pub const VNET_LEN: usize = 10;

/// The checksum field holds only the pseudo-header's sum; the sum over the data is still to be added.
pub const NEEDS_CSUM: u8 = 1;
/// The checksum was verified by whoever delivered the packet.
pub const DATA_VALID: u8 = 2;

/// Not a super-packet.
pub const GSO_NONE: u8 = 0;
/// IPv4 TCP super-packet.
pub const GSO_TCPV4: u8 = 1;
/// IPv6 TCP super-packet.
pub const GSO_TCPV6: u8 = 4;
/// UDP super-packet: each segment a datagram of its own (USO).
pub const GSO_UDP_L4: u8 = 5;
/// Modifier of the TCP types: the first segment carries CWR.
pub const GSO_ECN: u8 = 0x80;

const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const HDR_LEN: Range<usize> = 2..4;
const GSO_SIZE: Range<usize> = 4..6;
const CSUM_START: Range<usize> = 6..8;
const CSUM_OFFSET: Range<usize> = 8..10;

/// The header as values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// One of the `GSO_*` types.
    pub gso_type: u8,
    /// Bytes of IP and transport header together (a hint of the kernel's; not to be trusted).
    pub hdr_len: u16,
    /// Bytes of payload in every segment but the last.
    pub gso_size: u16,
    /// Where the checksummed part starts, from the start of the packet.
    pub csum_start: u16,
    /// Where the checksum goes, from `csum_start`.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// Reads the header off the front of `bytes`; `None` where there are fewer than [`VNET_LEN`].
    pub fn parse(bytes: &[u8]) -> Option<VnetHeader> {
        let bytes = bytes.get(..VNET_LEN)?;
        let field = |r: Range<usize>| u16::from_ne_bytes([bytes[r.start], bytes[r.start + 1]]);
        Some(VnetHeader {
            flags: bytes[FLAGS],
            gso_type: bytes[GSO_TYPE],
            hdr_len: field(HDR_LEN),
            gso_size: field(GSO_SIZE),
            csum_start: field(CSUM_START),
            csum_offset: field(CSUM_OFFSET),
        })
    }

    /// The header as bytes.
    pub fn emit(&self) -> [u8; VNET_LEN] {
        let mut out = [0; VNET_LEN];
        out[FLAGS] = self.flags;
        out[GSO_TYPE] = self.gso_type;
        out[HDR_LEN].copy_from_slice(&self.hdr_len.to_ne_bytes());
        out[GSO_SIZE].copy_from_slice(&self.gso_size.to_ne_bytes());
        out[CSUM_START].copy_from_slice(&self.csum_start.to_ne_bytes());
        out[CSUM_OFFSET].copy_from_slice(&self.csum_offset.to_ne_bytes());
        out
    }

    /// Whether the checksum is still partial.
    pub fn needs_csum(&self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_kernel() {
        let header = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4 | GSO_ECN,
            hdr_len: 52,
            gso_size: 1368,
            csum_start: 20,
            csum_offset: 16,
        };
        let bytes = [1, 0x81, 52, 0, 0x58, 5, 20, 0, 16, 0];
        if cfg!(target_endian = "little") {
            assert_eq!(header.emit(), bytes);
        }
        assert_eq!(VnetHeader::parse(&header.emit()), Some(header));
        assert_eq!(VnetHeader::parse(&bytes[..9]), None);
    }
}
