//! Throw-away certificates, made fast: no index, no locks, no fsync.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName,
    SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509NameBuilder};
use zeroize::Zeroizing;

use tunguard::exit::{Failure, Outcome};
use tunguard::tls::Credentials;

/// Makes `ca.pem`, `server.pem`, `server.key` and `count` clients in `dir`.
pub fn mint(dir: &Path, count: usize, server: IpAddr) -> Outcome<()> {
    let io = |e: std::io::Error| Failure::system(format!("write {}", dir.display()), e);
    let ssl = |e: ErrorStack| Failure::system("make a certificate", e);
    fs::create_dir_all(dir).map_err(io)?;
    let (ca, ca_key) = authority().map_err(ssl)?;
    fs::write(dir.join("ca.pem"), ca.to_pem().map_err(ssl)?).map_err(io)?;
    let issue = |name: &str, san: Option<IpAddr>| -> Outcome<()> {
        let (cert, key) = leaf(name, san, &ca, &ca_key).map_err(ssl)?;
        fs::write(dir.join(format!("{name}.pem")), cert.to_pem().map_err(ssl)?).map_err(io)?;
        fs::write(dir.join(format!("{name}.key")), key.private_key_to_pem_pkcs8().map_err(ssl)?).map_err(io)
    };
    issue("server", Some(server))?;
    (0..count).try_for_each(|i| issue(&client_name(i), None))
}

/// The credentials of client number `i`.
pub fn client(dir: &Path, i: usize) -> Outcome<Credentials> {
    let read = |file: String| {
        fs::read(dir.join(&file)).map_err(|e| Failure::system(format!("read {file}: run mint first"), e))
    };
    let name = client_name(i);
    Ok(Credentials {
        ca: read("ca.pem".into())?,
        cert: read(format!("{name}.pem"))?,
        key: Zeroizing::new(read(format!("{name}.key"))?),
    })
}

fn client_name(i: usize) -> String {
    format!("swarm-{i:05}")
}

fn authority() -> Result<(X509, PKey<Private>), ErrorStack> {
    let key = key()?;
    let mut builder = base("swarm CA", &key)?;
    let name = builder_name("swarm CA")?;
    builder.set_issuer_name(&name.build())?;
    builder.append_extension(BasicConstraints::new().critical().ca().build()?)?;
    builder.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
    let identifier = SubjectKeyIdentifier::new().build(&builder.x509v3_context(None, None))?;
    builder.append_extension(identifier)?;
    builder.sign(&key, MessageDigest::sha256())?;
    Ok((builder.build(), key))
}

fn leaf(
    name: &str,
    san: Option<IpAddr>,
    ca: &X509,
    ca_key: &PKey<Private>,
) -> Result<(X509, PKey<Private>), ErrorStack> {
    let key = key()?;
    let mut builder = base(name, &key)?;
    builder.set_issuer_name(ca.subject_name())?;
    builder.append_extension(BasicConstraints::new().critical().build()?)?;
    builder.append_extension(KeyUsage::new().critical().digital_signature().build()?)?;
    let usage = match san {
        Some(_) => ExtendedKeyUsage::new().server_auth().build()?,
        None => ExtendedKeyUsage::new().client_auth().build()?,
    };
    builder.append_extension(usage)?;
    if let Some(ip) = san {
        let context = builder.x509v3_context(Some(ca), None);
        let extension = SubjectAlternativeName::new().ip(&ip.to_string()).build(&context)?;
        builder.append_extension(extension)?;
    }
    let context = builder.x509v3_context(Some(ca), None);
    let identifier = AuthorityKeyIdentifier::new().keyid(true).build(&context)?;
    builder.append_extension(identifier)?;
    builder.sign(ca_key, MessageDigest::sha256())?;
    Ok((builder.build(), key))
}

fn base(name: &str, key: &PKey<Private>) -> Result<X509Builder, ErrorStack> {
    let mut builder = X509Builder::new()?;
    builder.set_version(2)?;
    let mut serial = BigNum::new()?;
    serial.rand(127, MsbOption::MAYBE_ZERO, false)?;
    let serial = serial.to_asn1_integer()?;
    builder.set_serial_number(&serial)?;
    let subject = builder_name(name)?.build();
    builder.set_subject_name(&subject)?;
    let (from, to) = (Asn1Time::days_from_now(0)?, Asn1Time::days_from_now(30)?);
    builder.set_not_before(&from)?;
    builder.set_not_after(&to)?;
    builder.set_pubkey(key)?;
    Ok(builder)
}

fn builder_name(name: &str) -> Result<X509NameBuilder, ErrorStack> {
    let mut builder = X509NameBuilder::new()?;
    builder.append_entry_by_nid(Nid::COMMONNAME, name)?;
    Ok(builder)
}

fn key() -> Result<PKey<Private>, ErrorStack> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    PKey::from_ec_key(EcKey::generate(&group)?)
}
