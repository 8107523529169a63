//! Packets that hosts and routers send of themselves, whether anybody uses the network or not.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::icmp::ICMPV6;
use super::inner::{Family, V4_MIN, V4_PROTOCOL, V6_LEN, upper_layer};

/// Whether `packet` says nothing of somebody using the tunnel: it is from or to an address that no host can be reached
/// by through it (multicast, limited broadcast, unspecified, loopback, link-local, reserved), it is IGMP, or one of the
/// ICMPv6 messages of neighbours and routers (MLD, Router and Neighbour Solicitation and Advertisement, Redirect). So is
/// what is no IP packet.
///
/// A subnet's broadcast address looks like any other from here: [`is_broadcast`] tells. Of a super-packet the header is as good as a packet's.
pub fn is_noise(packet: &[u8]) -> bool {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) if packet.len() >= V4_MIN => v4(packet),
        Some(6) if packet.len() >= V6_LEN => v6(packet),
        _ => true,
    }
}

/// Whether `packet` is IPv4 and goes to everybody in one of `networks`: no use of a tunnel either, which has no broadcast.
pub fn is_broadcast(packet: &[u8], networks: &[IpNet]) -> bool {
    let destination = packet.get(16..20).and_then(|bytes| bytes.first_chunk::<4>());
    let Some(destination) = destination.filter(|_| packet[0] >> 4 == 4) else { return false };
    networks.iter().any(|net| match net {
        // RFC 3021: two hosts, or one, and no broadcast.
        IpNet::V4(net) => net.prefix_len() < 31 && net.broadcast().octets() == *destination,
        IpNet::V6(_) => false,
    })
}

/// Whether `packet` comes from one of `networks`. Of a super-packet, too.
pub fn is_from(packet: &[u8], networks: &[IpNet]) -> bool {
    let bytes = |at: usize, len: usize| packet.get(at..at + len);
    let source = match packet.first().map(|byte| byte >> 4) {
        Some(4) => bytes(12, 4).and_then(|b| b.first_chunk::<4>()).map(|b| IpAddr::from(*b)),
        Some(6) => bytes(8, 16).and_then(|b| b.first_chunk::<16>()).map(|b| IpAddr::from(*b)),
        _ => None,
    };
    source.is_some_and(|source| networks.iter().any(|net| net.contains(&source)))
}

fn v4(packet: &[u8]) -> bool {
    let local = |bytes: &[u8]| {
        let Some(ip) = bytes.first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes)) else { return true };
        // "This network", and from 224 on: multicast, reserved, broadcast.
        ip.octets()[0] == 0 || ip.octets()[0] >= 224 || ip.is_loopback() || ip.is_link_local()
    };
    let (source, destination) = packet[Family::V4.addresses()].split_at(4);
    packet[V4_PROTOCOL] == IGMP || local(source) || local(destination)
}

fn v6(packet: &[u8]) -> bool {
    let local = |bytes: &[u8]| {
        let Some(ip) = bytes.first_chunk::<16>().map(|bytes| Ipv6Addr::from(*bytes)) else { return true };
        ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_unicast_link_local()
    };
    let (source, destination) = packet[Family::V6.addresses()].split_at(16);
    let neighbours = || match upper_layer(packet) {
        Some((at, ICMPV6)) => packet.get(at).is_none_or(|kind| NEIGHBOURS.contains(kind)),
        _ => false,
    };
    local(source) || local(destination) || neighbours()
}

