//! A client behind a NAT that forgets, in virtual time: what it sends to be reachable, and that it is.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use tunguard::config::common::Suite;
use tunguard::epochs::Limits;
use tunguard::keys::{Role, Secret};
use tunguard::path::Path;
use tunguard::paths::Keepalive;
use tunguard::paths::PathEvent;
use tunguard::session::{Event, IN_BAND_LEN, Opened, Session, Start};
use tunguard::time::Time;
use tunguard::wire::data::{HEADER_LEN, SessionId, TAG_LEN};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
const DELAY: Duration = Duration::from_millis(20);
const INSIDE: &str = "192.168.1.7";

/// What is between client and server.
#[derive(Clone, Copy, Debug)]
struct Nat {
    /// Silence after which a mapping is forgotten.
    expires: Duration,
    /// A new mapping has the same port as the one before.
    keeps_port: bool,
    /// What comes in counts as a sign of life, too.
    inbound: bool,
    ip: &'static str,
    port: u16,
    used: Option<Time>,
}

impl Nat {
    fn new(expires: Duration) -> Nat {
        Nat { expires, keeps_port: true, inbound: true, ip: "203.0.113.1", port: 4_000, used: None }
    }

    fn is_open(&self, now: Time) -> bool {
        self.used.is_some_and(|used| now.since(used) <= self.expires)
    }

    /// Where a datagram that leaves seems to come from.
    fn out(&mut self, now: Time) -> String {
        if !self.is_open(now) && !self.keeps_port {
            self.port += 1;
        }
        self.used = Some(now);
        self.address()
    }

    fn address(&self) -> String {
        format!("{}:{}", self.ip, self.port)
    }

    /// Whether one that comes to `address` gets in.
    fn lets_in(&mut self, now: Time, address: &str) -> bool {
        let open = self.is_open(now) && address == self.address();
        if open && self.inbound {
            self.used = Some(now);
        }
        open
    }
}

struct World {
    now: Time,
    client: Session,
    server: Session,
    /// The NAT on the way of each carrier; a carrier without one isn't here.
    nats: BTreeMap<u8, Nat>,
    /// Nothing passes.
    dead: bool,
    /// To the server or not, by and from which address.
    air: BTreeMap<(Time, u64), (bool, String, Vec<u8>)>,
    number: u64,
    /// What the client sent.
    datagrams: u64,
    bytes: usize,
    arrived: u64,
    events: Vec<Event>,
}

impl World {
    fn new(nat: Option<Nat>, keepalive: Keepalive) -> World {
        let now = Time::default() + SECOND;
        let start = |role, dialled| Start {
            role,
            id: SessionId::new(7, [1, 2, 3, 4, 5, 6]),
            suite: Suite::ChaCha20Poly1305,
            secret: Secret::from_bytes([42; 32]),
            limits: Limits { age: HOUR * 1_000, packets: 1 << 30 },
            inner: vec!["10.9.0.2/32".parse().expect("a network")],
            linger: MINUTE,
            dialled,
            vouched: None,
        };
        let client = Session::new(start(Role::Client, Some(server_by(0))), now);
        let server = Session::new(start(Role::Server, None), now);
        let mut world = World {
            now,
            client: client.expect("a session"),
            server: server.expect("a session"),
            nats: nat.into_iter().map(|nat| (0, nat)).collect(),
            dead: false,
            air: BTreeMap::new(),
            number: 0,
            datagrams: 0,
            bytes: 0,
            arrived: 0,
            events: Vec::new(),
        };
        world.client.set_keepalive(keepalive);
        world.client.probe(now);
        world.drain();
        world.run(SECOND);
        (world.datagrams, world.bytes) = (0, 0);
        world
    }

    fn transmit(&mut self, from: Role, path: Path, datagram: Vec<u8>) {
        let address = match (from, self.nats.get_mut(&path.carrier)) {
            (Role::Client, Some(nat)) => nat.out(self.now),
            (Role::Client, None) => format!("{INSIDE}:5000"),
            (Role::Server, _) => path.remote.to_string(),
        };
        if from == Role::Client {
            self.datagrams += 1;
            self.bytes += datagram.len();
        }
        self.number += 1;
        self.air.insert((self.now + DELAY, self.number), (from == Role::Client, address, datagram));
    }

