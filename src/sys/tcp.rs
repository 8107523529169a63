//! TCP connections of the control channel.

use std::io;
use std::net::TcpStream;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use socket2::{SockRef, TcpKeepalive};

/// No call on it waits. Whoever has made it so before may not be allowed to ask for it again: it is looked at first.
pub fn make_nonblocking(tcp: &TcpStream) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(tcp, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_NONBLOCK) { Ok(()) } else { tcp.set_nonblocking(true) }
}

/// Lets the kernel find out that the peer's host is gone without a word, once the connection was silent for
/// `idle`.
pub fn notice_silence(tcp: &TcpStream, idle: Duration) -> io::Result<()> {
    let idle = idle.clamp(Duration::from_secs(1), Duration::from_secs(32_767));
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(PROBE_EVERY).with_retries(PROBES);
    SockRef::from(tcp).set_tcp_keepalive(&keepalive)
}

const PROBE_EVERY: Duration = Duration::from_secs(15);
const PROBES: u32 = 4;
