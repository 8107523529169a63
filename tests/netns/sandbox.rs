//! Whoever reads from the network is filtered before it does, and a worker further with its session. What the filters
//! forbid is shown beside their tables (src/sys/seccomp/tests.rs); here, that they are in force.

use std::net::UdpSocket;

use crate::lab::{INNER_V4, Lab, PATIENCE, eventually, ip};
use crate::process::{Process, children, field, limit};
use crate::raw_client::Dialler;
use crate::traffic::transfer;

#[test]
fn a_worker_is_filtered_before_it_reads_and_further_with_a_session() {
    let Some(lab) = Lab::new("filters", 1) else { return };
    for way in ["'direct'", "'guard'"] {
        let mut server = lab.start_server(&lab.server().set("data.tun_write", way));
        let before = filters(server.pid());
        let silent = Dialler::new(&lab, 1).tcp().expect("the port is open");
        let worker = server.wait_for_children(1)[0];
        eventually("it is filtered", || (filters(worker) == before + 1).then_some(()));
        assert_eq!(field(worker, "Seccomp").as_deref(), Some("2"));
        assert_eq!(field(worker, "NoNewPrivs").as_deref(), Some("1"));
        assert_eq!(limit(worker, "Max open files"), "10");
        drop(silent);
        server.wait_for_children(0);

        let mut client = lab.start_client(1, &lab.client(1));
        let worker = server.wait_for_children(1)[0];
        assert_eq!(field(worker, "Seccomp").as_deref(), Some("2"));
        assert_eq!(filters(worker), before + 2);
        transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
        assert_eq!(client.stop(), 0);
        server.wait_for_children(0);
        assert_eq!(server.stop(), 0);
    }
}

#[test]
fn the_tunnel_process_is_filtered_for_its_life() {
    let Some(lab) = Lab::new("filtert", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let client = lab.start_client(1, &lab.client(1));
    let [tunnel] = client.children()[..] else { panic!("{:?}", client.children()) };
    assert_eq!(field(tunnel, "Seccomp").as_deref(), Some("2"));
    assert_eq!(field(tunnel, "NoNewPrivs").as_deref(), Some("1"));
    assert_eq!(filters(tunnel), filters(client.pid()) + 1);
    assert_eq!(limit(tunnel, "Max open files"), "41");
}

#[test]
fn a_name_is_looked_up_by_a_helper_that_is_filtered() {
    let Some(lab) = Lab::new("filterl", 1) else { return };
    let _server = lab.start_server(&lab.server());
    lab.srv().ip(&["addr", "add", "198.18.100.53/32", "dev", "lo"]);
    let resolver = lab.srv().within(|| UdpSocket::bind("198.18.100.53:53")).expect("a name server");
    resolver.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut client = lab.client_with_own_etc(1, "", &lab.client(1).set("remote", "'vpn.test'"));

    let mut query = [0; 512];
    let (mut len, mut asker) = resolver.recv_from(&mut query).expect("the helper asks");
    let helper = eventually("the helper", || {
        children(client.pid())
            .into_iter()
            .find(|pid| field(*pid, "Uid").is_some_and(|uid| uid.starts_with("65534")))
            .filter(|pid| field(*pid, "Seccomp").as_deref() == Some("2"))
    });
    assert_eq!(filters(helper), filters(client.pid()) + 1);
    assert_eq!(field(helper, "NoNewPrivs").as_deref(), Some("1"));
    assert_eq!(limit(helper, "Max processes"), "0");
    // For each family one question.
    while lab.sessions().is_empty() {
        resolver.send_to(&answer(&query[..len]), asker).expect("answers");
        resolver.set_read_timeout(Some(std::time::Duration::from_millis(500))).expect("a timeout");
        if let Ok(asked) = resolver.recv_from(&mut query) {
            (len, asker) = asked;
        }
        assert_eq!(client.try_exit(), None);
    }
    lab.wait_for_tunnel(1, &mut client);
}

#[test]
fn landlock_is_required_unless_it_is_off() {
    let Some(lab) = Lab::new("landlock", 1) else { return };
    let version = "sandbox: seccomp, Landlock ABI ";
    let warning = "sandbox: `landlock = \"off\"`";
    let times = |process: &Process, text: &str| process.log().matches(text).count();

    let mut server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    for process in [&server, &client] {
        assert_eq!((times(process, version), times(process, warning)), (1, 0), "{}", process.log());
    }
    assert!(lab.status()["sandbox"]["landlock_abi"].as_i64() > Some(0), "{}", lab.status());
    assert_eq!(lab.status()["sandbox"]["seccomp"], true);
    let of_client = lab.path("client-state-1").join("client-tg0.sock").display().to_string();
    for socket in [lab.path("admin.sock").display().to_string(), of_client] {
        let shown = lab.tunguard(&["status", "--socket", &socket]);
        assert!(shown.contains("seccomp, Landlock ABI "), "{shown}");
    }
    client.stop();
    server.stop();

    let server = lab.start_server(&lab.server().set("sandbox.landlock", "'off'"));
    let client = lab.start_client(1, &lab.client(1).set("sandbox.landlock", "'off'"));
    for process in [&server, &client] {
        assert_eq!((times(process, version), times(process, warning)), (0, 1), "{}", process.log());
    }
    assert!(lab.status()["sandbox"]["landlock_abi"].is_null(), "{}", lab.status());
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
    // The filters stay.
    assert_eq!(filters(server.wait_for_children(1)[0]), filters(server.pid()) + 2);
    assert_eq!(filters(client.children()[0]), filters(client.pid()) + 1);
}

/// How many filters a process has; a container's or a service manager's among them.
fn filters(pid: i32) -> u32 {
    field(pid, "Seccomp_filters").and_then(|count| count.parse().ok()).unwrap_or_default()
}

/// An answer (RFC 1035) to a question for the server's name: its IPv4 address, and nothing for other types.
fn answer(query: &[u8]) -> Vec<u8> {
    const HEADER: usize = 12;
    let name = query[HEADER..].iter().position(|byte| *byte == 0).expect("a name") + 1;
    let question = &query[HEADER..HEADER + name + 4];
    let is_a = question[name..name + 2] == [0, 1];
    let header = [&query[..2], &[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]].concat();
    // The question's name, A, IN, a minute, four bytes.
    let record: &[u8] = &[0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 18, 100, 2];
    [&header[..], question, if is_a { record } else { &[] }].concat()
}
