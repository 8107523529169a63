//! Our own certificate, key, CA and revocation list: read, checked, and carried to where TLS is done.
//!
//! A client's key is among them. A server's is not: see [`super::server_key`].

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, PKeyRef, Private};
use openssl::stack::Stack;
use openssl::x509::store::{X509Store, X509StoreBuilder};
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509PurposeId, X509Ref, X509StoreContext, X509VerifyResult};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::identity::{common_name, shown_name};
use super::revoked::Revoked;
use super::verify::Side;
use super::{clear_errors, library, reason, time};
use crate::config::client::ClientTls;
use crate::config::common::Pem;
use crate::config::server::ServerTls;
use crate::exit::{Exit, Failure, Outcome};

/// A client's PEM texts that have been checked against each other. They are sent to its tunnel process as they are.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// The CAs whose certificates we accept.
    pub ca: Vec<u8>,
    /// Our certificate, then intermediates if there are any.
    pub cert: Vec<u8>,
    /// Its private key, unencrypted.
    pub key: Zeroizing<Vec<u8>>,
}

/// A server's, nothing of which is secret. They are sent to its workers as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificates {
    /// The CAs whose certificates we accept.
    pub ca: Vec<u8>,
    /// Our certificate, then intermediates if there are any.
    pub cert: Vec<u8>,
    /// Revocation lists of the CAs.
    pub crl: Option<Vec<u8>>,
}

/// What both sides show and go by, parsed.
pub(crate) struct Loaded {
    /// The CAs.
    pub trust: X509Store,
    /// How errors name the first CA.
    pub ca_name: String,
    /// Our certificate.
    pub cert: X509,
    /// The intermediates we show with it.
    pub chain: Vec<X509>,
    /// What the CAs took back.
    pub revoked: Option<Revoked>,
}

impl Credentials {
    /// Reads and checks `[tls]` of a client, in the order in which an error is most useful: each text by itself, the
    /// key against the certificate, the certificate's dates and use, its signature.
    pub fn read_client(tls: &ClientTls) -> Outcome<Credentials> {
        let credentials = Credentials {
            ca: read_certificate(&tls.ca, "CA certificate", "tls.ca")?,
            cert: read_certificate(&tls.cert, "certificate", "tls.cert")?,
            key: read_key(&tls.key)
                .map_err(|e| unreadable(Exit::KeyUnreadable, "private key", &tls.key.name("tls.key"), e))?,
        };
        let sources = Sources::of_files(&tls.ca, &tls.cert, &tls.key, None);
        let (loaded, _) = credentials.load_from(&sources)?;
        check_own(Side::Client, &loaded, &sources)?;
        Ok(credentials)
    }

    /// Parses the texts again, in the process that uses them.
    pub(crate) fn load(&self) -> Outcome<(Loaded, PKey<Private>)> {
        self.load_from(&Sources::of_configuration())
    }

    fn load_from(&self, sources: &Sources) -> Outcome<(Loaded, PKey<Private>)> {
        clear_errors();
        let loaded = load(&self.ca, &self.cert, None, sources)?;
        let key = private_key(Side::Client, &self.key, &sources.key)?;
        match_key(&loaded.cert, &key, &sources.key, &sources.cert)?;
        Ok((loaded, key))
    }
}

impl Certificates {
    /// Reads and checks `[tls]` of a server, all but its key: each text by itself, the certificate's dates and use, its
    /// signature, the revocation list.
    pub fn read_server(tls: &ServerTls) -> Outcome<Certificates> {
        let crl = tls.crl.as_ref().map(|path| Pem::File(path.clone()));
        let certificates = Certificates {
            ca: read_certificate(&tls.ca, "CA certificate", "tls.ca")?,
            cert: read_certificate(&tls.cert, "certificate", "tls.cert")?,
            crl: read_list(crl.as_ref())?,
        };
        let sources = Sources::of_files(&tls.ca, &tls.cert, &tls.key, crl.as_ref());
        let loaded = certificates.load_from(&sources)?;
        check_own(Side::Server, &loaded, &sources)?;
        Ok(certificates)
    }

