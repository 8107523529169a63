//! The client's host moves, and connections inside the tunnel notice nothing but a pause.
//!
//! ```text
//!   c1 [eth0] 198.18.1.2   ---- 198.18.1.1   net ---- srv
//!      [eth1] 198.18.201.2 ---- 198.18.201.1          (in some tests, made by `Lab::second_link`)
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::lab::{Config, INNER_V4, INNER_V6, LAN_V4, Lab, SERVER_V4, SERVER_V6, eventually, ip, same_lines};
use crate::traffic::{Conversation, transfer};

#[test]
fn another_address_costs_no_connection() {
    let Some(lab) = Lab::new("address", 1) else { return };
    let _server = lab.start_server(&everything(&lab));
    let mut client = lab.start_client(1, &lab.client(1));
    let inner = lab.inner(1);
    while_talking(&lab, || {
        lab.c(1).ip(&["addr", "del", "198.18.1.2/24", "dev", "eth0"]);
        thread::sleep(Duration::from_millis(300));
        lab.c(1).ip(&["addr", "add", "198.18.1.77/24", "dev", "eth0"]);
        lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1"]);
        lab.wait_for_peer("198.18.1.77:");
    });
    // TCP can't move: another control connection is made at once.
    client.wait_for_log("a new control connection is made at once");
    assert!(host_routes(&lab).iter().any(|route| route.starts_with("198.18.100.2 via 198.18.1.1 dev eth0")));
    assert_eq!(lab.inner(1), inner);
    lab.wait_for_sessions(1);
    transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
    assert_eq!(client.stop(), 0);
    assert!(host_routes(&lab).is_empty(), "{:?}", host_routes(&lab));
}

#[test]
fn another_ipv6_address_costs_no_connection() {
    let Some(lab) = Lab::new("address6", 1) else { return };
    let _server = lab.start_server(&everything(&lab));
    let mut client = lab.start_client(1, &lab.client(1).set("remote", format_args!("['{SERVER_V6}']")));
    while_talking(&lab, || {
        lab.c(1).ip(&["addr", "del", "2001:db8:1::2/64", "dev", "eth0"]);
        thread::sleep(Duration::from_millis(300));
        // Tentative for a second or two: the router on the wire has to be asked first.
        lab.c(1).ip(&["addr", "add", "2001:db8:1::77/64", "dev", "eth0"]);
        lab.wait_for_peer("[2001:db8:1::77]:");
    });
    assert_eq!(client.stop(), 0);
    assert!(host_routes(&lab).is_empty(), "{:?}", host_routes(&lab));
}

#[test]
fn another_link_takes_over() {
    let Some(lab) = Lab::new("link", 1) else { return };
    lab.second_link();
    let _server = lab.start_server(&everything(&lab));
    let mut client = lab.start_client(1, &lab.client(1));
    while_talking(&lab, || {
        lab.c(1).ip(&["route", "replace", "default", "via", "198.18.201.1"]);
        lab.wait_for_peer("198.18.201.2:");
    });
    client.wait_for_log("a new control connection is made at once");
    let routes = host_routes(&lab);
    assert!(routes.iter().any(|r| r.starts_with("198.18.100.2 via 198.18.201.1 dev eth1")), "{routes:?}");
    assert!(!routes.iter().any(|r| r.contains("dev eth0")), "{routes:?}");
    // And back, with the old link gone for good.
    while_talking(&lab, || {
        lab.c(1).ip(&["link", "del", "eth1"]);
        lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1"]);
        lab.wait_for_peer("198.18.1.2:");
    });
    assert_eq!(client.stop(), 0);
    assert!(host_routes(&lab).is_empty(), "{:?}", host_routes(&lab));
}

#[test]
fn a_link_goes_down_and_up() {
    let Some(lab) = Lab::new("updown", 1) else { return };
    let _server = lab.start_server(&everything(&lab));
    let before = lab.c(1).routes();
    let mut client = lab.start_client(1, &lab.client(1));
    while_talking(&lab, || {
        lab.c(1).ip(&["link", "set", "eth0", "down"]);
        client.wait_for_log("there is no way to the server for now");
        // Not into the tunnel itself.
        let out = lab.c(1).run(&["ip", "route", "get", SERVER_V4]);
        assert!(!String::from_utf8_lossy(&out.stdout).contains("tg0"), "{out:?}");
        thread::sleep(Duration::from_secs(1));
        lab.c(1).ip(&["link", "set", "eth0", "up"]);
        lab.c(1).ip(&["addr", "add", "2001:db8:1::2/64", "dev", "eth0", "nodad"]);
        lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1"]);
        lab.c(1).ip(&["route", "add", "default", "via", "2001:db8:1::1"]);
        client.wait_for_log("the server is reached by eth0");
    });
    assert!(!client.log().contains("a new control connection"), "TCP outlives that: {}", client.log());
    assert_eq!(client.stop(), 0);
    same_lines(&before, &lab.c(1).routes(), "the client's routes");
}

