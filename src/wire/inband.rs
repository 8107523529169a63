//! In-band messages: what travels sealed in a datagram with the CONTROL flag. One type byte, then a body of
//! exactly the type's length; behind PATH_CHALLENGE and REBIND there may be zeros.

use std::net::{IpAddr, SocketAddr};

/// An in-band message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InBand {
    /// "Do you hear me on this path?" The peer answers with the same bytes on the path it came by.
    PathChallenge([u8; 8]),
    /// The answer, and where the challenge was seen to come from.
    PathResponse([u8; 8], SocketAddr),
    /// The sender's address changed; this datagram comes from the new one.
    Rebind,
    /// A challenge that is to be answered so many milliseconds later: does a NAT keep its mapping for so long?
    Keepalive([u8; 8], u32),
    /// What the sender thinks of the path this came by.
    PathStatus(PathStatus),
    /// What the sender has received on the path this goes by, ever: data packets and their datagrams' bytes.
    PathReport {
        /// Packets.
        packets: u64,
        /// Bytes.
        bytes: u64,
    },
    /// The session is over for this reason (a code of [`super::control::Reason`]).
    Close(u8),
}

/// A peer's word on one of its paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathStatus {
    /// The sender wants to be reached here.
    Preferred,
    /// Works, but another is better.
    Standby,
    /// About to go away, or not for data any more.
    Dropped,
    /// A copy of every packet is wanted here, too.
    Copy,
    /// Some of the flows are wanted here.
    Share,
}

/// The longest message.
pub const MAX_LEN: usize = 27;

const PATH_CHALLENGE: u8 = 1;
const PATH_RESPONSE: u8 = 2;
const REBIND: u8 = 3;
const KEEPALIVE: u8 = 4;
const PATH_STATUS: u8 = 5;
const CLOSE: u8 = 6;
const PATH_REPORT: u8 = 7;

impl InBand {
    /// Reads a message; `None` for an unknown type or any other length than the type's.
    pub fn parse(bytes: &[u8]) -> Option<InBand> {
        let (&kind, body) = bytes.split_first()?;
        Some(match (kind, body) {
            (PATH_CHALLENGE, body) => {
                let (nonce, padding) = body.split_first_chunk()?;
                padding.iter().all(|byte| *byte == 0).then_some(InBand::PathChallenge(*nonce))?
            }
            (PATH_RESPONSE, body) => {
                let (nonce, seen) = body.split_first_chunk()?;
                let (ip, port) = seen.split_first_chunk::<16>()?;
                let port = u16::from_be_bytes(port.try_into().ok()?);
                let ip = IpAddr::from(*ip).to_canonical();
                InBand::PathResponse(*nonce, SocketAddr::new(ip, port))
            }
            (REBIND, padding) => padding.iter().all(|byte| *byte == 0).then_some(InBand::Rebind)?,
            (KEEPALIVE, body) => {
                let (nonce, after) = body.split_first_chunk()?;
                InBand::Keepalive(*nonce, u32::from_be_bytes(after.try_into().ok()?))
            }
            (PATH_STATUS, [0]) => InBand::PathStatus(PathStatus::Preferred),
            (PATH_STATUS, [1]) => InBand::PathStatus(PathStatus::Standby),
            (PATH_STATUS, [2]) => InBand::PathStatus(PathStatus::Dropped),
            (PATH_STATUS, [3]) => InBand::PathStatus(PathStatus::Copy),
            (PATH_STATUS, [4]) => InBand::PathStatus(PathStatus::Share),
            (PATH_REPORT, body) => {
                let (packets, bytes) = body.split_first_chunk()?;
                InBand::PathReport {
                    packets: u64::from_be_bytes(*packets),
                    bytes: u64::from_be_bytes(bytes.try_into().ok()?),
                }
            }
            (CLOSE, [reason]) => InBand::Close(*reason),
            _ => return None,
        })
    }

