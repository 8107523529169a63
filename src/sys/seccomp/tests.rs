//! Each case is a process of its own: it puts a filter on, makes one call, and lives or dies of it.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use libc::{c_int, c_long};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use seccompiler::SeccompAction;

use super::{Call, Filter, allow, holder, is, lookup, tunnel, worker};

/// Descriptors that stand for those of a worker or a tunnel process.
struct Held([UnixStream; 9]);

impl Held {
    fn new() -> Held {
        Held(std::array::from_fn(|_| UnixStream::pair().expect("a pair").0))
    }

    fn fd(&self, at: usize) -> BorrowedFd<'_> {
        self.0[at].as_fd()
    }

    fn number(&self, at: usize) -> c_long {
        use std::os::fd::AsRawFd;
        self.0[at].as_raw_fd().into()
    }

    fn newborn(&self) -> worker::Newborn<'_> {
        worker::Newborn { guard: self.fd(GUARD), tcp: self.fd(TCP), signing: self.fd(SIGNING) }
    }

    fn carrying(&self, exit: worker::Exit<'_>) -> Filter {
        let held = worker::Carrying {
            guard: self.fd(GUARD),
            tcp: self.fd(TCP),
            udp: self.fd(UDP),
            downlink: self.fd(DOWNLINK),
            exit,
            epoll: self.fd(EPOLL),
        };
        Filter::compile(&worker::carrying(held)).expect("compiles")
    }

    fn admission(&self) -> Filter {
        Filter::compile(&worker::admission(self.newborn())).expect("compiles")
    }

    fn holder(&self) -> Filter {
        Filter::compile(&holder::life(holder::Newborn { epoll: self.fd(EPOLL) })).expect("compiles")
    }

    fn tunnel(&self) -> Filter {
        let held = tunnel::Newborn { supervisor: self.fd(GUARD), tun: self.fd(TUN) };
        Filter::compile(&tunnel::life(held)).expect("compiles")
    }
}

const GUARD: usize = 0;
const TCP: usize = 1;
const UDP: usize = 2;
const DOWNLINK: usize = 3;
const TUN: usize = 4;
const UPLINK: usize = 5;
const EPOLL: usize = 6;
const SIGNING: usize = 8;
/// What is held for nothing.
const OTHER: usize = 7;

/// What becomes of a process that makes this call under these filters: the call's error number, 0 where it succeeds, or
/// the signal it dies by.
fn fate(filters: &[&Filter], number: c_long, arguments: &[c_long]) -> Result<c_int, Signal> {
    let mut given: [c_long; 6] = [0; 6];
    given[..arguments.len()].copy_from_slice(arguments);
    // SAFETY: the child has one thread, and until it ends makes system calls only, on memory made before.
    match unsafe { fork() }.expect("forks") {
        ForkResult::Child => {
            let put_on = filters.iter().all(|filter| filter.install().is_ok());
            let [a, b, c, d, e, f] = given;
            // SAFETY: what the call does, it does to this process, which ends here.
            let done = unsafe { libc::syscall(number, a, b, c, d, e, f) };
            let errno = if done < 0 { nix::errno::Errno::last_raw() } else { 0 };
            let code = if put_on { errno } else { UNFILTERED };
            // SAFETY: nothing of the parent's is flushed or run in its copy.
            unsafe { libc::syscall(libc::SYS_exit_group, code) };
            unreachable!("it has ended")
        }
        ForkResult::Parent { child } => match waitpid(child, None).expect("waits") {
            WaitStatus::Exited(_, UNFILTERED) => panic!("no filter could be put on"),
            WaitStatus::Exited(_, errno) => Ok(errno),
            WaitStatus::Signaled(_, signal, _) => Err(signal),
            other => panic!("{other:?}"),
        },
    }
}

/// No error number.
const UNFILTERED: c_int = 255;

fn dies(filters: &[&Filter], number: c_long, arguments: &[c_long]) {
    assert_eq!(fate(filters, number, arguments), Err(Signal::SIGSYS), "call {number}, {arguments:?}");
}

fn lives(filters: &[&Filter], number: c_long, arguments: &[c_long]) {
    assert!(fate(filters, number, arguments).is_ok(), "call {number}, {arguments:?}");
}

