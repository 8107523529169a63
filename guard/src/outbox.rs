//! What waits for one session: batches that its queue had no room for, bounded.

use std::collections::VecDeque;
use std::io;

use tunguard::sys::mq::Writer;

/// A session's queue and the batches in front of it.
pub struct Outbox {
    queue: Writer,
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// It is in the queue.
    Sent,
    /// It waits; the queue's room is to be watched.
    Waiting,
    /// There was no room for it at all.
    Dropped,
}

impl Outbox {
    /// An empty one in front of `queue`.
    pub fn new(queue: Writer) -> Outbox {
        Outbox { queue, waiting: VecDeque::new(), bytes: 0 }
    }

    /// Sends a batch, or keeps it where the queue is full, behind those that wait already.
    pub fn post(&mut self, batch: &[u8]) -> io::Result<Posted> {
        if self.waiting.is_empty() && self.queue.send(batch)? {
            return Ok(Posted::Sent);
        }
        if self.bytes + batch.len() > BACKLOG_BYTES {
            return Ok(Posted::Dropped);
        }
        self.bytes += batch.len();
        self.waiting.push_back(batch.to_vec());
        Ok(Posted::Waiting)
    }

    /// The queue has room again: sends what waits. `true` when nothing waits any more.
    pub fn resume(&mut self) -> io::Result<bool> {
        while let Some(batch) = self.waiting.front() {
            if !self.queue.send(batch)? {
                return Ok(false);
            }
            self.bytes -= batch.len();
            self.waiting.pop_front();
        }
        Ok(true)
    }

    /// The queue, to be watched.
    pub fn queue(&self) -> &Writer {
        &self.queue
    }

    /// Bytes that wait.
    pub fn backlog(&self) -> usize {
        self.bytes
    }
}

/// Bytes that may wait in front of one queue: what a TCP flow has in flight while the worker is off the
/// processor. More would only add delay.
const BACKLOG_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use tunguard::sys::mq::{QueueSize, Reader, unlink};

    #[test]
    fn order_is_kept_and_the_bound_holds() {
        let name = format!("/tunguard-outbox-{}", std::process::id());
        let size = QueueSize { messages: 2, bytes: 8192 };
        let reader = Reader::create(&name, size).expect("a queue");
        let mut outbox = Outbox::new(Writer::open(&name).expect("its other end"));
        unlink(&name).expect("unlinks");
        let batch = |n: u32| {
            let mut bytes = vec![0; 8192];
            bytes[..4].copy_from_slice(&n.to_be_bytes());
            bytes
        };
        let fate: Vec<_> = (0..140).map(|n| outbox.post(&batch(n)).expect("posts")).collect();
        assert!(fate[..2].iter().all(|f| *f == Posted::Sent));
        assert!(fate[2..130].iter().all(|f| *f == Posted::Waiting));
        assert!(fate[130..].iter().all(|f| *f == Posted::Dropped));
        assert_eq!(outbox.backlog(), BACKLOG_BYTES);
        let mut next = 0u32;
        let mut buffer = vec![0; 8192];
        loop {
            while reader.receive(&mut buffer).expect("receives").is_some() {
                assert_eq!(buffer[..4], next.to_be_bytes());
                next += 1;
            }
            if outbox.resume().expect("resumes") && next == 130 {
                break;
            }
        }
        assert_eq!(outbox.backlog(), 0);
    }
}
