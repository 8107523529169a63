//! What a client that connects on demand counts: how often it was woken and by what, how long its packets waited then,
//! and what became of them. Shown by `tunguard status`.
//!
//! ```text
//!   asleep --woken--> waking --established--> up --first_answer--> up --asleep--> asleep
//!                       +--gave_up--> (waits for the next packet)
//! ```

use std::collections::VecDeque;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};

use crate::segment::inner::{self, TCP, UDP};
use crate::time::Time;

/// The counters, and the wakes last seen.
#[derive(Clone, Debug, Default)]
pub struct Starts {
    causes: [u64; WakeClass::ALL.len()],
    sleeps: [u64; SleepReason::ALL.len()],
    drops: [u64; HeldDrop::ALL.len()],
    held: u64,
    gave_up: u64,
    cold: Waits,
    warm: Waits,
    /// The newest last.
    recent: VecDeque<Wake>,
    /// When the client was woken, unless it sleeps.
    awake: Option<Time>,
    awake_for: Duration,
}

/// How long packets waited after a wake.
#[derive(Clone, Debug, Default)]
struct Waits {
    wakes: u64,
    /// Until those that were held were sent.
    first_packet: Histogram,
    /// Until something came back.
    first_answer: Histogram,
}

#[derive(Clone, Debug)]
struct Wake {
    at: Time,
    cause: WakeCause,
    warm: bool,
    sent: Option<Duration>,
    answered: Option<Duration>,
    over: bool,
}

impl Starts {
    /// A packet woke the client. `warm`: it has a ticket to resume its TLS session with.
    pub fn woken(&mut self, now: Time, cause: WakeCause, warm: bool) {
        self.end_wake();
        self.causes[cause.class as usize] += 1;
        self.waits(warm).wakes += 1;
        self.awake.get_or_insert(now);
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(Wake { at: now, cause, warm, sent: None, answered: None, over: false });
    }

    /// There is a session, and what was held goes out.
    pub fn established(&mut self, now: Time) {
        let Some(wake) = self.recent.back_mut().filter(|wake| !wake.over && wake.sent.is_none()) else {
            return;
        };
        let (wait, warm) = (now.since(wake.at), wake.warm);
        wake.sent = Some(wait);
        self.waits(warm).first_packet.add(wait);
    }

    /// A packet came by the session, the first one since the wake.
    pub fn first_answer(&mut self, now: Time) {
        let unanswered = |wake: &&mut Wake| !wake.over && wake.sent.is_some() && wake.answered.is_none();
        let Some(wake) = self.recent.back_mut().filter(unanswered) else { return };
        let (wait, warm) = (now.since(wake.at), wake.warm);
        wake.answered = Some(wait);
        self.waits(warm).first_answer.add(wait);
    }

    /// So many packets wait for a session.
    pub fn held(&mut self, packets: u64) {
        self.held += packets;
    }

    /// So many packets won't be sent.
    pub fn dropped(&mut self, why: HeldDrop, packets: u64) {
        self.drops[why as usize] += packets;
    }

    /// The client sleeps from now on.
    pub fn asleep(&mut self, now: Time, why: SleepReason) {
        self.sleeps[why as usize] += 1;
        self.end_awake(now);
    }

    /// No session came of the wake; the client tries no more until the next packet.
    pub fn gave_up(&mut self, now: Time) {
        self.gave_up += 1;
        self.end_awake(now);
    }

    /// For the status.
    pub fn to_json(&self, now: Time) -> Value {
        let awake = self.awake_for + self.awake.map_or(Duration::ZERO, |since| now.since(since));
        json!({
            "wakes": self.cold.wakes + self.warm.wakes,
            "established": self.cold.first_packet.count() + self.warm.first_packet.count(),
            "gave_up": self.gave_up,
            "held_packets": self.held,
            "awake_ms": millis(awake),
            "causes": counts(&WakeClass::ALL, WakeClass::name, &self.causes),
            "sleeps": counts(&SleepReason::ALL, SleepReason::name, &self.sleeps),
            "drops": counts(&HeldDrop::ALL, HeldDrop::name, &self.drops),
            "cold": self.cold.to_json(),
            "warm": self.warm.to_json(),
            "recent": self.recent.iter().rev().map(|wake| wake.to_json(now)).collect::<Vec<_>>(),
        })
    }