    /// Writes the message to the front of `out`, at least [`MAX_LEN`] long, and says how long it is.
    pub fn emit(&self, out: &mut [u8]) -> usize {
        let mut put = |kind: u8, body: &[u8]| {
            out[0] = kind;
            out[1..=body.len()].copy_from_slice(body);
            1 + body.len()
        };
        match self {
            InBand::PathChallenge(nonce) => put(PATH_CHALLENGE, nonce),
            InBand::PathResponse(nonce, seen) => {
                let ip = match seen.ip() {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                put(PATH_RESPONSE, &[&nonce[..], &ip.octets(), &seen.port().to_be_bytes()].concat())
            }
            InBand::Rebind => put(REBIND, &[]),
            InBand::Keepalive(nonce, after) => put(KEEPALIVE, &[&nonce[..], &after.to_be_bytes()].concat()),
            InBand::PathStatus(PathStatus::Preferred) => put(PATH_STATUS, &[0]),
            InBand::PathStatus(PathStatus::Standby) => put(PATH_STATUS, &[1]),
            InBand::PathStatus(PathStatus::Dropped) => put(PATH_STATUS, &[2]),
            InBand::PathStatus(PathStatus::Copy) => put(PATH_STATUS, &[3]),
            InBand::PathStatus(PathStatus::Share) => put(PATH_STATUS, &[4]),
            InBand::PathReport { packets, bytes } => {
                let mut body = [0; 16];
                body[..8].copy_from_slice(&packets.to_be_bytes());
                body[8..].copy_from_slice(&bytes.to_be_bytes());
                put(PATH_REPORT, &body)
            }
            InBand::Close(reason) => put(CLOSE, &[*reason]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_bytes() {
        let seen = |text: &str| text.parse().expect("an address");
        let table: [(InBand, &[u8]); 12] = [
            (InBand::PathChallenge([1, 2, 3, 4, 5, 6, 7, 8]), &[1, 1, 2, 3, 4, 5, 6, 7, 8]),
            (
                InBand::PathResponse([8, 7, 6, 5, 4, 3, 2, 1], seen("192.0.2.1:4660")),
                &[
                    2, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1, 0x12,
                    0x34,
                ],
            ),
            (
                InBand::PathResponse([8, 7, 6, 5, 4, 3, 2, 1], seen("[2001:db8::9]:7")),
                &[2, 8, 7, 6, 5, 4, 3, 2, 1, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 7],
            ),
            (InBand::Rebind, &[3]),
            (
                InBand::Keepalive([1, 2, 3, 4, 5, 6, 7, 8], 25_000),
                &[4, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0x61, 0xa8],
            ),
            (InBand::PathStatus(PathStatus::Preferred), &[5, 0]),
            (InBand::PathStatus(PathStatus::Standby), &[5, 1]),
            (InBand::PathStatus(PathStatus::Dropped), &[5, 2]),
            (InBand::PathStatus(PathStatus::Copy), &[5, 3]),
            (InBand::PathStatus(PathStatus::Share), &[5, 4]),
            (InBand::Close(3), &[6, 3]),
            (
                InBand::PathReport { packets: 0x0102, bytes: 0x0304_0506 },
                &[7, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 3, 4, 5, 6],
            ),
        ];
        for (message, bytes) in table {
            let mut out = [0; MAX_LEN];
            let len = message.emit(&mut out);
            assert_eq!(&out[..len], bytes);
            assert_eq!(InBand::parse(bytes), Some(message));
            // One byte more or less is another length than the type's, but for zeros behind some.
            let mut longer = bytes.to_vec();
            longer.push(0);
            let padded = matches!(message, InBand::PathChallenge(_) | InBand::Rebind);
            assert_eq!(InBand::parse(&longer), padded.then_some(message));
            longer.push(1);
            assert_eq!(InBand::parse(&longer), None);
            assert_eq!(InBand::parse(&bytes[..bytes.len() - 1]), None);
        }
        assert_eq!(InBand::parse(&[0]), None);
        assert_eq!(InBand::parse(&[8, 0]), None);
        assert_eq!(InBand::parse(&[5, 5]), None);
    }
}
