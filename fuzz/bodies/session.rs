//! Two sessions between clients and their server in virtual time, and a network that does what the input says: loses,
//! reorders, copies, changes and redirects datagrams, cuts what is long, takes addresses away; ends that renew keys,
//! lose their control channel, lie, leave and begin anew.
//!
//! What must hold, whatever happens:
//!
//! - an inner packet is delivered at most once, byte for byte, to the other end of its own session and to nobody else;
//!   what was changed on the way, is of another session or goes back to its sender is not even authenticated
//! - to an address that hasn't answered a challenge goes at most three times of what came from there
//! - every packet taken in is sent or counted as dropped, and every datagram that came was delivered, dealt with or
//!   counted as dropped
//! - what is due is done: after `handle_timeout` the next deadline lies ahead
//! - two honest ends never call each other's messages out of place; and when the network is well again, packets get
//!   through, whatever strangers sent meanwhile

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use tunguard::config::common::Suite;
use tunguard::drops::{DropReason, Drops};
use tunguard::egress::{self, Egress, Outlet};
use tunguard::epochs::Limits;
use tunguard::ingress::Ingress;
use tunguard::inside;
use tunguard::keys::{Role, Secret};
use tunguard::path::{INSIDE, Path};
use tunguard::paths::Mode;
use tunguard::resume::ResumeSecret;
use tunguard::segment::checksum;
use tunguard::session::{Event, Session, Start};
use tunguard::sys::udp::{ReceiveBuffers, Received, Unsent};
use tunguard::time::Time;
use tunguard::wire::control::{self, Message, Reason, Settings};
use tunguard::wire::data::{self, HEADER_LEN, SessionId, TAG_LEN};
use tunguard::wire::inband::{InBand, MAX_LEN};
use tunguard::wire::vnet::{GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, VNET_LEN, VnetHeader};

use super::input::Input;

/// Runs the events that `data` describes, and checks all of the above.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    // Half a megabyte of zeros for each input would take longer than the rest.
    thread_local! {
        static BUFFERS: RefCell<Option<ReceiveBuffers>> = const { RefCell::new(None) };
    }
    let mut world = World::new(&mut input, BUFFERS.take().unwrap_or_default());
    let mut events = 0;
    while !input.is_empty() && events < MOST_EVENTS {
        world.event(&mut input);
        world.settle();
        events += 1;
    }
    if world.config.heals {
        world.heal();
    }
    world.check_books();
    BUFFERS.set(Some(world.buffers));
}

/// A datagram under way.
#[derive(Clone)]
struct Flying {
    from: Origin,
    /// The client's address, whichever way it goes.
    address: SocketAddr,
    ecn: u8,
    datagram: Vec<u8>,
    /// As it was sent.
    original: Vec<u8>,
    /// What was sealed, if it is in band.
    said: Option<InBand>,
}

/// Who sealed a datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Origin {
    pair: usize,
    /// Which session of the pair's.
    generation: u32,
    role: Role,
}

/// What travels in the control connection.
enum Item {
    Message(Vec<u8>),
    Datagram(Flying),
    /// The end of the connection.
    Closed,
}

/// A client and its server.
struct Pair {
    generation: u32,
    client: End,
    server: End,
    /// Numbers and addresses of the client's carriers, best first.
    carriers: Vec<(u8, SocketAddr)>,
    next_carrier: u8,
    /// To the client and to the server.
    control: [VecDeque<Item>; 2],
    /// Where the client's TCP connection comes from.
    tcp: SocketAddr,
    /// The client offers the control connection as a path.
    offers_inside: bool,
    /// Longer datagrams vanish if nobody may cut them, as do those that our own link doesn't take.
    mtu: usize,
    link: usize,
    /// One end said what it may not, or what isn't true.
    hostile: bool,
    vouched: Option<SocketAddr>,
    /// Addresses that answered, with the challenges that went there.
    validated: BTreeSet<SocketAddr>,
    asked: BTreeMap<SocketAddr, BTreeSet<[u8; 8]>>,
    /// Bytes from and to each address, as far as the server saw them authenticated and while it wasn't validated.
    heard: BTreeMap<SocketAddr, u64>,
    told: BTreeMap<SocketAddr, u64>,
}

struct End {
    session: Session,
    egress: Egress,
    ingress: Ingress,
    outlet: Wire,
    over: bool,
    control: bool,
    ended: bool,
    /// Packets taken from the device, by number; and those that were delivered.
    packets: BTreeMap<u32, (Vec<u8>, bool)>,
    delivered: BTreeSet<u32>,
    /// The bytes of super-packets by source port, and which of them were delivered.
    streams: BTreeMap<u16, (Vec<u8>, Vec<bool>)>,
    books: Books,
}

/// What the world knows of an end's packets, to be compared with what the end says.
#[derive(Default)]
struct Books {
    /// In-band messages that were to be sent, and packets sealed behind the data path's back.
    said: u64,
    sealed: u64,
    /// Datagrams that got out; probes that the kernel refused.
    out: u64,
    refused: u64,
    /// Counted as dropped when sending.
    drops: u64,
    /// Datagrams that came.
    came: u64,
    /// Of those, delivered as packets or dealt with.
    delivered: u64,
    in_band: u64,
    lost: u64,
}

struct World {
    now: Time,
    pairs: [Pair; 2],
    air: Vec<Flying>,
    next_id: u32,
    next_port: u16,
    next_secret: u8,
    buffers: ReceiveBuffers,
    config: Config,
}

