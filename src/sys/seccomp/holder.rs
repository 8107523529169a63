//! What the key holder may do, once it has read the key. Workers' channels come and go, so only the guard's is known by
//! number.

use std::os::fd::BorrowedFd;
use std::process;

use super::common::common;
use super::{Call, allow, is};

/// What it holds from its start.
#[derive(Clone, Copy, Debug)]
pub struct Newborn<'a> {
    /// The set of descriptors to wait for.
    pub epoll: BorrowedFd<'a>,
}

/// From before the first byte of a worker until the end: nothing is opened, made or connected.
pub fn life(held: Newborn<'_>) -> Vec<Call> {
    let mut calls = common(process::id() as i32);
    calls.extend([
        // The guard's orders, with workers' channels; workers' requests.
        allow(libc::SYS_recvmsg, &[]),
        // Signatures, and reports of misuse.
        allow(libc::SYS_sendmsg, &[]),
        // Channels come into the set, and go.
        allow(libc::SYS_epoll_ctl, &[super::on(held.epoll)]),
        // To read back that it is filtered.
        allow(libc::SYS_prctl, &[is(0, libc::PR_GET_SECCOMP)]),
    ]);
    calls
}