    /// The same with the revocation list as it is now where `tls` says. Errors: it can't be read, isn't one, or isn't
    /// one of these CAs'.
    pub fn with_list_of(&self, tls: &ServerTls) -> Outcome<Certificates> {
        let crl = tls.crl.as_ref().map(|path| Pem::File(path.clone()));
        let certificates = Certificates { crl: read_list(crl.as_ref())?, ..self.clone() };
        certificates.load_from(&Sources::of_files(&tls.ca, &tls.cert, &tls.key, crl.as_ref()))?;
        Ok(certificates)
    }

    /// Parses the texts again, in the process that uses them.
    pub(crate) fn load(&self) -> Outcome<Loaded> {
        self.load_from(&Sources::of_configuration())
    }

    fn load_from(&self, sources: &Sources) -> Outcome<Loaded> {
        clear_errors();
        load(&self.ca, &self.cert, self.crl.as_deref(), sources)
    }
}

fn load(ca: &[u8], cert: &[u8], crl: Option<&[u8]>, sources: &Sources) -> Outcome<Loaded> {
    let cas = certificates(ca, "CA certificate", &sources.ca)?;
    let mut own = certificates(cert, "certificate", &sources.cert)?;
    let cert = own.remove(0);
    let revoked = match crl {
        Some(crl) => Some(
            Revoked::parse(crl, ca).map_err(|f| f.context(sources.crl.as_deref().unwrap_or("tls.crl")))?,
        ),
        None => None,
    };
    let ca_name = shown_name(&cas[0]);
    let trust = store(cas, None).map_err(|e| library("setting up the trusted CAs", &e))?;
    Ok(Loaded { trust, ca_name, cert, chain: own, revoked })
}

/// Refuses a key that isn't the certificate's.
pub(super) fn match_key(
    cert: &X509Ref,
    key: &PKeyRef<Private>,
    key_source: &str,
    cert_source: &str,
) -> Outcome<()> {
    let theirs = cert.public_key().is_ok_and(|public| public.public_eq(key));
    clear_errors();
    if theirs {
        return Ok(());
    }
    Err(Failure::new(
        Exit::KeyMismatch,
        format!("the private key {key_source} doesn't belong to the certificate {cert_source}"),
    ))
}

impl fmt::Debug for Credentials {
    // The key must not reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("ca", &format_args!("{} bytes", self.ca.len()))
            .field("cert", &format_args!("{} bytes", self.cert.len()))
            .field("key", &format_args!("hidden"))
            .finish()
    }
}

/// What errors call each text.
struct Sources {
    ca: String,
    cert: String,
    key: String,
    crl: Option<String>,
}

impl Sources {
    fn of_files(ca: &Pem, cert: &Pem, key: &Pem, crl: Option<&Pem>) -> Sources {
        Sources {
            ca: ca.name("tls.ca"),
            cert: cert.name("tls.cert"),
            key: key.name("tls.key"),
            crl: crl.map(|crl| crl.name("tls.crl")),
        }
    }

    /// Where the texts came from is not known any more.
    fn of_configuration() -> Sources {
        Sources {
            ca: "tls.ca".to_owned(),
            cert: "tls.cert".to_owned(),
            key: "tls.key".to_owned(),
            crl: Some("tls.crl".to_owned()),
        }
    }
}

