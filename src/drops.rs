//! Every dropped packet is counted under the reason it was dropped for.

use std::fmt;

/// Why a session's packet was dropped. "Anyone" marks what a stranger on the network can provoke, "peer" what
/// only the authenticated peer can, "host" what only our own machine can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// Received: shorter than header and tag (anyone).
    TooShort,
    /// Received: unknown flags (anyone).
    Flags,
    /// Received: another session's ID (anyone, where the kernel's filter is missing).
    WrongSession,
    /// Received: no keys for this epoch (anyone).
    UnknownEpoch,
    /// Received: a counter seen before (anyone: a replay).
    Duplicate,
    /// Received: a counter behind the window (anyone: a replay; or extreme reordering).
    TooOld,
    /// Received: the tag doesn't fit (anyone).
    BadTag,
    /// Received or to send: the epoch is past its hard stop (peer: it didn't renew the keys).
    KeysExpired,
    /// Received: no in-band message of this version (peer).
    BadInBand,
    /// Received: the inner packet is no IP packet of the stated length (peer).
    BadInner,
    /// Received: the inner source is not the session's (peer).
    SourceNotOurs,
    /// Received: the inner destination is not ours (peer).
    DestinationNotOurs,
    /// Received: more than the client may send (peer).
    RateUp,
    /// Received: congestion marked on the way, and the inner packet can't carry the mark (RFC 6040).
    Congested,
    /// Received: the TUN device refused it (host).
    TunRefused,
    /// Received: the queue to the guard was full (host).
    UplinkFull,
    /// To send: nobody has told us the peer's address yet (host).
    NoPath,
    /// To send: more than three times of what came from an address that hasn't answered yet (peer).
    Unproven,
    /// To send: the device gave a packet or super-packet that makes no sense (host).
    BadSuperPacket,
    /// To send: the socket's buffer was full (host).
    SocketFull,
    /// To send: the kernel refused, for lack of a route or by a firewall (host).
    SendRefused,
    /// To send: larger than the path carries (host).
    TooBig,
}

impl DropReason {
    /// Every reason, in order.
    pub const ALL: [DropReason; 22] = [
        DropReason::TooShort,
        DropReason::Flags,
        DropReason::WrongSession,
        DropReason::UnknownEpoch,
        DropReason::Duplicate,
        DropReason::TooOld,
        DropReason::BadTag,
        DropReason::KeysExpired,
        DropReason::BadInBand,
        DropReason::BadInner,
        DropReason::SourceNotOurs,
        DropReason::DestinationNotOurs,
        DropReason::RateUp,
        DropReason::Congested,
        DropReason::TunRefused,
        DropReason::UplinkFull,
        DropReason::NoPath,
        DropReason::Unproven,
        DropReason::BadSuperPacket,
        DropReason::SocketFull,
        DropReason::SendRefused,
        DropReason::TooBig,
    ];

    /// The name in `status`.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::TooShort => "too_short",
            DropReason::Flags => "flags",
            DropReason::WrongSession => "wrong_session",
            DropReason::UnknownEpoch => "unknown_epoch",
            DropReason::Duplicate => "duplicate",
            DropReason::TooOld => "too_old",
            DropReason::BadTag => "bad_tag",
            DropReason::KeysExpired => "keys_expired",
            DropReason::BadInBand => "bad_in_band",
            DropReason::BadInner => "bad_inner",
            DropReason::SourceNotOurs => "source_not_ours",
            DropReason::DestinationNotOurs => "destination_not_ours",
            DropReason::RateUp => "rate_up",
            DropReason::Congested => "congested",
            DropReason::TunRefused => "tun_refused",
            DropReason::UplinkFull => "uplink_full",
            DropReason::NoPath => "no_path",
            DropReason::Unproven => "unproven",
            DropReason::BadSuperPacket => "bad_super_packet",
            DropReason::SocketFull => "socket_full",
            DropReason::SendRefused => "send_refused",
            DropReason::TooBig => "too_big",
        }
    }
}

/// A session's counters, in packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Drops([u64; DropReason::ALL.len()]);

impl Drops {
    /// Counts one packet.
    pub fn count(&mut self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts `packets`.
    pub fn add(&mut self, reason: DropReason, packets: u64) {
        self.0[reason as usize] += packets;
    }

    /// Packets dropped for `reason`.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Reasons that occurred, with their counts.
    pub fn nonzero(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.into_iter().map(|r| (r, self.get(r))).filter(|(_, n)| *n > 0)
    }
}

/// For the log.
impl fmt::Display for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<String> =
            self.nonzero().map(|(reason, packets)| format!("{} {packets}", reason.name())).collect();
        f.write_str(if list.is_empty() { "nothing" } else { "" })?;
        f.write_str(&list.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_listed_by_name() {
        let mut drops = Drops::default();
        assert_eq!(drops.to_string(), "nothing");
        drops.add(DropReason::TooBig, 2);
        drops.count(DropReason::BadTag);
        assert_eq!(drops.to_string(), "bad_tag 1, too_big 2");
    }

    #[test]
    fn all_lists_each_reason_at_its_own_place() {
        for (place, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place, "{reason:?}");
        }
    }
}
