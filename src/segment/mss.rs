//! TCP's maximum segment size, lowered on the way so that both ends send packets that fit the path.

use super::checksum;
use super::inner::{Family, SYN, TCP_FLAGS, TCP_MIN, Transport, V4_MIN, V6_LEN, be16, parse, put16};

/// Lowers the MSS option of a TCP SYN so that the segments it allows are packets of at most `mtu` bytes: the MTU
/// without the fixed headers of IP and TCP, as RFC 9293, section 3.7.1 has it. Returns whether the packet changed.
///
/// `partial_csum` says that the checksum field holds only the pseudo-header's sum; a full one is updated (RFC 1624).
/// Everything that is not a whole TCP packet with SYN stays, and so does a SYN without the option: its sender takes
/// 536 bytes, or 1,220 over IPv6.
pub fn clamp_mss(packet: &mut [u8], partial_csum: bool, mtu: usize) -> bool {
    let Ok(layout) = parse(packet) else { return false };
    if layout.transport != Transport::Tcp || packet[layout.transport_at + TCP_FLAGS] & SYN == 0 {
        return false;
    }
    let ip_len = match layout.family {
        Family::V4 => V4_MIN,
        Family::V6 => V6_LEN,
    };
    let most = mtu.saturating_sub(ip_len + TCP_MIN);
    let most = u16::try_from(most).unwrap_or(u16::MAX);
    let checksum_at = layout.transport_at + layout.transport.checksum_offset();
    let options_at = layout.transport_at + TCP_MIN;

    let mut changed = false;
    let mut at = options_at;
    while let Some(&kind) = packet[..layout.payload_at].get(at) {
        let len = match kind {
            END => break,
            NO_OPERATION => 1,
            _ => match packet[..layout.payload_at].get(at + 1) {
                Some(&len) if len >= 2 => usize::from(len),
                _ => break,
            },
        };
        if kind == MSS && len == MSS_LEN && at + MSS_LEN <= layout.payload_at {
            let value_at = at + 2;
            let old = be16(packet, value_at);
            if old > most {
                put16(packet, value_at, most);
                if !partial_csum {
                    // At an odd place its bytes belong to two words, each in the other half.
                    let (old, new) = match (value_at - layout.transport_at) % 2 {
                        0 => (old, most),
                        _ => (old.swap_bytes(), most.swap_bytes()),
                    };
                    let checksum = checksum::update(be16(packet, checksum_at), old, new);
                    put16(packet, checksum_at, checksum);
                }
                changed = true;
            }
        }
        at += len;
    }
    changed
}

