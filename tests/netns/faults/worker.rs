//! SIGKILL of a worker at each state (row 8 of the fault matrix).

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Baseline, Bystander, halt, halted, kill_and_wait};
use crate::lab::{Lab, eventually};
use crate::process::{Process, alive};
use crate::resume::cut;
use crate::scarce::nursery;

/// From the accepted connection to the session.
const ENTERING: &[&str] = &[
    "worker.queues-made",
    "worker.locked-in",
    "worker.handshaking",
    "worker.identified",
    "worker.claimed",
    "worker.granted",
    "worker.registered",
    "worker.welcomed",
    "worker.first-datagram",
];
/// Of a session whose keys are renewed every two seconds.
const AT_WORK: &[&str] = &["worker.rekeying", "worker.rekeyed"];
const TAKEN_OVER: &[&str] = &["worker.draining"];
const ENDING: &[&str] = &["worker.ending"];
/// Of the process that forks workers; it has no log.
const NURSERY: &[&str] = &["nursery.ordered", "nursery.forked"];
pub const TABLES: &[&[&str]] = &[ENTERING, AT_WORK, TAKEN_OVER, ENDING, NURSERY];

/// Fault: SIGKILL of a worker at each state from its start to its client's first datagram. Pass: the bystander loses
/// nothing, its death is logged, the client has a session by its own next try, and then the server holds what it held.
#[test]
fn a_worker_killed_at_any_point_of_its_beginning_is_replaced() {
    let Some(lab) = Lab::rigged("kwenter", 2) else { return };
    killed_at_each(&lab, ENTERING);
}

/// Fault: SIGKILL of a worker while keys are renewed. Pass: as above.
#[test]
fn a_worker_killed_while_keys_are_renewed_is_replaced() {
    let Some(lab) = Lab::rigged("kwrekey", 2) else { return };
    killed_at_each(&lab, AT_WORK);
}

fn killed_at_each(lab: &Lab, points: &[&str]) {
    let mut server = lab.start_server(&lab.server().set("data.rekey", "'2s'"));
    let mut bystander = Bystander::start(lab);
    let baseline = Baseline::of(lab, &server);
    for (round, point) in points.iter().enumerate() {
        lab.order(&[&halt(point)]);
        let mut client = lab.try_client(1, &lab.client(1));
        server.wait_for_log(&halted(point));
        lab.order(&[]);
        kill_and_wait(the_other(&server, bystander.worker));
        bystander.is_unharmed(lab, point);
        lab.wait_for_tunnel(1, &mut client);
        assert_eq!(client.stop(), 0, "{point}");
        baseline.is_back(lab, &server, point);
        assert_eq!(deaths(&server), round + 1, "{point}: {}", server.log());
    }
}

