//! A client that connects on demand: no connection and no process of it while nobody needs one, and nobody who notices.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::capture::{Capture, only_the_tunnel};
use crate::kill::Holdings;
use crate::lab::{Config, INNER_V4, INNER_V6, LAN_V4, Lab, SERVER_V4, eventually, ip, same_lines};
use crate::moves::everything;
use crate::process::{Process, alive};
use crate::traffic::{Conversation, transfer, udp_to};

#[test]
fn the_first_ping_wakes_and_is_answered() {
    let Some(lab) = Lab::new("wake", 1) else { return };
    let server = lab.start_server(&lab.server());
    let before = Holdings::of(&server);
    let mut client = asleep(&lab, &on_demand(&lab, 1));
    assert_eq!(lab.inner(1), [ip("10.9.0.5"), ip("fd09::5")]);
    for (round, to) in (1..).zip([INNER_V4, INNER_V6]) {
        assert!(is_quiet(&lab, &client));
        // One packet, and it is not lost.
        ping_once(&lab, to);
        woken(&mut client, round);
        assert_eq!(lab.sessions().len(), 1);
        falls_asleep(&lab, &mut client, round);
        lab.wait_for_sessions(0);
        before.are_back(&server);
    }
    assert!(client.log().contains("woken by 10.9.0.5 -> 10.9.0.1 icmp"), "{}", client.log());
    assert_eq!(lab.inner(1), [ip("10.9.0.5"), ip("fd09::5")], "addresses stay");
    assert_eq!(client.stop(), 0);
}

