//! The commands of `tunguard`, each on top of a library module.

pub mod pki;
