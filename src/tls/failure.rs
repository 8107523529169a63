//! Why a TLS connection failed, in a sentence that says whose fault it is and what to do.
//!
//! Three sources: our own verdict on the peer (`Notes`), an alert from the peer, and what OpenSSL
//! made of the bytes. In TLS 1.3 a client's handshake is done before the server has looked at the client's certificate,
//! so a client learns of its rejection by its first read: hand that read's error to [`failure_of_io`] or
//! [`failure_of_handshake`], too.

use std::io;

use openssl::error::ErrorStack;
use openssl::ssl::{self, ErrorCode, HandshakeError, SslRef};
use openssl::x509::X509VerifyResult;

use super::signing::signing_failure;
use super::verify::{Side, notes};
use super::{library, reason};
use crate::exit::{Exit, Failure};

/// The failure behind an error of a handshake, read or write on `ssl`.
pub fn failure_of_handshake(ssl: &SslRef, error: &ssl::Error) -> Failure {
    let peer = Side::peer_of(ssl);
    if let Some(refusal) = notes(ssl).and_then(|n| n.refusal.get()) {
        return refusal.clone();
    }
    if let Some(failure) = signing_failure(ssl) {
        return failure;
    }
    if let Some(errors) = error.ssl_error() {
        return of_stack(ssl, peer, errors);
    }
    if let Some(e) = error.io_error() {
        return Failure::new(Exit::Tls, format!("the TLS connection to the {peer} broke: {e}"));
    }
    match error.code() {
        ErrorCode::ZERO_RETURN => Failure::new(Exit::Tls, format!("the {peer} closed the TLS connection")),
        ErrorCode::WANT_READ | ErrorCode::WANT_WRITE => {
            Failure::new(Exit::Tls, format!("the {peer} didn't finish the TLS handshake in time"))
        }
        _ => cut_off(peer),
    }
}

/// What a failed handshake says of a client, beyond what its failure's exit code does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stranger {
    /// It doesn't speak TLS 1.3 with our protocol in it.
    Garbage,
    /// It showed no certificate.
    NoCertificate,
    /// It went away, or wouldn't have ours.
    Left,
}

/// The same for whoever limits clients by what they do.
pub fn stranger(error: &ssl::Error) -> Stranger {
    if let Some(io) = error.io_error() {
        // Not the system's: the cap on what a stranger may send.
        return if io.kind() == io::ErrorKind::Other { Stranger::Garbage } else { Stranger::Left };
    }
    let Some(errors) = error.ssl_error() else { return Stranger::Left };
    let first = errors.errors().iter().find(|e| e.library_code() == LIBRARY_SSL).map(|e| e.reason_code());
    match first {
        Some(NO_PEER_CERTIFICATE) => Stranger::NoCertificate,
        Some(UNEXPECTED_EOF) => Stranger::Left,
        Some(alert) if u8::try_from(alert - ALERTS).is_ok() => Stranger::Left,
        _ => Stranger::Garbage,
    }
}

/// The failure behind what [`ssl::Ssl::connect`] or [`ssl::Ssl::accept`] gave back.
pub fn failure_of_connect<S>(error: HandshakeError<S>) -> Failure {
    match error {
        HandshakeError::SetupFailure(errors) => library("preparing a TLS connection", &errors),
        HandshakeError::Failure(mid) | HandshakeError::WouldBlock(mid) => {
            failure_of_handshake(mid.ssl(), mid.error())
        }
    }
}

/// The failure behind an error of [`io::Read`] or [`io::Write`] on a stream over `ssl`.
pub fn failure_of_io(ssl: &SslRef, error: &io::Error) -> Failure {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<ssl::Error>()) {
        Some(inner) => failure_of_handshake(ssl, inner),
        None => {
            let peer = Side::peer_of(ssl);
            Failure::new(Exit::Tls, format!("the TLS connection to the {peer} broke: {error}"))
        }
    }
}

