//! What the lookup helper may do: what libc's resolver needs, with whatever modules the host's nsswitch.conf names. They
//! are not ours and not known, so what is not here fails with EPERM instead of ending the process: most of them get by.

use std::process;

use libc::c_int;

use super::common::common;
use super::{Call, allow, is, lacks};

/// From before the name is looked up until the end.
pub fn life() -> Vec<Call> {
    let family = |family: c_int| allow(libc::SYS_socket, &[is(0, family)]);
    let for_writing = libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
    let mut calls = common(process::id() as i32);
    calls.extend([
        // The resolver's configuration, /etc/hosts, modules: opened for reading.
        allow(libc::SYS_openat, &[lacks(2, for_writing)]),
        allow(libc::SYS_read, &[]),
        allow(libc::SYS_pread64, &[]),
        allow(libc::SYS_lseek, &[]),
        allow(libc::SYS_fstat, &[]),
        allow(libc::SYS_newfstatat, &[]),
        allow(libc::SYS_statx, &[]),
        allow(libc::SYS_faccessat, &[]),
        allow(libc::SYS_readlinkat, &[]),
        // Modules as they are mapped: never writable and executable at once, and nothing becomes executable later.
        allow(libc::SYS_mmap, &[lacks(2, libc::PROT_WRITE)]),
        allow(libc::SYS_mmap, &[lacks(2, libc::PROT_EXEC)]),
        allow(libc::SYS_mprotect, &[lacks(2, libc::PROT_EXEC)]),
        // Name servers; the local resolver's socket; the kernel's list of addresses, to sort what was found.
        family(libc::AF_INET),
        family(libc::AF_INET6),
        family(libc::AF_UNIX),
        family(libc::AF_NETLINK),
        allow(libc::SYS_connect, &[]),
        allow(libc::SYS_bind, &[]),
        allow(libc::SYS_getsockname, &[]),
        allow(libc::SYS_getpeername, &[]),
        allow(libc::SYS_getsockopt, &[]),
        allow(libc::SYS_setsockopt, &[is(1, libc::IPPROTO_IP)]),
        allow(libc::SYS_setsockopt, &[is(1, libc::IPPROTO_IPV6)]),
        allow(libc::SYS_sendto, &[]),
        allow(libc::SYS_sendmsg, &[]),
        allow(libc::SYS_sendmmsg, &[]),
        allow(libc::SYS_recvfrom, &[]),
        allow(libc::SYS_recvmsg, &[]),
        allow(libc::SYS_writev, &[]),
        allow(libc::SYS_ioctl, &[is(1, libc::FIONREAD as i32)]),
        allow(libc::SYS_ioctl, &[is(1, libc::FIONBIO as i32)]),
        allow(libc::SYS_fcntl, &[is(1, libc::F_GETFL)]),
        allow(libc::SYS_fcntl, &[is(1, libc::F_SETFL)]),
        allow(libc::SYS_fcntl, &[is(1, libc::F_SETFD)]),
        // Who and where are we, how large is the machine, how long to wait.
        allow(libc::SYS_uname, &[]),
        allow(libc::SYS_sysinfo, &[]),
        allow(libc::SYS_getuid, &[]),
        allow(libc::SYS_geteuid, &[]),
        allow(libc::SYS_getgid, &[]),
        allow(libc::SYS_getegid, &[]),
        allow(libc::SYS_clock_nanosleep, &[]),
        allow(libc::SYS_rt_sigaction, &[]),
        // To read back that it is filtered.
        allow(libc::SYS_prctl, &[is(0, libc::PR_GET_SECCOMP)]),
    ]);
    #[cfg(target_arch = "x86_64")]
    calls.extend([
        allow(libc::SYS_open, &[lacks(1, for_writing)]),
        allow(libc::SYS_stat, &[]),
        allow(libc::SYS_lstat, &[]),
        allow(libc::SYS_access, &[]),
        allow(libc::SYS_readlink, &[]),
    ]);
    calls
}
