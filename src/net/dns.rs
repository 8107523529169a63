//! The client's resolvers, by the first of three ways the host has:
//!
//! 1. systemd-resolved, where name lookups go through it: the tunnel's link gets the servers, the routing domain
//!    `~.` and `default-route` (resolvectl(1)), so every name is asked there. Gone with the device.
//! 2. resolvconf(8), Debian's or openresolv.
//! 3. /etc/resolv.conf itself: the original goes into the state file and comes back, unless somebody else
//!    wrote the file meanwhile.
//!
//! Addresses come from the server: they are parsed types here, and no shell sees them.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::{programs, state};
use crate::config::common::DeviceName;
use crate::exit::{Failure, Outcome};
use crate::rigged::point;

/// Applied resolvers, until [`DnsKeeper::clear`] or drop.
#[derive(Debug)]
pub struct DnsKeeper {
    /// None once cleared.
    state_file: Option<PathBuf>,
    way: Way,
}

/// How resolvers were set, and what `state_file` holds: all that undoing it takes.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Way {
    Resolved { device: String, index: u32 },
    Resolvconf { record: String },
    File { original: Original, written: String },
}

/// What /etc/resolv.conf was.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Original {
    Missing,
    Link(PathBuf),
    File { content: Vec<u8>, mode: u32 },
}

impl DnsKeeper {
    /// Makes `servers` the host's resolvers; none where there are none. Repairs what a killed run with the same
    /// state file left. The state file must be this device's own.
    pub fn apply(
        device: &DeviceName,
        index: u32,
        servers: &[IpAddr],
        state_file: PathBuf,
    ) -> Outcome<Option<DnsKeeper>> {
        repair(&state_file)?;
        if servers.is_empty() {
            return Ok(None);
        }
        let resolvectl = programs::find("resolvectl").filter(|_| resolved_is_asked());
        let resolvconf = programs::find("resolvconf").filter(|program| !is_resolvectl(program));
        let way = if resolvectl.is_some() {
            Way::Resolved { device: device.to_string(), index }
        } else if resolvconf.is_some() {
            // Debian's /etc/resolvconf/interface-order puts tun* before the LAN's devices.
            Way::Resolvconf { record: format!("tun.{device}") }
        } else {
            Way::File { original: read_original()?, written: resolv_conf(device, servers) }
        };
        state::store(&state_file, &way)?;
        point("supervisor.dns-noted");
        // From here on an error undoes what was done, by drop.
        let keeper = DnsKeeper { state_file: Some(state_file), way };
        match (&keeper.way, resolvectl, resolvconf) {
            (Way::Resolved { .. }, Some(program), _) => {
                // By index: a device may be called "12" or "-h".
                let index = index.to_string();
                let servers: Vec<String> = servers.iter().map(IpAddr::to_string).collect();
                let dns: Vec<&str> =
                    ["dns", &index].into_iter().chain(servers.iter().map(String::as_str)).collect();
                programs::run_well(&program, &dns, "")?;
                programs::run_well(&program, &["domain", &index, "~."], "")?;
                programs::run_well(&program, &["default-route", &index, "yes"], "")?;
            }
            (Way::Resolvconf { record }, _, Some(program)) => {
                let text = nameservers(servers);
                if Path::new("/etc/resolvconf/interface-order").exists() {
                    programs::run_well(&program, &["-a", record], &text)?;
                } else {
                    // openresolv: highest priority, and nobody else's servers.
                    programs::run_well(&program, &["-a", record, "-m", "0", "-x"], &text)?;
                }
            }
            (Way::File { written, .. }, ..) => put(RESOLV_CONF, &Original::text(written))?,
            _ => {}
        }
        point("supervisor.dns-written");
        Ok(Some(keeper))
    }

    /// Puts the host's resolvers back.
    pub fn clear(mut self) -> Outcome<()> {
        self.undo()
    }

    fn undo(&mut self) -> Outcome<()> {
        let Some(state_file) = self.state_file.take() else { return Ok(()) };
        undo(&self.way)?;
        point("supervisor.dns-back");
        state::remove(&state_file)
    }
}

impl Drop for DnsKeeper {
    fn drop(&mut self) {
        if let Err(e) = self.undo() {
            log::warn!("restoring the resolvers: {e}");
        }
    }
}

/// Puts back the resolvers that a killed run noted in `state_file`.
pub fn repair(state_file: &Path) -> Outcome<()> {
    if let Some(way) = state::load::<Way>(state_file)? {
        log::info!("restoring resolvers that a killed run left behind");
        undo(&way)?;
    }
    state::remove(state_file)
}

fn undo(way: &Way) -> Outcome<()> {
    match way {
        Way::Resolved { device, index } => {
            // With the device its settings are gone, and its index is nobody's or another's.
            let there = nix::net::if_::if_nametoindex(&device[..]).is_ok_and(|now| now == *index);
            match programs::find("resolvectl").filter(|_| there) {
                Some(program) => programs::run_well(&program, &["revert", &index.to_string()], ""),
                None => Ok(()),
            }
        }
        Way::Resolvconf { record } => match programs::find("resolvconf") {
            Some(program) => programs::run_well(&program, &["-d", record], ""),
            None => Ok(()),
        },
        Way::File { original, written } => match read_original()? {
            Original::File { content, .. } if content == written.as_bytes() => put(RESOLV_CONF, original),
            now if now == *original => Ok(()),
            _ => {
                log::warn!("{RESOLV_CONF} stays as it is: somebody else changed it while tunguard ran");
                Ok(())
            }
        },
    }
}

