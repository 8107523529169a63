//! Who watches the server sees a move as it happens.

use crate::lab::{Lab, eventually, tunguard};
use crate::process::Process;

#[test]
fn a_move_is_seen_at_once() {
    let Some(lab) = Lab::new("watch", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let socket = lab.path("admin.sock").display().to_string();
    let command = [tunguard(), "status", "--watch", "--socket", &socket];
    let mut watching = Process::start("watching", &lab.srv(), &lab.dir, &command);
    watching.wait_for_log("0 sessions");
    let mut client = lab.start_client(1, &lab.client(1));
    watching.wait_for_log(" c1 is heard in a new session at 198.18.1.2:");
    let before = lab.session("c1").expect("a session")["peer"].as_str().expect("an address").to_owned();
    lab.c(1).ip(&["addr", "del", "198.18.1.2/24", "dev", "eth0"]);
    lab.c(1).ip(&["addr", "add", "198.18.1.77/24", "dev", "eth0"]);
    lab.c(1).ip(&["route", "add", "default", "via", "198.18.1.1"]);
    watching.wait_for_log(&format!(" c1 moved {before} -> 198.18.1.77:"));
    // The table above the line has it, too.
    let log = watching.log();
    let shown = log.split("tunguard 0.").find(|shown| shown.contains(" moved ")).expect("a table");
    let row = shown.lines().find(|line| line.starts_with("c1 ")).expect("a row");
    assert!(row.contains("198.18.1.77:"), "{shown}");
    let line = shown.lines().find(|line| line.contains(" moved ")).expect("a line");
    assert!(line.ends_with(" ms") && line.as_bytes()[8] == b'Z', "{line}");
    assert!(!log.contains('\x1b'), "a file is no terminal");
    // Who leaves without a word is no trouble.
    watching.kill();
    assert_eq!(client.stop(), 0);
    lab.wait_for_sessions(0);
}

#[test]
fn watchers_have_their_number() {
    let Some(lab) = Lab::new("watchers", 1) else { return };
    let server = lab.start_server(&lab.server());
    let descriptors = || crate::process::descriptors(server.pid()).len();
    let before = descriptors();
    let mut held = Vec::new();
    for _ in 0..20 {
        use std::io::Write;
        let mut stream = std::os::unix::net::UnixStream::connect(lab.path("admin.sock")).expect("connect");
        stream.write_all(b"watch\n").expect("ask");
        held.push(stream);
        // Others are answered all the same.
        assert!(lab.try_status().is_some());
    }
    assert!(descriptors() > before);
    drop(held);
    eventually("their descriptors are closed", || (descriptors() <= before).then_some(()));
}
