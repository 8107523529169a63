//! Which remote to try, when, and when to give up.

use std::time::Duration;

use crate::exit::{Exit, Failure};
use crate::time::Time;

/// The state of getting and keeping a session.
///
/// - getters: [`remote`](Attempts::remote), [`number`](Attempts::number)
/// - `handle_*`: [`handle_connected`](Attempts::handle_connected), [`handle_failed`](Attempts::handle_failed),
///   [`handle_established`](Attempts::handle_established), [`handle_lost`](Attempts::handle_lost),
///   [`handle_moved`](Attempts::handle_moved)
///
/// An attempt begins with [`remote`](Attempts::remote) and ends in `handle_failed` or `handle_established`; a session
/// ends in `handle_lost`. `jitter` is
/// any random number: it spreads clients that lost the same server.
#[derive(Clone, Debug)]
pub struct Attempts {
    remotes: usize,
    remote: usize,
    /// What each remote said in the round under way, where it was final.
    refusals: Vec<Option<Failure>>,
    ever_established: bool,
    established: Option<Time>,
    /// Attempts that led nowhere since the last good session.
    failures: u32,
    /// Attempts that failed since the last session of any kind.
    tries: u32,
    /// When a session was lost, or a process that had one: the server is likely to be back soon.
    lost: Option<Time>,
}

/// An attempt that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// Why.
    pub failure: Failure,
    /// How final that is.
    pub finality: Finality,
}

/// How final a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finality {
    /// It may work a moment later.
    Passing,
    /// It will not work without a change here or there; but a stranger on the path could have said so.
    Lasting,
    /// The server itself told us never to come back.
    Final,
}

impl Failed {
    /// A failure that may pass.
    pub fn passing(failure: Failure) -> Failed {
        Failed { failure, finality: Finality::Passing }
    }

    /// A failure of TLS: of the handshake, or (`authentic`) the server's word inside it.
    pub fn tls(failure: Failure, authentic: bool) -> Failed {
        let finality = match failure.exit {
            Exit::CertificateRevoked if authentic => Finality::Final,
            Exit::CertificateForeign | Exit::CertificateExpired | Exit::CertificateRevoked => {
                Finality::Lasting
            }
            _ => Finality::Passing,
        };
        Failed { failure, finality }
    }
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Try [`Attempts::remote`] after this time.
    RetryIn(Duration),
    /// Exit with this.
    GiveUp(Failure),
}

impl Attempts {
    /// Nothing tried yet; `ever_established` says whether an earlier process had a session.
    pub fn new(remotes: usize, ever_established: bool, now: Time) -> Attempts {
        let remotes = remotes.max(1);
        Attempts {
            remotes,
            remote: 0,
            refusals: vec![None; remotes],
            ever_established,
            established: None,
            failures: 0,
            tries: 0,
            lost: ever_established.then_some(now),
        }
    }

    /// Begins with this remote rather than with the first.
    pub fn starting_at(mut self, remote: usize) -> Attempts {
        self.remote = remote % self.remotes;
        self
    }

    /// The remote to begin with, or the one that was connected to.
    pub fn remote(&self) -> usize {
        self.remote
    }

    /// The number of the attempt under way or to come, from 1 after each session.
    pub fn number(&self) -> u32 {
        self.tries.saturating_add(1)
    }

    /// This remote is the one that could be connected to.
    pub fn handle_connected(&mut self, remote: usize) {
        self.remote = remote.min(self.remotes - 1);
    }

    /// The attempt failed: the next remote's turn.
    pub fn handle_failed(&mut self, failed: &Failed, now: Time, jitter: u32) -> Next {
        let (place, failure) = (self.remote, &failed.failure);
        self.remote = (self.remote + 1) % self.remotes;
        self.failures = self.failures.saturating_add(1);
        self.tries = self.tries.saturating_add(1);
        self.refusals[place] = (failed.finality != Finality::Passing).then(|| failure.clone());
        let hopeless = match self.ever_established {
            true => failed.finality == Finality::Final,
            false => self.refusals.iter().all(Option::is_some),
        };
        if hopeless {
            return Next::GiveUp(failure.clone());
        }
        Next::RetryIn(self.backoff(now, jitter))
    }

    /// The attempt succeeded.
    pub fn handle_established(&mut self, now: Time) {
        self.ever_established = true;
        self.established = Some(now);
        self.tries = 0;
        self.refusals.fill(None);
    }