#[derive(Clone, Copy)]
struct Config {
    suite: Suite,
    limits: Limits,
    linger: Duration,
    idle: Option<Duration>,
    inner_mtu: Option<u16>,
    vouches: bool,
    /// How the client uses several carriers, for as long as the session lasts.
    mode: Mode,
    /// Whether all is well in the end: not always, as that takes longer than the rest.
    heals: bool,
}

/// Where runs go out.
#[derive(Default)]
struct Wire {
    out: RefCell<Vec<(Path, u8, Vec<u8>)>>,
    refuses: Cell<Option<(DropReason, usize)>>,
    link: Cell<usize>,
    segments: Cell<usize>,
}

impl Outlet for Wire {
    fn send(&self, path: &Path, ecn: u8, datagrams: &[u8], stride: usize) -> Result<(), Unsent> {
        let all = datagrams.len().div_ceil(stride);
        assert!(all <= self.segments.get(), "a run of {all} datagrams");
        let (refused, most) = match self.refuses.take() {
            Some((reason, most)) => (Some(reason), most.min(all)),
            None => (None, all),
        };
        let out = datagrams.chunks(stride).take(most).map(|one| (*path, ecn, one.to_vec()));
        self.out.borrow_mut().extend(out);
        match refused.filter(|_| most < all) {
            Some(reason) => Err(Unsent { reason, datagrams: all - most }),
            None => Ok(()),
        }
    }

    fn send_whole(&self, path: &Path, datagram: &[u8]) -> Result<(), DropReason> {
        if datagram.len() > self.link.get() {
            return Err(DropReason::TooBig);
        }
        self.send(path, WHOLE, datagram, datagram.len()).map_err(|unsent| unsent.reason)
    }

    fn max_segments(&self) -> usize {
        self.segments.get()
    }
}

impl World {
    fn new(input: &mut Input<'_>, buffers: ReceiveBuffers) -> World {
        let mut config = Config {
            suite: input.pick(&Suite::ALL),
            limits: Limits {
                age: Duration::from_secs(input.pick(&[900, 60, 5])),
                packets: input.pick(&[1 << 30, 1_000, 20]),
            },
            linger: Duration::from_secs(input.pick(&[600, 30])),
            idle: input.pick(&[None, None, Some(Duration::from_secs(30))]),
            inner_mtu: input.pick(&[None, Some(1_420), Some(9_000)]),
            vouches: false,
            mode: Mode::Failover,
            heals: true,
        };
        let last = input.u8();
        (config.vouches, config.heals) = (last & 1 != 0, last & 6 == 0);
        config.mode = match last >> 3 & 3 {
            1 => Mode::Redundant,
            2 => Mode::Balance,
            _ => Mode::Failover,
        };
        let now = Time::default() + Duration::from_secs(1);
        World {
            now,
            pairs: [0, 1].map(|pair| Pair::new(config, now, pair as u8, 0, pair as u8)),
            air: Vec::new(),
            next_id: 0,
            next_port: 1,
            next_secret: 2,
            buffers,
            config,
        }
    }

    // -------------------------------------------------------------------------------------------- what happens

    fn event(&mut self, input: &mut Input<'_>) {
        let kind = input.u8();
        // The second pair is there to be mixed up with the first.
        let pair = usize::from(kind & 0x80 != 0 && kind & 0x40 != 0);
        let role = if kind & 0x40 != 0 { Role::Server } else { Role::Client };
        match kind & 0x3f {
            0..4 => self.push(pair, role, input),
            4..12 => {
                if !self.air.is_empty() {
                    let flying = self.air.remove(0);
                    self.arrive(flying);
                }
            }
            12..15 => self.arrive_some(input),
            15 => self.arrive_copy(input, |_, _| {}),
            16 => {
                if let Some(at) = self.some_flying(input) {
                    self.air.remove(at);
                }
            }
            17 => self.arrive_copy(input, |flying, input| {
                let at = usize::from(input.u16()) % flying.datagram.len();
                flying.datagram[at] ^= 1 << (input.u8() & 7);
            }),
            18 => self.arrive_copy(input, |flying, input| {
                let len = usize::from(input.u16()) % flying.datagram.len();
                flying.datagram.truncate(len.max(1));
            }),
            19..22 => self.arrive_copy(input, |flying, input| flying.address = stranger(input.u8())),
            22 => {
                // Overtaken: somebody on the path takes it and sends it from elsewhere.
                if let Some(at) = self.some_flying(input) {
                    let mut flying = self.air.remove(at);
                    flying.address = stranger(input.u8());
                    self.arrive(flying);
                }
            }
            23 => self.mix_up(input),
            24 => self.pass(Duration::from_millis(input.u8().into())),
            25..28 => self.pass_to_deadline(),
            28 => self.pass(Duration::from_millis(u64::from(input.u16()) * 4)),
            29 => {
                // Suspended: nothing is done in time.
                self.now = self.now + Duration::from_secs(u64::from(input.u16()) / 16);
            }
            30 | 31 => self.deliver_control(pair, role, input.u8() % 8 + 1),
            32 => self.rekey(pair, role),
            33 => self.end_now(pair, role, |end, now| end.session.probe(now)),
            34 => self.end_now(pair, role, |end, now| end.session.rebind(now)),
            35 => self.move_client(pair, input),
            36 => {
                // A NAT on the way forgets: nobody tells the client.
                let address = client_address(pair, input.u8());
                if let Some(carrier) = self.pairs[pair].carriers.first_mut() {
                    carrier.1 = address;
                }
            }
            37 | 38 => {
                self.pairs[pair].offers_inside ^= true;
                self.announce_ways(pair);
            }
            39 => self.lose_control(pair, input),
            40 => {
                self.pairs[pair].mtu = usize::from(input.u16()).max(600);
                self.pairs[pair].link = usize::from(input.u16()).max(1_280);
            }
            41 => {
                let reason =
                    input.pick(&[DropReason::SocketFull, DropReason::SendRefused, DropReason::TooBig]);
                let most = input.u8().into();
                self.end(pair, role).outlet.refuses.set(Some((reason, most)));
            }
            42 => self.hear_stranger(pair, role, input),
            43 => self.begin_anew(pair, input),
            44 => self.lie_on_control(pair, role, input),
            45..48 => self.lie_in_band(pair, role, input),
            48 => self.leave(pair, role, input),
            49 => {
                self.egress(pair, role, |end, _| end.egress.flush(&mut end.session, &end.outlet));
                self.end(pair, role).outlet.segments.set(usize::from(input.u8() % 64) + 1);
            }
            // The rest: a packet that flies and arrives at once, so that inputs needn't be long.
            _ => {
                self.push(pair, role, input);
                if let Some(flying) = self.air.pop() {
                    self.arrive(flying);
                }
            }
        }
    }

