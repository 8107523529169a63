//! What tunguard does to a host, on real kernels: each test has a network and a mount namespace of its own, which
//! go with its thread, so nothing of the machine's is touched even when a test fails.
//!
//! ```text
//!   up0 198.51.100.2/24, 2001:db8:1::2/64  ---- up0p     the "LAN", gateways .1 and ::1
//!   tg0 (a veth end standing in for the TUN) ---- tg0p
//! ```
//!
//! Needs root. Where that, or namespaces, are missing, each test prints `SKIPPED: why`; with CI=true it fails.

#![allow(clippy::unwrap_used, reason = "a test that fails may say so by panicking")]

use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use ipnet::IpNet;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use tunguard::config::common::DeviceName;
use tunguard::exit::Exit;
use tunguard::net::{
    Conflict, DnsKeeper, Forwarding, Monitor, Netlink, PROTOCOL, Route, RouteFilter, RouteKeeper, Table,
    TableSpec, dns, quiet_device, routes, sysctl, ways_to,
};
use tunguard::path;
use tunguard::sys::udp::{self, Carrier};

#[test]
fn links_and_addresses() {
    in_namespace(|_| {
        topology();
        let mut nl = Netlink::open().unwrap();
        let lo = nl.link_index("lo").unwrap();
        assert_eq!(lo, 1);
        let missing = nl.link_index("nope").unwrap_err();
        assert!(missing.text.contains("nope") && missing.text.contains("ENODEV"), "{missing}");

        let tg0 = nl.link_index("tg0").unwrap();
        nl.set_link_up(tg0, 1380).unwrap();
        assert!(ip("link show tg0").contains("mtu 1380"));
        nl.set_gso_max(tg0, 60_000).unwrap();
        assert!(ip("-d link show tg0").contains("gso_max_size 60000"));

        for address in ["10.9.0.2/24", "fd09::2/64"] {
            let address = net(address);
            for _ in 0..2 {
                nl.add_address(tg0, address).unwrap();
            }
            assert!(nl.addresses(tg0).unwrap().contains(&address));
        }
        let shown = ip("-6 addr show dev tg0");
        assert!(shown.contains("fd09::2/64") && shown.contains("nodad"), "{shown}");
        assert!(!shown.contains("tentative"), "{shown}");
        assert!(ip("route").contains("10.9.0.0/24 dev tg0 proto kernel"));

        // The same IPv6 address with another length takes the old prefix route with it.
        nl.add_address(tg0, net("fd09::2/128")).unwrap();
        assert!(!ip("-6 route").contains("fd09::/64"));
        assert!(nl.addresses(tg0).unwrap().contains(&net("fd09::2/128")));

        for address in ["10.9.0.2/24", "fd09::2/128"] {
            for _ in 0..2 {
                nl.del_address(tg0, net(address)).unwrap();
            }
        }
        assert!(!ip("addr show dev tg0").contains("10.9.0.2"));
        assert!(!ip("addr show dev tg0").contains("fd09::2"));
        let gone = nl.add_address(9_999, net("10.9.0.2/24")).unwrap_err();
        assert!(gone.text.contains("10.9.0.2/24") && gone.exit == Exit::System, "{gone}");
    });
}

#[test]
fn routes_come_and_go_and_are_looked_up() {
    in_namespace(|_| {
        topology();
        let mut nl = Netlink::open().unwrap();
        let tg0 = nl.link_index("tg0").unwrap();
        let up0 = nl.link_index("up0").unwrap();
        for (destination, gateway) in
            [("203.0.113.0/24", "198.51.100.1"), ("2001:db8:9::/48", "2001:db8:1::1")]
        {
            let mut route = Route::new(net(destination), up0);
            route.gateway = Some(addr(gateway));
            route.metric = Some(7);
            nl.add_route(&route).unwrap();
            let shown = ip(if destination.contains(':') { "-6 route" } else { "route" });
            assert!(
                shown.contains(&format!("{destination} via {gateway} dev up0 proto {PROTOCOL} metric 7")),
                "{shown}"
            );
            let twice = nl.add_route(&route).unwrap_err();
            assert!(twice.text.contains(destination) && twice.text.contains("up0"), "{twice}");
            nl.replace_route(&Route { gateway: None, device: tg0, ..route.clone() }).unwrap();
            let found = nl
                .routes(&RouteFilter { protocol: Some(PROTOCOL), device: Some(tg0), ..Default::default() })
                .unwrap();
            assert!(found.iter().any(|r| r.destination == net(destination) && r.gateway.is_none()));
            for _ in 0..2 {
                nl.del_route(&Route { device: 0, gateway: None, ..route.clone() }).unwrap();
            }
            assert!(!ip(if destination.contains(':') { "-6 route" } else { "route" }).contains(destination));
        }
        assert!(
            nl.routes(&RouteFilter { protocol: Some(PROTOCOL), ..Default::default() }).unwrap().is_empty()
        );

        let to = nl.route_to(addr("192.0.2.9")).unwrap().unwrap();
        assert_eq!(
            (to.gateway, to.device, to.source, to.local),
            (Some(addr("198.51.100.1")), up0, Some(addr("198.51.100.2")), false)
        );
        let to = nl.route_to(addr("2001:db8:1::77")).unwrap().unwrap();
        assert_eq!((to.gateway, to.device), (None, up0));
        assert!(nl.route_to(addr("198.51.100.2")).unwrap().unwrap().local);
        ip("route del default");
        assert_eq!(nl.route_to(addr("192.0.2.9")).unwrap(), None);
        ip("-6 route del default");
        assert_eq!(nl.route_to(addr("2001:db8:ffff::1")).unwrap(), None);
        ip("route add blackhole 192.0.2.0/24");
        assert_eq!(nl.route_to(addr("192.0.2.9")).unwrap(), None);

        // A gateway outside every network, as some clouds configure it; and one of the other family.
        ip("route add default via 172.31.1.1 dev up0 onlink");
        ip("route add 192.0.3.0/24 via inet6 2001:db8:1::1 dev up0");
        let to = nl.route_to(addr("192.0.3.1")).unwrap().unwrap();
        assert_eq!(to.gateway, Some(addr("2001:db8:1::1")));
        for (server, gateway) in [("203.0.113.5", "172.31.1.1"), ("192.0.3.1", "2001:db8:1::1")] {
            let mut route = Route::new(addr(server).into(), up0);
            route.gateway = Some(addr(gateway));
            nl.add_route(&route).unwrap();
            assert_eq!(nl.route_to(addr(server)).unwrap().unwrap().gateway, Some(addr(gateway)));
        }
    });
}

#[test]
fn without_privilege_the_error_says_so() {
    in_namespace(|_| {
        topology();
        // This binary again, as nobody, in this namespace; not by its path, which may be below /root.
        let child = Command::new("/proc/self/exe")
            .args(["--exact", "as_nobody", "--ignored", "--nocapture"])
            .current_dir("/")
            .uid(65_534)
            .gid(65_534)
            .output();
        match child {
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stdout);
                assert!(output.status.success() && said.contains("1 passed"), "{said}");
            }
            Err(e) => skip(&format!("nobody may not run this test: {e}")),
        }
    });
}

