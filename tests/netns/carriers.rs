//! A client with several ways to the server: one fails, another takes over, and what runs inside the tunnel goes on.
//!
//! ```text
//!   c1 [eth0] 198.18.1.2   ---- [c1]  198.18.1.1   net [srv] ---- srv
//!      [eth1] 198.18.201.2 ---- [c1b] 198.18.201.1
//! ```

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ring::digest::{Context, SHA256};

use crate::lab::{Config, INNER_V4, INNER_V6, Lab, eventually, ip};
use crate::mix::Stream;
use crate::moves::{everything, while_talking};
use crate::traffic::{Conversation, Noise, connect, transfer};

#[test]
fn a_carrier_that_falls_silent_is_left_and_used_again() {
    let Some(lab) = Lab::new("failover", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &two_carriers(&lab, "failover"));
    lab.wait_for_peer(FIRST);
    for directions in [&[UP, DOWN][..], &[UP], &[DOWN]] {
        let talks = Talk::start_all(&lab, directions);
        lab.swallow(&FIRST_CARRIER);
        lab.wait_for_peer(SECOND);
        talks.iter().for_each(Talk::goes_on);
        lab.swallow_no_more();
        lab.wait_for_peer(FIRST);
        for talk in talks {
            talk.goes_on();
            let (sent, arrived) = talk.end();
            assert!(arrived * 2 > sent, "{directions:?}: {arrived} of {sent}");
        }
    }
    lab.wait_for_sessions(1);
    assert_eq!(client.stop(), 0);
}

#[test]
fn another_default_route_costs_no_packet() {
    let Some(lab) = Lab::new("makebreak", 1) else { return };
    lab.second_link();
    lab.c(1).ip(&["route", "del", "default"]);
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1", "metric", "100"]);
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    lab.wait_for_peer(FIRST);
    for (peer, gateway, old) in
        [(SECOND, "198.18.201.1", "198.18.1.1"), (FIRST, "198.18.1.1", "198.18.201.1")]
    {
        let talks = Talk::start_all(&lab, &[UP, DOWN]);
        lab.c(1).ip(&["route", "add", "default", "via", gateway, "metric", "50"]);
        lab.wait_for_peer(peer);
        lab.c(1).ip(&["route", "del", "default", "via", old]);
        lab.c(1).ip(&["route", "add", "default", "via", gateway, "metric", "100"]);
        lab.c(1).ip(&["route", "del", "default", "via", gateway, "metric", "50"]);
        for talk in talks {
            talk.goes_on();
            talk.end_whole();
        }
    }
    lab.wait_for_sessions(1);
    assert_eq!(client.stop(), 0);
}

#[test]
fn a_link_that_is_removed_costs_what_was_on_its_way() {
    let Some(lab) = Lab::new("removed", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &two_carriers(&lab, "failover"));
    lab.wait_for_peer(FIRST);
    let talks = Talk::start_all(&lab, &[UP, DOWN]);
    lab.c(1).ip(&["link", "del", "eth0"]);
    lab.wait_for_peer(SECOND);
    let lost = talks.into_iter().map(|talk| {
        talk.goes_on();
        let (sent, arrived) = talk.end();
        sent - arrived
    });
    let lost: Vec<u64> = lost.collect();
    assert!(lost.iter().all(|lost| *lost <= 20), "lost up, down: {lost:?}");
    lab.wait_for_sessions(1);
    assert_eq!(client.stop(), 0);
}

#[test]
fn with_copies_on_two_carriers_one_may_be_cut() {
    let Some(lab) = Lab::new("redundant", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &two_carriers(&lab, "redundant"));
    lab.wait_for_peer(FIRST);
    let duplicates = || lab.session("c1").expect("a session")["drops"]["duplicate"].as_u64().unwrap_or(0);
    let talks = Talk::start_all(&lab, &[UP, DOWN]);
    talks.iter().for_each(Talk::goes_on);
    eventually("copies at the server", || Some(duplicates()).filter(|n| *n >= 50));
    lab.swallow(&FIRST_CARRIER);
    talks.iter().for_each(Talk::goes_on);
    lab.swallow_no_more();
    let before = duplicates();
    eventually("copies by both again", || Some(duplicates()).filter(|n| *n >= before + 50));
    talks.into_iter().for_each(Talk::end_whole);
    assert_eq!(client.stop(), 0);
    let log = client.log();
    let summary = log.lines().find(|line| line.contains("this session read")).expect("the summary");
    let dropped = summary.split("duplicate ").nth(1).expect("duplicates from the server");
    let number: u64 =
        dropped.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).expect("a number");
    assert!(number >= 100, "{summary}");
}

