//! When new settings of a session are handed to the supervisor. The server may change them as often as it likes;
//! the supervisor takes no more than its budget.

use std::collections::VecDeque;
use std::time::Duration;

use crate::time::Time;

/// What a `Configure` was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The attempt with this serial.
    Attempt(u64),
    /// New settings of the session in use.
    Settings,
}

/// The `Configure` requests under way, and whether the next is due. Settings wait for the answer to the request
/// before and for `SETTINGS_EVERY`; only the newest are asked for then.
///
/// - `handle_*`: [`handle_asked`](Configuring::handle_asked), [`handle_answer`](Configuring::handle_answer),
///   [`handle_change`](Configuring::handle_change), [`handle_replaced`](Configuring::handle_replaced)
/// - `poll_*`: [`poll_timeout`](Configuring::poll_timeout)
#[derive(Clone, Debug, Default)]
pub struct Configuring {
    /// What the answers will be for, in order.
    asked: VecDeque<Purpose>,
    /// The settings have changed since they were asked for.
    changed: bool,
    /// Not before.
    next: Time,
}

impl Configuring {
    /// A request was sent.
    pub fn handle_asked(&mut self, purpose: Purpose, now: Time) {
        self.asked.push_back(purpose);
        if purpose == Purpose::Settings {
            self.changed = false;
        }
        self.next = now + SETTINGS_EVERY;
    }

    /// An answer came; what for, unless nothing was asked.
    pub fn handle_answer(&mut self) -> Option<Purpose> {
        self.asked.pop_front()
    }

    /// The server changed the settings.
    pub fn handle_change(&mut self) {
        self.changed = true;
    }

    /// The session whose settings changed is not the one in use any more.
    pub fn handle_replaced(&mut self) {
        self.changed = false;
    }

    /// When to ask for the settings as they are then.
    pub fn poll_timeout(&self) -> Option<Time> {
        (self.changed && self.asked.is_empty()).then_some(self.next)
    }
}

/// Well within the supervisor's budget.
const SETTINGS_EVERY: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[test]
    fn a_lone_change_is_asked_for_at_once() {
        let now = Time::default() + MILLI * 5_000;
        let mut configuring = Configuring::default();
        assert_eq!(configuring.poll_timeout(), None);
        configuring.handle_change();
        assert!(configuring.poll_timeout().is_some_and(|at| at <= now));
    }

    #[test]
    fn a_thousand_changes_are_a_few_requests() {
        let mut now = Time::default();
        let mut configuring = Configuring::default();
        let mut asked = 0;
        for _ in 0..1_000 {
            configuring.handle_change();
            if configuring.poll_timeout().is_some_and(|at| at <= now) {
                asked += 1;
                configuring.handle_asked(Purpose::Settings, now);
                configuring.handle_change();
                assert_eq!(configuring.poll_timeout(), None, "one at a time");
                assert_eq!(configuring.handle_answer(), Some(Purpose::Settings));
            }
            now = now + MILLI;
        }
        assert_eq!(asked, 2);
        // The last change isn't forgotten.
        assert_eq!(configuring.poll_timeout(), Some(Time::default() + SETTINGS_EVERY * 2));
    }

    #[test]
    fn an_attempts_answer_comes_first_and_its_session_has_settings_of_its_own() {
        let now = Time::default();
        let mut configuring = Configuring::default();
        configuring.handle_asked(Purpose::Attempt(3), now);
        configuring.handle_change();
        assert_eq!(configuring.poll_timeout(), None);
        assert_eq!(configuring.handle_answer(), Some(Purpose::Attempt(3)));
        // It failed: the session before stays, and has changed.
        assert_eq!(configuring.poll_timeout(), Some(now + SETTINGS_EVERY));
        configuring.handle_replaced();
        assert_eq!(configuring.poll_timeout(), None);
        assert_eq!(configuring.handle_answer(), None, "nothing was asked");
    }
}
