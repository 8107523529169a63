//! `tunguard-flood`: what no client would send, as often as is asked for. For bench/floods.sh, in namespaces of its own, and
//! for nothing else.

#![forbid(unsafe_code)]

mod connections;
mod datagrams;
mod pace;

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::datagrams::{Flow, observe};

#[derive(Parser)]
#[command(about = "Floods a VPN's server, to measure what its clients notice", version)]
struct Command {
    #[command(flatten)]
    volume: Volume,
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Args)]
struct Volume {
    /// Datagrams or connections per second.
    #[arg(long)]
    rate: u64,
    /// How long.
    #[arg(long)]
    seconds: f64,
    /// Where the server listens.
    #[arg(long)]
    to: SocketAddrV4,
}

#[derive(Subcommand)]
enum Kind {
    /// TCP connections that say nothing, each from one of the addresses in turn, closed after a while.
    Connect {
        /// Addresses of this host.
        #[arg(long, required = true, num_args = 1..)]
        from: Vec<Ipv4Addr>,
        /// How long each stays open.
        #[arg(long, default_value_t = 1000)]
        hold_ms: u64,
    },
    /// UDP datagrams of random bytes, from addresses of a /24 that nobody has.
    Unknown {
        /// The network.
        #[arg(long)]
        from: Ipv4Addr,
        /// Bytes in each.
        #[arg(long, default_value_t = 120)]
        size: usize,
    },
    /// UDP datagrams that begin as one that was just seen of the client, and come from its address and port.
    Live {
        /// The client, whose datagrams are forwarded by this host.
        #[arg(long)]
        client: Ipv4Addr,
        /// How many bytes stay as they were seen; the rest is random.
        #[arg(long)]
        keep: usize,
        /// Bytes in each.
        #[arg(long, default_value_t = 120)]
        size: usize,
    },
}

fn main() -> ExitCode {
    match run(Command::parse()) {
        Ok(sent) => {
            println!("{}", serde_json::json!({ "sent": sent }));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("tunguard-flood: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(Command { volume, kind }: Command) -> io::Result<u64> {
    let Volume { rate, seconds, to } = volume;
    let time = Duration::from_secs_f64(seconds);
    match kind {
        Kind::Connect { from, hold_ms } => {
            connections::flood(to, &from, Duration::from_millis(hold_ms), rate, time)
        }
        Kind::Unknown { from, size } => datagrams::flood(&Flow::unknown(from, to, size), rate, time),
        Kind::Live { client, keep, size } => {
            let seen = observe(client, to, PATIENCE)?;
            datagrams::flood(&Flow::like(&seen, keep, size), rate, time)
        }
    }
}

/// For a datagram of the client's.
const PATIENCE: Duration = Duration::from_secs(5);
