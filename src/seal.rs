//! Sealing and opening datagrams in place. Every suite encrypts first and authenticates the whole header and
//! the ciphertext; nothing is decrypted before its tag was found good.
//!
//! Nonce: the direction's 12-byte IV xor (epoch byte, 6-byte counter) right-aligned, as in RFC 8446 section 5.3.

use std::ops::Range;

use openssl::cipher::Cipher;
use openssl::cipher_ctx::CipherCtx;
use ring::aead::{self, LessSafeKey, Nonce, UnboundKey};
use ring::hmac;

use crate::config::common::Suite;
use crate::exit::{Exit, Failure, Outcome};
use crate::keys::{DirectionKeys, Role, Secret};
use crate::sys::wipe::Wiping;
use crate::wire::data::{HEADER_LEN, Header, OVERHEAD, SessionId, TAG_LEN};

/// One direction's cipher of one epoch. The same type seals at one end and opens at the other.
pub struct Cryptor {
    iv: [u8; IV_LEN],
    kind: Kind,
}

enum Kind {
    Aead(Wiping<LessSafeKey>),
    Classic(Box<Classic>),
}

/// AES-256-CTR, then HMAC-SHA-256 truncated to 16 bytes, with independent keys.
struct Classic {
    cipher: CipherCtx,
    mac: Wiping<hmac::Key>,
}

/// Why a datagram couldn't be sealed or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealError {
    /// The tag doesn't fit header and ciphertext: forged, damaged, or another session's.
    BadTag,
    /// The cipher library failed.
    Library,
}

impl Cryptor {
    /// The cipher of `keys` in `suite`.
    pub fn new(suite: Suite, keys: &DirectionKeys) -> Result<Cryptor, SealError> {
        let aead = |algorithm| {
            let key = UnboundKey::new(algorithm, &keys.key[..]).map_err(|_| SealError::Library)?;
            Ok(Kind::Aead(Wiping::new(LessSafeKey::new(key))))
        };
        let kind = match suite {
            Suite::Aes256Gcm => aead(&aead::AES_256_GCM)?,
            Suite::ChaCha20Poly1305 => aead(&aead::CHACHA20_POLY1305)?,
            Suite::Aes256CtrHmacSha256 => {
                let mut cipher = CipherCtx::new().map_err(|_| SealError::Library)?;
                // In CTR mode both directions are the same operation, so one context serves both.
                cipher
                    .encrypt_init(Some(Cipher::aes_256_ctr()), Some(&keys.key[..]), None)
                    .map_err(|_| SealError::Library)?;
                let mac = Wiping::new(hmac::Key::new(hmac::HMAC_SHA256, &keys.mac[..]));
                Kind::Classic(Box::new(Classic { cipher, mac }))
            }
        };
        Ok(Cryptor { iv: keys.iv, kind })
    }

    /// Seals `datagram`, which is header space, plaintext and tag space: writes the header, encrypts in place
    /// and writes the tag.
    pub fn seal(&mut self, header: &Header, datagram: &mut [u8]) -> Result<(), SealError> {
        let nonce = self.nonce(header);
        let (head, rest) = datagram.split_at_mut_checked(HEADER_LEN).ok_or(SealError::Library)?;
        head.copy_from_slice(&header.emit());
        let text_len = rest.len().checked_sub(TAG_LEN).ok_or(SealError::Library)?;
        match &mut self.kind {
            Kind::Aead(key) => {
                let (text, tag_space) = rest.split_at_mut(text_len);
                let nonce = Nonce::assume_unique_for_key(nonce);
                let tag = key
                    .seal_in_place_separate_tag(nonce, aead::Aad::from(&*head), text)
                    .map_err(|_| SealError::Library)?;
                tag_space.copy_from_slice(tag.as_ref());
            }
            Kind::Classic(classic) => {
                classic.crypt(nonce, &mut rest[..text_len])?;
                let (authentic, tag_space) = datagram.split_at_mut(HEADER_LEN + text_len);
                tag_space.copy_from_slice(&classic.tag(authentic)?);
            }
        }
        Ok(())
    }

