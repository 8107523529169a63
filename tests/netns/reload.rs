//! A running server takes a new configuration over, whole, or leaves everything as it is and says why.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tunguard::exit::Exit;
use tunguard::wire::control::{Message, Reason};

use crate::certificates::crl;
use crate::identity::authority;
use crate::lab::{Config, INNER_V4, Lab, eventually, ip, tunguard};
use crate::process::Process;
use crate::raw_client::Dialler;
use crate::traffic::Conversation;

#[test]
fn a_reload_with_broken_files_changes_nothing_and_a_good_one_does() {
    let Some(lab) = Lab::new("reload", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let _one = lab.start_client(1, &lab.client(1));
    let good = fs::read(lab.path("certs/gate.pem")).expect("the certificate");
    lab.write("certs/gate.pem", "-----BEGIN CERTIFICATE-----\nhalf");
    server.signal(Signal::SIGHUP);
    server.wait_for_log("stays in force");
    let mut two = lab.start_client(2, &lab.client(2));
    assert!(lab.c(1).pings(INNER_V4, 56, 3));
    two.stop();
    // Another certificate for the server: new connections see it, old ones go on.
    lab.write("certs/gate.pem", good);
    lab.tunguard(&["pki", "server", "other", "--san", "other.test"]);
    fs::copy(lab.path("certs/other.pem"), lab.path("certs/gate.pem")).expect("copied");
    fs::copy(lab.path("certs/other.key"), lab.path("certs/gate.key")).expect("copied");
    server.signal(Signal::SIGHUP);
    server.wait_for_log("are read again");
    let mut refused = lab.try_client(2, &lab.client(2));
    assert_eq!(refused.exit(), Exit::CertificateForeign as i32, "{}", refused.log());
    let _two = lab.start_client(2, &lab.client(2).set("tls.server_name", "'other.test'"));
    assert!(lab.c(1).pings(INNER_V4, 56, 3));
    assert_eq!(server.try_exit(), None);
}

#[test]
fn what_is_wrong_or_fixed_is_refused_as_a_whole() {
    let Some(lab) = Lab::new("refused", 1) else { return };
    let server = lab.server().set("client_to_client", false).set("max_clients", 2);
    let _running = lab.start_server(&server);
    let _one = lab.start_client(1, &lab.client(1));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    let rules = lab.srv().must(&["nft", "list", "ruleset"]);
    let routes = lab.srv().routes();
    // Each comes with a change that would be in force at once.
    let base = server.clone().set("client_to_client", true).set("push.routes", "['192.168.50.0/24']");
    lab.write("clients.d/c9.toml", "subnets = ['172.16.9.0/24']");
    for (config, sentence) in [
        (base.clone().set("max_cleints", 7), "unknown key \"max_cleints\""),
        (base.clone().set("mtu", 7), "mtu = 7 is out of range"),
        (
            base.clone().set("listen", "'[::]:55556'"),
            "listen can't change while the server runs: restart the server",
        ),
        (
            base.clone().set("mtu", 1_400).set("worker_uids", "[70000, 80000]"),
            "mtu, worker_uids can't change while the server runs: restart the server to change them",
        ),
        (base.clone().set("max_clients", 3), "max_clients = 3 is more than the 2 there were at the start"),
        (base.clone().set("tls.cert", "'nowhere.pem'"), "nowhere.pem"),
        (base.clone().set("tls.key", "'certs/ca.key'"), "certs/ca.key"),
        (base.clone().set("tls.crl", "'nowhere.pem'"), "nowhere.pem"),
    ] {
        refused(&lab, &config, sentence);
    }
    let text = base.text();
    lab.write("server.toml", &text[..text.len() / 2]);
    refused_as_it_is(&lab, "server.toml");
    lab.write("clients.d/c8.toml", "subnets = ['172.16.9.0/24']");
    refused(&lab, &base, "is already another client's");
    talk.exchange(10_000);
    assert_eq!(lab.srv().must(&["nft", "list", "ruleset"]), rules);
    assert_eq!(lab.srv().routes(), routes);
    // A key among the good ones that the host refuses: what came before it is undone.
    fs::remove_file(lab.path("clients.d/c8.toml")).expect("removed");
    lab.srv().ip(&["route", "add", "172.16.10.0/24", "dev", "eth1"]);
    lab.write("clients.d/c9.toml", "subnets = ['172.16.9.0/24', '172.16.10.0/24']");
    let routes = lab.srv().routes();
    refused(&lab, &base, "172.16.10.0/24");
    assert_eq!(lab.srv().routes(), routes);
    assert_eq!(lab.srv().must(&["nft", "list", "ruleset"]), rules);
}

#[test]
fn what_may_change_is_in_force_at_once() {
    let Some(lab) = Lab::new("live", 2) else { return };
    let server = lab.server();
    let _running = lab.start_server(&server);
    let _one = lab.start_client(1, &lab.client(1));
    let _two = lab.start_client(2, &lab.client(2));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    assert!(lab.c(1).cannot_ping(lab.inner_v4(2)));
    let said = reloaded(&lab, &server);
    assert!(!said.contains("changed"), "{said}");
    // Rules, and what is pushed: by the sessions that are there.
    let next = server.set("client_to_client", true).set("push.routes", "['192.168.50.0/24']");
    let said = reloaded(&lab, &next);
    assert!(said.contains("changed: client_to_client, push.routes"), "{said}");
    assert!(lab.c(1).pings(lab.inner_v4(2), 56, 1));
    eventually("the pushed route is there", || {
        lab.c(1).routes().iter().any(|line| line.starts_with("192.168.50.0/24 dev tg0")).then_some(())
    });
    let next = next.set("client_to_client", false).set("push.routes", "[]");
    reloaded(&lab, &next);
    assert!(lab.c(1).cannot_ping(lab.inner_v4(2)));
    eventually("the pushed route is gone", || {
        (!lab.c(1).routes().iter().any(|line| line.starts_with("192.168.50.0/24"))).then_some(())
    });
    // Limits.
    reloaded(&lab, &next.clone().set("max_handshakes_per_source", 1));
    let dialler = Dialler::new(&lab, 1);
    let silent: Vec<_> = (0..3).map(|_| dialler.tcp().expect("the port is open")).collect();
    eventually("one place", || {
        let status = lab.status();
        (status["handshakes"] == 1 && status["waiting"] == 2).then_some(())
    });
    drop(silent);
    talk.exchange(100_000);
}

/// As many queues may be made as the new configuration needs, in the namespace that they are in.
#[test]
fn more_handshakes_have_room_for_their_queues() {
    let Some(lab) = Lab::new("morequeues", 1) else { return };
    let config = lab.server().set("max_clients", 10).set("max_handshakes", 1);
    let server = lab.start_server(&config);
    let most = || {
        let ipc = format!("--ipc=/proc/{}/ns/ipc", server.pid());
        let shown = lab.srv().must(&["nsenter", &ipc, "--", "cat", "/proc/sys/fs/mqueue/queues_max"]);
        shown.trim().parse::<usize>().expect("a number")
    };
    assert!(most() < 3 * 10 + 2 * 4_000, "{}", most());
    reloaded(&lab, &config.clone().set("max_handshakes", 4_000));
    assert!(most() >= 3 * 10 + 2 * 4_000, "{}", most());
    // It stays: what was made is there.
    reloaded(&lab, &config);
    assert!(most() >= 3 * 10 + 2 * 4_000, "{}", most());
    Dialler::new(&lab, 1).connect().leave();
}

#[test]
fn a_full_house_is_what_the_new_configuration_says() {
    let Some(lab) = Lab::new("newhouse", 2) else { return };
    let _server = lab.start_server(&lab.server());
    let one = Dialler::new(&lab, 1).connect();
    reloaded(&lab, &lab.server().set("max_clients", 1));
    let (_control, answer) = Dialler::new(&lab, 2).hello();
    assert_eq!(answer, Ok(Message::Bye(Reason::NoRoom)));
    reloaded(&lab, &lab.server());
    Dialler::new(&lab, 2).connect().leave();
    one.leave();
}

#[test]
fn clients_entries_change_for_those_concerned_only() {
    let Some(lab) = Lab::new("entries", 2) else { return };
    let server = lab.server();
    let _running = lab.start_server(&server);
    let mut one = lab.start_client(1, &lab.client(1));
    let _two = lab.start_client(2, &lab.client(2));
    let mut talk = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
    let before = lab.session("c2").expect("a session")["session"].clone();
    // A fixed address and a subnet for the first.
    lab.write("clients.d/c1.toml", "addresses = ['10.9.0.77']\nsubnets = ['172.16.1.0/24']");
    let said = reloaded(&lab, &server);
    assert!(said.contains("changed clients: c1"), "{said}");
    eventually("the first has its new address", || lab.inner(1).contains(&ip("10.9.0.77")).then_some(()));
    lab.wait_for_tunnel(1, &mut one);
    assert!(lab.srv().routes().iter().any(|line| line.starts_with("172.16.1.0/24 dev tg0")));
    let session = eventually("the first's session", || {
        lab.session("c1").filter(|session| session["phase"] == "established")
    });
    assert_eq!(session["subnets"], serde_json::json!(["172.16.1.0/24"]));
    // It changes hands.
    fs::rename(lab.path("clients.d/c1.toml"), lab.path("clients.d/c3.toml")).expect("renamed");
    reloaded(&lab, &server);
    eventually("the first has another address", || {
        let own = lab.inner(1);
        (!own.is_empty() && !own.contains(&ip("10.9.0.77"))).then_some(())
    });
    fs::remove_file(lab.path("clients.d/c3.toml")).expect("removed");
    reloaded(&lab, &server);
    assert!(!lab.srv().routes().iter().any(|line| line.starts_with("172.16.1.0/24")));
    talk.exchange(100_000);
    assert_eq!(lab.session("c2").expect("a session")["session"], before, "the second's session was ended");
}

#[test]
fn a_list_that_is_no_good_is_refused_and_the_old_one_stays() {
    let Some(lab) = Lab::new("lists", 2) else { return };
    lab.tunguard(&["pki", "revoke", "c1"]);
    let server = lab.server();
    let _running = lab.start_server(&server);
    let good = fs::read(lab.path("certs/crl.pem")).expect("a list");
    let foreign = {
        lab.tunguard(&["pki", "init", "--dir", "elsewhere"]);
        fs::read(lab.path("elsewhere/crl.pem")).expect("a list")
    };
    let expired = crl(&authority(&lab), &[], (-2_000, -1_000));
    for (list, sentence) in [
        (Some(&good[..good.len() / 2]), "the END line is missing"),
        (Some(&foreign[..]), "not signed by our CA"),
        (Some(&expired[..]), "it expired on"),
        (None, "crl.pem"),
    ] {
        match list {
            Some(list) => drop(lab.write("certs/crl.pem", list)),
            None => fs::remove_file(lab.path("certs/crl.pem")).expect("removed"),
        }
        refused(&lab, &server, sentence);
        let (_control, answer) = match Dialler::new(&lab, 1).control() {
            Ok(control) => Dialler::new(&lab, 1).hello_over(control),
            Err(_) => continue,
        };
        assert!(!matches!(answer, Ok(Message::Welcome(_))), "a revoked client is in with: {sentence}");
    }
    Dialler::new(&lab, 2).connect().leave();
}

#[test]
fn a_reload_cuts_a_revoked_session_within_a_second() {
    let Some(lab) = Lab::new("cutnow", 2) else { return };
    // A list that isn't where the server looks for it until it is told.
    let server = lab.server().set("tls.crl", "'other/crl.pem'");
    lab.write("other/crl.pem", fs::read(lab.path("certs/crl.pem")).expect("a list"));
    let _running = lab.start_server(&server);
    let mut measured = Vec::new();
    for (round, watched) in [(1, false), (2, true)] {
        if round == 2 {
            lab.tunguard(&["pki", "client", "c1"]);
        }
        let mut client = Dialler::new(&lab, 1).connect();
        lab.wait_for_sessions(1);
        let mut begun = Instant::now();
        lab.tunguard(&["pki", "revoke", "c1"]);
        if !watched {
            // Another list in server.toml, which is watched from then on.
            begun = Instant::now();
            reloaded(&lab, &lab.server());
        }
        let goodbye = loop {
            match client.next_message() {
                Ok(Message::Bye(reason)) => break reason,
                Ok(_) => {}
                Err(broken) => panic!("{broken:?}"),
            }
        };
        let took = begun.elapsed();
        assert_eq!(goodbye, Reason::Revoked);
        assert!(took < Duration::from_secs(10), "{took:?}");
        measured.push(took);
        lab.wait_for_sessions(0);
    }
    println!(
        "a revoked session is told {:?} after `tunguard reload` began, {:?} after `tunguard pki revoke` did",
        measured[0], measured[1]
    );
}

#[test]
fn without_a_nursery_nobody_is_let_in_and_sessions_go_on() {
    let Some(lab) = Lab::new("nonursery", 2) else { return };
    // Binaries of its own, one of which goes away.
    let own = lab.path("bin");
    fs::create_dir(&own).expect("a directory");
    for name in ["tunguard", "tunguard-guard", "tunguard-worker"] {
        fs::copy(std::path::Path::new(tunguard()).with_file_name(name), own.join(name)).expect("a copy");
    }
    let config = lab.server();
    let file = lab.write("server.toml", config.text()).display().to_string();
    let program = own.join("tunguard").display().to_string();
    let command = [&program[..], "server", "--config", &file];
    let mut server = Process::start("server", &lab.srv(), &lab.dir, &command);
    server.eventually("the server answers", || lab.try_status().map(drop));
    let mut one = Dialler::new(&lab, 1).connect();
    let (worker, gone) = (own.join("tunguard-worker"), own.join("gone"));
    fs::rename(&worker, &gone).expect("renamed");
    // Without a key holder it doesn't come that far.
    refused_as_it_is(&lab, "as the key holder: No such file or directory");
    let script = format!("#!/bin/sh\n[ \"$2\" = key-holder ] && exec {} \"$@\"\nexit 1\n", gone.display());
    fs::write(&worker, script).expect("written");
    fs::set_permissions(&worker, fs::Permissions::from_mode(0o755)).expect("executable");
    let out = reload(&lab);
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(Exit::NobodyLetIn as i32), "{error}");
    assert!(error.contains("nobody is let in") && error.contains("tunguard-worker"), "{error}");
    // Several try, and it is said once.
    let waiting: Vec<_> = (0..3).map(|_| Dialler::new(&lab, 2).tcp().expect("the port is open")).collect();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(lab.status()["handshakes"], 0);
    assert_eq!(server.children().len(), 1);
    assert_eq!(one.ping(1), 1);
    assert_eq!(server.log().matches("nobody is let in").count(), 1, "{}", server.log());
    drop(waiting);
    fs::rename(&gone, &worker).expect("renamed");
    Dialler::new(&lab, 2).connect().leave();
    server.wait_for_log("workers can be started again");
    assert_eq!(one.ping(2), 1);
}

/// Writes the server's configuration and has it read.
fn reload_with(lab: &Lab, config: &Config) -> Output {
    lab.write("server.toml", config.text());
    reload(lab)
}

fn reload(lab: &Lab) -> Output {
    let socket = lab.path("admin.sock");
    Command::new(tunguard()).args(["reload", "--socket"]).arg(socket).output().expect("tunguard starts")
}

fn reloaded(lab: &Lab, config: &Config) -> String {
    let out = reload_with(lab, config);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

fn refused(lab: &Lab, config: &Config, sentence: &str) {
    lab.write("server.toml", config.text());
    refused_as_it_is(lab, sentence);
}

fn refused_as_it_is(lab: &Lab, sentence: &str) {
    let out = reload(lab);
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(Exit::Usage as i32), "{sentence}: {error}");
    assert!(
        error.contains("nothing is changed") && error.contains(sentence),
        "{sentence:?} is not in: {error}"
    );
}
