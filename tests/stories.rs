//! Sessions in virtual time: two ends, a control channel and a network between them that the story controls.

use std::collections::VecDeque;
use std::time::Duration;

use tunguard::config::common::Suite;
use tunguard::drops::DropReason;
use tunguard::epochs::Limits;
use tunguard::keys::{Role, Secret};
use tunguard::path::Path;
use tunguard::paths::{PathEvent, Say};
use tunguard::session::{Event, IN_BAND_LEN, Opened, Session, Start};
use tunguard::time::Time;
use tunguard::wire::control::{Message, Reason};
use tunguard::wire::data::{HEADER_LEN, SessionId, TAG_LEN};
use tunguard::wire::inband::InBand;

const AGE: Duration = Duration::from_secs(900);
const LINGER: Duration = Duration::from_secs(600);
const RTT: Duration = Duration::from_millis(20);

/// Two ends and what is on the way between them.
struct Pair {
    now: Time,
    client: Session,
    server: Session,
    /// Where the client sends from at the moment.
    client_at: Path,
    /// The control connection is up.
    control: bool,
    to_server: VecDeque<Message>,
    to_client: VecDeque<Message>,
    events: Vec<(Role, Event)>,
}

impl Pair {
    fn new(suite: Suite, packets: u64) -> Pair {
        let now = Time::default() + Duration::from_secs(1);
        let start = |role, dialled| Pair::start(role, dialled, suite, packets);
        Pair {
            now,
            client: Session::new(start(Role::Client, Some(at("198.51.100.1:55555"))), now)
                .expect("a session"),
            server: Session::new(start(Role::Server, None), now).expect("a session"),
            client_at: at("192.0.2.1:4000"),
            control: true,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            events: Vec::new(),
        }
    }

    fn start(role: Role, dialled: Option<Path>, suite: Suite, packets: u64) -> Start {
        Start {
            role,
            id: SessionId::new(7, [1, 2, 3, 4, 5, 6]),
            suite,
            secret: Secret::from_bytes([42; 32]),
            limits: Limits { age: AGE, packets },
            inner: vec!["10.9.0.2/32".parse().expect("a network")],
            linger: LINGER,
            dialled,
            vouched: None,
        }
    }

    fn end(&mut self, role: Role) -> &mut Session {
        match role {
            Role::Client => &mut self.client,
            Role::Server => &mut self.server,
        }
    }

    /// What `from` puts on the wire for one packet.
    fn seal(&mut self, from: Role, text: &[u8]) -> Result<Vec<u8>, DropReason> {
        let now = self.now;
        let mut datagram = vec![0; HEADER_LEN];
        datagram.extend(text);
        datagram.extend([0; TAG_LEN]);
        self.end(from).seal(now, 0, &mut datagram)?;
        let _ = self.end(from).target(now, 0, datagram.len());
        Ok(datagram)
    }

    /// What `to` makes of a datagram.
    fn open(&mut self, to: Role, datagram: &[u8]) -> Result<Vec<u8>, DropReason> {
        let path = match to {
            Role::Client => at("198.51.100.1:55555"),
            Role::Server => self.client_at,
        };
        let (now, mut datagram) = (self.now, datagram.to_vec());
        match self.end(to).open(now, path, &mut datagram)? {
            Opened::Packet { text, .. } => Ok(datagram[text].to_vec()),
            Opened::InBand => Ok(Vec::new()),
        }
    }

    fn exchange(&mut self, from: Role) {
        let datagram = self.seal(from, b"a packet").expect("seals");
        assert_eq!(self.open(from.peer(), &datagram), Ok(b"a packet".to_vec()), "from the {from:?}");
    }