#[test]
fn flows_are_shared_out_and_leave_a_carrier_that_dies() {
    let Some(lab) = Lab::new("balance", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &two_carriers(&lab, "balance"));
    // Of data, not of challenges; and by the second carrier no more than a part of what the first takes.
    let rules = lab.write(
        "share.nft",
        "table inet share {\ncounter by_c1 { }\ncounter by_c1b { }\nchain passing {\n\
         type filter hook prerouting priority 0\n\
         udp dport 55555 iifname c1b limit rate over 3 mbytes/second burst 300 kbytes drop\n\
         udp dport 55555 iifname c1 meta length > 500 counter name by_c1\n\
         udp dport 55555 iifname c1b meta length > 500 counter name by_c1b\n}\n}\n",
    );
    lab.net().must(&["nft", "-f", &rules.display().to_string()]);
    let carried = || -> [u64; 2] {
        let text = lab.net().must(&["nft", "list", "counters", "table", "inet", "share"]);
        ["by_c1 ", "by_c1b "].map(|name| {
            let rest = text.split_once(&format!("counter {name}{{")).expect(name).1;
            let bytes = rest.split_once("bytes ").expect("bytes").1;
            let digits: String = bytes.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().expect("a number")
        })
    };
    let mut flows: Vec<Conversation> =
        (0..FLOWS).map(|_| Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4))).collect();
    let exchange = |flows: &mut [Conversation]| {
        thread::scope(|scope| {
            flows.iter_mut().for_each(|flow| drop(scope.spawn(|| flow.exchange(PER_FLOW))))
        });
    };
    eventually("data by both carriers", || {
        exchange(&mut flows);
        carried().iter().all(|bytes| *bytes >= SHARE).then_some(())
    });
    // Either of them dies, and is used again.
    for (dead, alive) in [(["iifname c1", "oifname c1"], 1), (["iifname c1b", "oifname c1b"], 0)] {
        lab.swallow(&dead);
        exchange(&mut flows);
        let before = carried();
        exchange(&mut flows);
        let after = carried();
        let all = FLOWS as u64 * PER_FLOW as u64;
        assert!(after[alive] - before[alive] >= all, "{before:?} {after:?}");
        lab.swallow_no_more();
        eventually("data by both carriers again", || {
            let before = carried();
            flows.truncate(FLOWS / 2);
            // A flow stays where it is; new ones are shared out.
            flows.extend((0..FLOWS / 2).map(|_| Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4))));
            exchange(&mut flows);
            let after = carried();
            (0..2).all(|n| after[n] - before[n] >= SHARE).then_some(())
        });
    }
    lab.wait_for_sessions(1);
    assert_eq!(client.stop(), 0);
}

#[test]
fn without_udp_from_the_start_the_tunnel_works_inside_the_control_connection() {
    let Some(lab) = Lab::new("noudp", 1) else { return };
    lab.swallow(&ALL_UDP);
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    inside_and_back(&lab, &mut client);
    assert_eq!(client.stop(), 0);
}

#[test]
fn udp_that_is_blocked_in_mid_session_is_done_without() {
    let Some(lab) = Lab::new("udpgone", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    eventually("UDP", || (!is_inside(&lab)?).then_some(()));
    let mut open = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    open.exchange(100_000);
    lab.swallow(&ALL_UDP);
    open.exchange(100_000);
    inside_and_back(&lab, &mut client);
    open.exchange(100_000);
    lab.wait_for_sessions(1);
    assert_eq!(client.stop(), 0);
}

/// UDP is blocked: the tunnel works all the same, and by UDP when that is over.
fn inside_and_back(lab: &Lab, client: &mut crate::process::Process) {
    eventually("the peer inside the control connection", || is_inside(lab)?.then_some(()));
    client.wait_for_log("packets go inside the control connection");
    assert!(lab.c(1).pings(INNER_V4, 56, 10));
    assert!(lab.c(1).pings(INNER_V6, 1_300, 10));
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 2 << 20);
    transfer(&lab.srv(), &lab.c(1), lab.inner_v6(1), 1 << 20);
    assert_eq!(is_inside(lab), Some(true));
    let talks = Talk::start_all(lab, &[UP, DOWN]);
    lab.swallow_no_more();
    eventually("the peer at a UDP address", || (!is_inside(lab)?).then_some(()));
    client.wait_for_log("packets go by");
    for talk in talks {
        talk.goes_on();
        talk.end();
    }
}

/// Whether the server has the client of its session where the control connection comes from, rather than by UDP.
fn is_inside(lab: &Lab) -> Option<bool> {
    let session = lab.session("c1")?;
    Some(session["peer"].as_str()? == session["tcp_peer"].as_str()?)
}

