//! A session goes on over a new connection: nothing is lost on the way, and nobody else can take it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tunguard::wire::control::{Message, Reason};

use crate::certificates::{Wish, client, credentials, make};
use crate::identity::authority;
use crate::lab::{INNER_V4, INNER_V6, Lab, Namespace, eventually, ip};
use crate::raw_client::{Dialler, RawClient, echo_request, resume};
use crate::traffic::{Conversation, udp_to};

#[test]
fn a_cut_control_connection_costs_no_packet() {
    let Some(lab) = Lab::new("cutcontrol", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let client = lab.start_client(1, &lab.client(1));
    let addresses = lab.inner(1);
    let (inside, inside6) = (lab.inner_v4(1), lab.inner_v6(1));
    let stop = AtomicBool::new(false);
    let lost = thread::scope(|scope| {
        let flows = [
            Flow { from: lab.c(1), to: lab.srv(), address: ip(INNER_V4) },
            Flow { from: lab.srv(), to: lab.c(1), address: inside },
            Flow { from: lab.c(1), to: lab.srv(), address: ip(INNER_V6) },
            Flow { from: lab.srv(), to: lab.c(1), address: inside6 },
        ];
        let flows = flows.map(|flow| flow.start(scope, &stop));
        let stopper = Stopper(&stop);
        for _ in 0..4 {
            let before = newest(&lab, "c1").expect("a session");
            thread::sleep(Duration::from_millis(500));
            cut(&lab);
            eventually("another session carries", || {
                newest(&lab, "c1").filter(|s| s["session"] != before["session"] && s["peer"] != Value::Null)
            });
            thread::sleep(Duration::from_millis(500));
        }
        drop(stopper);
        flows.map(|flow| flow.join().expect("a flow"))
    });
    for (sent, lost) in &lost {
        assert!(*sent > 1_000, "{sent} packets are no flow");
        assert!(lost.is_empty(), "{lost:?} of {sent} are lost; the client said:\n{}", client.log());
    }
    assert_eq!(lab.inner(1), addresses);
    server.wait_for_log("resumes session");
    lab.wait_for_sessions(1);
}

#[test]
fn packets_stay_in_the_old_session_until_the_new_one_is_heard() {
    let Some(lab) = Lab::new("heardfirst", 1) else { return };
    let server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let inside = lab.inner_v4(1);
    let stop = AtomicBool::new(false);
    let old = lab.session("c1").expect("a session");
    let port = old["peer"].as_str().and_then(|peer| peer.rsplit_once(':')).expect("an address").1.to_owned();
    let (sent, lost) = thread::scope(|scope| {
        let flow = Flow { from: lab.srv(), to: lab.c(1), address: inside }.start(scope, &stop);
        let stopper = Stopper(&stop);
        // What the client sends in another session than this one gets nowhere.
        let rules = format!(
            "table inet newport {{\nchain forward {{\ntype filter hook forward priority 0\n\
             udp dport 55555 udp sport != {port} drop\n}}\n}}\n"
        );
        let rules = lab.write("newport.nft", rules);
        lab.net().must(&["nft", "-f", &rules.display().to_string()]);
        cut(&lab);
        eventually("two sessions", || (lab.sessions().len() == 2).then_some(()));
        // Not later: the new one goes inside its control connection before long.
        let phases: Vec<Value> = lab.sessions().iter().map(|s| s["phase"].clone()).collect();
        assert_eq!(phases, ["established", "established"]);
        lab.net().must(&["nft", "delete", "table", "inet", "newport"]);
        eventually("the old one drains", || phase(&lab, &old).filter(|phase| phase == "draining"));
        thread::sleep(Duration::from_millis(500));
        drop(stopper);
        flow.join().expect("a flow")
    });
    assert!(sent > 100, "{sent} packets are no flow");
    assert!(lost.is_empty(), "{lost:?} of {sent} are lost");
    lab.wait_for_sessions(1);
    server.wait_for_children(1);
    lab.wait_for_tunnel(1, &mut client);
}

#[test]
fn what_is_on_its_way_in_the_old_session_arrives() {
    for mode in ["direct", "guard"] {
        let Some(lab) = Lab::new(&format!("onitsway-{mode}"), 1) else { return };
        let server = lab.start_server(&lab.server().set("data.tun_write", format_args!("'{mode}'")));
        let dialler = Dialler::new(&lab, 1);
        let mut old = dialler.connect();
        assert_eq!(old.ping(1), 1);
        let mut new = resumed(&dialler, &old);
        assert_eq!(new.welcome.addresses, old.welcome.addresses);
        // Not heard yet: all goes on in the old one.
        assert_eq!(old.ping(2), 1);
        assert_eq!(new.ping(3), 1);
        // From the old one still, and the answer comes in the new one.
        let late = old.seal(&echo_request(old.address(), 4));
        old.send(&late);
        assert_eq!(new.answers(4), 1, "{mode}: {}", lab.status());
        assert_eq!(old.receive(), Vec::<Vec<u8>>::new());
        assert_eq!(old.next_message(), Ok(Message::Bye(Reason::Replaced)));
        lab.wait_for_sessions(1);
        server.wait_for_children(1);
        let stray = old.seal(&echo_request(old.address(), 5));
        old.send(&stray);
        assert_eq!(new.answers(5), 0, "the old one is over");
        assert_eq!(new.ping(6), 1);
    }
}

#[test]
fn another_certificate_resumes_nothing() {
    let Some(lab) = Lab::new("othercert", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut old = Dialler::new(&lab, 1).connect();
    assert_eq!(old.ping(1), 1);
    // Another client that got hold of the secret, and another certificate of the same client.
    let ca = authority(&lab);
    let renewed = make(&Wish { names: &["c1"], ..client() }, Some(&ca));
    let renewed = Dialler::with(&lab, 1, &credentials(&ca, &renewed));
    for (dialler, line) in
        [(&Dialler::new(&lab, 2), "c2 refused: it asks to resume"), (&renewed, "with another certificate")]
    {
        let control = dialler.control().expect("the TLS handshake");
        let wish = resume(&control, &old.welcome);
        let (_control, answer) = dialler.hello_with(control, Some(wish));
        assert_eq!(answer, Ok(Message::Bye(Reason::Forbidden)));
        server.wait_for_log(line);
        assert_eq!(old.ping(2), 1, "the session goes on unharmed");
    }
    assert_eq!(session_id(&lab, "c1"), old.welcome.session.to_string());
    // Without the wish it is a new session like any other.
    let mut new = renewed.connect();
    assert_eq!(new.ping(3), 1);
    assert_eq!(new.welcome.addresses, old.welcome.addresses);
    lab.wait_for_sessions(1);
}

#[test]
fn a_proof_is_good_for_one_connection() {
    let Some(lab) = Lab::new("oldproof", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let mut old = dialler.connect();
    assert_eq!(old.ping(1), 1);
    let before = dialler.control().expect("the TLS handshake");
    let stolen = resume(&before, &old.welcome);
    let control = dialler.control().expect("the TLS handshake");
    let (_control, answer) = dialler.hello_with(control, Some(stolen.clone()));
    assert_eq!(answer, Ok(Message::Bye(Reason::Forbidden)));
    server.wait_for_log("its proof for session");
    assert_eq!(old.ping(2), 1, "the session goes on unharmed");
    // Where it was made it is good.
    let mut new = dialler.established(dialler.hello_with(before, Some(stolen)));
    assert_eq!(new.ping(3), 1);
    assert_eq!(new.welcome.addresses, old.welcome.addresses);
    lab.wait_for_sessions(1);
    assert_eq!(session_id(&lab, "c1"), new.welcome.session.to_string());
}

#[test]
fn of_two_resumptions_at_once_the_newest_wins() {
    let Some(lab) = Lab::new("twicefold", 1) else { return };
    let server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let mut old = dialler.connect();
    assert_eq!(old.ping(1), 1);
    let [first, second, third] = [(); 3].map(|()| {
        let control = dialler.control().expect("the TLS handshake");
        let wish = resume(&control, &old.welcome);
        (control, wish)
    });
    let mut second = dialler.established(dialler.hello_with(second.0, Some(second.1)));
    let mut third = dialler.established(dialler.hello_with(third.0, Some(third.1)));
    assert_eq!(second.next_message(), Ok(Message::Bye(Reason::Replaced)));
    assert_eq!(old.ping(2), 1, "nobody was heard yet");
    // The oldest connection comes last: what it asks for was overtaken.
    let (_control, answer) = dialler.hello_with(first.0, Some(first.1));
    assert_eq!(answer, Ok(Message::Bye(Reason::Replaced)));
    assert_eq!(third.ping(3), 1);
    assert_eq!(third.welcome.addresses, old.welcome.addresses);
    lab.wait_for_sessions(1);
    server.wait_for_children(1);
    assert_eq!(third.ping(4), 1);
    assert_eq!(session_id(&lab, "c1"), third.welcome.session.to_string());
}

#[test]
fn a_session_that_is_gone_is_replaced_by_a_new_one() {
    let Some(lab) = Lab::new("gone", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let old = dialler.connect();
    let (addresses, welcome) = (old.welcome.addresses.clone(), old.welcome.clone());
    old.leave();
    lab.wait_for_sessions(0);
    let again = |sequence| {
        let control = dialler.control().expect("the TLS handshake");
        let wish = resume(&control, &welcome);
        let mut new = dialler.established(dialler.hello_with(control, Some(wish)));
        assert_eq!(new.ping(sequence), 1);
        assert_eq!(new.welcome.addresses, addresses);
    };
    again(1);
    server.kill();
    let _server = lab.start_server(&lab.server());
    again(2);
}

#[test]
fn a_session_taken_over_is_not_resumed_again_by_what_comes_late() {
    let Some(lab) = Lab::new("toolate", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let mut old = dialler.connect();
    assert_eq!(old.ping(1), 1);
    let late = [(); 2].map(|()| {
        let control = dialler.control().expect("the TLS handshake");
        let wish = resume(&control, &old.welcome);
        (control, wish)
    });
    let mut new = resumed(&dialler, &old);
    assert_eq!(new.ping(2), 1);
    // While the old session drains, and when it is gone.
    for (sessions, (control, wish)) in [2, 1].into_iter().zip(late) {
        lab.wait_for_sessions(sessions);
        let (_control, answer) = dialler.hello_with(control, Some(wish));
        assert_eq!(answer, Ok(Message::Bye(Reason::Replaced)));
    }
    assert_eq!(new.ping(3), 1);
    assert_eq!(session_id(&lab, "c1"), new.welcome.session.to_string());
}

#[test]
fn either_session_survives_the_other() {
    let Some(lab) = Lab::new("survives", 1) else { return };
    let server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    let mut old = dialler.connect();
    assert_eq!(old.ping(1), 1);
    // The new one dies before it was heard.
    let new = resumed(&dialler, &old);
    kill_worker(&lab, &new);
    server.wait_for_children(1);
    assert_eq!(old.ping(2), 1);
    // The old one dies before the new one was heard.
    let mut new = resumed(&dialler, &old);
    kill_worker(&lab, &old);
    server.wait_for_children(1);
    let address = old.address().to_string();
    lab.srv().run(&["ping", "-n", "-c", "1", "-W", "1", &address]);
    let queued = newest(&lab, "c1").and_then(|s| s["queued_packets"].as_u64());
    assert!(queued > Some(0), "the packets don't go to the new one: {}", lab.status());
    assert_eq!(new.ping(3), 1);
    assert_eq!(new.welcome.addresses, old.welcome.addresses);
}

#[test]
fn where_udp_is_blocked_the_new_session_gets_the_packets_all_the_same() {
    let Some(lab) = Lab::new("blocked", 2) else { return };
    let server = lab.start_server(&lab.server().set("max_clients", 2));
    let dialler = Dialler::new(&lab, 1);
    let mut old = dialler.connect();
    assert_eq!(old.ping(1), 1);
    let begun = Instant::now();
    let mut new = resumed(&dialler, &old);
    // Both together count as one client.
    Dialler::new(&lab, 2).connect().leave();
    eventually("the old one drains", || phase_of(&lab, &old).filter(|phase| phase == "draining"));
    assert!(begun.elapsed() >= Duration::from_secs(4), "after {:?}", begun.elapsed());
    assert_eq!(old.next_message(), Ok(Message::Bye(Reason::Replaced)));
    server.wait_for_children(1);
    assert_eq!(new.ping(2), 1);
}

#[test]
fn a_goodbye_ends_what_the_new_session_was_to_replace() {
    let Some(lab) = Lab::new("goodbye", 1) else { return };
    let server = lab.start_server(&lab.server());
    let dialler = Dialler::new(&lab, 1);
    // A client that died, and comes back only to leave.
    let old = dialler.connect();
    let id = old.welcome.session.to_string();
    drop(old);
    eventually("its connection is lost", || {
        lab.session("c1").filter(|s| s["session"] == *id && s["control"] == "lost").map(drop)
    });
    dialler.connect().leave();
    lab.wait_for_sessions(0);
    server.wait_for_children(0);
}

#[test]
fn a_server_that_is_started_again_gives_the_same_addresses() {
    let Some(lab) = Lab::new("again", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let addresses = lab.inner(1);
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(100_000);
    server.kill();
    let _server = lab.start_server(&lab.server());
    talk.exchange(1_000_000);
    lab.wait_for_tunnel(1, &mut client);
    assert_eq!(lab.inner(1), addresses);
    assert!(!client.log().contains("refused to resume"), "{}", client.log());
}

/// A session that resumes `old`, silent on UDP so far.
fn resumed(dialler: &Dialler, old: &RawClient) -> RawClient {
    let control = dialler.control().expect("the TLS handshake");
    let wish = resume(&control, &old.welcome);
    dialler.established(dialler.hello_with(control, Some(wish)))
}

/// Cuts every control connection, as a network would that forgot them.
/// The control connection of the first client is gone.
pub fn cut(lab: &Lab) {
    lab.c(1).must(&["ss", "-K", "-t", "dport", "=", "55555"]);
}

fn kill_worker(lab: &Lab, client: &RawClient) {
    let id = client.welcome.session.to_string();
    let session = lab.sessions().into_iter().find(|s| s["session"] == *id).expect("its session");
    kill(Pid::from_raw(session["pid"].as_i64().expect("a worker") as i32), Signal::SIGKILL)
        .expect("a worker");
}

fn phase(lab: &Lab, session: &Value) -> Option<String> {
    let session = lab.sessions().into_iter().find(|s| s["session"] == session["session"])?;
    session["phase"].as_str().map(str::to_owned)
}

fn phase_of(lab: &Lab, client: &RawClient) -> Option<String> {
    phase(lab, &serde_json::json!({ "session": client.welcome.session.to_string() }))
}

/// The youngest session of this client.
fn newest(lab: &Lab, name: &str) -> Option<Value> {
    lab.sessions().into_iter().rfind(|s| s["name"] == name)
}

fn session_id(lab: &Lab, name: &str) -> String {
    newest(lab, name).and_then(|s| s["session"].as_str().map(str::to_owned)).expect("a session")
}

/// Stops the flows, when a test fails amid them as well.
pub struct Stopper<'a>(pub &'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Datagrams between two hosts, each with its number.
struct Flow {
    from: Namespace,
    to: Namespace,
    address: IpAddr,
}

impl Flow {
    /// Sends until told to stop; says how many it sent and which of them didn't arrive.
    fn start<'s>(
        self,
        scope: &'s thread::Scope<'s, '_>,
        stop: &'s AtomicBool,
    ) -> ScopedJoinHandle<'s, (u32, Vec<u32>)> {
        let receiver = self.to.within(|| UdpSocket::bind((self.address, 0))).expect("bind");
        let target: SocketAddr = receiver.local_addr().expect("an address");
        let sender = udp_to(&self.from, target).expect("a socket");
        receiver.set_read_timeout(Some(Duration::from_secs(2))).expect("a timeout");
        let receiving = scope.spawn(move || {
            let mut heard = BTreeSet::new();
            let mut number = [0; 4];
            while let Ok(4) = receiver.recv(&mut number) {
                heard.insert(u32::from_be_bytes(number));
            }
            heard
        });
        scope.spawn(move || {
            let mut sent = 0u32;
            while !stop.load(Ordering::Relaxed) {
                sender.send(&sent.to_be_bytes()).expect("a datagram");
                sent += 1;
                thread::sleep(Duration::from_millis(2));
            }
            let heard = receiving.join().expect("the receiving end");
            (sent, (0..sent).filter(|number| !heard.contains(number)).collect())
        })
    }
}
