//! From the TLS exporter's secret to the keys of each epoch and direction.
//!
//! ```text
//! exporter -> secret 0 -> secret 1 -> secret 2 ...     HKDF-SHA-256 (RFC 5869) over a fresh X25519 each
//!               |           |
//!               +-> c2s     +-> c2s                    key | MAC key | IV
//!               +-> s2c     +-> s2c
//! ```

use ring::agreement::{self, EphemeralPrivateKey, UnparsedPublicKey, X25519};
use ring::hkdf::{self, HKDF_SHA256, Prk, Salt};
use ring::rand::SystemRandom;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::config::common::Suite;

/// Which end of a session: names the sender of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The end that connected.
    Client,
    /// The end that was connected to.
    Server,
}

impl Role {
    /// The other end.
    pub fn peer(self) -> Role {
        match self {
            Role::Client => Role::Server,
            Role::Server => Role::Client,
        }
    }
}

/// An epoch's secret; overwritten when dropped.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct Secret([u8; 32]);

/// The keys of one epoch and direction; overwritten when dropped.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct DirectionKeys {
    /// Key of the cipher.
    pub key: [u8; 32],
    /// Key of the MAC, for the suite that has one.
    pub mac: [u8; 32],
    /// Base of the nonces.
    pub iv: [u8; 12],
}

impl Secret {
    /// Epoch 0's secret, from the exporter.
    pub fn from_bytes(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    /// The secret of epoch `epoch`, one after this: extract with this one as salt and `shared` as input,
    /// expand with "epoch" and the number (8 bytes, big-endian).
    pub fn next(&self, shared: &[u8], epoch: u64) -> Secret {
        let prk = Salt::new(HKDF_SHA256, &self.0).extract(shared);
        let mut next = Secret([0; 32]);
        expand(&prk, &[b"epoch", &epoch.to_be_bytes()], &mut next.0);
        next
    }

    /// The keys with which `sender` seals in `suite`.
    pub fn direction(&self, suite: Suite, sender: Role) -> DirectionKeys {
        let prk = Prk::new_less_safe(HKDF_SHA256, &self.0);
        let label: &[u8] = match sender {
            Role::Client => b"tunguard/1 c2s ",
            Role::Server => b"tunguard/1 s2c ",
        };
        let mut material = Zeroizing::new([0; 76]);
        expand(&prk, &[label, suite.name().as_bytes()], &mut material[..]);
        let mut keys = DirectionKeys { key: [0; 32], mac: [0; 32], iv: [0; 12] };
        keys.key.copy_from_slice(&material[..32]);
        keys.mac.copy_from_slice(&material[32..64]);
        keys.iv.copy_from_slice(&material[64..]);
        keys
    }

    /// Bytes for another purpose than the data channel, such as a resumption's proof.
    pub fn derive(&self, label: &[u8]) -> [u8; 32] {
        let mut out = [0; 32];
        expand(&Prk::new_less_safe(HKDF_SHA256, &self.0), &[label], &mut out);
        out
    }
}

/// Our half of a rekey in progress.
pub struct Exchange {
    private: EphemeralPrivateKey,
    /// The public key to send.
    pub public: [u8; 32],
}

/// The system's random numbers failed, or the peer's key is unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExchangeFailed;

impl Exchange {
    /// A fresh key pair.
    pub fn new() -> Result<Exchange, ExchangeFailed> {
        let private =
            EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).map_err(|_| ExchangeFailed)?;
        let public = private.compute_public_key().map_err(|_| ExchangeFailed)?;
        let public = public.as_ref().try_into().map_err(|_| ExchangeFailed)?;
        Ok(Exchange { private, public })
    }

    /// The secret of `epoch`, made with the peer's public key. An all-zero shared secret (RFC 7748 section 6.1)
    /// is refused.
    pub fn finish(self, previous: &Secret, peer: &[u8; 32], epoch: u64) -> Result<Secret, ExchangeFailed> {
        let peer = UnparsedPublicKey::new(&X25519, peer);
        agreement::agree_ephemeral(self.private, &peer, |shared| previous.next(shared, epoch))
            .map_err(|_| ExchangeFailed)
    }
}

fn expand(prk: &Prk, info: &[&[u8]], out: &mut [u8]) {
    let okm = prk.expand(info, Length(out.len())).expect("HKDF gives up to 255 * 32 bytes");
    okm.fill(out).expect("the length is the one asked for");
}

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_reach_the_same_epoch() {
        let (a, b) = (Exchange::new().expect("keys"), Exchange::new().expect("keys"));
        let (pa, pb) = (a.public, b.public);
        let old = Secret::from_bytes([3; 32]);
        let ours = a.finish(&old, &pb, 1).expect("agrees");
        let theirs = b.finish(&old, &pa, 1).expect("agrees");
        assert_eq!(ours.0, theirs.0);
        assert_ne!(ours.0, old.0);
    }

    #[test]
    fn the_schedule_of_the_protocol_page() {
        // RFC 7748 section 6.1's shared secret.
        let shared = hex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742");
        let zero = Secret::from_bytes(std::array::from_fn(|i| i as u8));
        let one = zero.next(&shared, 1);
        assert_eq!(&one.0[..], hex("5e50f24d03be7ca95dd5e53b7013ca73d2ba8ef6b2aa8ec260108d5d2ea69043"));
        let keys = zero.direction(Suite::Aes256Gcm, Role::Server);
        assert_eq!(&keys.key[..], hex("d7640e45933f48ff467f8db80dc0ea11042b68ea10ddd530744792db7594825b"));
        assert_eq!(&keys.iv[..], hex("2fef653d4364afb6abcfcc87"));
        let keys = zero.direction(Suite::Aes256CtrHmacSha256, Role::Client);
        assert_eq!(&keys.mac[..], hex("e0dcc096c16746fd812f4328c306af0112b622d820ff82d4a7369d0d86d1138d"));
    }

    fn hex(text: &str) -> Vec<u8> {
        let nibble = |c: u8| (c as char).to_digit(16).expect("hex") as u8;
        text.as_bytes().chunks(2).map(|pair| nibble(pair[0]) << 4 | nibble(pair[1])).collect()
    }

    #[test]
    fn a_low_order_point_is_refused() {
        let exchange = Exchange::new().expect("keys");
        assert!(exchange.finish(&Secret::from_bytes([3; 32]), &[0; 32], 1).is_err());
    }
}
