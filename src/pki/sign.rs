//! Certificates and revocation lists, made and signed; no files.

use std::collections::BTreeMap;

use openssl::asn1::{Asn1Integer, Asn1Time};
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, CrlNumber, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName,
    SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509Crl, X509CrlBuilder, X509Name, X509Ref, X509RevokedBuilder};

use super::names::AltName;
use crate::tls::identity::{canonical, hex};
use crate::tls::time::{self, DAY};
use crate::tls::verify::Side;

/// A certificate to be.
pub struct Request<'a> {
    pub name: &'a str,
    pub side: Side,
    pub alt_names: &'a [AltName],
    pub not_before: i64,
    pub not_after: i64,
}

/// A new authority: its certificate, signed by itself, and its key.
pub fn authority(name: &str, now: i64) -> Result<(X509, PKey<Private>), ErrorStack> {
    let key = new_key()?;
    let (mut cert, _) = builder(name, &key, now - BACKDATED, now + AUTHORITY_DAYS * DAY)?;
    cert.set_issuer_name(&*subject(name)?)?;
    // It signs clients and servers, never another authority.
    cert.append_extension(BasicConstraints::new().critical().ca().pathlen(0).build()?)?;
    cert.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
    let id = SubjectKeyIdentifier::new().build(&cert.x509v3_context(None, None))?;
    cert.append_extension(id)?;
    cert.sign(&key, MessageDigest::sha256())?;
    Ok((cert.build(), key))
}

/// A certificate signed by `ca`, its new key, and its serial number in hexadecimal.
pub fn certificate(
    ca: &X509Ref,
    ca_key: &PKey<Private>,
    request: &Request<'_>,
) -> Result<(X509, PKey<Private>, String), ErrorStack> {
    let key = new_key()?;
    let (mut cert, serial) = builder(request.name, &key, request.not_before, request.not_after)?;
    cert.set_issuer_name(ca.subject_name())?;
    cert.append_extension(BasicConstraints::new().critical().build()?)?;
    cert.append_extension(KeyUsage::new().critical().digital_signature().build()?)?;
    let mut usage = ExtendedKeyUsage::new();
    match request.side {
        Side::Server => usage.server_auth(),
        Side::Client => usage.client_auth(),
    };
    cert.append_extension(usage.build()?)?;
    let id = SubjectKeyIdentifier::new().build(&cert.x509v3_context(Some(ca), None))?;
    cert.append_extension(id)?;
    let issuer_id = AuthorityKeyIdentifier::new().keyid(true).build(&cert.x509v3_context(Some(ca), None))?;
    cert.append_extension(issuer_id)?;
    if !request.alt_names.is_empty() {
        let mut names = SubjectAlternativeName::new();
        for name in request.alt_names {
            match name {
                AltName::Dns(host) => names.dns(host),
                AltName::Ip(ip) => names.ip(&ip.to_string()),
            };
        }
        let names = names.build(&cert.x509v3_context(Some(ca), None))?;
        cert.append_extension(names)?;
    }
    cert.sign(ca_key, MessageDigest::sha256())?;
    Ok((cert.build(), key, serial))
}

/// A revocation list of the serials (in hexadecimal) in `revoked`, each with its time.
pub fn revocations(
    ca: &X509Ref,
    ca_key: &PKey<Private>,
    revoked: &BTreeMap<String, i64>,
    now: i64,
) -> Result<X509Crl, ErrorStack> {
    let mut crl = X509CrlBuilder::new()?;
    crl.set_issuer_name(ca.subject_name())?;
    crl.set_last_update(&*asn1(now - BACKDATED)?)?;
    crl.set_next_update(&*asn1(now + LIST_DAYS * DAY)?)?;
    for (serial, at) in revoked {
        let mut entry = X509RevokedBuilder::new()?;
        entry.set_serial_number(&*Asn1Integer::from_bn(&*BigNum::from_hex_str(serial)?)?)?;
        entry.set_revocation_date(&*asn1(*at)?)?;
        crl.add_revoked(entry.build())?;
    }
    crl.sort()?;
    let context = X509Builder::new()?;
    let issuer_id =
        AuthorityKeyIdentifier::new().keyid(true).build(&context.x509v3_context(Some(ca), None))?;
    crl.append_extension(issuer_id)?;
    // Must grow from list to list (RFC 5280 section 5.2.3). Time does, and nothing has to remember it; lists of the
    // same second differ in length, since entries are never taken out.
    let number = (now.max(0).unsigned_abs() << 20) | (revoked.len() as u64 & 0xf_ffff);
    crl.append_extension(CrlNumber::new(BigNum::from_slice(&number.to_be_bytes())?)?.build()?)?;
    crl.sign(ca_key, MessageDigest::sha256())?;
    crl.build()
}

/// What `crl` says: serial in hexadecimal -> time of revocation.
pub fn revoked(crl: &X509Crl) -> Result<BTreeMap<String, i64>, ErrorStack> {
    let mut found = BTreeMap::new();
    for entry in crl.get_revoked().into_iter().flatten() {
        let serial = hex(&canonical(entry.serial_number().to_bn()?.to_vec()));
        found.insert(serial, time::unix(entry.revocation_date())?);
    }
    Ok(found)
}

/// The serial number of `cert` in hexadecimal.
pub fn serial(cert: &X509Ref) -> String {
    cert.serial_number().to_bn().map_or(String::new(), |n| hex(&canonical(n.to_vec())))
}

/// An unencrypted private key. An encrypted one is refused here, since OpenSSL would ask on the terminal.
pub fn private_key(pem: &[u8]) -> Option<PKey<Private>> {
    if pem.windows(9).any(|w| w == b"ENCRYPTED") {
        return None;
    }
    PKey::private_key_from_pem_callback(pem, |_| Ok(0)).ok()
}

/// What every certificate has, and the serial number it got.
fn builder(
    name: &str,
    key: &PKey<Private>,
    not_before: i64,
    not_after: i64,
) -> Result<(X509Builder, String), ErrorStack> {
    let mut cert = X509Builder::new()?;
    cert.set_version(2)?;
    let (number, serial) = new_serial()?;
    cert.set_serial_number(&number)?;
    cert.set_subject_name(&*subject(name)?)?;
    cert.set_pubkey(key)?;
    cert.set_not_before(&*asn1(not_before)?)?;
    cert.set_not_after(&*asn1(not_after)?)?;
    Ok((cert, serial))
}

fn subject(name: &str) -> Result<X509Name, ErrorStack> {
    let mut subject = X509Name::builder()?;
    subject.append_entry_by_nid(Nid::COMMONNAME, name)?;
    Ok(subject.build())
}

/// 128 random bits, the highest of them set: positive, and always 32 digits.
fn new_serial() -> Result<(Asn1Integer, String), ErrorStack> {
    let mut number = BigNum::new()?;
    number.rand(128, MsbOption::ONE, false)?;
    Ok((Asn1Integer::from_bn(&number)?, hex(&number.to_vec())))
}

fn new_key() -> Result<PKey<Private>, ErrorStack> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    PKey::from_ec_key(EcKey::generate(&group)?)
}

fn asn1(unix: i64) -> Result<Asn1Time, ErrorStack> {
    Asn1Time::from_unix(unix)
}

/// Everything begins this many seconds early, for machines whose clock is late.
pub const BACKDATED: i64 = 300;

const AUTHORITY_DAYS: i64 = 3_653;
/// As long as the authority: a server without a valid list accepts nobody, and in a lab nobody renews one.
const LIST_DAYS: i64 = 3_653;
