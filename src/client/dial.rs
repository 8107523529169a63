//! Connecting to the server: names are looked up, and all there is to try is tried in order, each a moment after the
//! one before had no result (RFC 8305, without the sorting): the addresses of a remote, each by every link that leads
//! there, then those of the next remote. Nothing here blocks.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use super::lookup::{Confines, Lookup};
use crate::config::client::Remote;
use crate::exit::Outcome;
use crate::sys::poller::{Interest, Poller};
use crate::time::Time;

/// Remotes being dialled.
///
/// Call [`step`](Dial::step) when a descriptor under the token is ready and at [`poll_timeout`](Dial::poll_timeout)
/// until it is over. Dropping it ends everything that is under way.
#[derive(Debug)]
pub struct Dial {
    confines: Confines,
    /// Those whose turn hasn't come.
    later: VecDeque<Target>,
    /// Those whose turn has.
    begun: Vec<Target>,
    waiting: VecDeque<Candidate>,
    tries: Vec<Try>,
    /// When the next address is tried, and when the next remote.
    next_start: Time,
    next_remote: Time,
    deadline: Time,
    token: u64,
    last_failure: Option<String>,
}

/// A remote.
#[derive(Debug)]
struct Target {
    place: usize,
    remote: Remote,
    lookup: Option<Lookup>,
    known: Known,
    /// Its addresses, as far as they were found.
    addresses: Vec<SocketAddr>,
}

/// Something to try.
#[derive(Clone, Debug)]
struct Candidate {
    place: usize,
    address: SocketAddr,
    /// By this link; `None` where nobody has asked yet by which.
    link: Option<String>,
}

#[derive(Debug)]
struct Try {
    socket: Socket,
    place: usize,
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
    /// No remote can be connected to.
    Failed(String),
}

/// A control connection, and where it leads.
#[derive(Debug)]
pub struct Connected {
    /// The connection.
    pub stream: TcpStream,
    /// Place of the remote in the configuration.
    pub place: usize,
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

impl Known {
    /// It comes first again: where this host was or whom it tried says nothing any more, and the lookup may lead into
    /// a tunnel that isn't there.
    pub fn trust(&mut self) {
        self.good = !self.addresses.is_empty();
    }
}

impl Dial {
    /// Starts to dial these remotes of the configuration, the best first.
    pub fn start(
        remotes: impl IntoIterator<Item = (usize, Remote, Known)>,
        confines: Confines,
        (poller, token): (&Poller, u64),
        now: Time,
    ) -> Outcome<Dial> {
        let target =
            |(place, remote, known)| Target { place, remote, lookup: None, known, addresses: Vec::new() };
        let mut dial = Dial {
            confines,
            later: remotes.into_iter().map(target).collect(),
            begun: Vec::new(),
            waiting: VecDeque::new(),
            tries: Vec::new(),
            next_start: now,
            next_remote: now,
            deadline: now + DIAL_WITHIN,
            token,
            last_failure: None,
        };
        dial.begin(now, poller)?;
        Ok(dial)
    }

    /// Addresses of the remotes, as far as they were found.
    pub fn addresses(&self) -> impl Iterator<Item = (usize, SocketAddr)> {
        self.begun.iter().flat_map(|target| target.addresses.iter().map(|address| (target.place, *address)))
    }

    /// The next remote's turn.
    fn begin(&mut self, now: Time, poller: &Poller) -> Outcome<()> {
        let Some(mut target) = self.later.pop_front() else { return Ok(()) };
        self.deadline = now + DIAL_WITHIN;
        self.next_remote = now + NEXT_REMOTE_AFTER;
        let place = target.place;
        if let Ok(ip) = target.remote.host.parse() {
            target.addresses.push(SocketAddr::new(ip, target.remote.port));
        } else {
            if target.known.good {
                target.addresses.clone_from(&target.known.addresses);
            }
            // Also then: the name may lead elsewhere by now.
            let lookup = Lookup::start(&target.remote, self.confines, now)?;
            poller
                .add(lookup.as_fd(), self.token, Interest::Read)
                .map_err(|e| crate::exit::Failure::system("fill the epoll set", e))?;
            target.lookup = Some(lookup);
        }
        self.waiting.extend(target.addresses.iter().map(|address| Candidate {
            place,
            address: *address,
            link: None,
        }));
        self.begun.push(target);
        Ok(())
    }

    /// Goes on as far as it can. `ways_out` is called before each address is connected to: it keeps the way there
    /// outside the tunnel, and names the links to connect by, best first; with none that is left to the kernel.
    pub fn step(
        &mut self,
        now: Time,
        poller: &Poller,
        mut ways_out: impl FnMut(SocketAddr) -> Outcome<Vec<String>>,
    ) -> Dialling {
        self.take_lookups(now);
        if let Some(connected) = self.check_tries(now, poller) {
            return Dialling::Connected(connected);
        }
        loop {
            // A try that failed leaves its turn to the next at once.
            while (self.tries.is_empty() || now >= self.next_start)
                && let Some(candidate) = self.waiting.pop_front()
            {
                self.try_out(candidate, now, poller, &mut ways_out);
            }
            let nothing = self.tries.is_empty() && !self.begun.iter().any(|target| target.lookup.is_some());
            let turn = self.waiting.is_empty() && (nothing || now >= self.next_remote);
            if self.later.is_empty() || !turn {
                break;
            }
            if let Err(failure) = self.begin(now, poller) {
                self.note(failure.text);
            }
        }
        let looking = self.begun.iter().any(|target| target.lookup.is_some());
        let exhausted = !looking && self.waiting.is_empty() && self.tries.is_empty();
        if exhausted || now >= self.deadline {
            let why = self.last_failure.take();
            let host = self.begun.first().map_or("anybody", |target| &target.remote.host);
            return Dialling::Failed(why.unwrap_or_else(|| format!("no answer from {host}")));
        }
        Dialling::Pending
    }

