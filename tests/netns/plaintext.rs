//! What can be seen where: everything on the tunnel's devices, nothing of it on the wire.

use std::io::{Read, Write};
use std::net::IpAddr;

use crate::capture::{self, Capture, Captured, Inner, Sum, any_holds, only_the_tunnel};
use crate::lab::{INNER_V4, INNER_V6, Lab, ip};
use crate::traffic::{connect, udp_to};

#[test]
fn the_wire_shows_no_plaintext_and_the_devices_the_right_packets() {
    let Some(lab) = Lab::new("plaintext", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let wire = Capture::start(&lab.net(), "c1");
    let mut client = lab.start_client(1, &lab.client(1));
    let near = Capture::start(&lab.c(1), "tg0");
    let far = Capture::start(&lab.srv(), "tg0");
    let pairs = [[lab.inner_v4(1), ip(INNER_V4)], [lab.inner_v6(1), ip(INNER_V6)]];
    for [client, server] in pairs {
        say_secrets(&lab, server, client);
    }
    let (near, far) = (near.stop(), far.stop());
    client.stop();
    let wire = wire.stop();

    // The capture works: the secrets are on both devices.
    for secret in [SECRET_TCP, SECRET_UDP, SECRET_PING] {
        assert!(any_holds(&near, secret) && any_holds(&far, secret));
        assert!(!any_holds(&wire, secret), "{} is on the wire", String::from_utf8_lossy(secret));
    }
    only_the_tunnel(&wire, 50);
    for (packets, role) in [(&near, "client"), (&far, "server")] {
        right_packets(&pairs, packets, role);
    }
}

#[test]
fn congestion_marks_pass_in_and_out_of_the_tunnel() {
    let Some(lab) = Lab::new("ecn", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    let ping =
        |tos: &str| lab.c(1).run(&["ping", "-n", "-c", "5", "-i", "0.05", "-W", "1", "-Q", tos, INNER_V4]);
    // The outer header says what the inner one says; DSCP stays inside.
    for ecn in 0..4u8 {
        let (wire, far) = (Capture::start(&lab.net(), "c1"), Capture::start(&lab.srv(), "tg0"));
        assert!(ping(&format!("{:#04x}", 0xb8 | ecn)).status.success());
        let (wire, far) = (wire.stop(), far.stop());
        let outer: Vec<u8> = wire.iter().filter_map(|p| datagram_to_server(p)).map(|ip| ip[1]).collect();
        assert!(outer.iter().filter(|tos| **tos == ecn).count() >= 5, "ECN {ecn}: outer {outer:02x?}");
        let inner: Vec<u8> = far.iter().filter(|p| !p.outgoing).map(|p| p.bytes[1]).collect();
        assert!(inner.iter().all(|tos| *tos == 0xb8 | ecn), "ECN {ecn}: inner {inner:02x?}");
    }
    // A mark made on the way comes out inside, and what can't carry it is dropped (RFC 6040).
    let rules = "table ip congested {\nchain forward {\ntype filter hook forward priority 0\n\
                 udp dport 55555 ip ecn set ce\n}\n}\n";
    let rules = lab.write("mark.nft", rules);
    lab.net().must(&["nft", "-f", &rules.display().to_string()]);
    let far = Capture::start(&lab.srv(), "tg0");
    assert!(ping("0x02").status.success());
    let inner: Vec<u8> = far.stop().iter().filter(|p| !p.outgoing).map(|p| p.bytes[1]).collect();
    assert!(!inner.is_empty() && inner.iter().all(|tos| *tos == 3), "{inner:02x?}");
    assert!(!ping("0x00").status.success(), "a packet without ECN passed congestion");
    let drops = lab.session("c1").expect("a session")["drops"].clone();
    assert!(drops["congested"].as_u64() >= Some(5), "{drops}");
}

/// The IPv4 packet, if it is a datagram from a client to the server.
fn datagram_to_server(packet: &Captured) -> Option<&[u8]> {
    packet.ip_after_ethernet().filter(|ip| ip[9] == capture::UDP && ip[22..24] == 55555u16.to_be_bytes())
}

/// The same secret both ways by TCP, UDP and ping.
fn say_secrets(lab: &Lab, to: IpAddr, from: IpAddr) {
    let (mut near, mut far) = connect(&lab.c(1), &lab.srv(), to);
    let said = SECRET_TCP.repeat(5_000);
    let mut heard = vec![0; said.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| far.write_all(&said).expect("send"));
        near.read_exact(&mut heard).expect("receive");
    });
    near.write_all(SECRET_TCP).expect("send");
    far.read_exact(&mut heard[..SECRET_TCP.len()]).expect("receive");

    let server = lab.srv().within(|| std::net::UdpSocket::bind((to, 0))).expect("bind");
    let client = udp_to(&lab.c(1), server.local_addr().expect("an address")).expect("a socket");
    client.send(&SECRET_UDP.repeat(50)).expect("send");
    server.set_read_timeout(Some(crate::lab::PATIENCE)).expect("a timeout");
    server.recv(&mut heard).expect("a datagram");

    let pattern: String = SECRET_PING.iter().map(|byte| format!("{byte:02x}")).collect();
    for (host, other) in [(lab.c(1), to), (lab.srv(), from)] {
        host.must(&["ping", "-n", "-c", "2", "-i", "0.1", "-s", "200", "-p", &pattern, &other.to_string()]);
    }
}

/// On the devices only the client's and the server's inner addresses occur, with checksums that are right or
/// will be completed.
fn right_packets(pairs: &[[IpAddr; 2]; 2], packets: &[Captured], role: &str) {
    assert!(packets.len() > 20);
    for packet in packets {
        let Some(inner) = Inner::parse(&packet.bytes) else {
            panic!("an odd packet on the device of the {role}: {:02x?}", packet.bytes);
        };
        let [client, server] = &pairs[usize::from(inner.source.is_ipv6())];
        let (from, to) =
            if packet.outgoing == (role == "client") { (client, server) } else { (server, client) };
        assert_eq!((&inner.source, &inner.destination), (from, to), "{role}, outgoing {}", packet.outgoing);
        assert_ne!(inner.checksum, Sum::Wrong, "{role}, outgoing {}: {inner:?}", packet.outgoing);
    }
}

const SECRET_TCP: &[u8; 16] = b"tcp:Xq7Zr2Lw9Bv4";
const SECRET_UDP: &[u8; 16] = b"udp:Hn3Ks8Pd6Jc1";
const SECRET_PING: &[u8; 16] = b"png:Tf5Gm0Ya2Ue7";
