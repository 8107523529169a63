//! A thousand clients come and go, and the server holds what it held before.

use std::fs;
use std::thread;

use tunguard::wire::control::{Message, Reason};

use crate::capture::Capture;
use crate::kill::Holdings;
use crate::lab::{INNER_V4, Lab, eventually, ip};
use crate::process::field;
use crate::raw_client::{Dialler, echo_request};
use crate::traffic::Conversation;

#[test]
fn a_thousand_connects_leave_nothing() {
    connects_leave_nothing("churn", 1_000);
}

/// The same as often as one likes: CYCLES=10000.
#[test]
#[ignore = "takes minutes: make endure"]
fn any_number_of_connects_leaves_nothing() {
    let cycles = std::env::var("CYCLES").ok().and_then(|cycles| cycles.parse().ok());
    connects_leave_nothing("churnlong", cycles.unwrap_or(10_000));
}

fn connects_leave_nothing(test: &str, cycles: u32) {
    let Some(lab) = Lab::new(test, 2) else { return };
    let server = lab.start_server(&lab.server());
    // Somebody who stays.
    let _stays = lab.start_client(2, &lab.client(2));
    let mut talk = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
    let dialler = Dialler::new(&lab, 1);
    let mut early = None;
    for cycle in 1..=cycles {
        let mut client = dialler.connect();
        if cycle % 50 == 0 {
            assert_eq!(client.ping(cycle as u16), 1, "cycle {cycle}");
            talk.exchange(50_000);
        }
        match cycle % 3 {
            // Without a goodbye: the newer session of the same identity takes over.
            0 if cycle != cycles => drop(client),
            _ => client.leave(),
        }
        if cycle == EARLY {
            early = Some((Holdings::of_after(&lab, &server), memory_kib(server.pid())));
        }
    }
    let (holdings, memory) = early.expect("there was an early cycle");
    lab.wait_for_sessions(1);
    holdings.are_back(&server);
    let now = memory_kib(server.pid());
    assert!(
        now < memory + 2_048,
        "the guard had {memory} KiB after {EARLY} cycles, {now} KiB after {cycles}"
    );
    let status = lab.status();
    assert_eq!((&status["workers"], &status["handshakes"]), (&1.into(), &0.into()), "{status}");
    let leases = fs::read_to_string(lab.path("server-state/tg0.leases")).expect("the leases");
    assert!(leases.contains("\"c1\"") && leases.len() < 10_000, "{leases}");
    assert_eq!(queue_names(&lab, server.pid()), "", "names of queues that nobody opens any more");
    talk.exchange(100_000);
}

#[test]
fn one_certificate_from_many_places_at_once_is_one_session() {
    let Some(lab) = Lab::new("race", 2) else { return };
    let server = lab.start_server(&lab.server());
    let before = Holdings::of(&server);
    let dialler = Dialler::new(&lab, 1);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..25 {
                    // A newer one may be through first.
                    let (control, answer) = dialler.hello();
                    assert!(
                        matches!(&answer, Ok(Message::Welcome(_) | Message::Bye(Reason::Replaced)) | Err(_)),
                        "{answer:?}"
                    );
                    control.close();
                }
            });
        }
    });
    let mut last = dialler.connect();
    assert_eq!(last.ping(1), 1);
    lab.wait_for_sessions(1);
    last.leave();
    lab.wait_for_sessions(0);
    before.are_back(&server);
}

/// Fault: slots, session IDs' first half and users are used again at once, by another client, while datagrams of who had
/// them before still come, authentic ones. Pass: none is delivered or answered, and none moves whoever has the slot now.
#[test]
fn what_is_used_again_at_once_crosses_nobody() {
    let Some(lab) = Lab::new("reuse", 2) else { return };
    let server = lab.start_server(&lab.server().set("max_clients", 2));
    let (one, two) = (Dialler::new(&lab, 1), Dialler::new(&lab, 2));
    let mut first = one.connect();
    assert_eq!(first.ping(1), 1);
    let address = first.address();
    let late: Vec<Vec<u8>> = (100..120).map(|n| first.seal(&echo_request(address, n))).collect();
    let (slot, socket) = (first.welcome.session.slot(), first.udp.try_clone().expect("a second descriptor"));
    first.leave();
    lab.wait_for_sessions(0);
    let mut heir = None;
    for _ in 0..200 {
        let client = two.connect();
        if client.welcome.session.slot() == slot {
            heir = Some(client);
            break;
        }
        client.leave();
        lab.wait_for_sessions(0);
    }
    let mut heir = heir.expect("a slot is used again after all others");
    assert_eq!(heir.ping(1), 1);
    let peer = lab.session("c2").expect("a session")["peer"].clone();
    let device = Capture::start(&lab.srv(), "tg0");
    for datagram in &late {
        socket.send(datagram).expect("send");
        // As if it were the heir's: the ID is in what is authenticated.
        let renamed = [&heir.welcome.session.0[..], &datagram[8..]].concat();
        socket.send(&renamed).expect("send");
    }
    let answer = socket.recv(&mut [0; 64]);
    assert!(answer.is_err(), "an answer: {answer:?}");
    let delivered = device.stop();
    assert!(delivered.is_empty(), "{} packets were delivered", delivered.len());
    let session = lab.session("c2").expect("a session");
    assert_eq!(session["peer"], peer, "{session}");
    assert_eq!(session["drops"]["bad_tag"], late.len(), "{session}");
    assert_eq!(heir.ping(2), 1);
    heir.leave();
    server.wait_for_children(0);
}

impl Holdings {
    /// Once the last client that left is gone.
    fn of_after(lab: &Lab, server: &crate::process::Process) -> Holdings {
        lab.wait_for_sessions(1);
        server.wait_for_children(1);
        eventually("the guard is done with its clients", || (lab.status()["workers"] == 1).then_some(()));
        Holdings::of(server)
    }
}

/// Queues with a name in the guard's IPC namespace.
pub fn queue_names(lab: &Lab, guard: i32) -> String {
    let place = lab.path("mqueue").display().to_string();
    let ipc = format!("--ipc=/proc/{guard}/ns/ipc");
    let script = format!("mkdir -p {place} && mount -t mqueue none {place} && ls -A {place}");
    lab.srv().must(&["nsenter", &ipc, "--", "unshare", "--mount", "sh", "-c", &script])
}

/// Memory of a process.
pub fn memory_kib(pid: i32) -> u64 {
    let line = field(pid, "VmRSS").expect("VmRSS");
    line.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number")
}

const EARLY: u32 = 100;