    fn waits(&mut self, warm: bool) -> &mut Waits {
        if warm { &mut self.warm } else { &mut self.cold }
    }

    fn end_awake(&mut self, now: Time) {
        self.end_wake();
        if let Some(since) = self.awake.take() {
            self.awake_for += now.since(since);
        }
    }

    /// What comes later is another wake's.
    fn end_wake(&mut self) {
        if let Some(wake) = self.recent.back_mut() {
            wake.over = true;
        }
    }
}

impl Waits {
    fn to_json(&self) -> Value {
        json!({
            "wakes": self.wakes,
            "first_packet": self.first_packet.to_json(),
            "first_answer": self.first_answer.to_json(),
        })
    }
}

impl Wake {
    fn to_json(&self, now: Time) -> Value {
        json!({
            "ago_ms": millis(now.since(self.at)),
            "cause": self.cause.class.name(),
            "packet": self.cause.text,
            "warm": self.warm,
            "first_packet_ms": self.sent.map(millis),
            "first_answer_ms": self.answered.map(millis),
        })
    }
}

/// What woke the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WakeCause {
    class: WakeClass,
    text: String,
}

impl WakeCause {
    /// The inner packet that did. It was made on this host, but by anybody.
    pub fn of(packet: &[u8]) -> WakeCause {
        let Some((source, destination)) = inner::addresses(packet) else {
            return WakeCause { class: WakeClass::Other, text: "no IP packet".to_owned() };
        };
        let (protocol, rest) = match inner::carried(packet) {
            Ok((protocol, at)) => (protocol, packet.get(at..).unwrap_or_default()),
            Err(_) => {
                let text = format!("fragment {source} > {destination}");
                return WakeCause { class: WakeClass::Other, text };
            }
        };
        let mut text = String::new();
        let class = match (protocol, rest) {
            (TCP | UDP, &[a, b, c, d, ..]) => {
                let (from, to) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                let name = if protocol == TCP { "tcp" } else { "udp" };
                let (from, to) = (SocketAddr::new(source, from), SocketAddr::new(destination, to));
                let _ = write!(text, "{name} {from} > {to}");
                WakeClass::of_port(protocol, to)
            }
            (ICMP, [kind, ..]) | (ICMPV6, [kind, ..]) => {
                let _ = write!(text, "icmp {source} > {destination} type {kind}");
                let echo = [(ICMP, ECHO), (ICMPV6, ECHO_V6)].contains(&(protocol, *kind));
                if echo { WakeClass::Ping } else { WakeClass::Icmp }
            }
            _ => {
                let _ = write!(text, "protocol {protocol} {source} > {destination}");
                WakeClass::Other
            }
        };
        let class = if is_group(destination) { WakeClass::Group } else { class };
        WakeCause { class, text }
    }

    /// Something else than a packet, in a few words.
    pub fn without_packet(text: &str) -> WakeCause {
        WakeCause { class: WakeClass::NoPacket, text: text.chars().take(MAX_TEXT).collect() }
    }

    /// What kind of packet it was.
    pub fn class(&self) -> WakeClass {
        self.class
    }
}

/// Kinds of packets that wake: a few, whatever is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WakeClass {
    /// Name resolution: port 53 or 853.
    Dns,
    /// Port 80, 443, 8080 or 8443, QUIC included.
    Web,
    /// TCP port 22.
    Ssh,
    /// UDP port 123.
    Ntp,
    /// Any other TCP.
    Tcp,
    /// Any other UDP.
    Udp,
    /// An echo request.
    Ping,
    /// Any other ICMP.
    Icmp,
    /// To a multicast or broadcast address.
    Group,
    /// Anything else.
    Other,
    /// No packet at all.
    NoPacket,
}

impl WakeClass {
    /// All kinds, in the order of their numbers.
    pub const ALL: [WakeClass; 11] = [
        WakeClass::Dns,
        WakeClass::Web,
        WakeClass::Ssh,
        WakeClass::Ntp,
        WakeClass::Tcp,
        WakeClass::Udp,
        WakeClass::Ping,
        WakeClass::Icmp,
        WakeClass::Group,
        WakeClass::Other,
        WakeClass::NoPacket,
    ];

