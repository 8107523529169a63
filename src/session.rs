//! One session, seen from either end: keys, replay windows, the peer's paths, rekeying, and what to do when.
//! No I/O and no clock: the shells hand in datagrams, messages and the time, and ask what is to be sent.

use std::collections::VecDeque;
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use ipnet::IpNet;

use crate::config::common::Suite;
use crate::drops::{DropReason, Drops};
use crate::epochs::{Epochs, Limits};
use crate::idle::Idle;
use crate::keys::{Role, Secret};
use crate::path::Path;
use crate::paths::{Keepalive, Known, Mode, PathEvent, Paths, REBIND_BYTES, Say, Silence};
use crate::seal::SealError;
use crate::segment::inner;
use crate::time::Time;
use crate::wire::control::{Message, Reason, Settings};
use crate::wire::data::{self, HEADER_LEN, Header, SessionId, TAG_LEN};
use crate::wire::inband::{InBand, MAX_LEN};

/// A session.
///
/// - getters: [`id`](Session::id), [`suite`](Session::suite), [`epoch`](Session::epoch),
///   [`path`](Session::path), [`traffic`](Session::traffic), [`owns`](Session::owns), `drops`
/// - data path: [`seal`](Session::seal), [`open`](Session::open)
/// - commands: [`probe`](Session::probe), [`rekey`](Session::rekey), [`leave`](Session::leave)
/// - `handle_*`: [`handle_message`](Session::handle_message),
///   [`handle_control_lost`](Session::handle_control_lost), [`handle_timeout`](Session::handle_timeout)
/// - `poll_*`: [`poll_message`](Session::poll_message), [`poll_in_band`](Session::poll_in_band),
///   [`poll_event`](Session::poll_event), [`poll_timeout`](Session::poll_timeout)
///
/// After any `handle_*`, command or `open`, drain the first three `poll_*` until they return `None`, then wait
/// until `poll_timeout`.
pub struct Session {
    role: Role,
    id: SessionId,
    suite: Suite,
    epochs: Epochs,
    paths: Paths,
    inner: Vec<IpNet>,
    networks: Vec<IpNet>,
    linger: Duration,
    /// Packets dropped, by reason.
    pub drops: Drops,
    traffic: Traffic,
    idle: Idle,
    control: Control,
    last_heard: Time,
    messages: VecDeque<Message>,
    /// A goodbye; what there is to say about paths is theirs.
    in_band: VecDeque<Say>,
    events: VecDeque<Event>,
}

/// What a session is made of.
pub struct Start {
    /// Our end.
    pub role: Role,
    /// The session's ID.
    pub id: SessionId,
    /// Suite of the data channel.
    pub suite: Suite,
    /// From the TLS exporter.
    pub secret: Secret,
    /// When keys are renewed.
    pub limits: Limits,
    /// The client's inner addresses (as /32 or /128) and the subnets behind it.
    pub inner: Vec<IpNet>,
    /// How long the session outlives its control channel and the last authenticated packet.
    pub linger: Duration,
    /// Where the peer is, if it was dialled; otherwise it is wherever it is heard.
    pub dialled: Option<Path>,
    /// The address that the control connection comes from, where the peer wasn't dialled.
    pub vouched: Option<IpAddr>,
}

/// What a session carried: with its [`Drops`], where each packet went. What was read is cut, what was cut is sealed or
/// dropped; what was sealed is a datagram that was sent or dropped; a datagram that came was delivered, or a message
/// in band, or dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Traffic {
    /// Packets and super-packets taken from the device or the queue.
    pub read_packets: u64,
    /// Packets they were cut into.
    pub cut_packets: u64,
    /// Packets sealed.
    pub sent_packets: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// In-band messages sealed.
    pub sent_in_band: u64,
    /// Packets opened and delivered.
    pub received_packets: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// In-band messages opened.
    pub received_in_band: u64,
    /// Datagrams that were sent on a further path.
    pub copies: u64,
    /// Of all datagrams sent, copies as well, those that went inside the control connection.
    pub sent_inside: u64,
    /// Datagrams that came inside the control connection.
    pub received_inside: u64,
    /// Of the packets delivered: came with the client's Hello, in no datagram.
    pub received_early: u64,
    /// Of the packets sent, the same on the client.
    pub sent_early: u64,
}

/// For the log.
impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "read {} and cut into {}, sent {} packets ({} bytes) and {} in band, with {} copies and {} inside the \
             control connection, received {} packets ({} bytes) and {} in band, with {} inside",
            self.read_packets,
            self.cut_packets,
            self.sent_packets,
            self.sent_bytes,
            self.sent_in_band,
            self.copies,
            self.sent_inside,
            self.received_packets,
            self.received_bytes,
            self.received_in_band,
            self.received_inside,
        )
    }
}

