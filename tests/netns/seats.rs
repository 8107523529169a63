//! Several machines with one certificate, and slots and user IDs that are used again: nobody gets another's packets.

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tunguard::channel::Broken;
use tunguard::wire::control::{Message, Reason};

use crate::lab::{INNER_V4, Lab, PATIENCE, eventually};
use crate::raw_client::{Dialler, RawClient, echo_request, resume};

#[test]
fn by_default_the_newest_session_wins_and_the_other_machine_is_told() {
    let Some(lab) = Lab::new("newest", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut first = lab.start_client(1, &lab.client(1));
    let address = lab.inner_v4(1);
    let _second = lab.start_client(2, &same_certificate(&lab, 2));
    assert_eq!(lab.inner_v4(2), address, "one identity, one address");
    assert_eq!(first.exit(), tunguard::exit::Exit::Refused as i32, "{}", first.log());
    assert!(first.log().contains("another client with the same certificate took over"), "{}", first.log());
    lab.wait_for_sessions(1);
    server.wait_for_children(1);
    assert!(lab.c(2).pings(INNER_V4, 100, 3));
}

#[test]
fn with_refuse_who_is_there_stays_and_who_is_gone_gives_way() {
    let Some(lab) = Lab::new("refuse", 3) else { return };
    let mut server = lab.start_server(&lab.server().set("on_too_many", "'refuse'"));
    let first = lab.start_client(1, &lab.client(1));
    let session = lab.session("c1").expect("a session")["session"].clone();
    // Another machine's client is told why, and tries again.
    let mut second = lab.try_client(2, &same_certificate(&lab, 2));
    second.wait_for_log("the identity has as many sessions as it may");
    // For longer than it takes to be found gone, though the first one has nothing to say of itself.
    let other = with_certificate_of_c1(&lab, 3);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(13) {
        assert_eq!(refused(&other), Some(Reason::TooMany));
        thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(second.try_exit(), None, "{}", second.log());
    second.stop();
    server.wait_for_log("c1 refused: it has a session already");
    assert_eq!(lab.session("c1").map(|s| s["session"].clone()), Some(session.clone()));
    assert!(lab.c(1).pings(INNER_V4, 100, 3));
    // It comes back with proof when its connection breaks, whoever else knocks.
    crate::resume::cut(&lab);
    eventually("it is there anew", || {
        assert_eq!(refused(&other), Some(Reason::TooMany));
        lab.session("c1").filter(|s| s["session"] != session && s["control"] == "up").map(drop)
    });
    assert!(lab.c(1).pings(INNER_V4, 100, 3), "{}", first.log());
    // Its machine loses power: no goodbye, no end of the connection.
    lab.c(1).ip(&["link", "set", "eth0", "down"]);
    let mut heir = patiently(&other);
    assert_eq!(heir.ping(1), 1);
    assert_eq!(lab.sessions().iter().filter(|s| s["phase"] == "established").count(), 1);
}

#[test]
fn each_session_of_an_identity_has_addresses_of_its_own() {
    for mode in ["direct", "guard"] {
        let Some(lab) = Lab::new(&format!("seats-{mode}"), 2) else { return };
        let config = lab.server().set("max_sessions_per_identity", 2);
        let mut server = lab.start_server(&config.set("data.tun_write", format_args!("'{mode}'")));
        let near = Dialler::new(&lab, 1);
        let (mut one, mut two) = (near.connect(), with_certificate_of_c1(&lab, 2).connect());
        assert_ne!(one.address(), two.address());
        assert_eq!((one.ping(1), two.ping(2)), (1, 1));
        let mut seats: Vec<_> =
            lab.sessions().iter().map(|s| (s["name"].clone(), s["seat"].as_u64())).collect();
        seats.sort_by_key(|(_, seat)| *seat);
        assert_eq!(seats, [("c1".into(), Some(1)), ("c1".into(), Some(2))]);
        // Neither sends in the other's name.
        let forged = one.seal(&echo_request(two.address(), 3));
        one.send(&forged);
        assert_eq!((one.answers(3), two.answers(3)), (0, 0), "{mode}");
        let drops = lab.sessions().into_iter().find(|s| s["session"] == *one.welcome.session.to_string());
        assert_eq!(drops.expect("its session")["drops"]["source_not_ours"], 1);
        // Who resumes comes back to its own.
        let control = near.control().expect("the TLS handshake");
        let wish = resume(&control, &one.welcome);
        let mut again = near.established(near.hello_with(control, Some(wish)));
        assert_eq!((again.address(), again.ping(4), two.ping(4)), (one.address(), 1, 1));
        lab.wait_for_sessions(2);
        // A third one takes the place of the oldest, which is the second by now, and of nobody else.
        let mut three = near.connect();
        assert_eq!((three.address(), three.ping(5)), (two.address(), 1));
        assert_eq!(last_word(&mut two), Reason::Replaced);
        lab.wait_for_sessions(2);
        let stray = two.seal(&echo_request(two.address(), 6));
        two.send(&stray);
        assert_eq!((two.answers(6), three.answers(6)), (0, 0), "{mode}: its session is over");
        assert_eq!((again.ping(7), three.ping(7)), (1, 1));
        // Names are told apart.
        three.leave();
        lab.wait_for_sessions(1);
        assert_eq!(lab.status()["away"][0]["name"], "c1/2");
        server.signal(Signal::SIGTERM);
        assert_eq!(server.exit(), 0);
    }
}

#[test]
fn a_client_with_something_fixed_has_one_session() {
    let Some(lab) = Lab::new("fixedone", 1) else { return };
    lab.write("clients.d/c1.toml", "addresses = ['10.9.0.77']\n");
    let config = lab.server().set("max_sessions_per_identity", 5).set("on_too_many", "'refuse'");
    let _server = lab.start_server(&config);
    let dialler = Dialler::new(&lab, 1);
    let mut first = dialler.connect();
    assert_eq!(first.address().to_string(), "10.9.0.77");
    assert_eq!(first.ping(1), 1);
    assert_eq!(refused(&dialler), Some(Reason::TooMany));
    first.leave();
    lab.wait_for_sessions(0);
    assert_eq!(dialler.connect().address().to_string(), "10.9.0.77");
}

/// Slot and user ID of an old session are a new one's, and the old client goes on as if nothing had been.
#[test]
fn what_is_used_again_brings_nothing_of_who_had_it_before() {
    for mode in ["direct", "guard"] {
        let Some(lab) = Lab::new(&format!("again-{mode}"), 2) else { return };
        // One session at a time, and as few user IDs as there may be.
        let config = lab.server().set("max_clients", 1).set("worker_uids", "[70000, 70067]");
        let mut server = lab.start_server(&config.set("data.tun_write", format_args!("'{mode}'")));
        let (old_host, new_host) = (Dialler::new(&lab, 1), Dialler::new(&lab, 2));
        let mut old = old_host.connect();
        assert_eq!(old.ping(1), 1);
        // While it is there nobody else is let in.
        assert_eq!(refused(&new_host), Some(Reason::NoRoom));
        let held = of(&lab, &old).expect("its session");
        let datagrams: Vec<Vec<u8>> = (0..20).map(|n| old.seal(&echo_request(old.address(), n))).collect();
        let socket = old.udp.try_clone().expect("a descriptor");
        let send = || datagrams.iter().for_each(|datagram| drop(socket.send(datagram)));
        old.leave();
        // Until then its packets are its own.
        lab.wait_for_sessions(0);
        let (mut same_slot, mut same_uid) = (false, false);
        // Until both were used again; each rests as long as it can.
        for _ in 0..200 {
            send();
            let mut new = soon(&new_host);
            send();
            assert_eq!(new.ping(1), 1);
            let session = of(&lab, &new).expect("its session");
            assert_eq!(session["received_packets"], 1, "{mode}: {session}");
            assert_eq!(session["drops"], serde_json::json!({}), "{mode}: not even to be refused");
            same_slot |= session["slot"] == held["slot"];
            same_uid |= session["uid"] == held["uid"];
            assert_ne!(session["session"], held["session"]);
            new.leave();
            if same_slot && same_uid {
                break;
            }
        }
        assert!(same_slot && same_uid, "slot {same_slot}, user {same_uid}");
        // Nothing of the old client's came out: its pings would have been answered, to somebody who is away.
        lab.wait_for_sessions(0);
        assert_eq!(lab.status()["guard_drops"]["away"], 0);
        server.signal(Signal::SIGTERM);
        assert_eq!(server.exit(), 0);
    }
}

/// Sessions that drain keep their users. More of them than there are users for: who comes then waits, and has a session when one
/// of them has ended.
#[test]
fn who_comes_while_every_user_is_in_use_waits_for_one() {
    let Some(lab) = Lab::new("used-up", 2) else { return };
    let config =
        lab.server().set("max_clients", 3).set("max_sessions_per_identity", 2).set("max_handshakes", 1);
    // As few as there may be, which are as many as there are slots.
    let server = lab.start_server(&config.set("worker_uids", "[70000, 70006]"));
    let says = "every user ID of worker_uids is in use: whoever connects waits until a worker has ended";
    let dialler = Dialler::new(&lab, 1);
    let mut sessions = vec![dialler.connect(), dialler.connect()];
    while !server.log().contains(says) {
        assert!(sessions.len() < 50, "there is a user for each");
        let old = &sessions[sessions.len() - 2];
        // It waits for the last of them, too long where this host is slow.
        let Ok(control) = dialler.control() else { break };
        let wish = resume(&control, &old.welcome);
        let mut new = dialler.established(dialler.hello_with(control, Some(wish)));
        assert_eq!(new.ping(1), 1);
        sessions.push(new);
    }
    let mut client = lab.start_client(2, &lab.client(2));
    assert_eq!(client.stop(), 0);
    assert!(server.log().contains(says), "{}", server.log());
    assert!(!server.log().contains("nobody is let in"), "{}", server.log());
}

fn same_certificate(lab: &Lab, n: usize) -> crate::lab::Config {
    let client = lab.client(n);
    client.set("tls.cert", "'certs/clients/c1.pem'").set("tls.key", "'certs/clients/c1.key'")
}

fn with_certificate_of_c1(lab: &Lab, n: usize) -> Dialler {
    let read = |name: &str| std::fs::read(lab.path(name)).expect("a file of the authority's");
    let credentials = tunguard::tls::Credentials {
        ca: read("certs/ca.pem"),
        cert: read("certs/clients/c1.pem"),
        key: read("certs/clients/c1.key").into(),
    };
    Dialler::with(lab, n, &credentials)
}

/// Why a new session is refused, if it is.
fn refused(dialler: &Dialler) -> Option<Reason> {
    match dialler.hello().1 {
        Ok(Message::Bye(reason)) => Some(reason),
        _ => None,
    }
}

/// A session, as soon as the one before has ended.
fn soon(dialler: &Dialler) -> RawClient {
    eventually("there is room", || match dialler.hello() {
        (control, Ok(Message::Welcome(welcome))) => Some(dialler.welcomed(control, welcome)),
        _ => None,
    })
}

/// A session, as soon as whoever has the seat is found gone.
fn patiently(dialler: &Dialler) -> RawClient {
    let until = Instant::now() + PATIENCE;
    loop {
        match dialler.hello() {
            (control, Ok(Message::Welcome(welcome))) => return dialler.welcomed(control, welcome),
            (_, answer) => assert_eq!(answer, Ok(Message::Bye(Reason::TooMany))),
        }
        assert!(Instant::now() < until, "it is never found gone");
        thread::sleep(Duration::from_millis(300));
    }
}

/// How the server ended a session; it may ask for a sign of life before.
fn last_word(client: &mut RawClient) -> Reason {
    loop {
        match client.next_message() {
            Ok(Message::Bye(reason)) => return reason,
            Ok(Message::Ping(_)) => {}
            other => {
                let other: Result<Message, Broken> = other;
                panic!("no goodbye: {other:?}")
            }
        }
    }
}

fn of(lab: &Lab, client: &RawClient) -> Option<serde_json::Value> {
    let id = client.welcome.session.to_string();
    lab.sessions().into_iter().find(|s| s["session"] == *id)
}
