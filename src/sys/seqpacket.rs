//! Typed messages between two of our processes, over a SEQPACKET socket pair: one message a packet, decoded
//! to exactly its length, descriptors beside it where a channel carries them.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::sys::clock;
use crate::time::Time;

/// The longest message, encoded.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// Descriptors that may come with one message: a TCP connection and eight UDP sockets.
pub const MAX_FDS: usize = 9;

/// One end: sends `Tx`, receives `Rx`. Non-blocking.
#[derive(Debug)]
pub struct Channel<Tx, Rx> {
    socket: OwnedFd,
    _types: PhantomData<fn(Tx) -> Rx>,
}

/// What a read of the channel found.
#[derive(Debug)]
pub enum Incoming<Rx> {
    /// A message and the descriptors that came with it.
    Message(Rx, Vec<OwnedFd>),
    /// Nothing is waiting.
    Nothing,
    /// The other end is closed.
    Closed,
}

/// The other end broke the channel's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Longer than [`MAX_MESSAGE`].
    TooLong,
    /// It doesn't decode, or bytes are left over.
    Malformed,
    /// Descriptors where none are allowed, or too many.
    Descriptors,
    /// The socket failed.
    Socket(Errno),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::TooLong => f.write_str("a message that is too long"),
            Violation::Malformed => f.write_str("a message that doesn't decode"),
            Violation::Descriptors => f.write_str("descriptors that were not asked for"),
            Violation::Socket(errno) => write!(f, "the socket failed: {errno}"),
        }
    }
}

/// A connected pair: ours, and the other process's as a plain descriptor.
pub fn pair<Tx, Rx>() -> io::Result<(Channel<Tx, Rx>, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    Ok((Channel::from_fd(ours), theirs))
}

impl<Tx: Serialize, Rx: DeserializeOwned> Channel<Tx, Rx> {
    /// Sends a message; `false` when the other end doesn't read fast enough.
    pub fn send(&self, message: &Tx, fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
        let bytes = bincode::serde::encode_to_vec(message, CODING).map_err(io::Error::other)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(io::Error::other("the message is too long for the channel"));
        }
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        match sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reads a message. Descriptors are taken only where `with_fds`; otherwise they are closed unseen and the
    /// message is a violation.
    pub fn receive(&self, with_fds: bool) -> Result<Incoming<Rx>, Violation> {
        let mut bytes = [0; MAX_MESSAGE + 1];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; MAX_FDS]);
        let control = with_fds.then_some(&mut space[..]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let (len, flags, fds) = match recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, control, flags) {
            Ok(got) => {
                let fds = if with_fds { take_fds(&got)? } else { Vec::new() };
                (got.bytes, got.flags, fds)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Incoming::Nothing),
            Err(Errno::ECONNRESET) => return Ok(Incoming::Closed),
            Err(errno) => return Err(Violation::Socket(errno)),
        };
        if len == 0 {
            return Ok(Incoming::Closed);
        }
        if flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(Violation::Descriptors);
        }
        if len > MAX_MESSAGE || flags.contains(MsgFlags::MSG_TRUNC) {
            return Err(Violation::TooLong);
        }
        let (message, used) =
            bincode::serde::decode_from_slice(&bytes[..len], CODING).map_err(|_| Violation::Malformed)?;
        if used != len {
            return Err(Violation::Malformed);
        }
        Ok(Incoming::Message(message, fds))
    }

    /// The next message, without descriptors, or the end, for which this process does nothing else until `deadline`:
    /// [`Incoming::Nothing`] then.
    pub fn wait(&self, deadline: Time) -> Result<Incoming<Rx>, Violation> {
        loop {
            match self.receive(false) {
                Ok(Incoming::Nothing) => {}
                heard => return heard,
            }
            let left = deadline.since(clock::now());
            if left.is_zero() {
                return Ok(Incoming::Nothing);
            }
            // Rounded up: a timeout of less than a millisecond would be none.
            let left = PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], left) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(Violation::Socket(errno)),
            }
        }
    }
}

impl<Tx, Rx> Channel<Tx, Rx> {
    /// The same end once more.
    pub fn try_clone(&self) -> io::Result<Channel<Tx, Rx>> {
        Ok(Channel::from_fd(self.socket.try_clone()?))
    }

