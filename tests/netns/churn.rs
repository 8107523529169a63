//! A thousand clients come and go, and the server holds what it held before.

use std::fs;
use std::thread;

use tunguard::wire::control::{Message, Reason};

use crate::kill::Holdings;
use crate::lab::{INNER_V4, Lab, eventually, ip};
use crate::process::field;
use crate::raw_client::Dialler;
use crate::traffic::Conversation;

#[test]
fn a_thousand_connects_leave_nothing() {
    let Some(lab) = Lab::new("churn", 2) else { return };
    let server = lab.start_server(&lab.server());
    // Somebody who stays.
    let _stays = lab.start_client(2, &lab.client(2));
    let mut talk = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
    let dialler = Dialler::new(&lab, 1);
    let mut early = None;
    for cycle in 1..=CYCLES {
        let mut client = dialler.connect();
        if cycle % 50 == 0 {
            assert_eq!(client.ping(cycle), 1, "cycle {cycle}");
            talk.exchange(50_000);
        }
        match cycle % 3 {
            // Without a goodbye: the newer session of the same identity takes over.
            0 if cycle != CYCLES => drop(client),
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
        "the guard had {memory} KiB after {EARLY} cycles, {now} KiB after {CYCLES}"
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

const EARLY: u16 = 100;
const CYCLES: u16 = 1_000;
