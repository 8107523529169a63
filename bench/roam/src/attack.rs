//! Somebody on the way who wants a client's traffic: takes the client's datagrams, and sends them from addresses of his
//! own. He never answers what comes to him there.
//!
//! ```text
//!   client --- [tap] --- server        all UDP of the client goes through `tap`, both ways
//!               [own]                  a network of his own
//! ```
//! [`Attacker`] says what becomes of each datagram, [`Traffic`] what came of it; time is an argument of both, in
//! nanoseconds.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde::Serialize;
use tunguard::config::common::DeviceName;
use tunguard::segment::checksum;
use tunguard::sys::tun::Tun;
use tunguard::wire::vnet::{GSO_NONE, GSO_UDP_L4, VNET_LEN, VnetHeader};

use crate::{SECOND, now};

/// What he tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Attack {
    /// For two seconds a copy of each datagram comes from him, before the datagram itself.
    Race,
    /// A datagram that was delivered comes again from him, two seconds later.
    Replay,
    /// A datagram that was not delivered comes from him, after a newer one came from the client.
    Older,
    /// The newest datagram comes from him; nothing comes from the client for a second.
    Held,
}

/// Who is who.
#[derive(Clone, Copy, Debug)]
pub struct Scene {
    pub client: Ipv4Addr,
    pub server: Ipv4Addr,
    /// His network, of which he takes another address each time.
    pub own: Ipv4Addr,
}

/// Attacks `times` times in each way, and prints a line of JSON about each.
pub fn attack(tap: &DeviceName, own: &DeviceName, scene: Scene, times: u32) -> io::Result<()> {
    let mut wire = Wire {
        tap: Tun::create(tap).map_err(io::Error::other)?.0,
        own: Tun::create(own).map_err(io::Error::other)?.0,
        scene,
        buffer: vec![0; 1 << 17],
    };
    let mut number = 0;
    for _ in 0..times {
        for attack in [Attack::Race, Attack::Replay, Attack::Older, Attack::Held] {
            if !wire.wait_until_steady()? {
                return Err(io::Error::other("the client gets no even traffic"));
            }
            let [a, b, c, _] = scene.own.octets();
            let from =
                SocketAddrV4::new(Ipv4Addr::new(a, b, c, 10 + number % 240), 40_000 + u16::from(number));
            number += 1;
            let verdict = wire.try_once(attack, from)?;
            println!("{}", serde_json::to_string(&verdict)?);
            io::stdout().flush()?;
        }
    }
    Ok(())
}

/// What passes, or doesn't.
struct Wire {
    tap: Tun,
    own: Tun,
    scene: Scene,
    buffer: Vec<u8>,
}

enum Event {
    /// The client sent this; nobody has it yet.
    Up(Datagram),
    /// So many datagrams went on to the client.
    Down(usize),
    /// A datagram of so many bytes came to one of his own addresses.
    Caught(usize),
}

