//! Moves in virtual time: a client with addresses that come and go, a server that follows it, and a network that
//! delays, loses, copies and lies.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use tunguard::config::common::Suite;
use tunguard::drops::DropReason;
use tunguard::epochs::Limits;
use tunguard::keys::{Role, Secret};
use tunguard::path::Path;
use tunguard::paths::Mode;
use tunguard::paths::{PathEvent, Paths};
use tunguard::session::{Event, IN_BAND_LEN, Opened, Session, Start};
use tunguard::time::Time;
use tunguard::wire::data::{HEADER_LEN, SessionId, TAG_LEN};
use tunguard::wire::inband::{InBand, MAX_LEN};

const MS: Duration = Duration::from_millis(1);
/// Half a round trip.
const DELAY: Duration = Duration::from_millis(10);
const RTT: Duration = Duration::from_millis(20);
/// Between two packets of a stream.
const TICK: Duration = Duration::from_millis(2);

/// A datagram under way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flying {
    to: Role2,
    /// The client's address, whichever way it goes.
    address: String,
    datagram: Vec<u8>,
}

/// `Role` with an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Role2 {
    Client,
    Server,
}

struct World {
    now: Time,
    client: Session,
    server: Session,
    /// Addresses of the client by carrier, as the server sees them.
    carriers: BTreeMap<u8, String>,
    /// Addresses that lead nowhere.
    dead: BTreeSet<String>,
    air: BTreeMap<(Time, u64), Flying>,
    number: u64,
    sent: [u64; 2],
    arrived: [Vec<Time>; 2],
    copies: u64,
    events: Vec<(Role, Event)>,
    /// Bytes to and from each address.
    to: BTreeMap<String, usize>,
    from: BTreeMap<String, usize>,
    /// What an eavesdropper has seen from the client.
    seen: Vec<Vec<u8>>,
}

impl World {
    fn new() -> World {
        let now = Time::default() + Duration::from_secs(1);
        let start = |role, dialled| Start {
            role,
            id: SessionId::new(7, [1, 2, 3, 4, 5, 6]),
            suite: Suite::ChaCha20Poly1305,
            secret: Secret::from_bytes([42; 32]),
            limits: Limits { age: Duration::from_secs(900), packets: 1 << 30 },
            inner: vec!["10.9.0.2/32".parse().expect("a network")],
            linger: Duration::from_secs(600),
            dialled,
            vouched: None,
        };
        let client = Session::new(start(Role::Client, Some(server_by(0))), now).expect("a session");
        let server = Session::new(start(Role::Server, None), now).expect("a session");
        let mut world = World {
            now,
            client,
            server,
            carriers: BTreeMap::from([(0, "192.0.2.1:4000".to_owned())]),
            dead: BTreeSet::new(),
            air: BTreeMap::new(),
            number: 0,
            sent: [0; 2],
            arrived: [Vec::new(), Vec::new()],
            copies: 0,
            events: Vec::new(),
            to: BTreeMap::new(),
            from: BTreeMap::new(),
            seen: Vec::new(),
        };
        world.client.probe(now);
        world.run(500 * MS);
        world.events.clear();
        world
    }

    /// With a second carrier, which both ends know.
    fn with_two(mode: Mode) -> World {
        let mut world = World::new();
        world.carriers.insert(1, "203.0.113.5:6000".to_owned());
        let now = world.now;
        world.client.set_mode(now, mode);
        world.client.set_ways(now, &[server_by(0), server_by(1)]);
        world.run(Duration::from_secs(1));
        world.events.clear();
        world
    }

    /// The client has these carriers now, best first.
    fn set_carriers(&mut self, carriers: &[(u8, &str)]) {
        self.carriers = carriers.iter().map(|(n, address)| (*n, (*address).to_owned())).collect();
        let ways: Vec<Path> = carriers.iter().map(|(n, _)| server_by(*n)).collect();
        let now = self.now;
        self.client.set_ways(now, &ways);
    }