/// What nobody may do who reads from the network. Arguments that would do harm if they were let through are avoided.
fn dangerous() -> Vec<(c_long, Vec<c_long>)> {
    let exec = (libc::PROT_READ | libc::PROT_EXEC).into();
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).into();
    let here = libc::AT_FDCWD.into();
    let mut calls: Vec<(c_long, Vec<c_long>)> = vec![
        // Other programs, other processes.
        (libc::SYS_execve, vec![0, 0, 0]),
        (libc::SYS_execveat, vec![here, 0, 0, 0, 0]),
        (libc::SYS_clone, vec![libc::SIGCHLD.into()]),
        (libc::SYS_clone3, vec![0, 0]),
        (libc::SYS_kill, vec![0, 0]),
        (libc::SYS_tkill, vec![1, 0]),
        (libc::SYS_tgkill, vec![1, 1, libc::SIGABRT.into()]),
        (libc::SYS_rt_sigqueueinfo, vec![1, 0, 0]),
        (libc::SYS_pidfd_open, vec![1, 0]),
        (libc::SYS_pidfd_getfd, vec![0, 0, 0]),
        (libc::SYS_pidfd_send_signal, vec![0, 0, 0, 0]),
        (libc::SYS_ptrace, vec![libc::PTRACE_TRACEME.into()]),
        (libc::SYS_process_vm_readv, vec![1]),
        (libc::SYS_process_vm_writev, vec![1]),
        (libc::SYS_process_madvise, vec![0]),
        (libc::SYS_kcmp, vec![1, 1, 0, 0, 0]),
        (libc::SYS_rt_sigaction, vec![libc::SIGSYS.into(), 0, 0, 8]),
        // Files.
        (libc::SYS_openat, vec![here, 0, libc::O_RDONLY.into()]),
        (libc::SYS_openat2, vec![here, 0, 0, 0]),
        (libc::SYS_open_by_handle_at, vec![0, 0, 0]),
        (libc::SYS_memfd_create, vec![0, 0]),
        (libc::SYS_memfd_secret, vec![0]),
        (libc::SYS_unlinkat, vec![here, 0, 0]),
        (libc::SYS_renameat2, vec![here, 0, here, 0, 0]),
        (libc::SYS_linkat, vec![here, 0, here, 0, 0]),
        (libc::SYS_mkdirat, vec![here, 0, 0]),
        (libc::SYS_mknodat, vec![here, 0, 0, 0]),
        (libc::SYS_fchmodat, vec![here, 0, 0]),
        (libc::SYS_fchownat, vec![here, 0, 0, 0, 0]),
        (libc::SYS_chdir, vec![0]),
        (libc::SYS_fchdir, vec![0]),
        (libc::SYS_ftruncate, vec![99, 0]),
        (libc::SYS_getdents64, vec![99, 0, 0]),
        (libc::SYS_inotify_init1, vec![0]),
        (libc::SYS_fanotify_init, vec![0, 0]),
        // The system.
        (libc::SYS_mount, vec![0, 0, 0, 0, 0]),
        (libc::SYS_umount2, vec![0, 0]),
        (libc::SYS_fsopen, vec![0, 0]),
        (libc::SYS_open_tree, vec![here, 0, 0]),
        (libc::SYS_move_mount, vec![0, 0, 0, 0, 0]),
        (libc::SYS_chroot, vec![0]),
        (libc::SYS_pivot_root, vec![0, 0]),
        (libc::SYS_unshare, vec![0]),
        (libc::SYS_setns, vec![99, 0]),
        (libc::SYS_bpf, vec![99, 0, 0]),
        (libc::SYS_perf_event_open, vec![0, 0, -1, -1, 0]),
        (libc::SYS_io_uring_setup, vec![0, 0]),
        (libc::SYS_io_uring_enter, vec![99]),
        (libc::SYS_userfaultfd, vec![1 << 20]),
        (libc::SYS_keyctl, vec![99]),
        (libc::SYS_add_key, vec![0]),
        (libc::SYS_request_key, vec![0]),
        (libc::SYS_init_module, vec![0, 0, 0]),
        (libc::SYS_finit_module, vec![99, 0, 0]),
        (libc::SYS_kexec_load, vec![0, 99, 0, 0]),
        (libc::SYS_reboot, vec![0, 0, 0, 0]),
        (libc::SYS_syslog, vec![99, 0, 0]),
        (libc::SYS_personality, vec![0xffff_ffff]),
        (libc::SYS_settimeofday, vec![0, 0]),
        (libc::SYS_clock_settime, vec![99, 0]),
        (libc::SYS_sched_setaffinity, vec![0, 0, 0]),
        (libc::SYS_sched_setscheduler, vec![0, 99, 0]),
        (libc::SYS_setpriority, vec![0, 0, 0]),
        // Privileges and limits.
        (libc::SYS_setuid, vec![0]),
        (libc::SYS_setresuid, vec![0, 0, 0]),
        (libc::SYS_setresgid, vec![0, 0, 0]),
        (libc::SYS_setgroups, vec![0, 0]),
        (libc::SYS_capset, vec![0, 0]),
        (libc::SYS_prctl, vec![libc::PR_SET_DUMPABLE.into(), 1]),
        (libc::SYS_prctl, vec![libc::PR_SET_PDEATHSIG.into(), 0]),
        (libc::SYS_prctl, vec![libc::PR_SET_SECCOMP.into(), 0]),
        (libc::SYS_prlimit64, vec![0, libc::RLIMIT_NOFILE.into(), 0, 0]),
        (libc::SYS_prlimit64, vec![1, libc::RLIMIT_MSGQUEUE.into(), 0, 0]),
        // Memory that code is made in.
        (libc::SYS_mprotect, vec![0, 0, exec]),
        (libc::SYS_mprotect, vec![0, 0, libc::PROT_READ.into()]),
        (libc::SYS_pkey_mprotect, vec![0, 0, exec, 0]),
        (libc::SYS_mmap, vec![0, 4096, exec, anonymous, -1, 0]),
        (libc::SYS_mmap, vec![0, 4096, exec, libc::MAP_SHARED.into(), 99, 0]),
        (
            libc::SYS_mmap,
            vec![0, 4096, (libc::PROT_READ | libc::PROT_WRITE).into(), libc::MAP_SHARED.into(), 99, 0],
        ),
        (libc::SYS_remap_file_pages, vec![0, 0, 0, 0, 0]),
        (libc::SYS_madvise, vec![0, 0, libc::MADV_REMOVE.into()]),
        // Ways out: sockets other than those held, and other uses of those.
        (libc::SYS_socket, vec![libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0]),
        (libc::SYS_socket, vec![libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0]),
        (libc::SYS_socketpair, vec![libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0]),
        (libc::SYS_connect, vec![99, 0, 0]),
        (libc::SYS_bind, vec![99, 0, 0]),
        (libc::SYS_listen, vec![99, 0]),
        (libc::SYS_accept4, vec![99, 0, 0, 0]),
        (libc::SYS_shutdown, vec![99, 0]),
        (libc::SYS_splice, vec![99, 0, 99, 0, 0, 0]),
        (libc::SYS_tee, vec![99, 99, 0, 0]),
        (libc::SYS_vmsplice, vec![99, 0, 0, 0]),
        (libc::SYS_sendfile, vec![99, 99, 0, 0]),
        (libc::SYS_copy_file_range, vec![99, 0, 99, 0, 0, 0]),
        (libc::SYS_dup, vec![99]),
        (libc::SYS_dup3, vec![99, 98, 0]),
        (libc::SYS_fcntl, vec![99, libc::F_DUPFD.into(), 0]),
        (libc::SYS_fcntl, vec![99, libc::F_DUPFD_CLOEXEC.into(), 0]),
        (libc::SYS_fcntl, vec![99, libc::F_SETFL.into(), 0]),
        (libc::SYS_fcntl, vec![99, libc::F_SETOWN.into(), 1]),
        (libc::SYS_fcntl, vec![99, libc::F_ADD_SEALS.into(), 0]),
        (libc::SYS_write, vec![libc::STDOUT_FILENO.into(), 0, 0]),
        (libc::SYS_read, vec![99, 0, 0]),
        (libc::SYS_readv, vec![99, 0, 0]),
        (libc::SYS_pread64, vec![99, 0, 0, 0]),
        // TUNSETIFF, TUNSETOWNER, FIOASYNC.
        (libc::SYS_ioctl, vec![99, 0x4004_54ca]),
        (libc::SYS_ioctl, vec![99, 0x4004_54cc]),
        (libc::SYS_ioctl, vec![99, 0x5452]),
        // Others' queues, and all that System V left.
        (libc::SYS_mq_open, vec![0, libc::O_RDWR.into()]),
        (libc::SYS_mq_open, vec![0, libc::O_RDONLY.into()]),
        (
            libc::SYS_mq_open,
            vec![0, (libc::O_RDONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NONBLOCK).into()],
        ),
        (libc::SYS_prlimit64, vec![0, libc::RLIMIT_MSGQUEUE.into(), 0, 0]),
        (libc::SYS_landlock_create_ruleset, vec![0, 0]),
        (libc::SYS_mq_unlink, vec![0]),
        (libc::SYS_mq_notify, vec![99, 0]),
        (libc::SYS_mq_getsetattr, vec![99, 0, 0]),
        (libc::SYS_msgget, vec![0, 0]),
        (libc::SYS_shmget, vec![0, 0, 0]),
        (libc::SYS_semget, vec![0, 99, 0]),
        // Priorities and requeuing of locks.
        (libc::SYS_futex, vec![0, libc::FUTEX_LOCK_PI.into()]),
        (libc::SYS_futex, vec![0, libc::FUTEX_CMP_REQUEUE_PI.into()]),
    ];
    // Programs on sockets, other programs' ports, other devices, memory of our own for the kernel to send from.
    let options = [
        libc::SO_ATTACH_FILTER,
        libc::SO_ATTACH_BPF,
        libc::SO_ATTACH_REUSEPORT_CBPF,
        libc::SO_ATTACH_REUSEPORT_EBPF,
        libc::SO_DETACH_FILTER,
        libc::SO_REUSEPORT,
        libc::SO_REUSEADDR,
        libc::SO_BINDTODEVICE,
        libc::SO_MARK,
        libc::SO_PRIORITY,
        libc::SO_ZEROCOPY,
        libc::SO_RCVBUFFORCE,
    ];
    calls.extend(
        options.map(|option| (libc::SYS_setsockopt, vec![99, libc::SOL_SOCKET.into(), option.into(), 0, 0])),
    );
    let others = [
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        (libc::IPPROTO_IP, libc::IP_OPTIONS),
        (libc::IPPROTO_IP, libc::IP_ADD_MEMBERSHIP),
        (libc::IPPROTO_TCP, libc::TCP_ULP),
        (libc::IPPROTO_TCP, libc::TCP_REPAIR),
        (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
    ];
    calls.extend(
        others.map(|(level, option)| (libc::SYS_setsockopt, vec![99, level.into(), option.into(), 0, 0])),
    );
    #[cfg(target_arch = "x86_64")]
    calls.extend([
        (libc::SYS_fork, vec![]),
        (libc::SYS_vfork, vec![]),
        (libc::SYS_open, vec![0, 0]),
        (libc::SYS_creat, vec![0, 0]),
        (libc::SYS_unlink, vec![0]),
        (libc::SYS_modify_ldt, vec![99, 0, 0]),
        (libc::SYS_arch_prctl, vec![99, 0]),
        (libc::SYS_iopl, vec![0]),
        (libc::SYS_ioperm, vec![0, 0, 0]),
        (libc::SYS_dup2, vec![99, 98]),
    ]);
    calls
}

