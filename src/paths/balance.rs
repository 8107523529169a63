//! Balancing: each inner flow goes by one path, so that its packets stay in order, and new flows go where there is most
//! room. What a path carries is measured by the peer's reports of what arrived.

use std::collections::HashMap;
use std::time::Duration;

use super::{Key, Mode, Paths, Say};
use crate::keys::Role;
use crate::path::{INSIDE, Path};
use crate::time::Time;
use crate::wire::inband::{InBand, PathStatus};

/// Which flow goes by which path.
#[derive(Debug, Default)]
pub(super) struct Flows {
    pinned: HashMap<u32, (Key, Time)>,
}

impl Flows {
    /// A flow goes by this path. Of too many those that rest are forgotten, and where none does all of them.
    fn pin(&mut self, flow: u32, key: Key, now: Time) {
        if self.pinned.len() >= MOST_FLOWS {
            self.pinned.retain(|_, (_, last)| now.since(*last) < IDLE_FLOW);
            if self.pinned.len() >= MOST_FLOWS {
                self.pinned.clear();
            }
        }
        self.pinned.insert(flow, (key, now));
    }
}

/// What a path carries, from this end and to it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    /// Packets and bytes sent ever.
    sent: (u64, u64),
    /// The same when the last report came.
    sent_then: (u64, u64),
    /// What the last report said, and when it came.
    reported: (u64, u64),
    reported_at: Option<Time>,
    /// Bytes per second sent, between the last two reports.
    rate: f64,
    /// Bytes per second that get through; 0 as long as nothing is known.
    capacity: f64,
    /// Flows pinned to it of late, of which nothing is measured yet.
    fresh: f64,
    /// Packets and bytes received ever.
    received: (u64, u64),
    /// What was last reported of it, and when.
    told: (u64, u64),
    told_at: Time,
}

impl Load {
    /// A data packet came.
    pub(super) fn heard(&mut self, bytes: usize) {
        self.received = (self.received.0 + 1, self.received.1 + bytes as u64);
    }

    /// The peer has received so much in all.
    fn reported(&mut self, now: Time, packets: u64, bytes: u64) {
        if packets < self.reported.0 || bytes < self.reported.1 {
            // An older report that was overtaken.
            return;
        }
        if let Some(before) = self.reported_at {
            let seconds = now.since(before).as_secs_f64();
            if seconds < REPORT_EVERY.as_secs_f64() / 4.0 {
                return;
            }
            let arrived = (packets - self.reported.0) as f64;
            let sent = self.sent.0.saturating_sub(self.sent_then.0) as f64;
            let through = (bytes - self.reported.1) as f64 / seconds;
            self.rate = self.sent.1.saturating_sub(self.sent_then.1) as f64 / seconds;
            let full = arrived < sent * (1.0 - LOSS_OF_A_FULL_PATH);
            self.capacity = if full { (self.capacity + through) / 2.0 } else { self.capacity.max(through) };
        }
        self.fresh /= 2.0;
        self.reported_at = Some(now);
        self.reported = (packets, bytes);
        self.sent_then = self.sent;
    }

    /// How full it is; `most` is the capacity of the best path, which one that was never measured may have, too.
    fn fullness(&self, now: Time, most: f64) -> f64 {
        let stale = self.reported_at.is_none_or(|at| now.since(at) > RATE_FOR);
        // Nothing is reported where nothing arrives: what was sent since counts as well.
        let since = self.sent.1.saturating_sub(self.sent_then.1) as f64;
        let rate = if stale { 0.0 } else { self.rate };
        let capacity = if self.capacity > 0.0 { self.capacity } else { most };
        (rate.max(since) + 1.0 + self.fresh * GUESS) / capacity.max(1.0)
    }
}

impl Paths {
    /// Flows are spread over several paths.
    pub fn spreads(&self) -> bool {
        self.shared().nth(1).is_some()
    }

    /// The path of a flow.
    pub fn lane(&mut self, now: Time, flow: u32) -> Option<Path> {
        let pinned = self.flows.pinned.get(&flow).filter(|(_, last)| now.since(*last) < IDLE_FLOW).copied();
        let still = pinned.and_then(|(key, _)| self.shared().find(|at| self.list[*at].path.key() == key));
        let at = still.or_else(|| self.emptiest(now))?;
        self.list[at].load.fresh += if still.is_none() { 1.0 } else { 0.0 };
        let path = self.list[at].path;
        self.flows.pin(flow, path.key(), now);
        Some(path)
    }

