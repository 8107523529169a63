//! A client says how it is: by its admin socket, to root, beside a server's or another client's.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::lab::{INNER_V4, Lab, SERVER_V4, eventually, tunguard};
use crate::process::Process;

#[test]
fn a_connected_client_shows_its_session() {
    let Some(lab) = Lab::new("clstatus", 1) else { return };
    let server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let socket = socket_of(&lab, 1);
    let there = fs::symlink_metadata(&socket).expect("a socket");
    assert!(there.file_type().is_socket());
    assert_eq!((there.mode() & 0o777, there.uid()), (0o600, 0));

    let status = json(&socket).expect("a status");
    assert_eq!(status["role"], "client");
    assert_eq!(status["state"], "up");
    assert_eq!(status["device"], "tg0");
    assert_eq!(status["on_demand"], Value::Null);
    let addresses: Vec<String> = lab.inner(1).iter().map(ToString::to_string).collect();
    let mut shown: Vec<&str> =
        status["addresses"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    shown.sort_unstable();
    let mut expected: Vec<&str> = addresses.iter().map(String::as_str).collect();
    expected.sort_unstable();
    assert_eq!(shown, expected);
    assert_eq!(status["server"], format!("{SERVER_V4}:55555"));
    assert_eq!(status["carriers"][0]["device"], "eth0");
    assert_eq!(client.children(), [status["tunnel_pid"].as_i64().expect("a number") as i32]);
    // The same session as at the server.
    let at_server = lab.session("c1").expect("a session");
    let session = &status["session"];
    assert_eq!(session["session"], at_server["session"]);
    assert_eq!(session["suite"], at_server["suite"]);
    assert_eq!(session["control"], "up");
    let path = &session["paths"][0];
    assert_eq!(
        (&path["carrier"], &path["in_use"], &path["state"]),
        (&"eth0".into(), &true.into(), &"proven".into())
    );
    assert!(path["rtt_us"].as_u64().is_some_and(|rtt| rtt > 0));

    // What was carried meanwhile is counted.
    let before = carried(&status);
    lab.c(1).must(&["ping", "-n", "-q", "-c", "20", "-i", "0.01", "-W", "5", INNER_V4]);
    let after = carried(&json(&socket).expect("a status"));
    assert!(after[0] >= before[0] + 20 && after[1] >= before[1] + 20, "{before:?} {after:?}");
    assert!(after[2] >= before[2] + 20 * 84 && after[3] >= before[3] + 20 * 84, "{before:?} {after:?}");

    // For people.
    let text = said(&socket, &[]);
    for part in ["client on tg0, up", &addresses[0], SERVER_V4, "eth0 (198.18.1.2)", "proven"] {
        assert!(text.contains(part), "{part} is missing:\n{text}");
    }

    // A tunnel process that is stopped doesn't hold the answer up: its last report is shown.
    let tunnel = Pid::from_raw(client.children()[0]);
    kill(tunnel, Signal::SIGSTOP).expect("stop a child of our child");
    for _ in 0..10 {
        assert_eq!(json(&socket).expect("a status")["session"]["session"], session["session"]);
    }
    kill(tunnel, Signal::SIGCONT).expect("let it go on");
    // Its late reports, all asked for, are no violation.
    lab.c(1).must(&["ping", "-n", "-q", "-c", "1", "-W", "5", INNER_V4]);
    eventually("reports come again", || (carried(&json(&socket)?) != after).then_some(()));
    assert_eq!(client.children(), [tunnel.as_raw()]);

    // Without a server it looks for one, and says so.
    drop(server);
    eventually("the client is without a control connection", || {
        let status = json(&socket)?;
        (status["connecting"] == true && status["session"]["control"] == "lost").then_some(())
    });

    assert_eq!(client.stop(), 0);
    assert!(!socket.exists(), "the socket is left behind");
}

#[test]
fn a_killed_clients_socket_is_replaced() {
    let Some(lab) = Lab::new("clsocket", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let socket = socket_of(&lab, 1);
    client.kill();
    assert!(UnixStream::connect(&socket).is_err());
    let said = asked(&socket, &[]);
    assert!(!said.status.success());
    assert!(String::from_utf8_lossy(&said.stderr).contains("is it running?"), "{said:?}");
    let _client = lab.start_client(1, &lab.client(1));
    assert_eq!(json(&socket).expect("a status")["state"], "up");

    // Nobody else may ask.
    let nobody = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"])
        .arg(&socket)
        .output()
        .expect("setpriv starts");
    assert!(!nobody.status.success());
}

#[test]
fn a_client_answers_while_it_has_no_server() {
    let Some(lab) = Lab::new("clalone", 1) else { return };
    let _client = lab.try_client(1, &lab.client(1));
    let socket = socket_of(&lab, 1);
    let status = eventually("the client's status", || json(&socket).filter(|s| s["state"] == "connecting"));
    assert_eq!(status["session"], Value::Null);
    assert_eq!(status["remotes"][0], format!("{SERVER_V4}:55555"));
    assert!(said(&socket, &[]).contains("remotes    198.18.100.2:55555"));
}

#[test]
fn a_client_on_demand_shows_what_it_does() {
    let Some(lab) = Lab::new("clsleep", 1) else { return };
    let config = lab.client(1).set("on_demand.enabled", true).set("on_demand.idle", "'1s'");
    let mut client = lab.try_client(1, &config);
    let socket = socket_of(&lab, 1);
    let in_state = |state: &str| {
        eventually(&format!("the client is {state}"), || json(&socket).filter(|s| s["state"] == state))
    };
    assert_eq!(in_state("waking")["on_demand"]["causes"], serde_json::json!({ "no_packet": 1 }));
    let _server = lab.start_server(&lab.server());
    in_state("up");
    let first = in_state("asleep");
    assert_eq!((&first["tunnel_pid"], &first["session"]), (&Value::Null, &Value::Null));
    let addresses: Vec<String> = lab.inner(1).iter().map(ToString::to_string).collect();
    assert!(addresses.contains(&"10.9.0.2".to_owned()), "{addresses:?}");
    assert_eq!(first["addresses"].as_array().expect("a list").len(), addresses.len());

    lab.c(1).must(&["ping", "-n", "-c", "1", "-W", "20", INNER_V4]);
    let up = json(&socket).expect("a status");
    assert_eq!(up["state"], "up");
    let on_demand = &up["on_demand"];
    assert_eq!((on_demand["wakes"].as_u64(), on_demand["established"].as_u64()), (Some(2), Some(2)));
    assert_eq!(on_demand["causes"]["ping"], 1);
    assert_eq!(on_demand["recent"][0]["packet"], "icmp 10.9.0.2 > 10.9.0.1 type 8");
    let waited = |what: &str| on_demand["recent"][0][what].as_f64().expect("a number");
    assert!(waited("first_packet_ms") > 0.0 && waited("first_answer_ms") >= waited("first_packet_ms"));
    let last = in_state("asleep");
    assert_eq!(last["on_demand"]["sleeps"], serde_json::json!({ "idle": 2 }));
    assert!(said(&socket, &[]).contains("woken 2 times, connected 2 times"));
    assert_eq!(client.stop(), 0);
}

/// All three in one namespace and one directory of sockets.
#[test]
fn a_server_and_two_clients_are_told_apart() {
    let Some(lab) = Lab::new("clbeside", 2) else { return };
    let run = lab.path("run");
    let socket = |name: &str| format!("'{}'", run.join(name).display());
    // A server elsewhere, and one on the clients' host, for nobody.
    let _far = lab.start_server(&lab.server());
    let near = lab.server().set("socket", socket("srv0.sock")).set("device", "'srv0'");
    let near = near.set("networks", "['10.8.0.0/24']").set("state_dir", "'near-state'");
    let near = near.set("listen", "'127.0.0.1:4444'").set("worker_uids", "[200000, 210000]");
    let file = lab.write("near.toml", near.text());
    let command = [tunguard(), "server", "--config", file.to_str().expect("UTF-8")];
    let _near = Process::start("near", &lab.c(1), &lab.dir, &command);
    let client = |n: usize, device: &str| {
        let config = lab.client(n).set("device", format_args!("'{device}'")).set("routes", "'none'");
        config
            .set("state_dir", format_args!("'state-{device}'"))
            .set("socket", socket(&format!("client-{device}.sock")))
    };
    let mut first = lab.start_client(1, &client(1, "tg0"));
    let _second = {
        let file = lab.write("second.toml", client(2, "tg1").text());
        let command = [tunguard(), "client", "--config", file.to_str().expect("UTF-8")];
        Process::start("second", &lab.c(1), &lab.dir, &command)
    };

    // `tunguard status` looks into /run/tunguard, which is this directory here.
    let script =
        format!("mkdir -p /run/tunguard && mount --bind {} /run/tunguard && exec \"$@\"", run.display());
    let status = |args: &[&str]| {
        let out = lab.c(1).run(&[&["sh", "-c", &script, "sh", tunguard(), "status"], args].concat());
        (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    let shown = eventually("all three", || {
        let (_, shown) = status(&[]);
        ["client on tg0", "client on tg1", "on srv0, listening"]
            .iter()
            .all(|part| shown.contains(part))
            .then_some(shown)
    });
    assert_eq!(shown.matches("client on").count(), 2, "{shown}");
    let (fine, text) = status(&["--json"]);
    assert!(!fine && text.contains("--socket") && text.contains("client-tg1.sock"), "{text}");
    let (fine, text) = status(&["--json", "--socket", "/run/tunguard/client-tg1.sock"]);
    assert!(fine, "{text}");
    assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON")["device"], "tg1");

    // One that was killed is passed over.
    first.kill();
    let (fine, text) = status(&[]);
    assert!(fine && !text.contains("client on tg0") && text.contains("client on tg1"), "{text}");
}

fn socket_of(lab: &Lab, n: usize) -> PathBuf {
    lab.path(&format!("client-state-{n}/client-tg0.sock"))
}

fn asked(socket: &Path, args: &[&str]) -> Output {
    let out = Command::new("timeout")
        .args(["10", tunguard(), "status", "--socket"])
        .arg(socket)
        .args(args)
        .output();
    out.expect("tunguard starts")
}

fn said(socket: &Path, args: &[&str]) -> String {
    let out = asked(socket, args);
    assert!(out.status.success(), "{out:?}");
    String::from_utf8(out.stdout).expect("UTF-8")
}

fn json(socket: &Path) -> Option<Value> {
    let out = asked(socket, &["--json"]);
    out.status.success().then(|| serde_json::from_slice(&out.stdout).expect("status --json is JSON"))
}

/// Packets sent and received, bytes sent and received.
fn carried(status: &Value) -> [u64; 4] {
    ["sent_packets", "received_packets", "sent_bytes", "received_bytes"]
        .map(|name| status["session"][name].as_u64().expect("a number"))
}
