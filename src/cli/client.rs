//! `tunguard client`.

use std::path::PathBuf;

use clap::Args;

use super::{Loudness, logging};
use crate::client;
use crate::config::client::ClientConfig;
use crate::exit::{Failure, Outcome};

/// `tunguard client`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ClientCommand {
    /// client.toml, or a profile made by `tunguard pki profile`
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
}

impl ClientCommand {
    /// Runs the client until it is stopped.
    pub fn run(self, loudness: Loudness) -> Outcome<()> {
        let _flush =
            logging::install_patiently(loudness).map_err(|e| Failure::system("start the log's thread", e))?;
        client::require_root()?;
        client::run(&ClientConfig::load(&self.config)?)
    }
}

const EXAMPLES: &str = "\
Examples:
  tunguard client --config /etc/tunguard/client.toml
  tunguard client --config alice.toml --verbose";
