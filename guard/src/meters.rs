//! How much each client may send and be sent, whatever it makes its sessions do: one pair of buckets for each identity
//! with a limit, kept here because a worker's word on what it was given is none.
//!
//! To the client packets are held back, in the session's memory, and leave as the bucket allows. Of several sessions
//! of one identity each gets its turn. From the client they are dropped, where the guard writes them to the device.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

use tunguard::rate::{Bucket, Rates};
use tunguard::time::Time;

use crate::outbox::Valve;

/// The buckets of all identities with a limit.
#[derive(Default)]
pub struct Meters {
    by_name: HashMap<String, Meter>,
    /// When somebody of an identity that holds sessions back may go on, at the earliest: one entry for each identity.
    due: BinaryHeap<Reverse<(Time, String)>>,
}

struct Meter {
    rates: Rates,
    down: Option<Bucket>,
    up: Option<Bucket>,
    sessions: u32,
    /// Sessions that are held back, in the order of their turns.
    held: VecDeque<u64>,
    /// It is in the list of those due.
    listed: bool,
}

impl Meters {
    /// A session of `name` begins; until [`Meters::leave`], with the same rates.
    pub fn enter(&mut self, name: &str, rates: Rates, now: Time) {
        let limited = rates != Rates::default();
        if !limited && !self.by_name.contains_key(name) {
            return;
        }
        let meter = self.by_name.entry(name.to_owned()).or_insert_with(|| Meter::new(rates, now));
        // What it owes isn't forgotten by coming again, only by another limit.
        if meter.rates != rates {
            let held = std::mem::take(&mut meter.held);
            *meter = Meter { sessions: meter.sessions, held, listed: meter.listed, ..Meter::new(rates, now) };
        }
        meter.sessions += u32::from(limited);
    }

    /// A session of `name` is over.
    pub fn leave(&mut self, name: &str, rates: Rates, key: u64) {
        if let Some(meter) = self.by_name.get_mut(name) {
            meter.sessions = meter.sessions.saturating_sub(u32::from(rates != Rates::default()));
            meter.held.retain(|held| *held != key);
        }
    }

    /// To be called once in a while: who is away and owes nothing is forgotten.
    pub fn handle_timeout(&mut self, now: Time) {
        let rests = |bucket: &mut Option<Bucket>| bucket.as_mut().is_none_or(|bucket| bucket.is_full(now));
        self.by_name.retain(|_, m| m.sessions > 0 || !(rests(&mut m.down) && rests(&mut m.up)));
    }

    /// What a batch for session `key` of `name` has to pass.
    pub fn valve(&mut self, name: &str, key: u64) -> Valve<'_> {
        let Some(meter) = self.by_name.get_mut(name) else { return Valve::Open };
        match &mut meter.down {
            None => Valve::Open,
            // Others were there first.
            Some(_) if meter.held.iter().any(|held| *held != key) => Valve::Shut,
            Some(bucket) => Valve::Metered(bucket),
        }
    }

    /// The same for the session whose turn it is.
    pub fn turn(&mut self, name: &str) -> Valve<'_> {
        let bucket = self.by_name.get_mut(name).and_then(|meter| meter.down.as_mut());
        bucket.map_or(Valve::Open, Valve::Metered)
    }

    /// Session `key` has something that its valve didn't let pass: its turn is behind those of the others.
    pub fn hold(&mut self, name: &str, key: u64) {
        let Some(meter) = self.by_name.get_mut(name) else { return };
        if !meter.held.contains(&key) {
            meter.held.push_back(key);
        }
        if !std::mem::replace(&mut meter.listed, true) {
            self.due.push(Reverse((meter.ready_at(), name.to_owned())));
        }
    }

    /// Takes out a session whose turn it is.
    pub fn poll_release(&mut self, now: Time) -> Option<u64> {
        while self.due.peek().is_some_and(|Reverse((at, _))| *at <= now) {
            let Some(Reverse((_, name))) = self.due.pop() else { break };
            let Some(meter) = self.by_name.get_mut(&name) else { continue };
            // What it was listed for may have been used up since.
            let ready_at = meter.ready_at();
            let key = if ready_at <= now { meter.held.pop_front() } else { None };
            meter.listed = !meter.held.is_empty();
            if meter.listed {
                self.due.push(Reverse((ready_at, name)));
            }
            if key.is_some() {
                return key;
            }
        }
        None
    }

    /// When to ask for it.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.due.peek().map(|Reverse((at, _))| *at)
    }

    /// Whether `bytes` of `name` may go to the device.
    pub fn pass_up(&mut self, name: &str, now: Time, bytes: usize) -> bool {
        let bucket = self.by_name.get_mut(name).and_then(|meter| meter.up.as_mut());
        bucket.is_none_or(|bucket| bucket.pass(now, bytes))
    }
}

