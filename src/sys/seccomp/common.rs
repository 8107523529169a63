//! What every filtered process of ours does, whatever it is for.

use libc::{c_int, pid_t};

use super::{Call, allow, bits, is, lacks};

/// The allocator's calls, the clock's, and those of an orderly or a sudden end of process `own`.
pub(super) fn common(own: pid_t) -> Vec<Call> {
    let private = |operation: c_int| is(1, operation | libc::FUTEX_PRIVATE_FLAG);
    let mut calls = vec![
        // The allocator. Nothing becomes executable; mprotect is not here at all.
        allow(libc::SYS_brk, &[]),
        allow(
            libc::SYS_mmap,
            &[
                bits(3, libc::MAP_TYPE | libc::MAP_ANONYMOUS, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
                lacks(2, libc::PROT_EXEC),
            ],
        ),
        allow(libc::SYS_munmap, &[]),
        allow(libc::SYS_mremap, &[]),
        allow(libc::SYS_madvise, &[is(2, libc::MADV_DONTNEED)]),
        // The clock, on machines whose vDSO can't read it.
        allow(libc::SYS_clock_gettime, &[]),
        allow(libc::SYS_gettimeofday, &[]),
        // Keys, nonces, the seeds of hash tables.
        allow(libc::SYS_getrandom, &[]),
        // The cipher library asks whether it has been forked before each use of its random generator.
        allow(libc::SYS_getpid, &[]),
        // Locks and once-only starts; a single thread only ever wakes nobody. Not the calls on priorities and requeuing.
        allow(libc::SYS_futex, &[private(libc::FUTEX_WAKE)]),
        allow(libc::SYS_futex, &[private(libc::FUTEX_WAIT)]),
        allow(libc::SYS_futex, &[private(libc::FUTEX_WAIT_BITSET)]),
        // A wait goes on after SIGSTOP and SIGCONT.
        allow(libc::SYS_restart_syscall, &[]),
        // The standard library makes sure that what it closes is open, in debug builds.
        allow(libc::SYS_fcntl, &[is(1, libc::F_GETFD)]),
        allow(libc::SYS_close, &[]),
        // Last words of the runtime, to what is /dev/null.
        allow(libc::SYS_write, &[is(0, libc::STDERR_FILENO)]),
        // The end of main: the standard library takes its signal stack down.
        allow(libc::SYS_sigaltstack, &[]),
        allow(libc::SYS_exit_group, &[]),
        // abort(), so that a panic of a release build is told from a call that isn't allowed. Only of ourselves.
        allow(libc::SYS_rt_sigprocmask, &[]),
        allow(libc::SYS_gettid, &[]),
        allow(libc::SYS_tgkill, &[is(0, own), is(1, own), is(2, libc::SIGABRT)]),
    ];
    // Where the vDSO can't, as above.
    #[cfg(target_arch = "x86_64")]
    calls.push(allow(libc::SYS_time, &[]));
    calls.extend(waiting());
    calls
}

/// poll and epoll_wait, as each architecture has them. What is waited for is behind a pointer; waiting does nothing to it.
fn waiting() -> Vec<Call> {
    #[cfg(target_arch = "x86_64")]
    let older = vec![allow(libc::SYS_poll, &[]), allow(libc::SYS_epoll_wait, &[])];
    #[cfg(not(target_arch = "x86_64"))]
    let older = vec![];
    let newer = vec![allow(libc::SYS_ppoll, &[]), allow(libc::SYS_epoll_pwait, &[])];
    [older, newer].concat()
}

/// Taking over a UDP socket as quinn-udp does it, four times, and src/sys/udp.rs after it. None of the options attaches
/// a program, or binds the socket to anything.
pub(super) fn take_over_udp() -> Vec<Call> {
    let options: &[(c_int, c_int)] = &[
        // ECN bits, destination addresses and runs of datagrams come with what is received.
        (libc::IPPROTO_IP, libc::IP_RECVTOS),
        (libc::IPPROTO_IP, libc::IP_PKTINFO),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
        (libc::SOL_UDP, libc::UDP_GRO),
        // Asked for by quinn-udp; nobody looks at them.
        (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS),
        // Whether runs can be sent.
        (libc::SOL_UDP, libc::UDP_SEGMENT),
    ];
    let mut calls: Vec<Call> = options
        .iter()
        .map(|(level, option)| allow(libc::SYS_setsockopt, &[is(1, *level), is(2, *option)]))
        .collect();
    calls.extend(
        fragmentation().map(|(level, option)| allow(libc::SYS_setsockopt, &[is(1, level), is(2, option)])),
    );
    calls.extend([
        // Its family, whether it takes both families, whether it is non-blocking, and which kernel this is.
        allow(libc::SYS_getsockname, &[]),
        allow(libc::SYS_getsockopt, &[is(1, libc::IPPROTO_IPV6), is(2, libc::IPV6_V6ONLY)]),
        allow(libc::SYS_fcntl, &[is(1, libc::F_GETFL)]),
        allow(libc::SYS_uname, &[]),
    ]);
    calls
}

/// The options that a probe of the path's MTU is sent between (`send_whole`, src/sys/udp.rs).
pub(super) fn fragmentation() -> [(c_int, c_int); 3] {
    [
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
        (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    ]
}