#[test]
fn what_comes_meanwhile_arrives_once_and_in_order() {
    let Some(lab) = Lab::new("burst", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = asleep(&lab, &on_demand(&lab, 1));
    let (sender, receiver) = datagrams(&lab);
    for round in 1..=3u32 {
        let numbers: Vec<u32> = (round * 1_000..round * 1_000 + 200).collect();
        numbers.iter().for_each(|n| send(&sender, *n));
        assert_eq!(receive(&receiver, numbers.len()), numbers);
        assert_eq!(receiver.recv(&mut [0; 64]).ok(), None, "one came twice");
        falls_asleep(&lab, &mut client, round as usize);
    }
    assert_eq!(dropped(&lab), 0);
}

#[test]
fn beyond_the_queue_the_newest_are_dropped_and_counted() {
    let Some(lab) = Lab::new("queue", 1) else { return };
    let mut client = asleep(&lab, &on_demand(&lab, 1).set("on_demand.queue", 50));
    let (sender, receiver) = datagrams(&lab);
    send(&sender, 0);
    client.wait_for_log("woken by");
    (1..200).for_each(|n| send(&sender, n));
    // The first one is held by the supervisor; its place in the ring may be made free later, with others.
    let dropped = dropped(&lab);
    assert!((149..=150).contains(&dropped), "{dropped}");
    let _server = lab.start_server(&lab.server());
    assert_eq!(receive(&receiver, 200), (0..200 - dropped as u32).collect::<Vec<u32>>());
}

#[test]
fn only_what_matches_wakes() {
    let Some(lab) = Lab::new("rules", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let rules = "['udp/7000-7001', '10.9.0.128/25 icmp', 'fd09::/64 tcp/22']";
    let mut client = asleep(&lab, &on_demand(&lab, 1).set("on_demand.wake", rules));
    assert!(lab.c(1).cannot_ping(INNER_V4));
    let say = |to: &str| {
        let socket = udp_to(&lab.c(1), to.parse().expect("an address")).expect("a socket");
        socket.send(b"hello").expect("sent");
    };
    // Multicast isn't routed into the tunnel by itself.
    lab.c(1).ip(&["route", "add", "224.0.0.0/4", "dev", "tg0"]);
    for to in ["10.9.0.1:6999", "10.9.0.1:7002", "224.0.0.251:7000", "[fd09::1]:22"] {
        say(to);
    }
    thread::sleep(Duration::from_millis(300));
    assert!(is_quiet(&lab, &client) && !client.log().contains("woken by"), "{}", client.log());
    assert_eq!(lab.sessions().len(), 0);
    say("10.9.0.1:7001");
    woken(&mut client, 1);
    assert!(client.log().contains("woken by 10.9.0.5 -> 10.9.0.1 udp/7001"), "{}", client.log());
    // What doesn't wake passes all the same.
    ping_once(&lab, INNER_V4);
}

#[test]
fn five_idle_seconds_end_it_and_the_next_packet_begins_it() {
    let Some(lab) = Lab::new("five", 1) else { return };
    let server = lab.start_server(&lab.server());
    let before = Holdings::of(&server);
    let mut client = asleep(&lab, &on_demand(&lab, 1).set("on_demand.idle", "'5s'"));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(100_000);
    let begun = Instant::now();
    falls_asleep(&lab, &mut client, 1);
    assert!(begun.elapsed() >= Duration::from_secs(4), "after {:?}", begun.elapsed());
    assert!(client.log().contains("idle for 5 s: connection closed"), "{}", client.log());
    lab.wait_for_sessions(0);
    server.wait_for_children(0);
    before.are_back(&server);
    talk.exchange(100_000);
    woken(&mut client, 2);
}

#[test]
fn an_open_connection_goes_on_over_idle_cycles() {
    let Some(lab) = Lab::new("open", 1) else { return };
    let _server = lab.start_server(&everything(&lab));
    let config = learning(&lab);
    let mut client = lab.start_client(1, &config);
    let inner = lab.inner(1);
    let mut talks = [INNER_V4, INNER_V6].map(|to| Conversation::start(&lab.c(1), &lab.srv(), ip(to)));
    for round in 1..=10 {
        talks.iter_mut().for_each(|talk| talk.exchange(200_000));
        says(&mut client, "idle for 1 s: connection closed", round);
        falls_asleep(&lab, &mut client, round - 1);
        assert_eq!(lab.inner(1), inner);
    }
    // The server has something to say, which wakes nobody; the client's next word brings both.
    talks.iter_mut().for_each(|talk| talk.exchange(200_000));
    transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
    assert_eq!(client.stop(), 0);
}

#[test]
fn senders_are_told_when_there_is_no_session_and_it_comes_back() {
    let Some(lab) = Lab::new("giveup", 1) else { return };
    let mut client = asleep(&lab, &on_demand(&lab, 1).set("on_demand.give_up", "'2s'"));
    for (to, says) in [(INNER_V4, "Destination Host Unreachable"), (INNER_V6, "Address unreachable")] {
        let told = eventually("an answer to ping", || {
            let out = lab.c(1).run(&["ping", "-n", "-c", "4", "-W", "3", to]);
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            text.contains(says).then_some(text)
        });
        assert!(!told.contains("bytes from"), "{told}");
    }
    let refused = lab.c(1).within(|| {
        let server: SocketAddr = (ip(INNER_V4), 7).into();
        TcpStream::connect_timeout(&server, Duration::from_secs(20)).expect_err("nobody is there")
    });
    assert_eq!(refused.kind(), io::ErrorKind::HostUnreachable, "{refused}");
    assert!(client.log().contains("no session within 2 s"), "{}", client.log());
    client.wait_for_log("the next packet tries again");
    let _server = lab.start_server(&lab.server());
    eventually("the tunnel is back", || {
        lab.c(1).run(&["ping", "-n", "-c", "1", "-W", "3", INNER_V4]).status.success().then_some(())
    });
    falls_asleep(&lab, &mut client, 1);
    assert_eq!(client.stop(), 0);
}

#[test]
fn the_server_and_the_network_may_change_while_it_sleeps() {
    let Some(lab) = Lab::new("changes", 1) else { return };
    let config = learning(&lab);
    let mut server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &config);
    let inner = lab.inner(1);
    falls_asleep(&lab, &mut client, 0);
    // Stopped, started again, killed.
    assert_eq!(server.stop(), 0);
    let mut server = lab.start_server(&lab.server());
    ping_once(&lab, INNER_V4);
    falls_asleep(&lab, &mut client, 1);
    server.kill();
    let _server = lab.start_server(&lab.server());
    ping_once(&lab, INNER_V6);
    falls_asleep(&lab, &mut client, 2);
    // Another address of the client's.
    lab.c(1).ip(&["addr", "del", "198.18.1.2/24", "dev", "eth0"]);
    lab.c(1).ip(&["addr", "add", "198.18.1.77/24", "dev", "eth0"]);
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1"]);
    ping_once(&lab, INNER_V4);
    lab.wait_for_peer("198.18.1.77:");
    falls_asleep(&lab, &mut client, 3);
    // And while it wakes.
    lab.swallow(&["tcp dport 55555"]);
    let sent = Instant::now();
    let ping = thread::spawn({
        let host = lab.c(1);
        move || host.must(&["ping", "-n", "-c", "1", "-W", "25", INNER_V4])
    });
    says(&mut client, "woken by", 4);
    lab.c(1).ip(&["addr", "del", "198.18.1.77/24", "dev", "eth0"]);
    lab.c(1).ip(&["addr", "add", "198.18.1.78/24", "dev", "eth0"]);
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1"]);
    lab.swallow_no_more();
    ping.join().expect("the first packet is answered");
    println!("answered {:?} after it was sent", sent.elapsed());
    lab.wait_for_peer("198.18.1.78:");
    assert_eq!(lab.inner(1), inner);
}

#[test]
fn nothing_leaves_in_clear() {
    let Some(lab) = Lab::new("closed", 1) else { return };
    let _server = lab.start_server(&everything(&lab));
    let before = lab.c(1).routes();
    let config = learning(&lab);
    let mut client = lab.start_client(1, &config);
    falls_asleep(&lab, &mut client, 0);
    let wire = Capture::start(&lab.net(), "c1");
    // Asleep and waking, to hosts that are there and to those that aren't.
    lab.swallow(&["tcp dport 55555"]);
    for to in [LAN_V4, "203.0.113.9", "2001:db8:77::1"] {
        assert!(lab.c(1).cannot_ping(to));
    }
    let lookup = udp_to(&lab.c(1), "198.18.100.1:53".parse().expect("an address")).expect("a socket");
    lookup.send(b"who is it?").expect("sent");
    lab.swallow_no_more();
    ping_once(&lab, LAN_V4);
    falls_asleep(&lab, &mut client, 1);
    lookup.send(b"who is it?").expect("sent");
    says(&mut client, "tunnel up: ", 3);
    let wire = wire.stop();
    only_the_tunnel(&wire, 10);
    assert_eq!(client.stop(), 0);
    same_lines(&before, &lab.c(1).routes(), "the client's routes");
}

#[test]
fn the_server_itself_is_beside_the_tunnel_asleep_and_up() {
    let Some(lab) = Lab::new("beside", 1) else { return };
    let _server = lab.start_server(&everything(&lab));
    let config = learning(&lab);
    let mut client = lab.start_client(1, &config);
    falls_asleep(&lab, &mut client, 0);
    let listener = lab.srv().within(|| TcpListener::bind("0.0.0.0:2222")).expect("bind");
    let connect = || {
        let to = (ip(SERVER_V4), 2222).into();
        let ours = lab.c(1).within(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)));
        let (theirs, from) = listener.accept().expect("a connection");
        assert_eq!(from.ip(), ip("198.18.1.2"));
        (ours.expect("connected"), theirs)
    };
    let talk = |(ours, theirs): &mut (TcpStream, TcpStream)| {
        ours.write_all(b"word").expect("written");
        theirs.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        theirs.read_exact(&mut [0; 4]).expect("read");
    };
    let mut pair = connect();
    talk(&mut pair);
    assert!(is_quiet(&lab, &client) && !client.log().contains("woken by"), "{}", client.log());
    ping_once(&lab, LAN_V4);
    talk(&mut pair);
    falls_asleep(&lab, &mut client, 1);
    talk(&mut pair);
    // And after a start that begins asleep.
    assert_eq!(client.stop(), 0);
    let mut client = asleep(&lab, &config);
    talk(&mut connect());
    assert!(is_quiet(&lab, &client) && !client.log().contains("woken by"), "{}", client.log());
    // The way there follows the network while nobody uses it.
    lab.c(1).ip(&["addr", "del", "198.18.1.2/24", "dev", "eth0"]);
    lab.c(1).ip(&["addr", "add", "198.18.1.77/24", "dev", "eth0"]);
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1"]);
    ping_once(&lab, LAN_V4);
    lab.wait_for_peer("198.18.1.77:");
    falls_asleep(&lab, &mut client, 1);
}

