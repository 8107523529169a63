//! `tunguard`: the client, and the tools around it. `tunguard --help` lists them.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use tunguard::{cli, client, rigged};

fn main() -> ExitCode {
    rigged::read_orders();
    // The client starts this program again in other roles, which no user asks for by hand.
    match std::env::args_os().nth(1) {
        Some(first) if first == client::role::TUNNEL => client::tunnel::main(),
        Some(first) if first == client::role::LOOKUP => client::lookup::main(),
        _ => cli::main(),
    }
}
