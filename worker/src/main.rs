//! `tunguard-worker`: the process of one client's session. The guard starts this program once, as the
//! [`nursery`], with descriptor 3 its channel to the guard, 4 a sealed memory file with the [`Setup`] and 5 a channel to
//! the key holder; the nursery forks a worker for each connection. The key holder is this program as well ([`holder`]).

#![forbid(unsafe_code)]

mod admission;
mod downlink;
mod guard_log;
mod holder;
mod nursery;
mod run;
mod signer;
mod tickets;
mod uplink;

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};

use tunguard::VERSION;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::{HANDSHAKE_SECONDS, NurseryEnd, NurseryReply, Request, Setup, WorkerEnd};
use tunguard::key_ipc::KEY_HOLDER;
use tunguard::sys::{clock, jail, memfd, spawn};

use crate::nursery::{Newborn, Prepared};

fn main() -> ExitCode {
    if std::env::args().nth(2).as_deref() == Some(KEY_HOLDER) {
        return holder::main();
    }
    let Ok([channel, setup, signing]) = spawn::inherited::<3>() else {
        eprintln!("{NOT_BY_HAND}");
        return Exit::Usage.into();
    };
    let guard = NurseryEnd::from_fd(channel);
    let prepared = match prepare(setup, signing) {
        Ok(prepared) => prepared,
        Err(failure) => {
            let _ = guard.send(&NurseryReply::Failed { text: failure.text }, &[]);
            return failure.exit.into();
        }
    };
    match nursery::run(guard) {
        Ok(Some(newborn)) => live(&prepared, newborn),
        Ok(None) => ExitCode::SUCCESS,
        Err(failure) => failure.exit.into(),
    }
}

/// The nursery's start, before anything can be forked.
fn prepare(setup: OwnedFd, signing: OwnedFd) -> Outcome<Prepared> {
    // 1. Only this version's guard starts us.
    check_version()?;
    // 2. Ctrl-C reaches the whole terminal, and a service's stop its whole group: the guard hears it, and tells
    //    workers to say goodbye.
    block_stops()?;
    // 3. We end with the guard, and can be told from the workers.
    let _ = prctl::set_name(NURSERY_NAME);
    jail::die_with_parent()?;
    // 4. What we were told; the file is closed with this.
    let bytes = memfd::read(setup).map_err(|e| Failure::system("read the worker's setup", e))?;
    let setup = Setup::decode(&bytes)
        .ok_or_else(|| Failure::new(Exit::Malformed, "the worker's setup doesn't decode"))?;
    Prepared::new(setup, signing)
}

/// A worker's life.
fn live(prepared: &Prepared, newborn: Newborn) -> ExitCode {
    let deadline = clock::now() + Duration::from_secs(HANDSHAKE_SECONDS);
    let Newborn { uid, guard, tcp, signing } = newborn;
    let _ = prctl::set_name(WORKER_NAME);
    let Ok(copy) = guard.try_clone() else { return Exit::System.into() };
    guard_log::install(copy);
    guard_log::set_level(prepared.setup.log_level);
    match lock_in(&prepared.setup, uid).and_then(|()| run::serve(prepared, &guard, tcp, signing, deadline)) {
        Ok(ended) => {
            tell(&guard, ended);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            let fault = matches!(failure.exit, Exit::System | Exit::Usage | Exit::MacLength | Exit::Version);
            tell(&guard, Request::Ended { reason: None, fault, text: failure.text });
            failure.exit.into()
        }
    }
}

/// The worker's loss of privilege, in order. Nothing from the network is read before it is over. What the nursery
/// held is closed already but for its memory: its channel went with [`nursery::run`].
fn lock_in(setup: &Setup, uid: u32) -> Outcome<()> {
    // 1. Stage one: own user, no capabilities, empty root, no dumps, bound to the guard's life.
    let jail = jail::Jail {
        uid,
        gid: uid,
        root: &setup.root,
        descriptors: DESCRIPTORS,
        address_space: ADDRESS_SPACE,
        parent: setup.guard,
    };
    jail::enter(&jail)
    // 2. Stage two, the system call filters, belongs here: a first one for TLS and set-up, a second, narrower one
    //    once the session is established (run::carry).
}

fn check_version() -> Outcome<()> {
    let version = std::env::args().nth(1).unwrap_or_default();
    if version == VERSION {
        return Ok(());
    }
    let text = format!("this worker is version {VERSION}, its guard {version:?}: install them together");
    Err(Failure::new(Exit::Version, text))
}

/// Signals that are meant for the guard.
fn block_stops() -> Outcome<()> {
    let stops = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter();
    SigSet::from_iter(stops).thread_block().map_err(|e| Failure::system("block signals", e))
}

fn tell(guard: &WorkerEnd, ended: Request) {
    // If the guard doesn't read any more, it learns the rest from the exit code.
    let _ = guard.send(&ended, &[]);
}

const NOT_BY_HAND: &str =
    "tunguard-worker is started by tunguard-guard, not by hand: see tunguard server --help";

// As `ps -o comm` and `top` show them: at most 15 bytes.
const NURSERY_NAME: &CStr = c"tg-nursery";
const WORKER_NAME: &CStr = c"tunguard-worker";
/// Two channels, TCP, UDP, TUN, two queues, epoll, log, /dev/null three times, and room for what OpenSSL opens.
const DESCRIPTORS: u64 = 24;
/// A bound against runaway memory, far above what a session touches.
const ADDRESS_SPACE: u64 = 1 << 30;
