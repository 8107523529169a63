//! ICMP errors about inner packets (RFC 792, RFC 4443): whom one may be sent to, and its bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum;
use super::inner::{
    V4_CHECKSUM, V4_FRAGMENT, V4_MIN, V4_OFFSET, V4_PROTOCOL, V6_LEN, addresses, be16, put16, upper_layer,
};

/// What an error says: type, code, and the four bytes behind the checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Says {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Whatever belongs to the type.
    pub rest: u32,
}

/// The packet that tells the sender of `packet` something, `from` an address of ours; it quotes as much as may be.
///
/// `None` where nobody should be told: `packet` is an ICMP error itself, a fragment other than the first, or from or to
/// an address that isn't one host's (RFC 1122, section 3.2.2; RFC 4443, section 2.4 e, whose exceptions for multicast
/// are not made use of). A subnet's broadcast address looks like any other from here. Also `None` where `packet` is not
/// whole or `from` of the other version.
pub(super) fn error(packet: &[u8], from: IpAddr, says: Says) -> Option<Vec<u8>> {
    match (addresses(packet)?, from) {
        ((IpAddr::V4(source), IpAddr::V4(destination)), IpAddr::V4(from)) => {
            v4(packet, source, destination, from, says)
        }
        ((IpAddr::V6(source), IpAddr::V6(destination)), IpAddr::V6(from)) => {
            v6(packet, source, destination, from, says)
        }
        _ => None,
    }
}

fn v4(packet: &[u8], source: Ipv4Addr, destination: Ipv4Addr, from: Ipv4Addr, says: Says) -> Option<Vec<u8>> {
    // Above 224: multicast, reserved, broadcast.
    let first = source.octets()[0];
    if first == 0 || first == 127 || first >= 224 || destination.octets()[0] >= 224 {
        return None;
    }
    if be16(packet, V4_FRAGMENT) & V4_OFFSET != 0 {
        return None;
    }
    if packet[V4_PROTOCOL] == ICMP {
        let kind = packet.get(usize::from(packet[0] & 0x0f) * 4)?;
        if ICMP_ERRORS.contains(kind) {
            return None;
        }
    }

    let quote = &packet[..packet.len().min(V4_MOST - V4_MIN - ICMP_LEN)];
    let len = V4_MIN + ICMP_LEN + quote.len();
    let mut message = Vec::with_capacity(len);
    // Precedence 6 (RFC 1812, section 4.3.2.5), don't fragment, 64 hops.
    message.extend([0x45, 0xc0]);
    message.extend((len as u16).to_be_bytes());
    message.extend([0, 0, 0x40, 0, 64, ICMP, 0, 0]);
    message.extend(from.octets());
    message.extend(source.octets());
    let sum = checksum::finish(checksum::sum(&message));
    put16(&mut message, V4_CHECKSUM, sum);

    message.extend([says.kind, says.code, 0, 0]);
    message.extend(says.rest.to_be_bytes());
    message.extend(quote);
    let sum = checksum::finish(checksum::sum(&message[V4_MIN..]));
    put16(&mut message, V4_MIN + ICMP_CHECKSUM, sum);
    Some(message)
}

fn v6(packet: &[u8], source: Ipv6Addr, destination: Ipv6Addr, from: Ipv6Addr, says: Says) -> Option<Vec<u8>> {
    if source.is_unspecified() || source.is_loopback() || source.is_multicast() || destination.is_multicast()
    {
        return None;
    }
    let (at, protocol) = upper_layer(packet)?;
    if protocol == ICMPV6 {
        let kind = *packet.get(at)?;
        if kind < ICMPV6_FIRST_QUERY || kind == REDIRECT {
            return None;
        }
    }

    let quote = &packet[..packet.len().min(V6_LEAST_MTU - V6_LEN - ICMP_LEN)];
    let len = ICMP_LEN + quote.len();
    let mut message = Vec::with_capacity(V6_LEN + len);
    message.extend([0x60, 0, 0, 0]);
    message.extend((len as u16).to_be_bytes());
    message.extend([ICMPV6, 64]);
    message.extend(from.octets());
    message.extend(source.octets());
    let pseudo_sum = checksum::pseudo_header(&message[8..V6_LEN], ICMPV6, len as u32);

    message.extend([says.kind, says.code, 0, 0]);
    message.extend(says.rest.to_be_bytes());
    message.extend(quote);
    let sum = checksum::finish(pseudo_sum + checksum::sum(&message[V6_LEN..]));
    put16(&mut message, V6_LEN + ICMP_CHECKSUM, sum);
    Some(message)
}

// RFC 792.
pub(super) const ICMP: u8 = 1;
const ICMP_LEN: usize = 8;
const ICMP_CHECKSUM: usize = 2;
/// Destination unreachable, source quench, redirect, time exceeded, parameter problem (RFC 1122, section 3.2.2).
const ICMP_ERRORS: [u8; 5] = [3, 4, 5, 11, 12];
/// RFC 1812, section 4.3.2.3.
const V4_MOST: usize = 576;

