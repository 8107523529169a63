//! Supervisor and tunnel process: the only vocabulary they share. The tunnel process reads what strangers send,
//! so it is not trusted: a request out of place, too many of them, or one that doesn't decode ends it.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::common::Suite;
use crate::drops::Drops;
use crate::exit::{Exit, Failure};
use crate::paths::{Keepalive, Mode};
use crate::session::Traffic;
use crate::sys::seqpacket::Channel;
use crate::tls::{Credentials, SavedSession};
use crate::wire::control::Settings;
use crate::wire::data::SessionId;

/// The tunnel process's end.
pub type TunnelEnd = Channel<Request, Reply>;
/// The supervisor's end.
pub type SupervisorEnd = Channel<Reply, Request>;

/// What the tunnel process may ask or tell; when is said by [`Phase::allows`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Connect to a remote, or else to one of the others. Answer: `Dialled` or `DialFailed`.
    Dial {
        /// Place in the configuration of the one to begin with.
        remote: u16,
    },
    /// Set the host up for a session. Answer: `Configured` or `ConfigureFailed`.
    Configure(Wishes),
    /// The server gave us a ticket: it is kept for the next tunnel process.
    Ticket(Ticket),
    /// The answer to `Query`; boxed, as it is the largest.
    Report(Box<Report>),
    /// How the session is doing, where it was made on demand.
    Progress(Progress),
    /// A line for the log.
    Log {
        /// 1 error, 2 warning, 3 info, 4 debug, 5 trace (`log::Level`).
        level: u8,
        /// The line; shown escaped.
        text: String,
    },
    /// The last word before the tunnel process exits.
    Ended {
        /// Why, where it wasn't told to stop.
        failure: Option<(Exit, String)>,
        /// Starting again wouldn't help.
        permanent: bool,
    },
}

/// A TLS session that may be taken up again, at a server of the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The name its certificate was asked for.
    pub server_name: String,
    /// The session.
    pub session: SavedSession,
    /// [`crate::tls::trusted_until`] of the session that it all began with.
    pub until: i64,
}

/// What the tunnel process knows and the supervisor doesn't.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The session in use.
    pub session: Option<SessionReport>,
    /// The next session is being made, or waited for.
    pub connecting: bool,
}

/// A session, as its client's end sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReport {
    /// Its ID.
    pub id: SessionId,
    /// The remote's name, as configured.
    pub host: String,
    /// Where it was reached.
    pub server: Endpoint,
    /// Suite of the data channel.
    pub suite: Suite,
    /// Epoch sent with.
    pub epoch: u64,
    /// Milliseconds it is in use.
    pub age_ms: u64,
    /// Milliseconds since the server was last heard.
    pub silent_ms: u64,
    /// Inner MTU.
    pub mtu: u16,
    /// The largest inner packet that goes in one piece, where it was measured.
    pub path_mtu: Option<u64>,
    /// There is a control connection.
    pub control: bool,
    /// Inner packets and bytes.
    pub traffic: Traffic,
    /// Packets dropped, by reason.
    pub drops: Drops,
    /// The ways to the server, the one in use first.
    pub paths: Vec<PathReport>,
}

/// A way to the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathReport {
    /// What its carrier is called.
    pub carrier: String,
    /// Where it leads.
    pub server: Endpoint,
    /// Packets go by it.
    pub in_use: bool,
    /// A challenge was answered on it.
    pub proven: bool,
    /// Nothing answers on it any more.
    pub lost: bool,
    /// Round trip in microseconds, where it was measured.
    pub rtt_us: Option<u64>,
}

/// Of a session that was made on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Progress {
    /// The packets that came with [`Setup::on_demand`] have been sent.
    HeldSent,
    /// There is a session.
    Established,
    /// The first packet came by it.
    Answered,
    /// It is lost; another one is looked for.
    Lost,
    /// It is ended, as nobody needs it; then the tunnel process ends, too.
    Leaving {
        /// The server said so, not we.
        by_server: bool,
    },
}

