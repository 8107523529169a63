//! Strangers and liars: they get nothing, and nobody else notices.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use openssl::pkey::PKey;
use openssl::x509::X509;
use tunguard::channel::{Broken, ControlChannel, Progress};
use tunguard::keys::Role;
use tunguard::tls::{self, Certificates, Credentials};
use tunguard::wire::control::Message;
use tunguard::wire::data::{HEADER_LEN, OVERHEAD};

use crate::capture::{Capture, datagrams_to_server};
use crate::certificates;
use crate::lab::{INNER_V4, Lab, PATIENCE, SERVER_V4, eventually, ip, outer};
use crate::raw_client::{Dialler, RawClient, echo_request};
use crate::traffic::{Conversation, Noise, connect, transfer, udp_to};

#[test]
fn garbage_on_tcp_ends_its_own_connection_only() {
    let Some(lab) = Lab::new("tcpgarbage", 2) else { return };
    let server = lab.start_server(&lab.server());
    let _honest = lab.start_client(2, &lab.client(2));
    let mut talk = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
    let dialler = Dialler::new(&lab, 1);
    let noise: Vec<u8> = Noise::new(5).take(20_000).collect();
    // A handshake record that says it is 16,000 bytes long, and several of them.
    let record = [&[22, 3, 3, 0x3e, 0x80][..], &noise[..16_000]].concat();
    let hello_inside_zeros = [&[22, 3, 1, 0, 200, 1, 0, 0, 196][..], &[0; 400]].concat();
    let http = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n".to_vec();
    for garbage in [noise, record.repeat(4), hello_inside_zeros, http, vec![0; 20_000], vec![0x16]] {
        let mut tcp = dialler.tcp().expect("the port is open");
        // It may be closed on us while we still talk.
        let _ = tcp.write_all(&garbage);
        let _ = tcp.shutdown(std::net::Shutdown::Write);
        let said = until_closed(&mut tcp);
        assert!(said < 4_096, "the server said {said} bytes to garbage");
        talk.exchange(20_000);
    }
    server.wait_for_children(1);
    assert_eq!(dialler.connect().ping(1), 1, "an honest client after all that");
}

