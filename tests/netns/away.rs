//! Clients that come and go by themselves: what their absence looks like, and how an idle session ends.

use std::time::{Duration, Instant};

use tunguard::wire::control::{Message, Reason};

use crate::lab::{GATEWAY_V4, GATEWAY_V6, Lab, Namespace, ip};
use crate::raw_client::{Dialler, RawClient};

#[test]
fn who_sends_to_a_client_that_is_away_is_told() {
    let Some(lab) = Lab::new("away", 2) else { return };
    // As strict as a host may be with what comes from the device.
    lab.srv().sysctl("net/ipv4/conf/all/rp_filter", "1");
    let config = lab.server().set("client_to_client", true);
    let _server = lab.start_server(&config.set("push.routes", "['192.168.50.0/24', 'fd50::/64']"));
    lab.lan().ip(&["route", "add", "10.9.0.0/24", "via", GATEWAY_V4]);
    lab.lan().ip(&["route", "add", "fd09::/64", "via", GATEWAY_V6]);
    let _here = lab.start_client(1, &lab.client(1));
    let mut gone = lab.start_client(2, &lab.client(2));
    let (v4, v6) = (lab.inner_v4(2).to_string(), lab.inner_v6(2).to_string());
    assert!(lab.c(1).pings(&v4, 56, 1) && lab.lan().pings(&v6, 56, 1));
    assert_eq!(gone.stop(), 0);
    lab.wait_for_sessions(1);

    for host in [lab.srv(), lab.lan(), lab.c(1)] {
        for address in [v4.as_str(), v6.as_str()] {
            assert!(is_told(&host, address), "{} of {address}", host.0);
        }
    }
    let status = lab.status();
    let away = status["away"].as_array().expect("a list");
    assert_eq!(away.len(), 1, "{status}");
    assert_eq!((&away[0]["name"], &away[0]["packets"]), (&"c2".into(), &6.into()), "{status}");
    assert_eq!((&status["guard_drops"]["away"], &status["unreachables"]), (&6.into(), &6.into()), "{status}");

    // An address that nobody has, and those that no host has.
    assert!(is_told(&lab.srv(), "10.9.0.99") && is_told(&lab.lan(), "fd09::99"));
    assert!(lab.status()["guard_drops"]["no_route"].as_u64() >= Some(2));
    for address in ["10.9.0.255", "224.0.0.1", "ff02::1"] {
        lab.srv().run(&["ping", "-n", "-b", "-c", "2", "-i", "0.05", "-W", "1", "-I", "tg0", address]);
    }
    assert_eq!(lab.status()["unreachables"], 8);

    // A flood of one sender, and another one beside it.
    lab.srv().run(&["ping", "-n", "-q", "-f", "-c", "500", "-W", "1", &v4]);
    assert!(is_told(&lab.lan(), &v4));
    let told = lab.status()["unreachables"].as_u64().expect("a number");
    assert!((10..200).contains(&told), "{told}");

    // It comes back, to the addresses it had.
    let _back = lab.start_client(2, &lab.client(2));
    assert_eq!((lab.inner_v4(2), lab.inner_v6(2)), (ip(&v4), ip(&v6)));
    assert!(lab.lan().pings(&v4, 56, 1) && lab.c(1).pings(&v6, 56, 1));
    assert_eq!(lab.status()["away"], serde_json::json!([]));
}

#[test]
fn an_idle_session_ends_if_its_client_comes_and_goes_by_itself() {
    let Some(lab) = Lab::new("idle", 2) else { return };
    let _server = lab.start_server(&lab.server().set("idle", "'10s'"));
    let (first, second) = (Dialler::new(&lab, 1), Dialler::new(&lab, 2));
    let mut client = first.established(first.hello_early(&[]));
    let mut other = second.connect();
    assert_eq!(client.welcome.settings.idle, Some(10));
    let address = client.address();
    assert_eq!((client.ping(1), other.ping(1)), (1, 1));
    let used = Instant::now();
    // What the ends say to each other counts for nothing.
    let reason = loop {
        let _ = client.control.send(&Message::Ping(1));
        let challenge = client.rebind();
        challenge.iter().for_each(|datagram| client.send(datagram));
        client.receive();
        match client.next_message() {
            Ok(Message::Pong(_)) => std::thread::sleep(Duration::from_millis(200)),
            Ok(Message::Bye(reason)) => break reason,
            other => panic!("out of place: {other:?}"),
        }
    };
    let idle = used.elapsed();
    assert_eq!(reason, Reason::Idle);
    assert!((Duration::from_secs(10)..Duration::from_secs(14)).contains(&idle), "{idle:?}");
    lab.wait_for_sessions(1);
    assert_eq!(other.ping(2), 1, "it didn't say that it goes");
    assert!(is_told(&lab.srv(), &address.to_string()));

    let mut again: RawClient = first.established(first.hello_early(&[]));
    assert_eq!(again.address(), address);
    assert_eq!(again.ping(3), 1);
}

/// Whether a ping of `address` is answered with its host being unreachable.
fn is_told(host: &Namespace, address: &str) -> bool {
    let out = host.run(&["ping", "-n", "-c", "1", "-W", "3", address]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let told = text.contains("Destination Host Unreachable")
        || text.contains("Destination unreachable: Address unreachable");
    if !told {
        eprintln!("{text}");
    }
    told
}
