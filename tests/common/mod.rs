//! Certificates of every wrong kind, and a handshake between two threads. The certificates are made here and
//! not by `tunguard::pki`, so that a mistake there doesn't hide one in the checks.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use openssl::asn1::{Asn1Integer, Asn1Time, Asn1Type};
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{HandshakeError, Ssl, SslStream};
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, CrlNumber, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName,
    SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509CrlBuilder, X509Extension, X509Name, X509RevokedBuilder};
use tunguard::config::common::Pem;
use tunguard::exit::{Failure, Outcome};
use tunguard::tls::server_key::KeyNames;
use tunguard::tls::time::wall_clock;
use tunguard::tls::{
    Certificates, Credentials, KeySource, Signer, SigningKey, failure_of_connect, failure_of_io,
};
use zeroize::Zeroizing;

/// A certificate with its key.
#[derive(Clone)]
pub struct Pair {
    pub cert: X509,
    pub key: PKey<Private>,
}

/// What to put into a certificate; the default is a client's that everybody accepts.
#[derive(Clone)]
pub struct Wish<'a> {
    pub names: &'a [&'a str],
    pub server: bool,
    pub client: bool,
    pub dns: &'a [&'a str],
    pub ip: &'a [&'a str],
    /// Seconds from now.
    pub valid: (i64, i64),
    pub key: MakeKey,
    pub ca: bool,
    /// Whether a CA may sign revocation lists.
    pub signs_lists: bool,
    /// Instead of a random one.
    pub serial: Option<&'a [u8]>,
}

impl Default for Wish<'_> {
    fn default() -> Self {
        let (dns, ip) = (&[] as &[&str], &[] as &[&str]);
        Wish {
            names: &["alice"],
            server: false,
            client: true,
            dns,
            ip,
            valid: (-HOUR, HOUR),
            key: p256,
            ca: false,
            signs_lists: true,
            serial: None,
        }
    }
}

pub type MakeKey = fn() -> PKey<Private>;

pub const HOUR: i64 = 3_600;

pub fn server_wish() -> Wish<'static> {
    Wish {
        names: &["gate"],
        server: true,
        client: false,
        dns: &["vpn.example.org"],
        ip: &["192.0.2.1"],
        ..client()
    }
}

pub fn client() -> Wish<'static> {
    Wish::default()
}

pub fn ca(name: &str) -> Pair {
    make(&Wish { names: &[name], ca: true, client: false, ..client() }, None)
}

pub fn make(wish: &Wish<'_>, issuer: Option<&Pair>) -> Pair {
    let key = (wish.key)();
    let mut name = X509Name::builder().expect("a name");
    // With a type, OpenSSL takes any bytes; without one it refuses an empty name.
    for cn in wish.names {
        name.append_entry_by_nid_with_type(Nid::COMMONNAME, cn, Asn1Type::UTF8STRING).expect("a common name");
    }
    name.append_entry_by_nid(Nid::ORGANIZATIONNAME, "tests").expect("an organisation");
    let name = name.build();
    let mut cert = X509Builder::new().expect("a builder");
    let mut serial = BigNum::new().expect("a number");
    match wish.serial {
        Some(bytes) => serial.copy_from_slice(bytes).expect("a number"),
        None => serial.rand(120, MsbOption::ONE, false).expect("random bits"),
    }
    let (begin, end) = (wall_clock() + wish.valid.0, wall_clock() + wish.valid.1);
    let issuer_cert = issuer.map(|i| i.cert.as_ref());
    let mut set = || -> Result<(), openssl::error::ErrorStack> {
        cert.set_version(2)?;
        cert.set_serial_number(&*Asn1Integer::from_bn(&serial)?)?;
        cert.set_subject_name(&name)?;
        cert.set_issuer_name(issuer_cert.map_or(&name, |i| i.subject_name()))?;
        cert.set_pubkey(&key)?;
        cert.set_not_before(&*Asn1Time::from_unix(begin)?)?;
        cert.set_not_after(&*Asn1Time::from_unix(end)?)?;
        let id = SubjectKeyIdentifier::new().build(&cert.x509v3_context(issuer_cert, None))?;
        cert.append_extension(id)?;
        if wish.ca {
            cert.append_extension(BasicConstraints::new().critical().ca().build()?)?;
            let mut usage = KeyUsage::new();
            usage.critical().key_cert_sign();
            if wish.signs_lists {
                usage.crl_sign();
            }
            cert.append_extension(usage.build()?)?;
        }
        if issuer.is_some() {
            let id =
                AuthorityKeyIdentifier::new().keyid(true).build(&cert.x509v3_context(issuer_cert, None))?;
            cert.append_extension(id)?;
        }
        if wish.server || wish.client {
            let mut usage = ExtendedKeyUsage::new();
            if wish.server {
                usage.server_auth();
            }
            if wish.client {
                usage.client_auth();
            }
            cert.append_extension(usage.build()?)?;
        }
        let mut alt = SubjectAlternativeName::new();
        for dns in wish.dns {
            alt.dns(dns);
        }
        for ip in wish.ip {
            alt.ip(ip);
        }
        if !wish.dns.is_empty() || !wish.ip.is_empty() {
            let alt = alt.build(&cert.x509v3_context(issuer_cert, None))?;
            cert.append_extension(alt)?;
        }
        let signer = issuer.map_or(&key, |i| &i.key);
        let ed25519 = signer.id() == openssl::pkey::Id::ED25519;
        cert.sign(signer, if ed25519 { MessageDigest::null() } else { MessageDigest::sha256() })
    };
    set().expect("a certificate");
    Pair { cert: cert.build(), key }
}