    /// The name in the status.
    pub fn name(self) -> &'static str {
        match self {
            WakeClass::Dns => "dns",
            WakeClass::Web => "web",
            WakeClass::Ssh => "ssh",
            WakeClass::Ntp => "ntp",
            WakeClass::Tcp => "tcp",
            WakeClass::Udp => "udp",
            WakeClass::Ping => "ping",
            WakeClass::Icmp => "icmp",
            WakeClass::Group => "group",
            WakeClass::Other => "other",
            WakeClass::NoPacket => "no_packet",
        }
    }

    fn of_port(protocol: u8, to: SocketAddr) -> WakeClass {
        match (protocol, to.port()) {
            (_, 53 | 853) => WakeClass::Dns,
            (_, 80 | 443 | 8080 | 8443) => WakeClass::Web,
            (TCP, 22) => WakeClass::Ssh,
            (UDP, 123) => WakeClass::Ntp,
            (TCP, _) => WakeClass::Tcp,
            _ => WakeClass::Udp,
        }
    }
}

/// Why a client goes to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SleepReason {
    /// Nothing was sent or received for as long as is configured.
    Idle,
    /// The server ended the session.
    Server,
}

impl SleepReason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [SleepReason; 2] = [SleepReason::Idle, SleepReason::Server];

    /// The name in the status.
    pub fn name(self) -> &'static str {
        match self {
            SleepReason::Idle => "idle",
            SleepReason::Server => "server",
        }
    }
}

/// Why a packet that came while there was no session isn't sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldDrop {
    /// No session came.
    GaveUp,
    /// It is nothing to wake for.
    NoWake,
    /// Its source is none of our addresses, nor in a subnet behind us.
    SourceNotOurs,
}

impl HeldDrop {
    /// All reasons, in the order of their numbers.
    pub const ALL: [HeldDrop; 3] = [HeldDrop::GaveUp, HeldDrop::NoWake, HeldDrop::SourceNotOurs];

    /// The name in the status.
    pub fn name(self) -> &'static str {
        match self {
            HeldDrop::GaveUp => "gave_up",
            HeldDrop::NoWake => "no_wake",
            HeldDrop::SourceNotOurs => "source_not_ours",
        }
    }
}

/// How often something took how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Histogram {
    /// One more than there are bounds: the last is for what took longer than any of them.
    counts: [u64; AT_MOST_MS.len() + 1],
    worst: Duration,
}

impl Histogram {
    fn add(&mut self, took: Duration) {
        let place = AT_MOST_MS.iter().position(|most| took <= Duration::from_millis(*most));
        self.counts[place.unwrap_or(AT_MOST_MS.len())] += 1;
        self.worst = self.worst.max(took);
    }

    fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// A bound for half of them; `None` without any, or where it is beyond the last.
    fn median_at_most(&self) -> Option<u64> {
        let half = self.count().div_ceil(2);
        let mut seen = 0;
        let place = self.counts.iter().position(|count| {
            seen += count;
            half > 0 && seen >= half
        });
        AT_MOST_MS.get(place?).copied()
    }

    fn to_json(self) -> Value {
        let bounds = AT_MOST_MS.iter().map(|most| Some(*most)).chain([None]);
        let buckets = bounds.zip(self.counts).map(|(most, n)| json!({ "at_most_ms": most, "count": n }));
        json!({
            "count": self.count(),
            "median_at_most_ms": self.median_at_most(),
            "worst_ms": (self.count() > 0).then(|| millis(self.worst)),
            "buckets": buckets.collect::<Vec<_>>(),
        })
    }
}

fn counts<T: Copy>(all: &[T], name: fn(T) -> &'static str, counts: &[u64]) -> Value {
    let some = all.iter().zip(counts).filter(|(_, n)| **n > 0);
    Value::Object(some.map(|(one, n)| (name(*one).to_owned(), Value::from(*n))).collect())
}

fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// A packet to many.
fn is_group(destination: IpAddr) -> bool {
    destination.is_multicast() || destination == IpAddr::V4(std::net::Ipv4Addr::BROADCAST)
}

