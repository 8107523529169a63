//! Processes killed exactly at a named point of a session's life, each of them: others go on, nothing is left, and the
//! client has a session again by itself.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::Lab;

#[test]
fn a_worker_killed_before_the_handshake_is_replaced() {
    let Some(lab) = Lab::rigged("halt", 1) else { return };
    lab.order(&["halt worker.locked-in"]);
    let mut server = lab.start_server(&lab.server());
    let mut client = lab.try_client(1, &lab.client(1));
    server.wait_for_log("halted at worker.locked-in");
    lab.order(&[]);
    for worker in server.wait_for_children(1) {
        kill(Pid::from_raw(worker), Signal::SIGKILL).expect("kill a child of our child");
    }
    lab.wait_for_tunnel(1, &mut client);
}
