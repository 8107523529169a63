//! Signals as bytes of a pipe: nothing happens in a handler.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use crate::exit::{Failure, Outcome};

/// Lets a fault end the process by its own signal, as the kernel does it. The standard library's handlers only look for
/// a stack that overflowed, to say so on a standard error that nobody reads; under a system call filter they would be
/// cut short, and the fault would look like a call that isn't allowed.
pub fn end_by_faults() -> io::Result<()> {
    for fault in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the kernel's own action takes the place of a handler; no memory is touched.
        if unsafe { libc::signal(fault, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(Errno::last().into());
        }
    }
    Ok(())
}

/// For a process that others tell what to do: a terminal's or a service's signals are meant for those.
pub fn block_stops() -> Outcome<()> {
    let stops = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
    SigSet::from_iter(stops).thread_block().map_err(|e| Failure::system("block signals", e))
}

/// What came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// SIGINT or SIGTERM.
    pub stop: bool,
    /// SIGHUP.
    pub reload: bool,
    /// SIGCHLD.
    pub child: bool,
}

/// The pipes' reading ends.
pub struct Signals {
    stop: UnixStream,
    reload: UnixStream,
    child: UnixStream,
}

impl Signals {
    /// Starts to listen for SIGINT, SIGTERM, SIGHUP and SIGCHLD.
    pub fn install() -> io::Result<Signals> {
        let listen = |signals: &[i32]| -> io::Result<UnixStream> {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            for signal in signals {
                pipe::register(*signal, write.try_clone()?)?;
            }
            Ok(read)
        };
        Ok(Signals {
            stop: listen(&[SIGINT, SIGTERM])?,
            reload: listen(&[SIGHUP])?,
            child: listen(&[SIGCHLD])?,
        })
    }

    /// The descriptors to wait on.
    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.stop.as_fd(), self.reload.as_fd(), self.child.as_fd()]
    }

    /// What has arrived since the last call.
    pub fn take(&mut self) -> Arrived {
        fn drain(pipe: &mut UnixStream) -> bool {
            let mut buffer = [0; 64];
            let mut any = false;
            while pipe.read(&mut buffer).is_ok_and(|n| n > 0) {
                any = true;
            }
            any
        }
        Arrived {
            stop: drain(&mut self.stop),
            reload: drain(&mut self.reload),
            child: drain(&mut self.child),
        }
    }
}
