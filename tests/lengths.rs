//! Every length from 0 to 65,535 on every channel (row 6 of the fault matrix): what isn't whole is refused, and nothing
//! panics, hangs or believes a length that it was told.

use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, send};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tunguard::batch::BatchReader;
use tunguard::client::ipc as client_ipc;
use tunguard::config::common::Suite;
use tunguard::drops::DropReason;
use tunguard::epochs::Limits;
use tunguard::ipc;
use tunguard::keys::{Role, Secret};
use tunguard::path::Path;
use tunguard::segment::addresses;
use tunguard::session::{Opened, Session, Start};
use tunguard::sys::seqpacket::{self, Incoming, Violation};
use tunguard::time::Time;
use tunguard::wire::control::{self, LENGTH_LEN, MAX_MESSAGE, Malformed};
use tunguard::wire::data::{HEADER_LEN, OVERHEAD, SessionId, TAG_LEN};

/// Fault: datagrams of every length under a session's ID, without its keys. Pass: each is refused as what it is, and a good
/// datagram passes afterwards.
#[test]
fn datagrams_of_every_length_are_refused_without_the_keys() {
    for suite in Suite::ALL {
        let (mut client, mut server) = (session(Role::Client, suite), session(Role::Server, suite));
        let good = seal(&mut client, &[0x45; 60]);
        let mut forged = noise();
        forged[..HEADER_LEN].copy_from_slice(&good[..HEADER_LEN]);
        for len in 0..=LONGEST {
            let mut datagram = forged[..len].to_vec();
            let expected = if len < OVERHEAD { DropReason::TooShort } else { DropReason::BadTag };
            let refused = server.open(now(), peer(), &mut datagram).expect_err("no keys");
            assert_eq!(refused, expected, "{suite}: {len} bytes");
        }
        assert!(server.open(now(), peer(), &mut good.clone()).is_ok(), "{suite}");
    }
}

/// Fault: an authentic datagram, cut anywhere. Pass: only the whole one opens, once.
#[test]
fn a_datagram_cut_anywhere_is_refused() {
    for suite in Suite::ALL {
        let (mut client, mut server) = (session(Role::Client, suite), session(Role::Server, suite));
        let whole = seal(&mut client, &noise()[..LONGEST - OVERHEAD]);
        assert_eq!(whole.len(), LONGEST);
        for len in 0..LONGEST {
            assert!(server.open(now(), peer(), &mut whole[..len].to_vec()).is_err(), "{suite}: {len} bytes");
        }
        let mut datagram = whole.clone();
        let opened = server.open(now(), peer(), &mut datagram).expect("it is whole");
        assert!(matches!(opened, Opened::Packet { text, .. } if text.len() == LONGEST - OVERHEAD));
        assert_eq!(
            server.open(now(), peer(), &mut whole.clone()).expect_err("a copy"),
            DropReason::Duplicate
        );
    }
}

/// Fault: control messages that say any length, and hold noise of that length. Pass: lengths that none may have are refused
/// before a byte of the body, and as long as a body isn't whole more bytes are waited for.
#[test]
fn control_messages_of_every_length_are_judged_by_it() {
    let noise = noise();
    for len in 0..=LONGEST {
        let framed = [&(len as u32).to_be_bytes()[..], &noise[..len]].concat();
        let allowed = (1..=MAX_MESSAGE).contains(&len);
        let verdict = control::decode(&framed);
        assert_eq!(
            matches!(verdict, Err(Malformed::Length(n)) if n == len),
            !allowed,
            "{len} bytes: {verdict:?}"
        );
        if allowed {
            assert!(
                matches!(control::decode(&framed[..framed.len() - 1]), Ok(None)),
                "{len} bytes, one missing"
            );
            // Noise is a message by chance only, and then a whole one.
            assert!(!matches!(verdict, Ok(Some((_, used))) if used != LENGTH_LEN + len), "{len} bytes");
        } else {
            assert!(control::decode(&framed[..LENGTH_LEN]).is_err(), "{len} bytes: the length says enough");
        }
    }
}

