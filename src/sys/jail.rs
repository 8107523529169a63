//! Losing privileges for good. A step that fails refuses the start: there is never a process with less of a
//! jail than was asked for.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid, chdir, chroot, getppid, getresuid, setgroups, setresgid, setresuid};

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
    drop_bounding_set()?;
    step("drop the supplementary groups", setgroups(&[]))?;
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
    drop_bounding_set()?;
    step("drop the supplementary groups", setgroups(&[]))?;
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

fn drop_bounding_set() -> Outcome<()> {
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes numbers only; it touches no memory.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if dropped < 0 {
            match Errno::last() {
                // Beyond the kernel's last capability.
                Errno::EINVAL => break,
                errno => return step("empty the capability bounding set", Err(errno)),
            }
        }
    }
    Ok(())
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

fn step<T>(what: &str, done: nix::Result<T>) -> Outcome<T> {
    done.map_err(|errno| Failure::system(format!("jail: {what}"), io::Error::from(errno)))
}
