//! Telling an inner sender that its packet doesn't fit: ICMP "fragmentation needed" (RFC 1191) and ICMPv6 Packet Too
//! Big (RFC 4443).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum;
use super::inner::{
    DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, MAX_EXTENSIONS, ROUTING, V4_CHECKSUM, V4_DONT_FRAGMENT,
    V4_FRAGMENT, V4_MIN, V4_OFFSET, V4_PROTOCOL, V6_LEN, V6_NEXT_HEADER, addresses, be16, put16,
};

/// The packet that tells the sender of `packet` that it may be `mtu` bytes long, IP header included. It comes `from`
/// an address of ours, and quotes as much as may be. How often one is sent is for the caller to limit (RFC 1812, section
/// 4.3.2.8; RFC 4443, section 2.4 f).
///
/// IPv6 always carries 1,280 bytes, so no smaller `mtu` is told.
///
/// `None` where none is due: the packet fits; it is IPv4 and may be fragmented; or nobody should be told, because it
/// is an ICMP error itself, a fragment other than the first, or from or to an address that isn't one host's (RFC 1122,
/// section 3.2.2; RFC 4443, section 2.4 e, whose exception for multicast is not made use of). A subnet's broadcast
/// address looks like any other from here. Also `None` where `packet` is not whole or `from` of the other version.
pub fn too_big(packet: &[u8], mtu: usize, from: IpAddr) -> Option<Vec<u8>> {
    match (addresses(packet)?, from) {
        ((IpAddr::V4(source), IpAddr::V4(destination)), IpAddr::V4(from)) => {
            v4(packet, mtu, source, destination, from)
        }
        ((IpAddr::V6(source), IpAddr::V6(destination)), IpAddr::V6(from)) => {
            v6(packet, mtu.max(V6_LEAST_MTU), source, destination, from)
        }
        _ => None,
    }
}