#[test]
fn what_is_dangerous_ends_whoever_reads_from_the_network() {
    let held = Held::new();
    let (admission, tunnel, holder) = (held.admission(), held.tunnel(), held.holder());
    let carrying = held.carrying(worker::Exit::Device(held.fd(TUN)));
    for (number, arguments) in dangerous() {
        // The key holder reads what workers send, which is what the network may have made of them.
        for filter in [&admission, &carrying, &tunnel, &holder] {
            dies(&[filter], number, &arguments);
        }
    }
}

#[test]
fn calls_by_other_numbers_end_it_too() {
    let held = Held::new();
    let admission = held.admission();
    lives(&[&admission], libc::SYS_getpid, &[]);
    // x32's bit.
    #[cfg(target_arch = "x86_64")]
    dies(&[&admission], libc::SYS_getpid | 0x4000_0000, &[]);
    dies(&[&admission], 100_000, &[]);
}

#[test]
fn calls_of_a_32_bit_program_end_it() {
    let held = Held::new();
    let admission = held.admission();
    let by_interrupt = |filter: Option<&Filter>| {
        // SAFETY: as in `fate`.
        match unsafe { fork() }.expect("forks") {
            ForkResult::Child => {
                if let Some(filter) = filter {
                    let _ = filter.install();
                }
                #[cfg(target_arch = "x86_64")]
                // SAFETY: number 20 is getpid there, which touches no memory.
                unsafe {
                    std::arch::asm!("int 0x80", inout("rax") 20_u64 => _)
                };
                // SAFETY: as in `fate`.
                unsafe { libc::syscall(libc::SYS_exit_group, 0) };
                unreachable!("it has ended")
            }
            ForkResult::Parent { child } => waitpid(child, None).expect("waits"),
        }
    };
    // Only where the kernel has such calls at all.
    if cfg!(target_arch = "x86_64") && matches!(by_interrupt(None), WaitStatus::Exited(_, 0)) {
        assert!(matches!(by_interrupt(Some(&admission)), WaitStatus::Signaled(_, Signal::SIGSYS, _)));
    }
}