#[test]
fn the_route_to_the_server_follows_its_gateway() {
    let Some(lab) = Lab::new("gateway", 1) else { return };
    lab.net().ip(&["addr", "add", "198.18.1.9/24", "dev", "c1"]);
    lab.net().sysctl("net/ipv4/conf/c1/proxy_arp", "1");
    let _server = lab.start_server(&everything(&lab));
    let before = lab.c(1).routes();
    let mut client = lab.start_client(1, &lab.client(1));
    let leads = |start: &str| {
        eventually(&format!("a host route {start:?}"), || {
            let routes = host_routes(&lab);
            let to: Vec<&String> = routes.iter().filter(|route| route.starts_with("198.18.100.2")).collect();
            (to.len() == 1 && to[0].starts_with(start)).then_some(())
        });
    };
    leads("198.18.100.2 via 198.18.1.1 dev eth0");
    while_talking(&lab, || {
        lab.c(1).ip(&["route", "replace", "default", "via", "198.18.1.9"]);
        leads("198.18.100.2 via 198.18.1.9 dev eth0");
    });
    while_talking(&lab, || {
        lab.c(1).ip(&["route", "add", "198.18.100.0/24", "dev", "eth0"]);
        leads("198.18.100.2 dev eth0");
    });
    while_talking(&lab, || {
        lab.c(1).ip(&["route", "del", "198.18.100.0/24", "dev", "eth0"]);
        lab.c(1).ip(&["route", "replace", "default", "via", "198.18.1.1"]);
        leads("198.18.100.2 via 198.18.1.1 dev eth0");
    });
    assert!(!client.log().contains("the network changed"), "no other socket was needed: {}", client.log());
    assert_eq!(client.stop(), 0);
    same_lines(&before, &lab.c(1).routes(), "the client's routes");
}

#[test]
fn of_two_links_the_one_with_a_carrier_is_used() {
    let Some(lab) = Lab::new("twolinks", 1) else { return };
    lab.second_link();
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.201.1", "metric", "100"]);
    let _server = lab.start_server(&everything(&lab));
    let mut client = lab.start_client(1, &lab.client(1));
    lab.wait_for_peer("198.18.1.2:");
    let routes = host_routes(&lab);
    for way in ["via 198.18.1.1 dev eth0", "via 198.18.201.1 dev eth1"] {
        assert!(routes.iter().any(|r| r.starts_with(&format!("198.18.100.2 {way}"))), "{routes:?}");
    }
    while_talking(&lab, || {
        // The cable is pulled: no address and no route of the client changes.
        lab.net().ip(&["link", "set", "c1", "down"]);
        lab.wait_for_peer("198.18.201.2:");
    });
    while_talking(&lab, || {
        lab.net().ip(&["link", "set", "c1", "up"]);
        lab.wait_for_peer("198.18.1.2:");
    });
    assert_eq!(client.stop(), 0);
    assert!(host_routes(&lab).is_empty(), "{:?}", host_routes(&lab));
}

#[test]
fn configured_carriers_come_before_the_routes_order() {
    let Some(lab) = Lab::new("carriers", 1) else { return };
    lab.second_link();
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.201.1", "metric", "100"]);
    let _server = lab.start_server(&everything(&lab));
    for (carriers, peer, warned) in [
        ("['eth1', 'eth0']", "198.18.201.2:", false),
        ("['eth0', 'eth1']", "198.18.1.2:", false),
        ("['nothere', 'eth1']", "198.18.201.2:", false),
        ("['nothere']", "198.18.1.2:", true),
    ] {
        let mut client = lab.start_client(1, &lab.client(1).set("mobility.carriers", carriers));
        lab.wait_for_peer(peer);
        let log = client.log();
        assert_eq!(log.contains("none of the carriers leads to"), warned, "{log}");
        let missing = "mobility.carriers: there is no device nothere now";
        assert_eq!(log.contains(missing), carriers.contains("nothere"), "{log}");
        transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
        assert_eq!(client.stop(), 0);
    }
}

/// A server through which everything goes.
pub fn everything(lab: &Lab) -> Config {
    lab.server().set("push.routes", "['0.0.0.0/0', '::/0']").set("nat", true)
}

/// Connections through the tunnel in both directions, that never stop talking before, during and after `moves`.
pub fn while_talking(lab: &Lab, moves: impl FnOnce()) {
    let mut talks = [
        Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4)),
        Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V6)),
        Conversation::start(&lab.srv(), &lab.c(1), lab.inner_v4(1)),
    ];
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for talk in &mut talks {
            let done = &done;
            scope.spawn(move || {
                talk.exchange(100_000);
                while !done.load(Ordering::Relaxed) {
                    talk.exchange(20_000);
                    thread::sleep(Duration::from_millis(5));
                }
                talk.exchange(100_000);
            });
        }
        thread::sleep(Duration::from_millis(300));
        // A panic must not leave the others talking for ever.
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(moves));
        done.store(true, Ordering::Relaxed);
        if let Err(panic) = moved {
            std::panic::resume_unwind(panic);
        }
    });
}

/// The client's routes to servers, and what guards them.
fn host_routes(lab: &Lab) -> Vec<String> {
    let routes = lab.c(1).routes();
    routes.into_iter().filter(|r| r.contains("proto 116") && !r.contains("dev tg0")).collect()
}
