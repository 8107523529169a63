//! `tunguard-worker`: the process of one client's session. The guard starts it with descriptor 3 its channel
//! to the guard, 4 the accepted TCP connection, 5 a sealed memory file with its [`Setup`].

#![forbid(unsafe_code)]

mod admission;
mod guard_log;
mod run;

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::{HANDSHAKE_SECONDS, Request, Setup, WorkerEnd};
use tunguard::sys::{clock, jail, memfd, spawn};
use tunguard::{VERSION, seal};

fn main() -> ExitCode {
    let deadline = clock::now() + Duration::from_secs(HANDSHAKE_SECONDS);
    let Ok([channel, tcp, setup]) = spawn::inherited::<3>() else {
        eprintln!("tunguard-worker is started by tunguard-guard, not by hand: see tunguard server --help");
        return Exit::Usage.into();
    };
    let Ok(channel_copy) = channel.try_clone() else { return Exit::System.into() };
    let guard = WorkerEnd::from_fd(channel);
    guard_log::install(WorkerEnd::from_fd(channel_copy));
    match start(setup).and_then(|setup| run::serve(&setup, &guard, TcpStream::from(tcp), deadline)) {
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

/// The worker's loss of privilege, in order. Nothing from the network is read before it is over.
fn start(setup: OwnedFd) -> Outcome<Setup> {
    // 1. Only this version's guard starts us: worker UID is the second argument.
    let uid = arguments()?;
    // 2. Ctrl-C reaches the whole terminal, and a service's stop its whole group: the guard hears it, and tells us
    //    to say goodbye.
    let stops = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter();
    SigSet::from_iter(stops).thread_block().map_err(|e| Failure::system("block signals", e))?;
    // 3. What we were told; the file is closed with this.
    let bytes = memfd::read(setup).map_err(|e| Failure::system("read the worker's setup", e))?;
    let setup = Setup::decode(&bytes)
        .ok_or_else(|| Failure::new(Exit::Malformed, "the worker's setup doesn't decode"))?;
    guard_log::set_level(setup.log_level);
    // 4. The cipher library works, or nobody's traffic is touched.
    seal::self_test()?;
    // 5. Stage one: own user, no capabilities, empty root, no dumps, bound to the guard's life.
    let jail = jail::Jail {
        uid,
        gid: uid,
        root: &setup.root,
        descriptors: DESCRIPTORS,
        address_space: ADDRESS_SPACE,
        parent: setup.guard,
    };
    jail::enter(&jail)?;
    // 6. Stage two, the system call filters, belongs here: a first one for TLS and set-up, a second, narrower
    //    one once the session is established (run::carry).
    Ok(setup)
}

fn arguments() -> Outcome<u32> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [version, uid] = &arguments[..] else {
        return Err(Failure::usage("tunguard-worker takes a version and a user ID from its guard"));
    };
    if version != VERSION {
        let text = format!("this worker is version {VERSION}, its guard {version}: install them together");
        return Err(Failure::new(Exit::Version, text));
    }
    uid.parse().map_err(|_| Failure::usage(format!("{uid:?} is no user ID")))
}

fn tell(guard: &WorkerEnd, ended: Request) {
    // If the guard doesn't read any more, it learns the rest from the exit code.
    let _ = guard.send(&ended, &[]);
}

/// Channel, TCP, UDP, TUN, two queues, epoll, log, /dev/null three times, and room for what OpenSSL opens.
const DESCRIPTORS: u64 = 24;
/// A bound against runaway memory, far above what a session touches.
const ADDRESS_SPACE: u64 = 1 << 30;
