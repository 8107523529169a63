//! A log that never holds up the traffic: lines go to standard error by a thread of their own. While whoever reads
//! it doesn't, lines are dropped and counted.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use crate::sys::capabilities;

/// The way to the thread, for `env_logger::Target::Pipe`.
pub struct StderrLog {
    lines: SyncSender<Word>,
}

/// Waits, when dropped, for the lines still on their way, but not for ever.
pub struct Flush {
    lines: SyncSender<Word>,
}

enum Word {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// Starts the thread, which has no privileges.
pub fn start() -> io::Result<(StderrLog, Flush)> {
    let (lines, received) = mpsc::sync_channel(LINES_WAITING);
    let (ready, renounced) = mpsc::sync_channel(1);
    let live = move || {
        let done = capabilities::renounce();
        let goes_on = done.is_ok();
        let _ = ready.send(done);
        if goes_on {
            write_lines(&received);
        }
    };
    thread::Builder::new().name("log".into()).spawn(live)?;
    renounced.recv().map_err(|_| io::Error::other("it panicked"))??;
    Ok((StderrLog { lines: lines.clone() }, Flush { lines }))
}

fn write_lines(lines: &Receiver<Word>) {
    while let Ok(word) = lines.recv() {
        match word {
            Word::Line(line) => {
                let mut stderr = io::stderr().lock();
                let lost = LOST.swap(0, Ordering::Relaxed);
                if lost > 0 {
                    let _ = writeln!(stderr, "{lost} log lines were lost here, as nobody read them");
                }
                // Nobody to complain to.
                let _ = stderr.write_all(&line);
            }
            Word::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

impl Write for StderrLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.lines.try_send(Word::Line(line.to_vec())) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                LOST.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        let (done, finished) = mpsc::sync_channel(1);
        if self.lines.try_send(Word::Flush(done)).is_ok() {
            let _ = finished.recv_timeout(FLUSH_WAIT);
        }
    }
}

static LOST: AtomicU64 = AtomicU64::new(0);
const LINES_WAITING: usize = 1024;
const FLUSH_WAIT: Duration = Duration::from_secs(1);