#[test]
fn what_is_not_ours_wakes_nobody_and_keeps_nothing_up() {
    let Some(lab) = Lab::new("notours", 1) else { return };
    let _server = lab.start_server(&everything(&lab));
    let config = learning(&lab);
    let mut client = lab.start_client(1, &config);
    falls_asleep(&lab, &mut client, 0);
    let stranger = lab.c(1).within(|| UdpSocket::bind("198.18.1.2:0")).expect("bind");
    let everybody = lab.c(1).within(|| UdpSocket::bind("0.0.0.0:0")).expect("bind");
    let say = || {
        stranger.send_to(b"hello", "203.0.113.9:7").expect("sent");
        everybody.send_to(b"hello", "10.9.0.255:7").expect("sent");
    };
    (0..20).for_each(|_| say());
    thread::sleep(Duration::from_millis(300));
    assert!(is_quiet(&lab, &client) && !client.log().contains("woken by"), "{}", client.log());
    ping_once(&lab, LAN_V4);
    woken(&mut client, 2);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                say();
                thread::sleep(Duration::from_millis(50));
            }
        });
        // Two to three seconds later, whatever they say.
        let slept = eventually_asleep(&mut client, 2);
        done.store(true, Ordering::Relaxed);
        assert!(slept, "{}", client.log());
    });
}