    fn end(&mut self, pair: usize, role: Role) -> &mut End {
        self.pairs[pair].end(role)
    }

    fn end_now(&mut self, pair: usize, role: Role, act: impl FnOnce(&mut End, Time)) {
        let now = self.now;
        let end = self.end(pair, role);
        if !end.over {
            act(end, now);
        }
    }

    /// The device gives a packet or a super-packet.
    fn push(&mut self, pair: usize, role: Role, input: &mut Input<'_>) {
        let (shape, size) = (input.u8(), input.u8());
        if self.end(pair, role).over {
            return;
        }
        let (vnet, packet) = if shape & 0x30 == 0x30 {
            self.super_packet(pair, role, shape, size)
        } else {
            self.packet(pair, role, shape, size)
        };
        self.egress(pair, role, |end, now| {
            let End { session, egress, outlet, .. } = end;
            egress.push(session, outlet, now, vnet, &packet);
            // Some runs are longer than a packet.
            if shape & 0x08 == 0 {
                egress.flush(session, outlet);
            }
            while let Some(news) = egress.poll_told() {
                assert!(tunguard::segment::addresses(&news).is_some(), "news that is no packet: {news:02x?}");
            }
        });
    }

    fn packet(&mut self, pair: usize, role: Role, shape: u8, size: u8) -> (VnetHeader, Vec<u8>) {
        let v6 = shape & 1 != 0;
        // Of somebody else: not to be delivered.
        let foreign = shape & 0x06 == 0x06;
        let partial = shape & 0x40 != 0;
        let id = self.next_id;
        self.next_id += 1;
        let mut payload = id.to_be_bytes().to_vec();
        payload.extend((0..usize::from(size) * 6).map(|i| (i as u32 ^ id) as u8));
        let transport_len = 8 + payload.len();
        let mut transport = vec![0x12, 0x34, 0, 53];
        transport.extend((transport_len as u16).to_be_bytes());
        transport.extend([0, 0]);
        transport.extend(payload);
        let packet = ip_packet(role, v6, foreign, 17, &transport, shape >> 6 & 3);
        let csum_start = if v6 { 40 } else { 20 };
        let vnet = match partial {
            true => VnetHeader { flags: NEEDS_CSUM, csum_start, csum_offset: 6, ..VnetHeader::default() },
            false => VnetHeader::default(),
        };
        if !foreign {
            self.end(pair, role).packets.insert(id, (packet.clone(), partial));
        }
        (vnet, packet)
    }

    fn super_packet(&mut self, pair: usize, role: Role, shape: u8, size: u8) -> (VnetHeader, Vec<u8>) {
        let v6 = shape & 1 != 0;
        let port = self.next_port;
        self.next_port += 1;
        let bytes: Vec<u8> = (0..usize::from(size) * 40 + 1).map(|i| (i ^ usize::from(port)) as u8).collect();
        let mut transport = port.to_be_bytes().to_vec();
        transport.extend([0x01, 0xbb, 0, 0, 0, 0, 0, 0, 0, 7, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
        let at = if v6 { 8..40 } else { 12..20 };
        transport.extend(&bytes);
        let whole = ip_packet(role, v6, false, 6, &transport, 0);
        let sum = checksum::fold(checksum::pseudo_header(&whole[at], 6, transport.len() as u32));
        transport[16..18].copy_from_slice(&sum.to_be_bytes());
        let packet = ip_packet(role, v6, false, 6, &transport, 0);
        let vnet = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: if v6 { GSO_TCPV6 } else { GSO_TCPV4 },
            gso_size: 200 + u16::from(shape & 0x0f) * 80,
            csum_start: if v6 { 40 } else { 20 },
            csum_offset: 16,
            ..VnetHeader::default()
        };
        let seen = vec![false; bytes.len()];
        self.end(pair, role).streams.insert(port, (bytes, seen));
        (vnet, packet)
    }

    fn some_flying(&self, input: &mut Input<'_>) -> Option<usize> {
        (!self.air.is_empty()).then(|| input.place(self.air.len()))
    }

    fn arrive_some(&mut self, input: &mut Input<'_>) {
        if let Some(at) = self.some_flying(input) {
            let flying = self.air.remove(at);
            self.arrive(flying);
        }
    }

    /// One of those under way arrives, changed, and stays under way as it is.
    fn arrive_copy(&mut self, input: &mut Input<'_>, change: impl FnOnce(&mut Flying, &mut Input<'_>)) {
        if let Some(at) = self.some_flying(input) {
            let mut copy = self.air[at].clone();
            change(&mut copy, input);
            self.arrive(copy);
        }
    }

