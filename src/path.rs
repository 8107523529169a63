//! The peer's addresses. The peer is its session ID; an address is only where it was heard last.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use crate::time::Time;

/// One way to reach the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Path {
    /// The peer's address and port; never an IPv4-mapped IPv6 address.
    pub remote: SocketAddr,
    /// Our address it was sent to, to answer from the same one.
    pub local: Option<IpAddr>,
}

impl Path {
    /// A path, with mapped addresses turned into IPv4.
    pub fn new(remote: SocketAddr, local: Option<IpAddr>) -> Path {
        Path { remote: canonical(remote), local: local.map(|ip| ip.to_canonical()) }
    }
}

/// `address` as paths have it: mapped addresses are IPv4, a link-local one keeps its scope, and flow information,
/// which may differ from packet to packet, is left out.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match (address, address.ip().to_canonical()) {
        (SocketAddr::V6(v6), IpAddr::V6(ip)) => SocketAddrV6::new(ip, v6.port(), 0, v6.scope_id()).into(),
        (_, ip) => SocketAddr::new(ip, address.port()),
    }
}

/// What is known of the path in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// The path.
    pub path: Path,
    /// When it became the one in use.
    pub since: Time,
    /// Round trip as last measured; `None` until the path was proven.
    pub rtt: Option<Duration>,
}

/// Where the peer is.
pub struct Paths {
    active: Option<Active>,
    follow: bool,
}

impl Paths {
    /// The peer is wherever its newest authenticated packet came from (the server's view of a client).
    pub fn following() -> Paths {
        Paths { active: None, follow: true }
    }

    /// The peer is where it was dialled (the client's view of the server).
    pub fn fixed(path: Path, now: Time) -> Paths {
        Paths { active: Some(Active { path, since: now, rtt: None }), follow: false }
    }

    /// The path in use.
    pub fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    /// An authenticated packet came by `path`; `newest` says whether its counter is above all before it. Only
    /// such a packet moves the peer: an older one may be a copy that somebody delayed. Returns the old path
    /// where it did.
    pub fn heard(&mut self, now: Time, path: Path, newest: bool) -> Moved {
        let moves = self.follow && newest && self.active.is_none_or(|a| a.path != path);
        if !moves {
            return Moved::No;
        }
        let old = self.active.replace(Active { path, since: now, rtt: None });
        match old {
            // The same peer address, reached through another address of ours, is no event.
            Some(old) if old.path.remote == path.remote => Moved::No,
            old => Moved::Yes { old: old.map(|a| a.path) },
        }
    }

    /// The path in use answered after `rtt`.
    pub fn proven(&mut self, path: Path, rtt: Duration) {
        if let Some(active) = self.active.as_mut().filter(|a| a.path.remote == path.remote) {
            active.rtt = Some(rtt);
        }
    }
}

/// Whether the peer moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// It is where it was.
    No,
    /// It is somewhere else now.
    Yes {
        /// Where it was, if it was anywhere.
        old: Option<Path>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Path {
        Path::new(text.parse().expect("an address"), None)
    }

    #[test]
    fn only_the_newest_packet_moves_the_peer() {
        let mut paths = Paths::following();
        let (a, b) = (path("192.0.2.1:1"), path("192.0.2.2:2"));
        let now = Time::default();
        assert_eq!(paths.heard(now, a, true), Moved::Yes { old: None });
        assert_eq!(paths.heard(now, b, false), Moved::No);
        assert_eq!(paths.active().map(|p| p.path), Some(a));
        assert_eq!(paths.heard(now, b, true), Moved::Yes { old: Some(a) });
        assert_eq!(paths.active().map(|p| p.path), Some(b));
    }

    #[test]
    fn a_dialled_peer_stays_where_it_was_dialled() {
        let a = path("192.0.2.1:1");
        let mut paths = Paths::fixed(a, Time::default());
        assert_eq!(paths.heard(Time::default(), path("192.0.2.9:9"), true), Moved::No);
        assert_eq!(paths.active().map(|p| p.path), Some(a));
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        assert_eq!(path("[::ffff:192.0.2.1]:7"), path("192.0.2.1:7"));
    }

    #[test]
    fn link_local_addresses_keep_their_scope() {
        let peer = |flow, scope| {
            let ip = "fe80::1".parse().expect("an address");
            Path::new(SocketAddrV6::new(ip, 7, flow, scope).into(), None)
        };
        assert_eq!(peer(0, 3).remote.to_string(), "[fe80::1%3]:7");
        assert_ne!(peer(0, 3), peer(0, 4));
        assert_eq!(peer(99, 3), peer(0, 3));
    }
}
