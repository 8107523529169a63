//! SIGKILL of the key holder at each state.

use std::process::Command;
use std::thread;

use super::{Baseline, Bystander, halt, kill_and_wait};
use crate::key_holder::holders;
use crate::lab::{Lab, eventually, tunguard};
use crate::process::Process;

/// It has orders only as it starts, so it is a new one, made by a reload, that halts; it has no log.
const READING: &[&str] = &["holder.started"];
/// With the request of a nursery that is just made.
const SIGNING: &[&str] = &["holder.asked", "holder.signed"];
pub const TABLES: &[&[&str]] = &[READING, SIGNING];

/// Fault: SIGKILL of a new key holder before it has the key. Pass: the reload is refused and the old one stays, the
/// bystander loses nothing, whoever comes gets in.
#[test]
fn a_key_holder_killed_before_it_has_the_key_changes_nothing() {
    let Some(lab) = Lab::rigged("khread", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    for point in READING {
        let before = holders(&server);
        let (code, said) = killed_in_a_reload(&lab, &server, point);
        assert_eq!(code, Some(2), "{point}: {said}");
        assert!(said.contains("nothing is changed"), "{point}: {said}");
        eventually("the old key holder alone", || (holders(&server) == before).then_some(()));
        bystander.is_unharmed(&lab, point);
        assert_eq!(lab.start_client(1, &lab.client(1)).stop(), 0, "{point}");
        baseline.is_back(&lab, &server, point);
    }
    server.wait_for_log("what was there before stays in force");
}

/// Fault: SIGKILL of the key holder between a request and its signature. Pass: another one takes its place, its death is
/// logged, the bystander loses nothing, and whoever comes gets in.
#[test]
fn a_key_holder_killed_while_it_signs_is_replaced() {
    let Some(lab) = Lab::rigged("khsign", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    for point in SIGNING {
        killed_in_a_reload(&lab, &server, point);
        server.wait_for_log("the key holder, process");
        bystander.is_unharmed(&lab, point);
        assert_eq!(lab.start_client(1, &lab.client(1)).stop(), 0, "{point}");
        eventually("one key holder", || (holders(&server).len() == 1).then_some(()));
        baseline.is_back(&lab, &server, point);
    }
    assert_eq!(server.log().matches("the key holder, process").count(), SIGNING.len(), "{}", server.log());
}

/// What `tunguard reload` ends with and says, where the key holder that it makes is killed at `point`.
fn killed_in_a_reload(lab: &Lab, server: &Process, point: &str) -> (Option<i32>, String) {
    lab.order(&[&halt(point)]);
    let before = holders(server);
    let out = thread::scope(|scope| {
        let reload = scope.spawn(|| {
            let mut command = Command::new(tunguard());
            command
                .args(["reload", "--socket"])
                .arg(lab.path("admin.sock"))
                .output()
                .expect("tunguard starts")
        });
        let new = eventually("a key holder that has halted", || {
            let new = holders(server).into_iter().find(|pid| !before.contains(pid))?;
            has_halted(new).then_some(new)
        });
        lab.order(&[]);
        kill_and_wait(new);
        reload.join().expect("the reload's thread")
    });
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// Whether a process without a log has: it goes round in circles then.
pub fn has_halted(pid: i32) -> bool {
    cpu_ticks(pid) > 30
}

/// Of a process, in user mode, in hundredths of a second.
fn cpu_ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
    after_name.split_whitespace().nth(11).and_then(|ticks| ticks.parse().ok()).unwrap_or(0)
}
