//! What the client's tunnel process may do. It makes sessions again and again, with sockets that the supervisor hands
//! it, so only what it has from its start can be known by number.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::process;

use super::common::{common, take_over_udp};
use super::{Call, allow, is, is_not, on};

/// What a tunnel process holds from its start.
#[derive(Clone, Copy, Debug)]
pub struct Newborn<'a> {
    /// Its channel to the supervisor.
    pub supervisor: BorrowedFd<'a>,
    /// The device.
    pub tun: BorrowedFd<'a>,
}

/// From before the first byte of the network until the end.
pub fn life(held: Newborn<'_>) -> Vec<Call> {
    let (supervisor, tun) = (on(held.supervisor), on(held.tun));
    let option = |level, option| allow(libc::SYS_setsockopt, &[is(1, level), is(2, option)]);
    let mut calls = common(process::id() as i32);
    calls.extend(take_over_udp());
    calls.extend([
        // Packets from and to the device: these calls for the device, and no others.
        allow(libc::SYS_preadv2, &[tun]),
        allow(libc::SYS_writev, &[tun]),
        // Datagrams to and from the server.
        allow(libc::SYS_sendmsg, &[]),
        allow(libc::SYS_recvmmsg, &[]),
        // The supervisor's answers, with sockets; requests to it go by sendmsg.
        allow(libc::SYS_recvmsg, &[supervisor]),
        // Control connections, which the supervisor has made. Whether a file blocks is shared with the supervisor's copy
        // of it, so not of those two.
        allow(libc::SYS_recvfrom, &[]),
        allow(libc::SYS_sendto, &[]),
        allow(libc::SYS_getpeername, &[]),
        allow(
            libc::SYS_ioctl,
            &[
                is_not(0, held.tun.as_raw_fd()),
                is_not(0, held.supervisor.as_raw_fd()),
                is(1, libc::FIONBIO as i32),
            ],
        ),
        option(libc::IPPROTO_TCP, libc::TCP_NODELAY),
        // The set of descriptors to wait for.
        allow(libc::SYS_epoll_create1, &[]),
        allow(libc::SYS_epoll_ctl, &[]),
        // As in a worker's admission.
        allow(libc::SYS_sysinfo, &[]),
        // To read back that it is filtered.
        allow(libc::SYS_prctl, &[is(0, libc::PR_GET_SECCOMP)]),
    ]);
    calls
}
