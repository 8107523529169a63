//! What waits for one session: batches that its queue had no room for, bounded.

use std::collections::VecDeque;
use std::io;

use tunguard::batch::BatchWriter;
use tunguard::sys::mq::Writer;

/// Batches to be filled, kept so that their memory is used again.
pub struct Pool {
    spare: Vec<BatchWriter>,
    limit: usize,
}

impl Pool {
    /// A pool of batches of at most `limit` bytes.
    pub fn new(limit: usize) -> Pool {
        Pool { spare: Vec::new(), limit }
    }

    /// An empty batch.
    pub fn take(&mut self) -> BatchWriter {
        self.spare.pop().unwrap_or_else(|| BatchWriter::new(self.limit))
    }

    /// Takes a batch back.
    pub fn give(&mut self, mut batch: BatchWriter) {
        if self.spare.len() < SPARE_BATCHES {
            batch.clear();
            self.spare.push(batch);
        }
    }
}

/// A session's queue and the batches in front of it.
pub struct Outbox {
    queue: Writer,
    waiting: VecDeque<BatchWriter>,
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

    /// Sends a batch, or keeps it where the queue is full, behind those that wait already; then an empty one
    /// from the pool is put in its place.
    pub fn post(&mut self, batch: &mut BatchWriter, pool: &mut Pool) -> io::Result<Posted> {
        let len = batch.message().len();
        if self.waiting.is_empty() && self.queue.send(batch.message())? {
            return Ok(Posted::Sent);
        }
        if self.bytes + len > BACKLOG_BYTES {
            return Ok(Posted::Dropped);
        }
        // Behind the last one that waits, where there is room: so small batches don't each hold a large buffer.
        let joined = self.waiting.back_mut().is_some_and(|last| last.append(batch));
        self.bytes += len;
        if !joined {
            self.waiting.push_back(std::mem::replace(batch, pool.take()));
        }
        Ok(Posted::Waiting)
    }

    /// The queue has room again: sends what waits. `true` when nothing waits any more.
    pub fn resume(&mut self, pool: &mut Pool) -> io::Result<bool> {
        while let Some(batch) = self.waiting.pop_front() {
            if !self.queue.send(batch.message())? {
                self.waiting.push_front(batch);
                return Ok(false);
            }
            self.bytes -= batch.message().len();
            pool.give(batch);
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
/// Batches kept for use again: those of two full backlogs.
const SPARE_BATCHES: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use tunguard::batch::{BatchReader, RECORD_LEN};
    use tunguard::sys::mq::{QueueSize, Reader, unlink};
    use tunguard::wire::vnet::VnetHeader;

    #[test]
    fn order_is_kept_and_the_bound_holds() {
        let name = format!("/tunguard-outbox-{}", std::process::id());
        let size = QueueSize { messages: 2, bytes: 8192 };
        let reader = Reader::create(&name, size).expect("a queue");
        let mut outbox = Outbox::new(Writer::open(&name).expect("its other end"));
        unlink(&name).expect("unlinks");
        let mut pool = Pool::new(8192);
        let payload = vec![0; 8192 - RECORD_LEN];
        let fate: Vec<_> = (0..140u16)
            .map(|n| {
                let mut batch = pool.take();
                let vnet = VnetHeader { gso_size: n, ..VnetHeader::default() };
                assert!(batch.push(&vnet, &[], &payload));
                let posted = outbox.post(&mut batch, &mut pool).expect("posts");
                pool.give(batch);
                posted
            })
            .collect();
        assert!(fate[..2].iter().all(|f| *f == Posted::Sent));
        assert!(fate[2..130].iter().all(|f| *f == Posted::Waiting));
        assert!(fate[130..].iter().all(|f| *f == Posted::Dropped));
        assert_eq!(outbox.backlog(), BACKLOG_BYTES);
        let mut next = 0;
        let mut buffer = vec![0; 8192];
        loop {
            while reader.receive(&mut buffer).expect("receives").is_some() {
                let (vnet, _) = BatchReader::new(&buffer).next().expect("a record").expect("a whole one");
                assert_eq!(vnet.gso_size, next);
                next += 1;
            }
            if outbox.resume(&mut pool).expect("resumes") && next == 130 {
                break;
            }
        }
        assert_eq!(outbox.backlog(), 0);
    }
}