#[test]
fn a_stranger_in_the_servers_place_ends_nothing() {
    let Some(lab) = Lab::new("portal", 1) else { return };
    let mut stranger = lab.start_server(&lab.impostor());
    let mut client = asleep(&lab, &on_demand(&lab, 1).set("on_demand.give_up", "'2s'"));
    assert!(lab.c(1).cannot_ping(INNER_V4));
    client.wait_for_log("next attempt in");
    client.wait_for_log("the next packet tries again");
    assert_eq!(lab.inner(1), [ip("10.9.0.5"), ip("fd09::5")]);
    assert_eq!(stranger.stop(), 0);
    let _server = lab.start_server(&lab.server());
    eventually("the tunnel is there", || {
        lab.c(1).run(&["ping", "-n", "-c", "1", "-W", "3", INNER_V4]).status.success().then_some(())
    });
    assert_eq!(client.stop(), 0);
}

#[test]
fn what_the_server_pushes_is_learned_first() {
    let Some(lab) = Lab::new("learn", 1) else { return };
    let _server = lab.start_server(&lab.server().set("push.routes", "['192.168.50.0/24']").set("nat", true));
    lab.wait_for_carrier(1);
    let config = on_demand(&lab, 1).without("routes");
    let routed = || lab.c(1).routes().iter().any(|route| route.starts_with("192.168.50.0/24 dev tg0"));
    let mut client = lab.try_client(1, &config);
    client.wait_for_log("connecting once to learn them");
    woken(&mut client, 1);
    falls_asleep(&lab, &mut client, 0);
    assert!(routed());
    assert_eq!(lab.inner(1), [ip("10.9.0.5"), ip("fd09::5")]);
    assert_eq!(client.stop(), 0);
    let mut client = asleep(&lab, &config);
    assert!(routed() && lab.sessions().is_empty());
    ping_once(&lab, LAN_V4);
    assert_eq!(client.stop(), 0);
}

#[test]
fn a_server_with_a_name_is_looked_up_again_after_giving_up() {
    let Some(lab) = Lab::new("named", 1) else { return };
    let mut server = lab.start_server(&everything(&lab));
    let config = learning(&lab).set("remote", "['vpn.test']").set("on_demand.give_up", "'2s'");
    let start = |name_at: &str| lab.client_with_own_etc(1, &format!("{name_at} vpn.test\n"), &config);
    lab.wait_for_carrier(1);
    let mut client = start(SERVER_V4);
    woken(&mut client, 1);
    falls_asleep(&lab, &mut client, 0);
    assert_eq!(client.stop(), 0);
    let mut client = start(SERVER_V4);
    client.wait_for_log("asleep: waits for packets");
    assert_eq!(server.stop(), 0);
    assert!(lab.c(1).cannot_ping(INNER_V4));
    client.wait_for_log("the next packet tries again");
    assert_eq!(client.stop(), 0);
    let _server = lab.start_server(&everything(&lab));
    let mut client = start(SERVER_V4);
    client.wait_for_log("connecting once to learn them");
    woken(&mut client, 1);
    falls_asleep(&lab, &mut client, 0);
    assert_eq!(client.stop(), 0);
    let mut client = start(SERVER_V4);
    client.wait_for_log("asleep: waits for packets");
    ping_once(&lab, LAN_V4);
}

