//! Any process may die at any moment: the others go on, and nothing is left behind.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{INNER_V4, Lab, eventually, ip, same_lines};
use crate::process::{Process, alive, descriptors};
use crate::raw_client::Dialler;
use crate::traffic::{Conversation, transfer};

#[test]
fn a_client_that_leaves_is_gone_at_once() {
    let Some(lab) = Lab::new("leave", 1) else { return };
    let server = lab.start_server(&lab.server());
    let before = Holdings::of(&server);
    let routes = lab.c(1).routes();
    let mut client = lab.start_client(1, &lab.client(1));
    let worker = server.wait_for_children(1)[0];
    let processes = [vec![client.pid()], client.children()].concat();
    assert!(processes.len() > 1, "supervisor and tunnel process are one");

    let left = Instant::now();
    assert_eq!(client.stop(), 0);
    server.wait_for_children(0);
    // Far below `linger`, which is 10 minutes.
    assert!(left.elapsed() < Duration::from_secs(5), "it took {:?}", left.elapsed());
    lab.wait_for_sessions(0);
    before.are_back(&server);
    assert!(!alive(worker));
    assert!(!processes.into_iter().any(alive), "a process of the client is left");
    same_lines(&routes, &lab.c(1).routes(), "the client's routes");
    assert!(lab.c(1).addresses("tg0").is_empty());
}

#[test]
fn a_killed_client_is_released_after_linger() {
    let Some(lab) = Lab::new("killclient", 1) else { return };
    let server = lab.start_server(&lab.server().set("linger", "'2s'"));
    let before = Holdings::of(&server);
    let mut client = lab.start_client(1, &lab.client(1));
    let tunnel = client.children();
    let addresses = lab.inner(1);
    client.kill();
    eventually("the tunnel process dies with its supervisor", || {
        (!tunnel.iter().any(|pid| alive(*pid))).then_some(())
    });
    lab.wait_for_sessions(0);
    server.wait_for_children(0);
    before.are_back(&server);

    // The next start repairs whatever there is to repair, and has the same addresses.
    let _client = lab.start_client(1, &lab.client(1));
    assert_eq!(lab.inner(1), addresses);
}

