//! The next connection takes up the TLS session of the one before, where the server still knows it.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{INNER_V4, Lab, eventually};
use crate::process::Process;
use crate::resume::cut;

#[test]
fn the_next_connection_takes_up_the_tls_session_until_trust_changes() {
    let Some(lab) = Lab::new("tickets", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let client = lab.start_client(1, &lab.client(1));
    let inner = lab.inner(1);
    let mut connections = 1;
    let mut next = |client: &Process| {
        connections += 1;
        let line = eventually("a TLS connection", || {
            client
                .log()
                .lines()
                .filter(|line| line.contains("TLS 1.3 with"))
                .nth(connections - 1)
                .map(str::to_owned)
        });
        lab.wait_for_sessions(1);
        line
    };
    cut(&lab);
    assert!(next(&client).ends_with(", resumed)"));
    // Nobody knows who had a process that died in his hands.
    kill(Pid::from_raw(client.wait_for_children(1)[0]), Signal::SIGKILL).expect("is killed");
    assert!(!next(&client).contains("resumed"));
    cut(&lab);
    assert!(next(&client).ends_with(", resumed)"));
    assert_eq!(lab.inner(1), inner);
    // Certificates are read again: everybody shows one.
    server.signal(Signal::SIGHUP);
    server.wait_for_log("are read again");
    cut(&lab);
    assert!(!next(&client).contains("resumed"));
    cut(&lab);
    assert!(next(&client).ends_with(", resumed)"));
    // A server that was started again knows no ticket, and lets its clients in all the same.
    server.stop();
    let _server = lab.start_server(&lab.server());
    assert!(!next(&client).contains("resumed"));
    assert!(lab.c(1).pings(INNER_V4, 56, 3));
}
