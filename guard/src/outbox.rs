//! A session's way out: its queue, and the memory for what is too long for a message or has to wait.
//!
//! A batch goes into the queue as it is where it fits a message and there is room. Otherwise it is put into the
//! session's memory, and a message says where. The worker takes messages in order, one after the other, so the
//! queue's own length says which of the places it is done with: there is no word from the worker to be trusted.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroUsize;
use std::time::Duration;

use tunguard::batch::{BatchWriter, MAX_RECORD, Place};
use tunguard::rate::{Bucket, Rate};
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
    /// So much of its memory is used.
    room: usize,
    /// Batches that wait are joined up to this length.
    joined: usize,
    /// What waits does so for its valve, not for the queue.
    held: bool,
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

/// What leaves a session's way out has to pass.
#[derive(Debug)]
pub enum Valve<'a> {
    /// There is no limit.
    Open,
    /// So much at a time.
    Metered(&'a mut Bucket),
    /// Others of the same client go first.
    Shut,
}

impl Valve<'_> {
    fn is_open(&mut self, now: Time) -> bool {
        match self {
            Valve::Open => true,
            Valve::Metered(bucket) => bucket.is_ready(now),
            Valve::Shut => false,
        }
    }

    fn take(&mut self, bytes: usize) {
        if let Valve::Metered(bucket) = self {
            bucket.take(bytes);
        }
    }
}

