//! The supervisor's part in connecting on demand: it sets the host up before there is a connection, reads the device
//! while there is no tunnel process, and starts and stops that one as [`OnDemand`] says.

use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{DEVICE, Supervisor, full};
use crate::client::consent::{Policy, judge};
use crate::client::dial::Known;
use crate::client::host::Host;
use crate::client::ipc::{self, Phase, Progress, Reply, Wishes};
use crate::client::on_demand::{Due, Ended, OnDemand, Verdict};
use crate::client::remembered::{self, Remembered};
use crate::client::starts::{HeldDrop, SleepReason, Starts, WakeCause};
use crate::client::wake::{self, Wake};
use crate::config::client::{ClientConfig, Remote};
use crate::exit::{Failure, Outcome};
use crate::rigged::point;
use crate::sys::clock;
use crate::sys::poller::Interest;
use crate::sys::tun::Tun;
use crate::time::Time;
use crate::wire::vnet::{VNET_LEN, VnetHeader};

/// A connection on demand.
pub(super) struct Demand {
    core: OnDemand,
    /// For the status.
    pub starts: Starts,
    /// The device is in the epoll set.
    listening: bool,
    packet: Vec<u8>,
    remembered: Option<Remembered>,
    /// The addresses that the host was set up with.
    addresses: Vec<IpAddr>,
    sleep: SleepReason,
}

impl Demand {
    /// Where the configuration asks for it.
    pub fn new(config: &ClientConfig, now: Time) -> Outcome<Option<Demand>> {
        let on_demand = &config.on_demand;
        if !on_demand.enabled {
            return Ok(None);
        }
        let remembered = Remembered::load(config)?;
        let known = remembered::at_start(config, remembered.as_ref()).is_some();
        let wake = Wake::new(on_demand.wake.clone());
        Ok(Some(Demand {
            core: OnDemand::new(wake, on_demand.give_up, known, now),
            starts: Starts::default(),
            listening: false,
            packet: vec![0; VNET_LEN + usize::from(u16::MAX)],
            remembered,
            addresses: Vec::new(),
            sleep: SleepReason::Idle,
        }))
    }
}

impl Demand {
    /// For the status: what it does, and what was counted.
    pub fn shown(&self) -> (&'static str, &Starts) {
        (self.core.state(), &self.starts)
    }
}

