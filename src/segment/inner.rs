//! Where the headers of an inner packet are: fixed offsets, a handful of comparisons, no copies.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use super::SegmentError;
use super::checksum;

/// Source and destination of an IP packet; `None` where it is not a whole one: another version, a header
/// longer than the packet, or a length field that is not the number of bytes in `packet`.
pub fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let ip = ip(packet).ok()?;
    let (source, destination) = packet.get(ip.family.addresses())?.split_at(ip.family.address_len());
    Some(match ip.family {
        Family::V4 => {
            let v4 = |bytes: &[u8]| Some(IpAddr::V4(Ipv4Addr::from(*bytes.first_chunk::<4>()?)));
            (v4(source)?, v4(destination)?)
        }
        Family::V6 => {
            let v6 = |bytes: &[u8]| Some(IpAddr::V6(Ipv6Addr::from(*bytes.first_chunk::<16>()?)));
            (v6(source)?, v6(destination)?)
        }
    })
}

/// A number that is the same for all packets of a flow: by addresses, and by ports where there are any. FNV-1a.
pub fn flow(packet: &[u8]) -> u32 {
    let Ok(ip) = ip(packet) else { return 0 };
    // Of fragments only the first would have ports.
    let ports = parse(packet).ok().and_then(|layout| packet.get(layout.transport_at..)?.first_chunk::<4>());
    let addresses = packet.get(ip.family.addresses()).unwrap_or_default();
    let bytes = addresses.iter().chain(ports.into_iter().flatten());
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Where the headers of a whole, unfragmented TCP or UDP packet are. Offsets in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// IP version.
    pub family: Family,
    /// What IP carries.
    pub transport: Transport,
    /// Start of the transport header, behind options or extension headers. `csum_start` of the virtio header.
    pub transport_at: usize,
    /// Start of the payload; at most the packet's length.
    pub payload_at: usize,
}

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What IP carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Finds the transport header of `packet`, behind IPv4 options and the IPv6 extension headers that every
/// host skips alike (hop-by-hop, routing, destination options).
///
/// Sender and receiver of a packet with a partial checksum both come here for the checksum's position.
///
/// # Errors
/// `TooShort`, `NotIp`, `BadHeaderLength`, `LengthMismatch`, `Fragment`, `NotTransport`.
pub fn parse(packet: &[u8]) -> Result<Layout, SegmentError> {
    let family = ip(packet)?.family;
    let (protocol, transport_at) = carried(packet)?;
    let rest = packet.get(transport_at..).ok_or(SegmentError::TooShort)?;
    let (transport, header_len) = match protocol {
        TCP => {
            let header = rest.first_chunk::<TCP_MIN>().ok_or(SegmentError::TooShort)?;
            let len = usize::from(header[TCP_DATA_OFFSET] >> 4) * 4;
            if len < TCP_MIN || len > rest.len() {
                return Err(SegmentError::BadHeaderLength);
            }
            (Transport::Tcp, len)
        }
        UDP if rest.len() < UDP_LEN => return Err(SegmentError::TooShort),
        UDP => (Transport::Udp, UDP_LEN),
        _ => return Err(SegmentError::NotTransport),
    };
    Ok(Layout { family, transport, transport_at, payload_at: transport_at + header_len })
}

/// The number of what an unfragmented packet carries, and where that starts.
///
/// # Errors
/// `TooShort`, `NotIp`, `BadHeaderLength`, `LengthMismatch`, `Fragment`, `NotTransport`.
pub fn carried(packet: &[u8]) -> Result<(u8, usize), SegmentError> {
    let ip = ip(packet)?;
    let (at, protocol) = match ip.family {
        Family::V4 => (ip.header_len, ip.protocol),
        Family::V6 => skip_extensions(packet, ip.protocol)?,
    };
    if ip.fragment { Err(SegmentError::Fragment) } else { Ok((protocol, at)) }
}

impl Family {
    /// Source and destination address in the IP header.
    pub fn addresses(self) -> Range<usize> {
        match self {
            Family::V4 => 12..20,
            Family::V6 => 8..40,
        }
    }

    fn address_len(self) -> usize {
        match self {
            Family::V4 => 4,
            Family::V6 => 16,
        }
    }
}

impl Transport {
    /// The protocol's number.
    pub fn protocol(self) -> u8 {
        match self {
            Transport::Tcp => TCP,
            Transport::Udp => UDP,
        }
    }

    /// The checksum field from the start of the transport header: `csum_offset` of the virtio header.
    pub fn checksum_offset(self) -> usize {
        match self {
            Transport::Tcp => 16,
            Transport::Udp => 6,
        }
    }
}

/// What both versions' fixed headers say.
struct Ip {
    family: Family,
    /// With IPv4 options, without IPv6 extension headers.
    header_len: usize,
    protocol: u8,
    fragment: bool,
}

