//! Packets from the device and from the peer: what is cut merges again, what merges is cut into the same packets, and
//! whatever is in them nothing panics.

use std::net::IpAddr;

use tunguard::batch::{BatchReader, BatchWriter, Place};
use tunguard::segment::{
    Inner, MAX_SEGMENTS, Segments, addresses, checksum, clamp_mss, ecn, fragment, inner, is_broadcast,
    is_from, is_noise, next_run, pieces, too_big, unreachable,
};
use tunguard::wire::vnet::{GSO_NONE, VNET_LEN, VnetHeader};

use super::input::Input;

/// A few numbers, a virtio header and a packet, made whole if a number says so.
pub fn body(data: &[u8]) {
    batches(data);
    let mut input = Input::new(data);
    let (make_whole, mtu, ecn) = (input.u8(), usize::from(input.u16()), input.u8());
    let vnet = VnetHeader::parse(input.bytes(VNET_LEN)).unwrap_or_default();
    assert_eq!(VnetHeader::parse(&vnet.emit()), Some(vnet));
    let mut packet = input.rest().to_vec();
    packet.truncate(u16::MAX.into());
    if make_whole & 1 != 0 {
        set_lengths(&mut packet);
    }
    cut(vnet, &packet, mtu);
    cut(vnet, &packet, usize::MAX);
    merge(&packet, make_whole & 2 != 0);
    in_pieces(vnet, &packet, mtu);
    looked_at(&packet, mtu, make_whole & 4 != 0);
    marked(&packet, ecn);
}

/// So that more than a few inputs get beyond the length fields.
fn set_lengths(packet: &mut [u8]) {
    let len = packet.len();
    match packet.first().map(|byte| byte >> 4) {
        Some(4) if len >= 20 => {
            packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            let header = usize::from(packet[0] & 15) * 4;
            if (20..=len).contains(&header) {
                packet[10..12].fill(0);
                let sum = checksum::finish(checksum::sum(&packet[..header]));
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            }
        }
        Some(6) if len >= 40 => packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes()),
        _ => {}
    }
    if let Ok(layout) = inner::parse(packet)
        && layout.transport == inner::Transport::Udp
    {
        let transport_len = (len - layout.transport_at) as u16;
        packet[layout.transport_at + 4..][..2].copy_from_slice(&transport_len.to_be_bytes());
    }
}

/// All packets that a read of the device stands for.
fn cut_all(vnet: VnetHeader, packet: &[u8], mtu: usize) -> Option<Vec<(Vec<u8>, bool)>> {
    let mut segments = Segments::within(vnet, packet, mtu).ok()?;
    let count = segments.count();
    assert!((1..=MAX_SEGMENTS).contains(&count));
    let mut out = vec![0; segments.max_len()];
    let mut all = Vec::new();
    while let Some(segment) = segments.next_into(&mut out) {
        all.push((out[..segment.len].to_vec(), segment.partial_csum));
    }
    // A checksum that can't be completed ends it early.
    assert_eq!(all.len() + segments.count(), count);
    Some(all)
}

fn cut(vnet: VnetHeader, packet: &[u8], mtu: usize) {
    let Some(all) = cut_all(vnet, packet, mtu) else { return };
    for (segment, partial) in &all {
        assert!(segment.len() <= packet.len());
        if *partial {
            inner::parse(segment).expect("a receiver finds the checksum");
        }
    }
    if all.len() > 1 {
        let payload_at = inner::parse(packet).expect("headers").payload_at;
        let payload: Vec<u8> = all.iter().flat_map(|(segment, _)| segment[payload_at..].to_vec()).collect();
        assert_eq!(payload, packet[payload_at..]);
    }
    let inners: Vec<Inner<'_>> =
        all.iter().map(|(packet, partial_csum)| Inner { packet, partial_csum: *partial_csum }).collect();
    merges_exactly(&inners, true);
    merges_exactly(&inners, false);
}

