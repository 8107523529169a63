//! `tunguard status`: asks servers and clients that run here by their admin sockets.

use std::collections::BTreeMap;
use std::fs;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use nix::poll::{PollFd, PollFlags, poll};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::client_status;
use crate::escape::Escaped;
use crate::exit::{Failure, Outcome};
use crate::rate::Rate;
use crate::sandbox::Means;

/// `tunguard status`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct StatusCommand {
    /// Print the answer as it is, for scripts; --socket is needed where there are several
    #[arg(long)]
    json: bool,
    /// Show it again every second, and when a client moves, until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// Admin socket: DEVICE.sock of a server, client-DEVICE.sock of a client, unless it is configured
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl StatusCommand {
    /// Prints the status, once or again and again.
    pub fn run(self) -> Outcome<()> {
        // First, so that nothing that happens meanwhile is missed.
        let mut news = match self.watch {
            true => Some(News::of(&self.sockets()?)),
            false => None,
        };
        loop {
            let text = self.text()?;
            let mut out = std::io::stdout().lock();
            // A file or a pipe gets one after the other.
            let (before, after) = match self.watch && !self.json {
                true if out.is_terminal() => (CLEAR, ""),
                true => ("", "\n"),
                false => ("", ""),
            };
            let printed = writeln!(out, "{before}{}{after}", text.trim_end()).and_then(|()| out.flush());
            match printed {
                Ok(()) => {}
                // `tunguard status | head` is no failure.
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                Err(e) => return Err(Failure::system("writing to standard output", e)),
            }
            match &mut news {
                Some(news) => news.wait(),
                None => return Ok(()),
            }
        }
    }

    fn sockets(&self) -> Outcome<Vec<PathBuf>> {
        match &self.socket {
            Some(socket) => Ok(vec![socket.clone()]),
            None => usual_sockets(),
        }
    }

    fn text(&self) -> Outcome<String> {
        let sockets = self.sockets()?;
        match &sockets[..] {
            [socket] if self.json => ask(socket),
            several if self.json => {
                let list: Vec<String> = several.iter().map(|s| s.display().to_string()).collect();
                let text = format!("several of them run here: give --socket one of {}", list.join(", "));
                Err(Failure::usage(text))
            }
            some => {
                let shown = some.iter().map(|socket| show(socket, &ask(socket)?, self.watch));
                Ok(shown.collect::<Outcome<Vec<String>>>()?.join("\n"))
            }
        }
    }
}

/// What happens at those that run here.
struct News(Vec<UnixStream>);

impl News {
    fn of(sockets: &[PathBuf]) -> News {
        let watch = |socket: &PathBuf| {
            let mut stream = UnixStream::connect(socket).ok()?;
            stream.write_all(b"watch\n").ok()?;
            Some(stream)
        };
        News(sockets.iter().filter_map(watch).collect())
    }

    /// Waits until something happens, but not for long.
    fn wait(&mut self) {
        let mut fds: Vec<PollFd<'_>> =
            self.0.iter().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut fds, WATCH_EVERY) {
            Ok(1..) => {}
            _ => return,
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let mut ready = ready.into_iter();
        // One that takes no more of us, or is gone, says so by its end.
        let goes_on = |mut stream: &UnixStream| stream.read(&mut [0; 4096]).is_ok_and(|n| n > 0);
        self.0.retain(|stream| !ready.next().unwrap_or(false) || goes_on(stream));
        // A move is seldom alone.
        std::thread::sleep(TOGETHER);
    }
}

