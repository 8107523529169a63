//! Strangers who want a client's session to be somewhere else, or the server to shoot at somebody: the client stays
//! where it is, and what runs inside the tunnel goes on.
//!
//! ```text
//!   c1, the client    198.18.1.2 ---- [c1]
//!                                         net ---- srv
//!   c2, the stranger  198.18.2.2 ---- [c2]
//! ```
//! The stranger has what passed the router, may hold it back there, and sends first.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tunguard::wire::control::Message;
use tunguard::wire::data::{CONTROL, HEADER_LEN, TAG_LEN};

use crate::capture::{Capture, datagrams_to_server};
use crate::carriers::{DOWN, FIRST, Talk, UP};
use crate::lab::{Lab, SERVER_V4, eventually, ip, outer};
use crate::process::Process;
use crate::raw_client::{Dialler, echo_request};
use crate::traffic::{Conversation, Noise, udp_to};

#[test]
fn a_copy_that_comes_first_moves_nobody() {
    let Some(lab) = Lab::new("raced", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut client = Dialler::new(&lab, 1).connect();
    assert_eq!(client.ping(1), 1);
    let before = peer(&lab);
    let address = client.address();
    for sequence in 2..5 {
        let stranger = stranger(&lab);
        let datagram = client.seal(&echo_request(address, sequence));
        stranger.send(&datagram).expect("send");
        // It was taken for a move: otherwise this would try nothing.
        let mut answers = vec![stranger.recv(&mut [0; 2_048]).expect("a challenge")];
        client.send(&datagram);
        assert_eq!(client.answers(sequence), 1);
        assert_eq!(client.ping(100 + sequence), 1);
        answers.extend(heard(&stranger));
        let total: usize = answers.iter().sum();
        assert!(total <= 3 * datagram.len(), "{} bytes sent, {answers:?} came", datagram.len());
        assert_eq!(peer(&lab), before);
    }
    never_moved(&server);
}

#[test]
fn datagrams_held_back_and_sent_from_elsewhere_move_nobody() {
    let Some(lab) = Lab::new("heldback", 2) else { return };
    let server = lab.start_server(&lab.server());
    // One that comes up later is another carrier than what there was before.
    eventually("a link", || lab.c(1).ip(&["link", "show", "eth0"]).contains("state UP").then_some(()));
    let mut client = lab.start_client(1, &lab.client(1));
    lab.wait_for_peer(FIRST);
    let before = peer(&lab);
    let talks = Talk::start_all(&lab, &[UP, DOWN]);
    let mut open = Conversation::start(&lab.c(1), &lab.srv(), ip(crate::lab::INNER_V4));
    let stranger = stranger(&lab);
    for _ in 0..3 {
        let held = hold_back(&lab);
        send_all(&stranger, &held);
        stranger.recv(&mut [0; 2_048]).expect("a challenge");
        lab.swallow_no_more();
        talks.iter().for_each(Talk::goes_on);
        open.exchange(50_000);
        assert_eq!(peer(&lab), before);
    }
    for talk in talks {
        talk.end();
    }
    never_moved(&server);
    assert_eq!(client.stop(), 0);
}

#[test]
fn an_older_datagram_from_elsewhere_is_delivered_and_moves_nobody() {
    let Some(lab) = Lab::new("older", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut client = Dialler::new(&lab, 1).connect();
    let address = client.address();
    let older: Vec<Vec<u8>> = (1..=20).map(|n| client.seal(&echo_request(address, n))).collect();
    assert_eq!(client.ping(100), 1);
    let before = peer(&lab);
    let stranger = stranger(&lab);
    for (datagram, sequence) in older.iter().zip(1..) {
        stranger.send(datagram).expect("send");
        if sequence % 10 == 0 {
            assert_eq!(client.answers(sequence), 1);
        }
    }
    assert!(heard(&stranger).is_empty());
    assert_eq!(peer(&lab), before);
    // And once more they are nothing at all.
    send_all(&stranger, &older);
    assert_eq!(client.answers(20), 0);
    assert_eq!(lab.session("c1").expect("a session")["drops"]["duplicate"], older.len());
    assert!(heard(&stranger).is_empty());
    assert_eq!(client.ping(101), 1);
    never_moved(&server);
}

#[test]
fn hundreds_of_nominations_are_a_few() {
    let Some(lab) = Lab::new("nominations", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut client = Dialler::new(&lab, 1).connect();
    assert_eq!(client.ping(1), 1);
    let before = peer(&lab);
    let address = client.address();
    let begun = Instant::now();
    let strangers: Vec<UdpSocket> = (0..400).map(|_| stranger(&lab)).collect();
    let mut answers = 0;
    // No more at a time than a socket's buffer holds of answers.
    for few in strangers.chunks(50) {
        for stranger in few {
            // Each is the newest of all.
            let datagram = client.seal(&echo_request(address, 7));
            stranger.send(&datagram).expect("send");
        }
        answers += client.answers(7);
    }
    // They are delivered, and answered at the client.
    assert!(answers >= 300, "{answers} answers");
    assert_eq!(client.ping(2), 1);
    let noticed = strangers.iter().filter(|stranger| {
        stranger.set_nonblocking(true).expect("a socket that doesn't wait");
        stranger.recv(&mut [0; 2_048]).is_ok()
    });
    let (noticed, most) = (noticed.count(), 4 + 1 + begun.elapsed().as_secs() as usize);
    assert!((1..=most).contains(&noticed), "{noticed} of at most {most} nominations");
    assert_eq!(peer(&lab), before);
    never_moved(&server);
    // The client itself may still move.
    client.move_to_another_port();
    let mut sequence = 10;
    eventually("the client where it went", || {
        client.rebind().iter().for_each(|datagram| client.send(datagram));
        sequence += 1;
        (client.ping(sequence) == 1 && peer(&lab) != before).then_some(())
    });
}

#[test]
fn forged_messages_are_dropped_as_such() {
    let Some(lab) = Lab::new("forged", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut client = Dialler::new(&lab, 1).connect();
    assert_eq!(client.ping(1), 1);
    let before = peer(&lab);
    let stranger = stranger(&lab);
    let mut noise = Noise::new(4);
    let mut forged = 0;
    // Lengths of PATH_CHALLENGE and PATH_RESPONSE, PATH_STATUS, REBIND short and long.
    for text in [9, 2, 1, 1_200 - HEADER_LEN - TAG_LEN] {
        for counter in [0, 1, 50, 1_000, 1 << 40] {
            let datagram = forge(client.welcome.session.0, counter, text, &mut noise);
            stranger.send(&datagram).expect("send");
            // And as if the client had sent it.
            client.send(&datagram);
            forged += 2;
        }
    }
    assert!(heard(&stranger).is_empty());
    assert_eq!(client.ping(2), 1);
    let drops = lab.session("c1").expect("a session")["drops"].clone();
    let unseen = ["bad_tag", "duplicate", "too_old"].map(|reason| drops[reason].as_u64().unwrap_or(0));
    // Counters that the client has used are found out before the tag is looked at.
    assert_eq!(unseen.iter().sum::<u64>(), forged, "{drops}");
    assert!(unseen[0] >= forged * 3 / 5, "{drops}");
    assert_eq!(peer(&lab), before);
    never_moved(&server);
}

#[test]
fn a_rebind_says_nothing_twice_and_nothing_for_a_stranger() {
    let Some(lab) = Lab::new("rebind", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut client = Dialler::new(&lab, 1).connect();
    assert_eq!(client.ping(1), 1);
    let at_first = peer(&lab);
    // A true move.
    client.move_to_another_port();
    let datagrams = client.rebind();
    assert!(datagrams[0].len() >= 1_200, "a REBIND is padded");
    datagrams.iter().for_each(|datagram| client.send(datagram));
    assert_eq!(client.ping(2), 1);
    let moved = eventually("the move", || {
        client.receive();
        Some(peer(&lab)).filter(|now| *now != at_first)
    });
    assert_eq!(moves(&server), 1);
    // The same again, from elsewhere.
    let replaying = stranger(&lab);
    for _ in 0..10 {
        send_all(&replaying, &datagrams);
    }
    assert_eq!(client.ping(3), 1);
    assert!(heard(&replaying).is_empty());
    // One that was held back, and comes from elsewhere first.
    let racing = stranger(&lab);
    let datagrams = client.rebind();
    send_all(&racing, &datagrams);
    let mut answers = vec![racing.recv(&mut [0; 2_048]).expect("a challenge")];
    datagrams.iter().for_each(|datagram| client.send(datagram));
    for sequence in 10..40 {
        assert_eq!(client.ping(sequence), 1, "ping {sequence}");
        assert_eq!(peer(&lab), moved);
    }
    answers.extend(heard(&racing));
    let sent: usize = datagrams.iter().map(Vec::len).sum();
    assert!(answers.iter().sum::<usize>() <= 3 * sent, "{sent} bytes sent, {answers:?} came");
    assert_eq!(moves(&server), 1);
}

#[test]
fn nobody_gets_more_than_three_times_what_he_sent() {
    let Some(lab) = Lab::new("amplify", 2) else { return };
    let server = lab.start_server(&lab.server());
    // One that comes up later is another carrier than what there was before.
    eventually("a link", || lab.c(1).ip(&["link", "show", "eth0"]).contains("state UP").then_some(()));
    let mut client = lab.start_client(1, &lab.client(1));
    lab.wait_for_peer(FIRST);
    let before = peer(&lab);
    let talks = Talk::start_all(&lab, &[UP, DOWN]);
    let stranger = stranger(&lab);
    let held = hold_back(&lab);
    let wire = Capture::start(&lab.net(), "c2");
    // While the way up is held back the client can't say that it is where it was.
    let sent = &held[..held.len().min(5)];
    send_all(&stranger, sent);
    let target = std::net::SocketAddr::new(lab.inner_v4(1), 9);
    let source = udp_to(&lab.srv(), target).expect("a socket");
    for size in [64, 200, 1_200] {
        for n in 0..2_000 {
            // Port 9 is closed, which the socket may be told.
            let _ = source.send(&vec![0x77; size]);
            if n % 20 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
    lab.swallow_no_more();
    talks.iter().for_each(Talk::goes_on);
    assert_eq!(peer(&lab), before);
    let came: Vec<usize> = wire
        .stop()
        .iter()
        .filter(|packet| packet.outgoing)
        .filter_map(|packet| packet.ip_after_ethernet().map(<[u8]>::to_vec))
        .filter(|ip| ip[0] == 0x45 && ip[9] == 17 && ip[20..22] == 55555u16.to_be_bytes())
        .map(|ip| ip.len() - 28)
        .collect();
    let sent: usize = sent.iter().map(Vec::len).sum();
    let total: usize = came.iter().sum();
    assert!(total <= 3 * sent, "{sent} bytes sent, {total} came: {came:?}");
    // More than challenges: the bound was put to the test.
    assert!(came.iter().any(|len| *len > 64), "{came:?}");
    for talk in talks {
        talk.end();
    }
    // Nothing but challenges was kept back: the client got it all.
    let session = lab.session("c1").expect("a session");
    assert!(session["drops"]["unproven"].as_u64().unwrap_or(0) <= 20, "{session}");
    never_moved(&server);
    assert_eq!(client.stop(), 0);
}

#[test]
fn a_session_id_that_is_known_early_is_of_no_use() {
    let Some(lab) = Lab::new("early", 2) else { return };
    let server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let stranger = stranger(&lab);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // For every slot, all the time.
        scope.spawn(|| {
            let stranger = self::stranger(&lab);
            let mut noise = Noise::new(6);
            while !done.load(Ordering::Relaxed) {
                for slot in 0..320u16 {
                    let mut id: [u8; 8] = std::array::from_fn(|_| noise.next().expect("noise"));
                    id[..2].copy_from_slice(&slot.to_be_bytes());
                    let _ = stranger.send(&forge(id, 0, 64, &mut noise));
                }
                thread::sleep(Duration::from_millis(5));
            }
            assert!(heard(&stranger).is_empty());
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..3 {
                let (control, answer) = dialler.hello();
                let Ok(Message::Welcome(welcome)) = answer else { panic!("no welcome: {answer:?}") };
                // The ID is seen before the client has said anything with it.
                let mut noise = Noise::new(8);
                for counter in 0..100 {
                    stranger.send(&forge(welcome.session.0, counter, 64, &mut noise)).expect("send");
                }
                eventually("all of them dropped", || {
                    let session = lab.session("c1")?;
                    (session["drops"]["bad_tag"] == 100).then_some(())
                });
                assert!(lab.session("c1").expect("a session")["peer"].is_null());
                let mut client = dialler.welcomed(control, welcome);
                assert_eq!(client.ping(1), 1);
                assert!(peer(&lab).starts_with(FIRST));
                client.leave();
                lab.wait_for_sessions(0);
            }
        }));
        done.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(heard(&stranger).is_empty());
    never_moved(&server);
}

/// A stranger's socket.
fn stranger(lab: &Lab) -> UdpSocket {
    let socket = udp_to(&lab.c(2), outer(SERVER_V4)).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
    socket
}

fn send_all(stranger: &UdpSocket, datagrams: &[Vec<u8>]) {
    for datagram in datagrams {
        stranger.send(datagram).expect("send");
    }
}

/// Lengths of the datagrams that come to a stranger, until it is silent for a second.
fn heard(stranger: &UdpSocket) -> Vec<usize> {
    let mut buffer = [0; 2_048];
    let mut lengths = Vec::new();
    loop {
        match stranger.recv(&mut buffer) {
            Ok(len) => lengths.push(len),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return lengths,
            Err(e) => panic!("a stranger's socket: {e}"),
        }
    }
}

/// Datagrams that client 1 has sent and the server doesn't get, until [`Lab::swallow_no_more`].
fn hold_back(lab: &Lab) -> Vec<Vec<u8>> {
    lab.swallow(&["iifname c1 udp dport 55555"]);
    eventually("datagrams of the client", || {
        let wire = Capture::start(&lab.net(), "c1");
        thread::sleep(Duration::from_millis(200));
        Some(datagrams_to_server(&wire.stop())).filter(|held| held.len() >= 5)
    })
}

/// An in-band message of `text` bytes by somebody without keys.
fn forge(id: [u8; 8], counter: u64, text: usize, noise: &mut Noise) -> Vec<u8> {
    let mut datagram = [&id[..], &[0, CONTROL], &counter.to_be_bytes()[2..]].concat();
    datagram.extend(noise.take(text + TAG_LEN));
    datagram
}

/// Where the server has the client.
fn peer(lab: &Lab) -> String {
    let session = lab.session("c1").expect("a session");
    session["peer"].as_str().expect("a peer").to_owned()
}

/// How often a client moved.
fn moves(server: &Process) -> usize {
    server.log().matches("moved from").count()
}

fn never_moved(server: &Process) {
    assert_eq!(moves(server), 0, "{}", server.log());
}
