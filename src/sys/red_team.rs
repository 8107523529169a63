//! For tests (feature `rigged`): what a process under foreign control would ask of the kernel, a system call each, as
//! data. worker/src/red_team.rs tries them.
//!
//! An act is made so that it harms nobody but the one that tries it, where it gets through without being root: signals
//! are number 0 but for one, processes that come to be end at once, `reboot` asks for nothing.

use std::num::NonZeroUsize;
use std::os::fd::RawFd;
use std::ptr::NonNull;

use libc::{c_long, c_void};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

use crate::exit::{Failure, Outcome};

/// When a worker tries an act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It is locked in, and nothing from the network was read.
    Admission,
    /// As before, but it has claimed a session by itself, and holds what the guard grants with one.
    Granted,
    /// It has a session, and gave up what only admission needs.
    Carrying,
}

/// An act of the kernel's.
#[derive(Debug)]
pub struct Act {
    /// Its name, in orders and reports.
    pub name: &'static str,
    /// When it is tried.
    pub moments: &'static [Moment],
    call: fn(&Ground) -> Call,
}

/// What an attacker has found around itself: descriptors it holds (-1 where it doesn't), processes it has heard of.
#[derive(Debug)]
pub struct Ground {
    /// The channel to the guard.
    pub channel: RawFd,
    /// The client's connection.
    pub tcp: RawFd,
    /// The UDP slot.
    pub udp: RawFd,
    /// The queue from the guard, or what is its memory.
    pub queue: RawFd,
    /// The device, or the queue to the guard.
    pub exit: RawFd,
    /// The set of descriptors to wait for.
    pub epoll: RawFd,
    /// The guard.
    pub guard: i32,
    /// The nursery.
    pub nursery: i32,
    /// Another session's worker.
    pub sibling: i32,
    /// Pages for what system calls read and write.
    scratch: NonNull<c_void>,
}

/// A system call.
struct Call {
    number: c_long,
    arguments: [c_long; 6],
}

impl Ground {
    /// Pages to try things with; all numbers are still to be filled in.
    pub fn new() -> Outcome<Ground> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let len = NonZeroUsize::new(SCRATCH).expect("some");
        // SAFETY: new pages at a place of the kernel's choice, which are never given back.
        let scratch = unsafe { mmap_anonymous(None, len, access, MapFlags::MAP_PRIVATE) };
        let scratch = scratch.map_err(|e| Failure::system("get memory to try things with", e))?;
        let (fd, pid) = (-1, 0);
        Ok(Ground {
            channel: fd,
            tcp: fd,
            udp: fd,
            queue: fd,
            exit: fd,
            epoll: fd,
            guard: pid,
            nursery: pid,
            sibling: pid,
            scratch,
        })
    }

    /// 32 KiB of zeroes, or what earlier acts have left there.
    fn memory(&self) -> c_long {
        self.scratch.as_ptr() as c_long
    }

    /// Puts words at their start.
    fn put<const N: usize>(&self, words: [i32; N]) {
        // SAFETY: a few words at the start of 32 KiB of ours, aligned as pages are; nothing refers into them.
        unsafe { self.scratch.cast::<[i32; N]>().write(words) };
    }

    /// Puts a `struct iovec` there, of 2 KiB behind it, and says where.
    fn vector(&self) -> c_long {
        let [low, high] = [self.memory() + 1024, (self.memory() + 1024) >> 32].map(|half| half as i32);
        self.put([low, high, 2048, 0]);
        self.memory()
    }

    /// Pages of their own, for acts that change what pages are.
    fn pages(&self) -> c_long {
        self.memory() + (SCRATCH / 2) as c_long
    }
}

impl Act {
    /// Tries it.
    ///
    /// Errors: it was refused, and the process is still there.
    pub fn attempt(&self, ground: &Ground) -> nix::Result<()> {
        let Call { number, arguments: [a, b, c, d, e, f] } = (self.call)(ground);
        // SAFETY: what pointers are in the table lead to static strings, which no call of it writes to, or to the
        // pages of `ground`, which are there for good and hold nothing that Rust knows of; calls that map or protect
        // memory name these pages, or leave the place to the kernel. A process that comes to be has a copy of the
        // stack (no CLONE_VM in the table), and ends just below.
        let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
        if result == 0 && MAKES_PROCESSES.contains(&number) {
            // SAFETY: ends the process that was just made, and runs nothing of ours in it.
            unsafe { libc::_exit(0) };
        }
        Errno::result(result).map(drop)
    }
}

