//! Workers under foreign control (worker/src/red_team.rs), each started as any other: every forbidden act is refused and
//! in the log, nobody else notices, and no layer of the sandbox is there for nothing.
//!
//! ```text
//!   c1, its worker turns     198.18.1.2 ---- [c1]
//!                                                net ---- srv
//!   c2, who is to notice     198.18.2.2 ---- [c2]
//!   nothing
//! ```
//! An act that ends its worker needs one of its own, so a report is made by a connection for each. `docs/red-team.md` has
//! the table that a run prints (`--nocapture`).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use tunguard::sys::jail::Layer;

use crate::lab::{INNER_V4, Lab, PATIENCE, SERVER_V4, eventually, ip};
use crate::process::{Process, alive, descriptors};
use crate::raw_client::{Dialler, RawClient};
use crate::traffic::Conversation;

#[test]
fn a_worker_that_turns_before_it_has_a_session_gets_nowhere() {
    let Some(lab) = Lab::rigged("turned", 2) else { return };
    let mut team = Team::new(&lab, "direct");
    // It is killed when its time is over, which takes the longest.
    let deaf = team.start("admission", &[DEAF], &[]);
    let mut report = team.report_all("admission", AT_ADMISSION, &[DEAF]);
    report.insert(DEAF.to_owned(), team.outcome(&deaf, DEAF));
    drop(deaf);
    team.lines_are_cut("admission");
    judge("admission", &report, AT_ADMISSION);
    let report = team.report_all("granted", WITH_A_GRANT, &[]);
    judge("granted", &report, WITH_A_GRANT);
    team.nobody_else_noticed();
}

#[test]
fn a_worker_that_turns_in_a_session_gets_nowhere() {
    let Some(lab) = Lab::rigged("traitor", 2) else { return };
    let mut team = Team::new(&lab, "direct");
    // Where it shows what is possible by design.
    let hears = lab.c(2).within(|| UdpSocket::bind("198.18.2.2:40010")).expect("a socket");
    let inside = lab.srv().within(|| UdpSocket::bind((INNER_V4, 40_009))).expect("a socket");
    let mut report = team.report_all("carrying", WHILE_CARRYING, &[DEAF]);
    team.lines_are_cut("carrying");
    for (socket, source, text) in
        [(&hears, format!("{SERVER_V4}:55555"), "anybody?"), (&inside, "10.9.0.77:40009".into(), "alien")]
    {
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut buffer = [0; 64];
        let (len, from) = socket.recv_from(&mut buffer).expect("a datagram of the worker's");
        assert_eq!((&buffer[..len], from.to_string()), (text.as_bytes(), source));
    }
    team.nobody_else_noticed();
    // It doesn't hear that the server stops, and the server does all the same.
    let deaf = team.start("carrying", &[DEAF], &[]);
    for _ in 0..5 {
        assert_eq!(lab.sessions().len(), 2, "the guard answers while a worker doesn't");
    }
    let begun = Instant::now();
    assert_eq!(team.server.stop(), 0);
    assert!(begun.elapsed() < Duration::from_secs(20), "a deaf worker holds the server up");
    report.insert(DEAF.to_owned(), team.outcome(&deaf, DEAF));
    judge("carrying", &report, WHILE_CARRYING);
}

#[test]
fn a_worker_that_forges_packets_is_found_out_where_the_guard_writes() {
    let Some(lab) = Lab::rigged("forger", 2) else { return };
    let mut team = Team::new(&lab, "guard");
    let inside = lab.srv().within(|| UdpSocket::bind((INNER_V4, 40_009))).expect("a socket");
    let dropped = || lab.status()["guard_drops"]["source_not_ours"].as_u64().unwrap_or(0);
    assert_eq!(dropped(), 0, "{}", lab.status());
    assert_eq!(team.report("carrying", &["foreign-source"], &[])["foreign-source"], "done");
    eventually("the guard drops the packet", || (dropped() == 1).then_some(()));
    inside.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    assert!(inside.recv(&mut [0; 64]).is_err(), "it came through");
    // The queue to the guard is only that.
    for act in
        ["read-device", "gather-from-device", "splice-device", "change-device", "map-descriptor-to-read"]
    {
        assert_eq!(team.report("carrying", &[act], &[])[act], SIGSYS, "{act}");
    }
    team.nobody_else_noticed();
}

