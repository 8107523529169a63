//! The bodies of the fuzz targets: the same that tests replay.

#[path = "../bodies/mod.rs"]
pub mod bodies;
