//! Connecting on demand: when there is a tunnel process, who reads the device, and what becomes of packets meanwhile.
//! Pure: no clock, no I/O.
//!
//! ```text
//!            +------------------ it ended -------------------- Leaving
//!            v                                                    ^
//!         Asleep --a packet that matches--> Waking --session--> Up | idle
//!                                            | ^  <--lost-------+
//!                              give_up later | | a packet, after a while or elsewhere
//!                                            v |
//!                               GivingUp -> GivenUp (packets are answered with "unreachable")
//! ```
//! Asleep and GivenUp there is no tunnel process, and the supervisor reads the device. In every other state what comes
//! waits in the device's queue, or the tunnel process reads it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

use super::wake::{self, Wake};
use crate::budget::Budget;
use crate::segment::{addresses, is_broadcast, is_from, unreachable};
use crate::time::Time;
use crate::wire::vnet::VNET_LEN;

/// The states of a connection on demand.
///
/// - getters: [`listens`](OnDemand::listens), [`state`](OnDemand::state), [`held`](OnDemand::held)
/// - commands: [`set_servers`](OnDemand::set_servers), [`set_networks`](OnDemand::set_networks)
/// - `handle_*`: [`handle_packet`](OnDemand::handle_packet), [`handle_held_sent`](OnDemand::handle_held_sent),
///   [`handle_established`](OnDemand::handle_established), [`handle_lost`](OnDemand::handle_lost),
///   [`handle_leaving`](OnDemand::handle_leaving), [`handle_ended`](OnDemand::handle_ended),
///   [`handle_network_changed`](OnDemand::handle_network_changed), [`handle_timeout`](OnDemand::handle_timeout)
/// - `poll_*`: [`poll_answer`](OnDemand::poll_answer), [`poll_timeout`](OnDemand::poll_timeout)
#[derive(Clone, Debug)]
pub struct OnDemand {
    wake: Wake,
    give_up: Duration,
    state: State,
    /// The packet that woke us, as it came from the device, to be sent before anything else of it.
    held: Option<Vec<u8>>,
    /// Where servers are: packets to them are the tunnel's own.
    servers: Vec<SocketAddr>,
    /// Our inner addresses and the subnets behind us.
    own: Vec<IpNet>,
    /// The networks that those addresses are in.
    networks: Vec<IpNet>,
    /// Given up so many times since the last session.
    failures: u32,
    answers: VecDeque<Vec<u8>>,
    allowance: Budget,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Asleep,
    /// Until when; without an end where nobody can be waiting, as there are no addresses yet.
    Waking(Option<Time>),
    Up,
    /// Until when the tunnel process may take.
    Leaving(Time),
    GivingUp(Time),
    GivenUp {
        /// No packet brings up a tunnel before.
        until: Time,
        /// But it does if this host is elsewhere now.
        moved: bool,
    },
}

/// What becomes of a packet from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is dropped: nothing to wake for.
    Ignored,
    /// It is dropped: its source is none of ours, and the server wouldn't take it.
    NotOurs,
    /// It is held, and a tunnel process is to be started.
    Wakes,
    /// It is dropped: there is no session, and none is tried for now.
    Refused,
}

/// What follows from the end of a tunnel process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Another one is needed.
    Again,
    /// None is needed until a packet comes.
    Asleep,
    /// None until a packet comes after a while; the device's queue is to be read and answered.
    GivenUp,
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// The tunnel process is to stop: no session came of it.
    Stop,
    /// It didn't stop.
    Kill,
}

impl OnDemand {
    /// With a device that is set up it sleeps; without addresses (`known`) a first connection is to be made.
    pub fn new(wake: Wake, give_up: Duration, known: bool, now: Time) -> OnDemand {
        OnDemand {
            wake,
            give_up,
            state: if known { State::Asleep } else { State::Waking(None) },
            held: None,
            servers: Vec::new(),
            own: Vec::new(),
            networks: Vec::new(),
            failures: 0,
            answers: VecDeque::new(),
            allowance: Budget::new(ANSWERS, ANSWER_EVERY, now),
        }
    }

    /// Whether the device is the supervisor's to read, as there is no tunnel process.
    pub fn listens(&self) -> bool {
        matches!(self.state, State::Asleep | State::GivenUp { .. })
    }

