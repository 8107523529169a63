//! Who gets in, and what the others are told: each refusal with its twin that passes.

use std::thread;
use std::time::{Duration, Instant};

use tunguard::channel::Broken;
use tunguard::exit::Exit;
use tunguard::wire::control::{Message, Reason};

use crate::certificates::{HOUR, Pair, Wish, client, credentials, key_pem, make, pem};
use crate::lab::{Config, INNER_V4, Lab, eventually, ip};
use crate::process::Process;
use crate::raw_client::Dialler;
use crate::traffic::Conversation;

#[test]
fn the_client_says_what_is_wrong_with_its_own_certificate() {
    let Some(lab) = Lab::new("owncert", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let ca = authority(&lab);
    let stranger = crate::certificates::ca("stranger");
    for (what, pair, exit, sentence) in [
        ("foreign", make(&client(), Some(&stranger)), Exit::CertificateForeign, "not signed by the CA"),
        (
            "expired",
            make(&Wish { valid: (-2 * HOUR, -HOUR), ..client() }, Some(&ca)),
            Exit::CertificateExpired,
            "expired on",
        ),
        (
            "future",
            make(&Wish { valid: (HOUR, 2 * HOUR), ..client() }, Some(&ca)),
            Exit::CertificateExpired,
            "valid only from",
        ),
        (
            "server",
            make(&Wish { server: true, client: false, ..client() }, Some(&ca)),
            Exit::CertificateForeign,
            "can't be used by a client",
        ),
    ] {
        refused(&lab, &with_pair(&lab, what, &pair), exit, sentence);
    }
    let good = make(&client(), Some(&ca));
    let _accepted = lab.start_client(1, &with_pair(&lab, "good", &good));
    assert!(lab.session("alice").is_some());
}

#[test]
fn the_server_refuses_what_no_honest_client_would_show() {
    let Some(lab) = Lab::new("servercheck", 1) else { return };
    let server = lab.start_server(&lab.server());
    let ca = authority(&lab);
    let stranger = crate::certificates::ca("stranger");
    for (what, pair) in [
        ("foreign", make(&client(), Some(&stranger))),
        ("self-signed", make(&client(), None)),
        ("expired", make(&Wish { valid: (-2 * HOUR, -HOUR), ..client() }, Some(&ca))),
        ("future", make(&Wish { valid: (HOUR, 2 * HOUR), ..client() }, Some(&ca))),
        ("a server's", make(&Wish { server: true, client: false, ..client() }, Some(&ca))),
        ("without a name", make(&Wish { names: &[], ..client() }, Some(&ca))),
        ("with an empty name", make(&Wish { names: &[""], ..client() }, Some(&ca))),
        ("with an escape sequence", make(&Wish { names: &["a\u{1b}[2Jb"], ..client() }, Some(&ca))),
        ("with a line feed", make(&Wish { names: &["a\nb"], ..client() }, Some(&ca))),
    ] {
        let dialler = Dialler::with(&lab, 1, &credentials(&ca, &pair));
        // With TLS 1.3 a client may be done before the server has judged it.
        let answer = dialler.control().map(|_| dialler.hello().1);
        let got_in = matches!(&answer, Ok(Ok(Message::Welcome(_))));
        assert!(!got_in, "a certificate {what} got in");
        eventually("its worker ends", || server.children().is_empty().then_some(()));
    }
    assert!(!server.log().contains('\u{1b}'), "control characters in the log");
    let good = make(&client(), Some(&ca));
    assert_eq!(Dialler::with(&lab, 1, &credentials(&ca, &good)).connect().ping(1), 1);
}

#[test]
fn a_revoked_certificate_is_refused_and_another_is_not() {
    let Some(lab) = Lab::new("revoked", 2) else { return };
    lab.tunguard(&["pki", "revoke", "c1"]);
    let _server = lab.start_server(&lab.server());
    refused(&lab, &lab.client(1), Exit::CertificateRevoked, "revoked");
    let _accepted = lab.start_client(2, &lab.client(2));
}

#[test]
fn revoking_cuts_a_session_at_once_and_no_other() {
    let Some(lab) = Lab::new("cut", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut one = lab.start_client(1, &lab.client(1));
    let _two = lab.start_client(2, &lab.client(2));
    let mut bystander = Conversation::start(&lab.c(2), &lab.srv(), ip(INNER_V4));
    bystander.exchange(10_000);
    lab.tunguard(&["pki", "revoke", "c1"]);
    let revoked = Instant::now();
    server.wait_for_children(1);
    assert!(revoked.elapsed() < Duration::from_secs(2), "it took {:?}", revoked.elapsed());
    assert_eq!(one.exit(), Exit::CertificateRevoked as i32, "{}", one.log());
    bystander.exchange(1_000_000);
    refused(&lab, &lab.client(1), Exit::CertificateRevoked, "revoked");
    // A new certificate of the same name is another one.
    lab.tunguard(&["pki", "client", "c1"]);
    let _again = lab.start_client(1, &lab.client(1));
}

#[test]
fn a_broken_revocation_list_changes_nothing() {
    let Some(lab) = Lab::new("badcrl", 2) else { return };
    lab.tunguard(&["pki", "revoke", "c1"]);
    let mut server = lab.start_server(&lab.server());
    let _two = lab.start_client(2, &lab.client(2));
    lab.write("certs/crl.pem", "-----BEGIN X509 CRL-----\nhalf a li");
    server.wait_for_log("stays in force");
    refused(&lab, &lab.client(1), Exit::CertificateRevoked, "revoked");
    assert!(lab.c(2).pings(INNER_V4, 56, 3));
}

#[test]
fn the_servers_name_is_checked() {
    let Some(lab) = Lab::new("name", 1) else { return };
    let _server = lab.start_server(&lab.server());
    refused(
        &lab,
        &lab.client(1).set("tls.server_name", "'other.test'"),
        Exit::CertificateForeign,
        "other.test",
    );
    let _accepted = lab.start_client(1, &lab.client(1).set("tls.server_name", "'vpn.test'"));
}

#[test]
fn a_server_of_another_authority_is_refused() {
    let Some(lab) = Lab::new("wrongserver", 1) else { return };
    let server = lab.start_server(&lab.impostor());
    refused(&lab, &lab.client(1), Exit::CertificateForeign, "");
    drop(server);
    let _server = lab.start_server(&lab.server());
    let _accepted = lab.start_client(1, &lab.client(1));
}

#[test]
fn unreadable_files_have_their_own_exit_codes() {
    let Some(lab) = Lab::new("unreadable", 1) else { return };
    lab.write("empty.pem", "");
    for (key, value, exit) in [
        ("tls.cert", "'nowhere.pem'", Exit::CertificateUnreadable),
        ("tls.cert", "'empty.pem'", Exit::CertificateUnreadable),
        ("tls.ca", "'nowhere.pem'", Exit::CertificateUnreadable),
        ("tls.key", "'nowhere.pem'", Exit::KeyUnreadable),
        ("tls.key", "'empty.pem'", Exit::KeyUnreadable),
        ("tls.key", "'certs/ca.key'", Exit::KeyMismatch),
    ] {
        let file = value.trim_matches('\'');
        ends(&mut lab.try_client(1, &lab.client(1).set(key, value)), exit, file);
        ends(&mut lab.try_server(&lab.server().set(key, value)), exit, file);
    }
    let _server = lab.start_server(&lab.server());
    let _accepted = lab.start_client(1, &lab.client(1));
}

#[test]
fn a_mistake_in_the_configuration_is_named_with_its_place() {
    let Some(lab) = Lab::new("config", 1) else { return };
    for (key, near) in [("max_cleints", "max_clients"), ("devise", "device")] {
        let config = lab.server().set(key, 7);
        let mut server = lab.try_server(&config);
        let line = config.line_of(key);
        ends(&mut server, Exit::Usage, &format!("server.toml:{line}"));
        assert!(server.log().contains(key) && server.log().contains(near), "{}", server.log());
    }
    let mut client = lab.try_client(1, &lab.client(1).set("remotes", 7));
    ends(&mut client, Exit::Usage, "remote");
    assert!(client.log().contains("client1.toml"), "{}", client.log());
    let mut client = lab.try_client(1, &lab.client(1).set("mtu", 1_400));
    ends(&mut client, Exit::Usage, "mtu");
    let mut server = lab.try_server(&lab.server().without("networks"));
    ends(&mut server, Exit::Usage, "networks");
}

#[test]
fn what_the_host_lacks_is_said() {
    let Some(lab) = Lab::new("lacks", 1) else { return };
    let hidden = ["sh", "-c", "mount -t tmpfs none /dev/net && exec \"$@\"", "sh"];
    ends(&mut lab.try_server_under(&hidden, &lab.server()), Exit::NoTun, "/dev/net/tun");
    ends(&mut lab.try_client_under(&hidden, 1, &lab.client(1)), Exit::NoTun, "/dev/net/tun");
    // Not root, but able to reach the programs wherever they were built: below /root as well.
    let reach = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"];
    let nobody =
        [&["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"][..], &reach].concat();
    ends(&mut lab.try_server_under(&nobody, &lab.server()), Exit::Privilege, "root");
    ends(&mut lab.try_client_under(&nobody, 1, &lab.client(1)), Exit::Privilege, "root");
    let _server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
}

#[test]
fn what_is_in_use_is_said_and_not_disturbed() {
    let Some(lab) = Lab::new("inuse", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let _client = lab.start_client(1, &lab.client(1));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    let other_socket = lab.server().set("socket", "'other.sock'").set("state_dir", "'other-state'");
    let same_port = other_socket.clone().set("device", "'tg1'").set("networks", "['10.10.0.0/24']");
    ends(&mut lab.try_server(&same_port), Exit::PortInUse, "55555");
    let same_device = other_socket.set("listen", "'[::]:55556'").set("networks", "['10.10.0.0/24']");
    ends(&mut lab.try_server(&same_device), Exit::DeviceInUse, "tg0");
    let again = lab.client(1).set("state_dir", "'other-client-state'");
    ends(&mut lab.try_client(1, &again), Exit::DeviceInUse, "tg0");
    talk.exchange(100_000);
    assert_eq!(server.try_exit(), None);
    assert_eq!(lab.sessions().len(), 1);
}

#[test]
fn a_missing_binary_is_named() {
    let Some(lab) = Lab::new("alone", 1) else { return };
    let alone = lab.path("tunguard");
    std::fs::copy(crate::lab::tunguard(), &alone).expect("a copy");
    lab.write("server.toml", "");
    let command = [alone.to_str().expect("UTF-8"), "server", "--config", "server.toml"];
    let mut server = Process::start("alone", &lab.srv(), &lab.dir, &command);
    // Installed ones would be found.
    if !std::path::Path::new("/usr/libexec/tunguard").exists()
        && !std::path::Path::new("/usr/lib/tunguard").exists()
    {
        ends(&mut server, Exit::Version, "tunguard-guard");
    }
}

#[test]
fn a_dead_remote_is_tried_again_and_the_next_one_taken() {
    let Some(lab) = Lab::new("remotes", 1) else { return };
    // Nobody is at the first, a closed port at the second.
    let remotes = "['198.18.100.77:55555', '198.18.100.2:44444', 'vpn.test', '198.18.100.2:55555']";
    let mut client = lab.try_client(1, &lab.client(1).set("remote", remotes));
    thread::sleep(Duration::from_secs(1));
    assert_eq!(client.try_exit(), None, "a client without a server gave up: {}", client.log());
    let _server = lab.start_server(&lab.server());
    lab.wait_for_tunnel(1, &mut client);
}

#[test]
fn a_profile_is_all_a_client_needs() {
    let Some(lab) = Lab::new("profile", 1) else { return };
    let _server = lab.start_server(&lab.server());
    let profile = lab.tunguard(&["pki", "profile", "c1", "--remote", crate::lab::SERVER_V4]);
    let file = lab.write("elsewhere/laptop.toml", format!("dns = 'none'\n{profile}"));
    let command = [crate::lab::tunguard(), "client", "--config", &file.display().to_string()];
    let mut client = Process::start("profile", &lab.c(1), &lab.dir, &command);
    lab.wait_for_tunnel(1, &mut client);
}

#[test]
fn a_full_server_refuses_politely() {
    let Some(lab) = Lab::new("full-house", 2) else { return };
    let _server = lab.start_server(&lab.server().set("max_clients", 1));
    let one = Dialler::new(&lab, 1).connect();
    let (_control, answer) = Dialler::new(&lab, 2).hello();
    assert_eq!(answer, Ok(Message::Bye(Reason::NoRoom)));
    one.leave();
    lab.wait_for_sessions(0);
    assert_eq!(Dialler::new(&lab, 2).connect().ping(1), 1);
}

#[test]
fn messages_out_of_place_end_their_own_session() {
    let Some(lab) = Lab::new("outofplace", 2) else { return };
    let _server = lab.start_server(&lab.server());
    let mut bystander = Dialler::new(&lab, 2).connect();
    let dialler = Dialler::new(&lab, 1);
    // Before a Hello, and after it.
    let mut early = dialler.control().expect("the TLS handshake");
    early.send(&Message::Ping(1)).expect("sent");
    let mut late = dialler.connect();
    late.control.send(&Message::Notice("hello".into())).expect("sent");
    let answer = late.next_message();
    assert!(matches!(answer, Ok(Message::Bye(Reason::Protocol)) | Err(Broken::Closed)), "{answer:?}");
    lab.wait_for_sessions(1);
    assert_eq!(bystander.ping(1), 1);
    let mut good = dialler.connect();
    good.control.send(&Message::Ping(77)).expect("sent");
    assert_eq!(good.next_message(), Ok(Message::Pong(77)));
}

/// The lab's authority, to sign what `tunguard pki` wouldn't.
pub fn authority(lab: &Lab) -> Pair {
    let read = |name: &str| std::fs::read(lab.path(name)).expect(name);
    let cert = openssl::x509::X509::from_pem(&read("certs/ca.pem")).expect("a certificate");
    let key = openssl::pkey::PKey::private_key_from_pem(&read("certs/ca.key")).expect("a key");
    Pair { cert, key }
}

/// Client 1's configuration with this certificate.
fn with_pair(lab: &Lab, name: &str, pair: &Pair) -> Config {
    lab.write(&format!("{name}.pem"), pem(pair));
    lab.write(&format!("{name}.key"), key_pem(pair));
    lab.client(1).set("tls.cert", format_args!("'{name}.pem'")).set("tls.key", format_args!("'{name}.key'"))
}

/// Client 1 ends with this exit code and says this.
fn refused(lab: &Lab, config: &Config, exit: Exit, sentence: &str) {
    ends(&mut lab.try_client(1, config), exit, sentence);
    assert!(lab.c(1).addresses("tg0").is_empty(), "a refused client has a device");
}

fn ends(process: &mut Process, exit: Exit, sentence: &str) {
    let code = process.exit();
    assert_eq!(Exit::from_code(code as u8), Some(exit), "{code}: {}", process.log());
    assert!(process.log().contains(sentence), "{sentence:?} is not in: {}", process.log());
}