#[test]
fn with_a_session_each_descriptor_is_for_one_thing() {
    let held = Held::new();
    let carrying = held.carrying(worker::Exit::Device(held.fd(TUN)));
    // Both stages, as in a worker: what passes has to pass both.
    let both = [&held.admission(), &carrying];
    let uses: &[(c_long, &[usize])] = &[
        (libc::SYS_recvmmsg, &[UDP]),
        (libc::SYS_sendmsg, &[UDP, GUARD]),
        (libc::SYS_recvmsg, &[GUARD]),
        (libc::SYS_recvfrom, &[TCP]),
        (libc::SYS_sendto, &[TCP]),
        (libc::SYS_getpeername, &[TCP]),
        (libc::SYS_writev, &[TUN]),
        (libc::SYS_mq_timedreceive, &[DOWNLINK]),
        (libc::SYS_mq_timedsend, &[]),
        // The device isn't read, by whichever call.
        (libc::SYS_read, &[]),
        (libc::SYS_readv, &[]),
        (libc::SYS_preadv2, &[]),
        (libc::SYS_write, &[]),
        (libc::SYS_ioctl, &[]),
    ];
    for (number, whose) in uses {
        for fd in [GUARD, TCP, UDP, DOWNLINK, TUN, UPLINK, EPOLL, OTHER] {
            // Null pointers and no bytes: what gets through fails, or does nothing.
            let arguments = [held.number(fd), 0, 0, 0, 0, 0];
            match whose.contains(&fd) {
                true => lives(&both, *number, &arguments),
                false => dies(&both, *number, &arguments),
            }
        }
    }
    let by_queue = [&held.carrying(worker::Exit::Queue(held.fd(UPLINK)))];
    lives(&by_queue, libc::SYS_mq_timedsend, &[held.number(UPLINK)]);
    dies(&by_queue, libc::SYS_mq_timedsend, &[held.number(DOWNLINK)]);
    dies(&by_queue, libc::SYS_mq_timedreceive, &[held.number(UPLINK)]);
    dies(&by_queue, libc::SYS_writev, &[held.number(TUN)]);
}