impl Supervisor<'_> {
    /// Sets the host up as it was in the last session, or as configured, if that is known; then no process is started
    /// before a packet comes.
    pub(super) fn begin_asleep(&mut self, host: &mut Host) -> Outcome<()> {
        let Some(demand) = &mut self.demand else { return Ok(()) };
        host.set_queue(self.config.on_demand.queue)?;
        let last = demand.remembered.as_ref();
        if let Some((place, server)) = last.and_then(Remembered::server) {
            self.known.insert(place, Known { addresses: vec![server], good: true });
            self.found.insert(place, vec![server]);
            self.first_remote = place;
        }
        let first_session = last.is_none();
        let known = remembered::at_start(self.config, last);
        // Before there are routes of ours: whatever they are, none leads to a server itself.
        for server in self.kept_servers() {
            host.protect(server)?;
        }
        let result = match known {
            Some(mut wishes) => {
                if first_session {
                    // Which subnets are behind us the server hasn't said yet: any may be.
                    wishes.subnets = vec![IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
                }
                self.set_up_asleep(&wishes, host)
                    .map_err(|why| log::warn!("what is known of the last session is of no use: {why}"))
            }
            None => Err(()),
        };
        let servers = self.servers();
        let Some(demand) = &mut self.demand else { return Ok(()) };
        if result.is_ok() {
            self.restart_at = None;
            log::info!("asleep: waits for packets{}", listed(" as ", &self.want));
            point("supervisor.asleep");
        } else {
            let on_demand = &self.config.on_demand;
            let wake = Wake::new(on_demand.wake.clone());
            demand.core = OnDemand::new(wake, on_demand.give_up, false, clock::now());
            demand.starts.woken(clock::now(), first_wake(), false);
            self.want = on_demand.addresses.iter().map(IpNet::addr).collect();
            log::info!(
                "inner addresses, routes or the server's place aren't known: connecting once to learn them"
            );
        }
        demand.core.set_servers(servers);
        Ok(())
    }

    /// An error is a reason to connect first.
    fn set_up_asleep(&mut self, wishes: &Wishes, host: &mut Host) -> Result<(), String> {
        let lans = host.lans().map_err(|failure| failure.text)?;
        let plan = judge(&Policy::of(self.config), wishes, &lans).map_err(|refused| refused.to_string())?;
        host.apply(&plan).map_err(|failure| failure.text)?;
        // From here on, ending would let go of what is kept in the tunnel: a stranger's certificate is no reason for that.
        self.established = true;
        if let Some(demand) = &mut self.demand {
            demand.core.set_networks(&wishes.addresses, &wishes.subnets);
            demand.addresses.clone_from(&plan.addresses);
        }
        self.want = plan.addresses;
        Ok(())
    }

    /// Servers that a client on demand keeps the ways to all the time: asleep too, when the way might not be found again with
    /// our routes there, and so that what goes to a server beside the tunnel is never within it.
    pub(super) fn kept_servers(&self) -> Vec<IpAddr> {
        if self.demand.is_none() {
            return Vec::new();
        }
        kept(&self.config.remote, self.known.values())
    }

    /// What the next tunnel process is told of it.
    pub(super) fn demand_setup(&self) -> Option<ipc::Demand> {
        self.demand.as_ref().map(|demand| ipc::Demand {
            idle_ms: self.config.on_demand.idle.as_millis() as u64,
            held: demand.core.held().to_vec(),
        })
    }

    /// Reads the device until a packet wakes us, or none is left.
    pub(super) fn hear_device(&mut self, now: Time) -> Outcome<()> {
        let gone = |why: String| Failure::system(format!("read the device {}", self.config.device), why);
        for _ in 0..PACKETS_PER_TURN {
            let Some(demand) = self.demand.as_mut().filter(|demand| demand.core.listens()) else { break };
            let len = match self.tun.read(&mut demand.packet) {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(error) if Tun::is_gone(&error) => return Err(gone("it was removed".to_owned())),
                // A packet that the kernel can't describe (tun_put_user()) is gone with this.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
                Err(error) => return Err(gone(error.to_string())),
            };
            let read = &demand.packet[..len];
            match demand.core.handle_packet(now, read) {
                Verdict::Ignored => {
                    demand.starts.dropped(HeldDrop::NoWake, 1);
                    log::debug!("not woken by {}", wake::describe(read.get(VNET_LEN..).unwrap_or_default()));
                }
                Verdict::NotOurs => {
                    demand.starts.dropped(HeldDrop::SourceNotOurs, 1);
                    log::debug!("not ours: {}", wake::describe(read.get(VNET_LEN..).unwrap_or_default()));
                }
                Verdict::Refused => demand.starts.dropped(HeldDrop::GaveUp, 1),
                Verdict::Wakes => {
                    let packet = read.get(VNET_LEN..).unwrap_or_default();
                    log::info!("woken by {}", wake::describe(packet));
                    demand.starts.woken(now, WakeCause::of(packet), self.ticket.is_some());
                    demand.starts.held(1);
                    self.known.values_mut().for_each(Known::trust);
                    self.restart_at = Some(now);
                    point("supervisor.woken");
                }
            }
        }
        self.answer_senders();
        Ok(())
    }

    /// Tells senders that their packets were dropped.
    fn answer_senders(&mut self) {
        let Some(demand) = &mut self.demand else { return };
        while let Some(answer) = demand.core.poll_answer() {
            let vnet = VnetHeader::default().emit();
            if let Err(error) = self.tun.write(&[IoSlice::new(&vnet), IoSlice::new(&answer)]) {
                log::debug!("a sender isn't told: {error}");
            }
        }
    }

    /// When [`step_demand`](Supervisor::step_demand) has something to do.
    pub(super) fn poll_demand(&self) -> Option<Time> {
        self.demand.as_ref().and_then(|demand| demand.core.poll_timeout())
    }

    /// Does what is due, and reads the device where that is ours to do.
    pub(super) fn step_demand(&mut self, host: &mut Host, now: Time) -> Outcome<()> {
        let Some(demand) = &mut self.demand else { return Ok(()) };
        match (demand.core.handle_timeout(now), &mut self.process) {
            (Some(Due::Stop), Some(process)) => {
                let seconds = self.config.on_demand.give_up.as_secs_f64();
                log::warn!("no session within {seconds:.0} s: whoever waits is told that nobody is there");
                self.dial = None;
                if process.phase.is_at_work() {
                    process.phase = Phase::Stopping;
                    process.tell(&Reply::Stop, &[]);
                }
            }
            (Some(Due::Kill), Some(process)) => {
                log::warn!("the tunnel process doesn't leave: it is killed");
                let _ = process.child.kill();
            }
            // It waited for its next start.
            (Some(Due::Stop), None) => {
                self.restart_at = None;
                self.demand_ended(host, now);
            }
            _ => {}
        }
        self.listen_to_device()
    }

    fn listen_to_device(&mut self) -> Outcome<()> {
        let Some(demand) = &mut self.demand else { return Ok(()) };
        let listen = demand.core.listens() && self.process.is_none() && self.stop_by.is_none();
        match (demand.listening, listen) {
            (false, true) => self.poller.add(&self.tun, DEVICE, Interest::Read).map_err(full)?,
            (true, false) => self.poller.remove(&self.tun).map_err(full)?,
            _ => {}
        }
        demand.listening = listen;
        Ok(())
    }

    /// The tunnel process says how it is doing.
    pub(super) fn heed_progress(&mut self, progress: Progress, now: Time) -> Result<(), String> {
        let Some(demand) = &mut self.demand else {
            return Err("progress that nobody asked for".to_owned());
        };
        match progress {
            Progress::HeldSent => demand.core.handle_held_sent(),
            Progress::Established => {
                demand.core.handle_established();
                demand.starts.established(now);
            }
            Progress::Answered => demand.starts.first_answer(now),
            Progress::Lost => demand.core.handle_lost(now),
            Progress::Leaving { by_server } => {
                demand.core.handle_leaving(now);
                demand.sleep = if by_server { SleepReason::Server } else { SleepReason::Idle };
                match by_server {
                    true => log::info!("the server closed the connection, which was idle"),
                    false => log::info!("idle for {}: connection closed", spoken(self.config.on_demand.idle)),
                }
            }
        }
        Ok(())
    }

    /// The tunnel process is gone. Whether another one is to be started.
    pub(super) fn demand_ended(&mut self, host: &mut Host, now: Time) -> bool {
        let Some(demand) = &mut self.demand else { return true };
        let held = demand.core.held().len() as u64;
        match demand.core.handle_ended(now) {
            Ended::Again => return true,
            Ended::Asleep => {
                demand.starts.asleep(now, demand.sleep);
                log::info!("asleep: waits for packets");
                point("supervisor.asleep-again");
            }
            Ended::GivenUp => {
                demand.starts.gave_up(now);
                demand.starts.dropped(HeldDrop::GaveUp, held);
                if let Some(last) = &mut demand.remembered
                    && last.doubt_server(self.config)
                    && let Err(failure) = last.store(&remembered::file(self.config))
                {
                    log::warn!("the next start will look for the server where it was: {failure}");
                }
                log::info!("the next packet tries again");
            }
        }
        self.crashes = 0;
        self.answer_senders();
        self.release_servers(host);
        false
    }

    /// Nobody needs a way to other servers than those that are kept.
    fn release_servers(&mut self, host: &mut Host) {
        let (servers, keep) = (self.servers(), self.kept_servers());
        let Some(demand) = self.demand.as_mut().filter(|demand| demand.core.listens()) else { return };
        demand.core.set_servers(servers);
        if let Err(failure) = host.protect_only(&keep) {
            log::warn!("{failure}");
        }
    }

    /// This host is elsewhere, perhaps.
    pub(super) fn demand_moved(&mut self) {
        if let Some(demand) = &mut self.demand {
            demand.core.handle_network_changed();
        }
    }

    /// A session was made, and the host set up for it: the next start begins with that.
    pub(super) fn remember(&mut self, wishes: &Wishes) {
        let Some((place, server)) = self.in_use.as_ref().map(|c| (c.place, c.address)) else { return };
        self.first_remote = place;
        let Some(demand) = &mut self.demand else { return };
        demand.core.set_networks(&wishes.addresses, &wishes.subnets);
        if demand.addresses != self.want {
            if !demand.addresses.is_empty() {
                let before = listed("", &demand.addresses);
                log::warn!("the server gave other addresses:{} instead of {before}", listed(" ", &self.want));
            }
            demand.addresses.clone_from(&self.want);
        }
        let now = Remembered::of(self.config, wishes, place, server);
        if demand.remembered.as_ref() != Some(&now) {
            if let Err(failure) = now.store(&remembered::file(self.config)) {
                log::warn!("the next start won't know the inner addresses: {failure}");
            }
            demand.remembered = Some(now);
        }
    }
}

