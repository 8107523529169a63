//! Every `unsafe` block of the workspace.

pub mod x509;
