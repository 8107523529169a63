//! Addresses, routes and NAT: who is reached by which way, and that the host is put back.
//!
//! ```text
//!   c1 [tg0] ======== [tg0] srv [192.168.50.1] ---- [192.168.50.2] lan
//!    |                                               knows 192.168.50.0/24 and fd50::/64 only
//!   172.16.1.1 (a subnet behind the client, in some tests)
//! ```

use std::net::IpAddr;

use crate::lab::{
    Config, GATEWAY_V4, GATEWAY_V6, INNER_V4, INNER_V6, LAN_V4, LAN_V6, Lab, SERVER_V4, SERVER_V6, ip,
    same_lines,
};
use crate::traffic::{can_connect, seen_as, transfer, udp_echo};

#[test]
fn with_nat_the_lan_sees_the_server() {
    let Some(lab) = Lab::new("nat", 1) else { return };
    let mut server = lab.start_server(&lan_pushed(&lab).set("nat", true));
    let _client = lab.start_client(1, &lab.client(1));
    for (host, gateway) in [(LAN_V4, GATEWAY_V4), (LAN_V6, GATEWAY_V6)] {
        assert_eq!(seen_as(&lab.c(1), &lab.lan(), ip(host)), ip(gateway));
        assert!(lab.c(1).pings(host, 1_000, 3));
        transfer(&lab.c(1), &lab.lan(), ip(host), 4 << 20);
        udp_echo(&lab.c(1), &lab.lan(), ip(host), 10_000);
    }
    server.stop();
    assert_eq!(lab.srv().must(&["nft", "list", "ruleset"]), "", "the server's nftables table is left");
}

#[test]
fn without_nat_the_lan_sees_the_client() {
    let Some(lab) = Lab::new("nonat", 1) else { return };
    let _server = lab.start_server(&lan_pushed(&lab));
    let _client = lab.start_client(1, &lab.client(1));
    lab.srv().sysctl("net/ipv4/ip_forward", "1");
    lab.srv().sysctl("net/ipv6/conf/all/forwarding", "1");
    // The LAN doesn't know the way back.
    assert!(!can_connect(&lab.c(1), &lab.lan(), ip(LAN_V4)));
    lab.lan().ip(&["route", "add", "10.9.0.0/24", "via", GATEWAY_V4]);
    lab.lan().ip(&["route", "add", "fd09::/64", "via", GATEWAY_V6]);
    assert_eq!(seen_as(&lab.c(1), &lab.lan(), ip(LAN_V4)), lab.inner_v4(1));
    assert_eq!(seen_as(&lab.c(1), &lab.lan(), ip(LAN_V6)), lab.inner_v6(1));
    // And the other way round; what is too large for the tunnel is said to be.
    transfer(&lab.lan(), &lab.c(1), lab.inner_v4(1), 4 << 20);
    for (to, from) in [(lab.inner_v4(1), GATEWAY_V4), (lab.inner_v6(1), GATEWAY_V6)] {
        let size = if to.is_ipv4() { "1472" } else { "1452" };
        let out =
            lab.lan().run(&["ping", "-n", "-M", "do", "-c", "1", "-W", "5", "-s", size, &to.to_string()]);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(text.contains(&format!("From {from}")) && text.contains("1420"), "{text}");
    }
}

#[test]
fn pushed_routes_come_and_go() {
    let Some(lab) = Lab::new("pushed", 1) else { return };
    let _server = lab.start_server(&lan_pushed(&lab));
    let before = lab.c(1).routes();
    let mut client = lab.start_client(1, &lab.client(1));
    assert!(goes_through_tunnel(&lab, LAN_V4) && goes_through_tunnel(&lab, LAN_V6));
    assert!(!goes_through_tunnel(&lab, SERVER_V4));
    client.stop();
    same_lines(&before, &lab.c(1).routes(), "the client's routes");
    // The client has the last word: none of the pushed ones.
    let mut client = lab.start_client(1, &lab.client(1).set("routes", "'none'"));
    assert!(!goes_through_tunnel(&lab, LAN_V4) && !goes_through_tunnel(&lab, LAN_V6));
    assert!(goes_through_tunnel(&lab, INNER_V4) && goes_through_tunnel(&lab, INNER_V6));
    client.stop();
    // Or others.
    let mut client = lab.start_client(1, &lab.client(1).set("routes", "['192.168.77.0/24']"));
    assert!(goes_through_tunnel(&lab, "192.168.77.1") && !goes_through_tunnel(&lab, LAN_V4));
    client.stop();
    same_lines(&before, &lab.c(1).routes(), "the client's routes");
}

