//! What a worker may do: as long as it has no session, and when it has one.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::process;

use super::common::{common, fragmentation, take_over_udp};
use super::{Call, allow, has, is, on};

/// What a worker holds from its start.
#[derive(Clone, Copy, Debug)]
pub struct Newborn<'a> {
    /// Its channel to the guard.
    pub guard: BorrowedFd<'a>,
    /// Its client's connection.
    pub tcp: BorrowedFd<'a>,
    /// Its channel to the key holder.
    pub signing: BorrowedFd<'a>,
}

/// What a worker with a session holds.
#[derive(Clone, Copy, Debug)]
pub struct Carrying<'a> {
    /// Its channel to the guard.
    pub guard: BorrowedFd<'a>,
    /// Its client's connection.
    pub tcp: BorrowedFd<'a>,
    /// The UDP slot.
    pub udp: BorrowedFd<'a>,
    /// The queue of packets from the guard.
    pub downlink: BorrowedFd<'a>,
    /// Where packets go.
    pub exit: Exit<'a>,
    /// The epoll set with all of these.
    pub epoll: BorrowedFd<'a>,
}

/// Where the client's packets leave a worker.
#[derive(Clone, Copy, Debug)]
pub enum Exit<'a> {
    /// The TUN device.
    Device(BorrowedFd<'a>),
    /// The queue of packets to the guard.
    Queue(BorrowedFd<'a>),
}

/// Stage one, from before the first byte of the network until the session is established: TLS, the guard's grant, and
/// making and taking over what the session needs; besides everything of [`carrying`], as filters only ever take away.
pub fn admission(held: Newborn<'_>) -> Vec<Call> {
    let tcp = on(held.tcp);
    let mut calls = common(process::id() as i32);
    calls.extend(take_over_udp());
    calls.extend([
        // The client's connection: it is made ready, and says where the client is.
        allow(libc::SYS_recvfrom, &[tcp]),
        allow(libc::SYS_sendto, &[tcp]),
        allow(libc::SYS_getpeername, &[tcp]),
        allow(libc::SYS_setsockopt, &[tcp, is(1, libc::SOL_SOCKET), is(2, libc::SO_KEEPALIVE)]),
        allow(libc::SYS_setsockopt, &[tcp, is(1, libc::IPPROTO_TCP), is(2, libc::TCP_KEEPIDLE)]),
        allow(libc::SYS_setsockopt, &[tcp, is(1, libc::IPPROTO_TCP), is(2, libc::TCP_KEEPINTVL)]),
        allow(libc::SYS_setsockopt, &[tcp, is(1, libc::IPPROTO_TCP), is(2, libc::TCP_KEEPCNT)]),
        allow(libc::SYS_setsockopt, &[tcp, is(1, libc::IPPROTO_TCP), is(2, libc::TCP_NODELAY)]),
        // Messages to and from the guard; and datagrams, later. The slot's number isn't known yet.
        allow(libc::SYS_sendmsg, &[]),
        allow(libc::SYS_recvmsg, &[on(held.guard)]),
        // The signature of its handshake.
        allow(libc::SYS_recvmsg, &[on(held.signing)]),
        // The memory of its queue, to be read and nothing else: how long is it, can it shrink?
        allow(libc::SYS_fcntl, &[is(1, libc::F_GET_SEALS)]),
        allow(libc::SYS_fstat, &[]),
        allow(libc::SYS_newfstatat, &[has(3, libc::AT_EMPTY_PATH)]),
        allow(libc::SYS_mmap, &[is(2, libc::PROT_READ), is(3, libc::MAP_SHARED)]),
        // The set of descriptors to wait for.
        allow(libc::SYS_epoll_create1, &[]),
        allow(libc::SYS_epoll_ctl, &[]),
        // A library that sorts hundreds of certificates, with the C library before 2.37, whose qsort asks for the size
        // of the memory.
        allow(libc::SYS_sysinfo, &[]),
        // Stage two.
        allow(libc::SYS_prctl, &[is(0, libc::PR_SET_NO_NEW_PRIVS)]),
        allow(libc::SYS_prctl, &[is(0, libc::PR_GET_SECCOMP)]),
        allow(libc::SYS_seccomp, &[is(0, libc::SECCOMP_SET_MODE_FILTER as i32)]),
        // What packets pass through, when there is a session.
        allow(libc::SYS_recvmmsg, &[]),
        allow(libc::SYS_mq_timedreceive, &[]),
        allow(libc::SYS_mq_timedsend, &[]),
        allow(libc::SYS_writev, &[]),
    ]);
    calls
}

/// Stage two, until the end: each descriptor can do what it is there for, and nothing else. Nothing new can be opened,
/// made, mapped from a file, or sent anywhere but by these.
pub fn carrying(held: Carrying<'_>) -> Vec<Call> {
    let (guard, tcp, udp) = (on(held.guard), on(held.tcp), on(held.udp));
    let epoll = on(held.epoll);
    let connection = is(2, held.tcp.as_raw_fd());
    let mut calls = common(process::id() as i32);
    calls.extend([
        // Packets from the guard.
        allow(libc::SYS_mq_timedreceive, &[on(held.downlink)]),
        // Datagrams to and from the client.
        allow(libc::SYS_sendmsg, &[udp]),
        allow(libc::SYS_recvmmsg, &[udp]),
        // Requests to the guard, log lines among them, and its orders.
        allow(libc::SYS_sendmsg, &[guard]),
        allow(libc::SYS_recvmsg, &[guard]),
        // The control connection; where the client is, for packets inside it.
        allow(libc::SYS_recvfrom, &[tcp]),
        allow(libc::SYS_sendto, &[tcp]),
        allow(libc::SYS_getpeername, &[tcp]),
        // It is waited for to take more, and no longer when it is lost.
        allow(libc::SYS_epoll_ctl, &[epoll, is(1, libc::EPOLL_CTL_MOD), connection]),
        allow(libc::SYS_epoll_ctl, &[epoll, is(1, libc::EPOLL_CTL_DEL), connection]),
    ]);
    // A probe of the path's MTU.
    calls.extend(
        fragmentation()
            .map(|(level, option)| allow(libc::SYS_setsockopt, &[udp, is(1, level), is(2, option)])),
    );
    calls.push(match held.exit {
        // The device is written to and never read: it has the packets of all clients.
        Exit::Device(tun) => allow(libc::SYS_writev, &[on(tun)]),
        Exit::Queue(uplink) => allow(libc::SYS_mq_timedsend, &[on(uplink)]),
    });
    calls
}