    /// The state's name, for the status.
    pub fn state(&self) -> &'static str {
        match self.state {
            State::Asleep => "asleep",
            State::Waking(_) => "waking",
            State::Up => "up",
            State::Leaving(_) => "falling asleep",
            State::GivingUp(_) | State::GivenUp { .. } => "gave up",
        }
    }

    /// What the next tunnel process is to send first.
    pub fn held(&self) -> &[Vec<u8>] {
        self.held.as_slice()
    }

    /// Where servers are, as far as that is known.
    pub fn set_servers(&mut self, servers: Vec<SocketAddr>) {
        self.servers = servers;
    }

    /// Our inner addresses, with their networks' prefix lengths, and the subnets behind us.
    pub fn set_networks(&mut self, addresses: &[IpNet], subnets: &[IpNet]) {
        self.networks = addresses.to_vec();
        self.own =
            addresses.iter().map(|address| address.addr().into()).chain(subnets.iter().copied()).collect();
    }

    /// A packet, behind its virtio header, came from the device while it is ours to read.
    pub fn handle_packet(&mut self, now: Time, read: &[u8]) -> Verdict {
        let packet = read.get(VNET_LEN..).unwrap_or_default();
        let noise = self.is_own(packet) || is_broadcast(packet, &self.networks);
        if noise || !self.wake.matches(packet) {
            return Verdict::Ignored;
        }
        // Such as the kernel's answers to strangers who try the host's other addresses, with the default route ours.
        if !is_from(packet, &self.own) {
            return Verdict::NotOurs;
        }
        if let State::GivenUp { until, moved } = self.state
            && !moved
            && now < until
        {
            self.refuse(now, packet);
            return Verdict::Refused;
        }
        self.held = Some(read.to_vec());
        self.state = State::Waking(Some(now + self.give_up));
        Verdict::Wakes
    }

    /// What the kernel still says on connections of a tunnel process that ended.
    fn is_own(&self, packet: &[u8]) -> bool {
        wake::destination(packet).is_some_and(|(ip, port)| {
            self.servers.iter().any(|server| server.ip() == ip && Some(server.port()) == port)
        })
    }

    /// What was held has been sent.
    pub fn handle_held_sent(&mut self) {
        self.held = None;
    }

    /// There is a session.
    pub fn handle_established(&mut self) {
        if let State::Waking(_) = self.state {
            self.state = State::Up;
            self.failures = 0;
        }
    }

    /// There is none any more; the tunnel process looks for another.
    pub fn handle_lost(&mut self, now: Time) {
        if self.state == State::Up {
            self.state = State::Waking(Some(now + self.give_up));
        }
    }

    /// The tunnel process ends, as nobody needs it.
    pub fn handle_leaving(&mut self, now: Time) {
        if let State::Up | State::Waking(_) = self.state {
            self.state = State::Leaving(now + LEAVE_WITHIN);
        }
    }

    /// The tunnel process is gone, for whatever reason.
    pub fn handle_ended(&mut self, now: Time) -> Ended {
        match self.state {
            State::Up => {
                self.handle_lost(now);
                Ended::Again
            }
            State::Waking(_) => Ended::Again,
            // Not one packet is left behind.
            State::Leaving(_) if self.held.is_some() => {
                self.state = State::Waking(Some(now + self.give_up));
                Ended::Again
            }
            State::Leaving(_) | State::Asleep => {
                self.state = State::Asleep;
                Ended::Asleep
            }
            State::GivingUp(_) => {
                let wait = (FIRST_WAIT * 2u32.pow(self.failures.min(10))).min(LONGEST_WAIT);
                self.failures = self.failures.saturating_add(1);
                self.state = State::GivenUp { until: now + wait, moved: false };
                if let Some(read) = self.held.take() {
                    self.refuse(now, read.get(VNET_LEN..).unwrap_or_default());
                }
                Ended::GivenUp
            }
            State::GivenUp { .. } => Ended::GivenUp,
        }
    }

    /// This host has other addresses or routes than before.
    pub fn handle_network_changed(&mut self) {
        if let State::GivenUp { moved, .. } = &mut self.state {
            *moved = true;
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Time) -> Option<Due> {
        match self.state {
            State::Waking(Some(until)) if until <= now => {
                // The machine slept through it, and couldn't try.
                if now.since(until) > LATE {
                    self.state = State::Waking(Some(now + self.give_up));
                    return None;
                }
                self.state = State::GivingUp(now + LEAVE_WITHIN);
                Some(Due::Stop)
            }
            State::Leaving(until) | State::GivingUp(until) if until <= now => {
                // It is not asked for twice in a row.
                let later = now + LEAVE_WITHIN;
                self.state = match self.state {
                    State::Leaving(_) => State::Leaving(later),
                    _ => State::GivingUp(later),
                };
                Some(Due::Kill)
            }
            _ => None,
        }
    }

    /// When [`OnDemand::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        match self.state {
            State::Waking(until) => until,
            State::Leaving(until) | State::GivingUp(until) => Some(until),
            State::Asleep | State::Up | State::GivenUp { .. } => None,
        }
    }

    /// The next packet for the device: an answer to one that won't be sent.
    pub fn poll_answer(&mut self) -> Option<Vec<u8>> {
        self.answers.pop_front()
    }

    /// Tells the packet's sender, as if its destination did: this host expects packets from there.
    fn refuse(&mut self, now: Time, packet: &[u8]) {
        let answer = addresses(packet).and_then(|(_, from)| unreachable(packet, from));
        self.answers.extend(answer.filter(|_| self.allowance.take(now)));
    }
}