#[test]
#[ignore = "run by without_privilege_the_error_says_so"]
fn as_nobody() {
    let mut nl = Netlink::open().unwrap();
    let up0 = nl.link_index("up0").unwrap();
    let refused = nl.add_route(&Route::new(net("10.0.0.0/8"), up0)).unwrap_err();
    assert_eq!(refused.exit, Exit::Privilege);
    assert!(refused.text.contains("10.0.0.0/8") && refused.text.contains("root"), "{refused}");
    let refused = sysctl::ensure("net/ipv4/conf/up0/forwarding", "1").unwrap_err();
    assert_eq!(refused.exit, Exit::Privilege);
    let spec = TableSpec {
        device: tg("tg0"),
        networks: Vec::new(),
        nat: true,
        client_to_client: false,
        port: 55555,
    };
    let refused = Table::install(&spec).unwrap_err();
    assert_eq!(refused.exit, Exit::Privilege, "{refused}");
}

#[test]
fn a_full_tunnel_leaves_the_default_route_and_protects_the_server() {
    in_namespace(|dir| {
        topology();
        let state = dir.join("routes.json");
        let before = (ip("route"), ip("-6 route"));
        let (mut nl, tg0) = tunnel();
        let mut keeper = RouteKeeper::new(tg0, &tg("tg0"), state.clone()).unwrap();

        // Covered by nothing yet: nothing to do.
        for server in ["192.0.2.1", "2001:db8:5::1", "198.51.100.9", "::ffff:192.0.2.2"] {
            keeper.protect(addr(server)).unwrap();
        }
        assert!(!state.exists());
        assert!(!ip("route").contains("192.0.2.1"));

        let conflicts =
            keeper.set(&nets(&["0.0.0.0/0", "::/0"]), &[addr("10.9.0.2"), addr("fd09::2")]).unwrap();
        assert_eq!(conflicts, []);
        let (v4, v6) = (ip("route"), ip("-6 route"));
        for half in ["0.0.0.0/1", "128.0.0.0/1"] {
            assert!(v4.contains(&format!("{half} dev tg0 proto {PROTOCOL} scope link src 10.9.0.2")), "{v4}");
        }
        for half in ["::/1", "8000::/1"] {
            assert!(v6.contains(&format!("{half} dev tg0 proto {PROTOCOL} src fd09::2 metric 1")), "{v6}");
        }
        assert!(v4.contains("default via 198.51.100.1 dev up0"), "{v4}");
        assert!(v6.contains("default via 2001:db8:1::1 dev up0"), "{v6}");
        assert!(
            v4.contains(&format!("192.0.2.1 via 198.51.100.1 dev up0 proto {PROTOCOL} metric {tg0}")),
            "{v4}"
        );
        assert!(v4.contains("192.0.2.2 via 198.51.100.1 dev up0"), "{v4}");
        assert!(v4.contains(&format!("198.51.100.9 dev up0 proto {PROTOCOL} scope link")), "{v4}");
        assert!(v6.contains("2001:db8:5::1 via 2001:db8:1::1 dev up0"), "{v6}");
        assert_eq!(device_to(&mut nl, "192.0.2.1"), "up0");
        assert_eq!(device_to(&mut nl, "2001:db8:5::1"), "up0");
        assert_eq!(device_to(&mut nl, "192.0.2.77"), "tg0");
        assert_eq!(device_to(&mut nl, "2001:db8:5::77"), "tg0");
        assert!(state.exists());

        // Again: nothing changes. Fewer routes: the difference goes, and what nothing covers any more.
        keeper.set(&nets(&["0.0.0.0/0", "::/0"]), &[addr("10.9.0.2"), addr("fd09::2")]).unwrap();
        assert_eq!((ip("route"), ip("-6 route")), (v4, v6));
        keeper.set(&nets(&["192.0.2.0/24"]), &[addr("10.9.0.2")]).unwrap();
        let (v4, v6) = (ip("route"), ip("-6 route"));
        assert!(v4.contains("192.0.2.0/24 dev tg0") && !v4.contains("0.0.0.0/1") && !v6.contains("8000::/1"));
        assert!(
            v4.contains("192.0.2.1 via") && !v4.contains("198.51.100.9 ") && !v6.contains("2001:db8:5::1")
        );

        // A new inner address moves the preferred source.
        nl.add_address(tg0, net("10.9.0.3/24")).unwrap();
        keeper.set(&nets(&["192.0.2.0/24"]), &[addr("10.9.0.3")]).unwrap();
        assert!(ip("route").contains("192.0.2.0/24 dev tg0 proto 116 scope link src 10.9.0.3"));
        nl.del_address(tg0, net("10.9.0.3/24")).unwrap();

        keeper.clear().unwrap();
        assert!(!state.exists());
        drop(keeper);
        nl.del_address(tg0, net("10.9.0.2/24")).unwrap();
        nl.del_address(tg0, net("fd09::2/64")).unwrap();
        assert_eq!((ip("route"), ip("-6 route")), before);
    });
}

#[test]
fn a_protected_server_follows_the_network_and_never_enters_the_tunnel() {
    in_namespace(|dir| {
        topology();
        let (mut nl, tg0) = tunnel();
        let mut keeper = RouteKeeper::new(tg0, &tg("tg0"), dir.join("routes.json")).unwrap();
        keeper.set(&nets(&["0.0.0.0/0"]), &[]).unwrap();
        // The tunnel's routes are there first: the lookup must not answer "by the tunnel".
        keeper.protect(addr("192.0.2.1")).unwrap();
        assert_eq!(device_to(&mut nl, "192.0.2.1"), "up0");

        // Another gateway: one host route, by the new one.
        ip("route replace default via 198.51.100.3 dev up0");
        keeper.protect(addr("192.0.2.1")).unwrap();
        let v4 = ip("route");
        assert!(v4.contains("192.0.2.1 via 198.51.100.3 dev up0"), "{v4}");
        assert!(!v4.contains("192.0.2.1 via 198.51.100.1"), "{v4}");

        // No network at all: unreachable, not into the tunnel.
        ip("link set up0 down");
        assert_eq!(nl.route_to(addr("192.0.2.1")).unwrap(), None);
        keeper.protect(addr("192.0.2.1")).unwrap();
        assert_eq!(nl.route_to(addr("192.0.2.1")).unwrap(), None);
        ip("link set up0 up");
        ip("route add default via 198.51.100.4 dev up0");
        keeper.protect(addr("192.0.2.1")).unwrap();
        assert_eq!(nl.route_to(addr("192.0.2.1")).unwrap().unwrap().gateway, Some(addr("198.51.100.4")));

        // No default route any more: not by the old gateway either, though it is still there.
        ip("route del default");
        keeper.follow().unwrap();
        assert_eq!(nl.route_to(addr("192.0.2.1")).unwrap(), None);
        assert!(!ip("route").contains("198.51.100.4"));
        // On-link by now: no gateway.
        ip("route add 192.0.2.0/24 dev up0");
        keeper.follow().unwrap();
        let v4 = ip("route");
        assert!(v4.contains(&format!("192.0.2.1 dev up0 proto {PROTOCOL} scope link metric {tg0}")), "{v4}");

        keeper.unprotect(addr("192.0.2.1")).unwrap();
        let v4 = ip("route");
        assert!(!v4.contains("192.0.2.1"), "{v4}");

        // The same with IPv6, where a route with a gateway and one without are of two kinds to the kernel.
        keeper.set(&nets(&["::/0"]), &[]).unwrap();
        keeper.protect(addr("2001:db8:5::1")).unwrap();
        for (change, way) in [
            ("route replace default via 2001:db8:1::3 dev up0", "2001:db8:5::1 via 2001:db8:1::3 dev up0"),
            ("route add 2001:db8:5::/64 dev up0", "2001:db8:5::1 dev up0"),
            ("route del 2001:db8:5::/64 dev up0", "2001:db8:5::1 via 2001:db8:1::3 dev up0"),
        ] {
            ip(&format!("-6 {change}"));
            keeper.follow().unwrap();
            let v6 = ip("-6 route");
            let ours: Vec<&str> =
                v6.lines().filter(|l| l.starts_with("2001:db8:5::1 ") && l.contains("proto 116")).collect();
            assert!(ours.len() == 1 && ours[0].starts_with(way), "{change}: {ours:?}");
        }
        drop(keeper);
        assert!(!ip("route").contains("proto 116"));
    });
}