    /// One packet of data.
    fn send(&mut self, from: Role) {
        let now = self.now;
        let mut datagram = vec![0; HEADER_LEN + 100 + TAG_LEN];
        let end = if from == Role::Client { &mut self.client } else { &mut self.server };
        end.seal(now, 0, &mut datagram).expect("seals");
        let paths: Vec<Path> = (0..end.targets()).filter_map(|n| end.target(now, n, 132)).collect();
        for path in paths {
            self.transmit(from, path, datagram.clone());
        }
    }

    fn arrive(&mut self, (to_server, address, mut datagram): (bool, String, Vec<u8>)) {
        let now = self.now;
        if self.dead {
        } else if to_server {
            let _ = self.server.open(now, at(&address), &mut datagram);
        } else if let Some(carrier) = self.gets_in(&address) {
            let inside: IpAddr = INSIDE.parse().expect("an address");
            let path = Path { local: Some(inside), ..server_by(carrier) };
            let opened = self.client.open(now, path, &mut datagram);
            self.arrived += u64::from(matches!(opened, Ok(Opened::Packet { .. })));
        }
    }

    /// The carrier by which a datagram to `address` gets in now.
    fn gets_in(&mut self, address: &str) -> Option<u8> {
        if address.starts_with(INSIDE) {
            return Some(0);
        }
        let now = self.now;
        self.nats.iter_mut().find_map(|(carrier, nat)| nat.lets_in(now, address).then_some(*carrier))
    }

    fn drain(&mut self) {
        let now = self.now;
        for role in [Role::Client, Role::Server] {
            let mut said = Vec::new();
            let end = if role == Role::Client { &mut self.client } else { &mut self.server };
            if end.poll_timeout().is_some_and(|at| at <= now) {
                end.handle_timeout(now);
            }
            while let Some(say) = end.poll_in_band() {
                let mut datagram = [0; IN_BAND_LEN];
                if let Ok(len) = end.seal_in_band(now, &say, &mut datagram) {
                    said.push((say.path, datagram[..len].to_vec()));
                }
            }
            while let Some(event) = end.poll_event() {
                if role == Role::Client {
                    self.events.push(event);
                }
            }
            for (path, datagram) in said {
                self.transmit(role, path, datagram);
            }
        }
    }

    /// Lets time pass, from one thing that happens to the next.
    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        loop {
            let air = self.air.keys().next().map(|(at, _)| *at);
            let due = [air, self.client.poll_timeout(), self.server.poll_timeout()];
            let Some(next) = due.into_iter().flatten().min().filter(|at| *at <= until) else { break };
            self.now = self.now.max(next);
            while let Some(entry) = self.air.first_entry().filter(|entry| entry.key().0 <= next) {
                let flying = entry.remove();
                self.arrive(flying);
            }
            self.drain();
        }
        self.now = until;
    }

    /// A packet from the server would get in, were it there now.
    fn is_reachable(&self) -> bool {
        let remote = self.server.path().expect("a path").path.remote.to_string();
        remote.starts_with(INSIDE) || self.nats.values().any(|nat| nat.to_owned().lets_in(self.now, &remote))
    }

    /// Lets time pass, and says how long in all, and how often, the client wasn't reachable.
    fn watch(&mut self, time: Duration) -> (Duration, usize) {
        let (until, mut closed, mut times, mut before) = (self.now + time, Duration::ZERO, 0, true);
        while self.now < until {
            self.run(SECOND / 2);
            let open = self.is_reachable();
            closed += if open { Duration::ZERO } else { SECOND / 2 };
            times += usize::from(before && !open);
            before = open;
        }
        (closed, times)
    }

    fn translated(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, Event::Path(PathEvent::Translated { .. }))).count()
    }
}

fn at(text: &str) -> Path {
    Path::new(text.parse().expect("an address"), None)
}

fn server_by(carrier: u8) -> Path {
    at("198.51.100.1:55555").by(carrier)
}

