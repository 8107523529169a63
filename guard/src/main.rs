//! `tunguard-guard`: the server process. It owns the TUN device, hands each session its packets through a
//! message queue, grants leases and slots, and starts one worker per connection. It parses nothing that comes
//! from the network but the addresses of inner packets.

#![forbid(unsafe_code)]

mod accounts;
mod admin;
mod away;
mod blocks;
mod clients;
mod codel;
mod entrance;
mod events;
mod gate;
mod grants;
mod holder;
mod host;
mod leases;
mod lives;
mod meters;
mod notify;
mod outbox;
mod privileges;
mod reload;
mod routes;
mod run;
mod slots;
mod spawn;
mod starting;
mod succession;
mod tickets;
mod trust;
mod uids;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tunguard::VERSION;
use tunguard::admin::Admin;
use tunguard::config::server::ServerConfig;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::key_ipc;
use tunguard::sandbox::Means;
use tunguard::stderr_log::{self, StderrLog};
use tunguard::sys::{capabilities, jail};

fn main() -> ExitCode {
    let (log, flush) = match stderr_log::start() {
        Ok(log) => log,
        Err(error) => {
            eprintln!("tunguard: can't start the log's thread: {error}");
            return Exit::System.into();
        }
    };
    tunguard::rigged::read_orders();
    let outcome = start(log).and_then(run::Guard::run);
    drop(flush);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            for line in failure.text.lines() {
                // Not through the log: its level is the user's, this must be seen.
                let _ = writeln!(std::io::stderr(), "tunguard: {line}");
            }
            failure.exit.into()
        }
    }
}

/// Everything between the command line and the first packet, in order: what can fail for reasons of
/// configuration comes before anything on the host is changed.
fn start(log: StderrLog) -> Outcome<run::Guard> {
    // 1. Who are we, and what are we told?
    let (file, log_level) = arguments()?;
    env_logger::Builder::new()
        .parse_filters(&log_level)
        .format_timestamp_secs()
        .format_target(false)
        .target(env_logger::Target::Pipe(Box::new(log)))
        .init();
    host::require_root()?;
    capabilities::keep(privileges::START)?;
    let mut config = ServerConfig::load(&file)?;
    // 2. What this kernel can lock processes in with, queues in a namespace of our own, the binaries beside us, and
    //    whether the users exist that they are to be.
    let sandbox = Means::find(config.sandbox)?;
    let queues = host::prepare_queues(&config)?;
    let spawner = spawn::Spawner::new(&config, sandbox, &queues)?;
    // 3. What decides whom to trust: the key holder is the first of these.
    let trust = trust::Trust::load(&mut config, sandbox)?;
    // 4. Ports: a second server on them ends here, before it disturbs the first.
    let (listener, slots) = slots::bind(&config)?;
    // 5. What was promised to whom before, and whether there is room to write down what will be.
    let leases = leases::Leases::load(&config)?;
    // 6. The host: device, addresses, routes, forwarding, nftables; undone in reverse when dropped.
    let host = host::Host::set_up(&config)?;
    let admin = Admin::listen(&config.socket, "server", |key| run::Source::Conversation(key).token())?;
    // Key holders that are started later inherit the limit, and not the privilege to raise it.
    jail::allow_locked_memory(key_ipc::ADDRESS_SPACE);
    // 7. What only the start needed goes, before anybody is served.
    capabilities::keep(privileges::LIFE)?;
    run::Guard::new(config, trust, spawner, listener, slots, host, queues, leases, admin)
}

/// `tunguard-guard VERSION --config FILE [--log FILTER]`, as `tunguard server` calls it.
fn arguments() -> Outcome<(PathBuf, String)> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = "tunguard-guard is started by: tunguard server --config server.toml";
    let [version, flag, file, rest @ ..] = &arguments[..] else { return Err(Failure::usage(usage)) };
    if version != VERSION {
        let text = format!("this guard is version {VERSION}, the command {version}: install them together");
        return Err(Failure::new(Exit::Version, text));
    }
    let level = match rest {
        [] => "info".to_owned(),
        [flag, level] if flag == "--log" => level.clone(),
        _ => return Err(Failure::usage(usage)),
    };
    if flag != "--config" {
        return Err(Failure::usage(usage));
    }
    Ok((Path::new(file).to_owned(), level))
}
