//! Messages of the control channel (inside TLS): a 4-byte big-endian length, then the message in bincode
//! (big-endian, fixed-width integers, decoding bounded and of exactly that length).

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use bincode::config::{BigEndian, Configuration, Fixint, Limit};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::data::SessionId;
use crate::config::common::Suite;
use crate::resume::ResumeSecret;

/// The version in the first message.
pub const VERSION: u16 = 1;
/// The longest message, without its length.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// Bytes of the length in front of a message.
pub const LENGTH_LEN: usize = 4;

// What a Welcome and an Update may hold: more is refused by the client, and by the server's configuration.

/// Inner addresses of one client.
pub const MAX_ADDRESSES: usize = 4;
/// Subnets behind one client.
pub const MAX_SUBNETS: usize = 64;
/// Routes.
pub const MAX_ROUTES: usize = 256;
/// Resolvers.
pub const MAX_RESOLVERS: usize = 8;

/// The shortest idle limit, in seconds.
pub const IDLE_SECONDS_LEAST: u32 = 10;

// What a client may send with its Hello.

/// Early packets.
pub const MAX_EARLY: usize = 10;
/// Bytes of each.
pub const MAX_EARLY_PACKET: usize = 1_500;
/// Bytes of all.
pub const MAX_EARLY_BYTES: usize = 12_000;

/// A message; which side may send which is said at each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Client, first of all.
    Hello(Hello),
    /// Server, in answer.
    Welcome(Welcome),
    /// Either: a public X25519 key for the epoch named. Both sides may start; two that cross are one exchange.
    Rekey {
        /// The epoch these keys make, one above the newest.
        epoch: u64,
        /// X25519 public key (RFC 7748).
        public: [u8; 32],
    },
    /// Either: ready to receive in this epoch.
    RekeyDone {
        /// The epoch.
        epoch: u64,
    },
    /// Either.
    Ping(u64),
    /// The answer, with the same number.
    Pong(u64),
    /// Server: text for the client's log.
    Notice(String),
    /// Either: the session is over.
    Bye(Reason),
    /// Server: settings changed.
    Update(Settings),
    /// Either: a sealed datagram of the data channel, where UDP doesn't get through.
    Datagram(Vec<u8>),
    /// Client, right behind its Hello: an inner packet, whole and with its checksums complete. The server delivers it
    /// once it has granted the session.
    Early(Vec<u8>),
}

/// What the client has and wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u16,
    /// Bits of `FEATURE_*`; unknown ones are ignored.
    pub features: u64,
    /// Suites the client has, best first.
    pub suites: Vec<Suite>,
    /// Inner addresses the client had before and would like again.
    pub want: Vec<IpAddr>,
    /// A session to take up again.
    pub resume: Option<Resume>,
}

/// The sender's processor has AES instructions.
pub const FEATURE_AES_HARDWARE: u64 = 1;
/// The client comes and goes by itself, as its tunnel is used: the server may end its session when that is idle.
pub const FEATURE_ON_DEMAND: u64 = 1 << 1;

/// Names a session to take up, with the proof that it was ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The session.
    pub session: SessionId,
    /// Made from its resume secret and this TLS connection ([`ResumeSecret::proof`]).
    pub proof: [u8; 32],
}

/// Everything the client needs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Bits of `FEATURE_*`.
    pub features: u64,
    /// The session.
    pub session: SessionId,
    /// First epoch.
    pub epoch: u64,
    /// Suite of the data channel.
    pub suite: Suite,
    /// Inner addresses with the length of their network's prefix.
    pub addresses: Vec<IpNet>,
    /// Subnets behind this client.
    pub subnets: Vec<IpNet>,
    /// Inner MTU.
    pub mtu: u16,
    /// Routes and resolvers.
    pub settings: Settings,
    /// Milliseconds of an epoch.
    pub rekey_ms: u64,
    /// Packets of an epoch and direction.
    pub rekey_packets: u64,
    /// Milliseconds a session outlives its control channel.
    pub linger_ms: u64,
    /// For the proof in [`Resume`].
    pub resume_secret: ResumeSecret,
}

impl fmt::Debug for Welcome {
    // Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Welcome")
            .field("session", &self.session)
            .field("suite", &self.suite)
            .field("addresses", &self.addresses)
            .field("mtu", &self.mtu)
            .finish_non_exhaustive()
    }
}

