//! A small certificate authority in a directory, for those who have none.
//!
//! ```text
//! certs/ca.pem ca.key        the authority: the certificate goes everywhere, the key stays here
//! certs/crl.pem              what it took back; the server reads it (tls.crl)
//! certs/index.json           every certificate it issued: name, kind, serial, dates
//! certs/NAME.pem NAME.key    a server
//! certs/clients/NAME.pem .key
//! certs/.lock                held by the command at work
//! ```
//!
//! The revocation list is the only record of what was revoked, so no two files can disagree about it. A
//! certificate enters the index before its files are written: a crash in between leaves an entry that can be
//! revoked, never a certificate that can't.
//!
//! [`Authority`]'s methods by kind: [`Authority::init`] and [`Authority::open`] come first; `server`, `client` and
//! `revoke` change the directory; `profile` and `list` only read. Time is an argument, in seconds since 1970.

mod names;
mod sign;
mod store;

pub use names::{AltName, Name, RemoteHost};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use openssl::pkey::{PKey, Private};
use openssl::x509::{X509, X509Crl};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::exit::{Exit, Failure, Outcome};
use crate::tls::time::{self, DAY};
use crate::tls::verify::{Side, address};
use store::{Directory, Secrecy};

/// An opened directory, locked until it is dropped.
pub struct Authority {
    dir: Directory,
    cert: X509,
    key: PKey<Private>,
    crl: X509Crl,
    index: Index,
}

/// A certificate this authority issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// Whose it is.
    pub name: String,
    /// What it may be used for.
    pub kind: Side,
    /// Serial number in hexadecimal.
    pub serial: String,
    /// Last second of validity.
    pub not_after: i64,
    /// What it is worth.
    pub state: State,
}

/// What a certificate is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is accepted.
    Valid,
    /// Its time is over.
    Expired,
    /// It was taken back, at this time.
    Revoked(i64),
}

/// Where an identity's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Last second of validity: what was asked for, or the authority's own end if that is sooner.
    pub not_after: i64,
}

/// `index.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    version: u32,
    certificates: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    kind: Kind,
    serial: String,
    not_before: i64,
    not_after: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Server,
    Client,
}

impl Authority {
    /// Makes a new authority called `name` in `dir`, with an empty revocation list.
    pub fn init(dir: &Path, name: &str, now: i64) -> Outcome<()> {
        names::check_authority_name(name)?;
        let dir = Directory::create(dir)?;
        for file in [CA_CERT, CA_KEY, CRL, INDEX] {
            if dir.exists(file) {
                return Err(Failure::usage(format!(
                    "{} exists already: there is an authority in {}; name another --dir, or move it away",
                    dir.path(file).display(),
                    dir.root().display()
                )));
            }
        }
        let (cert, key) = sign::authority(name, now).map_err(broken)?;
        let crl = sign::revocations(&cert, &key, &BTreeMap::new(), now).map_err(broken)?;
        dir.write_new(CA_KEY, Secrecy::Private, &private_pem(&key)?)?;
        dir.write_new(CRL, Secrecy::Public, &crl.to_pem().map_err(broken)?)?;
        dir.write_new(INDEX, Secrecy::Public, &Index { version: 1, certificates: Vec::new() }.to_json()?)?;
        dir.write_new(CA_CERT, Secrecy::Public, &cert.to_pem().map_err(broken)?)
    }

