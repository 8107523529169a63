//! The epochs of a session's keys: one to send with, and the previous, current and next open for receiving.
//!
//! ```text
//!            rekey n+1 agreed      peer shows n+1        OVERLAP later
//! receiving  n            n, n+1                n, n+1               n+1
//! sending    n            n                     n+1                  n+1
//! ```

use std::ops::Range;
use std::time::Duration;

use crate::config::common::Suite;
use crate::drops::DropReason;
use crate::keys::{Exchange, Role, Secret};
use crate::replay::{Replayed, Window};
use crate::seal::{Cryptor, SealError};
use crate::time::Time;
use crate::wire::control::Message;
use crate::wire::data::{COUNTER_LIMIT, Header, SessionId};

/// When an epoch is to be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Age; its hard stop is at twice this.
    pub age: Duration,
    /// Packets sent in it; its hard stop is at twice this, and below the counter's limit.
    pub packets: u64,
}

/// The epochs.
///
/// Data path: [`seal`](Epochs::seal), [`open`](Epochs::open). Rekeying, in order: [`start_rekey`](Epochs::start_rekey) when [`rekey_due`](Epochs::rekey_due), [`handle_rekey`](Epochs::handle_rekey),
/// [`handle_rekey_done`](Epochs::handle_rekey_done).
pub struct Epochs {
    role: Role,
    suite: Suite,
    limits: Limits,
    session: SessionId,
    sender: Sender,
    receivers: Vec<Receiver>,
    /// The newest epoch with keys, and its secret.
    newest: u64,
    secret: Secret,
    /// Sends in the newest epoch once the peer has shown it.
    waiting: Option<Sender>,
    exchange: Option<Exchange>,
    /// The newest epoch in which a packet was authenticated.
    heard: u64,
}

struct Sender {
    epoch: u64,
    cryptor: Cryptor,
    counter: u64,
    born: Time,
}

struct Receiver {
    epoch: u64,
    cryptor: Cryptor,
    window: Window,
    /// Closed from then on.
    until: Time,
}

/// An authenticated datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authentic {
    /// Where the plaintext is.
    pub text: Range<usize>,
    /// Its counter is above every counter authenticated before.
    pub newest: bool,
}

/// The peer broke the protocol of rekeying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRekey;

impl Epochs {
    /// Epoch 0, made of the exporter's secret.
    pub fn new(
        role: Role,
        suite: Suite,
        session: SessionId,
        secret: Secret,
        limits: Limits,
        now: Time,
    ) -> Result<Epochs, SealError> {
        Ok(Epochs {
            role,
            suite,
            limits,
            session,
            sender: Sender::new(role, suite, &secret, 0, now)?,
            receivers: vec![Receiver::new(role, suite, &secret, 0, now, limits)?],
            newest: 0,
            secret,
            waiting: None,
            exchange: None,
            heard: 0,
        })
    }

    /// The epoch sent with.
    pub fn sending(&self) -> u64 {
        self.sender.epoch
    }

    /// Seals `datagram` (header space, plaintext, tag space) with the next counter.
    pub fn seal(&mut self, now: Time, flags: u8, datagram: &mut [u8]) -> Result<(), DropReason> {
        if now.since(self.sender.born) >= self.limits.age * 2 || self.sender.counter >= self.last_counter() {
            return Err(DropReason::KeysExpired);
        }
        let header = Header {
            session: self.session,
            epoch: self.sender.epoch as u8,
            flags,
            counter: self.sender.counter,
        };
        // A counter is spent even if sealing fails: no nonce is ever used twice.
        self.sender.counter += 1;
        self.sender.cryptor.seal(&header, datagram).map_err(|_| DropReason::BadSuperPacket)
    }

    /// Opens a datagram whose header and session were checked: epoch, window, tag, and only then the window
    /// moves.
    pub fn open(&mut self, now: Time, header: &Header, datagram: &mut [u8]) -> Result<Authentic, DropReason> {
        let receiver = self
            .receivers
            .iter_mut()
            .find(|r| r.epoch as u8 == header.epoch)
            .ok_or(DropReason::UnknownEpoch)?;
        if now >= receiver.until {
            return Err(DropReason::KeysExpired);
        }
        receiver.window.check(header.counter).map_err(|replayed| match replayed {
            Replayed::Duplicate => DropReason::Duplicate,
            Replayed::TooOld => DropReason::TooOld,
        })?;
        let text = receiver.cryptor.open(header, datagram).map_err(|_| DropReason::BadTag)?;
        let newest_in_epoch = receiver.window.commit(header.counter);
        let epoch = receiver.epoch;
        let newest = newest_in_epoch && epoch >= self.heard;
        self.heard = self.heard.max(epoch);
        if epoch > self.sender.epoch {
            self.peer_has(now, epoch);
        }
        Ok(Authentic { text, newest })
    }

