//! The operating system: every `unsafe` block of the workspace is below here, each argued where it stands.
#![allow(unsafe_code, reason = "this module is where the workspace's unsafe code is kept")]

pub mod capabilities;
pub mod clock;
pub mod ids;
pub mod jail;
pub mod landlock;
pub mod memfd;
pub mod mq;
pub mod poller;
#[cfg(feature = "rigged")]
pub mod red_team;
pub mod seccomp;
pub mod seqpacket;
pub mod shared;
pub mod signals;
pub mod spawn;
pub mod steer;
pub mod tcp;
pub mod tls_key;
pub mod tls_session;
pub mod tun;
pub mod udp;
pub mod wipe;
pub mod x509;
