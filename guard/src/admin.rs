//! What the guard answers on its admin socket ([`tunguard::admin`]).

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde_json::{Value, json};

use tunguard::VERSION;
use tunguard::admin::{self, Question};
use tunguard::ipc::{Reply, Report};
use tunguard::net;
use tunguard::sys::clock;
use tunguard::time::Time;

use crate::accounts::GuardDrop;
use crate::clients::{Phase, Session, Worker};
use crate::events::Heard;
use crate::gate::{Failed, Refusal, Source};
use crate::leases::Away;
use crate::run::Guard;

impl Guard {
    /// Takes in somebody who wants to ask.
    pub fn accept_admin(&mut self) {
        self.admin.accept(&self.poller, clock::now());
    }

    /// A conversation's socket is ready.
    pub fn converse(&mut self, key: u64) {
        match self.admin.converse(key, &self.poller) {
            Some(Question::Status) => self.ask_workers(key),
            Some(Question::Reload) => self.reload_and_tell(key),
            None => {}
        }
    }

    /// A worker reported; whoever waited for it may get the answer now.
    pub fn take_report(&mut self, key: u64, report: Report) {
        if let Some(session) = self.workers.get_mut(key).and_then(|w| w.session.as_mut()) {
            session.report = report;
        }
        self.admin.reported(key);
        self.continue_conversations(clock::now());
    }

    /// Answers what waits for nobody any more, and gives up on the deaf and dumb.
    pub fn continue_conversations(&mut self, now: Time) {
        while let Some(key) = self.admin.due(now, &self.poller) {
            let status = self.status(now);
            self.admin.answer(key, status, &self.poller);
        }
    }

    /// A client was heard somewhere else: whoever watches is told.
    pub fn tell_watchers(&mut self, heard: Heard<'_>) {
        let line = self.events.add(heard);
        self.admin.tell(&line, &self.poller);
    }

    fn ask_workers(&mut self, conversation: u64) {
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
        self.admin.wait_for(conversation, awaited, now);
        self.continue_conversations(now);
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
        let mut sandbox = self.spawner.sandbox.shown();
        sandbox["single_uid"] = json!(self.config.single_uid);
        let status = json!({
            "version": VERSION,
            "device": self.config.device.as_str(),
            "listen": self.listen.to_string(),
            "pid": std::process::id(),
            "uptime_s": now.since(self.started).as_secs(),
            "sandbox": sandbox,
            "queue": {
                "messages": self.queues.downlink.messages,
                "bytes": self.queues.downlink.bytes,
                "private": self.queues.private,
            },
            "handshakes": self.gate.handshakes(),
            "waiting": self.gate.waiting(),
            "sources": self.gate.sources(),
            "refused": Refusal::ALL.map(|why| (why.name(), self.gate.refused(why))).into_iter().collect::<HashMap<_, _>>(),
            "failed": Failed::ALL.map(|how| (how.name(), self.gate.failed(how))).into_iter().collect::<HashMap<_, _>>(),
            "penalised": self.gate.penalised(now).iter().map(penalty_status).collect::<Vec<_>>(),
            "workers": self.workers.len(),
            "device_packets": self.accounts.read_packets,
            "device_bytes": self.accounts.read_bytes,
            "queued_packets": self.accounts.queued_packets,
            "guard_drops": drops,
            "events": self.events.list(),
            "unreachables": self.accounts.told,
            "away": self.leases.away().map(|away| away_status(&away)).collect::<Vec<_>>(),
            "sessions": sessions.iter().map(|(s, w)| session_status(s, w, now)).collect::<Vec<_>>(),
        });
        admin::document(&status)
    }
}

fn penalty_status((source, left): &(Source, Duration)) -> Value {
    json!({ "source": source.to_string(), "for_s": left.as_secs_f64().ceil() as u64 })
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
        "seat": session.seat + 1,
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
        "copies": report.traffic.copies,
        "sent_inside": report.traffic.sent_inside,
        "received_inside": report.traffic.received_inside,
        "received_early": report.traffic.received_early,
        "queue_depth": depth,
        "backlog_bytes": session.outbox.as_ref().map_or(0, |o| o.backlog()),
        "rate_down": session.rates.down.map(|rate| rate.bits()),
        "rate_up": session.rates.up.map(|rate| rate.bits()),
        "guard_drops": { "rate_down": session.over_rate.down, "rate_up": session.over_rate.up },
        "pid": worker.pid,
        "uid": worker.uid,
        "drops": drops,
    })
}

/// Reports a worker may owe us.
const MAX_ASKED: u32 = 4;
