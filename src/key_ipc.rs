//! The key holder, and what is said to it: by the guard, which makes a channel for each connection, and over that by
//! the connection's worker, which may ask for one signature. A worker is not trusted here either.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ipc::HANDSHAKE_SECONDS;
use crate::sys::seqpacket::Channel;
use crate::tls::ToSign;
use crate::tls::server_key::KeyNames;

/// The key holder's end of its channel to the guard.
pub type HolderEnd = Channel<HolderReply, HolderRequest>;
/// The guard's end.
pub type HolderGuardEnd = Channel<HolderRequest, HolderReply>;

/// The key holder's end of a connection's channel.
pub type DeskEnd = Channel<Signature, ToSign>;
/// The worker's end.
pub type SignerEnd = Channel<ToSign, Signature>;

/// Where every key holder tells the guard of misuse.
pub type MisuseEnd = Channel<Misuse, ()>;
/// The guard's end.
pub type MisuseGuardEnd = Channel<(), Misuse>;

/// What the guard orders of the key holder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HolderRequest {
    /// Sign once for the connection whose channel comes with it.
    Serve {
        /// The channel's number: each is larger than the one before.
        channel: u64,
    },
}

/// What the key holder answers, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HolderReply {
    /// It has the key, which is the certificate's.
    Ready,
    /// It has not; its exit code says more.
    Failed {
        /// Why.
        text: String,
    },
}

/// The answer to a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Signature {
    /// Here it is.
    Made(Vec<u8>),
    /// The cipher library failed.
    Failed {
        /// Why.
        text: String,
    },
}

/// A worker has asked for what it may not have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Misuse {
    /// Its channel.
    pub channel: u64,
    /// What it did.
    pub what: String,
}

/// What the key holder is started with: in a sealed memory file, its descriptor 4. The key's file is 5.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HolderSetup {
    /// The guard's process ID: when it goes, the key holder goes.
    pub guard: i32,
    /// The key holder's user, which no worker has.
    pub uid: u32,
    /// An empty directory to be locked into.
    pub root: PathBuf,
    /// The certificate that the key has to belong to.
    pub cert: Vec<u8>,
    /// What errors call the two.
    pub names: KeyNames,
    /// Channels at once.
    pub channels: usize,
    /// The version of Landlock to be locked in with, `None` where the configuration does without.
    pub landlock: Option<i32>,
}

impl HolderSetup {
    /// As bytes for the memory file.
    pub fn encode(&self) -> Vec<u8> {
        bincode::serde::encode_to_vec(self, bincode::config::standard()).expect("plain data encodes")
    }

    /// From the memory file's bytes.
    pub fn decode(bytes: &[u8]) -> Option<HolderSetup> {
        let (setup, used) = bincode::serde::decode_from_slice(bytes, bincode::config::standard()).ok()?;
        (used == bytes.len()).then_some(setup)
    }
}

/// How long a signature may be asked for on a connection's channel. A worker keeps its own deadline, and the guard one for
/// workers that don't: 3 s later, as here.
pub const CHANNEL_LIFE: Duration = Duration::from_secs(HANDSHAKE_SECONDS + 3);
/// A bound against runaway memory of the key holder, which may lock all of it in memory where that is permitted.
pub const ADDRESS_SPACE: u64 = 1 << 28;
/// The second argument of `tunguard-worker` that makes it the key holder.
pub const KEY_HOLDER: &str = "key-holder";