/// What the guard answers; what it may say beyond this is for others.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    version: String,
    device: String,
    listen: String,
    uptime_s: u64,
    sandbox: Option<Means>,
    queue: Queue,
    handshakes: u64,
    waiting: u64,
    refused: BTreeMap<String, u64>,
    failed: BTreeMap<String, u64>,
    penalised: Vec<Penalty>,
    guard_drops: BTreeMap<String, u64>,
    events: Vec<Event>,
    sessions: Vec<Session>,
    away: Vec<Away>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Penalty {
    source: String,
    for_s: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Away {
    name: String,
    addresses: Vec<String>,
    since_s: u64,
    packets: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Event {
    time_ms: u64,
    name: String,
    from: Option<String>,
    to: String,
    after_ms: Option<u64>,
    inside: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Queue {
    messages: u64,
    bytes: u64,
    private: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Session {
    name: String,
    seat: u64,
    phase: String,
    addresses: Vec<String>,
    peer: Option<String>,
    tcp_peer: Option<String>,
    suite: Option<String>,
    age_s: u64,
    silent_ms: u64,
    rtt_us: Option<u64>,
    sent_bytes: u64,
    received_bytes: u64,
    control: String,
    rate_down: Option<u64>,
    rate_up: Option<u64>,
    guard_drops: BTreeMap<String, u64>,
    drops: BTreeMap<String, u64>,
}

impl Session {
    /// As the server names its lease: further sessions of a client are told apart by their seats.
    fn shown_name(&self) -> String {
        let name = harmless(&self.name);
        if self.seat > 1 { format!("{name}/{}", self.seat) } else { name }
    }
}

/// The sockets where servers and clients of this host listen unless they are configured otherwise.
pub(super) fn usual_sockets() -> Outcome<Vec<PathBuf>> {
    sockets(Path::new(SOCKETS))
}

/// The sockets in `directory`. Where there are several, those that nobody listens on any more don't count.
fn sockets(directory: &Path) -> Outcome<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut sockets: Vec<PathBuf> =
        entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "sock")).collect();
    sockets.sort();
    if sockets.is_empty() {
        let text = format!(
            "no socket of a server or client in {}: does one run here? (--socket PATH)",
            directory.display()
        );
        return Err(Failure::new(crate::exit::Exit::System, text));
    }
    let is_dead = |socket: &PathBuf| {
        UnixStream::connect(socket).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
    };
    let alive: Vec<PathBuf> = sockets.iter().filter(|socket| !is_dead(socket)).cloned().collect();
    // With none alive the first one's error says how it is.
    Ok(if alive.is_empty() { sockets.into_iter().take(1).collect() } else { alive })
}

/// The answer of whoever it is, for people.
fn show(socket: &Path, answer: &str, events: bool) -> Outcome<String> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Role {
        role: String,
    }
    let Role { role } = parse(socket, answer)?;
    match &role[..] {
        "client" => Ok(client_status::render(&parse(socket, answer)?)),
        _ => {
            let status: Status = parse(socket, answer)?;
            Ok(render(&status) + &if events { render_events(&status.events) } else { String::new() })
        }
    }
}

fn ask(socket: &Path) -> Outcome<String> {
    ask_for("status", socket, ANSWER_WITHIN)
}

/// What whoever listens on `socket` answers to one line.
pub(super) fn ask_for(question: &str, socket: &Path, within: Duration) -> Outcome<String> {
    let failed = |e: std::io::Error| {
        let hint = match e.kind() {
            std::io::ErrorKind::PermissionDenied => " (root's to ask)",
            std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound => " (is it running?)",
            _ => "",
        };
        Failure::system(format!("ask by {}", socket.display()), format!("{e}{hint}"))
    };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(within)).map_err(failed)?;
    stream.set_write_timeout(Some(within)).map_err(failed)?;
    stream.write_all(format!("{question}\n").as_bytes()).map_err(failed)?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES).read_to_string(&mut answer).map_err(failed)?;
    Ok(answer)
}

fn parse<T: DeserializeOwned>(socket: &Path, answer: &str) -> Outcome<T> {
    serde_json::from_str(answer).map_err(|e| {
        let text = format!("{}: the answer is no status: {e}", socket.display());
        Failure::new(crate::exit::Exit::Malformed, text)
    })
}

