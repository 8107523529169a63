//! Merging what one receive brought, for the device.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use tunguard::segment::{Inner, next_run};

use crate::packets::{Flow, RUN, Rng};

pub fn benches(criterion: &mut Criterion) {
    let flow = Flow::TCP_V4;
    let payload = Rng::new().bytes(RUN * flow.payload_len());
    let one_flow = flow.segments(&payload);
    let other_flows: Vec<Vec<u8>> =
        (0..RUN).map(|i| flow.neighbour(i).segments(&payload[..flow.payload_len()]).concat()).collect();

    let one_flow = partial(&one_flow);
    let run = next_run(&one_flow, true).expect("a run");
    let (vnet, whole) = flow.super_packet(&payload);
    assert_eq!((run.count, run.vnet, run.head()), (RUN, vnet, &whole[..run.payload_offset()]));
    assert_eq!(merge(&one_flow), 1);
    // They differ in a port only, so that nearly everything is compared in vain.
    let other_flows = partial(&other_flows);
    assert_eq!(merge(&other_flows), RUN);

    let mut group = criterion.benchmark_group("coalesce");
    group.throughput(Throughput::Elements(RUN as u64));
    group.bench_function("one_flow", |b| b.iter(|| merge(black_box(&one_flow))));
    group.bench_function("a_flow_each", |b| b.iter(|| merge(black_box(&other_flows))));
    group.finish();
}

/// As src/ingress.rs does it, without writing. Returns the number of writes.
fn merge(inners: &[Inner<'_>]) -> usize {
    let (mut rest, mut writes) = (inners, 0);
    while !rest.is_empty() {
        let run = next_run(rest, true).expect("a run");
        rest = &rest[run.count..];
        writes += 1;
        black_box(run);
    }
    writes
}

fn partial(packets: &[Vec<u8>]) -> Vec<Inner<'_>> {
    packets.iter().map(|packet| Inner { packet, partial_csum: true }).collect()
}
