//! Everything at once over a network that loses packets: what arrives is right, and what doesn't has a named reason.

use std::env;
use std::net::{IpAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::books::{Balance, Books, drops_of_process};
use crate::churn::{memory_kib, queue_names};
use crate::kill::Holdings;
use crate::lab::{INNER_V4, Lab, Namespace, PATIENCE, SERVER_V4, SERVER_V6, eventually, ip, outer, outer_v4};
use crate::mix::{Amount, Outcome, Turns, mix};
use crate::process::Process;
use crate::traffic::{Noise, udp_to};

#[test]
fn every_packet_is_accounted_for() {
    soak("soak", &Plan { sessions: 8, seconds: 3, permille: 20, tcp_bytes: 256 << 10 });
}

/// `make soak`.
#[test]
#[ignore = "run by make soak"]
fn every_packet_is_accounted_for_at_length() {
    let of = |name: &str, default: usize| {
        let set = env::var(name).ok().filter(|value| !value.is_empty());
        set.map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
    };
    let plan = Plan {
        sessions: of("SESSIONS", 100).max(BLOCKED),
        seconds: of("SECONDS", 120) as u64,
        permille: of("LOSS", 10) as u32,
        tcp_bytes: 512 << 10,
    };
    soak("long", &plan);
}

struct Plan {
    sessions: usize,
    seconds: u64,
    /// Of the datagrams, in each direction, that the network loses.
    permille: u32,
    tcp_bytes: usize,
}

fn soak(test: &str, plan: &Plan) {
    let Some(lab) = Lab::new(test, plan.sessions) else { return };
    let books = Books::open(&lab, plan.sessions, plan.permille);
    let mut server = lab.start_server(&lab.server().set("data.rekey", "'10s'").set("max_clients", 250));
    let holdings = Holdings::of(&server);
    let start = |n: usize| {
        let remote = remote(n);
        let suite = ["aes-256-gcm", "chacha20-poly1305", "aes-256-ctr-hmac-sha256"][n % 3];
        let config = lab.client(n).set("remote", format_args!("['{remote}']"));
        lab.try_client(n, &config.set("data.suites", format_args!("['{suite}']")))
    };
    let mut clients: Vec<_> = (1..=plan.sessions).map(start).collect();
    for (n, client) in (1..).zip(&mut clients) {
        lab.wait_for_tunnel(n, client);
    }
    let ids = || lab.sessions().iter().map(|s| s["session"].to_string()).collect::<Vec<_>>();
    let sessions = ids();
    let memory_before = memory_kib(server.pid());

    let amount = Amount {
        until: Instant::now() + Duration::from_secs(plan.seconds),
        tcp_bytes: plan.tcp_bytes,
        // The same number of datagrams a second for any number of sessions.
        tick: Duration::from_millis(plan.sessions as u64),
    };
    let (lab, turns, mut memory_most) = (&lab, &Turns::new(TCP_AT_ONCE), memory_before);
    let mut forged = 0;
    let mut outcomes: Vec<Outcome> = thread::scope(|scope| {
        let all: Vec<_> =
            (1..=plan.sessions).map(|n| scope.spawn(move || mix(lab, n, amount, turns))).collect();
        forged = harass(lab, &books, &clients);
        while !all.iter().all(|one| one.is_finished()) {
            memory_most = memory_most.max(memory_kib(server.pid()));
            thread::sleep(Duration::from_millis(500));
        }
        all.into_iter()
            .map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    assert_eq!(ids(), sessions, "sessions before and after");

    let memory_after = memory_kib(server.pid());
    let mut balance = books.close(&mut server, &mut clients);
    balance.accounts[FORGED - 1].forged = forged;
    let report = report(&balance, &mut outcomes);
    println!("{report}guard: {memory_before} KiB before, at most {memory_most}, {memory_after} after");
    let faults = balance.faults();
    assert!(faults.is_empty(), "it doesn't add up: {faults:#?}\n{report}");
    inner_losses_are_covered(&balance, &outcomes);
    harassment_has_its_names(&balance);

    // Nothing is left of it.
    holdings.are_back(&server);
    assert_eq!(queue_names(lab, server.pid()), "");
    assert_eq!(server.stop(), 0);
    let all: Vec<Namespace> = (1..=plan.sessions).map(|n| lab.c(n)).chain([lab.srv(), lab.net()]).collect();
    for namespace in all {
        eventually("no process is left", || namespace.pids().is_empty().then_some(()));
    }
}

/// Provokes drops of every kind that a test can provoke, each in a session of its own; how many datagrams it forged.
fn harass(lab: &Lab, books: &Books<'_>, clients: &[Process]) -> u64 {
    let session = |n: usize| lab.session(&format!("c{n}")).expect("a session");
    // A network that lets no UDP through for a while.
    books.block(BLOCKED, true);
    eventually("a session inside its control connection", || {
        let session = session(BLOCKED);
        (session["peer"] == session["tcp_peer"]).then_some(())
    });
    // Datagrams of a session that exists, sealed by nobody.
    let id =
        session(FORGED)["session"].as_str().and_then(|id| u64::from_str_radix(id, 16).ok()).expect("an ID");
    let mut noise = Noise::new(id);
    let liar = udp_to(&lab.c(FORGED), outer(remote(FORGED))).expect("a socket");
    for _ in 0..SOME {
        let mut datagram = [0; 200];
        noise.fill(&mut datagram[10..]);
        datagram[..8].copy_from_slice(&id.to_be_bytes());
        liar.send(&datagram).expect("send");
    }
    // Packets from an address that isn't the session's, and to one that is nobody's.
    let spoof = lab.c(SPOOFED).within(|| UdpSocket::bind((outer_v4(SPOOFED), 0))).expect("bind");
    let lost = lab.srv().within(|| UdpSocket::bind((INNER_V4, 0))).expect("bind");
    for _ in 0..SOME {
        spoof.send_to(b"not mine", (INNER_V4, 9)).expect("send");
        lost.send_to(b"nobody's", ("10.9.0.254", 9)).expect("send");
    }
    // Ends that don't read what they are sent.
    let tunnel = clients[DEAF_CLIENT - 1].wait_for_children(1)[0];
    while_stopped(tunnel, || {
        let full = || drops_of_process(&lab.c(DEAF_CLIENT), tunnel) > 0;
        flood(&lab.srv(), lab.inner_v4(DEAF_CLIENT), "the client's socket is full", full);
    });
    let worker = session(DEAF_WORKER)["pid"].as_i64().expect("a worker") as i32;
    while_stopped(worker, || {
        let full = || drops_of_process(&lab.srv(), worker) > 0;
        flood(&lab.c(DEAF_WORKER), ip(INNER_V4), "the worker's socket is full", full);
        let full = || lab.status()["guard_drops"]["queue_full"].as_u64() > Some(0);
        flood(&lab.srv(), lab.inner_v4(DEAF_WORKER), "the worker's queue is full", full);
    });
    books.block(BLOCKED, false);
    SOME
}

fn while_stopped(pid: i32, work: impl FnOnce()) {
    kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("stop a process");
    work();
    kill(Pid::from_raw(pid), Signal::SIGCONT).expect("wake a process");
}

/// Datagrams that nobody listens to, until `enough`.
fn flood(from: &Namespace, to: IpAddr, what: &str, enough: impl Fn() -> bool) {
    let socket = udp_to(from, (to, 9).into()).expect("a socket");
    let deadline = Instant::now() + PATIENCE;
    while !enough() {
        assert!(Instant::now() < deadline, "flooded {to} in vain: {what}");
        // The news that nobody listens comes as an error.
        (0..1_000).for_each(|_| drop(socket.send(&[0x77; 1_200])));
    }
}

fn harassment_has_its_names(balance: &Balance) {
    let account = |n: usize| &balance.accounts[n - 1];
    let dropped = |n: usize, reason: &str| account(n).server.drops.get(reason).copied().unwrap_or_default();
    // Keys may have been renewed: their epoch was 0.
    let refused = dropped(FORGED, "bad_tag") + dropped(FORGED, "unknown_epoch");
    assert!(refused > SOME / 2 && refused <= SOME, "{refused} forged datagrams refused");
    let spoofed = dropped(SPOOFED, "source_not_ours");
    assert!(spoofed > SOME / 2 && spoofed <= SOME, "{spoofed} spoofed packets refused");
    let strays = balance.guard_dropped("no_route");
    assert!(strays > SOME / 2 && strays <= SOME, "{strays} packets to nobody");
    assert!(account(DEAF_CLIENT).socket_full[1] > 0);
    assert!(account(DEAF_WORKER).socket_full[0] > 0);
    assert!(balance.guard_dropped("queue_full") > 0);
    for ledger in [&account(BLOCKED).client, &account(BLOCKED).server] {
        assert!(ledger.sent_inside > 0 && ledger.received_inside > 0, "{ledger:?}");
    }
}

/// Half of the clients dial the server's IPv6 address.
fn remote(n: usize) -> &'static str {
    [SERVER_V6, SERVER_V4][n % 2]
}

/// Datagrams and pings of the applications that didn't arrive: no more than were dropped for a named reason.
fn inner_losses_are_covered(balance: &Balance, outcomes: &[Outcome]) {
    for (n, (account, outcome)) in (1..).zip(balance.accounts.iter().zip(outcomes)) {
        for (way, up) in [(0, true), (1, false)] {
            let streams = || outcome.streams.iter().filter(|stream| stream.up == up);
            let lost: u64 = streams().map(|s| s.sent - s.arrived() - s.dropped()).sum();
            let before = if up { account.client_device_dropped } else { balance.dropped_by_guard() };
            let named = account.dropped_on_the_way(way) + before;
            assert!(lost <= named, "session {n}, way {way}: {lost} datagrams lost, {named} named");
        }
    }
}

fn report(balance: &Balance, outcomes: &mut [Outcome]) -> String {
    let mut text = balance.table();
    let transfers: u64 = outcomes.iter().map(|outcome| outcome.transfers).sum();
    text += &format!("TCP: {transfers} connections, all digests equal\n");
    for (up, name) in [(true, "to the server"), (false, "to the client")] {
        let (mut sent, mut arrived, mut dropped, mut reordered) = (0, 0, 0, 0);
        for stream in outcomes.iter_mut().flat_map(|o| &mut o.streams).filter(|s| s.up == up) {
            // What came while the tunnels got quiet.
            stream.receive();
            sent += stream.sent;
            arrived += stream.arrived();
            dropped += stream.dropped();
            reordered += stream.reordered;
        }
        text += &format!(
            "UDP {name}: {sent} sent, {arrived} arrived whole, {dropped} found a full socket, {reordered} reordered\n"
        );
    }
    for (way, name) in ["clients", "the server"].into_iter().enumerate() {
        let sum =
            |of: fn(&crate::mix::Pings) -> u64| -> u64 { outcomes.iter().map(|o| of(&o.pings[way])).sum() };
        text += &format!("pings by {name}: {} sent, {} answered\n", sum(|p| p.sent), sum(|p| p.answered));
    }
    text
}

// Sessions to which something special happens.
const FORGED: usize = 3;
const SPOOFED: usize = 4;
const DEAF_CLIENT: usize = 5;
const DEAF_WORKER: usize = 6;
const BLOCKED: usize = 7;
const SOME: u64 = 500;
/// Transfers under way at any time. With many more, two cores can't do what is asked of them: the device drops half of
/// what it is given, and a TCP connection that waits longer each time may wait for minutes.
const TCP_AT_ONCE: usize = 16;
