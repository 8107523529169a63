//! Narrow paths in virtual time: two ends whose datagrams are fragmented on the way where they are too large, but for
//! probes, which are lost.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tunguard::config::common::Suite;
use tunguard::drops::DropReason;
use tunguard::egress::{self, Egress, Outlet};
use tunguard::epochs::Limits;
use tunguard::keys::{Role, Secret};
use tunguard::path::Path;
use tunguard::paths::Mode;
use tunguard::paths::PathEvent;
use tunguard::session::{Event, Opened, Session, Start};
use tunguard::sys::udp::Unsent;
use tunguard::time::Time;
use tunguard::wire::data::{OVERHEAD, SessionId};
use tunguard::wire::vnet::{GSO_TCPV4, NEEDS_CSUM, VnetHeader};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const DELAY: Duration = Duration::from_millis(10);
/// The client's address by its second carrier.
const OTHER: &str = "203.0.113.5:6000";
const INNER: usize = 1_420;
/// UDP payload of a path of 1,300 bytes over IPv4, and the inner packet that fits there.
const NARROW: usize = 1_272;
const FITS: usize = NARROW - OVERHEAD;

/// One end's socket and the path behind it.
struct Wire {
    /// UDP payload that goes in one piece on the path, and on its first link.
    path: Cell<usize>,
    link: Cell<usize>,
    /// The same on the paths of some carriers.
    by: RefCell<BTreeMap<u8, usize>>,
    dead: Cell<bool>,
    out: RefCell<Vec<(Path, Vec<u8>)>>,
    probes: RefCell<Vec<(Path, usize)>>,
    /// Datagrams that arrive in pieces.
    pieces: Cell<u64>,
}

impl Wire {
    fn room(&self, path: &Path) -> usize {
        self.by.borrow().get(&path.carrier).copied().unwrap_or(self.path.get())
    }

    fn put(&self, path: &Path, datagram: &[u8]) {
        if !self.dead.get() {
            self.out.borrow_mut().push((*path, datagram.to_vec()));
        }
    }
}

impl Outlet for Wire {
    fn send(&self, path: &Path, _ecn: u8, datagrams: &[u8], stride: usize) -> Result<(), Unsent> {
        for datagram in datagrams.chunks(stride) {
            let too_large = datagram.len() > self.room(path).min(self.link.get());
            self.pieces.set(self.pieces.get() + u64::from(too_large));
            self.put(path, datagram);
        }
        Ok(())
    }

    fn send_whole(&self, path: &Path, datagram: &[u8]) -> Result<(), DropReason> {
        if datagram.len() > self.link.get() {
            return Err(DropReason::TooBig);
        }
        self.probes.borrow_mut().push((*path, datagram.len()));
        if datagram.len() <= self.room(path) {
            self.put(path, datagram);
        }
        Ok(())
    }

    fn max_segments(&self) -> usize {
        64
    }
}

struct End {
    session: Session,
    egress: Egress,
    wire: Wire,
    /// Packets that arrived here.
    arrived: Vec<Vec<u8>>,
    told: Vec<Vec<u8>>,
    sizes: Vec<usize>,
}

struct World {
    now: Time,
    ends: [End; 2],
    /// When, to whom, by which path as seen there.
    air: VecDeque<(Time, Role, Path, Vec<u8>)>,
    client_at: Path,
}

impl World {
    fn new(payload: usize) -> World {
        let now = Time::default() + SECOND;
        let end = |role, dialled| {
            let start = Start {
                role,
                id: SessionId::new(7, [1, 2, 3, 4, 5, 6]),
                suite: Suite::ChaCha20Poly1305,
                secret: Secret::from_bytes([42; 32]),
                limits: Limits { age: 10 * 3600 * SECOND, packets: 1 << 30 },
                inner: vec!["10.9.0.2/32".parse().expect("a network")],
                linger: 600 * SECOND,
                dialled,
                vouched: None,
            };
            let mut session = Session::new(start, now).expect("a session");
            session.set_mtu(INNER as u16);
            End {
                session,
                egress: Egress::default(),
                wire: Wire {
                    path: Cell::new(payload),
                    link: Cell::new(1_472),
                    by: RefCell::default(),
                    dead: Cell::new(false),
                    out: RefCell::default(),
                    probes: RefCell::default(),
                    pieces: Cell::new(0),
                },
                arrived: Vec::new(),
                told: Vec::new(),
                sizes: Vec::new(),
            }
        };
        let mut world = World {
            now,
            ends: [end(Role::Client, Some(server_by(0))), end(Role::Server, None)],
            air: VecDeque::new(),
            client_at: at("192.0.2.1:4000"),
        };
        world.end(Role::Client).session.probe(now);
        world.pass(SECOND);
        world
    }

