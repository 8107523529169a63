//! Every kind of traffic, over every family, suite and size.
//!
//! ```text
//!   c1 [tg0 10.9.0.x fd09::x] ==== 198.18.100.2 or 2001:db8:100::2 ==== [tg0 10.9.0.1 fd09::1] srv ---- lan
//! ```

use std::io::ErrorKind;
use std::net::IpAddr;

use crate::lab::{INNER_V4, INNER_V6, LAN_V4, LAN_V6, Lab, Namespace, SERVER_V6, ip};
use crate::traffic::{seen_as, transfer, udp_echo, udp_to_closed_port};

#[test]
fn all_traffic_passes_over_ipv4() {
    let Some(lab) = Lab::new("matrix4", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    let session = lab.session("c1").expect("a session");
    assert!(session["peer"].as_str().is_some_and(|peer| peer.starts_with("198.18.1.2:")), "{session}");
    exercise(&lab, 1420);
}

#[test]
fn all_traffic_passes_over_ipv6() {
    let Some(lab) = Lab::new("matrix6", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1).set("remote", format_args!("['[{SERVER_V6}]:55555']")));
    let session = lab.session("c1").expect("a session");
    assert!(session["peer"].as_str().is_some_and(|peer| peer.starts_with("[2001:db8:1::2]:")), "{session}");
    exercise(&lab, 1420);
}

#[test]
fn all_traffic_passes_through_the_guard() {
    let Some(lab) = Lab::new("matrixg", 1) else { return };
    let mut server = lab.start_server(&lab.server().set("data.tun_write", "'guard'"));
    let mut client = lab.start_client(1, &lab.client(1));
    let worker = server.wait_for_children(1)[0];
    let held = crate::process::descriptors(worker);
    assert!(!held.iter().any(|fd| fd == "/dev/net/tun"), "the worker holds the device: {held:?}");
    exercise(&lab, 1420);
    client.stop();
    server.stop();
}

#[test]
fn every_suite_carries_traffic() {
    let Some(lab) = Lab::new("suites", 1) else { return };
    for suite in ["aes-256-gcm", "chacha20-poly1305", "aes-256-ctr-hmac-sha256"] {
        let suites = format!("['{suite}']");
        let mut server = lab.start_server(&lab.server().set("data.suites", &suites));
        // One end alone decides; the other has all of them.
        let mut client = lab.start_client(1, &lab.client(1));
        assert_eq!(lab.session("c1").expect("a session")["suite"], suite);
        transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 4 << 20);
        udp_echo(&lab.c(1), &lab.srv(), ip(INNER_V6), 20_000);
        client.stop();
        server.stop();
    }
}

#[test]
fn suites_that_do_not_meet_are_refused() {
    let Some(lab) = Lab::new("nosuite", 1) else { return };
    let _server = lab.start_server(&lab.server().set("data.suites", "['aes-256-gcm']"));
    let mut refused = lab.try_client(1, &lab.client(1).set("data.suites", "['chacha20-poly1305']"));
    refused.wait_for_log("no common version or suite");
    drop(refused);
    let _accepted = lab.start_client(1, &lab.client(1).set("data.suites", "['aes-256-gcm']"));
}

#[test]
fn the_smallest_mtu_carries_traffic() {
    let Some(lab) = Lab::new("mtu1280", 1) else { return };
    let _server = lab.start_server(&lab.server().set("mtu", 1280));
    let _client = lab.start_client(1, &lab.client(1));
    exercise(&lab, 1280);
}

#[test]
fn jumbo_frames_carry_traffic() {
    let Some(lab) = Lab::new("mtu9000", 1) else { return };
    lab.set_outer_mtu(9216);
    let _server = lab.start_server(&lab.server().set("mtu", 9000));
    let _client = lab.start_client(1, &lab.client(1));
    exercise(&lab, 9000);
}

/// Everything a network has to do, for client 1, inside IPv4 and IPv6.
fn exercise(lab: &Lab, mtu: usize) {
    let (client, server) = (lab.c(1), lab.srv());
    for (to, from) in [(INNER_V4, lab.inner_v4(1)), (INNER_V6, lab.inner_v6(1))] {
        let to = ip(to);
        assert_eq!(seen_as(&client, &server, to), from, "the client's address inside");
        pings(&client, &server, to, from);
        largest_packet(&client, to, mtu);
        largest_packet(&server, from, mtu);
        transfer(&client, &server, to, MEGABYTES << 20);
        transfer(&server, &client, from, MEGABYTES << 20);
        let headers = if to.is_ipv4() { 28 } else { 48 };
        for size in [1, 2, 17, 512, mtu - headers, mtu - headers + 1, 4_000, 16_384, 40_000, 65_000] {
            udp_echo(&client, &server, to, size);
        }
        for (host, other) in [(&client, to), (&server, from)] {
            let error = udp_to_closed_port(host, other);
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "closed port of {other}: {error}");
        }
        time_exceeded(lab, to.is_ipv4());
    }
    // None of all that was lost to the server, but what a full queue to a guard that writes may have cost.
    let session = lab.session("c1").expect("a session");
    let drops = session["drops"].as_object().expect("drops by reason");
    assert!(drops.keys().all(|reason| reason == "uplink_full"), "{session}");
}

/// Tiny, usual and fragmented, both ways.
fn pings(client: &Namespace, server: &Namespace, to: IpAddr, from: IpAddr) {
    for size in [0, 1, 56, 1_000, 8_000, 60_000] {
        assert!(client.pings(to, size, 3), "ping of {size} bytes to {to}");
        assert!(server.pings(from, size, 3), "ping of {size} bytes to {from}");
    }
}

/// The largest packet passes unfragmented; one byte more is refused by the sender's own kernel.
fn largest_packet(from: &Namespace, to: IpAddr, mtu: usize) {
    let most = mtu - if to.is_ipv4() { 28 } else { 48 };
    let ping = |size: usize| {
        let (size, to) = (size.to_string(), to.to_string());
        let out = from.run(&["ping", "-n", "-M", "do", "-c", "1", "-W", "5", "-s", &size, &to]);
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        (out.status.success(), text)
    };
    let (answered, text) = ping(most);
    assert!(answered, "{most} bytes to {to}: {text}");
    let (answered, text) = ping(most + 1);
    assert!(
        !answered && text.to_lowercase().contains("message too long"),
        "{} bytes to {to}: {text}",
        most + 1
    );
}

/// The server routes: a packet with its last hop spent comes back as an ICMP error through the tunnel.
fn time_exceeded(lab: &Lab, v4: bool) {
    let (host, server) = if v4 { (LAN_V4, INNER_V4) } else { (LAN_V6, INNER_V6) };
    let bits = if v4 { "32" } else { "128" };
    let route = format!("{host}/{bits}");
    lab.c(1).ip(&["route", "replace", &route, "dev", "tg0"]);
    let forwarding = if v4 { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" };
    lab.srv().sysctl(forwarding, "1");
    let out = lab.c(1).run(&["ping", "-n", "-c", "1", "-W", "5", "-t", "1", host]);
    let text = String::from_utf8_lossy(&out.stdout);
    let expected = format!("From {server}");
    assert!(
        text.contains(&expected) && text.to_lowercase().contains("time to live exceeded")
            || text.contains(&expected) && text.contains("Hop limit"),
        "{text}"
    );
    lab.c(1).ip(&["route", "del", &route, "dev", "tg0"]);
}

const MEGABYTES: usize = 8;