// RFC 9293, section 3.2.
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const MSS: u8 = 2;
const MSS_LEN: usize = 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 10.9.0.2:40000 -> 10.9.0.1:443, SYN, MSS 1,460, SACK permitted, window scale 7.
    const SYN4: [u8; 52] = [
        0x45, 0, 0, 52, 0x12, 0x34, 0x40, 0, 64, 6, 0x14, 0x7c, 10, 9, 0, 2, 10, 9, 0, 1, //
        0x9c, 0x40, 0x01, 0xbb, 0, 0, 0, 1, 0, 0, 0, 0, 0x80, 0x02, 0xff, 0xff, 0xbd, 0x00, 0, 0, //
        2, 4, 0x05, 0xb4, 1, 1, 4, 2, 1, 3, 3, 7,
    ];

    fn full_checksum(packet: &mut [u8]) -> u16 {
        let layout = parse(packet).expect("a TCP packet");
        let at = layout.transport_at + 16;
        put16(packet, at, 0);
        let len = (packet.len() - layout.transport_at) as u32;
        let pseudo = checksum::pseudo_header(&packet[layout.family.addresses()], 6, len);
        let sum = checksum::finish(pseudo + checksum::sum(&packet[layout.transport_at..]));
        put16(packet, at, sum);
        sum
    }

    fn syn(v6: bool, extensions: usize, options: &[u8]) -> Vec<u8> {
        let mut packet;
        if v6 {
            packet = vec![0; 40];
            packet[0] = 0x60;
            packet[6] = if extensions > 0 { 60 } else { 6 };
            packet[23] = 1;
            packet[39] = 2;
            for i in 1..=extensions {
                packet.extend([if i == extensions { 6 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
            }
        } else {
            packet = SYN4[..20].to_vec();
        }
        packet.extend(&SYN4[20..40]);
        let transport_at = packet.len() - 20;
        packet[transport_at + 12] = (5 + options.len() as u8 / 4) << 4;
        packet.extend(options);
        let len = packet.len() as u16;
        if v6 {
            put16(&mut packet, 4, len - 40)
        } else {
            put16(&mut packet, 2, len)
        }
        full_checksum(&mut packet);
        packet
    }

    #[test]
    fn a_syn_in_bytes() {
        let mut packet = SYN4;
        assert_eq!(full_checksum(&mut packet), be16(&SYN4, 36));
        assert!(clamp_mss(&mut packet, false, 1_400));
        let mut expected = SYN4;
        // 1,360; and the checksum rose by the hundred that the option fell.
        expected[42..44].copy_from_slice(&[0x05, 0x50]);
        expected[36..38].copy_from_slice(&[0xbd, 0x64]);
        assert_eq!(packet, expected);

        // It fits already.
        assert!(!clamp_mss(&mut packet, false, 1_400));
        assert!(!clamp_mss(&mut packet, false, 9_000));
        assert!(!clamp_mss(&mut packet, false, usize::MAX));
        assert_eq!(packet, expected);
    }

    #[test]
    fn a_partial_checksum_does_not_cover_options() {
        let mut packet = SYN4;
        assert!(clamp_mss(&mut packet, true, 1_400));
        assert_eq!(packet[36..38], SYN4[36..38]);
        assert_eq!(packet[42..44], [0x05, 0x50]);
    }

    #[test]
    fn ipv6_has_twenty_bytes_more() {
        for extensions in 0..3 {
            let mut packet = syn(true, extensions, &[2, 4, 0x05, 0xa0]);
            let at = packet.len() - 2;
            assert!(clamp_mss(&mut packet, false, 1_400));
            assert_eq!(be16(&packet, at), 1_340);
            let sum = be16(&packet, at - 6);
            assert_eq!(sum, full_checksum(&mut packet));
        }
    }

    #[test]
    fn what_is_no_syn_with_an_mss_stays() {
        let with = |at: usize, value: u8| {
            let mut packet = SYN4.to_vec();
            packet[at] = value;
            packet
        };
        let mut cases = vec![
            with(33, 0x10), // no SYN
            with(9, 17),    // UDP
            with(6, 0x20),  // a fragment
            with(3, 51),    // another length
            with(40, 3),    // another option
            with(41, 0),    // an endless option
            with(41, 1),    // the same
            with(41, 3),    // an MSS of another length
            with(40, 0),    // the end of options
            vec![],
        ];
        cases.push(syn(false, 0, &[1, 1, 1, 2]));
        cases.push(syn(false, 0, &[1, 2, 4, 5]));
        cases.push(syn(false, 0, &[]));
        for packet in cases {
            let mut after = packet.clone();
            assert!(!clamp_mss(&mut after, false, 600), "{packet:x?}");
            assert_eq!(after, packet);
        }
    }

    proptest! {
        /// Wherever the option is, the checksum stays right (or as wrong as it was).
        #[test]
        fn the_checksum_stays_right(
            v6 in any::<bool>(),
            extensions in 0usize..3,
            before in 0usize..5,
            after in proptest::collection::vec(any::<u8>(), 12),
            mss in any::<u16>(),
            mtu in 0usize..70_000,
            damage in any::<u16>(),
        ) {
            let mut options = vec![1; before];
            options.extend([2, 4]);
            options.extend(mss.to_be_bytes());
            let value_at = options.len() - 2;
            // The end, so that what follows is no option.
            options.push(0);
            options.extend(&after[..(4 - options.len() % 4) % 4 + 4]);
            let mut packet = syn(v6, extensions, &options);
            let options_at = packet.len() - options.len();
            let checksum_at = options_at - 4;
            let right = be16(&packet, checksum_at);
            let wrong = checksum::update(right, 0, damage);
            put16(&mut packet, checksum_at, wrong);

            let before = packet.clone();
            let changed = clamp_mss(&mut packet, false, mtu);
            let most = mtu.saturating_sub(if v6 { 60 } else { 40 });
            let new = be16(&packet, options_at + value_at);
            prop_assert_eq!(usize::from(new), usize::from(mss).min(most));
            prop_assert_eq!(changed, new != mss);
            let sum = be16(&packet, checksum_at);
            let expected = checksum::update(full_checksum(&mut packet), 0, damage);
            // Zero has two forms.
            prop_assert!(sum == expected || (sum ^ expected) == 0xffff && (sum == 0 || expected == 0));
            if !changed {
                put16(&mut packet, checksum_at, wrong);
                prop_assert_eq!(packet, before);
            }
        }

        #[test]
        fn any_bytes(mut packet in proptest::collection::vec(any::<u8>(), 0..100), head in any::<bool>(), partial in any::<bool>()) {
            if head && packet.len() >= 52 {
                packet[..40].copy_from_slice(&SYN4[..40]);
                let len = packet.len() as u16;
                put16(&mut packet, 2, len);
            }
            clamp_mss(&mut packet, partial, 576);
        }
    }
}
