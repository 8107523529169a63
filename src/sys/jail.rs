//! Losing privileges for good. A step that fails refuses the start: there is never a process with less of a
//! jail than was asked for.

use std::io;
use std::path::Path;

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid, chdir, chroot, getppid, getresuid, setresgid, setresuid};

use super::seccomp::{self, Filter};
use super::{capabilities, ids, landlock, signals};
use crate::exit::{Failure, Outcome};

/// What a process is left with.
#[derive(Clone, Debug)]
pub struct Jail<'a> {
    /// User and group, both of this number.
    pub uid: u32,
    /// The group, where it is not the user's number.
    pub gid: u32,
    /// An empty directory, the only one there will be.
    pub root: &'a Path,
    /// Descriptors it may hold at once.
    pub descriptors: u64,
    /// Bytes of address space.
    pub address_space: u64,
    /// Who must still be our parent: it dies, we die.
    pub parent: i32,
}

/// What a process is locked in with, layer by layer. None of them trusts another one: what one forbids and another one
/// forbids as well is forbidden twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// No file can be written, no process made, no core left; descriptors and memory are bounded.
    Limits,
    /// An empty directory is all there is of the file system.
    EmptyRoot,
    /// No exec can bring a capability back: the bounding set is empty.
    BoundingSet,
    /// A user and group of its own, no supplementary groups; with root's user go all capabilities.
    OwnUser,
    /// No exec can bring privileges.
    NoNewPrivs,
    /// No dumps, and no other process of its user can trace it.
    NotDumpable,
    /// It ends with its parent.
    ParentsLife,
    /// Landlock: files, ports, other processes.
    Landlock,
    /// The system calls of a process that has no session, or of one that has no stages.
    FirstFilter,
    /// The system calls of a worker with a session, each on the descriptors it is for.
    CarryingFilter,
}

impl Layer {
    /// All, in the order in which a worker puts them on.
    pub const ALL: [Layer; 10] = [
        Layer::Limits,
        Layer::EmptyRoot,
        Layer::BoundingSet,
        Layer::OwnUser,
        Layer::NoNewPrivs,
        Layer::NotDumpable,
        Layer::ParentsLife,
        Layer::Landlock,
        Layer::FirstFilter,
        Layer::CarryingFilter,
    ];

    /// Its name, in messages.
    pub fn name(self) -> &'static str {
        match self {
            Layer::Limits => "limits",
            Layer::EmptyRoot => "empty-root",
            Layer::BoundingSet => "bounding-set",
            Layer::OwnUser => "own-user",
            Layer::NoNewPrivs => "no-new-privs",
            Layer::NotDumpable => "not-dumpable",
            Layer::ParentsLife => "parents-life",
            Layer::Landlock => "landlock",
            Layer::FirstFilter => "first-filter",
            Layer::CarryingFilter => "carrying-filter",
        }
    }
}

/// Puts one layer on. All of them pass here, so that a test's build can see what comes of it when one is missing.
pub fn put_on(layer: Layer, put: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
    #[cfg(feature = "rigged")]
    if crate::rigged::leaves_out(layer.name()) {
        log::warn!("left out: {}", layer.name());
        return Ok(());
    }
    put().map_err(|failure| failure.context(format_args!("jail, {}", layer.name())))
}

/// Everything that doesn't depend on what the process will hold or do, before anything from the network is read. In
/// this order, because each step needs a privilege that a later one takes away.
pub fn enter(jail: &Jail<'_>) -> Outcome<()> {
    put_on(Layer::Limits, || step("limit resources", limit_resources(jail)))?;
    // chroot needs CAP_SYS_CHROOT.
    put_on(Layer::EmptyRoot, || step("enter it", chroot(jail.root).and_then(|()| chdir("/"))))?;
    give_up_root(jail.uid, jail.gid, jail.parent)
}

/// For a helper that needs the host's files, and nothing more than any user may do: no root directory of its
/// own, but no privilege either. In the order of [`enter`].
pub fn become_user(uid: u32, gid: u32, parent: i32) -> Outcome<()> {
    put_on(Layer::Limits, || {
        let mut none = [Resource::RLIMIT_FSIZE, Resource::RLIMIT_NPROC, Resource::RLIMIT_CORE].into_iter();
        step("limit resources", none.try_for_each(|resource| setrlimit(resource, 0, 0)))
    })?;
    give_up_root(uid, gid, parent)
}