/// Remotes that are addresses, and where others were last.
fn kept<'k>(remotes: &[Remote], known: impl Iterator<Item = &'k Known>) -> Vec<IpAddr> {
    let literal = remotes.iter().filter_map(|remote| remote.host.parse().ok());
    let mut kept: Vec<IpAddr> = literal.chain(known.flat_map(|k| &k.addresses).map(SocketAddr::ip)).collect();
    kept.sort_unstable();
    kept.dedup();
    kept
}

fn first_wake() -> WakeCause {
    WakeCause::without_packet("to learn the inner addresses")
}

fn listed(before: &str, addresses: &[IpAddr]) -> String {
    let texts: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    format!("{before}{}", texts.join(", "))
}

/// A duration for people: `5 min`, `90 s`.
fn spoken(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds >= 60 && seconds.is_multiple_of(60) => format!("{} min", seconds / 60),
        _ => format!("{} s", duration.as_secs_f64()),
    }
}

/// Packets that may be read before signals are looked at.
const PACKETS_PER_TURN: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_stay_outside() {
        let remote = |host: &str| Remote { host: host.to_owned(), port: 7 };
        let remotes = ["192.0.2.1", "vpn.example.org", "2001:db8::1"].map(remote);
        let known = Known { addresses: vec!["198.51.100.1:7".parse().expect("an address")], good: false };
        let again = Known { addresses: vec!["192.0.2.1:7".parse().expect("an address")], good: true };
        let ips = |list: &[&str]| list.iter().map(|ip| ip.parse().expect("an IP")).collect::<Vec<IpAddr>>();
        let all = ips(&["192.0.2.1", "198.51.100.1", "2001:db8::1"]);
        assert_eq!(kept(&remotes, [&known, &again].into_iter()), all);
        assert_eq!(kept(&remotes[1..2], [].into_iter()), ips(&[]));
    }

    #[test]
    fn durations_for_people() {
        for (millis, text) in [(300_000, "5 min"), (90_000, "90 s"), (5_000, "5 s"), (1_500, "1.5 s")] {
            assert_eq!(spoken(Duration::from_millis(millis)), text);
        }
    }
}