fn ip(packet: &[u8]) -> Result<Ip, SegmentError> {
    match packet.first().ok_or(SegmentError::TooShort)? >> 4 {
        4 => {
            let header = packet.first_chunk::<V4_MIN>().ok_or(SegmentError::TooShort)?;
            let header_len = usize::from(header[0] & 0x0f) * 4;
            if header_len < V4_MIN || header_len > packet.len() {
                return Err(SegmentError::BadHeaderLength);
            }
            if usize::from(be16(header, V4_LENGTH)) != packet.len() {
                return Err(SegmentError::LengthMismatch);
            }
            let fragment = be16(header, V4_FRAGMENT) & (V4_MORE | V4_OFFSET) != 0;
            Ok(Ip { family: Family::V4, header_len, protocol: header[V4_PROTOCOL], fragment })
        }
        6 => {
            let header = packet.first_chunk::<V6_LEN>().ok_or(SegmentError::TooShort)?;
            if V6_LEN + usize::from(be16(header, V6_LENGTH)) != packet.len() {
                return Err(SegmentError::LengthMismatch);
            }
            let protocol = header[V6_NEXT_HEADER];
            Ok(Ip { family: Family::V6, header_len: V6_LEN, protocol, fragment: false })
        }
        _ => Err(SegmentError::NotIp),
    }
}

/// The offset and number of the first header that is not a skippable extension.
fn skip_extensions(packet: &[u8], mut protocol: u8) -> Result<(usize, u8), SegmentError> {
    let mut at = V6_LEN;
    for _ in 0..=MAX_EXTENSIONS {
        match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {}
            FRAGMENT => return Err(SegmentError::Fragment),
            _ => return Ok((at, protocol)),
        }
        let &[next, units] =
            packet.get(at..).and_then(|rest| rest.first_chunk()).ok_or(SegmentError::TooShort)?;
        protocol = next;
        at += (usize::from(units) + 1) * 8;
    }
    Err(SegmentError::NotTransport)
}

/// Place and number of what an IPv6 packet carries, behind the headers that hosts skip, those of a first fragment as
/// well; `None` for a fragment other than the first, and where the headers go on beyond the packet. `packet` is at least
/// 40 bytes.
pub(super) fn upper_layer(packet: &[u8]) -> Option<(usize, u8)> {
    let (mut at, mut protocol) = (V6_LEN, packet[V6_NEXT_HEADER]);
    for _ in 0..=MAX_EXTENSIONS {
        let len = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => (usize::from(*packet.get(at + 1)?) + 1) * 8,
            FRAGMENT if be16(packet.get(at..at + 8)?, 2) & V6_OFFSET != 0 => return None,
            FRAGMENT => 8,
            _ => return Some((at, protocol)),
        };
        protocol = packet[at];
        at += len;
    }
    None
}

