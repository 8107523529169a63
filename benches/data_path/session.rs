//! What a session adds to the suite: epochs, window, counters, the peer's path.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use tunguard::config::common::Suite;
use tunguard::epochs::Limits;
use tunguard::keys::{Role, Secret};
use tunguard::path::Path;
use tunguard::session::{Opened, Session, Start};
use tunguard::time::Time;
use tunguard::wire::data::{PARTIAL_CSUM, SessionId};

use crate::packets::{FRESH_RUN, Flow, PACKET_LEN, Rng, datagram};

pub fn benches(criterion: &mut Criterion) {
    let flow = Flow::TCP_V4;
    let packet = flow.segments(&Rng::new().bytes(flow.payload_len())).concat();
    let plain = datagram(&packet);
    let now = Time::default() + Duration::from_secs(1);
    let (mut client, mut server) = (session(Role::Client, now), session(Role::Server, now));
    let seal = |client: &mut Session, datagram: &mut [u8]| {
        client.seal(now, PARTIAL_CSUM, datagram).expect("seals");
    };
    let from = Path::new(CLIENT.parse().expect("an address"), None);
    let open = |server: &mut Session, datagram: &mut [u8]| server.open(now, from, datagram).expect("opens");

    let mut sealed = plain.clone();
    seal(&mut client, &mut sealed);
    let Opened::Packet { text, partial_csum: true } = open(&mut server, &mut sealed) else {
        panic!("another kind of datagram came out");
    };
    assert_eq!(sealed[text], packet);
    assert_eq!(client.traffic().sent_bytes, PACKET_LEN as u64);

    let mut group = criterion.benchmark_group("session");
    group.throughput(Throughput::Bytes(PACKET_LEN as u64));
    group.bench_function(BenchmarkId::new("seal/aes-256-gcm", PACKET_LEN), |b| {
        b.iter_batched_ref(|| plain.clone(), |datagram| seal(&mut client, datagram), FRESH_RUN);
    });
    group.bench_function(BenchmarkId::new("open/aes-256-gcm", PACKET_LEN), |b| {
        // The window refuses a counter it has seen, so each datagram is sealed anew, outside of the measured time.
        let fresh = || {
            let mut datagram = plain.clone();
            seal(&mut client, &mut datagram);
            datagram
        };
        b.iter_batched_ref(fresh, |datagram| open(&mut server, datagram), FRESH_RUN);
    });
    group.finish();
}

fn session(role: Role, now: Time) -> Session {
    let start = Start {
        role,
        id: SessionId::new(3, [9; 6]),
        suite: Suite::Aes256Gcm,
        secret: Secret::from_bytes([7; 32]),
        // Never reached, or sealing would fail in the middle of a bench.
        limits: Limits { age: Duration::from_secs(3600), packets: 1 << 46 },
        inner: vec!["10.9.0.2/32".parse().expect("a network")],
        linger: Duration::from_secs(600),
        vouched: None,
        dialled: (role == Role::Client).then(|| Path::new(SERVER.parse().expect("an address"), None)),
    };
    Session::new(start, now).expect("a session")
}

const CLIENT: &str = "192.0.2.1:4000";
const SERVER: &str = "198.51.100.1:55555";