/// What the shell should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Of the peer's addresses.
    Path(PathEvent),
    /// Sending with the keys of a new epoch.
    Rekeyed {
        /// The epoch.
        epoch: u64,
    },
    /// The peer's settings changed.
    Settings(Settings),
    /// Text for the log, as the peer wrote it (to be escaped).
    Notice(String),
    /// The session is over: nothing more will come of it.
    Ended {
        /// Why.
        reason: Reason,
        /// The peer said so; otherwise it should be told if it can be.
        by_peer: bool,
    },
}

/// What an opened datagram was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// A packet, at this place of the datagram.
    Packet {
        /// Where.
        text: Range<usize>,
        /// Its checksum field holds only the pseudo-header's sum.
        partial_csum: bool,
    },
    /// An in-band message, dealt with.
    InBand,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Control {
    Up,
    LostSince(Time),
    Over,
}

impl Session {
    /// A session in epoch 0, its control channel up.
    pub fn new(start: Start, now: Time) -> Result<Session, SealError> {
        let challenges = Secret::from_bytes(start.secret.derive(match start.role {
            Role::Client => b"tunguard/1 challenges of the client",
            Role::Server => b"tunguard/1 challenges of the server",
        }));
        let paths = match start.dialled {
            Some(path) => Paths::dialled(challenges, path, now),
            None => Paths::following(challenges, start.vouched),
        };
        let epochs = Epochs::new(start.role, start.suite, start.id, start.secret, start.limits, now)?;
        Ok(Session {
            role: start.role,
            id: start.id,
            suite: start.suite,
            epochs,
            paths,
            inner: start.inner,
            networks: Vec::new(),
            linger: start.linger,
            drops: Drops::default(),
            traffic: Traffic::default(),
            idle: Idle::new(None, now),
            control: Control::Up,
            last_heard: now,
            messages: VecDeque::new(),
            in_band: VecDeque::new(),
            events: VecDeque::new(),
        })
    }

    /// Its ID.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Suite of the data channel.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// The epoch sent with.
    pub fn epoch(&self) -> u64 {
        self.epochs.sending()
    }

    /// Where the peer is, once it is known.
    pub fn path(&self) -> Option<&Known> {
        self.paths.active()
    }

    /// All paths known, the one in use first.
    pub fn paths(&self) -> &[Known] {
        self.paths.known()
    }

    /// On how many paths data goes out.
    pub fn targets(&self) -> usize {
        self.paths.targets()
    }

    /// The `n`th of them, if `bytes` may be sent there, which is taken as done.
    pub fn target(&mut self, now: Time, n: usize, bytes: usize) -> Option<Path> {
        self.paths.target(now, n, bytes)
    }

    /// Where a packet goes, if inner flows are spread over several paths.
    pub fn lane(&mut self, now: Time, packet: &[u8]) -> Option<Path> {
        if !self.paths.spreads() {
            return None;
        }
        self.paths.lane(now, inner::flow(packet))
    }

    /// Takes `datagrams` of `bytes` in all as sent there.
    pub fn lane_target(&mut self, now: Time, lane: Path, datagrams: usize, bytes: usize) -> Option<Path> {
        self.paths.lane_target(now, lane, datagrams, bytes)
    }

    /// Another path, for data that no socket of the [`Session::targets`] took.
    pub fn way_out(&mut self, now: Time) -> Option<Path> {
        self.paths.way_out(now)
    }

    /// Counts datagrams that were sent on a further path.
    pub fn copied(&mut self, datagrams: u64) {
        self.traffic.copies += datagrams;
    }

    /// Counts datagrams that are to go inside the control connection.
    pub fn went_inside(&mut self, datagrams: u64) {
        self.traffic.sent_inside += datagrams;
    }

    /// Of those, so many waited until the connection was gone.
    pub fn left_inside(&mut self, datagrams: u64) {
        self.traffic.sent_inside -= datagrams;
        self.drops.add(DropReason::SendRefused, datagrams);
    }

    /// Counts a datagram that came inside the control connection.
    pub fn came_inside(&mut self) {
        self.traffic.received_inside += 1;
    }

    /// The client's ways to the server, best first ([`Paths::set_ways`]).
    pub fn set_ways(&mut self, now: Time, ways: &[Path]) {
        self.paths.set_ways(now, ways);
    }

    /// Tells the server where the client is, on the path in use.
    pub fn rebind(&mut self, now: Time) {
        self.paths.rebind(now);
    }