/// All acts that are one system call.
pub static ACTS: &[Act] = &[
    // Files.
    act("open-file", BOTH, |_| open(c"/etc/passwd", libc::O_RDONLY)),
    act("open-own-memory", BOTH, |_| open(c"/proc/self/mem", libc::O_RDWR)),
    act("open-proc", BOTH, |_| open(c"/proc", libc::O_RDONLY | libc::O_DIRECTORY)),
    act("open-root", FIRST, |_| open(c"/", libc::O_RDONLY | libc::O_DIRECTORY)),
    act("open-device", FIRST, |_| open(c"/dev/net/tun", libc::O_RDWR)),
    act("create-file", BOTH, |_| open(c"/tmp/red-team", libc::O_CREAT | libc::O_WRONLY)),
    act("open-by-newer-call", FIRST, |g| call(libc::SYS_openat2, [AT, text(c"/"), g.memory(), 24])),
    act("make-directory", FIRST, |_| call(libc::SYS_mkdirat, [AT, text(c"/red-team"), 0o700])),
    act("unlink", FIRST, |_| call(libc::SYS_unlinkat, [AT, text(c"/red-team"), 0])),
    act("stat", FIRST, |g| call(libc::SYS_statx, [AT, text(c"/etc/passwd"), 0, 0x7ff, g.memory()])),
    act("read-link", FIRST, |g| call(libc::SYS_readlinkat, [AT, text(c"/proc/self/exe"), g.memory(), 64])),
    act("file-handle", FIRST, |g| call(libc::SYS_open_by_handle_at, [AT, g.memory(), 0])),
    act("watch-files", FIRST, |_| call(libc::SYS_inotify_init1, [0])),
    act("watch-all-files", FIRST, |_| call(libc::SYS_fanotify_init, [0, 0])),
    // Sockets.
    act("socket-inet", BOTH, |_| socket(libc::AF_INET, libc::SOCK_STREAM, 0)),
    act("socket-inet6", FIRST, |_| socket(libc::AF_INET6, libc::SOCK_DGRAM, 0)),
    act("socket-unix", BOTH, |_| socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)),
    act("socket-packet", FIRST, |_| socket(libc::AF_PACKET, libc::SOCK_RAW, 0)),
    act("socket-netlink", FIRST, |_| socket(libc::AF_NETLINK, libc::SOCK_RAW, 0)),
    act("socket-alg", FIRST, |_| socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)),
    act("socket-vsock", FIRST, |_| socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)),
    act("socket-pair", FIRST, |g| call(libc::SYS_socketpair, [1, 1, 0, g.memory()])),
    act("connect", BOTH, |g| call(libc::SYS_connect, [g.tcp.into(), g.memory(), 16])),
    act("connect-udp", LATER, |g| call(libc::SYS_connect, [g.udp.into(), g.memory(), 16])),
    act("bind", BOTH, |g| call(libc::SYS_bind, [g.tcp.into(), g.memory(), 16])),
    act("listen", BOTH, |g| call(libc::SYS_listen, [g.tcp.into(), 1])),
    act("accept", FIRST, |g| call(libc::SYS_accept4, [g.tcp.into(), 0, 0, 0])),
    act("shut-udp", LATER, |g| call(libc::SYS_shutdown, [g.udp.into(), 2])),
    // Processes.
    act("fork", BOTH, |_| call(libc::SYS_clone, [libc::SIGCHLD.into()])),
    act("clone-into-namespace", FIRST, |_| {
        call(libc::SYS_clone, [(libc::CLONE_NEWUSER | libc::SIGCHLD).into()])
    }),
    act("clone3", BOTH, |g| call(libc::SYS_clone3, [g.memory(), 64])),
    act("exec", BOTH, |g| call(libc::SYS_execve, [text(c"/bin/true"), g.memory(), g.memory()])),
    act("exec-descriptor", BOTH, |g| {
        call(
            libc::SYS_execveat,
            [g.channel.into(), text(c""), g.memory(), g.memory(), libc::AT_EMPTY_PATH.into()],
        )
    }),
    act("wait", FIRST, |g| call(libc::SYS_wait4, [-1, g.memory(), libc::WNOHANG.into(), 0])),
    act("trace-guard", BOTH, |g| call(libc::SYS_ptrace, [SEIZE, g.guard.into(), 0, 0])),
    act("trace-nursery", FIRST, |g| call(libc::SYS_ptrace, [SEIZE, g.nursery.into(), 0, 0])),
    act("trace-sibling", BOTH, |g| call(libc::SYS_ptrace, [SEIZE, g.sibling.into(), 0, 0])),
    act("kill-guard", BOTH, |g| call(libc::SYS_kill, [g.guard.into(), 0])),
    act("kill-nursery", FIRST, |g| call(libc::SYS_kill, [g.nursery.into(), 0])),
    act("kill-sibling", BOTH, |g| call(libc::SYS_kill, [g.sibling.into(), 0])),
    act("kill-own-group", FIRST, |_| call(libc::SYS_kill, [0, 0])),
    act("kill-everybody", BOTH, |_| call(libc::SYS_kill, [-1, 0])),
    act("abort-sibling", BOTH, |g| {
        call(libc::SYS_tgkill, [g.sibling.into(), g.sibling.into(), libc::SIGABRT.into()])
    }),
    act("queue-signal", FIRST, |g| call(libc::SYS_rt_sigqueueinfo, [g.sibling.into(), 0, g.memory()])),
    act("read-sibling", BOTH, |g| {
        call(libc::SYS_process_vm_readv, [g.sibling.into(), g.vector(), 1, g.vector(), 1, 0])
    }),
    act("write-sibling", BOTH, |g| {
        call(libc::SYS_process_vm_writev, [g.sibling.into(), g.vector(), 1, g.vector(), 1, 0])
    }),
    act("compare-sibling", FIRST, |g| call(libc::SYS_kcmp, [g.sibling.into(), g.guard.into(), 0, 3, 3])),
    act("handle-of-sibling", BOTH, |g| call(libc::SYS_pidfd_open, [g.sibling.into(), 0])),
    act("descriptor-of-sibling", BOTH, |g| call(libc::SYS_pidfd_getfd, [g.channel.into(), 3, 0])),
    act("signal-by-handle", FIRST, |g| call(libc::SYS_pidfd_send_signal, [g.channel.into(), 0, 0, 0])),
    act("limits-of-sibling", BOTH, |g| {
        call(libc::SYS_prlimit64, [g.sibling.into(), libc::RLIMIT_NOFILE.into(), 0, g.memory()])
    }),
    act("processors-of-sibling", FIRST, |g| {
        call(libc::SYS_sched_setaffinity, [g.sibling.into(), 8, g.memory()])
    }),
    act("priority-of-sibling", BOTH, |g| call(libc::SYS_setpriority, [0, g.sibling.into(), 19])),
    act("own-scheduling", FIRST, |g| call(libc::SYS_sched_setscheduler, [0, 1, g.memory()])),
    act("io-priority", FIRST, |_| call(libc::SYS_ioprio_set, [1, 0, 0])),
    // Code.
    act("map-code", BOTH, |_| map(0, 4096, libc::PROT_READ | libc::PROT_EXEC, ANONYMOUS, -1)),
    act("make-page-code", BOTH, |g| {
        call(libc::SYS_mprotect, [g.pages(), 4096, (libc::PROT_READ | libc::PROT_EXEC).into()])
    }),
    act("make-page-code-by-key", FIRST, |g| {
        call(libc::SYS_pkey_mprotect, [g.pages(), 4096, (libc::PROT_READ | libc::PROT_EXEC).into(), -1])
    }),
    act("memory-file", BOTH, |_| call(libc::SYS_memfd_create, [text(c"red-team"), 0])),
    act("secret-memory", FIRST, |_| call(libc::SYS_memfd_secret, [0])),
    act("map-descriptor", BOTH, |g| {
        map(0, 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, g.channel)
    }),
    act("map-descriptor-to-read", LATER, |g| map(0, 4096, libc::PROT_READ, libc::MAP_SHARED, g.exit)),
    act("lock-memory", FIRST, |g| call(libc::SYS_mlock, [g.memory(), 4096])),
    act("merge-memory", BOTH, |g| call(libc::SYS_madvise, [g.pages(), 4096, libc::MADV_MERGEABLE.into()])),
    act("page-faults", FIRST, |_| call(libc::SYS_userfaultfd, [1])),
    act("handle-signals", BOTH, |g| call(libc::SYS_rt_sigaction, [libc::SIGSYS.into(), 0, g.memory(), 8])),
    // Memory and descriptors, more than there should be.
    act("map-much", BOTH, |_| map(0, 2 << 30, libc::PROT_READ | libc::PROT_WRITE, ANONYMOUS, -1)),
    act("copy-descriptor", BOTH, |g| call(libc::SYS_dup, [g.channel.into()])),
    act("put-descriptor-over-another", BOTH, |g| call(libc::SYS_dup3, [g.channel.into(), g.tcp.into(), 0])),
    act("copy-descriptor-by-fcntl", BOTH, |g| {
        call(libc::SYS_fcntl, [g.channel.into(), libc::F_DUPFD.into(), 3])
    }),
    act("block-descriptor", BOTH, |g| call(libc::SYS_fcntl, [g.channel.into(), libc::F_SETFL.into(), 0])),
    act("own-descriptor", BOTH, |g| {
        call(libc::SYS_fcntl, [g.tcp.into(), libc::F_SETOWN.into(), g.sibling.into()])
    }),
    act("pipe", FIRST, |g| call(libc::SYS_pipe2, [g.memory(), 0])),
    act("event", FIRST, |_| call(libc::SYS_eventfd2, [0, 0])),
    act("signal-descriptor", FIRST, |g| call(libc::SYS_signalfd4, [-1, g.memory(), 8, 0])),
    act("timer-descriptor", FIRST, |_| call(libc::SYS_timerfd_create, [1, 0])),
    act("timer", FIRST, |g| call(libc::SYS_timer_create, [1, 0, g.memory()])),
    act("alarm", FIRST, |g| call(libc::SYS_setitimer, [0, g.memory(), 0])),
    act("new-epoll-set", LATER, |_| call(libc::SYS_epoll_create1, [0])),
    act("watch-more", LATER, |g| {
        call(libc::SYS_epoll_ctl, [g.epoll.into(), libc::EPOLL_CTL_ADD.into(), g.exit.into(), g.memory()])
    }),
    act("shared-memory", FIRST, |_| call(libc::SYS_shmget, [0, 4096, 0o600])),
    act("semaphores", FIRST, |_| call(libc::SYS_semget, [0, 1, 0o600])),
    act("system-v-queue", FIRST, |_| call(libc::SYS_msgget, [0, 0o600])),
    act("own-limits", BOTH, |g| call(libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE.into(), g.memory(), 0])),
    act("own-limits-by-older-call", FIRST, |g| {
        call(libc::SYS_setrlimit, [libc::RLIMIT_NOFILE.into(), g.memory()])
    }),
    act("sleep", FIRST, |g| call(libc::SYS_nanosleep, [g.memory(), 0])),
    act("inherit-lock", FIRST, |g| call(libc::SYS_futex, [g.memory(), FUTEX_LOCK_PI, 0, 0])),
    act("robust-locks", FIRST, |g| {
        call(libc::SYS_get_robust_list, [g.sibling.into(), g.memory(), g.memory() + 64])
    }),
    // Queues.
    act("open-queue", BOTH, |_| open_queue(libc::O_WRONLY)),
    act("read-queue", BOTH, |_| open_queue(libc::O_RDONLY)),
    act("open-queue-as-if-new", FIRST, |_| {
        open_queue(libc::O_RDONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NONBLOCK)
    }),
    act("open-queue-of-all", BOTH, |_| {
        call(libc::SYS_mq_open, [text(QUEUE_OF_ALL), libc::O_WRONLY.into(), 0, 0])
    }),
    act("remove-queue", BOTH, |_| call(libc::SYS_mq_unlink, [text(QUEUE)])),
    act("change-queue", LATER, |g| call(libc::SYS_mq_getsetattr, [g.queue.into(), g.memory(), 0])),
    act("queue-signals", LATER, |g| call(libc::SYS_mq_notify, [g.queue.into(), g.memory()])),
    act("queue-of-own-once-more", LATER, |_| {
        let made = libc::O_RDONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NONBLOCK;
        call(libc::SYS_mq_open, [text(c"red-team-late"), made.into(), 0o600, 0])
    }),
    act("more-queues", FIRST, |g| {
        // A `struct rlimit` without limits.
        g.put([-1; 4]);
        call(libc::SYS_prlimit64, [0, libc::RLIMIT_MSGQUEUE.into(), g.memory(), 0])
    }),
    // The memory of the queue from the guard, as long as there is a descriptor of it.
    act("write-memory", GRANTED, |g| call(libc::SYS_pwrite64, [g.queue.into(), g.memory(), 64, 0])),
    act("gather-into-memory", GRANTED, |g| call(libc::SYS_writev, [g.queue.into(), g.vector(), 1])),
    act("map-memory-to-write", GRANTED, |g| {
        map(0, 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, g.queue)
    }),
    act("map-memory-to-read", GRANTED, |g| map(0, 4096, libc::PROT_READ, libc::MAP_SHARED, g.queue)),
    act("truncate-memory", GRANTED, |g| call(libc::SYS_ftruncate, [g.queue.into(), 0])),
    act("allocate-memory", GRANTED, |g| call(libc::SYS_fallocate, [g.queue.into(), 3, 0, 4096])),
    act("seal-memory", GRANTED, |g| {
        call(libc::SYS_fcntl, [g.queue.into(), libc::F_ADD_SEALS.into(), libc::F_SEAL_WRITE.into()])
    }),
    // The device: it has the packets of all clients.
    act("read-device", LATER, |g| call(libc::SYS_read, [g.exit.into(), g.memory(), 2048])),
    act("gather-from-device", LATER, |g| call(libc::SYS_readv, [g.exit.into(), g.vector(), 1])),
    act("read-device-at", LATER, |g| call(libc::SYS_preadv2, [g.exit.into(), g.vector(), 1, -1, 0, 8])),
    act("receive-from-device", LATER, |g| {
        call(libc::SYS_recvfrom, [g.exit.into(), g.memory(), 2048, 0, 0, 0])
    }),
    act("splice-device", LATER, |g| call(libc::SYS_splice, [g.exit.into(), 0, g.tcp.into(), 0, 2048, 0])),
    act("send-device", LATER, |g| call(libc::SYS_sendfile, [g.tcp.into(), g.exit.into(), 0, 2048])),
    act("write-device-otherwise", LATER, |g| call(libc::SYS_write, [g.exit.into(), g.memory(), 64])),
    act("name-device", LATER, |g| call(libc::SYS_ioctl, [g.exit.into(), TUNGETIFF, g.memory()])),
    act("change-device", LATER, |g| call(libc::SYS_ioctl, [g.exit.into(), TUNSETIFF, g.memory()])),
    act("filter-device", LATER, |g| call(libc::SYS_ioctl, [g.exit.into(), TUNATTACHFILTER, g.memory()])),
    act("keep-device", LATER, |g| call(libc::SYS_ioctl, [g.exit.into(), TUNSETPERSIST, 1])),
    // The UDP slot.
    act("steer-slots", LATER, |g| udp_option(g, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF)),
    act("steer-slots-by-ebpf", LATER, |g| udp_option(g, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_EBPF)),
    act("unsteer-slots", LATER, |g| udp_option(g, libc::SOL_SOCKET, libc::SO_DETACH_REUSEPORT_BPF)),
    act("admit-all", LATER, |g| udp_option(g, libc::SOL_SOCKET, libc::SO_DETACH_FILTER)),
    act("admit-others", LATER, |g| udp_option(g, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER)),
    act("share-port", LATER, |g| udp_option(g, libc::SOL_SOCKET, libc::SO_REUSEPORT)),
    act("bind-to-device", LATER, |g| udp_option(g, libc::SOL_SOCKET, libc::SO_BINDTODEVICE)),
    act("mark-packets", LATER, |g| udp_option(g, libc::SOL_SOCKET, libc::SO_MARK)),
    act("grow-buffer", LATER, |g| udp_option(g, libc::SOL_SOCKET, libc::SO_RCVBUF)),
    act("any-source", LATER, |g| udp_option(g, libc::SOL_IP, libc::IP_TRANSPARENT)),
    act("read-slot-otherwise", LATER, |g| {
        call(libc::SYS_recvfrom, [g.udp.into(), g.memory(), 2048, libc::MSG_DONTWAIT.into(), 0, 0])
    }),
    act("steer-by-connection", FIRST, |g| {
        let option = libc::SO_ATTACH_REUSEPORT_CBPF.into();
        call(libc::SYS_setsockopt, [g.tcp.into(), libc::SOL_SOCKET.into(), option, g.memory(), 16])
    }),
    act("upper-protocol", BOTH, |g| {
        call(
            libc::SYS_setsockopt,
            [g.tcp.into(), libc::SOL_TCP.into(), libc::TCP_ULP.into(), text(c"tls"), 4],
        )
    }),
    act("interfaces", BOTH, |g| call(libc::SYS_ioctl, [g.tcp.into(), SIOCGIFCONF, g.memory()])),
    // Privileges, and other worlds.
    act("new-user-namespace", BOTH, |_| call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into()])),
    act("new-network", FIRST, |_| call(libc::SYS_unshare, [libc::CLONE_NEWNET.into()])),
    act("new-mounts", FIRST, |_| call(libc::SYS_unshare, [libc::CLONE_NEWNS.into()])),
    act("enter-namespace", BOTH, |g| call(libc::SYS_setns, [g.channel.into(), 0])),
    act("become-root", BOTH, |_| call(libc::SYS_setresuid, [0, 0, 0])),
    act("become-root-by-older-call", FIRST, |_| call(libc::SYS_setuid, [0])),
    act("take-group", FIRST, |_| call(libc::SYS_setresgid, [0, 0, 0])),
    act("take-groups", FIRST, |g| call(libc::SYS_setgroups, [1, g.memory()])),
    act("files-user", FIRST, |_| call(libc::SYS_setfsuid, [0])),
    act("take-capabilities", BOTH, |g| {
        // Version 3 of the header, this process, and all of them in all sets.
        g.put([0x2008_0522, 0, -1, -1, -1, -1, -1, -1]);
        call(libc::SYS_capset, [g.memory(), g.memory() + 8])
    }),
    act("leave-root", BOTH, |_| call(libc::SYS_chroot, [text(c"..")])),
    act("change-directory", FIRST, |_| call(libc::SYS_chdir, [text(c"..")])),
    act("mount", BOTH, |_| call(libc::SYS_mount, [text(c"none"), text(c"/"), text(c"tmpfs"), 0, 0])),
    act("unmount", FIRST, |_| call(libc::SYS_umount2, [text(c"/red-team"), 0])),
    act("pivot-root", FIRST, |_| call(libc::SYS_pivot_root, [text(c"/"), text(c"/")])),
    act("new-mount-api", FIRST, |_| call(libc::SYS_fsopen, [text(c"tmpfs"), 0])),
    act("open-tree", FIRST, |_| call(libc::SYS_open_tree, [AT, text(c"/"), 0])),
    act("move-mount", FIRST, |_| call(libc::SYS_move_mount, [AT, text(c"/"), AT, text(c"/"), 0])),
    act("bpf", BOTH, |g| {
        // An array of one number.
        g.put([2, 4, 4, 1]);
        call(libc::SYS_bpf, [0, g.memory(), 64])
    }),
    act("performance-events", FIRST, |g| call(libc::SYS_perf_event_open, [g.memory(), 0, -1, -1, 0])),
    act("io-uring", BOTH, |g| call(libc::SYS_io_uring_setup, [1, g.memory()])),
    act("kernel-aio", FIRST, |g| call(libc::SYS_io_setup, [1, g.memory()])),
    act("add-key", FIRST, |g| call(libc::SYS_add_key, [text(c"user"), text(c"red-team"), g.memory(), 1, -3])),
    act("read-key", FIRST, |g| call(libc::SYS_keyctl, [11, -3, g.memory(), 64])),
    act("request-key", FIRST, |_| call(libc::SYS_request_key, [text(c"user"), text(c"red-team"), 0, 0])),
    act("personality", FIRST, |_| call(libc::SYS_personality, [0x004_0000])),
    act("be-dumped", BOTH, |_| prctl(libc::PR_SET_DUMPABLE, 1)),
    act("other-filter", BOTH, |_| prctl(libc::PR_SET_SECCOMP, 1)),
    act("outlive-the-guard", BOTH, |_| prctl(libc::PR_SET_PDEATHSIG, 0)),
    act("be-traced", FIRST, |_| prctl(libc::PR_SET_PTRACER, -1)),
    act("another-name", FIRST, |_| call(libc::SYS_prctl, [libc::PR_SET_NAME.into(), text(c"red-team")])),
    act("keep-capabilities", FIRST, |_| prctl(libc::PR_SET_KEEPCAPS, 1)),
    act("quota", FIRST, |g| call(libc::SYS_quotactl, [0, text(c"/"), 0, g.memory()])),
    act("kernel-log", FIRST, |g| call(libc::SYS_syslog, [3, g.memory(), 64])),
    act("reboot", FIRST, |_| call(libc::SYS_reboot, [0, 0, 0, 0])),
    act("another-kernel", FIRST, |_| call(libc::SYS_kexec_load, [0, -1, 0, 0])),
    act("kernel-module", BOTH, |g| call(libc::SYS_init_module, [g.memory(), 64, text(c"")])),
    act("kernel-module-of-file", FIRST, |g| call(libc::SYS_finit_module, [g.channel.into(), text(c""), 0])),
    act("swap", FIRST, |_| call(libc::SYS_swapon, [text(c"/red-team"), 0])),
    act("accounting", FIRST, |_| call(libc::SYS_acct, [text(c"/red-team")])),
    act("host-name", FIRST, |g| call(libc::SYS_sethostname, [g.memory(), 0])),
    act("clock", FIRST, |g| call(libc::SYS_clock_settime, [-1, g.memory()])),
    act("no-such-call", BOTH, |_| call(0xfff, [])),
    // Where filters ask nothing: what they rely on.
    act("poll-device", LATER, |g| {
        // A `struct pollfd`.
        g.put([g.exit, libc::POLLIN.into()]);
        call(libc::SYS_ppoll, [g.memory(), 1, g.memory() + 64, 0, 8])
    }),
];

