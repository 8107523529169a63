//! The tunnel process's log lines go to the supervisor: it can write to no file of its own, and the supervisor
//! escapes and limits what is shown.

use std::sync::OnceLock;

use log::{LevelFilter, Log, Metadata, Record};

use super::ipc::{Request, TunnelEnd, truncate};

/// Sends log lines and panics over `channel` from now on; the channel, for everything else. To be called once.
pub(super) fn install(channel: TunnelEnd) -> &'static TunnelEnd {
    let channel = CHANNEL.get_or_init(|| channel);
    if log::set_logger(&SupervisorLog).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
    std::panic::set_hook(Box::new(|panic| log::error!("the tunnel process panicked: {panic}")));
    channel
}

/// Shows lines up to `level`, as `log::LevelFilter` numbers them.
pub(super) fn set_level(level: u8) {
    let level = LevelFilter::iter().nth(level.into()).unwrap_or(LevelFilter::Info);
    log::set_max_level(level);
}

struct SupervisorLog;

impl Log for SupervisorLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let (true, Some(channel)) = (self.enabled(record.metadata()), CHANNEL.get()) else { return };
        let mut text = record.args().to_string();
        truncate(&mut text);
        // A supervisor that doesn't read costs us the line, never the traffic.
        let _ = channel.send(&Request::Log { level: record.level() as u8, text }, &[]);
    }

    fn flush(&self) {}
}

static CHANNEL: OnceLock<TunnelEnd> = OnceLock::new();
