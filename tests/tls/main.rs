//! Real handshakes: whom a server and a client let in, whom they don't, and what each side is told.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
mod signing;
mod tickets;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use common::{
    HOUR, MakeKey, Pair, Stream, Wish, ca, certificates, client as client_wish, credentials, crl, crl_with,
    ec, ed25519, key_pem, make, meet, p384, pem, read_key, rsa4096, server_wish, signer,
};
use openssl::asn1::{Asn1Object, Asn1OctetString};
use openssl::nid::Nid;
use openssl::ssl::{Ssl, SslContext, SslContextBuilder, SslMethod, SslVerifyMode, SslVersion};
use openssl::symm::Cipher;
use openssl::x509::X509Extension;
use tunguard::config::client::ClientTls;
use tunguard::config::common::Pem;
use tunguard::config::server::ServerTls;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::tls::{
    Certificates, Credentials, Identity, Revoked, client_context, client_ssl, confirm_peer, export_binding,
    export_secret, peer_identity, server_context, server_ssl, summary,
};

/// One CA, one server and one client that get along; each test spoils one thing.
struct Lab {
    ca: Pair,
    server: Pair,
    client: Pair,
    crl: Option<Vec<u8>>,
    expected: &'static str,
}

impl Lab {
    fn new() -> Lab {
        let ca = ca("Lab CA");
        let server = make(&server_wish(), Some(&ca));
        let client = make(&client_wish(), Some(&ca));
        Lab { ca, server, client, crl: None, expected: "vpn.example.org" }
    }

    fn with_client(wish: Wish<'_>) -> Lab {
        let mut lab = Lab::new();
        lab.client = make(&wish, Some(&lab.ca));
        lab
    }

    fn with_server(wish: Wish<'_>) -> Lab {
        let mut lab = Lab::new();
        lab.server = make(&wish, Some(&lab.ca));
        lab
    }

    fn server_certificates(&self) -> Certificates {
        Certificates { crl: self.crl.clone(), ..certificates(&self.ca, &self.server) }
    }

    fn server_end(&self) -> Ssl {
        server_ssl(&server_context(&self.server_certificates()).unwrap(), signer(&self.server)).unwrap()
    }

    fn client_end(&self) -> Ssl {
        client_ssl(&client_context(&credentials(&self.ca, &self.client)).unwrap(), self.expected).unwrap()
    }

    fn run(&self) -> (Outcome<Stream>, Outcome<Stream>) {
        meet(self.server_end(), self.client_end())
    }

    /// Whom the server takes the client for.
    fn passes(&self) -> Identity {
        let (server, client) = self.run();
        confirm_peer(client.unwrap().ssl(), None).unwrap();
        peer_identity(server.unwrap().ssl(), None).unwrap()
    }

    fn fails(&self) -> (Failure, Failure) {
        both_failed(self.run())
    }
}

fn both_failed((server, client): (Outcome<Stream>, Outcome<Stream>)) -> (Failure, Failure) {
    (server.expect_err("the server must fail"), client.expect_err("the client must fail"))
}

#[track_caller]
fn says(failure: &Failure, exit: Exit, parts: &[&str]) {
    assert_eq!(failure.exit, exit, "{failure}");
    for part in parts {
        assert!(failure.text.contains(part), "{part:?} is missing in: {failure}");
    }
    assert!(!failure.text.contains(['\n', '\x1b', '\0']), "{failure:?}");
}

#[test]
fn certificates_of_one_ca_get_along() {
    let lab = Lab::new();
    let identity = lab.passes();
    assert_eq!(identity.name, "alice");
    assert_eq!(identity.cert.serial, lab.client.cert.serial_number().to_bn().unwrap().to_vec());
    assert_eq!(identity.cert.issuer, openssl::sha::sha256(&lab.ca.cert.subject_name().to_der().unwrap()));
    assert!(identity.cert.not_after > tunguard::tls::time::wall_clock());
}

#[test]
fn every_kind_of_key_is_served() {
    let kinds: [(&str, MakeKey); 4] =
        [("P-384", p384), ("P-521", || ec(Nid::SECP521R1)), ("Ed25519", ed25519), ("RSA-4096", rsa4096)];
    for (kind, key) in kinds {
        let mut lab = Lab::new();
        // What a key holder can't sign with is a client's only.
        if kind != "Ed25519" {
            lab.server = make(&Wish { key, ..server_wish() }, Some(&lab.ca));
        }
        lab.client = make(&Wish { key, ..client_wish() }, Some(&lab.ca));
        assert_eq!(lab.passes().name, "alice", "{kind}");
    }
}

#[test]
fn the_line_for_the_log_names_version_cipher_and_group() {
    let (server, client) = Lab::new().run();
    let (server, client) = (summary(server.unwrap().ssl()), summary(client.unwrap().ssl()));
    assert_eq!(server, client);
    assert!(server.starts_with("TLSv1.3 TLS_"), "{server}");
    let modern = openssl::version::number() >= 0x3050_0000;
    assert!(server.ends_with(if modern { " X25519MLKEM768" } else { " X25519" }), "{server}");
}