#[test]
fn a_client_started_again_knows_its_addresses() {
    let Some(lab) = Lab::new("remember", 1) else { return };
    // The server itself is never routed into the tunnel.
    let pushed = format!("['192.168.50.0/24', '{SERVER_V4}/32']");
    let _server = lab.start_server(&lab.server().set("push.routes", pushed).set("nat", true));
    let config = learning(&lab);
    let routed = || lab.c(1).routes().iter().any(|route| route.starts_with("192.168.50.0/24 dev tg0"));
    let mut client = lab.try_client(1, &config);
    client.wait_for_log("connecting once to learn them");
    woken(&mut client, 1);
    falls_asleep(&lab, &mut client, 0);
    let inner = lab.inner(1);
    assert!(routed());
    for _ in 0..2 {
        assert_eq!(client.stop(), 0);
        client = asleep(&lab, &config);
        assert_eq!(lab.inner(1), inner);
        assert!(routed() && lab.sessions().is_empty() && !client.log().contains("connecting"));
        ping_once(&lab, LAN_V4);
        assert_eq!(lab.inner(1), inner);
    }
    // The configuration has the last word.
    assert_eq!(client.stop(), 0);
    client = asleep(&lab, &config.clone().set("routes", "'none'"));
    assert!(!routed(), "{:?}", lab.c(1).routes());
    assert_eq!(client.stop(), 0);
    // What is remembered of another server isn't used, and what is damaged isn't either.
    let file = lab.path("client-state-1/client-tg0.remembered.json");
    std::fs::write(&file, "{").expect("damaged");
    client = lab.start_client(1, &config);
    assert!(client.log().contains("connecting once"), "{}", client.log());
    assert_eq!(lab.inner(1), inner);
}

#[test]
fn other_addresses_take_the_place_of_those_it_had() {
    let Some(lab) = Lab::new("others", 1) else { return };
    lab.write("clients.d/c1.toml", "addresses = ['10.9.0.77', 'fd09::77']");
    let _server = lab.start_server(&lab.server());
    let mut client = asleep(&lab, &on_demand(&lab, 1));
    assert_eq!(lab.inner(1), [ip("10.9.0.5"), ip("fd09::5")]);
    // The first packet has an address that isn't its own.
    lab.c(1).run(&["ping", "-n", "-c", "1", "-W", "1", INNER_V4]);
    client.wait_for_log("the server gave other addresses: 10.9.0.77, fd09::77 instead of 10.9.0.5, fd09::5");
    assert_eq!(lab.inner(1), [ip("10.9.0.77"), ip("fd09::77")]);
    ping_once(&lab, INNER_V4);
}

#[test]
fn two_clients_come_and_go_on_their_own() {
    let Some(lab) = Lab::new("two", 2) else { return };
    let server = lab.start_server(&lab.server().set("client_to_client", true));
    let before = Holdings::of(&server);
    let mut clients: Vec<Process> = [1, 2]
        .map(|n| {
            lab.wait_for_carrier(n);
            lab.try_client(n, &on_demand(&lab, n))
        })
        .into();
    clients.iter_mut().for_each(|client| client.wait_for_log("asleep"));
    lab.c(2).must(&["ping", "-n", "-c", "1", "-W", "20", INNER_V4]);
    assert_eq!(lab.session("c1"), None);
    assert!(lab.session("c2").is_some());
    // The other one is there, so its packets are answered, too.
    lab.c(1).must(&["ping", "-n", "-c", "3", "-i", "0.2", "-W", "20", "10.9.0.6"]);
    for client in &mut clients {
        says(client, "asleep: waits for packets", 2);
    }
    lab.wait_for_sessions(0);
    before.are_back(&server);
}