    fn fly(&mut self, to: Role2, address: String, datagram: Vec<u8>) {
        self.number += 1;
        self.air.insert((self.now + DELAY, self.number), Flying { to, address, datagram });
    }

    fn send_by(&mut self, role: Role, path: Path, datagram: Vec<u8>) {
        match role {
            Role::Client => {
                let Some(address) = self.carriers.get(&path.carrier).cloned() else { return };
                self.seen.push(datagram.clone());
                if !self.dead.contains(&address) {
                    self.fly(Role2::Server, address, datagram);
                }
            }
            Role::Server => {
                let address = path.remote.to_string();
                *self.to.entry(address.clone()).or_default() += datagram.len();
                let alive = self.carriers.values().any(|a| *a == address) && !self.dead.contains(&address);
                if alive {
                    self.fly(Role2::Client, address, datagram);
                }
            }
        }
    }

    fn end(&mut self, role: Role) -> &mut Session {
        match role {
            Role::Client => &mut self.client,
            Role::Server => &mut self.server,
        }
    }

    fn send(&mut self, role: Role) {
        let now = self.now;
        self.sent[role as usize] += 1;
        let mut datagram = vec![0; HEADER_LEN + 132 + TAG_LEN];
        let end = self.end(role);
        end.seal(now, 0, &mut datagram).expect("seals");
        let paths: Vec<Path> =
            (0..end.targets()).filter_map(|n| end.target(now, n, datagram.len())).collect();
        for path in paths {
            self.send_by(role, path, datagram.clone());
        }
    }

    fn arrive(&mut self, flying: Flying) {
        let mut datagram = flying.datagram;
        let (role, path) = match flying.to {
            Role2::Server => {
                *self.from.entry(flying.address.clone()).or_default() += datagram.len();
                (Role::Server, at(&flying.address))
            }
            Role2::Client => {
                let carrier = self.carriers.iter().find(|(_, a)| **a == flying.address);
                let Some((carrier, _)) = carrier else { return };
                (Role::Client, server_by(*carrier))
            }
        };
        let now = self.now;
        match self.end(role).open(now, path, &mut datagram) {
            Ok(Opened::Packet { .. }) => self.arrived[role.peer() as usize].push(now),
            Err(DropReason::Duplicate) => self.copies += 1,
            _ => {}
        }
    }

    fn drain(&mut self) {
        let now = self.now;
        for role in [Role::Client, Role::Server] {
            let end = self.end(role);
            if end.poll_timeout().is_some_and(|at| at <= now) {
                end.handle_timeout(now);
            }
            while let Some(say) = self.end(role).poll_in_band() {
                let mut datagram = [0; IN_BAND_LEN];
                if let Ok(len) = self.end(role).seal_in_band(now, &say, &mut datagram) {
                    self.send_by(role, say.path, datagram[..len].to_vec());
                }
            }
            while let Some(event) = self.end(role).poll_event() {
                self.events.push((role, event));
            }
        }
    }

    /// Lets `time` pass, a millisecond at a time, with a stream from `role`.
    fn stream(&mut self, role: Option<Role>, time: Duration) {
        let until = self.now + time;
        let mut tick = self.now;
        while self.now < until {
            if let Some(role) = role.filter(|_| self.now >= tick) {
                tick = tick + TICK;
                self.send(role);
            }
            self.now = self.now + MS;
            while let Some(entry) = self.air.first_entry().filter(|e| e.key().0 <= self.now) {
                let flying = entry.remove();
                self.arrive(flying);
                self.drain();
            }
            self.drain();
        }
    }

    fn run(&mut self, time: Duration) {
        self.stream(None, time);
    }

    /// The longest time without an arrival since `since`, and how many of what was sent didn't arrive.
    fn gap(&self, role: Role, since: Time) -> Duration {
        let times: Vec<Time> = std::iter::once(since)
            .chain(self.arrived[role as usize].iter().copied().filter(|t| *t >= since))
            .collect();
        let last = times.last().copied().expect("one");
        let most = times.windows(2).map(|two| two[1] - two[0]).max().unwrap_or_default();
        most.max(self.now - last)
    }

