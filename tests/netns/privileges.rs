//! What each process may do: exactly the capabilities on its list, and users that exist where it runs.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tunguard::exit::Exit;
use tunguard::wire::control::{Message, Reason};

use crate::lab::{INNER_V4, LAN_V4, Lab, SERVER_V4, eventually, ip};
use crate::process::{self, Process, alive, children, field};
use crate::raw_client::Dialler;
use crate::traffic::transfer;
use crate::user_namespace::UserNamespace;

// include/uapi/linux/capability.h
const DAC_OVERRIDE: u32 = 1;
const KILL: u32 = 5;
const SETGID: u32 = 6;
const SETUID: u32 = 7;
const SETPCAP: u32 = 8;
const NET_ADMIN: u32 = 12;
const SYS_CHROOT: u32 = 18;

/// Guard and supervisor use these themselves.
const OWN: &[u32] = &[NET_ADMIN, KILL, DAC_OVERRIDE];
/// The nursery uses these, and all have them who start one of the unprivileged.
const JAIL: &[u32] = &[SETGID, SETUID, SETPCAP, SYS_CHROOT];

#[test]
fn each_process_has_the_capabilities_on_its_list() {
    let Some(lab) = Lab::new("caplist", 2) else { return };
    let config = lab.server().set("nat", true).set("push.routes", "['192.168.50.0/24']");
    let mut server = lab.start_server(&config);
    guard_and_nursery(&server);
    let mut client = lab.start_client(1, &lab.client(1));
    let worker = server.wait_for_children(1)[0];
    let [tunnel] = client.children()[..] else { panic!("one tunnel process: {:?}", client.children()) };
    let check = || {
        guard_and_nursery(&server);
        holds(server.pid(), worker, &[], &[]);
        threads_hold(client.pid(), OWN, &[OWN, JAIL].concat(), &[("log", &[])]);
        holds(client.pid(), tunnel, &[], &[]);
    };
    check();
    transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
    check();
    let processes = [vec![client.pid()], client.children()].concat();
    assert_eq!(client.stop(), 0);
    assert!(!processes.into_iter().any(alive));
    assert_eq!(server.stop(), 0);
    assert!(!server.log().contains("on leaving:"), "{}", server.log());
}

#[test]
fn a_capability_that_is_missing_is_named() {
    let Some(lab) = Lab::new("capless", 1) else { return };
    let before = lab.srv().routes();
    for (capability, name, what) in [
        ("kill", "CAP_KILL", "ending workers"),
        ("net_admin", "CAP_NET_ADMIN", "the device"),
        ("dac_override", "CAP_DAC_OVERRIDE", "the queues"),
        ("sys_chroot", "CAP_SYS_CHROOT", "workers, in an empty root"),
    ] {
        let bounding = format!("--bounding-set=-{capability}");
        let mut server = lab.try_server_under(&["setpriv", &bounding], &lab.server());
        assert_eq!(server.exit(), Exit::Privilege as i32, "{}", server.log());
        let log = server.log();
        assert!(log.contains(&format!("missing: {name} (for {what}")), "{log}");
        assert!(log.contains(&format!("systemd: CapabilityBoundingSet={name}, docker: --cap-add")), "{log}");
    }
    assert_eq!(before, lab.srv().routes());
    let mut client = lab.try_client_under(&["setpriv", "--bounding-set=-kill,-setuid"], 1, &lab.client(1));
    assert_eq!(client.exit(), Exit::Privilege as i32, "{}", client.log());
    let log = client.log();
    assert!(log.contains("missing: CAP_KILL (for ending the tunnel process"), "{log}");
    assert!(log.contains("CAP_SETUID (for the tunnel process, as a user of its own)"), "{log}");
}

#[test]
fn what_the_start_alone_uses_need_not_be_there() {
    let Some(lab) = Lab::new("capfew", 1) else { return };
    let bounding = "--bounding-set=-sys_admin,-net_bind_service,-sys_resource";
    let mut server = lab.try_server_under(&["setpriv", bounding], &lab.server());
    server.eventually("the server answers on its admin socket", || lab.try_status().map(drop));
    assert!(server.log().contains("no IPC namespace of our own"), "{}", server.log());
    let _client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
    guard_and_nursery(&server);
}