    fn end(&mut self, role: Role) -> &mut End {
        &mut self.ends[role as usize]
    }

    fn push(&mut self, role: Role, vnet: VnetHeader, packet: &[u8]) {
        let now = self.now;
        let End { session, egress, wire, told, .. } = self.end(role);
        egress.push(session, wire, now, vnet, packet);
        egress.flush(session, wire);
        told.extend(std::iter::from_fn(|| egress.poll_told()));
        self.drain();
    }

    fn drain(&mut self) {
        let now = self.now;
        for role in [Role::Client, Role::Server] {
            let End { session, wire, sizes, .. } = &mut self.ends[role as usize];
            if session.poll_timeout().is_some_and(|at| at <= now) {
                session.handle_timeout(now);
            }
            while let Some(say) = session.poll_in_band() {
                egress::say(session, wire, now, &say);
            }
            while let Some(event) = session.poll_event() {
                if let Event::Path(PathEvent::Mtu { mtu }) = event {
                    sizes.push(mtu);
                }
            }
            for (path, datagram) in wire.out.take() {
                let there = match role {
                    Role::Client if path.carrier == 0 => self.client_at,
                    Role::Client => at(OTHER),
                    Role::Server if path.remote == self.client_at.remote => server_by(0),
                    Role::Server if path.remote == at(OTHER).remote => server_by(1),
                    // Strangers' datagrams lead nowhere.
                    Role::Server => continue,
                };
                self.air.push_back((now + DELAY, role.peer(), there, datagram));
            }
        }
    }

    /// Lets time pass, from one thing that happens to the next.
    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        self.drain();
        loop {
            let timers = self.ends.iter().filter_map(|end| end.session.poll_timeout());
            let next = timers.chain(self.air.front().map(|(at, ..)| *at)).min();
            let Some(next) = next.filter(|next| *next <= until) else { break };
            self.now = self.now.max(next);
            while self.air.front().is_some_and(|(at, ..)| *at <= self.now) {
                let Some((_, role, path, mut datagram)) = self.air.pop_front() else { break };
                let now = self.now;
                let end = self.end(role);
                if let Ok(Opened::Packet { text, .. }) = end.session.open(now, path, &mut datagram) {
                    end.arrived.push(datagram[text].to_vec());
                }
            }
            self.drain();
        }
        self.now = until;
    }

    /// A packet from each end every ten milliseconds.
    fn talk(&mut self, time: Duration, vnet: VnetHeader, packet: &[u8]) {
        let until = self.now + time;
        while self.now < until {
            self.push(Role::Client, vnet, packet);
            self.push(Role::Server, vnet, packet);
            self.pass(10 * MS);
        }
    }

    /// Until no search is under way.
    fn settle(&mut self) {
        self.talk(5 * SECOND, VnetHeader::default(), &udp(false, 100));
        self.ends.iter_mut().for_each(|end| {
            end.wire.pieces.set(0);
            end.arrived.clear();
        });
    }

    fn mtus(&self) -> [Option<usize>; 2] {
        [0, 1].map(|n| self.ends[n].session.mtu())
    }

    /// What was cut was sealed or dropped, at both ends.
    fn adds_up(&self) {
        for end in &self.ends {
            let traffic = end.session.traffic();
            assert_eq!(traffic.cut_packets, traffic.sent_packets, "{}", end.session.drops);
        }
    }
}

fn at(text: &str) -> Path {
    Path::new(text.parse().expect("an address"), None)
}

fn server_by(carrier: u8) -> Path {
    at("198.51.100.1:55555").by(carrier)
}

/// An IPv4 packet of `len` bytes.
fn packet(protocol: u8, dont_fragment: bool, len: usize) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, protocol, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1];
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet[6] = if dont_fragment { 0x40 } else { 0 };
    packet.resize(len, 0x5a);
    packet
}

fn udp(dont_fragment: bool, len: usize) -> Vec<u8> {
    let mut packet = packet(17, dont_fragment, len);
    packet[24..26].copy_from_slice(&(len as u16 - 20).to_be_bytes());
    packet
}

