//! The log on standard error: short lines, and RUST_LOG for those who know what they look for.

use std::io::Write;

use env_logger::{Builder, Env};
use log::LevelFilter;

use super::Loudness;

/// Starts to log as loud as asked; RUST_LOG comes before the default, and a flag before both.
pub fn install(loudness: Loudness) {
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
    let _ = builder.try_init();
}
