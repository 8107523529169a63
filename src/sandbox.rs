//! What this kernel has to lock processes in with, found out once, by the process that starts the others.

use std::fmt;

use serde_json::{Value, json};

use crate::config::common::{Landlock, Sandbox};
use crate::exit::Outcome;
use crate::sys::{landlock, seccomp};

/// What is used. System call filters always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Means {
    /// The version of Landlock, `None` where the configuration does without.
    pub landlock: Option<i32>,
}

impl Means {
    /// Finds out, and says so in the log.
    ///
    /// Errors: the kernel has less than is required.
    pub fn find(wanted: Sandbox) -> Outcome<Means> {
        seccomp::require()?;
        let means = Means { landlock: landlock::version(wanted.landlock)? };
        log::info!("sandbox: {means}");
        if wanted.landlock == Landlock::Off {
            log::warn!(
                "sandbox: `landlock = \"off\"`: what keeps processes that are taken over from files, ports and other \
                 processes is their system call filter, user and empty root alone"
            );
        }
        Ok(means)
    }

    /// For a status.
    pub fn shown(self) -> Value {
        json!({ "seccomp": true, "landlock_abi": self.landlock })
    }
}

impl fmt::Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.landlock {
            Some(version) => write!(f, "seccomp, Landlock ABI {version}"),
            None => f.write_str("seccomp, no Landlock"),
        }
    }
}
