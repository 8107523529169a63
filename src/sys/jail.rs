//! Losing privileges for good. A step that fails refuses the start: there is never a process with less of a
//! jail than was asked for.

use std::io;
use std::path::Path;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid, chdir, chroot, getppid, getresuid, setresgid, setresuid};

use super::{capabilities, ids};
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

/// Stage one, before anything from the network is read: everything that doesn't depend on what the process
/// will hold later. In this order, because each step needs a privilege that a later one takes away.
pub fn enter(jail: &Jail<'_>) -> Outcome<()> {
    let (uid, gid) = (Uid::from_raw(jail.uid), Gid::from_raw(jail.gid));
    step("limit resources", limit_resources(jail))?;
    // chroot needs CAP_SYS_CHROOT.
    step("enter the empty root", chroot(jail.root).and_then(|()| chdir("/")))?;
    // The bounding set needs CAP_SETPCAP.
    step("empty the capability bounding set", capabilities::bound_to(0))?;
    step("drop the supplementary groups", ids::leave_groups())?;
    step("take the group", setresgid(gid, gid, gid))?;
    // The last step with privileges: the kernel clears all capabilities as no user ID is 0 any more
    // (capabilities(7), "Effect of user ID changes").
    step("take the user", setresuid(uid, uid, uid))?;
    step("forbid new privileges", prctl::set_no_new_privs())?;
    step("forbid dumps and tracing", prctl::set_dumpable(false))?;
    // A change of user clears the signal, so it is set after.
    step("tie our life to our parent's", prctl::set_pdeathsig(Signal::SIGKILL))?;
    if getppid() != Pid::from_raw(jail.parent) {
        return Err(Failure::system("start", "the parent is gone"));
    }
    confirm(uid)
}

/// For a helper that needs the host's files, and nothing more than any user may do: no root directory of its
/// own, but no privilege either. In the order of [`enter`].
pub fn become_user(uid: u32, gid: u32, parent: i32) -> Outcome<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    for resource in [Resource::RLIMIT_FSIZE, Resource::RLIMIT_CORE] {
        step("limit resources", setrlimit(resource, 0, 0))?;
    }
    step("empty the capability bounding set", capabilities::bound_to(0))?;
    step("drop the supplementary groups", ids::leave_groups())?;
    step("take the group", setresgid(gid, gid, gid))?;
    step("take the user", setresuid(uid, uid, uid))?;
    step("forbid new privileges", prctl::set_no_new_privs())?;
    step("forbid dumps and tracing", prctl::set_dumpable(false))?;
    step("tie our life to our parent's", prctl::set_pdeathsig(Signal::SIGKILL))?;
    if getppid() != Pid::from_raw(parent) {
        return Err(Failure::system("start", "the parent is gone"));
    }
    confirm(uid)
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
    done.map_err(|error| Failure::system(format!("jail: {what}"), error.into()))
}
