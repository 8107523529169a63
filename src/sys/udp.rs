//! UDP sockets: the server's slots, and a carrier that sends and receives runs of datagrams with one call.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::{Index, IndexMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{setsockopt, sockopt};
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use crate::drops::DropReason;
use crate::path::Path;

/// Binds one UDP socket of a group that shares `address`. An unspecified IPv6 address means dual-stack.
pub fn bind_shared(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_port(true)?;
    grow_buffers(&socket);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Binds a UDP socket of our own on any port, of the family of `peer`.
pub fn bind_towards(peer: SocketAddr) -> io::Result<UdpSocket> {
    bind_on(None, peer)
}

/// The same, for packets by `device` only (SO_BINDTODEVICE), whatever routes there are by others.
pub fn bind_on(device: Option<&str>, peer: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(peer), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    grow_buffers(&socket);
    if let Some(device) = device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    let any: SocketAddr = match peer {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    socket.bind(&any.into())?;
    Ok(socket.into())
}

/// A burst of super-packets has to fit. Beyond the host's limit where we may (CAP_NET_ADMIN), up to it where not.
fn grow_buffers(socket: &Socket) {
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    }
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    }
}

/// A UDP socket with segmentation and receive offload, destination addresses and ECN, where the kernel and the
/// device have them.
#[derive(Debug)]
pub struct Carrier {
    socket: UdpSocket,
    /// The one in use is last. quinn-udp gives up segmentation and ECN for good at the first EINVAL or EIO; but that
    /// may be the fault of one path, so there are a few to go on with, made while we may still set options.
    states: RefCell<Vec<UdpSocketState>>,
    /// Calls to send since the last of them gave up.
    degraded: Cell<u32>,
    mapped: bool,
}

/// Datagrams of a run that the kernel didn't take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsent {
    /// Why; of several reasons the last.
    pub reason: DropReason,
    /// How many.
    pub datagrams: usize,
}

/// Where received runs go. One piece of memory, so large that the allocator takes it from the kernel as it is, all
/// zero: what no traffic ever reached costs nothing, and most sessions are idle.
pub struct ReceiveBuffers(Vec<u8>);

impl Default for ReceiveBuffers {
    fn default() -> ReceiveBuffers {
        ReceiveBuffers(vec![0; RECEIVE_BUFFERS * RECEIVE_BUFFER_LEN])
    }
}

impl Index<usize> for ReceiveBuffers {
    type Output = [u8];

    fn index(&self, buffer: usize) -> &[u8] {
        &self.0[buffer * RECEIVE_BUFFER_LEN..][..RECEIVE_BUFFER_LEN]
    }
}

impl IndexMut<usize> for ReceiveBuffers {
    fn index_mut(&mut self, buffer: usize) -> &mut [u8] {
        &mut self.0[buffer * RECEIVE_BUFFER_LEN..][..RECEIVE_BUFFER_LEN]
    }
}

/// A run of datagrams from one path, all `stride` bytes but the last, which may be shorter.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Which of the buffers.
    pub buffer: usize,
    /// Bytes in it.
    pub len: usize,
    /// Bytes of each datagram.
    pub stride: usize,
    /// Where they came from and were sent to.
    pub path: Path,
    /// ECN bits of the outer header.
    pub ecn: u8,
}

impl Carrier {
    /// Takes over a bound socket.
    pub fn new(socket: OwnedFd) -> io::Result<Carrier> {
        let socket = UdpSocket::from(socket);
        let state = |_| UdpSocketState::new(UdpSockRef::from(&socket));
        let states = (0..STATES).map(state).collect::<io::Result<Vec<_>>>()?;
        let mapped = socket.local_addr()?.is_ipv6();
        let carrier = Carrier { socket, states: RefCell::new(states), degraded: Cell::new(0), mapped };
        carrier.allow_fragments()?;
        Ok(carrier)
    }

