//! The suites, each as such.

use criterion::{BenchmarkId, Criterion, Throughput};
use tunguard::config::common::Suite;
use tunguard::keys::{Role, Secret};
use tunguard::seal::Cryptor;
use tunguard::wire::data::{Header, SessionId};

use crate::packets::{FRESH_RUN, PACKET_LEN, Rng, datagram};

pub fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("seal");
    for (suite, len) in CASES {
        let (plain, _) = texts(suite, len);
        let (mut cryptor, mut header) = (cryptor(suite), HEADER);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new(suite.name(), len), |b| {
            let seal = |datagram: &mut Vec<u8>| {
                header.counter += 1;
                cryptor.seal(&header, datagram).expect("seals");
            };
            b.iter_batched_ref(|| plain.clone(), seal, FRESH_RUN);
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("open");
    for (suite, len) in CASES {
        let (_, sealed) = texts(suite, len);
        let mut cryptor = cryptor(suite);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new(suite.name(), len), |b| {
            // Opened in place, so each only once; always the same counter, as no window is in the way here.
            let open = |datagram: &mut Vec<u8>| cryptor.open(&HEADER, datagram).expect("opens");
            b.iter_batched_ref(|| sealed.clone(), open, FRESH_RUN);
        });
    }
    group.finish();
}

/// A text of `len` bytes before and after sealing; opening gives it back.
fn texts(suite: Suite, len: usize) -> (Vec<u8>, Vec<u8>) {
    let text = Rng::new().bytes(len);
    let plain = datagram(&text);
    let mut sealed = plain.clone();
    cryptor(suite).seal(&HEADER, &mut sealed).expect("seals");
    let mut opened = sealed.clone();
    let range = cryptor(suite).open(&HEADER, &mut opened).expect("opens");
    assert_ne!(sealed[range.clone()], text);
    assert_eq!(opened[range], text, "{suite}");
    (plain, sealed)
}

fn cryptor(suite: Suite) -> Cryptor {
    let keys = Secret::from_bytes([7; 32]).direction(suite, Role::Client);
    Cryptor::new(suite, &keys).expect("a cipher")
}

const HEADER: Header =
    Header { session: SessionId([0, 3, 9, 9, 9, 9, 9, 9]), epoch: 0, flags: 0, counter: 1000 };

const CASES: [(Suite, usize); 6] = [
    (Suite::Aes256Gcm, 100),
    (Suite::Aes256Gcm, PACKET_LEN),
    (Suite::ChaCha20Poly1305, 100),
    (Suite::ChaCha20Poly1305, PACKET_LEN),
    (Suite::Aes256CtrHmacSha256, 100),
    (Suite::Aes256CtrHmacSha256, PACKET_LEN),
];
