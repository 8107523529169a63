//! A server's private key, in the one process that has it.
//!
//! The guard opens the file ([`KeySource`]) and doesn't read it; the key holder reads it ([`SigningKey`]) and doesn't
//! open anything. A text that stands in the configuration itself has been in the guard's memory: it is moved into a
//! memory file and overwritten, but what the parser made of the file on its way is not. A file of its own is better.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use openssl::pkey::{Id, PKey, Private};
use openssl::rsa::Padding;
use openssl::sign::{RsaPssSaltlen, Signer};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use super::credentials::{certificates, match_key, private_key, read_all, unreadable, warn_if_exposed};
use super::signing::{Hash, ToSign};
use super::verify::Side;
use super::{clear_errors, library};
use crate::config::common::Pem;
use crate::exit::{Exit, Failure, Outcome};
use crate::sys::memfd;

/// Where the key is, opened.
pub struct KeySource {
    name: String,
    file: OwnedFd,
}

/// What errors of the key holder call key and certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyNames {
    /// The key.
    pub key: String,
    /// The certificate it has to belong to.
    pub cert: String,
}

/// The key.
pub struct SigningKey(PKey<Private>);

impl KeySource {
    /// Opens the key's file. A text in the configuration is moved from there into a memory file, and overwritten.
    pub fn open(pem: &mut Pem) -> Outcome<KeySource> {
        let name = pem.name("tls.key");
        let file = match pem {
            Pem::File(path) => open(path),
            Pem::Inline { text, .. } => {
                let sealed = memfd::sealed("tunguard-key", text.as_bytes());
                text.zeroize();
                sealed
            }
        };
        let file = file.map_err(|e| unreadable(Exit::KeyUnreadable, "private key", &name, e))?;
        Ok(KeySource { name, file })
    }

    /// The same source once more.
    pub fn try_clone(&self) -> Outcome<KeySource> {
        let file = self.file.try_clone().map_err(|e| Failure::system("keep the private key at hand", e))?;
        Ok(KeySource { name: self.name.clone(), file })
    }

    /// What errors call it.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl AsFd for KeySource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<KeySource> for OwnedFd {
    fn from(source: KeySource) -> OwnedFd {
        source.file
    }
}

fn open(path: &Path) -> std::io::Result<OwnedFd> {
    let file = File::open(path)?;
    warn_if_exposed(&file, path)?;
    Ok(file.into())
}

impl SigningKey {
    /// Reads the key from where the guard opened it, and checks that it is that of the first certificate in `cert`.
    pub fn read(file: OwnedFd, cert: &[u8], names: &KeyNames) -> Outcome<SigningKey> {
        clear_errors();
        let mut file = File::from(file);
        // Whoever held it before has read it, and the place in it is shared. A pipe has no place, and is read once.
        let _ = file.seek(SeekFrom::Start(0));
        let pem = read_all(&mut file).map_err(|e| {
            Failure::new(Exit::KeyUnreadable, format!("the private key {} can't be read: {e}", names.key))
        })?;
        let key = private_key(Side::Server, &pem, &names.key)?;
        let own = certificates(cert, "certificate", &names.cert)?;
        match_key(&own[0], &key, &names.key, &names.cert)?;
        Ok(SigningKey(key))
    }

    /// Signs for a server's side of one TLS 1.3 handshake, and nothing else. `None` if that is not what is asked for.
    pub fn sign(&self, wanted: &ToSign) -> Outcome<Option<Vec<u8>>> {
        let Some(content) = wanted.content().filter(|_| self.signs_with(wanted.hash)) else {
            return Ok(None);
        };
        clear_errors();
        let sign = || {
            let mut signer = Signer::new(wanted.hash.digest(), &self.0)?;
            if self.0.id() == Id::RSA {
                signer.set_rsa_padding(Padding::PKCS1_PSS)?;
                signer.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH)?;
            }
            signer.sign_oneshot_to_vec(&content)
        };
        sign().map(Some).map_err(|e| library("signing", &e))
    }

    /// TLS 1.3 has one hash for each curve (RFC 8446 section 4.2.3), and lets an RSA key have any.
    fn signs_with(&self, hash: Hash) -> bool {
        match (self.0.id(), self.0.bits()) {
            (Id::EC, 256) => hash == Hash::Sha256,
            (Id::EC, 384) => hash == Hash::Sha384,
            (Id::EC, 521) => hash == Hash::Sha512,
            (id, _) => id == Id::RSA,
        }
    }
}
