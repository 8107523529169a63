//! What server and client configuration share.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::exit::{Failure, Outcome};

/// The port where nothing else is said.
pub const DEFAULT_PORT: u16 = 55555;

/// A network device's name: 1 to 15 bytes, no '/', ':', white space or '%', not "." or ".."
/// (dev_valid_name() in net/core/dev.c), and printable ASCII, so that it is safe in logs and nft scripts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceName(String);

impl DeviceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for DeviceName {
    type Err = Failure;

    fn from_str(text: &str) -> Outcome<DeviceName> {
        let fits = (1..=15).contains(&text.len())
            && text != "."
            && text != ".."
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if fits {
            Ok(DeviceName(text.to_owned()))
        } else {
            Err(Failure::usage(format!(
                "{text:?} is no device name: 1 to 15 letters, digits, '-', '_' or '.'"
            )))
        }
    }
}

/// A suite of the data channel, in the protocol's spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Suite {
    /// AES-256 in Galois/Counter mode (RFC 5116 AEAD_AES_256_GCM).
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    /// ChaCha20-Poly1305 (RFC 8439).
    #[serde(rename = "chacha20-poly1305")]
    ChaCha20Poly1305,
    /// The classic composition: AES-256-CTR, then HMAC-SHA-256 over header and ciphertext.
    #[serde(rename = "aes-256-ctr-hmac-sha256")]
    Aes256CtrHmacSha256,
}

impl Suite {
    /// Every suite, in the default order of preference.
    pub const ALL: [Suite; 3] = [Suite::Aes256Gcm, Suite::ChaCha20Poly1305, Suite::Aes256CtrHmacSha256];

    /// The name on the wire and in files.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Aes256Gcm => "aes-256-gcm",
            Suite::ChaCha20Poly1305 => "chacha20-poly1305",
            Suite::Aes256CtrHmacSha256 => "aes-256-ctr-hmac-sha256",
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where PEM text comes from: a file (already made absolute), or the configuration itself (a profile).
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// A file to read.
    File(PathBuf),
    /// The text itself; `key` says which configuration key held it.
    Inline {
        /// Full key, as in `tls.cert`.
        key: &'static str,
        /// The PEM text.
        text: String,
    },
}

impl fmt::Debug for Pem {
    // A private key may be in it: never print the text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pem::File(path) => write!(f, "File({path:?})"),
            Pem::Inline { key, .. } => write!(f, "Inline({key})"),
        }
    }
}

/// `[data]` on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// Suites in order of preference, at least one, none twice.
    pub suites: Vec<Suite>,
    /// Age at which an epoch is replaced; default 15 min, at least 1 s. The hard stop is at twice this.
    pub rekey: Duration,
    /// Packets of one direction after which an epoch is replaced; default 2^30, 1,000 to 2^40.
    pub rekey_packets: u64,
}
