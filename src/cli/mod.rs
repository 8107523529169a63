//! The commands of `tunguard`, each on top of a library module.

pub mod client;
mod client_status;
pub mod logging;
pub mod pki;
pub mod reload;
pub mod server;
pub mod status;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::exit::Failure;

/// A privilege-separated VPN: one process per session, and sessions that follow their clients
///
/// Start with certificates (tunguard pki --help), then a server, then clients. Every command has examples in its
/// own --help.
#[derive(Debug, Parser)]
#[command(name = "tunguard", version = crate::VERSION, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// How much is logged.
    #[command(flatten)]
    pub loudness: Loudness,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Loudness {
    /// Log more: once for debugging, twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Log warnings and errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make and revoke certificates
    #[command(subcommand)]
    Pki(pki::PkiCommand),
    /// Run a server in the foreground
    ///
    /// Logs to standard error. SIGHUP reads configuration, certificates and revocations again, as `tunguard reload`
    /// does; Ctrl-C or SIGTERM ends all sessions and puts the host back as it was.
    Server(server::ServerCommand),
    /// Connect to a server and stay connected, in the foreground
    ///
    /// Makes the tunnel device, routes and resolvers, and puts everything back when it is stopped by Ctrl-C or SIGTERM.
    /// A lost connection is looked for again until it is there.
    Client(client::ClientCommand),
    /// Show a running server's sessions, or a client's
    ///
    /// Without --socket: whatever runs here, as far as its socket is in /run/tunguard.
    Status(status::StatusCommand),
    /// Have a running server read its configuration, certificates and revocations again
    ///
    /// All of it or nothing: where something is wrong, what was there before stays in force. Sessions go on.
    Reload(reload::ReloadCommand),
}

/// Runs the command that the arguments name. Errors go to standard error, a sentence each.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if !matches!(cli.command, Command::Client(_)) {
        logging::install(cli.loudness);
    }
    let result = match cli.command {
        Command::Pki(command) => command.run(),
        Command::Server(command) => command.run(),
        Command::Client(command) => command.run(cli.loudness),
        Command::Status(command) => command.run(),
        Command::Reload(command) => command.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> ExitCode {
    for line in failure.text.lines() {
        // Where it can't be written the exit code still says what it was.
        let _ = writeln!(io::stderr(), "tunguard: {line}");
    }
    failure.exit.into()
}

const EXIT_CODES: &str = "\
Exit codes:
   0  done                          12  registration or message malformed
   1  system error                  13  certificate of another CA, use or name
   2  wrong usage or configuration  14  certificate revoked
   5  self-test of ciphers failed   15  no /dev/net/tun
   6  TLS failed                    16  a privilege is missing
   7  certificate unreadable        17  port in use
   8  private key unreadable        18  device in use
   9  key of another certificate    19  a program isn't installed
  10  certificate expired           20  tunguard's programs don't match
  11  refused                       21  reloaded, but nobody is let in";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_command_is_named_like_a_hidden_role() {
        for command in Cli::command().get_subcommands() {
            assert!(
                ![crate::client::role::TUNNEL, crate::client::role::LOOKUP].contains(&command.get_name())
            );
        }
    }
}