#[test]
fn silence_on_tcp_is_ended_at_the_deadline() {
    let Some(lab) = Lab::new("silence", 1) else { return };
    let server = lab.start_server(&lab.server().set("max_handshakes_per_source", 3));
    let dialler = Dialler::new(&lab, 1);
    let begun = Instant::now();
    let mut silent = dialler.tcp().expect("the port is open");
    // TLS, but no Hello.
    let mut mute = dialler.control().expect("the TLS handshake");
    // One byte a second.
    let mut slow = dialler.tcp().expect("the port is open");
    server.wait_for_children(3);
    let mut byte = 22;
    slow.set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
    while begun.elapsed() < PATIENCE && slow.write_all(&[byte]).is_ok() && !server.children().is_empty() {
        byte = 3;
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(until_closed(&mut silent), 0);
    let took = begun.elapsed();
    assert!(
        took > Duration::from_secs(8) && took < Duration::from_secs(20),
        "the deadline came after {took:?}"
    );
    server.wait_for_children(0);
    assert!(mute.receive().is_err() || mute.receive().is_err(), "the mute one is still connected");
    // And there is room again.
    assert_eq!(dialler.connect().ping(1), 1);
}

#[test]
fn a_handshake_without_end_is_cut_off() {
    let Some(lab) = Lab::new("endless", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut tcp = Dialler::new(&lab, 1).tcp().expect("the port is open");
    // A ClientHello that says it is 100,000 bytes long, in records that are as they should be.
    let record = |bytes: &[u8]| [&[22, 3, 1, 0x3e, 0x80][..], bytes].concat();
    let first = [&[1, 1, 0x86, 0xa0, 3, 3][..], &[0x55; 15_994]].concat();
    let records = [record(&first), record(&[0x55; 16_000]).repeat(5)].concat();
    let _ = tcp.write_all(&records);
    assert!(until_closed(&mut tcp) < 100, "an alert at most");
    server.wait_for_log("too much before the handshake was done");
    server.wait_for_children(0);
}

/// Both ends of a control connection are here: what a server has for a client that doesn't read is bounded.
#[test]
fn what_waits_for_a_peer_that_does_not_read_is_bounded() {
    let Some(lab) = Lab::new("noread", 1) else { return };
    let read = |file: &str| std::fs::read(lab.path(file)).expect("a file of the authority's");
    let (near, far) = connect(&lab.c(1), &lab.srv(), ip(SERVER_V4));
    let own = Credentials {
        ca: read("certs/ca.pem"),
        cert: read("certs/clients/c1.pem"),
        key: read("certs/clients/c1.key").into(),
    };
    let context = tls::client_context(&own).expect("a context");
    let ssl = tls::client_ssl(&context, SERVER_V4).expect("TLS");
    let mut client = ControlChannel::new(ssl, near, Role::Client).expect("a channel");
    let shown = Certificates { ca: read("certs/ca.pem"), cert: read("certs/gate.pem"), crl: None };
    let gate = certificates::Pair {
        cert: X509::from_pem(&shown.cert).expect("a certificate"),
        key: PKey::private_key_from_pem(&read("certs/gate.key")).expect("a key"),
    };
    let context = tls::server_context(&shown).expect("a context");
    let ssl = tls::server_ssl(&context, certificates::signer(&gate)).expect("TLS");
    let mut server = ControlChannel::new(ssl, far, Role::Server).expect("a channel");
    eventually("the TLS handshake", || {
        let done = [&mut client, &mut server].map(|end| end.handshake().expect("it goes on"));
        (done == [Progress::Done; 2]).then_some(())
    });
    let notice = Message::Notice("n".repeat(200));
    let broken = (0..1_000_000).find_map(|_| {
        let sent = server.send(&notice);
        assert!(server.unsent() <= 65_536, "{} bytes", server.unsent());
        sent.err()
    });
    assert_eq!(broken, Some(Broken::Lost("the peer doesn't read".to_owned())));
}

#[test]
fn garbage_on_udp_gets_no_byte_in_reply() {
    let Some(lab) = Lab::new("udpgarbage", 2) else { return };
    let _server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let mut victim = dialler.connect();
    assert_eq!(victim.ping(1), 1);
    let stranger = udp_to(&lab.c(2), outer(SERVER_V4)).expect("a socket");
    stranger.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
    let id = victim.welcome.session.0;
    let mut noise = Noise::new(9);
    for len in (0..64).chain([100, 1_000, 1_452, 9_000, 65_000]) {
        let mut datagram: Vec<u8> = noise.by_ref().take(len).collect();
        stranger.send(&datagram).expect("send");
        // The same with an ID the server knows, epoch 0, flags 0.
        let known = [&id[..], &[0, 0]].concat();
        let n = known.len().min(len);
        datagram[..n].copy_from_slice(&known[..n]);
        stranger.send(&datagram).expect("send");
    }
    let answer = stranger.recv(&mut [0; 64]);
    assert!(matches!(&answer, Err(e) if e.kind() == ErrorKind::WouldBlock), "an answer: {answer:?}");
    assert_eq!(victim.ping(2), 1);
    let session = lab.session("c1").expect("a session");
    assert!(session["peer"].as_str().is_some_and(|peer| peer.starts_with("198.18.1.2:")), "moved: {session}");
    assert!(session["drops"]["bad_tag"].as_u64() > Some(0), "{session}");
}

#[test]
fn flipped_and_replayed_datagrams_are_dropped_and_counted() {
    let Some(lab) = Lab::new("replay", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = Dialler::new(&lab, 1).connect();
    let address = client.address();
    let datagram = client.seal(&echo_request(address, 7));
    for bit in 0..datagram.len() * 8 {
        let mut flipped = datagram.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        client.send(&flipped);
    }
    assert_eq!(client.answers(7), 0, "a flipped bit went unnoticed");
    // Nothing of that moved the window: the packet itself passes, once.
    client.send(&datagram);
    assert_eq!(client.answers(7), 1);
    for _ in 0..100 {
        client.send(&datagram);
    }
    assert_eq!(client.answers(7), 0, "a replay passed");
    assert_eq!(client.ping(8), 1);
    let drops = lab.session("c1").expect("a session")["drops"].clone();
    assert_eq!(drops["duplicate"], 100, "{drops}");
    // Each flip but those that name another session, which the kernel drops.
    let counted: u64 = ["bad_tag", "flags", "unknown_epoch", "too_old", "duplicate"]
        .iter()
        .filter_map(|reason| drops[reason].as_u64())
        .sum();
    assert_eq!(counted, 100 + (datagram.len() * 8 - 64) as u64, "{drops}");
    assert!(datagram.len() > OVERHEAD && HEADER_LEN == 16);
}

#[test]
fn malformed_messages_end_their_own_session() {
    let Some(lab) = Lab::new("malformed", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut bystander = Dialler::new(&lab, 2).connect();
    let dialler = Dialler::new(&lab, 1);
    let mut noise = Noise::new(11);
    let mut framed = |len: usize| {
        let mut bytes = (len as u32).to_be_bytes().to_vec();
        bytes.extend(noise.by_ref().take(len.min(20_000)));
        bytes
    };
    let lengths = [0, 1, 2, 5, 100, 16_384, 16_385, 1 << 24, u32::MAX as usize];
    for bytes in lengths.map(&mut framed) {
        let mut tls = dialler.tls();
        let _ = tls.write_all(&bytes);
        let _ = tls.get_ref().shutdown(std::net::Shutdown::Write);
        let mut said = Vec::new();
        // A reset is as good an end as any.
        let _ = tls.read_to_end(&mut said);
        assert!(said.len() < 64, "the server said {} bytes to a malformed message", said.len());
        server.wait_for_children(1);
    }
    assert_eq!(bystander.ping(1), 1);
    assert_eq!(dialler.connect().ping(1), 1);
}

#[test]
fn a_replayed_capture_delivers_nothing_and_moves_nothing() {
    let Some(lab) = Lab::new("recapture", 2) else { return };
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    let wire = Capture::start(&lab.net(), "c1");
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 200_000);
    assert!(lab.c(1).pings(INNER_V4, 56, 20));
    let datagrams = datagrams_to_server(&wire.stop());
    assert!(datagrams.len() >= 20, "{}", datagrams.len());

    let before = lab.session("c1").expect("a session");
    let device = Capture::start(&lab.srv(), "tg0");
    let stranger = udp_to(&lab.c(2), outer(SERVER_V4)).expect("a socket");
    for datagram in &datagrams {
        stranger.send(datagram).expect("send");
    }
    let delivered = device.stop();
    assert!(delivered.is_empty(), "{} packets were delivered again", delivered.len());
    let after = lab.session("c1").expect("a session");
    assert_eq!(after["peer"], before["peer"]);
    assert_eq!(after["drops"]["duplicate"], datagrams.len());
    assert!(lab.c(1).pings(INNER_V4, 56, 5));
}

#[test]
fn the_newest_authentic_packet_says_where_the_client_is() {
    let Some(lab) = Lab::new("follow", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = Dialler::new(&lab, 1).connect();
    assert_eq!(client.ping(1), 1);
    let address = client.address();
    let older = client.seal(&echo_request(address, 2));
    let peer = || lab.session("c1").expect("a session")["peer"].clone();
    let at_first = peer();
    client.move_to_another_port();
    assert_eq!(client.ping(3), 1, "no answer at the new port");
    let moved = eventually("the client is where it talks", || Some(peer()).filter(|now| *now != at_first));
    // A packet that was on its way for long is delivered, and answered where the client is now.
    let old_socket =
        std::mem::replace(&mut client.udp, udp_to(&lab.c(1), outer(SERVER_V4)).expect("a socket"));
    client.send(&older);
    client.udp = old_socket;
    assert_eq!(client.answers(2), 1);
    assert_eq!(peer(), moved);
}

#[test]
fn a_foreign_source_is_dropped_by_the_worker() {
    foreign_source("spoof", "direct");
}

#[test]
fn a_foreign_source_is_dropped_where_the_guard_writes() {
    foreign_source("spoofg", "guard");
}

fn foreign_source(test: &str, tun_write: &str) {
    let Some(lab) = Lab::new(test, 2) else { return };
    let _server = lab.start_server(&lab.server().set("data.tun_write", format_args!("'{tun_write}'")));
    let mut client = Dialler::new(&lab, 1).connect();
    let mut other = Dialler::new(&lab, 2).connect();
    assert_eq!((client.ping(1), other.ping(1)), (1, 1));
    let device = Capture::start(&lab.srv(), "tg0");
    let foreign = [other.address(), [10, 9, 0, 1].into(), [10, 9, 0, 200].into(), [198, 18, 1, 2].into()];
    for source in foreign {
        let datagram = client.seal(&echo_request(source, 99));
        client.send(&datagram);
    }
    assert_eq!((client.answers(99), other.answers(99)), (0, 0));
    assert_eq!(client.ping(2), 1);
    let sources: Vec<Vec<u8>> = device.stop().iter().map(|p| p.bytes[12..16].to_vec()).collect();
    let expected = [client.address().octets().to_vec(), [10, 9, 0, 1].to_vec()];
    assert!(sources.iter().all(|source| expected.contains(source)), "{sources:?}");
    let drops = lab.session("c1").expect("a session")["drops"]["source_not_ours"].clone();
    assert_eq!(drops, foreign.len());
}

#[test]
fn inner_garbage_is_dropped_by_the_worker() {
    let Some(lab) = Lab::new("innergarbage", 1) else { return };
    let server = lab.start_server(&lab.server());
    let mut client = Dialler::new(&lab, 1).connect();
    assert_eq!(client.ping(1), 1);
    let packet = echo_request(client.address(), 50);
    let mut noise = Noise::new(3);
    for len in 0..60 {
        let garbage: Vec<u8> = noise.by_ref().take(len).collect();
        send_inside(&mut client, &garbage);
        send_inside(&mut client, &packet[..len.min(packet.len() - 1)]);
    }
    for protocol in [1, 6, 17, 47] {
        for len in [20, 21, 27, 28, 33, 39, 40, 60, 1_400] {
            partial_sums(&mut client, protocol, len);
        }
    }
    assert_eq!(client.answers(50), 0);
    assert_eq!(client.ping(2), 1);
    server.wait_for_children(1);
    let drops = lab.session("c1").expect("a session")["drops"].clone();
    assert!(drops["bad_inner"].as_u64() > Some(50), "{drops}");
}

#[test]
fn keys_are_renewed_during_transfers() {
    let Some(lab) = Lab::new("rekey", 1) else { return };
    let _server = lab.start_server(&lab.server().set("data.rekey", "'2s'"));
    let _client = lab.start_client(1, &lab.client(1).set("data.rekey", "'2s'"));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(9) {
        transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 8 << 20);
    }
    eventually("three epochs", || {
        lab.session("c1").and_then(|s| s["epoch"].as_u64()).filter(|epoch| *epoch >= 3)
    });
    let drops = lab.session("c1").expect("a session")["drops"].clone();
    assert!(drops["bad_tag"].is_null() && drops["keys_expired"].is_null(), "{drops}");
}

/// Packets of the right source and length that promise a checksum to complete, where there may be no place for it.
fn partial_sums(client: &mut RawClient, protocol: u8, len: usize) {
    let mut packet = echo_request(client.address(), 50);
    packet.resize(len, 0x99);
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet[9] = protocol;
    for options in [5, 6, 15, 0] {
        packet[0] = 0x40 | options;
        let datagram = client.seal_partial(&packet);
        client.send(&datagram);
    }
}

fn send_inside(client: &mut RawClient, packet: &[u8]) {
    let datagram = client.seal(packet);
    client.send(&datagram);
}

/// How many bytes the server says before it closes.
fn until_closed(tcp: &mut TcpStream) -> usize {
    tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut said = 0;
    let mut buffer = [0; 4_096];
    loop {
        match tcp.read(&mut buffer) {
            Ok(0) => return said,
            Ok(n) => said += n,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return said,
            Err(e) => panic!("the server doesn't close: {e}"),
        }
    }
}