    /// The ends' devices have this MTU: from now on it is found out whether paths carry it.
    pub fn set_mtu(&mut self, mtu: u16) {
        self.paths.set_mtu(mtu.into());
    }

    /// The largest packet that goes in one piece where data goes now, where that is known.
    pub fn mtu(&self) -> Option<usize> {
        self.paths.mtu()
    }

    /// The same, where the device's packets may be larger.
    pub fn narrow(&self) -> Option<usize> {
        self.paths.narrow()
    }

    /// The same again, where senders may rely on it.
    pub fn announced_mtu(&self) -> Option<usize> {
        self.paths.announced()
    }

    /// Datagrams with packets, of up to `size` bytes, were sent on every path that data goes to.
    pub fn handle_sent(&mut self, now: Time, size: usize) {
        self.paths.handle_sent(now, size);
    }

    /// The kernel refused a sealed probe of the path's MTU as too large.
    pub fn handle_refused(&mut self, now: Time, probe: &Say) {
        self.traffic.sent_in_band -= 1;
        self.paths.handle_refused(now, probe);
    }

    /// How the client uses several ways.
    pub fn set_mode(&mut self, now: Time, mode: Mode) {
        self.paths.set_mode(now, mode);
    }

    /// When the client sends only to keep a NAT's mapping.
    pub fn set_keepalive(&mut self, keepalive: Keepalive) {
        self.paths.set_keepalive(keepalive);
    }

    /// What was learned of the NATs on the paths, by carrier.
    pub fn silences(&self) -> impl Iterator<Item = (u8, Silence)> {
        self.paths.silences()
    }

    /// A session before this one learned so much of the NAT behind a carrier.
    pub fn expect_silence(&mut self, carrier: u8, silence: Silence) {
        self.paths.expect_silence(carrier, silence);
    }

    /// Inner packets and bytes so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// When the peer was last heard, by an authenticated packet or message.
    pub fn last_heard(&self) -> Time {
        self.last_heard
    }

    /// Whether `ip` is the client's: one of its addresses, or in a subnet behind it.
    pub fn owns(&self, ip: IpAddr) -> bool {
        self.inner.iter().any(|net| net.contains(&ip))
    }

    /// An inner packet or super-packet came from the peer.
    pub fn carried(&mut self, now: Time, packet: &[u8]) {
        self.idle.carried(now, packet, &self.networks);
    }

    /// One goes to the peer. What isn't the client's is no use of the session: the server won't take it.
    pub fn carries(&mut self, now: Time, packet: &[u8]) {
        match self.role {
            Role::Client => self.idle.sent(now, packet, &self.networks, &self.inner),
            Role::Server => self.idle.carried(now, packet, &self.networks),
        }
    }

    /// The networks that the inner addresses are in: what goes to everybody there doesn't count as use.
    pub fn set_networks(&mut self, networks: Vec<IpNet>) {
        self.networks = networks;
    }

    /// How long the session has carried nothing.
    pub fn idle(&self) -> &Idle {
        &self.idle
    }

    /// Ends the session when it has carried nothing for so long; `None`: never.
    pub fn set_idle(&mut self, limit: Option<Duration>) {
        self.idle.set_limit(limit);
    }

    /// Inner packets came with the client's Hello, inside the control connection, which is `path`.
    pub fn heard_early(&mut self, now: Time, path: Path) {
        self.last_heard = now;
        self.paths.heard_early(now, path);
    }

    /// Counts one of them as delivered.
    pub fn delivered_early(&mut self) {
        self.traffic.received_early += 1;
    }

    /// Counts a packet of `bytes` that went with our Hello.
    pub fn went_early(&mut self, bytes: u64) {
        self.taken(1);
        self.traffic.sent_packets += 1;
        self.traffic.sent_bytes += bytes;
        self.traffic.sent_early += 1;
    }

    /// Counts a packet or super-packet that was taken in to be sent, as `packets` of the path's size.
    pub fn taken(&mut self, packets: u64) {
        self.traffic.read_packets += 1;
        self.traffic.cut_packets += packets;
    }

    /// Counts `packets` more that one of those taken in became.
    pub fn cut_further(&mut self, packets: u64) {
        self.traffic.cut_packets += packets;
    }

    /// Seals an inner packet: `datagram` is header space, the packet, tag space. `flags` is 0 or
    /// [`data::PARTIAL_CSUM`].
    pub fn seal(&mut self, now: Time, flags: u8, datagram: &mut [u8]) -> Result<(), DropReason> {
        self.epochs.seal(now, flags, datagram)?;
        self.traffic.sent_packets += 1;
        self.traffic.sent_bytes += (datagram.len() - HEADER_LEN - TAG_LEN) as u64;
        Ok(())
    }

