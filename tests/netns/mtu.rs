//! Paths narrower than the links at their ends.
//!
//! ```text
//!   c1 eth0 1500 ---- 1500 c1 [router: 1300 to either side] srv 1500 ---- 1500 eth0 srv
//! ```

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lab::{INNER_V4, INNER_V6, Lab, Namespace, SERVER_V4, SERVER_V6, eventually, ip};
use crate::traffic::{connect, transfer, udp_echo};

#[test]
fn nothing_is_fragmented_on_a_narrow_path_over_ipv4() {
    let Some(lab) = Lab::new("narrow4", 1) else { return };
    narrow(&lab, 1300);
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    fits(&lab, OVER_V4);
    senders_are_told(&lab);
}

#[test]
fn nothing_is_fragmented_on_a_narrow_path_over_ipv6() {
    let Some(lab) = Lab::new("narrow6", 1) else { return };
    narrow(&lab, 1300);
    let _server = lab.start_server(&lab.server().set("data.tun_write", "'guard'"));
    let _client = lab.start_client(1, &lab.client(1).set("remote", format_args!("['[{SERVER_V6}]:55555']")));
    fits(&lab, OVER_V6);
    senders_are_told(&lab);
}

#[test]
fn a_device_far_wider_than_the_path_carries_everything() {
    let Some(lab) = Lab::new("widetun", 1) else { return };
    let _server = lab.start_server(&lab.server().set("mtu", 9000));
    let _client = lab.start_client(1, &lab.client(1));
    fits(&lab, 1_432..=1_440);
    for (client, server) in [(ip(INNER_V4), lab.inner_v4(1)), (ip(INNER_V6), lab.inner_v6(1))] {
        for size in [1_400, 8_000, 60_000] {
            assert!(lab.c(1).pings(client, size, 3), "{size} bytes to {client}");
            assert!(lab.srv().pings(server, size, 3), "{size} bytes to {server}");
        }
    }
}

#[test]
fn a_transfer_outlives_a_path_that_shrinks_over_ipv4() {
    let Some(lab) = Lab::new("shrink4", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    shrinks(&lab);
    fits(&lab, OVER_V4);
}

#[test]
fn a_transfer_outlives_a_path_that_shrinks_over_ipv6() {
    let Some(lab) = Lab::new("shrink6", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1).set("remote", format_args!("['[{SERVER_V6}]:55555']")));
    shrinks(&lab);
    fits(&lab, OVER_V6);
}

#[test]
fn a_path_that_shrinks_stalls_a_transfer_for_a_moment_whatever_the_network_says_of_it() {
    for (name, remote) in [("IPv4", SERVER_V4.to_owned()), ("IPv6", format!("[{SERVER_V6}]:55555"))] {
        for told in [true, false] {
            let Some(lab) = Lab::new(&format!("stall-{}-{told}", &name[3..]), 1) else { return };
            let _server = lab.start_server(&lab.server());
            let _client = lab.start_client(1, &lab.client(1).set("remote", format_args!("['{remote}']")));
            if !told {
                let errors = "icmp type destination-unreachable drop; icmpv6 type packet-too-big drop";
                let chain = format!("chain out {{ type filter hook output priority 0; {errors}; }}");
                lab.net().must(&["nft", &format!("table inet quiet {{ {chain}; }}")]);
            }
            let (stall, until_known) = stall(&lab);
            println!("{name}, ICMP {told}: no byte for {stall:?}, the new size known after {until_known:?}");
        }
    }
}

/// The longest time without a byte of a transfer to the server while the path shrinks, and when that was found out.
fn stall(lab: &Lab) -> (Duration, Duration) {
    let (client, server) = (lab.c(1), lab.srv());
    eventually("the path's MTU at the server", || {
        transfer(&client, &server, ip(INNER_V4), 1 << 20);
        (path_mtu(lab)? == 1420).then_some(())
    });
    let (near, far) = connect(&client, &server, ip(INNER_V4));
    let (back_near, back_far) = (near.try_clone().expect("a copy"), far.try_clone().expect("a copy"));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let done = &done;
        for mut sending in [near, back_far] {
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    sending.write_all(&[7; 16_384]).expect("send");
                }
                sending.shutdown(Shutdown::Write).expect("end");
            });
        }
        let receiving = [far, back_near].map(|mut receiving| {
            scope.spawn(move || {
                let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
                while receiving.read(&mut [0; 65_536]).expect("receive") > 0 {
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                }
                longest
            })
        });
        thread::sleep(Duration::from_secs(1));
        let begun = Instant::now();
        narrow(lab, 1300);
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually("the new size", || path_mtu(lab).filter(|mtu| *mtu < 1_300));
        }));
        let until_known = begun.elapsed();
        thread::sleep(Duration::from_secs(1));
        done.store(true, Ordering::Relaxed);
        let longest = receiving.map(|one| one.join().expect("the receiver")).into_iter().max();
        if let Err(panic) = found {
            std::panic::resume_unwind(panic);
        }
        (longest.expect("two of them"), until_known)
    })
}

