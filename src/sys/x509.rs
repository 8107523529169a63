//! Verdicts of our own on a peer's certificate, in OpenSSL's numbers.
//!
//! OpenSSL turns the number into the alert the peer is sent (the table `x509table` in
//! ssl/statem/statem_lib.c), so a client learns that it was revoked, not just that something failed.

#![allow(
    unsafe_code,
    reason = "the crate makes no verdict but OK and APPLICATION_VERIFICATION from safe code"
)]

use openssl::x509::X509VerifyResult;

/// Why we refuse a certificate whose chain is sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Verdict {
    /// No revocation list covers its issuer: X509_V_ERR_UNABLE_TO_GET_CRL, alert unknown_ca.
    NoRevocationList = 3,
    /// Revoked: X509_V_ERR_CERT_REVOKED, alert certificate_revoked.
    Revoked = 23,
    /// For another use: X509_V_ERR_INVALID_PURPOSE, alert unsupported_certificate.
    WrongUse = 26,
    /// Its name or number is not acceptable: X509_V_ERR_CERT_REJECTED, alert bad_certificate.
    Rejected = 28,
    /// Nothing to do with the certificate: X509_V_ERR_APPLICATION_VERIFICATION, alert handshake_failure.
    Other = 50,
}

impl From<Verdict> for X509VerifyResult {
    fn from(verdict: Verdict) -> X509VerifyResult {
        // SAFETY: `from_raw` asks for a number OpenSSL knows, since the text of an unknown one is written to a
        // shared buffer. Each variant is an X509_V_ERR_* of include/openssl/x509_vfy.h, unchanged since 1.0.
        unsafe { X509VerifyResult::from_raw(verdict as i32) }
    }
}
