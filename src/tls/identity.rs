//! Who is at the other end: the certificate's common name, and the certificate itself by issuer and serial.

use std::fmt;

use openssl::nid::Nid;
use openssl::sha::sha256;
use openssl::ssl::SslRef;
use openssl::x509::{X509Ref, X509VerifyResult};
use serde::{Deserialize, Serialize};

use super::revoked::Revoked;
use super::verify::Side;
use super::{ALPN, library, time};
use crate::exit::{Exit, Failure, Outcome};

/// A client, as its certificate names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The common name: 1 to 64 graphic ASCII characters without '/', spaces only between them. So it is safe
    /// in a log line, a file name and a table.
    pub name: String,
    /// The certificate that proved it.
    pub cert: CertId,
}

/// One certificate, the way revocation lists name it.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CertId {
    /// SHA-256 of the issuer's name in DER.
    pub issuer: [u8; 32],
    /// Serial number, big-endian, 1 to 20 bytes.
    pub serial: Vec<u8>,
    /// Last second of validity, in seconds since 1970.
    pub not_after: i64,
}

/// Who the client at the other end of a finished handshake is. The server's step from a TLS connection to an
/// identity; it trusts nothing the handshake may have left unchecked.
///
/// `revoked` is the list as of now: it may be newer than the one the handshake was made with.
pub fn peer_identity(ssl: &SslRef, revoked: Option<&Revoked>) -> Outcome<Identity> {
    let cert = confirm_peer(ssl, revoked)?;
    let leaf = ssl.peer_certificate().ok_or_else(no_certificate)?;
    Ok(Identity { name: common_name(&leaf)?, cert })
}

/// Checks a finished handshake without asking for a name: certificate shown and verified, protocol agreed,
/// nothing revoked. A client has checked its server's name in the handshake and needs no more than this.
pub fn confirm_peer(ssl: &SslRef, revoked: Option<&Revoked>) -> Outcome<CertId> {
    if !ssl.is_init_finished() {
        return Err(Failure::new(Exit::Tls, "the TLS handshake is not finished"));
    }
    if ssl.selected_alpn_protocol() != Some(ALPN) {
        return Err(no_protocol());
    }
    let leaf = ssl.peer_certificate().ok_or_else(no_certificate)?;
    let verdict = ssl.verify_result();
    if verdict != X509VerifyResult::OK {
        return Err(Failure::new(
            Exit::CertificateForeign,
            format!("the peer's certificate is not trusted: {verdict}"),
        ));
    }
    if ssl.session_reused() {
        return confirm_again(&leaf, revoked, Side::peer_of(ssl));
    }
    if let Some(revoked) = revoked {
        let chain = ssl.verified_chain().ok_or_else(no_certificate)?;
        revoked.check_chain(chain.iter(), Side::peer_of(ssl)).map_err(|(_, failure)| failure)?;
    }
    CertId::of(&leaf)
}

/// A resumed session shows no chain: that of the certificate it began with was checked then, and the server drops all
/// tickets when what it trusts changes. What time and lists say of the certificate itself is looked at again.
fn confirm_again(leaf: &X509Ref, revoked: Option<&Revoked>, peer: Side) -> Outcome<CertId> {
    let cert = CertId::of(leaf)?;
    if cert.not_after < time::wall_clock() {
        let text = format!("the {peer}'s certificate expired on {}: renew it", time::date(cert.not_after));
        return Err(Failure::new(Exit::CertificateExpired, text));
    }
    if revoked.is_some_and(|revoked| revoked.contains(&cert)) {
        let text = format!("the {peer}'s certificate {} is revoked", shown_name(leaf));
        return Err(Failure::new(Exit::CertificateRevoked, text));
    }
    Ok(cert)
}

impl CertId {
    /// The ID of `cert`; refuses serials that RFC 5280 section 4.1.2.2 forbids.
    pub fn of(cert: &X509Ref) -> Outcome<CertId> {
        let broken = |e| library("reading a certificate", &e);
        let serial = cert.serial_number().to_bn().map_err(broken)?;
        if serial.is_negative() || serial.num_bytes() > 20 {
            return Err(Failure::new(
                Exit::CertificateForeign,
                format!(
                    "the certificate {} has a serial number that is negative or longer than 20 bytes: issue another",
                    shown_name(cert)
                ),
            ));
        }
        Ok(CertId {
            issuer: sha256(&cert.issuer_name().to_der().map_err(broken)?),
            serial: canonical(serial.to_vec()),
            not_after: time::unix(cert.not_after()).map_err(broken)?,
        })
    }

    /// The serial number in hexadecimal, as `openssl x509 -serial` prints it.
    pub fn serial_hex(&self) -> String {
        hex(&self.serial)
    }
}

impl fmt::Debug for CertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CertId(serial {}, until {})", self.serial_hex(), time::utc(self.not_after))
    }
}