#[test]
fn a_killed_client_is_repaired_by_its_next_start() {
    let Some(lab) = Lab::new("kill9", 1) else { return };
    let _server = lab.start_server(&everything(&lab));
    let before = lab.c(1).routes();
    let config = learning(&lab);
    let mut client = lab.start_client(1, &config);
    let inner = lab.inner(1);
    falls_asleep(&lab, &mut client, 0);
    // Asleep: the device goes, and its routes with it; the server's host route stays until the next start.
    let others = || {
        let routes = lab.c(1).routes();
        routes.into_iter().filter(|route| !route.contains(SERVER_V4)).collect::<Vec<String>>()
    };
    client.kill();
    same_lines(&before, &others(), "the client's routes");
    // Waking: the tunnel process goes, too.
    let mut client = asleep(&lab, &config);
    assert!(client.log().contains("removing the host route to"), "{}", client.log());
    assert_eq!(lab.inner(1), inner);
    lab.swallow(&["tcp dport 55555"]);
    assert!(lab.c(1).cannot_ping(LAN_V4));
    let children = client.children();
    assert_eq!(children.len(), 1);
    client.kill();
    eventually("the tunnel process dies", || (!children.iter().any(|pid| alive(*pid))).then_some(()));
    lab.swallow_no_more();
    let mut client = asleep(&lab, &config);
    ping_once(&lab, LAN_V4);
    assert_eq!(client.stop(), 0);
    same_lines(&before, &lab.c(1).routes(), "the client's routes");
}

#[test]
fn a_tunnel_process_that_dies_takes_no_packet_along() {
    let Some(lab) = Lab::new("dies", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = asleep(&lab, &on_demand(&lab, 1));
    let (sender, receiver) = datagrams(&lab);
    lab.swallow(&["tcp dport 55555"]);
    (0..100).for_each(|n| send(&sender, n));
    for round in 1..=2 {
        says(&mut client, "connecting to", round);
        for pid in client.children() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill a child of our child");
        }
        says(&mut client, "the tunnel process died", round);
    }
    lab.swallow_no_more();
    assert_eq!(receive(&receiver, 101), (0..100).collect::<Vec<u32>>());
}

#[test]
fn packets_come_through_whenever_they_are_sent() {
    cycles("cycles", 6);
}

/// Many times up and down: `cargo test --test netns -- --ignored --exact on_demand::...`, `CYCLES=...`.
#[test]
#[ignore = "run by hand with CYCLES=1000: it takes as many seconds and more"]
fn packets_come_through_whenever_they_are_sent_for_long() {
    let set = std::env::var("CYCLES").ok().and_then(|cycles| cycles.parse().ok());
    cycles("cycleslong", set.unwrap_or(200));
}

/// Sends a numbered datagram at ever other moments before, in and after the goodbye: each arrives, once, in order.
fn cycles(test: &str, cycles: u32) {
    let Some(lab) = Lab::new(test, 1) else { return };
    let server = lab.start_server(&lab.server());
    let before = Holdings::of(&server);
    let mut client = asleep(&lab, &on_demand(&lab, 1));
    let (sender, receiver) = datagrams(&lab);
    let mut waits = Vec::new();
    for n in 0..cycles {
        let (sent, cold) = (Instant::now(), is_quiet(&lab, &client));
        send(&sender, n);
        assert_eq!(receive(&receiver, 1), [n]);
        waits.extend(cold.then(|| sent.elapsed()));
        // The goodbye comes two to three seconds after the last packet.
        says_something_new(&mut client, "idle for 1 s", n % 3 != 0);
        thread::sleep(Duration::from_millis(u64::from(n * 7 % 60)));
    }
    thread::sleep(Duration::from_secs(1));
    assert_eq!(receiver.recv(&mut [0; 64]).ok(), None, "one came twice");
    eventually("it sleeps at last", || is_quiet(&lab, &client).then_some(()));
    lab.wait_for_sessions(0);
    before.are_back(&server);
    waits.sort();
    let (median, worst) = (waits.get(waits.len() / 2), waits.last());
    println!("{cycles} packets in {} sessions", client.log().matches("tunnel up: ").count());
    println!("{} woke it from sleep: median {median:?}, worst {worst:?}", waits.len());
    assert_eq!(client.stop(), 0);
}

/// Waits until it says `text` once more, or not even for that.
fn says_something_new(client: &mut Process, text: &str, wait: bool) {
    let before = client.log().matches(text).count();
    if wait {
        says(client, text, before + 1);
    } else {
        thread::sleep(Duration::from_millis(1_990));
    }
}

