//! What the supervisor answers on its admin socket ([`crate::admin`]): what it knows itself, and what the tunnel process
//! reports.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use super::ipc::{PathReport, Report, SessionReport};
use super::moves::Connection;
use super::starts::Starts;
use crate::VERSION;
use crate::admin::{Admin, Question, document};
use crate::config::client::{ClientConfig, Remote};
use crate::net;
use crate::sandbox::Means;
use crate::sys::poller::{Interest, Poller};
use crate::time::Time;

/// The socket, and what was reported last.
pub struct Desk {
    /// None where it couldn't be made: no reason to be without a tunnel.
    socket: Option<Admin>,
    started: Time,
    /// Reports that the tunnel process owes us.
    asked: u32,
    report: Option<Report>,
}

impl Desk {
    /// Listens, if that is possible.
    pub fn open(config: &ClientConfig, poller: &Poller, now: Time) -> Desk {
        let listening = Admin::listen(&config.socket, "client", |key| FIRST_CONVERSATION + key);
        let socket = listening.and_then(|socket| {
            let added = poller.add(&socket.listener, ADMIN, Interest::Read);
            added.map(|()| socket).map_err(|e| crate::exit::Failure::system("fill the epoll set", e))
        });
        let socket = socket.inspect_err(|failure| log::warn!("{failure}; `tunguard status` can't ask")).ok();
        Desk { socket, started: now, asked: 0, report: None }
    }

    /// Whether an event with this token is for [`Desk::hear`].
    pub fn owns(token: u64) -> bool {
        token >= ADMIN
    }

    /// When [`Desk::due`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.socket.as_ref()?.deadline()
    }

    /// Somebody comes or speaks. A key: he wants the status, and [`Desk::wait_for`] comes next.
    pub fn hear(&mut self, token: u64, poller: &Poller, now: Time) -> Option<u64> {
        let socket = self.socket.as_mut()?;
        if token == ADMIN {
            socket.accept(poller, now);
            return None;
        }
        let key = token - FIRST_CONVERSATION;
        match socket.converse(key, poller)? {
            Question::Status => Some(key),
            Question::Reload => {
                let text = "a client reads its configuration only when it starts";
                socket.answer(key, document(&json!({ "error": text })), poller);
                None
            }
        }
    }

    /// Whether to ask the tunnel process once more: not one that doesn't answer.
    pub fn may_ask(&self) -> bool {
        self.asked < MAX_ASKED
    }

    /// The answer waits for the tunnel process's report, if it was `asked` for one.
    pub fn wait_for(&mut self, key: u64, asked: bool, now: Time) {
        self.asked += u32::from(asked);
        let awaited = if asked { HashSet::from([TUNNEL]) } else { HashSet::new() };
        if let Some(socket) = &mut self.socket {
            socket.wait_for(key, awaited, now);
        }
    }

    /// The tunnel process reported. An error is a violation.
    pub fn take_report(&mut self, report: Report) -> Result<(), String> {
        self.asked = self.asked.checked_sub(1).ok_or("a report that nobody asked for")?;
        self.report = Some(report);
        self.reported();
        Ok(())
    }

    /// The tunnel process is gone, and its session.
    pub fn handle_gone(&mut self) {
        self.asked = 0;
        self.report = None;
        self.reported();
    }

    /// A conversation whose [`Desk::answer`] is due.
    pub fn due(&mut self, now: Time, poller: &Poller) -> Option<u64> {
        self.socket.as_mut()?.due(now, poller)
    }

    /// Answers with a status.
    pub fn answer(&mut self, key: u64, status: &Value, poller: &Poller) {
        if let Some(socket) = &mut self.socket {
            socket.answer(key, document(status), poller);
        }
    }

    fn reported(&mut self) {
        if let Some(socket) = &mut self.socket {
            socket.reported(TUNNEL);
        }
    }

    /// The status.
    pub fn status(&self, facts: &Facts<'_>, now: Time) -> Value {
        let report = self.report.as_ref();
        let session = report.and_then(|report| report.session.as_ref());
        let carriers = facts.connection.map(Connection::ways).unwrap_or_default();
        json!({
            "role": "client",
            "version": VERSION,
            "device": facts.config.device.as_str(),
            "pid": std::process::id(),
            "uptime_s": now.since(self.started).as_secs(),
            "sandbox": facts.sandbox.shown(),
            "state": facts.state(report),
            "connecting": report.is_some_and(|report| report.connecting),
            "addresses": facts.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "remotes": facts.config.remote.iter().map(Remote::to_string).collect::<Vec<_>>(),
            "server": facts.connection.map(|connection| connection.address.to_string()),
            "carriers": carriers.iter().map(|way| json!({
                "device": way.name,
                "address": way.source.to_string(),
            })).collect::<Vec<_>>(),
            "tunnel_pid": facts.tunnel,
            "device_full": net::device_full(facts.config.device.as_str()),
            "session": session.map(session_status),
            "on_demand": facts.on_demand.as_ref().map(|(_, starts)| starts.to_json(now)),
        })
    }
}