/// Every kind of NAT that forgets after so many seconds.
fn kinds(expires: u64) -> impl Iterator<Item = Nat> {
    let nat = Nat::new(Duration::from_secs(expires));
    [(true, true), (true, false), (false, true), (false, false)]
        .into_iter()
        .map(move |(keeps_port, inbound)| Nat { keeps_port, inbound, ..nat })
}

#[test]
fn without_a_nat_nothing_is_ever_sent() {
    let mut world = World::new(None, Keepalive::Auto);
    world.run(HOUR);
    assert_eq!((world.datagrams, world.translated()), (0, 0));
    world.send(Role::Client);
    world.send(Role::Server);
    world.run(HOUR);
    assert_eq!(world.datagrams, 1);
}

#[test]
fn a_nat_is_noticed_and_said_once() {
    let mut world = World::new(Some(Nat::new(MINUTE * 2)), Keepalive::Auto);
    let seen = "203.0.113.1:4000".parse().expect("an address");
    assert!(world.events.contains(&Event::Path(PathEvent::Seen { before: None, seen })));
    assert!(world.events.contains(&Event::Path(PathEvent::Translated { seen, silence: SECOND * 25 })));
    world.run(HOUR);
    assert_eq!(world.translated(), 1);
}

#[test]
fn an_idle_client_behind_a_nat_sends_little_and_stays_reachable() {
    for (expires, first_hour, later) in [(30, 180, 180), (120, 50, 42), (3_600, 20, 6)] {
        for nat in kinds(expires) {
            let mut world = World::new(Some(nat), Keepalive::Auto);
            let (_, mistakes) = world.watch(HOUR);
            assert!(mistakes <= 1, "{nat:?}: {mistakes} times");
            // A new mapping makes the server ask who is where: a few answers more.
            assert!(world.datagrams <= first_hour, "{nat:?}: {} datagrams at first", world.datagrams);
            for hour in 2..8 {
                (world.datagrams, world.bytes) = (0, 0);
                let (closed, mistakes) = world.watch(HOUR);
                assert!(mistakes <= 1 && closed <= SECOND * 60, "{nat:?}: {mistakes}, {closed:?}");
                assert!(world.datagrams <= later, "{nat:?}: {} in hour {hour}", world.datagrams);
                assert!(world.bytes <= 9_000, "{nat:?}: {} bytes in hour {hour}", world.bytes);
            }
            assert!(!world.events.contains(&Event::Path(PathEvent::Unreachable)), "{nat:?}");
        }
    }
}

#[test]
fn the_next_session_knows_what_the_one_before_learned() {
    for nat in kinds(60) {
        let mut first = World::new(Some(nat), Keepalive::Auto);
        first.run(HOUR / 2);
        let learned: Vec<_> = first.client.silences().collect();
        assert!(
            matches!(learned[..], [(0, known)] if known.verified && known.limit.is_some()),
            "{learned:?}"
        );
        let [with, without] = [true, false].map(|knows| {
            let mut next = World::new(Some(nat), Keepalive::Auto);
            if knows {
                next.client.expect_silence(0, learned[0].1);
            }
            next.watch(MINUTE * 15).1
        });
        assert_eq!(with, 0, "{nat:?}: closed once more");
        assert!(without > 0, "{nat:?}: there is something to know");
    }
}

#[test]
fn switched_off_it_is_unreachable_until_it_sends() {
    let mut world = World::new(Some(Nat::new(SECOND * 30)), Keepalive::Off);
    world.run(HOUR);
    assert_eq!((world.datagrams, world.translated()), (0, 0));
    world.send(Role::Server);
    world.run(SECOND);
    assert_eq!(world.arrived, 0);
    world.send(Role::Client);
    world.run(SECOND);
    world.send(Role::Server);
    world.run(SECOND);
    assert_eq!(world.arrived, 1);
}

#[test]
fn a_fixed_silence_is_kept_nat_or_not() {
    for nat in [None, Some(Nat::new(MINUTE))] {
        let mut world = World::new(nat, Keepalive::Every(SECOND * 40));
        let (closed, _) = world.watch(HOUR);
        assert_eq!(closed, Duration::ZERO);
        assert!((85..=90).contains(&world.datagrams), "{} datagrams", world.datagrams);
    }
}