#[test]
fn a_killed_tunnel_process_is_replaced() {
    let Some(lab) = Lab::new("killtunnel", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let addresses = lab.inner(1);
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(10_000);
    for pid in client.children() {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill a child of our child");
    }
    talk.exchange(1_000_000);
    lab.wait_for_tunnel(1, &mut client);
    assert_eq!(lab.inner(1), addresses);
}

#[test]
fn a_killed_worker_takes_nobody_along() {
    let Some(lab) = Lab::new("killworker", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut one = lab.start_client(1, &lab.client(1));
    let _two = lab.start_client(2, &lab.client(2));
    let addresses = lab.inner(1);
    let mut victim = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    let mut bystander = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
    victim.exchange(10_000);
    bystander.exchange(10_000);
    let pid_of = |name: &str| lab.session(name).and_then(|s| s["pid"].as_i64());
    let (first, other) = (pid_of("c1").expect("a worker"), pid_of("c2").expect("a worker"));

    kill(Pid::from_raw(first as i32), Signal::SIGKILL).expect("kill a worker");
    bystander.exchange(1_000_000);
    // The client is back by itself, with the same addresses: its connection inside goes on.
    victim.exchange(1_000_000);
    lab.wait_for_tunnel(1, &mut one);
    assert_eq!(lab.inner(1), addresses);
    assert_ne!(pid_of("c1"), Some(first));
    assert_eq!(pid_of("c2"), Some(other));
    server.wait_for_children(2);
}

#[test]
fn a_killed_server_is_found_again() {
    let Some(lab) = Lab::new("killguard", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut one = lab.start_client(1, &lab.client(1));
    let mut two = lab.start_client(2, &lab.client(2));
    let addresses = [lab.inner(1), lab.inner(2)];
    let workers = server.wait_for_children(2);
    // A connection through the tunnel needs its far end alive: the server's host is, only its VPN dies.
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(100_000);

    server.kill();
    eventually("the workers die with their guard", || (!workers.iter().any(|pid| alive(*pid))).then_some(()));
    thread::sleep(Duration::from_millis(500));
    let _server = lab.start_server(&lab.server());
    lab.wait_for_tunnel(1, &mut one);
    lab.wait_for_tunnel(2, &mut two);
    talk.exchange(1_000_000);
    assert_eq!([lab.inner(1), lab.inner(2)], addresses);
    transfer(&lab.c(2), &lab.srv(), ip(INNER_V4), 1 << 20);
}

#[test]
fn a_stopped_server_says_goodbye_and_puts_the_host_back() {
    let Some(lab) = Lab::new("stop", 1) else { return };
    let before = host(&lab);
    let mut server =
        lab.start_server(&lab.server().set("nat", true).set("push.routes", "['192.168.50.0/24']"));
    let mut client = lab.start_client(1, &lab.client(1));
    let workers = server.wait_for_children(1);
    assert_ne!(host(&lab), before);
    assert_eq!(server.stop(), 0);
    assert!(!workers.into_iter().any(alive), "a worker outlives its guard");
    same_lines(&before, &host(&lab), "the server's host");
    assert!(!lab.path("admin.sock").exists(), "the admin socket is left");
    client.wait_for_log("the server shut down");
    // It comes back with the server.
    let _server = lab.start_server(&lab.server());
    lab.wait_for_tunnel(1, &mut client);
}

#[test]
fn a_server_stopped_amid_handshakes_ends_well() {
    let Some(lab) = Lab::new("stopamid", 2) else { return };
    for _ in 0..3 {
        let mut server = lab.start_server(&lab.server());
        let stopped = AtomicBool::new(false);
        thread::scope(|scope| {
            for n in [1, 2, 1, 2] {
                let dialler = Dialler::new(&lab, n);
                let stopped = &stopped;
                scope.spawn(move || {
                    while !stopped.load(Ordering::Relaxed) {
                        // It may fail at any step.
                        let control = dialler.tcp().ok().and_then(|tcp| dialler.control_over(tcp).ok());
                        control.map(|control| dialler.hello_over(control));
                    }
                });
            }
            thread::sleep(Duration::from_millis(300));
            let begun = Instant::now();
            assert_eq!(server.stop(), 0);
            assert!(begun.elapsed() < Duration::from_secs(8), "it took {:?}", begun.elapsed());
            stopped.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn the_newest_of_two_clients_with_one_certificate_wins() {
    let Some(lab) = Lab::new("twice", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut old = lab.start_client(1, &lab.client(1));
    let addresses = lab.inner(1);
    let same =
        lab.client(2).set("tls.cert", "'certs/clients/c1.pem'").set("tls.key", "'certs/clients/c1.key'");
    let _new = lab.start_client(2, &same);
    assert_eq!(old.exit(), tunguard::exit::Exit::Refused as i32, "{}", old.log());
    assert!(old.log().contains("took over"), "{}", old.log());
    assert_eq!(lab.inner(2), addresses);
    lab.wait_for_sessions(1);
    server.wait_for_children(1);
    assert!(lab.c(2).pings(INNER_V4, 1_000, 3));
}

#[test]
fn a_stopped_worker_is_replaced_when_its_client_comes_back() {
    let Some(lab) = Lab::new("sigstop", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut one = lab.start_client(1, &lab.client(1));
    let _two = lab.start_client(2, &lab.client(2));
    let pid = lab.session("c1").and_then(|s| s["pid"].as_i64()).expect("a worker");
    kill(Pid::from_raw(pid as i32), Signal::SIGSTOP).expect("stop a worker");
    // The status and the other session don't wait for it.
    assert_eq!(lab.sessions().len(), 2);
    assert!(lab.c(2).pings(INNER_V4, 1_000, 10));
    one.kill();
    let _again = lab.start_client(1, &lab.client(1));
    server.wait_for_children(2);
    assert!(!alive(pid as i32));
}

/// What a guard holds while nobody is connected.
#[derive(Debug, PartialEq, Eq)]
pub struct Holdings {
    descriptors: Vec<String>,
    children: usize,
}

impl Holdings {
    /// Now.
    pub fn of(server: &Process) -> Holdings {
        // Sockets, pipes, queues and logs have names that change; their kind counts.
        let kind = |target: String| match target.split(':').next().unwrap_or_default() {
            queue if queue.starts_with("/tunguard-") => "queue".to_owned(),
            log if log.ends_with(".log") => "log".to_owned(),
            other => other.to_owned(),
        };
        let mut descriptors: Vec<String> = descriptors(server.pid()).into_iter().map(kind).collect();
        descriptors.sort();
        Holdings { descriptors, children: server.children().len() }
    }

    /// Waits until it holds the same again.
    pub fn are_back(&self, server: &Process) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let now = Holdings::of(server);
            if now == *self {
                return;
            }
            let count = |holdings: &Holdings| holdings.descriptors.len();
            assert!(
                Instant::now() < deadline,
                "{} descriptors before, {} now\nheld before: {self:?}\nheld now: {now:?}",
                count(self),
                count(&now)
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Routes, nftables and forwarding of the server's host.
pub fn host(lab: &Lab) -> Vec<String> {
    let mut lines = lab.srv().routes();
    lines.extend(lab.srv().must(&["nft", "list", "ruleset"]).lines().map(str::to_owned));
    for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/eth0/accept_ra"] {
        let path = format!("/proc/sys/net/{name}");
        let value = lab.srv().within(|| std::fs::read_to_string(&path)).expect(name);
        lines.push(format!("{name} = {value}"));
    }
    lines
}
