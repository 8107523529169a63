//! A client made of the library alone, without a device: for what no honest client does, and for thousands of
//! connections that cost little.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use openssl::ssl::SslContext;
use tunguard::channel::{Broken, ControlChannel, Progress};
use tunguard::config::common::Suite;
use tunguard::epochs::Limits;
use tunguard::exit::Failure;
use tunguard::keys::{Role, Secret};
use tunguard::path::Path;
use tunguard::session::{IN_BAND_LEN, Opened, Session, Start};
use tunguard::sys::clock;
use tunguard::tls::{self, Credentials};
use tunguard::wire::control::{FEATURE_ON_DEMAND, Hello, Message, Reason, Resume, VERSION, Welcome};
use tunguard::wire::data::{HEADER_LEN, PARTIAL_CSUM, TAG_LEN};

use crate::lab::{Lab, Namespace, PATIENCE, SERVER_V4};
use crate::traffic::udp_to;

/// What a raw client dials with.
pub struct Dialler {
    namespace: Namespace,
    server: SocketAddr,
    context: SslContext,
}

/// An established session.
pub struct RawClient {
    pub control: ControlChannel,
    pub welcome: Welcome,
    pub session: Session,
    pub udp: UdpSocket,
    path: Path,
    namespace: Namespace,
}

impl Dialler {
    /// From client `n` of the lab, with its certificate.
    pub fn new(lab: &Lab, n: usize) -> Dialler {
        let read = |name: &str| std::fs::read(lab.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let credentials = Credentials {
            ca: read("certs/ca.pem"),
            cert: read(&format!("certs/clients/c{n}.pem")),
            key: read(&format!("certs/clients/c{n}.key")).into(),
        };
        Dialler::with(lab, n, &credentials)
    }

    /// From client `n` of the lab, with these credentials, which nobody checks first.
    pub fn with(lab: &Lab, n: usize, credentials: &Credentials) -> Dialler {
        let context = tls::client_context(credentials).expect("credentials that can be loaded");
        Dialler { namespace: lab.c(n), server: crate::lab::outer(SERVER_V4), context }
    }

    /// A TCP connection to the server.
    pub fn tcp(&self) -> io::Result<TcpStream> {
        self.namespace.within(|| TcpStream::connect_timeout(&self.server, PATIENCE))
    }

    /// TLS, no message yet.
    pub fn control(&self) -> Result<ControlChannel, Failure> {
        self.control_over(self.tcp().expect("the server's port"))
    }

    /// TLS over a connection that is there.
    pub fn control_over(&self, tcp: TcpStream) -> Result<ControlChannel, Failure> {
        let ssl = tls::client_ssl(&self.context, SERVER_V4).expect("TLS");
        let mut control = ControlChannel::new(ssl, tcp, Role::Client)?;
        let deadline = Instant::now() + PATIENCE;
        while control.handshake()? == Progress::Waiting {
            wait(&control, PollFlags::POLLIN, deadline);
        }
        Ok(control)
    }

    /// A client's TLS, not connected yet.
    pub fn ssl(&self) -> openssl::ssl::Ssl {
        tls::client_ssl(&self.context, SERVER_V4).expect("TLS")
    }

    /// TLS by OpenSSL alone, for bytes that are no message.
    pub fn tls(&self) -> openssl::ssl::SslStream<TcpStream> {
        let tcp = self.tcp().expect("the server's port");
        tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let ssl = tls::client_ssl(&self.context, SERVER_V4).expect("TLS");
        ssl.connect(tcp).expect("the TLS handshake")
    }

    /// TLS and Hello: the server's first message.
    pub fn hello(&self) -> (ControlChannel, Result<Message, Broken>) {
        self.hello_over(self.control().expect("the TLS handshake"))
    }

    /// Hello over TLS that is there.
    pub fn hello_over(&self, control: ControlChannel) -> (ControlChannel, Result<Message, Broken>) {
        self.hello_with(control, None)
    }

    /// The same, with the wish to take up a session.
    pub fn hello_with(
        &self,
        mut control: ControlChannel,
        resume: Option<Resume>,
    ) -> (ControlChannel, Result<Message, Broken>) {
        let hello = Hello { resume, ..plain_hello() };
        let answer = control.send(&Message::Hello(hello)).and_then(|()| next(&mut control));
        (control, answer)
    }

    /// TLS and Hello of a client that comes and goes by itself, these inner packets right behind it.
    pub fn hello_early(&self, packets: &[Vec<u8>]) -> (ControlChannel, Result<Message, Broken>) {
        let mut control = self.control().expect("the TLS handshake");
        let hello = Hello { features: FEATURE_ON_DEMAND, ..plain_hello() };
        let mut sent = control.send(&Message::Hello(hello));
        for packet in packets {
            sent = sent.and_then(|()| control.send(&Message::Early(packet.clone())));
        }
        let answer = sent.and_then(|()| next(&mut control));
        (control, answer)
    }

    /// A whole session.
    pub fn connect(&self) -> RawClient {
        self.established(self.hello())
    }

    /// The session of a Welcome.
    pub fn established(&self, (control, answer): (ControlChannel, Result<Message, Broken>)) -> RawClient {
        match answer {
            Ok(Message::Welcome(welcome)) => self.welcomed(control, welcome),
            other => panic!("no welcome: {other:?}"),
        }
    }

    /// The session that was welcomed.
    pub fn welcomed(&self, control: ControlChannel, welcome: Welcome) -> RawClient {
        let secret = tls::export_secret(control.ssl(), &welcome.session.0).expect("the exporter");
        let udp = udp_to(&self.namespace, self.server).expect("a UDP socket");
        udp.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        let path = Path::new(self.server, None);
        let start = Start {
            role: Role::Client,
            id: welcome.session,
            suite: welcome.suite,
            secret: Secret::from_bytes(*secret),
            limits: Limits { age: Duration::from_secs(3600), packets: 1 << 30 },
            inner: welcome.addresses.iter().map(|a| a.addr().into()).collect(),
            linger: Duration::from_secs(600),
            dialled: Some(path),
            vouched: None,
        };
        let session = Session::new(start, clock::now()).expect("a suite");
        RawClient { control, welcome, session, udp, path, namespace: self.namespace.clone() }
    }
}

impl RawClient {
    /// The inner IPv4 address.
    pub fn address(&self) -> std::net::Ipv4Addr {
        let v4 = self.welcome.addresses.iter().find_map(|a| match a.addr() {
            IpAddr::V4(v4) => Some(v4),
            IpAddr::V6(_) => None,
        });
        v4.expect("an inner IPv4 address")
    }