    /// Opens the authority in `dir`; waits for another command that is at work there.
    pub fn open(dir: &Path) -> Outcome<Authority> {
        let dir = Directory::open(dir)?;
        let read_cert = || X509::from_pem(&dir.read(CA_CERT)?).map_err(|_| damaged(&dir, CA_CERT));
        let cert = read_cert().map_err(|f| Failure::new(Exit::CertificateUnreadable, f.text))?;
        let key =
            sign::private_key(&dir.read(CA_KEY).map_err(|f| Failure::new(Exit::KeyUnreadable, f.text))?)
                .ok_or_else(|| Failure::new(Exit::KeyUnreadable, damaged(&dir, CA_KEY).text))?;
        if !cert.public_key().is_ok_and(|public| public.public_eq(&key)) {
            return Err(Failure::new(
                Exit::KeyMismatch,
                format!("{} doesn't belong to {}", dir.path(CA_KEY).display(), dir.path(CA_CERT).display()),
            ));
        }
        let crl = X509Crl::from_pem(&dir.read(CRL)?).map_err(|_| damaged(&dir, CRL))?;
        let ours = cert.public_key().and_then(|public| crl.verify(&public)).unwrap_or(false);
        if !ours {
            return Err(Failure::usage(format!(
                "{} was not made by this authority: restore the list that belongs to it",
                dir.path(CRL).display()
            )));
        }
        let index: Index = serde_json::from_slice(&dir.read(INDEX)?)
            .map_err(|e| damaged(&dir, INDEX).context(format_args!("line {}", e.line())))?;
        if index.version != 1 {
            return Err(Failure::usage(format!(
                "{} has version {}, and this tunguard knows 1: use the newer one",
                dir.path(INDEX).display(),
                index.version
            )));
        }
        Ok(Authority { dir, cert, key, crl, index })
    }

    /// Issues a certificate for a server that is reached by `alt_names`, at least one.
    pub fn server(&mut self, name: &Name, alt_names: &[AltName], days: u32, now: i64) -> Outcome<Files> {
        if alt_names.is_empty() {
            return Err(Failure::usage("a server needs at least one --san HOST_OR_IP: what clients dial"));
        }
        self.issue(Kind::Server, name, alt_names, days, now)
    }

    /// Issues a certificate for the client `name`. A name whose certificates are all revoked or expired may be
    /// given out again; the old files are replaced.
    pub fn client(&mut self, name: &Name, days: u32, now: i64) -> Outcome<Files> {
        self.issue(Kind::Client, name, &[], days, now)
    }

    /// Takes back every valid certificate of `name` by writing a new revocation list.
    pub fn revoke(&mut self, name: &Name, now: i64) -> Outcome<Vec<Issued>> {
        let all: Vec<Issued> = self.list(now)?.into_iter().filter(|i| i.name == name.as_str()).collect();
        if all.is_empty() {
            return Err(self.unknown(name));
        }
        let valid: Vec<Issued> = all.iter().filter(|i| i.state == State::Valid).cloned().collect();
        if valid.is_empty() {
            // The newest says best what happened to the name.
            let state = all.last().map_or(State::Expired, |i| i.state);
            return Err(Failure::usage(format!("{name} has no valid certificate: {}", state.past())));
        }
        let mut revoked = sign::revoked(&self.crl).map_err(broken)?;
        for issued in &valid {
            revoked.insert(issued.serial.clone(), now);
        }
        let crl = sign::revocations(&self.cert, &self.key, &revoked, now).map_err(broken)?;
        self.dir.replace(CRL, Secrecy::Public, &crl.to_pem().map_err(broken)?)?;
        self.crl = crl;
        Ok(valid)
    }

    /// A client's configuration in one file, with everything secret inline.
    ///
    /// `server_name` of `None` means the first name of the server's certificate, if there is exactly one server here.
    pub fn profile(
        &self,
        name: &Name,
        remotes: &[RemoteHost],
        server_name: Option<&str>,
        now: i64,
    ) -> Outcome<Zeroizing<String>> {
        let all = self.list(now)?;
        let of_name: Vec<&Issued> = all.iter().filter(|i| i.name == name.as_str()).collect();
        match of_name.last() {
            None => {
                return Err(Failure::usage(format!(
                    "there is no client {name} yet: `tunguard pki client {name}`"
                )));
            }
            Some(i) if i.kind == Side::Server => {
                return Err(Failure::usage(format!("{name} is a server: profiles are for clients")));
            }
            Some(i) if i.state != State::Valid => {
                return Err(Failure::usage(format!(
                    "{name} has no valid certificate ({}): issue another with `tunguard pki client {name}`",
                    i.state.past()
                )));
            }
            Some(_) => {}
        }
        let (cert, key) = file_names(Kind::Client, name);
        let text = |file: &str| -> Outcome<Zeroizing<String>> {
            let bytes = self.dir.read(file)?;
            let text = std::str::from_utf8(&bytes).map_err(|_| damaged(&self.dir, file))?;
            if text.contains("'''") {
                return Err(damaged(&self.dir, file));
            }
            Ok(Zeroizing::new(text.trim_end().to_owned()))
        };
        let default = self.only_server_name(&all);
        Ok(profile_text(
            name,
            remotes,
            [&text(CA_CERT)?, &text(&cert)?, &text(&key)?],
            server_name.or(default.as_deref()),
        ))
    }