    /// Opens a datagram that came by `path`, in visible steps; nothing before the tag changes state.
    pub fn open(&mut self, now: Time, path: Path, datagram: &mut [u8]) -> Result<Opened, DropReason> {
        // 1. Length and flags.
        let header = Header::parse(datagram).map_err(|malformed| match malformed {
            data::Malformed::TooShort => DropReason::TooShort,
            data::Malformed::Flags => DropReason::Flags,
        })?;
        // 2. Session.
        if header.session != self.id {
            return Err(DropReason::WrongSession);
        }
        // 3. to 6. Epoch, window, tag; commit and decrypt.
        let sending = self.epochs.sending();
        let authentic = self.epochs.open(now, &header, datagram)?;
        if self.epochs.sending() != sending {
            self.events.push_back(Event::Rekeyed { epoch: self.epochs.sending() });
        }
        // 7. From here on the peer has spoken.
        self.last_heard = now;
        let control = header.flags & data::CONTROL != 0;
        let message = control.then(|| InBand::parse(&datagram[authentic.text.clone()])).flatten();
        // Nothing can be sent to port 0.
        if path.remote.port() != 0 {
            self.paths.heard(now, path, authentic.newest, datagram.len(), message);
        }
        // 8. Packet or in-band message.
        if !control {
            let partial_csum = header.flags & data::PARTIAL_CSUM != 0;
            return Ok(Opened::Packet { text: authentic.text, partial_csum });
        }
        let message = message.ok_or(DropReason::BadInBand)?;
        self.traffic.received_in_band += 1;
        if let InBand::Close(code) = message {
            self.end(Reason::from_code(code).unwrap_or(Reason::Internal), true);
        }
        Ok(Opened::InBand)
    }

    /// Counts an opened packet as delivered.
    pub fn delivered(&mut self, packets: u64, bytes: u64) {
        self.traffic.received_packets += packets;
        self.traffic.received_bytes += bytes;
    }

    /// Some of what was counted as delivered got lost behind the session after all.
    pub fn take_back(&mut self, packets: u64, bytes: u64) {
        self.traffic.received_packets = self.traffic.received_packets.saturating_sub(packets);
        self.traffic.received_bytes = self.traffic.received_bytes.saturating_sub(bytes);
    }

    /// Asks the peer to answer on the path in use: [`PathEvent::Proven`] or [`PathEvent::Unreachable`] follows.
    pub fn probe(&mut self, now: Time) {
        self.paths.probe(now);
    }

    /// Asks the peer for a sign of life, by whatever way there is: an honest one answers at once, and
    /// [`Session::last_heard`] says so.
    pub fn ask(&mut self, now: Time) {
        if self.control == Control::Up && self.messages.len() < MAX_QUEUED {
            self.messages.push_back(Message::Ping(0));
        }
        self.paths.probe(now);
    }

    /// Renews the keys now rather than when they are due.
    pub fn rekey(&mut self) {
        if self.control == Control::Up
            && let Some(message) = self.epochs.start_rekey()
        {
            self.messages.push_back(message);
        }
    }

    /// Ends the session from this side: a `Bye` is queued on the control channel, or in band where that is
    /// gone.
    pub fn leave(&mut self, reason: Reason) {
        match self.control {
            Control::Up => self.messages.push_back(Message::Bye(reason)),
            // In band a `Replaced` would overtake the news of the session that replaces this one, at the very
            // client that has just made it.
            Control::LostSince(_) if reason == Reason::Replaced => {}
            Control::LostSince(_) => {
                if let Some(active) = self.paths.active() {
                    let message = InBand::Close(reason as u8);
                    self.in_band.push_back(Say { message, path: active.path, pad: 0 });
                }
            }
            Control::Over => return,
        }
        self.control = Control::Over;
    }

