//! Captures of what passes a device, through AF_PACKET sockets.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use tunguard::segment::checksum;

use crate::lab::Namespace;

/// A packet that passed a device.
#[derive(Clone, Debug)]
pub struct Captured {
    /// It left by the device; otherwise it came in.
    pub outgoing: bool,
    /// From the link's header on, which a TUN device doesn't have.
    pub bytes: Vec<u8>,
}

/// A capture in progress.
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Captured>>,
}

impl Capture {
    /// Starts to capture what passes `device`; every packet from now on is in it.
    pub fn start(namespace: &Namespace, device: &str) -> Capture {
        let (fd, index) = namespace.within(|| {
            let fd =
                socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll);
            (fd.expect("a packet socket"), if_nametoindex(device).expect("the device's number"))
        });
        setsockopt(&fd, sockopt::RcvBufForce, &(64 << 20)).expect("a large buffer");
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100)).expect("a timeout");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || capture(&fd, index as usize, &stopped));
        Capture { stop, thread }
    }

    /// Ends it: the packets, oldest first.
    pub fn stop(self) -> Vec<Captured> {
        // What was sent just now is in the socket's buffer already, or will be within this time.
        thread::sleep(Duration::from_millis(200));
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the capturing thread")
    }
}

impl Captured {
    /// The IP packet of a capture with Ethernet headers.
    pub fn ip_after_ethernet(&self) -> Option<&[u8]> {
        let kind = self.bytes.get(12..14)?;
        matches!(kind, [0x08, 0x00] | [0x86, 0xdd]).then(|| &self.bytes[14..])
    }
}

/// On the wire there are more than `least` packets to or from the server's port, and what neighbours say to each other.
pub fn only_the_tunnel(wire: &[Captured], least: usize) {
    let mut tunnel = 0;
    for packet in wire {
        let Some(ip) = packet.ip_after_ethernet() else { continue };
        let Some(packet) = Inner::parse(ip) else { panic!("an odd packet on the wire: {ip:02x?}") };
        match packet.protocol {
            TCP | UDP => {
                let ports =
                    [0, 2].map(|at| u16::from_be_bytes([packet.transport[at], packet.transport[at + 1]]));
                assert!(ports.contains(&55555), "{packet:?}");
                tunnel += 1;
            }
            // MLD is behind a hop-by-hop option.
            0 => {}
            ICMP_V6 if packet.transport.first().is_none_or(|kind| *kind > 129) => {}
            _ => panic!("in clear: {packet:?}"),
        }
    }
    assert!(tunnel > least, "{tunnel} packets of the tunnel");
}

/// The datagrams to the server among them, over IPv4, as their senders sealed them: none of a run of several.
pub fn datagrams_to_server(packets: &[Captured]) -> Vec<Vec<u8>> {
    packets
        .iter()
        .filter_map(|packet| packet.ip_after_ethernet())
        .filter(|ip| ip[0] == 0x45 && ip[9] == 17 && ip[22..24] == 55555u16.to_be_bytes())
        .filter(|ip| ip.len() <= 1_500)
        .map(|ip| ip[28..].to_vec())
        .collect()
}

/// Whether any of the packets holds these bytes.
pub fn any_holds(packets: &[Captured], bytes: &[u8]) -> bool {
    packets.iter().any(|packet| packet.bytes.windows(bytes.len()).any(|window| window == bytes))
}

/// What an IP packet says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inner {
    pub source: std::net::IpAddr,
    pub destination: std::net::IpAddr,
    pub protocol: u8,
    /// From the transport's header on.
    pub transport: Vec<u8>,
    /// The transport's checksum is right, or holds the pseudo-header's sum for an offload to complete.
    pub checksum: Sum,
}

/// The state of a transport's checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    Right,
    Partial,
    Wrong,
    /// A fragment, or a protocol without one.
    None,
}

impl Inner {
    /// Reads an IP packet without options or extension headers, of exactly the stated length.
    pub fn parse(packet: &[u8]) -> Option<Inner> {
        let (source, destination, protocol, start, addresses): (
            std::net::IpAddr,
            std::net::IpAddr,
            u8,
            usize,
            _,
        ) = match packet.first()? >> 4 {
            4 => {
                let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
                // A super-packet of 64 KiB says 0.
                if length != packet.len() && length != 0 {
                    return None;
                }
                let four = |at: usize| <[u8; 4]>::try_from(&packet[at..at + 4]).expect("four bytes");
                (four(12).into(), four(16).into(), packet[9], 20, &packet[12..20])
            }
            6 => {
                let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
                if length + 40 != packet.len() && length != 0 {
                    return None;
                }
                let sixteen = |at: usize| <[u8; 16]>::try_from(&packet[at..at + 16]).expect("16 bytes");
                (sixteen(8).into(), sixteen(24).into(), packet[6], 40, &packet[8..40])
            }
            _ => return None,
        };
        let transport = packet[start..].to_vec();
        let fragment = packet[0] >> 4 == 4 && (packet[6] & 0x3f != 0 || packet[7] != 0);
        let place = match protocol {
            TCP => Some((16, true)),
            UDP => Some((6, true)),
            ICMP_V6 => Some((2, true)),
            ICMP => Some((2, false)),
            _ => None,
        };
        let checksum = match place {
            Some((place, with_addresses)) if !fragment => {
                let pseudo = if with_addresses {
                    checksum::pseudo_header(addresses, protocol, transport.len() as u32)
                } else {
                    0
                };
                let stored = u16::from_be_bytes([transport[place], transport[place + 1]]);
                if checksum::fold(pseudo + checksum::sum(&transport)) == 0xffff {
                    Sum::Right
                } else if stored == checksum::fold(pseudo) {
                    Sum::Partial
                } else {
                    Sum::Wrong
                }
            }
            _ => Sum::None,
        };
        Some(Inner { source, destination, protocol, transport, checksum })
    }
}

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP_V6: u8 = 58;

fn capture(fd: &OwnedFd, index: usize, stop: &AtomicBool) -> Vec<Captured> {
    let mut packets = Vec::new();
    let mut buffer = vec![0; 70_000];
    let mut last = false;
    loop {
        if !last && stop.load(Ordering::Relaxed) {
            // What is in the buffer, however much more comes meanwhile.
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a socket that doesn't wait");
            last = true;
        }
        match recvfrom::<LinkAddr>(fd.as_fd().as_raw_fd(), &mut buffer) {
            Ok((n, Some(from))) if from.ifindex() == index => {
                packets.push(Captured {
                    outgoing: from.pkttype() == libc::PACKET_OUTGOING,
                    bytes: buffer[..n].to_vec(),
                });
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if last => return packets,
            Err(Errno::EAGAIN) => {}
            Err(errno) => panic!("capture: {errno}"),
        }
    }
}