/// The kernel kills them in the name of whoever died, which has to have been allowed to: other users' processes.
#[test]
fn who_does_not_run_any_more_dies_with_its_parent() {
    let Some(lab) = Lab::new("capdeath", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let (worker, tunnel) = (server.wait_for_children(1)[0], client.children()[0]);
    for (pid, parent) in [(worker, &mut server), (tunnel, &mut client)] {
        // It can't notice that its channel is closed.
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("stop it");
        eventually("it is stopped", || field(pid, "State").filter(|state| state.starts_with('T')).map(drop));
        parent.kill();
        eventually("it dies with its parent", || (!alive(pid)).then_some(()));
    }
}

/// Capabilities, mask and view of /proc as in packaging/tunguard.service; no systemd is needed for these.
#[test]
fn a_server_works_with_what_its_unit_gives_it() {
    let Some(lab) = Lab::new("capunit", 1) else { return };
    let unit = include_str!("../../packaging/tunguard.service");
    let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).expect("a list");
    let allowed = line.split_whitespace().filter_map(|name| name.strip_prefix("CAP_"));
    // What this machine lacks can't be added.
    let there = u64::from_str_radix(&field(std::process::id() as i32, "CapBnd").expect("a mask"), 16);
    let has_resource = there.expect("a mask") & (1 << 24) != 0;
    let allowed = allowed.filter(|name| has_resource || *name != "SYS_RESOURCE");
    let added: String = allowed.map(|name| format!(",+{}", name.to_lowercase())).collect();
    let bounding = format!("--bounding-set=-all{added}");
    assert!(unit.contains("\nUMask=0077\n") && unit.contains("\nProtectProc=invisible\n"));
    let script = "umask 0077 && mount -t proc -o hidepid=invisible proc /proc && exec \"$@\"";
    // `ip netns exec` gives each program a mount namespace of its own.
    let launcher = ["sh", "-c", script, "sh", "setpriv", &bounding, "--no-new-privs"];
    let config = lab.server().set("nat", true).set("push.routes", "['192.168.50.0/24']");
    let mut server = lab.try_server_under(&launcher, &config);
    server.eventually("the server answers on its admin socket", || lab.try_status().map(drop));
    let mut client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
    guard_and_nursery(&server);
    assert_eq!(lab.status()["queue"]["private"], true);
    assert_eq!(client.stop(), 0);
    assert_eq!(server.stop(), 0);
    assert!(!server.log().contains("on leaving:"), "{}", server.log());
}

#[test]
fn a_port_below_1024_is_bound_before_the_privilege_goes() {
    let Some(lab) = Lab::new("caport", 1) else { return };
    let server = lab.start_server(&lab.server().set("listen", "'[::]:443'"));
    let remote = format!("['{}:443']", SERVER_V4);
    let _client = lab.start_client(1, &lab.client(1).set("remote", remote));
    guard_and_nursery(&server);
}

