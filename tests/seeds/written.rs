//! What fuzzing begins with: small inputs that get far, made of the literal vectors of docs/protocol.md, of the example
//! configurations and of short stories.

use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{MsgFlags, recv};
use serde::Serialize;
use tunguard::client::ipc as client;
use tunguard::ipc as server;
use tunguard::sys::mq::QueueSize;
use tunguard::sys::seqpacket::{Channel, pair};
use tunguard::tls::{CertId, SavedSession};
use tunguard::wire::control::Reason;
use tunguard::wire::vnet::{GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader};

use crate::common;

/// A target, a name and an input.
pub type Seed = (&'static str, String, Vec<u8>);

/// The same bytes each time.
pub fn fixed() -> Vec<Seed> {
    let mut seeds = Vec::new();
    vectors(&mut seeds);
    sessions(&mut seeds);
    packets(&mut seeds);
    channels(&mut seeds);
    configurations(&mut seeds);
    for (name, input) in [
        ("in_order", b"\0\0\0\0\0\0\0\0\0\x03\0\x05\x03\0\x40\x04\0\x03\x05\0\x01" as &[u8]),
        ("far_ahead", b"\0\0\0\x06\0\x01\x26\0\x01\x0e\x3f\xff\x05\0\x08\x05\0\x07\x04\x3f\xff"),
        ("at_the_end", b"\x07\0\0\xff\xff\xff\xff\xff\xfe\x04\0\0\x07\xff\xff\xff\xff\xff\xff\xff\xfe\0\0\0"),
        ("only_looked_at", b"\x80\0\0\0\0\0\x80\0\0\x00\0\0\x84\0\x01"),
    ] {
        seeds.push(("replay", name.to_owned(), input.to_vec()));
    }
    for (name, input) in [
        ("all_goes", b"\x05\xac\0\0\0\0\0\0\0\0\0\0" as &[u8]),
        ("narrow", b"\x05\xac\x06\x05\x14\0\0\x0f\0\0\x0f\0\0\x0f\0\0\0\0\0\0\0\0\x0f\0\0"),
        (
            "black_hole",
            b"\x23\x28\0\0\0\0\x02\x23\0\x06\x04\xb0\x07\xff\xff\x0f\0\0\x02\x23\0\x0f\0\0\x0f\0\0",
        ),
        ("hints", b"\x05\xac\0\0\x03\x05\x50\0\0\x03\x05\x20\x04\0\0\x05\x0f\0\0"),
    ] {
        seeds.push(("pmtu", name.to_owned(), input.to_vec()));
    }
    for (name, input) in [
        ("status", b"\0\x81\0\x07\0\0" as &[u8]),
        ("in_pieces", b"\0\x01\0\0\x03sta\x01\0\0\x03tus\x01\0\0\x01\n\x05"),
        ("watch", b"\0\x01\0\0\x06watch\n\x04\0\x05hello\x04\0\x03you\x06\0"),
        ("nonsense", b"\0\0\x01\0\0\x04GET \x01\x01\0\x02\r\n\x01\0\0\0\x06\0\x87"),
    ] {
        seeds.push(("admin", name.to_owned(), input.to_vec()));
    }
    for (name, rules) in [
        ("everything", ""),
        ("rules", "10.0.0.0/8\ntcp/22\n10.1.0.0/16 udp/53\nicmp\nfd09::/64 tcp/1-1023"),
        ("mistakes", "10.0.0.1/8\ntcp/0\nicmp/1\nudp/9-8\n10.0.0.0/8 10.0.0.0/8\nsctp"),
    ] {
        let mut input = chunk(rules.as_bytes());
        input.push(1);
        for packet in [udp4(), udp6(), tcp4()] {
            input.push(0);
            input.extend(chunk(&packet));
            input.extend([4, 5, 9, 0x27, 0x10, 7, 8]);
        }
        seeds.push(("wake", name.to_owned(), input));
    }
    for (name, text) in [
        ("name", "alice"),
        ("spaces", "Alice Example"),
        ("host", "vpn.example.org:55555"),
        ("wildcard", "*.example.org"),
        ("v6", "[2001:db8::1]:55555"),
        ("control", "a\x1b[2Jb\n"),
    ] {
        seeds.push(("certificates", format!("text_{name}"), [b"\x04", text.as_bytes()].concat()));
    }
    seeds
}

/// Others each time: keys are random, and days pass.
pub fn certificates() -> Vec<Seed> {
    let ca = common::ca("Lab CA");
    let (alice, gate) =
        (common::make(&common::client(), Some(&ca)), common::make(&common::server_wish(), Some(&ca)));
    let two_names = common::Wish { names: &["alice", "bob\n"], ..common::client() };
    let odd = common::make(&two_names, Some(&ca));
    let ca_pem = common::pem(&ca);
    let list = common::crl(&ca, &[&alice], (-common::HOUR, 50 * 365 * 24 * common::HOUR));
    let der = |pair: &common::Pair| pair.cert.to_der().expect("DER");
    [
        ("ca", vec![0], der(&ca)),
        ("client", vec![0], der(&alice)),
        ("server", vec![0], der(&gate)),
        ("two_names", vec![0], der(&odd)),
        ("pem", vec![1], [ca_pem.clone(), common::pem(&alice)].concat()),
        ("list", [vec![2], chunk(&ca_pem)].concat(), list),
    ]
    .map(|(name, front, bytes)| ("certificates", name.to_owned(), [front, bytes].concat()))
    .into()
}

/// The vectors of the protocol's page.
fn vectors(seeds: &mut Vec<Seed>) {
    let (mut name, mut all) = (String::new(), Vec::<(String, String)>::new());
    let page = include_str!("../../docs/protocol.md");
    let block = page.split("```vectors").nth(1).and_then(|rest| rest.split("```").next());
    for line in block.expect("vectors").lines() {
        if let Some((new, hex)) = line.split_once(" = ") {
            name = new.to_owned();
            all.push((name.clone(), hex.to_owned()));
        } else if line.starts_with(' ')
            && let Some((last, hex)) = all.last_mut()
        {
            assert_eq!(*last, name);
            hex.push_str(line);
        }
    }
    let bytes = |hex: &str| -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
        let pairs = digits.chunks(2).map(|pair| std::str::from_utf8(pair).expect("ASCII"));
        pairs.map(|pair| u8::from_str_radix(pair, 16).expect("hex")).collect()
    };
    let mut messages = Vec::new();
    for (name, hex) in &all {
        let kinds = [("message.", "control"), ("in_band.", "inband"), ("datagram.", "datagram")];
        for (prefix, target) in kinds {
            if let Some(short) = name.strip_prefix(prefix) {
                seeds.push((target, short.replace(['.', '-'], "_"), bytes(hex)));
            }
        }
        if name.starts_with("message.") {
            messages.extend(bytes(hex));
        }
    }
    seeds.push(("control", "all".to_owned(), messages));
}