/// The sum of an IPv4 header without the three fields that differ between segments: length, ID, checksum.
/// `header` is at least 20 bytes.
pub(super) fn v4_constant_sum(header: &[u8]) -> u32 {
    let word = |at| u32::from(be16(header, at));
    let sum = word(0) + word(V4_FRAGMENT) + word(8) + checksum::sum(&header[12..20]);
    if header.len() > V4_MIN { sum + checksum::sum(&header[V4_MIN..]) } else { sum }
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

// RFC 791.
pub(super) const V4_MIN: usize = 20;
pub(super) const V4_LENGTH: usize = 2;
pub(super) const V4_ID: usize = 4;
pub(super) const V4_FRAGMENT: usize = 6;
pub(super) const V4_DONT_FRAGMENT: u16 = 0x4000;
pub(super) const V4_MORE: u16 = 0x2000;
pub(super) const V4_OFFSET: u16 = 0x1fff;
pub(super) const V4_PROTOCOL: usize = 9;
pub(super) const V4_CHECKSUM: usize = 10;

// RFC 8200.
pub(super) const V6_LEN: usize = 40;
pub(super) const V6_LENGTH: usize = 4;
pub(super) const V6_NEXT_HEADER: usize = 6;
pub(super) const HOP_BY_HOP: u8 = 0;
pub(super) const ROUTING: u8 = 43;
pub(super) const FRAGMENT: u8 = 44;
pub(super) const DESTINATION_OPTIONS: u8 = 60;
const V6_OFFSET: u16 = 0xfff8;
/// More than any packet that is not an attack carries (RFC 8504, section 5.3 lets hosts limit this).
pub(super) const MAX_EXTENSIONS: usize = 8;

// RFC 9293; offsets from the start of the TCP header.
/// TCP's number.
pub const TCP: u8 = 6;
pub(super) const TCP_MIN: usize = 20;
pub(super) const TCP_SEQ: usize = 4;
pub(super) const TCP_DATA_OFFSET: usize = 12;
pub(super) const TCP_FLAGS: usize = 13;
pub(super) const FIN: u8 = 0x01;
pub(super) const SYN: u8 = 0x02;
pub(super) const RST: u8 = 0x04;
pub(super) const PSH: u8 = 0x08;
pub(super) const URG: u8 = 0x20;
pub(super) const CWR: u8 = 0x80;

// RFC 768; offset from the start of the UDP header.
/// UDP's number.
pub const UDP: u8 = 17;
const UDP_LEN: usize = 8;
pub(super) const UDP_LENGTH: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    const V4_UDP: [u8; 29] = [
        0x45, 0, 0, 29, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 192, 0, 2, 1, // IPv4
        0x12, 0x34, 0, 53, 0, 9, 0, 0, 0xaa,
    ];

    fn changed(packet: &[u8], at: usize, value: u8) -> Vec<u8> {
        let mut packet = packet.to_vec();
        packet[at] = value;
        packet
    }

    #[test]
    fn addresses_of_whole_packets_only() {
        let expected = (IpAddr::from([10, 9, 0, 2]), IpAddr::from([192, 0, 2, 1]));
        assert_eq!(addresses(&V4_UDP), Some(expected));
        // Addresses need no transport: fragments and other protocols have them too.
        assert_eq!(addresses(&changed(&V4_UDP, 6, 0x20)), Some(expected));
        assert_eq!(addresses(&changed(&V4_UDP, 9, 1)), Some(expected));
        assert_eq!(addresses(&[]), None);
        assert_eq!(addresses(&V4_UDP[..28]), None);
        assert_eq!(addresses(&changed(&V4_UDP, 0, 0x44)), None, "IHL below 5");
        assert_eq!(addresses(&changed(&V4_UDP, 0, 0x48)), None, "IHL beyond the packet");
        assert_eq!(addresses(&changed(&V4_UDP, 0, 0x55)), None, "version 5");
        assert_eq!(addresses(&changed(&V4_UDP, 3, 28)), None, "trailing byte");

        let mut v6 = [0; 40];
        v6[0] = 0x60;
        v6[23] = 1;
        v6[24] = 0xfd;
        let expected = (IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!(addresses(&v6), Some(expected));
        assert_eq!(addresses(&v6[..39]), None);
        assert_eq!(addresses(&changed(&v6, 5, 1)), None);
    }

    #[test]
    fn layouts_of_v4() {
        let layout = parse(&V4_UDP).expect("a UDP packet");
        assert_eq!((layout.family, layout.transport), (Family::V4, Transport::Udp));
        assert_eq!((layout.transport_at, layout.payload_at), (20, 28));
        for (at, value, error) in [
            (0, 0x35, SegmentError::NotIp),
            (0, 0x44, SegmentError::BadHeaderLength),
            (0, 0x46, SegmentError::TooShort),
            (3, 30, SegmentError::LengthMismatch),
            (6, 0x20, SegmentError::Fragment),
            (7, 1, SegmentError::Fragment),
            (9, 6, SegmentError::TooShort),
            (9, 1, SegmentError::NotTransport),
        ] {
            assert_eq!(parse(&changed(&V4_UDP, at, value)), Err(error), "byte {at} = {value}");
        }
        assert_eq!(parse(&V4_UDP[..19]), Err(SegmentError::TooShort));
        assert_eq!(parse(&[]), Err(SegmentError::TooShort));
    }

    #[test]
    fn layouts_behind_extension_headers() {
        let mut packet = vec![0; 40 + 8 + 16 + 20];
        packet[0] = 0x60;
        packet[5] = 44;
        packet[6] = HOP_BY_HOP;
        packet[40] = DESTINATION_OPTIONS;
        packet[48..50].copy_from_slice(&[TCP, 1]);
        packet[64 + 12] = 0x50;
        let layout = parse(&packet).expect("a TCP packet");
        assert_eq!((layout.transport, layout.transport_at, layout.payload_at), (Transport::Tcp, 64, 84));
        assert_eq!(parse(&changed(&packet, 40, FRAGMENT)), Err(SegmentError::Fragment));
        assert_eq!(parse(&changed(&packet, 40, 51)), Err(SegmentError::NotTransport), "AH");
        assert_eq!(parse(&changed(&packet, 49, 200)), Err(SegmentError::TooShort));
        assert_eq!(parse(&changed(&packet, 76, 0x40)), Err(SegmentError::BadHeaderLength));
        assert_eq!(parse(&changed(&packet, 76, 0x60)), Err(SegmentError::BadHeaderLength));

        let mut chain = vec![0; 40 + 8 * 20];
        chain[0] = 0x60;
        chain[5] = 160;
        assert_eq!(parse(&chain), Err(SegmentError::NotTransport), "an endless chain");
    }
}