#[test]
fn a_change_of_the_network_is_heard_of() {
    in_namespace(|_| {
        topology();
        let (mut nl, tg0) = tunnel();
        await_all_carriers();
        let mut monitor = Monitor::open(tg0).unwrap();
        assert!(!monitor.changed().unwrap(), "nothing yet");
        for change in [
            "link add up1 type veth peer name up1p",
            "link set up1 up",
            "link set up1p up",
            "addr add 192.0.2.9/32 dev up1",
            "route add 203.0.113.0/24 dev up1",
            "route del 203.0.113.0/24 dev up1",
            "route replace default via 198.51.100.3 dev up0",
            "-6 route replace default via 2001:db8:1::3 dev up0",
            "addr del 192.0.2.9/32 dev up1",
            "link set up1p down",
            "link del up1",
        ] {
            ip(change);
            assert!(hears(&mut monitor), "{change}");
        }
        // More than the socket holds: some of it is lost, and that is a change.
        for _ in 0..3_000 {
            let mut route = Route::new(net("203.0.113.0/24"), nl.link_index("up0").unwrap());
            route.protocol = 4;
            nl.add_route(&route).unwrap();
            nl.del_route(&route).unwrap();
        }
        assert!(hears(&mut monitor));
    });
}

#[test]
fn our_own_changes_are_not_heard_of() {
    in_namespace(|dir| {
        topology();
        let (mut nl, tg0) = tunnel();
        await_all_carriers();
        let mut monitor = Monitor::open(tg0).unwrap();
        nl.add_address(tg0, net("10.9.0.7/24")).unwrap();
        nl.set_link_up(tg0, 1300).unwrap();
        let mut keeper = RouteKeeper::new(tg0, &tg("tg0"), dir.join("routes.json")).unwrap();
        keeper.protect(addr("192.0.2.1")).unwrap();
        keeper.protect(addr("2001:db8:5::1")).unwrap();
        keeper.set(&nets(&["0.0.0.0/0", "::/0"]), &[]).unwrap();
        drop(keeper);
        nl.del_address(tg0, net("10.9.0.7/24")).unwrap();
        assert!(!monitor.changed().unwrap());
    });
}

#[test]
fn the_ways_to_a_server_are_found() {
    in_namespace(|dir| {
        topology();
        second_uplink();
        let (mut nl, tg0) = tunnel();
        let mut keeper = RouteKeeper::new(tg0, &tg("tg0"), dir.join("routes.json")).unwrap();
        await_carrier("up0", true);
        await_carrier("up1", true);
        let ways = |nl: &mut Netlink, server: &str, wanted: Option<&[&str]>| -> Vec<String> {
            let wanted: Option<Vec<DeviceName>> = wanted.map(|names| names.iter().map(|n| tg(n)).collect());
            let ways = ways_to(nl, addr(server), tg0, wanted.as_deref()).unwrap();
            ways.iter().map(|way| format!("{} {} {}", way.name, way.source, way.metric)).collect()
        };
        let both = ["up0 198.51.100.2 0", "up1 192.0.3.2 50"];
        let both_v6 = ["up0 2001:db8:1::2 1024", "up1 2001:db8:3::2 2000"];
        assert_eq!(ways(&mut nl, "192.0.2.1", None), both);
        assert_eq!(ways(&mut nl, "2001:db8:5::1", None), both_v6);
        // A more specific route comes first, and what is on a link is reached by that one best.
        ip("route add 203.0.113.0/24 via 192.0.3.1 dev up1 metric 900");
        assert_eq!(ways(&mut nl, "203.0.113.5", None), ["up1 192.0.3.2 900", "up0 198.51.100.2 0"]);
        assert_eq!(ways(&mut nl, "192.0.3.77", None), ["up1 192.0.3.2 0", "up0 198.51.100.2 0"]);
        assert_eq!(ways(&mut nl, "127.0.0.1", None), ["lo 127.0.0.1 0"]);
        assert_eq!(ways(&mut nl, "198.51.100.2", None), ["lo 198.51.100.2 0"]);
        // Wanted ones in their order, and no others.
        assert_eq!(ways(&mut nl, "192.0.2.1", Some(&["up1", "up0"])), [both[1], both[0]]);
        assert_eq!(ways(&mut nl, "192.0.2.1", Some(&["nope", "up1", "tg0", "lo"])), [both[1]]);
        assert_eq!(ways(&mut nl, "192.0.2.1", Some(&["nope"])), [""; 0]);

        // Just the same with the server kept out of the tunnel: each link has its own host route.
        keeper.set(&nets(&["0.0.0.0/0", "::/0"]), &[addr("10.9.0.2"), addr("fd09::2")]).unwrap();
        for server in ["192.0.2.1", "2001:db8:5::1"] {
            keeper.protect(addr(server)).unwrap();
        }
        let v4 = ip("route");
        let second = tg0 + (1 << 16);
        assert!(v4.contains(&format!("192.0.2.1 via 198.51.100.1 dev up0 proto 116 metric {tg0}")), "{v4}");
        assert!(v4.contains(&format!("192.0.2.1 via 192.0.3.1 dev up1 proto 116 metric {second}")), "{v4}");
        assert_eq!(ways(&mut nl, "192.0.2.1", None), both);
        assert_eq!(ways(&mut nl, "2001:db8:5::1", None), both_v6);
        assert_eq!(device_to(&mut nl, "192.0.2.1"), "up0");

        // A link without a carrier leads nowhere, though its routes stay.
        ip("link set up0p down");
        await_carrier("up0", false);
        keeper.follow().unwrap();
        assert_eq!(ways(&mut nl, "192.0.2.1", None), [both[1]]);
        assert_eq!(ways(&mut nl, "2001:db8:5::1", None), [both_v6[1]]);
        assert_eq!(device_to(&mut nl, "192.0.2.1"), "up1");
        let v4 = ip("route");
        assert!(!v4.contains("192.0.2.1 via 198.51.100.1"), "{v4}");
        ip("link set up0p up");
        await_carrier("up0", true);
        keeper.follow().unwrap();
        assert_eq!(ways(&mut nl, "192.0.2.1", None), both);

        // A link without an address has nothing to send from; nor has one whose address may yet be another's.
        ip("addr del 198.51.100.2/24 dev up0");
        ip("addr del 2001:db8:3::2/64 dev up1");
        sysctl::ensure("net/ipv6/conf/up1/accept_dad", "1").unwrap();
        sysctl::ensure("net/ipv6/conf/up1/dad_transmits", "60").unwrap();
        ip("addr add 2001:db8:3::2/64 dev up1");
        ip("-6 route replace default via 2001:db8:3::1 dev up1 metric 2000");
        keeper.follow().unwrap();
        assert!(ip("-6 addr show dev up1").contains("tentative"));
        assert_eq!(ways(&mut nl, "192.0.2.1", None), [both[1]]);
        assert_eq!(ways(&mut nl, "2001:db8:5::1", None), [both_v6[0]]);

        // No way at all: not by the tunnel either.
        ip("link set up1 down");
        keeper.follow().unwrap();
        assert_eq!(ways(&mut nl, "192.0.2.1", None), [""; 0]);
        assert_eq!(nl.route_to(addr("192.0.2.1")).unwrap(), None);
        drop(keeper);
        assert!(!ip("route").contains("proto 116") && !ip("-6 route").contains("proto 116"));
    });
}

