//! The admin socket: one line asks, one JSON document answers.

use std::collections::HashSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use tunguard::VERSION;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::{Reply, Report};
use tunguard::net;
use tunguard::sys::clock;
use tunguard::sys::poller::Interest;
use tunguard::time::Time;

use crate::accounts::GuardDrop;
use crate::clients::{Phase, Session, Worker};
use crate::leases::Away;
use crate::run::{Guard, Source};

/// The socket and the conversations on it.
pub struct Admin {
    path: PathBuf,
    /// The listening socket.
    pub listener: UnixListener,
    next: u64,
    conversations: Vec<Conversation>,
}

struct Conversation {
    key: u64,
    stream: UnixStream,
    question: Vec<u8>,
    /// Workers whose report is awaited, and how long.
    awaited: HashSet<u64>,
    until: Option<Time>,
    answer: Vec<u8>,
    /// Gives up on a peer that neither asks nor reads.
    deadline: Time,
}

impl Admin {
    /// Listens on `path`. A socket that a dead guard left is replaced.
    ///
    /// Errors: [`Exit::DeviceInUse`] where another guard answers on it.
    pub fn listen(path: &Path) -> Outcome<Admin> {
        let failed = |e| Failure::system(format!("listen on {}", path.display()), e);
        if UnixStream::connect(path).is_ok() {
            let text =
                format!("another server answers on {}: stop it, or set another `socket`", path.display());
            return Err(Failure::new(Exit::DeviceInUse, text));
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        if fs::symlink_metadata(path).is_ok_and(|m| !m.file_type().is_socket()) {
            let text = format!("socket = {:?} is there and no socket: remove it, or set another", path);
            return Err(Failure::usage(text));
        }
        match fs::remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Admin { path: path.to_owned(), listener, next: 0, conversations: Vec::new() })
    }

