//! For tests (feature `rigged`): a worker under foreign control, that started as any other does. What it tries, at which
//! moment, is ordered in the file that src/rigged.rs reads, as `act MOMENT.NAME`; what becomes of it, the guard's log says:
//!
//! ```text
//! red team: carrying.read-device             it is about to try
//! red team: carrying.read-device: EPERM      it was refused, and goes on
//! red team: carrying.send-anywhere: done     it got through
//! worker 17 of ann (5eed) died: ...          it got no further
//! ```
//! What is one system call is in src/sys/red_team.rs; here is what takes more: other ways to ask the kernel, and all that a
//! worker can say to the guard.

use std::ffi::CString;
use std::io::IoSlice;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::process::{self, ExitCode};
use std::sync::Mutex;
use std::time::Duration;
use std::{fs, io};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn6, sendmsg};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::getppid;

use tunguard::ipc::{Claim, Grant, Reply, Report, Request, WorkerEnd};
use tunguard::rigged;
use tunguard::segment::checksum;
use tunguard::sys::clock;
use tunguard::sys::mq::{QueueSize, Reader, Writer};
use tunguard::sys::red_team::{self as kernel, ACTS, ACTS_HERE, Ground, Moment};
use tunguard::sys::seqpacket::{Incoming, MAX_MESSAGE};
use tunguard::tls::{CertId, SavedSession};
use tunguard::wire::vnet::VnetHeader;

use crate::admission::TunExit;

/// Where a worker is when it turns, and what it holds.
pub struct Stage<'a> {
    moment: Moment,
    guard: &'a WorkerEnd,
    tcp: BorrowedFd<'a>,
    carried: Option<Carried<'a>>,
}

/// What it holds besides, with a session.
pub struct Carried<'a> {
    /// The UDP slot.
    pub udp: BorrowedFd<'a>,
    /// The queue from the guard.
    pub queue: BorrowedFd<'a>,
    /// The set of descriptors to wait for.
    pub epoll: BorrowedFd<'a>,
    /// Where packets go.
    pub exit: &'a mut TunExit,
}

impl<'a> Stage<'a> {
    /// Locked in, before a byte of the network is read.
    pub fn admission(guard: &'a WorkerEnd, tcp: BorrowedFd<'a>) -> Stage<'a> {
        Stage { moment: Moment::Admission, guard, tcp, carried: None }
    }

    /// Locked in further, with a session.
    pub fn carrying(guard: &'a WorkerEnd, tcp: BorrowedFd<'a>, carried: Carried<'a>) -> Stage<'a> {
        Stage { moment: Moment::Carrying, guard, tcp, carried: Some(carried) }
    }
}

/// Tries what was ordered for this moment, one thing after the other.
pub fn perform(mut stage: Stage<'_>) {
    let mut ground = match stage.ground() {
        Ok(ground) => ground,
        Err(failure) => return log::error!("red team: {failure}"),
    };
    for order in rigged::acts() {
        let Some((moment, name)) = order.split_once('.') else { continue };
        let Some(moment) = stage.moments().iter().copied().find(|known| word(*known) == moment) else {
            continue;
        };
        log::warn!("red team: {order}");
        if name == "list" || name == "list-calls" {
            list(moment, name == "list");
            continue;
        }
        if moment == Moment::Granted
            && let Err(refused) = stage.take_grant(&mut ground)
        {
            log::warn!("red team: {order}: no grant: {refused}");
            continue;
        }
        let came = match ACTS.iter().chain(ACTS_HERE).find(|act| act.name == name) {
            Some(act) => act.attempt(&ground).map_err(|errno| format!("{errno:?}")),
            None => match OTHERS.iter().find(|(known, _, _)| *known == name) {
                Some((_, _, attempt)) => attempt(&mut stage),
                None => Err("no such act".to_owned()),
            },
        };
        match came {
            Ok(()) => log::warn!("red team: {order}: done"),
            Err(refused) => log::warn!("red team: {order}: {refused}"),
        }
    }
}

