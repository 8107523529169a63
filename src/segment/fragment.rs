//! IPv4 packets too large for the path, cut as any router would (RFC 791, section 3.2).

use super::checksum;
use super::inner::{
    V4_CHECKSUM, V4_DONT_FRAGMENT, V4_FRAGMENT, V4_LENGTH, V4_MIN, V4_MORE, V4_OFFSET, addresses, be16,
    parse, put16,
};

/// The fragments of an IPv4 packet, each of at most `mtu` bytes; a packet that fits is its only one. Fragments are cut
/// again.
///
/// `partial_csum` says that the checksum field holds only the pseudo-header's sum: it is completed first, as nobody
/// could find it later.
///
/// `None` where that isn't for us to do: IPv6, "don't fragment" (see [`too_big`](super::too_big())), a length field that
/// is not the number of bytes, no room for eight bytes, or more than fits behind a fragment's offset.
pub fn fragment(packet: &[u8], partial_csum: bool, mtu: usize) -> Option<Vec<Vec<u8>>> {
    let (source, _) = addresses(packet)?;
    if source.is_ipv6() {
        return None;
    }
    let field = be16(packet, V4_FRAGMENT);
    if field & V4_DONT_FRAGMENT != 0 {
        return None;
    }
    let mut whole = packet.to_vec();
    if partial_csum {
        let layout = parse(packet).ok()?;
        checksum::complete(&mut whole, layout.transport_at, layout.transport.checksum_offset())?;
    }
    if whole.len() <= mtu {
        return Some(vec![whole]);
    }
    let (head, data) = whole.split_at(usize::from(packet[0] & 0x0f) * 4);
    // Offsets count in eight bytes.
    let room = mtu.checked_sub(head.len())? & !7;
    let offset = usize::from(field & V4_OFFSET);
    if room == 0 || offset + data.len() / 8 > usize::from(V4_OFFSET) {
        return None;
    }
    let mut later = head.to_vec();
    blank_uncopied(&mut later[V4_MIN..]);

    let pieces = data.chunks(room).enumerate().map(|(index, piece)| {
        let start = index * room;
        let mut fragment = if index == 0 { head.to_vec() } else { later.clone() };
        let is_last = start + piece.len() == data.len();
        let more = if is_last { field & V4_MORE } else { V4_MORE };
        let len = fragment.len() + piece.len();
        put16(&mut fragment, V4_LENGTH, len as u16);
        put16(
            &mut fragment,
            V4_FRAGMENT,
            field & !(V4_MORE | V4_OFFSET) | more | (offset + start / 8) as u16,
        );
        put16(&mut fragment, V4_CHECKSUM, 0);
        let checksum = checksum::finish(checksum::sum(&fragment));
        put16(&mut fragment, V4_CHECKSUM, checksum);
        fragment.extend(piece);
        fragment
    });
    Some(pieces.collect())
}

/// Turns options that only the first fragment has into nothing, as `ip_options_fragment` (net/ipv4/ip_options.c) does.
fn blank_uncopied(options: &mut [u8]) {
    let mut at = 0;
    while let Some(&kind) = options.get(at) {
        let len = match kind {
            END => return,
            NO_OPERATION => 1,
            _ => usize::from(options.get(at + 1).copied().unwrap_or(0)),
        };
        let Some(option) = options.get_mut(at..at + len).filter(|_| kind == NO_OPERATION || len >= 2) else {
            return;
        };
        if kind & COPIED == 0 {
            option.fill(NO_OPERATION);
        }
        at += len;
    }
}

