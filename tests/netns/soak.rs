//! Everything at once over a network that loses packets: what arrives is right, and what doesn't has a named reason.

use std::env;
use std::thread;
use std::time::{Duration, Instant};

use crate::books::{Balance, Books};
use crate::churn::{memory_kib, queue_names};
use crate::kill::Holdings;
use crate::lab::{Lab, Namespace, SERVER_V4, SERVER_V6, eventually};
use crate::mix::{Amount, Outcome, Turns, mix};

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
        sessions: of("SESSIONS", 100),
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
        let remote = [SERVER_V6, SERVER_V4][n % 2];
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
    let mut outcomes: Vec<Outcome> = thread::scope(|scope| {
        let all: Vec<_> =
            (1..=plan.sessions).map(|n| scope.spawn(move || mix(lab, n, amount, turns))).collect();
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
    let balance = books.close(&mut server, &mut clients);
    let report = report(&balance, &mut outcomes);
    println!("{report}guard: {memory_before} KiB before, at most {memory_most}, {memory_after} after");
    let faults = balance.faults();
    assert!(faults.is_empty(), "it doesn't add up: {faults:#?}\n{report}");
    inner_losses_are_covered(&balance, &outcomes);

    // Nothing is left of it.
    holdings.are_back(&server);
    assert_eq!(queue_names(lab, server.pid()), "");
    assert_eq!(server.stop(), 0);
    let all: Vec<Namespace> = (1..=plan.sessions).map(|n| lab.c(n)).chain([lab.srv(), lab.net()]).collect();
    for namespace in all {
        eventually("no process is left", || namespace.pids().is_empty().then_some(()));
    }
}

/// Datagrams and pings of the applications that didn't arrive: no more than were dropped for a named reason.
fn inner_losses_are_covered(balance: &Balance, outcomes: &[Outcome]) {
    for (n, (account, outcome)) in (1..).zip(balance.accounts.iter().zip(outcomes)) {
        for (way, up) in [(0, true), (1, false)] {
            let streams = || outcome.streams.iter().filter(|stream| stream.up == up);
            let lost: u64 = streams().map(|s| s.sent - s.arrived() - s.dropped()).sum();
            let device = if up { account.client_device_dropped } else { balance.device_dropped() };
            let named = account.dropped_on_the_way(way) + device;
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

/// Transfers under way at any time. With many more, two cores can't do what is asked of them: the device drops half of
/// what it is given, and a TCP connection that waits longer each time may wait for minutes.
const TCP_AT_ONCE: usize = 16;
