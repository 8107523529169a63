//! Starting our own programs with exactly the descriptors they need.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};

/// The descriptor number of the first of the `fds` given to [`spawn`].
pub const FIRST_FD: RawFd = 3;

/// Starts `program` with `fds` as its descriptors 3, 4, ..., nothing else open but stdin, stdout and stderr,
/// which are /dev/null, no environment, and all signals unblocked.
pub fn spawn<A: AsRef<OsStr>>(program: &Path, args: &[A], fds: &[BorrowedFd<'_>]) -> io::Result<Child> {
    // Copies above the numbers they will get, so that none overwrites another on the way.
    let floor = FIRST_FD + fds.len() as RawFd;
    let copies: Vec<OwnedFd> = fds
        .iter()
        .map(|fd| {
            let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(floor))?;
            // SAFETY: fcntl has just made this descriptor for us alone.
            Ok(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw) })
        })
        .collect::<io::Result<_>>()?;
    let raw: Vec<RawFd> = copies.iter().map(|fd| fd.as_raw_fd()).collect();
    let mut command = Command::new(program);
    command.args(args).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let in_child = move || place_descriptors(&raw);
    // SAFETY: the closure runs between fork and exec and makes only async-signal-safe calls (dup2, close_range,
    // sigprocmask) on data made before the fork; it allocates nothing.
    unsafe { command.pre_exec(in_child) };
    let child = command.spawn()?;
    drop(copies);
    Ok(child)
}

fn place_descriptors(raw: &[RawFd]) -> io::Result<()> {
    for (place, fd) in raw.iter().enumerate() {
        // SAFETY: dup2 of a descriptor of ours onto a number nothing of ours uses after exec; it touches no memory.
        if unsafe { libc::dup2(*fd, FIRST_FD + place as RawFd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let first_unused = FIRST_FD as libc::c_uint + raw.len() as libc::c_uint;
    // SAFETY: marks descriptors close-on-exec; it touches no memory. (Not closed at once: std reports a failed
    // exec through one of them.)
    let marked = unsafe {
        libc::syscall(libc::SYS_close_range, first_unused, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if marked < 0 {
        return Err(io::Error::last_os_error());
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    Ok(())
}

/// Which of two we are after [`fork_sibling`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// The new process, a child of our parent.
    Child,
    /// The old one, and the new one's process ID.
    Parent(i32),
}

/// Forks a process whose parent is our parent, so that it is waited for there and ours to forget (CLONE_PARENT).
/// Only for a process with a single thread.
///
/// Errors: more than one thread; no room for another process.
pub fn fork_sibling() -> io::Result<Forked> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("{threads} threads are running; only one may")));
    }
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: as fork(2): no memory is shared, the stack is the caller's copy (null), and with a single thread, as
    // checked, no lock can be held by one that isn't copied. glibc's own bookkeeping of a fork is left out: it keeps
    // the parent's thread ID in the child, which only matters to functions on other threads and to robust mutexes,
    // neither of which a worker uses; abort() and raise() ask the kernel.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags as libc::c_ulong, 0, 0, 0, 0) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid as i32)),
    }
}

/// Takes over descriptors 3, 4, ... that [`spawn`] placed. To be called once, first thing in main.
///
/// Errors: one of them isn't open, so this program wasn't started by its parent.
pub fn inherited<const N: usize>() -> io::Result<[OwnedFd; N]> {
    let numbers: [RawFd; N] = std::array::from_fn(|i| FIRST_FD + i as RawFd);
    for fd in numbers {
        // SAFETY: F_GETFD on a number; it touches no memory, and fails for one that isn't open.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above; a later exec of ours, if there were one, must not inherit it.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    // SAFETY: each was just found open, was placed for us by spawn(), and is owned once, here.
    Ok(numbers.map(|fd| unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) }))
}
