//! Connecting to one remote: its name is looked up, and its addresses are tried in order, the next one a
//! moment after the one before had no result (RFC 8305, without the sorting). Nothing here blocks.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use super::lookup::Lookup;
use super::supervisor::User;
use crate::config::client::Remote;
use crate::exit::Outcome;
use crate::sys::poller::{Interest, Poller};
use crate::time::Time;

/// One remote being dialled.
///
/// Call [`step`](Dial::step) when a descriptor under the token is ready and at [`poll_timeout`](Dial::poll_timeout)
/// until it is over. Dropping it ends everything that is under way.
#[derive(Debug)]
pub struct Dial {
    remote: Remote,
    place: usize,
    lookup: Option<Lookup>,
    /// Known from an earlier session, for when the name can't be looked up any more.
    fallback: Vec<SocketAddr>,
    waiting: VecDeque<SocketAddr>,
    tries: Vec<Try>,
    next_start: Time,
    deadline: Time,
    token: u64,
    last_failure: Option<String>,
}

#[derive(Debug)]
struct Try {
    socket: Socket,
    address: SocketAddr,
    link: Option<String>,
    until: Time,
}

/// How a dial is going.
#[derive(Debug)]
pub enum Dialling {
    /// Under way.
    Pending,
    /// Connected.
    Connected(Connected),
    /// No address of the remote can be connected to.
    Failed(String),
}

/// A control connection, and where it leads.
#[derive(Debug)]
pub struct Connected {
    /// The connection.
    pub stream: TcpStream,
    /// The remote's address.
    pub address: SocketAddr,
    /// The link it is bound to.
    pub link: Option<String>,
}

/// What is known of a remote's addresses from before.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Where sessions were made.
    pub addresses: Vec<SocketAddr>,
    /// The last dial led to a session: what is known comes first.
    pub good: bool,
}

impl Dial {
    /// Starts to dial the remote at `place` of the configuration.
    pub fn start(
        (place, remote): (usize, &Remote),
        known: &Known,
        user: User,
        (poller, token): (&Poller, u64),
        now: Time,
    ) -> Outcome<Dial> {
        let mut dial = Dial {
            remote: remote.clone(),
            place,
            lookup: None,
            fallback: known.addresses.clone(),
            waiting: VecDeque::new(),
            tries: Vec::new(),
            next_start: now,
            deadline: now + DIAL_WITHIN,
            token,
            last_failure: None,
        };
        if let Ok(ip) = remote.host.parse() {
            dial.waiting.push_back(SocketAddr::new(ip, remote.port));
            return Ok(dial);
        }
        if known.good {
            dial.waiting.extend(&known.addresses);
        }
        // Also then: the name may lead elsewhere by now.
        let lookup = Lookup::start(remote, user, now)?;
        poller
            .add(lookup.as_fd(), token, Interest::Read)
            .map_err(|e| crate::exit::Failure::system("fill the epoll set", e))?;
        dial.lookup = Some(lookup);
        Ok(dial)
    }

    /// Place of the remote in the configuration.
    pub fn place(&self) -> usize {
        self.place
    }

    /// The remote's name.
    pub fn host(&self) -> &str {
        &self.remote.host
    }

    /// Goes on as far as it can. `way_out` is called before each address is connected to: it keeps the way there outside
    /// the tunnel, and names the link to connect by, or leaves that to the kernel.
    pub fn step(
        &mut self,
        now: Time,
        poller: &Poller,
        mut way_out: impl FnMut(SocketAddr) -> Outcome<Option<String>>,
    ) -> Dialling {
        self.take_lookup(now);
        if let Some(connected) = self.check_tries(now, poller) {
            return Dialling::Connected(connected);
        }
        // A try that failed leaves its turn to the next at once.
        while (self.tries.is_empty() || now >= self.next_start) && !self.waiting.is_empty() {
            let Some(address) = self.waiting.pop_front() else { break };
            let started = way_out(address)
                .map_err(|failure| failure.text)
                .and_then(|link| self.connect(address, link, poller, now).map_err(|e| refused(address, &e)));
            match started {
                Ok(()) => self.next_start = now + NEXT_AFTER,
                Err(text) => self.last_failure = Some(text),
            }
        }
        let exhausted = self.lookup.is_none() && self.waiting.is_empty() && self.tries.is_empty();
        if exhausted || now >= self.deadline {
            let why = self.last_failure.take();
            return Dialling::Failed(why.unwrap_or_else(|| format!("no answer from {}", self.remote.host)));
        }
        Dialling::Pending
    }