impl Meter {
    fn new(rates: Rates, now: Time) -> Meter {
        Meter {
            rates,
            down: rates.down.map(|rate| Bucket::new(rate, rate.burst(), now)),
            // The worker has dropped what is too much, packet by packet: this is for one that doesn't, so what only
            // comes bunched from an honest one passes.
            up: rates.up.map(|rate| Bucket::new(rate, 2 * rate.burst(), now)),
            sessions: 0,
            held: VecDeque::new(),
            listed: false,
        }
    }

    fn ready_at(&self) -> Time {
        self.down.as_ref().map_or(Time::default(), Bucket::ready_at)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use tunguard::rate::Rate;

    use super::*;

    /// A byte each microsecond.
    fn rates() -> Rates {
        let rate = Rate::from_bits(8_000_000);
        Rates { down: rate, up: rate }
    }

    fn at(millis: u64) -> Time {
        Time::from_nanos(millis * 1_000_000)
    }

    fn passes(meters: &mut Meters, name: &str, key: u64, now: Time, bytes: usize) -> bool {
        match meters.valve(name, key) {
            Valve::Open => true,
            Valve::Shut => false,
            Valve::Metered(bucket) => bucket.pass(now, bytes),
        }
    }

    #[test]
    fn who_has_no_limit_is_not_held() {
        let mut meters = Meters::default();
        meters.enter("ann", Rates::default(), at(0));
        assert!((0..1_000).all(|_| passes(&mut meters, "ann", 1, at(0), 60_000)));
        assert!((0..1_000).all(|_| meters.pass_up("ann", at(0), 60_000)));
        assert_eq!((meters.poll_timeout(), meters.by_name.len()), (None, 0));
    }

    #[test]
    fn coming_again_forgives_nothing() {
        let mut meters = Meters::default();
        meters.enter("ann", rates(), at(0));
        assert!(passes(&mut meters, "ann", 1, at(0), 1_000_000));
        meters.leave("ann", rates(), 1);
        meters.handle_timeout(at(100));
        meters.enter("ann", rates(), at(100));
        assert!(!passes(&mut meters, "ann", 2, at(100), 1));
        meters.leave("ann", rates(), 2);
        meters.handle_timeout(at(10_000));
        assert!(meters.by_name.is_empty(), "but nobody is remembered for ever");
    }

    #[test]
    fn a_changed_limit_holds_from_the_next_session_on() {
        let mut meters = Meters::default();
        let limited = |meters: &mut Meters| {
            meters.handle_timeout(at(1_000_000));
            matches!(meters.valve("ann", 9), Valve::Metered(_))
        };
        meters.enter("ann", Rates::default(), at(0));
        meters.enter("ann", rates(), at(0));
        assert!(limited(&mut meters));
        // The end of one that had none leaves the other's.
        meters.leave("ann", Rates::default(), 1);
        assert!(limited(&mut meters));
        meters.enter("ann", Rates::default(), at(0));
        assert!(!limited(&mut meters));
        meters.leave("ann", rates(), 2);
        meters.leave("ann", Rates::default(), 3);
        assert!(!limited(&mut meters) && meters.by_name.is_empty());
    }

    #[test]
    fn those_held_back_have_their_turns_and_nobody_comes_in_between() {
        let mut meters = Meters::default();
        for _ in 0..3 {
            meters.enter("ann", rates(), at(0));
        }
        assert!(passes(&mut meters, "ann", 1, at(0), 1_000_000));
        for key in [1, 2] {
            assert!(!passes(&mut meters, "ann", key, at(0), 100));
            meters.hold("ann", key);
        }
        let due = meters.poll_timeout().expect("somebody waits");
        let early = Time::from_nanos(0) + Duration::from_millis(1);
        assert_eq!(meters.poll_release(early), None);
        assert!(!passes(&mut meters, "ann", 3, due, 100), "behind the others");
        // As the guard does: each passes one batch, and waits again.
        let mut now = due;
        let mut order = Vec::new();
        // Each time at least one has its turn.
        for _ in 0..6 {
            now = now.max(meters.poll_timeout().expect("somebody waits"));
            while let Some(key) = meters.poll_release(now) {
                order.push(key);
                assert!(!passes(&mut meters, "ann", 3, now, 100), "others are held");
                let Valve::Metered(bucket) = meters.turn("ann") else { panic!("there is a limit") };
                assert!(bucket.pass(now, 5_000));
                meters.hold("ann", key);
            }
        }
        assert_eq!(order[..6], [1, 2, 1, 2, 1, 2]);
        meters.leave("ann", rates(), 1);
        meters.leave("ann", rates(), 2);
        assert_eq!(meters.poll_release(at(100_000)), None);
        assert_eq!(meters.poll_timeout(), None);
    }

    #[test]
    fn one_that_is_held_back_goes_on_when_it_has_paid_and_one_that_left_holds_up_nobody() {
        let mut meters = Meters::default();
        for _ in 1..=3 {
            meters.enter("ann", rates(), at(0));
        }
        // A full bucket is 100,000 bytes, so 10 ms worth of bytes are owed.
        assert!(passes(&mut meters, "ann", 1, at(0), 110_000));
        meters.hold("ann", 1);
        assert_eq!(meters.poll_release(at(10)), None);
        let due = meters.poll_timeout().expect("it waits");
        assert!(due > at(10) && due <= at(11), "{due:?}");
        meters.hold("ann", 1);
        meters.hold("ann", 2);
        meters.hold("ann", 3);
        meters.leave("ann", rates(), 1);
        let turns: Vec<u64> = std::iter::from_fn(|| meters.poll_release(due)).take(9).collect();
        assert_eq!(turns, [2, 3]);
        assert_eq!(meters.poll_timeout(), None);
    }

    #[test]
    fn another_limit_forgets_neither_who_is_there_nor_who_waits() {
        let mut meters = Meters::default();
        meters.enter("ann", rates(), at(0));
        assert!(passes(&mut meters, "ann", 1, at(0), 1_000_000));
        meters.hold("ann", 1);
        let half = Rates { down: Rate::from_bits(4_000_000), up: None };
        meters.enter("ann", half, at(1));
        meters.hold("ann", 2);
        assert_eq!(meters.due.len(), 1, "each identity once");
        let turns: Vec<u64> = std::iter::from_fn(|| meters.poll_release(at(10_000))).take(9).collect();
        assert_eq!(turns, [1, 2]);
        // It is forgotten when the last of both is gone.
        for (key, rates) in [(1, rates()), (2, half)] {
            meters.handle_timeout(at(100_000));
            assert_eq!(meters.by_name.len(), 1);
            meters.leave("ann", rates, key);
        }
        meters.handle_timeout(at(100_000));
        assert!(meters.by_name.is_empty());
    }

    proptest! {
        /// However many sessions an identity has and whatever comes when: together they get no more than the rate and
        /// a burst, and up no more than the rate and two.
        #[test]
        fn the_limit_is_the_identitys(
            steps in prop::collection::vec((0u64..20, 1u64..5, 1usize..66_000), 1..300),
        ) {
            let mut meters = Meters::default();
            for _ in 1..5 {
                meters.enter("ann", rates(), at(0));
            }
            let (mut now, mut down, mut up) = (0, 0u64, 0u64);
            for (wait, key, bytes) in steps {
                now += wait;
                if passes(&mut meters, "ann", key, at(now), bytes) {
                    down += bytes as u64;
                }
                if meters.pass_up("ann", at(now), bytes) {
                    up += bytes as u64;
                }
                let (earned, burst) = (now * 1_000, rates().down.expect("a rate").burst());
                prop_assert!(down <= earned + burst + 66_000);
                prop_assert!(up <= earned + 2 * burst + 66_000);
            }
        }
    }
}
