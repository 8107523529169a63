//! The data path of an established session, in packet order:
//!
//! 1. `tun_to_server`: super-packets from the device are cut, sealed and sent in runs ([`crate::egress`])
//! 2. `server_to_tun`: runs of datagrams are opened and written to the device as super-packets
//!    ([`crate::ingress`])
//!
//! Control messages in between. What the session has to say is handed out as [`Word`]s.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::carriers::Carriers;
use super::ipc::{CarrierName, PathReport, SessionReport};
use super::nats::Nats;
use crate::channel::{Broken, ControlChannel};
use crate::egress::{self, Egress};
use crate::exit::{Failure, Outcome};
use crate::ingress::{Ingress, tun_refused};
use crate::inside::{self, WithInside};
use crate::keys::Role;
use crate::path::{INSIDE, Path};
use crate::paths::{Keepalive, Mode};
use crate::paths::{Known, PathEvent};
use crate::resume::ResumeSecret;
use crate::rigged::point;
use crate::session::{Event, Session};
use crate::sys::clock;
use crate::sys::poller::Poller;
use crate::sys::tun::Tun;
use crate::sys::udp::{Carrier, RECEIVE_BUFFERS, ReceiveBuffers, Received};
use crate::time::Time;
use crate::wire::control::{Message, Reason, Settings, Welcome};
use crate::wire::data::SessionId;
use crate::wire::vnet::{VNET_LEN, VnetHeader};

/// A session with its control channel and UDP socket.
pub struct Link {
    session: Session,
    /// `None` once it was lost.
    control: Option<ControlChannel>,
    net: WithInside<Carriers>,
    tokens: Tokens,
    /// The remote's name.
    pub host: String,
    /// Where it was reached.
    pub address: SocketAddr,
    /// Inner addresses with their networks' prefixes.
    pub addresses: Vec<IpNet>,
    /// Subnets behind us.
    pub subnets: Vec<IpNet>,
    /// Inner MTU.
    pub mtu: u16,
    /// What the server pushed last.
    pub settings: Settings,
    resume_secret: ResumeSecret,
    since: Time,
    /// The data channel has worked.
    proven: bool,
    /// When to warn that it doesn't.
    warn_at: Option<Time>,
    /// When to look for another connection: nothing answers by UDP, and the control connection was asked as well.
    doubt_until: Option<Time>,
    words: Vec<Word>,
    /// Messages may be left that the socket has no sign of: they were read together with others.
    behind: bool,
    /// It was the control channel's turn; the answers go out first.
    talked: bool,
    /// UDP may not get through: the control connection is a way, too.
    inside: bool,
    mode: Mode,
    keepalive: Keepalive,
    /// Datagrams that came inside the control connection, to be opened with the next turn.
    came_inside: Vec<Vec<u8>>,
    /// It isn't needed any more when it has carried nothing for so long; where it was made on demand.
    idle_limit: Option<Duration>,
}

/// The descriptors' tokens in the epoll set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Of the control connection.
    pub control: u64,
    /// Of the UDP socket.
    pub udp: u64,
}

/// What the tunnel process should know of its session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// The control connection broke off: the session lives on for a while.
    ControlLost(String),
    /// Nothing comes back on the data channel.
    Unreachable,
    /// The server changed its settings.
    Settings,
    /// The session is over.
    Ended {
        /// Why.
        reason: Reason,
        /// The server said so.
        by_peer: bool,
    },
    /// The session is over: the control channel failed in a way that no lost connection explains.
    Failed(Failure),
}

/// Buffers of the data path, shared by one session after the other.
pub struct Buffers {
    egress: Egress,
    ingress: Ingress,
    packet: Vec<u8>,
    runs: ReceiveBuffers,
    received: Vec<Received>,
    /// UDP super-packets may be written to the device.
    uso: bool,
}

impl Buffers {
    /// Buffers for a device that takes UDP super-packets, or doesn't.
    pub fn new(uso: bool) -> Buffers {
        Buffers {
            egress: Egress::default(),
            ingress: Ingress::default(),
            packet: vec![0; VNET_LEN + u16::MAX as usize],
            runs: ReceiveBuffers::default(),
            received: Vec::with_capacity(RECEIVE_BUFFERS),
            uso,
        }
    }
}

