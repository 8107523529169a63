//! `tunguard status`: asks a running server by its admin socket.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use crate::escape::Escaped;
use crate::exit::{Failure, Outcome};

/// Show a running server's sessions
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct StatusCommand {
    /// Print the server's answer as it is, for scripts
    #[arg(long)]
    json: bool,
    /// Show it again every second, until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// Admin socket of the server; needed where there are several
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl StatusCommand {
    /// Prints the status, once or again and again.
    pub fn run(self) -> Outcome<()> {
        let socket = match &self.socket {
            Some(socket) => socket.clone(),
            None => only_socket(Path::new(SOCKETS))?,
        };
        loop {
            let answer = ask(&socket)?;
            let text = if self.json { answer } else { render(&parse(&socket, &answer)?) };
            let clear = if self.watch && !self.json { CLEAR } else { "" };
            let mut out = std::io::stdout().lock();
            let printed = writeln!(out, "{clear}{}", text.trim_end()).and_then(|()| out.flush());
            match printed {
                Ok(()) => {}
                // `tunguard status | head` is no failure.
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                Err(e) => return Err(Failure::system("writing to standard output", e)),
            }
            if !self.watch {
                return Ok(());
            }
            std::thread::sleep(WATCH_EVERY);
        }
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
    queue: Queue,
    handshakes: u64,
    guard_drops: BTreeMap<String, u64>,
    sessions: Vec<Session>,
    away: Vec<Away>,
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
struct Queue {
    messages: u64,
    bytes: u64,
    private: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Session {
    name: String,
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
    drops: BTreeMap<String, u64>,
}

fn only_socket(directory: &Path) -> Outcome<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut sockets: Vec<PathBuf> =
        entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "sock")).collect();
    sockets.sort();
    match &sockets[..] {
        [one] => Ok(one.clone()),
        [] => {
            let text = format!(
                "no server's socket in {}: is one running here? (--socket PATH)",
                directory.display()
            );
            Err(Failure::new(crate::exit::Exit::System, text))
        }
        several => {
            let list: Vec<String> = several.iter().map(|s| s.display().to_string()).collect();
            Err(Failure::usage(format!("several servers run here: give --socket one of {}", list.join(", "))))
        }
    }
}

fn ask(socket: &Path) -> Outcome<String> {
    let failed = |e: std::io::Error| {
        let hint = match e.kind() {
            std::io::ErrorKind::PermissionDenied => " (root's to ask)",
            std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound => {
                " (is the server running?)"
            }
            _ => "",
        };
        Failure::system(format!("ask the server by {}", socket.display()), format!("{e}{hint}"))
    };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(failed)?;
    stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(failed)?;
    stream.write_all(b"status\n").map_err(failed)?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES).read_to_string(&mut answer).map_err(failed)?;
    Ok(answer)
}

fn parse(socket: &Path, answer: &str) -> Outcome<Status> {
    serde_json::from_str(answer).map_err(|e| {
        let text = format!("{}: the answer is no status: {e}", socket.display());
        Failure::new(crate::exit::Exit::Malformed, text)
    })
}