    /// The datagram that carries `packet`.
    pub fn seal(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0; HEADER_LEN];
        datagram.extend(packet);
        datagram.extend([0; TAG_LEN]);
        self.session.seal(clock::now(), 0, &mut datagram).expect("keys");
        datagram
    }

    /// The same, saying that the packet's checksum is still to be completed.
    pub fn seal_partial(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0; HEADER_LEN];
        datagram.extend(packet);
        datagram.extend([0; TAG_LEN]);
        self.session.seal(clock::now(), PARTIAL_CSUM, &mut datagram).expect("keys");
        datagram
    }

    /// Goes on from another socket of the same host.
    pub fn move_to_another_port(&mut self) {
        self.udp = udp_to(&self.namespace, self.path.remote).expect("a UDP socket");
        self.udp.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    }

    /// Sends bytes to the server's UDP port.
    pub fn send(&self, datagram: &[u8]) {
        self.udp.send(datagram).expect("send a datagram");
    }

    /// The inner packets that come until it is silent for 200 ms.
    pub fn receive(&mut self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let mut buffer = vec![0; 70_000];
        while let Ok(n) = self.udp.recv(&mut buffer) {
            if let Ok(Opened::Packet { text, .. }) =
                self.session.open(clock::now(), self.path, &mut buffer[..n])
            {
                packets.push(buffer[text].to_vec());
            }
            // Challenges are answered.
            self.in_band().iter().for_each(|datagram| self.send(datagram));
        }
        packets
    }

    /// The datagrams of what the session has to say.
    pub fn in_band(&mut self) -> Vec<Vec<u8>> {
        let mut datagrams = Vec::new();
        while let Some(say) = self.session.poll_in_band() {
            let mut datagram = [0; IN_BAND_LEN];
            if let Ok(len) = self.session.seal_in_band(clock::now(), &say, &mut datagram) {
                datagrams.push(datagram[..len].to_vec());
            }
        }
        datagrams
    }

    /// A REBIND, and the challenge that goes with it.
    pub fn rebind(&mut self) -> Vec<Vec<u8>> {
        self.session.rebind(clock::now());
        self.in_band()
    }

    /// Pings the server's inner address with the number `sequence`, once; says how many answers came.
    pub fn ping(&mut self, sequence: u16) -> usize {
        let packet = echo_request(self.address(), sequence);
        let datagram = self.seal(&packet);
        self.send(&datagram);
        self.answers(sequence)
    }

    /// How many answers to the ping with this number come.
    pub fn answers(&mut self, sequence: u16) -> usize {
        let number = sequence.to_be_bytes();
        self.receive()
            .iter()
            .filter(|p| p.len() >= 28 && p[9] == 1 && p[20] == 0 && p[26..28] == number)
            .count()
    }

    /// Leaves with a goodbye.
    pub fn leave(mut self) {
        // The server may have said goodbye first.
        let _ = self.control.send(&Message::Bye(Reason::Leaving));
        self.control.close();
    }

    /// The inner packets that come inside the control connection until it is silent for 200 ms, or how it ended.
    pub fn receive_inside(&mut self) -> Result<Vec<Vec<u8>>, Broken> {
        let mut packets = Vec::new();
        loop {
            match self.control.receive()? {
                Some(Message::Datagram(mut datagram)) => {
                    let path = tunguard::inside::path(self.path.remote);
                    if let Ok(Opened::Packet { text, .. }) =
                        self.session.open(clock::now(), path, &mut datagram)
                    {
                        packets.push(datagram[text].to_vec());
                    }
                }
                Some(other) => panic!("out of place: {other:?}"),
                None => {
                    let fds = &mut [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
                    if poll(fds, 200u16) == Ok(0) {
                        return Ok(packets);
                    }
                }
            }
        }
    }

    /// The server's next message, or how the channel ended.
    pub fn next_message(&mut self) -> Result<Message, Broken> {
        next(&mut self.control)
    }
}