/// What the server would like this host to be set up as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wishes {
    /// Inner addresses with the length of their network's prefix.
    pub addresses: Vec<IpNet>,
    /// Inner MTU.
    pub mtu: u16,
    /// Subnets behind this client, as the server knows them.
    pub subnets: Vec<IpNet>,
    /// Routes and resolvers.
    pub settings: Settings,
    /// The address the session was dialled at.
    pub server: IpAddr,
}

/// What the supervisor answers and orders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Connected; the TCP connection is the first descriptor, then comes a UDP socket for each carrier.
    Dialled {
        /// The remote's place in the configuration.
        remote: u16,
        /// Its name, as configured.
        host: String,
        /// Where it was reached; UDP goes there, too.
        address: Endpoint,
        /// What the UDP sockets are bound to, best first; at least one.
        carriers: Vec<CarrierName>,
    },
    /// No connection.
    DialFailed {
        /// Why.
        text: String,
    },
    /// The host is set up.
    Configured,
    /// It is not.
    ConfigureFailed {
        /// Why.
        text: String,
    },
    /// The network changed; a fresh UDP socket for each carrier comes with it.
    Carriers {
        /// The server that the session in use was dialled at.
        server: Endpoint,
        /// What the sockets are bound to, best first. None at all: there is no way to the server for now.
        carriers: Vec<CarrierName>,
        /// The address that the control connection was made from is gone from this host, or its link leads nowhere:
        /// nothing will come of it any more, which TCP itself would notice only much later.
        control_gone: bool,
        /// There is a way to another remote, or to another address of this one.
        elsewhere: bool,
    },
    /// The network changed: an attempt that waits for its time may begin now.
    Moved {
        /// Nothing comes of the connection that was handed over last: its address or link is gone.
        cut_off: bool,
    },
    /// Report, please.
    Query,
    /// Say goodbye to the server and exit.
    Stop,
}

/// What a UDP socket is bound to: a link by which the server can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarrierName {
    /// The link's name, or [`CarrierName::ANY`].
    pub name: String,
    /// Its index; 0 where the socket is bound to none.
    pub index: u32,
    /// The address the kernel sends from there.
    pub source: Option<IpAddr>,
}

impl CarrierName {
    /// The name where the socket is bound to no link, and the kernel chooses for each datagram.
    pub const ANY: &str = "any";

    /// The carrier of a socket that isn't bound to a link.
    pub fn any() -> CarrierName {
        CarrierName { name: CarrierName::ANY.to_owned(), index: 0, source: None }
    }
}

/// An address and port as channels carry them: serde leaves out the scope of a [`SocketAddr`], without which a
/// link-local address leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    ip: IpAddr,
    port: u16,
    scope: u32,
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Endpoint {
        let scope = match address {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(v6) => v6.scope_id(),
        };
        Endpoint { ip: address.ip(), port: address.port(), scope }
    }
}

impl From<Endpoint> for SocketAddr {
    fn from(endpoint: Endpoint) -> SocketAddr {
        match endpoint.ip {
            IpAddr::V4(ip) => (ip, endpoint.port).into(),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, endpoint.port, 0, endpoint.scope).into(),
        }
    }
}

