//! Hosts and networks that are not as one would like them.

use std::fs;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tunguard::exit::Exit;
use tunguard::wire::control::{Message, Reason};

use crate::lab::{INNER_V4, INNER_V6, LAN_V4, Lab, PATIENCE, SERVER_V4, eventually, ip, same_lines};
use crate::process::descriptors;
use crate::raw_client::Dialler;
use crate::traffic::{Conversation, transfer, udp_echo};

#[test]
fn many_connections_share_a_tunnel() {
    let Some(lab) = Lab::new("parallel", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    thread::scope(|scope| {
        for n in 0..16 {
            let lab = &lab;
            scope.spawn(move || {
                let inside = if n % 2 == 0 { ip(INNER_V6) } else { ip(INNER_V4) };
                transfer(&lab.c(1), &lab.srv(), inside, 1 << 20);
                udp_echo(&lab.c(1), &lab.srv(), inside, 3_000);
            });
        }
    });
}

#[test]
fn a_lossy_network_loses_no_byte() {
    let Some(lab) = Lab::new("lossy", 1) else { return };
    lose(&lab, 5);
    let _server = lab.start_server(&lab.server().set("data.rekey", "'2s'"));
    let _client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
    transfer(&lab.srv(), &lab.c(1), lab.inner_v6(1), 1 << 20);
    // Nearly dead, but a tunnel.
    lose(&lab, 30);
    eventually("a ping in spite of the loss", || lab.c(1).pings(INNER_V4, 56, 1).then_some(()));
    lose(&lab, 0);
    assert!(lab.session("c1").is_some());
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
}

#[test]
fn a_network_that_is_away_for_a_while_costs_no_connection() {
    let Some(lab) = Lab::new("away", 1) else { return };
    let server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    let addresses = lab.inner(1);
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(10_000);
    lab.net().ip(&["link", "set", "c1", "down"]);
    thread::sleep(Duration::from_secs(3));
    lab.net().ip(&["link", "set", "c1", "up"]);
    talk.exchange(1_000_000);
    assert_eq!(lab.inner(1), addresses);
    server.wait_for_children(1);
}

#[test]
fn a_client_without_ipv6_gets_the_rest() {
    let Some(lab) = Lab::new("noipv6", 1) else { return };
    lab.c(1).sysctl("net/ipv6/conf/all/disable_ipv6", "1");
    lab.c(1).sysctl("net/ipv6/conf/default/disable_ipv6", "1");
    let _server =
        lab.start_server(&lab.server().set("push.routes", "['0.0.0.0/0', '::/0']").set("nat", true));
    let mut client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
    assert_eq!(client.stop(), 0);
}

#[test]
fn a_server_without_ipv6_serves_ipv4() {
    let Some(lab) = Lab::new("nosrv6", 1) else { return };
    lab.srv().sysctl("net/ipv6/conf/all/disable_ipv6", "1");
    lab.srv().sysctl("net/ipv6/conf/default/disable_ipv6", "1");
    let _server = lab.start_server(&lab.server().set("networks", "['10.9.0.0/24']"));
    let _client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
}

#[test]
fn a_route_over_the_server_itself_keeps_the_tunnel_up() {
    let Some(lab) = Lab::new("overroute", 1) else { return };
    let over = "['198.18.100.0/24', '198.18.1.0/24', '192.168.50.0/24']";
    let _server = lab.start_server(&lab.server().set("push.routes", over).set("nat", true));
    let before = lab.c(1).routes();
    let mut client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.lan(), ip(LAN_V4), 1 << 20);
    thread::sleep(Duration::from_secs(2));
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
    assert_eq!(client.stop(), 0);
    same_lines(&before, &lab.c(1).routes(), "the client's routes");
}

#[test]
fn a_server_on_one_address_and_port_is_enough() {
    let Some(lab) = Lab::new("port443", 1) else { return };
    let _server = lab.start_server(&lab.server().set("listen", "'198.18.100.2:443'"));
    let _client = lab.start_client(1, &lab.client(1).set("remote", "'198.18.100.2:443'"));
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
}

