//! The port: one TCP listener, and one UDP socket per slot, all on one port, steered by session ID in the
//! kernel.
//!
//! ```text
//! free --take--> shut and drained, new ID, filter admits that ID only --release--> shut and drained --> free
//! ```
//! A slot's socket is never closed while the server runs: that would renumber the group.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{MsgFlags, recv};

use tunguard::config::server::ServerConfig;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::random;
use tunguard::sys::{clock, steer, udp};
use tunguard::wire::data::SessionId;

/// The UDP slots.
pub struct Slots {
    sockets: Vec<UdpSocket>,
    /// First in, first out: a slot rests as long as possible before it is used again.
    free: VecDeque<u16>,
}

/// Opens the port for TCP and UDP.
///
/// Errors: [`Exit::PortInUse`], [`Exit::Privilege`].
pub fn bind(config: &ServerConfig) -> Outcome<(TcpListener, Slots)> {
    // Every client may come back at once, while its old session drains.
    let count = config.max_clients + config.max_clients.max(SPARE_SLOTS);
    make_room(count, config.max_handshakes)?;
    let listener = listen(config.listen)?;
    let address = listener.local_addr().map_err(|e| Failure::system("ask for our own address", e))?;
    let refused = |error| refused("UDP", address, error);
    // The group is shared by user: a server that runs already as root would let us in, so we look first,
    // without SO_REUSEPORT.
    drop(bind_alone(address).map_err(refused)?);
    let mut sockets = Vec::with_capacity(count.into());
    for slot in 0..count {
        let socket = udp::bind_shared(address).map_err(refused)?;
        steer::admit_nothing(&socket).map_err(|e| Failure::system("shut a UDP slot", e))?;
        if slot == 0 {
            steer::attach_slot_steering(&socket)
                .map_err(|e| Failure::system("steer datagrams by session ID", e))?;
        }
        sockets.push(socket);
    }
    log::info!("listening on {address}, TCP and UDP, {count} slots");
    Ok((listener, Slots { free: (0..count).collect(), sockets }))
}

impl Slots {
    /// A slot and the ID of its new session; `None` when all are taken.
    pub fn take(&mut self) -> Outcome<Option<SessionId>> {
        let Some(slot) = self.free.pop_front() else { return Ok(None) };
        let session = SessionId::new(slot, random::bytes()?);
        let socket = &self.sockets[usize::from(slot)];
        // Still shut; what slipped in between two filters long ago goes now.
        let opened = reset(socket)
            .and_then(|()| steer::admit_only(socket, session))
            // A worker could have put another program in its place.
            .and_then(|()| steer::attach_slot_steering(socket));
        if let Err(error) = opened {
            self.free.push_back(slot);
            return Err(Failure::system("open a UDP slot", error));
        }
        Ok(Some(session))
    }

    /// Takes a slot back. The worker that had it must be gone.
    pub fn release(&mut self, session: SessionId) {
        let socket = &self.sockets[usize::from(session.slot())];
        let shut = steer::admit_nothing(socket).and_then(|()| steer::attach_slot_steering(socket));
        match shut.and_then(|()| reset(socket)) {
            Ok(()) => self.free.push_back(session.slot()),
            // Never to be given to another session.
            Err(error) => log::error!("UDP slot {} can't be shut and stays unused: {error}", session.slot()),
        }
    }

    /// A session's socket, to be handed to its worker.
    pub fn socket(&self, session: SessionId) -> BorrowedFd<'_> {
        self.sockets[usize::from(session.slot())].as_fd()
    }
}

/// A socket that is shut as it was at first. Whether it blocks is shared with the worker that had it, and the next one
/// isn't allowed to change that.
fn reset(socket: &UdpSocket) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    drain(socket)
}

/// Takes everything out that waits in a socket that is shut. Each call says by itself that it must not block.
fn drain(socket: &UdpSocket) -> io::Result<()> {
    let mut byte = [0];
    for _ in 0..MOST_WAITING {
        match recv(socket.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(Errno::EAGAIN) => return Ok(()),
            // The error of an earlier send; reading it clears it.
            Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::other("it doesn't run dry"))
}

fn listen(address: SocketAddr) -> Outcome<TcpListener> {
    let bound = TcpListener::bind(address).or_else(|error| {
        // A host without IPv6: [::] was meant as "everywhere".
        let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
        let no_ipv6 = error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32)
            || error.kind() == ErrorKind::AddrNotAvailable;
        match address.ip() {
            IpAddr::V6(v6) if v6.is_unspecified() && no_ipv6 => TcpListener::bind(everywhere),
            _ => Err(error),
        }
    });
    let listener = bound.map_err(|e| refused("TCP", address, e))?;
    listener.set_nonblocking(true).map_err(|e| Failure::system("prepare the listener", e))?;
    Ok(listener)
}

/// With patience: the TCP port is ours by now, so it's the workers of a server that was killed, and they are ending.
fn bind_alone(address: SocketAddr) -> io::Result<UdpSocket> {
    let until = clock::now() + WORKERS_END_WITHIN;
    loop {
        match UdpSocket::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && clock::now() < until => {
                thread::sleep(LOOK_AGAIN);
            }
            bound => return bound,
        }
    }
}

