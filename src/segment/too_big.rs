//! Telling an inner sender that its packet doesn't fit: ICMP "fragmentation needed" (RFC 1191) and ICMPv6 Packet Too
//! Big (RFC 4443).

use std::net::IpAddr;

use super::icmp::{Says, V6_LEAST_MTU, error};
use super::inner::{V4_DONT_FRAGMENT, V4_FRAGMENT, V4_MIN, be16};

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
    let says = match from {
        IpAddr::V4(_) => {
            let may_be_cut = packet.len() >= V4_MIN && be16(packet, V4_FRAGMENT) & V4_DONT_FRAGMENT == 0;
            if packet.len() <= mtu || may_be_cut {
                return None;
            }
            // Unused, next-hop MTU.
            let rest = u16::try_from(mtu).unwrap_or(u16::MAX).into();
            Says { kind: DESTINATION_UNREACHABLE, code: FRAGMENTATION_NEEDED, rest }
        }
        IpAddr::V6(_) => {
            let mtu = mtu.max(V6_LEAST_MTU);
            if packet.len() <= mtu {
                return None;
            }
            Says { kind: PACKET_TOO_BIG, code: 0, rest: u32::try_from(mtu).unwrap_or(u32::MAX) }
        }
    };
    error(packet, from, says)
}

// RFC 792.
const DESTINATION_UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
// RFC 4443.
const PACKET_TOO_BIG: u8 = 2;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::checksum;
    use super::super::icmp::tests::{ROUTER4, ROUTER6, made_whole, packet4, packet6, sums_are_right};
    use super::super::inner::addresses;
    use super::*;

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
    fn nobody_is_told_of_what_goes() {
        let packet = packet4(1_420);
        let with = |flags: u8| {
            let mut packet = packet.clone();
            packet[6] = flags;
            too_big(&packet, 1_160, ROUTER4)
        };
        assert_eq!(too_big(&packet, 1_420, ROUTER4), None, "fits");
        assert_eq!(with(0), None, "may be fragmented");
        assert!(with(0x60).is_some(), "the first fragment");
        assert_eq!(too_big(&[], 0, ROUTER4), None);
        assert_eq!(too_big(&[0x45; 3], 0, ROUTER4), None);
        assert_eq!(too_big(&packet6(1_420), 1_420, ROUTER6), None, "fits");
    }

    proptest! {
        #[test]
        fn any_bytes(
            packet in proptest::collection::vec(any::<u8>(), 40..1_500),
            v6 in any::<bool>(),
            next in proptest::sample::select(&[0u8, 1, 6, 43, 44, 58, 60][..]),
            mtu in 0usize..1_500,
        ) {
            let packet = made_whole(packet, v6, next);
            for from in [ROUTER4, ROUTER6] {
                if let Some(message) = too_big(&packet, mtu, from) {
                    let (source, destination) = addresses(&message).expect("a packet");
                    prop_assert_eq!(source, from);
                    prop_assert_eq!(Some(destination), addresses(&packet).map(|(source, _)| source));
                    let most = if v6 { 1_280 } else { 576 };
                    prop_assert!(message.len() <= most);
                    prop_assert!(sums_are_right(&message));
                    // And no message is answered by another.
                    prop_assert_eq!(too_big(&message, 0, destination), None);
                }
            }
        }
    }
}
