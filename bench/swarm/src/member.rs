//! One session of the swarm: the protocol as a client speaks it, without a device.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use ipnet::IpNet;
use tunguard::channel::{Broken, ControlChannel, Progress};
use tunguard::config::common::Suite;
use tunguard::egress::{self, Egress};
use tunguard::epochs::Limits;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::hardware;
use tunguard::keys::{Role, Secret};
use tunguard::path::Path;
use tunguard::session::{Event, Opened, Session, Start};
use tunguard::sys::clock;
use tunguard::sys::udp::{self, Carrier, ReceiveBuffers, Received};
use tunguard::time::Time;
use tunguard::tls::{self, Credentials};
use tunguard::wire::control::{self, Hello, Message, Reason, Welcome};
use tunguard::wire::vnet::VnetHeader;

use crate::echo;

/// A client.
pub struct Member {
    /// Its control channel.
    pub control: ControlChannel,
    greeted: bool,
    /// Its session and UDP socket, once it has one.
    pub live: Option<Live>,
    server: SocketAddr,
}

/// An established session.
pub struct Live {
    session: Session,
    /// Its UDP socket.
    pub carrier: Carrier,
    address: Ipv4Addr,
    sequence: u16,
    /// Pings sent, and answers.
    pub sent: u64,
    /// Answers that came back.
    pub answered: u64,
    ended: bool,
}

impl Member {
    /// Connects to the server; the handshake is still to come.
    pub fn dial(credentials: &Credentials, server: SocketAddr) -> Outcome<Member> {
        let context = tls::client_context(credentials)?;
        let ssl = tls::client_ssl(&context, &server.ip().to_string())?;
        let tcp =
            TcpStream::connect(server).map_err(|e| Failure::system(format!("connect to {server}"), e))?;
        Ok(Member {
            control: ControlChannel::new(ssl, tcp, Role::Client)?,
            greeted: false,
            live: None,
            server,
        })
    }

    /// Goes on with the control channel; `true` once there is a session.
    pub fn advance(&mut self) -> Outcome<bool> {
        if !self.greeted {
            if self.control.handshake()? == Progress::Waiting {
                return Ok(false);
            }
            let hello = Hello {
                version: control::VERSION,
                features: hardware::features(),
                suites: Suite::ALL.to_vec(),
                want: Vec::new(),
                resume: None,
            };
            self.greeted = true;
            self.control.send(&Message::Hello(hello)).map_err(broken)?;
        }
        while let Some(message) = self.control.receive().map_err(broken)? {
            match (message, &mut self.live) {
                (Message::Welcome(welcome), None) => self.live = Some(self.start(welcome)?),
                (Message::Bye(reason), _) => return Err(Failure::new(Exit::Refused, reason.to_string())),
                (message, Some(live)) => {
                    let handled = live.session.handle_message(clock::now(), message);
                    handled.map_err(|reason| Failure::new(Exit::Malformed, reason.to_string()))?;
                }
                (_, None) => return Err(Failure::new(Exit::Malformed, "no welcome")),
            }
        }
        Ok(self.live.is_some())
    }

    fn start(&self, welcome: Welcome) -> Outcome<Live> {
        let secret = tls::export_secret(self.control.ssl(), &welcome.session.0)?;
        let address = welcome
            .addresses
            .iter()
            .find_map(|a| match a.addr() {
                IpAddr::V4(v4) => Some(v4),
                IpAddr::V6(_) => None,
            })
            .ok_or_else(|| Failure::usage("the server gives out no IPv4 addresses"))?;
        let start = Start {
            role: Role::Client,
            id: welcome.session,
            suite: welcome.suite,
            secret: Secret::from_bytes(*secret),
            limits: Limits { age: Duration::from_millis(welcome.rekey_ms), packets: welcome.rekey_packets },
            inner: welcome.addresses.iter().map(|a| IpNet::from(a.addr())).collect(),
            linger: Duration::from_millis(welcome.linger_ms),
            dialled: Some(Path::new(self.server, None)),
            vouched: None,
        };
        let now = clock::now();
        let mut session = Session::new(start, now)
            .map_err(|_| Failure::new(Exit::MacLength, "the cipher library refuses the suite"))?;
        let socket = udp::bind_towards(self.server).map_err(|e| Failure::system("bind a UDP socket", e))?;
        let carrier =
            Carrier::new(OwnedFd::from(socket)).map_err(|e| Failure::system("use a UDP socket", e))?;
        session.probe(now);
        let mut live = Live { session, carrier, address, sequence: 0, sent: 0, answered: 0, ended: false };
        live.send_in_band();
        Ok(live)
    }

    /// What is due by now, and what the session has to say; says whether the session still stands.
    pub fn keep(&mut self, now: Time) -> Outcome<bool> {
        let Some(live) = &mut self.live else { return Ok(false) };
        if live.session.poll_timeout().is_some_and(|at| at <= now) || live.session.rekey_due(now) {
            live.session.handle_timeout(now);
        }
        while let Some(message) = live.session.poll_message() {
            self.control.send(&message).map_err(broken)?;
        }
        self.control.flush().map_err(broken)?;
        live.send_in_band();
        while let Some(event) = live.session.poll_event() {
            live.ended |= matches!(event, Event::Ended { .. });
        }
        Ok(!live.ended)
    }

    /// Says goodbye.
    pub fn leave(mut self) {
        let _ = self.control.send(&Message::Bye(Reason::Leaving));
        self.control.close();
    }
}

impl Live {
    /// Sends `count` pings of `size` bytes.
    pub fn ping(&mut self, egress: &mut Egress, to: Ipv4Addr, size: usize, count: usize) {
        let now = clock::now();
        for _ in 0..count {
            self.sequence = self.sequence.wrapping_add(1);
            let packet = echo::request(self.address, to, size, self.sequence);
            egress.push(&mut self.session, &self.carrier, now, VnetHeader::default(), &packet);
        }
        egress.flush(&mut self.session, &self.carrier);
        self.sent += count as u64;
    }

    /// Takes what has come; says how many of it were answers.
    pub fn receive(&mut self, buffers: &mut ReceiveBuffers, received: &mut Vec<Received>) -> Outcome<usize> {
        let mut answers = 0;
        loop {
            self.carrier.receive(buffers, received).map_err(|e| Failure::system("read a UDP socket", e))?;
            if received.is_empty() {
                break;
            }
            let now = clock::now();
            for run in received.iter() {
                for datagram in buffers[run.buffer][..run.len].chunks_mut(run.stride) {
                    if let Ok(Opened::Packet { text, .. }) = self.session.open(now, run.path, datagram)
                        && echo::is_reply(&datagram[text])
                    {
                        answers += 1;
                    }
                }
            }
        }
        while let Some(event) = self.session.poll_event() {
            self.ended |= matches!(event, Event::Ended { .. });
        }
        self.send_in_band();
        self.answered += answers as u64;
        Ok(answers)
    }

    fn send_in_band(&mut self) {
        while let Some(say) = self.session.poll_in_band() {
            egress::say(&mut self.session, &self.carrier, clock::now(), &say);
        }
    }
}

impl AsFd for Member {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.control.as_fd()
    }
}

fn broken(broken: Broken) -> Failure {
    match broken {
        Broken::Lost(text) => Failure::new(Exit::Tls, text),
        Broken::Closed => Failure::new(Exit::Tls, "the server closed the connection"),
        Broken::Refused(failure) => failure,
    }
}