/// A name, a configuration and events.
type Story<'a> = (&'a str, [u8; 7], &'a [&'a [u8]]);

/// Each a configuration of seven bytes (suite, age, packets, linger, idle, MTU, who vouches), then events: see
/// fuzz/bodies/session.rs.
fn sessions(seeds: &mut Vec<Seed>) {
    const CLIENT: u8 = 50;
    const SERVER: u8 = CLIENT | 0x40;
    /// Four datagrams arrive, and time passes.
    const ON: [u8; 5] = [4, 5, 6, 7, 25];
    let hello = [[CLIENT, 0, 10].as_slice(), &ON, &ON].concat();
    let traffic =
        [CLIENT, 1, 20, SERVER, 0, 200, CLIENT, 0x30, 255, 4, 5, 6, SERVER, 0x31, 90, 4, 5, 6, 4, 5];
    let stories: &[Story<'_>] = &[
        ("talk", [0; 7], &[&hello, &traffic, &traffic]),
        ("chacha", [1, 0, 0, 0, 0, 1, 1], &[&hello, &traffic, &ON, &traffic, &ON, &ON]),
        (
            "rekey",
            [2, 0, 1, 0, 0, 0, 0],
            &[&hello, &[32, 94, 94, 95, 94], &traffic, &[32, 96, 94, 95, 30, 94, 30]],
        ),
        ("rekey_by_packets", [1, 2, 2, 0, 0, 0, 0], &[&hello, &traffic, &traffic, &[30, 7, 94, 7], &traffic]),
        (
            "move",
            [1, 0, 0, 0, 0, 1, 0],
            &[&hello, &[35, 23], &ON, &ON, &traffic, &[35, 0, 36, 9], &ON, &traffic],
        ),
        ("balance", [1, 0, 0, 0, 0, 1, 17], &[&hello, &[35, 3], &ON, &ON, &traffic, &ON, &traffic]),
        ("redundant", [1, 0, 0, 0, 0, 0, 9], &[&hello, &[35, 3], &ON, &ON, &traffic, &ON, &traffic]),
        ("nat", [0, 0, 0, 0, 0, 0, 1], &[&hello, &[36, 5], &traffic, &ON, &[29, 4, 0], &ON]),
        ("copies", [0; 7], &[&hello, &[0, 0, 9, 15, 0, 15, 0, 19, 0, 3, 20, 0, 5, 22, 0, 2], &ON, &ON]),
        (
            "forgeries",
            [0; 7],
            &[&hello, &[0, 0, 9, 17, 0, 0, 30, 3, 18, 0, 0, 31, 23, 0, 1, 0, 1, 4], &traffic],
        ),
        ("inside", [0; 7], &[&hello, &[38], &ON, &[30, 7, 94, 7], &ON, &traffic, &[30, 7, 94, 7]]),
        (
            "control_lost",
            [0, 1, 0, 1, 0, 0, 0],
            &[&hello, &[39, 0, 0], &traffic, &[28, 255, 255, 28, 255, 255]],
        ),
        ("narrow", [0, 0, 0, 0, 0, 1, 1], &[&hello, &[40, 2, 188, 5, 220], &traffic, &ON, &ON, &traffic]),
        ("refused", [0; 7], &[&hello, &[41, 0, 0, 0, 0, 9, 41, 1, 0], &traffic, &[41, 2, 0], &traffic]),
        ("anew", [0; 7], &[&hello, &[0, 0, 9, 0, 0, 9, 43, 3, 3], &ON, &traffic]),
        ("lies", [0; 7], &[&hello, &[44, 2, 1, 45, 1, 0, 0, 46, 3, 0, 1, 47, 0, 2, 5, 3], &ON, &traffic]),
        ("goodbye", [0; 7], &[&hello, &[48, 0, 3, 94, 7], &traffic]),
        ("both", [0; 7], &[&hello, &[CLIENT | 0xc0, 0, 9], &[23, 0, 1, 0, 1, 23, 0, 1, 1, 0], &traffic]),
    ];
    for (name, config, events) in stories {
        seeds.push(("session", (*name).to_owned(), [config.as_slice(), &events.concat()].concat()));
    }
}

