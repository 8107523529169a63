//! The key holder: this program in its other role. It has the server's private key, which no other process has, and
//! signs with it for workers' handshakes, one signature for each connection.
//!
//! ```text
//! guard --a channel for each connection--> key holder <--one request, one answer--> worker
//! ```
//! It reads the key where the guard has opened it, loses its privileges, and says that it is ready. From then on it
//! reads what workers send, and nothing else that anybody could have thought of: it is bounded in bytes, in messages and
//! in time ([`desk`]), and no worker holds up another.

mod desk;

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit};

use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::key_ipc::{
    ADDRESS_SPACE, DeskEnd, HolderEnd, HolderReply, HolderRequest, HolderSetup, Misuse, MisuseEnd, Signature,
};
use tunguard::rigged;
use tunguard::sys::capabilities::{self, Capability, Kept};
use tunguard::sys::jail;
use tunguard::sys::poller::{Interest, Poller, Ready};
use tunguard::sys::seccomp::Filter;
use tunguard::sys::seccomp::holder::{Newborn, life};
use tunguard::sys::seqpacket::Incoming;
use tunguard::sys::{clock, memfd, signals, spawn, tls_key};
use tunguard::tls::{SigningKey, ToSign};

use self::desk::{Act, Desk, Heard};

/// The whole program, as the guard starts it: descriptor 3 its channel, 4 the [`HolderSetup`], 5 the key's file, 6 where
/// misuse is told.
pub fn main() -> ExitCode {
    let Ok([channel, setup, key, misuse]) = spawn::inherited::<4>() else {
        eprintln!("{}", crate::NOT_BY_HAND);
        return Exit::Usage.into();
    };
    let guard = HolderEnd::from_fd(channel);
    let outcome =
        Poller::new(EVENTS).map_err(|e| Failure::system("make an epoll set", e)).and_then(|poller| {
            let orders = guard.try_clone().map_err(|e| Failure::system("listen to the guard", e))?;
            let (key, channels) = prepare(setup, key, &poller)?;
            let holder = Holder::new(orders, MisuseEnd::from_fd(misuse), key, channels, poller)?;
            guard.send(&HolderReply::Ready, &[]).map_err(|e| Failure::system("answer the guard", e))?;
            Ok(holder)
        });
    match outcome.and_then(Holder::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = guard.send(&HolderReply::Failed { text: failure.text }, &[]);
            failure.exit.into()
        }
    }
}

/// The start, and the loss of privilege, in order. Nothing that a worker sent is read before it is over.
fn prepare(setup: OwnedFd, key: OwnedFd, poller: &Poller) -> Outcome<(SigningKey, usize)> {
    // 1. Only this version's guard starts us, and signals to its terminal or its service are its own. Of root only what
    //    the next steps need.
    crate::check_version()?;
    signals::block_stops()?;
    rigged::read_orders();
    capabilities::keep(PRIVILEGES)?;
    // 2. We end with the guard, and can be told from its other processes.
    let _ = prctl::set_name(NAME);
    jail::die_with_parent()?;
    // 3. From before there is anything to be seen: no dumps, no tracing, nothing in swap space.
    jail::keep_memory_private(ADDRESS_SPACE)?;
    tls_key::keep_private_numbers_apart();
    let bytes = memfd::read(setup).map_err(|e| Failure::system("read the key holder's setup", e))?;
    let setup = HolderSetup::decode(&bytes)
        .ok_or_else(|| Failure::new(Exit::Malformed, "the key holder's setup doesn't decode"))?;
    rigged::point("holder.started");
    // 4. The key, while we may be root: its file is open already, and is closed with this.
    let key = SigningKey::read(key, &setup.cert, &setup.names)?;
    // 5. No network but our own empty one, and none of the queues. Where the kernel refuses that (containers), the rest
    //    of the jail has to do.
    let _ = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC);
    // 6. Stage one: a user of our own, no capabilities, empty root, bound to the guard's life.
    let channels = setup.channels.min(descriptors_allowed().saturating_sub(OWN_DESCRIPTORS));
    jail::enter(&jail::Jail {
        uid: setup.uid,
        gid: setup.uid,
        root: &setup.root,
        descriptors: (channels + OWN_DESCRIPTORS) as u64,
        address_space: ADDRESS_SPACE,
        parent: setup.guard,
    })?;
    // 7. No files, ports or other processes.
    jail::give_up_the_rest(setup.landlock)?;
    // 8. The system calls of what is left to do: to hear, to sign and to answer.
    jail::filter_calls(|| Filter::compile(&life(Newborn { epoll: poller.as_fd() })))?;
    Ok((key, channels))
}

fn descriptors_allowed() -> usize {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((0, 0));
    usize::try_from(most).unwrap_or(usize::MAX)
}

struct Holder {
    guard: HolderEnd,
    /// The guard has no more orders: what is open is served, and then that was it.
    replaced: bool,
    misuse: MisuseEnd,
    key: SigningKey,
    desk: Desk,
    channels: HashMap<u64, DeskEnd>,
    poller: Poller,
}

