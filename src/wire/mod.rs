//! Wire formats: what the bytes of each header and message mean, and nothing else.

pub mod control;
pub mod data;
pub mod inband;
pub mod vnet;