/// What becomes of those that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumed {
    /// None is left.
    Empty,
    /// The queue is full: its room is to be watched.
    Full,
    /// The valve is shut: they are to be resumed when it opens.
    Held,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// It is in the queue.
    Sent,
    /// It waits; the queue's room is to be watched.
    Waiting,
    /// It waits for its valve.
    Held,
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
            room: memory.size(),
            memory,
            sent: 0,
            told: VecDeque::new(),
            waiting: VecDeque::new(),
            codel: Codel::default(),
            joined: FULL_AT,
            held: false,
            used: false,
        }
    }

    /// For a client that is sent no more than this: what waits is bounded by time, and leaves in small portions.
    pub fn with_rate(self, rate: Option<Rate>) -> Outbox {
        let Some(rate) = rate else { return self };
        let bytes = |time| usize::try_from(rate.bytes_in(time)).unwrap_or(usize::MAX);
        let joined = bytes(PORTION).clamp(TWO_PACKETS, FULL_AT);
        let codel = Codel::for_batches(rate.time_of(joined as u64));
        let room = bytes(BACKLOG).max(BACKLOG_LEAST).min(self.room);
        Outbox { codel, joined, room, blocks: Blocks::new(room), ..self }
    }

    /// Sends a batch, or keeps it where the queue is full or the valve shut, behind those that wait already.
    pub fn post(&mut self, now: Time, batch: &[u8], mut valve: Valve<'_>) -> io::Result<Posted> {
        let passes = self.waiting.is_empty() && valve.is_open(now);
        if passes && batch.len() <= self.message && self.send(batch)? {
            valve.take(batch.len());
            return Ok(Posted::Sent);
        }
        let oldest = self.take_back()?;
        if self.codel.refuses(now, oldest.map(|since| now.since(since))) {
            return Ok(Posted::Late);
        }
        if self.joined(batch) {
            return Ok(self.waits());
        }
        let Some(at) = self.blocks.take(batch.len()) else { return Ok(Posted::Full) };
        self.used = true;
        self.memory.fill(at, batch);
        let place = Place { at: at as u32, len: batch.len() as u32 };
        if passes && self.tell(place, now)? {
            valve.take(batch.len());
            return Ok(Posted::Sent);
        }
        if self.waiting.is_empty() {
            self.held = !passes;
        }
        self.waiting.push_back((place, now));
        Ok(self.waits())
    }

    /// The queue has room again, or the valve opens: tells of what waits.
    pub fn resume(&mut self, now: Time, mut valve: Valve<'_>) -> io::Result<Resumed> {
        while let Some(&(place, since)) = self.waiting.front() {
            self.held = !valve.is_open(now);
            if self.held {
                return Ok(Resumed::Held);
            }
            if !self.tell(place, since)? {
                return Ok(Resumed::Full);
            }
            valve.take(place.len as usize);
            self.waiting.pop_front();
        }
        self.held = false;
        Ok(Resumed::Empty)
    }

    /// Whether what waits does so because of the client's limit.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// To be called once in a while: gives memory back to the kernel that was not used since the last call.
    pub fn rest(&mut self) {
        let idle = !std::mem::take(&mut self.used) && self.waiting.is_empty();
        // The last batch is never known to be done with; but by now it is, if nothing is left in the queue.
        let read = || self.queue.attributes().is_ok_and(|(_, unread)| unread == 0);
        if idle && !self.told.is_empty() && read() {
            self.told.clear();
            self.blocks = Blocks::new(self.room);
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

    fn waits(&self) -> Posted {
        if self.held { Posted::Held } else { Posted::Waiting }
    }

    /// Behind the last batch that waits, where there is room: so small batches don't need a message each.
    fn joined(&mut self, batch: &[u8]) -> bool {
        let Some((last, _)) = self.waiting.back_mut() else { return false };
        let (at, len) = (last.at as usize, last.len as usize);
        if len + batch.len() > self.joined || !self.blocks.extend(at, batch.len()) {
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
/// Of a client with a limit: what leaves at once, so that what comes behind it waits no longer than that,
const PORTION: Duration = Duration::from_millis(10);
/// but not less than two packets,
const TWO_PACKETS: usize = 3_000;
/// and what may wait at all: more is shortened by time all the same, but not against senders that don't slow down.
const BACKLOG: Duration = Duration::from_millis(300);
/// Two super-packets.
const BACKLOG_LEAST: usize = 2 * MAX_RECORD;
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
            self.outbox.post(self.time(), batch, Valve::Open).expect("posts")
        }

        fn time(&self) -> Time {
            Time::from_nanos(self.now)
        }

        fn resume(&mut self) -> Resumed {
            self.outbox.resume(self.time(), Valve::Open).expect("resumes")
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
                    Posted::Held => panic!("there is no limit"),
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
                lab.resume();
            }
        }
        while let Some(bytes) = lab.take() {
            parts(&bytes).into_iter().for_each(|part| assert_eq!(Some(part), seen.next()));
            lab.resume();
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
                    lab.resume();
                }
            }
        }
        assert!(late[0] > 0, "a worker that doesn't read");
        while lab.take().is_some() {}
        assert_eq!(late[1], 0, "one that does");
    }

    #[test]
    fn a_limited_client_gets_its_rate_in_order_and_little_waits() {
        // A byte each microsecond.
        let rate = Rate::from_bits(8_000_000).expect("a rate");
        let mut lab = Lab::new("rate", 10);
        lab.outbox = std::mem::replace(&mut lab.outbox, Lab::new("spare", 1).outbox).with_rate(Some(rate));
        let mut bucket = Bucket::new(rate, rate.burst(), lab.time());
        let (mut taken, mut refused, mut got) = (0u64, 0, Vec::new());
        // Twice what may leave, for ten seconds.
        for n in 0..20_000u32 {
            lab.now += 500_000;
            match lab.outbox.post(lab.time(), &batch(n, 1_000), Valve::Metered(&mut bucket)).expect("posts") {
                Posted::Sent | Posted::Held => {}
                Posted::Late | Posted::Full => {
                    assert!(lab.outbox.is_held());
                    refused += 1;
                }
                Posted::Waiting => panic!("the queue is read"),
            }
            assert!(lab.outbox.blocks.used() <= 300_000, "no more than 300 ms");
            let resumed = lab.outbox.resume(lab.time(), Valve::Metered(&mut bucket)).expect("resumes");
            assert_ne!(resumed, Resumed::Full);
            while let Some(bytes) = lab.take() {
                taken += bytes.len() as u64;
                got.extend(bytes.chunks(1_000).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])));
            }
        }
        let earned = 10_000_000 + rate.burst();
        assert!((9_900_000..=earned + 16_384).contains(&taken), "{taken} of {earned}");
        assert!(got.is_sorted_by(|a, b| a < b), "in order, each once");
        assert!(refused > 5_000, "{refused}");
        // While others go first nothing leaves.
        lab.now += 10_000_000_000;
        assert_eq!(lab.outbox.resume(lab.time(), Valve::Shut).expect("resumes"), Resumed::Held);
        assert_eq!(lab.take(), None);
        while lab.resume() != Resumed::Empty {
            while lab.take().is_some() {}
        }
        assert!(!lab.outbox.is_held() && lab.outbox.backlog() == 0);
    }
}
