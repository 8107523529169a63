//! `tunguard-worker`: the process of one client's session. The guard starts this program once, as the
//! [`nursery`], with descriptor 3 its channel to the guard, 4 a sealed memory file with the [`Setup`] and 5 a channel to
//! the key holder; the nursery forks a worker for each connection. The key holder is this program as well ([`holder`]).

#![forbid(unsafe_code)]

mod admission;
mod downlink;
mod guard_log;
mod holder;
mod nursery;
#[cfg(feature = "rigged")]
mod red_team;
mod run;
mod signer;
mod tickets;
mod uplink;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::prctl;

use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::{HANDSHAKE_SECONDS, NurseryEnd, NurseryReply, Request, Setup, WorkerEnd};
use tunguard::key_ipc::KEY_HOLDER;
use tunguard::sys::capabilities::{self, Capability, Kept};
use tunguard::sys::jail;
use tunguard::sys::seccomp::Filter;
use tunguard::sys::seccomp::worker::{Newborn, admission};
use tunguard::sys::{clock, memfd, mq, signals, spawn};
use tunguard::{VERSION, rigged};

use crate::admission::{Connection, NoSession, Queues};
use crate::nursery::Prepared;

fn main() -> ExitCode {
    #[cfg(feature = "rigged")]
    if let Some(code) = red_team::after_exec() {
        return code;
    }
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
    rigged::read_orders();
    // 2. Root only as far as `lock_in` of the workers needs it.
    capabilities::keep(PRIVILEGES)?;
    // 3. Ctrl-C reaches the whole terminal, and a service's stop its whole group: the guard hears it, and tells
    //    workers to say goodbye.
    signals::block_stops()?;
    // 4. We end with the guard, and can be told from the workers.
    let _ = prctl::set_name(NURSERY_NAME);
    jail::die_with_parent()?;
    // 5. What we were told; the file is closed with this.
    let bytes = memfd::read(setup).map_err(|e| Failure::system("read the worker's setup", e))?;
    let setup = Setup::decode(&bytes)
        .ok_or_else(|| Failure::new(Exit::Malformed, "the worker's setup doesn't decode"))?;
    Prepared::new(setup, signing)
}

/// A worker's life.
fn live(prepared: &Prepared, newborn: nursery::Newborn) -> ExitCode {
    let deadline = clock::now() + Duration::from_secs(HANDSHAKE_SECONDS);
    let nursery::Newborn { uid, number, guard, tcp, signing } = newborn;
    let _ = prctl::set_name(WORKER_NAME);
    let guard = guard_log::install(guard);
    guard_log::set_level(prepared.setup.log_level);
    let held = Newborn { guard: guard.as_fd(), tcp: tcp.as_fd(), signing: signing.as_fd() };
    // Whether a file blocks belongs to whoever else has it, too: no worker may change that once it reads.
    let prepare = |e| Failure::system("prepare the connection", e);
    let locked_in = tcp.set_nonblocking(true).map_err(prepare);
    let locked_in = locked_in.and_then(|()| lock_in(&prepared.setup, (uid, number), held));
    rigged::point("worker.locked-in");
    #[cfg(feature = "rigged")]
    if locked_in.is_ok() {
        red_team::perform(red_team::Stage::admission(guard, tcp.as_fd()));
    }
    let served = locked_in
        .map_err(NoSession::from)
        .and_then(|queues| run::serve(prepared, Connection { guard, tcp, signing, queues, deadline }));
    match served {
        Ok(ended) => {
            tell(guard, ended);
            ExitCode::SUCCESS
        }
        Err(NoSession { cause, failure }) => {
            tell(guard, Request::Ended { reason: None, cause, text: failure.text });
            failure.exit.into()
        }
    }
}

/// The worker's loss of privilege, in order. Nothing from the network is read before it is over. What the nursery
/// held is closed already but for its memory: its channel went with [`nursery::run`].
fn lock_in(setup: &Setup, (uid, number): (u32, u64), held: Newborn<'_>) -> Outcome<io::Result<Queues>> {
    // 1. Own user, no capabilities, empty root, no dumps, bound to the guard's life.
    let jail = jail::Jail {
        uid,
        gid: uid,
        root: &setup.root,
        descriptors: DESCRIPTORS,
        address_space: ADDRESS_SPACE,
        parent: setup.guard,
    };
    jail::enter(&jail)?;
    // 2. The queues of the session that there may be, charged to our own user, and never another one. Where they can't
    //    be made, the client is told so when there is TLS to tell it by.
    let queues = Queues::make(&setup.queues, number);
    mq::make_no_more().map_err(|e| Failure::system("forbid more queues", e))?;
    rigged::point("worker.queues-made");
    // 3. No files, ports or other processes.
    jail::give_up_the_rest(setup.landlock)?;
    // 4. The system calls of admission. What is left of them when the session is established: `lock_in_further`
    //    (worker/src/run.rs).
    jail::filter_calls(|| Filter::compile(&admission(held)))?;
    Ok(queues)
}

fn check_version() -> Outcome<()> {
    let version = std::env::args().nth(1).unwrap_or_default();
    if version == VERSION {
        return Ok(());
    }
    let text = format!("this worker is version {VERSION}, its guard {version:?}: install them together");
    Err(Failure::new(Exit::Version, text))
}

fn tell(guard: &WorkerEnd, ended: Request) {
    // If the guard doesn't read any more, it learns the rest from the exit code.
    let _ = guard.send(&ended, &[]);
}

/// Of the nursery, each for a step of [`jail::enter`] in the workers, which keep none.
const PRIVILEGES: &[Kept] = &[
    Kept::used(Capability::CAP_SYS_CHROOT, "workers, in an empty root"),
    Kept::used(Capability::CAP_SETPCAP, "workers, with an empty bounding set"),
    Kept::used(Capability::CAP_SETGID, "workers, each with a group of its own"),
    Kept::used(Capability::CAP_SETUID, "workers, each with a user of its own"),
];

const NOT_BY_HAND: &str =
    "tunguard-worker is started by tunguard-guard, not by hand: see tunguard server --help";

// As `ps -o comm` and `top` show them: at most 15 bytes.
const NURSERY_NAME: &CStr = c"tg-nursery";
const WORKER_NAME: &CStr = c"tunguard-worker";
/// /dev/null three times, channel, TCP, UDP, memory (until it is mapped), TUN or the queue to the guard, the queue to us, and
/// epoll. The channel to the key holder is closed with the handshake.
const DESCRIPTORS: u64 = 10;
/// A bound against runaway memory, far above what a session touches.
const ADDRESS_SPACE: u64 = 1 << 30;