    /// A datagram gets to an end that it isn't for, as it is or with that session's ID.
    fn mix_up(&mut self, input: &mut Input<'_>) {
        let Some(at) = self.some_flying(input) else { return };
        let mut copy = self.air[at].clone();
        let pair = input.place(2);
        let role = input.pick(&[Role::Client, Role::Server]);
        if input.u8() & 1 != 0 {
            let id = self.pairs[pair].client.session.id();
            copy.datagram[data::SESSION_ID].copy_from_slice(&id.0);
        }
        let path = match role {
            Role::Server => Path::new(copy.address, None),
            Role::Client => server_by(self.pairs[pair].carriers.first().map_or(0, |(carrier, _)| *carrier)),
        };
        self.open(pair, role, path, &copy);
    }

    /// Bytes that nobody has sealed.
    fn hear_stranger(&mut self, pair: usize, role: Role, input: &mut Input<'_>) {
        let address = stranger(input.u8());
        let mut datagram = input.chunk().to_vec();
        if datagram.len() >= 8 && input.u8() & 1 != 0 {
            datagram[data::SESSION_ID].copy_from_slice(&self.end(pair, role).session.id().0);
        }
        if datagram.is_empty() {
            return;
        }
        let from = Origin { pair: usize::MAX, generation: 0, role: role.peer() };
        let flying = Flying { from, address, ecn: 0, original: Vec::new(), datagram, said: None };
        self.open(
            pair,
            role,
            if role == Role::Client { server_by(0) } else { Path::new(address, None) },
            &flying,
        );
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        // A machine that is slow does less often what is due.
        for _ in 0..MOST_DEADLINES {
            match self.next_deadline() {
                Some(at) if at < until => self.now = self.now.max(at),
                _ => break,
            }
            self.settle();
        }
        self.now = self.now.max(until);
    }

    fn pass_to_deadline(&mut self) {
        if let Some(at) = self.next_deadline() {
            self.now = self.now.max(at);
        }
    }

    fn next_deadline(&self) -> Option<Time> {
        let ends = self.pairs.iter().flat_map(Pair::ends);
        ends.filter(|end| !end.over).filter_map(|end| end.session.poll_timeout()).min()
    }

    fn rekey(&mut self, pair: usize, role: Role) {
        self.end_now(pair, role, |end, _| end.session.rekey());
    }

    /// The client's links change, and it says so.
    fn move_client(&mut self, pair: usize, input: &mut Input<'_>) {
        let plan = input.u8();
        let own = &mut self.pairs[pair];
        match plan & 3 {
            0 => own.carriers.clear(),
            1 => own.carriers.reverse(),
            2 => {
                own.carriers.pop();
            }
            _ => {}
        }
        if plan & 3 != 1 && own.carriers.len() < 3 {
            own.carriers.insert(0, (own.next_carrier, client_address(pair, plan >> 2)));
            own.next_carrier = (own.next_carrier + 1) % INSIDE;
        }
        self.announce_ways(pair);
    }

    fn announce_ways(&mut self, pair: usize) {
        let own = &self.pairs[pair];
        let mut ways: Vec<Path> = own.carriers.iter().map(|(carrier, _)| server_by(*carrier)).collect();
        if own.offers_inside && own.client.control {
            ways.push(inside::path(server_address()));
        }
        self.end_now(pair, Role::Client, |end, now| end.session.set_ways(now, &ways));
    }

    fn deliver_control(&mut self, pair: usize, to: Role, most: u8) {
        for _ in 0..most {
            let Some(item) = self.pairs[pair].control[to as usize].pop_front() else { return };
            let now = self.now;
            let hostile = self.pairs[pair].hostile;
            if self.end(pair, to).over || !self.end(pair, to).control {
                continue;
            }
            match item {
                Item::Message(bytes) => {
                    let (message, used) = control::decode(&bytes).expect("our own").expect("whole");
                    assert_eq!(used, bytes.len());
                    if let Err(reason) = self.end(pair, to).session.handle_message(now, message) {
                        assert!(hostile, "an honest message was out of place");
                        self.say_goodbye(pair, to, reason);
                    }
                }
                Item::Datagram(flying) => {
                    let peer = if to == Role::Client { server_address() } else { self.pairs[pair].tcp };
                    self.end(pair, to).session.came_inside();
                    self.open(pair, to, inside::path(peer), &flying);
                }
                Item::Closed => self.lose_end_of_control(pair, to),
            }
            self.settle();
        }
    }

    fn lose_control(&mut self, pair: usize, input: &mut Input<'_>) {
        self.pairs[pair].control = [VecDeque::new(), VecDeque::new()];
        // Both notice at once, or one of them some time later.
        for (role, bit) in [(Role::Client, 1), (Role::Server, 2)] {
            if self.end(pair, role).control {
                self.pairs[pair].control[role as usize].push_back(Item::Closed);
            }
            if input.u8() & bit == 0 {
                self.deliver_control(pair, role, 1);
            }
        }
    }

    fn lose_end_of_control(&mut self, pair: usize, role: Role) {
        self.end(pair, role).control = false;
        self.end_now(pair, role, |end, now| end.session.handle_control_lost(now));
        if role == Role::Client {
            self.announce_ways(pair);
        }
    }

    /// A session ends at one end, which says so.
    fn say_goodbye(&mut self, pair: usize, role: Role, reason: Reason) {
        self.end_now(pair, role, |end, _| end.session.leave(reason));
        self.settle();
        self.close(pair, role);
    }

    fn leave(&mut self, pair: usize, role: Role, input: &mut Input<'_>) {
        let reason = Reason::from_code(input.u8() % 13).expect("a code");
        // Once a run at most, or most of it would be silence.
        if input.u8() & 3 == 3 && !self.end(pair, role).over {
            self.say_goodbye(pair, role, reason);
        }
    }