    /// Lets everything that is due happen and arrive.
    fn settle(&mut self) {
        for _ in 0..50 {
            let now = self.now;
            for role in [Role::Client, Role::Server] {
                let end = self.end(role);
                if end.poll_timeout().is_some_and(|at| at <= now) || end.rekey_due(now) {
                    end.handle_timeout(now);
                }
                let mut sent = Vec::new();
                while let Some(message) = end.poll_message() {
                    sent.push(message);
                }
                let mut in_band = Vec::new();
                while let Some(say) = end.poll_in_band() {
                    let mut datagram = [0; IN_BAND_LEN];
                    if let Ok(len) = end.seal_in_band(now, &say, &mut datagram) {
                        in_band.push(datagram[..len].to_vec());
                    }
                }
                while let Some(event) = self.end(role).poll_event() {
                    self.events.push((role, event));
                }
                for datagram in in_band {
                    let _ = self.open(role.peer(), &datagram);
                }
                if self.control {
                    match role {
                        Role::Client => self.to_server.extend(sent),
                        Role::Server => self.to_client.extend(sent),
                    }
                }
            }
            while let Some(message) = self.to_server.pop_front() {
                self.server.handle_message(now, message).expect("in place");
            }
            while let Some(message) = self.to_client.pop_front() {
                self.client.handle_message(now, message).expect("in place");
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        self.settle();
    }

    fn lose_control(&mut self) {
        self.control = false;
        let now = self.now;
        self.client.handle_control_lost(now);
        self.server.handle_control_lost(now);
    }

    fn ended(&self, role: Role) -> Option<Reason> {
        self.events.iter().find_map(|(r, e)| match e {
            Event::Ended { reason, .. } if *r == role => Some(*reason),
            _ => None,
        })
    }
}

fn at(text: &str) -> Path {
    Path::new(text.parse().expect("an address"), None)
}

#[test]
fn packets_flow_and_copies_do_not() {
    for suite in Suite::ALL {
        let mut pair = Pair::new(suite, 1 << 30);
        let one = pair.seal(Role::Client, b"one").expect("seals");
        let two = pair.seal(Role::Client, b"two").expect("seals");
        assert_eq!(pair.open(Role::Server, &two), Ok(b"two".to_vec()));
        assert_eq!(pair.open(Role::Server, &one), Ok(b"one".to_vec()), "order doesn't matter");
        assert_eq!(pair.open(Role::Server, &one), Err(DropReason::Duplicate));
        assert_eq!(pair.open(Role::Client, &two), Err(DropReason::BadTag), "reflected to its sender");
        let mut forged = pair.seal(Role::Client, b"three").expect("seals");
        forged[20] ^= 1;
        assert_eq!(pair.open(Role::Server, &forged), Err(DropReason::BadTag));
        forged[20] ^= 1;
        assert_eq!(pair.open(Role::Server, &forged), Ok(b"three".to_vec()), "the forgery spent no counter");
        pair.exchange(Role::Server);
    }
}

#[test]
fn the_peer_is_where_its_newest_packet_came_from() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    pair.exchange(Role::Client);
    assert_eq!(pair.server.path().map(|a| a.path), Some(at("192.0.2.1:4000")));
    let old = pair.seal(Role::Client, b"sent before the move").expect("seals");
    pair.client_at = at("203.0.113.5:6000");
    pair.exchange(Role::Client);
    pair.settle();
    pair.pass(Duration::from_secs(1));
    assert_eq!(pair.server.path().map(|a| a.path), Some(at("203.0.113.5:6000")));
    // Somebody held the old packet back and sends it from elsewhere: delivered, and nothing moves.
    pair.client_at = at("198.18.0.9:9");
    assert!(pair.open(Role::Server, &old).is_ok());
    // A forgery from elsewhere moves nothing, a replay neither.
    let fresh = pair.seal(Role::Client, b"x").expect("seals");
    let mut forged = fresh.clone();
    forged[HEADER_LEN] ^= 1;
    assert_eq!(pair.open(Role::Server, &forged), Err(DropReason::BadTag));
    assert_eq!(pair.open(Role::Server, &old), Err(DropReason::Duplicate));
    assert_eq!(pair.server.path().map(|a| a.path), Some(at("203.0.113.5:6000")));
    pair.settle();
    let moves = pair
        .events
        .iter()
        .filter(|(_, e)| matches!(e, Event::Path(PathEvent::Moved { old: Some(_), .. })))
        .count();
    assert_eq!(moves, 1);
}

#[test]
fn the_client_stays_with_the_server_it_dialled() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    let datagram = pair.seal(Role::Server, b"x").expect("seals");
    let now = pair.now;
    assert!(pair.client.open(now, at("198.18.0.9:9"), &mut datagram.clone()).is_ok());
    assert_eq!(pair.client.path().map(|a| a.path), Some(at("198.51.100.1:55555")));
}