    /// The session was lost: when to look for the next. Its own remote comes first. At once, unless sessions have
    /// been short-lived.
    pub fn handle_lost(&mut self, now: Time, jitter: u32) -> Duration {
        let lived = self.established.take().map(|since| now.since(since)).unwrap_or_default();
        if lived > GOOD_SESSION {
            self.failures = 0;
        }
        // Sessions that break one after the other don't begin it anew.
        if lived > GOOD_SESSION || self.lost.is_none() {
            self.lost = Some(now);
        }
        let wait = if self.failures == 0 { spread(AT_ONCE, jitter) } else { self.backoff(now, jitter) };
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// This host has another way to the server now: what failed before says nothing of that, and the next attempt may
    /// start at once.
    pub fn handle_moved(&mut self, now: Time) {
        self.failures = 0;
        self.lost = Some(now);
    }

    /// Doubles with each round over all remotes; half of it is the jitter's. For some time after a session was lost
    /// it stays short, and grows from there.
    fn backoff(&mut self, now: Time, jitter: u32) -> Duration {
        let eager = self.lost.is_some_and(|lost| now.since(lost) < EAGER_FOR);
        let remotes = self.remotes as u32;
        let longest = match eager {
            true => {
                self.failures = self.failures.min(remotes.saturating_mul(EAGER_ROUNDS));
                EAGER_WAIT
            }
            false => LONGEST_WAIT,
        };
        let rounds = self.failures.saturating_sub(1) / remotes;
        let whole = FIRST_WAIT.saturating_mul(1 << rounds.min(16)).min(longest);
        whole / 2 + spread(whole / 2, jitter)
    }
}

fn spread(most: Duration, jitter: u32) -> Duration {
    most.mul_f64(f64::from(jitter) / f64::from(u32::MAX))
}

/// Wait after the first failure.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A server that is started again has its clients back within 2 s.
const EAGER_WAIT: Duration = Duration::from_millis(1_500);
const EAGER_FOR: Duration = Duration::from_secs(120);
/// Rounds that it takes to reach [`EAGER_WAIT`].
const EAGER_ROUNDS: u32 = 3;
/// The most that "at once" waits.
const AT_ONCE: Duration = Duration::from_millis(100);
/// A session that lived for so long was good.
const GOOD_SESSION: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: Time = Time::from_nanos(0);

    fn passing() -> Failed {
        Failed::passing(Failure::system("connect", "refused"))
    }

    fn foreign() -> Failed {
        Failed::tls(Failure::new(Exit::CertificateForeign, "foreign"), false)
    }

    fn revoked(authentic: bool) -> Failed {
        Failed::tls(Failure::new(Exit::CertificateRevoked, "revoked"), authentic)
    }

    fn millis(next: &Next) -> u128 {
        match next {
            Next::RetryIn(wait) => wait.as_millis(),
            Next::GiveUp(failure) => panic!("gave up: {failure}"),
        }
    }

