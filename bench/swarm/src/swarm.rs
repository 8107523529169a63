//! All members on one epoll set.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tunguard::egress::Egress;
use tunguard::exit::{Failure, Outcome};
use tunguard::sys::clock;
use tunguard::sys::poller::{Interest, Poller};
use tunguard::sys::udp::{ReceiveBuffers, Received};
use tunguard::time::Time;
use tunguard::tls::Credentials;

use crate::certificates;
use crate::member::Member;

/// The swarm.
pub struct Swarm {
    server: SocketAddr,
    credentials: Vec<Credentials>,
    members: Vec<Member>,
    poller: Poller,
}

/// What the active members do.
pub struct Load {
    /// How many of them.
    pub active: usize,
    /// Bytes of a packet.
    pub size: usize,
    /// Packets under way, for each.
    pub window: usize,
    /// Whom they ping.
    pub inner: Ipv4Addr,
    /// Answers after which one stops.
    pub pings: u64,
}

impl Swarm {
    /// `count` members, none connected yet.
    pub fn new(dir: &Path, server: SocketAddr, count: usize) -> Outcome<Swarm> {
        let credentials = (0..count).map(|i| certificates::client(dir, i)).collect::<Outcome<_>>()?;
        let poller = Poller::new(256).map_err(|e| Failure::system("make an epoll set", e))?;
        Ok(Swarm { server, credentials, members: Vec::new(), poller })
    }

    /// Makes every session, `parallel` handshakes at a time, and says how long it took.
    pub fn connect_all(&mut self, parallel: usize) -> Outcome<Duration> {
        let start = clock::now();
        let mut under_way = 0;
        let mut done = 0;
        while done < self.credentials.len() {
            while under_way < parallel && self.members.len() < self.credentials.len() {
                let member = Member::dial(&self.credentials[self.members.len()], self.server)?;
                let token = CONTROL | (self.members.len() as u64) << 1;
                self.poller.add(&member, token, Interest::Read).map_err(watch)?;
                self.members.push(member);
                under_way += 1;
                // The client speaks first.
                self.advance(self.members.len() - 1)?;
            }
            let ready: Vec<_> = self.poller.wait(Some(PATIENCE)).map_err(watch)?.collect();
            if ready.is_empty() {
                return Err(Failure::system("make sessions", "the server doesn't answer"));
            }
            for event in ready {
                let i = (event.token >> 1) as usize;
                if event.token & 1 == CONTROL {
                    let before = self.members[i].live.is_some();
                    self.advance(i)?;
                    if !before && self.members[i].live.is_some() {
                        done += 1;
                        under_way -= 1;
                    }
                }
            }
        }
        Ok(clock::now().since(start))
    }

    fn advance(&mut self, i: usize) -> Outcome<()> {
        let member = &mut self.members[i];
        let before = member.live.is_some();
        member.advance()?;
        if let (false, Some(live)) = (before, &member.live) {
            self.poller.add(live.carrier.as_fd(), DATA | (i as u64) << 1, Interest::Read).map_err(watch)?;
        }
        Ok(())
    }

    /// Lets the active members ping for `time`, and says what came back to each.
    pub fn exchange(&mut self, load: &Load, time: Duration) -> Outcome<Value> {
        let mut egress = Egress::default();
        let mut buffers = ReceiveBuffers::default();
        let mut received: Vec<Received> = Vec::new();
        let start = clock::now();
        let mut last = vec![start; self.members.len()];
        for member in &mut self.members[..load.active] {
            if let Some(live) = &mut member.live {
                live.ping(&mut egress, load.inner, load.size, load.window);
            }
        }
        let mut running = load.active;
        while running > 0 && clock::now().since(start) < time {
            let ready: Vec<_> = self.poller.wait(Some(Duration::from_millis(20))).map_err(watch)?.collect();
            for event in ready {
                let i = (event.token >> 1) as usize;
                if event.token & 1 == CONTROL {
                    self.advance(i)?;
                    continue;
                }
                let Some(live) = &mut self.members[i].live else { continue };
                let answers = live.receive(&mut buffers, &mut received)?;
                last[i] = clock::now();
                let (before, after) = (live.answered - answers as u64, live.answered);
                if after < load.pings {
                    live.ping(&mut egress, load.inner, load.size, answers);
                } else if before < load.pings && i < load.active {
                    running -= 1;
                }
            }
            self.refill(load, &mut egress, &mut last, clock::now());
        }
        Ok(self.sum_up(load, clock::now().since(start)))
    }