/// The part of [`enter`] that every process has that gives up root.
fn give_up_root(uid: u32, gid: u32, parent: i32) -> Outcome<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // It needs CAP_SETPCAP.
    put_on(Layer::BoundingSet, || step("empty it", capabilities::bound_to(0)))?;
    // The last step with privileges: the kernel clears all capabilities as no user ID is 0 any more
    // (capabilities(7), "Effect of user ID changes").
    put_on(Layer::OwnUser, || {
        step("drop the supplementary groups", ids::leave_groups())?;
        step("take the group", setresgid(gid, gid, gid))?;
        step("take the user", setresuid(uid, uid, uid))
    })?;
    put_on(Layer::NoNewPrivs, || step("forbid new privileges", prctl::set_no_new_privs()))?;
    put_on(Layer::NotDumpable, || step("forbid dumps and tracing", prctl::set_dumpable(false)))?;
    // A change of user clears the signal, so it is set after.
    put_on(Layer::ParentsLife, || {
        step("set the signal of its death", prctl::set_pdeathsig(Signal::SIGKILL))?;
        if getppid() == Pid::from_raw(parent) {
            Ok(())
        } else {
            Err(Failure::system("start", "the parent is gone"))
        }
    })?;
    put_on(Layer::OwnUser, || confirm(uid))
}

/// Files, ports and other processes, by this version of Landlock; `None` where the configuration does without.
pub fn give_up_the_rest(version: Option<i32>) -> Outcome<()> {
    put_on(Layer::Landlock, || version.map_or(Ok(()), landlock::restrict))
}

/// The last step before anything from outside is read: the system calls of `filter` are all that is left. A fault ends us
/// as what it is, not as a call that isn't allowed.
pub fn filter_calls(filter: impl FnOnce() -> Outcome<Filter>) -> Outcome<()> {
    signals::end_by_faults().map_err(|e| Failure::system("let faults end us", e))?;
    put_on(Layer::FirstFilter, || {
        filter()?.install()?;
        seccomp::confirm()
    })
}

/// For a process that is going to hold a secret, while it is root: no dump of it, no tracing, and nothing of it in swap
/// space, where the limit can be raised to `bytes`, the most memory it may have. (Where not, in containers, locking all
/// would be worse: a stack that is locked doesn't grow beyond the limit.)
pub fn keep_memory_private(bytes: u64) -> Outcome<()> {
    step("forbid dumps and tracing", prctl::set_dumpable(false))?;
    if setrlimit(Resource::RLIMIT_MEMLOCK, bytes, bytes).is_ok() {
        // SAFETY: takes numbers only. Pages are locked as they are touched, so that this takes no memory of its own.
        unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    }
    Ok(())
}

/// Lets this process and those that it starts lock so many bytes in memory, if it may.
pub fn allow_locked_memory(bytes: u64) {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK)
        && hard < bytes
    {
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, soft, bytes);
    }
}

/// Ties our life to our parent's, for a process that keeps its privileges.
pub fn die_with_parent() -> Outcome<()> {
    let parent = getppid();
    step("tie our life to our parent's", prctl::set_pdeathsig(Signal::SIGKILL))?;
    if getppid() == parent && parent != Pid::from_raw(1) {
        return Ok(());
    }
    Err(Failure::system("start", "the parent is gone"))
}

fn limit_resources(jail: &Jail<'_>) -> nix::Result<()> {
    let limits = [
        // No file can be written, no process made, no core left.
        (Resource::RLIMIT_FSIZE, 0),
        (Resource::RLIMIT_NPROC, 0),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_NOFILE, jail.descriptors),
        (Resource::RLIMIT_AS, jail.address_space),
    ];
    limits.into_iter().try_for_each(|(resource, most)| setrlimit(resource, most, most))
}

/// Reads back what must be true now.
fn confirm(uid: Uid) -> Outcome<()> {
    let ids = step("read our user IDs", getresuid())?;
    let gone = [ids.real, ids.effective, ids.saved].iter().all(|id| *id == uid && !id.is_root());
    // Regaining root must fail; its success would be our failure.
    let regained = setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_ok();
    if gone && !regained {
        Ok(())
    } else {
        Err(Failure::system("drop privileges", "the kernel still lets us be root"))
    }
}

fn step<T, E: Into<io::Error>>(what: &str, done: Result<T, E>) -> Outcome<T> {
    done.map_err(|error| Failure::system(what, error.into()))
}