    /// Everything that was issued, oldest first.
    pub fn list(&self, now: i64) -> Outcome<Vec<Issued>> {
        let revoked = sign::revoked(&self.crl).map_err(broken)?;
        let issued = self.index.certificates.iter().map(|entry| Issued {
            name: entry.name.clone(),
            kind: entry.kind.into(),
            serial: entry.serial.clone(),
            not_after: entry.not_after,
            state: match revoked.get(&entry.serial) {
                Some(at) => State::Revoked(*at),
                None if now > entry.not_after => State::Expired,
                None => State::Valid,
            },
        });
        Ok(issued.collect())
    }

    fn issue(
        &mut self,
        kind: Kind,
        name: &Name,
        alt_names: &[AltName],
        days: u32,
        now: i64,
    ) -> Outcome<Files> {
        let (cert_file, key_file) = file_names(kind, name);
        self.check_free(kind, name, [&cert_file, &key_file], now)?;
        let end = time::unix(self.cert.not_after()).map_err(broken)?;
        if now >= end {
            return Err(Failure::new(
                Exit::CertificateExpired,
                format!(
                    "the authority expired on {}: start a new one with `tunguard pki init`",
                    time::date(end)
                ),
            ));
        }

        let request = sign::Request {
            name: name.as_str(),
            side: kind.into(),
            alt_names,
            not_before: now - sign::BACKDATED,
            not_after: (now + i64::from(days) * DAY).min(end),
        };
        let (cert, key, serial) = sign::certificate(&self.cert, &self.key, &request).map_err(broken)?;
        self.index.certificates.push(Entry {
            name: name.as_str().to_owned(),
            kind,
            serial,
            not_before: request.not_before,
            not_after: request.not_after,
        });
        self.dir.replace(INDEX, Secrecy::Public, &self.index.to_json()?)?;
        self.dir.replace(&key_file, Secrecy::Private, &private_pem(&key)?)?;
        self.dir.replace(&cert_file, Secrecy::Public, &cert.to_pem().map_err(broken)?)?;
        Ok(Files {
            cert: self.dir.path(&cert_file),
            key: self.dir.path(&key_file),
            not_after: request.not_after,
        })
    }

    /// Refuses a name that is in use, and files that aren't left over from a certificate that is worth nothing.
    fn check_free(&self, kind: Kind, name: &Name, files: [&str; 2], now: i64) -> Outcome<()> {
        let former: Vec<Issued> = self.list(now)?.into_iter().filter(|i| i.name == name.as_str()).collect();
        let path = self.dir.path(files[0]);
        let path = path.display();
        if let Some(valid) = former.iter().find(|i| i.state == State::Valid) {
            return Err(Failure::usage(format!(
                "{name} has a valid {} certificate ({path}, serial {}): use that, choose another name, or \
                 `tunguard pki revoke {name}` first",
                valid.kind, valid.serial
            )));
        }
        if let Some(other) = former.iter().find(|i| i.kind != kind.into()) {
            return Err(Failure::usage(format!("{name} was a {}'s name: choose another name", other.kind)));
        }
        if self.dir.exists(files[0]) {
            let there = X509::from_pem(&self.dir.read(files[0])?).ok().map(|cert| sign::serial(&cert));
            if !former.iter().any(|i| Some(&i.serial) == there.as_ref()) {
                return Err(Failure::usage(format!("{path} exists and isn't in the index: move it away")));
            }
        } else if self.dir.exists(files[1]) && former.is_empty() {
            let path = self.dir.path(files[1]);
            return Err(Failure::usage(format!(
                "{} exists and isn't in the index: move it away",
                path.display()
            )));
        }
        Ok(())
    }