    /// Pings that got lost leave a window that is too small, or nothing at all.
    fn refill(&mut self, load: &Load, egress: &mut Egress, last: &mut [Time], now: Time) {
        for (i, member) in self.members[..load.active].iter_mut().enumerate() {
            let Some(live) = &mut member.live else { continue };
            if live.answered < load.pings && now.since(last[i]) > LOST_AFTER {
                last[i] = now;
                live.ping(egress, load.inner, load.size, load.window);
            }
        }
    }

    fn sum_up(&self, load: &Load, took: Duration) -> Value {
        let answered: Vec<f64> = self.members[..load.active]
            .iter()
            .map(|m| m.live.as_ref().map_or(0, |l| l.answered) as f64)
            .collect();
        let sum: f64 = answered.iter().sum();
        let squares: f64 = answered.iter().map(|x| x * x).sum();
        // Jain's index: 1 where all got the same, 1/n where one got everything.
        let fairness = sum * sum / (answered.len() as f64 * squares);
        json!({
            "sessions": self.members.len(),
            "active": load.active,
            "seconds": took.as_secs_f64(),
            "answers": sum,
            "answers_per_second": sum / took.as_secs_f64(),
            "bits_per_second_each_way": sum * load.size as f64 * 8.0 / took.as_secs_f64(),
            "jain": fairness,
            "least": answered.iter().copied().fold(f64::INFINITY, f64::min),
            "most": answered.iter().copied().fold(0.0, f64::max),
        })
    }

    /// Keeps the sessions for `time`, answering what has to be answered.
    pub fn idle(&mut self, time: Duration) -> Outcome<()> {
        let until = clock::now() + time;
        while clock::now() < until {
            let left = until.since(clock::now()).min(Duration::from_millis(200));
            let ready: Vec<_> = self.poller.wait(Some(left)).map_err(watch)?.collect();
            for event in ready.iter().filter(|e| e.token & 1 == CONTROL) {
                self.advance((event.token >> 1) as usize)?;
            }
            if ready.iter().any(|e| e.token & 1 == DATA) {
                let mut buffers = ReceiveBuffers::default();
                for event in ready.iter().filter(|e| e.token & 1 == DATA) {
                    if let Some(live) = &mut self.members[(event.token >> 1) as usize].live {
                        live.receive(&mut buffers, &mut Vec::new())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Keeps the sessions for `time` as clients do, new keys and all; the first `active` send a ping every so often. Says
    /// what came of it.
    pub fn hold(&mut self, load: &Load, every: Duration, time: Duration) -> Outcome<Value> {
        let mut egress = Egress::default();
        let mut buffers = ReceiveBuffers::default();
        let mut received: Vec<Received> = Vec::new();
        let start = clock::now();
        let (mut next, mut look) = (start, start);
        let mut standing = 0;
        while clock::now().since(start) < time {
            let now = clock::now();
            if next <= now {
                next = now + every;
                for live in self.members[..load.active].iter_mut().filter_map(|m| m.live.as_mut()) {
                    live.ping(&mut egress, load.inner, load.size, load.window);
                }
            }
            if look <= now {
                look = now + LOOK;
                standing = 0;
                for member in &mut self.members {
                    standing += usize::from(member.keep(now)?);
                }
            }
            let timeout = next.min(look).since(clock::now());
            let ready: Vec<_> = self.poller.wait(Some(timeout)).map_err(watch)?.collect();
            for event in ready {
                let i = (event.token >> 1) as usize;
                if event.token & 1 == CONTROL {
                    self.advance(i)?;
                } else if let Some(live) = &mut self.members[i].live {
                    live.receive(&mut buffers, &mut received)?;
                }
            }
        }
        let sum = |count: fn(&crate::member::Live) -> u64| -> u64 {
            self.members.iter().filter_map(|m| m.live.as_ref()).map(count).sum()
        };
        Ok(json!({
            "sessions": self.members.len(),
            "standing": standing,
            "active": load.active,
            "seconds": clock::now().since(start).as_secs_f64(),
            "pings": sum(|live| live.sent),
            "answers": sum(|live| live.answered),
        }))
    }

    /// Everybody says goodbye.
    pub fn leave(self) {
        self.members.into_iter().for_each(Member::leave);
    }
}

fn watch(error: std::io::Error) -> Failure {
    Failure::system("wait for events", error)
}

const CONTROL: u64 = 0;
const DATA: u64 = 1;
const PATIENCE: Duration = Duration::from_secs(20);
/// How often timers are looked at.
const LOOK: Duration = Duration::from_millis(100);
const LOST_AFTER: Duration = Duration::from_millis(250);
