//! A session's way out: its queue, and the memory for what is too long for a message or has to wait.
//!
//! A batch goes into the queue as it is where it fits a message and there is room. Otherwise it is put into the
//! session's memory, and a message says where. The worker takes messages in order, one after the other, so the
//! queue's own length says which of the places it is done with: there is no word from the worker to be trusted.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroUsize;

use tunguard::batch::{BatchWriter, MAX_RECORD, Place};
use tunguard::sys::mq::Writer;
use tunguard::sys::shared::Filler;
use tunguard::time::Time;

use crate::blocks::Blocks;
use crate::codel::Codel;

/// Batches to be filled, kept so that their memory is used again.
#[derive(Default)]
pub struct Pool(Vec<BatchWriter>);

impl Pool {
    /// An empty batch, for packets until it is [`FULL_AT`] bytes long.
    pub fn take(&mut self) -> BatchWriter {
        self.0.pop().unwrap_or_else(|| BatchWriter::new(FULL_AT + MAX_RECORD))
    }

    /// Takes a batch back.
    pub fn give(&mut self, mut batch: BatchWriter) {
        if self.0.len() < SPARE_BATCHES {
            batch.clear();
            self.0.push(batch);
        }
    }
}

/// A session's queue and its memory.
#[derive(Debug)]
pub struct Outbox {
    queue: Writer,
    /// Bytes of the queue's largest message.
    message: usize,
    memory: Filler,
    blocks: Blocks,
    /// Messages ever put into the queue.
    sent: u64,
    /// Batches in memory that the worker was told of and may still read, oldest first.
    told: VecDeque<Told>,
    /// Batches in memory that the queue had no room to tell of, oldest first.
    waiting: VecDeque<(Place, Time)>,
    codel: Codel,
    /// Its memory was used since [`Outbox::rest`] was last called.
    used: bool,
}

#[derive(Debug)]
struct Told {
    /// Which message told it, counted from 1.
    number: u64,
    place: Place,
    since: Time,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// It is in the queue.
    Sent,
    /// It waits; the queue's room is to be watched.
    Waiting,
    /// There was no room for it.
    Full,
    /// The queue stands for too long already.
    Late,
}

impl Outbox {
    /// An empty one for `queue`, whose messages have `message` bytes at most, and `memory`, both shared with the
    /// worker.
    pub fn new(queue: Writer, message: usize, memory: Filler) -> Outbox {
        Outbox {
            queue,
            message,
            blocks: Blocks::new(memory.size()),
            memory,
            sent: 0,
            told: VecDeque::new(),
            waiting: VecDeque::new(),
            codel: Codel::default(),
            used: false,
        }
    }

    /// Sends a batch, or keeps it where the queue is full, behind those that wait already.
    pub fn post(&mut self, now: Time, batch: &[u8]) -> io::Result<Posted> {
        if self.waiting.is_empty() && batch.len() <= self.message && self.send(batch)? {
            return Ok(Posted::Sent);
        }
        let oldest = self.take_back()?;
        if self.codel.refuses(now, oldest.map(|since| now.since(since))) {
            return Ok(Posted::Late);
        }
        if self.joined(batch) {
            return Ok(Posted::Waiting);
        }
        let Some(at) = self.blocks.take(batch.len()) else { return Ok(Posted::Full) };
        self.used = true;
        self.memory.fill(at, batch);
        let place = Place { at: at as u32, len: batch.len() as u32 };
        if self.waiting.is_empty() && self.tell(place, now)? {
            return Ok(Posted::Sent);
        }
        self.waiting.push_back((place, now));
        Ok(Posted::Waiting)
    }

    /// The queue has room again: tells of what waits. `true` when nothing waits any more.
    pub fn resume(&mut self) -> io::Result<bool> {
        while let Some(&(place, since)) = self.waiting.front() {
            if !self.tell(place, since)? {
                return Ok(false);
            }
            self.waiting.pop_front();
        }
        Ok(true)
    }