impl Holder {
    fn new(
        guard: HolderEnd,
        misuse: MisuseEnd,
        key: SigningKey,
        channels: usize,
        poller: Poller,
    ) -> Outcome<Holder> {
        let failed = |e| Failure::system("prepare to wait for events", e);
        poller.add(guard.as_fd(), GUARD, Interest::Read).map_err(failed)?;
        let desk = Desk::new(channels);
        Ok(Holder { guard, replaced: false, misuse, key, desk, channels: HashMap::new(), poller })
    }

    fn run(mut self) -> Outcome<()> {
        while !(self.replaced && self.desk.is_empty()) {
            let timeout = self.desk.deadline().map(|at| at.since(clock::now()));
            let events = self.poller.wait(timeout).map_err(|e| Failure::system("wait for events", e))?;
            let ready: Vec<Ready> = events.collect();
            for event in ready {
                match event.token {
                    GUARD => self.obey_guard()?,
                    token => self.serve(token - FIRST_CHANNEL),
                }
            }
            for late in self.desk.late(clock::now()) {
                self.channels.remove(&late);
            }
        }
        Ok(())
    }

    fn obey_guard(&mut self) -> Outcome<()> {
        for _ in 0..ORDERS_PER_TURN {
            match self.guard.receive(true) {
                Ok(Incoming::Message(HolderRequest::Serve { channel }, fds)) => {
                    let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
                        return Err(Failure::new(
                            Exit::Malformed,
                            "the guard's order came without its channel",
                        ));
                    };
                    self.open(channel, DeskEnd::from_fd(fd));
                }
                Ok(Incoming::Nothing) => break,
                Ok(Incoming::Closed) => {
                    let _ = self.poller.remove(self.guard.as_fd());
                    self.replaced = true;
                    break;
                }
                Err(violation) => {
                    return Err(Failure::new(Exit::Malformed, format!("the guard sent {violation}")));
                }
            }
        }
        Ok(())
    }

    fn open(&mut self, number: u64, channel: DeskEnd) {
        if let Some(oldest) = self.desk.open(number, clock::now()) {
            self.channels.remove(&oldest);
        }
        // Where it can't be watched it is closed, and its worker sees that.
        if self.poller.add(channel.as_fd(), number + FIRST_CHANNEL, Interest::Read).is_ok() {
            self.channels.insert(number, channel);
        } else {
            self.desk.hear(number, Heard::Closed);
        }
    }

    fn serve(&mut self, number: u64) {
        let Some(channel) = self.channels.get(&number) else { return };
        let heard = match channel.receive(false) {
            Ok(Incoming::Message(wanted, _)) => Heard::Request(wanted),
            Ok(Incoming::Nothing) => Heard::Nothing,
            Ok(Incoming::Closed) => Heard::Closed,
            Err(violation) => Heard::Garbage(violation.to_string()),
        };
        match self.desk.hear(number, heard) {
            Act::Wait => return,
            Act::Sign(wanted) => self.sign(number, &wanted),
            Act::Report(what) => self.report(number, what),
            Act::Close => {}
        }
        self.channels.remove(&number);
    }

    fn sign(&self, number: u64, wanted: &ToSign) {
        rigged::point("holder.asked");
        let answer = match self.key.sign(wanted) {
            Ok(Some(signature)) => Signature::Made(signature),
            Ok(None) => {
                return self.report(number, "a signature that no handshake with this key needs".to_owned());
            }
            Err(failure) => Signature::Failed { text: failure.text },
        };
        rigged::point("holder.signed");
        if let Some(channel) = self.channels.get(&number) {
            // A worker that is gone, or doesn't read what fits an empty channel, does without.
            let _ = channel.send(&answer, &[]);
        }
    }

    fn report(&self, channel: u64, what: String) {
        // A guard that doesn't read learns it from the channel's end, as a handshake that came to nothing.
        let _ = self.misuse.send(&Misuse { channel, what }, &[]);
    }
}

/// As `ps -o comm` and `top` show it.
const NAME: &CStr = c"tg-keyholder";

/// Until it is locked in, and none after that.
const PRIVILEGES: &[Kept] = &[
    Kept::used_if_there(Capability::CAP_SYS_ADMIN, "network and IPC namespaces of its own"),
    Kept::used_if_there(Capability::CAP_SYS_RESOURCE, "more locked memory than its allowance"),
    Kept::used(Capability::CAP_SYS_CHROOT, "an empty root"),
    Kept::used(Capability::CAP_SETPCAP, "an empty bounding set"),
    Kept::used(Capability::CAP_SETGID, "a group of its own"),
    Kept::used(Capability::CAP_SETUID, "a user of its own"),
];

const GUARD: u64 = 0;
const FIRST_CHANNEL: u64 = 1;
const EVENTS: usize = 64;
/// How long the guard may keep workers waiting.
const ORDERS_PER_TURN: usize = 64;
/// Channel twice, misuse, epoll, Landlock's ruleset for a moment, /dev/null three times, an order's descriptors on their way.
const OWN_DESCRIPTORS: usize = 24;
