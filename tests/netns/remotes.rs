//! The server is somewhere else than before, or isn't reached as before: another address, another remote, another
//! family, another link. What runs inside the tunnel notices a pause.

use std::net::IpAddr;
use std::time::Instant;

use crate::lab::{Config, INNER_V4, LAN_V4, Lab, SERVER_V4, SERVER_V6, eventually, ip, outer};
use crate::moves::while_talking;
use crate::process::Process;
use crate::traffic::transfer;

#[test]
fn a_name_that_leads_to_another_address_is_looked_up_again() {
    let Some(lab) = Lab::new("renamed", 1) else { return };
    let _server = lab.start_server(&server(&lab));
    let config = lab.client(1).set("remote", "'vpn.test'");
    let mut client = lab.client_with_own_etc(1, &format!("{SERVER_V4} vpn.test\n"), &config);
    lab.wait_for_tunnel(1, &mut client);
    let inner = lab.inner(1);
    while_talking(&lab, || {
        lab.write("etc/hosts", format!("127.0.0.1 localhost\n{SECOND} vpn.test\n"));
        lab.srv().ip(&["addr", "del", &format!("{SERVER_V4}/24"), "dev", "eth0"]);
        lab.srv().ip(&["addr", "add", &format!("{SECOND}/24"), "dev", "eth0"]);
        lab.srv().ip(&["route", "add", "default", "via", "198.18.100.1"]);
        comes_again(&lab, &client, SECOND);
    });
    as_before(&lab, &mut client, &inner);
}

#[test]
fn another_remote_takes_over_from_one_that_is_dead() {
    let Some(lab) = Lab::new("second", 1) else { return };
    lab.srv().ip(&["addr", "add", &format!("{SECOND}/24"), "dev", "eth0"]);
    let _server = lab.start_server(&server(&lab));
    let config = lab.client(1).set("remote", format_args!("['{SERVER_V4}', '{SECOND}']"));
    let mut client = lab.start_client(1, &config.set("tls.server_name", "'vpn.test'"));
    let inner = lab.inner(1);
    for (dead, other) in [(SERVER_V4, SECOND), (SECOND, SERVER_V4)] {
        while_talking(&lab, || {
            lab.swallow(&[&format!("ip daddr {dead}"), &format!("ip saddr {dead}")]);
            comes_again(&lab, &client, other);
            lab.swallow_no_more();
        });
    }
    as_before(&lab, &mut client, &inner);
}

#[test]
fn a_family_that_goes_away_is_replaced_by_the_other() {
    let Some(lab) = Lab::new("families", 1) else { return };
    let _server = lab.start_server(&server(&lab));
    let config = lab.client(1).set("remote", format_args!("['{SERVER_V4}', '{SERVER_V6}']"));
    let mut client = lab.start_client(1, &config);
    let inner = lab.inner(1);
    // The client's host loses the one, and finds it again when it loses the other.
    while_talking(&lab, || {
        lab.c(1).ip(&["addr", "del", "198.18.1.2/24", "dev", "eth0"]);
        comes_again(&lab, &client, SERVER_V6);
    });
    assert!(!client.log().contains("the server doesn't answer"), "it was told so: {}", client.log());
    while_talking(&lab, || {
        lab.c(1).ip(&["addr", "add", "198.18.1.2/24", "dev", "eth0"]);
        lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1"]);
        lab.c(1).ip(&["addr", "del", "2001:db8:1::2/64", "dev", "eth0"]);
        comes_again(&lab, &client, SERVER_V4);
    });
    // And the network in between loses one.
    lab.c(1).ip(&["addr", "add", "2001:db8:1::2/64", "dev", "eth0", "nodad"]);
    lab.c(1).ip(&["route", "replace", "default", "via", "2001:db8:1::1"]);
    while_talking(&lab, || {
        lab.swallow(&["meta nfproto ipv4"]);
        comes_again(&lab, &client, SERVER_V6);
    });
    as_before(&lab, &mut client, &inner);
}

