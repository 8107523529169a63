//! A mix of traffic through one session: TCP, UDP and pings, in both directions and both families at once, all of it
//! checked byte for byte.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ring::digest::{SHA256, digest};
use socket2::{Domain, Protocol, Socket, Type};

use crate::books::{drops_of, socket_inode};
use crate::lab::{INNER_V4, INNER_V6, Lab, Namespace, PATIENCE, ip};
use crate::traffic::{Noise, transfer, udp_to};

/// How much there is to be of it.
#[derive(Clone, Copy)]
pub struct Amount {
    /// It goes on until then, and until there was some of everything.
    pub until: Instant,
    /// Of each TCP transfer, in each direction.
    pub tcp_bytes: usize,
    /// Pause between the turns in which each UDP stream sends.
    pub tick: Duration,
}

/// What came of one session's traffic.
pub struct Outcome {
    /// TCP connections, each with equal digests at both ends.
    pub transfers: u64,
    /// UDP streams; their last datagrams may still be in the sockets.
    pub streams: Vec<Stream>,
    /// Pings from the client, and from the server.
    pub pings: [Pings; 2],
}

/// Lets so many do something at once.
pub struct Turns {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Turns {
    /// For `free` at once.
    pub fn new(free: usize) -> Turns {
        Turns { free: Mutex::new(free), freed: Condvar::new() }
    }

    fn take(&self) -> Turn<'_> {
        let free = self.free.lock().expect("nobody panics with it");
        *self.freed.wait_while(free, |free| *free == 0).expect("nobody panics with it") -= 1;
        Turn(self)
    }
}

/// Given back when it goes, by a panic as well.
struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().expect("nobody panics with it") += 1;
        self.0.freed.notify_one();
    }
}

/// Sends the mix through session `n` of the lab.
pub fn mix(lab: &Lab, n: usize, amount: Amount, turns: &Turns) -> Outcome {
    let ends = Ends::of(lab, n);
    thread::scope(|scope| {
        let tcp = scope.spawn(|| ends.transfers(amount, turns));
        let udp = scope.spawn(|| ends.streams(amount));
        let pings = scope.spawn(|| ends.pings(amount));
        let outcome = (tcp.join(), udp.join(), pings.join());
        let (Ok(transfers), Ok(streams), Ok(pings)) = outcome else {
            panic!("traffic of session {n} failed, see above")
        };
        Outcome { transfers, streams, pings }
    })
}

/// The two ends of a session, by family: IPv4, IPv6.
struct Ends {
    n: usize,
    client: Namespace,
    server: Namespace,
    client_at: [IpAddr; 2],
    server_at: [IpAddr; 2],
}

impl Ends {
    fn of(lab: &Lab, n: usize) -> Ends {
        Ends {
            n,
            client: lab.c(n),
            server: lab.srv(),
            client_at: [lab.inner_v4(n), lab.inner_v6(n)],
            server_at: [ip(INNER_V4), ip(INNER_V6)],
        }
    }

    /// From whom to whom: each direction in each family.
    fn ways(&self) -> [(bool, &Namespace, &Namespace, IpAddr); 4] {
        let up = |family: usize| (true, &self.client, &self.server, self.server_at[family]);
        let down = |family: usize| (false, &self.server, &self.client, self.client_at[family]);
        [up(0), down(1), up(1), down(0)]
    }

    /// One connection after the other, each with data both ways.
    fn transfers(&self, amount: Amount, turns: &Turns) -> u64 {
        let mut done = 0;
        for (_, from, to, address) in self.ways().into_iter().cycle() {
            if done >= 4 && Instant::now() >= amount.until {
                break;
            }
            let _turn = turns.take();
            transfer(from, to, address, amount.tcp_bytes);
            done += 1;
        }
        done
    }

    fn streams(&self, amount: Amount) -> Vec<Stream> {
        let ways = self.ways().into_iter().enumerate();
        let mut streams: Vec<Stream> =
            ways.map(|(i, (up, from, to, at))| Stream::new(self.n * 4 + i, up, (from, to), at)).collect();
        let deadline = amount.until + PATIENCE;
        let mut turn = 0;
        while Instant::now() < amount.until || streams.iter().any(|s| s.arrived() < SOME) {
            let missing: Vec<String> = streams.iter().map(ToString::to_string).collect();
            assert!(Instant::now() < deadline, "session {}: too little arrives: {missing:#?}", self.n);
            turn += 1;
            for stream in &mut streams {
                // Now and then many at once, so that runs and super-packets come about.
                for _ in 0..if turn % 8 == 0 { BURST } else { 1 } {
                    stream.send();
                }
                stream.receive();
            }
            thread::sleep(amount.tick);
        }
        streams
    }

    fn pings(&self, amount: Amount) -> [Pings; 2] {
        let mut sum = [Pings::default(); 2];
        let mut todo: BTreeSet<(usize, usize)> =
            (0..4).flat_map(|way| PING_SIZES.map(|size| (way, size))).collect();
        let deadline = amount.until + PATIENCE;
        let pingers: Vec<Pinger> = self.ways().map(|(_, from, _, at)| Pinger::new(from, at)).into();
        let mut sequence = 0;
        while Instant::now() < amount.until || !todo.is_empty() {
            assert!(Instant::now() < deadline, "session {}: no answer to pings {todo:?}", self.n);
            for (way, pinger) in pingers.iter().enumerate() {
                let size = PING_SIZES[usize::from(sequence) % PING_SIZES.len()];
                sequence = u16::wrapping_add(sequence, 1);
                let pings = &mut sum[way % 2];
                pings.sent += 1;
                if pinger.ping(sequence, size) {
                    pings.answered += 1;
                    todo.remove(&(way, size));
                }
            }
            thread::sleep(amount.tick);
        }
        sum
    }
}