    fn close(&mut self, pair: usize, role: Role) {
        let end = self.end(pair, role);
        end.over = true;
        if std::mem::take(&mut end.control) {
            self.pairs[pair].control[role.peer() as usize].push_back(Item::Closed);
        }
    }

    /// The client dials again: a session with an ID, keys and a secret of its own. What is under way of the old one is
    /// of no use any more.
    fn begin_anew(&mut self, pair: usize, input: &mut Input<'_>) {
        self.check_books_of(pair);
        let old = &self.pairs[pair];
        let secret = ResumeSecret::from_bytes([old.generation as u8; 32]);
        let (id, binding): (_, [u8; 32]) = (old.client.session.id(), [7; 32]);
        let mut proof = secret.proof(id, &binding);
        assert!(secret.proves(id, &binding, &proof));
        proof[input.place(32)] ^= 1 << (input.u8() & 7);
        assert!(!secret.proves(id, &binding, &proof), "a proof that isn't one");
        let generation = old.generation + 1;
        let seed = self.next_secret;
        self.next_secret = self.next_secret.wrapping_add(1).max(2);
        self.pairs[pair] = Pair::new(self.config, self.now, pair as u8, generation, seed);
    }

    /// One end says on the control channel what comes into its head.
    fn lie_on_control(&mut self, pair: usize, to: Role, input: &mut Input<'_>) {
        let message = match input.u8() % 8 {
            0 => Message::Ping(input.u64()),
            1 => Message::Pong(input.u64()),
            2 => Message::Rekey { epoch: input.u8().into(), public: input.array() },
            3 => Message::RekeyDone { epoch: input.u8().into() },
            4 => Message::Update(Settings { idle: Some(input.u32()), ..Settings::default() }),
            5 => Message::Notice(String::from_utf8_lossy(input.chunk()).into_owned()),
            6 => Message::Bye(Reason::from_code(input.u8() % 13).expect("a code")),
            _ => match control::decode(input.chunk()) {
                Ok(Some((message, _))) => message,
                _ => return,
            },
        };
        self.pairs[pair].hostile = true;
        let now = self.now;
        let end = self.end(pair, to);
        if !end.over
            && end.control
            && let Err(reason) = end.session.handle_message(now, message)
        {
            self.say_goodbye(pair, to, reason);
        }
    }

    /// One end seals what comes into its head, and sends it from where it likes.
    fn lie_in_band(&mut self, pair: usize, role: Role, input: &mut Input<'_>) {
        let at = input.u8();
        let own = &self.pairs[pair];
        let address = match at & 1 {
            0 => own.carriers.first().map_or(stranger(at), |(_, address)| *address),
            _ => stranger(at),
        };
        // A challenge that went anywhere at all.
        let challenges: Vec<[u8; 8]> = own.asked.values().flatten().copied().collect();
        let nonce = match challenges.is_empty() {
            true => input.array(),
            false => challenges[input.place(challenges.len())],
        };
        let mut text = [0; MAX_LEN];
        let len = match input.u8() % 4 {
            0 => InBand::PathResponse(nonce, address).emit(&mut text),
            1 => InBand::PathChallenge(input.array()).emit(&mut text),
            _ => {
                let bytes = input.bytes(MAX_LEN);
                text[..bytes.len()].copy_from_slice(bytes);
                bytes.len()
            }
        };
        self.pairs[pair].hostile = true;
        let now = self.now;
        let from = self.pairs[pair].origin(pair, role);
        let end = self.end(pair, role);
        if end.over {
            return;
        }
        let padding = usize::from(at) * 4;
        let mut datagram = vec![0; HEADER_LEN + len + padding + TAG_LEN];
        datagram[HEADER_LEN..][..len].copy_from_slice(&text[..len]);
        if end.session.seal(now, data::CONTROL, &mut datagram).is_err() {
            return;
        }
        end.books.sealed += 1;
        let said = InBand::parse(&[&text[..len], &vec![0; padding]].concat());
        self.fly(Flying { from, address, ecn: 0, original: datagram.clone(), datagram, said });
    }

    // ----------------------------------------------------------------------------------- what follows from that

    /// Does what is due, and takes what the ends have to say.
    fn settle(&mut self) {
        for pair in 0..self.pairs.len() {
            for role in [Role::Client, Role::Server] {
                self.settle_end(pair, role);
            }
        }
    }

    fn settle_end(&mut self, pair: usize, role: Role) {
        let now = self.now;
        for round in 0.. {
            if self.end(pair, role).over {
                return;
            }
            let due = self.end(pair, role).session.poll_timeout().is_some_and(|at| at <= now);
            assert!(round < MOST_ROUNDS || !due, "the {role:?}'s deadline stays in the past");
            let end = self.end(pair, role);
            if due || end.session.rekey_due(now) {
                end.session.handle_timeout(now);
            }
            self.drain(pair, role);
            if !due {
                return;
            }
        }
    }

