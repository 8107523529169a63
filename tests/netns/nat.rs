//! A client that says nothing, behind a NAT that forgets.
//!
//! ```text
//!   c1 198.18.1.2 ---- net, which translates c1 to 198.18.100.1 and forgets after 4 s ---- srv
//! ```

use std::thread;
use std::time::Duration;

use crate::lab::{Lab, outer};

/// Silence after which the router forgets, in seconds.
const FORGETS: u64 = 4;
/// The router has forgotten after that. The client asks once more, 3 s after what it sent last.
const SILENCE: Duration = Duration::from_secs(FORGETS + 5);

#[test]
fn a_silent_client_stays_reachable() {
    let Some(lab) = nat("keepnat") else { return };
    let _server = lab.start_server(&lab.server());
    let config = lab.client(1).set("mobility.keepalive", "'1s'");
    let mut client = lab.start_client(1, &config);
    client.wait_for_log("this network translates addresses (the server sees 198.18.100.1:");
    let inner = lab.inner_v4(1);
    thread::sleep(SILENCE);
    assert!(lab.srv().pings(inner, 100, 1), "the way to the client is closed: {}", client.log());
    assert_eq!(client.stop(), 0);
}

#[test]
fn a_silent_client_without_keepalive_is_out_of_reach_until_it_speaks() {
    let Some(lab) = nat("losenat") else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1).set("mobility.keepalive", "'off'"));
    let inner = lab.inner_v4(1);
    assert!(lab.srv().pings(inner, 100, 1), "at first the way is open: {}", client.log());
    thread::sleep(SILENCE);
    assert!(lab.srv().cannot_ping(inner), "nobody forgot: {}", client.log());
    assert!(lab.c(1).pings(crate::lab::INNER_V4, 100, 1));
    assert!(lab.srv().pings(inner, 100, 1), "{}", client.log());
    assert!(!client.log().contains("this network translates addresses"));
    assert_eq!(client.stop(), 0);
}

#[test]
fn a_nat_is_seen_and_nothing_is_sent_where_there_is_none() {
    let Some(lab) = nat("seenat") else { return };
    let _server = lab.start_server(&lab.server());
    let mut translated = lab.start_client(1, &lab.client(1));
    translated.wait_for_log("a packet every 25 s of silence keeps the way open");
    assert_eq!(translated.stop(), 0);
    let remote = format!("['{}']", outer(crate::lab::SERVER_V6));
    let mut direct = lab.start_client(1, &lab.client(1).set("remote", remote));
    direct.wait_for_log("data channel works");
    assert!(!direct.log().contains("this network translates addresses"), "{}", direct.log());
    assert_eq!(direct.stop(), 0);
}

/// A lab whose router translates IPv4, with a short memory for UDP.
fn nat(test: &str) -> Option<Lab> {
    let lab = Lab::new(test, 1)?;
    let rules = lab.write(
        "nat.nft",
        "table ip nat {\nchain post {\ntype nat hook postrouting priority srcnat\noifname \"srv\" masquerade\n}\n}\n",
    );
    lab.net().must(&["nft", "-f", &rules.display().to_string()]);
    for timeout in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
        lab.net().sysctl(&format!("net/netfilter/{timeout}"), &FORGETS.to_string());
    }
    Some(lab)
}