    /// Opens a whole `datagram` whose header is `header`, in place; says where the plaintext is. On failure
    /// the bytes are as good as lost, and nothing else has changed.
    pub fn open(&mut self, header: &Header, datagram: &mut [u8]) -> Result<Range<usize>, SealError> {
        let nonce = self.nonce(header);
        let text = HEADER_LEN..datagram.len().checked_sub(TAG_LEN).ok_or(SealError::BadTag)?;
        match &mut self.kind {
            Kind::Aead(key) => {
                let (head, sealed) = datagram.split_at_mut_checked(HEADER_LEN).ok_or(SealError::BadTag)?;
                let nonce = Nonce::assume_unique_for_key(nonce);
                key.open_in_place(nonce, aead::Aad::from(&*head), sealed).map_err(|_| SealError::BadTag)?;
            }
            Kind::Classic(classic) => {
                let (authentic, tag) = datagram.split_at_mut_checked(text.end).ok_or(SealError::BadTag)?;
                if authentic.len() < HEADER_LEN {
                    return Err(SealError::BadTag);
                }
                if !openssl::memcmp::eq(&classic.tag(authentic)?, tag) {
                    return Err(SealError::BadTag);
                }
                classic.crypt(nonce, &mut authentic[HEADER_LEN..])?;
            }
        }
        Ok(text)
    }

    fn nonce(&self, header: &Header) -> [u8; IV_LEN] {
        let mut nonce = self.iv;
        nonce[5] ^= header.epoch;
        for (n, c) in nonce[6..].iter_mut().zip(&header.counter.to_be_bytes()[2..]) {
            *n ^= c;
        }
        nonce
    }
}

impl Classic {
    fn crypt(&mut self, nonce: [u8; IV_LEN], text: &mut [u8]) -> Result<(), SealError> {
        // 12-byte nonce, then a 4-byte block counter from zero: 64 GiB per datagram, never reached.
        let mut block = [0; 16];
        block[..IV_LEN].copy_from_slice(&nonce);
        self.cipher.encrypt_init(None, None, Some(&block)).map_err(|_| SealError::Library)?;
        let len = text.len();
        self.cipher.cipher_update_inplace(text, len).map_err(|_| SealError::Library)?;
        Ok(())
    }

    fn tag(&self, authentic: &[u8]) -> Result<[u8; TAG_LEN], SealError> {
        let tag = hmac::sign(&self.mac, authentic);
        tag.as_ref().first_chunk::<TAG_LEN>().copied().ok_or(SealError::Library)
    }
}

/// Seals and opens a known datagram in every suite and compares with the bytes of docs/protocol.md, so that
/// a broken cipher library ends a process before it touches anyone's traffic.
///
/// Errors: [`Exit::MacLength`].
pub fn self_test() -> Outcome<()> {
    for (suite, expected) in SELF_TEST {
        let failed = |what: &str| Failure::new(Exit::MacLength, format!("self-test of {suite}: {what}"));
        let keys = Secret::from_bytes(SELF_TEST_SECRET).direction(suite, Role::Client);
        let mut cryptor = Cryptor::new(suite, &keys).map_err(|_| failed("no such cipher"))?;
        let header = SELF_TEST_HEADER;
        let mut datagram = [0; OVERHEAD + SELF_TEST_TEXT.len()];
        datagram[HEADER_LEN..][..SELF_TEST_TEXT.len()].copy_from_slice(SELF_TEST_TEXT);
        cryptor.seal(&header, &mut datagram).map_err(|_| failed("can't seal"))?;
        if datagram[HEADER_LEN..] != expected {
            return Err(failed("wrong ciphertext or tag"));
        }
        let mut forged = datagram;
        forged[0] ^= 1;
        if cryptor.open(&header, &mut forged).is_ok() {
            return Err(failed("a forged datagram was accepted"));
        }
        let text = cryptor.open(&header, &mut datagram).map_err(|_| failed("can't open"))?;
        if &datagram[text] != SELF_TEST_TEXT {
            return Err(failed("wrong plaintext"));
        }
    }
    Ok(())
}

const IV_LEN: usize = 12;

