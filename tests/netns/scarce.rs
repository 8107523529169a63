//! What server and client need from their kernel and don't get (row 12 of the fault matrix; the server's descriptors are in
//! hardship.rs).

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use tunguard::exit::Exit;

use crate::faults::{Baseline, Bystander};
use crate::hardship::cpu_ticks;
use crate::lab::{INNER_V4, Lab, eventually, ip, skipped};
use crate::process::{Process, children, descriptors, field};
use crate::resume::cut;
use crate::traffic::Conversation;

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

/// Fault: `state_dir` is on a read-only file system. Pass: the start is refused for good, by name, before the host is changed:
/// the device couldn't be made either.
#[test]
fn a_server_that_cannot_write_to_its_state_dir_does_not_start() {
    let Some(lab) = Lab::new("rostate", 1) else { return };
    let state = lab.path("state");
    fs::create_dir(&state).expect("a directory");
    lab.srv().must(&["ip", "link", "add", "taken", "type", "veth", "peer", "name", "other"]);
    let config = lab.server().set("device", "'taken'").set("nat", true).set("state_dir", "'state'");
    // `ip netns exec` gives each program a mount namespace of its own.
    let script = format!("mount -t tmpfs -o ro tmpfs {} && exec \"$@\"", state.display());
    let mut server = lab.try_server_under(&["sh", "-c", &script, "sh"], &config);
    assert_eq!(server.exit(), Exit::Usage as i32, "{}", server.log());
    let what = format!("state_dir = {state:?} can't be written to: Read-only file system (os error 30)");
    assert!(server.log().contains(&what), "{}", server.log());
    let mut server = lab.try_server(&config);
    assert_eq!(server.exit(), Exit::DeviceInUse as i32, "{}", server.log());
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
    let Some(group) = Group::new("noprocess") else { return };
    survives(
        &lab,
        "nobody is let in for the moment: start a worker: Resource temporarily unavailable",
        |server| {
            group.set("pids.max", "1");
            group.set("cgroup.procs", &nursery(server).to_string());
        },
        |_| group.set("pids.max", "max"),
    );
}

/// Fault: a client has no descriptor left when its control connection is lost. Pass: packets go on meanwhile, it says why it
/// can't connect and keeps trying without spinning; with descriptors again it has a connection by itself.
#[test]
fn a_client_out_of_descriptors_keeps_its_session_and_recovers() {
    let Some(lab) = Lab::new("clinofile", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    let first = lab.session("c1").expect("a session")["session"].clone();
    let set = |descriptors: usize| {
        let limit = format!("--nofile={descriptors}:");
        lab.c(1).must(&["prlimit", "--pid", &client.pid().to_string(), &limit]);
    };
    set(descriptors(client.pid()).len());
    cut(&lab);
    let log = || client.log();
    eventually("it says why", || log().contains("Too many open files").then_some(()));
    let mut busy = cpu_ticks(client.pid());
    talk.exchange(100_000);
    thread::sleep(Duration::from_secs(1));
    busy = cpu_ticks(client.pid()) - busy;
    assert!(busy < 50, "the client spins: {busy} ticks in a second");
    assert_eq!(lab.session("c1").expect("a session")["session"], first);
    set(1_024);
    eventually("another session", || lab.session("c1").filter(|session| session["session"] != first));
    talk.exchange(100_000);
    assert_eq!(client.stop(), 0);
}

/// Fault: a client may have no more processes when its tunnel process dies. Pass: it says so, keeps its routes and tries
/// again; with room for one there is a tunnel by itself, and connections inside go on.
#[test]
fn a_client_without_room_for_a_process_keeps_its_routes_and_recovers() {
    let Some(lab) = Lab::new("clinoproc", 1) else { return };
    let Some(group) = Group::new("clinoproc") else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(10_000);
    let routes = lab.c(1).routes();
    group.set("pids.max", "1");
    group.set("cgroup.procs", &client.pid().to_string());
    crate::faults::kill_and_wait(client.wait_for_children(1)[0]);
    client.wait_for_log("start the tunnel process: Resource temporarily unavailable");
    crate::lab::same_lines(&routes, &lab.c(1).routes(), "the client's routes");
    group.set("pids.max", "max");
    talk.exchange(100_000);
    lab.wait_for_tunnel(1, &mut client);
    assert_eq!(client.stop(), 0);
}

fn survives(lab: &Lab, says: &str, impose: impl FnOnce(&Process), lift: impl FnOnce(&Process)) {
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(lab);
    let baseline = Baseline::of(lab, &server);
    impose(&server);
    let mut client = lab.try_client(1, &lab.client(1));
    server.wait_for_log(says);
    let log = server.log();
    let line = log.lines().find(|line| line.contains(says)).expect("just seen");
    assert!(!line.contains(" INFO ]"), "not a client's fault, but this host's: {line}");
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
pub fn nursery(server: &Process) -> i32 {
    let named = |pid: &i32| field(*pid, "Name").is_some_and(|name| name == "tg-nursery");
    children(server.pid()).into_iter().find(named).expect("a nursery")
}

/// A cgroup with a limit of processes, gone with the test.
struct Group(PathBuf);

impl Group {
    /// `None` where this machine can't have one: the test is skipped, and says so.
    fn new(test: &str) -> Option<Group> {
        match Group::make(test) {
            Ok(group) => Some(group),
            Err(why) => {
                let why = format!("no cgroup with a limit of processes: {why}");
                assert!(std::env::var_os("CI").is_none(), "{why}, for the test {test}");
                skipped(test, &why);
                None
            }
        }
    }

    fn make(test: &str) -> Result<Group, String> {
        let v1 = Path::new("/sys/fs/cgroup/pids");
        let v2 = Path::new("/sys/fs/cgroup");
        let parent = if v1.is_dir() { v1 } else { v2 };
        let path = parent.join(format!("tg{}-{test}", std::process::id()));
        fs::create_dir(&path).map_err(|e| format!("make {}: {e}", path.display()))?;
        let group = Group(path);
        let limit = group.0.join("pids.max");
        if limit.exists() { Ok(group) } else { Err(format!("{} is missing", limit.display())) }
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