#[test]
fn the_exported_secret_is_shared_and_bound_to_the_session_id() {
    let (server, client) = Lab::new().run();
    let (server, client) = (server.unwrap(), client.unwrap());
    let one = export_secret(server.ssl(), &[1; 8]).unwrap();
    assert_eq!(one, export_secret(client.ssl(), &[1; 8]).unwrap());
    assert_ne!(one, export_secret(client.ssl(), &[2; 8]).unwrap());

    let (_, other) = Lab::new().run();
    assert_ne!(one, export_secret(other.unwrap().ssl(), &[1; 8]).unwrap());
}

#[test]
fn the_exported_binding_is_shared_by_one_connections_ends_only() {
    let (server, client) = Lab::new().run();
    let (server, client) = (server.unwrap(), client.unwrap());
    let one = export_binding(server.ssl()).unwrap();
    assert_eq!(one, export_binding(client.ssl()).unwrap());

    let (_, other) = Lab::new().run();
    assert_ne!(one, export_binding(other.unwrap().ssl()).unwrap());
}

// A client's certificate, as the server sees it.

#[test]
fn a_client_without_certificate_is_refused() {
    let lab = Lab::new();
    let (server, client) = both_failed(meet(lab.server_end(), plain_client(None, Some(b"\x0atunguard/1"))));
    says(&server, Exit::Tls, &["the client showed no certificate"]);
    says(&client, Exit::CertificateForeign, &["certificate required"]);
}

#[test]
fn a_client_of_a_foreign_ca_is_refused() {
    let mut lab = Lab::new();
    let foreign = ca("Lab CA");
    lab.client = make(&client_wish(), Some(&foreign));
    let (server, client) = lab.fails();
    says(
        &server,
        Exit::CertificateForeign,
        &["\"alice\"", "not signed by our CA \"Lab CA\"", "local issuer"],
    );
    says(&client, Exit::CertificateForeign, &["the server rejected our certificate: unknown CA"]);
}

#[test]
fn a_self_signed_client_is_refused() {
    let mut lab = Lab::new();
    lab.client = make(&client_wish(), None);
    let (server, _) = lab.fails();
    says(&server, Exit::CertificateForeign, &["not signed by our CA", "self-signed"]);
}

#[test]
fn a_client_certificate_is_no_ca() {
    let mut lab = Lab::new();
    let child = make(&Wish { names: &["mallory"], ..client_wish() }, Some(&lab.client));
    let chain = [pem(&child), pem(&lab.client)].concat();
    let forged = Credentials { cert: chain, ..credentials(&lab.ca, &child) };
    let client = client_ssl(&client_context(&forged).unwrap(), lab.expected).unwrap();
    let (server, _) = both_failed(meet(lab.server_end(), client));
    says(&server, Exit::CertificateForeign, &["\"alice\"", "invalid CA"]);

    // Its twin: a true intermediate.
    let between =
        make(&Wish { names: &["Office CA"], ca: true, client: false, ..client_wish() }, Some(&lab.ca));
    lab.client = make(&client_wish(), Some(&between));
    let chain = [pem(&lab.client), pem(&between)].concat();
    let whole = Credentials { cert: chain, ..credentials(&lab.ca, &lab.client) };
    let client = client_ssl(&client_context(&whole).unwrap(), lab.expected).unwrap();
    let (server, client) = meet(lab.server_end(), client);
    client.unwrap();
    assert_eq!(peer_identity(server.unwrap().ssl(), None).unwrap().name, "alice");
}

#[test]
fn a_chain_of_four_intermediates_is_too_long() {
    for (intermediates, fits) in [(3, true), (4, false)] {
        let mut lab = Lab::new();
        let mut signer = lab.ca.clone();
        let mut chain = Vec::new();
        for _ in 0..intermediates {
            signer =
                make(&Wish { names: &["Below"], ca: true, client: false, ..client_wish() }, Some(&signer));
            chain.insert(0, pem(&signer));
        }
        lab.client = make(&client_wish(), Some(&signer));
        chain.insert(0, pem(&lab.client));
        let long = Credentials { cert: chain.concat(), ..credentials(&lab.ca, &lab.client) };
        let client = client_ssl(&client_context(&long).unwrap(), lab.expected).unwrap();
        let (server, _) = meet(lab.server_end(), client);
        assert_eq!(server.is_ok(), fits, "{intermediates} intermediates");
    }
}

#[test]
fn an_expired_client_is_refused() {
    let (server, client) = Lab::with_client(Wish { valid: (-2 * HOUR, -HOUR), ..client_wish() }).fails();
    says(&server, Exit::CertificateExpired, &["\"alice\" expired on 20", "UTC"]);
    says(&client, Exit::CertificateExpired, &["the server rejected our certificate: certificate expired"]);
}

