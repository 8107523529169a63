//! `tunguard-roam`: what traffic inside a VPN notices of its client's moves. For bench/roam.sh, and for nothing else.

#![forbid(unsafe_code)]

mod attack;
mod delay;
mod flow;
mod judge;
mod transfer;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use nix::time::{ClockId, clock_gettime};
use tunguard::config::common::DeviceName;

#[derive(Parser)]
#[command(about = "What traffic inside a VPN notices of its client's moves", version)]
enum Command {
    /// Sends numbered UDP packets at an even pace until it is ended; what can't be sent is lost.
    Send {
        /// Where `receive` listens, inside the VPN.
        #[arg(long)]
        to: SocketAddr,
        /// Packets per second.
        #[arg(long, default_value_t = 500)]
        rate: u64,
        /// Bytes of each.
        #[arg(long, default_value_t = 200)]
        size: usize,
    },
    /// Receives them around one move, and prints what was noticed of it as JSON.
    ///
    /// Prints `steady` when packets have arrived evenly for a second. Reads `move` from standard input just before
    /// the move, and `back` when it is done and the network is whole again; ends when packets arrive evenly after
    /// that, or not in time.
    Receive {
        /// UDP port.
        #[arg(long)]
        port: u16,
        /// Packets per second that are sent.
        #[arg(long, default_value_t = 500)]
        rate: u64,
        /// Seconds after `back` until it counts as lost for good.
        #[arg(long, default_value_t = 20.0)]
        limit: f64,
        /// Seconds without a new silence after which it has recovered.
        #[arg(long, default_value_t = 2.0)]
        settle: f64,
        /// A log of the VPN, in which --line is waited for.
        #[arg(long, requires = "line")]
        log: Option<PathBuf>,
        /// What a line in --log says: its time is told, too, and it isn't over before.
        #[arg(long, requires = "log")]
        line: Option<String>,
    },
    /// Makes a TUN device that gives every packet back later: a long way between two ends, by routes through it.
    Delay {
        /// Name of the device.
        #[arg(long)]
        device: DeviceName,
        /// How much later, in milliseconds.
        #[arg(long)]
        ms: f64,
    },
    /// Makes two TUN devices, and attacks the client whose datagrams are led through the first: for bench/attacks.sh.
    ///
    /// Prints a line of JSON for each attack.
    Attack {
        /// Device that all UDP between client and server is led through.
        #[arg(long)]
        tap: DeviceName,
        /// Device of the attacker's own network.
        #[arg(long)]
        own: DeviceName,
        /// The client's address.
        #[arg(long)]
        client: Ipv4Addr,
        /// The server's address.
        #[arg(long)]
        server: Ipv4Addr,
        /// The attacker's network, a /24.
        #[arg(long)]
        network: Ipv4Addr,
        /// How often each attack is tried.
        #[arg(long, default_value_t = 3)]
        times: u32,
    },
    /// Transfers bytes over TCP, with their SHA-256 at both ends.
    #[command(subcommand)]
    Tcp(Tcp),
}

#[derive(clap::Subcommand)]
enum Tcp {
    /// Connects, sends and prints what both ends saw, as JSON.
    Send {
        /// Where `tcp receive` listens.
        #[arg(long)]
        to: SocketAddr,
        /// How many bytes.
        #[arg(long)]
        bytes: u64,
        /// Bytes per second at most.
        #[arg(long, default_value_t = 2_000_000)]
        rate: u64,
        /// Seconds of standstill after which it has failed.
        #[arg(long, default_value_t = 60)]
        patience: u64,
    },
    /// Accepts one connection, reads it to its end and answers with what it saw.
    Receive {
        /// TCP port.
        #[arg(long)]
        port: u16,
        /// Seconds of standstill after which it has failed.
        #[arg(long, default_value_t = 60)]
        patience: u64,
    },
}

fn main() -> ExitCode {
    match run(Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tunguard-roam: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> io::Result<()> {
    match command {
        Command::Send { to, rate, size } => flow::send(to, rate, size),
        Command::Receive { port, rate, limit, settle, log, line } => {
            let bounds = judge::Bounds {
                interval: SECOND / rate,
                limit: (limit * SECOND as f64) as u64,
                settle: (settle * SECOND as f64) as u64,
                awaits_log: log.is_some(),
            };
            let report = flow::receive(port, &bounds, log.as_deref().zip(line))?;
            println!("{}", serde_json::to_string(&report)?);
            Ok(())
        }
        Command::Delay { device, ms } => delay::relay(&device, (ms * 1e6) as u64),
        Command::Attack { tap, own, client, server, network, times } => {
            attack::attack(&tap, &own, attack::Scene { client, server, own: network }, times)
        }
        Command::Tcp(Tcp::Send { to, bytes, rate, patience }) => {
            let sent = transfer::send(to, bytes, rate, Duration::from_secs(patience))?;
            println!("{}", serde_json::to_string(&sent)?);
            Ok(())
        }
        Command::Tcp(Tcp::Receive { port, patience }) => {
            transfer::receive(port, Duration::from_secs(patience))
        }
    }
}

/// Now, in nanoseconds of CLOCK_MONOTONIC: the same clock in every network namespace.
fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has CLOCK_MONOTONIC");
    now.tv_sec() as u64 * SECOND + now.tv_nsec() as u64
}

/// In nanoseconds.
const SECOND: u64 = 1_000_000_000;