/// Bounds of the histograms' buckets.
const AT_MOST_MS: [u64; 12] = [5, 10, 20, 30, 60, 100, 200, 500, 1_000, 2_000, 5_000, 10_000];
/// Wakes that are shown one by one.
const RECENT: usize = 16;
const MAX_TEXT: usize = 100;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const ECHO: u8 = 8;
const ECHO_V6: u8 = 128;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(millis: u64) -> Time {
        Time::default() + Duration::from_millis(millis)
    }

    fn v4(protocol: u8, destination: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 9, 0, 2];
        packet.extend(destination);
        packet.extend(payload);
        packet[3] = packet.len() as u8;
        packet
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 64];
        packet.extend([0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        packet.extend([0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        packet.extend(payload);
        packet
    }

    fn ports(to: u16) -> Vec<u8> {
        [&4000u16.to_be_bytes()[..], &to.to_be_bytes(), &[0; 16]].concat()
    }

    #[test]
    fn a_cause_is_named_by_its_destination() {
        let gate = [10, 9, 0, 1];
        for (packet, class, text) in [
            (v4(17, gate, &ports(53)), WakeClass::Dns, "udp 10.9.0.2:4000 > 10.9.0.1:53"),
            (v4(6, gate, &ports(443)), WakeClass::Web, "tcp 10.9.0.2:4000 > 10.9.0.1:443"),
            (v4(6, gate, &ports(22)), WakeClass::Ssh, "tcp 10.9.0.2:4000 > 10.9.0.1:22"),
            (v4(17, gate, &ports(22)), WakeClass::Udp, "udp 10.9.0.2:4000 > 10.9.0.1:22"),
            (v4(17, gate, &ports(123)), WakeClass::Ntp, "udp 10.9.0.2:4000 > 10.9.0.1:123"),
            (v4(6, gate, &ports(9)), WakeClass::Tcp, "tcp 10.9.0.2:4000 > 10.9.0.1:9"),
            (v4(1, gate, &[8, 0]), WakeClass::Ping, "icmp 10.9.0.2 > 10.9.0.1 type 8"),
            (v4(1, gate, &[3, 0]), WakeClass::Icmp, "icmp 10.9.0.2 > 10.9.0.1 type 3"),
            (v4(17, [224, 0, 0, 251], &ports(53)), WakeClass::Group, "udp 10.9.0.2:4000 > 224.0.0.251:53"),
            (v4(47, gate, &[]), WakeClass::Other, "protocol 47 10.9.0.2 > 10.9.0.1"),
            (v4(6, gate, &[1]), WakeClass::Other, "protocol 6 10.9.0.2 > 10.9.0.1"),
            (v6(17, &ports(53)), WakeClass::Dns, "udp [fd09::2]:4000 > [fd09::1]:53"),
            (v6(58, &[128]), WakeClass::Ping, "icmp fd09::2 > fd09::1 type 128"),
            (v6(44, &[6, 0, 0, 1, 0, 0, 0, 0]), WakeClass::Other, "fragment fd09::2 > fd09::1"),
            (vec![], WakeClass::Other, "no IP packet"),
        ] {
            let cause = WakeCause::of(&packet);
            assert_eq!((cause.class(), &cause.text[..]), (class, text));
        }
        assert_eq!(WakeCause::without_packet(&"é".repeat(500)).text.chars().count(), MAX_TEXT);
    }

    #[test]
    fn a_day_of_a_client() {
        let mut starts = Starts::default();
        let ping = || WakeCause::of(&v4(1, [10, 9, 0, 1], &[8, 0]));
        starts.woken(at(1_000), ping(), false);
        starts.held(3);
        starts.dropped(HeldDrop::SourceNotOurs, 2);
        starts.established(at(1_055));
        starts.first_answer(at(1_070));
        starts.first_answer(at(1_500));
        starts.asleep(at(2_000), SleepReason::Idle);
        starts.woken(at(3_000), ping(), true);
        starts.established(at(3_004));
        starts.asleep(at(3_500), SleepReason::Idle);
        // It comes too late to be that wake's.
        starts.first_answer(at(3_600));
        starts.woken(at(4_000), WakeCause::without_packet("start"), false);
        starts.gave_up(at(4_700));
        starts.established(at(4_800));
        let said = starts.to_json(at(5_000));
        for (place, value) in [
            ("/wakes", json!(3)),
            ("/established", json!(2)),
            ("/gave_up", json!(1)),
            ("/held_packets", json!(3)),
            ("/awake_ms", json!(2_200.0)),
            ("/causes", json!({ "ping": 2, "no_packet": 1 })),
            ("/sleeps", json!({ "idle": 2 })),
            ("/drops", json!({ "source_not_ours": 2 })),
            ("/cold/wakes", json!(2)),
            ("/cold/first_packet/count", json!(1)),
            ("/cold/first_packet/worst_ms", json!(55.0)),
            ("/cold/first_packet/median_at_most_ms", json!(60)),
            ("/cold/first_answer/worst_ms", json!(70.0)),
            ("/warm/wakes", json!(1)),
            ("/warm/first_packet/buckets/0", json!({ "at_most_ms": 5, "count": 1 })),
            ("/warm/first_answer/count", json!(0)),
            ("/warm/first_answer/worst_ms", Value::Null),
            ("/warm/first_answer/median_at_most_ms", Value::Null),
            ("/recent/0/packet", json!("start")),
            ("/recent/0/first_packet_ms", Value::Null),
            ("/recent/1/warm", json!(true)),
            ("/recent/2/ago_ms", json!(4_000.0)),
            ("/recent/2/first_answer_ms", json!(70.0)),
        ] {
            assert_eq!(said.pointer(place), Some(&value), "{place}");
        }
    }

    #[test]
    fn buckets_end_at_their_bounds() {
        let mut histogram = Histogram::default();
        for took in [0, 5_000, 5_001, 10_000_000, 10_000_001, 99_000_000] {
            histogram.add(Duration::from_micros(took));
        }
        let counts = histogram.counts;
        assert_eq!((counts[0], counts[1], counts[11], counts[12]), (2, 1, 1, 2));
        assert_eq!(histogram.median_at_most(), Some(10));
        histogram.add(Duration::from_secs(60));
        histogram.add(Duration::from_secs(60));
        histogram.add(Duration::from_secs(60));
        assert_eq!(histogram.median_at_most(), None, "beyond the last bound");
    }

    #[test]
    fn names_are_each_at_their_own_place() {
        assert!(WakeClass::ALL.into_iter().enumerate().all(|(place, class)| class as usize == place));
        assert!(SleepReason::ALL.into_iter().enumerate().all(|(place, why)| why as usize == place));
        assert!(HeldDrop::ALL.into_iter().enumerate().all(|(place, why)| why as usize == place));
    }

    #[derive(Clone, Debug)]
    enum Call {
        Woken(bool),
        Established,
        FirstAnswer,
        Asleep,
        GaveUp,
    }

    fn call() -> impl Strategy<Value = Call> {
        prop_oneof![
            any::<bool>().prop_map(Call::Woken),
            Just(Call::Established),
            Just(Call::FirstAnswer),
            Just(Call::Asleep),
            Just(Call::GaveUp),
        ]
    }

    proptest! {
        #[test]
        fn the_numbers_fit_together_whatever_is_called(
            calls in proptest::collection::vec((call(), 0u64..20_000), 0..200),
        ) {
            let mut starts = Starts::default();
            let mut now = 0;
            for (call, later) in calls {
                now += later;
                match call {
                    Call::Woken(warm) => starts.woken(at(now), WakeCause::of(&[]), warm),
                    Call::Established => starts.established(at(now)),
                    Call::FirstAnswer => starts.first_answer(at(now)),
                    Call::Asleep => starts.asleep(at(now), SleepReason::Server),
                    Call::GaveUp => starts.gave_up(at(now)),
                }
            }
            let said = starts.to_json(at(now));
            let number = |place: &str| said.pointer(place).and_then(Value::as_u64).unwrap_or(0);
            prop_assert_eq!(number("/wakes"), number("/causes/other"));
            for way in ["/cold", "/warm"] {
                let (wakes, sent, answered) = (
                    number(&format!("{way}/wakes")),
                    number(&format!("{way}/first_packet/count")),
                    number(&format!("{way}/first_answer/count")),
                );
                prop_assert!(wakes >= sent && sent >= answered);
            }
            prop_assert!(starts.recent.len() <= RECENT);
            prop_assert!(said["awake_ms"].as_f64().is_some_and(|awake| awake <= now as f64));
        }

        #[test]
        fn any_bytes_have_a_cause(packet in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(WakeCause::of(&packet).text.len() <= 2 * MAX_TEXT);
        }
    }
}