fn of_stack(ssl: &SslRef, peer: Side, errors: &ErrorStack) -> Failure {
    let ours = errors.errors().iter().filter(|e| e.library_code() == LIBRARY_SSL).map(|e| e.reason_code());
    for code in ours {
        if let Ok(alert) = u8::try_from(code - ALERTS) {
            return of_alert(peer, alert, &reason(errors));
        }
        let (exit, text) = match code {
            VERIFY_FAILED if ssl.verify_result() != X509VerifyResult::OK => (
                Exit::CertificateForeign,
                format!("the {peer}'s certificate is refused: {}", ssl.verify_result()),
            ),
            NO_PEER_CERTIFICATE => {
                (Exit::Tls, format!("the {peer} showed no certificate: it needs one of our CA"))
            }
            UNSUPPORTED_PROTOCOL | WRONG_SSL_VERSION | VERSION_TOO_LOW => {
                (Exit::Tls, format!("the {peer} doesn't speak TLS 1.3, the only version allowed"))
            }
            WRONG_VERSION_NUMBER | HTTP_REQUEST | HTTPS_PROXY_REQUEST | RECORD_TOO_LONG => {
                (Exit::Tls, format!("the {peer} doesn't speak TLS: is it another service's port?"))
            }
            NO_APPLICATION_PROTOCOL => {
                (Exit::Tls, format!("the {peer} doesn't speak tunguard/1 (ALPN): is it another version?"))
            }
            UNEXPECTED_EOF => return cut_off(peer),
            _ => continue,
        };
        return Failure::new(exit, text);
    }
    Failure::new(Exit::Tls, format!("the TLS connection to the {peer} failed: {}", reason(errors)))
}

/// An alert is the peer's word before it was authenticated: believed for the text, never for what we do.
fn of_alert(peer: Side, alert: u8, reason: &str) -> Failure {
    let rejected =
        |exit, why: &str| Failure::new(exit, format!("the {peer} rejected our certificate: {why}"));
    match alert {
        40 => Failure::new(
            Exit::Tls,
            format!("the {peer} refused the TLS handshake (handshake failure): the {peer}'s log says why"),
        ),
        42 => rejected(
            Exit::CertificateForeign,
            "bad certificate (its name, or not valid yet by the clock there): the log there says which",
        ),
        43 => rejected(Exit::CertificateForeign, "unsupported certificate (issued for another use)"),
        44 => rejected(Exit::CertificateRevoked, "certificate revoked: ask for another"),
        45 => rejected(Exit::CertificateExpired, "certificate expired: ask for another, or check the clocks"),
        46 => rejected(Exit::CertificateForeign, "certificate unknown"),
        48 => rejected(
            Exit::CertificateForeign,
            "unknown CA: it must be signed by the CA the other side trusts",
        ),
        49 => rejected(Exit::CertificateForeign, "access denied"),
        51 => rejected(Exit::CertificateForeign, "decrypt error: its signature doesn't fit the CA there"),
        70 => Failure::new(Exit::Tls, format!("the {peer} doesn't speak TLS 1.3, the only version allowed")),
        116 => rejected(Exit::CertificateForeign, "certificate required, and we showed none"),
        120 => Failure::new(
            Exit::Tls,
            format!("the {peer} doesn't speak tunguard/1 (ALPN): is it another version?"),
        ),
        _ => Failure::new(
            Exit::Tls,
            format!("the {peer} ended the TLS connection with alert {alert}: {reason}"),
        ),
    }
}

fn cut_off(peer: Side) -> Failure {
    Failure::new(Exit::Tls, format!("the {peer} dropped the connection without a TLS close"))
}

/// ERR_LIB_SSL of include/openssl/err.h.
const LIBRARY_SSL: i32 = 20;

// SSL_R_* of include/openssl/sslerr.h. An alert from the peer is its number plus SSL_AD_REASON_OFFSET.
const ALERTS: i32 = 1000;
const VERIFY_FAILED: i32 = 134;
const HTTPS_PROXY_REQUEST: i32 = 155;
const HTTP_REQUEST: i32 = 156;
const RECORD_TOO_LONG: i32 = 198;
const NO_PEER_CERTIFICATE: i32 = 199;
const NO_APPLICATION_PROTOCOL: i32 = 235;
const UNSUPPORTED_PROTOCOL: i32 = 258;
const WRONG_SSL_VERSION: i32 = 266;
const WRONG_VERSION_NUMBER: i32 = 267;
const UNEXPECTED_EOF: i32 = 294;
const VERSION_TOO_LOW: i32 = 396;