    /// Whether it is time to renew the keys.
    pub fn rekey_due(&self, now: Time) -> bool {
        self.exchange.is_none()
            && self.waiting.is_none()
            && (now >= self.rekey_at() || self.sender.counter >= self.limits.packets)
    }

    /// When the sending epoch's age asks for new keys. The client asks first, so that the two seldom cross.
    pub fn rekey_at(&self) -> Time {
        let grace = if self.role == Role::Server { self.limits.age / 10 } else { Duration::ZERO };
        self.sender.born + self.limits.age + grace
    }

    /// From then on nothing more can be sent.
    pub fn hard_stop(&self) -> Time {
        self.sender.born + self.limits.age * 2
    }

    /// Starts an exchange: the message to send, or `None` where one is under way or the system has no
    /// randomness.
    pub fn start_rekey(&mut self) -> Option<Message> {
        if self.exchange.is_some() || self.waiting.is_some() {
            return None;
        }
        let exchange = Exchange::new().ok()?;
        let public = exchange.public;
        self.exchange = Some(exchange);
        Some(Message::Rekey { epoch: self.newest + 1, public })
    }

    /// The peer's half came: the messages to send. Where we had started too, our half is out already and the
    /// two are one exchange.
    pub fn handle_rekey(
        &mut self,
        now: Time,
        epoch: u64,
        public: &[u8; 32],
    ) -> Result<Vec<Message>, BadRekey> {
        // One epoch at a time: the next begins when both sides send in this one.
        if epoch != self.newest + 1 || self.waiting.is_some() {
            return Err(BadRekey);
        }
        let mut messages = Vec::new();
        let exchange = match self.exchange.take() {
            Some(ours) => ours,
            None => {
                let fresh = Exchange::new().map_err(|_| BadRekey)?;
                messages.push(Message::Rekey { epoch, public: fresh.public });
                fresh
            }
        };
        let secret = exchange.finish(&self.secret, public, epoch).map_err(|_| BadRekey)?;
        let receiver = Receiver::new(self.role, self.suite, &secret, epoch, now, self.limits);
        self.receivers.push(receiver.map_err(|_| BadRekey)?);
        let sender = Sender::new(self.role, self.suite, &secret, epoch, now).map_err(|_| BadRekey)?;
        self.waiting = Some(sender);
        self.secret = secret;
        self.newest = epoch;
        let excess = self.receivers.len().saturating_sub(OPEN_EPOCHS);
        self.receivers.drain(..excess);
        messages.push(Message::RekeyDone { epoch });
        Ok(messages)
    }

    /// The peer is ready to receive in `epoch`.
    pub fn handle_rekey_done(&mut self, now: Time, epoch: u64) -> Result<(), BadRekey> {
        if epoch != self.newest {
            return Err(BadRekey);
        }
        self.peer_has(now, epoch);
        Ok(())
    }

    /// Closes epochs whose time is over; their keys are overwritten.
    pub fn retire(&mut self, now: Time) {
        self.receivers.retain(|r| now < r.until);
    }

    /// When the next epoch is to be closed.
    pub fn retire_at(&self) -> Option<Time> {
        self.receivers.iter().map(|r| r.until).min()
    }

    fn peer_has(&mut self, now: Time, epoch: u64) {
        if let Some(sender) = self.waiting.take_if(|s| s.epoch == epoch) {
            self.sender = sender;
            for old in self.receivers.iter_mut().filter(|r| r.epoch < epoch) {
                old.until = old.until.min(now + OVERLAP);
            }
        }
    }

    fn last_counter(&self) -> u64 {
        self.limits.packets.saturating_mul(2).min(COUNTER_LIMIT)
    }
}

impl Sender {
    fn new(role: Role, suite: Suite, secret: &Secret, epoch: u64, born: Time) -> Result<Sender, SealError> {
        let cryptor = Cryptor::new(suite, &secret.direction(suite, role))?;
        Ok(Sender { epoch, cryptor, counter: 0, born })
    }
}

impl Receiver {
    fn new(
        role: Role,
        suite: Suite,
        secret: &Secret,
        epoch: u64,
        born: Time,
        limits: Limits,
    ) -> Result<Receiver, SealError> {
        let cryptor = Cryptor::new(suite, &secret.direction(suite, role.peer()))?;
        // The sender's clock starts a little before or after ours; its own hard stop is what binds it.
        let until = born + limits.age * 2 + OVERLAP;
        Ok(Receiver { epoch, cryptor, window: Window::default(), until })
    }
}

/// How long the previous epoch stays open after the switch, for packets on the way.
const OVERLAP: Duration = Duration::from_secs(60);
/// Previous, current, next.
const OPEN_EPOCHS: usize = 3;