/// Numbers that only this architecture has.
#[cfg(target_arch = "x86_64")]
pub static ACTS_HERE: &[Act] = &[
    act("open-by-older-call", FIRST, |_| call(libc::SYS_open, [text(c"/etc/passwd"), 0])),
    act("fork-by-older-call", FIRST, |_| call(libc::SYS_fork, [])),
    act("arch-prctl", FIRST, |g| call(libc::SYS_arch_prctl, [0x1003, g.memory()])),
    act("io-ports", FIRST, |_| call(libc::SYS_ioperm, [0x70, 1, 1])),
    act("io-privilege", FIRST, |_| call(libc::SYS_iopl, [3])),
    act("local-descriptors", FIRST, |g| call(libc::SYS_modify_ldt, [0, g.memory(), 64])),
    act("x32-call", BOTH, |_| call(0x4000_0000 | libc::SYS_getpid, [])),
];
/// Numbers that only this architecture has.
#[cfg(not(target_arch = "x86_64"))]
pub static ACTS_HERE: &[Act] = &[];

/// vfork(2). The new process shares this one's stack, so it ends before it touches it.
#[cfg(target_arch = "x86_64")]
pub fn vfork() -> nix::Result<()> {
    let result: c_long;
    // SAFETY: the parent waits until the child is gone, and the child does nothing but exit_group(0): no memory is
    // written. The kernel clobbers rcx and r11; rdi is given.
    unsafe {
        std::arch::asm!(
            "syscall", "test rax, rax", "jnz 2f", "mov eax, 231", "xor edi, edi", "syscall", "2:",
            inlateout("rax") libc::SYS_vfork => result, out("rdi") _, out("rcx") _, out("r11") _,
        );
    }
    if result < 0 { Err(Errno::from_raw(-result as i32)) } else { Ok(()) }
}

