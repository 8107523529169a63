//! The test vectors of docs/protocol.md, recomputed with the library: the page and the code say the same.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tunguard::config::common::Suite;
use tunguard::keys::{DirectionKeys, Role, Secret};
use tunguard::resume::ResumeSecret;
use tunguard::seal::Cryptor;
use tunguard::wire::control::{self, Hello, Message, Reason, Resume, Settings, Welcome};
use tunguard::wire::data::{CONTROL, HEADER_LEN, Header, PARTIAL_CSUM, SessionId, TAG_LEN};
use tunguard::wire::inband::{InBand, MAX_LEN, PathStatus};

const PAGE: &str = include_str!("../docs/protocol.md");

#[test]
fn the_page_has_every_vector_and_no_other() {
    let page = vectors_of_the_page();
    let code = vectors_of_the_code(&page["shared_1"]);
    let wrong: Vec<String> = code
        .iter()
        .filter(|(name, hex)| page.get(*name) != Some(*hex))
        .map(|(name, hex)| format!("{name} = {hex}"))
        .collect();
    assert!(wrong.is_empty(), "the page lacks these lines, or has others:\n{}", wrong.join("\n"));
    let unknown: Vec<&String> = page.keys().filter(|name| !code.contains_key(*name)).collect();
    assert!(unknown.is_empty(), "the page has vectors that nothing checks: {unknown:?}");
}

/// The secret of epoch 1 stays inside the library, so the page's is checked by what follows from it.
#[test]
fn the_secret_of_epoch_1_gives_the_keys_of_epoch_1() {
    let page = vectors_of_the_page();
    let next = secret_0().next(&bytes(&page["shared_1"]), 1);
    let given = Secret::from_bytes(bytes(&page["secret_1"]).try_into().expect("32 bytes"));
    for suite in Suite::ALL {
        for role in [Role::Client, Role::Server] {
            assert_eq!(whole(&next.direction(suite, role)), whole(&given.direction(suite, role)));
        }
    }
}

#[test]
fn the_page_s_datagrams_open() {
    let page = vectors_of_the_page();
    for suite in Suite::ALL {
        let mut datagram = bytes(&page[&format!("datagram.{suite}")]);
        let header = Header::parse(&datagram).expect("a header");
        let mut cryptor = Cryptor::new(suite, &secret_0().direction(suite, Role::Client)).expect("a cipher");
        let text = cryptor.open(&header, &mut datagram).expect("a good tag");
        assert_eq!(&datagram[text], TEXT);
    }
}

#[test]
fn the_page_s_messages_decode() {
    for (name, hex) in vectors_of_the_page().iter().filter(|(name, _)| name.starts_with("message.")) {
        let framed = bytes(hex);
        let (message, used) = control::decode(&framed).expect(name).expect("a whole message");
        assert_eq!(used, framed.len(), "{name}");
        assert_eq!(control::encode(&message).expect("encodes"), framed, "{name}");
    }
}

/// The lines `name = hex` inside the page's code blocks; hex may go on in indented lines, and hold spaces.
fn vectors_of_the_page() -> BTreeMap<String, String> {
    let mut vectors: BTreeMap<String, String> = BTreeMap::new();
    let mut inside = false;
    let mut last: Option<String> = None;
    for line in PAGE.lines() {
        if line.starts_with("```") {
            inside = line == "```vectors";
            last = None;
        } else if inside {
            let hex = |text: &str| {
                let hex: String = text.chars().filter(|c| !c.is_whitespace()).collect();
                assert!(
                    hex.chars().all(|c| c.is_ascii_hexdigit()) && hex.len().is_multiple_of(2),
                    "no hex: {line}"
                );
                hex
            };
            if let Some((name, value)) = line.split_once(" = ") {
                let name = name.trim().to_owned();
                assert!(vectors.insert(name.clone(), hex(value)).is_none(), "{name} is there twice");
                last = Some(name);
            } else if line.starts_with(' ') {
                let name = last.as_ref().expect("a vector to go on with");
                vectors.get_mut(name).expect("just inserted").push_str(&hex(line));
            } else {
                assert!(line.is_empty() || line.starts_with('#'), "no vector: {line}");
            }
        }
    }
    vectors
}

fn vectors_of_the_code(shared: &str) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut put = |name: String, bytes: &[u8]| {
        all.insert(name, bytes.iter().map(|b| format!("{b:02x}")).collect::<String>());
    };
    // Header.
    for (name, flags) in [("plain", 0), ("partial_csum", PARTIAL_CSUM), ("control", CONTROL)] {
        put(format!("header.{name}"), &header(flags).emit());
    }
    // Key schedule.
    put("secret_0".into(), &SECRET_0);
    put("shared_1".into(), &bytes(shared));
    put("secret_1".into(), &hkdf_next(&SECRET_0, &bytes(shared), 1));
    let one = secret_0().next(&bytes(shared), 1);
    for suite in Suite::ALL {
        for (direction, role) in [("c2s", Role::Client), ("s2c", Role::Server)] {
            put(format!("keys_0.{direction}.{suite}"), &whole(&secret_0().direction(suite, role)));
            put(format!("keys_1.{direction}.{suite}"), &whole(&one.direction(suite, role)));
        }
    }
    // Datagrams.
    put("text".into(), TEXT);
    for suite in Suite::ALL {
        let keys = secret_0().direction(suite, Role::Client);
        put(format!("nonce.{suite}"), &nonce(&keys.iv, &header(0)));
        let mut datagram = [&[0; HEADER_LEN][..], TEXT, &[0; TAG_LEN]].concat();
        let mut cryptor = Cryptor::new(suite, &keys).expect("a cipher");
        cryptor.seal(&header(0), &mut datagram).expect("seals");
        put(format!("datagram.{suite}"), &datagram);
    }
    // Messages.
    for (name, message) in messages() {
        put(format!("message.{name}"), &control::encode(&message).expect("encodes"));
    }
    // Resumption: the secret is secret_0's bytes, the session the header's.
    put("resume.binding".into(), &BINDING);
    put("resume.proof".into(), &ResumeSecret::from_bytes(SECRET_0).proof(header(0).session, &BINDING));
    for (name, message) in in_band() {
        let mut out = [0; MAX_LEN];
        let len = message.emit(&mut out);
        put(format!("in_band.{name}"), &out[..len]);
    }
    all
}