    /// A message came on the control channel. An error is a message out of place: the session should end.
    pub fn handle_message(&mut self, now: Time, message: Message) -> Result<(), Reason> {
        self.last_heard = now;
        match message {
            Message::Rekey { epoch, public } => {
                if self.messages.len() >= MAX_QUEUED {
                    return Err(Reason::Protocol);
                }
                let answers = self.epochs.handle_rekey(now, epoch, &public).map_err(|_| Reason::Protocol)?;
                self.messages.extend(answers);
            }
            Message::RekeyDone { epoch } => {
                let before = self.epochs.sending();
                self.epochs.handle_rekey_done(now, epoch).map_err(|_| Reason::Protocol)?;
                if self.epochs.sending() != before {
                    self.events.push_back(Event::Rekeyed { epoch });
                }
            }
            Message::Ping(number) => {
                if self.messages.len() >= MAX_QUEUED {
                    return Err(Reason::Protocol);
                }
                self.messages.push_back(Message::Pong(number));
            }
            Message::Pong(_) => {}
            Message::Bye(reason) => self.end(reason, true),
            Message::Update(settings) if self.role == Role::Client => {
                self.events.push_back(Event::Settings(settings));
            }
            Message::Notice(text) if self.role == Role::Client => self.events.push_back(Event::Notice(text)),
            // Packets and datagrams are the data path's, which comes before this.
            Message::Update(_)
            | Message::Notice(_)
            | Message::Hello(_)
            | Message::Welcome(_)
            | Message::Early(_)
            | Message::Datagram(_) => {
                return Err(Reason::Protocol);
            }
        }
        Ok(())
    }

    /// The control channel broke off without a goodbye: the session lingers.
    pub fn handle_control_lost(&mut self, now: Time) {
        if self.control == Control::Up {
            self.control = Control::LostSince(now);
            self.messages.clear();
        }
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Time) {
        self.epochs.retire(now);
        if self.control == Control::Up && self.epochs.rekey_due(now) {
            self.rekey();
        }
        if now >= self.epochs.hard_stop() {
            self.end(Reason::KeysExpired, false);
        }
        if self.linger_until().is_some_and(|until| now >= until) {
            self.end(Reason::Timeout, false);
        }
        if self.idle.is_over(now) {
            self.end(Reason::Idle, false);
        }
        if self.paths.poll_timeout().is_some_and(|at| now >= at) {
            self.paths.handle_timeout(now);
        }
    }

    /// The next message for the control channel.
    pub fn poll_message(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }

    /// The next in-band message to seal (with [`Session::seal_in_band`]) and send on its path.
    pub fn poll_in_band(&mut self) -> Option<Say> {
        self.paths.poll_say().or_else(|| self.in_band.pop_front())
    }

    /// Seals an in-band message into `datagram` and says how long it is: at most [`IN_BAND_LEN`], or what it asks for.
    pub fn seal_in_band(&mut self, now: Time, say: &Say, datagram: &mut [u8]) -> Result<usize, DropReason> {
        let mut bytes = [0; MAX_LEN];
        let text_len = say.message.emit(&mut bytes);
        let text = &bytes[..text_len];
        let len = (HEADER_LEN + text.len() + TAG_LEN).max(say.pad);
        let datagram = datagram.get_mut(..len).ok_or(DropReason::TooBig)?;
        datagram.fill(0);
        datagram[HEADER_LEN..][..text.len()].copy_from_slice(text);
        self.epochs.seal(now, data::CONTROL, datagram)?;
        self.traffic.sent_in_band += 1;
        match self.paths.spend(say.path, len) {
            true => Ok(len),
            false => Err(DropReason::Unproven),
        }
    }

    /// The next thing the shell should know.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.paths.poll_event().map(Event::Path).or_else(|| self.events.pop_front())
    }

    /// When [`Session::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        if self.control == Control::Over {
            return None;
        }
        let rekey = (self.control == Control::Up && self.epochs.rekey_due(self.epochs.rekey_at()))
            .then(|| self.epochs.rekey_at());
        [
            rekey,
            Some(self.epochs.hard_stop()),
            self.epochs.retire_at(),
            self.linger_until(),
            self.idle.poll_timeout(),
            self.paths.poll_timeout(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Whether the packet limit asks for new keys; the shell looks after a batch, as no timer can tell.
    pub fn rekey_due(&self, now: Time) -> bool {
        self.control == Control::Up && self.epochs.rekey_due(now)
    }

    fn end(&mut self, reason: Reason, by_peer: bool) {
        if self.control == Control::Over {
            return;
        }
        if by_peer {
            self.control = Control::Over;
        } else {
            self.leave(reason);
        }
        self.events.push_back(Event::Ended { reason, by_peer });
    }

    fn linger_until(&self) -> Option<Time> {
        match self.control {
            Control::LostSince(lost) => Some(lost.max(self.last_heard) + self.linger),
            Control::Up | Control::Over => None,
        }
    }
}

/// The longest in-band datagram but for probes of a path's MTU, which are as long as their `pad` says.
pub const IN_BAND_LEN: usize = REBIND_BYTES;

/// Queued answers to a peer that asks faster than we can send; more are not queued.
const MAX_QUEUED: usize = 32;