/// Three numbers, a virtio header and a packet: see fuzz/bodies/segment.rs.
fn packets(seeds: &mut Vec<Seed>) {
    let partial = |start, offset| VnetHeader {
        flags: NEEDS_CSUM,
        csum_start: start,
        csum_offset: offset,
        ..VnetHeader::default()
    };
    let super_packet =
        |gso_type, gso_size, start, offset| VnetHeader { gso_type, gso_size, ..partial(start, offset) };
    let long = |mut packet: Vec<u8>| {
        packet.extend((0..400u32).map(|i| i as u8));
        packet
    };
    let with_options = [&tcp4()[..], &[2, 4, 5, 0xb4, 1, 1, 1, 0]].concat();
    let mut syn = with_options;
    (syn[32], syn[33]) = (0x70, 0x02);
    let mut fragments = long(udp4());
    fragments[6] = 0;
    for (name, numbers, vnet, packet) in [
        ("tcp4", [3, 0, 0, 1], super_packet(GSO_TCPV4, 100, 20, 16), long(tcp4())),
        ("tcp4_narrow", [3, 0, 90, 3], super_packet(GSO_TCPV4, 100, 20, 16), long(tcp4())),
        ("tcp6", [3, 1, 0, 2], super_packet(GSO_TCPV6, 90, 40, 16), long(tcp6())),
        ("udp4", [3, 0, 200, 0], super_packet(GSO_UDP_L4, 64, 20, 6), long(udp4())),
        ("udp6", [3, 0, 200, 3], super_packet(GSO_UDP_L4, 64, 40, 6), long(udp6())),
        ("whole", [5, 5, 220, 1], VnetHeader::default(), long(udp4())),
        ("partial", [7, 5, 220, 1], partial(20, 6), udp4()),
        ("elsewhere", [0, 0, 100, 0], partial(2, 30), long(udp4())),
        ("syn", [1, 2, 88, 0], VnetHeader::default(), syn),
        ("fragments", [1, 0, 100, 0], VnetHeader::default(), fragments),
    ] {
        let input = [&numbers[..], &vnet.emit(), &packet].concat();
        seeds.push(("segment", name.to_owned(), input));
    }
    let records = [&12u16.to_ne_bytes()[..], &[0; 10], b"twelve bytes"].concat();
    seeds.push(("segment", "batch".to_owned(), records.repeat(3)));
}

