//! Cutting against an independent builder of packets, merging as its inverse, and bytes from nowhere.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::wire::vnet::{
    DATA_VALID, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader,
};

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const URG: u8 = 0x20;
const ECE: u8 = 0x40;
const CWR: u8 = 0x80;

// ---------------------------------------------------------------------------------------- the builder

/// A flow; [`Flow::packet`] builds its packets with nothing from the code under test.
#[derive(Clone, Debug)]
struct Flow {
    v6: bool,
    udp: bool,
    /// Told apart by its last byte.
    source: u8,
    port: u16,
    tos: u8,
    ttl: u8,
    dont_fragment: bool,
    ip_options: Vec<u8>,
    tcp_options: Vec<u8>,
    ack: u32,
    window: u16,
}

impl Flow {
    fn tcp4() -> Flow {
        Flow {
            v6: false,
            udp: false,
            source: 2,
            port: 40_000,
            tos: 0x02,
            ttl: 64,
            dont_fragment: true,
            ip_options: vec![],
            tcp_options: vec![1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9],
            ack: 0x0102_0304,
            window: 501,
        }
    }

    fn tcp6() -> Flow {
        Flow { v6: true, ..Flow::tcp4() }
    }

    fn udp4() -> Flow {
        Flow { udp: true, ..Flow::tcp4() }
    }

    fn transport_at(&self) -> usize {
        if self.v6 { 40 } else { 20 + self.ip_options.len() }
    }

    fn head_len(&self) -> usize {
        self.transport_at() + if self.udp { 8 } else { 20 + self.tcp_options.len() }
    }

    fn checksum_offset(&self) -> usize {
        if self.udp { 6 } else { 16 }
    }

