//! Processes that stand still for a while (rows 8 and 15 of the fault matrix): one of them, as under a debugger, or all of a
//! host, as in suspend. The clock goes on meanwhile, as CLOCK_BOOTTIME does.

use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::faults::{Baseline, Bystander};
use crate::lab::{INNER_V4, Lab, ip};
use crate::process::{Process, alive, children};
use crate::traffic::Conversation;

/// Fault: SIGSTOP of a worker in mid-session. Pass: its client is in another session by itself, with the same addresses and
/// no byte lost; the stopped worker is ended; the bystander loses nothing, and the server holds what it held.
#[test]
fn a_stopped_workers_client_goes_on_in_another_session() {
    let Some(lab) = Lab::new("frozenworker", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    let mut client = lab.start_client(1, &lab.client(1));
    let addresses = lab.inner(1);
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(10_000);
    let worker = lab.session("c1").and_then(|s| s["pid"].as_i64()).expect("a worker") as i32;
    kill(Pid::from_raw(worker), Signal::SIGSTOP).expect("stop a worker");
    talk.exchange(100_000);
    bystander.is_unharmed(&lab, "stopped");
    crate::lab::eventually("the stopped worker is ended", || (!alive(worker)).then_some(()));
    assert_eq!(lab.inner(1), addresses);
    assert_eq!(client.stop(), 0);
    baseline.is_back(&lab, &server, "stopped");
}

/// Fault: the client's host sleeps for 12 s, longer than it takes to give a server up. Pass: the connections inside go on,
/// the addresses stay, and the bystander notices nothing.
#[test]
fn a_client_that_slept_goes_on() {
    sleep_of_a_client("sleepclient", 12);
}

/// The same for as long as one likes: SECONDS=3600 are an hour.
#[test]
#[ignore = "takes as long as SECONDS says: make endure"]
fn a_client_that_slept_for_long_goes_on() {
    sleep_of_a_client("sleeplong", seconds());
}

/// Fault: the server's host sleeps for 12 s. Pass: the connections of its clients go on, their addresses stay, and then it
/// holds what it held.
#[test]
fn a_server_that_slept_goes_on() {
    sleep_of_a_server("sleepserver", 12);
}

/// The same for as long as one likes.
#[test]
#[ignore = "takes as long as SECONDS says: make endure"]
fn a_server_that_slept_for_long_goes_on() {
    sleep_of_a_server("sleeplongs", seconds());
}

fn sleep_of_a_client(test: &str, seconds: u64) {
    let Some(lab) = Lab::new(test, 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    let mut client = lab.start_client(1, &lab.client(1));
    let addresses = lab.inner(1);
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(10_000);
    sleep(&client, seconds);
    talk.exchange(100_000);
    lab.wait_for_tunnel(1, &mut client);
    assert_eq!(lab.inner(1), addresses);
    bystander.is_unharmed(&lab, "asleep");
    assert_eq!(client.stop(), 0);
    baseline.is_back(&lab, &server, "asleep");
}

fn sleep_of_a_server(test: &str, seconds: u64) {
    let Some(lab) = Lab::new(test, 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut clients = [lab.start_client(1, &lab.client(1)), lab.start_client(2, &lab.client(2))];
    let addresses = [lab.inner(1), lab.inner(2)];
    let mut talks = [1, 2].map(|n| Conversation::start(&lab.c(n), &lab.srv(), ip(INNER_V4)));
    talks.iter_mut().for_each(|talk| talk.exchange(10_000));
    sleep(&server, seconds);
    for (n, talk) in (1..).zip(&mut talks) {
        talk.exchange(100_000);
        lab.wait_for_tunnel(n, &mut clients[n - 1]);
    }
    assert_eq!([lab.inner(1), lab.inner(2)], addresses);
    // Sessions that were taken over end by themselves.
    lab.wait_for_sessions(2);
    server.wait_for_children(2);
}

/// All processes of one program stand still, and go on in no particular order.
fn sleep(process: &Process, seconds: u64) {
    let family = [vec![process.pid()], children(process.pid())].concat();
    let all =
        |signal| family.iter().for_each(|pid| kill(Pid::from_raw(*pid), signal).expect("a process of ours"));
    all(Signal::SIGSTOP);
    thread::sleep(Duration::from_secs(seconds));
    all(Signal::SIGCONT);
}

fn seconds() -> u64 {
    std::env::var("SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(3_600)
}