    /// Takes `datagrams` of `bytes` in all as sent by the path of a flow.
    pub fn lane_target(&mut self, now: Time, path: Path, datagrams: usize, bytes: usize) -> Option<Path> {
        self.sent = now;
        let at = self.find(path.key())?;
        let known = &mut self.list[at];
        known.carries(now);
        known.load.sent = (known.load.sent.0 + datagrams as u64, known.load.sent.1 + bytes as u64);
        Some(known.path)
    }

    /// Places of the paths that share the flows.
    pub(super) fn shared(&self) -> impl Iterator<Item = usize> {
        let share = move |at: &usize| {
            let known = &self.list[*at];
            let meant = match self.role {
                Role::Client => self.mode == Mode::Balance,
                Role::Server => known.status() == Some(PathStatus::Share),
            };
            meant && known.path.carrier != INSIDE && self.is_usable(*at)
        };
        (0..self.list.len()).filter(share)
    }

    fn emptiest(&self, now: Time) -> Option<usize> {
        let most = self.shared().map(|at| self.list[at].load.capacity).fold(0.0, f64::max);
        let fullness = |at: &usize| self.list[*at].load.fullness(now, most);
        self.shared().min_by(|a, b| fullness(a).total_cmp(&fullness(b)))
    }

    pub(super) fn hear_report(&mut self, now: Time, at: usize, packets: u64, bytes: u64) {
        self.list[at].load.reported(now, packets, bytes);
    }

    /// Tells the peer what came, now and then.
    pub(super) fn report(&mut self, now: Time) {
        if !self.spreads() {
            return;
        }
        for known in &mut self.list {
            let load = &mut known.load;
            if load.received != load.told && now.since(load.told_at) >= REPORT_EVERY {
                (load.told, load.told_at) = (load.received, now);
                let message = InBand::PathReport { packets: load.received.0, bytes: load.received.1 };
                self.said.push_back(Say { message, path: known.path, pad: 0 });
            }
        }
    }

    /// When [`Paths::report`] is due.
    pub(super) fn report_at(&self) -> Option<Time> {
        if !self.spreads() {
            return None;
        }
        let untold = self.list.iter().map(|known| &known.load).filter(|load| load.received != load.told);
        untold.map(|load| load.told_at + REPORT_EVERY).min()
    }
}