/// The configuration of a client that sleeps soon; it has the server tell it addresses and routes.
fn learning(lab: &Lab) -> Config {
    on_demand(lab, 1).without("on_demand.addresses").without("routes")
}

/// The same with fixed addresses, and nothing for the server to say.
fn on_demand(lab: &Lab, n: usize) -> Config {
    lab.client(n)
        .set("routes", "'none'")
        .set("on_demand.enabled", true)
        .set("on_demand.idle", "'1s'")
        .set("on_demand.addresses", format_args!("['10.9.0.{0}/24', 'fd09::{0}/64']", n + 4))
}

/// Starts client 1, which is asleep then.
fn asleep(lab: &Lab, config: &Config) -> Process {
    lab.wait_for_carrier(1);
    let mut client = lab.try_client(1, config);
    client.wait_for_log("asleep: waits for packets");
    client
}

/// One echo request, and its answer. There may be time, but no second request.
fn ping_once(lab: &Lab, to: &str) {
    lab.c(1).must(&["ping", "-n", "-c", "1", "-W", "20", to]);
}

/// Waits for the `n`th session.
fn woken(client: &mut Process, n: usize) {
    says(client, "tunnel up: ", n);
}

/// Waits until it sleeps, after having been awake `n` times.
fn falls_asleep(lab: &Lab, client: &mut Process, n: usize) {
    says(client, "asleep: waits for packets", n + 1);
    eventually("nothing is left of the connection", || is_quiet(lab, client).then_some(()));
}

/// Whether it sleeps within twice the time that it takes, after having been awake `n` times.
fn eventually_asleep(client: &mut Process, n: usize) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(6) {
        if client.log().matches("asleep: waits for packets").count() >= n {
            return true;
        }
        thread::sleep(Duration::from_millis(50));
    }
    false
}

/// Waits until it has said `text` so many times.
fn says(client: &mut Process, text: &str, times: usize) {
    let mut log = String::new();
    for _ in 0..1_500 {
        log = client.log();
        if log.matches(text).count() >= times {
            return;
        }
        assert_eq!(client.try_exit(), None, "it ended");
        thread::sleep(Duration::from_millis(20));
    }
    panic!("not {times} times {text:?}:\n{log}");
}

/// The client has no process but its supervisor, and its host no socket to the server.
fn is_quiet(lab: &Lab, client: &Process) -> bool {
    let sockets = lab.c(1).must(&["ss", "-Hntua"]);
    // What the kernel remembers of a connection that was closed is no socket.
    let to_server = |line: &str| line.contains(":55555") && !line.contains("TIME-WAIT");
    client.children().is_empty() && !sockets.lines().any(to_server)
}

/// A socket of the client's that sends to one of the server's through the tunnel.
fn datagrams(lab: &Lab) -> (UdpSocket, UdpSocket) {
    // The server's inner address may not be there yet.
    let receiver = lab.srv().within(|| UdpSocket::bind("0.0.0.0:0")).expect("bind");
    receiver.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    let port = receiver.local_addr().expect("an address").port();
    (udp_to(&lab.c(1), (ip(INNER_V4), port).into()).expect("a socket"), receiver)
}

fn send(socket: &UdpSocket, number: u32) {
    socket.send(&number.to_be_bytes()).expect("sent");
}

/// The numbers of the datagrams that come, at most `most`: until one second is quiet behind them, or nothing comes at
/// all for as long as it may take.
fn receive(socket: &UdpSocket, most: usize) -> Vec<u32> {
    let (mut numbers, mut quiet) = (Vec::new(), 0);
    while numbers.len() < most && quiet < 200 {
        let mut bytes = [0; 64];
        match socket.recv(&mut bytes) {
            Ok(4) => numbers.push(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
            Ok(n) => panic!("a datagram of {n} bytes"),
            Err(_) => quiet += if numbers.is_empty() { 1 } else { 20 },
        }
    }
    numbers
}

/// What the client's device had no room for.
fn dropped(lab: &Lab) -> u64 {
    let text = lab.c(1).ip(&["-s", "-j", "link", "show", "tg0"]);
    let links: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    links[0]["stats64"]["tx"]["dropped"].as_u64().expect("a counter")
}
