//! What the fuzz targets do with their bytes: each a function of a byte slice that panics where something doesn't hold.
//! The targets in `fuzz_targets` call them, and so do tests that replay the seeds without a fuzzer.

pub mod admin;
pub mod certificates;
pub mod config;
pub mod input;
pub mod ipc;
pub mod pmtu;
pub mod replay;
pub mod segment;
pub mod session;
pub mod wake;
pub mod wire;

/// A target's name, which is also that of its seeds' folder, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All targets but the guard's.
pub const TARGETS: &[Target] = &[
    ("session", session::body),
    ("datagram", wire::datagram),
    ("inband", wire::in_band),
    ("control", wire::control),
    ("segment", segment::body),
    ("replay", replay::body),
    ("pmtu", pmtu::body),
    ("ipc", ipc::body),
    ("admin", admin::body),
    ("config", config::body),
    ("certificates", certificates::body),
    ("wake", wake::body),
];