/// A system call as a 32-bit program makes it: getpid, which is 20 there.
#[cfg(target_arch = "x86_64")]
pub fn call_as_32_bit() -> nix::Result<()> {
    let result: i32;
    // SAFETY: getpid reads and writes no memory; the kernel may clobber r8 to r11.
    unsafe {
        std::arch::asm!(
            "int 0x80",
            inlateout("eax") 20 => result, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    if result < 0 { Err(Errno::from_raw(-result)) } else { Ok(()) }
}

/// A TCP socket that others can connect to, on a port of the kernel's choice.
pub fn listen_on_tcp() -> nix::Result<()> {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, socket};
    use std::os::fd::AsRawFd;
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
    listen(&fd, Backlog::new(1)?)
}

/// Whether another process of this user could trace this one, or read what it leaves in a core.
pub fn is_dumpable() -> bool {
    // SAFETY: PR_GET_DUMPABLE takes and returns numbers only.
    let dumpable = unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) };
    dumpable == 1
}

/// Turns into `program` with one argument. Returns where it was refused.
pub fn exec(program: &std::ffi::CStr, argument: &std::ffi::CStr) -> nix::Result<()> {
    match nix::unistd::execv(program, &[program, argument]) {
        Ok(never) => match never {},
        Err(errno) => Err(errno),
    }
}