fn plain_hello() -> Hello {
    Hello { version: VERSION, features: 0, suites: vec![Suite::ChaCha20Poly1305], want: vec![], resume: None }
}

/// The wish to resume the session of `welcome` over `control`.
pub fn resume(control: &ControlChannel, welcome: &Welcome) -> Resume {
    let binding = tls::export_binding(control.ssl()).expect("the exporter");
    Resume { session: welcome.session, proof: welcome.resume_secret.proof(welcome.session, &binding) }
}

/// An ICMP echo request from `source` to the server's inner address.
pub fn echo_request(source: std::net::Ipv4Addr, sequence: u16) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0x12, 0x34];
    icmp.extend(sequence.to_be_bytes());
    icmp.extend([0x55; 16]);
    let sum = tunguard::segment::checksum::finish(tunguard::segment::checksum::sum(&icmp));
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let total = (20 + icmp.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 1, 0, 0]);
    packet.extend(source.octets());
    packet.extend([10, 9, 0, 1]);
    let sum = tunguard::segment::checksum::finish(tunguard::segment::checksum::sum(&packet));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(icmp);
    packet
}

fn next(control: &mut ControlChannel) -> Result<Message, Broken> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(message) = control.receive()? {
            return Ok(message);
        }
        wait(control, PollFlags::POLLIN, deadline);
    }
}

fn wait(control: &ControlChannel, flags: PollFlags, deadline: Instant) {
    let left = deadline.saturating_duration_since(Instant::now());
    assert!(!left.is_zero(), "the server is silent");
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let _ = poll(&mut [PollFd::new(control.as_fd(), flags)], timeout);
}
