//! Which session an inner address belongs to, as the guard finds it for every packet: `make bench-micro`.

// The guard is a program and no library, so its file is taken in as it is.
#[path = "../src/routes.rs"]
#[allow(unused, reason = "a bench needs neither everything in it nor its tests")]
mod routes;

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};
use ipnet::IpNet;

use routes::Routes;

fn main() {
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    lookups(&mut criterion);
    criterion.final_summary();
}

fn lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("routes");
    for (name, route) in
        [("host", host as fn(u64) -> IpNet), ("subnet_v4", subnet_v4), ("subnet_v6", subnet_v6)]
    {
        for count in COUNTS {
            // Every client has a host route, so what is behind one is looked for among those in vain first.
            let mut routes = Routes::default();
            for worker in 0..count {
                routes.insert(host(worker), worker);
                routes.insert(route(worker), worker);
            }
            // Every route in turn, so never the same address twice in a row: that one is remembered.
            let mut order: Vec<u64> = (0..count).collect();
            order.sort_by_key(|worker| scattered(*worker));
            let addresses: Vec<IpAddr> = order.iter().map(|worker| inside(route(*worker))).collect();
            for (address, worker) in addresses.iter().zip(order) {
                assert_eq!(routes.lookup(*address), Some(worker));
            }

            let mut next = addresses.iter().cycle();
            group.bench_function(BenchmarkId::new(name, count), |b| {
                b.iter(|| next.next().and_then(|address| routes.lookup(*black_box(address))));
            });
        }
    }

    let mut routes = Routes::default();
    routes.insert(host(1), 1);
    let address = host(1).addr();
    assert_eq!(routes.lookup(address), Some(1));
    group.bench_function("same_again", |b| b.iter(|| routes.lookup(black_box(address))));
    group.finish();
}

/// An address of the tunnel's network, one after the other as leases are.
fn host(worker: u64) -> IpNet {
    IpAddr::V4(Ipv4Addr::from_bits(0x6440_0000 + 2 + worker as u32)).into()
}

/// Some /24 of 10.0.0.0/8; no two are the same, as the factor is odd.
fn subnet_v4(worker: u64) -> IpNet {
    let bits = 0x0a00_0000 | u32::from((worker as u16).wrapping_mul(40_503)) << 8;
    IpNet::new(Ipv4Addr::from_bits(bits).into(), 24).expect("a length")
}

/// Some /48 of fd00::/8: RFC 4193 wants 40 random bits.
fn subnet_v6(worker: u64) -> IpNet {
    let global = u128::from(scattered(worker) >> 24);
    IpNet::new(Ipv6Addr::from_bits(0xfd << 120 | global << 80).into(), 48).expect("a length")
}

/// A random number that is the same in every run.
fn scattered(value: u64) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(value)
}

/// The last address but one of `net`.
fn inside(net: IpNet) -> IpAddr {
    match net {
        net if net.prefix_len() == net.max_prefix_len() => net.addr(),
        IpNet::V4(net) => Ipv4Addr::from_bits(net.broadcast().to_bits() - 1).into(),
        IpNet::V6(net) => Ipv6Addr::from_bits(net.broadcast().to_bits() - 1).into(),
    }
}

const COUNTS: [u64; 3] = [10, 1_000, 65_000];
