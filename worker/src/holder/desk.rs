//! What the key holder does for whom: one signature on each channel, within its time. No I/O, no clock.

use std::collections::BTreeMap;

use tunguard::key_ipc::CHANNEL_LIFE;
use tunguard::time::Time;
use tunguard::tls::ToSign;

/// The channels on which a signature may still be asked for.
#[derive(Debug)]
pub struct Desk {
    most: usize,
    /// By number, which is by age: when each is closed.
    open: BTreeMap<u64, Time>,
}

/// What came over a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A request.
    Request(ToSign),
    /// Nothing yet.
    Nothing,
    /// Its end.
    Closed,
    /// Something that is no request.
    Garbage(String),
}

/// What to do about it. Every channel but a waiting one is closed afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Sign, and answer.
    Sign(ToSign),
    /// Keep it open.
    Wait,
    /// It is over.
    Close,
    /// It broke the rules: the guard is told.
    Report(String),
}

impl Desk {
    /// One for so many channels at once.
    pub fn new(most: usize) -> Desk {
        Desk { most: most.max(1), open: BTreeMap::new() }
    }

    /// A connection got a channel. Where there is no room for it the oldest is to be closed: who has asked for nothing
    /// for so long needs it least, and a worker that keeps its channel for no use can't keep others out.
    pub fn open(&mut self, channel: u64, now: Time) -> Option<u64> {
        let oldest = if self.open.len() >= self.most { self.open.pop_first() } else { None };
        self.open.insert(channel, now + CHANNEL_LIFE);
        oldest.map(|(channel, _)| channel)
    }

    /// Something came over a channel.
    pub fn hear(&mut self, channel: u64, heard: Heard) -> Act {
        if !self.open.contains_key(&channel) {
            return Act::Close;
        }
        if heard == Heard::Nothing {
            return Act::Wait;
        }
        self.open.remove(&channel);
        match heard {
            Heard::Request(wanted) => Act::Sign(wanted),
            Heard::Garbage(what) => Act::Report(what),
            Heard::Closed | Heard::Nothing => Act::Close,
        }
    }

    /// Channels whose time is over: they are to be closed.
    pub fn late(&mut self, now: Time) -> Vec<u64> {
        let late =
            self.open.iter().take_while(|(_, until)| **until <= now).map(|(c, _)| *c).collect::<Vec<_>>();
        self.open.retain(|_, until| *until > now);
        late
    }

    /// When to look for late ones again.
    pub fn deadline(&self) -> Option<Time> {
        self.open.first_key_value().map(|(_, until)| *until)
    }

    /// Whether nobody can ask for anything.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tunguard::tls::signing::Hash;

    use super::*;

    fn wanted() -> Heard {
        Heard::Request(ToSign { hash: Hash::Sha256, transcript: vec![7; 32] })
    }

    fn at(seconds: u64) -> Time {
        Time::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn a_channel_is_good_for_one_signature() {
        let mut desk = Desk::new(4);
        assert_eq!(desk.open(1, at(0)), None);
        assert_eq!(desk.hear(1, Heard::Nothing), Act::Wait);
        assert!(matches!(desk.hear(1, wanted()), Act::Sign(_)));
        assert_eq!(desk.hear(1, wanted()), Act::Close);
        assert_eq!(desk.hear(9, wanted()), Act::Close, "nobody opened that");
        assert!(desk.is_empty());
    }

    #[test]
    fn garbage_is_reported_and_ends_the_channel() {
        let mut desk = Desk::new(4);
        desk.open(1, at(0));
        assert_eq!(desk.hear(1, Heard::Garbage("junk".into())), Act::Report("junk".into()));
        assert_eq!(desk.hear(1, wanted()), Act::Close);
    }

    #[test]
    fn the_oldest_makes_room() {
        let mut desk = Desk::new(2);
        assert_eq!([desk.open(1, at(0)), desk.open(2, at(0)), desk.open(3, at(1))], [None, None, Some(1)]);
        assert_eq!(desk.hear(1, wanted()), Act::Close);
        assert!(matches!(desk.hear(2, wanted()), Act::Sign(_)));
        assert!(matches!(desk.hear(3, wanted()), Act::Sign(_)));
    }

    #[test]
    fn time_closes_what_nobody_asks_on() {
        let mut desk = Desk::new(4);
        desk.open(1, at(0));
        desk.open(2, at(5));
        assert_eq!(desk.deadline(), Some(at(13)));
        assert!(desk.late(at(12)).is_empty());
        assert_eq!(desk.late(at(13)), [1]);
        assert_eq!(desk.hear(1, wanted()), Act::Close);
        assert_eq!(desk.deadline(), Some(at(18)));
        assert_eq!(desk.late(at(60)), [2]);
        assert_eq!(desk.deadline(), None);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Open,
        Hear(u64, Heard),
        Pass(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let heard = prop_oneof![
            Just(wanted()),
            Just(Heard::Nothing),
            Just(Heard::Closed),
            Just(Heard::Garbage("junk".into()))
        ];
        prop_oneof![
            Just(Step::Open),
            (0..20u64, heard).prop_map(|(c, h)| Step::Hear(c, h)),
            (0..8u64).prop_map(Step::Pass)
        ]
    }

    proptest! {
        /// Whatever happens, in whatever order: a channel gives one signature at most, only between its opening and its
        /// end, and no more of them are open than there is room for.
        #[test]
        fn never_two_signatures_for_one_channel(steps in prop::collection::vec(step(), 1..200)) {
            let mut desk = Desk::new(3);
            let (mut now, mut next) = (0, 0);
            let mut opened: BTreeMap<u64, u64> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Open => {
                        if let Some(gone) = desk.open(next, at(now)) {
                            prop_assert!(opened.remove(&gone).is_some());
                        }
                        opened.insert(next, now);
                        next += 1;
                    }
                    Step::Hear(channel, heard) => match desk.hear(channel, heard.clone()) {
                        Act::Sign(_) => prop_assert!(heard == wanted() && opened.remove(&channel).is_some()),
                        Act::Wait => prop_assert!(heard == Heard::Nothing && opened.contains_key(&channel)),
                        Act::Close => drop(opened.remove(&channel)),
                        Act::Report(_) => {
                            prop_assert!(matches!(heard, Heard::Garbage(_)));
                            prop_assert!(opened.remove(&channel).is_some());
                        }
                    },
                    Step::Pass(seconds) => {
                        now += seconds;
                        for late in desk.late(at(now)) {
                            let since = opened.remove(&late);
                            prop_assert!(since.is_some_and(|since| now >= since + CHANNEL_LIFE.as_secs()));
                        }
                        prop_assert!(opened.values().all(|since| now < since + CHANNEL_LIFE.as_secs()));
                    }
                }
                prop_assert!(opened.len() <= 3);
                prop_assert_eq!(desk.is_empty(), opened.is_empty());
            }
        }
    }
}