    #[test]
    fn waits_double_up_to_half_a_minute() {
        let mut attempts = Attempts::new(1, false, START);
        let waits: Vec<u128> =
            (0..8).map(|_| millis(&attempts.handle_failed(&passing(), START, u32::MAX))).collect();
        assert_eq!(waits, [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        let mut attempts = Attempts::new(1, false, START);
        let least: Vec<u128> =
            (0..3).map(|_| millis(&attempts.handle_failed(&passing(), START, 0))).collect();
        assert_eq!(least, [250, 500, 1_000]);
    }

    #[test]
    fn remotes_take_turns_and_a_round_costs_no_more_than_one() {
        let mut attempts = Attempts::new(3, false, START);
        let mut seen = Vec::new();
        for _ in 0..7 {
            let remote = attempts.remote();
            seen.push((remote, millis(&attempts.handle_failed(&passing(), START, u32::MAX))));
        }
        assert_eq!(seen, [(0, 500), (1, 500), (2, 500), (0, 1_000), (1, 1_000), (2, 1_000), (0, 2_000)]);
    }

    #[test]
    fn gives_up_when_every_remote_refuses_for_good() {
        let mut attempts = Attempts::new(1, false, START);
        assert_eq!(attempts.handle_failed(&foreign(), START, 0), Next::GiveUp(foreign().failure));

        let mut attempts = Attempts::new(2, false, START);
        millis(&attempts.handle_failed(&foreign(), START, 0));
        millis(&attempts.handle_failed(&passing(), START, 0));
        millis(&attempts.handle_failed(&foreign(), START, 0));
        // The second remote's turn in the second round: now both have refused in one round.
        assert_eq!(attempts.handle_failed(&revoked(true), START, 0), Next::GiveUp(revoked(true).failure));
    }

    #[test]
    fn a_refusal_is_forgotten_when_the_remote_says_otherwise() {
        let mut attempts = Attempts::new(2, false, START);
        millis(&attempts.handle_failed(&foreign(), START, 0));
        millis(&attempts.handle_failed(&passing(), START, 0));
        millis(&attempts.handle_failed(&passing(), START, 0));
        millis(&attempts.handle_failed(&foreign(), START, 0));
    }

    #[test]
    fn after_a_first_session_only_the_servers_own_word_is_final() {
        let mut attempts = Attempts::new(1, false, START);
        attempts.handle_established(START);
        attempts.handle_lost(START, 0);
        millis(&attempts.handle_failed(&foreign(), START, 0));
        // Anyone on the path can send this alert before the handshake is done.
        millis(&attempts.handle_failed(&revoked(false), START, 0));
        assert_eq!(attempts.handle_failed(&revoked(true), START, 0), Next::GiveUp(revoked(true).failure));
        let mut restarted = Attempts::new(1, true, START);
        millis(&restarted.handle_failed(&foreign(), START, 0));
    }

    #[test]
    fn a_lost_session_is_looked_for_at_once_unless_it_flaps() {
        let second = Duration::from_secs(1);
        let mut now = START;
        let mut attempts = Attempts::new(2, false, START);
        millis(&attempts.handle_failed(&passing(), START, 0));
        assert_eq!(attempts.number(), 2);
        attempts.handle_established(now);
        // A good session wipes the slate clean, and its remote is tried first.
        now = now + second * 31;
        assert_eq!(attempts.handle_lost(now, u32::MAX), Duration::from_millis(100));
        assert_eq!((attempts.remote(), attempts.number()), (1, 1));
        attempts.handle_established(now);
        // One that broke at once doesn't: the next wait is a real one.
        now = now + second;
        assert_eq!(attempts.handle_lost(now, u32::MAX), Duration::from_millis(500));
        attempts.handle_established(now);
        assert_eq!(attempts.handle_lost(now, u32::MAX), Duration::from_millis(500));
        attempts.handle_established(now);
        assert_eq!(attempts.handle_lost(now, u32::MAX), Duration::from_millis(1_000));
    }

    #[test]
    fn a_server_that_comes_back_has_its_clients_within_two_seconds() {
        for remotes in [1, 3] {
            let mut attempts = Attempts::new(remotes, false, START);
            attempts.handle_established(START);
            let mut now = START + GOOD_SESSION * 2;
            let lost = now;
            now = now + attempts.handle_lost(now, u32::MAX);
            let mut waits = Vec::new();
            while now.since(lost) < Duration::from_secs(600) {
                let wait = millis(&attempts.handle_failed(&passing(), now, u32::MAX));
                assert!(wait <= 1_500 || now.since(lost) >= EAGER_FOR, "{wait} at {:?}", now.since(lost));
                waits.push(wait);
                now = now + Duration::from_millis(wait as u64);
            }
            // Then it grows, step by step, and never shrinks.
            waits.dedup();
            waits.retain(|wait| *wait > 500);
            assert_eq!(waits, [1_000, 1_500, 4_000, 8_000, 16_000, 30_000], "{remotes} remotes");
        }
    }

    #[test]
    fn a_host_that_moves_starts_anew() {
        let mut attempts = Attempts::new(1, false, START);
        attempts.handle_established(START);
        let mut now = START + GOOD_SESSION * 2;
        attempts.handle_lost(now, 0);
        while now.since(START) < EAGER_FOR * 4 {
            now = now
                + Duration::from_millis(millis(&attempts.handle_failed(&passing(), now, u32::MAX)) as u64);
        }
        attempts.handle_moved(now);
        let waits: Vec<u128> =
            (0..4).map(|_| millis(&attempts.handle_failed(&passing(), now, u32::MAX))).collect();
        assert_eq!(waits, [500, 1_000, 1_500, 1_500]);
        attempts.handle_established(now);
        attempts.handle_moved(now);
        assert!(attempts.handle_lost(now, u32::MAX) <= AT_ONCE, "not for a session that the move cut short");
    }

    #[test]
    fn a_process_started_again_is_as_eager_and_sessions_that_flap_are_not() {
        let mut restarted = Attempts::new(1, true, START);
        let waits: Vec<u128> =
            (0..5).map(|_| millis(&restarted.handle_failed(&passing(), START, u32::MAX))).collect();
        assert_eq!(waits, [500, 1_000, 1_500, 1_500, 1_500]);

        let (mut flapping, mut now) = (Attempts::new(1, false, START), START);
        for _ in 0..200 {
            flapping.handle_established(now);
            now = now + Duration::from_secs(1);
            now = now + flapping.handle_lost(now, u32::MAX);
        }
        flapping.handle_established(now);
        assert_eq!(flapping.handle_lost(now, u32::MAX), LONGEST_WAIT);
    }

    proptest! {
        #[test]
        fn waits_stay_in_bounds(failures in 1u32..200, remotes in 1usize..5, jitter in any::<u32>()) {
            let mut attempts = Attempts::new(remotes, true, START);
            for _ in 0..failures {
                let wait = millis(&attempts.handle_failed(&passing(), START, jitter));
                prop_assert!((250..=30_000).contains(&wait));
                prop_assert!(attempts.remote() < remotes);
            }
        }
    }
}