    fn lost(&self, role: Role) -> u64 {
        self.sent[role as usize] - self.arrived[role as usize].len() as u64
    }

    fn at(&self) -> String {
        self.server.path().expect("a path").path.remote.to_string()
    }

    fn moves(&self) -> usize {
        let moved = |e: &&(Role, Event)| {
            e.0 == Role::Server && matches!(e.1, Event::Path(PathEvent::Moved { old: Some(_), .. }))
        };
        self.events.iter().filter(moved).count()
    }
}

fn at(text: &str) -> Path {
    Path::new(text.parse().expect("an address"), None)
}

fn server_by(carrier: u8) -> Path {
    at("198.51.100.1:55555").by(carrier)
}

/// Lets what is on its way arrive.
fn settled(world: &mut World) {
    world.run(RTT * 2);
}

#[test]
fn a_new_address_is_followed_within_a_round_trip_whoever_talks() {
    for role in [Role::Client, Role::Server] {
        let mut world = World::new();
        world.stream(Some(role), 500 * MS);
        let moved = world.now;
        world.set_carriers(&[(1, "203.0.113.5:6000")]);
        world.stream(Some(role), Duration::from_secs(2));
        settled(&mut world);
        assert_eq!(world.at(), "203.0.113.5:6000");
        assert_eq!(world.moves(), 1);
        let gap = world.gap(role, moved);
        assert!(
            gap <= RTT + 30 * MS + RTT,
            "{role:?}: {gap:?} of silence, the last {:?} of it the end",
            RTT * 2
        );
        assert!(world.lost(role) <= 20, "{role:?}: {} lost", world.lost(role));
    }
}

#[test]
fn with_another_carrier_up_before_nothing_is_lost() {
    for role in [Role::Client, Role::Server] {
        let mut world = World::with_two(Mode::Failover);
        assert_eq!(world.at(), "192.0.2.1:4000");
        world.stream(Some(role), 500 * MS);
        // It prefers the other one, and some time later the first is gone.
        let now = world.now;
        world.client.set_ways(now, &[server_by(1), server_by(0)]);
        world.stream(Some(role), 100 * MS);
        world.set_carriers(&[(1, "203.0.113.5:6000")]);
        world.stream(Some(role), Duration::from_secs(1));
        settled(&mut world);
        assert_eq!(world.at(), "203.0.113.5:6000");
        assert_eq!(world.lost(role), 0, "{role:?}");
    }
}

#[test]
fn a_carrier_that_swallows_everything_is_left_within_three_round_trips() {
    for role in [Role::Client, Role::Server] {
        let mut world = World::with_two(Mode::Failover);
        world.stream(Some(role), 500 * MS);
        let cut = world.now;
        world.dead.insert("192.0.2.1:4000".to_owned());
        world.stream(Some(role), Duration::from_secs(3));
        let gap = world.gap(role, cut);
        assert!(gap <= RTT * 3 + 100 * MS, "{role:?}: {gap:?} of silence");
        // When it is back, it is used again after a while, and nothing is lost by that.
        world.dead.clear();
        world.stream(Some(role), Duration::from_secs(40));
        settled(&mut world);
        let lost = world.lost(role);
        assert!(lost <= 80, "{role:?}: {lost} lost");
        assert_eq!(world.client.path().expect("a path").path.carrier, 0, "{role:?}");
        assert_eq!(world.at(), "192.0.2.1:4000", "{role:?}");
    }
}

