//! The worker's log lines go to the guard: the worker can write to no file of its own, and the guard escapes
//! and limits what is shown.

use std::sync::OnceLock;

use log::{LevelFilter, Log, Metadata, Record};
use tunguard::ipc::{MAX_LOG_LINE, Request, WorkerEnd};

/// Sends log lines and panics over `channel` from now on; the channel, for everything else. To be called once.
pub fn install(channel: WorkerEnd) -> &'static WorkerEnd {
    let channel = CHANNEL.get_or_init(|| channel);
    if log::set_logger(&GuardLog).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
    std::panic::set_hook(Box::new(|panic| log::error!("the worker panicked: {panic}")));
    channel
}

/// Shows lines up to `level`, as `log::LevelFilter` numbers them.
pub fn set_level(level: u8) {
    let level = LevelFilter::iter().nth(level.into()).unwrap_or(LevelFilter::Info);
    log::set_max_level(level);
}

struct GuardLog;

impl Log for GuardLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let (true, Some(channel)) = (self.enabled(record.metadata()), CHANNEL.get()) else { return };
        let mut text = record.args().to_string();
        while text.len() > MAX_LOG_LINE {
            text.pop();
        }
        // A guard that doesn't read costs us the line, never the traffic.
        let _ = channel.send(&Request::Log { level: record.level() as u8, text }, &[]);
    }

    fn flush(&self) {}
}

static CHANNEL: OnceLock<WorkerEnd> = OnceLock::new();
