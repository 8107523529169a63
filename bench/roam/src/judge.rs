//! What arrived around one move, and what is to be said about it. Time is an argument: nanoseconds.
//!
//! ```text
//!   -- packets -- move ............ back --- packets -- silence? -- packets for `settle` -- over
//!                      (the move itself)     `limit` after back: over in any case
//! ```

use std::collections::HashSet;

use serde::Serialize;

use crate::SECOND;

/// One packet that came.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// When.
    pub at: u64,
    /// Its number.
    pub sequence: u64,
    /// When it was sent.
    pub sent: u64,
}

/// What holds for all moves.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Between two packets as they are sent.
    pub interval: u64,
    /// After `back`.
    pub limit: u64,
    /// How long packets have to come without a break for it to be over.
    pub settle: u64,
    /// It isn't over, either, before the VPN's log says what is waited for.
    pub awaits_log: bool,
}

/// What is said about one move.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Packets came evenly before the move. All else is worth nothing without.
    steady: bool,
    /// They did again after it, in time.
    recovered: bool,
    /// Longest time between two arrivals from just before the move on, less the interval.
    silence_ms: Option<f64>,
    /// From `back` to the first arrival.
    first_ms: Option<f64>,
    /// Numbers that never came, of those up to the highest that did.
    lost: Option<u64>,
    /// Came again.
    duplicated: u64,
    /// Came after a higher number.
    reordered: u64,
    /// From `move` to the first line in the VPN's log that was waited for.
    logged_ms: Option<f64>,
    /// From `move` to `back`.
    took_ms: f64,
    /// Longest time between two neighbours when they were sent, less the interval: what the machine owes, not the VPN.
    sender_ms: f64,
    /// Times at which packets came without a break, from and to, in ms from the move.
    runs: Vec<(f64, f64)>,
}

/// Collects arrivals; `arrived`, `moves` and `back` as they happen, `is_*` as often as wanted, `report` once.
#[derive(Debug)]
pub struct Watch {
    start: u64,
    arrivals: Vec<Arrival>,
    /// When the current row of arrivals without a break began.
    row: Option<u64>,
    told: bool,
    moved: Option<u64>,
    back: Option<u64>,
    logged: Option<u64>,
}

impl Watch {
    /// Starts now.
    pub fn new(now: u64) -> Watch {
        Watch {
            start: now,
            arrivals: Vec::new(),
            row: None,
            told: false,
            moved: None,
            back: None,
            logged: None,
        }
    }

    /// A packet came.
    pub fn arrived(&mut self, arrival: Arrival, bounds: &Bounds) {
        let broken = self.arrivals.last().is_none_or(|last| arrival.at > last.at + bounds.interval + BREAK);
        if broken || self.row.is_none() {
            self.row = Some(arrival.at);
        }
        self.arrivals.push(arrival);
    }

    /// The move begins.
    pub fn moves(&mut self, at: u64) {
        self.moved = Some(at);
    }

    /// The network is whole again.
    pub fn back(&mut self, at: u64) {
        self.back = Some(at);
    }

    /// The VPN's log says what is waited for. What it said before the move is of no interest.
    pub fn logged(&mut self, at: u64) {
        if self.moved.is_some_and(|moved| moved <= at) {
            self.logged.get_or_insert(at);
        }
    }

    /// Packets have come evenly for a while; true once.
    pub fn is_newly_steady(&mut self, now: u64) -> bool {
        let steady = !self.told && self.flows_since(now, now.saturating_sub(STEADY));
        self.told |= steady;
        steady
    }

    /// There is no more to be seen.
    pub fn is_over(&self, now: u64, bounds: &Bounds) -> bool {
        if !self.told {
            return now > self.start + PATIENCE;
        }
        let Some(back) = self.back else { return false };
        let settled = now >= back + bounds.settle
            && self.flows_since(now, now - bounds.settle)
            && (self.logged.is_some() || !bounds.awaits_log);
        let alive = self.alive(now);
        settled || now > back + bounds.limit + if alive { bounds.settle } else { 0 }
    }