    /// To be called once in a while: gives memory back to the kernel that was not used since the last call.
    pub fn rest(&mut self) {
        let idle = !std::mem::take(&mut self.used) && self.waiting.is_empty();
        // The last batch is never known to be done with; but by now it is, if nothing is left in the queue.
        let read = || self.queue.attributes().is_ok_and(|(_, unread)| unread == 0);
        if idle && !self.told.is_empty() && read() {
            self.told.clear();
            self.blocks = Blocks::new(self.memory.size());
            let _ = self.memory.forget();
        }
    }

    /// The queue, to be watched.
    pub fn queue(&self) -> &Writer {
        &self.queue
    }

    /// Bytes that the queue has no room to tell of.
    pub fn backlog(&self) -> usize {
        self.waiting.iter().map(|(place, _)| place.len as usize).sum()
    }

    /// Behind the last batch that waits, where there is room: so small batches don't need a message each.
    fn joined(&mut self, batch: &[u8]) -> bool {
        let Some((last, _)) = self.waiting.back_mut() else { return false };
        let (at, len) = (last.at as usize, last.len as usize);
        if len + batch.len() > FULL_AT || !self.blocks.extend(at, batch.len()) {
            return false;
        }
        self.memory.fill(at + len, batch);
        last.len += batch.len() as u32;
        true
    }

    fn tell(&mut self, place: Place, since: Time) -> io::Result<bool> {
        let sent = self.send(&place.emit())?;
        if sent {
            self.told.push_back(Told { number: self.sent, place, since });
        }
        Ok(sent)
    }

    fn send(&mut self, message: &[u8]) -> io::Result<bool> {
        let sent = self.queue.send(message)?;
        self.sent += u64::from(sent);
        Ok(sent)
    }

    /// Frees the places that the worker is done with. Says since when the oldest of the others has waited.
    fn take_back(&mut self) -> io::Result<Option<Time>> {
        if !self.told.is_empty() {
            let (_, unread) = self.queue.attributes()?;
            let read = self.sent - (unread as u64).min(self.sent);
            // The last one it took it may be at just now.
            while let Some(told) = self.told.front().filter(|told| told.number < read) {
                self.blocks.give(told.place.at as usize);
                self.told.pop_front();
            }
            if let Some(told) = self.told.iter().find(|told| told.number > read) {
                return Ok(Some(told.since));
            }
        }
        Ok(self.waiting.front().map(|(_, since)| *since))
    }
}