#[test]
fn no_layer_of_the_sandbox_is_there_for_nothing() {
    let Some(lab) = Lab::rigged("layers", 2) else { return };
    let mut team = Team::new(&lab, "direct");
    let program = SetUid::new(&lab);
    let with = format!("with {}", program.path());
    let mut table = String::new();
    // `a_worker_that_ignores_the_guard_does_not_outlive_it`
    let mut shown = vec![Layer::ParentsLife.name()];
    for &(layer, behind, moment, act, kept, gone) in LAYERS {
        let leave_out = |layers: &[&str]| -> Vec<String> {
            let orders = layers.iter().map(|layer| format!("leave-out {layer}"));
            orders.chain([with.clone()]).collect()
        };
        let (before, after) = (leave_out(behind), leave_out(&[behind, &[layer]].concat()));
        let first = team.report(moment, &[act], &before)[act].clone();
        // Without users of their own they share an allowance of queues.
        team.server.wait_for_children(1);
        let second = team.report(moment, &[act], &after)[act].clone();
        team.server.wait_for_children(1);
        let _ =
            writeln!(table, "| `{layer}` | {} | {moment}.{act} | {first} | {second} |", behind.join(", "));
        assert!(first.starts_with(kept) && second.starts_with(gone), "{layer} behind {behind:?}:\n{table}");
        assert_ne!(first, second, "{layer} behind {behind:?}");
        shown.push(layer);
    }
    for &(layer, behind) in SECOND_LOCKS {
        let orders = [behind, &[layer]].concat();
        let orders = orders.iter().map(|layer| format!("leave-out {layer}")).chain([with.clone()]);
        let came = &team.report("admission", &["exec-set-uid"], &orders.collect::<Vec<_>>())["exec-set-uid"];
        assert_eq!(came, "exit code 76", "{layer} behind {behind:?}");
        team.server.wait_for_children(1);
        shown.push(layer);
    }
    println!("| layer | without, besides | act | with it | without it |\n|---|---|---|---|---|\n{table}");
    for layer in Layer::ALL {
        assert!(shown.contains(&layer.name()), "nothing shows what {layer:?} is good for");
    }
    team.nobody_else_noticed();
}

#[test]
fn what_the_filters_stop_most_of_is_refused_behind_them_too() {
    let Some(lab) = Lab::rigged("unfiltered", 2) else { return };
    let mut team = Team::new(&lab, "direct");
    let orders = ["leave-out first-filter".to_owned(), "leave-out carrying-filter".to_owned()];
    for (moment, refused) in [("admission", UNFILTERED), ("carrying", UNFILTERED_LATER)] {
        let mut report = BTreeMap::new();
        for act in team.known(moment, "list-calls") {
            report.extend(team.report(moment, &[&act], &orders));
        }
        show(&format!("{moment}, without filters"), &report);
        let got: Vec<(&str, &str)> = refused.iter().map(|(act, _)| (*act, report[*act].as_str())).collect();
        assert_eq!(got, refused, "{moment}");
        assert!(report.len() >= UNFILTERED_AT_LEAST, "{report:?}");
    }
}

#[test]
fn a_worker_that_ignores_the_guard_does_not_outlive_it() {
    for (orders, outlives) in [(&[][..], false), (&["leave-out parents-life"][..], true)] {
        let Some(lab) = Lab::rigged(if outlives { "orphan" } else { "killed" }, 2) else { return };
        let mut team = Team::new(&lab, "direct");
        let orders: Vec<String> = orders.iter().map(|order| (*order).to_owned()).collect();
        let deaf = team.start("carrying", &[DEAF], &orders);
        let worker = team.pid_of("carrying.stay-deaf").expect("its process");
        assert!(alive(worker));
        team.server.kill();
        match outlives {
            false => eventually("the worker's end", || (!alive(worker)).then_some(())),
            true => {
                std::thread::sleep(Duration::from_secs(1));
                assert!(alive(worker), "something else than its parent's end has killed it");
                kill(Pid::from_raw(worker), Signal::SIGKILL).expect("a worker of our server");
            }
        }
        drop(deaf);
    }
}