#[test]
fn each_next_hop_of_a_route_is_a_way() {
    in_namespace(|_| {
        topology();
        second_uplink();
        await_carrier("up0", true);
        await_carrier("up1", true);
        let (mut nl, tg0) = tunnel();
        ip("route add 203.0.113.0/24 nexthop via 192.0.3.1 dev up1 nexthop via 198.51.100.1 dev up0");
        ip(
            "-6 route add 2001:db8:9::/48 nexthop via 2001:db8:3::1 dev up1 nexthop via 2001:db8:1::1 dev up0",
        );
        for server in ["203.0.113.5", "2001:db8:9::5"] {
            let mut names: Vec<String> =
                ways_to(&mut nl, addr(server), tg0, None).unwrap().into_iter().map(|way| way.name).collect();
            names.sort();
            assert_eq!(names, ["up0", "up1"], "{server}");
        }
    });
}

#[test]
fn foreign_routes_stay_and_conflicts_are_named() {
    in_namespace(|dir| {
        topology();
        let (_, tg0) = tunnel();
        ip("route add 192.0.2.1 via 198.51.100.1 dev up0");
        ip(&format!("route add 192.0.2.2 via 198.51.100.1 dev up0 metric {tg0}"));
        ip("route add 172.16.0.0/12 via 198.51.100.1 dev up0");
        let before = ip("route");
        let mut keeper = RouteKeeper::new(tg0, &tg("tg0"), dir.join("routes.json")).unwrap();
        keeper.protect(addr("192.0.2.1")).unwrap();
        keeper.protect(addr("192.0.2.2")).unwrap();
        let wanted =
            nets(&["192.0.2.0/24", "172.16.0.0/12", "192.0.2.1/32", "198.51.100.0/24", "10.9.0.0/24"]);
        let conflicts = keeper.set(&wanted, &[]).unwrap();
        let destinations: Vec<IpNet> = conflicts.iter().map(|c| c.destination).collect();
        assert_eq!(destinations, nets(&["192.0.2.1/32", "172.16.0.0/12", "198.51.100.0/24"]));
        assert_eq!(conflicts[0], Conflict { destination: net("192.0.2.1/32"), holder: None });
        let said = conflicts[1].to_string();
        assert!(said.contains("172.16.0.0/12 via 198.51.100.1 dev up0"), "{said}");
        assert!(ip("route").contains("192.0.2.0/24 dev tg0"));
        keeper.clear().unwrap();
        assert_eq!(ip("route"), before);
    });
}

#[test]
fn a_killed_clients_host_routes_are_repaired() {
    in_namespace(|dir| {
        topology();
        let state = dir.join("deep/routes.json");
        let (_, tg0) = tunnel();
        await_all_carriers();
        let before = (ip("route"), ip("-6 route"));
        let killed = || {
            let mut keeper = RouteKeeper::new(tg0, &tg("tg0"), state.clone()).unwrap();
            keeper.protect(addr("192.0.2.1")).unwrap();
            keeper.protect(addr("2001:db8:5::1")).unwrap();
            keeper.set(&nets(&["0.0.0.0/0", "::/0"]), &[]).unwrap();
            // What SIGKILL leaves: no drop. The device goes with its process, and its routes with it.
            std::mem::forget(keeper);
            let mut nl = Netlink::open().unwrap();
            for route in nl.routes(&RouteFilter { device: Some(tg0), ..Default::default() }).unwrap() {
                if route.protocol == PROTOCOL {
                    nl.del_route(&route).unwrap();
                }
            }
        };
        killed();
        assert!(ip("route").contains("192.0.2.1 via"));
        // The next start does it by itself.
        killed();
        routes::repair(&state).unwrap();
        assert_eq!((ip("route"), ip("-6 route")), before);
        assert!(!state.exists());
        routes::repair(&state).unwrap();

        // Damaged files and those of another boot are passed over.
        for text in ["{", &format!("{{\"boot_id\":\"x\",\"device\":\"tg0\",\"host_routes\":[{}]}}", FOREIGN)]
        {
            ip("route replace 192.0.2.1 via 198.51.100.1 dev up0 proto 116 metric 5");
            fs::write(&state, text).unwrap();
            routes::repair(&state).unwrap();
            assert!(ip("route").contains("192.0.2.1 via") && !state.exists());
        }
    });
}

const FOREIGN: &str = r#"{"destination":"192.0.2.1/32","gateway":null,"device":2,"metric":5,"source":null,
    "protocol":116,"kind":"Unicast"}"#;

