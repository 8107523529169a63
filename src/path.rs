//! One way to reach the peer. The peer is its session ID; an address is only where it was heard last.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

/// The number of the carrier that is no socket: the control connection ([`crate::inside`]).
pub const INSIDE: u8 = u8::MAX;

/// One way to reach the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Path {
    /// The peer's address and port; never an IPv4-mapped IPv6 address.
    pub remote: SocketAddr,
    /// Our address it was sent to, to answer from the same one.
    pub local: Option<IpAddr>,
    /// Which of our sockets; 0 where there is only one.
    pub carrier: u8,
}

impl Path {
    /// A path, with mapped addresses turned into IPv4.
    pub fn new(remote: SocketAddr, local: Option<IpAddr>) -> Path {
        Path { remote: canonical(remote), local: local.map(|ip| ip.to_canonical()), carrier: 0 }
    }

    /// The same by another of our sockets.
    pub fn by(self, carrier: u8) -> Path {
        Path { carrier, ..self }
    }

    /// What tells it from others: our own address may be another each time.
    pub fn key(&self) -> (SocketAddr, u8) {
        (self.remote, self.carrier)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Path {
        Path::new(text.parse().expect("an address"), None)
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        assert_eq!(path("[::ffff:192.0.2.1]:7"), path("192.0.2.1:7"));
    }

    #[test]
    fn another_socket_makes_another_path() {
        let (first, second) = (path("192.0.2.1:7"), path("192.0.2.1:7").by(3));
        assert_eq!((second.remote, second.carrier), (first.remote, 3));
        assert_ne!(first.key(), second.key());
        // Our own address doesn't.
        let elsewhere = Path { local: Some([192, 0, 2, 9].into()), ..first };
        assert_eq!(first.key(), elsewhere.key());
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
