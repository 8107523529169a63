//! Taking up a session again over a new connection: the secret that only its two ends have, and the proof made from
//! it, which is good for one TLS connection only.

use std::fmt;

use ring::hmac;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::sys::wipe::Wiping;
use crate::wire::data::SessionId;

/// What a session can be resumed with; overwritten when dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
pub struct ResumeSecret([u8; 32]);

impl ResumeSecret {
    /// The secret of these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> ResumeSecret {
        ResumeSecret(bytes)
    }

    /// The proof that `session` was ours, on the connection that exports `binding` ([`crate::tls::export_binding`]).
    pub fn proof(&self, session: SessionId, binding: &[u8; 32]) -> [u8; 32] {
        let tag = hmac::sign(&self.key(), &proven(session, binding));
        std::array::from_fn(|i| tag.as_ref()[i])
    }

    /// Whether `proof` is that proof; takes the same time whatever is wrong with it.
    pub fn proves(&self, session: SessionId, binding: &[u8; 32], proof: &[u8; 32]) -> bool {
        hmac::verify(&self.key(), &proven(session, binding), proof).is_ok()
    }

    fn key(&self) -> Wiping<hmac::Key> {
        Wiping::new(hmac::Key::new(hmac::HMAC_SHA256, &self.0))
    }
}

impl fmt::Debug for ResumeSecret {
    // Messages that hold one are shown where they are out of place.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResumeSecret")
    }
}

fn proven(session: SessionId, binding: &[u8; 32]) -> Vec<u8> {
    [LABEL, &session.0, binding].concat()
}

const LABEL: &[u8] = b"tunguard/1 resume";

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId([1, 2, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6]);

    fn secret() -> ResumeSecret {
        ResumeSecret::from_bytes(std::array::from_fn(|i| i as u8))
    }

    #[test]
    fn the_proof_of_the_protocol_page() {
        // HMAC-SHA-256 as Python's hmac module computes it.
        let proof = secret().proof(SESSION, &[0x55; 32]);
        let hex: String = proof.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "a3f4355b2af0b93946ef7d75a4b52f64777a9eec399b5372b1765beb7727ef48");
    }

    #[test]
    fn a_proof_is_good_for_its_session_connection_and_secret_only() {
        let binding = [0x55; 32];
        let proof = secret().proof(SESSION, &binding);
        assert!(secret().proves(SESSION, &binding, &proof));
        assert!(!secret().proves(SessionId([1; 8]), &binding, &proof));
        assert!(!secret().proves(SESSION, &[0x54; 32], &proof));
        assert!(!ResumeSecret::from_bytes([0; 32]).proves(SESSION, &binding, &proof));
        let mut damaged = proof;
        damaged[31] ^= 1;
        assert!(!secret().proves(SESSION, &binding, &damaged));
    }

    #[test]
    fn it_is_not_shown() {
        assert_eq!(format!("{:?}", secret()), "ResumeSecret");
    }
}