/// Everything that would make each peer refuse us, found before anyone is asked.
fn check_own(side: Side, loaded: &Loaded, sources: &Sources) -> Outcome<()> {
    let cert = &loaded.cert;
    let source = &sources.cert;
    let dates = time::unix(cert.not_before()).and_then(|begin| Ok((begin, time::unix(cert.not_after())?)));
    let (begin, end) = dates.map_err(|e| {
        Failure::new(
            Exit::CertificateUnreadable,
            format!("the certificate {source} has dates that can't be read: {}", reason(&e)),
        )
    })?;
    let now = time::wall_clock();
    if now < begin {
        return Err(Failure::new(
            Exit::CertificateExpired,
            format!(
                "the certificate {source} is valid only from {}, and this machine's clock says {}: correct the clock",
                time::utc(begin),
                time::utc(now)
            ),
        ));
    }
    if now > end {
        return Err(Failure::new(
            Exit::CertificateExpired,
            format!(
                "the certificate {source} expired on {} (this machine's clock says {}): issue another",
                time::utc(end),
                time::utc(now)
            ),
        ));
    }
    if !side.use_allowed(cert) {
        return Err(Failure::new(
            Exit::CertificateForeign,
            format!(
                "the certificate {source} can't be used by a {side} (its extended key usage lacks {}): issue one with \
                 `tunguard pki {side}`",
                side.use_name()
            ),
        ));
    }
    if side == Side::Client {
        common_name(cert).map_err(|f| f.context(source))?;
    }
    let result =
        verify(side, loaded).map_err(|e| library(&format!("verifying the certificate {source}"), &e))?;
    if [X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED].contains(&result.as_raw()) {
        return Err(Failure::new(
            Exit::CertificateExpired,
            format!(
                "a CA certificate above {source}, in {} or beside it, is not valid today: {result}",
                sources.ca
            ),
        ));
    }
    if result != X509VerifyResult::OK {
        return Err(Failure::new(
            Exit::CertificateForeign,
            format!(
                "the certificate {source} is not signed by the CA {} of {}: {result}",
                loaded.ca_name, sources.ca
            ),
        ));
    }
    Ok(())
}

/// Whether a peer with the same CA would accept our chain.
fn verify(side: Side, loaded: &Loaded) -> Result<X509VerifyResult, ErrorStack> {
    let purpose = match side {
        Side::Client => X509PurposeId::SSL_CLIENT,
        Side::Server => X509PurposeId::SSL_SERVER,
    };
    let trust = store(loaded.trust.all_certificates(), Some(purpose))?;
    let mut chain = Stack::new()?;
    for cert in &loaded.chain {
        chain.push(cert.clone())?;
    }
    let mut context = X509StoreContext::new()?;
    let result = context.init(&trust, &loaded.cert, &chain, |c| {
        c.verify_cert()?;
        Ok(c.error())
    });
    clear_errors();
    result
}

/// The CAs as trust anchors: each for itself, so that a CA below a bigger one needs only its own certificate here.
fn store(
    cas: impl IntoIterator<Item = X509>,
    purpose: Option<X509PurposeId>,
) -> Result<X509Store, ErrorStack> {
    let mut store = X509StoreBuilder::new()?;
    for ca in cas {
        store.add_cert(ca)?;
    }
    if let Some(purpose) = purpose {
        let mut param = X509VerifyParam::new()?;
        param.set_purpose(purpose)?;
        param.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
        store.set_param(&param)?;
    }
    Ok(store.build())
}

pub(super) fn certificates(pem: &[u8], what: &str, source: &str) -> Outcome<Vec<X509>> {
    let fail = |why: &str| {
        Failure::new(Exit::CertificateUnreadable, format!("the {what} {source} can't be read: {why}"))
    };
    let certs = X509::stack_from_pem(pem).map_err(|e| fail(&reason(&e)))?;
    if certs.is_empty() {
        return Err(fail("there is no PEM certificate in it"));
    }
    Ok(certs)
}

pub(super) fn private_key(side: Side, pem: &[u8], source: &str) -> Outcome<PKey<Private>> {
    let fail = |why: &str| {
        Failure::new(Exit::KeyUnreadable, format!("the private key {source} can't be used: {why}"))
    };
    // Said before OpenSSL is asked, which would prompt on the terminal.
    if pem.windows(ENCRYPTED.len()).any(|w| w == ENCRYPTED) {
        return Err(fail(
            "it is encrypted, and there is nobody to ask: decrypt it with `openssl pkey`, mode 0600",
        ));
    }
    let no_password = |_: &mut [u8]| Ok(0);
    let key = PKey::private_key_from_pem_callback(pem, no_password).map_err(|e| {
        if pem.windows(PRIVATE.len()).any(|w| w == PRIVATE) {
            fail(&reason(&e))
        } else {
            fail("there is no PEM private key in it")
        }
    })?;
    if suitable(side, &key) {
        return Ok(key);
    }
    Err(fail(match side {
        Side::Client => "it must be P-256, P-384, P-521, Ed25519, or RSA with 2,048 to 4,096 bits",
        Side::Server => {
            "a server's must be P-256, P-384, P-521, or RSA with 2,048 to 4,096 bits, and not Ed25519, with which \
             the key holder can't sign: issue the server another certificate (`tunguard pki server` does)"
        }
    }))
}