impl Original {
    fn text(content: &str) -> Original {
        Original::File { content: content.as_bytes().to_owned(), mode: 0o644 }
    }
}

/// Whether the host's lookups reach systemd-resolved: it runs, and either /etc/resolv.conf leads to it or
/// nss-resolve(8) is in use. A resolved that nobody asks would leave every lookup outside the tunnel.
fn resolved_is_asked() -> bool {
    if !Path::new(RESOLVED).is_dir() {
        return false;
    }
    let leads_there = fs::canonicalize(RESOLV_CONF).is_ok_and(|to| to.starts_with(RESOLVED));
    let has_line = |file: &str, fits: fn(&[&str]) -> bool| {
        fs::read(file).is_ok_and(|bytes| {
            String::from_utf8_lossy(&bytes)
                .lines()
                .any(|line| fits(&line.split_ascii_whitespace().collect::<Vec<_>>()))
        })
    };
    leads_there
        || has_line(RESOLV_CONF, |words| matches!(words, ["nameserver", "127.0.0.53" | "127.0.0.54", ..]))
        || has_line("/etc/nsswitch.conf", |words| {
            words.first() == Some(&"hosts:") && words.contains(&"resolve")
        })
}

/// systemd installs its resolvectl under this name too, for hosts where resolved runs; then way 1 is taken.
fn is_resolvectl(program: &Path) -> bool {
    fs::canonicalize(program).is_ok_and(|file| file.file_name().is_some_and(|name| name == "resolvectl"))
}

/// resolv.conf(5). Only `options` stay of what was there: the LAN's search domains would let it choose
/// what short names mean inside the tunnel.
fn resolv_conf(device: &DeviceName, servers: &[IpAddr]) -> String {
    let mut text = format!("# By tunguard for {device}; the file it replaces comes back at its end.\n");
    if servers.len() > MAXNS {
        log::warn!("only the first {MAXNS} of {} resolvers are used by the C library", servers.len());
    }
    text.push_str(&nameservers(servers));
    let before = fs::read(RESOLV_CONF).unwrap_or_default();
    for line in String::from_utf8_lossy(&before).lines().filter(|line| line.starts_with("options ")) {
        text.push_str(line);
        text.push('\n');
    }
    text
}

fn nameservers(servers: &[IpAddr]) -> String {
    servers.iter().map(|server| format!("nameserver {server}\n")).collect()
}

fn read_original() -> Outcome<Original> {
    let failed = |e: io::Error| Failure::system(format!("reading {RESOLV_CONF}"), e);
    let metadata = match fs::symlink_metadata(RESOLV_CONF) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Original::Missing),
        Err(e) => return Err(failed(e)),
    };
    if metadata.is_symlink() {
        return fs::read_link(RESOLV_CONF).map(Original::Link).map_err(failed);
    }
    let content = fs::read(RESOLV_CONF).map_err(failed)?;
    Ok(Original::File { content, mode: metadata.permissions().mode() & 0o7777 })
}

/// Makes `path` be `what`: by renaming over it, so that nobody reads half a file and a link is replaced rather
/// than followed; in place where the file can't be replaced, because it is a bind mount (in containers) or its
/// directory is read-only.
fn put(path: &str, what: &Original) -> Outcome<()> {
    let failed = |e: io::Error| {
        Failure::system(
            format!("writing {path}"),
            format_args!("{e}; set the resolvers by hand, or dns = \"none\""),
        )
    };
    let directory = Path::new(path).parent().unwrap_or(Path::new("/"));
    match what {
        Original::Missing => match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(e)),
            _ => Ok(()),
        },
        Original::Link(target) => {
            let beside = format!("{path}.tunguard-{}", std::process::id());
            symlink(target, &beside).and_then(|()| fs::rename(&beside, path)).map_err(|e| {
                let removed = fs::remove_file(&beside);
                log::debug!("{beside}: {removed:?}");
                failed(e)
            })
        }
        Original::File { content, mode } => {
            let replaced = tempfile::Builder::new()
                .prefix(".resolv.conf.tunguard-")
                .permissions(fs::Permissions::from_mode(*mode))
                .tempfile_in(directory)
                .and_then(|mut file| {
                    file.write_all(content)?;
                    // Beyond the umask.
                    file.as_file().set_permissions(fs::Permissions::from_mode(*mode))?;
                    file.as_file().sync_all()?;
                    file.persist(path).map(drop).map_err(|e| e.error)
                });
            match replaced {
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::ResourceBusy
                            | io::ErrorKind::CrossesDevices
                            | io::ErrorKind::ReadOnlyFilesystem
                    ) =>
                {
                    log::debug!("{path} can't be replaced ({e}): writing it in place");
                    fs::write(path, content).map_err(failed)
                }
                other => other.map_err(failed),
            }
        }
    }
}

const RESOLV_CONF: &str = "/etc/resolv.conf";
const RESOLVED: &str = "/run/systemd/resolve";
/// MAXNS in resolv.h.
const MAXNS: usize = 3;