#[test]
fn a_client_not_yet_valid_is_refused() {
    let (server, client) = Lab::with_client(Wish { valid: (HOUR, 2 * HOUR), ..client_wish() }).fails();
    says(&server, Exit::CertificateExpired, &["\"alice\" is not valid before 20", "clocks"]);
    says(&client, Exit::CertificateForeign, &["the server rejected our certificate", "not valid yet"]);
}

#[test]
fn a_client_with_a_servers_certificate_is_refused() {
    let (server, client) = Lab::with_client(Wish { names: &["alice"], ..server_wish() }).fails();
    says(&server, Exit::CertificateForeign, &["\"alice\" is no client certificate", "clientAuth"]);
    says(&client, Exit::CertificateForeign, &["unsupported certificate"]);
    // A certificate for both is one for a client.
    let both = Wish { server: true, ..client_wish() };
    assert_eq!(Lab::with_client(both).passes().name, "alice");
}

#[test]
fn a_client_without_extended_key_usage_is_refused() {
    let (server, client) = Lab::with_client(Wish { client: false, ..client_wish() }).fails();
    says(&server, Exit::CertificateForeign, &["\"alice\" is no client certificate", "clientAuth"]);
    says(&client, Exit::CertificateForeign, &["unsupported certificate"]);
}

#[test]
fn a_revoked_client_is_refused_and_told_so() {
    let mut lab = Lab::new();
    lab.crl = Some(crl(&lab.ca, &[], (-HOUR, HOUR)));
    assert_eq!(lab.passes().name, "alice");

    lab.crl = Some(crl(&lab.ca, &[&lab.client], (-HOUR, HOUR)));
    let (server, client) = lab.fails();
    says(&server, Exit::CertificateRevoked, &["the client's certificate \"alice\"", "was revoked"]);
    says(&client, Exit::CertificateRevoked, &["the server rejected our certificate: certificate revoked"]);

    // Same name, other serial.
    lab.client = make(&client_wish(), Some(&lab.ca));
    assert_eq!(lab.passes().name, "alice");
}

#[test]
fn a_list_that_came_after_the_handshake_counts() {
    let lab = Lab::new();
    let (server, _client) = lab.run();
    let server = server.unwrap();
    let list =
        |revoked: &[&Pair]| Revoked::parse(&crl(&lab.ca, revoked, (-HOUR, HOUR)), &pem(&lab.ca)).unwrap();
    let identity = peer_identity(server.ssl(), Some(&list(&[]))).unwrap();
    let later = list(&[&lab.client]);
    assert!(later.contains(&identity.cert) && !list(&[]).contains(&identity.cert));
    assert_eq!((later.len(), later.is_empty(), list(&[]).is_empty()), (1, false, true));
    let failure = peer_identity(server.ssl(), Some(&later)).unwrap_err();
    says(&failure, Exit::CertificateRevoked, &["\"alice\"", "was revoked"]);
}

#[test]
fn an_intermediate_can_be_revoked_and_needs_a_list() {
    let lab = Lab::new();
    let between =
        make(&Wish { names: &["Office CA"], ca: true, client: false, ..client_wish() }, Some(&lab.ca));
    let alice = make(&client_wish(), Some(&between));
    let shown = Credentials { cert: [pem(&alice), pem(&between)].concat(), ..credentials(&lab.ca, &alice) };
    let client = client_context(&shown).unwrap();
    // Lists are believed when their CA is in tls.ca.
    let ca = [pem(&lab.ca), pem(&between)].concat();
    let run = |cas: &[u8], lists: &[Vec<u8>]| {
        let ours = Certificates {
            ca: cas.to_vec(),
            crl: Some(lists.concat()),
            ..certificates(&lab.ca, &lab.server)
        };
        let server = server_ssl(&server_context(&ours).unwrap(), signer(&lab.server)).unwrap();
        meet(server, client_ssl(&client, lab.expected).unwrap())
    };
    let empty = |issuer: &Pair| crl(issuer, &[], (-HOUR, HOUR));

    let (server, client) = run(&ca, &[empty(&lab.ca), empty(&between)]);
    client.unwrap();
    server.unwrap();

    let (server, _) = both_failed(run(&pem(&lab.ca), &[empty(&lab.ca)]));
    says(&server, Exit::CertificateForeign, &["no revocation list covers", "\"alice\"", "tls.crl"]);

    let (server, client) = both_failed(run(&ca, &[empty(&lab.ca), crl(&between, &[&alice], (-HOUR, HOUR))]));
    says(&server, Exit::CertificateRevoked, &["\"alice\""]);
    says(&client, Exit::CertificateRevoked, &["certificate revoked"]);

    // What we trust ourselves must be sound; what a peer brings along is its own trouble.
    let list = crl(&lab.ca, &[&between], (-HOUR, HOUR));
    let failure = Revoked::parse(&[list.clone(), empty(&between)].concat(), &ca).unwrap_err();
    says(&failure, Exit::Usage, &["revokes the CA \"Office CA\"", "tls.ca"]);
    both_failed(run(&pem(&lab.ca), &[list]));
}