impl Link {
    /// A session as `welcome` made it.
    pub fn new(
        mut session: Session,
        control: ControlChannel,
        (carriers, mode, keepalive): (Carriers, Mode, Keepalive),
        (host, address): (String, SocketAddr),
        welcome: Welcome,
        now: Time,
    ) -> Link {
        session.set_mtu(welcome.mtu);
        session.set_networks(welcome.addresses.clone());
        Link {
            session,
            control: Some(control),
            net: WithInside::new(carriers),
            tokens: Tokens { control: 0, udp: 0 },
            host,
            address,
            addresses: welcome.addresses,
            subnets: welcome.subnets,
            mtu: welcome.mtu,
            settings: welcome.settings,
            resume_secret: welcome.resume_secret,
            since: now,
            proven: false,
            warn_at: Some(now + WARN_AFTER),
            doubt_until: None,
            words: Vec::new(),
            behind: false,
            talked: false,
            inside: false,
            mode,
            keepalive,
            came_inside: Vec::new(),
            idle_limit: None,
        }
    }

    /// It isn't needed any more when it has carried nothing for `limit`, or for less if the server says so.
    pub fn set_idle(&mut self, limit: Duration) {
        self.idle_limit = Some(limit);
    }

    /// When that will be; to a second, as it is measured.
    pub fn idle_at(&self) -> Option<Time> {
        let limit = self.idle_limit?.min(self.settings.idle_limit().unwrap_or(Duration::MAX));
        Some(self.session.idle().last() + limit + Duration::from_secs(1))
    }

    /// Whether anything came by it for the device.
    pub fn is_answered(&self) -> bool {
        self.session.traffic().received_packets > 0
    }

    /// Our inner addresses.
    pub fn inner(&self) -> Vec<IpAddr> {
        self.addresses.iter().map(IpNet::addr).collect()
    }

    /// The line that tells the user so.
    pub fn summary(&self, device: &str) -> String {
        let inner: Vec<String> = self.inner().iter().map(ToString::to_string).collect();
        format!(
            "tunnel up: {} on {device}, MTU {}, suite {}, server {}",
            inner.join(", "),
            self.mtu,
            self.session.suite(),
            self.address
        )
    }

    /// What the status shows of it.
    pub fn report(&self, now: Time) -> SessionReport {
        let session = &self.session;
        let in_use = session.path().map(|known| known.path.key());
        let path = |known: &Known| PathReport {
            carrier: self.net.udp.name_of(&known.path).to_owned(),
            server: known.path.remote.into(),
            in_use: in_use == Some(known.path.key()),
            proven: known.is_proven(),
            lost: known.is_lost(),
            rtt_us: known.rtt.map(|rtt| rtt.as_micros() as u64),
        };
        SessionReport {
            id: session.id(),
            host: self.host.clone(),
            server: self.address.into(),
            suite: session.suite(),
            epoch: session.epoch(),
            age_ms: now.since(self.since).as_millis() as u64,
            silent_ms: now.since(session.last_heard()).as_millis() as u64,
            mtu: self.mtu,
            path_mtu: session.mtu().map(|mtu| mtu as u64),
            control: self.control.is_some(),
            traffic: session.traffic(),
            drops: session.drops,
            paths: session.paths().iter().map(path).collect(),
        }
    }

    /// Counts a packet of `bytes` that went with our Hello.
    pub fn went_early(&mut self, bytes: u64) {
        self.session.went_early(bytes);
    }

    /// What it can be resumed with on another connection.
    pub fn resumable(&self) -> (SessionId, &ResumeSecret) {
        (self.session.id(), &self.resume_secret)
    }

    /// Its descriptors' tokens.
    pub fn tokens(&self) -> Tokens {
        self.tokens
    }

    /// Takes up its work: the server is to learn our UDP address at once.
    pub fn start(&mut self, poller: &Poller, tokens: Tokens, nats: &Nats) -> Outcome<()> {
        self.tokens = tokens;
        let full = |e| Failure::system("fill the epoll set", e);
        self.net.udp.watch(poller, tokens.udp)?;
        if let Some(control) = &self.control {
            poller.add(control, tokens.control, control.interest()).map_err(full)?;
        }
        let now = clock::now();
        self.session.set_mode(now, self.mode);
        self.session.set_keepalive(self.keepalive);
        self.session.set_ways(now, &self.ways());
        for (name, number) in self.net.udp.names() {
            if let Some(silence) = nats.get(name) {
                self.session.expect_silence(number, silence);
            }
        }
        // Messages behind the welcome may have been read together with it.
        self.talk_to_server(poller);
        Ok(())
    }

