//! POSIX message queues (mq_overview(7)), always non-blocking, in an IPC namespace of their own where the
//! kernel lets us have one.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use posixmq::{OpenOptions, PosixMq};

/// Messages a queue holds, and bytes of the largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct QueueSize {
    /// Messages.
    pub messages: usize,
    /// Bytes of one.
    pub bytes: usize,
}

impl QueueSize {
    /// What the kernel allows without any privilege (`DFLT_MSGMAX`, `DFLT_MSGSIZEMAX` in
    /// include/linux/ipc_namespace.h).
    pub const KERNEL_DEFAULT: QueueSize = QueueSize { messages: 10, bytes: 8192 };

    /// What one such queue is charged against RLIMIT_MSGQUEUE (mqueue_get_inode() in ipc/mqueue.c): its
    /// messages, and for each a header and a tree node.
    pub fn charge(self) -> u64 {
        const MSG_MSG: u64 = 48;
        const TREE_NODE: u64 = 48;
        self.messages as u64 * (self.bytes as u64 + MSG_MSG + TREE_NODE)
    }

    /// The largest size of messages of `bytes` that the limits allow: `messages` of them, or fewer.
    pub fn within(messages: usize, bytes: usize, limits: &QueueLimits) -> QueueSize {
        let bytes = bytes.min(limits.max_bytes);
        let mut size = QueueSize { messages: messages.min(limits.max_messages).max(1), bytes };
        while size.messages > 2 && size.charge() > limits.per_user {
            size.messages -= 1;
        }
        if size.charge() > limits.per_user {
            size = QueueSize {
                messages: 2,
                bytes: ((limits.per_user / 2).saturating_sub(96) as usize).min(bytes),
            };
        }
        size
    }

    /// A size for many that share an allowance, `limits.per_user` being one queue's part of it: rather short messages
    /// than few, but none shorter than `least`. `None` where there is no room for [`QueueSize::FEWEST`] of them.
    pub fn sharing(messages: usize, least: usize, bytes: usize, limits: &QueueLimits) -> Option<QueueSize> {
        let messages = messages.min(limits.max_messages).max(1);
        let most = bytes.min(limits.max_bytes);
        let alone = QueueSize { messages: 1, bytes: 0 }.charge();
        let even = (limits.per_user / messages as u64).saturating_sub(alone);
        let bytes = usize::try_from(even).map_or(most, |even| even.max(least).min(most));
        let room = limits.per_user / (alone + bytes as u64);
        let messages = usize::try_from(room).map_or(messages, |room| room.min(messages));
        (bytes >= least && messages >= QueueSize::FEWEST).then_some(QueueSize { messages, bytes })
    }

    /// Messages below which [`QueueSize::sharing`] calls it no queue.
    pub const FEWEST: usize = 8;
}

/// What the kernel allows here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// The queues are in an IPC namespace of our own.
    pub private: bool,
    /// Messages of a queue.
    pub max_messages: usize,
    /// Bytes of a message.
    pub max_bytes: usize,
    /// Queues of the namespace.
    pub max_queues: usize,
    /// RLIMIT_MSGQUEUE, charged to the user that creates a queue.
    pub per_user: u64,
}

/// Gives this process an IPC namespace of its own and raises its queue limits towards what is asked for, and the allowance
/// of a user towards `charge`. Where the kernel refuses (containers), the limits found are what there is.
pub fn prepare(messages: usize, bytes: usize, queues: usize, charge: u64) -> io::Result<QueueLimits> {
    // Names can't clash, no other user can open a queue, and the kernel destroys them with the last process.
    let private = match unshare(CloneFlags::CLONE_NEWIPC) {
        Ok(()) => true,
        Err(errno) => {
            log::warn!("no IPC namespace of our own ({errno}): the queues are in the host's");
            false
        }
    };
    // Only in a namespace of our own: the host's limits are not ours to change.
    if private {
        for (file, want) in [("msg_max", messages), ("msgsize_max", bytes)] {
            raise(file, want);
        }
        make_room_for(queues);
    }
    let per_user = allowance(charge)?;
    Ok(QueueLimits {
        private,
        max_messages: read_limit("msg_max")?,
        max_bytes: read_limit("msgsize_max")?,
        max_queues: read_limit("queues_max")?,
        per_user,
    })
}

