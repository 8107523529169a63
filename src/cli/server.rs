//! `tunguard server`: finds the guard and becomes it.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use crate::VERSION;
use crate::exit::{Exit, Failure, Outcome};

/// `tunguard server`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServerCommand {
    /// server.toml
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
}

impl ServerCommand {
    /// Becomes the guard; returns only if that fails.
    pub fn run(self) -> Outcome<()> {
        let guard = find(&places())?;
        // The level is handed on in the form the guard's logger reads.
        let level = std::env::var("RUST_LOG")
            .ok()
            .filter(|_| log::max_level() == log::LevelFilter::Info)
            .unwrap_or_else(|| log::max_level().to_string().to_lowercase());
        let error =
            Command::new(&guard).args([VERSION, "--config"]).arg(&self.config).args(["--log", &level]).exec();
        Err(Failure::system(format!("start {}", guard.display()), error))
    }
}

/// Where the guard may be: beside this program, or in the libexec directory.
fn places() -> Vec<PathBuf> {
    let beside = std::fs::read_link("/proc/self/exe").ok();
    let beside = beside.as_deref().and_then(Path::parent).map(Path::to_owned);
    let libexec: Vec<PathBuf> = match option_env!("TUNGUARD_LIBEXEC") {
        Some(directory) => vec![directory.into()],
        None => vec!["/usr/libexec/tunguard".into(), "/usr/lib/tunguard".into()],
    };
    beside.into_iter().chain(libexec).collect()
}

fn find(places: &[PathBuf]) -> Outcome<PathBuf> {
    places.iter().map(|place| place.join(GUARD)).find(|guard| guard.is_file()).ok_or_else(|| {
        let looked: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        let text = format!(
            "{GUARD} is missing (looked in {}): install it with this program, in the same version",
            looked.join(", ")
        );
        Failure::new(Exit::Version, text)
    })
}

const GUARD: &str = "tunguard-guard";

const EXAMPLES: &str = "\
Examples:
  tunguard server --config /etc/tunguard/server.toml
  RUST_LOG=debug tunguard server --config server.toml";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_place_that_has_the_guard_wins() {
        let (a, b) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        let places = [a.path().to_owned(), b.path().to_owned()];
        let missing = find(&places).expect_err("nothing there");
        assert_eq!(missing.exit, Exit::Version);
        assert!(missing.text.contains(&a.path().display().to_string()), "{missing}");
        std::fs::write(b.path().join(GUARD), "").expect("writes");
        assert_eq!(find(&places), Ok(b.path().join(GUARD)));
        std::fs::write(a.path().join(GUARD), "").expect("writes");
        assert_eq!(find(&places), Ok(a.path().join(GUARD)));
    }
}