const fn act(name: &'static str, moments: &'static [Moment], call: fn(&Ground) -> Call) -> Act {
    Act { name, moments, call }
}

fn call<const N: usize>(number: c_long, given: [c_long; N]) -> Call {
    let mut arguments = [0; 6];
    arguments[..N].copy_from_slice(&given);
    Call { number, arguments }
}

fn open(path: &'static std::ffi::CStr, flags: i32) -> Call {
    call(libc::SYS_openat, [AT, text(path), flags.into(), 0o600])
}

fn socket(family: i32, kind: i32, protocol: i32) -> Call {
    call(libc::SYS_socket, [family.into(), kind.into(), protocol.into()])
}

fn map(at: c_long, len: c_long, access: i32, flags: i32, fd: RawFd) -> Call {
    call(libc::SYS_mmap, [at, len, access.into(), flags.into(), fd.into(), 0])
}

fn open_queue(flags: i32) -> Call {
    call(libc::SYS_mq_open, [text(QUEUE), flags.into(), 0o600, 0])
}

fn udp_option(ground: &Ground, level: i32, option: i32) -> Call {
    call(libc::SYS_setsockopt, [ground.udp.into(), level.into(), option.into(), ground.memory(), 16])
}

fn prctl(option: i32, value: c_long) -> Call {
    call(libc::SYS_prctl, [option.into(), value])
}

