//! Guard and worker: the only vocabulary they share. A worker is not trusted: the guard checks each request
//! against the phase its session is in, and a request out of place ends that worker.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::common::Suite;
use crate::drops::Drops;
use crate::exit::Exit;
use crate::rate::Rate;
use crate::resume::ResumeSecret;
use crate::session::Traffic;
use crate::sys::mq::{self, QueueSize};
use crate::sys::seqpacket::Channel;
use crate::tls::{CertId, Certificates, SavedSession, TicketId};
use crate::wire::control::{Reason, Settings};
use crate::wire::data::SessionId;

/// The worker's end.
pub type WorkerEnd = Channel<Request, Reply>;
/// The guard's end.
pub type GuardEnd = Channel<Reply, Request>;

/// The nursery's end of its channel to the guard.
pub type NurseryEnd = Channel<NurseryReply, NurseryRequest>;
/// The guard's end.
pub type NurseryGuardEnd = Channel<NurseryRequest, NurseryReply>;

/// What the guard orders of the nursery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NurseryRequest {
    /// Make a worker; with it come its end of a channel to the guard, its client's TCP connection, and its end of a
    /// channel to the key holder.
    Start {
        /// The worker's user.
        uid: u32,
        /// Its number, for the names of its queues.
        number: u64,
    },
}

/// What the nursery answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NurseryReply {
    /// It is there, once.
    Ready,
    /// The worker is there.
    Started {
        /// Its process.
        pid: i32,
    },
    /// It is not: the system has no room for a process, or the nursery itself can't go on.
    Failed {
        /// Why.
        text: String,
    },
}

/// What a worker may ask or tell; in which phase is said in `guard/src/grants.rs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The client shows a ticket, in its first message: the TLS session behind it, please. Answer: `Redeemed`.
    Redeem(TicketId),
    /// The client proved who it is: a lease, a session and a slot are asked for. Answer: `Granted` or `Refused`.
    Claim(Claim),
    /// The queues are to be used. Answer: `Registered` or `Refused`.
    Register {
        /// Size of the queue to the worker.
        size: QueueSize,
    },
    /// The client got a ticket: the TLS session behind it, to be kept.
    Ticket {
        /// The ticket's number.
        id: TicketId,
        /// The session.
        session: SavedSession,
        /// [`crate::tls::trusted_until`]; where the session was resumed the guard knows better.
        until: i64,
    },
    /// The client is at a new address.
    Moved {
        /// Where.
        new: SocketAddr,
        /// Milliseconds since it was last heard where it was before.
        after_ms: Option<u64>,
        /// Its packets come inside the control connection.
        inside: bool,
    },
    /// The control channel is lost; the session lingers.
    ControlLost,
    /// The answer to `Ask`: the client was heard since.
    Heard,
    /// The answer to `Query`.
    Report(Box<Report>),
    /// A line for the log.
    Log {
        /// 1 error, 2 warning, 3 info, 4 debug, 5 trace (`log::Level`).
        level: u8,
        /// The line; shown escaped.
        text: String,
    },
    /// The last word before the worker exits.
    Ended {
        /// Why the session is over; `None` where there never was one.
        reason: Option<Reason>,
        /// Whose doing it is where there never was a session.
        cause: Cause,
        /// A sentence for the log.
        text: String,
    },
}

/// Whose doing it is that a connection came to nothing, in its worker's word. It is the client's word in the end, or
/// that of a worker the client took over: believed against the source of that connection only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// Something on this host failed, nothing that a client did.
    Ours,
    /// What came is no TLS, or none that any client of ours speaks.
    Garbage,
    /// There was no certificate, or one that is refused.
    Certificate,
    /// It wasn't done in [`HANDSHAKE_SECONDS`].
    Deadline,
    /// The client went away, wouldn't have our certificate, or spoke out of place behind a good one of its own.
    Left,
    /// It was refused by the guard, which knows why.
    Refused,
}

impl Cause {
    /// As far as the exit code tells it.
    pub fn of(exit: Exit) -> Cause {
        match exit {
            Exit::CertificateUnreadable
            | Exit::CertificateExpired
            | Exit::CertificateForeign
            | Exit::CertificateRevoked => Cause::Certificate,
            // Nonsense inside TLS has a certificate, and so a name.
            Exit::Tls | Exit::Malformed => Cause::Left,
            Exit::Refused => Cause::Refused,
            Exit::System
            | Exit::Usage
            | Exit::MacLength
            | Exit::KeyUnreadable
            | Exit::KeyMismatch
            | Exit::NoTun
            | Exit::Privilege
            | Exit::PortInUse
            | Exit::DeviceInUse
            | Exit::MissingProgram
            | Exit::Version
            | Exit::NobodyLetIn => Cause::Ours,
        }
    }
}

/// Who the client proved to be, and what it would like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Identity: the certificate's subject CN.
    pub name: String,
    /// Its certificate.
    pub cert: CertId,
    /// It hasn't shown that: its TLS session was resumed with the ticket that was redeemed.
    pub resumed: bool,
    /// Inner addresses it had before.
    pub want: Vec<IpAddr>,
    /// The session it would take up again.
    pub resume: Option<Resumption>,
}