/// Memory of a session, for what a TCP flow has in flight while the worker is off the processor. More would only
/// add delay.
pub const MEMORY: NonZeroUsize = NonZeroUsize::new(1 << 20).expect("some");
/// A batch of this length is posted: a worker is to start with the first super-packet while the next is read.
pub const FULL_AT: usize = 16_384;
/// Batches kept for use again.
const SPARE_BATCHES: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use tunguard::sys::mq::{QueueSize, Reader, unlink};
    use tunguard::sys::shared::Viewer;

    struct Lab {
        outbox: Outbox,
        reader: Reader,
        memory: Viewer,
        buffer: Vec<u8>,
        now: u64,
    }

    impl Lab {
        fn new(name: &str, messages: usize) -> Lab {
            let name = format!("/tunguard-outbox-{name}-{}", std::process::id());
            let reader = Reader::create(&name, QueueSize { messages, bytes: 100 }).expect("a queue");
            let writer = Writer::open(&name).expect("its other end");
            unlink(&name).expect("unlinks");
            let (filler, file) = Filler::create("outbox", MEMORY).expect("memory");
            let memory = Viewer::open(file).expect("the same");
            Lab { outbox: Outbox::new(writer, 100, filler), reader, memory, buffer: vec![0; 100], now: 0 }
        }

        fn post(&mut self, batch: &[u8]) -> Posted {
            self.now += 1000;
            self.outbox.post(Time::from_nanos(self.now), batch).expect("posts")
        }

        fn take(&mut self) -> Option<Vec<u8>> {
            let len = self.reader.receive(&mut self.buffer).expect("receives")?;
            let message = &self.buffer[..len];
            Some(match Place::parse(message) {
                Some(place) => {
                    self.memory.view(place.at as usize, place.len as usize).expect("is there").to_vec()
                }
                None => message.to_vec(),
            })
        }
    }

    /// A batch of `len` bytes that says which it is.
    fn batch(n: u32, len: usize) -> Vec<u8> {
        n.to_ne_bytes().into_iter().cycle().take(len).collect()
    }

    #[test]
    fn order_and_contents_are_kept_and_the_bound_holds() {
        let mut lab = Lab::new("order", 4);
        let mut seen = 0..;
        let mut posted = 0;
        // Long ones and short ones; the reader falls behind and catches up, again and again.
        for round in 0..50 {
            for n in 0..100 {
                let len = if (n + round) % 3 == 0 { 50_000 } else { 60 };
                match lab.post(&batch(posted, len)) {
                    Posted::Sent | Posted::Waiting => posted += 1,
                    Posted::Full => break,
                    Posted::Late => panic!("nothing is late within a millisecond"),
                }
                assert!(lab.outbox.blocks.used() <= MEMORY.get());
            }
            for _ in 0..20 {
                let Some(bytes) = lab.take() else { break };
                for part in parts(&bytes) {
                    assert_eq!(part, seen.next().expect("endless"));
                }
                lab.outbox.resume().expect("resumes");
            }
        }
        while let Some(bytes) = lab.take() {
            parts(&bytes).into_iter().for_each(|part| assert_eq!(Some(part), seen.next()));
            lab.outbox.resume().expect("resumes");
        }
        assert_eq!(seen.next(), Some(posted), "all that was posted came, once");
        assert!(posted > 500);
    }

    /// Which batches are in `bytes`: long ones stand for themselves, short ones may have been joined.
    fn parts(bytes: &[u8]) -> Vec<u32> {
        let words: Vec<u32> = bytes.chunks(4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]])).collect();
        let mut parts = words.clone();
        parts.dedup();
        for part in &parts {
            let count = words.iter().filter(|word| *word == part).count();
            assert!(count == 15 || count == 12_500, "{count} words of {part}");
        }
        parts
    }

    #[test]
    fn memory_is_taken_back_once_the_next_message_was_taken() {
        let mut lab = Lab::new("back", 10);
        assert_eq!(lab.post(&batch(0, 50_000)), Posted::Sent);
        assert_eq!(lab.take().map(|b| b.len()), Some(50_000));
        // The reader may still be at it.
        assert_eq!(lab.post(&batch(1, 50_000)), Posted::Sent);
        assert_eq!(lab.outbox.blocks.used(), 100_000);
        lab.take();
        assert_eq!(lab.post(&batch(2, 50_000)), Posted::Sent);
        assert_eq!(lab.outbox.blocks.used(), 100_000);
        lab.take();
        lab.outbox.rest();
        assert_eq!(lab.outbox.blocks.used(), 100_000, "used just now");
        lab.outbox.rest();
        assert_eq!(lab.outbox.blocks.used(), 0);
        assert_eq!(lab.memory.view(0, 4), Some(&[0; 4][..]));
    }

    #[test]
    fn a_queue_that_stands_is_told_from_one_that_moves() {
        let mut lab = Lab::new("late", 10);
        let mut late = [0, 0];
        for (moves, late) in late.iter_mut().enumerate() {
            while lab.take().is_some() {}
            for _ in 0..300 {
                lab.now += 1_000_000;
                *late += u32::from(lab.post(&batch(0, 200)) == Posted::Late);
                if moves == 1 {
                    lab.take();
                    lab.outbox.resume().expect("resumes");
                }
            }
        }
        assert!(late[0] > 0, "a worker that doesn't read");
        while lab.take().is_some() {}
        assert_eq!(late[1], 0, "one that does");
    }
}
