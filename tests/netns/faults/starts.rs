//! Key holder and nursery that hang at their start: the guard serves its sessions meanwhile. That it does is seen without a
//! clock: what it has to do with is done while the process that hangs is there, which it kills as soon as it gives it up.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tunguard::exit::Exit;

use super::holder::has_halted;
use super::{Baseline, Bystander, halt, kill_and_wait};
use crate::key_holder::holders;
use crate::lab::{Lab, eventually, tunguard};
use crate::process::{Process, alive, children, field};
use crate::raw_client::{Dialler, RawClient};

/// Of the process that forks workers; it has no log.
const NURSERY: &[&str] = &["nursery.started"];
pub const TABLES: &[&[&str]] = &[NURSERY];

/// Fault: the key holder is killed, and the next one hangs at its start, until somebody kills it, or the guard does. Pass:
/// meanwhile the bystander loses nothing, a handshake that has its signature becomes a session, one that leaves is gone,
/// status is answered; a client waits at the gate, and has a session when there is a key holder.
#[test]
fn a_key_holder_that_hangs_at_its_start_holds_up_no_session() {
    let Some(lab) = Lab::rigged("hangkh", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    for (by_us, says) in [
        (
            true,
            "start the key holder again (SIGHUP reads key and certificate anew): wait for the key holder: it is gone",
        ),
        (false, "wait for the key holder: it doesn't answer"),
    ] {
        let signed = Dialler::new(&lab, 1).control().expect("a handshake");
        let before = holders(&server);
        lab.order(&[&halt("holder.started")]);
        before.iter().for_each(|pid| kill_and_wait(*pid));
        let hangs = eventually("a key holder that hangs", || {
            holders(&server).into_iter().find(|pid| !before.contains(pid) && has_halted(*pid))
        });
        let dialler = Dialler::new(&lab, 1);
        let session = dialler.established(dialler.hello_over(signed));
        serves(&lab, &mut bystander, session);
        let mut client = waits_at_the_gate(&lab);
        assert!(alive(hangs), "the guard did nothing before it gave the key holder up");
        lab.order(&[]);
        goes(&mut server, hangs, by_us, says);
        lab.wait_for_tunnel(1, &mut client);
        assert_eq!(client.stop(), 0);
        baseline.is_back(&lab, &server, says);
    }
}

/// Fault: the nursery is killed, and the next one hangs at its start, until somebody kills it, or the guard does. Pass: as
/// above, and whoever hangs up meanwhile owes nothing.
#[test]
fn a_nursery_that_hangs_at_its_start_holds_up_no_session() {
    let Some(lab) = Lab::rigged("hangnur", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    for point in NURSERY {
        for (by_us, says) in
            [(true, "wait for the nursery: it is gone"), (false, "wait for the nursery: it doesn't answer")]
        {
            let session = Dialler::new(&lab, 1).connect();
            lab.order(&[&halt(point)]);
            let before = nurseries(&server);
            before.iter().for_each(|pid| kill_and_wait(*pid));
            // It is started when somebody comes.
            let mut client = waits_at_the_gate(&lab);
            let hangs = hanging_nursery(&server, &before);
            // Who loses patience with us is charged nothing.
            let left = lab.status()["failed"]["left"].clone();
            let impatient = Dialler::new(&lab, 1).tcp().expect("a connection");
            eventually("another one waits", || (lab.status()["waiting"] == 2).then_some(()));
            drop(impatient);
            serves(&lab, &mut bystander, session);
            assert!(alive(hangs), "the guard did nothing before it gave the nursery up");
            lab.order(&[]);
            goes(&mut server, hangs, by_us, says);
            lab.wait_for_tunnel(1, &mut client);
            assert_eq!(lab.status()["failed"]["left"], left, "{says}");
            assert_eq!(client.stop(), 0);
            baseline.is_back(&lab, &server, says);
        }
    }
}

/// Fault: the key holder that a reload starts hangs. Pass: the reload is refused at its deadline; meanwhile whoever comes
/// gets in, the bystander loses nothing, and another reload waits for its turn.
#[test]
fn a_reload_whose_key_holder_hangs_holds_up_nobody() {
    let Some(lab) = Lab::rigged("hangheir", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    let before = holders(&server);
    lab.order(&[&halt("holder.started")]);
    let (first, second) = thread::scope(|scope| {
        let first = scope.spawn(|| reload(&lab));
        let hangs = eventually("a key holder that hangs", || {
            holders(&server).into_iter().find(|pid| !before.contains(pid) && has_halted(*pid))
        });
        lab.order(&[]);
        let second = scope.spawn(|| reload(&lab));
        serves(&lab, &mut bystander, Dialler::new(&lab, 1).connect());
        assert!(alive(hangs), "the guard did nothing before it gave the key holder up");
        (first.join().expect("a reload"), second.join().expect("a reload"))
    });
    assert_eq!(first.status.code(), Some(Exit::Usage as i32), "{}", said(&first));
    assert!(
        said(&first).contains("nothing is changed: wait for the key holder: it doesn't answer"),
        "{}",
        said(&first)
    );
    assert_eq!(second.status.code(), Some(0), "{}", said(&second));
    server.wait_for_log("what was there before stays in force");
    eventually("one key holder, another one", || match holders(&server)[..] {
        [one] => (!before.contains(&one)).then_some(()),
        _ => None,
    });
    assert_eq!(lab.start_client(1, &lab.client(1)).stop(), 0);
    bystander.is_unharmed(&lab, "reloaded");
    baseline.is_back(&lab, &server, "reloaded");
}

/// Fault: the nursery that a reload starts hangs. Pass: the reload is in force, and who asked for it is told at the
/// deadline that nobody is let in; meanwhile the bystander loses nothing, and the next nursery lets clients in.
#[test]
fn a_reload_whose_nursery_hangs_holds_up_no_session() {
    let Some(lab) = Lab::rigged("hangrel", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    let session = Dialler::new(&lab, 1).connect();
    let before = nurseries(&server);
    lab.order(&[&halt(NURSERY[0])]);
    let (answer, mut client) = thread::scope(|scope| {
        let answer = scope.spawn(|| reload(&lab));
        let hangs = hanging_nursery(&server, &before);
        lab.order(&[]);
        serves(&lab, &mut bystander, session);
        let client = waits_at_the_gate(&lab);
        assert!(alive(hangs), "the guard did nothing before it gave the nursery up");
        (answer.join().expect("a reload"), client)
    });
    let text = said(&answer);
    assert_eq!(answer.status.code(), Some(Exit::NobodyLetIn as i32), "{text}");
    assert!(text.contains("it is in force, but nobody is let in for the moment: start "), "{text}");
    assert!(text.contains("wait for the nursery: it doesn't answer"), "{text}");
    lab.wait_for_tunnel(1, &mut client);
    server.wait_for_log("workers can be started again");
    assert_eq!(client.stop(), 0);
    baseline.is_back(&lab, &server, "reloaded");
}

/// Fault: a certificate is revoked while the key holder of a reload hangs. Pass: its session ends meanwhile, and its
/// client isn't let in again; after all of it, neither.
#[test]
fn who_is_revoked_during_a_reload_that_hangs_goes_at_once() {
    let Some(lab) = Lab::rigged("hangcrl", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let _gone = Dialler::new(&lab, 1).connect();
    lab.wait_for_sessions(2);
    let before = holders(&server);
    lab.order(&[&halt("holder.started")]);
    thread::scope(|scope| {
        let answer = scope.spawn(|| reload(&lab));
        let hangs = eventually("a key holder that hangs", || {
            holders(&server).into_iter().find(|pid| !before.contains(pid) && has_halted(*pid))
        });
        lab.order(&[]);
        lab.tunguard(&["pki", "revoke", "c1"]);
        lab.wait_for_sessions(1);
        // Workers to come know of it, too.
        let mut client = lab.try_client(1, &lab.client(1));
        assert_eq!(client.exit(), Exit::CertificateRevoked as i32, "{}", client.log());
        assert!(alive(hangs), "the guard did nothing before it gave the key holder up");
        assert_eq!(answer.join().expect("a reload").status.code(), Some(Exit::Usage as i32));
    });
    server.wait_for_log("the revocation list changed, and is read again");
    bystander.is_unharmed(&lab, "revoked");
    let mut client = lab.try_client(1, &lab.client(1));
    assert_eq!(client.exit(), Exit::CertificateRevoked as i32, "{}", client.log());
    lab.wait_for_sessions(1);
}

/// Fault: the server stops while the key holder of a reload hangs. Pass: who asked for it is told, the server ends in time
/// and takes along what hangs; whoever asks then is told that there is none.
#[test]
fn a_server_that_stops_during_a_reload_says_so() {
    let Some(lab) = Lab::rigged("hangstop", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let before = holders(&server);
    lab.order(&[&halt("holder.started")]);
    let (answer, hangs) = thread::scope(|scope| {
        let answer = scope.spawn(|| reload(&lab));
        let hangs = eventually("a key holder that hangs", || {
            holders(&server).into_iter().find(|pid| !before.contains(pid) && has_halted(*pid))
        });
        assert_eq!(server.stop(), 0);
        (answer.join().expect("a reload"), hangs)
    });
    assert!(!alive(hangs), "it is left");
    assert_eq!(answer.status.code(), Some(Exit::Usage as i32), "{}", said(&answer));
    assert!(said(&answer).contains("nothing is changed: reload: the server stops"), "{}", said(&answer));
    let nobody = reload(&lab);
    assert_eq!(nobody.status.code(), Some(Exit::System as i32), "{}", said(&nobody));
}

/// Fault: nursery and key holder are stopped, and a reload replaces them. Pass: both are gone, the key holder when all
/// that it may have begun is over; meanwhile the bystander loses nothing, and clients get in.
#[test]
fn stopped_processes_that_a_reload_replaced_are_gone() {
    let Some(lab) = Lab::rigged("stopped", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    let (nursery, holder) = (nurseries(&server)[0], holders(&server)[0]);
    for pid in [nursery, holder] {
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("stop a descendant of ours");
    }
    let answer = reload(&lab);
    assert_eq!(answer.status.code(), Some(0), "{}", said(&answer));
    eventually("the nursery is gone", || (!alive(nursery)).then_some(()));
    serves(&lab, &mut bystander, Dialler::new(&lab, 1).connect());
    assert!(alive(holder), "it may have had something to finish");
    eventually("the key holder is gone", || (!alive(holder)).then_some(()));
    server.wait_for_log("doesn't end in time: killed");
    assert_eq!((nurseries(&server).len(), holders(&server).len()), (1, 1));
    assert_eq!(lab.start_client(1, &lab.client(1)).stop(), 0);
    bystander.is_unharmed(&lab, "reloaded");
    baseline.is_back(&lab, &server, "reloaded");
}

/// Fault: nursery and key holder hang before they are bound to the guard's life, and the server stops. Pass: it takes them
/// along.
#[test]
fn a_server_that_stops_takes_along_what_hangs_before_its_first_step() {
    let Some(lab) = Lab::rigged("hangexec", 1) else { return };
    // The worker's program hangs at once where there is a file that says so.
    let (program, hang) = (lab.rigged_program("tunguard-worker"), lab.path("hang"));
    fs::rename(&program, program.with_file_name("worker")).expect("another name");
    let script =
        format!("#!/bin/sh\n[ -e {} ] && exec sleep 300\nexec \"${{0%/*}}/worker\" \"$@\"\n", hang.display());
    fs::write(&program, script).expect("a program");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("a program");
    let mut server = lab.start_server(&lab.server());
    lab.write("hang", "");
    let hanging = |others: &[i32]| {
        eventually("a process that hangs", || {
            let asleep = |pid: &i32| field(*pid, "Name").as_deref() == Some("sleep");
            children(server.pid()).into_iter().find(|pid| asleep(pid) && !others.contains(pid))
        })
    };
    nurseries(&server).into_iter().for_each(kill_and_wait);
    let _client = waits_at_the_gate(&lab);
    let nursery = hanging(&[]);
    holders(&server).into_iter().for_each(kill_and_wait);
    let holder = hanging(&[nursery]);
    assert_eq!(server.stop(), 0);
    for pid in [nursery, holder] {
        eventually("it is gone", || (!alive(pid)).then_some(()));
    }
}

/// The guard does what it does for sessions: it moves their packets, answers, and takes back what one held that ends.
fn serves(lab: &Lab, bystander: &mut Bystander, session: RawClient) {
    bystander.is_unharmed(lab, "something hangs");
    lab.wait_for_sessions(2);
    session.leave();
    lab.wait_for_sessions(1);
}

/// A client that can't be served for now.
fn waits_at_the_gate(lab: &Lab) -> Process {
    let client = lab.try_client(1, &lab.client(1));
    eventually("a connection waits", || {
        let status = lab.status();
        (status["waiting"] == 1 && status["handshakes"] == 0).then_some(())
    });
    client
}

/// The one that hangs is killed, by this test or by the guard.
fn goes(server: &mut Process, hangs: i32, by_us: bool, says: &str) {
    if by_us {
        kill(Pid::from_raw(hangs), Signal::SIGKILL).expect("kill a descendant of ours");
    }
    server.wait_for_log(says);
    eventually("it is gone", || (!alive(hangs)).then_some(()));
}

fn hanging_nursery(server: &Process, before: &[i32]) -> i32 {
    eventually("a nursery that hangs", || {
        nurseries(server).into_iter().find(|pid| !before.contains(pid) && has_halted(*pid))
    })
}

fn nurseries(server: &Process) -> Vec<i32> {
    let mut found = children(server.pid());
    found.retain(|pid| alive(*pid) && field(*pid, "Name").as_deref() == Some("tg-nursery"));
    found
}

fn reload(lab: &Lab) -> Output {
    let mut command = Command::new(tunguard());
    command.args(["reload", "--socket"]).arg(lab.path("admin.sock")).output().expect("tunguard starts")
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&[&out.stdout[..], &out.stderr].concat()).into_owned()
}