    /// What is to be said.
    pub fn report(&self, end: u64, bounds: &Bounds) -> Report {
        let moved = self.moved.unwrap_or(end);
        let back = self.back.unwrap_or(end);
        let seen: Vec<_> = self.arrivals.iter().filter(|a| a.at + BEFORE >= moved).copied().collect();
        let gaps = seen.windows(2).map(|pair| (pair[1].at - pair[0].at).saturating_sub(bounds.interval));
        let silence = gaps.max();
        let first = seen.iter().find(|a| a.at >= back).map(|a| a.at - back);
        let recovered = self.told && self.alive(end) && first.is_some_and(|first| first <= bounds.limit);
        let counts = Counts::of(&seen);
        Report {
            steady: self.told,
            recovered,
            silence_ms: silence.filter(|_| recovered).map(ms),
            first_ms: first.filter(|_| recovered).map(ms),
            lost: recovered.then_some(counts.lost),
            duplicated: counts.duplicated,
            reordered: counts.reordered,
            logged_ms: self.logged.map(|at| ms(at - moved)),
            took_ms: ms(back.saturating_sub(moved)),
            sender_ms: ms(sender(&seen).saturating_sub(bounds.interval)),
            runs: self.runs(moved),
        }
    }

    /// Packets have come without a break since `then`, and still do.
    fn flows_since(&self, now: u64, then: u64) -> bool {
        self.row.is_some_and(|row| row <= then) && self.arrivals.last().is_some_and(|a| now <= a.at + BREAK)
    }

    fn alive(&self, now: u64) -> bool {
        self.arrivals.last().is_some_and(|a| now <= a.at + ALIVE)
    }

    fn runs(&self, moved: u64) -> Vec<(f64, f64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for a in self.arrivals.iter().filter(|a| a.at + SECOND >= moved) {
            match runs.last_mut() {
                Some(run) if a.at <= run.1 + HOLE => run.1 = a.at,
                _ => runs.push((a.at, a.at)),
            }
        }
        let relative = |at: u64| ((at as f64 - moved as f64) / 1e4).round() / 100.0;
        runs.into_iter().map(|(from, to)| (relative(from), relative(to))).collect()
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    lost: u64,
    duplicated: u64,
    reordered: u64,
}

impl Counts {
    fn of(arrivals: &[Arrival]) -> Counts {
        let Some(lowest) = arrivals.iter().map(|a| a.sequence).min() else { return Counts::default() };
        let mut counts = Counts::default();
        let mut known = HashSet::new();
        let mut highest = lowest;
        for a in arrivals {
            if !known.insert(a.sequence) {
                counts.duplicated += 1;
            } else if a.sequence < highest {
                counts.reordered += 1;
            }
            highest = highest.max(a.sequence);
        }
        counts.lost = highest - lowest + 1 - known.len() as u64;
        counts
    }
}

/// Longest time between two packets with neighbouring numbers when they were sent.
fn sender(arrivals: &[Arrival]) -> u64 {
    let neighbours = arrivals.windows(2).filter(|pair| pair[1].sequence == pair[0].sequence + 1);
    neighbours.map(|pair| pair[1].sent.saturating_sub(pair[0].sent)).max().unwrap_or(0)
}

fn ms(nanos: u64) -> f64 {
    (nanos as f64 / 1e4).round() / 100.0
}

const MS: u64 = SECOND / 1000;
/// How far before the move a silence may begin that is laid to it: the last packet before it, at the least.
const BEFORE: u64 = 50 * MS;
/// A time without packets that breaks a row of them.
const BREAK: u64 = 100 * MS;
/// A time without packets that the timeline shows.
const HOLE: u64 = 10 * MS;
/// How long a row has to be before a move.
const STEADY: u64 = SECOND;
/// How long it may take until there is one.
const PATIENCE: u64 = 20 * SECOND;
/// No packet for so long at the end: it hasn't recovered.
const ALIVE: u64 = SECOND / 2;

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds =
        Bounds { interval: 2 * MS, limit: 20 * SECOND, settle: 2 * SECOND, awaits_log: false };

    /// Plays packets sent every 2 ms from time 1 s on, of which `comes` says when each arrives, with a move at 3 s
    /// that takes `took`; returns the report and when it was over.
    fn play(took: u64, comes: impl Fn(u64) -> Vec<u64>) -> (Report, u64) {
        let mut arrivals: Vec<_> = (0..20_000)
            .flat_map(|sequence| {
                let sent = SECOND + sequence * 2 * MS;
                comes(sent).into_iter().map(move |at| Arrival { at, sequence, sent })
            })
            .collect();
        arrivals.sort_by_key(|a| a.at);
        let mut waiting = arrivals.into_iter().peekable();
        let mut watch = Watch::new(SECOND);
        let mut told = false;
        for now in (SECOND..60 * SECOND).step_by(MS as usize) {
            while let Some(arrival) = waiting.next_if(|a| a.at <= now) {
                watch.arrived(arrival, &BOUNDS);
            }
            told |= watch.is_newly_steady(now);
            if now == MOVE {
                assert!(told, "steady before the move");
                watch.moves(now);
            }
            if now == MOVE + took {
                watch.back(now);
            }
            if watch.is_over(now, &BOUNDS) {
                return (watch.report(now, &BOUNDS), now);
            }
        }
        panic!("never over");
    }