/// A super-packet of TCP segments that fill the device's MTU.
fn tcp(segments: usize) -> (VnetHeader, Vec<u8>) {
    let mut packet = packet(6, true, 40 + segments * (INNER - 40));
    packet[20..40]
        .copy_from_slice(&[0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    let vnet = VnetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 40,
        gso_size: (INNER - 40) as u16,
        csum_start: 20,
        csum_offset: 16,
    };
    (vnet, packet)
}

#[test]
fn a_wide_path_takes_two_probes_and_changes_nothing() {
    let mut world = World::new(1_472);
    world.settle();
    assert_eq!(world.mtus(), [Some(INNER); 2]);
    let (vnet, packet) = tcp(8);
    world.talk(60 * SECOND, vnet, &packet);
    for end in &world.ends {
        assert_eq!(end.session.narrow(), None);
        let sizes: Vec<usize> = end.wire.probes.borrow().iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes[..2], [1_200, INNER + OVERHEAD]);
        // And a confirmation each five seconds of traffic.
        assert!(sizes.len() <= 2 + 13, "{sizes:?}");
        assert!(end.arrived.iter().all(|packet| packet.len() == INNER));
        assert_eq!(end.wire.pieces.get(), 0);
    }
    world.adds_up();
}

#[test]
fn a_narrow_path_carries_tcp_in_segments_that_fit() {
    let mut world = World::new(NARROW);
    let (vnet, packet) = tcp(8);
    // As before, while nobody knows.
    world.push(Role::Client, vnet, &packet);
    world.pass(SECOND);
    assert_eq!(world.ends[1].arrived.len(), 8);
    assert_eq!(world.ends[0].wire.pieces.get(), 8);
    world.settle();
    for mtu in world.mtus() {
        let mtu = mtu.expect("known");
        assert!((FITS - 9..=FITS).contains(&mtu), "{mtu}");
    }
    world.talk(10 * SECOND, vnet, &packet);
    for end in &world.ends {
        assert_eq!(end.wire.pieces.get(), 0);
        // The last ones are still on their way.
        let payload: usize = end.arrived.iter().map(|packet| packet.len() - 40).sum();
        assert_eq!(payload, 1_000 * 8 * (INNER - 40));
    }
    world.adds_up();
}

#[test]
fn what_cannot_be_cut_is_fragmented_or_its_sender_told() {
    let mut world = World::new(NARROW);
    world.settle();
    let plain = VnetHeader::default();
    world.push(Role::Client, plain, &udp(false, INNER));
    world.pass(SECOND);
    let lens: Vec<usize> = world.ends[1].arrived.iter().map(Vec::len).collect();
    assert_eq!(lens.len(), 2, "{lens:?}");
    assert_eq!(world.ends[0].wire.pieces.get(), 0);
    world.adds_up();

    world.push(Role::Client, plain, &udp(true, INNER));
    world.pass(SECOND);
    // It arrives all the same, and whole.
    assert_eq!(world.ends[1].arrived.last().map(Vec::len), Some(INNER));
    assert_eq!(world.ends[0].wire.pieces.get(), 1);
    let told = world.ends[0].told.pop().expect("news for the sender");
    let mtu = usize::from(u16::from_be_bytes([told[26], told[27]]));
    assert_eq!((told[9], told[20], told[21]), (1, 3, 4), "fragmentation needed");
    assert_eq!((&told[12..16], &told[16..20]), (&[10, 9, 0, 1][..], &[10, 9, 0, 2][..]));
    assert_eq!(Some(mtu), world.mtus()[0]);
    // Not for each of a flood.
    for _ in 0..1_000 {
        world.push(Role::Client, plain, &udp(true, INNER));
        world.pass(MS);
    }
    assert!((20..=31).contains(&world.ends[0].told.len()), "{}", world.ends[0].told.len());
    world.adds_up();
}

#[test]
fn an_idle_session_probes_nothing() {
    for payload in [1_472, NARROW, 1_000] {
        let mut world = World::new(payload);
        world.pass(3_600 * SECOND);
        assert_eq!(world.ends[0].wire.probes.borrow().len(), 0);
        world.push(Role::Client, VnetHeader::default(), &udp(false, 100));
        world.pass(3_600 * SECOND);
        let probes = world.ends.each_ref().map(|end| end.wire.probes.borrow().len());
        assert_eq!(probes, [1, 0], "one for each time that data was sent");
    }
}