fn v4(packet: &[u8], mtu: usize, source: Ipv4Addr, destination: Ipv4Addr, from: Ipv4Addr) -> Option<Vec<u8>> {
    let field = be16(packet, V4_FRAGMENT);
    if packet.len() <= mtu || field & V4_DONT_FRAGMENT == 0 || field & V4_OFFSET != 0 {
        return None;
    }
    // Above 224: multicast, reserved, broadcast.
    let first = source.octets()[0];
    if first == 0 || first == 127 || first >= 224 || destination.octets()[0] >= 224 {
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

    message.extend([DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED, 0, 0, 0, 0]);
    message.extend(u16::try_from(mtu).unwrap_or(u16::MAX).to_be_bytes());
    message.extend(quote);
    let sum = checksum::finish(checksum::sum(&message[V4_MIN..]));
    put16(&mut message, V4_MIN + ICMP_CHECKSUM, sum);
    Some(message)
}

fn v6(packet: &[u8], mtu: usize, source: Ipv6Addr, destination: Ipv6Addr, from: Ipv6Addr) -> Option<Vec<u8>> {
    if packet.len() <= mtu
        || source.is_unspecified()
        || source.is_loopback()
        || source.is_multicast()
        || destination.is_multicast()
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

    message.extend([PACKET_TOO_BIG, 0, 0, 0]);
    message.extend(u32::try_from(mtu).unwrap_or(u32::MAX).to_be_bytes());
    message.extend(quote);
    let sum = checksum::finish(pseudo_sum + checksum::sum(&message[V6_LEN..]));
    put16(&mut message, V6_LEN + ICMP_CHECKSUM, sum);
    Some(message)
}

/// Place and number of what the packet carries; `None` for a fragment other than the first, and where the headers go
/// on beyond the packet.
fn upper_layer(packet: &[u8]) -> Option<(usize, u8)> {
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

// RFC 792.
const ICMP: u8 = 1;
const ICMP_LEN: usize = 8;
const ICMP_CHECKSUM: usize = 2;
const DESTINATION_UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
/// Destination unreachable, source quench, redirect, time exceeded, parameter problem (RFC 1122, section 3.2.2).
const ICMP_ERRORS: [u8; 5] = [3, 4, 5, 11, 12];
/// RFC 1812, section 4.3.2.3.
const V4_MOST: usize = 576;

// RFC 4443, and RFC 4861 for Redirect.
const ICMPV6: u8 = 58;
const PACKET_TOO_BIG: u8 = 2;
const ICMPV6_FIRST_QUERY: u8 = 128;
const REDIRECT: u8 = 137;
const V6_OFFSET: u16 = 0xfff8;
/// RFC 8200, section 5.
const V6_LEAST_MTU: usize = 1_280;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROUTER4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
    const ROUTER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 1));

    /// A UDP packet with DF.
    fn packet4(len: usize) -> Vec<u8> {
        let mut packet = vec![0x5a; len];
        packet[..20]
            .copy_from_slice(&[0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 192, 0, 2, 1]);
        put16(&mut packet, 2, len as u16);
        packet
    }

    fn packet6(len: usize) -> Vec<u8> {
        let mut packet = vec![0x5a; len];
        packet[..40].fill(0);
        (packet[0], packet[6], packet[7]) = (0x60, 17, 64);
        put16(&mut packet, 4, (len - 40) as u16);
        (packet[8], packet[9], packet[23]) = (0xfd, 9, 2);
        (packet[24], packet[25], packet[39]) = (0x20, 1, 1);
        packet
    }

    #[test]
    fn fragmentation_needed_in_bytes() {
        let packet = packet4(1_420);
        let message = too_big(&packet, 1_160, ROUTER4).expect("a message");
        assert_eq!(message.len(), 576);
        assert_eq!(
            message[..20],
            [0x45, 0xc0, 0x02, 0x40, 0, 0, 0x40, 0, 64, 1, 0x23, 0xe9, 10, 9, 0, 1, 10, 9, 0, 2]
        );
        assert_eq!(message[20..22], [3, 4]);
        assert_eq!(message[24..28], [0, 0, 0x04, 0x88]);
        assert_eq!(message[28..], packet[..548]);
        assert_eq!(checksum::sum(&message[..20]), 0xffff);
        assert_eq!(checksum::sum(&message[20..]), 0xffff);
        // A short one is quoted whole.
        assert_eq!(too_big(&packet4(100), 99, ROUTER4).expect("a message")[28..], packet4(100));
    }

    #[test]
    fn packet_too_big_in_bytes() {
        let packet = packet6(1_420);
        let message = too_big(&packet, 1_300, ROUTER6).expect("a message");
        assert_eq!(message.len(), 1_280);
        assert_eq!(message[..8], [0x60, 0, 0, 0, 0x04, 0xd8, 58, 64]);
        assert_eq!((&message[8..10], message[23]), (&[0xfd, 9][..], 1));
        assert_eq!(message[24..40], packet[8..24]);
        assert_eq!(message[40..42], [2, 0]);
        assert_eq!(message[44..48], [0, 0, 0x05, 0x14]);
        assert_eq!(message[48..], packet[..1_232]);
        let pseudo = checksum::pseudo_header(&message[8..40], 58, 1_240);
        assert_eq!(checksum::fold(pseudo + checksum::sum(&message[40..])), 0xffff);
        // Nothing less than what IPv6 always carries.
        assert_eq!(too_big(&packet, 1_160, ROUTER6).expect("a message")[44..48], [0, 0, 0x05, 0]);
        assert_eq!(too_big(&packet6(1_280), 1_160, ROUTER6), None);
    }

    #[test]
    fn nobody_is_told_in_vain() {
        let packet = packet4(1_420);
        let with = |at: usize, value: &[u8]| {
            let mut packet = packet.clone();
            packet[at..at + value.len()].copy_from_slice(value);
            too_big(&packet, 1_160, ROUTER4)
        };
        assert_eq!(too_big(&packet, 1_420, ROUTER4), None, "fits");
        assert_eq!(too_big(&packet, 1_160, ROUTER6), None, "another version");
        assert_eq!(too_big(&packet[..1_400], 1_160, ROUTER4), None, "cut short");
        assert_eq!(too_big(&[], 0, ROUTER4), None);
        assert_eq!(with(6, &[0]), None, "may be fragmented");
        assert_eq!(with(7, &[1]), None, "a later fragment");
        assert!(with(6, &[0x60]).is_some(), "the first fragment");
        for source in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [240, 0, 0, 1], [255; 4]] {
            assert_eq!(with(12, &source), None, "from {source:?}");
        }
        for destination in [[224, 0, 0, 251], [239, 1, 2, 3], [255; 4]] {
            assert_eq!(with(16, &destination), None, "to {destination:?}");
        }
        for kind in 0..=255 {
            let mut icmp = packet.clone();
            (icmp[9], icmp[20]) = (1, kind);
            let is_error = [3, 4, 5, 11, 12].contains(&kind);
            assert_eq!(too_big(&icmp, 1_160, ROUTER4).is_none(), is_error, "ICMP {kind}");
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
            too_big(&packet, 1_300, ROUTER6)
        };
        assert_eq!(too_big(&packet, 1_420, ROUTER6), None, "fits");
        assert_eq!(too_big(&packet, 1_300, ROUTER4), None, "another version");
        assert_eq!(with(&[(8, 0), (9, 0), (23, 0)]), None, "from nowhere");
        assert_eq!(with(&[(8, 0), (9, 0), (23, 1)]), None, "from ::1");
        assert_eq!(with(&[(8, 0xff)]), None, "from multicast");
        assert_eq!(with(&[(24, 0xff)]), None, "to multicast");
        for kind in 0..=255 {
            let is_told = kind >= 128 && kind != 137;
            assert_eq!(with(&[(6, 58), (40, kind)]).is_some(), is_told, "ICMPv6 {kind}");
            // Behind destination options of 16 bytes.
            assert_eq!(with(&[(6, 60), (40, 58), (41, 1), (56, kind)]).is_some(), is_told, "ICMPv6 {kind}");
            // In a first fragment.
            let first = [(6, 44), (40, 58), (42, 0), (43, 1), (48, kind)];
            assert_eq!(with(&first).is_some(), is_told, "ICMPv6 {kind}");
        }
        assert_eq!(with(&[(6, 44), (40, 17), (42, 0), (43, 0x08)]), None, "a later fragment");
        assert_eq!(with(&[(6, 60), (40, 60), (41, 255)]), None, "headers beyond the packet");
        assert!(with(&[(6, 50)]).is_some(), "ESP");
    }

    proptest! {
        #[test]
        fn any_bytes(
            mut packet in proptest::collection::vec(any::<u8>(), 40..1_500),
            v6 in any::<bool>(),
            next in proptest::sample::select(&[0u8, 1, 6, 43, 44, 58, 60][..]),
            mtu in 0usize..1_500,
        ) {
            let len = packet.len() as u16;
            if v6 {
                (packet[0], packet[6]) = (0x60, next);
                put16(&mut packet, 4, len - 40);
            } else {
                (packet[0], packet[6], packet[9]) = (0x45 + packet[0] % 6, 0x40, next);
                put16(&mut packet, 2, len);
            }
            for from in [ROUTER4, ROUTER6] {
                if let Some(message) = too_big(&packet, mtu, from) {
                    let (source, destination) = addresses(&message).expect("a packet");
                    prop_assert_eq!(source, from);
                    prop_assert_eq!(Some(destination), addresses(&packet).map(|(source, _)| source));
                    let most = if v6 { 1_280 } else { 576 };
                    prop_assert!(message.len() <= most);
                    // And no message is answered by another.
                    prop_assert_eq!(too_big(&message, 0, destination), None);
                }
            }
        }
    }
}