#[test]
fn with_a_session_options_and_the_set_of_descriptors_stay_but_for_two_uses() {
    let held = Held::new();
    let both = [&held.admission(), &held.carrying(worker::Exit::Device(held.fd(TUN)))];
    let option = |fd, level: c_int, name: c_int| [held.number(fd), level.into(), name.into(), 0, 0];
    lives(&both, libc::SYS_setsockopt, &option(UDP, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER));
    dies(&both, libc::SYS_setsockopt, &option(TCP, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER));
    dies(&both, libc::SYS_setsockopt, &option(UDP, libc::IPPROTO_IP, libc::IP_PKTINFO));
    dies(&both, libc::SYS_setsockopt, &option(TCP, libc::IPPROTO_TCP, libc::TCP_NODELAY));
    let epoll = |operation: c_int, fd| [held.number(EPOLL), operation.into(), held.number(fd), 0];
    lives(&both, libc::SYS_epoll_ctl, &epoll(libc::EPOLL_CTL_MOD, TCP));
    lives(&both, libc::SYS_epoll_ctl, &epoll(libc::EPOLL_CTL_DEL, TCP));
    dies(&both, libc::SYS_epoll_ctl, &epoll(libc::EPOLL_CTL_ADD, TCP));
    dies(&both, libc::SYS_epoll_ctl, &epoll(libc::EPOLL_CTL_DEL, GUARD));
    // Nothing that only admission needs.
    for (number, arguments) in [
        (libc::SYS_seccomp, [libc::SECCOMP_SET_MODE_FILTER.into(), 0]),
        (libc::SYS_prctl, [libc::PR_GET_SECCOMP.into(), 0]),
        (libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS.into(), 0]),
        (libc::SYS_epoll_create1, [0, 0]),
        (libc::SYS_getsockname, [held.number(UDP), 0]),
        (libc::SYS_uname, [0, 0]),
        (libc::SYS_sysinfo, [0, 0]),
    ] {
        lives(&both[..1], number, &arguments);
        dies(&both, number, &arguments);
    }
}

