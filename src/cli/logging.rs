//! The log on standard error: short lines, and RUST_LOG for those who know what they look for.

use std::io::{self, Write};

use env_logger::{Builder, Env, Target};
use log::LevelFilter;

use super::Loudness;
use crate::stderr_log::{self, Flush};

/// The same for a command that serves others meanwhile: whoever reads the log, or doesn't, holds up nobody.
///
/// Errors: no thread can be started.
pub fn install_patiently(loudness: Loudness) -> io::Result<Flush> {
    let (log, flush) = stderr_log::start()?;
    let mut builder = builder(loudness);
    let _ = builder.target(Target::Pipe(Box::new(log))).try_init();
    Ok(flush)
}

/// Starts to log as loud as asked; RUST_LOG comes before the default, and a flag before both.
pub fn install(loudness: Loudness) {
    let _ = builder(loudness).try_init();
}

fn builder(loudness: Loudness) -> Builder {
    let mut builder = Builder::from_env(Env::default().default_filter_or("info"));
    match loudness {
        Loudness { quiet: true, .. } => builder.filter_level(LevelFilter::Warn),
        Loudness { verbose: 0, .. } => &mut builder,
        Loudness { verbose: 1, .. } => builder.filter_level(LevelFilter::Debug),
        Loudness { .. } => builder.filter_level(LevelFilter::Trace),
    };
    // The journal has times of its own.
    let stamped = std::env::var_os("JOURNAL_STREAM").is_none();
    builder.format(move |out, record| {
        if stamped {
            let stamp = out.timestamp_seconds().to_string();
            // 2026-01-31T12:34:56Z: the time of day, in UTC.
            write!(out, "{} ", stamp.get(11..).unwrap_or(&stamp))?;
        }
        writeln!(out, "{:5} {}", record.level(), record.args())
    });
    builder
}
