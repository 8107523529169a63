//! Connections before they are authenticated: each source has its share, and what one does is no other's trouble.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::certificates::{Wish, ca, client, credentials, make};
use crate::identity::authority;
use crate::lab::{INNER_V4, Lab, PATIENCE, eventually, ip};
use crate::raw_client::Dialler;
use crate::traffic::Conversation;

#[test]
fn one_host_with_hundreds_of_silent_connections_keeps_nobody_out() {
    let Some(lab) = Lab::new("silenthost", 2) else { return };
    let server = lab.start_server(&lab.server());
    let attacker = Dialler::new(&lab, 1);
    // Some are refused so fast that connecting fails.
    let silent: Vec<TcpStream> = (0..400).filter_map(|_| attacker.tcp().ok()).collect();
    eventually("its share is taken", || (lab.status()["handshakes"] == 8).then_some(()));
    let status = lab.status();
    assert_eq!((&status["handshakes"], &status["waiting"]), (&8.into(), &64.into()), "{status}");
    server.wait_for_children(8);
    let mut busy = crate::hardship::cpu_ticks(server.pid());
    thread::sleep(Duration::from_secs(1));
    busy = crate::hardship::cpu_ticks(server.pid()) - busy;
    assert!(busy < 50, "the guard spins while connections wait: {busy} ticks in a second");
    // It was ten seconds for everybody once.
    let others = Dialler::new(&lab, 2);
    let begun = Instant::now();
    let mut honest = others.connect();
    let took = begun.elapsed();
    println!("a session beside 400 silent connections of another host: {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(honest.ping(1), 1);
    // The silent ones fail at their deadline, and their source is refused for that.
    let status = eventually("the attacker is refused", || {
        Some(lab.status()).filter(|status| status["penalised"][0]["source"] == "198.18.1.2")
    });
    assert!(status["failed"]["deadline"].as_u64() >= Some(4), "{status}");
    assert!(status["refused"]["crowded"].as_u64() >= Some(300), "{status}");
    assert_eq!(attacker.tcp().map_or(0, until_closed), 0);
    let shown = lab.tunguard(&["status", "--socket", &lab.path("admin.sock").display().to_string()]);
    for line in ["handshakes that failed: ", "connections refused: ", "refused for a while: 198.18.1.2 for "]
    {
        assert!(shown.contains(line), "{line:?} is not in: {shown}");
    }
    // What was said of it is bounded.
    let lines = server.log().lines().filter(|line| line.contains("turned away")).count();
    assert!(lines < 150, "{lines} lines");
    assert_eq!(honest.ping(2), 1);
    drop(silent);
}

#[test]
fn a_class_behind_one_address_gets_in_within_seconds() {
    let Some(lab) = Lab::new("class", 1) else { return };
    // One identity each, as in life, all from one host.
    let ca = authority(&lab);
    let names: Vec<String> = (0..30).map(|n| format!("p{n}")).collect();
    let pupils: Vec<_> =
        names.iter().map(|name| make(&Wish { names: &[name], ..client() }, Some(&ca))).collect();
    let _server = lab.start_server(&lab.server());
    let begun = Instant::now();
    thread::scope(|scope| {
        for pupil in &pupils {
            let dialler = Dialler::with(&lab, 1, &credentials(&ca, pupil));
            scope.spawn(move || drop(dialler.connect()));
        }
    });
    println!("thirty sessions at once from one address: {:?}", begun.elapsed());
    let status = lab.status();
    assert!(status["refused"].as_object().is_some_and(|r| r.values().all(|n| n == 0)), "{status}");
}

#[test]
fn garbage_has_a_stranger_refused_and_not_a_neighbour_of_sessions() {
    let Some(lab) = Lab::new("penalty", 3) else { return };
    let _server = lab.start_server(&lab.server().set("exempt_sources", "['198.18.3.0/24']"));
    let _neighbour = lab.start_client(2, &lab.client(2));
    let mut talk = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
    for host in 1..=3 {
        let dialler = Dialler::new(&lab, host);
        for _ in 0..12 {
            let Ok(mut tcp) = dialler.tcp() else { continue };
            let _ = tcp.write_all(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n");
            until_closed(tcp);
        }
    }
    let status = lab.status();
    let penalised: Vec<_> =
        status["penalised"].as_array().expect("a list").iter().map(|p| &p["source"]).collect();
    assert_eq!(penalised, ["198.18.1.2"], "{status}");
    assert!(status["failed"]["garbage"].as_u64() >= Some(7 + 12 + 12), "{status}");
    assert!(status["refused"]["penalised"].as_u64() >= Some(1), "{status}");
    talk.exchange(10_000);
    for host in [2, 3] {
        Dialler::new(&lab, host).connect().leave();
    }
}

#[test]
fn a_refused_certificate_does_not_lock_neighbours_out() {
    let Some(lab) = Lab::new("expired", 1) else { return };
    let (own, strangers) = (authority(&lab), ca("another"));
    let foreign = make(&client(), Some(&strangers));
    let _server = lab.start_server(&lab.server());
    let broken = Dialler::with(&lab, 1, &credentials(&own, &foreign));
    for _ in 0..30 {
        // Refused by TLS, at its first message at the latest.
        let _ = broken.control().map(|control| broken.hello_over(control).1.expect_err("refused"));
    }
    let status = lab.status();
    assert!(status["failed"]["certificate"].as_u64() >= Some(20), "{status}");
    assert_eq!(status["penalised"], serde_json::json!([]), "{status}");
    Dialler::new(&lab, 1).connect().leave();
}

#[test]
fn a_crash_counts_against_its_source_whoever_else_is_there() {
    let Some(lab) = Lab::new("crashes", 2) else { return };
    let _server = lab.start_server(&lab.server());
    let attacker = Dialler::new(&lab, 1);
    for (signal, crashes) in [(Signal::SIGKILL, 0), (Signal::SIGABRT, 1), (Signal::SIGABRT, 2)] {
        let session = attacker.connect();
        let pid = eventually("its worker", || lab.session("c1").and_then(|s| s["pid"].as_i64()));
        kill(Pid::from_raw(pid as i32), signal).expect("kill a worker");
        lab.wait_for_sessions(0);
        assert_eq!(lab.status()["failed"]["crash"], crashes);
        drop(session);
    }
    assert_eq!(lab.status()["penalised"][0]["source"], "198.18.1.2");
    assert_eq!(attacker.tcp().map_or(0, until_closed), 0);
    Dialler::new(&lab, 2).connect().leave();
}

#[test]
fn a_worker_that_keeps_no_deadline_is_killed_at_the_guards() {
    let Some(lab) = Lab::new("guardsdeadline", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let _silent = Dialler::new(&lab, 1).tcp().expect("the port is open");
    let worker = server.wait_for_children(1)[0];
    kill(Pid::from_raw(worker), Signal::SIGSTOP).expect("stop a worker");
    server.wait_for_children(0);
    server.wait_for_log("doesn't end in time: killed");
    assert_eq!(lab.status()["failed"]["deadline"], 1);
}

#[test]
fn a_handshake_of_more_than_64_kib_is_cut() {
    let Some(lab) = Lab::new("bytecap", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut tcp = Dialler::new(&lab, 1).tcp().expect("the port is open");
    // A ClientHello that says it is almost 128 KiB long, which OpenSSL would read: records of 16 KiB without an end.
    let mut hello = vec![1, 1, 0xff, 0, 3, 3];
    hello.resize(120 << 10, 0);
    for record in hello.chunks(16 << 10) {
        let header = [&[22, 3, 1][..], &(record.len() as u16).to_be_bytes()].concat();
        let _ = tcp.write_all(&header).and_then(|()| tcp.write_all(record));
    }
    server.wait_for_log("no session: ");
    assert!(server.log().contains("too much before the handshake was done"), "{}", server.log());
    assert_eq!(lab.status()["failed"]["garbage"], 1);
}

/// How many bytes the server says before it closes.
fn until_closed(mut tcp: TcpStream) -> usize {
    tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut said = 0;
    while let Ok(n @ 1..) = tcp.read(&mut [0; 4_096]) {
        said += n;
    }
    said
}