#[test]
fn a_path_that_shrinks_and_grows_is_followed_without_a_loss() {
    let mut world = World::new(1_472);
    world.settle();
    let (vnet, packet) = tcp(4);
    for end in &world.ends {
        end.wire.path.set(NARROW);
    }
    world.talk(8 * SECOND, vnet, &packet);
    for mtu in world.mtus() {
        assert!(mtu.is_some_and(|mtu| (FITS - 9..=FITS).contains(&mtu)), "{mtu:?}");
    }
    let payload = |world: &World, n: usize| -> usize {
        world.ends[n].arrived.iter().map(|packet| packet.len() - 40).sum()
    };
    let sent = 800 * 4 * (INNER - 40);
    assert_eq!((payload(&world, 0), payload(&world, 1)), (sent, sent));
    // Grown again: that is found within ten minutes of traffic.
    for end in &world.ends {
        end.wire.path.set(1_472);
    }
    for _ in 0..620 {
        world.push(Role::Client, vnet, &packet);
        world.push(Role::Server, vnet, &packet);
        world.pass(SECOND);
    }
    assert_eq!(world.mtus(), [Some(INNER); 2]);
    world.adds_up();
}

#[test]
fn after_an_outage_the_path_is_as_wide_as_before() {
    let mut world = World::new(1_472);
    world.settle();
    let (vnet, packet) = tcp(2);
    for end in &world.ends {
        end.wire.dead.set(true);
    }
    world.talk(90 * SECOND, vnet, &packet);
    for end in &world.ends {
        end.wire.dead.set(false);
    }
    world.talk(20 * SECOND, vnet, &packet);
    assert_eq!(world.mtus(), [Some(INNER); 2]);
}

#[test]
fn what_the_own_link_refuses_counts_as_never_sent() {
    let mut world = World::new(1_472);
    for end in &world.ends {
        end.wire.link.set(NARROW);
    }
    world.settle();
    for (end, mtu) in world.ends.iter().zip(world.mtus()) {
        assert!(mtu.is_some_and(|mtu| (FITS - 9..=FITS).contains(&mtu)), "{mtu:?}");
        assert_eq!(end.session.drops.to_string(), "nothing");
    }
    let (client, server) = (world.ends[0].session.traffic(), world.ends[1].session.traffic());
    assert_eq!(client.sent_in_band, server.received_in_band);
    assert_eq!(server.sent_in_band, client.received_in_band);
}

#[test]
fn nobody_is_probed_who_has_not_answered() {
    let mut world = World::new(1_472);
    world.settle();
    // Somebody sends the client's newest packet from elsewhere, and the server talks on.
    let now = world.now;
    let End { session, egress, wire, .. } = world.end(Role::Client);
    egress.push(session, wire, now, VnetHeader::default(), &udp(false, INNER));
    egress.flush(session, wire);
    let (_, mut copy) = world.ends[0].wire.out.take().pop().expect("a datagram");
    let evil = at("198.18.0.9:9");
    world.ends[1].session.open(now, evil, &mut copy).expect("authentic");
    for _ in 0..200 {
        world.push(Role::Server, VnetHeader::default(), &udp(false, 1_000));
        world.pass(10 * MS);
    }
    assert!(world.ends[1].wire.probes.borrow().iter().all(|(path, _)| path.remote != evil.remote));
}

#[test]
fn of_several_paths_in_use_the_narrowest_counts() {
    for (mode, shrunk) in [
        (Mode::Failover, INNER..=INNER),
        (Mode::Redundant, FITS - 9..=FITS),
        (Mode::Balance, FITS - 9..=FITS),
    ] {
        let mut world = World::new(1_472);
        let now = world.now;
        let client = &mut world.end(Role::Client).session;
        client.set_mode(now, mode);
        client.set_ways(now, &[server_by(0), server_by(1)]);
        world.pass(SECOND);
        world.settle();
        assert_eq!(world.mtus()[0], Some(INNER), "{mode:?}");
        // The other one shrinks later on, which only a confirmation tells.
        world.ends[0].wire.by.borrow_mut().insert(1, NARROW);
        let (vnet, packet) = tcp(2);
        world.talk(12 * SECOND, vnet, &packet);
        let mtu = world.mtus()[0].expect("known");
        assert!(shrunk.contains(&mtu), "{mode:?}: {mtu}");
    }
}
