//! Waiting for descriptors: epoll with tokens.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// A set of descriptors, each under a token of the caller's.
pub struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Something to read, or the end.
    Read,
    /// Room to write, or the end.
    Write,
    /// Either.
    Both,
    /// Only the end.
    Nothing,
}

/// What happened to one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Its token.
    pub token: u64,
    /// Something to read, or the end, or an error.
    pub read: bool,
    /// Room to write, or an error.
    pub write: bool,
}

impl Poller {
    /// An empty set; at most `events` are reported at once.
    pub fn new(events: usize) -> io::Result<Poller> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Poller { epoll, events: vec![EpollEvent::empty(); events] })
    }

    /// Adds a descriptor.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(flags(interest), token))?)
    }

    /// Changes what is waited for.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(flags(interest), token))?)
    }

    /// Takes a descriptor out; to be done before it is closed where others hold it too.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }

    /// Waits until something happens or `timeout` passes (rounded up to milliseconds; `None` is for ever).
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<impl Iterator<Item = Ready> + '_> {
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            Some(t) => {
                let millis = t.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
                EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::ZERO)
            }
        };
        let count = match self.epoll.wait(&mut self.events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        Ok(self.events[..count].iter().map(|event| {
            let broken = event.events().intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
            Ready {
                token: event.data(),
                read: broken || event.events().contains(EpollFlags::EPOLLIN),
                write: broken || event.events().contains(EpollFlags::EPOLLOUT),
            }
        }))
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

fn flags(interest: Interest) -> EpollFlags {
    match interest {
        Interest::Read => EpollFlags::EPOLLIN,
        Interest::Write => EpollFlags::EPOLLOUT,
        Interest::Both => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
        Interest::Nothing => EpollFlags::empty(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_what_is_out_of_the_set_is_silent_about_its_end() {
        let mut poller = Poller::new(4).expect("an epoll set");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        poller.add(&ours, 7, Interest::Nothing).expect("added");
        drop(theirs);
        let mut ready =
            || poller.wait(Some(Duration::ZERO)).expect("waits").map(|r| r.token).collect::<Vec<_>>();
        assert_eq!((ready(), ready()), (vec![7], vec![7]), "again and again");
        poller.remove(&ours).expect("removed");
        assert_eq!(poller.wait(Some(Duration::ZERO)).expect("waits").count(), 0);
        poller.add(&ours, 7, Interest::Read).expect("added");
        assert_eq!(poller.wait(Some(Duration::ZERO)).expect("waits").count(), 1, "told of it afterwards");
    }
}