// RFC 791, section 3.1.
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const COPIED: u8 = 0x80;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(options: &[u8], field: u16, data: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45 + options.len() as u8 / 4, 0, 0, 0, 0xab, 0xcd, 0, 0, 64, 17, 0, 0];
        packet.extend([10, 9, 0, 2, 10, 9, 0, 1]);
        packet.extend(options);
        let len = (packet.len() + data.len()) as u16;
        put16(&mut packet, 2, len);
        put16(&mut packet, 6, field);
        let sum = checksum::finish(checksum::sum(&packet));
        put16(&mut packet, 10, sum);
        packet.extend(data);
        packet
    }

    /// What a host makes of fragments; `None` where they don't fit together.
    fn reassembled(fragments: &[Vec<u8>]) -> Option<Vec<u8>> {
        let mut data = vec![];
        for (i, fragment) in fragments.iter().enumerate() {
            let header_len = usize::from(fragment[0] & 15) * 4;
            let field = be16(fragment, 6);
            let is_last = i + 1 == fragments.len();
            if checksum::sum(&fragment[..header_len]) != 0xffff
                || usize::from(be16(fragment, 2)) != fragment.len()
                || usize::from(field & V4_OFFSET) * 8 != data.len()
                || (field & V4_MORE == 0) != is_last
            {
                return None;
            }
            data.extend(&fragment[header_len..]);
        }
        let header_len = usize::from(fragments[0][0] & 15) * 4;
        Some(packet(&fragments[0][20..header_len], be16(&fragments[0], 6) & 0x8000, &data))
    }

    #[test]
    fn fragments_in_bytes() {
        let data: Vec<u8> = (0..20).collect();
        let fragments = fragment(&packet(&[], 0, &data), false, 30).expect("fragments");
        let head = |len, field: u16, sum: u16| {
            let [f, s] = [field.to_be_bytes(), sum.to_be_bytes()];
            vec![0x45, 0, 0, len, 0xab, 0xcd, f[0], f[1], 64, 17, s[0], s[1], 10, 9, 0, 2, 10, 9, 0, 1]
        };
        let expected = [
            [head(28, 0x2000, 0x9aef), data[..8].to_vec()].concat(),
            [head(28, 0x2001, 0x9aee), data[8..16].to_vec()].concat(),
            [head(24, 0x0002, 0xbaf1), data[16..].to_vec()].concat(),
        ];
        assert_eq!(fragments, expected);
        // The second one cut again, and the last.
        let data: Vec<u8> = (0..24).collect();
        let again = fragment(&packet(&[], 0x2005, &data), false, 43).expect("fragments");
        assert_eq!(again.iter().map(|f| be16(f, 6)).collect::<Vec<_>>(), [0x2005, 0x2007]);
        let again = fragment(&packet(&[], 0x0005, &data), false, 43).expect("fragments");
        assert_eq!(again.iter().map(|f| be16(f, 6)).collect::<Vec<_>>(), [0x2005, 0x0007]);
    }

    #[test]
    fn options_are_copied_if_they_say_so() {
        // Record route (not copied), security (copied), and a no-operation to fill up.
        let options = [7, 7, 4, 0, 0, 0, 0, 0x82, 4, 9, 9, 1];
        let fragments = fragment(&packet(&options, 0, &[5; 16]), false, 40).expect("fragments");
        assert_eq!(fragments.len(), 2);
        assert_eq!(fragments[0][20..32], options);
        assert_eq!(fragments[1][20..32], [1, 1, 1, 1, 1, 1, 1, 0x82, 4, 9, 9, 1]);
    }

    #[test]
    fn a_partial_checksum_is_completed() {
        let mut data = vec![0x9c, 0x40, 0, 53, 0, 24, 0, 0];
        data.extend([0x11; 16]);
        let pseudo = checksum::fold(checksum::pseudo_header(&[10, 9, 0, 2, 10, 9, 0, 1], 17, 24));
        put16(&mut data, 6, pseudo);
        let partial = packet(&[], 0, &data);
        for (mtu, count) in [(28, 3), (1_500, 1)] {
            let whole = reassembled(&fragment(&partial, true, mtu).expect("fragments")).expect("a packet");
            assert_eq!(fragment(&partial, true, mtu).map(|f| f.len()), Some(count));
            let sum =
                checksum::pseudo_header(&[10, 9, 0, 2, 10, 9, 0, 1], 17, 24) + checksum::sum(&whole[20..]);
            assert_eq!(checksum::fold(sum), 0xffff);
            assert_eq!(whole[28..], partial[28..]);
        }
    }

    #[test]
    fn what_is_not_fragmented() {
        let data = [1; 100];
        assert_eq!(fragment(&packet(&[], V4_DONT_FRAGMENT, &data), false, 60), None);
        assert_eq!(fragment(&packet(&[], 0, &data)[..119], false, 60), None, "cut short");
        assert_eq!(fragment(&packet(&[], 0, &data), false, 27), None, "no room");
        assert_eq!(fragment(&packet(&[], 0, &data), false, 0), None);
        assert_eq!(fragment(&packet(&[], 0x1ff8, &data), false, 60), None, "beyond the last offset");
        let mut v6 = vec![0; 140];
        (v6[0], v6[5]) = (0x60, 100);
        assert_eq!(fragment(&v6, false, 60), None);
        let small = packet(&[], 0, &data);
        assert_eq!(fragment(&small, false, 120), Some(vec![small]));
    }

    proptest! {
        #[test]
        fn reassembly_gives_the_packet(
            options in proptest::collection::vec(any::<u8>(), 0..=40),
            reserved in any::<bool>(),
            data in proptest::collection::vec(any::<u8>(), 0..3_000),
            mtu in 68usize..1_500,
            again in 68usize..1_500,
        ) {
            let options = &options[..options.len() / 4 * 4];
            let whole = packet(options, if reserved { 0x8000 } else { 0 }, &data);
            let fragments = fragment(&whole, false, mtu).expect("fragments");
            prop_assert!(fragments.iter().all(|f| f.len() <= mtu));
            prop_assert_eq!(reassembled(&fragments), Some(whole.clone()));
            let fragments: Vec<_> =
                fragments.iter().flat_map(|f| fragment(f, false, again).expect("fragments")).collect();
            prop_assert!(fragments.iter().all(|f| f.len() <= again));
            prop_assert_eq!(reassembled(&fragments), Some(whole));
        }

        #[test]
        fn any_bytes(mut packet in proptest::collection::vec(any::<u8>(), 20..200), mtu in 0usize..200, partial in any::<bool>()) {
            packet[0] = 0x40 | packet[0] & 0x0f;
            let len = packet.len() as u16;
            put16(&mut packet, 2, len);
            packet[6] &= 0x3f;
            for piece in fragment(&packet, partial, mtu).unwrap_or_default() {
                prop_assert!(piece.len() <= mtu);
            }
        }
    }
}
