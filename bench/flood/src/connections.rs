//! TCP connections that say nothing.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use crate::pace::Pace;

/// Opens `rate` connections per second, each closed after `hold`; says how many were begun.
pub fn flood(
    to: SocketAddrV4,
    from: &[Ipv4Addr],
    hold: Duration,
    rate: u64,
    time: Duration,
) -> io::Result<u64> {
    let mut open: VecDeque<(Instant, Socket)> = VecDeque::new();
    let mut pace = Pace::new(rate, time);
    let mut sources = from.iter().cycle();
    let mut begun = 0;
    while let Some(due) = pace.next(BURST) {
        for source in sources.by_ref().take(due as usize) {
            while open.front().is_some_and(|(since, _)| since.elapsed() >= hold || open.len() >= MOST_OPEN) {
                open.pop_front();
            }
            let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
            // Closed by a reset: no port waits, so that there are always enough.
            socket.set_linger(Some(Duration::ZERO))?;
            socket.bind(&SocketAddrV4::new(*source, 0).into())?;
            match socket.connect(&to.into()) {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {}
                Err(e) => return Err(e),
            }
            open.push_back((Instant::now(), socket));
            begun += 1;
        }
    }
    Ok(begun)
}

const BURST: u64 = 1_000;
const MOST_OPEN: usize = 10_000;
