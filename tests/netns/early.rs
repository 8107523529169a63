//! Packets that come with a client's Hello: answered at once, delivered once, and only to whom they are due.

use std::net::Ipv4Addr;

use tunguard::channel::Broken;
use tunguard::wire::control::{MAX_EARLY, Message, Reason};

use crate::lab::{Lab, eventually, outer_v4};
use crate::raw_client::{Dialler, RawClient, echo_request};

#[test]
fn an_early_packet_is_answered_behind_the_welcome() {
    for tun_write in ["direct", "guard"] {
        let Some(lab) = Lab::new(&format!("early{tun_write}"), 1) else { return };
        let _server = lab.start_server(&lab.server().set("data.tun_write", format_args!("'{tun_write}'")));
        let dialler = Dialler::new(&lab, 1);
        let mut client = dialler.established(dialler.hello_early(&[ping(1), ping(2)]));
        assert_eq!(client.address(), FIRST);
        assert_eq!(answered(&mut client), [1, 2], "once, and in order");
        assert_eq!(client.receive(), [[0; 0]; 0], "nothing by UDP yet");
        let session = lab.session("c1").expect("a session");
        assert_eq!(session["received_early"], 2, "{session}");
        assert_eq!((&session["received_packets"], &session["sent_packets"]), (&2.into(), &2.into()));

        // From its first datagram on the client is where that came from.
        assert_eq!(client.ping(3), 1);
        assert_eq!(answered(&mut client), [0; 0]);
        lab.wait_for_peer(&outer_v4(1));
        assert_eq!(client.ping(4), 1);
        client.leave();
    }
}

#[test]
fn an_early_packet_from_an_address_of_somebody_else_is_dropped() {
    let Some(lab) = Lab::new("earlyspoof", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let spoofed = echo_request(Ipv4Addr::new(10, 9, 0, 77), 1);
    let mut client = dialler.established(dialler.hello_early(&[spoofed, vec![0x45; 10], ping(2)]));
    assert_eq!(answered(&mut client), [2]);
    let session = lab.session("c1").expect("a session");
    assert_eq!(session["drops"]["source_not_ours"], 1, "{session}");
    assert_eq!(session["drops"]["bad_inner"], 1, "{session}");
    // No answer to it went anywhere.
    assert_eq!(lab.status()["device_packets"], 1, "{}", lab.status());
}

#[test]
fn more_of_them_or_later_ones_end_the_session() {
    let Some(lab) = Lab::new("earlymost", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let many: Vec<_> = (1..=MAX_EARLY as u16 + 1).map(ping).collect();
    let mut client = dialler.established(dialler.hello_early(&many));
    assert_eq!(ended(&mut client), Some(Reason::Protocol));

    let mut client = dialler.established(dialler.hello_early(&[vec![0x45; 1_501]]));
    assert_eq!(ended(&mut client), Some(Reason::Protocol));

    // As many as may be, and one after another message.
    let mut client = dialler.established(dialler.hello_early(&many[1..]));
    let answers: Vec<u16> = (2..=MAX_EARLY as u16 + 1).collect();
    assert_eq!(answered(&mut client), answers);
    let _ =
        client.control.send(&Message::Ping(7)).and_then(|()| client.control.send(&Message::Early(ping(1))));
    assert_eq!(ended(&mut client), Some(Reason::Protocol));
    lab.wait_for_sessions(0);
}

#[test]
fn early_packets_of_a_client_that_is_refused_are_not_delivered() {
    let Some(lab) = Lab::new("earlyrefused", 2) else { return };
    let _server = lab.start_server(&lab.server().set("max_clients", 1));
    let mut first = Dialler::new(&lab, 1).connect();
    assert_eq!(first.ping(1), 1);
    let read = || lab.status()["device_packets"].as_u64();
    let before = read();
    let (_, answer) =
        Dialler::new(&lab, 2).hello_early(&[ping(1), echo_request(Ipv4Addr::new(10, 9, 0, 3), 2)]);
    assert_eq!(answer, Ok(Message::Bye(Reason::NoRoom)));
    assert_eq!(first.ping(2), 1);
    assert_eq!(read(), before.map(|n| n + 1), "the first client's answer alone");
}

#[test]
fn early_packets_take_over_from_a_session_that_was_left_behind() {
    let Some(lab) = Lab::new("earlytakeover", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let mut old = dialler.connect();
    assert_eq!(old.ping(1), 1);
    let mut client = dialler.established(dialler.hello_early(&[ping(2)]));
    assert_eq!(answered(&mut client), [2]);
    eventually("the older one is over", || {
        let sessions = lab.sessions();
        (sessions.len() == 1 && sessions[0]["session"] == client.welcome.session.to_string()).then_some(())
    });
}

/// The address that the first client gets.
const FIRST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

fn ping(sequence: u16) -> Vec<u8> {
    echo_request(FIRST, sequence)
}

/// Numbers of the pings answered inside the control connection.
fn answered(client: &mut RawClient) -> Vec<u16> {
    let packets = client.receive_inside().expect("a session");
    let reply = |p: &Vec<u8>| (p[9] == 1 && p[20] == 0).then(|| u16::from_be_bytes([p[26], p[27]]));
    packets.iter().filter_map(reply).collect()
}

/// The server's goodbye, behind whatever comes before it.
fn ended(client: &mut RawClient) -> Option<Reason> {
    loop {
        match client.next_message() {
            Ok(Message::Bye(reason)) => return Some(reason),
            Ok(_) => {}
            Err(Broken::Closed | Broken::Lost(_) | Broken::Refused(_)) => return None,
        }
    }
}