#[test]
fn forwarding_is_put_back_with_all_its_side_effects() {
    in_namespace(|dir| {
        topology();
        let state = dir.join("forwarding.json");
        sysctl::ensure("net/ipv4/conf/all/accept_redirects", "0").unwrap();
        sysctl::ensure("net/ipv4/conf/tg0/forwarding", "1").unwrap();
        sysctl::ensure("net/ipv6/conf/tg0p/forwarding", "1").unwrap();
        sysctl::ensure("net/ipv6/conf/up0/accept_ra", "1").unwrap();
        sysctl::ensure("net/ipv6/conf/up0p/accept_ra", "0").unwrap();
        let before = settings();

        let forwarding = Forwarding::enable(true, true, &state).unwrap();
        assert_eq!(get("net/ipv4/ip_forward"), "1");
        assert_eq!(get("net/ipv6/conf/all/forwarding"), "1");
        assert_eq!(get("net/ipv6/conf/up0/accept_ra"), "2");
        assert_eq!(get("net/ipv6/conf/up0p/accept_ra"), "0");
        forwarding.restore().unwrap();
        assert_eq!(settings(), before);
        assert!(!state.exists());

        // Killed: the next run finds it on, and still puts it back.
        leave_as_killed(Forwarding::enable(true, true, &state).unwrap(), &state);
        assert_eq!(get("net/ipv4/ip_forward"), "1");
        let next = Forwarding::enable(true, true, &state).unwrap();
        assert_eq!(get("net/ipv6/conf/up0/accept_ra"), "2");
        drop(next);
        assert_eq!(settings(), before);

        // Two servers: the last one out.
        let first = Forwarding::enable(true, false, &state).unwrap();
        let second = Forwarding::enable(true, true, &state).unwrap();
        drop(first);
        assert_eq!(get("net/ipv4/ip_forward"), "1");
        drop(second);
        assert_eq!(settings(), before);

        // What somebody else changed meanwhile is theirs.
        let forwarding = Forwarding::enable(false, true, &state).unwrap();
        sysctl::ensure("net/ipv6/conf/up0/accept_ra", "0").unwrap();
        forwarding.restore().unwrap();
        assert_eq!(get("net/ipv6/conf/up0/accept_ra"), "0");
        assert_eq!(get("net/ipv6/conf/all/forwarding"), "0");

        // On already: nothing to write, so a read-only /proc/sys does no harm; off, it is an error to act on.
        sysctl::ensure("net/ipv4/ip_forward", "1").unwrap();
        let none = None::<&str>;
        mount(Some("/proc/sys"), "/proc/sys", none, MsFlags::MS_BIND | MsFlags::MS_REC, none).unwrap();
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, "/proc/sys", none, read_only, none).unwrap();
        Forwarding::enable(true, false, &state).unwrap().restore().unwrap();
        assert_eq!(get("net/ipv4/ip_forward"), "1");
        let refused = Forwarding::enable(true, true, &state).unwrap_err();
        assert_eq!(refused.exit, Exit::Privilege);
        assert!(refused.text.contains("read-only") && refused.text.contains("--sysctl"), "{refused}");
    });
}

#[test]
fn a_router_advertised_default_route_survives_forwarding() {
    in_namespace(|dir| {
        topology();
        fresh("/run");
        ip("-6 route del default");
        ip("netns add router");
        ip("link set up0p netns router");
        ip("-n router link set up0p up");
        ip("-n router addr add fe80::99/64 dev up0p nodad");
        sysctl::ensure("net/ipv6/conf/up0/accept_ra", "1").unwrap();
        // RFC 4861, 4.2: type, code, checksum (by the kernel), hop limit, flags, lifetime 1,800 s, timers.
        let advertisement = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
        let learned = || ip("-6 route").contains("default via fe80::99 dev up0 proto ra");
        let learn = || {
            let mut tries = 0;
            while !learned() {
                within("router", move || {
                    use socket2::{Domain, Protocol, Socket, Type};
                    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
                    socket.set_multicast_hops_v6(255).unwrap();
                    let index = nix::net::if_::if_nametoindex("up0p").unwrap();
                    socket.bind(&SocketAddrV6::new("fe80::99".parse().unwrap(), 0, 0, index).into()).unwrap();
                    let everyone = SocketAddrV6::new("ff02::1".parse().unwrap(), 0, 0, index);
                    socket.send_to(&advertisement, &everyone.into()).unwrap();
                });
                tries += 1;
                assert!(tries < 100, "no default route from an advertisement");
                thread::sleep(Duration::from_millis(20));
            }
        };

        // Without care it is lost: this is why.
        learn();
        sysctl::ensure("net/ipv6/conf/all/forwarding", "1").unwrap();
        assert!(!learned());
        sysctl::ensure("net/ipv6/conf/all/forwarding", "0").unwrap();

        learn();
        let forwarding = Forwarding::enable(false, true, &dir.join("forwarding.json")).unwrap();
        assert!(learned());
        forwarding.restore().unwrap();
        assert!(learned());
    });
}