/// RFC 1112.
const IGMP: u8 = 2;
/// MLD (RFC 2710, RFC 3810), Router and Neighbour Discovery (RFC 4861).
const NEIGHBOURS: [u8; 9] = [130, 131, 132, 133, 134, 135, 136, 137, 143];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::icmp::tests::{packet4, packet6};
    use super::*;

    #[test]
    fn what_hosts_say_to_each_other_is_none() {
        assert!(!is_noise(&packet4(40)));
        assert!(!is_noise(&packet6(60)));
        // A super-packet.
        assert!(!is_noise(&packet4(60_000)));
        // A fragment, and ping.
        for (at, value) in [(6, 0x20), (7, 1), (9, 1)] {
            let mut packet = packet4(40);
            packet[at] = value;
            assert!(!is_noise(&packet), "byte {at} = {value}");
        }
        for kind in [1, 2, 3, 4, 128, 129] {
            let mut ping = packet6(60);
            (ping[6], ping[40]) = (58, kind);
            assert!(!is_noise(&ping), "ICMPv6 {kind}");
        }
    }

    #[test]
    fn what_they_say_to_their_neighbours_is() {
        let with4 = |at: usize, value: &[u8]| {
            let mut packet = packet4(40);
            packet[at..at + value.len()].copy_from_slice(value);
            is_noise(&packet)
        };
        for local in
            [[0, 0, 0, 0], [0, 1, 2, 3], [127, 0, 0, 1], [169, 254, 1, 1], [224, 0, 0, 251], [240, 0, 0, 1]]
        {
            assert!(with4(12, &local), "from {local:?}");
            assert!(with4(16, &local), "to {local:?}");
        }
        assert!(with4(16, &[255; 4]));
        assert!(with4(9, &[2]), "IGMP");
        assert!(!with4(16, &[223, 255, 255, 255]));
        assert!(!with4(16, &[169, 253, 1, 1]));

        let with6 = |changes: &[(usize, u8)]| {
            let mut packet = packet6(60);
            changes.iter().for_each(|(at, value)| packet[*at] = *value);
            is_noise(&packet)
        };
        assert!(with6(&[(8, 0), (9, 0), (23, 0)]), "from ::");
        assert!(with6(&[(8, 0), (9, 0), (23, 1)]), "from ::1");
        assert!(with6(&[(8, 0xfe), (9, 0x80)]), "from a link-local address");
        assert!(with6(&[(24, 0xfe), (25, 0xbf)]), "to one");
        assert!(with6(&[(24, 0xff), (25, 0x02)]), "to multicast");
        for kind in 0..=255 {
            let expected = (130..=137).contains(&kind) || kind == 143;
            assert_eq!(with6(&[(6, 58), (40, kind)]), expected, "ICMPv6 {kind}");
            // MLD comes behind a router alert.
            let behind = [(6, 0), (40, 58), (41, 0), (48, kind)];
            assert_eq!(with6(&behind), expected, "ICMPv6 {kind}");
        }
    }

    #[test]
    fn a_networks_broadcast_is_known_by_the_network() {
        let networks = ["10.9.0.2/24", "fd09::2/64"].map(|net| net.parse().expect("a network"));
        let to = |destination: [u8; 4]| {
            let mut packet = packet4(40);
            packet[16..20].copy_from_slice(&destination);
            is_broadcast(&packet, &networks)
        };
        assert!(to([10, 9, 0, 255]));
        assert!(!to([10, 9, 0, 254]) && !to([10, 9, 1, 255]));
        assert!(!is_broadcast(&packet6(60), &networks));
        assert!(!is_broadcast(&[], &networks) && !is_broadcast(&[0x45; 19], &networks));
        let mut packet = packet4(40);
        packet[16..20].copy_from_slice(&[10, 9, 0, 2]);
        assert!(!is_broadcast(&packet, &["10.9.0.2/32".parse().expect("a network")]));
    }

    #[test]
    fn sources_are_in_networks() {
        let from = |packet: &[u8], net: &str| is_from(packet, &[net.parse().expect("a network")]);
        // A super-packet's length field may say anything.
        for mut packet in [packet4(40), packet4(60_000)] {
            packet[12..20].copy_from_slice(&[10, 9, 0, 2, 192, 0, 2, 1]);
            assert!(from(&packet, "10.9.0.2/32") && from(&packet, "10.9.0.0/24"));
            assert!(!from(&packet, "192.0.2.0/24") && !from(&packet, "::/0"));
        }
        let mut packet = packet6(60);
        packet[8..24].copy_from_slice(&Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 2).octets());
        assert!(from(&packet, "fd09::2/128") && !from(&packet, "fd09::3/128") && !from(&packet, "0.0.0.0/0"));
        for bytes in [&[][..], &[0x45; 15], &[0x60; 23], &[0x55; 40]] {
            assert!(!from(bytes, "0.0.0.0/0") && !from(bytes, "::/0"));
        }
    }

    #[test]
    fn what_is_no_packet_is_too() {
        for bytes in [&[][..], &[0x45; 19], &[0x60; 39], &[0x55; 40]] {
            assert!(is_noise(bytes));
        }
    }

    proptest! {
        #[test]
        fn any_bytes(mut bytes in proptest::collection::vec(any::<u8>(), 0..100), v6 in any::<bool>()) {
            if let Some(first) = bytes.first_mut() {
                *first = if v6 { 0x60 } else { 0x45 };
            }
            let _ = is_noise(&bytes);
        }
    }
}