#[test]
fn the_other_carrier_may_fail_before_the_first_is_trusted_again() {
    for role in [Role::Client, Role::Server] {
        let mut world = World::with_two(Mode::Failover);
        world.stream(Some(role), 500 * MS);
        for turn in 0..6 {
            // Whichever is in use fails just when the other works again.
            world.dead.clear();
            world.stream(Some(role), 300 * MS);
            let at = match role {
                Role::Server => world.at(),
                Role::Client => world.carriers[&world.client.path().expect("a path").path.carrier].clone(),
            };
            let cut = world.now;
            world.dead.insert(at);
            world.stream(Some(role), Duration::from_secs(4));
            let gap = world.gap(role, cut);
            assert!(gap <= RTT * 6 + 100 * MS, "{role:?}, turn {turn}: {gap:?} of silence");
        }
    }
}

#[test]
fn redundant_carriers_lose_nothing_when_one_is_cut() {
    for role in [Role::Client, Role::Server] {
        let mut world = World::with_two(Mode::Redundant);
        world.stream(Some(role), 500 * MS);
        assert!(world.copies > 200, "{role:?}: {} copies", world.copies);
        world.dead.insert("192.0.2.1:4000".to_owned());
        world.stream(Some(role), Duration::from_secs(12));
        settled(&mut world);
        assert_eq!(world.lost(role), 0, "{role:?}");
        // The dead one costs nothing any more.
        let copies = world.copies;
        world.stream(Some(role), Duration::from_secs(1));
        assert_eq!(world.copies, copies);
    }
}

#[test]
fn flows_are_shared_out_and_leave_a_path_that_dies() {
    for role in [Role::Client, Role::Server] {
        let mut world = World::with_two(Mode::Balance);
        let now = world.now;
        let lane = |world: &mut World, flow: u8| {
            let now = world.now;
            let packet = inner_udp(flow);
            let only = world.end(role).path().expect("a path").path;
            world.end(role).lane(now, &packet).unwrap_or(only)
        };
        let lanes: Vec<Path> = (0..40).map(|flow| lane(&mut world, flow)).collect();
        assert!(lanes.iter().any(|path| *path != lanes[0]), "one path takes them all");
        assert_eq!(lanes, (0..40).map(|flow| lane(&mut world, flow)).collect::<Vec<_>>(), "they stay");
        // Datagrams by each, so that it's seen which one is silent.
        world.dead.insert("192.0.2.1:4000".to_owned());
        while world.now < now + Duration::from_secs(3) {
            for flow in 0..40 {
                let path = lane(&mut world, flow);
                let now = world.now;
                let mut datagram = vec![0; HEADER_LEN + 132 + TAG_LEN];
                world.end(role).seal(now, 0, &mut datagram).expect("seals");
                world.end(role).lane_target(now, path, 1, datagram.len()).expect("a path");
                world.send_by(role, path, datagram);
            }
            world.run(5 * MS);
        }
        // One path is no choice.
        assert_eq!(world.end(role).lane(now, &inner_udp(0)), None);
        let by_second: usize = world.to.get("203.0.113.5:6000").copied().unwrap_or_default();
        assert!(role == Role::Client || by_second > 40 * 100 * 100, "{by_second} bytes by the other");
        assert!(!world.end(role).path().expect("a path").is_lost());
    }
}

#[test]
fn an_idle_client_that_would_use_several_carriers_is_followed_with_one() {
    for mode in [Mode::Failover, Mode::Redundant, Mode::Balance] {
        let mut world = World::new();
        let now = world.now;
        world.client.set_mode(now, mode);
        world.run(Duration::from_secs(1));
        world.set_carriers(&[(1, "203.0.113.5:6000")]);
        world.run(Duration::from_secs(1));
        assert_eq!(world.at(), "203.0.113.5:6000", "{mode:?}");
        // So that the first packet finds it.
        world.send(Role::Server);
        settled(&mut world);
        assert_eq!(world.lost(Role::Server), 0, "{mode:?}");
    }
}