/// A server, somebody whose worker turns, and somebody who is not to notice.
struct Team<'a> {
    lab: &'a Lab,
    server: Process,
    _bystander: Process,
    talk: Conversation,
    dialler: Dialler,
    /// The bystander's session.
    session: Value,
    descriptors: usize,
}

/// A connection whose worker tries something.
struct Attempt {
    moment: &'static str,
    /// How long the log was before.
    mark: usize,
    held: Option<Held>,
}

enum Held {
    Tcp(#[expect(dead_code, reason = "held open")] TcpStream),
    Session(Box<RawClient>),
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(Held::Session(session)) = self.held.take() {
            session.leave();
        }
    }
}

impl<'a> Team<'a> {
    fn new(lab: &'a Lab, tun_write: &str) -> Team<'a> {
        lab.order(&[]);
        // Queues are charged to users: so many of them are not to be anybody else's on this host.
        static SERVERS: AtomicU32 = AtomicU32::new(0);
        let number = std::process::id() % 100_000 * 10 + SERVERS.fetch_add(1, Ordering::Relaxed) % 10;
        let first = 1_000_000 + number * 1_000;
        let config = lab
            .server()
            // Each that dies counts against its source.
            .set("exempt_sources", "['198.18.0.0/15']")
            .set("data.tun_write", format_args!("'{tun_write}'"))
            // A source whose handshakes fail so often would be turned away.
            .set("penalty", "'off'")
            .set("worker_uids", format_args!("[{first}, {}]", first + 999));
        let server = lab.start_server(&config).attacked();
        let bystander = lab.start_client(2, &lab.client(2));
        let talk = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
        let dialler = Dialler::new(lab, 1);
        dialler.connect().leave();
        lab.wait_for_sessions(1);
        let session = lab.sessions()[0]["session"].clone();
        assert!(session.is_string(), "{session}");
        let descriptors = descriptors(server.pid()).len();
        Team { lab, server, _bystander: bystander, talk, dialler, session, descriptors }
    }

    /// Lets a worker try these at that moment.
    fn start(&self, moment: &'static str, acts: &[&str], orders: &[String]) -> Attempt {
        let to_try = acts.iter().map(|act| format!("act {moment}.{act}"));
        let orders: Vec<String> = orders.iter().cloned().chain(to_try).collect();
        self.lab.order(&orders.iter().map(String::as_str).collect::<Vec<_>>());
        let mark = self.server.log().len();
        let held = match moment {
            "admission" | "granted" => Held::Tcp(self.dialler.tcp().expect("the server's port")),
            _ => Held::Session(Box::new(self.dialler.connect())),
        };
        let attempt = Attempt { moment, mark, held: Some(held) };
        // Orders are for one worker.
        let first = format!("red team: {moment}.{}", acts.first().expect("an act"));
        eventually(&first, || self.server.log()[mark..].contains(&first).then_some(()));
        attempt
    }

    /// What became of an act: how it was refused, how its worker ended, or `done`.
    fn outcome(&mut self, attempt: &Attempt, act: &str) -> String {
        let begins = format!("red team: {}.{act}", attempt.moment);
        eventually(&format!("what becomes of {begins}"), || {
            let log = self.server.log();
            let since = &log[attempt.mark..];
            // The first line says that it was tried at all, and by whom.
            let pid = since.lines().find(|line| line.ends_with(&begins)).and_then(pid_in)?;
            since.lines().find_map(|line| {
                if let Some((_, came)) = line.split_once(&format!("{begins}: ")) {
                    return Some(came.to_owned());
                }
                if let Some((_, how)) = line.split_once(&format!("worker {pid} of ")) {
                    if let Some((_, how)) = how.split_once(" died: ") {
                        return Some(how.split(',').next().unwrap_or(how).to_owned());
                    }
                    return how.contains("doesn't end in time").then(|| LATE.to_owned());
                }
                // Which says whose session it was, and no process: only one worker at a time breaks them.
                let rules = line.split_once("killed: the worker broke the rules: ").filter(|_| act != DEAF);
                rules.map(|(_, which)| format!("{RULES}{which}"))
            })
        })
    }

    /// What becomes of these acts, by one worker. None of them but the last may end it.
    fn report(&mut self, moment: &'static str, acts: &[&str], orders: &[String]) -> BTreeMap<String, String> {
        let attempt = self.start(moment, acts, orders);
        acts.iter().map(|act| ((*act).to_owned(), self.outcome(&attempt, act))).collect()
    }

    /// What becomes of every act that there is for this moment, by a worker each.
    fn report_all(
        &mut self,
        moment: &'static str,
        expected: Expected,
        but: &[&str],
    ) -> BTreeMap<String, String> {
        let known = self.known(moment, "list");
        for (act, _) in expected {
            assert!(known.iter().any(|known| known == act), "no act is called {act}");
        }
        let mut report = BTreeMap::new();
        for (n, act) in known.iter().filter(|act| !but.contains(&act.as_str())).enumerate() {
            report.extend(self.report(moment, &[act], &[]));
            if n % 10 == 0 {
                self.talk.exchange(20_000);
            }
        }
        assert_eq!(report.len() + but.len(), known.len(), "every act has an outcome");
        let at_least = if moment == "granted" { 30 } else { 90 };
        assert!(known.len() >= at_least, "{known:?}");
        report
    }

    /// The acts that the worker knows; with `list-calls` those that are one system call.
    fn known(&mut self, moment: &'static str, list: &str) -> Vec<String> {
        let attempt = self.start(moment, &[list], &[]);
        let prefix = format!("red team knows, {moment}: ");
        let (all, names) = eventually("a list of acts", || {
            let log = self.server.log();
            let lines =
                log[attempt.mark..].lines().filter_map(|line| Some(line.split_once(&prefix)?.1.to_owned()));
            let mut lines: Vec<String> = lines.collect();
            let all: usize = lines.last()?.strip_prefix("all ")?.parse().ok()?;
            lines.pop();
            Some((all, lines.iter().flat_map(|line| line.split(' ').map(str::to_owned)).collect::<Vec<_>>()))
        });
        assert_eq!(names.len(), all);
        names
    }

    /// One worker can't fill the log, nor write lines of others into it.
    fn lines_are_cut(&self, moment: &str) {
        let log = self.server.log();
        let lines = log.matches("one of many lines").count();
        assert!((20..=60).contains(&lines), "{moment}: {lines} lines of 200");
        assert!(log.contains("lines left out"), "{moment}");
        let forged: Vec<&str> =
            log.split(['\n', '\r']).filter(|line| line.contains("a forged line")).collect();
        assert!(forged.len() == 1 && forged[0].contains("first"), "{moment}: {forged:?}");
        assert!(!log.contains(['\u{1b}', '\u{202e}', '\0', '\r']), "{moment}: control characters in the log");
    }

    fn pid_of(&self, act: &str) -> Option<i32> {
        self.server.log().lines().find(|line| line.ends_with(act)).and_then(pid_in)
    }

    /// The bystander's session is what it was, and nothing is left of the others.
    fn nobody_else_noticed(&mut self) {
        self.lab.order(&[]);
        self.talk.exchange(100_000);
        self.lab.wait_for_sessions(1);
        self.server.wait_for_children(1);
        assert_eq!(self.lab.sessions()[0]["session"], self.session);
        let mut honest = self.dialler.connect();
        assert_eq!(honest.ping(1), 1, "an honest client after all that");
        honest.leave();
        self.lab.wait_for_sessions(1);
        let held = descriptors(self.server.pid()).len();
        // UDP slots are never closed; 253 descriptors would be seen.
        assert!(
            held < self.descriptors + 100,
            "the guard held {} descriptors, and now {held}",
            self.descriptors
        );
    }
}

/// A program that belongs to root and runs as root, whoever starts it: the worker's own, where only its name has to be known.
struct SetUid {
    dir: std::path::PathBuf,
}

impl SetUid {
    fn new(lab: &Lab) -> SetUid {
        let name = lab.dir.file_name().expect("a name").to_string_lossy().into_owned();
        let dir = lab.dir.with_file_name(format!("{name}-set-uid"));
        fs::create_dir(&dir).expect("a directory");
        let made = SetUid { dir };
        fs::copy(lab.rigged_program("tunguard-worker"), made.dir.join("program")).expect("a copy");
        for (path, mode) in [(made.dir.join("program"), 0o4711), (made.dir.clone(), 0o711)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("its mode");
        }
        made
    }