#[test]
fn a_ca_below_another_is_trusted_for_itself_alone() {
    let lab = Lab::new();
    let between =
        make(&Wish { names: &["Office CA"], ca: true, client: false, ..client_wish() }, Some(&lab.ca));
    let server = server_context(&Certificates { ca: pem(&between), ..lab.server_certificates() }).unwrap();
    let run = |pair: &Pair| {
        let client = client_context(&credentials(&lab.ca, pair)).unwrap();
        meet(server_ssl(&server, signer(&lab.server)).unwrap(), client_ssl(&client, lab.expected).unwrap())
    };
    let (server, client) = run(&make(&client_wish(), Some(&between)));
    client.unwrap();
    server.unwrap();
    let (server, _) = both_failed(run(&lab.client));
    says(&server, Exit::CertificateForeign, &["not signed by our CA \"Office CA\""]);
}

#[test]
fn a_serial_number_that_no_list_can_name_is_refused() {
    for (serial, fits) in [(&[0x7f; 20][..], true), (&[0xff; 20], true), (&[0], true), (&[1; 21], false)] {
        let lab = Lab::with_client(Wish { serial: Some(serial), ..client_wish() });
        if fits {
            assert_eq!(lab.passes().cert.serial, serial);
            continue;
        }
        let (server, client) = lab.fails();
        says(&server, Exit::CertificateForeign, &["\"alice\"", "longer than 20 bytes"]);
        says(&client, Exit::CertificateForeign, &["bad certificate"]);
    }
}