// RFC 4443, and RFC 4861 for Redirect.
pub(super) const ICMPV6: u8 = 58;
const ICMPV6_FIRST_QUERY: u8 = 128;
const REDIRECT: u8 = 137;
/// RFC 8200, section 5.
pub(super) const V6_LEAST_MTU: usize = 1_280;

/// Packets to be told about, for the tests of each message.
#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub const ROUTER4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
    pub const ROUTER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 1));

    /// A UDP packet with DF from 10.9.0.2 to 192.0.2.1.
    pub fn packet4(len: usize) -> Vec<u8> {
        let mut packet = vec![0x5a; len];
        packet[..20]
            .copy_from_slice(&[0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 192, 0, 2, 1]);
        put16(&mut packet, 2, len as u16);
        packet
    }

    /// A UDP packet from fd09::2 to 2001::1.
    pub fn packet6(len: usize) -> Vec<u8> {
        let mut packet = vec![0x5a; len];
        packet[..40].fill(0);
        (packet[0], packet[6], packet[7]) = (0x60, 17, 64);
        put16(&mut packet, 4, (len - 40) as u16);
        (packet[8], packet[9], packet[23]) = (0xfd, 9, 2);
        (packet[24], packet[25], packet[39]) = (0x20, 1, 1);
        packet
    }

    /// Whole IP packets of any content, for property tests.
    pub fn made_whole(mut packet: Vec<u8>, v6: bool, next: u8) -> Vec<u8> {
        let len = packet.len() as u16;
        if v6 {
            (packet[0], packet[6]) = (0x60, next);
            put16(&mut packet, 4, len - 40);
        } else {
            (packet[0], packet[6], packet[9]) = (0x45 + packet[0] % 6, 0x40, next);
            put16(&mut packet, 2, len);
        }
        packet
    }

    /// Whether both checksums of an error are right.
    pub fn sums_are_right(message: &[u8]) -> bool {
        match message[0] >> 4 {
            4 => checksum::sum(&message[..20]) == 0xffff && checksum::sum(&message[20..]) == 0xffff,
            _ => {
                let pseudo = checksum::pseudo_header(&message[8..40], 58, (message.len() - 40) as u32);
                checksum::fold(pseudo + checksum::sum(&message[40..])) == 0xffff
            }
        }
    }

    fn told(packet: &[u8], from: IpAddr) -> bool {
        let says = Says { kind: 3, code: 1, rest: 0 };
        error(packet, from, says).is_some()
    }

    #[test]
    fn nobody_is_told_in_vain() {
        let packet = packet4(1_420);
        let with = |at: usize, value: &[u8]| {
            let mut packet = packet.clone();
            packet[at..at + value.len()].copy_from_slice(value);
            told(&packet, ROUTER4)
        };
        assert!(told(&packet, ROUTER4));
        assert!(!told(&packet, ROUTER6), "another version");
        assert!(!told(&packet[..1_400], ROUTER4), "cut short");
        assert!(!told(&[], ROUTER4));
        assert!(!with(7, &[1]), "a later fragment");
        assert!(with(6, &[0x60]), "the first fragment");
        for source in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [240, 0, 0, 1], [255; 4]] {
            assert!(!with(12, &source), "from {source:?}");
        }
        for destination in [[224, 0, 0, 251], [239, 1, 2, 3], [255; 4]] {
            assert!(!with(16, &destination), "to {destination:?}");
        }
        for kind in 0..=255 {
            let mut icmp = packet.clone();
            (icmp[9], icmp[20]) = (1, kind);
            let is_error = [3, 4, 5, 11, 12].contains(&kind);
            assert_eq!(told(&icmp, ROUTER4), !is_error, "ICMP {kind}");
        }
    }

    #[test]
    fn nobody_is_told_in_vain_over_ipv6() {
        let packet = packet6(1_420);
        let with = |changes: &[(usize, u8)]| {
            let mut packet = packet.clone();
            for (at, value) in changes {
                packet[*at] = *value;
            }
            told(&packet, ROUTER6)
        };
        assert!(with(&[]));
        assert!(!told(&packet, ROUTER4), "another version");
        assert!(!with(&[(8, 0), (9, 0), (23, 0)]), "from nowhere");
        assert!(!with(&[(8, 0), (9, 0), (23, 1)]), "from ::1");
        assert!(!with(&[(8, 0xff)]), "from multicast");
        assert!(!with(&[(24, 0xff)]), "to multicast");
        for kind in 0..=255 {
            let is_told = kind >= 128 && kind != 137;
            assert_eq!(with(&[(6, 58), (40, kind)]), is_told, "ICMPv6 {kind}");
            // Behind destination options of 16 bytes.
            assert_eq!(with(&[(6, 60), (40, 58), (41, 1), (56, kind)]), is_told, "ICMPv6 {kind}");
            // In a first fragment.
            let first = [(6, 44), (40, 58), (42, 0), (43, 1), (48, kind)];
            assert_eq!(with(&first), is_told, "ICMPv6 {kind}");
        }
        assert!(!with(&[(6, 44), (40, 17), (42, 0), (43, 0x08)]), "a later fragment");
        assert!(!with(&[(6, 60), (40, 60), (41, 255)]), "headers beyond the packet");
        assert!(with(&[(6, 50)]), "ESP");
    }
}