    /// Hands on what was learned of NATs.
    pub fn teach(&self, nats: &mut Nats) {
        for (number, silence) in self.session.silences() {
            let carrier = self.net.udp.names().find(|(_, known)| *known == number);
            carrier.into_iter().for_each(|(name, _)| nats.learn(name, silence));
        }
    }

    /// Goes on by other carriers, best first; without any it stays with what it has, until some come.
    pub fn take_carriers(&mut self, poller: &Poller, carriers: Vec<(CarrierName, Carrier)>) -> Outcome<()> {
        let now = clock::now();
        if carriers.is_empty() {
            return Ok(());
        }
        self.net.udp.replace(poller, self.tokens.udp, carriers)?;
        let before = self.session.path().map(|known| known.path);
        self.session.set_ways(now, &self.ways());
        // The same way as before: but there was a change, and what led back to us may have forgotten.
        if self.session.path().map(|known| known.path) == before {
            self.session.rebind(now);
        }
        Ok(())
    }

    /// The paths to the server, best first.
    fn ways(&self) -> Vec<Path> {
        let mut ways = self.net.udp.ways(self.address);
        if self.inside && self.control.is_some() {
            ways.push(inside::path(self.address));
        }
        ways
    }

    /// Takes the control connection in as a way, or out.
    fn set_inside(&mut self, inside: bool) {
        if self.inside != inside {
            self.inside = inside;
            self.session.set_ways(clock::now(), &self.ways());
        }
    }

    /// Device to network.
    ///
    /// Errors: the device is gone.
    pub fn tun_to_server(&mut self, tun: &Tun, buffers: &mut Buffers) -> io::Result<()> {
        let Buffers { egress, packet, .. } = buffers;
        for _ in 0..READS_PER_TURN {
            let Some(len) = tun.read(packet)? else { break };
            let now = clock::now();
            match VnetHeader::parse(&packet[..len]) {
                Some(vnet) => {
                    egress.push(&mut self.session, &self.net, now, vnet, &packet[VNET_LEN..len]);
                }
                None => Egress::refuse(&mut self.session),
            }
        }
        egress.flush(&mut self.session, &self.net);
        self.flush_inside();
        while let Some(packet) = egress.poll_told() {
            let vnet = VnetHeader::default().emit();
            // The next packet that is too large brings the next one.
            let _ = tun.write(&[IoSlice::new(&vnet), IoSlice::new(&packet)]);
        }
        Ok(())
    }

    /// Sends packets that were read from the device before there was a session, with their virtio headers.
    pub fn send_held(&mut self, held: &[Vec<u8>], buffers: &mut Buffers) {
        let now = clock::now();
        for read in held {
            match VnetHeader::parse(read) {
                Some(vnet) => {
                    buffers.egress.push(&mut self.session, &self.net, now, vnet, &read[VNET_LEN..]);
                }
                None => Egress::refuse(&mut self.session),
            }
        }
        buffers.egress.flush(&mut self.session, &self.net);
        self.flush_inside();
    }

    /// Network to device.
    pub fn server_to_tun(&mut self, tun: &Tun, buffers: &mut Buffers) -> Outcome<()> {
        let Buffers { ingress, runs, received, uso, .. } = buffers;
        for n in 0..self.net.udp.count() {
            for _ in 0..RECEIVES_PER_TURN {
                let taken = self.net.udp.receive(n, runs, received);
                taken.map_err(|e| Failure::system("read the UDP socket", e))?;
                if received.is_empty() {
                    break;
                }
                let now = clock::now();
                for run in received.iter() {
                    ingress.open(&mut self.session, Role::Client, now, run, &mut runs[run.buffer]);
                }
                ingress.write_out(&mut self.session, runs, *uso, |parts| {
                    tun.write(parts).map_err(|e| tun_refused(&e))
                });
            }
        }
        Ok(())
    }

