//! Steering and filtering of the UDP slots in the kernel, in classic BPF
//! (Documentation/networking/filter.rst).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{
    BPF_ABS, BPF_H, BPF_IMM, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter, sock_fprog,
};

use crate::wire::data::SessionId;

/// Makes the kernel hand each datagram of the socket's SO_REUSEPORT group to the socket whose number in the
/// group is in the datagram's first two bytes. (SO_ATTACH_REUSEPORT_CBPF runs at the UDP payload:
/// reuseport_select_sock() in net/core/sock_reuseport.c.) A number beyond the group falls back to a hash.
pub fn attach_slot_steering(socket: impl AsFd) -> io::Result<()> {
    // No BPF_RET of the accumulator in libc's list: it is 0x10 (BPF_A in include/uapi/linux/filter.h).
    const BPF_A: u32 = 0x10;
    let program = [instruction(BPF_LD | BPF_H | BPF_ABS, 0, 0, 0), instruction(BPF_RET | BPF_A, 0, 0, 0)];
    attach(socket, libc::SO_ATTACH_REUSEPORT_CBPF, &program)
}

/// Drops every datagram that is not `session`'s before any process wakes. (A socket filter sees the UDP header
/// first: the payload starts at 8.)
pub fn admit_only(socket: impl AsFd, session: SessionId) -> io::Result<()> {
    let word = |at: usize| {
        let bytes = [session.0[at], session.0[at + 1], session.0[at + 2], session.0[at + 3]];
        u32::from_be_bytes(bytes)
    };
    let program = [
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, UDP_HEADER),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 3, word(0)),
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, UDP_HEADER + 4),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, word(4)),
        instruction(BPF_RET | BPF_K, 0, 0, u32::MAX),
        instruction(BPF_RET | BPF_K, 0, 0, 0),
    ];
    attach(socket, libc::SO_ATTACH_FILTER, &program)
}

/// Drops everything.
pub fn admit_nothing(socket: impl AsFd) -> io::Result<()> {
    attach(socket, libc::SO_ATTACH_FILTER, &[instruction(BPF_RET | BPF_K, 0, 0, 0)])
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: (code | BPF_IMM) as u16, jt, jf, k }
}

fn attach(socket: impl AsFd, option: libc::c_int, program: &[sock_filter]) -> io::Result<()> {
    let program = sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies the program during the call (sk_attach_filter() in net/core/filter.c) and
    // doesn't write to it; `program` and what it points to outlive the call.
    let status = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const program).cast(),
            size_of::<sock_fprog>() as libc::socklen_t,
        )
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

const UDP_HEADER: u32 = 8;
