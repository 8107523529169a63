//! Kernel settings below /proc/sys (sysctl(8), Documentation/networking/ip-sysctl.rst). Keys are written with '/',
//! since a device name may hold dots: `net/ipv6/conf/eth0.5/accept_ra`.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::exit::{Exit, Failure, Outcome};

/// The value of `key`, trimmed; none where this kernel, or this namespace, has no such setting.
pub fn read(key: &str) -> Outcome<Option<String>> {
    match fs::read_to_string(path_of(key)) {
        Ok(value) => Ok(Some(value.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::system(format!("reading sysctl {}", shown(key)), e)),
    }
}

/// Sets `key` to `value`; false where it had that value already, in which case nothing is written: in
/// containers /proc/sys is read-only, and what is right needs no write.
pub fn ensure(key: &str, value: &str) -> Outcome<bool> {
    if read(key)?.as_deref() == Some(value) {
        return Ok(false);
    }
    let e = match fs::write(path_of(key), value) {
        Ok(()) => return Ok(true),
        Err(e) => e,
    };
    let what = format!("setting sysctl {} = {value}", shown(key));
    Err(match e.kind() {
        io::ErrorKind::ReadOnlyFilesystem => Failure::new(
            Exit::Privilege,
            format!(
                "{what}: /proc/sys is read-only here; set it from outside, for a container with \
                 --sysctl {}={value}",
                shown(key)
            ),
        ),
        io::ErrorKind::PermissionDenied => Failure::new(
            Exit::Privilege,
            format!("{what}: not permitted: this needs CAP_NET_ADMIN; run tunguard as root"),
        ),
        io::ErrorKind::NotFound => {
            Failure::new(Exit::System, format!("{what}: this kernel has no such setting"))
        }
        _ => Failure::system(what, e),
    })
}

/// The names below a directory of settings, as `net/ipv6/conf`; empty where it is missing.
pub fn list(directory: &str) -> Outcome<Vec<String>> {
    let failed = |e| Failure::system(format!("listing sysctls {}", shown(directory)), e);
    let entries = match fs::read_dir(path_of(directory)) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

fn path_of(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(key)
}

/// As sysctl(8) writes it: '.' between the parts, and '/' for a dot inside one.
fn shown(key: &str) -> String {
    key.chars()
        .map(|c| match c {
            '/' => '.',
            '.' => '/',
            other => other,
        })
        .collect()
}