    fn drain(&mut self, pair: usize, role: Role) {
        while let Some(message) = self.end(pair, role).session.poll_message() {
            let end = self.end(pair, role);
            let bytes = control::encode(&message).expect("a message of our own");
            if end.control {
                self.pairs[pair].control[role.peer() as usize].push_back(Item::Message(bytes));
            }
        }
        while let Some(say) = self.end(pair, role).session.poll_in_band() {
            let own = &mut self.pairs[pair];
            if let (Role::Server, InBand::PathChallenge(nonce)) = (role, say.message) {
                own.asked.entry(say.path.remote).or_default().insert(nonce);
            }
            own.end(role).books.said += 1;
            let link = own.link;
            let mut refused = false;
            self.egress_of(pair, role, Some(say.message), |end, now| {
                end.outlet.link.set(link);
                let before = end.session.traffic().sent_in_band;
                let drops = end.session.drops;
                egress::say(&mut end.session, &end.outlet, now, &say);
                // The kernel's word on a probe is neither a loss nor a datagram.
                refused = end.session.traffic().sent_in_band == before && end.session.drops == drops;
            });
            self.end(pair, role).books.refused += u64::from(refused);
        }
        while let Some(event) = self.end(pair, role).session.poll_event() {
            if let Event::Ended { .. } = event {
                let end = self.end(pair, role);
                assert!(!std::mem::replace(&mut end.ended, true), "it ended twice");
                self.close(pair, role);
            }
        }
    }

    fn egress(&mut self, pair: usize, role: Role, act: impl FnOnce(&mut End, Time)) {
        self.egress_of(pair, role, None, act);
    }

    /// Lets an end send, and puts on its way what got out.
    fn egress_of(&mut self, pair: usize, role: Role, said: Option<InBand>, act: impl FnOnce(&mut End, Time)) {
        let now = self.now;
        let from = self.pairs[pair].origin(pair, role);
        let end = self.end(pair, role);
        let before = total(&end.session.drops);
        act(end, now);
        end.outlet.refuses.set(None);
        end.books.drops += total(&end.session.drops) - before;
        let out = end.outlet.out.take();
        end.books.out += out.len() as u64;
        for (path, ecn, datagram) in out {
            self.depart(from, path, ecn, datagram, said);
        }
    }

    fn depart(&mut self, from: Origin, path: Path, ecn: u8, datagram: Vec<u8>, said: Option<InBand>) {
        let own = &mut self.pairs[from.pair];
        let (whole, ecn) = (ecn == WHOLE, ecn & 3);
        let address = match from.role {
            Role::Client => {
                assert_eq!(path.remote, server_address(), "the client sends to a stranger");
                own.carriers.iter().find(|(carrier, _)| *carrier == path.carrier).map(|(_, a)| *a)
            }
            Role::Server => Some(path.remote),
        };
        let flying = |address| Flying {
            from,
            address,
            ecn,
            original: datagram.clone(),
            datagram: datagram.clone(),
            said,
        };
        if path.carrier == INSIDE {
            if own.end(from.role).control {
                let address = own.tcp;
                own.control[from.role.peer() as usize].push_back(Item::Datagram(flying(address)));
            }
            return;
        }
        let Some(address) = address else { return };
        if from.role == Role::Server {
            own.count_told(address, datagram.len());
            // To somebody who isn't there (any more).
            if !own.carriers.iter().any(|(_, a)| *a == address) {
                return;
            }
        }
        if !(whole && datagram.len() > own.mtu) {
            self.fly(flying(address));
        }
    }

    fn fly(&mut self, flying: Flying) {
        self.air.push(flying);
        // The network holds only so many.
        if self.air.len() > MOST_FLYING {
            self.air.remove(0);
        }
    }

    /// A datagram gets where it was sent, if that end is still there.
    fn arrive(&mut self, flying: Flying) {
        let Origin { pair, generation, role } = flying.from;
        if self.pairs[pair].generation != generation {
            // The next session of the same client has the same addresses, and another ID.
            let path = Path::new(flying.address, None);
            return self.open(pair, role.peer(), path, &flying);
        }
        let path = match role {
            Role::Client => Path::new(flying.address, None),
            Role::Server => {
                let carriers = &self.pairs[pair].carriers;
                let Some((carrier, _)) = carriers.iter().find(|(_, a)| *a == flying.address) else { return };
                server_by(*carrier)
            }
        };
        self.open(pair, role.peer(), path, &flying);
    }

    /// What an end makes of a datagram.
    fn open(&mut self, pair: usize, role: Role, path: Path, flying: &Flying) {
        let now = self.now;
        if self.end(pair, role).over {
            return;
        }
        let genuine =
            flying.from == self.pairs[pair].origin(pair, role.peer()) && flying.datagram == flying.original;
        let buffers = &mut self.buffers;
        let own = &mut self.pairs[pair];
        let (client, server) = (&mut own.client, &mut own.server);
        let (end, peer) = if role == Role::Client { (client, server) } else { (server, client) };

        let len = flying.datagram.len();
        buffers[0][..len].copy_from_slice(&flying.datagram);
        let received = Received { buffer: 0, len, stride: len, path, ecn: flying.ecn };
        let (drops, traffic) = (end.session.drops, end.session.traffic());
        end.ingress.open(&mut end.session, role, now, &received, &mut buffers[0]);
        let mut written = 0;
        end.ingress.write_out(&mut end.session, buffers, false, |parts| {
            let whole: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
            assert!(genuine, "a packet was delivered that nobody sent here");
            peer.check_delivery(&whole);
            written += 1;
            Ok(())
        });

        end.books.came += 1;
        let lost = total(&end.session.drops) - total(&drops);
        let packets = end.session.traffic().received_packets - traffic.received_packets;
        let in_band = end.session.traffic().received_in_band - traffic.received_in_band;
        assert_eq!(packets, written);
        assert_eq!(lost + packets + in_band, 1, "of one datagram");
        end.books.lost += lost;
        end.books.delivered += packets;
        end.books.in_band += in_band;
        let authentic = NOT_AUTHENTIC.iter().all(|r| end.session.drops.get(*r) == drops.get(*r));
        assert!(genuine || !authentic, "what nobody sent here was taken for genuine");
        if role == Role::Server && authentic && path.carrier != INSIDE {
            *own.heard.entry(path.remote).or_default() += len as u64;
            if let Some(InBand::PathResponse(nonce, _)) = flying.said
                && own.asked.get(&path.remote).is_some_and(|nonces| nonces.contains(&nonce))
            {
                own.validated.insert(path.remote);
            }
        }
        // As the shells do, before anything else happens.
        self.settle_end(pair, role);
    }