#[test]
fn a_full_tunnel_takes_everything_but_itself() {
    let Some(lab) = Lab::new("full", 1) else { return };
    let everything = lab.server().set("push.routes", "['0.0.0.0/0', '::/0']").set("nat", true);
    let _server = lab.start_server(&everything);
    let before = lab.c(1).routes();
    for remote in [SERVER_V4.to_owned(), format!("[{SERVER_V6}]:55555")] {
        let mut client = lab.start_client(1, &lab.client(1).set("remote", format_args!("['{remote}']")));
        for inside in [LAN_V4, LAN_V6, "192.0.2.77", "2001:db8:77::1", INNER_V4, INNER_V6] {
            assert!(goes_through_tunnel(&lab, inside), "{inside} with the server at {remote}");
        }
        let outside = if remote == SERVER_V4 { SERVER_V4 } else { SERVER_V6 };
        assert!(!goes_through_tunnel(&lab, outside), "the tunnel inside itself, at {remote}");
        transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 4 << 20);
        transfer(&lab.c(1), &lab.lan(), ip(LAN_V6), 4 << 20);
        client.stop();
        same_lines(&before, &lab.c(1).routes(), &format!("routes after {remote}"));
    }
}

#[test]
fn a_killed_clients_routes_are_repaired_by_the_next_start() {
    let Some(lab) = Lab::new("repair", 1) else { return };
    let _server = lab.start_server(&lab.server().set("push.routes", "['0.0.0.0/0']").set("nat", true));
    let before = lab.c(1).routes();
    let mut client = lab.start_client(1, &lab.client(1));
    client.kill();
    let mut client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
    client.stop();
    same_lines(&before, &lab.c(1).routes(), "the client's routes");
}

#[test]
fn a_subnet_behind_a_client_is_reached() {
    let Some(lab) = Lab::new("subnet", 2) else { return };
    lab.write("clients.d/c1.toml", "subnets = ['172.16.1.0/24', 'fd16:1::/64']\n");
    let mut server = lab.start_server(&lab.server().set("client_to_client", true));
    let _one = lab.start_client(1, &lab.client(1));
    let _two = lab.start_client(2, &lab.client(2).set("routes", "['172.16.1.0/24', 'fd16:1::/64']"));
    for (address, bits) in [("172.16.1.1", "24"), ("fd16:1::1", "64")] {
        lab.c(1).ip(&["addr", "add", &format!("{address}/{bits}"), "dev", "lo"]);
        assert!(lab.srv().pings(address, 1_000, 3), "the server to {address}");
        transfer(&lab.srv(), &lab.c(1), ip(address), 1 << 20);
        // From another client, too, as clients may reach each other here.
        transfer(&lab.c(2), &lab.c(1), ip(address), 1 << 20);
    }
    let session = lab.session("c1").expect("a session");
    assert_eq!(session["subnets"], serde_json::json!(["172.16.1.0/24", "fd16:1::/64"]));
    server.stop();
    assert!(!lab.srv().routes().iter().any(|route| route.contains("172.16.1.0/24")));
}