    /// Inside the control connection to device.
    pub fn inside_to_tun(&mut self, tun: &Tun, buffers: &mut Buffers) {
        let Buffers { ingress, runs, uso, .. } = buffers;
        for datagram in std::mem::take(&mut self.came_inside) {
            let (run, now) = (inside::receive(self.address, &datagram, runs), clock::now());
            self.session.came_inside();
            ingress.open(&mut self.session, Role::Client, now, &run, &mut runs[run.buffer]);
            ingress.write_out(&mut self.session, runs, *uso, |parts| {
                tun.write(parts).map_err(|e| tun_refused(&e))
            });
        }
    }

    fn flush_inside(&mut self) {
        let Some(control) = self.control.as_mut().filter(|_| self.net.is_waiting()) else { return };
        if let Err(broken) = self.net.flush(control) {
            log::debug!("inside the control connection: {broken:?}");
        }
    }

    /// Reads what the server says on the control channel.
    pub fn talk_to_server(&mut self, poller: &Poller) {
        if std::mem::replace(&mut self.talked, true) {
            return;
        }
        let now = clock::now();
        self.behind = true;
        for _ in 0..CONTROL_PER_TURN {
            let Some(control) = &mut self.control else { break };
            match control.receive() {
                Ok(Some(Message::Datagram(datagram))) => self.came_inside.push(datagram),
                Ok(Some(message)) => {
                    if let Err(reason) = self.session.handle_message(now, message) {
                        self.session.leave(reason);
                        self.words.push(Word::Ended { reason, by_peer: false });
                        return;
                    }
                }
                Ok(None) => {
                    self.behind = false;
                    break;
                }
                Err(broken) => return self.control_broken(poller, broken),
            }
        }
        self.flush_control(poller);
    }

    fn flush_control(&mut self, poller: &Poller) {
        let Some(control) = &mut self.control else { return };
        if let Err(broken) = control.flush().and_then(|()| self.net.flush(control)) {
            return self.control_broken(poller, broken);
        }
        let _ = poller.modify(&*control, self.tokens.control, control.interest());
    }

    fn control_broken(&mut self, poller: &Poller, broken: Broken) {
        if let Some(control) = self.control.take() {
            let _ = poller.remove(&control);
        }
        self.session.handle_control_lost(clock::now());
        self.session.left_inside(self.net.clear());
        self.set_inside(false);
        // A goodbye that came before says more.
        self.note_events();
        if self.words.iter().any(|word| matches!(word, Word::Ended { .. })) {
            return;
        }
        self.words.push(match broken {
            Broken::Lost(text) => Word::ControlLost(text),
            Broken::Closed => Word::ControlLost("the server closed it".to_owned()),
            Broken::Refused(failure) => Word::Failed(failure),
        });
    }