    // ------------------------------------------------------------------------------------------ and in the end

    /// The network is well, nobody lies: two honest ends that still have their session find each other.
    fn heal(&mut self) {
        self.air.clear();
        for pair in 0..self.pairs.len() {
            let own = &mut self.pairs[pair];
            (own.mtu, own.link) = (65_535, 65_535);
            own.carriers = vec![(own.next_carrier, client_address(pair, 77))];
            own.next_carrier += 1;
            for end in [&mut own.client, &mut own.server] {
                end.outlet.refuses.set(None);
            }
            self.announce_ways(pair);
        }
        let well = self.now + HEALING;
        for _ in 0..MOST_TURNS {
            // What is answered is answered at once.
            for _ in 0..20 {
                self.settle();
                for pair in 0..self.pairs.len() {
                    self.deliver_control(pair, Role::Client, u8::MAX);
                    self.deliver_control(pair, Role::Server, u8::MAX);
                }
                if self.air.is_empty() {
                    break;
                }
                for flying in std::mem::take(&mut self.air) {
                    self.arrive(flying);
                }
            }
            if self.now >= well {
                break;
            }
            let next = self.next_deadline().unwrap_or(well).min(well);
            self.now = self.now.max(next);
        }
        for pair in 0..self.pairs.len() {
            let both = |own: &Pair| !own.hostile && !own.client.over && !own.server.over;
            if !both(&self.pairs[pair]) {
                continue;
            }
            for role in [Role::Client, Role::Server] {
                let before = self.end(pair, role.peer()).books.delivered;
                // Of several paths in use one may lead nowhere, which only packets tell.
                let mut through = false;
                for _ in 0..40 {
                    self.push(pair, role, &mut Input::new(&[0, 9]));
                    for _ in 0..4 {
                        for flying in std::mem::take(&mut self.air) {
                            self.arrive(flying);
                        }
                        self.deliver_control(pair, Role::Client, u8::MAX);
                        self.deliver_control(pair, Role::Server, u8::MAX);
                    }
                    through = self.end(pair, role.peer()).books.delivered > before;
                    if through {
                        break;
                    }
                    self.pass(Duration::from_millis(100));
                }
                // Without a control channel keys are not renewed; and where it broke off amid that, one end may have
                // closed the epoch that the other goes on with.
                let own = &self.pairs[pair];
                let apart = own.client.session.epoch() != own.server.session.epoch();
                let expired = own
                    .ends()
                    .any(|end| !end.control && (apart || end.session.drops.get(DropReason::KeysExpired) > 0));
                assert!(
                    through || expired || !both(&self.pairs[pair]),
                    "nothing gets through from the {role:?} when all is well again: {}",
                    self.pairs[pair]
                );
            }
        }
    }

    fn check_books(&mut self) {
        for pair in 0..self.pairs.len() {
            self.check_books_of(pair);
        }
    }

    fn check_books_of(&mut self, pair: usize) {
        for role in [Role::Client, Role::Server] {
            self.egress(pair, role, |end, _| end.egress.flush(&mut end.session, &end.outlet));
            let end = self.end(pair, role);
            let (books, traffic) = (&end.books, end.session.traffic());
            assert_eq!(
                traffic.cut_packets + books.said + traffic.copies,
                books.out + books.drops + books.refused,
                "the {role:?}'s books: {traffic}, dropped {}",
                end.session.drops
            );
            assert_eq!(books.came, books.delivered + books.in_band + books.lost);
            assert_eq!(total(&end.session.drops), books.drops + books.lost);
            assert!(traffic.sent_packets <= traffic.cut_packets + books.sealed);
        }
    }
}

impl Pair {
    fn new(config: Config, now: Time, pair: u8, generation: u32, seed: u8) -> Pair {
        let first = client_address(pair.into(), generation as u8 & 7);
        let vouched = config.vouches.then_some(first);
        let end = |role, dialled, vouched: Option<SocketAddr>| {
            let id = SessionId::new(pair.into(), [seed, generation as u8, 3, 4, 5, 6]);
            let start = Start {
                role,
                id,
                suite: config.suite,
                secret: Secret::from_bytes([seed; 32]),
                limits: config.limits,
                inner: vec![
                    "10.9.0.2/32".parse().expect("a network"),
                    "fd09::2/128".parse().expect("a network"),
                ],
                linger: config.linger,
                dialled,
                vouched: vouched.map(|address| address.ip()),
            };
            let mut session = Session::new(start, now).expect("a session");
            if let Some(mtu) = config.inner_mtu {
                session.set_mtu(mtu);
            }
            session.set_idle(config.idle);
            End::new(session)
        };
        let mut client = end(Role::Client, Some(server_by(0)), None);
        client.session.set_mode(now, config.mode);
        client.session.probe(now);
        Pair {
            generation,
            client,
            server: end(Role::Server, None, vouched),
            carriers: vec![(0, first)],
            next_carrier: 1,
            control: [VecDeque::new(), VecDeque::new()],
            tcp: SocketAddr::new(first.ip(), 40_000),
            offers_inside: false,
            mtu: 1_500,
            link: 1_500,
            hostile: false,
            vouched,
            validated: BTreeSet::new(),
            asked: BTreeMap::new(),
            heard: BTreeMap::new(),
            told: BTreeMap::new(),
        }
    }

