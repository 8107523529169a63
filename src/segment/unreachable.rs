//! Telling an inner sender that nobody is there: ICMP host unreachable (RFC 792) and ICMPv6 address unreachable (RFC
//! 4443).

use std::net::IpAddr;

use super::icmp::{Says, error};

/// The packet that tells the sender of `packet` that its destination can't be reached. It comes `from` an address of
/// ours, and quotes as much as may be. How often one is sent is for the caller to limit (RFC 1812, section 4.3.2.8; RFC
/// 4443, section 2.4 f).
///
/// `None` where nobody should be told (RFC 1122, section 3.2.2; RFC 4443, section 2.4 e): `packet` is an ICMP error
/// itself, a fragment other than the first, or from or to an address that isn't one host's. A subnet's broadcast address
/// looks like any other from here. Also `None` where `packet` is not whole or `from` of the other version.
pub fn unreachable(packet: &[u8], from: IpAddr) -> Option<Vec<u8>> {
    let says = match from {
        IpAddr::V4(_) => Says { kind: DESTINATION_UNREACHABLE4, code: HOST, rest: 0 },
        IpAddr::V6(_) => Says { kind: DESTINATION_UNREACHABLE6, code: ADDRESS, rest: 0 },
    };
    error(packet, from, says)
}

// RFC 792.
const DESTINATION_UNREACHABLE4: u8 = 3;
const HOST: u8 = 1;
// RFC 4443.
const DESTINATION_UNREACHABLE6: u8 = 1;
const ADDRESS: u8 = 3;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::icmp::tests::{ROUTER4, ROUTER6, made_whole, packet4, packet6, sums_are_right};
    use super::super::inner::addresses;
    use super::*;

    #[test]
    fn host_unreachable_in_bytes() {
        let packet = packet4(32);
        #[rustfmt::skip]
        assert_eq!(unreachable(&packet, ROUTER4).expect("a message"), [
            0x45, 0xc0, 0, 60, 0, 0, 0x40, 0, 64, 1, 0x25, 0xed, 10, 9, 0, 1, 10, 9, 0, 2,
            3, 1, 0x3b, 0x6e, 0, 0, 0, 0,
            0x45, 0, 0, 32, 0x12, 0x34, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 192, 0, 2, 1,
            0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a,
        ]);
        let packet = packet4(1_420);
        let message = unreachable(&packet, ROUTER4).expect("a message");
        assert_eq!(message.len(), 576);
        assert_eq!(message[28..], packet[..548]);
    }

    #[test]
    fn address_unreachable_in_bytes() {
        let packet = packet6(44);
        #[rustfmt::skip]
        assert_eq!(unreachable(&packet, ROUTER6).expect("a message"), [
            0x60, 0, 0, 0, 0, 52, 58, 64,
            0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
            0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
            1, 3, 0xc1, 0x70, 0, 0, 0, 0,
            0x60, 0, 0, 0, 0, 4, 17, 64,
            0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
            0x20, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
            0x5a, 0x5a, 0x5a, 0x5a,
        ]);
        let packet = packet6(1_420);
        let message = unreachable(&packet, ROUTER6).expect("a message");
        assert_eq!(message.len(), 1_280);
        assert_eq!(message[48..], packet[..1_232]);
    }

    #[test]
    fn a_packet_that_may_be_fragmented_is_answered_too() {
        let mut packet = packet4(100);
        packet[6] = 0;
        assert!(unreachable(&packet, ROUTER4).is_some());
    }

    proptest! {
        #[test]
        fn any_bytes(packet in proptest::collection::vec(any::<u8>(), 0..1_500)) {
            for from in [ROUTER4, ROUTER6] {
                let _ = unreachable(&packet, from);
            }
        }

        #[test]
        fn any_packet(
            packet in proptest::collection::vec(any::<u8>(), 40..1_500),
            v6 in any::<bool>(),
            next in proptest::sample::select(&[0u8, 1, 6, 43, 44, 58, 60][..]),
        ) {
            let packet = made_whole(packet, v6, next);
            for from in [ROUTER4, ROUTER6] {
                if let Some(message) = unreachable(&packet, from) {
                    let (source, destination) = addresses(&message).expect("a packet");
                    prop_assert_eq!(source, from);
                    prop_assert_eq!(Some(destination), addresses(&packet).map(|(source, _)| source));
                    let most = if v6 { 1_280 } else { 576 };
                    prop_assert!(message.len() <= most);
                    prop_assert!(sums_are_right(&message));
                    // And no message is answered by another.
                    prop_assert_eq!(unreachable(&message, destination), None);
                }
            }
        }
    }
}