#[test]
fn keys_are_renewed_by_age_again_and_again() {
    let mut pair = Pair::new(Suite::ChaCha20Poly1305, 1 << 30);
    for epoch in 1..=300 {
        pair.exchange(Role::Client);
        let late = pair.seal(Role::Server, b"late").expect("seals");
        pair.pass(AGE);
        assert_eq!((pair.client.epoch(), pair.server.epoch()), (epoch, epoch));
        assert_eq!(pair.open(Role::Client, &late), Ok(b"late".to_vec()), "the old epoch is open for a while");
        pair.exchange(Role::Client);
        pair.exchange(Role::Server);
    }
    assert_eq!(pair.ended(Role::Client), None);
}

#[test]
fn the_old_epoch_closes_after_the_overlap() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    let late = pair.seal(Role::Client, b"late").expect("seals");
    pair.pass(AGE);
    pair.pass(Duration::from_secs(61));
    assert_eq!(pair.open(Role::Server, &late), Err(DropReason::UnknownEpoch));
}

#[test]
fn two_rekeys_that_cross_are_one_exchange() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    for epoch in 1..=5 {
        pair.client.rekey();
        pair.server.rekey();
        pair.settle();
        assert_eq!((pair.client.epoch(), pair.server.epoch()), (epoch, epoch));
        pair.exchange(Role::Client);
        pair.exchange(Role::Server);
    }
}

#[test]
fn keys_are_renewed_by_packets() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1_000);
    for _ in 0..5_000 {
        pair.exchange(Role::Client);
        if pair.client.rekey_due(pair.now) {
            pair.settle();
        }
    }
    assert!(pair.client.epoch() >= 4, "epoch {}", pair.client.epoch());
}

#[test]
fn a_peer_that_wont_renew_its_keys_stops_traffic_and_nothing_wraps() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 100);
    pair.control = false;
    for _ in 0..200 {
        pair.exchange(Role::Client);
    }
    assert_eq!(pair.seal(Role::Client, b"one more"), Err(DropReason::KeysExpired));
    // By age, too: the session ends itself.
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    pair.control = false;
    pair.pass(AGE);
    pair.exchange(Role::Client);
    pair.pass(AGE);
    assert_eq!(pair.seal(Role::Client, b"one more"), Err(DropReason::KeysExpired));
    assert_eq!(pair.ended(Role::Client), Some(Reason::KeysExpired));
}

#[test]
fn a_session_outlives_its_control_channel_for_as_long_as_it_is_heard_and_then_lingers() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    pair.pass(AGE);
    pair.lose_control();
    pair.pass(LINGER / 2);
    pair.exchange(Role::Client);
    pair.exchange(Role::Server);
    pair.settle();
    pair.pass(LINGER - Duration::from_secs(1));
    assert_eq!(pair.ended(Role::Server), None, "it was heard half way through");
    pair.pass(Duration::from_secs(1));
    assert_eq!(pair.ended(Role::Server), Some(Reason::Timeout));
    assert_eq!(pair.server.poll_timeout(), None, "nothing is left to wait for");
}

#[test]
fn goodbyes_reach_the_peer_by_either_channel() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    pair.client.leave(Reason::Leaving);
    pair.settle();
    assert_eq!(pair.ended(Role::Server), Some(Reason::Leaving));
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    pair.exchange(Role::Client);
    pair.lose_control();
    pair.client.leave(Reason::Leaving);
    pair.settle();
    assert_eq!(pair.ended(Role::Server), Some(Reason::Leaving), "in band");
}

#[test]
fn repeated_goodbyes_lengthen_nothing() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    let now = pair.now;
    pair.server.handle_message(now, Message::Bye(Reason::Leaving)).expect("in place");
    assert_eq!(pair.server.poll_timeout(), None);
    for _ in 0..3 {
        pair.server.handle_message(now, Message::Bye(Reason::Leaving)).expect("in place");
    }
    pair.settle();
    let ends = pair.events.iter().filter(|(_, e)| matches!(e, Event::Ended { .. })).count();
    assert_eq!(ends, 1);
    assert_eq!(pair.server.poll_timeout(), None);
}

