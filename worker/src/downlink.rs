//! The session's packets on their way from the guard: its queue, and the memory that what is too long for a message
//! lies in.

use std::os::fd::{AsFd, BorrowedFd};

use tunguard::batch::Place;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::sys::mq::Reader;
use tunguard::sys::shared::Viewer;

/// Where the guard's batches come from.
pub struct Downlink {
    queue: Reader,
    memory: Viewer,
    message: Vec<u8>,
}

impl Downlink {
    /// Batches from `queue`, whose messages have `message_bytes` at most, and `memory`.
    pub fn new(queue: Reader, memory: Viewer, message_bytes: usize) -> Downlink {
        Downlink { queue, memory, message: vec![0; message_bytes] }
    }

    /// The next batch, good until the one after it is taken; `None` when there is none.
    pub fn take(&mut self) -> Outcome<Option<&[u8]>> {
        let received = self.queue.receive(&mut self.message);
        let Some(len) = received.map_err(|e| Failure::system("read the session's queue", e))? else {
            return Ok(None);
        };
        let message = &self.message[..len];
        let Some(place) = Place::parse(message) else { return Ok(Some(message)) };
        let batch = self.memory.view(place.at as usize, place.len as usize);
        let outside =
            || Failure::new(Exit::Malformed, format!("the guard names no place of ours: {place:?}"));
        batch.ok_or_else(outside).map(Some)
    }
}

impl AsFd for Downlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}