    /// When the next conversation has to go on.
    pub fn deadline(&self) -> Option<Time> {
        self.conversations.iter().map(|c| c.until.unwrap_or(c.deadline).min(c.deadline)).min()
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Guard {
    /// Takes in somebody who wants to ask.
    pub fn accept_admin(&mut self) {
        while let Ok((stream, _)) = self.admin.listener.accept() {
            if self.admin.conversations.len() >= MAX_CONVERSATIONS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let key = self.admin.next;
            self.admin.next += 1;
            if self.poller.add(stream.as_fd(), Source::Conversation(key).token(), Interest::Read).is_err() {
                continue;
            }
            self.admin.conversations.push(Conversation {
                key,
                stream,
                question: Vec::new(),
                awaited: HashSet::new(),
                until: None,
                answer: Vec::new(),
                deadline: clock::now() + PATIENCE,
            });
        }
    }

    /// A conversation's socket is ready.
    pub fn converse(&mut self, key: u64) {
        let Some(at) = self.admin.conversations.iter().position(|c| c.key == key) else { return };
        let conversation = &mut self.admin.conversations[at];
        if !conversation.answer.is_empty() {
            return self.say(at);
        }
        let mut bytes = [0; MAX_QUESTION];
        match conversation.stream.read(&mut bytes) {
            // It has asked, and sends nothing more: the answer is on its way.
            Ok(0) if conversation.until.is_some() => {
                let token = Source::Conversation(key).token();
                let _ = self.poller.modify(conversation.stream.as_fd(), token, Interest::Nothing);
                return;
            }
            Ok(0) => return self.hang_up(at),
            Ok(n) => conversation.question.extend(&bytes[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return,
            Err(_) => return self.hang_up(at),
        }
        match conversation.question.iter().position(|b| *b == b'\n') {
            Some(end) if &conversation.question[..end] == b"status" && conversation.until.is_none() => {
                self.ask_workers(at);
            }
            None if conversation.question.len() < MAX_QUESTION => {}
            _ => {
                conversation.answer = b"{\"error\": \"unknown question: ask for status\"}\n".to_vec();
                self.say(at);
            }
        }
    }

    /// A worker reported; whoever waited for it may get the answer now.
    pub fn take_report(&mut self, key: u64, report: Report) {
        if let Some(session) = self.workers.get_mut(key).and_then(|w| w.session.as_mut()) {
            session.report = report;
        }
        for conversation in &mut self.admin.conversations {
            conversation.awaited.remove(&key);
        }
        self.continue_conversations(clock::now());
    }

    /// Answers what waits for nobody any more, and gives up on the deaf and dumb.
    pub fn continue_conversations(&mut self, now: Time) {
        let mut at = 0;
        while at < self.admin.conversations.len() {
            let conversation = &mut self.admin.conversations[at];
            let before = conversation.key;
            if conversation.until.is_some_and(|until| conversation.awaited.is_empty() || now >= until) {
                conversation.until = None;
                let status = self.status(now);
                self.admin.conversations[at].answer = status;
                self.say(at);
            } else if now >= conversation.deadline {
                self.hang_up(at);
            }
            if self.admin.conversations.get(at).is_some_and(|c| c.key == before) {
                at += 1;
            }
        }
    }

    fn ask_workers(&mut self, at: usize) {
        let mut awaited = HashSet::new();
        let reports = |worker: &Worker| matches!(worker.phase, Phase::Established | Phase::Draining);
        for (key, worker) in self.workers.iter_mut().filter(|(_, worker)| reports(worker)) {
            // One that doesn't answer isn't asked again and again.
            if worker.asked < MAX_ASKED && matches!(worker.channel.send(&Reply::Query, &[]), Ok(true)) {
                worker.asked += 1;
                awaited.insert(key);
            }
        }
        let now = clock::now();
        let conversation = &mut self.admin.conversations[at];
        conversation.awaited = awaited;
        // A worker that is stopped or busy doesn't hold the answer up: its last report is shown.
        conversation.until = Some(now + REPORT_WAIT);
        self.continue_conversations(now);
    }

    fn say(&mut self, at: usize) {
        let conversation = &mut self.admin.conversations[at];
        loop {
            match conversation.stream.write(&conversation.answer) {
                Ok(n) => {
                    conversation.answer.drain(..n);
                    if conversation.answer.is_empty() {
                        return self.hang_up(at);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return self.hang_up(at),
            }
        }
        let token = Source::Conversation(conversation.key).token();
        let _ = self.poller.modify(conversation.stream.as_fd(), token, Interest::Write);
    }

    fn hang_up(&mut self, at: usize) {
        let conversation = self.admin.conversations.swap_remove(at);
        let _ = self.poller.remove(conversation.stream.as_fd());
    }

    fn status(&self, now: Time) -> Vec<u8> {
        let mut sessions: Vec<(&Session, &Worker)> =
            self.workers.iter().filter_map(|(_, w)| w.session.as_ref().map(|s| (s, w))).collect();
        sessions.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name).then(a.since.cmp(&b.since)));
        let mut drops: serde_json::Map<String, Value> =
            GuardDrop::ALL.iter().map(|r| (r.name().to_owned(), self.accounts.dropped(*r).into())).collect();
        // Not dropped by us, but for us: too late to read them.
        if let Some(packets) = net::device_full(self.config.device.as_str()) {
            drops.insert("device_full".to_owned(), packets.into());
        }
        let status = json!({
            "version": VERSION,
            "device": self.config.device.as_str(),
            "listen": self.listen.to_string(),
            "pid": std::process::id(),
            "uptime_s": now.since(self.started).as_secs(),
            "queue": {
                "messages": self.queues.downlink.messages,
                "bytes": self.queues.downlink.bytes,
                "private": self.queues.private,
            },
            "handshakes": self.workers.handshakes(),
            "workers": self.workers.len(),
            "device_packets": self.accounts.read_packets,
            "device_bytes": self.accounts.read_bytes,
            "queued_packets": self.accounts.queued_packets,
            "guard_drops": drops,
            "unreachables": self.accounts.told,
            "away": self.leases.away().map(|away| away_status(&away)).collect::<Vec<_>>(),
            "sessions": sessions.iter().map(|(s, w)| session_status(s, w, now)).collect::<Vec<_>>(),
        });
        let mut text = serde_json::to_vec_pretty(&status).unwrap_or_default();
        text.push(b'\n');
        text
    }
}

fn away_status(away: &Away<'_>) -> Value {
    json!({
        "name": away.name,
        "addresses": away.addresses.iter().map(|a| a.to_string()).collect::<Vec<_>>(),
        "since_s": away.since,
        "packets": away.missed,
    })
}

fn session_status(session: &Session, worker: &Worker, now: Time) -> Value {
    let report = &session.report;
    let depth = session.outbox.as_ref().and_then(|o| o.queue().attributes().ok()).map_or(0, |(_, n)| n);
    let drops: serde_json::Map<String, Value> =
        report.drops.nonzero().map(|(r, n)| (r.name().to_owned(), n.into())).collect();
    json!({
        "session": session.id.to_string(),
        "slot": session.id.slot(),
        "name": session.name,
        "phase": worker.phase,
        "addresses": session.addresses.iter().map(|a| a.addr().to_string()).collect::<Vec<_>>(),
        "subnets": session.subnets.iter().map(|n| n.to_string()).collect::<Vec<_>>(),
        "peer": session.peer.map(|p| p.to_string()),
        "tcp_peer": worker.tcp_peer.to_string(),
        "control": if session.control { "up" } else { "lost" },
        "suite": report.suite.map(|s| s.name()),
        "epoch": report.epoch,
        "age_s": now.since(session.since).as_secs(),
        "silent_ms": report.silent_ms,
        "rtt_us": report.rtt_us,
        "path_mtu": report.path_mtu,
        "queued_packets": session.queued_packets,
        "read_packets": report.traffic.read_packets,
        "cut_packets": report.traffic.cut_packets,
        "sent_packets": report.traffic.sent_packets,
        "sent_bytes": report.traffic.sent_bytes,
        "sent_in_band": report.traffic.sent_in_band,
        "received_packets": report.traffic.received_packets,
        "received_bytes": report.traffic.received_bytes,
        "received_in_band": report.traffic.received_in_band,
        "received_early": report.traffic.received_early,
        "queue_depth": depth,
        "backlog_bytes": session.outbox.as_ref().map_or(0, |o| o.backlog()),
        "pid": worker.pid,
        "uid": worker.uid,
        "drops": drops,
    })
}

const MAX_CONVERSATIONS: usize = 16;
const MAX_QUESTION: usize = 256;
/// Reports a worker may owe us.
const MAX_ASKED: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(5);
const REPORT_WAIT: Duration = Duration::from_millis(500);