/// Every run is cut into its members again.
fn merges_exactly(inners: &[Inner<'_>], uso: bool) {
    let mut rest = inners;
    while !rest.is_empty() {
        let Ok(run) = next_run(rest, uso) else {
            rest = &rest[1..];
            continue;
        };
        assert!(run.count >= 1 && run.count <= rest.len());
        let (members, others) = rest.split_at(run.count);
        rest = others;
        let mut whole = run.head().to_vec();
        members.iter().for_each(|member| whole.extend(&member.packet[run.payload_offset()..]));
        if run.count == 1 {
            assert_eq!(whole, members[0].packet);
            continue;
        }
        let again = cut_all(run.vnet, &whole, usize::MAX).expect("what was merged can be cut");
        assert_eq!(again.len(), members.len());
        for ((packet, partial), member) in again.iter().zip(members) {
            assert!(*partial && packet == member.packet, "a merged packet is cut into others");
        }
    }
}

/// The packet as the peer sent several like it: taken apart at a place or two.
fn merge(packet: &[u8], uso: bool) {
    let one = Inner { packet, partial_csum: true };
    merges_exactly(&[one, one, Inner { partial_csum: false, ..one }, one], uso);
}

fn in_pieces(vnet: VnetHeader, packet: &[u8], max_len: usize) {
    let mut emitted = Vec::new();
    let count = pieces(vnet, packet, max_len, |vnet, head, payload| {
        emitted.push((vnet, [head, payload].concat()));
    });
    assert_eq!(count.unwrap_or(0), emitted.len());
    assert!(emitted.iter().all(|(_, piece)| piece.len() <= max_len));
    if emitted.len() < 2 || vnet.gso_type == GSO_NONE {
        return;
    }
    let Some(whole) = cut_all(vnet, packet, usize::MAX) else { return };
    let cut = |(vnet, piece): &(VnetHeader, Vec<u8>)| cut_all(*vnet, piece, usize::MAX);
    let all: Vec<_> = emitted.iter().filter_map(cut).flatten().collect();
    assert!(all == whole, "the pieces are cut into other packets than the whole");
}

fn looked_at(packet: &[u8], mtu: usize, partial: bool) {
    let net = "10.9.0.0/24".parse().expect("a network");
    let _ = (is_noise(packet), is_broadcast(packet, &[net]), is_from(packet, &[net]), inner::flow(packet));
    let _ = (inner::carried(packet), ecn::ecn_of(packet));

    let mut clamped = packet.to_vec();
    if clamp_mss(&mut clamped, partial, mtu) {
        assert!(!clamp_mss(&mut clamped.clone(), partial, mtu), "it is not low enough yet");
        assert_eq!(clamped.len(), packet.len());
    }
    if let Some(fragments) = fragment(packet, partial, mtu) {
        are_all_of(&fragments, packet, mtu);
    }
    for from in [IpAddr::from([192, 0, 2, 9]), IpAddr::from([0xfd; 16])] {
        let news = [too_big(packet, mtu, from), unreachable(packet, from)];
        for news in news.into_iter().flatten() {
            let (source, destination) = addresses(&news).expect("a packet");
            assert_eq!(source, from);
            assert_eq!(Some(destination), addresses(packet).map(|(source, _)| source));
            assert!(news.len() <= 1_280);
            assert_eq!(unreachable(&news, destination), None, "news of news");
        }
    }
}

fn are_all_of(fragments: &[Vec<u8>], packet: &[u8], mtu: usize) {
    let header = |packet: &[u8]| usize::from(packet[0] & 15) * 4;
    let field = |packet: &[u8]| u16::from_be_bytes([packet[6], packet[7]]);
    if fragments.len() == 1 {
        return assert_eq!(fragments[0].len(), packet.len());
    }
    let mut at = usize::from(field(packet) & 0x1fff) * 8;
    let from = at;
    for fragment in fragments {
        assert!(fragment.len() <= mtu && addresses(fragment).is_some());
        assert_eq!(checksum::fold(checksum::sum(&fragment[..header(fragment)])), 0xffff);
        assert_eq!(usize::from(field(fragment) & 0x1fff) * 8, at);
        at += fragment.len() - header(fragment);
    }
    assert_eq!(at - from, packet.len() - header(packet));
}

fn marked(packet: &[u8], outer: u8) {
    let mut inner = packet.to_vec();
    let before = ecn::ecn_of(packet);
    if ecn::decapsulate(outer, &mut inner).is_err() {
        return assert_eq!((before, outer & 3), (Some(ecn::NOT_ECT), ecn::CE));
    }
    assert_eq!(addresses(&inner), addresses(packet));
    // RFC 6040: a packet that isn't ECN-capable stays so, and a mark is never lost.
    match before {
        None => assert_eq!(inner, packet),
        Some(ecn::NOT_ECT) => assert_eq!(ecn::ecn_of(&inner), Some(ecn::NOT_ECT)),
        Some(ecn::CE) => assert_eq!(ecn::ecn_of(&inner), Some(ecn::CE)),
        Some(_) => assert_ne!(ecn::ecn_of(&inner), Some(ecn::NOT_ECT)),
    }
}

/// What a worker might write into a queue, and what the guard makes of its own.
fn batches(data: &[u8]) {
    if let Some(place) = Place::parse(data) {
        assert_eq!(place.emit(), data);
    }
    let mut writer = BatchWriter::new(u16::MAX.into());
    let mut taken = 0;
    for record in BatchReader::new(data) {
        let Ok((vnet, packet)) = record else { break };
        assert!(writer.push(&vnet, packet, &[]) || writer.message().len() + packet.len() > 65_000);
        taken += 12 + packet.len();
    }
    let written = writer.message();
    assert!(written.len() == taken || taken > 65_000);
    assert!(data.starts_with(written));
}