#[test]
fn a_new_mapping_of_a_nat_is_followed() {
    let Some(lab) = Lab::new("nat", 1) else { return };
    let net = lab.net();
    // Its UDP only: the control connection, and so the session, stays.
    let translate = |ports: &str| {
        let rule = format!("udp dport 55555 snat to 198.18.100.1:{ports}");
        let table = format!("{{ chain out {{ type nat hook postrouting priority 100; {rule}; }}; }}");
        // At once: what passes in between would go untranslated from then on.
        net.must(&["nft", &format!("table ip nat; delete table ip nat; table ip nat {table}")]);
    };
    translate("20000-20999");
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    lab.wait_for_peer("198.18.100.1:20");
    let id = || lab.session("c1").expect("a session")["session"].clone();
    let before = id();
    for (ports, peer, directions) in
        [("30000-30999", "198.18.100.1:30", &[UP, DOWN][..]), ("40000-40999", "198.18.100.1:40", &[UP])]
    {
        let talks = Talk::start_all(&lab, directions);
        translate(ports);
        net.forget_connections();
        lab.wait_for_peer(peer);
        for talk in talks {
            talk.goes_on();
            talk.end();
        }
    }
    assert_eq!(id(), before);
    assert_eq!(client.stop(), 0);
}

#[test]
fn connections_outlive_ten_seconds_without_any_link() {
    let Some(lab) = Lab::new("outage", 1) else { return };
    let _server = lab.start_server(&everything(&lab));
    let mut client = lab.start_client(1, &two_carriers(&lab, "failover"));
    lab.wait_for_peer(FIRST);
    let inner = lab.inner(1);
    while_talking(&lab, || {
        for state in ["down", "up"] {
            for link in ["c1", "c1b"] {
                lab.net().ip(&["link", "set", link, state]);
            }
            if state == "down" {
                thread::sleep(Duration::from_secs(10));
            }
        }
        eventually("an answer through the tunnel", || lab.c(1).pings(INNER_V4, 56, 1).then_some(()));
    });
    assert_eq!(lab.inner(1), inner);
    assert_eq!(client.stop(), 0);
}

#[test]
fn connections_outlive_the_server() {
    let Some(lab) = Lab::new("restart", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let inner = lab.inner(1);
    let mut again = None;
    while_talking(&lab, || {
        server.kill();
        again = Some(lab.start_server(&lab.server()));
        lab.wait_for_tunnel(1, &mut client);
    });
    assert!(client.log().matches("tunnel up").count() > 1, "{}", client.log());
    assert_eq!(lab.inner(1), inner);
    assert_eq!(client.stop(), 0);
}

#[test]
fn a_transfer_survives_fifty_moves() {
    let Some(lab) = Lab::new("fifty", 1) else { return };
    lab.second_link();
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.201.1", "metric", "200"]);
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1", "metric", "100"]);
    lab.c(1).ip(&["route", "del", "default", "metric", "0"]);
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let (near, far) = connect(&lab.c(1), &lab.srv(), ip(INNER_V4));
    let (moved, arrived) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let gone = AtomicBool::new(false);
    let all = MOVES * BYTES_PER_MOVE;
    let (sent, received) = thread::scope(|scope| {
        let (moved, arrived, gone) = (&moved, &arrived, &gone);
        let sending = scope.spawn(move || {
            let (mut noise, mut digest, mut chunk) = (Noise::new(7), Context::new(&SHA256), vec![0; CHUNK]);
            for n in 0..all / CHUNK {
                // It is never done before the last move, and there is more to send after each.
                while n * CHUNK >= moved.load(Ordering::Relaxed) * BYTES_PER_MOVE {
                    if gone.load(Ordering::Relaxed) {
                        return None;
                    }
                    thread::sleep(Duration::from_millis(1));
                }
                noise.fill(&mut chunk);
                digest.update(&chunk);
                (&near).write_all(&chunk).expect("send");
            }
            drop(near);
            Some(digest.finish())
        });
        let receiving = scope.spawn(move || {
            let (mut digest, mut chunk) = (Context::new(&SHA256), vec![0; CHUNK]);
            loop {
                match (&far).read(&mut chunk).expect("receive") {
                    0 => return digest.finish(),
                    n => {
                        digest.update(&chunk[..n]);
                        arrived.fetch_add(n, Ordering::Relaxed);
                    }
                }
            }
        });
        let moving = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for n in 1..=MOVES {
                lab.wait_for_peer(&another_place(&lab, n));
                let before = arrived.load(Ordering::Relaxed);
                moved.store(n, Ordering::Relaxed);
                eventually("more of the transfer", || {
                    (arrived.load(Ordering::Relaxed) >= before + SOME_BYTES).then_some(())
                });
            }
        }));
        gone.store(true, Ordering::Relaxed);
        if let Err(panic) = moving {
            std::panic::resume_unwind(panic);
        }
        (sending.join().expect("the sender"), receiving.join().expect("the receiver"))
    });
    assert_eq!(arrived.into_inner(), all);
    assert_eq!(sent.expect("all was sent").as_ref(), received.as_ref());
    lab.wait_for_sessions(1);
    assert_eq!(client.stop(), 0);
}