#[test]
fn the_tunnel_process_reads_and_writes_its_device_and_nothing_else_so() {
    let held = Held::new();
    let tunnel = [&held.tunnel()];
    for number in [libc::SYS_preadv2, libc::SYS_writev] {
        lives(&tunnel, number, &[held.number(TUN), 0, 0]);
        dies(&tunnel, number, &[held.number(OTHER), 0, 0]);
    }
    lives(&tunnel, libc::SYS_recvmsg, &[held.number(GUARD)]);
    dies(&tunnel, libc::SYS_recvmsg, &[held.number(OTHER)]);
    let non_blocking = libc::FIONBIO as c_long;
    lives(&tunnel, libc::SYS_ioctl, &[held.number(OTHER), non_blocking, 0]);
    dies(&tunnel, libc::SYS_ioctl, &[held.number(TUN), non_blocking, 0]);
    dies(&tunnel, libc::SYS_ioctl, &[held.number(GUARD), non_blocking, 0]);
}

#[test]
fn the_lookup_helper_is_refused_what_no_resolver_needs() {
    let life = Filter::compile_mild(&lookup::life()).expect("compiles");
    let refused = |number, arguments: &[c_long]| {
        assert_eq!(fate(&[&life], number, arguments), Ok(libc::EPERM), "call {number}, {arguments:?}");
    };
    let written = libc::O_WRONLY | libc::O_CREAT;
    let executable_and_writable = libc::PROT_WRITE | libc::PROT_EXEC;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    refused(libc::SYS_execve, &[0, 0, 0]);
    refused(libc::SYS_clone, &[libc::SIGCHLD.into()]);
    refused(libc::SYS_ptrace, &[libc::PTRACE_TRACEME.into()]);
    refused(libc::SYS_mount, &[0, 0, 0, 0, 0]);
    refused(libc::SYS_bpf, &[99]);
    refused(libc::SYS_keyctl, &[99]);
    refused(libc::SYS_io_uring_setup, &[0, 0]);
    refused(libc::SYS_openat, &[libc::AT_FDCWD.into(), 0, written.into()]);
    refused(libc::SYS_socket, &[libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0]);
    refused(libc::SYS_mmap, &[0, 4096, executable_and_writable.into(), anonymous.into(), -1, 0]);
    refused(libc::SYS_mprotect, &[0, 0, libc::PROT_EXEC.into()]);
    refused(libc::SYS_kill, &[0, 0]);
    let udp = [libc::AF_INET.into(), libc::SOCK_DGRAM.into(), 0];
    assert_eq!(fate(&[&life], libc::SYS_socket, &udp), Ok(0));
}

