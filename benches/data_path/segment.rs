//! Cutting what one read of the device brings.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use tunguard::segment::Segments;
use tunguard::wire::data::{HEADER_LEN, OVERHEAD, TAG_LEN};
use tunguard::wire::vnet::VnetHeader;

use crate::packets::{Flow, PACKET_LEN, Rng};

pub fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("segment");
    for (name, flow) in [("tcp_v4", Flow::TCP_V4), ("tcp_v6", Flow::TCP_V6), ("udp_v4", Flow::UDP_V4)] {
        // Whole segments only, as a TCP that has more to send makes them.
        let count = (usize::from(u16::MAX) - HEADERS) / flow.payload_len();
        let payload = Rng::new().bytes(count * flow.payload_len());
        let (vnet, packet) = flow.super_packet(&payload);
        let mut run = vec![0; count * (PACKET_LEN + OVERHEAD)];
        assert_eq!(cut(vnet, &packet, &mut run), run.len());
        let texts = run.chunks(PACKET_LEN + OVERHEAD).map(|datagram| &datagram[HEADER_LEN..][..PACKET_LEN]);
        assert!(texts.eq(flow.segments(&payload)), "{name}");

        group.throughput(Throughput::Bytes(packet.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| cut(black_box(vnet), black_box(&packet), black_box(&mut run)));
        });
    }
    group.finish();
}

/// As src/egress.rs does it, without sealing: each segment behind room for a header. Returns the bytes taken.
fn cut(vnet: VnetHeader, packet: &[u8], run: &mut [u8]) -> usize {
    let mut segments = Segments::new(vnet, packet).expect("a super-packet");
    let mut len = 0;
    while let Some(segment) = run.get_mut(len + HEADER_LEN..).and_then(|room| segments.next_into(room)) {
        len += HEADER_LEN + segment.len + TAG_LEN;
    }
    len
}

/// The longest ones here: IPv6, TCP, timestamps.
const HEADERS: usize = 72;