/// The kind of a channel and a message of it.
fn channels(seeds: &mut Vec<Seed>) {
    let cert = CertId { issuer: [1; 32], serial: vec![7], not_after: 0 };
    let want = vec!["10.9.0.2".parse().expect("an address"), "fd09::2".parse().expect("an address")];
    let claim = server::Claim { name: "alice".into(), cert, resumed: false, want, resume: None };
    let size = QueueSize::KERNEL_DEFAULT;
    let moved = server::Request::Moved { new: ([192, 0, 2, 1], 9).into(), after_ms: Some(3), inside: false };
    let mut push = |kind: u8, name: &str, bytes: Vec<u8>| {
        seeds.push(("ipc", name.to_owned(), [vec![kind], bytes].concat()));
    };
    push(0, "redeem", encoded(server::Request::Redeem([3; 32])));
    push(0, "claim", encoded(server::Request::Claim(claim)));
    push(0, "register", encoded(server::Request::Register { size }));
    push(0, "moved", encoded(moved));
    push(0, "report", encoded(server::Request::Report(Box::default())));
    push(0, "log", encoded(server::Request::Log { level: 3, text: "a line".into() }));
    push(1, "redeemed", encoded(server::Reply::Redeemed(Some(SavedSession::from_bytes(vec![1, 2])))));
    push(1, "end", encoded(server::Reply::End(Reason::Shutdown)));
    push(2, "start", encoded(server::NurseryRequest::Start { uid: 60_000, number: 7 }));
    push(3, "started", encoded(server::NurseryReply::Started { pid: 7 }));
    push(4, "dial", encoded(client::Request::Dial { remote: 1 }));
    push(4, "ended", encoded(client::Request::Ended { failure: None, permanent: true }));
    push(4, "progress", encoded(client::Request::Progress(client::Progress::Leaving { by_server: true })));
    push(5, "dial_failed", encoded(client::Reply::DialFailed { text: "no".into() }));
    push(5, "stop", encoded(client::Reply::Stop));
    push(6, "phases", vec![0, 5, 1, 1, 2, 3, 0, 5, 0, 7, 6, 0, 1, 3, 4, 0, 2]);
}

/// As a channel sends it.
fn encoded<T: Serialize + serde::de::DeserializeOwned>(message: T) -> Vec<u8> {
    let (ours, theirs) = pair::<T, T>().expect("a socket pair");
    assert!(Channel::<T, T>::send(&ours, &message, &[]).expect("sends"));
    let mut bytes = vec![0; 4_096];
    let len = recv(theirs.as_fd().as_raw_fd(), &mut bytes, MsgFlags::empty()).expect("receives");
    bytes.truncate(len);
    bytes
}

fn configurations(seeds: &mut Vec<Seed>) {
    let client = "remote = \"vpn.example.org\"\n[tls]\nca = \"ca.pem\"\ncert = \"c.pem\"\nkey = \"c.key\"\n";
    let two = "addresses = [\"10.9.0.7\"]\nsubnets = [\"192.168.7.0/24\"]\n---\naddresses = [\"10.9.0.8\", \"fd09::8\"]\n";
    for (name, kind, text) in [
        ("server_example", 0, include_str!("../../packaging/server.example.toml")),
        ("client_example", 1, include_str!("../../packaging/client.example.toml")),
        ("client", 1, client),
        ("clients", 2, two),
        (
            "mistakes",
            0,
            "listen = 5\nmtu = 1\nnetworks = [\"10.9.0.1/24\"]\n[tls]\nca = \"x\"\ncerd = \"y\"\n",
        ),
        ("syntax", 1, "remote = [\n\"a\n"),
    ] {
        seeds.push(("config", name.to_owned(), [&[kind], text.as_bytes()].concat()));
    }
}

fn chunk(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

/// 10.9.0.2:4660 to 192.0.2.1:53: that of `message.early` in docs/protocol.md.
fn udp4() -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, 17, 0x6e, 0xc4, 10, 9, 0, 2, 192, 0, 2, 1];
    packet.extend([0x12, 0x34, 0, 53, 0, 8, 0x21, 0x69]);
    packet
}

fn udp6() -> Vec<u8> {
    [&head6(17, 8)[..], &[0x12, 0x34, 0, 53, 0, 8, 0, 0]].concat()
}

fn tcp4() -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0x6e, 0xc3, 10, 9, 0, 2, 192, 0, 2, 1];
    packet.extend([0x12, 0x34, 1, 0xbb, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    packet
}

fn tcp6() -> Vec<u8> {
    let tcp = [0x12, 0x34, 1, 0xbb, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0];
    [&head6(6, 20)[..], &tcp].concat()
}

/// fd09::2 to fd50::1.
fn head6(next: u8, len: u8) -> Vec<u8> {
    let mut head = vec![0x60, 0, 0, 0, 0, len, next, 64];
    head.extend([0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    head.extend([0xfd, 0x50, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    head
}
