//! `tunguard-swarm`: many real client sessions in one process (TLS, own certificates and keys, sealed
//! datagrams), without devices of their own. For measuring a server, and for nothing else.

#![forbid(unsafe_code)]

mod certificates;
mod echo;
mod member;
mod swarm;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tunguard::exit::Outcome;

#[derive(Parser)]
#[command(about = "Many tunguard client sessions in one process, to measure a server", version)]
enum Command {
    /// Makes an authority, a server's certificate and COUNT clients' in DIR.
    Mint {
        /// Where to put them.
        #[arg(long)]
        dir: PathBuf,
        /// Clients.
        #[arg(long)]
        count: usize,
        /// The server's address, for its certificate.
        #[arg(long)]
        server: std::net::IpAddr,
    },
    /// Makes COUNT sessions as fast as the server lets it, and prints how long that took, as JSON.
    Connect {
        #[command(flatten)]
        target: Target,
        /// Handshakes under way at once.
        #[arg(long, default_value_t = 8)]
        parallel: usize,
        /// Seconds to hold them all before leaving.
        #[arg(long, default_value_t = 0.0)]
        hold: f64,
        /// Break off instead of saying goodbye.
        #[arg(long)]
        rude: bool,
    },
    /// Holds COUNT sessions of which the first ACTIVE exchange pings with the server, and prints what came back
    /// to each, as JSON.
    Traffic {
        #[command(flatten)]
        target: Target,
        /// Sessions that exchange packets.
        #[arg(long)]
        active: usize,
        /// How long.
        #[arg(long, default_value_t = 5.0)]
        seconds: f64,
        /// Bytes of each ping's packet.
        #[arg(long, default_value_t = 1400)]
        size: usize,
        /// Pings under way at once, for each session.
        #[arg(long, default_value_t = 32)]
        window: usize,
        /// Inner address of the server.
        #[arg(long, default_value = "10.9.0.1")]
        inner: Ipv4Addr,
        /// Pings after which a session stops, however much time is left.
        #[arg(long)]
        pings: Option<u64>,
    },
    /// Holds COUNT sessions as clients would, of which the first ACTIVE send pings every so often, and prints how many still
    /// stand at the end and what came back, as JSON.
    Hold {
        #[command(flatten)]
        target: Target,
        /// Sessions that exchange packets.
        #[arg(long)]
        active: usize,
        /// How long.
        #[arg(long)]
        seconds: f64,
        /// Milliseconds between pings of one session.
        #[arg(long, default_value_t = 100)]
        every_ms: u64,
        /// Bytes of each ping's packet.
        #[arg(long, default_value_t = 1000)]
        size: usize,
        /// Inner address of the server.
        #[arg(long, default_value = "10.9.0.1")]
        inner: Ipv4Addr,
    },
}

#[derive(clap::Args)]
struct Target {
    /// Where `mint` put the certificates.
    #[arg(long)]
    dir: PathBuf,
    /// The server's address and port.
    #[arg(long)]
    server: SocketAddr,
    /// Sessions.
    #[arg(long)]
    count: usize,
}

fn main() -> ExitCode {
    match run(Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("tunguard-swarm: {failure}");
            failure.exit.into()
        }
    }
}

fn run(command: Command) -> Outcome<()> {
    match command {
        Command::Mint { dir, count, server } => certificates::mint(&dir, count, server),
        Command::Connect { target, parallel, hold, rude } => {
            let mut swarm = swarm::Swarm::new(&target.dir, target.server, target.count)?;
            let took = swarm.connect_all(parallel)?;
            let per_second = target.count as f64 / took.as_secs_f64();
            println!(
                "{}",
                serde_json::json!({
                    "sessions": target.count, "seconds": took.as_secs_f64(), "per_second": per_second,
                })
            );
            swarm.idle(Duration::from_secs_f64(hold))?;
            if !rude {
                swarm.leave();
            }
            Ok(())
        }
        Command::Traffic { target, active, seconds, size, window, inner, pings } => {
            let mut swarm = swarm::Swarm::new(&target.dir, target.server, target.count)?;
            swarm.connect_all(8)?;
            let load = swarm::Load { active, size, window, inner, pings: pings.unwrap_or(u64::MAX) };
            println!("{}", swarm.exchange(&load, Duration::from_secs_f64(seconds))?);
            swarm.leave();
            Ok(())
        }
        Command::Hold { target, active, seconds, every_ms, size, inner } => {
            let mut swarm = swarm::Swarm::new(&target.dir, target.server, target.count)?;
            swarm.connect_all(8)?;
            // For who watches from outside.
            eprintln!("connected");
            let load = swarm::Load { active, size, window: 1, inner, pings: u64::MAX };
            let every = Duration::from_millis(every_ms);
            println!("{}", swarm.hold(&load, every, Duration::from_secs_f64(seconds))?);
            swarm.leave();
            Ok(())
        }
    }
}