#[test]
fn files_are_read_again_whoever_owns_them() {
    let Some(lab) = Lab::new("capreload", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let key = lab.path("certs/gate.key");
    for owner in [0, 1234] {
        let lines = || server.log().matches("are read again").count();
        let before = lines();
        chown(&key, Some(owner), Some(owner)).expect("the key's owner");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("the key's mode");
        server.signal(Signal::SIGHUP);
        eventually("the key is read", || (lines() > before).then_some(()));
    }
    // The nursery that follows has the new one, and the same privileges.
    let _client = lab.start_client(1, &lab.client(1));
    guard_and_nursery(&server);
    assert_eq!(server.try_exit(), None);
}

#[test]
fn users_that_are_not_mapped_are_refused_with_the_ways_out() {
    let Some(lab) = Lab::new("unmapped", 1) else { return };
    let Some(inside) = UserNamespace::new("unmapped", &lab, 65_536, "allow") else { return };
    let mut server = inside.try_server(&lab, &lab.server());
    assert_eq!(server.exit(), Exit::Usage as i32, "{}", server.log());
    let text = "worker_uids = [65536, 99999]: not mapped in this user namespace: users 65536-99999; groups \
                65536-99999. Mapped are users 0-65535; groups 0-65535: set worker_uids to at least 379 that are \
                mapped as users and as groups, or, which is weaker (see the documentation), sandbox.single_uid to \
                one that is, and not 0";
    assert!(server.log().contains(text), "{}", server.log());
    let mut server = inside.try_server(&lab, &lab.server().set("sandbox.single_uid", 70_000));
    assert_eq!(server.exit(), Exit::Usage as i32, "{}", server.log());
    assert!(server.log().contains("sandbox.single_uid = 70000: not mapped"), "{}", server.log());
    // A client: `nobody` isn't there, where root is all there is.
    let launcher = ["setpriv", "--clear-groups", "unshare", "--user", "--map-root-user"];
    let mut client = lab.try_client_under(&launcher, 1, &lab.client(1));
    assert_eq!(client.exit(), Exit::Usage as i32, "{}", client.log());
    let text = "the user 65534 of the tunnel process isn't mapped in this user namespace, mapped are 0: set a `user`";
    assert!(client.log().contains(text), "{}", client.log());
}

#[test]
fn one_user_for_all_serves_where_few_are_mapped() {
    let Some(lab) = Lab::new("singleuid", 3) else { return };
    let Some(inside) = UserNamespace::new("singleuid", &lab, 65_536, "deny") else { return };
    let config = lab.server().set("sandbox.single_uid", 900).set("max_clients", 6);

    // Groups that can't be left are refused at the start, not when a client comes.
    let mut refused = inside.try_server_in_groups("4,5", &lab, &config);
    assert_eq!(refused.exit(), Exit::System as i32, "{}", refused.log());
    let text = "drop the workers' supplementary groups: this user namespace forbids it (/proc/self/setgroups says \
                \"deny\"), and there are some: 4 5.";
    assert!(refused.log().contains(text), "{}", refused.log());

    let mut server = inside.start_server(&lab, &config);
    server.wait_for_log("weaker mode, sandbox.single_uid: all workers are user 900");
    server.wait_for_log("from one allowance for all");
    assert_eq!(lab.status()["sandbox"]["single_uid"], 900);
    // As many queues as there may be clients fit: 6 of them, and 3 for those that move.
    let queue = &lab.status()["queue"];
    let number = |key: &str| queue[key].as_u64().expect("a number");
    assert!(number("messages") * (number("bytes") + 96) * 9 <= 819_200, "{queue}");
    assert_eq!(number("messages"), 64, "{queue}");
    // Queues have names of their own, though their user is the same: who says nothing keeps nobody out.
    let silent = Dialler::new(&lab, 1).tcp().expect("the server's port");
    server.wait_for_children(1);
    let _clients: Vec<Process> = (1..=3).map(|n| lab.start_client(n, &lab.client(n))).collect();
    drop(silent);
    server.wait_for_children(3);
    std::thread::scope(|scope| {
        for n in 1..=3 {
            let lab = &lab;
            scope.spawn(move || {
                transfer(&lab.c(n), &lab.srv(), ip(INNER_V4), 4 << 20);
                transfer(&lab.srv(), &lab.c(n), lab.inner_v4(n), 4 << 20);
            });
        }
    });
    let workers = server.wait_for_children(3);
    assert_eq!(process::uids(&workers), [900].into());
    for worker in workers {
        holds(server.pid(), worker, &[], &[]);
        assert_eq!(field(worker, "Groups").as_deref(), Some(""), "supplementary groups");
        // Their one user may send them signals, which is what is weaker, but not trace them.
        let as_one_of_them = |command: &str| inside.succeeds_as(900, &lab, &format!("{command} {worker}"));
        assert!(as_one_of_them("kill -0"));
        assert!(as_one_of_them("x() { cat /proc/self/maps >/dev/null; }; x"));
        assert!(!as_one_of_them("x() { cat /proc/$1/maps >/dev/null; }; x"));
    }
    guard_and_nursery(&server);
    assert_eq!(server.stop(), 0);
}

#[test]
fn users_of_a_user_namespace_share_what_queues_may_take() {
    let Some(lab) = Lab::new("userns", 2) else { return };
    let Some(inside) = UserNamespace::new("userns", &lab, 200_000, "allow") else { return };
    // Of queues as large as elsewhere a second one would not fit, whoever makes it.
    let server = inside.start_server(&lab, &lab.server());
    assert_eq!(lab.status()["sandbox"]["single_uid"], serde_json::Value::Null);
    let clients: Vec<Process> = (1..=2).map(|n| lab.start_client(n, &lab.client(n))).collect();
    for n in 1..=2 {
        transfer(&lab.c(n), &lab.srv(), ip(INNER_V4), 4 << 20);
        transfer(&lab.srv(), &lab.c(n), lab.inner_v4(n), 4 << 20);
    }
    let workers = server.wait_for_children(2);
    assert_eq!(process::uids(&workers).len(), 2, "a user each");
    drop((clients, server));

    // A second queue for each, from the same allowance.
    let config = lab.server().set("data.tun_write", "'guard'");
    let server = inside.start_server(&lab, &config.clone().set("max_clients", 2));
    let clients: Vec<Process> = (1..=2).map(|n| lab.start_client(n, &lab.client(n))).collect();
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 4 << 20);
    transfer(&lab.srv(), &lab.c(2), lab.inner_v4(2), 4 << 20);
    drop((clients, server));
    let mut server = inside.try_server(&lab, &config);
    assert_eq!(server.exit(), Exit::System as i32, "{}", server.log());
    let text = "which is too little for max_clients = 250: lower that, or raise the limit";
    assert!(server.log().contains(text), "{}", server.log());

    // Too many for what there is.
    let mut server = inside.try_server(&lab, &lab.server().set("max_clients", 2_000));
    assert_eq!(server.exit(), Exit::System as i32, "{}", server.log());
    let text = "which is too little for max_clients = 2000: lower that, or raise the limit";
    assert!(server.log().contains(text), "{}", server.log());
}