/// A goodbye takes a second at most.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);
/// Nobody who is awake looks at the time so late.
const LATE: Duration = Duration::from_secs(5);
/// After giving up, packets are refused for so long.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Answers at once, and how often one more.
const ANSWERS: u32 = 100;
const ANSWER_EVERY: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::wake::tests::v4;
    use super::*;

    const GIVE_UP: Duration = Duration::from_secs(30);

    fn at(millis: u64) -> Time {
        Time::default() + Duration::from_millis(millis)
    }

    fn new(known: bool) -> OnDemand {
        let mut demand = OnDemand::new(Wake::default(), GIVE_UP, known, at(0));
        let nets = ["10.9.0.2/24", "192.168.7.0/24"].map(|net| net.parse().expect("a network"));
        demand.set_networks(&nets[..1], &nets[1..]);
        demand
    }

    fn from_to(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
        [vec![0; VNET_LEN], v4(source, destination, 17, 7)].concat()
    }

    /// A datagram to `port`, as it comes from the device.
    fn read(port: u16) -> Vec<u8> {
        [vec![0; VNET_LEN], v4([10, 9, 0, 2], [10, 9, 0, 1], 17, port)].concat()
    }

    fn noise() -> Vec<u8> {
        [vec![0; VNET_LEN], v4([10, 9, 0, 2], [224, 0, 0, 251], 17, 5353)].concat()
    }

    #[test]
    fn a_packet_wakes_and_idleness_ends_it() {
        let mut demand = new(true);
        assert!(demand.listens());
        assert_eq!(demand.handle_packet(at(0), &noise()), Verdict::Ignored);
        assert_eq!(demand.handle_packet(at(0), &[0; 3]), Verdict::Ignored);
        assert_eq!(demand.handle_packet(at(10), &read(7)), Verdict::Wakes);
        assert!(!demand.listens());
        assert_eq!(demand.held(), [read(7)]);
        demand.handle_held_sent();
        demand.handle_established();
        assert_eq!((demand.poll_timeout(), demand.held().len()), (None, 0));
        demand.handle_leaving(at(60_000));
        assert!(!demand.listens(), "what comes waits in the device");
        assert_eq!(demand.handle_ended(at(60_050)), Ended::Asleep);
        assert!(demand.listens());
        assert_eq!(demand.handle_packet(at(60_060), &read(8)), Verdict::Wakes);
    }

    #[test]
    fn a_process_that_dies_has_its_packets_sent_by_the_next() {
        let mut demand = new(true);
        demand.handle_packet(at(0), &read(7));
        assert_eq!(demand.handle_ended(at(100)), Ended::Again);
        assert_eq!(demand.held(), [read(7)]);
        demand.handle_established();
        assert_eq!(demand.handle_ended(at(200)), Ended::Again);
        assert_eq!(demand.held(), [read(7)], "it didn't say that it sent it");
        demand.handle_held_sent();
        demand.handle_established();
        demand.handle_lost(at(1_000));
        assert_eq!(demand.poll_timeout(), Some(at(31_000)));
    }

    #[test]
    fn senders_are_told_after_a_while_and_the_next_packet_tries_again() {
        let mut demand = new(true);
        demand.handle_packet(at(0), &read(7));
        assert_eq!(demand.handle_timeout(at(29_999)), None);
        assert_eq!(demand.handle_timeout(at(30_000)), Some(Due::Stop));
        assert!(!demand.listens());
        demand.handle_established();
        assert_eq!(demand.handle_ended(at(30_010)), Ended::GivenUp, "it was told to stop already");
        assert!(demand.listens() && demand.held().is_empty());
        assert!(demand.poll_answer().is_some_and(|answer| answer[20..22] == [3, 1]));
        // What waited in the device.
        assert_eq!(demand.handle_packet(at(30_020), &read(8)), Verdict::Refused);
        assert!(demand.poll_answer().is_some());
        assert_eq!(demand.handle_packet(at(30_020), &noise()), Verdict::Ignored);
        assert_eq!(demand.poll_answer(), None);
        assert_eq!(demand.handle_packet(at(31_010), &read(9)), Verdict::Wakes);
        // The next wait is longer, unless the host moves.
        assert_eq!(demand.handle_timeout(at(61_010)), Some(Due::Stop));
        assert_eq!(demand.handle_ended(at(61_010)), Ended::GivenUp);
        assert_eq!(demand.handle_packet(at(63_000), &read(9)), Verdict::Refused);
        demand.handle_network_changed();
        assert_eq!(demand.handle_packet(at(63_001), &read(9)), Verdict::Wakes);
    }

    #[test]
    fn answers_are_bounded_and_given_to_hosts_only() {
        let mut demand = new(true);
        demand.handle_packet(at(0), &read(7));
        demand.handle_timeout(at(30_000));
        demand.handle_ended(at(30_000));
        for _ in 0..1_000 {
            demand.handle_packet(at(30_001), &read(7));
        }
        assert_eq!(std::iter::from_fn(|| demand.poll_answer()).count(), 100);
        // An ICMP error is no question.
        let mut error = v4([10, 9, 0, 2], [10, 9, 0, 1], 1, 0);
        error[20] = 3;
        let error = [vec![0; VNET_LEN], error].concat();
        assert_eq!(demand.handle_packet(at(30_900), &error), Verdict::Refused);
        assert_eq!(demand.poll_answer(), None);
    }

    #[test]
    fn a_machine_that_slept_tries_first() {
        let mut demand = new(true);
        demand.handle_packet(at(0), &read(7));
        assert_eq!(demand.handle_timeout(at(3_600_000)), None);
        assert_eq!(demand.poll_timeout(), Some(at(3_630_000)));
        assert_eq!(demand.handle_timeout(at(3_630_000)), Some(Due::Stop));
    }

    #[test]
    fn a_process_that_does_not_leave_is_killed() {
        let mut demand = new(true);
        demand.handle_packet(at(0), &read(7));
        demand.handle_held_sent();
        demand.handle_established();
        demand.handle_leaving(at(1_000));
        assert_eq!(demand.handle_timeout(at(3_999)), None);
        assert_eq!(demand.handle_timeout(at(4_000)), Some(Due::Kill));
        assert_eq!(demand.handle_timeout(at(4_001)), None);
        assert_eq!(demand.handle_ended(at(4_010)), Ended::Asleep);
    }

    #[test]
    fn without_addresses_nobody_waits() {
        let mut demand = new(false);
        assert!(!demand.listens());
        assert_eq!(demand.poll_timeout(), None);
        assert_eq!(demand.handle_ended(at(90_000)), Ended::Again);
        demand.handle_established();
        demand.handle_lost(at(100_000));
        assert_eq!(demand.poll_timeout(), Some(at(130_000)));
    }

    #[test]
    fn the_tunnels_own_packets_wake_nobody() {
        let mut demand = new(true);
        demand.set_servers(vec!["10.9.0.1:55555".parse().expect("an address")]);
        assert_eq!(demand.handle_packet(at(0), &read(55_555)), Verdict::Ignored);
        assert_eq!(demand.handle_packet(at(0), &read(22)), Verdict::Wakes);
    }

    #[test]
    fn only_what_is_ours_wakes_or_is_answered() {
        let gate = [10, 9, 0, 1];
        let mut demand = new(true);
        assert_eq!(demand.handle_packet(at(0), &from_to([198, 18, 1, 2], gate)), Verdict::NotOurs);
        assert_eq!(demand.handle_packet(at(0), &from_to([10, 9, 0, 3], gate)), Verdict::NotOurs);
        assert_eq!(demand.handle_packet(at(0), &from_to([10, 9, 0, 2], [10, 9, 0, 255])), Verdict::Ignored);
        assert_eq!(demand.handle_packet(at(0), &from_to([192, 168, 7, 9], gate)), Verdict::Wakes, "a subnet");
        demand.handle_timeout(at(30_000));
        demand.handle_ended(at(30_000));
        assert!(demand.poll_answer().is_some());
        assert_eq!(demand.handle_packet(at(30_001), &from_to([198, 18, 1, 2], gate)), Verdict::NotOurs);
        assert_eq!(
            demand.handle_packet(at(30_001), &from_to([10, 9, 0, 2], [10, 9, 0, 255])),
            Verdict::Ignored
        );
        assert_eq!(demand.poll_answer(), None);
        // Other addresses.
        demand.set_networks(&["10.8.0.2/24".parse().expect("a network")], &[]);
        assert_eq!(demand.handle_packet(at(90_000), &read(7)), Verdict::NotOurs);
        assert_eq!(demand.handle_packet(at(90_000), &from_to([10, 8, 0, 2], gate)), Verdict::Wakes);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Packet,
        Noise,
        HeldSent,
        Established,
        Lost,
        Leaving,
        Ended,
        Moved,
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Packet),
            1 => Just(Step::Noise),
            2 => Just(Step::HeldSent),
            2 => Just(Step::Established),
            1 => Just(Step::Lost),
            1 => Just(Step::Leaving),
            2 => Just(Step::Ended),
            1 => Just(Step::Moved),
            3 => (0u64..40_000).prop_map(Step::Wait),
        ]
    }

    proptest! {
        #[test]
        fn no_packet_is_lost(known in any::<bool>(), steps in proptest::collection::vec(step(), 0..200)) {
            let mut demand = new(known);
            let (mut now, mut next, mut sent) = (0, 1u16, Vec::new());
            let mut process = !known;
            for step in steps {
                match step {
                    Step::Packet | Step::Noise if demand.listens() => {
                        prop_assert!(!process, "two readers");
                        let packet = if let Step::Packet = step { read(next) } else { noise() };
                        match demand.handle_packet(at(now), &packet) {
                            Verdict::Wakes => process = true,
                            Verdict::Refused => sent.push(next),
                            Verdict::Ignored | Verdict::NotOurs => continue,
                        }
                        next += 1;
                    }
                    Step::HeldSent if process => {
                        sent.extend(demand.held().iter().map(|p| u16::from_be_bytes([p[32], p[33]])));
                        demand.handle_held_sent();
                    }
                    Step::Established if process && demand.held().is_empty() => demand.handle_established(),
                    Step::Lost if process => demand.handle_lost(at(now)),
                    Step::Leaving if process && demand.held().is_empty() => demand.handle_leaving(at(now)),
                    Step::Ended if process => {
                        let held = demand.held().to_vec();
                        process = demand.handle_ended(at(now)) == Ended::Again;
                        if demand.held().is_empty() {
                            sent.extend(held.iter().map(|p| u16::from_be_bytes([p[32], p[33]])));
                        }
                    }
                    Step::Moved => demand.handle_network_changed(),
                    Step::Wait(millis) => now += millis,
                    _ => {}
                }
                if demand.handle_timeout(at(now)).is_some() {
                    prop_assert!(process, "there is nothing to stop");
                }
                prop_assert!(demand.poll_timeout().is_none_or(|due| due > at(now)));
                prop_assert_eq!(process, !demand.listens());
                while demand.poll_answer().is_some() {}
            }
            sent.extend(demand.held().iter().map(|p| u16::from_be_bytes([p[32], p[33]])));
            prop_assert_eq!(sent, (1..next).collect::<Vec<_>>());
        }
    }
}