/// What the server pushes and may change later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Destinations reached through the tunnel.
    pub routes: Vec<IpNet>,
    /// Resolvers.
    pub dns: Vec<IpAddr>,
    /// Seconds without an inner packet after which the server ends the session of a client that comes and goes by
    /// itself ([`FEATURE_ON_DEMAND`]).
    pub idle: Option<u32>,
}

impl Settings {
    /// The idle limit; never so short that a session ends that waits for an answer.
    pub fn idle_limit(&self) -> Option<Duration> {
        self.idle.map(|seconds| Duration::from_secs(seconds.max(IDLE_SECONDS_LEAST).into()))
    }
}

/// Why a session ended. The number is the code on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Reason {
    /// The client leaves.
    Leaving,
    /// The server shuts down.
    Shutdown,
    /// A newer session of the same identity took over.
    Replaced,
    /// The certificate was revoked.
    Revoked,
    /// Versions or suites don't meet.
    Incompatible,
    /// A message that doesn't belong here, or none at all.
    Protocol,
    /// No room: sessions, addresses or memory.
    NoRoom,
    /// The identity is not allowed in.
    Forbidden,
    /// Nothing was heard for too long.
    Timeout,
    /// The keys reached their limit and the peer didn't renew them.
    KeysExpired,
    /// Something failed at the sender's side.
    Internal,
    /// The certificate is not valid any more.
    Expired,
    /// Nothing was carried for so long that the session isn't needed.
    Idle,
    /// The identity has as many sessions as it may.
    TooMany,
    /// What is fixed for this client has changed: a new session has it.
    Changed,
}

impl Reason {
    const ALL: [Reason; 15] = [
        Reason::Leaving,
        Reason::Shutdown,
        Reason::Replaced,
        Reason::Revoked,
        Reason::Incompatible,
        Reason::Protocol,
        Reason::NoRoom,
        Reason::Forbidden,
        Reason::Timeout,
        Reason::KeysExpired,
        Reason::Internal,
        Reason::Expired,
        Reason::Idle,
        Reason::TooMany,
        Reason::Changed,
    ];

    /// The reason with this code.
    pub fn from_code(code: u8) -> Option<Reason> {
        Reason::ALL.into_iter().find(|r| *r as u8 == code)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Leaving => "the client left",
            Reason::Shutdown => "the server shut down",
            Reason::Replaced => "a newer session of the same identity took over",
            Reason::Revoked => "the certificate is revoked",
            Reason::Incompatible => "no common version or suite",
            Reason::Protocol => "a message out of place",
            Reason::NoRoom => "the server has no room",
            Reason::Forbidden => "the identity is not allowed in",
            Reason::Timeout => "nothing was heard for too long",
            Reason::KeysExpired => "the keys reached their limit",
            Reason::Internal => "an internal failure",
            Reason::Expired => "the certificate has expired",
            Reason::Idle => "nothing was carried for a while",
            Reason::TooMany => "the identity has as many sessions as it may",
            Reason::Changed => "what is fixed for the client has changed",
        })
    }
}

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The length is zero or above [`MAX_MESSAGE`].
    Length(usize),
    /// The body doesn't decode, or leaves bytes over.
    Body,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Malformed::Length(n) => write!(f, "a message of {n} bytes (1 to {MAX_MESSAGE} are allowed)"),
            Malformed::Body => f.write_str("a message that doesn't decode"),
        }
    }
}

const CODING: Configuration<BigEndian, Fixint, Limit<MAX_MESSAGE>> =
    bincode::config::standard().with_big_endian().with_fixed_int_encoding().with_limit::<MAX_MESSAGE>();

/// The message with its length in front.
pub fn encode(message: &Message) -> Result<Vec<u8>, Malformed> {
    let body = bincode::serde::encode_to_vec(message, CODING).map_err(|_| Malformed::Body)?;
    if body.len() > MAX_MESSAGE {
        return Err(Malformed::Length(body.len()));
    }
    let mut framed = Vec::with_capacity(LENGTH_LEN + body.len());
    framed.extend((body.len() as u32).to_be_bytes());
    framed.extend(body);
    Ok(framed)
}

