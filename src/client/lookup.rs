//! Looking up a name in a process of its own: libc's resolver parses what the network sends, and blocks. The
//! helper runs as the tunnel process's user, answers once and is killed when it takes too long.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::{Child, ExitCode};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ipc::{Endpoint, truncate};
use super::role;
use super::supervisor::User;
use crate::VERSION;
use crate::config::client::Remote;
use crate::escape::Escaped;
use crate::exit::{Exit, Failure, Outcome};
use crate::path::canonical;
use crate::sandbox::Means;
use crate::sys::jail::{self, Layer};
use crate::sys::seccomp::Filter;
use crate::sys::seccomp::lookup::life;
use crate::sys::seqpacket::{self, Channel, Incoming};
use crate::sys::{landlock, spawn};
use crate::time::Time;

/// What the helper says, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Found {
    /// The name's addresses, best first.
    Addresses(Vec<Endpoint>),
    /// It has none.
    Nothing(String),
}

/// What the helper is locked in with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confines {
    /// Its user.
    pub user: User,
    /// What the kernel has.
    pub sandbox: Means,
}

/// A lookup under way; dropping it ends the helper.
#[derive(Debug)]
pub struct Lookup {
    helper: Child,
    answer: Channel<(), Found>,
    until: Time,
}

impl Lookup {
    /// Starts to look up `remote`'s name.
    pub fn start(remote: &Remote, Confines { user, sandbox }: Confines, now: Time) -> Outcome<Lookup> {
        let failed = |e: io::Error| Failure::system("start the name lookup", e);
        let (answer, theirs) = seqpacket::pair().map_err(failed)?;
        let arguments = [
            role::LOOKUP.to_owned(),
            VERSION.to_owned(),
            std::process::id().to_string(),
            user.uid.to_string(),
            user.gid.to_string(),
            sandbox.landlock.unwrap_or(NO_LANDLOCK).to_string(),
            remote.host.clone(),
            remote.port.to_string(),
        ];
        let helper =
            spawn::spawn(Path::new("/proc/self/exe"), &arguments, &[theirs.as_fd()]).map_err(failed)?;
        Ok(Lookup { helper, answer, until: now + LOOKUP_WITHIN })
    }

    /// The addresses, or why there are none; `None` while the helper is at it. It parses what strangers send:
    /// what it says is bounded here.
    pub fn poll(&self, now: Time, remote: &Remote) -> Option<Result<VecDeque<SocketAddr>, String>> {
        let nothing = |why: &str| Some(Err(format!("can't look up {}: {why}", remote.host)));
        match self.answer.receive(false) {
            Ok(Incoming::Message(Found::Addresses(found), _)) => {
                let usable = |a: &SocketAddr| !a.ip().is_unspecified() && !a.ip().is_multicast();
                let port = |mut a: SocketAddr| {
                    a.set_port(remote.port);
                    canonical(a)
                };
                let found = found.into_iter().map(SocketAddr::from);
                let usable: VecDeque<_> = found.filter(usable).take(MAX_FOUND).map(port).collect();
                if usable.is_empty() { nothing("the name has no usable address") } else { Some(Ok(usable)) }
            }
            Ok(Incoming::Message(Found::Nothing(why), _)) => {
                let why: String = why.chars().take(200).collect();
                nothing(&Escaped(&why).to_string())
            }
            Ok(Incoming::Nothing) if now < self.until => None,
            Ok(Incoming::Nothing) => {
                nothing(&format!("no answer within {} s; is DNS reachable?", LOOKUP_WITHIN.as_secs()))
            }
            Ok(Incoming::Closed) => nothing("the lookup helper died"),
            Err(violation) => nothing(&format!("the lookup helper sent {violation}")),
        }
    }

    /// When the lookup is given up.
    pub fn until(&self) -> Time {
        self.until
    }
}

impl AsFd for Lookup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.answer.as_fd()
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        let _ = self.helper.kill();
        let _ = self.helper.wait();
    }
}

/// The helper's whole life: `client-lookup VERSION SUPERVISOR UID GID LANDLOCK HOST PORT`, descriptor 3 its channel.
pub fn main() -> ExitCode {
    let Ok([channel]) = spawn::inherited::<1>() else {
        eprintln!("tunguard: {} is started by tunguard client, not by hand", role::LOOKUP);
        return Exit::Usage.into();
    };
    let channel: Channel<Found, ()> = Channel::from_fd(channel);
    let found = look_up().unwrap_or_else(|failure| Found::Nothing(failure.text));
    match channel.send(&found, &[]) {
        Ok(true) => ExitCode::SUCCESS,
        _ => Exit::System.into(),
    }
}

fn look_up() -> Outcome<Found> {
    let arguments: Vec<String> = std::env::args().skip(2).collect();
    let [version, parent, uid, gid, landlock, host, port] = &arguments[..] else {
        return Err(Failure::usage("wrong arguments"));
    };
    if version != VERSION {
        return Err(Failure::new(Exit::Version, format!("the lookup helper is version {VERSION}")));
    }
    let number = |text: &String| text.parse().map_err(|_| Failure::usage("wrong arguments"));
    let port: u16 = port.parse().map_err(|_| Failure::usage("wrong arguments"))?;
    let parent = parent.parse().map_err(|_| Failure::usage("wrong arguments"))?;
    let landlock = landlock.parse().map_err(|_| Failure::usage("wrong arguments"))?;
    lock_in((number(uid)?, number(gid)?), landlock, parent)?;
    Ok(match (host.as_str(), port).to_socket_addrs() {
        Ok(addresses) => Found::Addresses(addresses.take(MAX_FOUND).map(Endpoint::from).collect()),
        Err(error) => {
            let mut text = error.to_string();
            truncate(&mut text);
            Found::Nothing(text.trim_start_matches("failed to lookup address information: ").to_owned())
        }
    })
}

/// The helper's loss of privilege, in order. The host's files stay in sight, as libc's resolver needs them.
fn lock_in((uid, gid): (u32, u32), landlock: i32, parent: i32) -> Outcome<()> {
    // 1. The tunnel process's user, no capabilities, bound to the supervisor's life.
    jail::become_user(uid, gid, parent)?;
    // 2. Files are read, and neither written nor executed; TCP goes to name servers.
    jail::put_on(Layer::Landlock, || match landlock {
        NO_LANDLOCK => Ok(()),
        version => landlock::restrict_to_resolving(version),
    })?;
    // 3. The system calls of resolving.
    jail::filter_calls(|| Filter::compile_mild(&life()))
}

/// In place of a version.
const NO_LANDLOCK: i32 = 0;
/// Addresses of one name that are tried.
const MAX_FOUND: usize = 16;
const LOOKUP_WITHIN: Duration = Duration::from_secs(5);