#[test]
fn what_no_socket_takes_may_go_another_way_that_works() {
    for role in [Role::Client, Role::Server] {
        let way_out = |mut world: World| {
            let now = world.now;
            let path = world.end(role).way_out(now)?;
            Some(if role == Role::Client { path.carrier.to_string() } else { path.remote.to_string() })
        };
        let other = if role == Role::Client { "1" } else { "203.0.113.5:6000" };
        assert_eq!(way_out(World::new()), None, "{role:?}: there is only one");
        assert_eq!(way_out(World::with_two(Mode::Failover)).as_deref(), Some(other), "{role:?}");
        assert_eq!(way_out(World::with_two(Mode::Redundant)), None, "{role:?}: data goes there already");
        // One that never answered is none.
        let mut world = World::new();
        world.dead.insert("203.0.113.5:6000".to_owned());
        world.set_carriers(&[(0, "192.0.2.1:4000"), (1, "203.0.113.5:6000")]);
        assert_eq!(way_out(world), None, "{role:?}");
    }
}

#[test]
fn a_stranger_that_is_forgotten_gets_no_more_than_one_that_is_remembered() {
    let (client, stranger) = (at("192.0.2.1:4000"), at("203.0.113.9:9"));
    let now = Time::default() + Duration::from_secs(1);
    let mut paths = Paths::following(Secret::from_bytes([1; 32]), None);
    let told = |paths: &mut Paths| {
        let (mut bytes, mut asked) = (0, None);
        while let Some(say) = paths.poll_say() {
            let mut message = [0; MAX_LEN];
            let len = HEADER_LEN + say.message.emit(&mut message) + TAG_LEN;
            if paths.spend(say.path, len) && say.path == stranger {
                bytes += len;
            }
            if let InBand::PathChallenge(nonce) = say.message {
                asked = Some(nonce).filter(|_| say.path == client).or(asked);
            }
        }
        (bytes, asked)
    };
    let challenge = Some(InBand::PathChallenge([7; 8]));
    paths.heard(now, client, true, 41, challenge);
    let nonce = told(&mut paths).1.expect("a challenge");
    paths.heard(now, client, true, 59, Some(InBand::PathResponse(nonce, client.remote)));
    // Somebody took the next one and sends it on; when he is asked again, he is found out.
    paths.heard(now, stranger, true, 41, challenge);
    let first = told(&mut paths).0;
    let now = now + Duration::from_secs(1);
    paths.handle_timeout(now);
    assert_eq!(paths.known().len(), 1);
    let later = told(&mut paths).0;
    assert!(first > 0 && first + later <= 3 * 41, "{first} and {later} bytes for 41");
}

/// A UDP packet of the flow with this number.
fn inner_udp(flow: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1];
    packet.extend([0x40, flow, 0, 53, 0, 8, 0, 0]);
    packet
}

#[test]
fn a_nat_that_rebinds_is_noticed_by_data() {
    let mut world = World::new();
    world.stream(Some(Role::Client), 500 * MS);
    // Nobody tells the client.
    let moved = world.now;
    world.carriers.insert(0, "192.0.2.1:9999".to_owned());
    world.stream(Some(Role::Client), 500 * MS);
    settled(&mut world);
    assert_eq!(world.at(), "192.0.2.1:9999");
    assert_eq!(world.lost(Role::Client), 0);
    assert!(world.gap(Role::Client, moved) <= RTT * 2 + 10 * MS);
}

#[test]
fn an_hour_without_a_network_ends_nothing() {
    let mut world = World::new();
    world.stream(Some(Role::Client), 100 * MS);
    world.carriers.clear();
    let now = world.now;
    world.client.set_ways(now, &[]);
    world.now = world.now + Duration::from_secs(590);
    world.drain();
    world.set_carriers(&[(2, "203.0.113.7:7000")]);
    world.stream(Some(Role::Server), Duration::from_secs(1));
    settled(&mut world);
    assert_eq!(world.at(), "203.0.113.7:7000");
    assert!(world.lost(Role::Server) <= 20);
    assert!(!world.events.iter().any(|(_, e)| matches!(e, Event::Ended { .. })));
}