/// Fault: messages of every length between our own processes. Pass: those that are too long are refused as such, an empty
/// one counts as the end, and of the others none is taken for more than it is.
#[test]
fn messages_between_processes_of_every_length_are_judged_by_it() {
    judged::<ipc::Request>("a worker's");
    judged::<ipc::Reply>("the guard's");
    judged::<ipc::NurseryRequest>("the guard's to the nursery");
    judged::<ipc::NurseryReply>("the nursery's");
    judged::<client_ipc::Request>("the tunnel process's");
    judged::<client_ipc::Reply>("the supervisor's");
}

fn judged<Rx: Serialize + DeserializeOwned>(whose: &str) {
    let (ours, theirs) = seqpacket::pair::<Rx, Rx>().expect("a channel");
    let noise = noise();
    for len in 0..=LONGEST {
        send(theirs.as_raw_fd(), &noise[..len], MsgFlags::MSG_DONTWAIT).expect("a message fits");
        let verdict = ours.receive(false);
        match len {
            0 => assert!(matches!(verdict, Ok(Incoming::Closed)), "{whose}: an empty message"),
            _ if len > seqpacket::MAX_MESSAGE => {
                assert!(matches!(verdict, Err(Violation::TooLong)), "{whose}: {len} bytes")
            }
            _ => assert!(
                matches!(verdict, Ok(Incoming::Message(..)) | Err(Violation::Malformed)),
                "{whose}: {len} bytes"
            ),
        }
    }
}

/// Fault: messages of a queue of every length, full of noise. Pass: reading ends, with no more records than bytes.
#[test]
fn batches_of_every_length_end() {
    let noise = noise();
    for len in 0..=LONGEST {
        assert!(BatchReader::new(&noise[..len]).count() <= len.max(1), "{len} bytes");
    }
}

/// Fault: inner packets of every length, of both families, that say another length. Pass: they have no addresses.
#[test]
fn inner_packets_of_another_length_than_they_say_are_none() {
    let mut v4 = noise();
    v4[..4].copy_from_slice(&[0x45, 0, 0x12, 0x34]);
    let mut v6 = noise();
    v6[..6].copy_from_slice(&[0x60, 0, 0, 0, 0x12, 0x34]);
    for len in 0..=LONGEST {
        assert_eq!(addresses(&v4[..len]).is_some(), len == 0x1234, "IPv4, {len} bytes");
        assert_eq!(addresses(&v6[..len]).is_some(), len == 0x1234 + 40, "IPv6, {len} bytes");
    }
}

fn session(role: Role, suite: Suite) -> Session {
    let start = Start {
        role,
        id: SessionId::new(7, [1, 2, 3, 4, 5, 6]),
        suite,
        secret: Secret::from_bytes([42; 32]),
        limits: Limits { age: Duration::from_secs(900), packets: 1 << 30 },
        inner: vec!["10.9.0.2/32".parse().expect("a network")],
        linger: Duration::from_secs(600),
        dialled: (role == Role::Client).then(peer),
        vouched: None,
    };
    Session::new(start, now()).expect("a session")
}

fn seal(session: &mut Session, text: &[u8]) -> Vec<u8> {
    let mut datagram = [&[0; HEADER_LEN], text, &[0; TAG_LEN]].concat();
    session.seal(now(), 0, &mut datagram).expect("seals");
    datagram
}

fn now() -> Time {
    Time::default() + Duration::from_secs(1)
}

fn peer() -> Path {
    Path::new("192.0.2.1:4000".parse().expect("an address"), None)
}

/// Bytes that say nothing: xorshift64*.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    };
    std::iter::repeat_with(next).take(LONGEST).collect()
}

/// The largest length a UDP header can say.
const LONGEST: usize = 65_535;
