//! Guard and worker: the only vocabulary they share. A worker is not trusted: the guard checks each request
//! against the phase its session is in, and a request out of place ends that worker.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::common::Suite;
use crate::drops::Drops;
use crate::resume::ResumeSecret;
use crate::session::Traffic;
use crate::sys::mq::QueueSize;
use crate::sys::seqpacket::Channel;
use crate::tls::{CertId, Credentials, SavedSession, TicketId};
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
    /// Make a worker; with it come its end of a channel to the guard, and its client's TCP connection.
    Start {
        /// The worker's user.
        uid: u32,
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
    /// The queues named in the grant are there. Answer: `Registered` or `Refused`.
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
        /// Something on this host failed, nothing that a client did.
        fault: bool,
        /// A sentence for the log.
        text: String,
    },
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
    /// Name under which the worker creates the queue of packets to the client.
    pub downlink: String,
    /// Size to create it with.
    pub size: QueueSize,
    /// Name and size of the queue of packets to the guard, where the guard writes to the TUN device.
    pub uplink: Option<(String, QueueSize)>,
}

/// What every worker is started with: in a sealed memory file, the nursery's descriptor 4.
#[derive(Serialize, Deserialize)]
pub struct Setup {
    /// The guard's process ID: when it goes, the worker goes.
    pub guard: i32,
    /// Certificates and the server's key.
    pub credentials: Credentials,
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