    fn path(&self) -> String {
        self.dir.join("program").display().to_string()
    }
}

impl Drop for SetUid {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Compares a report with what is expected, and prints it as a table.
fn judge(moment: &str, report: &BTreeMap<String, String>, expected: Expected) {
    show(moment, report);
    let page = fs::read_to_string(PAGE).expect(PAGE);
    let possible =
        page.split("\n## ").find(|part| part.starts_with("What is possible")).expect("what is possible");
    let mut wrong = String::new();
    for (act, came) in report {
        let wanted = expected.iter().find(|(name, _)| name == act).map_or(SIGSYS, |(_, wanted)| wanted);
        if !wanted.split(" or ").any(|wanted| came.starts_with(wanted)) {
            let _ = writeln!(wrong, "{moment}.{act}: {came}, and not {wanted}");
        }
        if came == "done" && !possible.contains(&format!("`{act}`")) {
            let _ = writeln!(wrong, "{moment}.{act} gets through, and {PAGE} doesn't say so");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Prints a report as docs/red-team.md has it: outcomes, and which acts came to each.
fn show(title: &str, report: &BTreeMap<String, String>) {
    let mut by_outcome: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (act, came) in report {
        // A request out of place says more.
        let kind = came
            .split_once("out of place")
            .map_or(came.as_str(), |(_, rest)| &came[..came.len() - rest.len()]);
        by_outcome.entry(kind).or_default().push(format!("`{act}`"));
    }
    let row =
        |(kind, acts): (&&str, &Vec<String>)| format!("| {kind} | {} | {} |\n", acts.len(), acts.join(" "));
    let rows: String = by_outcome.iter().map(row).collect();
    println!("| {title}: {} acts | | |\n|---|---|---|\n{rows}", report.len());
}

/// `... [123] text`
fn pid_in(line: &str) -> Option<i32> {
    line.split('[').rev().find_map(|part| part.split_once(']')?.0.parse().ok())
}

type Expected = &'static [(&'static str, &'static str)];

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/red-team.md");
/// What takes longer than anything else: it ends with the worker's time.
const DEAF: &str = "stay-deaf";
const SIGSYS: &str = "signal SIGSYS";
const LATE: &str = "killed when its time was over";
const RULES: &str = "killed by the guard: ";

/// Outcomes of what the system call filters don't end the worker for, at admission.
const AT_ADMISSION: Expected = &[
    ("map-much", "ENOMEM"),
    // Where the kernel has no 32-bit calls at all, that is a fault.
    ("32-bit-call", "signal SIGSYS or signal SIGSEGV"),
    ("register-before-grant", "killed by the guard: a request out of place"),
    ("report-unasked", "killed by the guard: a request out of place"),
    ("redeem-twice", "killed by the guard: a second ticket"),
    ("claim-twice", "killed by the guard: a request out of place"),
    ("claim-another-ones-ticket", "killed by the guard: it claims to be another"),
    ("claim-impossible-name", "killed by the guard: a claim that no certificate makes"),
    ("ticket-before-session", "killed by the guard: a request out of place"),
    ("move-before-session", "killed by the guard: a request out of place"),
    ("lose-before-session", "killed by the guard: a request out of place"),
    ("register-another-size", "refused by the guard"),
    ("unknown-request", "killed by the guard: a message that doesn't decode"),
    ("cut-request", "killed by the guard: a message that doesn't decode"),
    ("too-long-request", "killed by the guard: a message that is too long"),
    ("empty-request", LATE),
    ("descriptor-to-guard", "killed by the guard: descriptors"),
    ("descriptors-to-guard", "killed by the guard: descriptors"),
    ("flood-of-requests", "killed by the guard: more requests than its budget allows"),
    ("close-channel", LATE),
    (DEAF, LATE),
    // Cut and escaped: `lines_are_cut`.
    ("flood-of-lines", "done"),
    ("lines-in-a-line", "done"),
    // By design: the guard believes a worker who its client is (docs/red-team.md).
    ("claim-any-name", "done"),
];

/// The same where it has claimed a session itself, so that it has no second filter: a real session's descriptors, and the
/// system calls of admission.
const WITH_A_GRANT: Expected = &[
    ("map-descriptor-to-read", "ENODEV"),
    ("watch-more", "EBADF"),
    // Everything that a worker may hold is held.
    ("new-epoll-set", "EMFILE"),
    ("poll-device", "done"),
    // No file of any kind can be written: `limits`.
    ("gather-into-memory", "signal SIGXFSZ"),
    ("map-memory-to-read", "done"),
];

/// The same while there is a session.
const WHILE_CARRYING: Expected = &[
    ("map-much", "ENOMEM"),
    ("32-bit-call", "signal SIGSYS or signal SIGSEGV"),
    ("register-again", "killed by the guard: a request out of place"),
    ("report-unasked", "killed by the guard: a request out of place"),
    ("redeem-late", "killed by the guard: a request out of place"),
    ("claim-again", "killed by the guard: a request out of place"),
    ("ticket-twice", "killed by the guard: a second ticket for one session"),
    ("unknown-request", "killed by the guard: a message that doesn't decode"),
    ("cut-request", "killed by the guard: a message that doesn't decode"),
    ("too-long-request", "killed by the guard: a message that is too long"),
    ("empty-request", LATE),
    ("descriptor-to-guard", "killed by the guard: descriptors"),
    ("descriptors-to-guard", "killed by the guard: descriptors"),
    ("flood-of-requests", "killed by the guard: more requests than its budget allows"),
    ("close-channel", LATE),
    (DEAF, LATE),
    ("flood-of-lines", "done"),
    ("lines-in-a-line", "done"),
    // By design (docs/red-team.md): it can wait for the device, send from the server's port, and write any packet to the
    // device where the guard doesn't.
    ("poll-device", "done"),
    ("send-anywhere", "done"),
    ("foreign-source", "done"),
];

/// Without any filter: refused by what stands behind it, at admission.
const UNFILTERED: Expected = &[
    ("abort-sibling", "EPERM"),
    ("accounting", "EPERM"),
    ("become-root", "EPERM"),
    ("become-root-by-older-call", "EPERM"),
    ("compare-sibling", "EPERM"),
    ("create-file", "ENOENT"),
    ("exec", "ENOENT"),
    ("fork", "EAGAIN"),
    ("host-name", "EPERM"),
    ("kill-guard", "EPERM"),
    ("kill-nursery", "EPERM"),
    ("kill-sibling", "EPERM"),
    ("leave-root", "EPERM"),
    ("limits-of-sibling", "EPERM"),
    ("make-directory", "EACCES"),
    ("map-much", "ENOMEM"),
    ("mount", "EPERM"),
    ("new-mounts", "EPERM"),
    ("new-network", "EPERM"),
    ("new-user-namespace", "EPERM"),
    ("open-device", "ENOENT"),
    ("open-file", "ENOENT"),
    ("open-own-memory", "ENOENT"),
    ("open-proc", "ENOENT"),
    ("open-queue", "EACCES"),
    ("open-root", "EACCES"),
    ("pivot-root", "EPERM"),
    ("priority-of-sibling", "EPERM"),
    ("processors-of-sibling", "EPERM"),
    ("queue-signal", "EPERM"),
    ("read-queue", "EACCES"),
    ("read-sibling", "EPERM"),
    ("reboot", "EPERM"),
    ("remove-queue", "EPERM"),
    ("socket-packet", "EPERM"),
    ("swap", "EPERM"),
    ("take-capabilities", "EPERM"),
    ("take-group", "EPERM"),
    ("take-groups", "EPERM"),
    ("trace-guard", "EPERM"),
    ("trace-nursery", "EPERM"),
    ("trace-sibling", "EPERM"),
    ("write-sibling", "EPERM"),
];
/// The same while there is a session.
const UNFILTERED_LATER: Expected = &[
    ("become-root", "EPERM"),
    ("fork", "EAGAIN"),
    ("kill-guard", "EPERM"),
    ("kill-sibling", "EPERM"),
    ("leave-root", "EPERM"),
    ("mark-packets", "EPERM"),
    ("mount", "EPERM"),
    ("open-file", "ENOENT"),
    ("open-own-memory", "ENOENT"),
    ("open-queue", "EACCES"),
    ("open-queue-of-all", "EACCES"),
    ("queue-of-own-once-more", "EMFILE"),
    ("remove-queue", "EPERM"),
    ("take-capabilities", "EPERM"),
    ("trace-guard", "EPERM"),
    ("trace-sibling", "EPERM"),
    ("read-sibling", "EPERM"),
];
const UNFILTERED_AT_LEAST: usize = 60;

/// Layer; what is left out besides, because it forbids the same before this layer is asked; moment; act; what becomes of it
/// with the layer, and without.
type Row = (&'static str, &'static [&'static str], &'static str, &'static str, &'static str, &'static str);
const LAYERS: &[Row] = &[
    ("first-filter", &[], "admission", "socket-unix", SIGSYS, "done"),
    ("first-filter", &[], "admission", "open-file", SIGSYS, "ENOENT"),
    ("carrying-filter", &[], "carrying", "new-epoll-set", SIGSYS, "done"),
    ("limits", &[], "admission", "map-much", "ENOMEM", "done"),
    ("limits", &["first-filter"], "admission", "fork", "EAGAIN", "done"),
    ("limits", &[], "granted", "gather-into-memory", "signal SIGXFSZ", "done"),
    ("landlock", &["first-filter"], "admission", "open-root", "EACCES", "done"),
    ("landlock", &["first-filter"], "admission", "listen-on-tcp", "EACCES", "done"),
    ("landlock", &["first-filter", "carrying-filter"], "carrying", "open-queue-of-all", "EACCES", "done"),
    ("empty-root", &["first-filter", "landlock"], "admission", "open-file", "ENOENT", "done"),
    ("own-user", &["first-filter", "landlock"], "admission", "kill-guard", "EPERM", "done"),
    ("own-user", &["first-filter", "landlock"], "admission", "take-groups", "EPERM", "done"),
    ("own-user", &["first-filter", "landlock"], "admission", "open-queue", "EACCES", "done"),
    // The kernel makes a process that changes its user undumpable, but for where `fs.suid_dumpable` says otherwise.
    (
        "not-dumpable",
        &["first-filter", "own-user"],
        "admission",
        "find-itself-dumpable",
        "not dumpable",
        "done",
    ),
];

/// Layers that change nothing where the guard has given up new privileges for itself and all that it starts (`keep`,
/// src/sys/capabilities.rs): a set-user-ID program that a worker starts without them gets nothing, which is 76.
const SECOND_LOCKS: &[(&str, &[&str])] = &[
    ("no-new-privs", EXEC),
    ("bounding-set", &["first-filter", "landlock", "empty-root", "limits", "no-new-privs"]),
];
/// So that a program can be started at all.
const EXEC: &[&str] = &["first-filter", "landlock", "empty-root", "limits"];