/// What can be tried at this moment, so that a test leaves none out; or the system calls among it.
fn list(moment: Moment, others: bool) {
    let calls = ACTS.iter().chain(ACTS_HERE).filter(|act| act.moments.contains(&moment)).map(|act| act.name);
    let others = OTHERS.iter().filter(|(_, moments, _)| others && moments.contains(&moment));
    let names: Vec<&str> = calls.chain(others.map(|(name, _, _)| *name)).collect();
    for few in names.chunks(30) {
        log::warn!("red team knows, {}: {}", word(moment), few.join(" "));
    }
    log::warn!("red team knows, {}: all {}", word(moment), names.len());
}

/// Whom a worker could attack: an attacker would have to guess their numbers. Called in the nursery, right before it forks.
pub fn look_around() {
    if rigged::acts().is_empty() {
        return;
    }
    let guard = getppid().as_raw();
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    let children = read(format!("/proc/{guard}/task/{guard}/children"));
    let worker = |pid: &i32| read(format!("/proc/{pid}/comm")).trim() == "tunguard-worker";
    let sibling = children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(worker);
    *AROUND.lock().expect("one thread") =
        Around { guard, nursery: process::id() as i32, sibling: sibling.unwrap_or(0) };
    // Stand-ins for the queue of another session, as it is while it has a name.
    for (name, mode) in kernel::QUEUE_NAMES.into_iter().zip([0o600, 0o666]) {
        if let Ok(queue) = Writer::create(name, TINY) {
            let _ = fchmod(queue.as_fd(), Mode::from_bits_truncate(mode));
        }
    }
}

#[derive(Clone, Copy)]
struct Around {
    guard: i32,
    nursery: i32,
    sibling: i32,
}

static AROUND: Mutex<Around> = Mutex::new(Around { guard: 0, nursery: 0, sibling: 0 });

