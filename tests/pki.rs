//! An authority's life in a directory, up to the handshakes its files are for.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[allow(dead_code, reason = "tests/tls/main.rs needs the rest")]
mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{Stream, meet, read_key};
use openssl::nid::Nid;
use openssl::x509::{X509, X509ExtendedKeyUsage, X509KeyUsage};
use tempfile::TempDir;
use tunguard::config::client::ClientTls;
use tunguard::config::common::Pem;
use tunguard::config::server::ServerTls;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::pki::{AltName, Authority, CLIENT_DAYS, Files, Name, RemoteHost, SERVER_DAYS, State};
use tunguard::tls::time::{DAY, unix, wall_clock};
use tunguard::tls::verify::Side;
use tunguard::tls::{
    Certificates, Credentials, client_context, client_ssl, peer_identity, server_context, server_ssl,
};

/// An authority with the server `gate` and the client `alice`, at the present time.
struct Lab {
    temp: TempDir,
    now: i64,
}

impl Lab {
    fn new() -> Lab {
        let lab = Lab { temp: tempfile::tempdir().unwrap(), now: wall_clock() };
        Authority::init(&lab.dir(), "Lab CA", lab.now).unwrap();
        lab.server("gate").unwrap();
        lab.client("alice").unwrap();
        lab
    }

    fn dir(&self) -> PathBuf {
        self.temp.path().join("certs")
    }

    fn open(&self) -> Authority {
        Authority::open(&self.dir()).unwrap()
    }

    fn server(&self, who: &str) -> Outcome<Files> {
        let names: [AltName; 2] = ["vpn.example.org".parse()?, "192.0.2.1".parse()?];
        self.open().server(&name(who), &names, SERVER_DAYS, self.now)
    }

    fn client(&self, who: &str) -> Outcome<Files> {
        self.open().client(&name(who), CLIENT_DAYS, self.now)
    }

    fn profile(&self, who: &str, server_name: Option<&str>) -> Outcome<String> {
        let remotes: [RemoteHost; 2] = ["vpn.example.org".parse()?, "[2001:db8::1]:443".parse()?];
        self.open().profile(&name(who), &remotes, server_name, self.now).map(|text| text.to_string())
    }

    fn states(&self) -> Vec<(String, State)> {
        self.open().list(self.now).unwrap().into_iter().map(|i| (i.name, i.state)).collect()
    }