#[test]
fn a_device_taken_away_from_the_client_ends_clearly_or_comes_back() {
    let Some(lab) = Lab::new("nodevice", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    lab.c(1).ip(&["link", "del", "tg0"]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Some(code) = client.try_exit() {
            assert_eq!(code, Exit::System as i32, "{}", client.log());
            assert!(client.log().contains("tg0"), "{}", client.log());
            return;
        }
        if !lab.inner(1).is_empty() && lab.c(1).pings(INNER_V4, 56, 1) {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("the client neither ends nor makes its device anew");
}

#[test]
fn a_device_taken_away_from_the_server_ends_clearly_or_comes_back() {
    let Some(lab) = Lab::new("nosrvdevice", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    lab.srv().ip(&["link", "del", "tg0"]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.try_exit().is_none() && lab.srv().addresses("tg0").is_empty() {
        assert!(Instant::now() < deadline, "the server neither ends nor makes its device anew");
        thread::sleep(Duration::from_millis(50));
    }
    let _again = match server.try_exit() {
        Some(code) => {
            assert_eq!(code, Exit::System as i32, "{}", server.log());
            assert!(server.log().contains("tg0"), "{}", server.log());
            lab.start_server(&lab.server())
        }
        None => server,
    };
    lab.wait_for_tunnel(1, &mut client);
}

#[test]
fn a_device_set_down_and_up_goes_on() {
    let Some(lab) = Lab::new("downup", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    lab.srv().ip(&["link", "set", "tg0", "down"]);
    // What arrives meanwhile can't be delivered.
    assert!(lab.c(1).cannot_ping(INNER_V4));
    let mut busy = cpu_ticks(server.pid());
    thread::sleep(Duration::from_secs(1));
    busy = cpu_ticks(server.pid()) - busy;
    assert!(busy < 50, "the guard spins while its device is down: {busy} ticks in a second");
    lab.srv().ip(&["link", "set", "tg0", "up"]);
    assert_eq!(server.try_exit(), None);
    lab.wait_for_tunnel(1, &mut client);
}

/// Fault: the resolver is dead when the client starts. Pass: it says which name can't be looked up and keeps trying; as soon
/// as the name leads somewhere there is a tunnel.
#[test]
fn a_dead_resolver_is_waited_for() {
    let Some(lab) = Lab::new("deaddns", 1) else { return };
    let _server = lab.start_server(&lab.server());
    // The resolver of its own /etc is an address that nobody has.
    let mut client = lab.client_with_own_etc(1, "", &lab.client(1).set("remote", "['vpn.test']"));
    client.wait_for_log("vpn.test");
    client.wait_for_log("next attempt in");
    lab.write("etc/hosts", format!("{SERVER_V4} vpn.test\n"));
    lab.wait_for_tunnel(1, &mut client);
    assert_eq!(client.stop(), 0);
}

/// Fault: the client's device is set down and up again. Pass: meanwhile and afterwards nothing that belongs into the tunnel
/// goes out in clear; either the client ends and says why, or the tunnel carries again by itself.
#[test]
fn a_clients_device_set_down_and_up_ends_clearly_or_goes_on() {
    let Some(lab) = Lab::new("clientdown", 1) else { return };
    let _server = lab.start_server(&lab.server().set("push.routes", "['192.168.50.0/24']").set("nat", true));
    let mut client = lab.start_client(1, &lab.client(1));
    let before = lab.c(1).routes();
    lab.c(1).ip(&["link", "set", "tg0", "down"]);
    thread::sleep(Duration::from_secs(1));
    lab.c(1).ip(&["link", "set", "tg0", "up"]);
    let deadline = Instant::now() + PATIENCE;
    while !lab.c(1).pings(LAN_V4, 56, 1) {
        if let Some(code) = client.try_exit() {
            assert_eq!(code, Exit::System as i32, "{}", client.log());
            assert!(client.log().contains("tg0"), "{}", client.log());
            return;
        }
        let routes = lab.c(1).routes();
        assert!(Instant::now() < deadline, "neither; the routes are {routes:#?}, and were {before:#?}");
    }
    same_lines(&before, &lab.c(1).routes(), "the client's routes");
    assert_eq!(client.stop(), 0);
}

#[test]
fn a_worker_that_does_not_read_holds_up_nobody() {
    let Some(lab) = Lab::new("deaf", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut one = lab.start_client(1, &lab.client(1));
    let _two = lab.start_client(2, &lab.client(2));
    let inside = lab.inner_v4(1).to_string();
    let mut bystander = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
    let pid = lab.session("c1").and_then(|s| s["pid"].as_i64()).expect("a worker") as i32;
    kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("stop a worker");
    // Far more than queue and backlog hold.
    let flood = lab.srv().within(|| std::net::UdpSocket::bind(("0.0.0.0", 0))).expect("bind");
    for _ in 0..200_000 {
        let _ = flood.send_to(&[0x77; 1_000], (inside.as_str(), 9));
    }
    bystander.exchange(1_000_000);
    let dropped = lab.status()["guard_drops"]["queue_full"].as_u64();
    assert!(dropped > Some(0), "{}", lab.status());
    let memory = crate::process::field(server.pid(), "VmRSS").expect("VmRSS");
    let kib: u64 = memory.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number");
    assert!(kib < 100_000, "the guard holds {memory}");
    kill(Pid::from_raw(pid), Signal::SIGCONT).expect("wake a worker");
    lab.wait_for_tunnel(1, &mut one);
    assert_eq!(server.try_exit(), None);
}

#[test]
fn silent_connections_keep_others_out_for_a_while_at_most() {
    let Some(lab) = Lab::new("slots", 2) else { return };
    // Whose source has no share can take all places there are.
    let config = lab.server().set("max_handshakes", 8).set("exempt_sources", "['198.18.1.0/24']");
    let server = lab.start_server(&config);
    let dialler = Dialler::new(&lab, 1);
    let silent: Vec<TcpStream> = (0..40).map(|_| dialler.tcp().expect("the port is open")).collect();
    server.wait_for_children(8);
    eventually("the rest waits", || (lab.status()["waiting"] == 32).then_some(()));
    assert_eq!(lab.status()["handshakes"], 8);
    let mut busy = cpu_ticks(server.pid());
    thread::sleep(Duration::from_secs(1));
    busy = cpu_ticks(server.pid()) - busy;
    assert!(busy < 50, "the guard spins while it is full: {busy} ticks in a second");
    // Those who wait are gone when their turn comes.
    drop(silent);
    let mut client = lab.try_client(2, &lab.client(2));
    lab.wait_for_tunnel(2, &mut client);
}

#[test]
fn a_server_out_of_descriptors_recovers() {
    let Some(lab) = Lab::new("emfile", 2) else { return };
    let config = lab.server().set("max_clients", 5);
    let mut server = lab.start_server(&config);
    let mut stays = Dialler::new(&lab, 2).connect();
    assert_eq!(stays.ping(1), 1);
    let dialler = Dialler::new(&lab, 1);
    // Room for a few more, less than there will be clients; or none, so that not even a connection is accepted.
    let few = descriptors(server.pid()).len() + 3;
    for (limit, said) in [(few, "nobody is let in for the moment"), (3, "can't accept connections")] {
        let nofile = format!("--nofile={limit}:");
        lab.srv().must(&["prlimit", "--pid", &server.pid().to_string(), &nofile]);
        let silent: Vec<TcpStream> = (0..20).map(|_| dialler.tcp().expect("the port is open")).collect();
        server.wait_for_log(said);
        let mut busy = cpu_ticks(server.pid());
        thread::sleep(Duration::from_secs(2));
        busy = cpu_ticks(server.pid()) - busy;
        assert!(busy < 100, "the guard spins without descriptors: {busy} ticks in two seconds");
        assert_eq!(stays.ping(2), 1);
        drop(silent);
        lab.srv().must(&["prlimit", "--pid", &server.pid().to_string(), "--nofile=4096:"]);
        let mut client = lab.try_client(1, &lab.client(1));
        lab.wait_for_tunnel(1, &mut client);
        assert_eq!(client.stop(), 0);
    }
    assert_eq!(stays.ping(3), 1);
}

#[test]
fn a_network_that_carries_no_udp_is_named() {
    let Some(lab) = Lab::new("noudp", 1) else { return };
    let rules = "table inet noudp {\nchain forward {\ntype filter hook forward priority 0\n\
                 udp dport 55555 drop\n}\n}\n";
    let rules = lab.write("noudp.nft", rules);
    lab.net().must(&["nft", "-f", &rules.display().to_string()]);
    let _server = lab.start_server(&lab.server());
    let mut client = lab.try_client(1, &lab.client(1));
    client.wait_for_log("UDP");
    lab.net().must(&["nft", "delete", "table", "inet", "noudp"]);
    lab.wait_for_tunnel(1, &mut client);
}

#[test]
fn a_lost_control_channel_does_not_stop_traffic() {
    let Some(lab) = Lab::new("nocontrol", 1) else { return };
    let _server = lab.start_server(&lab.server().set("linger", "'3s'"));
    let mut client = lab.start_client(1, &lab.client(1));
    let addresses = lab.inner(1);
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    let rules = "table inet notcp {\nchain forward {\ntype filter hook forward priority 0\n\
                 tcp dport 55555 reject with tcp reset\n}\n}\n";
    let rules = lab.write("notcp.nft", rules);
    lab.net().must(&["nft", "-f", &rules.display().to_string()]);
    lab.c(1).must(&["ss", "-K", "-t", "dport", "=", "55555"]);
    lab.srv().must(&["ss", "-K", "-t", "sport", "=", "55555"]);
    eventually("the control channel is lost", || {
        lab.session("c1").filter(|session| session["control"] == "lost").map(drop)
    });
    // Longer than `linger`: it counts from the last authenticated packet.
    for _ in 0..14 {
        talk.exchange(50_000);
        thread::sleep(Duration::from_millis(500));
    }
    lab.net().must(&["nft", "delete", "table", "inet", "notcp"]);
    lab.wait_for_tunnel(1, &mut client);
    talk.exchange(1_000_000);
    assert_eq!(lab.inner(1), addresses);
}

#[test]
fn keys_with_a_short_life_in_packets_are_renewed_in_time() {
    let Some(lab) = Lab::new("rekeypackets", 1) else { return };
    let _server = lab.start_server(&lab.server().set("data.rekey_packets", 1_000));
    let _client = lab.start_client(1, &lab.client(1));
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 16 << 20);
    let epoch = lab.session("c1").expect("a session")["epoch"].as_u64();
    assert!(epoch > Some(3), "{epoch:?}");
}

#[test]
fn the_last_address_is_given_and_then_there_is_none() {
    let Some(lab) = Lab::new("pool", 2) else { return };
    let _server = lab.start_server(&lab.server().set("networks", "['10.9.0.0/30']").set("lease", "'1s'"));
    let one = Dialler::new(&lab, 1).connect();
    assert_eq!(one.address().to_string(), "10.9.0.2");
    let (_control, answer) = Dialler::new(&lab, 2).hello();
    assert_eq!(answer, Ok(Message::Bye(Reason::NoRoom)));
    one.leave();
    // Its owner keeps it for a second.
    let two = eventually("the lease to run out", || match Dialler::new(&lab, 2).hello() {
        (control, Ok(Message::Welcome(welcome))) => Some((control, welcome)),
        _ => None,
    });
    assert_eq!(two.1.addresses[0].addr().to_string(), "10.9.0.2");
}

#[test]
fn waiting_costs_nothing() {
    let Some(lab) = Lab::new("idle", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut client = lab.start_client(1, &lab.client(1));
    let mut two = lab.start_client(2, &lab.client(2));
    let workers = server.wait_for_children(2);
    let all =
        [vec![server.pid(), client.pid(), two.pid()], client.children(), two.children(), workers].concat();
    idle("everybody while nothing happens", &all);
    // A session whose client is gone lingers.
    two.kill();
    eventually("its control channel is lost", || {
        lab.session("c2").filter(|session| session["control"] == "lost").map(drop)
    });
    idle("guard and workers while a session lingers", &[vec![server.pid()], server.children()].concat());
    // A device that is down, a server that is gone.
    lab.c(1).ip(&["link", "set", "tg0", "down"]);
    idle("the client while its device is down", &[vec![client.pid()], client.children()].concat());
    server.kill();
    thread::sleep(Duration::from_millis(500));
    idle("the client while its server is gone", &[vec![client.pid()], client.children()].concat());
    assert_eq!(client.try_exit(), None);
}

/// Asserts that these processes hardly run for a second.
fn idle(what: &str, pids: &[i32]) {
    let before: Vec<u64> = pids.iter().map(|pid| cpu_ticks(*pid)).collect();
    thread::sleep(Duration::from_secs(1));
    for (pid, before) in pids.iter().zip(before) {
        // One that spins takes a hundred, or half of that where it has to share.
        let spent = cpu_ticks(*pid).saturating_sub(before);
        assert!(spent < 20, "{what}: process {pid} ran for {spent} hundredths of a second");
    }
}

#[test]
fn a_path_narrower_than_the_tunnel_carries_what_fits() {
    let Some(lab) = Lab::new("narrow", 1) else { return };
    // Somewhere in the middle, where neither end can know: DF packets above it come back as ICMP errors.
    lab.net().ip(&["link", "set", "srv", "mtu", "1400"]);
    lab.srv().ip(&["link", "set", "eth0", "mtu", "1400"]);
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    assert!(lab.c(1).pings(INNER_V4, 1_200, 3));
    transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
}

#[test]
fn status_is_for_people_too() {
    let Some(lab) = Lab::new("status", 1) else { return };
    let server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    let text = lab.tunguard(&["status", "--socket", "admin.sock"]);
    for word in ["c1", "10.9.0.", "fd09::", "198.18.1.2", "aes-256-gcm"] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    let mode = fs::metadata(lab.path("admin.sock"))
        .map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()));
    assert_eq!(mode.expect("the socket") & 0o777, 0o600);
    drop(server);
    let out = std::process::Command::new(crate::lab::tunguard())
        .args(["status", "--socket", "admin.sock"])
        .current_dir(&lab.dir)
        .output()
        .expect("tunguard starts");
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && error.contains("admin.sock"), "{error}");
}

/// The network loses this share of the packets to and from port 55555.
fn lose(lab: &Lab, percent: u32) {
    let rules = format!(
        "table inet loss\ndelete table inet loss\ntable inet loss {{\nchain forward {{\n\
         type filter hook forward priority 0; policy accept;\n\
         th dport 55555 numgen random mod 100 < {percent} drop\n\
         th sport 55555 numgen random mod 100 < {percent} drop\n}}\n}}\n"
    );
    let file = lab.write("loss.nft", rules);
    lab.net().must(&["nft", "-f", &file.display().to_string()]);
}

/// CPU time of a process, in hundredths of a second.
pub fn cpu_ticks(pid: i32) -> u64 {
    // One that has ended meanwhile doesn't run.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // After the command's name, which may hold anything: utime and stime are fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    [11, 12].iter().filter_map(|at| fields.get(*at)?.parse::<u64>().ok()).sum()
}