#[test]
fn a_probe_measures_the_path_or_says_that_it_is_dead() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    let now = pair.now;
    pair.client.probe(now);
    let challenge = pair.client.poll_in_band().expect("a challenge");
    let mut datagram = [0; IN_BAND_LEN];
    let len = pair.client.seal_in_band(now, &challenge, &mut datagram).expect("seals");
    pair.now = now + RTT;
    pair.open(Role::Server, &datagram[..len]).expect("opens");
    pair.settle();
    let proven = pair.events.iter().find(|(_, e)| matches!(e, Event::Path(PathEvent::Proven { .. })));
    assert_eq!(proven, Some(&(Role::Client, Event::Path(PathEvent::Proven { rtt: RTT }))));

    // Now nothing arrives any more: the client sends data, hears nothing, asks, and gives up.
    let mut waited = Duration::ZERO;
    pair.seal(Role::Client, b"into the void").expect("seals");
    while !pair.events.iter().any(|(_, e)| *e == Event::Path(PathEvent::Unreachable)) {
        let next = pair.client.poll_timeout().expect("something to wait for");
        waited += next - pair.now;
        pair.now = next;
        pair.client.handle_timeout(next);
        while pair.client.poll_in_band().is_some() {}
        while let Some(event) = pair.client.poll_event() {
            pair.events.push((Role::Client, event));
        }
        assert!(waited < Duration::from_secs(30), "it never gives up");
    }
    assert!(waited > Duration::from_secs(10), "it gave up after {waited:?}");
}

#[test]
fn an_idle_session_sends_nothing() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    pair.exchange(Role::Client);
    pair.exchange(Role::Server);
    pair.settle();
    let quiet_until = pair.now + (AGE - Duration::from_secs(1));
    while let Some(next) = pair.client.poll_timeout().filter(|at| *at < quiet_until) {
        pair.client.handle_timeout(next);
        assert_eq!(pair.client.poll_in_band(), None);
        assert_eq!(pair.client.poll_message(), None);
    }
}

#[test]
fn messages_out_of_place_are_refused() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    let now = pair.now;
    for message in [
        Message::Notice("for clients".into()),
        Message::Update(Default::default()),
        Message::Rekey { epoch: 5, public: [9; 32] },
        Message::Rekey { epoch: 1, public: [0; 32] },
        Message::RekeyDone { epoch: 3 },
    ] {
        assert_eq!(pair.server.handle_message(now, message.clone()), Err(Reason::Protocol), "{message:?}");
    }
}

#[test]
fn a_flood_of_pings_or_keys_ends_the_session() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    let now = pair.now;
    let flood = (0..1_000).map(|n| pair.server.handle_message(now, Message::Ping(n)));
    assert_eq!(flood.filter(|r| r.is_err()).count(), 968, "answers are queued up to a bound");

    // A client that makes one epoch after the other, each as it should be, and never reads an answer.
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    let made = (1..1_000).take_while(|epoch| {
        let rekey = Message::Rekey { epoch: *epoch, public: [9; 32] };
        pair.server.handle_message(now, rekey).is_ok()
            && pair.server.handle_message(now, Message::RekeyDone { epoch: *epoch }).is_ok()
    });
    assert_eq!(made.count(), 16);
    assert_eq!(std::iter::from_fn(|| pair.server.poll_message()).count(), 32);
}

#[test]
fn a_flood_of_challenges_gets_a_few_answers_at_once() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    pair.exchange(Role::Client);
    pair.settle();
    let now = pair.now;
    for n in 0..1_000u64 {
        let say =
            Say { message: InBand::PathChallenge(n.to_be_bytes()), path: at("198.51.100.1:55555"), pad: 0 };
        let mut datagram = [0; IN_BAND_LEN];
        let len = pair.client.seal_in_band(now, &say, &mut datagram).expect("seals");
        assert_eq!(pair.open(Role::Server, &datagram[..len]), Ok(Vec::new()));
    }
    assert_eq!(std::iter::from_fn(|| pair.server.poll_in_band()).count(), 32);
}

#[test]
fn a_client_is_known_at_a_few_places_only() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    pair.exchange(Role::Client);
    for port in 5_000..5_200 {
        pair.client_at = at(&format!("192.0.2.1:{port}"));
        pair.exchange(Role::Client);
        assert!(pair.server.paths().len() <= 8, "{}", pair.server.paths().len());
        pair.pass(Duration::from_millis(50));
    }
}

/// A packet that counts as use.
const DATA: [u8; 28] =
    [0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 192, 0, 2, 1, 0x12, 0x34, 0, 53, 0, 8, 0, 0];