/// Between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// A path that loses more than this carries as much as it can.
const LOSS_OF_A_FULL_PATH: f64 = 0.02;
/// Bytes per second of a flow that has just begun.
const GUESS: f64 = 100_000.0;
/// What is known of a rate is true for so long.
const RATE_FOR: Duration = Duration::from_secs(1);
/// A flow that was silent for so long may go by another path.
const IDLE_FLOW: Duration = Duration::from_secs(10);
const MOST_FLOWS: usize = 4_096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::tests::{MS, PACKET, SILENT, client, said, server_with, start};

    /// A second of sending `bytes` a millisecond by a path that carries `capacity` of them.
    fn second(load: &mut Load, now: &mut Time, bytes: u64, capacity: u64) {
        for ms in 0..1_000u64 {
            *now = *now + Duration::from_millis(1);
            load.sent = (load.sent.0 + bytes / 100, load.sent.1 + bytes);
            let through = bytes.min(capacity);
            load.received = (load.received.0 + through / 100, load.received.1 + through);
            if ms % 250 == 0 {
                let (packets, bytes) = load.received;
                load.reported(*now, packets, bytes);
            }
        }
    }

    #[test]
    fn capacity_is_what_gets_through_when_more_is_sent() {
        let (mut load, mut now) = (Load::default(), Time::default());
        second(&mut load, &mut now, 1_000, 4_000);
        assert!((load.capacity / 1e6 - 1.0).abs() < 0.1, "at least {}", load.capacity);
        for _ in 0..3 {
            second(&mut load, &mut now, 10_000, 4_000);
        }
        assert!((load.capacity / 4e6 - 1.0).abs() < 0.1, "{}", load.capacity);
        // It became narrower.
        for _ in 0..5 {
            second(&mut load, &mut now, 10_000, 2_000);
        }
        assert!((load.capacity / 2e6 - 1.0).abs() < 0.1, "{}", load.capacity);
        // Less is sent: that says nothing against it.
        second(&mut load, &mut now, 500, 2_000);
        assert!((load.capacity / 2e6 - 1.0).abs() < 0.1, "{}", load.capacity);
        assert!(load.fullness(now, 0.0) < 0.5);
    }

    #[test]
    fn flows_beyond_the_bound_are_forgotten() {
        let (mut flows, start) = (Flows::default(), Time::default());
        let key = (([192, 0, 2, 1], 1).into(), 0);
        for flow in 0..3 * MOST_FLOWS as u32 {
            flows.pin(flow, key, start);
            assert!(flows.pinned.len() <= MOST_FLOWS);
        }
        // Those that rest go first.
        flows.pinned.clear();
        (0..MOST_FLOWS as u32 - 1).for_each(|flow| flows.pin(flow, key, start));
        flows.pin(u32::MAX, key, start + IDLE_FLOW);
        flows.pin(u32::MAX - 1, key, start + IDLE_FLOW);
        assert_eq!(flows.pinned.len(), 2);
    }

    #[test]
    fn reports_that_were_overtaken_or_come_too_fast_count_for_nothing() {
        let mut load = Load::default();
        let at = |ms| Time::default() + Duration::from_millis(ms);
        load.sent = (100, 10_000);
        load.reported(at(0), 0, 0);
        load.reported(at(250), 100, 10_000);
        let capacity = load.capacity;
        load.reported(at(251), 101, 10_100);
        load.reported(at(600), 50, 5_000);
        assert_eq!(load.capacity, capacity);
        assert_eq!(load.reported, (100, 10_000));
    }

    #[test]
    fn a_report_says_what_got_through_and_what_was_lost() {
        // Of 100 packets of 1,000 bytes, half a second after the first report: how many arrived, and the capacity then.
        for (before, arrived, capacity) in [
            (0.0, 100, 200_000.0),
            (150_000.0, 100, 200_000.0),
            (300_000.0, 100, 300_000.0),
            (300_000.0, 98, 300_000.0),
            (300_000.0, 97, 247_000.0),
            (300_000.0, 0, 150_000.0),
        ] {
            let mut load = Load { sent: (500, 500_000), capacity: before, fresh: 3.0, ..Load::default() };
            load.reported(start(), 490, 490_000);
            assert_eq!((load.capacity, load.rate, load.fresh), (before, 0.0, 1.5), "nothing to compare with");
            load.sent = (600, 600_000);
            load.reported(start() + 500 * MS, 490 + arrived, 490_000 + arrived * 1_000);
            assert_eq!(
                (load.capacity, load.rate, load.fresh),
                (capacity, 200_000.0, 0.75),
                "{arrived} arrived"
            );
            assert_eq!((load.sent_then, load.reported_at), ((600, 600_000), Some(start() + 500 * MS)));
        }
    }

    #[test]
    fn a_report_counts_if_it_is_no_less_and_some_time_after_the_last() {
        for (after, packets, bytes, counts) in [
            (63 * MS, 101, 10_001, true),
            (62_500 * MS / 1_000, 101, 10_001, true),
            (62 * MS, 101, 10_001, false),
            (250 * MS, 100, 10_000, true),
            (250 * MS, 99, 10_001, false),
            (250 * MS, 101, 9_999, false),
        ] {
            let mut load = Load::default();
            load.reported(start(), 100, 10_000);
            load.reported(start() + after, packets, bytes);
            let last = if counts { start() + after } else { start() };
            assert_eq!(load.reported_at, Some(last), "{packets} packets, {bytes} bytes, {after:?}");
        }
    }

    #[test]
    fn how_full_a_path_is() {
        let load = Load {
            sent: (0, 900),
            sent_then: (0, 400),
            reported_at: Some(start()),
            rate: 2_999.0,
            capacity: 10_000.0,
            ..Load::default()
        };
        let full = |load: Load, ms| load.fullness(start() + ms * MS, 5_000.0);
        assert_eq!(full(load, 1_000), 0.3);
        assert_eq!(full(load, 1_001), 501.0 / 10_000.0, "that was long ago");
        assert_eq!(full(Load { sent: (0, 5_399), ..load }, 0), 0.5, "more since");
        assert_eq!(full(Load { reported_at: None, ..load }, 0), 501.0 / 10_000.0);
        assert_eq!(full(Load { fresh: 0.5, ..load }, 0), (3_000.0 + GUESS / 2.0) / 10_000.0);
        assert_eq!(full(Load { capacity: 0.0, ..load }, 0), 0.6, "as good as the best");
        assert_eq!(load.fullness(start(), 0.0), 0.3);
        assert_eq!(Load { capacity: 0.0, ..load }.fullness(start(), 0.0), 3_000.0, "nothing is known of any");
    }

    fn balancing(carriers: &[u8]) -> Paths {
        let mut paths = client(carriers);
        paths.mode = Mode::Balance;
        paths
    }

    #[test]
    fn who_shares_the_flows() {
        let shared = |paths: &Paths| (paths.shared().collect::<Vec<_>>(), paths.spreads());
        let mut paths = balancing(&[0, 1, INSIDE]);
        assert_eq!(shared(&paths), (vec![0, 1], true));
        paths.list[0].lost = SILENT;
        assert_eq!(shared(&paths), (vec![1], false));
        paths.list[1].proven = false;
        assert_eq!(shared(&paths), (vec![], false));
        let mut paths = balancing(&[0, 1]);
        paths.mode = Mode::Redundant;
        assert_eq!(shared(&paths), (vec![], false));
        // To the server it is its client's word that counts.
        let (share, copy) = (Some(PathStatus::Share), Some(PathStatus::Copy));
        let mut paths = server_with(&[share, copy, share, None], &[None, None, SILENT, None]);
        assert_eq!(shared(&paths), (vec![1], false));
        paths.list[0].status = share;
        assert_eq!(shared(&paths), (vec![0, 1], true));
    }

    #[test]
    fn a_flow_keeps_its_path_until_it_rests() {
        let mut paths = balancing(&[0, 1]);
        let lane =
            |paths: &mut Paths, after, flow| paths.lane(start() + after, flow).expect("a path").carrier;
        assert_eq!(lane(&mut paths, Duration::ZERO, 7), 0);
        assert_eq!((paths.list[0].load.fresh, paths.list[1].load.fresh), (1.0, 0.0));
        // There is one flow on it now.
        assert_eq!(lane(&mut paths, Duration::ZERO, 8), 1);
        paths.list[0].load.fresh = 9.0;
        assert_eq!(lane(&mut paths, IDLE_FLOW - MS, 7), 0);
        assert_eq!((paths.list[0].load.fresh, paths.list[1].load.fresh), (9.0, 1.0), "it is no fresh one");
        assert_eq!(lane(&mut paths, IDLE_FLOW * 2 - MS, 7), 1, "it rested");
        assert_eq!(paths.list[1].load.fresh, 2.0);
        // It can't stay where nothing answers.
        paths.list[1].lost = SILENT;
        assert_eq!(lane(&mut paths, IDLE_FLOW * 2, 7), 0);
    }

    #[test]
    fn a_path_without_a_figure_is_taken_for_as_wide_as_the_best() {
        let mut paths = balancing(&[0, 1, 2]);
        paths.list[0].load.capacity = 1e6;
        paths.list[1].load.capacity = 4e6;
        (paths.list[0].load.fresh, paths.list[1].load.fresh, paths.list[2].load.fresh) = (1.0, 2.0, 1.5);
        assert_eq!(paths.emptiest(start()), Some(2));
        paths.list[2].load.fresh = 2.5;
        assert_eq!(paths.emptiest(start()), Some(1));
    }

    #[test]
    fn what_is_sent_by_a_lane_is_counted() {
        let mut paths = balancing(&[0, 1]);
        let (now, path) = (start() + MS, paths.list[1].path);
        for n in 1..3 {
            assert_eq!(paths.lane_target(now, path, 3, 4_000), Some(path));
            assert_eq!(paths.list[1].load.sent, (n * 3, n * 4_000));
        }
        assert_eq!((paths.sent, paths.list[1].waiting), (now, Some(now)));
        assert_eq!(paths.lane_target(now, path.by(9), 1, 100), None);
    }

    #[test]
    fn what_came_is_reported_four_times_a_second() {
        let mut paths = balancing(&[0, 1]);
        let path = paths.list[1].path;
        assert_eq!(paths.report_at(), None);
        paths.list[1].load.told_at = start();
        (0..3).for_each(|_| paths.heard(start() + MS, path, true, PACKET, None));
        assert_eq!(paths.report_at(), Some(start() + REPORT_EVERY));
        paths.report(start() + (REPORT_EVERY - MS));
        assert_eq!(said(&mut paths), []);
        paths.report(start() + REPORT_EVERY);
        let message = InBand::PathReport { packets: 3, bytes: 3 * PACKET as u64 };
        assert_eq!(said(&mut paths), [(path, message)]);
        // Once is enough.
        assert_eq!(paths.report_at(), None);
        paths.report(start() + REPORT_EVERY * 2);
        assert_eq!(said(&mut paths), []);
        // Where flows aren't shared out, nobody wants to know.
        paths.heard(start() + REPORT_EVERY * 3, path, true, PACKET, None);
        paths.mode = Mode::Failover;
        assert_eq!(paths.report_at(), None);
        paths.report(start() + REPORT_EVERY * 4);
        assert_eq!(said(&mut paths), []);
    }

    #[test]
    fn the_peers_report_is_of_the_path_it_came_by() {
        let mut paths = balancing(&[0, 1]);
        let path = paths.list[1].path;
        paths.heard(start(), path, true, PACKET, Some(InBand::PathReport { packets: 7, bytes: 700 }));
        assert_eq!((paths.list[0].load.reported, paths.list[1].load.reported), ((0, 0), (7, 700)));
    }
}