// The vectors of docs/protocol.md.
const SELF_TEST_SECRET: [u8; 32] = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
    29, 30, 31,
];
const SELF_TEST_HEADER: Header = Header {
    session: SessionId([0x01, 0x02, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6]),
    epoch: 7,
    flags: 0,
    counter: 0x0001_0203,
};
const SELF_TEST_TEXT: &[u8; 9] = b"tunguard!";
const SELF_TEST: [(Suite, [u8; 25]); 3] = [
    (
        Suite::Aes256Gcm,
        [
            0xa8, 0x4f, 0x83, 0x1f, 0xc4, 0x4f, 0x13, 0x30, 0x35, 0x58, 0x6c, 0x89, 0x52, 0x4c, 0xcf, 0xf0,
            0x88, 0x74, 0xd3, 0x5f, 0xc8, 0xef, 0x78, 0x49, 0x15,
        ],
    ),
    (
        Suite::ChaCha20Poly1305,
        [
            0x47, 0xe1, 0x2b, 0x07, 0xe1, 0x29, 0x71, 0x3c, 0x5c, 0x78, 0x1c, 0x30, 0x3e, 0x19, 0x07, 0xa8,
            0xe1, 0x48, 0x21, 0xf7, 0x38, 0x6d, 0x9e, 0x29, 0xb6,
        ],
    ),
    (
        Suite::Aes256CtrHmacSha256,
        [
            0x40, 0xc7, 0x0d, 0xef, 0xb9, 0xb2, 0x06, 0x21, 0x8c, 0xc3, 0x11, 0x22, 0x98, 0xd4, 0x84, 0xce,
            0xab, 0x9a, 0x28, 0x04, 0xe0, 0x75, 0x4c, 0x86, 0xb9,
        ],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair(suite: Suite) -> (Cryptor, Cryptor) {
        let keys = Secret::from_bytes([7; 32]).direction(suite, Role::Server);
        (Cryptor::new(suite, &keys).expect("cipher"), Cryptor::new(suite, &keys).expect("cipher"))
    }

    fn header(counter: u64) -> Header {
        Header { session: SessionId::new(3, [9; 6]), epoch: 1, flags: 0, counter }
    }

    fn sealed(cryptor: &mut Cryptor, counter: u64, text: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0; HEADER_LEN];
        datagram.extend(text);
        datagram.extend([0; TAG_LEN]);
        cryptor.seal(&header(counter), &mut datagram).expect("seals");
        datagram
    }

    #[test]
    fn an_empty_text_is_one_and_less_is_none() {
        for suite in Suite::ALL {
            let keys = Secret::from_bytes(SELF_TEST_SECRET).direction(suite, Role::Client);
            let mut cryptor = Cryptor::new(suite, &keys).expect("a cipher");
            let mut datagram = [0; OVERHEAD];
            cryptor.seal(&SELF_TEST_HEADER, &mut datagram).expect("seals");
            for len in 0..OVERHEAD {
                let mut short = datagram[..len].to_vec();
                assert!(cryptor.open(&SELF_TEST_HEADER, &mut short).is_err(), "{suite}, {len} bytes");
            }
            let text = cryptor.open(&SELF_TEST_HEADER, &mut datagram).expect("opens");
            assert_eq!(text, HEADER_LEN..HEADER_LEN, "{suite}");
        }
    }

    #[test]
    fn vectors() {
        self_test().expect("the vectors hold");
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        for suite in Suite::ALL {
            let (mut ours, mut theirs) = pair(suite);
            let good = sealed(&mut ours, 5, b"some packet that is longer than one block of the cipher");
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                // The receiver takes the header off the bytes, as they are.
                let Ok(seen) = Header::parse(&bad) else { continue };
                assert_eq!(theirs.open(&seen, &mut bad), Err(SealError::BadTag), "{suite} bit {bit}");
            }
            let mut fine = good.clone();
            assert_eq!(theirs.open(&header(5), &mut fine), Ok(HEADER_LEN..good.len() - TAG_LEN));
        }
    }

    #[test]
    fn truncated_datagrams_are_refused() {
        for suite in Suite::ALL {
            let (mut ours, mut theirs) = pair(suite);
            let good = sealed(&mut ours, 5, b"text");
            for len in 0..good.len() {
                let mut short = good[..len].to_vec();
                assert_eq!(theirs.open(&header(5), &mut short), Err(SealError::BadTag), "{suite} {len}");
            }
        }
    }

    #[test]
    fn each_counter_epoch_and_direction_has_its_own_stream() {
        for suite in Suite::ALL {
            let (mut ours, _) = pair(suite);
            let one = sealed(&mut ours, 1, &[0; 64]);
            let two = sealed(&mut ours, 2, &[0; 64]);
            assert_ne!(one[HEADER_LEN..], two[HEADER_LEN..], "{suite}");
            let secret = Secret::from_bytes([7; 32]);
            let mut other = Cryptor::new(suite, &secret.direction(suite, Role::Client)).expect("cipher");
            let theirs = sealed(&mut other, 1, &[0; 64]);
            assert_ne!(one[HEADER_LEN..], theirs[HEADER_LEN..], "{suite}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(
            text in prop::collection::vec(any::<u8>(), 0..2_000),
            counter in 0..crate::wire::data::COUNTER_LIMIT,
            suite in prop::sample::select(&Suite::ALL[..]),
        ) {
            let (mut ours, mut theirs) = pair(suite);
            let mut datagram = sealed(&mut ours, counter, &text);
            let range = theirs.open(&header(counter), &mut datagram).expect("opens");
            prop_assert_eq!(&datagram[range], &text[..]);
        }
    }
}
