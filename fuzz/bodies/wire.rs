//! What stands on the wire: the header of a datagram and its seal, messages in band and on the control channel.

use tunguard::config::common::Suite;
use tunguard::epochs::Limits;
use tunguard::keys::{Role, Secret};
use tunguard::path::Path;
use tunguard::seal::Cryptor;
use tunguard::session::{Session, Start};
use tunguard::time::Time;
use tunguard::wire::control;
use tunguard::wire::data::{COUNTER_LIMIT, HEADER_LEN, Header, SESSION_ID, SessionId, TAG_LEN};
use tunguard::wire::inband::{InBand, MAX_LEN};

use super::input::Input;

/// A header reads and writes alike; no session takes a datagram that nobody sealed; what is sealed opens to the same
/// text, once and unchanged only.
pub fn datagram(data: &[u8]) {
    if let Ok(header) = Header::parse(data)
        && header.counter < COUNTER_LIMIT
    {
        assert_eq!(header.emit(), data[..HEADER_LEN]);
    }
    no_session_takes(data);

    let mut input = Input::new(data);
    let (suite, role) = (input.pick(&Suite::ALL), input.pick(&[Role::Client, Role::Server]));
    let keys = Secret::from_bytes([input.u8(); 32]).direction(suite, role);
    let header = Header {
        session: SessionId(input.array()),
        epoch: input.u8(),
        flags: input.u8() % 3,
        counter: input.u64() % COUNTER_LIMIT,
    };
    let (at, bit) = (usize::from(input.u16()), input.u8() & 7);
    let text = input.rest();
    let mut datagram = [&[0; HEADER_LEN][..], text, &[0; TAG_LEN]].concat();
    let mut cryptor = Cryptor::new(suite, &keys).expect("a cipher");
    cryptor.seal(&header, &mut datagram).expect("seals");
    assert_eq!(Header::parse(&datagram), Ok(header));

    let mut changed = datagram.clone();
    let at = at % changed.len();
    changed[at] ^= 1 << bit;
    if let Ok(header) = Header::parse(&changed) {
        assert!(cryptor.open(&header, &mut changed).is_err(), "bit {bit} of byte {at} doesn't matter");
    }
    let place = cryptor.open(&header, &mut datagram).expect("opens");
    assert_eq!(&datagram[place], text);
}

fn no_session_takes(data: &[u8]) {
    let id = SessionId([7; 8]);
    let start = Start {
        role: Role::Server,
        id,
        suite: Suite::ChaCha20Poly1305,
        secret: Secret::from_bytes([1; 32]),
        limits: Limits { age: std::time::Duration::from_secs(900), packets: 1_000 },
        inner: Vec::new(),
        linger: std::time::Duration::from_secs(600),
        dialled: None,
        vouched: None,
    };
    let mut session = Session::new(start, Time::default()).expect("a session");
    let path = Path::new(([192, 0, 2, 1], 4_000).into(), None);
    let mut datagram = data.to_vec();
    assert!(session.open(Time::default(), path, &mut datagram).is_err());
    // Under its own ID as well.
    let mut datagram = data.to_vec();
    if let Some(bytes) = datagram.get_mut(SESSION_ID) {
        bytes.copy_from_slice(&id.0);
    }
    assert!(session.open(Time::default(), path, &mut datagram).is_err());
    assert!(session.path().is_none() && session.poll_in_band().is_none() && session.poll_event().is_none());
}

/// What parses is written in the same bytes, but for zeros behind it.
pub fn in_band(data: &[u8]) {
    let Some(message) = InBand::parse(data) else { return };
    let mut out = [0; MAX_LEN];
    let len = message.emit(&mut out);
    assert_eq!(InBand::parse(&out[..len]), Some(message));
    let (front, padding) = data.split_at(len);
    assert_eq!(front, &out[..len]);
    assert!(padding.iter().all(|byte| *byte == 0));
    let padded = matches!(message, InBand::PathChallenge(_) | InBand::Rebind);
    assert!(padded || padding.is_empty());
}

/// What decodes encodes to the same bytes, and nothing shorter decodes.
pub fn control(data: &[u8]) {
    let mut rest = data;
    while let Ok(Some((message, used))) = control::decode(rest) {
        let (framed, others) = rest.split_at(used);
        assert_eq!(control::encode(&message).expect("encodes"), framed, "{message:?}");
        assert_eq!(control::decode(&framed[..used - 1]), Ok(None));
        if let control::Message::Welcome(welcome) = &message {
            // For the log.
            assert!(format!("{welcome:?}").len() < 64 << 10);
        }
        rest = others;
    }
}