/// Takes the first whole message off `bytes`: the message and how many bytes it took, or `None` where more
/// bytes are needed.
pub fn decode(bytes: &[u8]) -> Result<Option<(Message, usize)>, Malformed> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_LEN>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if length == 0 || length > MAX_MESSAGE {
        return Err(Malformed::Length(length));
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    let (message, used) = bincode::serde::decode_from_slice(body, CODING).map_err(|_| Malformed::Body)?;
    if used != length {
        return Err(Malformed::Body);
    }
    Ok(Some((message, LENGTH_LEN + length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Message {
        Message::Hello(Hello {
            version: VERSION,
            features: FEATURE_AES_HARDWARE,
            suites: vec![Suite::ChaCha20Poly1305],
            want: vec![IpAddr::from([10, 9, 0, 2])],
            resume: None,
        })
    }

    #[test]
    fn literal_bytes() {
        assert_eq!(
            encode(&Message::Ping(0x0102)).expect("encodes"),
            [0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 1, 2]
        );
        #[rustfmt::skip]
        assert_eq!(encode(&hello()).expect("encodes"), [
            0, 0, 0, 43,
            0, 0, 0, 0,                                          // Hello
            0, 1,                                                // version
            0, 0, 0, 0, 0, 0, 0, 1,                              // features
            0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1,                  // one suite: the second
            0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 10, 9, 0, 2,     // one address: IPv4
            0,                                                   // no resumption
        ]);
    }

    #[test]
    fn literal_bytes_of_an_early_packet_and_settings() {
        #[rustfmt::skip]
        assert_eq!(encode(&Message::Early(vec![0x45, 0, 1])).expect("encodes"), [
            0, 0, 0, 15,
            0, 0, 0, 10,                                         // Early
            0, 0, 0, 0, 0, 0, 0, 3, 0x45, 0, 1,                  // its bytes
        ]);
        #[rustfmt::skip]
        assert_eq!(encode(&Message::Update(Settings { idle: Some(600), ..Settings::default() })).expect("encodes"), [
            0, 0, 0, 25,
            0, 0, 0, 8,                                          // Update
            0, 0, 0, 0, 0, 0, 0, 0,                              // no routes
            0, 0, 0, 0, 0, 0, 0, 0,                              // no resolvers
            1, 0, 0, 2, 88,                                      // idle
        ]);
        assert_eq!(
            encode(&Message::Bye(Reason::Idle)).expect("encodes"),
            [0, 0, 0, 8, 0, 0, 0, 7, 0, 0, 0, 12]
        );
    }

    #[test]
    fn no_idle_limit_is_too_short() {
        let limit = |idle| Settings { idle, ..Settings::default() }.idle_limit().map(|limit| limit.as_secs());
        assert_eq!((limit(None), limit(Some(0)), limit(Some(11))), (None, Some(10), Some(11)));
    }

    #[test]
    fn takes_whole_messages_only() {
        let bytes = encode(&hello()).expect("encodes");
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), Ok(None), "cut at {cut}");
        }
        let mut two = bytes.clone();
        two.extend(&bytes);
        assert_eq!(decode(&two), Ok(Some((hello(), bytes.len()))));
    }

    #[test]
    fn refuses_bad_lengths_and_left_over_bytes() {
        assert_eq!(decode(&[0, 0, 0, 0]), Err(Malformed::Length(0)));
        assert_eq!(decode(&[0, 0, 0x40, 1]), Err(Malformed::Length(0x4001)));
        assert_eq!(decode(&[255; 4]), Err(Malformed::Length(0xffff_ffff)));
        let mut bytes = encode(&Message::Ping(1)).expect("encodes");
        bytes.push(0);
        bytes[3] += 1;
        assert_eq!(decode(&bytes), Err(Malformed::Body));
        // A vector that claims more elements than there are bytes.
        let mut bytes = encode(&hello()).expect("encodes");
        bytes[18] = 255;
        assert_eq!(decode(&bytes), Err(Malformed::Body));
        // A variant nobody knows.
        assert_eq!(decode(&[0, 0, 0, 4, 0, 0, 0, 99]), Err(Malformed::Body));
    }

    #[test]
    fn reasons_keep_their_codes() {
        for (code, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, code);
            assert_eq!(Reason::from_code(code as u8), Some(reason));
        }
        assert_eq!(Reason::from_code(Reason::ALL.len() as u8), None);
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn random_bodies_never_panic(kind in 0u32..13, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = ((body.len() + 4) as u32).to_be_bytes().to_vec();
            bytes.extend(kind.to_be_bytes());
            bytes.extend(&body);
            if let Ok(Some((message, used))) = decode(&bytes) {
                prop_assert_eq!(used, bytes.len());
                prop_assert_eq!(decode(&encode(&message).expect("encodes")), Ok(Some((message, used))));
            }
        }
    }
}