    fn end(&mut self, role: Role) -> &mut End {
        match role {
            Role::Client => &mut self.client,
            Role::Server => &mut self.server,
        }
    }

    fn ends(&self) -> impl Iterator<Item = &End> {
        [&self.client, &self.server].into_iter()
    }

    fn origin(&self, pair: usize, role: Role) -> Origin {
        Origin { pair, generation: self.generation, role }
    }

    /// The server sends to `address`.
    fn count_told(&mut self, address: SocketAddr, bytes: usize) {
        let vouched = self.vouched.is_some_and(|vouched| vouched.ip() == address.ip());
        if vouched || self.validated.contains(&address) {
            return;
        }
        let told = self.told.entry(address).or_default();
        *told += bytes as u64;
        let heard = self.heard.get(&address).copied().unwrap_or(0);
        assert!(*told <= heard * 3, "{told} bytes to {address}, of which {heard} came");
    }
}

/// Where the ends take each other to be, where an assertion fails.
impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the client's carriers {:?}", self.carriers)?;
        for (role, end) in [(Role::Client, &self.client), (Role::Server, &self.server)] {
            let session = &end.session;
            writeln!(f, "{role:?}: epoch {}, dropped {}", session.epoch(), session.drops)?;
            session.paths().iter().try_for_each(|known| writeln!(f, "  {known:?}"))?;
        }
        Ok(())
    }
}

impl End {
    fn new(session: Session) -> End {
        let outlet = Wire::default();
        outlet.segments.set(64);
        End {
            session,
            egress: Egress::default(),
            ingress: Ingress::default(),
            outlet,
            over: false,
            control: true,
            ended: false,
            packets: BTreeMap::new(),
            delivered: BTreeSet::new(),
            streams: BTreeMap::new(),
            books: Books::default(),
        }
    }

    /// The other end writes this to its device: did we take it from ours, and for the first time?
    fn check_delivery(&mut self, written: &[u8]) {
        let vnet = VnetHeader::parse(written).expect("a virtio header");
        let packet = &written[VNET_LEN..];
        let (at, protocol) = match packet[0] >> 4 {
            4 => (20, packet[9]),
            _ => (40, packet[6]),
        };
        if protocol == 17 {
            let id = packet[at + 8..].first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
            let id = id.expect("a number");
            let (sent, partial) = self.packets.get(&id).expect("a packet that was never sent");
            assert!(sent == packet, "a packet was changed");
            assert_eq!(*partial, vnet.needs_csum());
            assert!(self.delivered.insert(id), "a packet was delivered twice");
            return;
        }
        let port = u16::from_be_bytes([packet[at], packet[at + 1]]);
        let from = packet[at + 4..].first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
        let from = from.expect("a sequence number") as usize;
        let payload = &packet[at + 20..];
        let (bytes, seen) = self.streams.get_mut(&port).expect("a stream that was never sent");
        assert!(bytes[from..].starts_with(payload), "a stream was changed");
        for place in &mut seen[from..from + payload.len()] {
            assert!(!std::mem::replace(place, true), "a segment was delivered twice");
        }
        assert!(at == 40 || checksum::fold(checksum::sum(&packet[..20])) == 0xffff, "a bad IPv4 header");
    }
}

/// An IP packet that nobody may fragment.
fn ip_packet(role: Role, v6: bool, foreign: bool, protocol: u8, transport: &[u8], ecn: u8) -> Vec<u8> {
    let host = if foreign { 9 } else { 2 };
    let mut packet = Vec::with_capacity(40 + transport.len());
    if v6 {
        packet.extend([0x60, ecn << 4, 0, 0]);
        packet.extend((transport.len() as u16).to_be_bytes());
        packet.extend([protocol, 64]);
        let ip = |last| [0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
        let (client, server) = (ip(host), ip(1));
        packet.extend(if role == Role::Client { [client, server] } else { [server, client] }.concat());
    } else {
        packet.extend([0x45, ecn]);
        packet.extend(((20 + transport.len()) as u16).to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
        let (client, server) = ([10, 9, 0, host], [10, 9, 0, 1]);
        packet.extend(if role == Role::Client { [client, server] } else { [server, client] }.concat());
        let sum = checksum::finish(checksum::sum(&packet));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet.extend(transport);
    packet
}

fn total(drops: &Drops) -> u64 {
    drops.nonzero().map(|(_, packets)| packets).sum()
}

fn server_address() -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 1], 55_555))
}

fn server_by(carrier: u8) -> Path {
    Path::new(server_address(), None).by(carrier)
}

/// A few addresses, so that they come again.
fn client_address(pair: usize, n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, pair as u8], 4_000 + u16::from(n)))
}

/// Of somebody on the way.
fn stranger(n: u8) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, n & 7], 9))
}

/// What an unauthenticated datagram is dropped as.
const NOT_AUTHENTIC: [DropReason; 8] = [
    DropReason::TooShort,
    DropReason::Flags,
    DropReason::WrongSession,
    DropReason::UnknownEpoch,
    DropReason::Duplicate,
    DropReason::TooOld,
    DropReason::BadTag,
    DropReason::KeysExpired,
];
/// No ECN bits: marks a datagram that nobody may cut.
const WHOLE: u8 = 0x80;
const MOST_EVENTS: usize = 400;
const MOST_FLYING: usize = 40;
const MOST_ROUNDS: usize = 16;
const MOST_DEADLINES: usize = 60;
/// Longer than anything waits before it tries again.
const HEALING: Duration = Duration::from_secs(70);
const MOST_TURNS: usize = 1_000;