    /// When [`Dial::step`] has something to do without a descriptor being ready.
    pub fn poll_timeout(&self) -> Time {
        let next = (!self.waiting.is_empty()).then_some(self.next_start);
        let lookup = self.lookup.as_ref().map(Lookup::until);
        let tries = self.tries.iter().map(|t| t.until);
        tries.chain(next).chain(lookup).fold(self.deadline, Time::min)
    }

    fn take_lookup(&mut self, now: Time) {
        let Some(result) = self.lookup.as_ref().and_then(|lookup| lookup.poll(now, &self.remote)) else {
            return;
        };
        self.lookup = None;
        let found = result.unwrap_or_else(|why| {
            if !self.fallback.is_empty() {
                log::warn!("{why}; trying the address it had before");
            }
            self.last_failure = Some(why);
            self.fallback.iter().copied().collect()
        });
        for address in found {
            if !self.waiting.contains(&address) && !self.tries.iter().any(|t| t.address == address) {
                self.waiting.push_back(address);
            }
        }
    }

    fn check_tries(&mut self, now: Time, poller: &Poller) -> Option<Connected> {
        let mut place = 0;
        while place < self.tries.len() {
            let result = match self.tries[place].finished() {
                None if now >= self.tries[place].until => {
                    Err(format!("no answer from {}", self.tries[place].address))
                }
                None => {
                    place += 1;
                    continue;
                }
                Some(result) => result.map_err(|e| refused(self.tries[place].address, &e)),
            };
            let done = self.tries.remove(place);
            let _ = poller.remove(&done.socket);
            match result {
                Ok(()) => {
                    let Try { socket, address, link, .. } = done;
                    return Some(Connected { stream: socket.into(), address, link });
                }
                Err(text) => self.last_failure = Some(text),
            }
        }
        None
    }

    fn connect(
        &mut self,
        address: SocketAddr,
        link: Option<String>,
        poller: &Poller,
        now: Time,
    ) -> io::Result<()> {
        log::info!("connecting to {} ({address}) ...", self.remote.host);
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
        if let Some(link) = &link {
            socket.bind_device(Some(link.as_bytes()))?;
        }
        match socket.connect(&address.into()) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(e) => return Err(e),
        }
        poller.add(&socket, self.token, Interest::Write)?;
        self.tries.push(Try { socket, address, link, until: now + CONNECT_WITHIN });
        Ok(())
    }
}

impl Try {
    fn finished(&self) -> Option<io::Result<()>> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => None,
            Ok(_) => Some(self.socket.take_error().and_then(|error| error.map_or(Ok(()), Err))),
            Err(errno) => Some(Err(errno.into())),
        }
    }
}

fn refused(address: SocketAddr, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            format!(
                "{address} refuses connections (is the server running, and TCP port {} open?)",
                address.port()
            )
        }
        io::ErrorKind::NetworkUnreachable => format!("no route to {address} (is the network up?)"),
        _ => format!("can't connect to {address}: {error}"),
    }
}

/// The next address is tried after this time without a result (RFC 8305 section 5).
const NEXT_AFTER: Duration = Duration::from_millis(250);
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Lookup and connections together.
const DIAL_WITHIN: Duration = Duration::from_secs(10);