impl Wire {
    /// Lets everything pass until the client has got packets without a break for a while.
    fn wait_until_steady(&mut self) -> io::Result<bool> {
        let start = now();
        let (mut row, mut last) = (start, start);
        while now() < start + PATIENCE {
            for event in self.listen(now() + TICK)? {
                match event {
                    Event::Up(datagram) => self.pass(&datagram)?,
                    Event::Down(_) => last = now(),
                    Event::Caught(_) => {}
                }
            }
            if now() > last + BREAK {
                (row, last) = (now(), now());
            } else if last > row + PAUSE {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn try_once(&mut self, attack: Attack, from: SocketAddrV4) -> io::Result<Verdict> {
        let mut attacker = Attacker::new(attack, now());
        let mut traffic = Traffic::default();
        while !attacker.is_over(now()) {
            let soon = now() + TICK;
            for event in self.listen(attacker.next().map_or(soon, |due| due.min(soon)))? {
                match event {
                    Event::Up(datagram) => attacker.handle(now(), datagram),
                    Event::Down(count) => traffic.client.extend(std::iter::repeat_n(now(), count)),
                    Event::Caught(len) => traffic.caught.push((now(), len)),
                }
            }
            while let Some((datagram, by)) = attacker.due(now()) {
                match by {
                    By::Client => self.pass(&datagram)?,
                    By::Attacker => {
                        traffic.sent.push((now(), datagram.text.len()));
                        self.send(&Datagram { source: from, ..datagram })?;
                    }
                }
            }
        }
        Ok(traffic.verdict(attack, now()))
    }

    /// What comes until then, at least something if anything does.
    fn listen(&mut self, until: u64) -> io::Result<Vec<Event>> {
        let mut events = Vec::new();
        loop {
            while let Some(len) = self.tap.read(&mut self.buffer)? {
                let packet = &self.buffer[..len];
                match Datagram::parse(packet) {
                    Some(datagrams) if *datagrams[0].destination.ip() == self.scene.server => {
                        events.extend(datagrams.into_iter().map(Event::Up));
                    }
                    other => {
                        let Scene { client, server, .. } = self.scene;
                        let ends = |of: &Datagram| (*of.source.ip(), *of.destination.ip());
                        let down = other.filter(|of| ends(&of[0]) == (server, client));
                        events.extend(down.map(|of| Event::Down(of.len())));
                        give_back(&self.tap, packet)?;
                    }
                }
            }
            while let Some(len) = self.own.read(&mut self.buffer)? {
                // Whatever else the kernel says on a new device isn't from the server.
                let caught = Datagram::parse(&self.buffer[..len]).unwrap_or_default();
                events.extend(caught.iter().map(|datagram| Event::Caught(datagram.text.len())));
            }
            let left = until.saturating_sub(now());
            if !events.is_empty() || left == 0 {
                return Ok(events);
            }
            let wait = TimeSpec::new((left / SECOND) as i64, (left % SECOND) as i64);
            let mut fds = [
                PollFd::new(self.tap.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.own.as_fd(), PollFlags::POLLIN),
            ];
            match ppoll(&mut fds, Some(wait), None) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The client's datagram goes on.
    fn pass(&self, datagram: &Datagram) -> io::Result<()> {
        give_back(&self.tap, &datagram.packet())
    }

    /// His own goes out by his own network.
    fn send(&self, datagram: &Datagram) -> io::Result<()> {
        give_back(&self.own, &datagram.packet())
    }
}

/// A packet that the kernel doesn't take is lost, as anywhere on the Internet.
fn give_back(tun: &Tun, packet: &[u8]) -> io::Result<()> {
    match tun.write(&[IoSlice::new(packet)]) {
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

/// What he does in one attack: datagrams of the client go in, and come out when and as he wants.
#[derive(Debug)]
pub struct Attacker {
    attack: Attack,
    begun: u64,
    /// Those that he kept.
    kept: Option<Datagram>,
    /// What goes out, and when; in order.
    out: VecDeque<(u64, Datagram, By)>,
    /// The last that he sent himself.
    last: Option<u64>,
}

/// Whose address a datagram bears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Client,
    Attacker,
}

impl Attacker {
    /// Begins now.
    pub fn new(attack: Attack, now: u64) -> Attacker {
        Attacker { attack, begun: now, kept: None, out: VecDeque::new(), last: None }
    }

    /// The client sent a datagram.
    pub fn handle(&mut self, now: u64, datagram: Datagram) {
        // Small ones may be anything: keepalives, answers, acknowledgements.
        let of_use = datagram.text.len() >= LEAST;
        match self.attack {
            Attack::Race if of_use && now < self.begun + RACING => {
                self.put(now, datagram.clone(), By::Attacker);
                self.put(now + AHEAD, datagram, By::Client);
            }
            Attack::Replay if of_use && self.kept.is_none() => {
                self.kept = Some(datagram.clone());
                self.put(now, datagram.clone(), By::Client);
                self.put(now + OLD, datagram, By::Attacker);
            }
            Attack::Older if of_use && self.kept.is_none() => self.kept = Some(datagram),
            Attack::Older if of_use && self.out.is_empty() && self.last.is_none() => {
                self.put(now, datagram, By::Client);
                if let Some(kept) = self.kept.clone() {
                    self.put(now + LATE, kept, By::Attacker);
                }
            }
            Attack::Held if of_use && self.kept.is_none() => {
                self.kept = Some(datagram.clone());
                self.put(now, datagram, By::Attacker);
            }
            Attack::Held => match self.last {
                Some(sent) if now < sent + HOLDING => self.put(sent + HOLDING, datagram, By::Client),
                _ => self.put(now, datagram, By::Client),
            },
            _ => self.put(now, datagram, By::Client),
        }
    }

    /// What goes out now.
    pub fn due(&mut self, now: u64) -> Option<(Datagram, By)> {
        self.next().filter(|due| *due <= now)?;
        let (_, datagram, by) = self.out.pop_front()?;
        if by == By::Attacker {
            self.last = Some(now);
        }
        Some((datagram, by))
    }

    /// When there is something to go out.
    pub fn next(&self) -> Option<u64> {
        self.out.front().map(|(due, ..)| *due)
    }

    /// Nothing more comes of it.
    pub fn is_over(&self, now: u64) -> bool {
        let end = match self.attack {
            Attack::Race => self.begun + RACING,
            _ => 0,
        };
        match self.last {
            Some(last) => now > end.max(last) + WATCHED && self.out.is_empty(),
            None => now > self.begun + PATIENCE,
        }
    }

    fn put(&mut self, due: u64, datagram: Datagram, by: By) {
        let at = self.out.partition_point(|(other, ..)| *other <= due);
        self.out.insert(at, (due, datagram, by));
    }
}

/// What happened, each with its time.
#[derive(Debug, Default)]
pub struct Traffic {
    /// He sent so many bytes.
    pub sent: Vec<(u64, usize)>,
    /// So many came to him.
    pub caught: Vec<(u64, usize)>,
    /// A datagram came to the client.
    pub client: Vec<u64>,
}

/// What came of an attack.
#[derive(Debug, PartialEq, Serialize)]
pub struct Verdict {
    attack: Attack,
    /// Datagrams that he sent, and their bytes.
    sent: usize,
    sent_bytes: usize,
    /// Datagrams that came to him, and their bytes.
    caught: usize,
    caught_bytes: usize,
    /// Datagrams that came to the client meanwhile.
    client: usize,
    /// How long traffic came to him and none to the client, in all.
    moved_ms: f64,
    /// Longest time without a datagram to the client from the first that he sent on.
    silence_ms: f64,
}

impl Traffic {
    /// What is to be said at the end.
    pub fn verdict(&self, attack: Attack, end: u64) -> Verdict {
        let start = self.sent.first().map_or(end, |(at, _)| *at);
        let client: Vec<u64> = self.client.iter().copied().filter(|at| *at >= start).collect();
        let marks = [&[start], &client[..], &[end]].concat();
        let (mut moved, mut silence) = (0, 0);
        for pair in marks.windows(2) {
            silence = silence.max(pair[1] - pair[0]);
            let between: Vec<u64> =
                self.caught.iter().map(|(at, _)| *at).filter(|at| (pair[0]..pair[1]).contains(at)).collect();
            if let [first, .., last] = between[..] {
                // A burst of copies between two packets of the client is no move.
                moved +=
                    Some(last - first).filter(|long| between.len() >= MANY && *long >= LONG).unwrap_or(0);
            }
        }
        let bytes = |of: &[(u64, usize)]| of.iter().map(|(_, len)| len).sum();
        Verdict {
            attack,
            sent: self.sent.len(),
            sent_bytes: bytes(&self.sent),
            caught: self.caught.len(),
            caught_bytes: bytes(&self.caught),
            client: client.len(),
            moved_ms: moved as f64 / 1e6,
            silence_ms: silence as f64 / 1e6,
        }
    }
}

/// A UDP datagram over IPv4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    pub source: SocketAddrV4,
    pub destination: SocketAddrV4,
    pub text: Vec<u8>,
}

impl Datagram {
    /// Those in a packet with its virtio header: several, where it is a super-packet; at least one.
    pub fn parse(packet: &[u8]) -> Option<Vec<Datagram>> {
        let header = VnetHeader::parse(packet)?;
        let ip = packet.get(VNET_LEN..)?;
        // Neither options nor fragments.
        if ip.len() < HEADERS || ip[0] != 0x45 || ip[9] != UDP || (ip[6] & 0x3f, ip[7]) != (0, 0) {
            return None;
        }
        let address = |at: usize| Ipv4Addr::from([ip[at], ip[at + 1], ip[at + 2], ip[at + 3]]);
        let port = |at: usize| u16::from_be_bytes([ip[at], ip[at + 1]]);
        let source = SocketAddrV4::new(address(12), port(20));
        let destination = SocketAddrV4::new(address(16), port(22));
        let text = &ip[HEADERS..];
        let each = match header.gso_type {
            GSO_NONE => text.len(),
            GSO_UDP_L4 => header.gso_size.into(),
            _ => return None,
        };
        let one = |text: &[u8]| Datagram { source, destination, text: text.to_vec() };
        Some(if text.is_empty() { vec![one(text)] } else { text.chunks(each.max(1)).map(one).collect() })
    }

    /// The packet, with an empty virtio header.
    pub fn packet(&self) -> Vec<u8> {
        let mut packet = vec![0; VNET_LEN + HEADERS];
        packet.extend(&self.text);
        let ip = &mut packet[VNET_LEN..];
        let total = ip.len() as u16;
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        // Don't fragment; hops as anybody's.
        ip[6] = 0x40;
        ip[8] = 64;
        ip[9] = UDP;
        ip[12..16].copy_from_slice(&self.source.ip().octets());
        ip[16..20].copy_from_slice(&self.destination.ip().octets());
        let sum = checksum::finish(checksum::sum(&ip[..20]));
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip[20..22].copy_from_slice(&self.source.port().to_be_bytes());
        ip[22..24].copy_from_slice(&self.destination.port().to_be_bytes());
        ip[24..26].copy_from_slice(&(total - 20).to_be_bytes());
        let pseudo = checksum::pseudo_header(&ip[12..20], UDP, u32::from(total) - 20);
        let sum = match checksum::finish(pseudo + checksum::sum(&ip[20..])) {
            0 => 0xffff,
            sum => sum,
        };
        ip[26..28].copy_from_slice(&sum.to_be_bytes());
        packet
    }
}

const UDP: u8 = 17;
/// IPv4 without options, and UDP.
const HEADERS: usize = 28;
const MS: u64 = SECOND / 1000;
/// How often he looks at the clock while nothing comes.
const TICK: u64 = 20 * MS;
/// Between two attacks the client gets traffic for so long.
const PAUSE: u64 = 4 * SECOND;
/// No packet for so long: that is no traffic.
const BREAK: u64 = 500 * MS;
/// How long he waits for traffic, or for datagrams of the client.
const PATIENCE: u64 = 40 * SECOND;
/// A datagram of fewer bytes isn't worth it.
const LEAST: usize = 100;
/// How long copies race datagrams, and how far ahead.
const RACING: u64 = 2 * SECOND;
const AHEAD: u64 = 5 * MS;
/// Age of what is replayed.
const OLD: u64 = 2 * SECOND;
/// How long after a newer one an older one comes.
const LATE: u64 = 50 * MS;
/// How long nothing comes from the client.
const HOLDING: u64 = SECOND;
/// How long the traffic is watched after the last that he sent.
const WATCHED: u64 = 3 * SECOND;
/// Datagrams that make a move, and for how long they come.
const MANY: usize = 5;
const LONG: u64 = 30 * MS;

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(number: u8) -> Datagram {
        let [source, destination] = [1, 2].map(|n| SocketAddrV4::new(Ipv4Addr::new(198, 18, n, 2), 5000));
        Datagram { source, destination, text: vec![number; 120] }
    }

    /// A client that sends every 250 ms: when what went out, and by whose address.
    fn play(attack: Attack) -> Vec<(u64, u8, By)> {
        let mut attacker = Attacker::new(attack, 0);
        let mut out = Vec::new();
        for ms in 0..60_000 {
            let now = ms * MS;
            if ms % 250 == 0 {
                attacker.handle(now, datagram((ms / 250) as u8));
            }
            while let Some((datagram, by)) = attacker.due(now) {
                out.push((ms, datagram.text[0], by));
            }
            if attacker.is_over(now) {
                return out;
            }
        }
        panic!("never over");
    }

    #[test]
    fn each_attack_sends_what_it_says() {
        let race = play(Attack::Race);
        assert_eq!(
            race[..4],
            [(0, 0, By::Attacker), (5, 0, By::Client), (250, 1, By::Attacker), (255, 1, By::Client)]
        );
        assert_eq!(race.iter().filter(|(.., by)| *by == By::Attacker).count(), 8);
        let single = |attack| {
            let of_his: Vec<_> = play(attack).into_iter().filter(|(.., by)| *by == By::Attacker).collect();
            assert_eq!(of_his.len(), 1, "{attack:?}");
            (of_his[0].0, of_his[0].1)
        };
        assert_eq!(single(Attack::Replay), (2_000, 0));
        assert_eq!(single(Attack::Older), (300, 0));
        assert_eq!(single(Attack::Held), (0, 0));
        // The first never comes from the client.
        assert_eq!(play(Attack::Older)[0], (250, 1, By::Client));
        assert!(play(Attack::Older).iter().all(|(_, number, by)| *number != 0 || *by == By::Attacker));
        let held = play(Attack::Held);
        assert_eq!(
            held[1..5],
            [(1_000, 1, By::Client), (1_000, 2, By::Client), (1_000, 3, By::Client), (1_000, 4, By::Client)]
        );
    }

    #[test]
    fn traffic_has_moved_where_it_comes_to_him_only() {
        let every = |from: u64, to: u64| (from..to).step_by(2).map(|ms| ms * MS);
        let caught = |times: Vec<u64>| times.into_iter().map(|at| (at, 240)).collect::<Vec<_>>();
        let sent = vec![(1_000 * MS, 120)];
        let verdict = |client: Vec<u64>, times: Vec<u64>| {
            let traffic = Traffic { sent: sent.clone(), caught: caught(times), client };
            let verdict = traffic.verdict(Attack::Older, 4_000 * MS);
            (verdict.moved_ms, verdict.silence_ms, verdict.caught_bytes)
        };
        // It stays.
        assert_eq!(verdict(every(0, 4_000).collect(), vec![]), (0.0, 2.0, 0));
        // A few copies, and the machine pauses after them.
        let paused = every(0, 1_500).chain(every(1_600, 4_000)).collect();
        assert_eq!(verdict(paused, vec![1_499 * MS; 8]), (0.0, 102.0, 8 * 240));
        // It moves for 500 ms.
        let moved = every(0, 1_500).chain(every(2_000, 4_000)).collect();
        assert_eq!(verdict(moved, every(1_500, 2_000).collect()).0, 498.0);
        // Copies to both are no move.
        assert_eq!(verdict(every(0, 4_000).collect(), every(1_001, 2_001).collect()).0, 0.0);
        // It never comes back.
        assert_eq!(verdict(every(0, 1_500).collect(), every(1_500, 4_000).collect()).0, 2_498.0);
    }

    #[test]
    fn packets_are_what_they_were() {
        let original = datagram(7);
        let packet = original.packet();
        assert_eq!(Datagram::parse(&packet), Some(vec![original.clone()]));
        let ip = &packet[VNET_LEN..];
        assert_eq!(checksum::fold(checksum::sum(&ip[..20])), 0xffff);
        let pseudo = checksum::pseudo_header(&ip[12..20], UDP, ip.len() as u32 - 20);
        assert_eq!(checksum::fold(pseudo + checksum::sum(&ip[20..])), 0xffff);
        // A super-packet of two.
        let mut run = packet.clone();
        run[1] = GSO_UDP_L4;
        run[4..6].copy_from_slice(&60u16.to_ne_bytes());
        let lengths: Vec<usize> =
            Datagram::parse(&run).expect("two").iter().map(|one| one.text.len()).collect();
        assert_eq!(lengths, [60, 60]);
        let mut tcp = packet;
        tcp[VNET_LEN + 9] = 6;
        assert_eq!(Datagram::parse(&tcp), None);
    }
}