// Attacks.

const EVIL: &str = "198.18.0.9:9";

#[test]
fn a_copy_raced_ahead_from_elsewhere_moves_nothing() {
    let mut world = World::new();
    world.stream(Some(Role::Client), 200 * MS);
    // It overtakes the original, again and again.
    for _ in 0..20 {
        let seen = world.seen.len();
        world.send(Role::Client);
        let copy = world.seen[seen].clone();
        world.arrive(Flying { to: Role2::Server, address: EVIL.to_owned(), datagram: copy });
        world.drain();
        world.stream(Some(Role::Server), 100 * MS);
        assert_eq!(world.moves(), 0);
    }
    settled(&mut world);
    assert_eq!(world.at(), "192.0.2.1:4000");
    assert_eq!(world.lost(Role::Server), 0);
    bounded(&world);
}

#[test]
fn an_old_packet_from_elsewhere_is_not_even_remembered() {
    let mut world = World::new();
    world.send(Role::Client);
    let held = world.seen.last().expect("one").clone();
    world.air.clear();
    world.stream(Some(Role::Client), 100 * MS);
    world.arrive(Flying { to: Role2::Server, address: EVIL.to_owned(), datagram: held.clone() });
    world.arrive(Flying { to: Role2::Server, address: EVIL.to_owned(), datagram: held });
    settled(&mut world);
    assert_eq!(world.server.paths().len(), 1);
    assert_eq!(world.to.get(EVIL), None, "nothing was sent there");
}

#[test]
fn a_flood_of_nominations_is_bounded_and_moves_nothing() {
    let mut world = World::new();
    world.stream(Some(Role::Client), 200 * MS);
    for n in 0..500 {
        let seen = world.seen.len();
        world.send(Role::Client);
        let copy = world.seen[seen].clone();
        world.arrive(Flying {
            to: Role2::Server,
            address: format!("198.18.1.9:{}", 1000 + n),
            datagram: copy,
        });
        world.drain();
        world.stream(Some(Role::Server), 10 * MS);
    }
    settled(&mut world);
    assert_eq!(world.at(), "192.0.2.1:4000");
    assert!(world.server.paths().len() <= 8);
    let touched = world.to.keys().filter(|a| a.starts_with("198.18.1.9")).count();
    assert!(touched <= 4 + 6, "{touched} strangers were sent something within five seconds");
    bounded(&world);
    assert_eq!(world.lost(Role::Server), 0);
}

#[test]
fn a_replayed_rebind_moves_nothing() {
    let mut world = World::new();
    let before = world.seen.len();
    world.set_carriers(&[(1, "203.0.113.5:6000")]);
    world.run(500 * MS);
    let rebind = world.seen[before..].iter().find(|d| d.len() == IN_BAND_LEN).expect("a REBIND").clone();
    let moves = world.moves();
    world.arrive(Flying { to: Role2::Server, address: EVIL.to_owned(), datagram: rebind });
    world.run(Duration::from_secs(4));
    assert_eq!((world.at().as_str(), world.moves()), ("203.0.113.5:6000", moves));
    assert_eq!(world.to.get(EVIL), None);
}

#[test]
fn a_rebind_that_is_diverted_moves_nothing_without_an_answer() {
    let mut world = World::new();
    let before = world.seen.len();
    // The client's own never arrives, a copy of it comes from elsewhere.
    world.set_carriers(&[(1, "203.0.113.5:6000")]);
    world.dead.insert("203.0.113.5:6000".to_owned());
    world.drain();
    let rebind = world.seen[before..].iter().find(|d| d.len() == IN_BAND_LEN).expect("a REBIND").clone();
    world.arrive(Flying { to: Role2::Server, address: EVIL.to_owned(), datagram: rebind });
    world.stream(Some(Role::Server), Duration::from_secs(5));
    assert_eq!(world.at(), "192.0.2.1:4000");
    bounded(&world);
    // And the client is followed as soon as its network works.
    world.dead.clear();
    world.stream(Some(Role::Server), Duration::from_secs(5));
    assert_eq!(world.at(), "203.0.113.5:6000");
}

