//! UDP datagrams with made-up senders, from a raw socket.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendmmsg,
    socket,
};
use ring::rand::{SecureRandom, SystemRandom};
use std::os::fd::AsFd;

use crate::pace::Pace;

/// A datagram as it was seen.
pub struct Seen {
    from: SocketAddrV4,
    to: SocketAddrV4,
    payload: Vec<u8>,
}

/// What is sent.
pub struct Flow {
    to: SocketAddrV4,
    /// The sender; with port 0 any of its /24, and any port.
    from: SocketAddrV4,
    start: Vec<u8>,
    size: usize,
}

impl Flow {
    /// Random bytes from a network.
    pub fn unknown(network: Ipv4Addr, to: SocketAddrV4, size: usize) -> Flow {
        Flow { to, from: SocketAddrV4::new(network, 0), start: Vec::new(), size }
    }

    /// What begins as another.
    pub fn like(seen: &Seen, keep: usize, size: usize) -> Flow {
        let start = seen.payload.iter().copied().take(keep).collect();
        Flow { to: seen.to, from: seen.from, start, size }
    }

    /// A packet with its IP and UDP headers; no UDP checksum (RFC 768: zero), as whoever floods would do.
    fn packet(&self, random: &[u8]) -> Vec<u8> {
        let (choice, garbage) = random.split_at(CHOICE);
        let (ip, port) = match self.from.port() {
            0 => {
                let [a, b, c, _] = self.from.ip().octets();
                let port = 1024 | u16::from_be_bytes([choice[1], choice[2]]);
                (Ipv4Addr::new(a, b, c, choice[0]), port)
            }
            port => (*self.from.ip(), port),
        };
        let udp_len = (8 + self.size) as u16;
        let mut packet = Vec::with_capacity(20 + usize::from(udp_len));
        packet.extend([0x45, 0]);
        packet.extend((20 + udp_len).to_be_bytes());
        // Identification and checksum are the kernel's to fill in (raw(7)); 64 hops, UDP.
        packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        packet.extend(ip.octets());
        packet.extend(self.to.ip().octets());
        packet.extend(port.to_be_bytes());
        packet.extend(self.to.port().to_be_bytes());
        packet.extend(udp_len.to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(&self.start);
        packet.extend(&garbage[..self.size - self.start.len().min(self.size)]);
        packet
    }
}

/// The next datagram from the client to the server that passes here.
pub fn observe(client: Ipv4Addr, server: SocketAddrV4, patience: Duration) -> io::Result<Seen> {
    let all =
        socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    let until = Instant::now() + patience;
    let mut buffer = [0; 2048];
    while Instant::now() < until {
        let mut fds = [PollFd::new(all.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(100u16))?;
        if !fds[0].any().unwrap_or(false) {
            continue;
        }
        let len = recv(all.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if let Some(seen) = parse(&buffer[..len]).filter(|s| *s.from.ip() == client && s.to == server) {
            return Ok(seen);
        }
    }
    Err(io::Error::other(format!("no datagram from {client} to {server} within {patience:?}")))
}

fn parse(packet: &[u8]) -> Option<Seen> {
    let header = usize::from(packet.first()? & 15) * 4;
    if packet[0] >> 4 != 4 || *packet.get(9)? != 17 {
        return None;
    }
    let ip = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    let port = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    Some(Seen {
        from: SocketAddrV4::new(ip(12)?, port(header)?),
        to: SocketAddrV4::new(ip(16)?, port(header + 2)?),
        payload: packet.get(header + 8..)?.to_vec(),
    })
}

/// Sends `rate` per second; says how many went out.
pub fn flood(flow: &Flow, rate: u64, time: Duration) -> io::Result<u64> {
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    let packets = make(flow)?;
    let mut pace = Pace::new(rate, time);
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let to = [Some(SockaddrIn::from(SocketAddrV4::new(*flow.to.ip(), 0))); BATCH];
    let mut sent = 0;
    let mut next = 0;
    while let Some(due) = pace.next(BATCH as u64) {
        let slices: Vec<[IoSlice<'_>; 1]> =
            (0..due as usize).map(|i| [IoSlice::new(&packets[(next + i) % packets.len()])]).collect();
        next = (next + due as usize) % packets.len();
        let none: [nix::sys::socket::ControlMessage<'_>; 0] = [];
        let results =
            sendmmsg(raw.as_raw_fd(), &mut headers, &slices, &to[..slices.len()], none, MsgFlags::empty())?;
        sent += results.count() as u64;
    }
    Ok(sent)
}

/// Many different ones, made before time counts.
fn make(flow: &Flow) -> io::Result<Vec<Vec<u8>>> {
    let mut random = vec![0; CHOICE + flow.size];
    let source = SystemRandom::new();
    (0..PACKETS)
        .map(|_| {
            source.fill(&mut random).map_err(|_| io::Error::other("no random bytes"))?;
            Ok(flow.packet(&random))
        })
        .collect()
}

/// Random bytes that choose the sender.
const CHOICE: usize = 3;
const PACKETS: usize = 4096;
const BATCH: usize = 256;
