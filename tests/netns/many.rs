//! Several clients at once: nobody gets another's packets, and they reach each other only where they may.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::thread;

use crate::lab::{INNER_V4, INNER_V6, Lab, ip};
use crate::process::{self, field};
use crate::traffic::{Conversation, can_connect, transfer, udp_echo};

#[test]
fn three_clients_transfer_at_once() {
    let Some(lab) = Lab::new("three", 3) else { return };
    let server = lab.start_server(&lab.server());
    let _clients: Vec<_> = (1..=3).map(|n| lab.start_client(n, &lab.client(n))).collect();
    thread::scope(|scope| {
        for n in 1..=3 {
            let lab = &lab;
            scope.spawn(move || {
                let inside = if n == 2 { ip(INNER_V6) } else { ip(INNER_V4) };
                transfer(&lab.c(n), &lab.srv(), inside, 8 << 20);
                transfer(&lab.srv(), &lab.c(n), lab.inner_v4(n), 8 << 20);
                udp_echo(&lab.c(n), &lab.srv(), ip(INNER_V4), 30_000);
            });
        }
    });

    // The queues are in a namespace that ends with the server's processes.
    let ipc = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/ipc")).expect("an IPC namespace");
    assert_ne!(ipc(&server.pid().to_string()), ipc("self"));

    // Addresses are distinct, and so are the workers' users, which can do nothing.
    let addresses: BTreeSet<IpAddr> = (1..=3).flat_map(|n| lab.inner(n)).collect();
    assert_eq!(addresses.len(), 6, "{addresses:?}");
    let workers = server.wait_for_children(3);
    assert_eq!(process::uids(&workers).len(), 3);
    for worker in workers {
        confined(worker);
    }
    let sessions = lab.sessions();
    let names: Vec<&str> = sessions.iter().filter_map(|s| s["name"].as_str()).collect();
    assert_eq!(names, ["c1", "c2", "c3"]);
    for session in &sessions {
        for direction in ["sent_bytes", "received_bytes"] {
            assert!(session[direction].as_u64().is_some_and(|n| n > 16 << 20), "{direction}: {session}");
        }
    }
}

#[test]
fn clients_do_not_reach_each_other_unless_allowed() {
    let Some(lab) = Lab::new("c2c", 2) else { return };
    // A host that forwards by itself doesn't do so between clients either.
    lab.srv().sysctl("net/ipv4/ip_forward", "1");
    lab.srv().sysctl("net/ipv6/conf/all/forwarding", "1");
    for allowed in [false, true] {
        let mut server = lab.start_server(&lab.server().set("client_to_client", allowed));
        let mut one = lab.start_client(1, &lab.client(1));
        let mut two = lab.start_client(2, &lab.client(2));
        for other in lab.inner(2) {
            if allowed {
                assert!(lab.c(1).pings(other, 1_000, 3), "ping {other}");
                transfer(&lab.c(1), &lab.c(2), other, 2 << 20);
            } else {
                assert!(lab.c(1).cannot_ping(other), "{other} answered");
                assert!(!can_connect(&lab.c(1), &lab.c(2), other), "TCP reached {other}");
            }
        }
        // The server is reached in any case.
        assert!(lab.c(1).pings(INNER_V4, 56, 3));
        one.stop();
        two.stop();
        server.stop();
    }
}

#[test]
fn one_clients_end_leaves_the_others_alone() {
    let Some(lab) = Lab::new("others", 2) else { return };
    let server = lab.start_server(&lab.server());
    let _one = lab.start_client(1, &lab.client(1));
    let mut two = lab.start_client(2, &lab.client(2));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(100_000);
    assert_eq!(two.stop(), 0);
    lab.wait_for_sessions(1);
    server.wait_for_children(1);
    talk.exchange(1_000_000);
}

#[test]
fn a_worker_holds_the_limits_of_its_server() {
    let Some(lab) = Lab::new("msgqueue", 1) else { return };
    // Queues have to fit what is left: 100,000 bytes for each user instead of 819,200.
    let mut server = lab.try_server_under(&["prlimit", "--msgqueue=100000:100000"], &lab.server());
    server.eventually("the server answers", || lab.try_status().map(drop));
    let _client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 4 << 20);
    udp_echo(&lab.srv(), &lab.c(1), lab.inner_v4(1), 60_000);
}

/// What architecture and threat model promise of a worker, as the kernel shows it.
fn confined(worker: i32) {
    let all_the_same = |name: &str| {
        let line = field(worker, name).expect(name);
        let ids: BTreeSet<&str> = line.split_whitespace().collect();
        assert_eq!(ids.len(), 1, "{name}: {line}");
        line.split_whitespace().next().and_then(|id| id.parse::<u32>().ok()).expect("a number")
    };
    assert!(all_the_same("Uid") >= 65_536);
    assert!(all_the_same("Gid") >= 65_536);
    assert_eq!(field(worker, "Groups").as_deref(), Some(""));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(worker, set).as_deref(), Some("0000000000000000"), "{set}");
    }
    assert_eq!(field(worker, "NoNewPrivs").as_deref(), Some("1"));
    for limit in ["Max file size", "Max processes", "Max core file size"] {
        assert_eq!(process::limit(worker, limit), "0", "{limit}");
    }
    let root = std::fs::read_dir(format!("/proc/{worker}/root")).expect("its root");
    assert_eq!(root.count(), 0, "the worker's root is not empty");
    let environment = std::fs::read(format!("/proc/{worker}/environ")).expect("its environment");
    assert!(environment.is_empty(), "the worker has an environment");
    let descriptors = process::descriptors(worker);
    let ordinary = |target: &String| {
        ["/dev/null", "/dev/net/tun"].contains(&target.as_str())
            || ["socket:", "anon_inode:", "/tunguard-", "/memfd:"].iter().any(|kind| target.starts_with(kind))
    };
    assert!(descriptors.iter().all(ordinary), "{descriptors:?}");
    assert!(descriptors.len() <= 12, "{descriptors:?}");
}