/// The one common name of `cert`, if it can be an identity.
pub fn common_name(cert: &X509Ref) -> Outcome<String> {
    let refuse = |why: String| {
        Failure::new(
            Exit::CertificateForeign,
            format!("{why}: issue one whose common name is 1 to 64 printable ASCII characters without '/'"),
        )
    };
    let names = common_names(cert);
    match names.as_slice() {
        [] => Err(refuse("the client's certificate has no common name".to_owned())),
        [name] if acceptable(name) => Ok(name.clone()),
        [name] => Err(refuse(format!("the client's certificate has the common name {}", escaped(name)))),
        _ => Err(refuse(format!("the client's certificate has {} common names", names.len()))),
    }
}

/// What a certificate calls itself, escaped, for an error's text: its first common name or else its whole
/// subject.
pub(crate) fn shown_name(cert: &X509Ref) -> String {
    match common_names(cert).first() {
        Some(name) => escaped(name),
        None => {
            format!("serial {}", cert.serial_number().to_bn().map_or(String::new(), |n| hex(&n.to_vec())))
        }
    }
}

/// Text from a peer, safe to print: quoted, escaped, and not longer than a line.
pub(crate) fn escaped(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_default).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push_str("...");
    }
    format!("\"{shown}\"")
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02X}")).collect()
}

/// A serial's bytes with zero as one byte, so that equal numbers have equal bytes.
pub(crate) fn canonical(serial: Vec<u8>) -> Vec<u8> {
    if serial.is_empty() { vec![0] } else { serial }
}

pub(crate) fn no_protocol() -> Failure {
    Failure::new(
        Exit::Tls,
        "the peer doesn't speak tunguard/1 (ALPN): is it another service, or another version?",
    )
}

fn no_certificate() -> Failure {
    Failure::new(Exit::Tls, "the peer showed no certificate")
}

fn common_names(cert: &X509Ref) -> Vec<String> {
    // A name that can't be converted stays in the list as one that nobody can accept.
    cert.subject_name()
        .entries_by_nid(Nid::COMMONNAME)
        .map(|entry| entry.data().to_string().unwrap_or_else(|_| "\u{fffd}".to_owned()))
        .collect()
}

/// Whether a name is a client's: 1 to 64 printable ASCII characters, no '/', no space at either end.
pub fn acceptable(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'/')
        && !name.starts_with(' ')
        && !name.ends_with(' ')
}

/// Characters of a peer's text that an error shows.
const SHOWN: usize = 64;

#[cfg(test)]
mod tests {
    use openssl::asn1::{Asn1Integer, Asn1Time};
    use openssl::bn::BigNum;
    use openssl::error::ErrorStack;
    use openssl::hash::MessageDigest;
    use openssl::pkey::PKey;
    use openssl::x509::{X509, X509Builder};

    use super::*;

    #[test]
    fn names_are_accepted_or_refused() {
        let long = "x".repeat(64);
        for good in ["a", "alice", "Alice Example", "alice@example.org", "a.b-c_d", "..", "'\"\\$`", &long] {
            assert!(acceptable(good), "{good:?}");
        }
        let too_long = "x".repeat(65);
        for bad in [
            "",
            " ",
            " a",
            "a ",
            "a\nb",
            "a\x1b[2Jb",
            "a\0b",
            "a\x7f",
            "a/b",
            "../x",
            "\u{fc}",
            "a\u{202e}b",
            &too_long,
        ] {
            assert!(!acceptable(bad), "{bad:?}");
        }
    }

    /// With serial number 7, until so many seconds from now.
    fn cert(seconds: i64) -> X509 {
        let make = || -> Result<X509, ErrorStack> {
            let key = PKey::generate_ed25519()?;
            let mut cert = X509Builder::new()?;
            cert.set_serial_number(&*Asn1Integer::from_bn(&*BigNum::from_u32(7)?)?)?;
            cert.set_not_before(&*Asn1Time::from_unix(0)?)?;
            cert.set_not_after(&*Asn1Time::from_unix(time::wall_clock() + seconds)?)?;
            cert.set_pubkey(&key)?;
            cert.sign(&key, MessageDigest::null())?;
            Ok(cert.build())
        };
        make().expect("a certificate")
    }

    #[test]
    fn who_comes_again_is_still_judged_by_time() {
        let good = cert(3_600);
        let id = confirm_again(&good, None, Side::Client).expect("valid");
        assert_eq!((id.serial_hex().as_str(), id), ("07", CertId::of(&good).expect("an ID")));
        for seconds in [-1, -3_600] {
            let refused = confirm_again(&cert(seconds), None, Side::Client).map_err(|failure| failure.exit);
            assert_eq!(refused, Err(Exit::CertificateExpired), "{seconds}");
        }
    }

    #[test]
    fn an_id_says_little_in_a_log() {
        let id = CertId { issuer: [9; 32], serial: vec![0x0a, 0xbc], not_after: 0 };
        assert_eq!(format!("{id:?}"), "CertId(serial 0ABC, until 1970-01-01 00:00:00 UTC)");
    }

    #[test]
    fn text_of_a_peer_is_printed_escaped_and_short() {
        assert_eq!(escaped("a\n\x1b[31m\"\u{202e}"), r#""a\n\u{1b}[31m\"\u{202e}""#);
        assert_eq!(escaped(&"x".repeat(5_000)).len(), 64 + 5);
    }
}