/// To an address that never answered no more than three times of what came from it.
fn bounded(world: &World) {
    for (address, sent) in &world.to {
        let received = world.from.get(address).copied().unwrap_or_default();
        let ours = world.carriers.values().any(|a| a == address) || address == "192.0.2.1:4000";
        assert!(ours || *sent <= 3 * received, "{sent} bytes to {address}, {received} from it");
    }
}

/// What happens in a random story.
#[derive(Clone, Debug)]
enum Step {
    Move(u8),
    Switch,
    Outage(u64),
    Nat(u16),
    Copy(u8),
    Stream(bool, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<u8>().prop_map(Step::Move),
        Just(Step::Switch),
        (0u64..3_000).prop_map(Step::Outage),
        (2_000u16..60_000).prop_map(Step::Nat),
        any::<u8>().prop_map(Step::Copy),
        (any::<bool>(), 1u64..1_500).prop_map(|(up, ms)| Step::Stream(up, ms)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever happened: once the client talks from where it is, both ways work within seconds.
    #[test]
    fn every_story_ends_well(steps in prop::collection::vec(step(), 1..12)) {
        let mut world = World::new();
        let mut next = 0u8;
        for step in steps {
            match step {
                Step::Move(n) => {
                    next = next % 200 + 1;
                    let address = format!("203.0.113.{}:{}", n % 250 + 1, 1000 + u16::from(next));
                    world.set_carriers(&[(next, &address)]);
                }
                Step::Switch => {
                    next = next % 200 + 1;
                    let address = format!("203.0.113.1:{}", 1000 + u16::from(next));
                    let first = world.client.path().expect("a path").path.carrier;
                    let old = world.carriers.get(&first).cloned();
                    world.carriers = old.into_iter().map(|a| (first, a)).collect();
                    world.carriers.insert(next, address);
                    let now = world.now;
                    world.client.set_ways(now, &[server_by(next), server_by(first)]);
                }
                Step::Outage(ms) => {
                    world.dead.extend(world.carriers.values().cloned());
                    world.stream(Some(Role::Client), Duration::from_millis(ms));
                    world.dead.clear();
                }
                Step::Nat(port) => {
                    for address in world.carriers.values_mut() {
                        *address = format!("{}:{port}", address.split(':').next().expect("an address"));
                    }
                }
                Step::Copy(n) => {
                    let seen = world.seen.len();
                    world.send(Role::Client);
                    if let Some(copy) = world.seen.get(seen).cloned() {
                        let address = format!("198.18.0.{}:9", n % 250 + 1);
                        world.arrive(Flying { to: Role2::Server, address, datagram: copy });
                        world.drain();
                    }
                }
                Step::Stream(up, ms) => {
                    let role = if up { Role::Client } else { Role::Server };
                    world.stream(Some(role), Duration::from_millis(ms));
                }
            }
        }
        world.stream(Some(Role::Client), Duration::from_secs(12));
        let here = world.client.path().expect("a path").path.carrier;
        prop_assert_eq!(Some(&world.at()), world.carriers.get(&here));
        for role in [Role::Client, Role::Server] {
            settled(&mut world);
            let (sent, arrived) = (world.sent[role as usize], world.arrived[role as usize].len());
            world.stream(Some(role), Duration::from_millis(200));
            settled(&mut world);
            let sent = world.sent[role as usize] - sent;
            prop_assert_eq!(world.arrived[role as usize].len() - arrived, sent as usize);
        }
        for (address, sent) in &world.to {
            let stranger = address.starts_with("198.18.");
            let received = world.from.get(address).copied().unwrap_or_default();
            prop_assert!(!stranger || *sent <= 3 * received, "{} bytes to {}", sent, address);
        }
    }
}
