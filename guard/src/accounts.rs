//! What the guard itself drops, by reason.

/// Why the guard dropped a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardDrop {
    /// From the device: no session has this destination.
    NoRoute,
    /// From the device: the client that has this destination has no session.
    Away,
    /// From the device: no IP packet of the stated length.
    BadInner,
    /// From the device: the session's queue and memory are full.
    QueueFull,
    /// From the device: the session's queue stood for too long (RFC 8289).
    Codel,
    /// From the device: more than the client may be sent.
    RateDown,
    /// From the device: the kernel couldn't hand it over.
    Unreadable,
    /// From a worker: no record, or no IP packet of the stated length.
    BadRecord,
    /// From a worker: the source is not its session's.
    SourceNotOurs,
    /// From a worker: more than its client may send.
    RateUp,
    /// From a worker: the device refused it.
    TunRefused,
}

impl GuardDrop {
    /// Every reason, in order.
    pub const ALL: [GuardDrop; 11] = [
        GuardDrop::NoRoute,
        GuardDrop::Away,
        GuardDrop::BadInner,
        GuardDrop::QueueFull,
        GuardDrop::Codel,
        GuardDrop::RateDown,
        GuardDrop::Unreadable,
        GuardDrop::BadRecord,
        GuardDrop::SourceNotOurs,
        GuardDrop::RateUp,
        GuardDrop::TunRefused,
    ];

    /// The name in `status`.
    pub fn name(self) -> &'static str {
        match self {
            GuardDrop::NoRoute => "no_route",
            GuardDrop::Away => "away",
            GuardDrop::BadInner => "bad_inner",
            GuardDrop::QueueFull => "queue_full",
            GuardDrop::Codel => "codel",
            GuardDrop::RateDown => "rate_down",
            GuardDrop::Unreadable => "unreadable",
            GuardDrop::BadRecord => "bad_record",
            GuardDrop::SourceNotOurs => "source_not_ours",
            GuardDrop::RateUp => "rate_up",
            GuardDrop::TunRefused => "tun_refused",
        }
    }
}

/// Packets and bytes through the device, and drops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accounts {
    /// Packets and super-packets read from the device.
    pub read_packets: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Packets and super-packets handed to sessions: in their queues, or waiting for room there.
    pub queued_packets: u64,
    /// Senders told that nobody is there: packets written to the device.
    pub told: u64,
    drops: [u64; GuardDrop::ALL.len()],
}

impl Accounts {
    /// Counts one packet dropped.
    pub fn drop(&mut self, reason: GuardDrop) {
        self.drop_many(reason, 1);
    }

    /// Counts `packets` dropped.
    pub fn drop_many(&mut self, reason: GuardDrop, packets: u64) {
        self.drops[reason as usize] += packets;
    }

    /// Packets dropped for `reason`.
    pub fn dropped(&self, reason: GuardDrop) -> u64 {
        self.drops[reason as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_reason_is_counted_under_a_name_of_its_own() {
        let mut accounts = Accounts::default();
        for (n, reason) in (1..).zip(GuardDrop::ALL) {
            accounts.drop(reason);
            accounts.drop_many(reason, n);
        }
        assert!((2..).zip(GuardDrop::ALL).all(|(n, reason)| accounts.dropped(reason) == n));
        let names: HashSet<&str> = GuardDrop::ALL.map(GuardDrop::name).into();
        assert_eq!(names.len(), GuardDrop::ALL.len());
        let is_word =
            |name: &str| !name.is_empty() && name.chars().all(|c| c == '_' || c.is_ascii_lowercase());
        assert!(names.iter().all(|name| is_word(name)), "{names:?}");
    }
}
