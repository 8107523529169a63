//! Wire formats: what the bytes of each header and message mean, and nothing else.

pub mod vnet;
