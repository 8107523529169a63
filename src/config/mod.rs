//! Configuration files, parsed into types that can only be valid.
//!
//! Every error names file, line, full key, what is wrong with the value and what is accepted; a file's
//! errors are reported together, one a line.

pub mod client;
mod clients;
pub mod common;
mod reader;
pub mod server;

/// An example file with every commented-out key set.
#[cfg(test)]
fn uncommented(text: &str) -> String {
    let line = |line: &str| match line.strip_prefix('#') {
        Some(key) if !key.starts_with(' ') => format!("{key}\n"),
        _ => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}