fn text(text: &'static std::ffi::CStr) -> c_long {
    text.as_ptr() as c_long
}

/// A queue of somebody else's, as the kernel's calls name it: without the library's slash.
const QUEUE: &std::ffi::CStr = c"tunguard-red-team";
/// Another one, that any user may open.
const QUEUE_OF_ALL: &std::ffi::CStr = c"tunguard-red-team-of-all";
/// Both with it.
pub const QUEUE_NAMES: [&str; 2] = ["/tunguard-red-team", "/tunguard-red-team-of-all"];

const FIRST: &[Moment] = &[Moment::Admission];
const GRANTED: &[Moment] = &[Moment::Granted];
const LATER: &[Moment] = &[Moment::Granted, Moment::Carrying];
const BOTH: &[Moment] = &[Moment::Admission, Moment::Carrying];

const SCRATCH: usize = 64 * 1024;
const MAKES_PROCESSES: &[c_long] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
];
const AT: c_long = libc::AT_FDCWD as c_long;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const SEIZE: c_long = 0x4206;
const FUTEX_LOCK_PI: c_long = 6;
// include/uapi/linux/if_tun.h
const TUNSETPERSIST: c_long = 0x4004_54cb;
const TUNSETIFF: c_long = 0x4004_54ca;
const TUNGETIFF: c_long = 0x8004_54d2;
const TUNATTACHFILTER: c_long = 0x4010_54d5;
const SIOCGIFCONF: c_long = 0x8912;
