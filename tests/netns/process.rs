//! Processes under test: started in a namespace, watched through /proc, killed at the latest with the test.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{Namespace, PATIENCE, eventually};

/// A process of ours.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    exit: Option<i32>,
    rules_hold: bool,
}

impl Process {
    /// Starts a program in `namespace`, its standard error in a file in `dir`.
    pub fn start(name: &str, namespace: &Namespace, dir: &Path, command: &[&str]) -> Process {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let log = dir.join(format!("{name}.{}.log", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let file = File::create(&log).expect("a log file");
        let level = std::env::var("TUNGUARD_TEST_LOG").unwrap_or_else(|_| "info".to_owned());
        // ip turns into the program: the process ID stays.
        let child = Command::new("ip")
            .args(["netns", "exec", &namespace.0])
            .args(command)
            .env("RUST_LOG", level)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a log file"))
            .stderr(file)
            .spawn()
            .expect("ip starts");
        Process { name: name.to_owned(), child, log, exit: None, rules_hold: true }
    }

    /// A worker of its is made to break the rules, by this test.
    pub fn breaks_rules(&mut self) {
        self.rules_hold = false;
    }

    /// The same, from its start on.
    pub fn attacked(mut self) -> Process {
        self.breaks_rules();
        self
    }

    /// Its process ID.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until it has said `text`.
    pub fn wait_for_log(&mut self, text: &str) {
        let log = self.log.clone();
        self.eventually(&format!("a line with {text:?}"), || {
            let bytes = fs::read(&log).ok()?;
            String::from_utf8_lossy(&bytes).contains(text).then_some(())
        });
    }

    /// Waits until `probe` gives a value, as long as the process lives.
    pub fn eventually<T>(&mut self, what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = probe() {
                return value;
            }
            if let Some(code) = self.try_exit() {
                panic!("{} ended with {code} while this was awaited: {what}", self.name);
            }
            assert!(Instant::now() < deadline, "{}: waited {PATIENCE:?} in vain: {what}", self.name);
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its exit code, or 128 and the signal, once it has ended.
    pub fn try_exit(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt;
        if self.exit.is_none() {
            let status = self.child.try_wait().expect("wait for our child")?;
            self.exit = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
        }
        self.exit
    }

    /// Waits for its end.
    pub fn exit(&mut self) -> i32 {
        let what = format!("{} ends", self.name);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(code) = self.try_exit() {
                return code;
            }
            assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain: {what}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("signal a child of ours");
    }

    /// Asks it to end, and waits for it.
    pub fn stop(&mut self) -> i32 {
        self.signal(Signal::SIGTERM);
        self.exit()
    }

    /// Kills it without a warning, and waits for its end.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.exit();
    }

    /// Its children; of a server, the workers: key holder and nursery are there as long as the server.
    pub fn children(&self) -> Vec<i32> {
        let mut children = children(self.pid());
        let standing = |pid| matches!(field(pid, "Name").as_deref(), Some("tg-nursery" | "tg-keyholder"));
        children.retain(|pid| !standing(*pid));
        children
    }

    /// Waits until it has exactly `n` children.
    pub fn wait_for_children(&self, n: usize) -> Vec<i32> {
        eventually(&format!("{} has {n} children", self.name), || {
            Some(self.children()).filter(|children| children.len() == n)
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exit.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let log = self.log();
        if !thread::panicking() {
            // Whatever a test is about: none of ours panics, and no worker of ours breaks the rules, or makes a system
            // call that its filter doesn't know.
            let never = ["panicked at", "broke the rules", "SIGSYS"];
            for never in never.into_iter().take(if self.rules_hold { never.len() } else { 1 }) {
                assert!(!log.contains(never), "{}: {never}:\n{log}", self.name);
            }
        } else {
            let lines: Vec<&str> = log.lines().collect();
            let from = lines.len().saturating_sub(SHOWN_LINES);
            eprintln!("---- {} (exit {:?}), last lines:", self.name, self.exit);
            lines[from..].iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Children of a process, zombies included.
pub fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>())
        .collect()
}

/// Whether a process is there and no zombie.
pub fn alive(pid: i32) -> bool {
    field(pid, "State").is_some_and(|state| !state.starts_with('Z'))
}

/// A field of /proc/PID/status.
pub fn field(pid: i32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// What each open descriptor is.
pub fn descriptors(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| target.display().to_string())
        .collect()
}

/// A line of /proc/PID/limits, by its name: the soft limit.
pub fn limit(pid: i32, name: &str) -> String {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect(name);
    line.split_whitespace().next().expect("a soft limit").to_owned()
}

/// User IDs of these processes, all distinct ones.
pub fn uids(pids: &[i32]) -> BTreeSet<u32> {
    let uid = |pid: &i32| field(*pid, "Uid")?.split_whitespace().next()?.parse().ok();
    pids.iter().filter_map(uid).collect()
}

const SHOWN_LINES: usize = 60;