/// What the supervisor knows.
pub struct Facts<'a> {
    /// The configuration.
    pub config: &'a ClientConfig,
    /// What the tunnel process is locked in with.
    pub sandbox: Means,
    /// Inner addresses on the device.
    pub addresses: &'a [IpAddr],
    /// The tunnel process's ID.
    pub tunnel: Option<u32>,
    /// The connection of the session in use.
    pub connection: Option<&'a Connection>,
    /// Of a client that connects on demand: what it does without a session, and its counters.
    pub on_demand: Option<(&'static str, &'a Starts)>,
}

impl Facts<'_> {
    fn state(&self, report: Option<&Report>) -> &'static str {
        let has_session = match report {
            Some(report) => report.session.is_some(),
            // It doesn't answer.
            None => self.connection.is_some(),
        };
        match &self.on_demand {
            _ if has_session => "up",
            Some((state, _)) => state,
            None if self.tunnel.is_none() => "starting",
            None => "connecting",
        }
    }
}

fn session_status(session: &SessionReport) -> Value {
    let drops: serde_json::Map<String, Value> =
        session.drops.nonzero().map(|(r, n)| (r.name().to_owned(), n.into())).collect();
    json!({
        "session": session.id.to_string(),
        "host": session.host,
        "server": SocketAddr::from(session.server).to_string(),
        "suite": session.suite.name(),
        "epoch": session.epoch,
        "age_s": session.age_ms / 1000,
        "silent_ms": session.silent_ms,
        "mtu": session.mtu,
        "path_mtu": session.path_mtu,
        "control": if session.control { "up" } else { "lost" },
        "paths": session.paths.iter().map(path_status).collect::<Vec<_>>(),
        "read_packets": session.traffic.read_packets,
        "cut_packets": session.traffic.cut_packets,
        "sent_packets": session.traffic.sent_packets,
        "sent_bytes": session.traffic.sent_bytes,
        "sent_in_band": session.traffic.sent_in_band,
        "sent_early": session.traffic.sent_early,
        "copies": session.traffic.copies,
        "sent_inside": session.traffic.sent_inside,
        "received_inside": session.traffic.received_inside,
        "received_packets": session.traffic.received_packets,
        "received_bytes": session.traffic.received_bytes,
        "received_in_band": session.traffic.received_in_band,
        "drops": drops,
    })
}

fn path_status(path: &PathReport) -> Value {
    let state = match (path.lost, path.proven) {
        (true, _) => "lost",
        (false, true) => "proven",
        (false, false) => "unproven",
    };
    json!({
        "carrier": path.carrier,
        "server": SocketAddr::from(path.server).to_string(),
        "in_use": path.in_use,
        "state": state,
        "rtt_us": path.rtt_us,
    })
}