fn shrinks(lab: &Lab) {
    let (client, server) = (lab.c(1), lab.srv());
    eventually("the path's MTU at the server", || {
        transfer(&client, &server, ip(INNER_V4), 1 << 20);
        (path_mtu(lab)? == 1420).then_some(())
    });
    thread::scope(|scope| {
        let carried = scope.spawn(|| transfer(&client, &server, ip(INNER_V4), LONG_TRANSFER));
        thread::sleep(Duration::from_millis(300));
        narrow(lab, 1300);
        assert!(!carried.is_finished(), "the transfer was over before the path shrank");
        carried.join().expect("the transfer");
    });
}

/// Once both ends know the path, TCP in both families goes without outer fragments.
fn fits(lab: &Lab, expected: std::ops::RangeInclusive<u64>) {
    let (client, server) = (lab.c(1), lab.srv());
    for host in [&client, &server] {
        let rules = lab.write(
            "fragments.nft",
            "table inet fragments {\ncounter pieces { }\nchain arrive {\n\
             type filter hook prerouting priority -450\n\
             iifname eth0 ip frag-off & 0x3fff != 0 counter name pieces\n\
             iifname eth0 exthdr frag exists counter name pieces\n}\n}\n",
        );
        host.must(&["nft", "-f", &rules.display().to_string()]);
    }
    let transfers = |bytes| {
        transfer(&client, &server, ip(INNER_V4), bytes);
        transfer(&client, &server, ip(INNER_V6), bytes);
    };
    let seen = || pieces(&client) + pieces(&server);
    eventually("the search ends", || {
        transfers(1 << 20);
        path_mtu(lab).filter(|mtu| expected.contains(mtu))
    });
    eventually("a transfer without fragments", || {
        let before = seen();
        transfers(1 << 20);
        (seen() == before).then_some(())
    });
    let before = seen();
    transfers(16 << 20);
    assert_eq!(seen(), before, "fragments once the path is known");
}

/// A packet too large that must not be fragmented: its sender hears the path's MTU. One that may be arrives.
fn senders_are_told(lab: &Lab) {
    let (client, server) = (lab.c(1), lab.srv());
    let known = path_mtu(lab).expect("a known path");
    for (host, to) in [(&client, ip(INNER_V4)), (&server, lab.inner_v4(1))] {
        let (mtu, said) = ping_whole(host, &to.to_string(), 1420 - 28);
        assert_eq!(mtu, Some(known), "{said}");
        assert!(host.pings(to, 4_000, 3), "fragments to {to}");
    }
    for (host, to) in [(&client, ip(INNER_V6)), (&server, lab.inner_v6(1))] {
        let (mtu, said) = ping_whole(host, &to.to_string(), 1420 - 48);
        assert_eq!(mtu, Some(1280), "{said}");
        assert!(host.pings(to, 1280 - 48, 3), "1280 bytes go to {to}");
        assert!(host.pings(to, 4_000, 3), "fragments to {to}");
    }
    for to in [INNER_V4, INNER_V6] {
        udp_echo(&client, &server, ip(to), 1_350);
        udp_echo(&client, &server, ip(to), 9_000);
    }
}

/// The MTU that ping hears of when nobody may fragment its packets, and all it says.
fn ping_whole(host: &Namespace, to: &str, size: usize) -> (Option<u64>, String) {
    let size = size.to_string();
    let out = host.run(&["ping", "-n", "-M", "do", "-c", "3", "-i", "0.2", "-W", "1", "-s", &size, to]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    let mtu = said.split_once("mtu").map(|(_, rest)| {
        let digits = rest.trim_start_matches([' ', '=', ':']).chars().take_while(char::is_ascii_digit);
        digits.collect::<String>()
    });
    (mtu.and_then(|digits| digits.parse().ok()), said)
}

fn path_mtu(lab: &Lab) -> Option<u64> {
    lab.session("c1")?["path_mtu"].as_u64()
}

/// Lets packets of at most `mtu` bytes through the router, which says so to nobody but by ICMP.
fn narrow(lab: &Lab, mtu: u32) {
    let mtu = mtu.to_string();
    for (device, wire) in [("c1", "1"), ("srv", "100")] {
        for net in [format!("198.18.{wire}.0/24"), format!("2001:db8:{wire}::/64")] {
            let (family, metric) = if net.contains(':') { ("-6", "256") } else { ("-4", "0") };
            let route = [family, "route", "replace", &net, "dev", device, "proto", "kernel"];
            lab.net().ip(&[&route[..], &["metric", metric, "mtu", "lock", &mtu]].concat());
        }
    }
}

/// Fragments that came to a host from outside.
fn pieces(host: &Namespace) -> u64 {
    let text = host.must(&["nft", "-j", "list", "counters", "table", "inet", "fragments"]);
    let listed: Value = serde_json::from_str(&text).expect("nft's JSON");
    let items = listed["nftables"].as_array().expect("a list").iter();
    let counters: BTreeMap<&str, u64> = items
        .filter_map(|item| Some((item["counter"]["name"].as_str()?, item["counter"]["packets"].as_u64()?)))
        .collect();
    counters["pieces"]
}

const LONG_TRANSFER: usize = 128 << 20;
/// Inner packets that go through 1,300 bytes of IPv4 or IPv6. What is less than one percent is not searched for.
const OVER_V4: std::ops::RangeInclusive<u64> = 1_230..=1_240;
const OVER_V6: std::ops::RangeInclusive<u64> = 1_212..=1_220;