#[test]
fn a_session_that_carries_nothing_for_its_limit_ends_as_idle() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    pair.server.set_idle(Some(Duration::from_secs(60)));
    for _ in 0..20 {
        let now = pair.now;
        pair.server.carried(now, &DATA);
        pair.exchange(Role::Client);
        pair.pass(Duration::from_secs(30));
    }
    let ended =
        |pair: &Pair, role, reason, by_peer| pair.events.contains(&(role, Event::Ended { reason, by_peer }));
    assert!(!ended(&pair, Role::Server, Reason::Idle, false));
    // Packets that count for nothing, and challenges.
    let mut noise = DATA;
    noise[16] = 224;
    for _ in 0..4 {
        let now = pair.now;
        pair.server.carried(now, &noise);
        pair.client.probe(now);
        pair.pass(Duration::from_secs(15));
    }
    assert!(ended(&pair, Role::Server, Reason::Idle, false), "{:?}", pair.events);
    assert!(ended(&pair, Role::Client, Reason::Idle, true), "{:?}", pair.events);
}

#[test]
fn what_answers_early_packets_goes_inside_until_the_client_is_heard() {
    for vouched in [true, false] {
        let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
        let inside = tunguard::inside::path("192.0.2.1:50000".parse().expect("an address"));
        if vouched {
            let start = Start {
                vouched: Some(inside.remote.ip()),
                ..Pair::start(Role::Server, None, Suite::Aes256Gcm, 1 << 30)
            };
            pair.server = Session::new(start, pair.now).expect("a session");
        }
        let now = pair.now;
        assert!(pair.server.target(now, 0, 1_000).is_none(), "nobody knows where to");
        pair.server.heard_early(now, inside);
        pair.server.heard_early(now, inside);
        let moved = |old, new| Event::Path(PathEvent::Moved { old, new });
        assert_eq!(pair.server.poll_event(), Some(moved(None, inside)));
        assert_eq!(pair.server.target(now, 0, 60_000), Some(inside), "proven by TCP and TLS");
        assert_eq!(pair.server.poll_in_band(), None, "the client doesn't know it for a path yet");
        // Nor later, with data unanswered.
        pair.pass(Duration::from_secs(5));
        assert_eq!(pair.server.target(pair.now, 0, 60_000), Some(inside));
        assert_eq!(pair.events, []);

        // The client is heard by UDP.
        let text = pair.seal(Role::Client, &DATA).expect("seals");
        assert_eq!(pair.open(Role::Server, &text), Ok(DATA.to_vec()));
        let (now, udp) = (pair.now, pair.client_at);
        let targets: Vec<_> = (0..pair.server.targets()).map(|n| pair.server.target(now, n, 10)).collect();
        let both = vec![Some(inside), Some(udp)];
        assert_eq!(targets, if vouched { vec![Some(udp)] } else { both }, "vouched: {vouched}");
        pair.settle();
        assert_eq!(pair.server.path().map(|known| known.path), Some(udp));
        assert_eq!(pair.server.targets(), 1);
        assert!(pair.events.contains(&(Role::Server, moved(Some(inside), udp))));
    }
}

#[test]
fn an_address_that_nobody_vouches_for_and_that_never_answers_takes_nothing_from_inside() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    let inside = tunguard::inside::path("192.0.2.1:50000".parse().expect("an address"));
    let now = pair.now;
    pair.server.heard_early(now, inside);
    let text = pair.seal(Role::Client, &DATA).expect("seals");
    assert_eq!(pair.open(Role::Server, &text), Ok(DATA.to_vec()));
    // UDP doesn't get through to the client: challenges go unanswered.
    for _ in 0..100 {
        pair.now = pair.now + Duration::from_millis(100);
        let now = pair.now;
        pair.server.handle_timeout(now);
        while pair.server.poll_in_band().is_some() {}
        assert_eq!(pair.server.target(now, 0, 1_000), Some(inside));
    }
    assert_eq!(pair.server.targets(), 1, "it is forgotten");
}

#[test]
fn a_client_whose_udp_is_blocked_from_the_start_stays_inside() {
    let mut pair = Pair::new(Suite::Aes256Gcm, 1 << 30);
    let inside = tunguard::inside::path("192.0.2.1:50000".parse().expect("an address"));
    let now = pair.now;
    pair.server.heard_early(now, inside);
    // It offers the control connection as a path itself.
    pair.client_at = inside;
    pair.client.probe(now);
    pair.settle();
    let known = pair.server.path().expect("a path");
    assert_eq!((known.path, known.rtt.is_some()), (inside, true), "it answers challenges there");
}