/// A revocation list of `issuer`, valid between the two times (seconds from now).
pub fn crl(issuer: &Pair, revoked: &[&Pair], valid: (i64, i64)) -> Vec<u8> {
    crl_with(issuer, revoked, valid, None)
}

/// The same with one more extension.
pub fn crl_with(
    issuer: &Pair,
    revoked: &[&Pair],
    valid: (i64, i64),
    extension: Option<X509Extension>,
) -> Vec<u8> {
    let make = || -> Result<Vec<u8>, openssl::error::ErrorStack> {
        let at = |offset: i64| Asn1Time::from_unix(wall_clock() + offset);
        let mut crl = X509CrlBuilder::new()?;
        crl.set_issuer_name(issuer.cert.subject_name())?;
        crl.set_last_update(&*at(valid.0)?)?;
        crl.set_next_update(&*at(valid.1)?)?;
        for pair in revoked {
            let mut entry = X509RevokedBuilder::new()?;
            entry.set_serial_number(pair.cert.serial_number())?;
            entry.set_revocation_date(&*at(0)?)?;
            crl.add_revoked(entry.build())?;
        }
        let context = X509Builder::new()?;
        let context = context.x509v3_context(Some(&issuer.cert), None);
        crl.append_extension(AuthorityKeyIdentifier::new().keyid(true).build(&context)?)?;
        crl.append_extension(CrlNumber::new(BigNum::from_u32(1)?)?.build()?)?;
        if let Some(extension) = extension {
            crl.append_extension(extension)?;
        }
        crl.sign(&issuer.key, MessageDigest::sha256())?;
        crl.build()?.to_pem()
    };
    make().expect("a revocation list")
}

pub fn p256() -> PKey<Private> {
    ec(Nid::X9_62_PRIME256V1)
}

pub fn p384() -> PKey<Private> {
    ec(Nid::SECP384R1)
}

pub fn ed25519() -> PKey<Private> {
    PKey::generate_ed25519().expect("a key")
}

pub fn rsa4096() -> PKey<Private> {
    openssl::rsa::Rsa::generate(4096).and_then(PKey::from_rsa).expect("a key")
}

pub fn ec(curve: Nid) -> PKey<Private> {
    let group = EcGroup::from_curve_name(curve).expect("a curve");
    EcKey::generate(&group).and_then(PKey::from_ec_key).expect("a key")
}

pub fn pem(pair: &Pair) -> Vec<u8> {
    pair.cert.to_pem().expect("PEM")
}

pub fn key_pem(pair: &Pair) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(pair.key.private_key_to_pem_pkcs8().expect("PEM"))
}

/// What [`Credentials`] would read, without the checks that would refuse what a test is about.
pub fn credentials(ca: &Pair, own: &Pair) -> Credentials {
    Credentials { ca: pem(ca), cert: pem(own), key: key_pem(own) }
}

/// The same of a server.
pub fn certificates(ca: &Pair, own: &Pair) -> Certificates {
    Certificates { ca: pem(ca), cert: pem(own), crl: None }
}

/// A key, as the key holder reads it.
pub fn signing_key(own: &Pair) -> SigningKey {
    let text = String::from_utf8(key_pem(own).to_vec()).expect("PEM is text");
    read_key(Pem::Inline { key: "tls.key", text }, &pem(own)).expect("a key that signs")
}

/// The way of a server's key from the configuration to where it signs.
pub fn read_key(mut key: Pem, cert: &[u8]) -> Outcome<SigningKey> {
    let source = KeySource::open(&mut key)?;
    let names = KeyNames { key: source.name().to_owned(), cert: "own.pem".to_owned() };
    SigningKey::read(source.into(), cert, &names)
}

/// A key holder in this process, for one handshake.
pub fn signer(own: &Pair) -> Signer {
    let key = signing_key(own);
    Box::new(move |wanted| {
        key.sign(wanted)?.ok_or_else(|| Failure::system("sign", "the key isn't for this kind of signature"))
    })
}

/// Both ends of a finished or failed handshake. The client reads a byte, since only that tells it whether the
/// server accepted its certificate.
pub fn meet(server: Ssl, client: Ssl) -> (Outcome<Stream>, Outcome<Stream>) {
    let (near, far) = UnixStream::pair().expect("a socket pair");
    let accepting = thread::spawn(move || -> Outcome<Stream> {
        let mut stream = accepted(server.accept(near))?;
        // The handshake can be done here and the client gone: then what it said is in the next read.
        if stream.write_all(b"!").is_err() {
            return Err(read_failure(&mut stream));
        }
        let mut byte = [0];
        match stream.read_exact(&mut byte) {
            Ok(()) => Ok(stream),
            Err(e) => Err(failure_of_io(stream.ssl(), &e)),
        }
    });
    let dialled = accepted(client.connect(far)).and_then(|mut stream| {
        let mut byte = [0];
        stream.read_exact(&mut byte).map_err(|e| failure_of_io(stream.ssl(), &e))?;
        stream.write_all(b"!").map_err(|e| failure_of_io(stream.ssl(), &e))?;
        Ok(stream)
    });
    (accepting.join().expect("the server's thread"), dialled)
}

pub type Stream = SslStream<UnixStream>;

fn accepted(result: Result<Stream, HandshakeError<UnixStream>>) -> Outcome<Stream> {
    result.map_err(failure_of_connect)
}

fn read_failure(stream: &mut Stream) -> Failure {
    let mut byte = [0];
    let e = stream.read_exact(&mut byte).expect_err("a refusal");
    failure_of_io(stream.ssl(), &e)
}
