//! The part of `tunguard status` that shows a client.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::sandbox::Means;

use super::status::{age, bytes, counts, harmless, plural, table};

/// What the supervisor answers; what it may say beyond this is for others.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ClientStatus {
    version: String,
    device: String,
    uptime_s: u64,
    state: String,
    connecting: bool,
    sandbox: Option<Means>,
    addresses: Vec<String>,
    remotes: Vec<String>,
    carriers: Vec<Carrier>,
    device_full: Option<u64>,
    session: Option<Session>,
    on_demand: Option<OnDemand>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Carrier {
    device: String,
    address: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Session {
    host: String,
    server: String,
    suite: String,
    age_s: u64,
    silent_ms: u64,
    mtu: u64,
    path_mtu: Option<u64>,
    control: String,
    paths: Vec<Path>,
    sent_packets: u64,
    sent_bytes: u64,
    received_packets: u64,
    received_bytes: u64,
    drops: BTreeMap<String, u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Path {
    carrier: String,
    in_use: bool,
    state: String,
    rtt_us: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OnDemand {
    wakes: u64,
    established: u64,
    gave_up: u64,
    held_packets: u64,
    awake_ms: f64,
    causes: BTreeMap<String, u64>,
    drops: BTreeMap<String, u64>,
    cold: Starts,
    warm: Starts,
    recent: Vec<Wake>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Starts {
    first_packet: Waits,
    first_answer: Waits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Waits {
    count: u64,
    median_at_most_ms: Option<u64>,
    worst_ms: Option<f64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Wake {
    ago_ms: f64,
    packet: String,
    warm: bool,
    first_packet_ms: Option<f64>,
    first_answer_ms: Option<f64>,
}

pub(super) fn render(status: &ClientStatus) -> String {
    let mut text = format!(
        "tunguard {} client on {}, {}{}, started {} ago\n",
        harmless(&status.version),
        harmless(&status.device),
        harmless(&status.state),
        if status.connecting && status.session.is_some() { " and connecting anew" } else { "" },
        age(status.uptime_s),
    );
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            text.push_str(&format!("{name:10} {value}\n"));
        }
    };
    line("sandbox", &status.sandbox.map(|sandbox| sandbox.to_string()).unwrap_or_default());
    line("addresses", &listed(status.addresses.iter().map(|a| harmless(a))));
    match &status.session {
        Some(session) => {
            line("server", &format!("{} ({})", harmless(&session.server), harmless(&session.host)));
            line("carriers", &listed(status.carriers.iter().map(Carrier::shown)));
            line("session", &session.shown());
            line("sent", &traffic(session.sent_packets, session.sent_bytes));
            line("received", &traffic(session.received_packets, session.received_bytes));
            line("dropped", &counts(&session.drops).unwrap_or_default());
        }
        None => line("remotes", &listed(status.remotes.iter().map(|r| harmless(r)))),
    }
    if let Some(packets) = status.device_full.filter(|packets| *packets > 0) {
        line("dropped", &format!("device_full {packets}"));
    }
    if let Some(on_demand) = &status.on_demand {
        on_demand.show(&mut line);
    }
    if let Some(session) = status.session.as_ref().filter(|session| !session.paths.is_empty()) {
        text.push('\n');
        let mut rows = vec![["PATH", "IN USE", "STATE", "RTT"].map(str::to_owned)];
        rows.extend(session.paths.iter().map(Path::row));
        text.push_str(&table(&rows));
    }
    if let Some(on_demand) = status.on_demand.as_ref().filter(|on_demand| !on_demand.recent.is_empty()) {
        text.push('\n');
        let mut rows = vec![["WOKEN", "BY", "START", "SENT AFTER", "ANSWERED AFTER"].map(str::to_owned)];
        rows.extend(on_demand.recent.iter().map(Wake::row));
        text.push_str(&table(&rows));
    }
    text
}

impl Carrier {
    fn shown(&self) -> String {
        format!("{} ({})", harmless(&self.device), harmless(&self.address))
    }
}

impl Session {
    fn shown(&self) -> String {
        let path_mtu = self.path_mtu.map_or(String::new(), |mtu| format!(" (path {mtu})"));
        let control = if self.control == "lost" { ", control lost" } else { "" };
        format!(
            "for {}, heard {} ago, {}, MTU {}{path_mtu}{control}",
            age(self.age_s),
            age(self.silent_ms / 1000),
            harmless(&self.suite),
            self.mtu,
        )
    }
}

impl Path {
    fn row(&self) -> [String; 4] {
        let in_use = if self.in_use { "yes" } else { "-" };
        [
            harmless(&self.carrier),
            in_use.to_owned(),
            harmless(&self.state),
            millis(self.rtt_us.map(|us| us as f64 / 1e3)),
        ]
    }
}

impl OnDemand {
    fn show(&self, line: &mut impl FnMut(&str, &str)) {
        let gave_up =
            if self.gave_up > 0 { format!(", gave up {} times", self.gave_up) } else { String::new() };
        line(
            "on demand",
            &format!(
                "woken {} times, connected {} times{gave_up}, awake for {}, {} held",
                self.wakes,
                self.established,
                age((self.awake_ms / 1e3) as u64),
                plural(self.held_packets, "packet"),
            ),
        );
        line("woken by", &counts(&self.causes).unwrap_or_default());
        line("not sent", &counts(&self.drops).unwrap_or_default());
        line("cold", &self.cold.shown());
        line("warm", &self.warm.shown());
    }
}

impl Starts {
    fn shown(&self) -> String {
        if self.first_packet.count == 0 {
            return String::new();
        }
        format!("first packet sent: {}; answered: {}", self.first_packet.shown(), self.first_answer.shown())
    }
}

impl Waits {
    fn shown(&self) -> String {
        let Some(worst) = self.worst_ms else { return "never".to_owned() };
        let median = self.median_at_most_ms.map_or(String::new(), |ms| format!("half within {ms} ms, "));
        format!("{median}{worst:.0} ms at worst")
    }
}

impl Wake {
    fn row(&self) -> [String; 5] {
        [
            format!("{} ago", age((self.ago_ms / 1e3) as u64)),
            harmless(&self.packet),
            if self.warm { "warm" } else { "cold" }.to_owned(),
            millis(self.first_packet_ms),
            millis(self.first_answer_ms),
        ]
    }
}

fn millis(ms: Option<f64>) -> String {
    ms.map_or("-".to_owned(), |ms| format!("{ms:.1} ms"))
}

fn traffic(packets: u64, size: u64) -> String {
    format!("{} ({})", plural(packets, "packet"), bytes(size))
}

fn listed(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(answer: &str) -> String {
        render(&serde_json::from_str(answer).expect("a status"))
    }

    #[test]
    fn a_session_is_shown_with_its_paths() {
        let text = shown(
            r#"{
            "role": "client", "version": "0.1.0", "device": "tg0", "uptime_s": 75, "state": "up", "future": {},
            "addresses": ["10.9.0.2", "fd09::2"], "remotes": ["vpn.test:55555"], "device_full": 0,
            "carriers": [{"device": "wlan0", "address": "192.0.2.7"}],
            "session": {"host": "vpn.test", "server": "198.51.100.1:55555", "suite": "aes-256-gcm", "age_s": 61,
                "silent_ms": 900, "mtu": 1420, "path_mtu": 1380, "control": "lost", "sent_packets": 1,
                "sent_bytes": 84, "received_packets": 2, "received_bytes": 1500, "drops": {"bad_tag": 2, "flags": 0},
                "paths": [{"carrier": "wlan0\u001b", "in_use": true, "state": "proven", "rtt_us": 412},
                    {"carrier": "eth0", "state": "lost", "rtt_us": null}]}
        }"#,
        );
        assert_eq!(
            text,
            "tunguard 0.1.0 client on tg0, up, started 1m15s ago\n\
             addresses  10.9.0.2, fd09::2\n\
             server     198.51.100.1:55555 (vpn.test)\n\
             carriers   wlan0 (192.0.2.7)\n\
             session    for 1m01s, heard 0s ago, aes-256-gcm, MTU 1420 (path 1380), control lost\n\
             sent       1 packet (84 B)\n\
             received   2 packets (1.5 kB)\n\
             dropped    bad_tag 2\n\
             \n\
             PATH         IN USE  STATE   RTT\n\
             wlan0\\u{1b}  yes     proven  0.4 ms\n\
             eth0         -       lost    -\n"
        );
    }

    #[test]
    fn a_sleeping_client_says_what_woke_it() {
        let text = shown(
            r#"{
            "role": "client", "version": "0.1.0", "device": "tg0", "uptime_s": 75, "state": "asleep",
            "addresses": ["10.9.0.2"], "remotes": ["vpn.test:55555"], "session": null, "device_full": 3,
            "on_demand": {"wakes": 2, "established": 1, "gave_up": 1, "held_packets": 1, "awake_ms": 1500.5,
                "causes": {"ping": 2}, "drops": {"gave_up": 1}, "warm": {},
                "cold": {"first_packet": {"count": 1, "median_at_most_ms": 60, "worst_ms": 55.4},
                    "first_answer": {"count": 0, "worst_ms": null}},
                "recent": [{"ago_ms": 4000, "packet": "icmp 10.9.0.2 > 10.9.0.1 type 8", "warm": false,
                    "first_packet_ms": 55.4, "first_answer_ms": null}]}
        }"#,
        );
        assert_eq!(
            text,
            "tunguard 0.1.0 client on tg0, asleep, started 1m15s ago\n\
             addresses  10.9.0.2\n\
             remotes    vpn.test:55555\n\
             dropped    device_full 3\n\
             on demand  woken 2 times, connected 1 times, gave up 1 times, awake for 1s, 1 packet held\n\
             woken by   ping 2\n\
             not sent   gave_up 1\n\
             cold       first packet sent: half within 60 ms, 55 ms at worst; answered: never\n\
             \n\
             WOKEN   BY                               START  SENT AFTER  ANSWERED AFTER\n\
             4s ago  icmp 10.9.0.2 > 10.9.0.1 type 8  cold   55.4 ms     -\n"
        );
    }

    #[test]
    fn an_answer_with_nothing_in_it_is_shown() {
        assert_eq!(shown(r#"{"role": "client"}"#), "tunguard  client on , , started 0s ago\n");
    }
}