fn suitable(side: Side, key: &PKeyRef<Private>) -> bool {
    match key.id() {
        Id::ED25519 => side == Side::Client,
        Id::RSA => (2048..=4096).contains(&key.bits()),
        Id::EC => key.ec_key().is_ok_and(|ec| {
            let curve = ec.group().curve_name();
            [Nid::X9_62_PRIME256V1, Nid::SECP384R1, Nid::SECP521R1].map(Some).contains(&curve)
        }),
        _ => false,
    }
}

fn read_pem(pem: &Pem) -> io::Result<Zeroizing<Vec<u8>>> {
    match pem {
        Pem::Inline { text, .. } => Ok(Zeroizing::new(text.clone().into_bytes())),
        Pem::File(path) => read_all(&mut File::open(path)?),
    }
}

fn read_list(crl: Option<&Pem>) -> Outcome<Option<Vec<u8>>> {
    let Some(crl) = crl else { return Ok(None) };
    let read = read_pem(crl);
    let read = read.map_err(|e| unreadable(Exit::Usage, "revocation list", &crl.name("tls.crl"), e))?;
    Ok(Some(read.to_vec()))
}

fn read_certificate(pem: &Pem, what: &str, key: &str) -> Outcome<Vec<u8>> {
    let read = read_pem(pem).map_err(|e| unreadable(Exit::CertificateUnreadable, what, &pem.name(key), e))?;
    Ok(read.to_vec())
}

fn read_key(pem: &Pem) -> io::Result<Zeroizing<Vec<u8>>> {
    let Pem::File(path) = pem else {
        return read_pem(pem);
    };
    let mut file = File::open(path)?;
    warn_if_exposed(&file, path)?;
    read_all(&mut file)
}

pub(super) fn warn_if_exposed(file: &File, path: &Path) -> io::Result<()> {
    let metadata = file.metadata()?;
    let mode = metadata.permissions().mode() & 0o777;
    if metadata.is_file() && mode & 0o077 != 0 {
        log::warn!("the private key {} is open to others (mode {mode:04o}): chmod 600 it", path.display());
    }
    Ok(())
}

fn read_all(file: &mut File) -> io::Result<Zeroizing<Vec<u8>>> {
    let size = file.metadata()?.len();
    read_sized(file, size)
}

/// Everything in `from`, which has `size` bytes as far as is known.
pub(super) fn read_sized(from: impl Read, size: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    // Sized ahead: a vector that grows leaves copies of a key behind.
    let size = usize::try_from(size).unwrap_or(0).min(LARGEST);
    let mut bytes = Zeroizing::new(Vec::with_capacity(size + 1));
    from.take(LARGEST as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > LARGEST {
        return Err(io::Error::other("it is larger than 16 MiB"));
    }
    Ok(bytes)
}

pub(super) fn unreadable(exit: Exit, what: &str, name: &str, error: io::Error) -> Failure {
    Failure::new(exit, format!("the {what} {name} can't be read: {error}"))
}

/// More than any list of ours; less than a mistake like /dev/zero.
const LARGEST: usize = 16 << 20;

/// In the header of both encrypted formats, PKCS #8 and the older one.
const ENCRYPTED: &[u8] = b"ENCRYPTED";
const PRIVATE: &[u8] = b"PRIVATE KEY-----";

// Of include/openssl/x509_vfy.h. Our own certificate's dates have been checked when these are looked for.
const X509_V_ERR_CERT_NOT_YET_VALID: i32 = 9;
const X509_V_ERR_CERT_HAS_EXPIRED: i32 = 10;
