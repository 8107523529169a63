//! The Internet checksum (RFC 1071), and its incremental update (RFC 1624).
//!
//! Sums are kept as `u32` in which carries may still stand above bit 15; words count as they are on the
//! wire (big-endian). A few dozen sums can be added before [`fold`].

/// The ones-complement sum of `bytes`, an odd last byte padded with zero. At most 0xffff.
///
/// Eight bytes at a time in the machine's own byte order: the sum of swapped words is the swapped sum.
pub fn sum(bytes: &[u8]) -> u32 {
    let (words, tail) = bytes.as_chunks::<8>();
    let (blocks, words) = words.as_chunks::<4>();
    let mut sums = [0u64; 4];
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block) {
            *sum += halves(*word);
        }
    }
    let mut total: u64 = sums.iter().sum();
    total += words.iter().map(|word| halves(*word)).sum::<u64>();
    let mut last = [0; 8];
    last[..tail.len()].copy_from_slice(tail);
    total += halves(last);

    let total = (total >> 32) + (total & 0xffff_ffff);
    let total = (total >> 48) + (total >> 32 & 0xffff) + (total >> 16 & 0xffff) + (total & 0xffff);
    // At most 18 bits are left.
    fold(total as u32).to_be().into()
}

/// The sum of the pseudo-header of TCP and UDP.
///
/// `addresses` are source and destination as they follow each other in the IP header: 8 bytes of IPv4,
/// 32 of IPv6. `length` is that of the transport header and its payload, in bytes.
pub fn pseudo_header(addresses: &[u8], protocol: u8, length: u32) -> u32 {
    sum(addresses) + u32::from(protocol) + (length >> 16) + (length & 0xffff)
}

/// The sum in 16 bits. Zero only where every word was zero.
pub fn fold(sum: u32) -> u16 {
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// What a checksum field holds for this sum: its complement.
pub fn finish(sum: u32) -> u16 {
    !fold(sum)
}

/// The checksum after one 16-bit word it covers changed from `old` to `new` (RFC 1624, equation 3).
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    finish(u32::from(!checksum) + u32::from(!old) + u32::from(new))
}

/// Completes a checksum that the kernel left partial: the field at `start + offset` holds the sum of the
/// pseudo-header, the data are those from `start` on. `None`, and nothing changed, where the field lies
/// outside the packet.
///
/// A result of zero becomes 0xffff, as in `skb_checksum_help` (net/core/dev.c): zero means "none" in UDP,
/// and everywhere else the two are equal.
pub fn complete(packet: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let data = packet.get_mut(start..)?;
    data.get(offset..offset.checked_add(2)?)?;
    let checksum = match finish(sum(data)) {
        0 => 0xffff,
        checksum => checksum,
    };
    data.get_mut(offset..offset + 2)?.copy_from_slice(&checksum.to_be_bytes());
    Some(())
}

/// Both 32-bit halves of a word, so that four billion words fit in a sum without a carry.
fn halves(word: [u8; 8]) -> u64 {
    let word = u64::from_ne_bytes(word);
    (word >> 32) + (word & 0xffff_ffff)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
        }
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    #[test]
    fn example_of_rfc_1071() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
        assert_eq!(sum(&[]), 0);
        assert_eq!(sum(&[0xab]), 0xab00);
        assert_eq!(sum(&[0xff; 65_536]), 0xffff);
    }

    #[test]
    fn example_of_rfc_1624() {
        // Section 4: the equation that it replaces gives 0xffff here.
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn completes_inside_the_packet_only() {
        let mut packet = [0x11, 0x22, 0x00, 0x01, 0x80];
        assert_eq!(complete(&mut packet, 1, 3), None);
        assert_eq!(complete(&mut packet, 6, 0), None);
        assert_eq!(complete(&mut packet, 1, usize::MAX), None);
        assert_eq!(packet, [0x11, 0x22, 0x00, 0x01, 0x80]);
        assert_eq!(complete(&mut packet, 2, 0), Some(()));
        assert_eq!(packet, [0x11, 0x22, 0x7f, 0xfe, 0x80]);
        let mut zero = [0xff, 0xff];
        assert_eq!(complete(&mut zero, 0, 0), Some(()));
        assert_eq!(zero, [0xff, 0xff]);
    }

    proptest! {
        #[test]
        fn equals_the_naive_sum(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(sum(&bytes), u32::from(naive(&bytes)));
        }

        #[test]
        fn update_equals_the_whole(mut bytes in proptest::collection::vec(any::<u8>(), 20), new in 1u16..) {
            bytes[0] |= 0x40;
            let old = u16::from_be_bytes([bytes[0], bytes[1]]);
            let before = finish(sum(&bytes));
            bytes[..2].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(update(before, old, new), finish(sum(&bytes)));
        }
    }
}