#[test]
fn names_that_are_no_identity_are_refused() {
    let long = "x".repeat(65);
    let cases: [(&[&str], &str); 10] = [
        (&[], "has no common name"),
        (&[""], r#"the common name """#),
        (&["a\nb"], r#""a\nb""#),
        (&["a\x1b[31mb"], r#""a\u{1b}[31mb""#),
        (&["alice\0mallory"], r#""alice\u{0}mallory""#),
        (&["a/b"], r#""a/b""#),
        (&[" a"], r#"" a""#),
        (&["b\u{fc}ro"], r#""b\u{fc}ro""#),
        (&[&long], "..."),
        (&["alice", "bob"], "2 common names"),
    ];
    for (names, part) in cases {
        let (server, client) = Lab::with_client(Wish { names, ..client_wish() }).fails();
        says(&server, Exit::CertificateForeign, &["the client's certificate", part, "issue one"]);
        says(&client, Exit::CertificateForeign, &["the server rejected our certificate: bad certificate"]);
    }
    for name in ["Alice Example", "alice@example.org", ".."] {
        assert_eq!(Lab::with_client(Wish { names: &[name], ..client_wish() }).passes().name, name);
    }
}

// A server's certificate, as the client sees it.

#[test]
fn a_server_of_a_foreign_ca_is_refused() {
    let mut lab = Lab::new();
    lab.server = make(&server_wish(), Some(&ca("Other CA")));
    let (server, client) = lab.fails();
    says(
        &client,
        Exit::CertificateForeign,
        &["the server's certificate \"gate\" is not signed by our CA", "tls.ca"],
    );
    says(&server, Exit::CertificateForeign, &["the client rejected our certificate: unknown CA"]);
}

#[test]
fn a_server_with_a_clients_certificate_is_refused() {
    let wish = Wish { server: false, client: true, ..server_wish() };
    let (server, client) = Lab::with_server(wish).fails();
    says(&client, Exit::CertificateForeign, &["\"gate\" is no server certificate", "serverAuth"]);
    says(&server, Exit::CertificateForeign, &["the client rejected our certificate", "unsupported"]);
}

#[test]
fn an_expired_server_is_refused() {
    let (server, client) = Lab::with_server(Wish { valid: (-2 * HOUR, -HOUR), ..server_wish() }).fails();
    says(&client, Exit::CertificateExpired, &["the server's certificate \"gate\" expired on 20"]);
    says(&server, Exit::CertificateExpired, &["the client rejected our certificate: certificate expired"]);
}

#[test]
fn a_server_of_another_name_is_refused_and_its_names_are_listed() {
    let mut lab = Lab::new();
    for wrong in ["other.example.org", "example.org", "x.vpn.example.org", "192.0.2.2", "2001:db8::1", "gate"]
    {
        lab.expected = wrong;
        let (server, client) = lab.fails();
        let named = format!("for \"vpn.example.org\", 192.0.2.1, not for \"{wrong}\"");
        says(&client, Exit::CertificateForeign, &[&named, "tls.server_name"]);
        says(&server, Exit::CertificateForeign, &["the client rejected our certificate: bad certificate"]);
    }
    for right in ["vpn.example.org", "VPN.Example.Org.", "192.0.2.1"] {
        lab.expected = right;
        lab.passes();
    }
}

#[test]
fn of_a_servers_many_names_the_first_are_listed() {
    let names: Vec<String> = (1..=10).map(|n| format!("n{n}.example.org")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for (count, end) in
        [(7, "\"n7.example.org\","), (8, "\"n8.example.org\","), (10, "\"n8.example.org\", 2 more,")]
    {
        let (_, client) = Lab::with_server(Wish { dns: &names[..count], ip: &[], ..server_wish() }).fails();
        says(&client, Exit::CertificateForeign, &["for \"n1.example.org\", ", &format!("{end} not for")]);
    }
}

#[test]
fn a_servers_common_name_is_no_address_of_its() {
    let mut lab = Lab::with_server(Wish { names: &["vpn.example.org"], dns: &[], ip: &[], ..server_wish() });
    let (_, client) = lab.fails();
    says(&client, Exit::CertificateForeign, &["no name at all (it has no subject alternative name)"]);
    // And the other way round: a server needs no common name.
    lab = Lab::with_server(Wish { names: &[], ..server_wish() });
    lab.passes();
}

#[test]
fn a_wildcard_stands_for_one_label() {
    for (expected, fits) in [
        ("a.example.org", true),
        ("a.b.example.org", false),
        ("example.org", false),
        ("xa.example.net", false),
    ] {
        let mut lab = Lab::with_server(Wish { dns: &["*.example.org", "x*.example.net"], ..server_wish() });
        lab.expected = expected;
        assert_eq!(lab.run().1.is_ok(), fits, "{expected}");
    }
}

#[test]
fn an_ipv6_address_is_a_name() {
    let mut lab = Lab::with_server(Wish { dns: &[], ip: &["2001:db8::1"], ..server_wish() });
    lab.expected = "2001:db8:0::1";
    lab.passes();
    lab.expected = "2001:db8::2";
    let (_, client) = lab.fails();
    says(&client, Exit::CertificateForeign, &["2001:db8::1"]);
}

// The protocol itself.

#[test]
fn tls_1_2_is_refused_on_both_sides() {
    let lab = Lab::new();
    let old =
        |builder: &mut SslContextBuilder| builder.set_max_proto_version(Some(SslVersion::TLS1_2)).unwrap();
    let (server, client) = both_failed(meet(lab.server_end(), plain_ssl(SslMethod::tls_client(), old)));
    says(&server, Exit::Tls, &["the client doesn't speak TLS 1.3"]);
    says(&client, Exit::Tls, &["the server doesn't speak TLS 1.3"]);

    let pair = lab.server.clone();
    let server = plain_ssl(SslMethod::tls_server(), |builder| {
        old(builder);
        builder.set_certificate(&pair.cert).unwrap();
        builder.set_private_key(&pair.key).unwrap();
    });
    let (_, client) = both_failed(meet(server, lab.client_end()));
    says(&client, Exit::Tls, &["the server doesn't speak TLS 1.3"]);
}

#[test]
fn a_client_without_our_alpn_is_refused() {
    let lab = Lab::new();
    let (server, client) =
        both_failed(meet(lab.server_end(), plain_client(Some(&lab.client), Some(b"\x02h2"))));
    says(&server, Exit::Tls, &["doesn't speak tunguard/1"]);
    says(&client, Exit::Tls, &["doesn't speak tunguard/1"]);

    let (server, client) = both_failed(meet(lab.server_end(), plain_client(Some(&lab.client), None)));
    says(&server, Exit::Tls, &["doesn't speak tunguard/1"]);
    says(&client, Exit::Tls, &["handshake failure"]);

    // Their twin: the same client with our protocol among others.
    let offer = Some(b"\x02h2\x0atunguard/1".as_slice());
    let (server, client) = meet(lab.server_end(), plain_client(Some(&lab.client), offer));
    client.unwrap();
    assert_eq!(peer_identity(server.unwrap().ssl(), None).unwrap().name, "alice");
}

#[test]
fn a_server_without_our_alpn_is_refused() {
    let lab = Lab::new();
    let pair = lab.server.clone();
    let server = plain_ssl(SslMethod::tls_server(), |builder| {
        builder.set_certificate(&pair.cert).unwrap();
        builder.set_private_key(&pair.key).unwrap();
    });
    let (_, client) = both_failed(meet(server, lab.client_end()));
    says(&client, Exit::Tls, &["doesn't speak tunguard/1"]);
}

#[test]
fn a_peer_that_is_no_tls_is_named_so() {
    use std::io::{Read, Write};
    let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
    far.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
    let failure = Lab::new().client_end().connect(near).map(drop).map_err(tunguard::tls::failure_of_connect);
    says(&failure.unwrap_err(), Exit::Tls, &["the server doesn't speak TLS"]);
    let _ = far.read(&mut [0; 4096]);

    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(far);
    let failure = Lab::new().server_end().accept(near).map(drop).map_err(tunguard::tls::failure_of_connect);
    says(&failure.unwrap_err(), Exit::Tls, &["the client dropped the connection"]);
}

#[test]
fn identity_is_asked_of_finished_handshakes_only() {
    let failure = peer_identity(&Lab::new().server_end(), None).unwrap_err();
    says(&failure, Exit::Tls, &["not finished"]);
}

// Our own files.

/// Credentials as files in a directory of their own.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new(lab: &Lab) -> Files {
        let files = Files { dir: tempfile::tempdir().unwrap() };
        files.put("ca.pem", &pem(&lab.ca));
        files.own(&lab.server);
        files
    }

    fn own(&self, pair: &Pair) {
        self.put("own.pem", &pem(pair));
        self.put("own.key", &key_pem(pair));
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str) -> Pem {
        Pem::File(self.path(name))
    }

    fn server(&self, crl: Option<&str>) -> Outcome<Certificates> {
        let crl = crl.map(|name| self.path(name));
        let (ca, cert, key) = (self.file("ca.pem"), self.file("own.pem"), self.file("own.key"));
        let certificates = Certificates::read_server(&ServerTls { ca, cert, key: key.clone(), crl })?;
        read_key(key, &certificates.cert).map(|_| certificates)
    }

    fn client(&self) -> Outcome<Credentials> {
        let (ca, cert, key) = (self.file("ca.pem"), self.file("own.pem"), self.file("own.key"));
        Credentials::read_client(&ClientTls { ca, cert, key, server_name: None })
    }
}

#[test]
fn credentials_are_read_and_travel() {
    let lab = Lab::new();
    let files = Files::new(&lab);
    files.put("crl.pem", &crl(&lab.ca, &[], (-HOUR, HOUR)));
    let read = files.server(Some("crl.pem")).unwrap();
    let config = bincode::config::standard();
    let bytes = bincode::serde::encode_to_vec(&read, config).unwrap();
    let (sent, _): (Certificates, usize) = bincode::serde::decode_from_slice(&bytes, config).unwrap();
    assert_eq!(read, sent);
    server_context(&sent).unwrap();
    assert!(!bytes.windows(7).any(|w| w == b"PRIVATE"), "the key travels with the certificates");

    files.own(&lab.client);
    let read = files.client().unwrap();
    let bytes = bincode::serde::encode_to_vec(&read, config).unwrap();
    let (sent, _): (Credentials, usize) = bincode::serde::decode_from_slice(&bytes, config).unwrap();
    assert_eq!(read, sent);
    client_context(&sent).unwrap();
    let shown = format!("{read:?}");
    assert!(shown.contains("hidden") && !shown.contains("PRIVATE"), "{shown}");
}

#[test]
fn what_is_missing_is_named() {
    for (name, exit, what, key) in [
        ("ca.pem", Exit::CertificateUnreadable, "CA certificate", "tls.ca"),
        ("own.pem", Exit::CertificateUnreadable, "certificate", "tls.cert"),
        ("own.key", Exit::KeyUnreadable, "private key", "tls.key"),
        ("crl.pem", Exit::Usage, "revocation list", "tls.crl"),
    ] {
        let lab = Lab::new();
        let files = Files::new(&lab);
        files.put("crl.pem", &crl(&lab.ca, &[], (-HOUR, HOUR)));
        fs::remove_file(files.path(name)).unwrap();
        let failure = files.server(Some("crl.pem")).unwrap_err();
        says(&failure, exit, &[what, &format!("{name} ({key})"), "No such file"]);

        for junk in [&b""[..], b"hello\n", b"-----BEGIN ", &[0xff; 100]] {
            files.put(name, junk);
            let failure = files.server(Some("crl.pem")).unwrap_err();
            says(&failure, exit, &[&format!("{name} ({key})")]);
        }
    }
}

#[test]
fn half_a_file_is_refused() {
    let lab = Lab::new();
    let list = crl(&lab.ca, &[&lab.client], (-HOUR, HOUR));
    for (name, whole, exit) in [
        ("own.pem", pem(&lab.server), Exit::CertificateUnreadable),
        ("own.key", key_pem(&lab.server).to_vec(), Exit::KeyUnreadable),
        ("crl.pem", list.clone(), Exit::Usage),
    ] {
        let files = Files::new(&lab);
        files.put("crl.pem", &list);
        for cut in (0..whole.len() - 1).step_by(37) {
            files.put(name, &whole[..cut]);
            assert_eq!(files.server(Some("crl.pem")).unwrap_err().exit, exit, "{name} cut to {cut} bytes");
        }
        files.put(name, &whole);
        files.server(Some("crl.pem")).unwrap();
    }
}

#[test]
fn inline_texts_are_named_by_their_key() {
    let lab = Lab::new();
    let inline =
        |key: &'static str, bytes: &[u8]| Pem::Inline { key, text: String::from_utf8(bytes.into()).unwrap() };
    let mut tls = ClientTls {
        ca: inline("tls.ca", &pem(&lab.ca)),
        cert: inline("tls.cert", &pem(&lab.client)),
        key: inline("tls.key", &key_pem(&lab.client)),
        server_name: None,
    };
    Credentials::read_client(&tls).unwrap();
    tls.cert = inline("tls.cert", b"x");
    says(&Credentials::read_client(&tls).unwrap_err(), Exit::CertificateUnreadable, &["tls.cert"]);
}

#[test]
fn a_key_of_another_certificate_is_a_mismatch() {
    let lab = Lab::new();
    let files = Files::new(&lab);
    files.put("own.key", &key_pem(&lab.client));
    says(&files.server(None).unwrap_err(), Exit::KeyMismatch, &["own.key", "own.pem"]);
    let mixed = Credentials { key: key_pem(&lab.server), ..credentials(&lab.ca, &lab.client) };
    says(&client_context(&mixed).unwrap_err(), Exit::KeyMismatch, &["tls.key"]);
}

#[test]
fn an_encrypted_key_is_refused_without_a_question() {
    let lab = Lab::new();
    let files = Files::new(&lab);
    let key = &lab.server.key;
    let old_format =
        key.ec_key().unwrap().private_key_to_pem_passphrase(Cipher::aes_256_cbc(), b"secret").unwrap();
    let new_format = key.private_key_to_pem_pkcs8_passphrase(Cipher::aes_256_cbc(), b"secret").unwrap();
    for encrypted in [old_format, new_format] {
        files.put("own.key", &encrypted);
        says(
            &files.server(None).unwrap_err(),
            Exit::KeyUnreadable,
            &["own.key", "encrypted", "openssl pkey"],
        );
    }
    files.put("own.key", &key.ec_key().unwrap().private_key_to_pem().unwrap());
    files.server(None).unwrap();
}

#[test]
fn keys_of_other_kinds_are_refused() {
    let kinds: [MakeKey; 3] = [
        || ec(Nid::SECP256K1),
        ed25519,
        || openssl::rsa::Rsa::generate(1024).and_then(openssl::pkey::PKey::from_rsa).unwrap(),
    ];
    for key in kinds {
        let files = Files::new(&Lab::with_server(Wish { key, ..server_wish() }));
        says(&files.server(None).unwrap_err(), Exit::KeyUnreadable, &["own.key", "P-256", "Ed25519"]);
    }
}

#[test]
fn our_own_certificate_must_be_valid_now() {
    let lab = Lab::with_server(Wish { valid: (-2 * HOUR, -HOUR), ..server_wish() });
    let failure = Files::new(&lab).server(None).unwrap_err();
    says(&failure, Exit::CertificateExpired, &["own.pem", "expired on 20", "UTC"]);
    let lab = Lab::with_server(Wish { valid: (HOUR, 2 * HOUR), ..server_wish() });
    let failure = Files::new(&lab).server(None).unwrap_err();
    says(&failure, Exit::CertificateExpired, &["own.pem", "valid only from 20", "clock"]);
}

#[test]
fn our_own_certificate_must_come_from_the_ca() {
    let mut lab = Lab::new();
    lab.ca = ca("Lab CA");
    let failure = Files::new(&lab).server(None).unwrap_err();
    says(&failure, Exit::CertificateForeign, &["own.pem", "not signed by the CA \"Lab CA\"", "ca.pem"]);
}

#[test]
fn our_own_certificate_must_be_for_our_side() {
    let lab = Lab::new();
    let files = Files::new(&lab);
    files.server(None).unwrap();
    says(&files.client().unwrap_err(), Exit::CertificateForeign, &["own.pem", "by a client", "clientAuth"]);
    files.own(&lab.client);
    files.client().unwrap();
    says(
        &files.server(None).unwrap_err(),
        Exit::CertificateForeign,
        &["own.pem", "by a server", "serverAuth"],
    );
}

#[test]
fn an_expired_ca_is_named() {
    let mut lab = Lab::new();
    lab.ca = make(
        &Wish { names: &["Old CA"], ca: true, client: false, valid: (-2 * HOUR, -HOUR), ..client_wish() },
        None,
    );
    lab.server = make(&server_wish(), Some(&lab.ca));
    let failure = Files::new(&lab).server(None).unwrap_err();
    says(&failure, Exit::CertificateExpired, &["a CA certificate", "ca.pem", "expired"]);
}

#[test]
fn lists_that_prove_nothing_are_refused() {
    let lab = Lab::new();
    let files = Files::new(&lab);
    let twin = ca("Lab CA");
    let twin_named_otherwise = ca("Other CA");
    let good = crl(&lab.ca, &[], (-HOUR, HOUR));
    let mut flipped = openssl::x509::X509Crl::from_pem(&good).unwrap().to_der().unwrap();
    *flipped.last_mut().unwrap() ^= 1;
    let flipped = openssl::x509::X509Crl::from_der(&flipped).unwrap().to_pem().unwrap();
    for (list, part) in [
        (crl(&twin, &[], (-HOUR, HOUR)), "not signed by our CA"),
        (crl(&ca("Other CA"), &[], (-HOUR, HOUR)), "not signed by our CA"),
        (crl(&lab.server, &[], (-HOUR, HOUR)), "not signed by our CA"),
        (flipped, "not signed by our CA"),
        (crl(&lab.ca, &[], (-2 * HOUR, -HOUR)), "expired on 20"),
        (crl(&lab.ca, &[], (HOUR, 2 * HOUR)), "not valid before 20"),
        (
            crl(&Pair { cert: twin_named_otherwise.cert, key: lab.ca.key.clone() }, &[], (-HOUR, HOUR)),
            "not signed by our CA",
        ),
        (crl_with(&lab.ca, &[], (-HOUR, HOUR), Some(extension("2.5.29.27", &[2, 1, 1]))), "complete lists"),
        (
            crl_with(&lab.ca, &[], (-HOUR, HOUR), Some(extension("2.5.29.28", &[0x30, 3, 0x81, 1, 0xff]))),
            "complete lists",
        ),
        ([good.clone(), crl(&twin, &[], (-HOUR, HOUR))].concat(), "not signed by our CA"),
        (good[..good.len() - 30].to_vec(), "cut short"),
        (pem(&lab.ca), "no X509 CRL"),
    ] {
        files.put("crl.pem", &list);
        says(&files.server(Some("crl.pem")).unwrap_err(), Exit::Usage, &["crl.pem", "revocation list", part]);
    }
    files.put("crl.pem", &good);
    files.server(Some("crl.pem")).unwrap();
}

#[test]
fn a_newer_list_is_needed_when_the_first_of_them_expires() {
    let (one, two) = (ca("One CA"), ca("Two CA"));
    let cas = [pem(&one), pem(&two)].concat();
    let lists =
        |ends: [i64; 2]| [crl(&one, &[], (-HOUR, ends[0])), crl(&two, &[], (-HOUR, ends[1]))].concat();
    let now = tunguard::tls::time::wall_clock();
    for ends in [[HOUR, 2 * HOUR], [2 * HOUR, HOUR]] {
        let needed = Revoked::parse(&lists(ends), &cas).unwrap().next_update().unwrap() - now;
        assert!((HOUR..HOUR + 1_000).contains(&needed), "{ends:?}: in {needed} s");
    }
    assert_eq!(Revoked::default().next_update(), None);
}

#[test]
fn a_ca_that_may_not_sign_lists_signs_none() {
    let mut lab = Lab::new();
    for (signs_lists, fits) in [(true, true), (false, false)] {
        lab.ca =
            make(&Wish { names: &["Lab CA"], ca: true, client: false, signs_lists, ..client_wish() }, None);
        lab.server = make(&server_wish(), Some(&lab.ca));
        let files = Files::new(&lab);
        files.put("crl.pem", &crl(&lab.ca, &[], (-HOUR, HOUR)));
        assert_eq!(files.server(Some("crl.pem")).is_ok(), fits);
    }
}

#[test]
fn a_key_open_to_others_is_warned_about() {
    static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    struct Keep;
    impl log::Log for Keep {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            LOGGED.lock().unwrap().push(record.args().to_string());
        }
        fn flush(&self) {}
    }
    log::set_logger(&Keep).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let files = Files::new(&Lab::new());
    let warned =
        |path: &Path| LOGGED.lock().unwrap().iter().any(|line| line.contains(path.to_str().unwrap()));
    files.server(None).unwrap();
    assert!(!warned(&files.path("own.key")));
    fs::set_permissions(files.path("own.key"), fs::Permissions::from_mode(0o640)).unwrap();
    files.server(None).unwrap();
    assert!(warned(&files.path("own.key")));
}

fn extension(oid: &str, der: &[u8]) -> X509Extension {
    let oid = Asn1Object::from_str(oid).unwrap();
    X509Extension::new_from_der(&oid, true, &Asn1OctetString::new_from_bytes(der).unwrap()).unwrap()
}

/// An end that checks nothing: what a hostile or mistaken peer might run.
fn plain_ssl(method: SslMethod, set: impl FnOnce(&mut SslContextBuilder)) -> Ssl {
    let mut builder = SslContext::builder(method).unwrap();
    builder.set_verify(SslVerifyMode::NONE);
    set(&mut builder);
    Ssl::new(&builder.build()).unwrap()
}

fn plain_client(pair: Option<&Pair>, alpn: Option<&[u8]>) -> Ssl {
    plain_ssl(SslMethod::tls_client(), |builder| {
        if let Some(pair) = pair {
            builder.set_certificate(&pair.cert).unwrap();
            builder.set_private_key(&pair.key).unwrap();
        }
        if let Some(alpn) = alpn {
            builder.set_alpn_protos(alpn).unwrap();
        }
    })
}
