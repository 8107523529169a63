//! A server's signature, made by somebody else: the key holder, who has the private key, while the connection is in
//! a worker, who has not.
//!
//! What the holder is told is the hash of the handshake so far, and around it the holder itself writes what TLS 1.3
//! signs (RFC 8446 section 4.4.3). So what it makes can stand in one place only: in a server's CertificateVerify.
//! OpenSSL doesn't tell that hash, so it is made here once more, of the messages it sends and receives.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use openssl::error::ErrorStack;
use openssl::hash::{Hasher, MessageDigest};
use openssl::pkey::{PKeyRef, Public};
use openssl::ssl::SslRef;
use serde::{Deserialize, Serialize};

use super::verify::notes;
use crate::exit::{Failure, Outcome};
use crate::sys::tls_key;

/// What a server signs to show that it has its certificate's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToSign {
    /// The hash the signature is made with.
    pub hash: Hash,
    /// The hash of the handshake's messages up to the server's certificate: 32 or 48 bytes.
    pub transcript: Vec<u8>,
}

/// The hash of a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hash {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

/// Makes the signature, once.
pub type Signer = Box<dyn FnOnce(&ToSign) -> Outcome<Vec<u8>> + Send>;

impl ToSign {
    /// The bytes that are signed; `None` if this is no transcript hash of any cipher suite of TLS 1.3.
    pub fn content(&self) -> Option<Vec<u8>> {
        let plausible = [SHA256_BYTES, SHA384_BYTES].contains(&self.transcript.len());
        plausible.then(|| [&[b' '; 64][..], CONTEXT, &[0], &self.transcript].concat())
    }
}

impl Hash {
    /// As OpenSSL calls it.
    pub fn digest(self) -> MessageDigest {
        match self {
            Hash::Sha256 => MessageDigest::sha256(),
            Hash::Sha384 => MessageDigest::sha384(),
            Hash::Sha512 => MessageDigest::sha512(),
        }
    }

    fn from_nid(nid: i32) -> Option<Hash> {
        [Hash::Sha256, Hash::Sha384, Hash::Sha512].into_iter().find(|h| h.digest().type_().as_raw() == nid)
    }
}

/// One connection's signature: what it is about, who makes it, and how that ended.
pub(crate) struct Signing {
    stage: Mutex<Stage>,
    failure: OnceLock<Failure>,
}

struct Stage {
    signer: Option<Signer>,
    transcript: Transcript,
    due: Option<ToSign>,
}

impl Signing {
    /// Has `signer` asked for the signature of `ssl`'s handshake, whose certificate's key is `public`.
    pub fn prepare(
        ssl: &mut SslRef,
        public: &PKeyRef<Public>,
        signer: Signer,
    ) -> Result<Arc<Signing>, ErrorStack> {
        let stage = Stage { signer: Some(signer), transcript: Transcript::default(), due: None };
        let signing = Arc::new(Signing { stage: Mutex::new(stage), failure: OnceLock::new() });
        let theirs = signing.clone();
        tls_key::use_remote_key(ssl, public, Box::new(move || theirs.sign()))?;
        Ok(signing)
    }

    /// Why there was no signature.
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.get()
    }

    fn sign(&self) -> Option<Vec<u8>> {
        let (signer, due) = {
            let mut stage = self.stage();
            (stage.signer.take(), stage.due.take())
        };
        let made = match (signer, due) {
            (Some(signer), Some(due)) => signer(&due),
            // Not a signature of a handshake as we know it.
            _ => Err(Failure::system("sign for a client", "nothing is to be signed now")),
        };
        made.map_err(|failure| self.failure.set(failure)).ok()
    }

    fn heard(&self, ssl: &SslRef, sent: bool, message: &[u8]) {
        let mut stage = self.stage();
        if stage.transcript.add(sent, message).is_err() {
            super::clear_errors();
            stage.transcript = Transcript::Over;
        }
        if sent && message.first() == Some(&CERTIFICATE) {
            let transcript = stage.transcript.finish();
            let hash = tls_key::signature_hash(ssl).and_then(Hash::from_nid);
            stage.due = transcript.zip(hash).map(|(transcript, hash)| ToSign { hash, transcript });
        }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Signing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signing")
    }
}

/// The handshake is done: nothing will be signed any more. (A session that was taken up again needed no signature.)
pub fn close_signing(ssl: &SslRef) {
    if let Some(signing) = notes(ssl).and_then(|notes| notes.signing.as_ref()) {
        signing.stage().signer = None;
    }
}

/// Why `ssl` got no signature, if that is how its handshake ended.
pub(crate) fn signing_failure(ssl: &SslRef) -> Option<Failure> {
    notes(ssl)?.signing.as_ref()?.failure().cloned()
}

/// A handshake message of `ssl` was sent or received.
pub(crate) fn heard(ssl: &SslRef, sent: bool, message: &[u8]) {
    if let Some(signing) = notes(ssl).and_then(|notes| notes.signing.as_ref()) {
        signing.heard(ssl, sent, message);
    }
}

/// The hash of a handshake's messages (RFC 8446 section 4.4.1).
enum Transcript {
    /// The client's first message; which hash it is, the server's answer says.
    Hello(Vec<u8>),
    Hashing(Hasher),
    Over,
}

impl Default for Transcript {
    fn default() -> Transcript {
        Transcript::Hello(Vec::new())
    }
}

impl Transcript {
    fn add(&mut self, sent: bool, message: &[u8]) -> Result<(), ErrorStack> {
        match self {
            Transcript::Hello(hello) if !sent => hello.extend_from_slice(message),
            Transcript::Hello(hello) => {
                let Some(digest) = hash_of_suite(message) else {
                    *self = Transcript::Over;
                    return Ok(());
                };
                let mut hasher = Hasher::new(digest)?;
                if is_retry(message) {
                    // The first hello is replaced by its hash.
                    let hash = openssl::hash::hash(digest, hello)?;
                    hasher.update(&[MESSAGE_HASH, 0, 0, hash.len() as u8])?;
                    hasher.update(&hash)?;
                } else {
                    hasher.update(hello)?;
                }
                hasher.update(message)?;
                *self = Transcript::Hashing(hasher);
            }
            Transcript::Hashing(hasher) => hasher.update(message)?,
            Transcript::Over => {}
        }
        Ok(())
    }

    /// Nothing is added any more.
    fn finish(&mut self) -> Option<Vec<u8>> {
        match std::mem::replace(self, Transcript::Over) {
            Transcript::Hashing(mut hasher) => hasher.finish().ok().map(|hash| hash.to_vec()),
            _ => None,
        }
    }
}

/// The hash of the cipher suite that a ServerHello chooses.
fn hash_of_suite(message: &[u8]) -> Option<MessageDigest> {
    let session_id = usize::from(*message.get(38)?);
    match *message.get(39 + session_id..41 + session_id)? {
        [0x13, 0x01 | 0x03] => Some(MessageDigest::sha256()),
        [0x13, 0x02] => Some(MessageDigest::sha384()),
        _ => None,
    }
}

/// Whether a ServerHello is a HelloRetryRequest, by its random number.
fn is_retry(message: &[u8]) -> bool {
    // Type, length of three bytes, version of two.
    message.get(6..38) == Some(&openssl::sha::sha256(b"HelloRetryRequest")[..])
}

// Of RFC 8446 sections 4 and 4.4.3.
const CERTIFICATE: u8 = 11;
const MESSAGE_HASH: u8 = 254;
const CONTEXT: &[u8] = b"TLS 1.3, server CertificateVerify";

const SHA256_BYTES: usize = 32;
const SHA384_BYTES: usize = 48;