/// The `n`th move of client 1: from link to link, or to another address on the first; says where it is then.
fn another_place(lab: &Lab, n: usize) -> String {
    let client = lab.c(1);
    let route = |what: &str, gateway: &str, metric: &str| {
        client.ip(&["route", what, "default", "via", gateway, "metric", metric]);
    };
    let (first, second) = ("198.18.1.1", "198.18.201.1");
    match n % 5 {
        1 | 3 => {
            route("add", second, "50");
            route("del", second, "200");
            SECOND.to_owned()
        }
        2 | 4 => {
            route("add", second, "200");
            route("del", second, "50");
            // Of the address it has had since the last time.
            format!("{}:", client.addresses("eth0").first().expect("an address"))
        }
        _ => {
            client.ip(&["addr", "flush", "dev", "eth0", "scope", "global"]);
            let address = format!("198.18.1.{}", 10 + n);
            client.ip(&["addr", "add", &format!("{address}/24"), "dev", "eth0"]);
            route("add", first, "100");
            format!("{address}:")
        }
    }
}

/// A client with both links, the first one the better.
fn two_carriers(lab: &Lab, mode: &str) -> Config {
    lab.second_link();
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.201.1", "metric", "100"]);
    lab.client(1).set("mobility.carriers", "['eth0', 'eth1']").set("mobility.mode", format_args!("'{mode}'"))
}

/// Inner datagrams, 100 a second, from one end of the tunnel to the other.
pub struct Talk {
    thread: JoinHandle<Stream>,
    stop: Arc<AtomicBool>,
    arrived: Arc<AtomicU64>,
    up: bool,
}

impl Talk {
    /// One in each of these directions, client 1's.
    pub fn start_all(lab: &Lab, directions: &[bool]) -> Vec<Talk> {
        let talks: Vec<Talk> = directions.iter().map(|up| Talk::start(lab, *up)).collect();
        talks.iter().for_each(Talk::goes_on);
        talks
    }

    fn start(lab: &Lab, up: bool) -> Talk {
        let (client, server) = (lab.c(1), lab.srv());
        let mut stream = match up {
            UP => Stream::new(1, up, (&client, &server), ip(INNER_V4)),
            DOWN => Stream::new(2, up, (&server, &client), lab.inner_v4(1)),
        };
        let (stop, arrived) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), arrived.clone());
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                stream.send();
                thread::sleep(Duration::from_millis(10));
                stream.receive();
                counted.store(stream.arrived(), Ordering::Relaxed);
            }
            stream
        });
        Talk { thread, stop, arrived, up }
    }

    /// Waits for some more of it to arrive.
    pub fn goes_on(&self) {
        let before = self.arrived.load(Ordering::Relaxed);
        eventually("more datagrams inside the tunnel", || {
            (self.arrived.load(Ordering::Relaxed) >= before + SOME).then_some(())
        });
    }

    /// Ends it, when what is on its way has arrived: how many were sent and how many arrived.
    pub fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let mut stream = self.thread.join().expect("the talking thread");
        for _ in 0..LAST_ONES {
            stream.receive();
            if stream.arrived() == stream.sent {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        (stream.sent, stream.arrived())
    }

    /// The same, where none was lost.
    pub fn end_whole(self) {
        let way = if self.up { "up" } else { "down" };
        let (sent, arrived) = self.end();
        assert_eq!(sent - arrived, 0, "lost on the way {way}, of {sent}");
    }
}

pub const UP: bool = true;
pub const DOWN: bool = false;

/// Where the server sees the client by each carrier.
pub const FIRST: &str = "198.18.1.2:";
const SECOND: &str = "198.18.201.2:";
const FIRST_CARRIER: [&str; 2] = ["iifname c1", "oifname c1"];
const ALL_UDP: [&str; 2] = ["udp dport 55555", "udp sport 55555"];

/// Datagrams that show that a talk goes on.
const SOME: u64 = 50;
/// Looks for the last of it, 20 ms apart.
const LAST_ONES: usize = 250;
/// Inner connections that are shared out.
const FLOWS: usize = 8;
/// Bytes that each of them carries at a time, there and back.
const PER_FLOW: usize = 300_000;
/// Bytes that show that a carrier has flows.
const SHARE: u64 = 200_000;
const MOVES: usize = 50;
const BYTES_PER_MOVE: usize = 2 << 20;
const SOME_BYTES: usize = 256 << 10;
const CHUNK: usize = 64 << 10;
