//! The message of a queue: written by the guard, read by a worker.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use tunguard::batch::{BatchReader, BatchWriter};
use tunguard::wire::vnet::VnetHeader;

use crate::packets::{Flow, RUN, Rng};

pub fn benches(criterion: &mut Criterion) {
    let flow = Flow::TCP_V4;
    let vnet = flow.partial();
    let packets = flow.segments(&Rng::new().bytes(RUN * flow.payload_len()));
    let mut batch = BatchWriter::new(QUEUE_BYTES);
    write(&mut batch, &vnet, &packets);
    let back = BatchReader::new(batch.message()).map(|record| record.expect("a record"));
    assert!(back.eq(packets.iter().map(|packet| (vnet, &packet[..]))));
    assert_eq!(packets.len(), RUN);

    let mut group = criterion.benchmark_group("batch");
    group.throughput(Throughput::Bytes(packets.iter().map(|packet| packet.len() as u64).sum()));
    group.bench_function("push", |b| {
        b.iter(|| {
            write(&mut batch, &vnet, black_box(&packets));
            black_box(batch.message());
        });
    });
    // Without the bytes of the packets: a worker gets at them in the message itself.
    group.throughput(Throughput::Elements(RUN as u64));
    group.bench_function("read", |b| {
        b.iter(|| BatchReader::new(black_box(batch.message())).map(black_box).filter(Result::is_ok).count());
    });
    group.finish();
}

fn write(batch: &mut BatchWriter, vnet: &VnetHeader, packets: &[Vec<u8>]) {
    batch.clear();
    for packet in packets {
        assert!(batch.push(vnet, &[], packet));
    }
}

/// The guard's size of queue messages (guard/src/host.rs).
const QUEUE_BYTES: usize = 67_000;