    /// The end whose descriptor was handed to this process.
    pub fn from_fd(socket: OwnedFd) -> Channel<Tx, Rx> {
        Channel { socket, _types: PhantomData }
    }
}

impl<Tx, Rx> AsFd for Channel<Tx, Rx> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn take_fds(got: &nix::sys::socket::RecvMsg<'_, '_, ()>) -> Result<Vec<OwnedFd>, Violation> {
    let mut fds = Vec::new();
    for message in got.cmsgs().map_err(|_| Violation::Descriptors)? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just installed these descriptors for us alone; each is owned once, here.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(fds)
}

const CODING: Configuration<LittleEndian, Fixint, Limit<MAX_MESSAGE>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<MAX_MESSAGE>();

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Word {
        Text(String),
        Number(u32),
    }

    fn ends() -> (Channel<Word, Word>, Channel<Word, Word>) {
        let (ours, theirs) = pair().expect("a socket pair");
        (ours, Channel::from_fd(theirs))
    }

    fn raw_send(channel: &Channel<Word, Word>, bytes: &[u8]) {
        let iov = [IoSlice::new(bytes)];
        sendmsg::<()>(channel.socket.as_raw_fd(), &iov, &[], MsgFlags::empty(), None).expect("sends");
    }

    #[test]
    fn messages_and_descriptors_arrive_whole() {
        let (a, b) = ends();
        assert!(matches!(b.receive(true), Ok(Incoming::Nothing)));
        let (file, _other) = ends();
        assert!(a.send(&Word::Text("hello".into()), &[file.as_fd()]).expect("sends"));
        match b.receive(true).expect("reads") {
            Incoming::Message(Word::Text(text), fds) => assert_eq!((text.as_str(), fds.len()), ("hello", 1)),
            other => panic!("{other:?}"),
        }
        drop(a);
        // A test beside this one may have forked: its child has a copy of that end for a moment.
        while matches!(b.receive(true), Ok(Incoming::Nothing)) {
            std::thread::yield_now();
        }
        assert!(matches!(b.receive(true), Ok(Incoming::Closed)));
    }

    #[test]
    fn who_waits_hears_what_comes_and_no_longer_than_he_wants() {
        let (a, b) = ends();
        assert!(a.send(&Word::Number(1), &[]).expect("sends"));
        // What is there already is heard, even if it is too late to wait.
        assert!(matches!(b.wait(Time::default()), Ok(Incoming::Message(Word::Number(1), _))));
        assert!(matches!(b.wait(Time::default()), Ok(Incoming::Nothing)));
        let until = clock::now() + Duration::from_micros(1_500);
        assert!(matches!(b.wait(until), Ok(Incoming::Nothing)));
        assert!(clock::now() >= until, "it gave up too early");
        let hours = clock::now() + Duration::from_secs(1 << 40);
        let other = thread::spawn(move || {
            a.send(&Word::Number(2), &[]).expect("sends");
        });
        assert!(matches!(b.wait(hours), Ok(Incoming::Message(Word::Number(2), _))));
        assert!(matches!(b.wait(hours), Ok(Incoming::Closed)));
        other.join().expect("it sends");
    }

    #[test]
    fn broken_rules_are_named() {
        let (a, b) = ends();
        raw_send(&a, &[1, 0, 0, 0, 7, 0, 0, 0, 9]);
        assert!(matches!(b.receive(false), Err(Violation::Malformed)));
        raw_send(&a, &[1, 0, 0, 0, 7]);
        assert!(matches!(b.receive(false), Err(Violation::Malformed)));
        raw_send(&a, &[9, 0, 0, 0]);
        assert!(matches!(b.receive(false), Err(Violation::Malformed)));
        raw_send(&a, &[0; MAX_MESSAGE + 1]);
        assert!(matches!(b.receive(false), Err(Violation::TooLong)));
        let (file, _other) = ends();
        a.send(&Word::Number(1), &[file.as_fd()]).expect("sends");
        assert!(matches!(b.receive(false), Err(Violation::Descriptors)));
        a.send(&Word::Number(2), &[]).expect("sends");
        assert!(matches!(b.receive(false), Ok(Incoming::Message(Word::Number(2), _))));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 1..200)) {
            let (a, b) = ends();
            raw_send(&a, &bytes);
            let _ = b.receive(true);
        }
    }
}