/// What the tunnel process is started with: in a sealed memory file, as descriptor 5.
#[derive(Serialize, Deserialize)]
pub struct Setup {
    /// The supervisor's process ID: when it goes, the tunnel process goes.
    pub supervisor: i32,
    /// User to become.
    pub uid: u32,
    /// Group to become.
    pub gid: u32,
    /// An empty directory to be locked into.
    pub root: PathBuf,
    /// Certificates and our key.
    pub credentials: Credentials,
    /// The name the server's certificate must carry; the remote's host where it is `None`.
    pub server_name: Option<String>,
    /// The device's name, for the log.
    pub device: String,
    /// Number of remotes.
    pub remotes: u16,
    /// Suites, best first.
    pub suites: Vec<Suite>,
    /// Milliseconds of an epoch.
    pub rekey_ms: u64,
    /// Packets of an epoch.
    pub rekey_packets: u64,
    /// What is done with several carriers.
    pub mode: Mode,
    /// When something is sent only to keep a NAT's mapping.
    pub keepalive: Keepalive,
    /// UDP super-packets may be written to the device.
    pub uso: bool,
    /// A tunnel process before this one had a session: don't give up.
    pub established: bool,
    /// Inner addresses it had.
    pub want: Vec<IpAddr>,
    /// A TLS session that it had.
    pub ticket: Option<Ticket>,
    /// Place of the remote to begin with.
    pub first_remote: u16,
    /// For a session that is made on demand.
    pub on_demand: Option<Demand>,
    /// The version of Landlock it uses, `None` where the configuration does without.
    pub landlock: Option<i32>,
    /// The most verbose level the log shows (`log::LevelFilter`).
    pub log_level: u8,
}

/// What a tunnel process has to know of a connection on demand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// A session without inner data for so many milliseconds is ended.
    pub idle_ms: u64,
    /// Packets with their virtio headers, to be sent before anything of the device.
    pub held: Vec<Vec<u8>>,
}

impl Setup {
    /// As bytes for the memory file.
    pub fn encode(&self) -> Vec<u8> {
        bincode::serde::encode_to_vec(self, bincode::config::standard()).expect("plain data encodes")
    }

    /// From the memory file's bytes.
    pub fn decode(bytes: &[u8]) -> Option<Setup> {
        let (setup, used) = bincode::serde::decode_from_slice(bytes, bincode::config::standard()).ok()?;
        (used == bytes.len()).then_some(setup)
    }
}

/// How far a tunnel process is, as the supervisor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It was started and has no connection yet.
    Fresh,
    /// Its first connection is being made.
    FirstDial,
    /// It has been given a connection.
    Connected,
    /// It has been given a connection, and the next is being made.
    NextDial,
    /// It was told to stop.
    Stopping,
    /// It has said its last word.
    Ended,
}

impl Phase {
    /// Whether `request` is in place. A `Report` must have been asked for, too.
    ///
    /// | request | Fresh | FirstDial | Connected | NextDial | Stopping | Ended |
    /// |---|---|---|---|---|---|---|
    /// | Dial | yes | - | yes | - | ignored | - |
    /// | Configure | - | - | yes | yes | ignored | - |
    /// | Ticket | - | - | yes | yes | ignored | - |
    /// | Report | yes | yes | yes | yes | ignored | - |
    /// | Progress | - | - | yes | yes | yes | - |
    /// | Log | yes | yes | yes | yes | yes | - |
    /// | Ended | yes | yes | yes | yes | yes | - |
    pub fn allows(self, request: &Request) -> Verdict {
        use Phase::*;
        match (self, request) {
            (Ended, _) => Verdict::Violation,
            (_, Request::Log { .. } | Request::Ended { .. }) => Verdict::Allowed,
            (Connected | NextDial | Stopping, Request::Progress(_)) => Verdict::Allowed,
            // On its way to us when it was told to stop.
            (
                Stopping,
                Request::Dial { .. } | Request::Configure(_) | Request::Ticket(_) | Request::Report(_),
            ) => Verdict::Ignored,
            (_, Request::Report(_)) => Verdict::Allowed,
            (Fresh | Connected, Request::Dial { .. }) => Verdict::Allowed,
            (FirstDial | NextDial, Request::Dial { .. }) => Verdict::Violation,
            (Connected | NextDial, Request::Configure(_) | Request::Ticket(_)) => Verdict::Allowed,
            (Fresh | FirstDial, Request::Configure(_) | Request::Ticket(_) | Request::Progress(_)) => {
                Verdict::Violation
            }
        }
    }

    /// A connection is being made.
    pub fn dialling(self) -> Phase {
        if self == Phase::Connected { Phase::NextDial } else { Phase::FirstDial }
    }

    /// Whether it may have a session that outlives a change of the network.
    pub fn has_connection(self) -> bool {
        matches!(self, Phase::Connected | Phase::NextDial)
    }