    /// Lets the network fragment a datagram that a narrow path can't carry whole, rather than lose it.
    fn allow_fragments(&self) -> io::Result<()> {
        self.set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
        if self.mapped {
            self.set(libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 0)?;
            self.set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)?;
        }
        Ok(())
    }

    /// Nobody may fragment what is sent, this host included, and what it heard of the path's MTU doesn't matter
    /// (ip_sk_use_pmtu() in include/net/ip.h).
    fn forbid_fragments(&self) -> io::Result<()> {
        // This one also counts for the mapped addresses of a dual-stack socket.
        self.set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)?;
        if self.mapped {
            self.set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)?;
        }
        Ok(())
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        // SAFETY: these options take one int, which outlives the call.
        let status = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Datagrams one call can send.
    pub fn max_segments(&self) -> usize {
        self.states.borrow().last().map_or(1, |s| s.max_gso_segments())
    }

    /// Sends `datagrams`, each `stride` bytes but the last, which may be shorter. An error says what to count; the
    /// network's state is never more than that.
    pub fn send(&self, path: &Path, ecn: u8, datagrams: &[u8], stride: usize) -> Result<(), Unsent> {
        if datagrams.len() > stride && self.max_segments() > 1 {
            match self.send_once(path, ecn, datagrams, Some(stride)) {
                Ok(()) => return Ok(()),
                // The device or the path refuses segmentation (quinn-udp has noted it), or the path's MTU is
                // below the stride: one by one they may still go, as fragments.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)) => {}
                Err(e) => {
                    return Err(Unsent { reason: reason(&e), datagrams: datagrams.len().div_ceil(stride) });
                }
            }
        }
        if datagrams.len() > stride {
            self.recover();
        }
        let mut unsent: Option<Unsent> = None;
        for datagram in datagrams.chunks(stride) {
            // One that is refused says nothing of the next: that may be shorter, or find room.
            if let Err(e) = self.send_once(path, ecn, datagram, None) {
                let before = unsent.map_or(0, |unsent| unsent.datagrams);
                unsent = Some(Unsent { reason: reason(&e), datagrams: before + 1 });
            }
        }
        unsent.map_or(Ok(()), Err)
    }

    /// Sends one datagram that arrives whole or not at all: a probe of the path's MTU (RFC 8899, section 4.1). What is
    /// sent after it may be fragmented as before.
    ///
    /// # Errors
    /// EMSGSIZE where it is larger than the link carries; otherwise the kernel's, as for any datagram.
    pub fn send_whole(&self, path: &Path, datagram: &[u8]) -> io::Result<()> {
        let sent = self.forbid_fragments().and_then(|()| self.send_once(path, 0, datagram, None));
        // Whatever became of it.
        self.allow_fragments()?;
        sent
    }

    fn send_once(&self, path: &Path, ecn: u8, contents: &[u8], stride: Option<usize>) -> io::Result<()> {
        let remote = match path.remote {
            SocketAddr::V4(v4) if self.mapped => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
            remote => remote,
        };
        let transmit = Transmit {
            destination: remote,
            ecn: EcnCodepoint::from_bits(ecn),
            contents,
            segment_size: stride,
            src_ip: path.local,
        };
        let states = self.states.borrow();
        let Some(state) = states.last() else { return Err(io::ErrorKind::Unsupported.into()) };
        match state.try_send(UdpSockRef::from(&self.socket), &transmit) {
            // The address we answered from may be gone from this host: let the kernel choose.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && transmit.src_ip.is_some() => {
                state.try_send(UdpSockRef::from(&self.socket), &Transmit { src_ip: None, ..transmit })
            }
            sent => sent,
        }
    }

    /// Tries segmentation again some time after it was given up.
    fn recover(&self) {
        let calls = self.degraded.get() + 1;
        let mut states = self.states.borrow_mut();
        if calls < RECOVER_AFTER || states.len() <= 1 {
            self.degraded.set(calls);
        } else {
            states.pop();
            self.degraded.set(0);
        }
    }

    /// Receives into `buffers`; what came is put into `received`. An empty list means nothing is waiting.
    pub fn receive(&self, buffers: &mut ReceiveBuffers, received: &mut Vec<Received>) -> io::Result<()> {
        received.clear();
        let mut metas = [RecvMeta::default(); RECEIVE_BUFFERS];
        let mut slices: Vec<IoSliceMut<'_>> =
            buffers.0.chunks_exact_mut(RECEIVE_BUFFER_LEN).map(IoSliceMut::new).collect();
        let states = self.states.borrow();
        let Some(state) = states.last() else { return Ok(()) };
        let count = match state.recv(UdpSockRef::from(&self.socket), &mut slices, &mut metas) {
            Ok(count) => count,
            Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
            // An ICMP error of an earlier send, a device that is down, or the like: nothing to read, and no reason to
            // stop.
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::ConnectionRefused
                        | ErrorKind::HostUnreachable
                        | ErrorKind::NetworkUnreachable
                        | ErrorKind::NetworkDown
                ) =>
            {
                0
            }
            Err(e) => return Err(e),
        };
        received.extend(metas[..count].iter().enumerate().map(|(buffer, meta)| Received {
            buffer,
            len: meta.len,
            stride: meta.stride.max(1),
            path: Path::new(meta.addr, meta.dst_ip.filter(|ip| !multicast(ip))),
            ecn: meta.ecn.map_or(0, |ecn| ecn as u8),
        }));
        Ok(())
    }
}

fn multicast(ip: &IpAddr) -> bool {
    ip.is_multicast() || matches!(ip, IpAddr::V4(v4) if v4.is_broadcast())
}

/// What a failed call to send is counted as.
pub fn reason(error: &io::Error) -> DropReason {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => DropReason::SocketFull,
        Some(libc::EMSGSIZE) => DropReason::TooBig,
        _ => DropReason::SendRefused,
    }
}

impl AsFd for Carrier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Runs of datagrams taken with one call.
pub const RECEIVE_BUFFERS: usize = 8;
/// Bytes of one receive buffer: the largest run the kernel makes.
const RECEIVE_BUFFER_LEN: usize = 65_536;
const SOCKET_BUFFER: usize = 4 << 20;
const STATES: usize = 4;
/// Runs sent datagram by datagram before segmentation is tried again.
const RECOVER_AFTER: u32 = 5_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_on_a_device_hears_and_reaches_only_what_is_there() {
        let receiver = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let target = receiver.local_addr().expect("an address");
        let socket = bind_on(Some("lo"), target).expect("bind");
        socket.send_to(b"here", target).expect("sends");
        assert_eq!(receiver.recv(&mut [0; 64]).expect("receives"), 4);
        assert_eq!(
            bind_on(Some("nosuchdevice"), target).expect_err("none").raw_os_error(),
            Some(libc::ENODEV)
        );
    }

    #[test]
    fn a_run_refused_in_part_counts_that_part() {
        let receiver = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let target = receiver.local_addr().expect("an address");
        let carrier = Carrier::new(bind_towards(target).expect("bind").into()).expect("a carrier");
        // The first is longer than any datagram can be.
        let run = vec![7; 70_010];
        let unsent = carrier.send(&Path::new(target, None), 0, &run, 70_000);
        assert_eq!(unsent, Err(Unsent { reason: DropReason::TooBig, datagrams: 1 }));
        assert_eq!(receiver.recv(&mut [0; 64]).expect("the second"), 10);
    }
}
