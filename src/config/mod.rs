//! Configuration files, parsed into types that can only be valid.

pub mod client;
pub mod common;
pub mod server;
