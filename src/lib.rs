//! The library behind tunguard's processes, in the order a packet meets it.
//!
//! Pure cores (no I/O, no clock) come first; the shells around them are the binaries `tunguard`,
//! `tunguard-guard` and `tunguard-worker`. All system calls that need `unsafe` are in [`sys`].

pub mod config;
pub mod exit;
pub mod net;
pub mod wire;