#[test]
fn a_filter_is_as_long_as_the_kernel_takes_and_no_table_contradicts_itself() {
    let held = Held::new();
    for filter in [
        held.admission(),
        held.carrying(worker::Exit::Device(held.fd(TUN))),
        held.tunnel(),
        Filter::compile_mild(&lookup::life()).expect("compiles"),
    ] {
        // BPF_MAXINSNS is 4,096; each call passes some of it.
        assert!((100..1_000).contains(&filter.0.len()), "{}", filter.0.len());
    }
    let both_ways = |table: &[Call]| Filter::compile_or(SeccompAction::KillProcess, table).is_err();
    assert!(both_ways(&[allow(0, &[]), allow(0, &[is(0, 7)])]));
    assert!(both_ways(&[allow(0, &[is(0, 7)]), allow(0, &[])]));
    assert!(!both_ways(&[allow(0, &[is(0, 7)]), allow(0, &[is(0, 8)])]));
}

/// What becomes of a process that does this under both of a worker's filters. It is a copy of one with several threads, of
/// which it has one: what it does must not wait for another.
fn fate_of(work: impl FnOnce(), prepare: impl FnOnce()) -> WaitStatus {
    let held = Held::new();
    // SAFETY: as said above; the C library's allocator makes itself usable in the child.
    match unsafe { fork() }.expect("forks") {
        ForkResult::Child => {
            // Of this process: the tables name it.
            let filters = [held.admission(), held.carrying(worker::Exit::Device(held.fd(TUN)))];
            prepare();
            let put_on = filters.iter().all(|filter| filter.install().is_ok());
            if put_on {
                work();
            }
            // SAFETY: nothing of the parent's is flushed or run in its copy.
            unsafe { libc::syscall(libc::SYS_exit_group, if put_on { 0 } else { UNFILTERED }) };
            unreachable!("it has ended")
        }
        ForkResult::Parent { child } => waitpid(child, None).expect("waits"),
    }
}

#[test]
fn memory_clock_and_random_numbers_are_there_to_the_end() {
    let work = || {
        let mut kept: Vec<Vec<u8>> = Vec::new();
        for size in [1, 100, 5_000, 140_000, 3 << 20] {
            let mut grown = vec![1; size];
            grown.resize(size * 7, 2);
            grown.shrink_to_fit();
            kept.push(grown);
            kept.push(vec![0; size * 3]);
        }
        drop(kept);
        let mut impossible: Vec<u8> = Vec::new();
        assert!(impossible.try_reserve_exact(1 << 46).is_err());
        let _ = crate::sys::clock::now();
        let _ = crate::tls::time::wall_clock();
        let _: [u8; 32] = crate::random::bytes().expect("random bytes");
        let _ = std::collections::HashMap::<u8, u8>::new();
    };
    // A thread of the harness has an arena of its own (mallopt(3)), which grows by mprotect. A worker has no threads: this
    // is for a harness with one arena.
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() {
        let mut again = std::process::Command::new(std::env::current_exe().expect("our own program"));
        let name = "sys::seccomp::tests::memory_clock_and_random_numbers_are_there_to_the_end";
        let out = again.args(["--exact", name]).env("MALLOC_ARENA_MAX", "1").output().expect("starts");
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    assert!(matches!(fate_of(work, || ()), WaitStatus::Exited(_, 0)));
}

#[test]
fn a_fault_and_an_abort_are_told_from_a_forbidden_call() {
    let abort = || std::process::abort();
    assert!(matches!(fate_of(abort, || ()), WaitStatus::Signaled(_, Signal::SIGABRT, _)));
    let fault = || {
        // SAFETY: there is nothing at this address, which is the point.
        unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) }
    };
    let prepare = || crate::sys::signals::end_by_faults().expect("the kernel's own action");
    assert!(matches!(fate_of(fault, prepare), WaitStatus::Signaled(_, Signal::SIGSEGV, _)));
}