#[test]
fn fixed_addresses_are_given_to_their_owner() {
    let Some(lab) = Lab::new("fixed", 2) else { return };
    lab.write("clients.d/c2.toml", "addresses = ['10.9.0.77', 'fd09::77']\n");
    let _server = lab.start_server(&lab.server());
    let _one = lab.start_client(1, &lab.client(1));
    let _two = lab.start_client(2, &lab.client(2));
    assert_eq!(lab.inner(2), [ip("10.9.0.77"), ip("fd09::77")]);
    assert!(lab.inner(1).iter().all(|address| !lab.inner(2).contains(address)));
    assert!(lab.srv().pings("fd09::77", 56, 3));
}

#[test]
fn addresses_stick_to_their_client_across_restarts() {
    let Some(lab) = Lab::new("sticky", 2) else { return };
    let mut addresses: Vec<Vec<IpAddr>> = Vec::new();
    for order in [[1, 2], [2, 1], [1, 2]] {
        let mut server = lab.start_server(&lab.server());
        let clients: Vec<_> = order.iter().map(|n| lab.start_client(*n, &lab.client(*n))).collect();
        let now = vec![lab.inner(1), lab.inner(2)];
        if addresses.is_empty() {
            addresses = now;
        } else {
            assert_eq!(now, addresses);
        }
        for mut client in clients {
            client.stop();
        }
        server.stop();
    }
}

#[test]
fn one_family_inside_is_enough() {
    let Some(lab) = Lab::new("onefamily", 1) else { return };
    for (networks, address) in [("['10.9.0.0/24']", INNER_V4), ("['fd09::/64']", INNER_V6)] {
        let mut server = lab.start_server(&lab.server().set("networks", networks));
        let mut client = lab.start_client(1, &lab.client(1));
        assert_eq!(lab.inner(1).len(), 1);
        transfer(&lab.c(1), &lab.srv(), ip(address), 1 << 20);
        client.stop();
        server.stop();
    }
}

#[test]
fn clients_behind_one_nat_are_told_apart() {
    let Some(lab) = Lab::new("behindnat", 2) else { return };
    let rules = lab.write(
        "nat.nft",
        "table ip nat {\nchain post {\ntype nat hook postrouting priority srcnat\noifname \"srv\" masquerade\n}\n}\n",
    );
    lab.net().must(&["nft", "-f", &rules.display().to_string()]);
    let _server = lab.start_server(&lab.server());
    let _one = lab.start_client(1, &lab.client(1));
    let _two = lab.start_client(2, &lab.client(2));
    for n in [1, 2] {
        let session = lab.session(&format!("c{n}")).expect("a session");
        assert!(session["peer"].as_str().is_some_and(|peer| peer.starts_with("198.18.100.1:")), "{session}");
        transfer(&lab.c(n), &lab.srv(), ip(INNER_V4), 2 << 20);
        transfer(&lab.srv(), &lab.c(n), lab.inner_v6(n), 2 << 20);
    }
}

#[test]
fn strays_disturb_nobody() {
    let Some(lab) = Lab::new("strays", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    // To nobody, to everybody, to groups.
    for (host, device) in [(lab.srv(), "tg0"), (lab.c(1), "tg0")] {
        for stray in ["10.9.0.99", "10.9.0.255", "224.0.0.1", "fd09::99", "ff02::1", "10.9.0.0"] {
            host.run(&["ping", "-n", "-b", "-c", "2", "-i", "0.05", "-W", "1", "-I", device, stray]);
        }
    }
    assert!(lab.status()["guard_drops"]["no_route"].as_u64() > Some(0), "{}", lab.status());
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
    assert_eq!((server.try_exit(), client.try_exit()), (None, None));
}

/// A server that pushes the way to the LAN behind it.
fn lan_pushed(lab: &Lab) -> Config {
    lab.server().set("push.routes", "['192.168.50.0/24', 'fd50::/64']")
}

/// Whether client 1 sends to this address through its tunnel.
fn goes_through_tunnel(lab: &Lab, address: &str) -> bool {
    // One that is unreachable goes nowhere.
    let out = lab.c(1).run(&["ip", "route", "get", address]);
    String::from_utf8_lossy(&out.stdout).contains(" dev tg0 ")
}
