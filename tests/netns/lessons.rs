//! Bugs that other VPNs and daemons had, each as a test that fails where we have it, too (docs/reliability.md has the list;
//! most have their test beside the code in question).

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tunguard::wire::control::Message;

use crate::churn::memory_kib;
use crate::faults::{Baseline, Bystander};
use crate::lab::{Lab, SERVER_V4, outer, outer_v4};
use crate::raw_client::Dialler;

/// CVE-2021-3773: a client inside the tunnel sends from the server's own port to another host. A server that translates
/// addresses must not use its port for that: what the other host sends to the server would be handed to the client.
#[test]
fn a_client_does_not_shadow_the_servers_port() {
    let Some(lab) = Lab::new("shadow", 2) else { return };
    let _server = lab.start_server(&lab.server().set("nat", true).set("push.routes", "['192.168.50.0/24']"));
    let _attacker = lab.start_client(1, &lab.client(1));
    let victim = outer_v4(2);
    lab.c(1).ip(&["route", "add", &format!("{victim}/32",), "dev", "tg0"]);
    let inside = lab.inner_v4(1);
    let attacker = lab.c(1).within(|| UdpSocket::bind((inside, 55555))).expect("bind");
    attacker.set_read_timeout(Some(Duration::from_secs(2))).expect("a timeout");
    let victims = lab.c(2).within(|| UdpSocket::bind((victim.as_str(), 4_000))).expect("bind");
    victims.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    attacker.send_to(b"from the server's port?", (victim.as_str(), 4_000)).expect("send");
    let (_, from) = victims.recv_from(&mut [0; 64]).expect("it is let through");
    assert_eq!(from.ip().to_string(), SERVER_V4, "it isn't translated");
    victims.send_to(b"for the server", outer(SERVER_V4)).expect("send");
    let stolen = attacker.recv(&mut [0; 64]);
    assert!(
        matches!(&stolen, Err(e) if e.kind() == ErrorKind::WouldBlock),
        "the attacker has it: {stolen:?}"
    );
    // What answers it goes back, as ever.
    victims.send_to(b"an answer", from).expect("send");
    let mut buffer = [0; 64];
    let len = attacker.recv(&mut buffer).expect("the answer");
    assert_eq!(&buffer[..len], b"an answer");
}

/// CVE-2025-26466: pings without end, whose answers nobody reads. Pass: no more of them are read at some point, and the
/// memory of who answers stays what it was.
#[test]
fn answers_that_nobody_reads_are_bounded() {
    let Some(lab) = Lab::new("pingflood", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    let mut client = Dialler::new(&lab, 1).connect();
    let worker = lab.session("c1").and_then(|s| s["pid"].as_i64()).expect("a worker") as i32;
    let before = memory_kib(worker);
    let (begun, mut most) = (Instant::now(), before);
    // 16 bytes each; what the kernel takes for both directions is a few megabytes.
    let broken = (0..5_000_000_u64).find_map(|n| {
        if n % 10_000 == 0 && server.children().contains(&worker) {
            most = most.max(crate::process::field(worker, "VmRSS").map_or(0, |_| memory_kib(worker)));
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "it reads and answers and never ends");
        client.control.send(&Message::Ping(n)).err()
    });
    println!("{broken:?} after {:?}, {} KiB more", begun.elapsed(), most - before);
    assert!(broken.is_some(), "80 MB of pings were taken");
    assert!(most < before + 4_096, "the worker grew from {before} to {most} KiB");
    bystander.is_unharmed(&lab, "pings without end");
    drop(client);
    // Its session lives on for a while without a control connection, unless its client comes back and leaves.
    Dialler::new(&lab, 1).connect().leave();
    baseline.is_back(&lab, &server, "pings without end");
}

/// CVE-2024-6387: work in signal handlers. Pass: a storm of signals at any time changes nothing.
#[test]
fn a_storm_of_signals_is_handled_one_after_the_other() {
    let Some(lab) = Lab::new("storm", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    for round in 0..2_000 {
        server.signal(Signal::SIGCHLD);
        if round % 100 == 0 {
            server.signal(Signal::SIGHUP);
            let _ = Dialler::new(&lab, 1).tcp();
        }
    }
    bystander.is_unharmed(&lab, "signals");
    assert_eq!(server.try_exit(), None);
    // It comes after those that are under way, which refuse handshakes that they overtake.
    lab.tunguard(&["reload", "--socket", "admin.sock"]);
    Dialler::new(&lab, 1).connect().leave();
    baseline.is_back(&lab, &server, "signals");
}