#[test]
fn an_attempt_under_way_begins_anew_where_the_host_has_moved_to() {
    let Some(lab) = Lab::new("midway", 1) else { return };
    let _server = lab.start_server(&server(&lab));
    // Nothing gets through at first; then the connection is made, but carries nothing.
    for (n, swallowed) in [(7, ""), (8, "tcp flags & psh == psh")] {
        let address = |n: u8| format!("198.18.1.{n}/24");
        lab.swallow(&[&format!("ip saddr 198.18.1.{} {swallowed}", before(n))]);
        let mut client = lab.try_client(1, &lab.client(1));
        client.wait_for_log("connecting to");
        if !swallowed.is_empty() {
            eventually("a connection", || {
                let list = lab.c(1).must(&["ss", "-Htn", "state", "established", "dport", "=", "55555"]);
                (!list.trim().is_empty()).then_some(())
            });
        }
        lab.c(1).ip(&["addr", "del", &address(before(n)), "dev", "eth0"]);
        lab.c(1).ip(&["addr", "add", &address(n), "dev", "eth0"]);
        lab.c(1).ip(&["route", "replace", "default", "via", "198.18.1.1"]);
        lab.wait_for_tunnel(1, &mut client);
        let log = client.log();
        assert!(!log.contains("no answer from") && !log.contains("no session within"), "{log}");
        assert_eq!(client.stop(), 0);
        lab.swallow_no_more();
    }
}

#[test]
fn an_attempt_that_waits_begins_when_the_host_has_a_network() {
    let Some(lab) = Lab::new("waits", 1) else { return };
    let _server = lab.start_server(&server(&lab));
    lab.c(1).ip(&["link", "set", "eth0", "down"]);
    let mut client = lab.try_client(1, &lab.client(1));
    // Every further attempt comes later than the one before.
    client.wait_for_log("(attempt 4)");
    lab.c(1).ip(&["link", "set", "eth0", "up"]);
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1"]);
    client.wait_for_log("a new control connection is made at once");
    lab.wait_for_tunnel(1, &mut client);
    assert_eq!(client.stop(), 0);
}

#[test]
fn a_carrier_that_is_dead_from_the_start_is_passed_over() {
    let Some(lab) = Lab::new("deadfirst", 1) else { return };
    lab.second_link();
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.201.1", "metric", "100"]);
    lab.swallow(&["iifname c1", "oifname c1"]);
    let _server = lab.start_server(&server(&lab));
    let mut client = lab.start_client(1, &lab.client(1).set("mobility.carriers", "['eth0', 'eth1']"));
    lab.wait_for_peer("198.18.201.2:");
    let log = client.log();
    for line in ["(198.18.100.2:55555) by eth0 ...", "(198.18.100.2:55555) by eth1 ..."] {
        assert!(log.contains(line), "{log}");
    }
    assert!(!log.contains("next attempt"), "the same attempt: {log}");
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
    assert_eq!(client.stop(), 0);
}

fn before(n: u8) -> u8 {
    if n == 7 { 2 } else { n - 1 }
}

fn server(lab: &Lab) -> Config {
    lab.server().set("push.routes", "['192.168.50.0/24']").set("nat", true)
}

/// Waits for another session, with this address of the server.
fn comes_again(lab: &Lab, client: &Process, address: &str) {
    let begun = Instant::now();
    eventually(&format!("a session by {address}"), || {
        let log = client.log();
        let last = log.lines().rev().find(|line| line.contains("tunnel up"))?;
        last.contains(&outer(address).to_string()).then_some(())
    });
    // Not judged here, as the machine may be busy.
    println!("another session, by {address}, after {:?}", begun.elapsed());
    eventually("an answer through the tunnel", || lab.c(1).pings(INNER_V4, 56, 1).then_some(()));
}

/// The same inner addresses, one session, and an orderly end.
fn as_before(lab: &Lab, client: &mut Process, inner: &[IpAddr]) {
    assert_eq!(lab.inner(1), inner);
    lab.wait_for_sessions(1);
    transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
    assert_eq!(client.stop(), 0);
}

/// The server's other address.
const SECOND: &str = "198.18.100.3";