/// This program as a worker has turned into it (`exec-set-uid`): its exit code says what it gained. It does nothing else
/// where its user isn't who started it.
pub fn after_exec() -> Option<ExitCode> {
    let (real, effective) = (nix::unistd::getuid(), nix::unistd::geteuid());
    if real == effective && std::env::args().nth(1).as_deref() != Some(AFTER_EXEC) {
        return None;
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let none = held.map(|held| held.trim().trim_start_matches('0').is_empty());
    Some(ExitCode::from(match (effective.is_root(), none) {
        (false, _) => 76,
        (true, Some(true)) => 77,
        (true, Some(false)) => 78,
        (true, None) => 79,
    }))
}

impl Stage<'_> {
    /// What can be ordered for now.
    fn moments(&self) -> &'static [Moment] {
        match self.moment {
            Moment::Admission => &[Moment::Admission, Moment::Granted],
            _ => &[Moment::Carrying],
        }
    }

    /// Claims a session, for nobody, and keeps what comes with it.
    fn take_grant(&self, ground: &mut Ground) -> Came {
        let (_, fds) = self.granted("somebody-else")?;
        let [udp, queue, exit] =
            <[OwnedFd; 3]>::try_from(fds).map_err(|fds| format!("{} descriptors", fds.len()))?;
        // The memory stands where the queue does later.
        [ground.udp, ground.queue, ground.exit] = [udp, queue, exit].map(IntoRawFd::into_raw_fd);
        Ok(())
    }

    fn ground(&self) -> tunguard::exit::Outcome<Ground> {
        let mut ground = Ground::new()?;
        (ground.channel, ground.tcp) = (self.guard.as_fd().as_raw_fd(), self.tcp.as_raw_fd());
        if let Some(carried) = &self.carried {
            ground.udp = carried.udp.as_raw_fd();
            ground.queue = carried.queue.as_raw_fd();
            ground.epoll = carried.epoll.as_raw_fd();
            ground.exit = match &*carried.exit {
                TunExit::Device(tun) => tun.as_fd().as_raw_fd(),
                TunExit::Guard(uplink) => uplink.as_fd().as_raw_fd(),
            };
        }
        let Around { guard, nursery, sibling } = *AROUND.lock().expect("one thread");
        (ground.guard, ground.nursery, ground.sibling) = (guard, nursery, sibling);
        Ok(ground)
    }

    fn say(&self, request: &Request) -> Came {
        match self.guard.send(request, &[]) {
            Ok(true) => Ok(()),
            Ok(false) => Err("the guard doesn't read".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Says what is out of place, and waits for what comes of it: a worker that is killed doesn't return.
    fn provoke(&self, requests: &[Request]) -> Came {
        requests.iter().try_for_each(|request| self.say(request))?;
        self.wait(PATIENCE);
        Ok(())
    }

    /// The same with bytes that are no request, and descriptors.
    fn provoke_raw(&self, bytes: &[u8], fds: &[i32]) -> Came {
        let rights = [ControlMessage::ScmRights(fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let channel = self.guard.as_fd().as_raw_fd();
        let sent = sendmsg::<()>(channel, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
        sent.map_err(|errno| format!("{errno:?}"))?;
        self.wait(PATIENCE);
        Ok(())
    }

    /// The guard's next word to this worker.
    fn hear(&self) -> Result<(Reply, Vec<OwnedFd>), String> {
        let until = clock::now() + PATIENCE;
        loop {
            match self.guard.receive(true) {
                Ok(Incoming::Message(Reply::Query, _)) => self.say(&Request::Report(Box::default()))?,
                Ok(Incoming::Message(reply, fds)) => return Ok((reply, fds)),
                Ok(Incoming::Closed) => return Err("the guard is gone".to_owned()),
                Ok(Incoming::Nothing) if until <= clock::now() => return Err("no answer".to_owned()),
                Ok(Incoming::Nothing) => {
                    let mut fds = [PollFd::new(self.guard.as_fd(), PollFlags::POLLIN)];
                    let _ = poll(&mut fds, 100u16);
                }
                Err(violation) => return Err(violation.to_string()),
            }
        }
    }

    /// Lets time go by.
    fn wait(&self, time: Duration) {
        let until = clock::now() + time;
        while clock::now() < until {
            let _ = poll(&mut [], PollTimeout::from(50u16));
        }
    }

    fn granted(&self, name: &str) -> Result<(Grant, Vec<OwnedFd>), String> {
        self.say(&claim(name, false))?;
        match self.hear()? {
            (Reply::Granted(grant), fds) => Ok((*grant, fds)),
            (Reply::Refused { text, .. }, _) => Err(format!("refused by the guard: {text}")),
            (other, _) => Err(format!("the guard says {other:?}")),
        }
    }

    /// What the guard says to queues that are there, or are not.
    fn register(&self, size: QueueSize) -> Came {
        self.say(&Request::Register { size })?;
        match self.hear()? {
            (Reply::Registered, _) => Ok(()),
            (Reply::Refused { .. }, _) => Err("refused by the guard".to_owned()),
            (other, _) => Err(format!("the guard says {other:?}")),
        }
    }

    /// A packet to the device, as if it came from the client.
    fn inject(&mut self, packet: &[u8]) -> Came {
        let Some(Carried { exit, .. }) = &mut self.carried else { return Err("no session".to_owned()) };
        let vnet = VnetHeader::default().emit();
        match exit {
            TunExit::Device(tun) => {
                let written = tun.write(&[IoSlice::new(&vnet), IoSlice::new(packet)]);
                written.map_err(|error| shown(&error))
            }
            TunExit::Guard(uplink) => {
                let parts = [IoSlice::new(&vnet), IoSlice::new(&[]), IoSlice::new(packet)];
                uplink.worker_to_guard(&parts).map_err(|reason| format!("{reason:?}"))?;
                match uplink.flush().packets {
                    0 => Ok(()),
                    _ => Err("the queue is full".to_owned()),
                }
            }
        }
    }
}

/// `Ok` where it got through, and otherwise what refused it.
type Came = Result<(), String>;
type Attempt = fn(&mut Stage<'_>) -> Came;

/// Acts of several steps, and those that are no system call of their own.
static OTHERS: &[(&str, &[Moment], Attempt)] = &[
    // The kernel, otherwise.
    #[cfg(target_arch = "x86_64")]
    ("vfork", BOTH, |_| named(kernel::vfork())),
    #[cfg(target_arch = "x86_64")]
    ("32-bit-call", BOTH, |_| named(kernel::call_as_32_bit())),
    ("listen-on-tcp", BOTH, |_| named(kernel::listen_on_tcp())),
    ("find-itself-dumpable", BOTH, |_| match kernel::is_dumpable() {
        true => Ok(()),
        false => Err("not dumpable".to_owned()),
    }),
    ("exec-set-uid", BOTH, |_| {
        let program = CString::new(rigged::with().unwrap_or_default()).map_err(|e| e.to_string())?;
        let argument = CString::new(AFTER_EXEC).map_err(|e| e.to_string())?;
        named(kernel::exec(&program, &argument))
    }),
    ("leave-queues", FIRST, |_| {
        // Names that are not the guard's stay when the worker is gone.
        for n in 0..MANY {
            if let Err(error) = Reader::create(&format!("/left-{}-{n}", process::id()), TINY) {
                return Err(format!("{} after {n}", shown(&error)));
            }
        }
        Ok(())
    }),
    // The guard: what it is told in the wrong phase, twice, or unasked.
    ("register-before-grant", FIRST, |s| s.provoke(&[register(TINY)])),
    ("register-again", LATER, |s| s.provoke(&[register(TINY)])),
    ("report-unasked", BOTH, |s| s.provoke(&[Request::Report(Box::<Report>::default())])),
    ("redeem-twice", FIRST, |s| s.provoke(&[Request::Redeem([7; 32]), Request::Redeem([8; 32])])),
    ("redeem-late", LATER, |s| s.provoke(&[Request::Redeem([7; 32])])),
    ("claim-again", LATER, |s| s.provoke(&[claim("somebody-else", false)])),
    ("claim-twice", FIRST, |s| s.provoke(&[claim("somebody-else", false), claim("another", false)])),
    ("claim-another-ones-ticket", FIRST, |s| s.provoke(&[claim("somebody-else", true)])),
    ("claim-impossible-name", FIRST, |s| s.provoke(&[claim("../\u{1b}[2J", false)])),
    ("ticket-before-session", FIRST, |s| s.provoke(&[ticket(1)])),
    ("ticket-twice", LATER, |s| s.provoke(&[ticket(1), ticket(2)])),
    ("move-before-session", FIRST, |s| {
        let new = ([192, 0, 2, 1], 1).into();
        s.provoke(&[Request::Moved { new, after_ms: None, inside: false }])
    }),
    ("lose-before-session", FIRST, |s| s.provoke(&[Request::ControlLost])),
    // The guard: what is granted, and what is made of it.
    ("claim-any-name", FIRST, |s| s.granted("somebody-else").map(drop)),
    ("register-another-size", FIRST, |s| {
        let (_grant, _fds) = s.granted("somebody-else")?;
        s.register(TINY)
    }),
    // The guard: what is no request.
    ("unknown-request", BOTH, |s| s.provoke_raw(&[99, 0, 0, 0], &[])),
    ("cut-request", BOTH, |s| s.provoke_raw(&[1, 0], &[])),
    ("too-long-request", BOTH, |s| s.provoke_raw(&[0; MAX_MESSAGE + 1], &[])),
    ("empty-request", BOTH, |s| s.provoke_raw(&[], &[])),
    ("descriptor-to-guard", BOTH, |s| s.provoke_raw(&[5, 0, 0, 0], &[s.tcp.as_raw_fd()])),
    ("descriptors-to-guard", BOTH, |s| s.provoke_raw(&[5, 0, 0, 0], &[s.tcp.as_raw_fd(); 253])),
    // The guard: too much, or nothing.
    ("flood-of-requests", BOTH, |s| {
        for _ in 0..100 * MANY {
            if let Ok(false) = s.guard.send(&line("flood".to_owned()), &[]) {
                let mut fds = [PollFd::new(s.guard.as_fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut fds, 100u16);
            }
        }
        Ok(())
    }),
    ("flood-of-lines", BOTH, |s| {
        for n in 0..200 {
            s.say(&line(format!("one of many lines, {n}")))?;
        }
        // Until a line is due again: this act's own report.
        s.wait(Duration::from_secs(3));
        Ok(())
    }),
    ("lines-in-a-line", BOTH, |s| {
        s.say(&line("first\n[1] a forged line\r[1] and another\u{1b}[2J\u{202e}\u{0}".to_owned()))
    }),
    ("close-channel", BOTH, |s| {
        nix::unistd::close(s.guard.as_fd().as_raw_fd()).map_err(|errno| format!("{errno:?}"))?;
        loop {
            s.wait(PATIENCE);
        }
    }),
    ("stay-deaf", BOTH, |s| {
        loop {
            s.wait(PATIENCE);
        }
    }),
    // What is possible by design: a test says so, that documents say so.
    ("foreign-source", LATER, |s| {
        // From 10.9.0.77 to port 40009 of the server's inner address.
        let mut packet = [0x45, 0, 0, 33, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 77, 10, 9, 0, 1].to_vec();
        let sum = checksum::finish(checksum::sum(&packet));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend([0x9c, 0x49, 0x9c, 0x49, 0, 13, 0, 0]);
        packet.extend(b"alien");
        s.inject(&packet)
    }),
    ("send-anywhere", LATER, |s| {
        let Some(carried) = &s.carried else { return Err("no session".to_owned()) };
        let to: Ipv6Addr = "::ffff:198.18.2.2".parse().map_err(|_| "no address".to_owned())?;
        let to = SockaddrIn6::from(std::net::SocketAddrV6::new(to, 40_010, 0, 0));
        let parts = [IoSlice::new(b"anybody?")];
        named(sendmsg(carried.udp.as_raw_fd(), &parts, &[], MsgFlags::empty(), Some(&to)).map(drop))
    }),
];

fn word(moment: Moment) -> &'static str {
    match moment {
        Moment::Admission => "admission",
        Moment::Granted => "granted",
        Moment::Carrying => "carrying",
    }
}

fn named(result: nix::Result<()>) -> Came {
    result.map_err(|errno| format!("{errno:?}"))
}

fn shown(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |code| format!("{:?}", Errno::from_raw(code)))
}

fn claim(name: &str, resumed: bool) -> Request {
    let cert = CertId { issuer: [7; 32], serial: vec![1], not_after: 1 << 40 };
    Request::Claim(Claim { name: name.to_owned(), cert, resumed, want: vec![], resume: None })
}

fn register(size: QueueSize) -> Request {
    Request::Register { size }
}

fn ticket(n: u8) -> Request {
    Request::Ticket { id: [n; 32], session: SavedSession::from_bytes(vec![1; 100]), until: 1 << 40 }
}

fn line(text: String) -> Request {
    Request::Log { level: 2, text }
}

const FIRST: &[Moment] = &[Moment::Admission];
const LATER: &[Moment] = &[Moment::Carrying];
const BOTH: &[Moment] = &[Moment::Admission, Moment::Carrying];

/// Far beyond what the guard needs to kill, or to answer.
const PATIENCE: Duration = Duration::from_secs(8);
const MANY: u32 = 10_000;
const TINY: QueueSize = QueueSize { messages: 1, bytes: 1 };
const AFTER_EXEC: &str = "red-team-after-exec";
