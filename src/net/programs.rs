//! The few programs tunguard calls: found without a shell, run with a fixed environment and bounded in time.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::exit::{Failure, Outcome};

/// The program called `name` in the absolute directories of PATH, then in the usual ones: a service's or a plain
/// user's PATH often lacks /usr/sbin.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(env::split_paths(OsStr::new(USUAL_PATH)))
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(name))
        .find(|file| is_executable(file))
}

/// How a program ended.
pub(super) struct Finished {
    pub status: ExitStatus,
    /// What it said on standard output and standard error.
    pub said: String,
}

/// Runs `program` and feeds it `input`. Both ends are files in memory, so neither side can block the other.
pub(super) fn run(program: &Path, arguments: &[&str], input: &str) -> Outcome<Finished> {
    let failed = |e: std::io::Error| Failure::system(format!("running {}", program.display()), e);
    let mut stdin = memory_file().map_err(failed)?;
    stdin.write_all(input.as_bytes()).and_then(|()| stdin.rewind()).map_err(failed)?;
    let mut output = memory_file().map_err(failed)?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", USUAL_PATH)
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(output.try_clone().map_err(failed)?))
        .stderr(Stdio::from(output.try_clone().map_err(failed)?))
        .spawn()
        .map_err(failed)?;
    let deadline = Instant::now() + FINISH_WITHIN;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
        if Instant::now() >= deadline {
            let ended = child.kill().and_then(|()| child.wait());
            log::debug!("{} was killed: {ended:?}", program.display());
            return Err(Failure::system(
                format!("running {}", program.display()),
                format_args!("it did not finish within {} s", FINISH_WITHIN.as_secs()),
            ));
        }
        thread::sleep(LOOK_EVERY);
    };
    let mut said = Vec::new();
    output.seek(SeekFrom::Start(0)).map_err(failed)?;
    output.take(SAID_AT_MOST).read_to_end(&mut said).map_err(failed)?;
    Ok(Finished { status, said: one_line(&String::from_utf8_lossy(&said)) })
}

/// Runs `program`; an exit status other than 0 is an error that quotes it.
pub(super) fn run_well(program: &Path, arguments: &[&str], input: &str) -> Outcome<()> {
    let finished = run(program, arguments, input)?;
    if finished.status.success() {
        return Ok(());
    }
    let what =
        [&program.display().to_string()[..]].iter().chain(arguments).copied().collect::<Vec<_>>().join(" ");
    Err(Failure::system(what, format_args!("{} ({})", finished.said, finished.status)))
}

fn memory_file() -> std::io::Result<File> {
    Ok(File::from(memfd_create("tunguard", MFdFlags::MFD_CLOEXEC)?))
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Fit for a log line: control characters become spaces, lines are joined.
fn one_line(text: &str) -> String {
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>())
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines.join(" | ").trim().to_owned()
}

const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const FINISH_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(2);
const SAID_AT_MOST: u64 = 4_096;