    /// Both ends of a handshake made from the files, as a server and a client would read them now.
    fn handshake(&self, who: &str) -> (Outcome<Stream>, Outcome<Stream>) {
        let file = |name: &str| Pem::File(self.dir().join(name));
        let server = Certificates::read_server(&ServerTls {
            ca: file("ca.pem"),
            cert: file("gate.pem"),
            key: file("gate.key"),
            crl: Some(self.dir().join("crl.pem")),
        });
        let client = Credentials::read_client(&ClientTls {
            ca: file("ca.pem"),
            cert: file(&format!("clients/{who}.pem")),
            key: file(&format!("clients/{who}.key")),
            server_name: None,
        });
        let server = server.unwrap();
        let key = read_key(file("gate.key"), &server.cert).unwrap();
        let signer = Box::new(move |wanted: &_| Ok(key.sign(wanted)?.unwrap()));
        let server = server_ssl(&server_context(&server).unwrap(), signer).unwrap();
        let client = client_ssl(&client_context(&client.unwrap()).unwrap(), "vpn.example.org").unwrap();
        meet(server, client)
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[track_caller]
fn says(failure: &Failure, parts: &[&str]) {
    assert_eq!(failure.exit, Exit::Usage, "{failure}");
    for part in parts {
        assert!(failure.text.contains(part), "{part:?} is missing in: {failure}");
    }
}

fn read_cert(path: &Path) -> X509 {
    X509::from_pem(&fs::read(path).unwrap()).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn what_was_issued_connects_until_it_is_revoked_and_again_when_reissued() {
    let lab = Lab::new();
    let (server, client) = lab.handshake("alice");
    client.unwrap();
    let first = peer_identity(server.unwrap().ssl(), None).unwrap();
    assert_eq!(first.name, "alice");
    lab.client("bob").unwrap();

    let revoked = lab.open().revoke(&name("alice"), lab.now).unwrap();
    assert_eq!(revoked.len(), 1);
    assert_eq!(revoked[0].serial, first.cert.serial_hex());
    let (server, client) = lab.handshake("alice");
    assert_eq!(server.unwrap_err().exit, Exit::CertificateRevoked);
    assert_eq!(client.unwrap_err().exit, Exit::CertificateRevoked);
    lab.handshake("bob").0.unwrap();

    // The old key stays out, whatever the name is given to afterwards.
    let old = ["pem", "key"].map(|end| fs::read(lab.dir().join(format!("clients/alice.{end}"))).unwrap());
    lab.client("alice").unwrap();
    let (server, _client) = lab.handshake("alice");
    let second = peer_identity(server.unwrap().ssl(), None).unwrap();
    assert_eq!(second.name, "alice");
    assert_ne!(first.cert, second.cert);
    fs::write(lab.dir().join("clients/old.pem"), &old[0]).unwrap();
    fs::write(lab.dir().join("clients/old.key"), &old[1]).unwrap();
    assert_eq!(lab.handshake("old").0.unwrap_err().exit, Exit::CertificateRevoked);

    // A second revocation forgets none of the first.
    lab.open().revoke(&name("bob"), lab.now).unwrap();
    assert_eq!(lab.handshake("old").0.unwrap_err().exit, Exit::CertificateRevoked);
    assert_eq!(lab.handshake("bob").0.unwrap_err().exit, Exit::CertificateRevoked);
    lab.handshake("alice").0.unwrap();
    let at = State::Revoked(lab.now);
    let expected = [("gate", State::Valid), ("alice", at), ("bob", at), ("alice", State::Valid)];
    assert_eq!(lab.states(), expected.map(|(who, state)| (who.to_owned(), state)));
}

#[test]
fn files_are_where_they_belong_and_open_to_nobody_else() {
    let lab = Lab::new();
    let mut found = BTreeSet::new();
    for dir in [lab.dir(), lab.dir().join("clients")] {
        assert_eq!(mode(&dir), 0o700);
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let secret = path.extension().is_some_and(|e| e == "key") || path.ends_with(".lock");
                assert_eq!(mode(&path), if secret { 0o600 } else { 0o644 }, "{}", path.display());
                found.insert(path.strip_prefix(lab.dir()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    let expected = [
        ".lock",
        "ca.key",
        "ca.pem",
        "clients/alice.key",
        "clients/alice.pem",
        "crl.pem",
        "gate.key",
        "gate.pem",
        "index.json",
    ];
    assert_eq!(found, expected.map(str::to_owned).into());
}

#[test]
fn certificates_say_what_they_are_for() {
    let lab = Lab::new();
    let ca = read_cert(&lab.dir().join("ca.pem"));
    let gate = read_cert(&lab.dir().join("gate.pem"));
    let alice = read_cert(&lab.dir().join("clients/alice.pem"));

    assert_eq!(ca.key_usage(), Some(X509KeyUsage::KEY_CERT_SIGN | X509KeyUsage::CRL_SIGN));
    assert_eq!(ca.pathlen(), Some(0));
    assert_eq!(gate.extended_key_usage(), Some(X509ExtendedKeyUsage::SSL_SERVER));
    assert_eq!(alice.extended_key_usage(), Some(X509ExtendedKeyUsage::SSL_CLIENT));
    let mut serials = BTreeSet::new();
    for (cert, days) in [(&ca, 3_653), (&gate, 825), (&alice, 730)] {
        assert_eq!(cert.version(), 2);
        assert_eq!(
            cert.public_key().unwrap().ec_key().unwrap().group().curve_name(),
            Some(Nid::X9_62_PRIME256V1)
        );
        assert_eq!(unix(cert.not_before()).unwrap(), lab.now - 300);
        assert_eq!(unix(cert.not_after()).unwrap(), lab.now + days * DAY);
        let serial = cert.serial_number().to_bn().unwrap();
        assert!(!serial.is_negative() && serial.num_bits() == 128, "{serial}");
        serials.insert(serial.to_vec());
        assert!(cert.subject_key_id().is_some());
    }
    assert_eq!(serials.len(), 3);
    for cert in [&gate, &alice] {
        assert_eq!(cert.key_usage(), Some(X509KeyUsage::DIGITAL_SIGNATURE));
        assert_eq!(cert.authority_key_id().unwrap().as_slice(), ca.subject_key_id().unwrap().as_slice());
        assert!(cert.verify(&ca.public_key().unwrap()).unwrap());
    }
    let text = String::from_utf8(gate.to_text().unwrap()).unwrap();
    assert!(text.contains("DNS:vpn.example.org, IP Address:192.0.2.1"), "{text}");
    assert!(text.contains("Basic Constraints: critical") && text.contains("Key Usage: critical"), "{text}");
}

#[test]
fn nothing_outlives_the_authority() {
    let lab = Lab::new();
    let end = unix(read_cert(&lab.dir().join("ca.pem")).not_after()).unwrap();
    let late = lab.open().client(&name("late"), 730, end - DAY).unwrap();
    assert_eq!(late.not_after, end);
    let failure = lab.open().client(&name("later"), 730, end).unwrap_err();
    assert_eq!(failure.exit, Exit::CertificateExpired, "{failure}");
}

#[test]
fn an_authority_is_never_overwritten() {
    for file in ["ca.pem", "ca.key", "crl.pem", "index.json"] {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join(file), "precious").unwrap();
        says(&Authority::init(temp.path(), "x", 0).unwrap_err(), &[file, "exists already", "--dir"]);
        assert_eq!(fs::read_to_string(temp.path().join(file)).unwrap(), "precious");
    }
    let temp = tempfile::tempdir().unwrap();
    for bad in ["", " x", "a\nb", &"x".repeat(65)] {
        says(&Authority::init(temp.path(), bad, 0).unwrap_err(), &["can't name an authority"]);
    }
    Authority::init(temp.path(), "B\u{fc}ro", wall_clock()).unwrap();
}

#[test]
fn an_identity_is_never_overwritten() {
    let lab = Lab::new();
    let before = fs::read(lab.dir().join("clients/alice.key")).unwrap();
    says(
        &lab.client("alice").unwrap_err(),
        &["alice has a valid client", "clients/alice.pem", "pki revoke alice"],
    );
    says(&lab.server("gate").unwrap_err(), &["gate has a valid server", "gate.pem", "pki revoke gate"]);
    // One name, one identity: revocation goes by name.
    says(&lab.client("gate").unwrap_err(), &["gate has a valid server"]);
    says(&lab.server("alice").unwrap_err(), &["alice has a valid client"]);
    assert_eq!(fs::read(lab.dir().join("clients/alice.key")).unwrap(), before);
    lab.open().revoke(&name("alice"), lab.now).unwrap();
    says(&lab.server("alice").unwrap_err(), &["alice was a client's name"]);

    // Files that the index doesn't know are somebody's, too; so is a key alone.
    for file in ["clients/carol.pem", "clients/dave.key"] {
        fs::write(lab.dir().join(file), "precious").unwrap();
        let who = Path::new(file).file_stem().unwrap().to_str().unwrap();
        says(&lab.client(who).unwrap_err(), &[file, "move it away"]);
        assert_eq!(fs::read_to_string(lab.dir().join(file)).unwrap(), "precious");
    }
    // Moved to its device, a certificate is valid still.
    for end in ["pem", "key"] {
        fs::remove_file(lab.dir().join(format!("gate.{end}"))).unwrap();
    }
    says(&lab.server("gate").unwrap_err(), &["gate has a valid server"]);
}

#[test]
fn an_expired_name_is_issued_again() {
    let mut lab = Lab::new();
    lab.now += i64::from(CLIENT_DAYS) * DAY + 1;
    assert_eq!(lab.states()[1], ("alice".to_owned(), State::Expired));
    says(
        &lab.open().revoke(&name("alice"), lab.now).unwrap_err(),
        &["alice has no valid certificate", "expired"],
    );
    says(&lab.profile("alice", None).unwrap_err(), &["expired", "tunguard pki client alice"]);
    lab.client("alice").unwrap();
    assert_eq!(lab.states()[2], ("alice".to_owned(), State::Valid));
}

#[test]
fn revocation_needs_somebody_to_revoke() {
    let lab = Lab::new();
    let before = fs::read(lab.dir().join("crl.pem")).unwrap();
    let revoke = |who: &str| lab.open().revoke(&name(who), lab.now).unwrap_err();
    says(&revoke("alcie"), &["alcie has no certificate", "did you mean alice?"]);
    says(&revoke("somebody-else"), &["somebody-else has no certificate", "tunguard pki list"]);
    assert_eq!(fs::read(lab.dir().join("crl.pem")).unwrap(), before);
    lab.open().revoke(&name("alice"), lab.now).unwrap();
    says(&revoke("alice"), &["alice has no valid certificate", "revoked on 20"]);
}

#[test]
fn a_lost_or_foreign_list_is_not_replaced_by_an_empty_one() {
    let lab = Lab::new();
    lab.open().revoke(&name("alice"), lab.now).unwrap();
    let other = Lab::new();
    fs::copy(other.dir().join("crl.pem"), lab.dir().join("crl.pem")).unwrap();
    says(&Authority::open(&lab.dir()).err().unwrap(), &["crl.pem", "not made by this authority"]);
    fs::remove_file(lab.dir().join("crl.pem")).unwrap();
    says(&Authority::open(&lab.dir()).err().unwrap(), &["crl.pem", "can't be read"]);
}

#[test]
fn damage_is_named() {
    for (file, exit) in [
        ("ca.pem", Exit::CertificateUnreadable),
        ("ca.key", Exit::KeyUnreadable),
        ("crl.pem", Exit::Usage),
        ("index.json", Exit::Usage),
    ] {
        let lab = Lab::new();
        let path = lab.dir().join(file);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let failure = Authority::open(&lab.dir()).err().unwrap();
        assert_eq!(failure.exit, exit, "{failure}");
        assert!(failure.text.contains(file) && failure.text.contains("damaged"), "{failure}");
    }
    let lab = Lab::new();
    fs::copy(lab.dir().join("gate.key"), lab.dir().join("ca.key")).unwrap();
    assert_eq!(Authority::open(&lab.dir()).err().unwrap().exit, Exit::KeyMismatch);
    let nowhere = lab.temp.path().join("nowhere");
    says(&Authority::open(&nowhere).err().unwrap(), &["nowhere", "tunguard pki init"]);
    assert!(!nowhere.exists());
}

#[test]
fn a_profile_is_a_whole_client_configuration() {
    let lab = Lab::new();
    let text = lab.profile("alice", None).unwrap();
    assert!(text.starts_with("# tunguard profile of the client alice.\n# It holds a private key"), "{text}");
    let toml: toml::Table = text.parse().unwrap();
    let remotes: Vec<&str> = toml["remote"].as_array().unwrap().iter().map(|r| r.as_str().unwrap()).collect();
    assert_eq!(remotes, ["vpn.example.org", "[2001:db8::1]:443"]);
    let tls = toml["tls"].as_table().unwrap();
    assert_eq!(tls["server_name"].as_str(), Some("vpn.example.org"));
    let keys: Vec<&str> = tls.keys().map(String::as_str).collect();
    assert_eq!(
        keys.iter().copied().collect::<BTreeSet<_>>(),
        BTreeSet::from(["ca", "cert", "key", "server_name"])
    );
    let inline =
        |key: &'static str, text: &toml::Value| Pem::Inline { key, text: text.as_str().unwrap().to_owned() };
    let client = Credentials::read_client(&ClientTls {
        ca: inline("tls.ca", &tls["ca"]),
        cert: inline("tls.cert", &tls["cert"]),
        key: inline("tls.key", &tls["key"]),
        server_name: None,
    });
    assert_eq!(client.unwrap().cert, fs::read(lab.dir().join("clients/alice.pem")).unwrap());

    let text = lab.profile("alice", Some("10.0.0.1")).unwrap();
    assert!(text.contains("server_name = \"10.0.0.1\"\n"), "{text}");
    // With two servers nobody can guess.
    lab.server("gate2").unwrap();
    assert!(!lab.profile("alice", None).unwrap().contains("server_name"));
    lab.open().revoke(&name("gate2"), lab.now).unwrap();
    assert!(lab.profile("alice", None).unwrap().contains("server_name"));
}

#[test]
fn a_profile_needs_a_client_that_is_valid() {
    let lab = Lab::new();
    says(&lab.profile("bob", None).unwrap_err(), &["no client bob yet", "tunguard pki client bob"]);
    says(&lab.profile("gate", None).unwrap_err(), &["gate is a server"]);
    lab.open().revoke(&name("alice"), lab.now).unwrap();
    says(&lab.profile("alice", None).unwrap_err(), &["revoked on", "tunguard pki client alice"]);
    lab.client("alice").unwrap();
    fs::remove_file(lab.dir().join("clients/alice.key")).unwrap();
    says(&lab.profile("alice", None).unwrap_err(), &["clients/alice.key", "can't be read"]);
}

#[test]
fn a_server_needs_an_alternative_name() {
    let lab = Lab::new();
    let failure = lab.open().server(&name("bare"), &[], 1, lab.now).unwrap_err();
    says(&failure, &["--san"]);
}

#[test]
fn commands_at_the_same_time_take_turns() {
    let lab = Lab::new();
    std::thread::scope(|scope| {
        for n in 0..8 {
            let lab = &lab;
            scope.spawn(move || lab.client(&format!("c{n}")).unwrap());
        }
    });
    let list = lab.open().list(lab.now).unwrap();
    assert_eq!(list.len(), 10);
    assert_eq!(list.iter().filter(|i| i.kind == Side::Client).count(), 9);
}
