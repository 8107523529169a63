//! packaging/tunguard.service with the systemd of this machine, booted in namespaces of its own (tests/netns/systemd.sh):
//! installed by `make install`, with packaging/server.example.toml as its configuration.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::{INNER_V4, LAN_V4, Lab, eventually, ip, skipped, tunguard};
use crate::process::{Process, alive, children};
use crate::traffic::{Conversation, transfer};

#[test]
fn the_systemd_unit_runs_reloads_comes_back_and_leaves_nothing() {
    let Some(lab) = Lab::new("unit", 1) else { return };
    let Some(mut host) = Host::boot(&lab) else { return };
    let forwarding = || host.must(&["cat", "/proc/sys/net/ipv4/ip_forward"]);
    let before = forwarding();
    // Nothing in it is anything that systemd doesn't know, or would leave out.
    let verified = host.run(&["systemd-analyze", "verify", "tunguard.service"]);
    assert_eq!((verified.0, &*verified.1), (0, ""), "systemd-analyze verify");

    // A configuration with a mistake: the service fails, says which, and isn't started again and again.
    host.write_configuration("networks = 'here'\n");
    assert_ne!(host.run(&["systemctl", "start", "tunguard"]).0, 0, "a service that isn't ready at once");
    eventually("the service has failed", || (host.property("ActiveState") == "failed").then_some(()));
    assert_eq!((host.property("ExecMainStatus").as_str(), host.property("NRestarts").as_str()), ("2", "0"));
    assert!(host.journal().contains("/etc/tunguard/server.toml:1: networks"), "{}", host.journal());

    host.write_configuration("nat = true\npush = { routes = ['192.168.50.0/24'] }\n");
    host.must(&["systemctl", "start", "tunguard"]);
    host.wait_for_server();
    let client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
    assert_eq!(host.status()["queue"]["private"], true);

    // A reload says whether there was one.
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    host.write_configuration("nat = true\noops = 1\n");
    assert_ne!(host.run(&["systemctl", "reload", "tunguard"]).0, 0);
    assert!(host.journal().contains("unknown key \"oops\""), "{}", host.journal());
    host.write_configuration("nat = false\npush = { routes = ['192.168.50.0/24'] }\n");
    host.must(&["systemctl", "reload", "tunguard"]);
    talk.exchange(100_000);

    // After a crash of the guard it is back, and so is the client.
    let pid = host.property("MainPID");
    host.must(&["kill", "-KILL", &pid]);
    eventually("another guard", || {
        let main = host.property("MainPID");
        (main != "0" && main != pid && host.property("ActiveState") == "active").then_some(())
    });
    eventually("the client is back", || lab.c(1).pings(INNER_V4, 56, 1).then_some(()));
    assert_eq!(host.property("NRestarts"), "1");
    assert!(client.log().contains("reconnecting"), "{}", client.log());

    host.must(&["systemctl", "stop", "tunguard"]);
    assert_eq!(
        (host.property("ActiveState").as_str(), host.property("Result").as_str()),
        ("inactive", "success")
    );
    assert_eq!(forwarding(), before);
    assert_eq!(host.must(&["nft", "list", "tables"]), "");
    assert_eq!(host.run(&["pgrep", "tunguard|tg-"]).0, 1, "processes that stayed");
    assert!(!host.journal().contains("on leaving:"), "{}", host.journal());
    host.shut_down();
}

/// The server's host with a systemd of its own.
struct Host {
    boot: Process,
    init: i32,
}

impl Host {
    /// `None` where there is no systemd: the test is skipped.
    fn boot(lab: &Lab) -> Option<Host> {
        if !Path::new("/lib/systemd/systemd").exists() {
            assert!(std::env::var_os("CI").is_none(), "the package systemd is missing");
            skipped("unit", "the package systemd is missing");
            return None;
        }
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/netns/systemd.sh");
        let mounts = lab.path("cgroup");
        fs::create_dir(&mounts).expect("a directory");
        let programs = Path::new(tunguard()).parent().expect("a directory").to_str().expect("UTF-8");
        let name = lab.srv().0;
        let command = ["sh", script, &name, mounts.to_str().expect("UTF-8"), programs];
        let mut boot = Process::start("systemd", &lab.srv(), &lab.dir, &command);
        let pid = boot.pid();
        let init = boot.eventually("systemd starts", || {
            let unshare = *children(pid).first()?;
            let init = *children(unshare).first()?;
            let name = fs::read_to_string(format!("/proc/{init}/comm")).ok()?;
            (name == "systemd\n").then_some(init)
        });
        let host = Host { boot, init };
        eventually("systemd has booted", || {
            let state = host.run(&["systemctl", "is-system-running"]).1;
            (state == "running\n").then_some(())
        });
        let certs = lab.path("certs");
        host.must(&["mkdir", "/etc/tunguard"]);
        host.must(&["cp", "-r", certs.to_str().expect("UTF-8"), "/etc/tunguard/"]);
        Some(host)
    }

    /// The example, with the lab's certificates and what is said here in front.
    fn write_configuration(&self, first: &str) {
        let example = include_str!("../../packaging/server.example.toml");
        let text = example.replace("server.pem", "gate.pem").replace("server.key", "gate.key");
        let keys: Vec<&str> = first.lines().filter_map(|line| Some(line.split_once(" =")?.0)).collect();
        let given = |line: &&str| !keys.iter().any(|key| line.starts_with(&format!("{key} =")));
        let rest: String = text.lines().filter(given).map(|line| format!("{line}\n")).collect();
        let file = format!("{first}{rest}");
        self.must(&["sh", "-c", "printf %s \"$1\" >/etc/tunguard/server.toml", "sh", &file]);
    }

    /// Exit code and output of a program there.
    fn run(&self, command: &[&str]) -> (i32, String) {
        let out = Command::new("nsenter")
            .args(["--target", &self.init.to_string(), "--all", "timeout", "60"])
            .args(command)
            .output()
            .expect("nsenter starts");
        let text = [out.stdout, out.stderr].concat();
        (out.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
    }

    /// Output of one that has to succeed.
    fn must(&self, command: &[&str]) -> String {
        let (code, text) = self.run(command);
        assert_eq!(code, 0, "{command:?}: {text}\n{}", self.journal());
        text
    }

    fn journal(&self) -> String {
        self.run(&["journalctl", "--no-pager", "--output", "cat", "--unit", "tunguard"]).1
    }

    /// A property of the service.
    fn property(&self, name: &str) -> String {
        self.must(&["systemctl", "show", "--value", "--property", name, "tunguard"]).trim().to_owned()
    }

    fn wait_for_server(&self) {
        eventually("the server answers", || (self.run(&["tunguard", "status"]).0 == 0).then_some(()));
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.must(&["tunguard", "status", "--json"])).expect("status --json is JSON")
    }

    fn shut_down(&mut self) {
        if self.boot.try_exit().is_none() {
            self.boot.signal(Signal::SIGTERM);
            assert_eq!(self.boot.exit(), 0, "{}", self.boot.log());
            assert!(!alive(self.init));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.shut_down();
        } else if self.boot.try_exit().is_none() {
            self.boot.signal(Signal::SIGTERM);
            // Its processes end with it, and its control group is empty by then.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.boot.exit()));
        }
    }
}
