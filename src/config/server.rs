//! `server.toml` and `clients.d/NAME.toml`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

use super::common::{Data, DeviceName, Pem};
use crate::exit::Outcome;

/// Who writes a client's packets to the TUN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunWrite {
    /// The session's worker (the default).
    Direct,
    /// The guard, after it checked the source address; the worker never holds the device.
    Guard,
}

/// What clients are offered beyond their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Push {
    /// Destinations to be routed into the tunnel.
    pub routes: Vec<IpNet>,
    /// Resolvers.
    pub dns: Vec<IpAddr>,
}

/// `[tls]` of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// The CA that signs clients.
    pub ca: Pem,
    /// The server's certificate chain.
    pub cert: Pem,
    /// Its private key.
    pub key: Pem,
    /// Revoked certificates, if there is a list.
    pub crl: Option<PathBuf>,
}

/// `clients.d/NAME.toml`: what is fixed for the client whose identity is NAME.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientEntry {
    /// Fixed inner addresses, at most one of each family, each inside one of `networks`, none twice over all
    /// clients, none the server's.
    pub addresses: Vec<IpAddr>,
    /// Subnets behind this client, routed to it; none twice over all clients, none overlapping `networks`.
    pub subnets: Vec<IpNet>,
}

/// `server.toml`, whole and valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// The file it came from, absolute.
    pub file: PathBuf,
    /// TCP and UDP; an unspecified IPv6 address means dual-stack. Default `[::]:55555`.
    pub listen: SocketAddr,
    /// TUN device; default `tg0`.
    pub device: DeviceName,
    /// Inner networks: one or two, at most one of each family, written as network addresses, not smaller than
    /// /30 or /126. The first host address of each is the server's.
    pub networks: Vec<IpNet>,
    /// Inner MTU; default 1420, 1280 to 65,000 (576 where no network is IPv6).
    pub mtu: u16,
    /// Sessions at once; default 250, 1 to 16,000.
    pub max_clients: u16,
    /// Masquerade what leaves the tunnel for other networks; default false.
    pub nat: bool,
    /// Whether clients reach each other; default false.
    pub client_to_client: bool,
    /// `[push]` or `push = { .. }`.
    pub push: Push,
    /// `[tls]`.
    pub tls: ServerTls,
    /// `[data]`.
    pub data: Data,
    /// `[data] tun_write = "direct" | "guard"`.
    pub tun_write: TunWrite,
    /// How long a session without control channel and without authenticated packets is kept; `linger`,
    /// default 10 min, at least 1 s.
    pub linger: Duration,
    /// How long a lease stays reserved after its session; `lease`, default 24 h.
    pub lease: Duration,
    /// Admin socket; `socket`, default `/run/tunguard/DEVICE.sock`.
    pub socket: PathBuf,
    /// Leases and the like; `state_dir`, default `/var/lib/tunguard`.
    pub state_dir: PathBuf,
    /// User IDs of workers, one per session: `worker_uids = [first, last]`, default 65536 to 524287, at least
    /// `max_clients` + 64 of them, never 0 or below 1,000.
    pub worker_uids: (u32, u32),
    /// Handshakes in progress at once; `max_handshakes`, default 64, 1 to 4,096.
    pub max_handshakes: u16,
    /// From `clients_dir`, default `clients.d` beside the file (which may be missing): identity -> entry.
    pub clients: BTreeMap<String, ClientEntry>,
}

impl ServerConfig {
    /// Reads `path` and the clients' files. Errors name file, line and key.
    pub fn load(path: &Path) -> Outcome<ServerConfig> {
        let _ = path;
        Err(crate::exit::Failure::usage("not written yet"))
    }
}
