//! Congestion marks of a tunnel's outer packet carried over to the inner one: RFC 6040, section 4.2.

use super::checksum;
use super::inner::{V4_CHECKSUM, V4_MIN, V6_LEN, be16, put16};

/// Not ECN-capable.
pub const NOT_ECT: u8 = 0b00;
/// ECN-capable, ECT(1).
pub const ECT_1: u8 = 0b01;
/// ECN-capable, ECT(0).
pub const ECT_0: u8 = 0b10;
/// Congestion experienced.
pub const CE: u8 = 0b11;

/// The outer packet met congestion, and the inner one's sender would not understand the mark: the packet
/// must be dropped for its sender to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("congestion marked on a packet that is not ECN-capable")]
pub struct DropCe;

/// The ECN codepoint of an IP packet; `None` where it is neither IPv4 nor IPv6 or ends inside its header.
pub fn ecn_of(packet: &[u8]) -> Option<u8> {
    match packet.first()? >> 4 {
        4 if packet.len() >= V4_MIN => Some(packet[1] & CE),
        6 if packet.len() >= V6_LEN => Some(packet[1] >> 4 & CE),
        _ => None,
    }
}

/// Merges the mark of the outer packet into the inner one, keeping an IPv4 header checksum valid.
///
/// `outer` is a codepoint, or a whole TOS or traffic class byte: only its two low bits count.
/// What is not an IP packet stays as it is.
///
/// # Errors
/// [`DropCe`] where `packet` is to be dropped; it is unchanged.
pub fn decapsulate(outer: u8, packet: &mut [u8]) -> Result<(), DropCe> {
    let Some(inner) = ecn_of(packet) else { return Ok(()) };
    // Figure 4. The combinations it flags as dangerous or unused keep the inner mark, as it says.
    let merged = match (inner, outer & CE) {
        (NOT_ECT, CE) => return Err(DropCe),
        (NOT_ECT, _) => NOT_ECT,
        (ECT_0, ECT_1) => ECT_1,
        (_, CE) => CE,
        (inner, _) => inner,
    };
    if merged == inner {
        return Ok(());
    }
    if packet[0] >> 4 == 6 {
        packet[1] ^= (inner ^ merged) << 4;
        return Ok(());
    }
    let old = be16(packet, 0);
    packet[1] ^= inner ^ merged;
    let checksum = checksum::update(be16(packet, V4_CHECKSUM), old, be16(packet, 0));
    put16(packet, V4_CHECKSUM, checksum);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: [u8; 20] = [0x45, 0x28, 0, 20, 0x12, 0x34, 0x40, 0, 64, 1, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1];

    /// Rows: inner Not-ECT, ECT(0), ECT(1), CE; columns: outer likewise, as figure 4 is printed.
    const FIGURE_4: [[Option<u8>; 4]; 4] = [
        [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None],
        [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)],
        [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)],
        [Some(CE), Some(CE), Some(CE), Some(CE)],
    ];
    const ORDER: [u8; 4] = [NOT_ECT, ECT_0, ECT_1, CE];

    fn v4(ecn: u8) -> Vec<u8> {
        let mut packet = V4.to_vec();
        packet[1] |= ecn;
        let checksum = checksum::finish(checksum::sum(&packet));
        put16(&mut packet, V4_CHECKSUM, checksum);
        packet
    }

    fn v6(ecn: u8) -> Vec<u8> {
        let mut packet = vec![0; 40];
        // Traffic class 0xb8 with its ECN bits, flow label 0xfffff.
        packet[..4].copy_from_slice(&[0x6b, 0x8f | ecn << 4, 0xff, 0xff]);
        packet
    }

    #[test]
    fn figure_4_exactly() {
        for (inner, row) in ORDER.into_iter().zip(FIGURE_4) {
            for (outer, expected) in ORDER.into_iter().zip(row) {
                for make in [v4, v6] {
                    let mut packet = make(inner);
                    assert_eq!(ecn_of(&packet), Some(inner));
                    // The outer DSCP doesn't matter.
                    let result = decapsulate(outer | 0xb8, &mut packet);
                    match expected {
                        None => assert_eq!((result, packet), (Err(DropCe), make(inner))),
                        Some(ecn) => assert_eq!((result, packet), (Ok(()), make(ecn))),
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_ip_stays() {
        for bytes in [&[][..], &[0x45], &[0x45, 2, 0], &V4[..19], &[0x60; 39], &[0x50; 60]] {
            let mut packet = bytes.to_vec();
            assert_eq!(ecn_of(bytes), None);
            assert_eq!(decapsulate(CE, &mut packet), Ok(()));
            assert_eq!(packet, bytes);
        }
    }
}
