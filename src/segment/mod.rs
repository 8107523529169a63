//! Super-packets and their segments, with no I/O and no allocation: what the TUN device hands over in one
//! read is cut into packets that fit a datagram, and opened packets are merged for one write.
//!
//! ```text
//!   TUN read  -> [vnet][IP TCP|aaaa bbbb cc]  -- Segments --> [IP TCP|aaaa] [IP TCP|bbbb] [IP TCP|cc]
//!   TUN write <- [vnet][IP TCP]+aaaa+bbbb+cc  <- next_run --- [IP TCP|aaaa] [IP TCP|bbbb] [IP TCP|cc]
//! ```
//!
//! The two are inverse to each other: what [`next_run`] merges, [`Segments`] (and the kernel's own
//! segmentation) cuts into the same bytes again. So a merged packet differs from its segments for nobody
//! behind the TUN device.
//!
//! Every function accepts any bytes and returns an error rather than panics.
//!
//! 1. [`inner`]: where the headers of a packet are.
//! 2. [`Segments`], [`pieces`]: the way out of the TUN device.
//! 3. [`next_run`]: the way in.
//! 4. [`ecn`]: congestion marks of the outer packet carried over to the inner one.
//! 5. [`clamp_mss`], [`fragment()`], [`too_big()`]: packets made to fit a path, or their senders told;
//!    [`unreachable()`]: that nobody is there.
//! 6. [`is_noise`]: packets that say nothing of somebody using the tunnel.
//! 7. [`checksum`]: the Internet checksum, for all of these.

pub mod checksum;
mod coalesce;
pub mod ecn;
mod fragment;
mod icmp;
pub mod inner;
mod mss;
mod noise;
mod split;
mod too_big;
mod unreachable;

#[cfg(test)]
mod tests;

pub use coalesce::{Inner, MAX_RUN, Run, next_run};
pub use fragment::fragment;
pub use inner::addresses;
pub use mss::clamp_mss;
pub use noise::{is_broadcast, is_from, is_noise};
pub use split::{MAX_SEGMENTS, Segment, Segments, pieces};
pub use too_big::too_big;
pub use unreachable::unreachable;

/// Why a packet is not cut or merged. Whoever wrote the packet can provoke any of these: count and drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SegmentError {
    /// [`next_run`] was given no packet at all.
    #[error("no packet")]
    Empty,
    /// The packet ends inside its headers.
    #[error("the packet ends inside its headers")]
    TooShort,
    /// The version nibble is neither 4 nor 6.
    #[error("neither IPv4 nor IPv6")]
    NotIp,
    /// A header says that it is shorter than its fixed part, or longer than the packet.
    #[error("a header's length field is out of range")]
    BadHeaderLength,
    /// A length field of IP or UDP is not the number of bytes that are there.
    #[error("a length field differs from the bytes present")]
    LengthMismatch,
    /// A fragment: only the first has a transport header, and none a checksum of its own.
    #[error("an IP fragment")]
    Fragment,
    /// Neither TCP nor UDP, or behind an extension header that we don't follow.
    #[error("neither TCP nor UDP")]
    NotTransport,
    /// The virtio header's `gso_type` is unknown, or is not what the packet is.
    #[error("the GSO type is unknown or not the packet's")]
    BadGsoType,
    /// A super-packet whose segments would carry nothing.
    #[error("the GSO size is zero")]
    ZeroGsoSize,
    /// `csum_start` and `csum_offset` point outside the packet, or in a super-packet not at the checksum.
    #[error("the checksum position is out of range")]
    BadChecksumStart,
    /// The super-packet has more than [`MAX_SEGMENTS`] segments.
    #[error("more than {MAX_SEGMENTS} segments")]
    TooManySegments,
    /// [`pieces`]: a segment, or a packet that is not a super-packet, is longer than the longest piece.
    #[error("one segment is longer than a piece may be")]
    TooLong,
}