    /// When [`Link::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        let at_once = (self.behind && self.control.is_some()).then(Time::default);
        self.session
            .poll_timeout()
            .into_iter()
            .chain(self.warn_at)
            .chain(self.doubt_until)
            .chain(at_once)
            .min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Time, poller: &Poller) {
        if self.behind {
            self.talk_to_server(poller);
        }
        if self.session.poll_timeout().is_some_and(|at| at <= now) || self.session.rekey_due(now) {
            self.session.handle_timeout(now);
        }
        // What was heard meanwhile comes first.
        self.note_events();
        if self.doubt_until.take_if(|until| *until <= now).is_some() {
            self.words.push(Word::Unreachable);
        }
        if self.warn_at.is_some_and(|at| at <= now) {
            self.warn_at = None;
            log::warn!(
                "the server's data channel doesn't answer: is UDP port {} open on the way to {}?",
                self.address.port(),
                self.address.ip(),
            );
        }
    }

    /// Sends what the session wants sent, and hands out what it has to say.
    pub fn drain(&mut self, poller: &Poller) -> Vec<Word> {
        let now = clock::now();
        self.talked = false;
        self.note_events();
        while let Some(say) = self.session.poll_in_band() {
            egress::say(&mut self.session, &self.net, now, &say);
        }
        let mut spoke = false;
        while let Some(message) = self.session.poll_message() {
            spoke = true;
            let sent = self.control.as_mut().map_or(Ok(()), |control| control.send(&message));
            if let Err(broken) = sent {
                self.control_broken(poller, broken);
            }
            if matches!(message, Message::Rekey { .. }) {
                point("tunnel.rekeying");
            }
        }
        if spoke || self.net.is_waiting() {
            self.flush_control(poller);
        }
        std::mem::take(&mut self.words)
    }

    fn note_events(&mut self) {
        while let Some(event) = self.session.poll_event() {
            self.note(event);
        }
    }

    fn note(&mut self, event: Event) {
        match event {
            Event::Path(PathEvent::Proven { rtt }) => {
                (self.warn_at, self.doubt_until) = (None, None);
                let rtt = rtt.as_secs_f64() * 1e3;
                if self.proven {
                    log::debug!("round trip {rtt:.1} ms");
                } else {
                    log::info!("data channel works, round trip {rtt:.1} ms");
                }
                self.proven = true;
            }
            Event::Path(PathEvent::Mtu { mtu }) => log::debug!("the path carries packets of {mtu} bytes"),
            Event::Rekeyed { epoch } => {
                log::debug!("new keys, epoch {epoch}");
                point("tunnel.rekeyed");
            }
            Event::Notice(text) => log::info!("the server says {:?}", super::connect::shorten(&text)),
            Event::Settings(settings) => {
                self.settings = settings;
                self.words.push(Word::Settings);
            }
            Event::Path(PathEvent::Unreachable) => self.words.push(Word::Unreachable),
            Event::Ended { reason, by_peer } => self.words.push(Word::Ended { reason, by_peer }),
            Event::Path(PathEvent::Seen { before: None, seen }) => {
                log::debug!("the server sees this host at {seen}")
            }
            Event::Path(PathEvent::Seen { before: Some(before), seen }) => {
                log::debug!("the server sees this host at {seen}, not at {before} any more");
            }
            Event::Path(PathEvent::Translated { seen, silence }) => log::info!(
                "this network translates addresses (the server sees {seen}): a packet every {} s of silence keeps \
                 the way open",
                silence.as_secs_f64()
            ),
            Event::Path(PathEvent::Suspect) => {
                self.doubt_until = Some(clock::now() + DOUBT);
                self.set_inside(true);
            }
            Event::Path(PathEvent::Moved { new, .. }) => {
                self.doubt_until = None;
                match new.carrier {
                    INSIDE => log::warn!(
                        "UDP port {} doesn't get through to {}: packets go inside the control connection",
                        self.address.port(),
                        self.address.ip()
                    ),
                    _ => {
                        log::info!("packets go by {}", self.net.udp.name_of(&new));
                        self.set_inside(false);
                    }
                }
            }
        }
    }

    /// Says goodbye, and goes on receiving until [`Word::ControlLost`], or for as long as the caller likes.
    pub fn say_goodbye(&mut self, poller: &Poller, reason: Reason) {
        self.session.leave(reason);
        let words = self.drain(poller);
        self.words.extend(words);
    }

    /// Says goodbye, by whichever way is left, and closes the control channel.
    pub fn leave(mut self, poller: &Poller, reason: Reason) {
        self.session.leave(reason);
        self.drain(poller);
        self.end(poller);
    }

    /// Closes the control channel; what is on its way on the data channel still arrives.
    pub fn hush(&mut self, poller: &Poller) {
        if let Some(control) = self.control.take() {
            let _ = poller.remove(&control);
            control.close();
        }
    }

    /// Closes what there is, without a word to the server.
    pub fn end(mut self, poller: &Poller) {
        self.hush(poller);
        self.net.udp.forget(poller);
        log::info!("this session {}; dropped: {}", self.session.traffic(), self.session.drops);
    }
}

// How long one source may keep the others waiting.
const READS_PER_TURN: usize = 16;
const RECEIVES_PER_TURN: usize = 16;
const CONTROL_PER_TURN: usize = 32;
/// A control connection that works answers within this time. If it doesn't, the server may be elsewhere by now: another
/// connection is tried, and the session goes on meanwhile.
const DOUBT: Duration = Duration::from_millis(1_500);
/// The data channel should have answered the first challenge by then.
const WARN_AFTER: Duration = Duration::from_secs(5);