/// Raises the limit of queues in our own namespace, where `queues` are more. Where the kernel refuses, it stays.
pub fn make_room_for(queues: usize) {
    raise("queues_max", queues);
}

/// RLIMIT_MSGQUEUE, for us and whom we start, raised as far as it may be if it is below `wanted`: beyond the hard limit with
/// CAP_SYS_RESOURCE only.
fn allowance(wanted: u64) -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_MSGQUEUE)?;
    if soft >= wanted {
        return Ok(soft);
    }
    let raised = setrlimit(Resource::RLIMIT_MSGQUEUE, wanted, hard.max(wanted))
        .or_else(|_| setrlimit(Resource::RLIMIT_MSGQUEUE, hard, hard));
    if let Err(errno) = raised {
        log::info!("RLIMIT_MSGQUEUE stays at {soft}: {errno}");
    }
    Ok(getrlimit(Resource::RLIMIT_MSGQUEUE)?.0)
}

fn raise(file: &str, want: usize) {
    let raised = match read_limit(file) {
        Ok(present) if present >= want => Ok(()),
        Ok(_) => fs::write(Path::new(LIMITS).join(file), want.to_string()),
        Err(error) => Err(error),
    };
    if let Err(error) = raised {
        log::info!("{LIMITS}/{file} stays as it is: {error}");
    }
}

fn read_limit(file: &str) -> io::Result<usize> {
    let path = Path::new(LIMITS).join(file);
    let text = fs::read_to_string(&path)?;
    text.trim().parse().map_err(|_| io::Error::new(ErrorKind::InvalidData, format!("{path:?}: {text:?}")))
}

/// The end that takes messages out.
#[derive(Debug)]
pub struct Reader(PosixMq);

/// The end that puts messages in.
#[derive(Debug)]
pub struct Writer(PosixMq);

impl Reader {
    /// Creates the queue `name`, which must not exist, readable by us and writable by its owner.
    pub fn create(name: &str, size: QueueSize) -> io::Result<Reader> {
        let mut options = OpenOptions::readonly();
        options.nonblocking().create_new().mode(0o600).capacity(size.messages).max_msg_len(size.bytes);
        Ok(Reader(options.open(name)?))
    }

    /// Opens the queue `name`.
    pub fn open(name: &str) -> io::Result<Reader> {
        Ok(Reader(OpenOptions::readonly().nonblocking().existing().open(name)?))
    }

    /// Takes the oldest message out; `None` when there is none. `into` must hold the queue's largest.
    pub fn receive(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        match self.0.recv(into) {
            Ok((_, len)) => Ok(Some(len)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The queue's size and how many messages wait in it.
    pub fn attributes(&self) -> io::Result<(QueueSize, usize)> {
        attributes(&self.0)
    }
}

impl Writer {
    /// Creates the queue `name`, which must not exist.
    pub fn create(name: &str, size: QueueSize) -> io::Result<Writer> {
        let mut options = OpenOptions::writeonly();
        options.nonblocking().create_new().mode(0o600).capacity(size.messages).max_msg_len(size.bytes);
        Ok(Writer(options.open(name)?))
    }

    /// Opens the queue `name`.
    pub fn open(name: &str) -> io::Result<Writer> {
        Ok(Writer(OpenOptions::writeonly().nonblocking().existing().open(name)?))
    }

    /// Puts a message in; `false` when the queue is full.
    pub fn send(&self, message: &[u8]) -> io::Result<bool> {
        match self.0.send(0, message) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The queue's size and how many messages wait in it.
    pub fn attributes(&self) -> io::Result<(QueueSize, usize)> {
        attributes(&self.0)
    }
}

/// Lets this process, for good, make no more queues.
pub fn make_no_more() -> io::Result<()> {
    Ok(setrlimit(Resource::RLIMIT_MSGQUEUE, 0, 0)?)
}

/// Takes the queue's name away; it lives on until its last descriptor is closed.
pub fn unlink(name: &str) -> io::Result<()> {
    posixmq::remove_queue(name)
}

fn attributes(queue: &PosixMq) -> io::Result<(QueueSize, usize)> {
    let found = queue.attributes()?;
    Ok((QueueSize { messages: found.capacity, bytes: found.max_msg_len }, found.current_messages))
}

fn borrow(queue: &PosixMq) -> BorrowedFd<'_> {
    // SAFETY: a queue descriptor is a file descriptor on Linux, open as long as the queue it is borrowed from.
    unsafe { BorrowedFd::borrow_raw(queue.as_raw_fd()) }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.0)
    }
}

impl AsFd for Writer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.0)
    }
}