fn messages() -> Vec<(&'static str, Message)> {
    let hello = |resume| {
        Message::Hello(Hello {
            version: control::VERSION,
            features: control::FEATURE_AES_HARDWARE,
            suites: vec![Suite::Aes256Gcm, Suite::ChaCha20Poly1305],
            want: vec![ip("10.9.0.2"), ip("fd09::2")],
            resume,
        })
    };
    let settings =
        |idle| Settings { routes: vec![net("0.0.0.0/0"), net("fd50::/64")], dns: vec![ip("10.9.0.1")], idle };
    let resume = Resume { session: header(0).session, proof: SECRET_0 };
    vec![
        ("hello", hello(None)),
        ("hello_resume", hello(Some(resume))),
        (
            "welcome",
            Message::Welcome(Welcome {
                features: control::FEATURE_AES_HARDWARE,
                session: header(0).session,
                epoch: 0,
                suite: Suite::Aes256Gcm,
                addresses: vec![net("10.9.0.2/24"), net("fd09::2/64")],
                subnets: vec![net("192.168.7.0/24")],
                mtu: 1420,
                settings: settings(None),
                rekey_ms: 900_000,
                rekey_packets: 1 << 30,
                linger_ms: 600_000,
                resume_secret: ResumeSecret::from_bytes(SECRET_0),
            }),
        ),
        ("rekey", Message::Rekey { epoch: 1, public: SECRET_0 }),
        ("rekey_done", Message::RekeyDone { epoch: 1 }),
        ("ping", Message::Ping(0x0102)),
        ("pong", Message::Pong(0x0102)),
        ("notice", Message::Notice("hello".into())),
        ("bye", Message::Bye(Reason::Shutdown)),
        ("bye.idle", Message::Bye(Reason::Idle)),
        ("update", Message::Update(settings(Some(600)))),
        ("early", Message::Early(EARLY.to_vec())),
    ]
}

fn in_band() -> [(&'static str, InBand); 8] {
    [
        ("path_challenge", InBand::PathChallenge([1, 2, 3, 4, 5, 6, 7, 8])),
        (
            "path_response",
            InBand::PathResponse([1, 2, 3, 4, 5, 6, 7, 8], "192.0.2.1:4660".parse().expect("an address")),
        ),
        ("rebind", InBand::Rebind),
        ("keepalive", InBand::Keepalive([1, 2, 3, 4, 5, 6, 7, 8], 25_000)),
        ("path_status.preferred", InBand::PathStatus(PathStatus::Preferred)),
        ("path_status.standby", InBand::PathStatus(PathStatus::Standby)),
        ("path_status.dropped", InBand::PathStatus(PathStatus::Dropped)),
        ("close", InBand::Close(Reason::Revoked as u8)),
    ]
}

/// The step from one epoch's secret to the next, written down a second time: HKDF-SHA-256 (RFC 5869).
fn hkdf_next(secret: &[u8], shared: &[u8], epoch: u64) -> Vec<u8> {
    let hmac = |key: &[u8], parts: &[&[u8]]| {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
        ring::hmac::sign(&key, &parts.concat()).as_ref().to_vec()
    };
    let prk = hmac(secret, &[shared]);
    hmac(&prk, &[b"epoch", &epoch.to_be_bytes(), &[1]])
}

/// IV xor (epoch, counter), right-aligned.
fn nonce(iv: &[u8; 12], header: &Header) -> [u8; 12] {
    let mut right = [0; 12];
    right[5] = header.epoch;
    right[6..].copy_from_slice(&header.counter.to_be_bytes()[2..]);
    std::array::from_fn(|i| iv[i] ^ right[i])
}

/// Key, MAC key and IV, as they come out of HKDF one behind the other.
fn whole(keys: &DirectionKeys) -> Vec<u8> {
    [&keys.key[..], &keys.mac, &keys.iv].concat()
}

fn header(flags: u8) -> Header {
    let session = SessionId::new(0x0102, [0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6]);
    Header { session, epoch: 7, flags, counter: 0x0001_0203 }
}

fn secret_0() -> Secret {
    Secret::from_bytes(SECRET_0)
}

fn bytes(hex: &str) -> Vec<u8> {
    let nibble = |c: u8| (c as char).to_digit(16).expect("hex") as u8;
    hex.as_bytes().chunks(2).map(|pair| nibble(pair[0]) << 4 | nibble(pair[1])).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn net(text: &str) -> ipnet::IpNet {
    text.parse().expect("a network")
}

const SECRET_0: [u8; 32] = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
    29, 30, 31,
];
const BINDING: [u8; 32] = [0x55; 32];
/// From 10.9.0.2 to 192.0.2.1: an empty UDP packet from port 4660 to 53.
const EARLY: [u8; 28] = [
    0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, 17, 0x6e, 0xc4, 10, 9, 0, 2, 192, 0, 2, 1, 0x12, 0x34, 0, 53, 0, 8,
    0x21, 0x69,
];
const TEXT: &[u8] = b"tunguard!";