/// A client's wish to take up a session again, for the guard to judge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumption {
    /// The session.
    pub session: SessionId,
    /// The client's proof that it was its own.
    pub proof: [u8; 32],
    /// What names the connection that the proof must be made for ([`crate::tls::export_binding`]).
    pub binding: [u8; 32],
}

/// What a worker counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Inner packets and bytes.
    pub traffic: Traffic,
    /// Packets dropped, by reason.
    pub drops: Drops,
    /// Epoch sent with.
    pub epoch: u64,
    /// Suite of the data channel.
    pub suite: Option<Suite>,
    /// Where the client is.
    pub peer: Option<SocketAddr>,
    /// Round trip in microseconds, where it was measured.
    pub rtt_us: Option<u64>,
    /// The largest inner packet that goes in one piece, where it was measured.
    pub path_mtu: Option<usize>,
    /// Milliseconds since the client was last heard.
    pub silent_ms: u64,
}

/// What the guard answers and orders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// What the ticket stands for, if the guard knows it.
    Redeemed(Option<SavedSession>),
    /// A session; its UDP slot comes as the first descriptor, the memory of its queue as the second, the TUN device
    /// as the third where the worker writes to it itself.
    Granted(Box<Grant>),
    /// No.
    Refused {
        /// For the client.
        reason: Reason,
        /// For the log.
        text: String,
    },
    /// Packets will come.
    Registered,
    /// Report, please.
    Query,
    /// Is the client still there? It is to be asked, and `Heard` says that it was heard.
    Ask,
    /// What is pushed has changed: tell the client.
    Update(Settings),
    /// The client has a newer session, which gets its packets from now on: send what is in the queue, take in what
    /// is still on its way for [`DRAIN_SECONDS`], then end.
    Drain,
    /// End the session and exit.
    End(Reason),
}

/// A session as the guard grants it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Its ID, with the slot in it.
    pub session: SessionId,
    /// Inner addresses with the length of their network's prefix.
    pub addresses: Vec<IpNet>,
    /// Subnets behind the client.
    pub subnets: Vec<IpNet>,
    /// For the client, to take the session up again.
    pub resume_secret: ResumeSecret,
    /// How much the client may send.
    pub rate_up: Option<Rate>,
}

/// The queues that a worker makes before it reads anything from the network, and no others after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePlan {
    /// What all names begin with: nobody else can guess them, and take them first.
    pub prefix: String,
    /// Size of the queue of packets to the client.
    pub downlink: QueueSize,
    /// Size of the queue of packets to the guard, where the guard writes to the TUN device.
    pub uplink: Option<QueueSize>,
}

impl QueuePlan {
    /// Names of the queues of the worker with this number, which no other worker ever has.
    pub fn names(&self, number: u64) -> QueueNames {
        let name = |end: &str| format!("{}-{number}-{end}", self.prefix);
        QueueNames { down: name("down"), up: self.uplink.map(|_| name("up")) }
    }
}

/// Names of a worker's queues, until the guard has taken them away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueNames {
    /// Of the queue of packets to the client.
    pub down: String,
    /// Of the queue of packets to the guard, where the guard writes to the TUN device.
    pub up: Option<String>,
}

impl QueueNames {
    /// Takes them away, and says whether any was there; the queues live on until their last descriptor is closed.
    pub fn unlink(&self) -> bool {
        let all = std::iter::once(&self.down).chain(&self.up);
        all.filter(|name| mq::unlink(name).is_ok()).count() > 0
    }
}

/// What every worker is started with: in a sealed memory file, the nursery's descriptor 4.
#[derive(Serialize, Deserialize)]
pub struct Setup {
    /// The guard's process ID: when it goes, the worker goes.
    pub guard: i32,
    /// Certificates and lists. The server's key is the key holder's.
    pub certificates: Certificates,
    /// An empty directory to be locked into.
    pub root: PathBuf,
    /// Suites in the server's order.
    pub suites: Vec<Suite>,
    /// Inner MTU.
    pub mtu: u16,
    /// What is pushed.
    pub settings: Settings,
    /// Milliseconds of an epoch.
    pub rekey_ms: u64,
    /// Packets of an epoch.
    pub rekey_packets: u64,
    /// Milliseconds a session outlives its control channel.
    pub linger_ms: u64,
    /// UDP super-packets may be written to the device.
    pub uso: bool,
    /// The queues of each.
    pub queues: QueuePlan,
    /// The version of Landlock that workers use, `None` where the configuration does without.
    pub landlock: Option<i32>,
    /// The most verbose level the guard's log shows (`log::LevelFilter`).
    pub log_level: u8,
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

/// The longest log line a worker may send, in bytes.
pub const MAX_LOG_LINE: usize = 1024;
/// Seconds that a session goes on after a newer one of its client took over.
pub const DRAIN_SECONDS: u64 = 3;
/// Seconds from accepting a connection to a session, all handshakes included.
pub const HANDSHAKE_SECONDS: u64 = 10;