    /// A packet with a partial checksum.
    fn packet(&self, seq: u32, id: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut transport = vec![];
        transport.extend(self.port.to_be_bytes());
        transport.extend(443u16.to_be_bytes());
        if self.udp {
            transport.extend((8 + payload.len() as u16).to_be_bytes());
            transport.extend([0, 0]);
        } else {
            transport.extend(seq.to_be_bytes());
            transport.extend(self.ack.to_be_bytes());
            transport.push((5 + self.tcp_options.len() as u8 / 4) << 4);
            transport.push(flags);
            transport.extend(self.window.to_be_bytes());
            transport.extend([0; 4]);
            transport.extend(&self.tcp_options);
        }
        transport.extend(payload);

        let mut packet = vec![];
        let mut pseudo = vec![];
        let protocol = if self.udp { 17 } else { 6 };
        if self.v6 {
            packet.extend([0x60 | self.tos >> 4, self.tos << 4 | 0x0a, 0xbc, 0xde]);
            packet.extend((transport.len() as u16).to_be_bytes());
            packet.extend([protocol, self.ttl]);
            packet.extend([0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, self.source]);
            packet.extend([0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            pseudo.extend(&packet[8..40]);
        } else {
            let total = 20 + self.ip_options.len() + transport.len();
            packet.extend([0x45 + (self.ip_options.len() / 4) as u8, self.tos]);
            packet.extend((total as u16).to_be_bytes());
            packet.extend(id.to_be_bytes());
            packet.extend([if self.dont_fragment { 0x40 } else { 0 }, 0, self.ttl, protocol, 0, 0]);
            packet.extend([10, 9, 0, self.source, 10, 9, 0, 1]);
            packet.extend(&self.ip_options);
            let checksum = !naive_sum(&packet);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
            pseudo.extend(&packet[12..20]);
        }
        pseudo.extend((transport.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
        let at = self.checksum_offset();
        transport[at..at + 2].copy_from_slice(&naive_sum(&pseudo).to_be_bytes());
        packet.extend(transport);
        packet
    }

    /// The super-packet that stands for all of `payload`.
    fn vnet(&self, gso_size: usize, flags: u8) -> VnetHeader {
        let gso_type = match (self.udp, self.v6) {
            (true, _) => GSO_UDP_L4,
            (false, false) => GSO_TCPV4,
            (false, true) => GSO_TCPV6,
        };
        let ecn = if flags & CWR != 0 && !self.udp { GSO_ECN } else { 0 };
        VnetHeader {
            gso_type: gso_type | ecn,
            gso_size: gso_size as u16,
            hdr_len: self.head_len() as u16,
            ..self.partial()
        }
    }

    /// A single packet with a partial checksum.
    fn partial(&self) -> VnetHeader {
        VnetHeader {
            flags: NEEDS_CSUM,
            csum_start: self.transport_at() as u16,
            csum_offset: self.checksum_offset() as u16,
            ..VnetHeader::default()
        }
    }

    /// What cutting must give.
    fn segments(&self, seq: u32, id: u16, flags: u8, payload: &[u8], gso_size: usize) -> Vec<Vec<u8>> {
        let last = payload.len().div_ceil(gso_size) - 1;
        let segment = |(i, chunk): (usize, &[u8])| {
            let mut flags = flags;
            if i > 0 {
                flags &= !CWR;
            }
            if i < last {
                flags &= !(PSH | FIN);
            }
            self.packet(seq.wrapping_add((i * gso_size) as u32), id.wrapping_add(i as u16), flags, chunk)
        };
        payload.chunks(gso_size).enumerate().map(segment).collect()
    }
}

fn naive_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// Whether a receiver that sums everything finds the packet intact.
fn verifies(packet: &[u8]) -> bool {
    let (at, mut covered) = match packet[0] >> 4 {
        4 => {
            let ihl = usize::from(packet[0] & 15) * 4;
            if naive_sum(&packet[..ihl]) != 0xffff {
                return false;
            }
            (ihl, [&packet[12..20], &[0, packet[9]]].concat())
        }
        _ => (40, [&packet[8..40], &[0, packet[6]]].concat()),
    };
    covered.extend(((packet.len() - at) as u32).to_be_bytes());
    covered.extend(&packet[at..]);
    naive_sum(&covered) == 0xffff
}

fn cut(vnet: VnetHeader, packet: &[u8]) -> Vec<(Vec<u8>, bool)> {
    cut_within(vnet, packet, usize::MAX)
}

fn cut_within(vnet: VnetHeader, packet: &[u8], mtu: usize) -> Vec<(Vec<u8>, bool)> {
    let mut segments = Segments::within(vnet, packet, mtu).expect("a packet that can be cut");
    let mut out = vec![0xa5; segments.max_len()];
    let (mut all, mut longest) = (vec![], 0);
    let count = segments.count();
    while let Some(segment) = segments.next_into(&mut out) {
        longest = longest.max(segment.len);
        all.push((out[..segment.len].to_vec(), segment.partial_csum));
        assert_eq!(segments.count(), count - all.len());
    }
    assert_eq!((all.len(), longest), (count, out.len()));
    all
}

/// What the caller's gathered write puts together.
fn gather(run: &Run, packets: &[Inner<'_>]) -> Vec<u8> {
    let mut whole = run.head().to_vec();
    for inner in &packets[..run.count] {
        whole.extend(&inner.packet[run.payload_offset()..]);
    }
    whole
}

fn partial(packets: &[Vec<u8>]) -> Vec<Inner<'_>> {
    packets.iter().map(|packet| Inner { packet, partial_csum: true }).collect()
}

// --------------------------------------------------------------------------------------- literal bytes

/// 10.9.0.2:40000 -> 10.9.0.1:443, sequence 0xfffffffe, ID 0xffff, CWR ACK PSH FIN, "abcde".
const SUPER: [u8; 45] = [
    0x45, 0x00, 0x00, 0x2d, 0xff, 0xff, 0x40, 0x00, 0x40, 0x06, 0x26, 0xb7, //
    10, 9, 0, 2, 10, 9, 0, 1, //
    0x9c, 0x40, 0x01, 0xbb, 0xff, 0xff, 0xff, 0xfe, //
    0, 0, 0, 7, 0x50, 0x99, 1, 0, 0x14, 0x34, 0, 0, //
    b'a', b'b', b'c', b'd', b'e',
];

const SUPER_SEGMENTS: [&[u8]; 3] = [
    &[
        0x45, 0x00, 0x00, 0x2a, 0xff, 0xff, 0x40, 0x00, 0x40, 0x06, 0x26, 0xba, //
        10, 9, 0, 2, 10, 9, 0, 1, //
        0x9c, 0x40, 0x01, 0xbb, 0xff, 0xff, 0xff, 0xfe, //
        0, 0, 0, 7, 0x50, 0x90, 1, 0, 0x14, 0x31, 0, 0, //
        b'a', b'b',
    ],
    &[
        0x45, 0x00, 0x00, 0x2a, 0x00, 0x00, 0x40, 0x00, 0x40, 0x06, 0x26, 0xba, //
        10, 9, 0, 2, 10, 9, 0, 1, //
        0x9c, 0x40, 0x01, 0xbb, 0x00, 0x00, 0x00, 0x00, //
        0, 0, 0, 7, 0x50, 0x10, 1, 0, 0x14, 0x31, 0, 0, //
        b'c', b'd',
    ],
    &[
        0x45, 0x00, 0x00, 0x29, 0x00, 0x01, 0x40, 0x00, 0x40, 0x06, 0x26, 0xba, //
        10, 9, 0, 2, 10, 9, 0, 1, //
        0x9c, 0x40, 0x01, 0xbb, 0x00, 0x00, 0x00, 0x02, //
        0, 0, 0, 7, 0x50, 0x19, 1, 0, 0x14, 0x30, 0, 0, //
        b'e',
    ],
];

const SUPER_VNET: VnetHeader = VnetHeader {
    flags: NEEDS_CSUM,
    gso_type: GSO_TCPV4 | GSO_ECN,
    hdr_len: 40,
    gso_size: 2,
    csum_start: 20,
    csum_offset: 16,
};

#[test]
fn a_super_packet_in_bytes() {
    let segments = cut(SUPER_VNET, &SUPER);
    assert_eq!(segments.iter().map(|(bytes, _)| &bytes[..]).collect::<Vec<_>>(), SUPER_SEGMENTS);
    assert!(segments.iter().all(|(_, partial_csum)| *partial_csum));

    let inners = SUPER_SEGMENTS.map(|packet| Inner { packet, partial_csum: true });
    let run = next_run(&inners, false).expect("a run");
    assert_eq!((run.count, run.payload_offset(), run.vnet), (3, 40, SUPER_VNET));
    assert_eq!(run.head(), &SUPER[..40]);
    assert_eq!(gather(&run, &inners), SUPER);
}

#[test]
fn a_narrow_path_in_bytes() {
    // Segments of three bytes are too long for 42 bytes, those of two are not; nor is the plain packet.
    for gso_size in [3, 9_999] {
        let vnet = VnetHeader { gso_size, ..SUPER_VNET };
        let segments = cut_within(vnet, &SUPER, 42);
        assert_eq!(segments.iter().map(|(bytes, _)| &bytes[..]).collect::<Vec<_>>(), SUPER_SEGMENTS);
    }
    let plain = VnetHeader { gso_type: GSO_NONE, gso_size: 0, ..SUPER_VNET };
    let segments = cut_within(plain, &SUPER, 42);
    assert_eq!(segments.iter().map(|(bytes, _)| &bytes[..]).collect::<Vec<_>>(), SUPER_SEGMENTS);
    assert!(segments.iter().all(|(_, partial_csum)| *partial_csum));
    // All fits.
    assert_eq!(cut_within(plain, &SUPER, 45), [(SUPER.to_vec(), true)]);
    assert_eq!(cut_within(SUPER_VNET, &SUPER, 42), cut(SUPER_VNET, &SUPER));
    // No room for a byte.
    for mtu in [0, 40] {
        assert_eq!(cut_within(plain, &SUPER, mtu), [(SUPER.to_vec(), true)]);
        assert_eq!(cut_within(SUPER_VNET, &SUPER, mtu), cut(SUPER_VNET, &SUPER));
    }
}

#[test]
fn what_is_never_cut() {
    for flow in [Flow::tcp4(), Flow::tcp6()] {
        let payload = [7; 100];
        for flags in [SYN, SYN | ACK, RST, ACK | URG] {
            let packet = flow.packet(1, 1, flags, &payload);
            assert_eq!(cut_within(flow.partial(), &packet, 90), [(packet.clone(), true)], "{flags:#x}");
            let vnet = flow.vnet(60, flags);
            assert_eq!(cut_within(vnet, &packet, 90), cut(vnet, &packet), "{flags:#x}");
        }
        // A full checksum is replaced by a partial one only where it is right.
        let packet = flow.packet(1, 1, ACK, &payload);
        let mut full = packet.clone();
        checksum::complete(&mut full, flow.transport_at(), flow.checksum_offset());
        let segments = flow.segments(1, 1, ACK, &payload, 90 - flow.head_len());
        let segments: Vec<_> = segments.into_iter().map(|segment| (segment, true)).collect();
        assert_eq!(cut_within(VnetHeader::default(), &full, 90), segments);
        full[flow.head_len()] ^= 1;
        assert_eq!(cut_within(VnetHeader::default(), &full, 90), [(full.clone(), false)]);

        let flow = Flow { udp: true, ..flow };
        let packet = flow.packet(0, 1, 0, &payload);
        assert_eq!(cut_within(flow.partial(), &packet, 90), [(packet.clone(), true)]);
        assert_eq!(cut_within(flow.vnet(70, 0), &packet, 90), cut(flow.vnet(70, 0), &packet));
    }
    // Nor what isn't TCP or isn't whole, or has its checksum elsewhere.
    let flow = Flow::tcp4();
    for (at, value) in [(6, 0x20), (9, 47), (3, 44), (0, 0x55)] {
        let mut packet = flow.packet(1, 2, ACK, &[7; 100]);
        packet[at] = value;
        assert_eq!(cut_within(VnetHeader::default(), &packet, 90), [(packet.clone(), false)]);
        assert_eq!(cut_within(flow.partial(), &packet, 90), cut(flow.partial(), &packet));
    }
    let packet = flow.packet(1, 2, ACK, &[7; 100]);
    let elsewhere = VnetHeader { csum_offset: 18, ..flow.partial() };
    assert_eq!(cut_within(elsewhere, &packet, 90), cut(elsewhere, &packet));
    // And not into more than may be.
    let packet = flow.packet(1, 1, ACK, &[7; MAX_SEGMENTS + 1]);
    assert_eq!(cut_within(flow.partial(), &packet, flow.head_len() + 1).len(), 1);
    let many = Segments::within(flow.vnet(500, ACK), &packet, flow.head_len() + 1).map(|_| ());
    assert_eq!(many, Err(SegmentError::TooManySegments));
}

#[test]
fn what_the_virtio_header_says_wrongly() {
    let refused = |vnet| Segments::new(vnet, &SUPER).map(|_| ());
    assert_eq!(refused(VnetHeader { gso_size: 0, ..SUPER_VNET }), Err(SegmentError::ZeroGsoSize));
    for gso_type in [3, GSO_TCPV6, GSO_UDP_L4, GSO_UDP_L4 | GSO_ECN, GSO_ECN, 0x20 | GSO_TCPV4, 0xff] {
        assert_eq!(refused(VnetHeader { gso_type, ..SUPER_VNET }), Err(SegmentError::BadGsoType));
    }
    assert_eq!(refused(VnetHeader { csum_start: 21, ..SUPER_VNET }), Err(SegmentError::BadChecksumStart));
    assert_eq!(refused(VnetHeader { csum_offset: 6, ..SUPER_VNET }), Err(SegmentError::BadChecksumStart));
    let plain = VnetHeader { gso_type: GSO_NONE, ..SUPER_VNET };
    assert_eq!(
        refused(VnetHeader { csum_start: 44, csum_offset: 0, ..plain }),
        Err(SegmentError::BadChecksumStart)
    );
    let far = VnetHeader { csum_start: u16::MAX, csum_offset: u16::MAX, ..plain };
    assert_eq!(refused(far), Err(SegmentError::BadChecksumStart));
    // The length of the headers is ours to find.
    assert_eq!(cut(VnetHeader { hdr_len: 9_999, ..SUPER_VNET }, &SUPER), cut(SUPER_VNET, &SUPER));

    assert_eq!(Segments::new(plain, &[]).map(|_| ()), Err(SegmentError::TooShort));
    let short = Segments::new(SUPER_VNET, &SUPER[..44]).map(|_| ());
    assert_eq!(short, Err(SegmentError::LengthMismatch));
}

#[test]
fn the_number_of_segments_is_bounded() {
    let flow = Flow::tcp4();
    let payload = vec![7; MAX_SEGMENTS + 1];
    let packet = flow.packet(1, 1, ACK, &payload);
    let many = Segments::new(flow.vnet(1, ACK), &packet).map(|_| ());
    assert_eq!(many, Err(SegmentError::TooManySegments));
    let packet = flow.packet(1, 1, ACK, &payload[1..]);
    assert_eq!(cut(flow.vnet(1, ACK), &packet).len(), MAX_SEGMENTS);
}

#[test]
fn a_packet_with_a_full_checksum_stays() {
    for flags in [0, DATA_VALID] {
        let vnet = VnetHeader { flags, ..VnetHeader::default() };
        assert_eq!(cut(vnet, b"no IP at all"), [(b"no IP at all".to_vec(), false)]);
        assert_eq!(cut(vnet, &SUPER), [(SUPER.to_vec(), false)]);
    }
}

#[test]
fn a_partial_checksum_stays_where_the_receiver_finds_it() {
    for flow in [Flow::tcp4(), Flow::tcp6(), Flow::udp4(), Flow { udp: true, ..Flow::tcp6() }] {
        let packet = flow.packet(1, 2, ACK, b"odd");
        assert_eq!(cut(flow.partial(), &packet), [(packet.clone(), true)]);
        // Cut without a partial checksum, a super-packet gets the right sums all the same.
        let mut full = packet.clone();
        checksum::complete(&mut full, flow.transport_at(), flow.checksum_offset());
        let vnet = VnetHeader { flags: DATA_VALID, ..flow.vnet(3, ACK) };
        assert_eq!(cut(vnet, &full), [(packet, true)]);
    }
}

#[test]
fn a_partial_checksum_elsewhere_is_completed() {
    // A fragment, another protocol, and a length that the receiver would not take.
    for (at, value) in [(6, 0x20), (9, 47), (3, 44)] {
        let flow = Flow::tcp4();
        let mut packet = flow.packet(1, 2, ACK, b"odd");
        packet[at] = value;
        let mut expected = packet.clone();
        let sum = !naive_sum(&packet[20..]);
        expected[36..38].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(cut(flow.partial(), &packet), [(expected, false)]);
    }
}

#[test]
fn a_buffer_that_is_too_short_loses_nothing() {
    for vnet in [SUPER_VNET, VnetHeader { gso_type: GSO_NONE, ..SUPER_VNET }, VnetHeader::default()] {
        let mut segments = Segments::new(vnet, &SUPER).expect("a packet");
        let (count, len) = (segments.count(), segments.max_len());
        let mut out = vec![0; len];
        assert_eq!(segments.next_into(&mut out[..len - 1]), None);
        assert_eq!(segments.count(), count);
        assert_eq!(segments.next_into(&mut out).map(|segment| segment.len), Some(len));
    }
}

#[test]
fn pieces_in_bytes() {
    let collect = |vnet, max_len| {
        let mut all = vec![];
        pieces(vnet, &SUPER, max_len, |vnet, head, payload| all.push((vnet, [head, payload].concat()))).map(
            |count| {
                assert_eq!(count, all.len());
                all
            },
        )
    };
    assert_eq!(collect(SUPER_VNET, 45), Ok(vec![(SUPER_VNET, SUPER.to_vec())]));
    let all = collect(SUPER_VNET, 44).expect("pieces");
    assert_eq!(all.len(), 2);
    assert_eq!((all[0].0, all[0].1.len()), (SUPER_VNET, 44));
    let single = VnetHeader { gso_type: GSO_NONE, gso_size: 0, hdr_len: 0, ..SUPER_VNET };
    assert_eq!(all[1], (single, SUPER_SEGMENTS[2].to_vec()));
    assert_eq!(collect(SUPER_VNET, 43).map(|all| all.len()), Ok(3));
    assert_eq!(collect(SUPER_VNET, 42).map(|all| all.len()), Ok(3));
    assert_eq!(collect(SUPER_VNET, 41), Err(SegmentError::TooLong));
    assert_eq!(collect(single, 44), Err(SegmentError::TooLong));
}

// ------------------------------------------------------------------------------------------ what merges

/// How many of two packets merge: 2, or 1 for each reason not to.
fn merged(first: Vec<u8>, second: Vec<u8>, uso: bool) -> usize {
    let packets = [first, second];
    next_run(&partial(&packets), uso).expect("packets that parse").count
}

#[test]
fn merges_only_what_continues_the_flow() {
    type Change = fn(&mut Flow);
    let changes: [Change; 9] = [
        |flow| flow.source += 1,
        |flow| flow.port += 1,
        |flow| flow.tos ^= 1,
        |flow| flow.ttl -= 1,
        |flow| flow.dont_fragment ^= !flow.v6,
        |flow| flow.ack += 1,
        |flow| flow.window += 1,
        |flow| flow.tcp_options[7] += 1,
        |flow| flow.ip_options = if flow.v6 { vec![] } else { vec![1; 4] },
    ];
    for flow in [Flow::tcp4(), Flow::tcp6()] {
        let first = flow.packet(100, 5, ACK, b"abcd");
        let second = flow.packet(104, 6, ACK, b"efgh");
        assert_eq!(merged(first.clone(), second.clone(), false), 2);
        for (i, change) in changes.iter().enumerate() {
            let mut other = flow.clone();
            change(&mut other);
            let other = other.packet(104, 6, ACK, b"efgh");
            assert_eq!(
                merged(first.clone(), other.clone(), false),
                if other == second { 2 } else { 1 },
                "{i}"
            );
        }

        let of_second = |seq, id, flags, payload: &[u8]| {
            merged(first.clone(), flow.packet(seq, id, flags, payload), false)
        };
        assert_eq!(of_second(104, 6, ACK, b"e"), 2, "shorter");
        assert_eq!(of_second(104, 6, ACK, b"efghi"), 1, "longer");
        assert_eq!(of_second(104, 6, ACK, b""), 1, "empty");
        assert_eq!(of_second(103, 6, ACK, b"efgh"), 1, "sequence");
        assert_eq!(of_second(104, 7, ACK, b"efgh"), if flow.v6 { 2 } else { 1 }, "ID");
        for flags in [PSH, FIN, PSH | FIN] {
            assert_eq!(of_second(104, 6, ACK | flags, b"efgh"), 2, "{flags:#x} on the last");
            assert_eq!(merged(flow.packet(100, 5, ACK | flags, b"abcd"), second.clone(), false), 1);
        }
        for flags in [SYN, RST, URG] {
            assert_eq!(of_second(104, 6, ACK | flags, b"efgh"), 1);
            let third = flow.packet(104, 6, ACK | flags, b"efgh");
            assert_eq!(merged(flow.packet(100, 5, ACK | flags, b"abcd"), third, false), 1);
        }
        assert_eq!(of_second(104, 6, ACK | CWR, b"efgh"), 1, "CWR on the second");
        assert_eq!(of_second(104, 6, ACK | ECE, b"efgh"), 1, "ECE on the second only");
        assert_eq!(merged(flow.packet(100, 5, ACK | CWR, b"abcd"), second.clone(), false), 2);

        // What is wrong is its sender's, and stays wrong.
        for at in [flow.transport_at() + 16, if flow.v6 { 5 } else { 10 }] {
            let mut wrong = second.clone();
            wrong[at] ^= 1;
            assert_eq!(merged(first.clone(), wrong, false), 1);
        }
        for at in [flow.transport_at() + 17, if flow.v6 { 39 } else { 11 }] {
            let mut wrong = first.clone();
            wrong[at] ^= 1;
            assert_eq!(merged(wrong, second.clone(), false), 1);
        }
        let mut wrong = second.clone();
        wrong[if flow.v6 { 4 } else { 2 }] ^= 1;
        assert_eq!(merged(first.clone(), wrong, false), 1, "IP length");
    }
}

#[test]
fn a_short_packet_or_push_ends_the_run() {
    let flow = Flow::tcp4();
    let short = [
        flow.packet(0, 1, ACK, b"abcd"),
        flow.packet(4, 2, ACK, b"ef"),
        flow.packet(6, 3, ACK, b"gh"),
        flow.packet(8, 4, ACK | PSH, b"ij"),
        flow.packet(10, 5, ACK, b"kl"),
    ];
    let inners = partial(&short);
    let counts = [0, 2, 4].map(|from| next_run(&inners[from..], false).expect("a run").count);
    assert_eq!(counts, [2, 2, 1]);
}

#[test]
fn udp_merges_only_with_uso() {
    for flow in [Flow::udp4(), Flow { udp: true, ..Flow::tcp6() }] {
        let first = flow.packet(0, 1, 0, b"abcd");
        let second = flow.packet(0, 2, 0, b"ef");
        assert_eq!(merged(first.clone(), second.clone(), true), 2);
        assert_eq!(merged(first.clone(), second.clone(), false), 1);
        let other = Flow { port: 1, ..flow.clone() }.packet(0, 2, 0, b"ef");
        assert_eq!(merged(first.clone(), other, true), 1);
        let mut wrong = second.clone();
        wrong[flow.transport_at() + 5] -= 1;
        assert_eq!(merged(first.clone(), wrong, true), 1, "UDP length");
    }
    let (udp, tcp) = (Flow::udp4().packet(0, 1, 0, b"abcd"), Flow::tcp4().packet(0, 2, ACK, b"abcd"));
    assert_eq!(merged(udp, tcp, true), 1);
}

#[test]
fn only_partial_checksums_merge() {
    let flow = Flow::tcp4();
    let packets = [flow.packet(0, 1, ACK, b"ab"), flow.packet(2, 2, ACK, b"cd")];
    for marks in [[false, true], [true, false], [false, false]] {
        let inners = [0, 1].map(|i| Inner { packet: &packets[i], partial_csum: marks[i] });
        let run = next_run(&inners, true).expect("a run");
        let vnet = if marks[0] { flow.partial() } else { VnetHeader::default() };
        assert_eq!((run.count, run.vnet, run.head(), run.payload_offset()), (1, vnet, &[][..], 0));
    }
}

#[test]
fn unparsable_packets_are_errors_only_where_a_checksum_is_to_be_found() {
    let junk = Inner { packet: b"?junk", partial_csum: false };
    assert_eq!(next_run(&[junk, junk], true).map(|run| run.count), Ok(1));
    let junk = Inner { packet: b"?junk", partial_csum: true };
    assert_eq!(next_run(&[junk], true).map(|run| run.count), Err(SegmentError::NotIp));
    assert_eq!(next_run(&[], true).map(|run| run.count), Err(SegmentError::Empty));
    let packet = Flow::tcp4().packet(0, 1, ACK, b"ab");
    let good = Inner { packet: &packet, partial_csum: true };
    assert_eq!(next_run(&[good, junk], true).map(|run| run.count), Ok(1));
    let longer = [&packet[..], &[0]].concat();
    let longer = Inner { packet: &longer, partial_csum: true };
    assert_eq!(next_run(&[longer], true).map(|run| run.count), Err(SegmentError::LengthMismatch));
}

#[test]
fn runs_are_bounded_in_packets_and_bytes() {
    let run_of = |flow: &Flow, len: usize, count: u16| {
        let payload = vec![1; len];
        let packet = |i| flow.packet(u32::from(i) * len as u32, i, ACK, &payload);
        let packets: Vec<_> = (0..count).map(packet).collect();
        let inners = partial(&packets);
        let run = next_run(&inners, true).expect("a run");
        (run.count, gather(&run, &inners).len())
    };
    assert_eq!(run_of(&Flow::tcp4(), 1, 200), (MAX_RUN, 52 + 128));
    assert_eq!(run_of(&Flow::udp4(), 1, 200), (64, 28 + 64));
    let flow = Flow::tcp6();
    assert_eq!(run_of(&flow, 1, 200), (MAX_RUN, 72 + 128));
    assert_eq!(run_of(&flow, 1_368, 60), (47, 72 + 47 * 1_368));
    // Exactly 65,535 bytes.
    assert_eq!(run_of(&flow, (65_535 - 72) / 3, 4), (3, 65_535));
    assert_eq!(run_of(&flow, (65_535 - 72) / 3 + 1, 4).0, 2);
}

#[test]
fn extension_headers_keep_a_packet_alone() {
    let packets = [(0, b"abcd"), (4, b"efgh")].map(|(seq, payload)| {
        let mut packet = Flow::tcp6().packet(seq, 0, ACK, payload);
        packet.splice(40..40, [6, 0, 1, 4, 0, 0, 0, 0]);
        packet[6] = 60;
        packet[5] += 8;
        packet
    });
    let run = next_run(&partial(&packets), true).expect("a run");
    let packet = &packets[0];
    assert_eq!((run.count, run.vnet.csum_start, run.vnet.csum_offset), (1, 48, 16));
    // And a super-packet with them is cut behind them.
    let vnet = VnetHeader { gso_type: GSO_TCPV6, gso_size: 3, ..run.vnet };
    let segments = cut(vnet, packet);
    assert_eq!(segments.len(), 2);
    assert_eq!(segments[1].0[..8], [0x60, 0x2a, 0xbc, 0xde, 0, 41, 60, 64]);
    assert_eq!(segments[1].0[80..], *b"d");
}

// ------------------------------------------------------------------------------------------ properties

fn flows() -> impl Strategy<Value = Flow> {
    let ip = (any::<bool>(), any::<bool>(), 1u8..4, 1u16..3, any::<u8>(), 1u8.., any::<bool>());
    let options = (vec(any::<u8>(), 0..=40), vec(any::<u8>(), 0..=40), any::<u32>(), any::<u16>());
    (ip, options).prop_map(|((v6, udp, source, port, tos, ttl, dont_fragment), (ip, tcp, ack, window))| {
        Flow {
            v6,
            udp,
            source,
            port,
            tos,
            ttl,
            dont_fragment,
            ip_options: if v6 { vec![] } else { ip[..ip.len() / 4 * 4].to_vec() },
            tcp_options: tcp[..tcp.len() / 4 * 4].to_vec(),
            ack,
            window,
        }
    })
}

fn flags() -> impl Strategy<Value = u8> {
    (any::<[bool; 4]>()).prop_map(|[fin, psh, ece, cwr]| {
        let flag = |on, flag| if on { flag } else { 0 };
        ACK | flag(fin, FIN) | flag(psh, PSH) | flag(ece, ECE) | flag(cwr, CWR)
    })
}

/// A flow, and a super-packet of it.
#[derive(Clone, Debug)]
struct Burst {
    flow: Flow,
    seq: u32,
    id: u16,
    flags: u8,
    gso_size: usize,
    payload: Vec<u8>,
}

impl Burst {
    fn packet(&self) -> Vec<u8> {
        self.flow.packet(self.seq, self.id, self.flags, &self.payload)
    }

    fn segments(&self) -> Vec<Vec<u8>> {
        self.flow.segments(self.seq, self.id, self.flags, &self.payload, self.gso_size)
    }

    fn vnet(&self) -> VnetHeader {
        self.flow.vnet(self.gso_size, self.flags)
    }
}

fn bursts(max_size: usize, max_segments: usize) -> impl Strategy<Value = Burst> {
    let shape = (1..=max_size, 2..=max_segments, any::<prop::sample::Index>(), any::<u64>());
    (flows(), any::<u32>(), any::<u16>(), flags(), shape).prop_map(
        |(flow, seq, id, flags, (gso_size, segments, last, seed))| {
            let last = 1 + last.index(gso_size);
            let room = 65_535 - flow.head_len();
            let len = ((segments - 1) * gso_size + last).min(room);
            let mut state = seed | 1;
            let payload = (0..len).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            });
            Burst { payload: payload.collect(), flow, seq, id, flags, gso_size }
        },
    )
}

/// Merges everything, and checks on the way that each run gives back what went into it.
fn merge_and_cut_again(inners: &[Inner<'_>], uso: bool) -> Result<usize, TestCaseError> {
    let (mut at, mut runs) = (0, 0);
    while at < inners.len() {
        runs += 1;
        let rest = &inners[at..];
        let Ok(run) = next_run(rest, uso) else {
            prop_assert!(rest[0].partial_csum && inner::parse(rest[0].packet).is_err());
            at += 1;
            continue;
        };
        prop_assert!(run.count >= 1 && run.count <= rest.len() && run.count <= MAX_RUN);
        let whole = gather(&run, rest);
        prop_assert!(run.count == 1 || whole.len() <= 65_535);
        let expected: Vec<_> =
            rest[..run.count].iter().map(|inner| (inner.packet.to_vec(), inner.partial_csum)).collect();
        prop_assert_eq!(run.count == 1, run.vnet.gso_type == GSO_NONE);
        if rest[0].partial_csum || !whole.is_empty() {
            prop_assert_eq!(cut(run.vnet, &whole), expected);
        }
        at += run.count;
    }
    Ok(runs)
}

proptest! {
    #[test]
    fn cutting_is_exact_and_merging_its_inverse(burst in bursts(1500, 64)) {
        let packet = burst.packet();
        let segments = cut(burst.vnet(), &packet);
        let expected = burst.segments();
        prop_assert!(segments.iter().all(|(_, partial_csum)| *partial_csum));
        prop_assert!(segments.iter().map(|(bytes, _)| bytes).eq(&expected));
        for (mut bytes, _) in segments {
            checksum::complete(&mut bytes, burst.flow.transport_at(), burst.flow.checksum_offset());
            prop_assert!(verifies(&bytes));
        }

        let inners = partial(&expected);
        let run = next_run(&inners, true).expect("a run");
        prop_assert_eq!(run.count, expected.len());
        prop_assert_eq!(run.vnet, burst.vnet());
        prop_assert_eq!(gather(&run, &inners), packet);
    }

    /// A path narrower than the device: TCP is cut to fit, with the same stream in it; UDP keeps its datagrams.
    #[test]
    fn a_narrow_path_carries_the_same_stream(burst in bursts(3_000, 4), mtu in 220usize..3_000, full in any::<bool>()) {
        let flow = &burst.flow;
        let room = mtu - flow.head_len();
        let packet = burst.packet();
        let gso_size = if flow.udp { burst.gso_size } else { burst.gso_size.min(room) };
        let segments = cut_within(burst.vnet(), &packet, mtu);
        let expected = flow.segments(burst.seq, burst.id, burst.flags, &burst.payload, gso_size);
        prop_assert!(segments.iter().all(|(bytes, partial_csum)| *partial_csum && (flow.udp || bytes.len() <= mtu)));
        prop_assert!(segments.iter().map(|(bytes, _)| bytes).eq(&expected));

        // The same as one plain packet, its checksum left partial or not.
        let mut plain = packet.clone();
        let mut vnet = flow.partial();
        if full {
            checksum::complete(&mut plain, flow.transport_at(), flow.checksum_offset());
            vnet = VnetHeader::default();
        }
        let segments = cut_within(vnet, &plain, mtu);
        if flow.udp || plain.len() <= mtu {
            prop_assert_eq!(segments, [(plain, !full)]);
        } else {
            let expected = flow.segments(burst.seq, burst.id, burst.flags, &burst.payload, room);
            prop_assert!(segments.iter().all(|(bytes, partial_csum)| *partial_csum && bytes.len() <= mtu));
            prop_assert!(segments.iter().map(|(bytes, _)| bytes).eq(&expected));
            for (mut bytes, _) in segments {
                checksum::complete(&mut bytes, flow.transport_at(), flow.checksum_offset());
                prop_assert!(verifies(&bytes));
            }
            let inners = partial(&expected);
            let run = next_run(&inners, true).expect("a run");
            prop_assert_eq!(gather(&run, &inners), packet);
        }
    }

    #[test]
    fn pieces_stand_for_the_same_segments(burst in bursts(1500, 40), max_len in 40usize..65_000) {
        let packet = burst.packet();
        let mut segments = vec![];
        let result = pieces(burst.vnet(), &packet, max_len, |vnet, head, payload| {
            let piece = [head, payload].concat();
            assert!(piece.len() <= max_len);
            // What the queue's other end passes to the device must be valid there, too.
            assert!(vnet.needs_csum() && piece.len() >= burst.flow.head_len());
            let single = piece.len() - burst.flow.head_len() <= burst.gso_size;
            let cwr = !burst.flow.udp && piece[burst.flow.transport_at() + 13] & CWR != 0;
            assert_eq!(vnet.gso_type == GSO_NONE, single);
            assert_eq!(vnet.gso_type & GSO_ECN != 0, cwr && !single);
            segments.extend(cut(vnet, &piece));
        });
        if max_len < burst.flow.head_len() + burst.gso_size && max_len < packet.len() {
            prop_assert_eq!(result, Err(SegmentError::TooLong));
            prop_assert!(segments.is_empty());
        } else {
            prop_assert!(result.is_ok());
            prop_assert_eq!(segments, cut(burst.vnet(), &packet));
        }
    }

    /// Flows that differ in one thing or nothing, packets swapped, changed and lost.
    #[test]
    fn merging_mixed_flows_never_changes_a_packet(
        mut bursts in vec(bursts(40, 12), 1..5),
        same in any::<bool>(),
        damage in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>(), 0u8..8), 0..8),
        uso in any::<bool>(),
    ) {
        if same {
            // One flow in consecutive bursts, which may merge across their borders.
            let first = bursts[0].clone();
            let (mut seq, mut id) = (first.seq, first.id);
            for burst in &mut bursts {
                (burst.flow, burst.gso_size, burst.seq, burst.id) = (first.flow.clone(), first.gso_size, seq, id);
                seq = seq.wrapping_add(burst.payload.len() as u32);
                id = id.wrapping_add(burst.segments().len() as u16);
            }
        }
        let mut packets: Vec<_> =
            bursts.iter().flat_map(Burst::segments).map(|packet| (packet, true)).collect();
        for (which, place, value, kind) in damage {
            let i = which.index(packets.len());
            let j = place.index(packets.len());
            if packets[i].0.is_empty() {
                continue;
            }
            match kind {
                0 => packets.swap(i, j),
                1 if packets.len() > 1 => drop(packets.remove(i)),
                2 => packets[i].1 = false,
                3 => packets[i].0.push(value),
                4 => {
                    // Damage where it hurts: in the headers.
                    let at = place.index(packets[i].0.len().min(80));
                    packets[i].0[at] ^= value;
                }
                5 => {
                    let at = place.index(packets[i].0.len());
                    packets[i].0.truncate(at);
                }
                6 => packets[i] = packets[j].clone(),
                _ => {
                    let at = place.index(packets[i].0.len());
                    packets[i].0[at] = value;
                }
            }
        }
        let inners: Vec<_> =
            packets.iter().map(|(packet, partial_csum)| Inner { packet, partial_csum: *partial_csum }).collect();
        merge_and_cut_again(&inners, uso)?;
    }

    #[test]
    fn nothing_panics(
        mut packet in vec(any::<u8>(), 0..200),
        other in vec(any::<u8>(), 0..200),
        vnet in (any::<u8>(), any::<u8>(), any::<[u16; 4]>()),
        plausible in any::<[bool; 6]>(),
        max_len in 0usize..300,
    ) {
        let (mut flags, mut gso_type, [hdr_len, mut gso_size, mut csum_start, mut csum_offset]) = vnet;
        // Make each check pass in half of the cases, so that the code behind it is reached.
        if plausible[0] && packet.len() > 40 {
            let len = packet.len() as u16;
            if plausible[1] {
                packet[0] = 0x45 + packet[0] % 3;
                packet[2..4].copy_from_slice(&len.to_be_bytes());
                packet[6..8].copy_from_slice(&[0x40, 0]);
                packet[9] = if plausible[2] { 6 } else { 17 };
            } else {
                packet[0] = 0x60;
                packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
                packet[6] = if plausible[2] { 6 } else { [17, 0, 43, 60][usize::from(packet[7] % 4)] };
            }
        }
        if plausible[3] {
            (flags, gso_size) = (flags & 1, gso_size % 32);
            gso_type = [GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4][usize::from(gso_type % 4)];
        }
        if plausible[4] {
            csum_start %= 64;
            csum_offset = if plausible[5] { 6 } else { 16 };
        }
        let vnet = VnetHeader { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset };

        if let Ok(mut segments) = Segments::new(vnet, &packet) {
            prop_assert!(segments.count() <= MAX_SEGMENTS);
            let mut out = vec![0; segments.max_len()];
            let count = segments.count();
            prop_assert_eq!(std::iter::from_fn(|| segments.next_into(&mut out)).count(), count);
        }
        if let Ok(mut segments) = Segments::within(vnet, &packet, max_len) {
            let mut out = vec![0; segments.max_len()];
            let count = segments.count();
            prop_assert!(count <= MAX_SEGMENTS);
            prop_assert_eq!(std::iter::from_fn(|| segments.next_into(&mut out)).count(), count);
        }
        let mut longest = 0;
        let _ = pieces(vnet, &packet, max_len, |_, head, payload| longest = longest.max(head.len() + payload.len()));
        prop_assert!(longest <= max_len);
        let _ = addresses(&packet);
        for outer in 0..4 {
            let _ = ecn::decapsulate(outer, &mut packet.clone());
        }
        let inners = [&packet, &other, &packet].map(|packet| Inner { packet, partial_csum: plausible[5] });
        merge_and_cut_again(&inners, plausible[4])?;
    }
}