const LIMITS: &str = "/proc/sys/fs/mqueue";

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(max_messages: usize, max_bytes: usize, per_user: u64) -> QueueLimits {
        QueueLimits { private: true, max_messages, max_bytes, max_queues: 256, per_user }
    }

    #[test]
    fn sizes_adapt_to_the_limits() {
        let size = |messages, bytes| QueueSize { messages, bytes };
        assert_eq!(QueueSize::within(11, 67_000, &limits(64, 67_000, 819_200)), size(11, 67_000));
        assert_eq!(QueueSize::within(64, 67_000, &limits(64, 67_000, 819_200)), size(12, 67_000));
        assert_eq!(QueueSize::within(11, 67_000, &limits(10, 8192, 819_200)), QueueSize::KERNEL_DEFAULT);
        assert_eq!(QueueSize::within(11, 67_000, &limits(10, 8192, 20_000)), size(2, 8192));
        assert_eq!(QueueSize::within(11, 67_000, &limits(10, 8192, 8_000)), size(2, 3904));
    }

    #[test]
    fn many_share_an_allowance() {
        let size = |messages, bytes| Some(QueueSize { messages, bytes });
        let shared = |each| QueueSize::sharing(64, 64, 8192, &limits(64, 67_000, each));
        // As few as that: as large as ever.
        assert_eq!(shared(819_200), size(64, 8192));
        assert_eq!(shared(200_000), size(64, 3029));
        assert_eq!(shared(20_000), size(64, 216));
        // Shorter messages would hold nothing: fewer of them.
        assert_eq!(shared(10_240), size(64, 64));
        assert_eq!(shared(2_608), size(16, 64));
        assert_eq!(shared(1_280), size(8, 64));
        assert_eq!(shared(1_279), None);
        for each in (1_280..900_000).step_by(977) {
            assert!(shared(each).expect("room").charge() <= each, "{each}");
        }
        // Where no limit can be raised.
        let default = limits(10, 8192, 819_200 / 4);
        assert_eq!(QueueSize::sharing(64, 64, 8192, &default), size(10, 8192));
        assert_eq!(QueueSize::sharing(64, 64, 8192, &QueueLimits { max_bytes: 63, ..default }), None);
    }

    #[test]
    fn a_queue_carries_messages_and_says_when_it_is_full() {
        let name = format!("/tunguard-test-{}", std::process::id());
        let size = QueueSize { messages: 2, bytes: 100 };
        let reader = Reader::create(&name, size).expect("a queue");
        let writer = Writer::open(&name).expect("its other end");
        unlink(&name).expect("a name to take away");
        assert_eq!(reader.attributes().expect("attributes"), (size, 0));
        assert!(writer.send(b"one").expect("sends"));
        assert!(writer.send(b"two").expect("sends"));
        assert!(!writer.send(b"three").expect("is full"));
        let mut buffer = [0; 100];
        assert_eq!(reader.receive(&mut buffer).expect("receives"), Some(3));
        assert_eq!(&buffer[..3], b"one");
        assert!(writer.send(b"three").expect("sends"));
        assert_eq!(reader.receive(&mut buffer).expect("receives"), Some(3));
        assert_eq!(reader.receive(&mut buffer).expect("receives"), Some(5));
        assert_eq!(reader.receive(&mut buffer).expect("is empty"), None);
    }
}