fn render(status: &Status) -> String {
    let queue = &status.queue;
    let mut text = format!(
        "tunguard {} on {}, listening on {}, up {}\n{}, {} handshake{} under way; queues of {} x {} bytes{}\n",
        harmless(&status.version),
        harmless(&status.device),
        harmless(&status.listen),
        age(status.uptime_s),
        plural(status.sessions.len() as u64, "session"),
        status.handshakes,
        if status.handshakes == 1 { "" } else { "s" },
        queue.messages,
        queue.bytes,
        if queue.private { "" } else { " (shared IPC namespace)" },
    );
    if let Some(drops) = counts(&status.guard_drops) {
        text.push_str(&format!("dropped by the guard: {drops}\n"));
    }
    if !status.sessions.is_empty() {
        text.push('\n');
        text.push_str(&sessions(&status.sessions));
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

fn away(away: &[Away]) -> String {
    let mut rows = vec![["AWAY", "ADDRESSES", "LEFT", "PACKETS FOR IT"].map(str::to_owned)];
    rows.extend(away.iter().map(|client| {
        let addresses: Vec<String> = client.addresses.iter().map(|a| harmless(a)).collect();
        let left = format!("{} ago", age(client.since_s));
        [harmless(&client.name), addresses.join(" "), left, client.packets.to_string()]
    }));
    table(&rows)
}

fn row(session: &Session) -> [String; 11] {
    let addresses: Vec<String> = session.addresses.iter().map(|a| harmless(a)).collect();
    let peer = session.peer.as_ref().or(session.tcp_peer.as_ref());
    let state = match session.control.as_str() {
        "lost" => format!("{}, control lost", session.phase),
        _ => session.phase.clone(),
    };
    [
        harmless(&session.name),
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

fn table<const N: usize>(rows: &[[String; N]]) -> String {
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

fn counts(drops: &BTreeMap<String, u64>) -> Option<String> {
    let list: Vec<String> = drops
        .iter()
        .filter(|(_, packets)| **packets > 0)
        .map(|(reason, packets)| format!("{} {packets}", harmless(reason)))
        .collect();
    (!list.is_empty()).then(|| list.join(", "))
}

fn plural(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

fn age(seconds: u64) -> String {
    let (d, h, m, s) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, m) => format!("{m}m{s:02}s"),
        (0, h, m) => format!("{h}h{m:02}m"),
        (d, h, _) => format!("{d}d{h:02}h"),
    }
}

fn bytes(number: u64) -> String {
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
fn harmless(text: &str) -> String {
    Escaped(text).to_string()
}

const SOCKETS: &str = "/run/tunguard";
/// Cursor home, and everything below it gone.
const CLEAR: &str = "\x1b[H\x1b[J";
const WATCH_EVERY: Duration = Duration::from_secs(1);
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Some 1 kB a session.
const ANSWER_BYTES: u64 = 64 << 20;

const EXAMPLES: &str = "\
Examples:
  tunguard status
  tunguard status --watch
  tunguard status --json --socket /run/tunguard/tg0.sock";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_becomes_a_table_whatever_else_is_in_it() {
        let answer = r#"{
            "version": "0.1.0", "device": "tg0", "listen": "[::]:55555", "uptime_s": 3725, "future": [1],
            "queue": {"messages": 10, "bytes": 8192, "private": true}, "handshakes": 1, "totals": {"a": 1},
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
             1 session, 1 handshake under way; queues of 10 x 8192 bytes\n\
             dropped by the guard: no_route 3\n\
             \n\
             NAME             ADDRESSES         PEER            STATE                      AGE    HEARD   RTT     SENT    RECEIVED  SUITE        DROPS\n\
             alice\\u{1b}[31m  10.9.0.2 fd09::2  192.0.2.7:4500  established, control lost  1m01s  0s ago  0.4 ms  1.5 MB  999 B     aes-256-gcm  bad_tag 2\n\
             \n\
             AWAY  ADDRESSES         LEFT       PACKETS FOR IT\n\
             bob   10.9.0.3 fd09::3  3m00s ago  12\n"
        );
    }

    #[test]
    fn an_empty_answer_is_a_status_and_garbage_is_none() {
        assert!(render(&parse(Path::new("x"), "{}").expect("a status")).contains("0 sessions"));
        assert!(parse(Path::new("x"), "").is_err());
        assert!(parse(Path::new("x"), "7").is_err());
    }

    #[test]
    fn the_socket_is_guessed_only_where_there_is_one() {
        let directory = tempfile::tempdir().expect("a directory");
        assert!(only_socket(&directory.path().join("missing")).is_err());
        assert!(only_socket(directory.path()).is_err());
        fs::write(directory.path().join("tg0.sock"), "").expect("writes");
        fs::write(directory.path().join("other.json"), "").expect("writes");
        assert_eq!(only_socket(directory.path()), Ok(directory.path().join("tg0.sock")));
        fs::write(directory.path().join("tg1.sock"), "").expect("writes");
        assert!(only_socket(directory.path()).expect_err("two").text.contains("tg1.sock"));
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