#[test]
fn a_session_without_room_for_its_queue_is_refused_as_such() {
    let Some(lab) = Lab::new("noqueue", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    // As if others had used it up: the next nursery, and so the workers, may make no queue at all.
    lab.srv().must(&["prlimit", "--msgqueue=100:100", "--pid", &server.pid().to_string()]);
    server.signal(Signal::SIGHUP);
    server.wait_for_log("are read again");
    let (_control, answer) = Dialler::new(&lab, 1).hello();
    assert_eq!(answer, Ok(Message::Bye(Reason::NoRoom)));
    server.wait_for_log("the allowance for queues is used up: raise RLIMIT_MSGQUEUE, or lower max_clients");
}

/// What a server has while it serves.
fn guard_and_nursery(server: &Process) {
    let all = [OWN, JAIL].concat();
    // The thread that writes the log can do nothing.
    threads_hold(server.pid(), OWN, &all, &[("log", &[])]);
    let named = |name: &str| {
        let mut all = children(server.pid()).into_iter();
        all.find(|pid| field(*pid, "Name").as_deref() == Some(name)).expect(name)
    };
    let (nursery, holder) = (named("tg-nursery"), named("tg-keyholder"));
    holds(nursery, nursery, JAIL, JAIL);
    holds(holder, holder, &[], &[]);
}

/// All threads of a process hold this, but for those with a name that hold other.
fn threads_hold(pid: i32, effective: &[u32], permitted: &[u32], others: &[(&str, &[u32])]) {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("threads").flatten();
    let tids: Vec<i32> = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect();
    for tid in &tids {
        let name = field(*tid, "Name").expect("a name");
        match others.iter().find(|(other, _)| *other == name) {
            Some((_, set)) => holds(pid, *tid, set, set),
            None => holds(pid, *tid, effective, permitted),
        }
    }
    assert_eq!(tids.len(), 1 + others.len(), "threads of {pid}");
}

/// A thread has exactly these capabilities, can't get others, and says so to what it starts.
fn holds(pid: i32, tid: i32, effective: &[u32], permitted: &[u32]) {
    let mask = |set: &[u32]| format!("{:016x}", set.iter().fold(0u64, |mask, number| mask | 1 << number));
    let wanted = [
        ("CapInh", mask(&[])),
        ("CapPrm", mask(permitted)),
        ("CapEff", mask(effective)),
        ("CapBnd", mask(permitted)),
        ("CapAmb", mask(&[])),
        ("NoNewPrivs", "1".to_owned()),
    ];
    for (name, wanted) in wanted {
        let found = field(tid, name);
        assert_eq!(
            found.as_deref(),
            Some(&*wanted),
            "{name} of {tid}, of process {pid}, {:?}",
            field(tid, "Name")
        );
    }
}
