//! The library behind tunguard's processes, in the order a packet meets it.
//!
//! Pure cores (no I/O, no clock) come first; the shells around them are the binaries `tunguard`,
//! `tunguard-guard` and `tunguard-worker`. All system calls that need `unsafe` are in [`sys`].

pub mod admin;
pub mod batch;
pub mod budget;
pub mod channel;
pub mod cli;
pub mod client;
pub mod config;
pub mod drops;
pub mod early;
pub mod egress;
pub mod epochs;
pub mod escape;
pub mod exit;
pub mod hardware;
pub mod idle;
pub mod ingress;
pub mod inside;
pub mod ipc;
pub mod keys;
pub mod net;
pub mod path;
pub mod paths;
pub mod pki;
pub mod pmtu;
pub mod random;
pub mod replay;
pub mod resume;
pub mod rigged;
pub mod sandbox;
pub mod seal;
pub mod segment;
pub mod session;
pub mod stderr_log;
pub mod sys;
pub mod time;
pub mod tls;
pub mod wire;

/// The version all binaries must share.
#[cfg(not(feature = "rigged"))]
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The version all binaries must share.
#[cfg(feature = "rigged")]
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "+rigged");