/// Fault: SIGKILL of the worker whose session was just taken over by a newer one of the same client. Pass: the newer
/// session goes on, the bystander loses nothing, and then the server holds what it held.
#[test]
fn a_worker_killed_while_it_drains_takes_nothing_along() {
    let Some(lab) = Lab::rigged("kwdrain", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    for point in TAKEN_OVER {
        lab.order(&[&halt(point)]);
        let mut client = lab.start_client(1, &lab.client(1));
        lab.order(&[]);
        let old = the_other(&server, bystander.worker);
        cut(&lab);
        server.wait_for_log(&halted(point));
        kill_and_wait(old);
        bystander.is_unharmed(&lab, point);
        lab.wait_for_tunnel(1, &mut client);
        assert_ne!(the_other(&server, bystander.worker), old);
        assert_eq!(client.stop(), 0);
        // The nursery is a new one after a death.
        assert_eq!(lab.start_client(1, &lab.client(1)).stop(), 0);
        baseline.is_back(&lab, &server, point);
        assert_eq!(deaths(&server), 1, "{}", server.log());
    }
}

/// Fault: SIGKILL of a worker whose client has just left. Pass: the client ends well, the bystander loses nothing, and
/// after the next client the server holds what it held.
#[test]
fn a_worker_killed_at_its_end_leaves_nothing() {
    let Some(lab) = Lab::rigged("kwend", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    for point in ENDING {
        lab.order(&[&halt(point)]);
        let mut client = lab.start_client(1, &lab.client(1));
        lab.order(&[]);
        let worker = the_other(&server, bystander.worker);
        assert_eq!(client.stop(), 0);
        server.wait_for_log(&halted(point));
        kill_and_wait(worker);
        bystander.is_unharmed(&lab, point);
        // The nursery is a new one after a death.
        assert_eq!(lab.start_client(1, &lab.client(1)).stop(), 0);
        baseline.is_back(&lab, &server, point);
        assert_eq!(deaths(&server), 1, "{}", server.log());
    }
}

/// Fault: SIGSTOP of a worker before its client has a session, with slot, lease and user taken. Pass: the guard ends it
/// at the handshake's deadline and says so, the bystander loses nothing, the client has a session by itself.
#[test]
fn a_worker_stopped_in_the_handshake_is_ended_at_the_deadline() {
    let Some(lab) = Lab::rigged("kwstop", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    lab.order(&[&halt("worker.granted")]);
    let begun = Instant::now();
    let mut client = lab.try_client(1, &lab.client(1));
    server.wait_for_log(&halted("worker.granted"));
    lab.order(&[]);
    let worker = the_other(&server, bystander.worker);
    kill(Pid::from_raw(worker), Signal::SIGSTOP).expect("stop a worker");
    while alive(worker) {
        bystander.is_unharmed(&lab, "stopped");
        assert!(begun.elapsed() < Duration::from_secs(60), "it is still there");
        thread::sleep(Duration::from_millis(200));
    }
    assert!(begun.elapsed() > Duration::from_secs(10), "its own deadline was yet to come");
    server.wait_for_log("doesn't end in time: killed");
    lab.wait_for_tunnel(1, &mut client);
    assert_eq!(client.stop(), 0);
    baseline.is_back(&lab, &server, "stopped");
}

/// Fault: the process that forks workers hangs before or after the fork, and is killed while it has nothing to do. Pass: the
/// guard puts another in its place, and says so; a worker that it doesn't know of is gone; the client has a session by its
/// own next try.
#[test]
fn a_nursery_that_hangs_or_dies_is_replaced() {
    let Some(lab) = Lab::rigged("knursery", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    for (round, point) in NURSERY.iter().enumerate() {
        lab.order(&[&halt(point)]);
        let mut client = lab.try_client(1, &lab.client(1));
        let turned_away = |log: String| {
            log.matches("nobody is let in for the moment: wait for the nursery: it doesn't answer").count()
        };
        eventually("a connection is turned away", || (turned_away(server.log()) > round).then_some(()));
        lab.order(&[]);
        bystander.is_unharmed(&lab, point);
        lab.wait_for_tunnel(1, &mut client);
        assert_eq!(client.stop(), 0, "{point}");
        baseline.is_back(&lab, &server, point);
    }
    let nursery = nursery(&server);
    kill_and_wait(nursery);
    server.wait_for_log(&format!("the nursery, process {nursery}, died: signal SIGKILL"));
    assert_eq!(lab.start_client(1, &lab.client(1)).stop(), 0);
    bystander.is_unharmed(&lab, "no nursery");
    baseline.is_back(&lab, &server, "no nursery");
}

/// The worker that isn't the bystander's.
fn the_other(server: &Process, bystanders: i32) -> i32 {
    eventually("one worker beside the bystander's", || {
        let others: Vec<i32> = server.children().into_iter().filter(|pid| *pid != bystanders).collect();
        (others.len() == 1).then(|| others[0])
    })
}

/// Workers whose death the guard has logged.
fn deaths(server: &Process) -> usize {
    server.log().matches("died: signal SIGKILL").count()
}