    /// What the one server here is called by its clients.
    fn only_server_name(&self, all: &[Issued]) -> Option<String> {
        let mut servers = all.iter().filter(|i| i.kind == Side::Server && i.state == State::Valid);
        let (server, None) = (servers.next()?, servers.next()) else {
            return None;
        };
        let name: Name = server.name.parse().ok()?;
        let (file, _) = file_names(Kind::Server, &name);
        let cert = X509::from_pem(&self.dir.read(&file).ok()?).ok()?;
        cert.subject_alt_names()?.iter().find_map(|alt| {
            let dns = alt.dnsname().map(str::to_owned);
            dns.or_else(|| alt.ipaddress().and_then(address).map(|ip| ip.to_string()))
        })
    }

    fn unknown(&self, name: &Name) -> Failure {
        let root = self.dir.root().display();
        let known = self.index.certificates.iter().map(|e| e.name.as_str());
        let nearest = known
            .map(|k| (strsim::damerau_levenshtein(k, name.as_str()), k))
            .filter(|(distance, _)| *distance <= 2)
            .min();
        let hint = match nearest {
            Some((_, near)) => format!("did you mean {near}?"),
            None => "`tunguard pki list` shows who has one".to_owned(),
        };
        Failure::usage(format!("{name} has no certificate in {root}: {hint}"))
    }
}

impl State {
    fn past(self) -> String {
        match self {
            State::Valid => "valid".to_owned(),
            State::Expired => "expired".to_owned(),
            State::Revoked(at) => format!("revoked on {}", time::date(at)),
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.past())
    }
}

impl From<Kind> for Side {
    fn from(kind: Kind) -> Side {
        match kind {
            Kind::Server => Side::Server,
            Kind::Client => Side::Client,
        }
    }
}

impl Index {
    fn to_json(&self) -> Outcome<Vec<u8>> {
        let mut json =
            serde_json::to_vec_pretty(self).map_err(|e| Failure::system("writing the index", e))?;
        json.push(b'\n');
        Ok(json)
    }
}

fn profile_text(
    name: &Name,
    remotes: &[RemoteHost],
    [ca, cert, key]: [&str; 3],
    server_name: Option<&str>,
) -> Zeroizing<String> {
    let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let remotes: Vec<String> = remotes.iter().map(|r| quoted(r.as_str())).collect();
    let server_name = server_name.map_or(String::new(), |n| format!("server_name = {}\n", quoted(n)));
    // One allocation that is large enough: a string that grows leaves copies of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(ca.len() + cert.len() + key.len() + 4_096));
    for part in [
        &format!("# tunguard profile of the client {name}.\n"),
        "# It holds a private key: keep it secret (chmod 600), and send it over a safe channel only.\n",
        &format!("remote = [{}]\n\n[tls]\n", remotes.join(", ")),
        &server_name,
        "ca = '''\n",
        ca,
        "\n'''\ncert = '''\n",
        cert,
        "\n'''\nkey = '''\n",
        key,
        "\n'''\n",
    ] {
        text.push_str(part);
    }
    text
}

/// An identity's certificate and key, below the directory.
fn file_names(kind: Kind, name: &Name) -> (String, String) {
    match kind {
        Kind::Server => (format!("{name}.pem"), format!("{name}.key")),
        Kind::Client => (format!("{CLIENTS}/{name}.pem"), format!("{CLIENTS}/{name}.key")),
    }
}

fn private_pem(key: &PKey<Private>) -> Outcome<Zeroizing<Vec<u8>>> {
    key.private_key_to_pem_pkcs8().map(Zeroizing::new).map_err(broken)
}

fn damaged(dir: &Directory, file: &str) -> Failure {
    Failure::usage(format!("{} is damaged: restore it from a backup", dir.path(file).display()))
}

fn broken(e: openssl::error::ErrorStack) -> Failure {
    Failure::system("making certificates with OpenSSL", e)
}

/// Days a server's certificate is valid unless asked otherwise.
pub const SERVER_DAYS: u32 = 825;
/// Days a client's certificate is valid unless asked otherwise.
pub const CLIENT_DAYS: u32 = 730;

const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const CRL: &str = "crl.pem";
const INDEX: &str = "index.json";
const CLIENTS: &str = "clients";
