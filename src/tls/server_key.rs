//! A server's private key, in the one process that has it.
//!
//! The guard opens the file ([`KeySource`]) and doesn't read it; the key holder reads it ([`SigningKey`]) and doesn't
//! open anything. A text that stands in the configuration itself has been in the guard's memory: it is moved into a
//! memory file and overwritten, but what the parser made of the file on its way is not. A file of its own is better.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use openssl::pkey::{Id, PKey, Private};
use openssl::rsa::Padding;
use openssl::sign::{RsaPssSaltlen, Signer};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use super::credentials::{certificates, match_key, private_key, read_sized, unreadable, warn_if_exposed};
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

fn open(path: &Path) -> io::Result<OwnedFd> {
    let file = File::open(path)?;
    warn_if_exposed(&file, path)?;
    Ok(file.into())
}

/// Everything in `file`, whose place is shared with whoever else has it, and may be reading it now.
fn read_whole(mut file: &File) -> io::Result<Zeroizing<Vec<u8>>> {
    let size = file.metadata()?.len();
    match file.stream_position() {
        Ok(_) => read_sized(ByPosition { file, at: 0 }, size),
        // A pipe has no place, and is read once.
        Err(_) => read_sized(file, size),
    }
}

struct ByPosition<'a> {
    file: &'a File,
    at: u64,
}

impl Read for ByPosition<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read_at(bytes, self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl SigningKey {
    /// Reads the key from where the guard opened it, and checks that it is that of the first certificate in `cert`.
    pub fn read(file: OwnedFd, cert: &[u8], names: &KeyNames) -> Outcome<SigningKey> {
        clear_errors();
        let pem = read_whole(&File::from(file)).map_err(|e| {
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

#[cfg(test)]
mod tests {
    use std::io::{SeekFrom, Write};

    use super::*;

    #[test]
    fn a_key_is_read_whole_wherever_others_are_in_it() {
        let mut text = Pem::Inline { key: "tls.key", text: "a key".to_owned() };
        let source = KeySource::open(&mut text).expect("a memory file");
        let mut other = File::from(OwnedFd::from(source.try_clone().expect("a copy")));
        for place in [0, 2, 5] {
            other.seek(SeekFrom::Start(place)).expect("a place");
            let file = File::from(OwnedFd::from(source.try_clone().expect("a copy")));
            assert_eq!(read_whole(&file).expect("read")[..], b"a key"[..]);
            assert_eq!(other.stream_position().expect("a place"), place, "it was moved under another reader");
        }
    }

    #[test]
    fn a_key_may_come_out_of_a_pipe() {
        let (ours, mut theirs) = io::pipe().expect("a pipe");
        theirs.write_all(b"a key").expect("written");
        drop(theirs);
        assert_eq!(read_whole(&File::from(OwnedFd::from(ours))).expect("read")[..], b"a key"[..]);
    }
}
