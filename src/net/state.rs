//! State files: what to undo after a crash, as JSON, replaced atomically.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::exit::{Failure, Outcome};

/// Reads a state file; none where there is none. One that doesn't parse is none of ours (they are only ever
/// replaced whole): it is reported and passed over, so that it can't keep the service down.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> Outcome<Option<T>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(Failure::system(format!("reading state file {}", path.display()), e)),
    };
    match serde_json::from_slice(&bytes) {
        Ok(state) => Ok(Some(state)),
        Err(e) => {
            log::warn!("state file {} is damaged and will be replaced: {e}", path.display());
            Ok(None)
        }
    }
}

/// Writes a state file, readable by its owner only; its directory is made where it is missing.
pub(crate) fn store<T: Serialize>(path: &Path, state: &T) -> Outcome<()> {
    let failed = |e: io::Error| Failure::system(format!("writing state file {}", path.display()), e);
    let text = serde_json::to_vec_pretty(state).map_err(|e| failed(e.into()))?;
    let directory = directory_of(path);
    fs::create_dir_all(directory).map_err(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
    file.write_all(&text).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    file.persist(path).map(drop).map_err(|e| failed(e.error))
}

/// Removes a state file, if it is there.
pub(crate) fn remove(path: &Path) -> Outcome<()> {
    match fs::remove_file(path) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(Failure::system(format!("removing state file {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

/// Identifies the running kernel (random(4)): routes and sysctls recorded under another one are gone.
pub(crate) fn boot_id() -> String {
    match fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(id) => id.trim().to_owned(),
        Err(e) => {
            log::debug!("no boot id: {e}");
            String::new()
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