/// What the only process that reports is called by [`Admin`].
const TUNNEL: u64 = 0;
/// Reports the tunnel process may owe us.
const MAX_ASKED: u32 = 4;
/// Tokens in the supervisor's epoll set, beyond its own.
const ADMIN: u64 = 1 << 32;
const FIRST_CONVERSATION: u64 = ADMIN + 1;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use super::*;
    use crate::client::starts::{SleepReason, WakeCause};

    const START: Time = Time::from_nanos(0);

    fn config(directory: &Path) -> ClientConfig {
        let text = format!(
            "remote = 'vpn.test'\nstate_dir = '{}'\n[tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\n",
            directory.display()
        );
        ClientConfig::parse(&text, Path::new("client.toml")).expect("valid")
    }

    fn facts(config: &ClientConfig) -> Facts<'_> {
        Facts {
            config,
            sandbox: Means { landlock: None },
            addresses: &[],
            tunnel: None,
            connection: None,
            on_demand: None,
        }
    }

    #[test]
    fn states() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = config(directory.path());
        let starts = Starts::default();
        let none = Report { session: None, connecting: true };
        let asleep = Some(("asleep", &starts));
        assert_eq!(facts(&config).state(None), "starting");
        assert_eq!(Facts { tunnel: Some(7), ..facts(&config) }.state(None), "connecting");
        assert_eq!(Facts { tunnel: Some(7), ..facts(&config) }.state(Some(&none)), "connecting");
        assert_eq!(Facts { on_demand: asleep, ..facts(&config) }.state(None), "asleep");
        assert_eq!(Facts { on_demand: asleep, ..facts(&config) }.state(Some(&none)), "asleep");
    }

    #[test]
    fn what_was_counted_on_demand_is_shown() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = config(directory.path());
        let poller = Poller::new(4).expect("an epoll set");
        let desk = Desk::open(&config, &poller, START);
        let mut starts = Starts::default();
        starts.woken(START, WakeCause::of(&[]), false);
        starts.asleep(START, SleepReason::Idle);
        let on_demand = Some(("asleep", &starts));
        let status = desk.status(&Facts { on_demand, ..facts(&config) }, START);
        assert_eq!(status["state"], "asleep");
        assert_eq!(status["remotes"], json!(["vpn.test:55555"]));
        assert_eq!(status["on_demand"]["wakes"], 1);
        assert_eq!(desk.status(&facts(&config), START)["on_demand"], Value::Null);
    }

    #[test]
    fn an_answer_waits_for_the_tunnel_process_or_its_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = config(directory.path());
        let poller = Poller::new(4).expect("an epoll set");
        let mut desk = Desk::open(&config, &poller, START);
        for key in 0..3 {
            let mut caller = UnixStream::connect(&config.socket).expect("connects");
            caller.write_all(b"status\n").expect("asks");
            assert_eq!(desk.hear(ADMIN, &poller, START), None);
            assert_eq!(desk.hear(FIRST_CONVERSATION + key, &poller, START), Some(key));
            let asked = key < 2;
            desk.wait_for(key, asked, START);
            match key {
                0 => {
                    assert_eq!(desk.due(START, &poller), None);
                    assert_eq!(desk.take_report(Report::default()), Ok(()));
                }
                1 => {
                    assert_eq!(desk.due(START, &poller), None);
                    desk.handle_gone();
                }
                _ => {}
            }
            assert_eq!(desk.due(START, &poller), Some(key));
            desk.answer(key, &json!({ "key": key }), &poller);
            let mut said = String::new();
            caller.read_to_string(&mut said).expect("it hangs up");
            assert_eq!(serde_json::from_str::<Value>(&said).expect("JSON"), json!({ "key": key }));
        }
    }

    #[test]
    fn reports_are_asked_for_and_not_without_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = config(directory.path());
        let poller = Poller::new(4).expect("an epoll set");
        let mut desk = Desk::open(&config, &poller, START);
        assert!(desk.take_report(Report::default()).is_err());
        for key in 0..u64::from(MAX_ASKED) {
            assert!(desk.may_ask());
            desk.wait_for(key, true, START);
        }
        assert!(!desk.may_ask());
        assert_eq!(desk.take_report(Report::default()), Ok(()));
        assert!(desk.may_ask());
    }

    #[test]
    fn without_a_socket_there_is_a_client_all_the_same() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = config(directory.path());
        let poller = Poller::new(4).expect("an epoll set");
        let _other = Desk::open(&config, &poller, START);
        let mut desk = Desk::open(&config, &poller, START);
        assert!(desk.socket.is_none());
        assert_eq!(desk.poll_timeout(), None);
        assert_eq!(desk.hear(ADMIN, &poller, START), None);
        assert!(config.socket.exists(), "the other one's");
    }
}