    const MOVE: u64 = 3 * SECOND;

    #[test]
    fn a_move_that_nobody_notices() {
        let (report, over) = play(5 * MS, |sent| vec![sent]);
        assert!(report.recovered);
        assert_eq!(report.silence_ms, Some(0.0));
        assert_eq!(report.lost, Some(0));
        assert_eq!(over, MOVE + 5 * MS + BOUNDS.settle);
        assert_eq!(report.runs.len(), 1);
    }

    #[test]
    fn a_silence_that_begins_after_the_move_is_done() {
        let silent = MOVE + 100 * MS..MOVE + 3_100 * MS;
        let (report, over) = play(5 * MS, |sent| if silent.contains(&sent) { vec![] } else { vec![sent] });
        assert!(report.recovered);
        assert_eq!(report.silence_ms, Some(3_000.0));
        assert_eq!(report.lost, Some(1_500));
        assert_eq!(over, silent.end + BOUNDS.settle);
        assert_eq!(report.runs.len(), 2);
    }

    #[test]
    fn a_silence_without_end() {
        let (report, over) = play(5 * MS, |sent| if sent > MOVE + 10 * MS { vec![] } else { vec![sent] });
        assert!(!report.recovered);
        assert_eq!((report.silence_ms, report.first_ms, report.lost), (None, None, None));
        assert_eq!(over, MOVE + 5 * MS + BOUNDS.limit + MS);
    }

    #[test]
    fn an_outage_and_what_was_kept_meanwhile() {
        // The network is away for 5 s; 100 ms after it is back what was sent in its last second comes at once.
        let back = MOVE + 5 * SECOND;
        let (report, _) = play(5 * SECOND, |sent| match sent {
            s if s < MOVE || s > back + 100 * MS => vec![s],
            s if s > back - SECOND => vec![back + 100 * MS],
            _ => vec![],
        });
        assert_eq!(report.first_ms, Some(100.0));
        assert_eq!(report.took_ms, 5_000.0);
        assert_eq!(report.lost, Some(2_001));
    }

    #[test]
    fn what_the_log_says_is_waited_for_and_counted_from_the_move() {
        let bounds = Bounds { awaits_log: true, ..BOUNDS };
        let run = |logged: &[u64]| {
            let mut watch = Watch::new(0);
            for now in (0..60 * SECOND).step_by(2 * MS as usize) {
                watch.arrived(Arrival { at: now, sequence: now / (2 * MS), sent: now }, &bounds);
                watch.is_newly_steady(now);
                if now == MOVE {
                    watch.moves(now);
                    watch.back(now);
                }
                if logged.contains(&now) {
                    watch.logged(now);
                }
                if watch.is_over(now, &bounds) {
                    return (watch.report(now, &bounds).logged_ms, now);
                }
            }
            panic!("never over");
        };
        // Earlier lines are of the session before, later ones of the one after.
        let at = MOVE + 4 * SECOND;
        assert_eq!(run(&[MOVE - SECOND, at, at + SECOND]), (Some(4_000.0), at));
        assert_eq!(run(&[MOVE + 160 * MS]), (Some(160.0), MOVE + BOUNDS.settle));
        let (logged, over) = run(&[]);
        assert_eq!(logged, None);
        assert!(over > MOVE + BOUNDS.limit);
    }

    #[test]
    fn nothing_at_all() {
        let mut watch = Watch::new(0);
        assert!(!watch.is_newly_steady(PATIENCE));
        assert!(watch.is_over(PATIENCE + 1, &BOUNDS));
        let report = watch.report(PATIENCE + 1, &BOUNDS);
        assert!(!report.steady && !report.recovered);
    }

    #[test]
    fn every_packet_is_counted_once() {
        let counts = |numbers: &[u64]| {
            let arrivals: Vec<_> =
                numbers.iter().map(|&sequence| Arrival { at: 0, sequence, sent: 0 }).collect();
            let Counts { lost, duplicated, reordered } = Counts::of(&arrivals);
            (lost, duplicated, reordered)
        };
        assert_eq!(counts(&[]), (0, 0, 0));
        assert_eq!(counts(&[7, 8, 9]), (0, 0, 0));
        assert_eq!(counts(&[7, 9, 10]), (1, 0, 0));
        assert_eq!(counts(&[7, 9, 8, 10]), (0, 0, 1));
        assert_eq!(counts(&[7, 7, 8, 9, 8, 10]), (0, 2, 0));
    }
}