    /// When [`Dial::step`] has something to do without a descriptor being ready.
    pub fn poll_timeout(&self) -> Time {
        let next = match self.waiting.is_empty() {
            false => Some(self.next_start),
            true => (!self.later.is_empty()).then_some(self.next_remote),
        };
        let lookups = self.begun.iter().filter_map(|target| target.lookup.as_ref()).map(Lookup::until);
        let tries = self.tries.iter().map(|t| t.until);
        tries.chain(next).chain(lookups).fold(self.deadline, Time::min)
    }

    fn take_lookups(&mut self, now: Time) {
        for at in 0..self.begun.len() {
            let target = &mut self.begun[at];
            let Some(result) = target.lookup.as_ref().and_then(|lookup| lookup.poll(now, &target.remote))
            else {
                continue;
            };
            target.lookup = None;
            let fallback = target.known.addresses.clone();
            let found = result.unwrap_or_else(|why| {
                if !fallback.is_empty() {
                    log::warn!("{why}; trying the address it had before");
                }
                self.note(why);
                fallback.into()
            });
            let target = &mut self.begun[at];
            for address in found {
                if !target.addresses.contains(&address) {
                    target.addresses.push(address);
                    self.waiting.push_back(Candidate { place: target.place, address, link: None });
                }
            }
        }
    }

    fn check_tries(&mut self, now: Time, poller: &Poller) -> Option<Connected> {
        let mut at = 0;
        while at < self.tries.len() {
            let result = match self.tries[at].finished() {
                None if now >= self.tries[at].until => {
                    Err(format!("no answer from {}", self.tries[at].address))
                }
                None => {
                    at += 1;
                    continue;
                }
                Some(result) => result.map_err(|e| refused(self.tries[at].address, &e)),
            };
            let done = self.tries.remove(at);
            let _ = poller.remove(&done.socket);
            match result {
                Ok(()) => {
                    let Try { socket, place, address, link, .. } = done;
                    return Some(Connected { stream: socket.into(), place, address, link });
                }
                Err(text) => self.note(text),
            }
        }
        None
    }

    /// Connects, by the best link if there are several; the others' turns come after that.
    fn try_out(
        &mut self,
        mut candidate: Candidate,
        now: Time,
        poller: &Poller,
        ways_out: &mut impl FnMut(SocketAddr) -> Outcome<Vec<String>>,
    ) {
        if candidate.link.is_none() {
            let links = match ways_out(candidate.address) {
                Ok(links) => links,
                Err(failure) => return self.note(failure.text),
            };
            let mut links = links.into_iter();
            candidate.link = links.next();
            for link in links.rev() {
                self.waiting.push_front(Candidate { link: Some(link), ..candidate.clone() });
            }
        }
        let address = candidate.address;
        match self.connect(candidate, poller, now) {
            Ok(()) => {
                self.next_start = now + NEXT_AFTER;
                self.next_remote = now + NEXT_REMOTE_AFTER;
            }
            Err(error) => self.note(refused(address, &error)),
        }
    }

    fn connect(&mut self, candidate: Candidate, poller: &Poller, now: Time) -> io::Result<()> {
        let Candidate { place, address, link } = candidate;
        let host = self.begun.iter().find(|target| target.place == place);
        let host = host.map_or("the server", |target| &target.remote.host);
        let by = link.as_ref().map(|link| format!(" by {link}")).unwrap_or_default();
        log::info!("connecting to {host} ({address}){by} ...");
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
        self.tries.push(Try { socket, place, address, link, until: now + CONNECT_WITHIN });
        Ok(())
    }

    /// A failure: the last one is the result where nothing works, the others go to the log.
    fn note(&mut self, failure: String) {
        if let Some(before) =
            self.last_failure.replace(failure).filter(|before| Some(before) != self.last_failure.as_ref())
        {
            log::info!("{before}");
        }
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

/// The next address, or the next link, is tried after this time without a result (RFC 8305 section 5).
const NEXT_AFTER: Duration = Duration::from_millis(250);
/// The next remote is second choice: a lost SYN alone doesn't lead there.
const NEXT_REMOTE_AFTER: Duration = Duration::from_millis(1_250);
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Lookup and connections of a remote, and of those before it, together.
const DIAL_WITHIN: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_can_be_trusted() {
        let mut known = Known::default();
        known.trust();
        assert!(!known.good);
        known.addresses.push("192.0.2.1:55555".parse().expect("an address"));
        known.trust();
        assert!(known.good);
    }
}