fn render(status: &Status) -> String {
    let queue = &status.queue;
    let mut text = format!(
        "tunguard {} on {}, listening on {}, up {}\n{}, {} handshake{} under way{}; queues of {} x {} bytes{}\n",
        harmless(&status.version),
        harmless(&status.device),
        harmless(&status.listen),
        age(status.uptime_s),
        plural(status.sessions.len() as u64, "session"),
        status.handshakes,
        if status.handshakes == 1 { "" } else { "s" },
        if status.waiting > 0 { format!(" and {} waiting", status.waiting) } else { String::new() },
        queue.messages,
        queue.bytes,
        if queue.private { "" } else { " (shared IPC namespace)" },
    );
    if let Some(sandbox) = status.sandbox {
        text.push_str(&format!("workers are locked in by {sandbox}\n"));
    }
    if let Some(drops) = counts(&status.guard_drops) {
        text.push_str(&format!("dropped by the guard: {drops}\n"));
    }
    if let Some(failed) = counts(&status.failed) {
        text.push_str(&format!("handshakes that failed: {failed}\n"));
    }
    if let Some(refused) = counts(&status.refused) {
        text.push_str(&format!("connections refused: {refused}\n"));
    }
    if !status.penalised.is_empty() {
        let shown = |p: &Penalty| format!("{} for {}", harmless(&p.source), age(p.for_s));
        let list: Vec<String> = status.penalised.iter().map(shown).collect();
        text.push_str(&format!("refused for a while: {}\n", list.join(", ")));
    }
    if !status.sessions.is_empty() {
        text.push('\n');
        text.push_str(&sessions(&status.sessions));
    }
    let limited: Vec<&Session> =
        status.sessions.iter().filter(|s| s.rate_down.or(s.rate_up).is_some()).collect();
    if !limited.is_empty() {
        text.push('\n');
        text.push_str(&limits(&limited));
    }
    if !status.away.is_empty() {
        text.push('\n');
        text.push_str(&away(&status.away));
    }
    text
}

fn sessions(sessions: &[Session]) -> String {
    let mut rows = vec![
        ["NAME", "ADDRESSES", "PEER", "STATE", "AGE", "HEARD", "RTT", "SENT", "RECEIVED", "SUITE", "DROPS"]
            .map(str::to_owned),
    ];
    rows.extend(sessions.iter().map(row));
    table(&rows)
}

/// How much these may send and be sent, and packets that were too many.
fn limits(sessions: &[&Session]) -> String {
    let mut rows = vec![["LIMITED", "DOWN", "TOO MANY", "UP", "TOO MANY"].map(str::to_owned)];
    rows.extend(sessions.iter().map(|session| {
        let of = |drops: &BTreeMap<String, u64>, reason: &str| drops.get(reason).copied().unwrap_or(0);
        let rate = |bits: Option<u64>| match bits {
            Some(bits) => Rate::from_bits(bits).map_or("-".to_owned(), |rate| rate.to_string()),
            None => "off".to_owned(),
        };
        let down = of(&session.guard_drops, "rate_down");
        let up = of(&session.guard_drops, "rate_up").saturating_add(of(&session.drops, "rate_up"));
        let (rate_down, rate_up) = (rate(session.rate_down), rate(session.rate_up));
        [session.shown_name(), rate_down, down.to_string(), rate_up, up.to_string()]
    }));
    table(&rows)
}

fn away(away: &[Away]) -> String {
    let mut rows = vec![["AWAY", "ADDRESSES", "LEFT", "PACKETS FOR IT"].map(str::to_owned)];
    rows.extend(away.iter().map(|client| {
        let addresses: Vec<String> = client.addresses.iter().map(|a| harmless(a)).collect();
        let left = format!("{} ago", age(client.since_s));
        [harmless(&client.name), addresses.join(" "), left, client.packets.to_string()]
    }));
    table(&rows)
}

/// The latest events, a line each.
fn render_events(events: &[Event]) -> String {
    let lines: String = events.iter().rev().take(EVENTS_SHOWN).rev().map(line).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// The time of day as in the log: in UTC.
fn line(event: &Event) -> String {
    let seconds = event.time_ms / 1_000 % 86_400;
    let (hours, minutes, seconds) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    let (name, to) = (harmless(&event.name), harmless(&event.to));
    let what = match &event.from {
        None => format!("is heard in a new session at {to}"),
        Some(from) => format!("moved {} -> {to}", harmless(from)),
    };
    let inside = if event.inside { " inside the control connection" } else { "" };
    let after = event.after_ms.map(|ms| format!(", {ms} ms")).unwrap_or_default();
    format!("{hours:02}:{minutes:02}:{seconds:02}Z {name} {what}{inside}{after}\n")
}

fn row(session: &Session) -> [String; 11] {
    let addresses: Vec<String> = session.addresses.iter().map(|a| harmless(a)).collect();
    let peer = session.peer.as_ref().or(session.tcp_peer.as_ref());
    let state = match session.control.as_str() {
        "lost" => format!("{}, control lost", session.phase),
        _ => session.phase.clone(),
    };
    [
        session.shown_name(),
        addresses.join(" "),
        peer.map_or("-".to_owned(), |p| harmless(p)),
        harmless(&state),
        age(session.age_s),
        format!("{} ago", age(session.silent_ms / 1000)),
        session.rtt_us.map_or("-".to_owned(), |us| format!("{:.1} ms", us as f64 / 1e3)),
        bytes(session.sent_bytes),
        bytes(session.received_bytes),
        session.suite.as_deref().map_or("-".to_owned(), harmless),
        counts(&session.drops).unwrap_or_else(|| "-".to_owned()),
    ]
}

pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

pub(super) fn counts(drops: &BTreeMap<String, u64>) -> Option<String> {
    let list: Vec<String> = drops
        .iter()
        .filter(|(_, packets)| **packets > 0)
        .map(|(reason, packets)| format!("{} {packets}", harmless(reason)))
        .collect();
    (!list.is_empty()).then(|| list.join(", "))
}

pub(super) fn plural(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

pub(super) fn age(seconds: u64) -> String {
    let (d, h, m, s) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, m) => format!("{m}m{s:02}s"),
        (0, h, m) => format!("{h}h{m:02}m"),
        (d, h, _) => format!("{d}d{h:02}h"),
    }
}

