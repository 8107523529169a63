//! Processes killed exactly at a named point of a session's life (src/rigged.rs), each process at each of its points.
//! What passes is the same everywhere, and [`Bystander`] and [`Holdings`](crate::kill::Holdings) see to it: a session
//! beside the killed one loses no byte of its connection, the server holds what it held before within 10 s, the end of a
//! process is logged with its reason, and the client has a session again, by itself or after the next start.

mod client;
mod guard;
mod holder;
mod starts;
mod worker;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::churn::queue_names;
use crate::kill::Holdings;
use crate::lab::{INNER_V4, Lab, eventually, ip};
use crate::process::{Process, alive};
use crate::traffic::Conversation;

/// Fault: a point was added to a program, and nobody kills the program there. Pass: every point in the source is in the
/// table of a test, and the other way round.
#[test]
fn every_point_is_one_that_a_process_is_killed_at() {
    let mut points = BTreeSet::new();
    for folder in ["src", "guard/src", "worker/src"] {
        for file in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)) {
            let text = fs::read_to_string(&file).expect("a source file");
            let named = text.split("point(\"").skip(1).filter_map(|rest| rest.split_once("\");"));
            points.extend(named.map(|(name, _)| name.to_owned()));
        }
    }
    let tables =
        [worker::TABLES, guard::TABLES, holder::TABLES, starts::TABLES, client::TABLES].concat().concat();
    let killed: BTreeSet<String> = tables.iter().map(|point| (*point).to_owned()).collect();
    assert_eq!(killed.len(), tables.len(), "a point is in two tables");
    assert_eq!(points, killed);
}

/// Client 2, which has nothing to do with the process that is killed.
pub struct Bystander {
    client: Process,
    talk: Conversation,
    worker: i32,
}

impl Bystander {
    pub fn start(lab: &Lab) -> Bystander {
        let client = lab.start_client(2, &lab.client(2));
        let mut talk = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
        talk.exchange(10_000);
        let worker = lab.session("c2").and_then(|s| s["pid"].as_i64()).expect("a worker") as i32;
        Bystander { client, talk, worker }
    }

    /// Its connection goes on, in the session it had, byte for byte.
    pub fn is_unharmed(&mut self, lab: &Lab, at: &str) {
        self.talk.exchange(100_000);
        let session = lab.session("c2").unwrap_or_else(|| panic!("{at}: the bystander has no session"));
        assert_eq!(session["pid"], self.worker, "{at}: the bystander's session is another one");
        assert_eq!(self.client.try_exit(), None, "{at}");
    }
}

/// What the server holds while the bystander alone is connected.
pub struct Baseline(Holdings);

impl Baseline {
    pub fn of(lab: &Lab, server: &Process) -> Baseline {
        lab.wait_for_sessions(1);
        server.wait_for_children(1);
        Baseline(Holdings::of(server))
    }

    /// The same again: sessions, processes (zombies count), descriptors, names of queues.
    pub fn is_back(&self, lab: &Lab, server: &Process, at: &str) {
        eventually(&format!("{at}: the bystander's session alone"), || {
            let status = lab.status();
            let alone = status["workers"] == 1 && status["handshakes"] == 0;
            (alone && status["sessions"].as_array().is_some_and(|s| s.len() == 1)).then_some(())
        });
        self.0.are_back(server);
        assert_eq!(queue_names(lab, server.pid()), "", "{at}: names of queues");
    }
}

/// Kills a process of ours, or a child of one, without a warning, and waits until it is gone.
pub fn kill_and_wait(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill a descendant of ours");
    gone(&[pid]);
}

fn gone(pids: &[i32]) {
    eventually(&format!("{pids:?} are gone"), || (!pids.iter().any(|pid| alive(*pid))).then_some(()));
}

fn halt(point: &str) -> String {
    format!("halt {point}")
}

fn halted(point: &str) -> String {
    format!("halted at {point}")
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of sources");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}
