//! TLS sessions that clients may take up again, kept for the workers (src/tls/tickets.rs says why here): a few for each
//! client, each handed out once.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tunguard::time::Time;
use tunguard::tls::{CertId, SavedSession, TicketId};

/// The sessions behind tickets.
#[derive(Debug)]
pub struct Tickets {
    /// So many at all.
    most: usize,
    /// So many of one client.
    each: usize,
    by_id: HashMap<TicketId, Held>,
    /// Oldest first.
    of: HashMap<String, VecDeque<TicketId>>,
}

/// A session at rest.
#[derive(Debug)]
pub struct Held {
    holder: Holder,
    session: SavedSession,
    until: Time,
}

/// Whom a session belongs to: who resumes it can be nobody else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The client.
    pub name: String,
    /// The certificate it has shown.
    pub cert: CertId,
    /// Seconds since 1970: from then on it has to show it again.
    pub until: i64,
}

impl Tickets {
    /// None yet, for so many sessions, of which so many are one client's.
    pub fn new(sessions: usize, of_one: usize) -> Tickets {
        let (by_id, of) = (HashMap::new(), HashMap::new());
        Tickets { most: most(sessions), each: each(of_one), by_id, of }
    }

    /// There may be so many from now on.
    pub fn set_sessions(&mut self, sessions: usize, of_one: usize) {
        (self.most, self.each) = (most(sessions), each(of_one));
    }

    /// There is nothing to watch over.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Keeps a session of `holder`; its oldest one goes where it has enough. `false` where the number is taken.
    pub fn keep(&mut self, holder: Holder, id: TicketId, session: SavedSession, now: Time) -> bool {
        if self.by_id.contains_key(&id) {
            return false;
        }
        // Clients come and go, and names are free to those that nobody watches.
        if self.by_id.len() >= self.most
            && let Some(oldest) = self.by_id.iter().min_by_key(|(_, held)| held.until).map(|(id, _)| *id)
        {
            self.forget(&oldest);
        }
        let own = self.of.entry(holder.name.clone()).or_default();
        own.push_back(id);
        if own.len() > self.each
            && let Some(oldest) = own.pop_front()
        {
            self.by_id.remove(&oldest);
        }
        self.by_id.insert(id, Held { holder, session, until: now + LIFETIME });
        true
    }

    /// The session behind a ticket, which is gone with that. `wall`: seconds since 1970.
    pub fn redeem(&mut self, id: &TicketId, now: Time, wall: i64) -> Option<(Holder, SavedSession)> {
        let held = self.forget(id)?;
        (now < held.until && wall < held.holder.until).then_some((held.holder, held.session))
    }

    /// This one is of no use.
    pub fn forget(&mut self, id: &TicketId) -> Option<Held> {
        let held = self.by_id.remove(id)?;
        if let Some(own) = self.of.get_mut(&held.holder.name) {
            own.retain(|own| own != id);
            if own.is_empty() {
                self.of.remove(&held.holder.name);
            }
        }
        Some(held)
    }

    /// To be called once in a while: what is too old goes.
    pub fn handle_timeout(&mut self, now: Time) {
        let old: Vec<TicketId> =
            self.by_id.iter().filter(|(_, held)| held.until <= now).map(|(id, _)| *id).collect();
        for id in old {
            self.forget(&id);
        }
    }

    /// Whom to trust has changed: everybody shows a certificate again.
    pub fn clear(&mut self) {
        self.by_id.clear();
        self.of.clear();
    }
}

fn most(sessions: usize) -> usize {
    sessions.max(1) * EACH * 2
}

fn each(of_one: usize) -> usize {
    of_one.max(1) * EACH
}