/// Echo requests, and answers with the same bytes in them.
#[derive(Clone, Copy, Default)]
pub struct Pings {
    /// Requests.
    pub sent: u64,
    /// Answers in time.
    pub answered: u64,
}

/// A ping socket, on which the kernel shows only the answers to its own requests.
struct Pinger {
    socket: UdpSocket,
    request: u8,
    reply: u8,
}

impl Pinger {
    fn new(from: &Namespace, to: IpAddr) -> Pinger {
        let (domain, protocol, request, reply) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 0),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 129),
        };
        // Both families ask this one.
        from.sysctl("net/ipv4/ping_group_range", "0 0");
        let made = from.within(|| {
            let socket = Socket::new(domain, Type::DGRAM, Some(protocol))?;
            socket.connect(&SocketAddr::new(to, 0).into())?;
            socket.set_read_timeout(Some(ANSWER_WITHIN))?;
            Ok::<_, io::Error>(socket)
        });
        Pinger { socket: made.expect("a ping socket").into(), request, reply }
    }

    fn ping(&self, sequence: u16, size: usize) -> bool {
        // Checksum and identifier are the kernel's.
        let mut message = vec![0; 8 + size];
        message[0] = self.request;
        message[6..8].copy_from_slice(&sequence.to_be_bytes());
        Noise::new(u64::from(sequence)).fill(&mut message[8..]);
        // The error of an earlier one, or a full buffer: as good as lost.
        if self.socket.send(&message).is_err() {
            return false;
        }
        let mut answer = vec![0; 65_536];
        let deadline = Instant::now() + ANSWER_WITHIN;
        while Instant::now() < deadline {
            let Ok(len) = self.socket.recv(&mut answer) else { return false };
            if answer[6..8] == message[6..8] {
                assert_eq!(answer[0], self.reply, "an answer of another type");
                assert!(answer[8..len] == message[8..], "the echo of {size} bytes differs");
                return true;
            }
        }
        false
    }
}

/// Datagrams in one direction, each with its stream, its number and a checksum.
pub struct Stream {
    number: u32,
    /// From the client to the server.
    pub up: bool,
    sender: UdpSocket,
    receiver: UdpSocket,
    receiving: Namespace,
    /// Taken by the kernel.
    pub sent: u64,
    seen: BTreeSet<u64>,
    /// Behind one with a higher number.
    pub reordered: u64,
    buffer: Vec<u8>,
}

impl Stream {
    /// From one namespace to `address` in the other.
    pub fn new(number: usize, up: bool, (from, to): (&Namespace, &Namespace), address: IpAddr) -> Stream {
        let receiver = to.within(|| UdpSocket::bind((address, 0))).expect("bind");
        receiver.set_nonblocking(true).expect("a socket that doesn't wait");
        let sender = udp_to(from, receiver.local_addr().expect("an address")).expect("a socket");
        Stream {
            number: number as u32,
            up,
            sender,
            receiver,
            receiving: to.clone(),
            sent: 0,
            seen: BTreeSet::new(),
            reordered: 0,
            buffer: vec![0; 65_536],
        }
    }

    /// Datagrams that arrived whole.
    pub fn arrived(&self) -> u64 {
        self.seen.len() as u64
    }

    /// Datagrams the receiving socket had no room for.
    pub fn dropped(&self) -> u64 {
        drops_of(&self.receiving, socket_inode(std::process::id() as i32, self.receiver.as_raw_fd()))
    }

    /// Sends the next one.
    pub fn send(&mut self) {
        let size = SIZES[(self.sent % SIZES.len() as u64) as usize];
        let mut datagram = vec![0; size];
        datagram[..4].copy_from_slice(&self.number.to_be_bytes());
        datagram[4..12].copy_from_slice(&self.sent.to_be_bytes());
        let (body, sum) = datagram.split_at_mut(size - SUM);
        Noise::new(self.sent).fill(&mut body[12..]);
        sum.copy_from_slice(&digest(&SHA256, body).as_ref()[..SUM]);
        // A full buffer refuses it: then it wasn't sent.
        if self.sender.send(&datagram).is_ok() {
            self.sent += 1;
        }
    }

    /// Takes what has come. Nothing may come twice, from another stream, or changed.
    pub fn receive(&mut self) {
        while let Ok(len) = self.receiver.recv(&mut self.buffer) {
            let (body, sum) = self.buffer[..len].split_at(len.saturating_sub(SUM));
            assert!(len >= 12 + SUM && digest(&SHA256, body).as_ref()[..SUM] == *sum, "corrupt: {len} bytes");
            assert_eq!(body[..4], self.number.to_be_bytes(), "a datagram of another stream");
            let number = u64::from_be_bytes(body[4..12].try_into().expect("eight bytes"));
            assert_eq!(len, SIZES[(number % SIZES.len() as u64) as usize], "another length than was sent");
            if self.seen.last().is_some_and(|last| *last > number) {
                self.reordered += 1;
            }
            assert!(self.seen.insert(number), "datagram {number} came twice");
        }
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = if self.up { "up" } else { "down" };
        write!(f, "{way}, {:?}: {} of {} arrived", self.sender.peer_addr(), self.arrived(), self.sent)
    }
}

/// Datagrams of each stream that have to arrive at the least.
const SOME: u64 = 100;
const BURST: usize = 8;
/// Of datagrams; the last is larger than the tunnel's MTU.
const SIZES: [usize; 6] = [32, 200, 1_200, 1_200, 1_372, 3_000];
const SUM: usize = 8;
/// Payloads of pings: the last two are larger than the tunnel's MTU.
const PING_SIZES: [usize; 5] = [0, 56, 1_364, 1_700, 6_000];
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
