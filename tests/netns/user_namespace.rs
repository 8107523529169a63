//! A server's host inside a user namespace, as in a container without root.
//!
//! ```text
//!   net ----veth---- srv, whose network, IPC and mount namespaces belong to a user namespace with few IDs
//! ```

use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::lab::{Config, Lab, SERVER_V4, SERVER_V6, eventually, remove_namespace, skipped};
use crate::process::Process;

/// The process that keeps the namespaces there.
pub struct UserNamespace {
    holder: Child,
    _alone: MutexGuard<'static, ()>,
}

/// The kernel charges the queues of all these namespaces to whoever made them: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

impl UserNamespace {
    /// Moves the lab's server there. As many IDs from 0 on as `ids` says are there, with the numbers they have outside.
    /// `None` where this isn't permitted: the test is skipped.
    pub fn new(test: &str, lab: &Lab, ids: u32, setgroups: &str) -> Option<UserNamespace> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        // It ends with its standard input, at the latest with us.
        let mut holder = Command::new("unshare")
            .args(["--user", "--net", "--ipc", "--mount", "--propagation", "unchanged", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let proc = format!("/proc/{}", holder.id());
        // All are made by one call, and `cat` is there after it.
        let ready = || fs::read_to_string(format!("{proc}/comm")).is_ok_and(|name| name.trim() == "cat");
        let made = eventually("a user namespace, or a reason why not", || {
            if let Some(status) = holder.try_wait().expect("wait for our child") {
                return Some(Err(status));
            }
            ready().then_some(Ok(()))
        });
        if let Err(status) = made {
            let out = holder.wait_with_output().expect("unshare ends");
            let why =
                format!("no user namespaces: {} ({status})", String::from_utf8_lossy(&out.stderr).trim());
            assert!(std::env::var_os("CI").is_none(), "for the test {test}: {why}");
            skipped(test, &why);
            return None;
        }
        for (file, text) in [
            ("setgroups", setgroups.to_owned()),
            ("uid_map", format!("0 0 {ids}")),
            ("gid_map", format!("0 0 {ids}")),
        ] {
            fs::write(format!("{proc}/{file}"), text).expect(file);
        }
        let srv = lab.srv().0;
        // With both its ends, and at once.
        lab.net().ip(&["link", "del", "srv"]);
        remove_namespace(&srv);
        let attached = Command::new("ip").args(["netns", "attach", &srv, &holder.id().to_string()]).status();
        assert!(attached.is_ok_and(|status| status.success()), "the namespace gets the server's name");
        let net = lab.net();
        net.ip(&["link", "add", "srv", "type", "veth", "peer", "name", "eth0", "netns", &srv]);
        net.ip(&["addr", "add", "198.18.100.1/24", "dev", "srv"]);
        net.ip(&["addr", "add", "2001:db8:100::1/64", "dev", "srv", "nodad"]);
        net.ip(&["link", "set", "srv", "up"]);
        let srv = lab.srv();
        srv.ip(&["link", "set", "lo", "up"]);
        srv.ip(&["addr", "add", &format!("{SERVER_V4}/24"), "dev", "eth0"]);
        srv.ip(&["addr", "add", &format!("{SERVER_V6}/64"), "dev", "eth0", "nodad"]);
        srv.ip(&["link", "set", "eth0", "up"]);
        srv.ip(&["route", "add", "default", "via", "198.18.100.1"]);
        srv.ip(&["route", "add", "default", "via", "2001:db8:100::1"]);
        Some(UserNamespace { holder, _alone: alone })
    }

    /// Starts a server there that may fail.
    pub fn try_server(&self, lab: &Lab, config: &Config) -> Process {
        let entry = self.entry();
        let entry: Vec<&str> = entry.iter().map(|s| &**s).collect();
        lab.try_server_under(&[&["nsenter"], &entry[..]].concat(), config)
    }

    /// The same, in these supplementary groups.
    pub fn try_server_in_groups(&self, groups: &str, lab: &Lab, config: &Config) -> Process {
        let entry = self.entry();
        let entry: Vec<&str> = entry.iter().map(|s| &**s).collect();
        let launcher = [&["setpriv", "--groups", groups, "nsenter", "--preserve-credentials"], &entry[..]];
        lab.try_server_under(&launcher.concat(), config)
    }

    /// Starts a server there and waits until it answers.
    pub fn start_server(&self, lab: &Lab, config: &Config) -> Process {
        let mut server = self.try_server(lab, config);
        server.eventually("the server answers on its admin socket", || lab.try_status().map(drop));
        server
    }

    /// Whether a shell command succeeds there, as this user without privileges.
    pub fn succeeds_as(&self, uid: u32, lab: &Lab, command: &str) -> bool {
        let (uid, target) = (uid.to_string(), self.holder.id().to_string());
        let enter = ["nsenter", "--target", &target, "--user", "--setuid", &uid, "--setgid", &uid];
        lab.srv().run(&[&enter[..], &["sh", "-c", command]].concat()).status.success()
    }

    fn entry(&self) -> Vec<String> {
        ["--target", &self.holder.id().to_string(), "--user", "--ipc", "--mount", "--"]
            .map(str::to_owned)
            .to_vec()
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