/// Tickets of one session: one for the connection under way, one for another that races it.
const EACH: usize = 2;
/// OpenSSL's own limit for a session.
const LIFETIME: Duration = Duration::from_secs(2 * 3_600);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn holder(name: &str) -> Holder {
        Holder {
            name: name.to_owned(),
            cert: CertId { issuer: [1; 32], serial: vec![7], not_after: 0 },
            until: 100,
        }
    }

    fn session(n: u8) -> SavedSession {
        SavedSession::from_bytes(vec![n])
    }

    fn at(seconds: u64) -> Time {
        Time::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn a_ticket_is_good_once_and_for_two_hours() {
        let mut tickets = Tickets::new(3, 1);
        assert!(tickets.keep(holder("alice"), [1; 32], session(1), at(0)));
        assert!(!tickets.keep(holder("bob"), [1; 32], session(2), at(0)), "taken");
        assert_eq!(tickets.redeem(&[1; 32], at(7_199), 99), Some((holder("alice"), session(1))));
        assert_eq!(tickets.redeem(&[1; 32], at(7_199), 99), None);
        tickets.keep(holder("alice"), [2; 32], session(1), at(0));
        assert_eq!(tickets.redeem(&[2; 32], at(7_200), 99), None);
        assert!(tickets.of.is_empty());
        // However young it is: the certificates it goes back to are too old.
        tickets.keep(holder("alice"), [3; 32], session(1), at(0));
        assert_eq!(tickets.redeem(&[3; 32], at(1), 100), None);
    }

    #[test]
    fn of_too_many_the_oldest_goes() {
        let mut tickets = Tickets::new(1, 1);
        for n in 0..20 {
            tickets.keep(holder(&format!("c{n}")), [n; 32], session(n), at(n.into()));
        }
        assert_eq!(tickets.by_id.len(), 4);
        assert_eq!(tickets.redeem(&[15; 32], at(20), 99), None);
        assert!(tickets.redeem(&[16; 32], at(20), 99).is_some());
    }

    #[test]
    fn the_oldest_goes_and_a_change_of_trust_ends_all() {
        let mut tickets = Tickets::new(3, 1);
        for n in 1..=3 {
            tickets.keep(holder("alice"), [n; 32], session(n), at(0));
        }
        tickets.keep(holder("bob"), [9; 32], session(9), at(0));
        assert_eq!(tickets.redeem(&[1; 32], at(1), 99), None);
        assert_eq!(tickets.redeem(&[2; 32], at(1), 99), Some((holder("alice"), session(2))));
        tickets.clear();
        for id in [[3; 32], [9; 32]] {
            assert_eq!(tickets.redeem(&id, at(1), 99), None);
        }
    }

    #[test]
    fn each_session_of_a_client_has_its_own() {
        let mut tickets = Tickets::new(10, 3);
        for n in 1..=7 {
            tickets.keep(holder("alice"), [n; 32], session(n), at(0));
        }
        assert_eq!(tickets.redeem(&[1; 32], at(1), 99), None);
        assert!((2..=7).all(|n| tickets.redeem(&[n; 32], at(1), 99).is_some()));
    }

    #[test]
    fn what_is_too_old_goes_without_being_asked_for() {
        let mut tickets = Tickets::new(3, 1);
        assert!(tickets.is_empty());
        tickets.keep(holder("alice"), [1; 32], session(1), at(0));
        tickets.keep(holder("bob"), [2; 32], session(2), at(1));
        tickets.handle_timeout(at(7_199));
        assert_eq!(tickets.by_id.len(), 2);
        tickets.handle_timeout(at(7_200));
        assert_eq!(tickets.by_id.keys().collect::<Vec<_>>(), [&[2; 32]]);
        assert!(!tickets.is_empty());
        tickets.handle_timeout(at(7_201));
        assert!(tickets.is_empty() && tickets.of.is_empty());
    }

    #[test]
    fn as_many_are_kept_as_the_present_limits_say() {
        let mut tickets = Tickets::new(1, 1);
        let kept = |tickets: &mut Tickets, of_one: bool| {
            tickets.clear();
            for n in 0..=255 {
                let name = if of_one { "alice".to_owned() } else { format!("c{n}") };
                assert!(tickets.keep(holder(&name), [n; 32], session(n), at(0)));
            }
            tickets.by_id.len()
        };
        assert_eq!([true, false].map(|one| kept(&mut tickets, one)), [2, 4]);
        tickets.set_sessions(10, 3);
        // Two for each session, and as many again for clients that went.
        assert_eq!([true, false].map(|one| kept(&mut tickets, one)), [6, 40]);
        tickets.set_sessions(0, 0);
        assert_eq!([true, false].map(|one| kept(&mut tickets, one)), [2, 4]);
    }

    proptest! {
        #[test]
        fn it_never_holds_more_than_each_client_may_have(
            steps in prop::collection::vec((0u8..6, 0u8..40, 0u64..9_000), 1..300),
        ) {
            let mut tickets = Tickets::new(3, 1);
            let mut now = 0;
            for (who, id, wait) in steps {
                match who {
                    0 => drop(tickets.redeem(&[id; 32], at(now), 99)),
                    1 => { now += wait; tickets.handle_timeout(at(now)) }
                    _ => drop(tickets.keep(holder(&format!("c{who}")), [id; 32], session(id), at(now))),
                }
                prop_assert!(tickets.of.values().all(|own| (1..=EACH).contains(&own.len())));
                prop_assert_eq!(tickets.of.values().map(VecDeque::len).sum::<usize>(), tickets.by_id.len());
            }
        }
    }
}