#[test]
fn the_table_is_what_it_should_be() {
    in_namespace(|_| {
        topology();
        let spec = TableSpec {
            device: tg("tg0"),
            networks: nets(&["10.9.0.0/24", "fd09::/64"]),
            nat: true,
            client_to_client: false,
            port: 55555,
        };
        let table = Table::install(&spec).unwrap();
        let chains = chains(&spec);
        assert_eq!(chains, ["forward/forward/0", "forward_mss/forward/-150", "postrouting/postrouting/100"]);
        let rules = rules(&spec);
        let text = rules.join("\n");
        assert_eq!(rules.len(), 7, "{text}");
        assert!(rules[0].contains(r#""reject":{"expr":"admin-prohibited","type":"icmpx"}"#), "{text}");
        assert!(rules[0].contains(r#""counter""#), "{text}");
        assert!(rules[1].contains("iifname") && rules[2].contains("oifname"), "{text}");
        assert!(rules[1..3].iter().all(|r| r.contains("maxseg") && r.contains(r#""key":"mtu""#)), "{text}");
        let of = |net: &str, rules: &[String]| rules.iter().all(|rule| rule.contains(net));
        assert!(of("10.9.0.0", &rules[3..5]) && of("fd09::", &rules[5..]), "{text}");
        // With ports, not the server's own; and what has none.
        assert!(of(r#""range":[1024,55554]"#, &[rules[3].clone(), rules[5].clone()]), "{text}");
        assert!(rules[3..].iter().all(|r| r.contains("masquerade") && r.contains(r#""op":"!=""#)), "{text}");

        // A crash leaves the table; the next start replaces all of it.
        std::mem::forget(table);
        nft("add rule inet tunguard_tg0 forward_mss drop");
        let open = TableSpec { nat: false, client_to_client: true, ..spec.clone() };
        let table = Table::install(&open).unwrap();
        assert_eq!(self::chains(&open), ["forward_mss/forward/-150"]);
        assert_eq!(self::rules(&open).len(), 2);

        // Other tables are nobody's business, and a table that is gone is no error.
        nft("add table inet other");
        table.remove().unwrap();
        assert_eq!(nft("list tables").trim(), "table inet other");
        let table = Table::install(&spec).unwrap();
        nft("flush ruleset");
        drop(table);

        // Device names that look alike, and one that looks like an option.
        let alike: Vec<Table> = ["a-b", "a.b", "a_b", "-h", "0", ".x"]
            .map(|name| Table::install(&TableSpec { device: tg(name), ..spec.clone() }).unwrap())
            .into_iter()
            .collect();
        let listed = nft("list tables");
        assert_eq!(listed.lines().count(), 6, "{listed}");
        assert!(listed.contains("tunguard_a-b") && listed.contains("tunguard_.x"), "{listed}");
        drop(alike);
        assert_eq!(nft("list tables"), "");
    });
}

/// ```text
///  client 10.9.0.2 [tg0p]---[tg0 10.9.0.1  this namespace  up0 198.51.100.2]---[up0p] world 198.51.100.9
/// ```
#[test]
fn the_table_does_what_it_should() {
    in_namespace(|dir| {
        topology();
        fresh("/run");
        for (space, device, addresses) in [
            ("client", "tg0p", ["10.9.0.2/24", "fd09::2/64"]),
            ("world", "up0p", ["198.51.100.9/24", "2001:db8:1::9/64"]),
        ] {
            ip(&format!("netns add {space}"));
            ip(&format!("link set {device} netns {space}"));
            for address in addresses {
                let nodad = if address.contains(':') { "nodad" } else { "" };
                ip(&format!("-n {space} addr add {address} dev {device} {nodad}"));
            }
            ip(&format!("-n {space} link set {device} up"));
        }
        let mut nl = Netlink::open().unwrap();
        let tg0 = nl.link_index("tg0").unwrap();
        nl.add_address(tg0, net("10.9.0.1/24")).unwrap();
        nl.add_address(tg0, net("fd09::1/64")).unwrap();
        nl.set_link_up(tg0, 1_380).unwrap();
        for (gateway, other) in [("10.9.0.1", "10.9.0.77"), ("fd09::1", "fd09::77")] {
            ip(&format!("-n client route add default via {gateway}"));
            ip(&format!("-n client route add {other} via {gateway}"));
        }
        let _forwarding = Forwarding::enable(true, true, &dir.join("forwarding.json")).unwrap();
        let spec = TableSpec {
            device: tg("tg0"),
            networks: nets(&["10.9.0.0/24", "fd09::/64"]),
            nat: true,
            client_to_client: false,
            port: 55555,
        };
        let table = Table::install(&spec).unwrap();

        // One client to another: refused at once, with an ICMP error.
        for other in ["10.9.0.77", "fd09::77"] {
            let refused = within("client", move || ask(addr(other)).unwrap_err());
            // ICMP_PKT_FILTERED and ICMPV6_ADM_PROHIBITED in the kernel's tables of errors.
            let errno = if other.contains(':') { nix::libc::EACCES } else { nix::libc::EHOSTUNREACH };
            assert_eq!(refused.raw_os_error(), Some(errno), "{other}: {refused}");
        }

        // To the world, which has no route back to 10.9.0.0/24: by the server's address.
        for (world, ours) in [("198.51.100.9", "198.51.100.2"), ("2001:db8:1::9", "2001:db8:1::2")] {
            let socket = within("world", move || UdpSocket::bind((addr(world), 7)).unwrap());
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let asker = thread::spawn(move || within("client", move || ask(addr(world))));
            let (length, from) = socket.recv_from(&mut [0; 9]).unwrap();
            assert_eq!((length, from.ip()), (1, addr(ours)));
            socket.send_to(b"!", from).unwrap();
            asker.join().unwrap().unwrap();
        }

        // A SYN leaves the client with an MSS for its 1,500 byte link, and arrives with one for the tunnel.
        let script = dir.join("script");
        let counted = "table inet t { chain c { type filter hook input priority 0;\n\
                       tcp flags syn tcp option maxseg size 1340 counter accept\n}\n}\n";
        fs::write(&script, counted).unwrap();
        ip(&format!("netns exec world /usr/sbin/nft -f {}", script.display()));
        let listener = within("world", || TcpListener::bind("198.51.100.9:80").unwrap());
        within("client", || TcpStream::connect("198.51.100.9:80").unwrap());
        drop(listener);
        let seen = ip("netns exec world /usr/sbin/nft list table inet t");
        assert!(seen.contains("packets 1 "), "{seen}");
        drop(table);
    });
}

/// ```text
///  near 10.9.0.2 [tg0p]---[tg0 10.9.0.1  this namespace  up0, MTU 1300]---[up0p] far 198.51.100.9
/// ```
#[test]
fn probes_are_fragmented_nowhere_and_data_is() {
    in_namespace(|dir| {
        topology();
        fresh("/run");
        for (space, device, addresses) in [
            ("near", "tg0p", ["10.9.0.2/24", "fd09::2/64"]),
            ("far", "up0p", ["198.51.100.9/24", "2001:db8:1::9/64"]),
        ] {
            ip(&format!("netns add {space}"));
            ip(&format!("link set {device} netns {space}"));
            for address in addresses {
                let nodad = if address.contains(':') { "nodad" } else { "" };
                ip(&format!("-n {space} addr add {address} dev {device} {nodad}"));
            }
            ip(&format!("-n {space} link set {device} up"));
        }
        ip("addr add 10.9.0.1/24 dev tg0");
        ip("addr add fd09::1/64 dev tg0 nodad");
        ip("link set up0 mtu 1300");
        ip("-n near route add default via 10.9.0.1");
        ip("-n near route add default via fd09::1");
        let _forwarding = Forwarding::enable(true, true, &dir.join("forwarding.json")).unwrap();

        for (bound, far, headers) in [
            ("0.0.0.0:0", "198.51.100.9", 28),
            ("[::]:0", "198.51.100.9", 28),
            ("[::]:0", "2001:db8:1::9", 48),
        ] {
            let receiver = within("far", move || UdpSocket::bind((addr(far), 0)).unwrap());
            receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let path = path::Path::new(receiver.local_addr().unwrap(), None);
            let socket = within("near", move || udp::bind_shared(bound.parse().unwrap()).unwrap());
            let carrier = Carrier::new(socket.into()).unwrap();
            let bytes = [7; 3_000];
            let of = |mtu: usize| &bytes[..mtu - headers];
            let data = |mtu: usize| carrier.send(&path, 0, of(mtu), mtu - headers).unwrap();
            // Whether a datagram arrived before a small one that was sent after it.
            let arrives = |mtu: usize| {
                let mut buffer = [0; 3_000];
                data(headers + 1);
                let mut length = receiver.recv(&mut buffer).unwrap();
                let arrived = length == mtu - headers;
                if arrived {
                    length = receiver.recv(&mut buffer).unwrap();
                }
                assert_eq!(length, 1);
                arrived
            };

            carrier.send_whole(&path, of(1_300)).unwrap();
            assert!(arrives(1_300), "{bound} to {far}");
            // More than once, as this host learns how narrow the path is.
            for mtu in [1_301, 1_301, 1_500] {
                carrier.send_whole(&path, of(mtu)).unwrap();
                assert!(!arrives(mtu), "{bound} to {far}: {mtu}");
            }
            let refused = carrier.send_whole(&path, of(1_501)).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(nix::libc::EMSGSIZE), "{bound} to {far}");
            assert!(!arrives(1_501));
            for mtu in [1_301, 1_500, 2_500] {
                data(mtu);
                assert!(arrives(mtu), "{bound} to {far}: {mtu} as data");
            }
        }
    });
}

/// Sends one datagram and waits for an answer or an error.
fn ask(to: IpAddr) -> std::io::Result<()> {
    let socket = UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.connect((to, 7))?;
    socket.send(b"?")?;
    socket.recv(&mut [0; 9]).map(drop)
}

/// Runs `what` in a named network namespace (of this mount namespace).
fn within<T: Send + 'static>(space: &str, what: impl FnOnce() -> T + Send + 'static) -> T {
    let space = fs::File::open(format!("/run/netns/{space}")).unwrap();
    thread::spawn(move || {
        setns(space, CloneFlags::CLONE_NEWNET).unwrap();
        what()
    })
    .join()
    .unwrap()
}

#[test]
fn a_missing_or_failing_nft_is_named() {
    in_namespace(|_| {
        let spec = TableSpec {
            device: tg("tg0"),
            networks: Vec::new(),
            nat: true,
            client_to_client: false,
            port: 55555,
        };
        fresh("/usr/local/sbin");
        // Wherever it is, it is no program any more.
        let none = None::<&str>;
        for directory in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .chain(["/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from))
        {
            let file = directory.join("nft");
            if file.is_file() {
                mount(Some("/dev/null"), &file, none, MsFlags::MS_BIND, none).unwrap();
            }
        }
        let missing = Table::install(&spec).unwrap_err();
        assert_eq!(missing.exit, Exit::MissingProgram);
        assert!(missing.text.contains("apt install nftables"), "{missing}");

        script(Path::new("/usr/local/sbin/nft"), "echo 'Error: syntax error' >&2; exit 1");
        let failed = Table::install(&spec).unwrap_err();
        assert!(failed.text.contains("Error: syntax error"), "{failed}");
        assert!(failed.text.contains("tunguard_tg0"), "{failed}");
    });
}

#[test]
fn resolv_conf_is_replaced_and_comes_back() {
    in_namespace(|dir| {
        fresh("/etc");
        let (file, state) = (Path::new("/etc/resolv.conf"), dir.join("dns.json"));
        let servers = [addr("10.9.0.1"), addr("fd09::1")];
        let apply = || DnsKeeper::apply(&tg("tg0"), 7, &servers, state.clone()).unwrap().unwrap();
        let original = "search lan\noptions edns0\nnameserver 192.0.2.53\n";
        let mode = || fs::metadata(file).unwrap().permissions().mode() & 0o777;

        assert!(DnsKeeper::apply(&tg("tg0"), 7, &[], state.clone()).unwrap().is_none());

        fs::write(file, original).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o640)).unwrap();
        let keeper = apply();
        let ours = fs::read_to_string(file).unwrap();
        let lines: Vec<&str> = ours.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(lines, ["nameserver 10.9.0.1", "nameserver fd09::1", "options edns0"]);
        assert_eq!(mode(), 0o644);
        keeper.clear().unwrap();
        assert_eq!((fs::read_to_string(file).unwrap().as_str(), mode()), (original, 0o640));
        assert!(!state.exists());

        // Killed, and killed again: the first original is the one that comes back.
        std::mem::forget(apply());
        std::mem::forget(apply());
        dns::repair(&state).unwrap();
        assert_eq!(fs::read_to_string(file).unwrap(), original);

        // Somebody else wrote it: it is theirs.
        let keeper = apply();
        fs::write(file, "nameserver 192.0.2.99\n").unwrap();
        keeper.clear().unwrap();
        assert_eq!(fs::read_to_string(file).unwrap(), "nameserver 192.0.2.99\n");

        // A link comes back as a link, and its target is never written.
        fs::write("/etc/target", original).unwrap();
        fs::remove_file(file).unwrap();
        symlink("target", file).unwrap();
        let keeper = apply();
        assert!(!fs::symlink_metadata(file).unwrap().is_symlink());
        assert_eq!(fs::read_to_string("/etc/target").unwrap(), original);
        drop(keeper);
        assert_eq!(fs::read_link(file).unwrap(), Path::new("target"));

        // Missing before: missing after.
        fs::remove_file(file).unwrap();
        apply().clear().unwrap();
        assert!(!file.exists());

        // A bind mount, as in containers: written in place.
        fs::write(file, "").unwrap();
        let none = None::<&str>;
        mount(Some("/etc/target"), file, none, MsFlags::MS_BIND, none).unwrap();
        let keeper = apply();
        assert!(fs::read_to_string("/etc/target").unwrap().contains("10.9.0.1"));
        keeper.clear().unwrap();
        assert_eq!(fs::read_to_string("/etc/target").unwrap(), original);
        let left: Vec<_> = fs::read_dir("/etc").unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    });
}

#[test]
fn resolved_and_resolvconf_get_arguments_not_shell() {
    in_namespace(|dir| {
        topology();
        fresh("/etc");
        fresh("/run");
        fresh("/usr/local/bin");
        fresh("/usr/local/sbin");
        let mut nl = Netlink::open().unwrap();
        let index = nl.link_index("tg0").unwrap();
        let (state, log) = (dir.join("dns.json"), dir.join("log"));
        let says = format!("echo \"$0 $*\" >> {0}; cat >> {0}", log.display());
        let servers = [addr("10.9.0.1"), addr("fd09::1")];
        let took =
            || fs::read_to_string(&log).inspect(|_| fs::remove_file(&log).unwrap()).unwrap_or_default();

        script(Path::new("/usr/local/sbin/resolvconf"), &says);
        fs::write("/etc/resolv.conf", "nameserver 127.0.0.53\n").unwrap();
        let keeper = DnsKeeper::apply(&tg("tg0"), index, &servers, state.clone()).unwrap().unwrap();
        assert_eq!(
            took(),
            "/usr/local/sbin/resolvconf -a tun.tg0 -m 0 -x\nnameserver 10.9.0.1\nnameserver fd09::1\n"
        );
        keeper.clear().unwrap();
        assert_eq!(took(), "/usr/local/sbin/resolvconf -d tun.tg0\n");

        fs::create_dir_all("/run/systemd/resolve").unwrap();
        script(Path::new("/usr/local/bin/resolvectl"), &says);
        let keeper = DnsKeeper::apply(&tg("tg0"), index, &servers, state.clone()).unwrap().unwrap();
        let program = "/usr/local/bin/resolvectl";
        assert_eq!(
            took(),
            format!(
                "{program} dns {index} 10.9.0.1 fd09::1\n{program} domain {index} ~.\n\
                 {program} default-route {index} yes\n"
            )
        );
        std::mem::forget(keeper);
        dns::repair(&state).unwrap();
        assert_eq!(took(), format!("{program} revert {index}\n"));
        assert_eq!(fs::read_to_string("/etc/resolv.conf").unwrap(), "nameserver 127.0.0.53\n");

        // A failure is quoted, and undone.
        script(
            Path::new(program),
            &format!("{says}; [ $1 != domain ] || {{ echo no such link >&2; exit 1; }}"),
        );
        let failed = DnsKeeper::apply(&tg("tg0"), index, &servers, state.clone()).unwrap_err();
        assert!(failed.text.contains("no such link") && failed.text.contains("domain"), "{failed}");
        assert!(took().ends_with(&format!("revert {index}\n")) && !state.exists());

        // A resolved that nobody asks doesn't count.
        fs::write("/etc/resolv.conf", "nameserver 192.0.2.53\n").unwrap();
        drop(DnsKeeper::apply(&tg("tg0"), index, &servers, state.clone()).unwrap());
        assert!(took().starts_with("/usr/local/sbin/resolvconf -a"));
    });
}

#[test]
fn a_quiet_device_has_no_link_local_address() {
    in_namespace(|_| {
        ip("link add tg0.1 type veth peer name p");
        quiet_device(&tg("tg0.1"));
        quiet_device(&tg("nope"));
        ip("link set p up");
        ip("link set tg0.1 up");
        await_carrier("p", true);
        // The other end has one; this end has no address at all, so it isn't listed.
        let shown = ip("-6 addr show");
        assert!(shown.contains("p@tg0.1") && shown.contains("fe80"), "{shown}");
        assert!(!shown.contains(": tg0.1@"), "{shown}");
        assert_eq!(get("net/ipv6/conf/tg0.1/accept_ra"), "0");
        assert_eq!(get("net/ipv6/conf/tg0.1/router_solicitations"), "0");
    });
}

/// Runs `test` in a thread with namespaces of its own and an empty directory.
fn in_namespace(test: impl FnOnce(&Path) + Send + 'static) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    // Under the test's name, for `skip`.
    let name = thread::current().name().unwrap_or("a test").to_owned();
    let body = move || {
        let none = None::<&str>;
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
        {
            return skip(&format!("no namespace of my own ({e}): run as root"));
        }
        ip("link set lo up");
        test(&path);
    };
    let result = thread::Builder::new().name(name).spawn(body).unwrap().join();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

fn skip(why: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}");
    println!("SKIPPED: {why}");
    // For `make test`, which counts and names what was skipped.
    if let Some(list) = std::env::var_os("TUNGUARD_SKIPPED_FILE") {
        let mut file = fs::File::options().create(true).append(true).open(list).unwrap();
        writeln!(file, "{}: {why}", thread::current().name().unwrap_or("a test")).unwrap();
    }
}

fn topology() {
    ip("link add up0 type veth peer name up0p");
    ip("link add tg0 type veth peer name tg0p");
    quiet_device(&tg("tg0"));
    for device in ["up0", "up0p", "tg0", "tg0p"] {
        sysctl::ensure(&format!("net/ipv6/conf/{device}/accept_dad"), "0").unwrap();
        sysctl::ensure(&format!("net/ipv6/conf/{device}/keep_addr_on_down"), "1").unwrap();
        ip(&format!("link set {device} up"));
    }
    ip("addr add 198.51.100.2/24 dev up0");
    ip("addr add 2001:db8:1::2/64 dev up0 nodad");
    ip("route add default via 198.51.100.1 dev up0");
    ip("-6 route add default via 2001:db8:1::1 dev up0");
}

/// A second link, worse than the first.
fn second_uplink() {
    ip("link add up1 type veth peer name up1p");
    for device in ["up1", "up1p"] {
        sysctl::ensure(&format!("net/ipv6/conf/{device}/accept_dad"), "0").unwrap();
        sysctl::ensure(&format!("net/ipv6/conf/{device}/keep_addr_on_down"), "1").unwrap();
        ip(&format!("link set {device} up"));
    }
    ip("addr add 192.0.3.2/24 dev up1");
    ip("addr add 2001:db8:3::2/64 dev up1 nodad");
    ip("route add default via 192.0.3.1 dev up1 metric 50");
    ip("-6 route add default via 2001:db8:3::1 dev up1 metric 2000");
}

/// Waits until the device has a carrier, or has none: the kernel finds out up to a second late.
fn await_carrier(device: &str, wanted: bool) {
    for _ in 0..500 {
        if ip(&format!("link show {device}")).contains("state UP") == wanted {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{device}: waited in vain for a carrier to be {wanted}");
}

/// The same for all devices, and for the link-local addresses that follow.
fn await_all_carriers() {
    for device in ["up0", "up0p", "tg0", "tg0p"] {
        await_carrier(device, true);
    }
    thread::sleep(Duration::from_millis(200));
}

/// Whether the monitor hears of a change within a second; all of what there is to hear is taken.
fn hears(monitor: &mut Monitor) -> bool {
    let mut heard = false;
    for _ in 0..100 {
        heard |= monitor.changed().unwrap();
        if heard && !monitor.changed().unwrap() {
            return true;
        }
        thread::sleep(Duration::from_millis(10));
    }
    heard
}

/// The tunnel device with its addresses.
fn tunnel() -> (Netlink, u32) {
    let mut nl = Netlink::open().unwrap();
    let index = nl.link_index("tg0").unwrap();
    nl.add_address(index, net("10.9.0.2/24")).unwrap();
    nl.add_address(index, net("fd09::2/64")).unwrap();
    (nl, index)
}

fn device_to(nl: &mut Netlink, address: &str) -> String {
    let to = nl.route_to(addr(address)).unwrap().unwrap();
    nix::net::if_::if_indextoname(to.device).unwrap().into_string().unwrap()
}

/// What SIGKILL leaves of a `Forwarding`: the settings and the state file, but not the lock.
fn leave_as_killed(forwarding: Forwarding, state: &Path) {
    let kept = fs::read(state).unwrap();
    // Without its record it restores nothing.
    fs::remove_file(state).unwrap();
    drop(forwarding);
    fs::write(state, kept).unwrap();
}

/// Every setting that switching forwarding may touch.
fn settings() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for family in ["ipv4", "ipv6"] {
        for device in sysctl::list(&format!("net/{family}/conf")).unwrap() {
            for setting in ["forwarding", "accept_ra", "accept_redirects", "send_redirects"] {
                let key = format!("net/{family}/conf/{device}/{setting}");
                found.extend(sysctl::read(&key).unwrap().map(|value| (key, value)));
            }
        }
    }
    assert!(found.len() > 20);
    found
}

fn get(key: &str) -> String {
    sysctl::read(key).unwrap().unwrap()
}

fn chains(spec: &TableSpec) -> Vec<String> {
    objects(spec, "chain")
        .iter()
        .map(|c| {
            assert_eq!(c["policy"], "accept");
            format!("{}/{}/{}", c["name"].as_str().unwrap(), c["hook"].as_str().unwrap(), c["prio"])
        })
        .collect()
}

fn rules(spec: &TableSpec) -> Vec<String> {
    objects(spec, "rule").iter().map(|rule| rule["expr"].to_string()).collect()
}

fn objects(spec: &TableSpec, kind: &str) -> Vec<serde_json::Value> {
    let text = nft(&format!("-j list table inet {}", spec.table()));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["nftables"].as_array().unwrap().iter().filter_map(|o| o.get(kind).cloned()).collect()
}

/// An empty tmpfs over a directory, in this namespace only.
fn fresh(directory: &str) {
    let none = None::<&str>;
    mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), none).unwrap();
}

fn script(file: &Path, body: &str) {
    fs::write(file, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
}

fn ip(arguments: &str) -> String {
    command("ip", arguments)
}

fn nft(arguments: &str) -> String {
    command("/usr/sbin/nft", arguments)
}

/// Runs a program in this thread's namespaces.
fn command(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn tg(name: &str) -> DeviceName {
    name.parse().unwrap()
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|text| net(text)).collect()
}
