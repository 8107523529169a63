//! `client.toml`, and profiles: the same format with the PEMs inline.

use std::path::{Path, PathBuf};

use ipnet::IpNet;

use super::common::{Data, DeviceName, Pem};
use crate::exit::Outcome;

/// One `remote`: `HOST`, `HOST:PORT`, an address, or `[v6]:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Remote {
    /// Name or address, without brackets.
    pub host: String,
    /// Port, 55555 where none was given.
    pub port: u16,
}

/// What the client lets the server route into the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Routes {
    /// Whatever the server pushes.
    Pushed,
    /// Only the tunnel's own networks.
    None,
    /// These, whatever the server pushes.
    List(Vec<IpNet>),
}

/// `[tls]` of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    /// The CA that signs the server.
    pub ca: Pem,
    /// The client's certificate chain.
    pub cert: Pem,
    /// Its private key.
    pub key: Pem,
    /// The name the server's certificate must carry; default: the remote's host, as dialled.
    pub server_name: Option<String>,
}

/// `client.toml`, whole and valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The file it came from, absolute.
    pub file: PathBuf,
    /// Servers in order, at least one; a single string is taken as a list of one.
    pub remote: Vec<Remote>,
    /// TUN device; default `tg0`.
    pub device: DeviceName,
    /// `routes`, default `"pushed"`.
    pub routes: Routes,
    /// Whether pushed resolvers are used: `dns = "pushed"` (the default) or `"none"`.
    pub accept_dns: bool,
    /// `[tls]`.
    pub tls: ClientTls,
    /// `[data]`.
    pub data: Data,
    /// Unprivileged user of the tunnel process: `user`, a name or number, default `nobody`; never root.
    pub user: String,
    /// State that outlives the process (what to repair after a crash); `state_dir`, default `/run/tunguard`.
    pub state_dir: PathBuf,
}

impl ClientConfig {
    /// Reads `path`. Errors name file, line and key.
    pub fn load(path: &Path) -> Outcome<ClientConfig> {
        let _ = path;
        Err(crate::exit::Failure::usage("not written yet"))
    }
}