    /// Whether it is neither stopping nor over.
    pub fn is_at_work(self) -> bool {
        !matches!(self, Phase::Stopping | Phase::Ended)
    }

    /// The connection was made, or not.
    pub fn dialled(self, made: bool) -> Phase {
        match self {
            Phase::FirstDial if !made => Phase::Fresh,
            Phase::FirstDial | Phase::NextDial => Phase::Connected,
            other => other,
        }
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is dealt with.
    Allowed,
    /// It came too late to matter.
    Ignored,
    /// The tunnel process ends.
    Violation,
}

/// A failure as the channel carries it.
pub fn pack(failure: &Failure) -> (Exit, String) {
    let mut text = failure.text.clone();
    truncate(&mut text);
    (failure.exit, text)
}

/// Cuts `text` to what the channel carries.
pub fn truncate(text: &mut String) {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// The longest text in a message, in bytes.
pub const MAX_TEXT: usize = 1024;

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::seqpacket::Incoming;

    fn requests() -> [Request; 7] {
        let wishes = Wishes {
            addresses: Vec::new(),
            mtu: 1420,
            subnets: Vec::new(),
            settings: Settings::default(),
            server: IpAddr::from([192, 0, 2, 1]),
        };
        let session = SavedSession::from_bytes(vec![1]);
        let ticket = Ticket { server_name: "vpn".to_owned(), session, until: 0 };
        [
            Request::Dial { remote: 0 },
            Request::Configure(wishes),
            Request::Ticket(ticket),
            Request::Report(Box::default()),
            Request::Progress(Progress::Established),
            Request::Log { level: 3, text: String::new() },
            Request::Ended { failure: None, permanent: false },
        ]
    }

    #[test]
    fn the_phase_table() {
        use Verdict::{Allowed as Y, Ignored as I, Violation as N};
        for (phase, verdicts) in [
            (Phase::Fresh, [Y, N, N, Y, N, Y, Y]),
            (Phase::FirstDial, [N, N, N, Y, N, Y, Y]),
            (Phase::Connected, [Y, Y, Y, Y, Y, Y, Y]),
            (Phase::NextDial, [N, Y, Y, Y, Y, Y, Y]),
            (Phase::Stopping, [I, I, I, I, Y, Y, Y]),
            (Phase::Ended, [N, N, N, N, N, N, N]),
        ] {
            for (request, verdict) in requests().iter().zip(verdicts) {
                assert_eq!(phase.allows(request), verdict, "{phase:?} {request:?}");
            }
        }
    }

    #[test]
    fn phases_follow_the_dials() {
        let first = Phase::Fresh.dialling();
        assert_eq!(first, Phase::FirstDial);
        assert_eq!(first.dialled(false), Phase::Fresh);
        assert_eq!(first.dialled(true), Phase::Connected);
        let with_session = |phase: &Phase| phase.has_connection();
        let all = [
            Phase::Fresh,
            Phase::FirstDial,
            Phase::Connected,
            Phase::NextDial,
            Phase::Stopping,
            Phase::Ended,
        ];
        let told: Vec<Phase> = all.into_iter().filter(with_session).collect();
        assert_eq!(told, [Phase::Connected, Phase::NextDial], "those are told of new carriers");
        let next = Phase::Connected.dialling();
        assert_eq!(next, Phase::NextDial);
        assert_eq!(next.dialled(false), Phase::Connected, "the session before is still there");
        assert_eq!(Phase::Stopping.dialled(true), Phase::Stopping);
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let mut text = "é".repeat(MAX_TEXT);
        text.insert(0, 'x');
        truncate(&mut text);
        assert_eq!(text.len(), MAX_TEXT - 1);
    }

    #[test]
    fn addresses_cross_a_channel_whole() {
        let (supervisor, tunnel) = crate::sys::seqpacket::pair::<Reply, Request>().expect("a pair");
        let tunnel = TunnelEnd::from_fd(tunnel);
        for text in ["192.0.2.1:7", "[2001:db8::1]:7", "[fe80::1%3]:7"] {
            let address: SocketAddr = text.parse().expect("an address");
            let carriers = vec![CarrierName::any()];
            let sent = Reply::Dialled { remote: 0, host: String::new(), address: address.into(), carriers };
            assert!(supervisor.send(&sent, &[]).expect("fits"));
            let Ok(Incoming::Message(Reply::Dialled { address: got, .. }, _)) = tunnel.receive(false) else {
                panic!("{text} is lost");
            };
            assert_eq!(SocketAddr::from(got), address);
        }
    }

    #[test]
    fn the_most_carriers_fit_a_message_with_a_connection() {
        assert_eq!(crate::sys::seqpacket::MAX_FDS, 1 + crate::net::carriers::MAX_WAYS);
        let (supervisor, tunnel) = crate::sys::seqpacket::pair::<Reply, Request>().expect("a pair");
        let tunnel = TunnelEnd::from_fd(tunnel);
        let link = CarrierName {
            name: "a-name-of-15-by".to_owned(),
            index: u32::MAX,
            source: Some("2001:db8::1".parse().expect("an address")),
        };
        let carriers = vec![link; crate::net::carriers::MAX_WAYS];
        let address = SocketAddr::from(([192, 0, 2, 1], 7)).into();
        let sent = Reply::Dialled { remote: 0, host: "h".repeat(253), address, carriers: carriers.clone() };
        let file = std::fs::File::open("/dev/null").expect("a file");
        let fds = vec![file.as_fd(); 1 + carriers.len()];
        assert!(supervisor.send(&sent, &fds).expect("fits"));
        let Ok(Incoming::Message(Reply::Dialled { carriers: got, .. }, fds)) = tunnel.receive(true) else {
            panic!("it is lost");
        };
        assert_eq!((got, fds.len()), (carriers, 9));
    }

    #[test]
    fn the_longest_report_fits_a_message() {
        let path = PathReport {
            carrier: "a-name-of-15-by".to_owned(),
            server: SocketAddr::from(([0; 16], 7)).into(),
            in_use: true,
            proven: true,
            lost: true,
            rtt_us: Some(u64::MAX),
        };
        let session = SessionReport {
            id: SessionId::new(1, [2; 6]),
            host: "h".repeat(253),
            server: path.server,
            suite: Suite::Aes256Gcm,
            epoch: u64::MAX,
            age_ms: u64::MAX,
            silent_ms: u64::MAX,
            mtu: u16::MAX,
            path_mtu: Some(u64::MAX),
            control: true,
            traffic: Traffic::default(),
            drops: Drops::default(),
            paths: vec![path; 2 * (1 + crate::net::carriers::MAX_WAYS)],
        };
        let (tunnel, supervisor) = crate::sys::seqpacket::pair::<Request, Reply>().expect("a pair");
        let report = Report { session: Some(session), connecting: true };
        assert!(tunnel.send(&Request::Report(Box::new(report)), &[]).expect("fits"));
        drop(supervisor);
    }

    #[test]
    fn the_longest_wishes_fit_a_message() {
        let wishes = Wishes {
            addresses: vec!["fd09::2/64".parse().expect("a network"); crate::wire::control::MAX_ADDRESSES],
            mtu: 1420,
            subnets: vec!["fd0a::/64".parse().expect("a network"); crate::wire::control::MAX_SUBNETS],
            settings: Settings {
                routes: vec!["fd0b::/64".parse().expect("a network"); crate::wire::control::MAX_ROUTES],
                dns: vec!["fd09::1".parse().expect("an address"); crate::wire::control::MAX_RESOLVERS],
                idle: Some(u32::MAX),
            },
            server: "2001:db8::1".parse().expect("an address"),
        };
        let (tunnel, supervisor) = crate::sys::seqpacket::pair::<Request, Reply>().expect("a pair");
        assert!(tunnel.send(&Request::Configure(wishes), &[]).expect("fits"));
        drop(supervisor);
    }
}
