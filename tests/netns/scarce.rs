//! What a server needs from its kernel and doesn't get (row 12 of the fault matrix; descriptors are in hardship.rs).

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::faults::{Baseline, Bystander};
use crate::hardship::cpu_ticks;
use crate::lab::Lab;
use crate::process::{Process, children, field};

/// Fault: the namespace has no more room for queues. Pass: the client is refused with a reason in the log and keeps trying,
/// the guard doesn't spin, the bystander loses nothing; with room again the client is there by itself, and when it has
/// left the server holds what it held.
#[test]
fn a_server_without_room_for_queues_refuses_and_recovers() {
    let Some(lab) = Lab::new("noqueues", 2) else { return };
    let set = |server: &Process, most: &str| {
        let ipc = format!("--ipc=/proc/{}/ns/ipc", server.pid());
        let write = format!("echo {most} >/proc/sys/fs/mqueue/queues_max");
        lab.srv().must(&["nsenter", &ipc, "--", "sh", "-c", &write]);
    };
    survives(&lab, "create the session's queue", |server| set(server, "1"), |server| set(server, "1000"));
}

/// Fault: a worker's user may have no queue of the size agreed (RLIMIT_MSGQUEUE). Pass: as above.
#[test]
fn a_worker_that_may_have_no_queue_is_refused_and_the_next_is_not() {
    let Some(lab) = Lab::new("msgqueue", 2) else { return };
    let set = |server: &Process, bytes: &str| {
        let limit = format!("--msgqueue={bytes}:");
        lab.srv().must(&["prlimit", "--pid", &nursery(server).to_string(), &limit]);
    };
    survives(
        &lab,
        "create the session's queue",
        |server| set(server, "1000"),
        |server| set(server, "819200"),
    );
}

/// Fault: the guard gets no memory for a session's packets. Pass: as above.
#[test]
fn a_guard_without_memory_for_a_session_refuses_and_recovers() {
    let Some(lab) = Lab::new("nomemory", 2) else { return };
    let set = |server: &Process, bytes: String| {
        let limit = format!("--as={bytes}:");
        lab.srv().must(&["prlimit", "--pid", &server.pid().to_string(), &limit]);
    };
    survives(
        &lab,
        "make the memory of a session's queue: Cannot allocate memory",
        |server| {
            let size = field(server.pid(), "VmSize").expect("VmSize");
            let kib: u64 = size.split(' ').next().and_then(|n| n.parse().ok()).expect("a number");
            set(server, ((kib + 200) << 10).to_string());
        },
        |server| set(server, "unlimited".to_owned()),
    );
}

/// Fault: there may be no more processes (a cgroup's pids.max: root has no other limit). Pass: as above.
#[test]
fn a_server_without_room_for_processes_refuses_and_recovers() {
    let Some(lab) = Lab::new("noprocess", 2) else { return };
    let Some(group) = Group::new("noprocess") else {
        eprintln!("no cgroup of our own with a limit of processes: not tested");
        return;
    };
    survives(
        &lab,
        "turned away: start a worker: Resource temporarily unavailable",
        |server| {
            group.set("pids.max", "1");
            group.set("cgroup.procs", &nursery(server).to_string());
        },
        |_| group.set("pids.max", "max"),
    );
}

fn survives(lab: &Lab, says: &str, impose: impl FnOnce(&Process), lift: impl FnOnce(&Process)) {
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(lab);
    let baseline = Baseline::of(lab, &server);
    impose(&server);
    let mut client = lab.try_client(1, &lab.client(1));
    server.wait_for_log(says);
    bystander.is_unharmed(lab, says);
    let mut busy = cpu_ticks(server.pid());
    thread::sleep(Duration::from_secs(2));
    busy = cpu_ticks(server.pid()) - busy;
    assert!(busy < 100, "the guard spins: {busy} ticks in two seconds");
    let lines = server.log().matches(says).count();
    assert!(lines < 30, "{lines} times in two seconds: {says}");
    assert_eq!(client.try_exit(), None, "{}", client.log());
    bystander.is_unharmed(lab, says);
    lift(&server);
    lab.wait_for_tunnel(1, &mut client);
    assert_eq!(client.stop(), 0);
    baseline.is_back(lab, &server, says);
}

/// The process that forks the server's workers.
fn nursery(server: &Process) -> i32 {
    let named = |pid: &i32| field(*pid, "Name").is_some_and(|name| name == "tg-nursery");
    children(server.pid()).into_iter().find(named).expect("a nursery")
}

/// A cgroup with a limit of processes, gone with the test.
struct Group(PathBuf);

impl Group {
    fn new(test: &str) -> Option<Group> {
        let v1 = Path::new("/sys/fs/cgroup/pids");
        let v2 = Path::new("/sys/fs/cgroup");
        let parent = if v1.is_dir() { v1 } else { v2 };
        let path = parent.join(format!("tg{}-{test}", std::process::id()));
        fs::create_dir(&path).ok()?;
        let group = Group(path);
        group.0.join("pids.max").exists().then_some(group)
    }

    fn set(&self, file: &str, value: &str) {
        let path = self.0.join(file);
        fs::write(&path, value).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Those in it go home first.
        let home = self.0.parent().expect("a parent").join("cgroup.procs");
        for pid in fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(&home, pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}