pub(super) fn bytes(number: u64) -> String {
    let mut value = number as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{number} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// Names come out of certificates.
pub(super) fn harmless(text: &str) -> String {
    Escaped(text).to_string()
}

const SOCKETS: &str = "/run/tunguard";
/// Cursor home, and everything below it gone.
const CLEAR: &str = "\x1b[H\x1b[J";
const EVENTS_SHOWN: usize = 10;
/// After the first news.
const TOGETHER: Duration = Duration::from_millis(20);
/// Milliseconds.
const WATCH_EVERY: u16 = 1_000;
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Some 1 kB a session.
const ANSWER_BYTES: u64 = 64 << 20;

const EXAMPLES: &str = "\
Examples:
  tunguard status
  tunguard status --watch
  tunguard status --json --socket /run/tunguard/tg0.sock
  tunguard status --socket /run/tunguard/client-tg0.sock";

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_status_becomes_a_table_whatever_else_is_in_it() {
        let answer = r#"{
            "version": "0.1.0", "device": "tg0", "listen": "[::]:55555", "uptime_s": 3725, "future": [1],
            "queue": {"messages": 10, "bytes": 8192, "private": true}, "handshakes": 1, "sandbox": {"seccomp": true, "landlock_abi": 7}, "totals": {"a": 1},
            "waiting": 2, "failed": {"garbage": 7, "left": 0}, "refused": {"early": 3},
            "penalised": [{"source": "2001:db8::/64\u001b", "for_s": 61}],
            "guard_drops": {"no_route": 3, "nothing": 0},
            "sessions": [{"session": "x", "slot": 1, "name": "alice\u001b[31m", "phase": "established",
                "addresses": ["10.9.0.2", "fd09::2"], "subnets": [], "peer": "192.0.2.7:4500",
                "tcp_peer": "192.0.2.7:4000", "suite": "aes-256-gcm", "epoch": 0, "age_s": 61, "silent_ms": 900,
                "rtt_us": 412, "sent_packets": 1, "sent_bytes": 1500000, "received_packets": 1,
                "received_bytes": 999, "queue_depth": 0, "backlog_bytes": 0, "pid": 1, "uid": 2,
                "control": "lost", "drops": {"bad_tag": 2}}],
            "away": [{"name": "bob", "addresses": ["10.9.0.3", "fd09::3"], "since_s": 180, "packets": 12}]
        }"#;
        let text = render(&parse(Path::new("x"), answer).expect("a status"));
        assert_eq!(
            text,
            "tunguard 0.1.0 on tg0, listening on [::]:55555, up 1h02m\n\
             1 session, 1 handshake under way and 2 waiting; queues of 10 x 8192 bytes\n\
             workers are locked in by seccomp, Landlock ABI 7\n\
             dropped by the guard: no_route 3\n\
             handshakes that failed: garbage 7\n\
             connections refused: early 3\n\
             refused for a while: 2001:db8::/64\\u{1b} for 1m01s\n\
             \n\
             NAME             ADDRESSES         PEER            STATE                      AGE    HEARD   RTT     SENT    RECEIVED  SUITE        DROPS\n\
             alice\\u{1b}[31m  10.9.0.2 fd09::2  192.0.2.7:4500  established, control lost  1m01s  0s ago  0.4 ms  1.5 MB  999 B     aes-256-gcm  bad_tag 2\n\
             \n\
             AWAY  ADDRESSES         LEFT       PACKETS FOR IT\n\
             bob   10.9.0.3 fd09::3  3m00s ago  12\n"
        );
    }

    #[test]
    fn limits_and_seats_are_shown() {
        let answer = r#"{"sessions": [
            {"name": "ann", "seat": 1, "phase": "established"},
            {"name": "ann", "seat": 2, "rate_down": 20000000, "guard_drops": {"rate_down": 7, "rate_up": 1},
                "drops": {"rate_up": 2}, "rate_up": 1500000},
            {"name": "bob", "seat": 1, "rate_up": 64000}
        ]}"#;
        let text = render(&parse(Path::new("x"), answer).expect("a status"));
        assert!(text.contains("\nann    ") && text.contains("\nann/2  "), "{text}");
        let limits = "\n\nLIMITED  DOWN     TOO MANY  UP         TOO MANY\n\
                      ann/2    20Mbit/s  7         1500Kbit/s  3\n\
                      bob      off       0         64Kbit/s    0\n";
        let tidy = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(tidy(&text).ends_with(&tidy(limits)), "{text}");
    }

    #[test]
    fn events_become_lines() {
        let answer = r#"{"events": [
            {"time_ms": 43384123, "event": "moved", "name": "laptop", "session": "x", "from": "198.18.1.2:4000",
                "to": "198.18.2.2:5000", "after_ms": 5, "inside": false},
            {"time_ms": 86400000, "event": "heard", "name": "a\u001b", "to": "192.0.2.1:1"},
            {"time_ms": 86399000, "from": "192.0.2.1:1", "to": "192.0.2.1:2", "name": "b", "inside": true}
        ]}"#;
        let status: Status = parse(Path::new("x"), answer).expect("a status");
        assert_eq!(
            render_events(&status.events),
            "\n12:03:04Z laptop moved 198.18.1.2:4000 -> 198.18.2.2:5000, 5 ms\n\
             00:00:00Z a\\u{1b} is heard in a new session at 192.0.2.1:1\n\
             23:59:59Z b moved 192.0.2.1:1 -> 192.0.2.1:2 inside the control connection\n"
        );
        assert_eq!(render_events(&[]), "");
        assert!(!render(&status).contains("moved"), "only who watches is shown them");
    }

    #[test]
    fn an_empty_answer_is_a_status_and_garbage_is_none() {
        assert!(render(&parse(Path::new("x"), "{}").expect("a status")).contains("0 sessions"));
        assert!(parse::<Status>(Path::new("x"), "").is_err());
        assert!(parse::<Status>(Path::new("x"), "7").is_err());
    }

    #[test]
    fn dead_sockets_are_passed_over_beside_others() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name| directory.path().join(name);
        assert!(sockets(&path("missing")).is_err());
        assert!(sockets(directory.path()).is_err());
        fs::write(path("other.json"), "").expect("writes");
        assert!(sockets(directory.path()).is_err());
        drop(UnixListener::bind(path("client-tg0.sock")).expect("binds"));
        assert_eq!(sockets(directory.path()), Ok(vec![path("client-tg0.sock")]), "to say that it is dead");
        let _server = UnixListener::bind(path("tg0.sock")).expect("binds");
        assert_eq!(sockets(directory.path()), Ok(vec![path("tg0.sock")]));
        let _client = UnixListener::bind(path("client-tg1.sock")).expect("binds");
        assert_eq!(sockets(directory.path()), Ok(vec![path("client-tg1.sock"), path("tg0.sock")]));
    }

    #[test]
    fn a_clients_answer_is_told_from_a_servers() {
        let shown = |answer| show(Path::new("x"), answer, false).expect("a status");
        assert!(shown(r#"{"role": "client"}"#).contains("client on"));
        assert!(shown("{}").contains("listening on"));
        assert!(show(Path::new("x"), "", false).is_err());
        assert!(show(Path::new("x"), r#"{"role": 7}"#, false).is_err());
    }

    #[test]
    fn numbers_are_readable() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (60, "1m00s"), (3_600, "1h00m"), (90_000, "1d01h")] {
            assert_eq!(age(seconds), text);
        }
        for (number, text) in [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (2_000_000_000_000, "2.0 TB")] {
            assert_eq!(bytes(number), text);
        }
    }
}