#[test]
fn traffic_is_as_good_as_a_keepalive() {
    for (role, extra) in [(Role::Client, 0), (Role::Server, 400)] {
        let mut world = World::new(Some(Nat::new(MINUTE * 5)), Keepalive::Auto);
        for _ in 0..200 {
            world.send(role);
            world.run(SECOND);
            if role == Role::Client {
                world.send(Role::Server);
            }
            world.run(SECOND * 19);
        }
        let data = if role == Role::Client { 200 } else { 0 };
        // What comes in alone keeps no mapping of some NATs.
        assert!(world.datagrams <= data + extra, "{role:?}: {} datagrams", world.datagrams);
        assert_eq!(world.arrived, 200);
    }
}

#[test]
fn a_way_that_is_only_kept_ready_is_kept_open() {
    let first = Nat::new(SECOND * 100);
    let mut world = World::new(Some(first), Keepalive::Auto);
    world.nats.insert(1, Nat { ip: "203.0.113.2", expires: SECOND * 45, ..first });
    let now = world.now;
    world.client.set_ways(now, &[server_by(0), server_by(1)]);
    world.drain();
    world.run(HOUR + MINUTE);
    assert_eq!(world.translated(), 2);
    let mut closed = [0, 0];
    for _ in 0..900 {
        world.run(SECOND);
        for (carrier, nat) in &world.nats {
            closed[usize::from(*carrier)] += u32::from(!nat.is_open(world.now));
        }
    }
    assert!(closed.iter().all(|seconds| *seconds <= 30), "closed for so many seconds of 900: {closed:?}");
    // It takes over, and the one before is the one kept ready.
    let now = world.now;
    world.client.set_ways(now, &[server_by(1), server_by(0)]);
    world.drain();
    world.run(HOUR);
    assert!(world.is_reachable());
    assert!(!world.events.contains(&Event::Path(PathEvent::Unreachable)));
}

#[test]
fn a_dead_path_is_noticed_without_traffic() {
    let mut world = World::new(Some(Nat::new(MINUTE * 2)), Keepalive::Auto);
    world.run(HOUR);
    world.dead = true;
    world.run(MINUTE * 3);
    assert!(world.events.contains(&Event::Path(PathEvent::Unreachable)));
}

#[test]
fn a_host_that_slept_learns_nothing_from_that() {
    let mut world = World::new(Some(Nat::new(HOUR * 2)), Keepalive::Auto);
    world.run(MINUTE * 10);
    for _ in 0..5 {
        // Whatever came meanwhile is lost.
        world.air.clear();
        world.now = world.now + MINUTE * 30;
        world.server.handle_timeout(world.now);
        while world.server.poll_in_band().is_some() {}
        world.drain();
        world.run(MINUTE * 30);
    }
    world.datagrams = 0;
    world.run(HOUR);
    assert!(world.datagrams <= 7, "{} datagrams an hour: no limit was learned", world.datagrams);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Whatever the NAT, the client finds what keeps its mapping, and doesn't waver.
    #[test]
    fn any_nat_is_kept_open(
        expires in 16u64..4_000,
        keeps_port: bool,
        inbound: bool,
        packets in prop::collection::vec((any::<bool>(), 1u64..900), 0..12),
    ) {
        let nat = Nat { keeps_port, inbound, ..Nat::new(Duration::from_secs(expires)) };
        let mut world = World::new(Some(nat), Keepalive::Auto);
        world.run(HOUR + MINUTE * 30);
        let mut lost = 0;
        for (up, wait) in packets {
            world.run(Duration::from_secs(wait));
            let arrived = world.arrived;
            world.send(if up { Role::Client } else { Role::Server });
            world.run(SECOND);
            lost += u64::from(!up && world.arrived == arrived);
        }
        prop_assert!(lost <= 1, "{lost} lost");
        world.datagrams = 0;
        let (closed, mistakes) = world.watch(HOUR * 2);
        prop_assert!(mistakes <= 3, "{mistakes} times within two hours");
        prop_assert!(closed <= Duration::from_secs(expires.min(600)) * 2, "{closed:?}");
        let most = 2 * 3_600 * 9 / (expires.min(600) * 5) + 24;
        prop_assert!(world.datagrams <= most, "{} datagrams, {most} expected", world.datagrams);
    }
}