fn refused(protocol: &str, address: SocketAddr, error: io::Error) -> Failure {
    match error.kind() {
        ErrorKind::AddrInUse => Failure::new(
            Exit::PortInUse,
            format!(
                "{protocol} port {} on {} is in use: stop the other server, or set another `listen`",
                address.port(),
                address.ip()
            ),
        ),
        ErrorKind::PermissionDenied => Failure::new(
            Exit::Privilege,
            format!("may not listen on {protocol} {address}: run as root, or choose a port above 1023"),
        ),
        ErrorKind::AddrNotAvailable => {
            Failure::usage(format!("listen = \"{address}\": this host has no address {}", address.ip()))
        }
        _ => Failure::system(format!("listen on {protocol} {address}"), error),
    }
}

/// A slot, a channel and two queues a session, and the handshakes.
fn make_room(slots: u16, handshakes: u16) -> Outcome<()> {
    // Those that wait for a handshake and all that is there once are in the last number.
    let need = u64::from(slots) * 4 + u64::from(handshakes) + 1024;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)
        .map_err(|e| Failure::system("read the limit of descriptors", e))?;
    if soft < need && setrlimit(Resource::RLIMIT_NOFILE, need.min(hard), hard).is_ok() && hard < need {
        log::warn!(
            "{hard} descriptors are allowed, {need} may be needed for max_clients: raise the limit (ulimit -n)"
        );
    }
    Ok(())
}

const SPARE_SLOTS: u16 = 16;
/// Workers end with their guard.
const WORKERS_END_WITHIN: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Datagrams a full socket buffer may hold, and many more.
const MOST_WAITING: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    /// Slots on a port of the kernel's choice, and a client's socket.
    fn slots(max_clients: u16) -> (Slots, UdpSocket) {
        let text = format!(
            "networks = [\"10.9.0.0/24\"]\nmax_clients = {max_clients}\n\
             [tls]\nca = \"a\"\ncert = \"b\"\nkey = \"c\"\n"
        );
        let mut config = ServerConfig::parse(&text, Path::new("server.toml")).expect("a valid configuration");
        config.listen = "127.0.0.1:0".parse().expect("an address");
        let (listener, slots) = bind(&config).expect("the port");
        let client = UdpSocket::bind("127.0.0.1:0").expect("a port");
        client.connect(listener.local_addr().expect("an address")).expect("connects");
        (slots, client)
    }

    fn datagram(session: SessionId, text: &[u8]) -> Vec<u8> {
        [&session.0[..], text].concat()
    }

    /// What waits in a session's socket.
    fn received(slots: &Slots, session: SessionId) -> Vec<Vec<u8>> {
        let mut bytes = [0; 100];
        let socket = slots.socket(session).as_raw_fd();
        std::iter::from_fn(|| {
            recv(socket, &mut bytes, MsgFlags::MSG_DONTWAIT).ok().map(|len| bytes[..len].to_vec())
        })
        .collect()
    }

    #[test]
    fn a_datagram_reaches_the_session_that_it_names_and_no_other() {
        let (mut slots, client) = slots(2);
        let sessions = [(); 3].map(|()| slots.take().expect("works").expect("there are more"));
        for session in sessions {
            client.send(&datagram(session, b"own")).expect("sends");
            let mut stranger = session;
            stranger.0[7] ^= 1;
            client.send(&datagram(stranger, b"one that was there before")).expect("sends");
        }
        for session in sessions {
            assert_eq!(received(&slots, session), [datagram(session, b"own")]);
        }
    }

    #[test]
    fn a_slot_rests_and_has_nothing_of_the_session_before() {
        let (mut slots, client) = slots(1);
        let count = slots.sockets.len();
        assert_eq!(count, 1 + usize::from(SPARE_SLOTS), "each client twice, and some");
        let sessions: Vec<SessionId> =
            (0..count).map(|_| slots.take().expect("works").expect("there are more")).collect();
        assert_eq!(slots.take().expect("works"), None, "all are taken");
        let (old, other) = (sessions[3], sessions[5]);
        client.send(&datagram(old, b"late")).expect("sends");
        // Its worker left it blocking, with datagrams in it.
        let socket = &slots.sockets[usize::from(old.slot())];
        socket.set_nonblocking(false).expect("works");
        slots.release(old);
        client.send(&datagram(old, b"too late")).expect("sends");
        assert_eq!(received(&slots, old), NOTHING);
        slots.release(other);
        let new = slots.take().expect("works").expect("it is free");
        assert_eq!((new.slot(), new == old), (old.slot(), false), "who was free first");
        client.send(&datagram(old, b"much too late")).expect("sends");
        client.send(&datagram(new, b"in time")).expect("sends");
        assert_eq!(received(&slots, new), [datagram(new, b"in time")]);
        let flags = fcntl(slots.socket(new), FcntlArg::F_GETFL).expect("works");
        assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
    }

    #[test]
    fn what_keeps_the_port_from_us_is_said() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("an address");
        let failure = listen(address).expect_err("refused");
        assert_eq!(failure.exit, Exit::PortInUse);
        assert!(
            failure.text.contains(&format!("TCP port {} on 127.0.0.1 is in use", address.port())),
            "{failure}"
        );
        let failure = refused("TCP", address, ErrorKind::PermissionDenied.into());
        assert_eq!(failure.exit, Exit::Privilege);
        let failure = listen("192.0.2.77:0".parse().expect("an address")).expect_err("refused");
        assert!(failure.text.contains("this host has no address 192.0.2.77"), "{failure}");
        // One address that isn't here is not "everywhere".
        assert!(listen("[2001:db8::77]:0".parse().expect("an address")).is_err());
        // Whether this host has IPv6 or not.
        assert!(listen("[::]:0".parse().expect("an address")).is_ok());
    }

    const NOTHING: [Vec<u8>; 0] = [];
}
