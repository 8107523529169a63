//! IP forwarding, switched on while a server runs and put back as it was.
//!
//! Switching it has side effects, which are put back too:
//! - `net.ipv4.ip_forward` writes every device's `forwarding` and `all.accept_redirects`, and switching it off
//!   *allows* redirects whatever the administrator had (inet_forward_change() in net/ipv4/devinet.c).
//! - `net.ipv6.conf.all.forwarding` writes every device's `forwarding`, and makes the kernel drop the default
//!   routes it learned from router advertisements, except on devices with `accept_ra = 2`
//!   (addrconf_fixup_forwarding(), rt6_purge_dflt_routers()): the host would cut itself off. So devices that
//!   accept advertisements now (`accept_ra = 1`, `forwarding = 0`) get 2 first. `default` stays as it is, so a
//!   device plugged in later behaves as on any router.
//!
//! `net.ipv4.conf.all.send_redirects` goes off as well. A packet from the tunnel into the tunnel would otherwise
//! be answered with "use the other client directly", which is no use on a tunnel, and worse: the redirect is sent
//! before the forward hook and uses up the sender's rate limit (ip_rt_send_redirect()), so that the table's own
//! refusal is never sent. A device's own setting counts as well (either suffices), so others keep theirs, and
//! [`quiet_device`](super::quiet_device) cares for the tunnel's.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::{state, sysctl};
use crate::exit::{Failure, Outcome};
use crate::rigged::point;

/// Forwarding, on until [`Forwarding::restore`] or drop.
///
/// Several servers of one host may share a state file, and should: each holds a shared lock on the file beside
/// it (`STATE_FILE.lock`), and the last to leave restores. The kernel drops the lock of a killed one.
#[derive(Debug)]
pub struct Forwarding {
    state_file: PathBuf,
    /// None once restored.
    users: Option<Flock<File>>,
}

/// What `state_file` holds.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
struct Changes {
    /// Settings don't outlive the kernel they were made in.
    boot_id: String,
    changes: Vec<Change>,
}

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Change {
    key: String,
    was: String,
    /// What we set; none where the kernel changed it by itself when we set something else.
    set: Option<String>,
}

impl Forwarding {
    /// Switches forwarding on for the families asked for, where it is off. What it changes is in `state_file`
    /// before it happens, and what an earlier run left there (it was killed) is still restored by this one.
    ///
    /// Call [`quiet_device`](super::quiet_device) on the tunnel device first: it must not count as a device that
    /// accepts router advertisements.
    pub fn enable(v4: bool, v6: bool, state_file: &Path) -> Outcome<Forwarding> {
        let users = lock_shared(state_file)?;
        let forwarding = Forwarding { state_file: state_file.to_owned(), users: Some(users) };
        let mut changes = recorded(state_file)?;
        // Dropping `forwarding` on an error below restores what was done until then.
        if v4 {
            forwarding.switch_on_v4(&mut changes)?;
            if let Err(e) = forwarding.redirects_off(&mut changes) {
                log::debug!("redirects stay on: {e}");
            }
        }
        if v6 {
            forwarding.switch_on_v6(&mut changes)?;
        }
        Ok(forwarding)
    }

    /// Puts everything back that still is as we set it, unless another server of this host needs it.
    pub fn restore(mut self) -> Outcome<()> {
        self.put_back()
    }

    fn switch_on_v4(&self, changes: &mut Changes) -> Outcome<()> {
        match sysctl::read(V4_FORWARD)?.as_deref() {
            None | Some("0") => {}
            Some(_) => return Ok(()),
        }
        let mut new = vec![Change::ours(V4_FORWARD, "0", "1")];
        for device in sysctl::list("net/ipv4/conf")? {
            let key = format!("net/ipv4/conf/{device}/forwarding");
            if device != "all" && sysctl::read(&key)?.as_deref() == Some("1") {
                new.push(Change::side_effect(key, "1"));
            }
        }
        if let Some(was) = sysctl::read(V4_REDIRECTS)? {
            new.push(Change::side_effect(V4_REDIRECTS.to_owned(), &was));
        }
        self.make(changes, new)
    }

    fn redirects_off(&self, changes: &mut Changes) -> Outcome<()> {
        match sysctl::read(V4_SEND_REDIRECTS)?.as_deref() {
            Some("1") => self.make(changes, vec![Change::ours(V4_SEND_REDIRECTS, "1", "0")]),
            _ => Ok(()),
        }
    }

    fn switch_on_v6(&self, changes: &mut Changes) -> Outcome<()> {
        match sysctl::read(V6_FORWARD)?.as_deref() {
            None | Some("0") => {}
            Some(_) => return Ok(()),
        }
        let mut new = Vec::new();
        for device in sysctl::list("net/ipv6/conf")? {
            let forwarding_key = format!("net/ipv6/conf/{device}/forwarding");
            let forwarding = sysctl::read(&forwarding_key)?;
            if device == "all" {
                continue;
            }
            if forwarding.as_deref() == Some("1") {
                new.push(Change::side_effect(forwarding_key, "1"));
                continue;
            }
            let accept_ra = format!("net/ipv6/conf/{device}/accept_ra");
            if !matches!(&device[..], "default" | "lo") && sysctl::read(&accept_ra)?.as_deref() == Some("1") {
                // Listed, so set, before forwarding.
                new.insert(0, Change::ours(&accept_ra, "1", "2"));
            }
        }
        new.push(Change::ours(V6_FORWARD, "0", "1"));
        self.make(changes, new)
    }

    /// Journals `new`, then does it in order.
    fn make(&self, changes: &mut Changes, new: Vec<Change>) -> Outcome<()> {
        let to_set: Vec<Change> = new.iter().filter(|change| change.set.is_some()).cloned().collect();
        // A fresh reading replaces an older record of the same key: someone put the value back meanwhile.
        changes.changes.retain(|old| !new.iter().any(|change| change.key == old.key));
        changes.changes.extend(new);
        state::store(&self.state_file, changes)?;
        point("guard.forwarding-noted");
        for change in to_set {
            if let Some(value) = &change.set {
                sysctl::ensure(&change.key, value)?;
                log::info!("{} was {}, is {value} while tunguard runs", change.key, change.was);
                point("guard.forwarding-half");
            }
        }
        Ok(())
    }

    fn put_back(&mut self) -> Outcome<()> {
        let Some(users) = self.users.take() else { return Ok(()) };
        // The last one out; flock(2) may lose the shared lock on the way, which we don't need any more.
        let _alone = match users.relock(FlockArg::LockExclusiveNonblock) {
            Ok(()) => users,
            Err(_) => {
                log::info!("forwarding stays on: another tunguard server of this host needs it");
                return Ok(());
            }
        };
        let recorded = recorded(&self.state_file)?;
        let mut first_error = None;
        let mut note = |result: Outcome<()>| {
            if let Err(e) = result {
                log::warn!("{e}");
                first_error.get_or_insert(e);
            }
        };
        // The switches in reverse order, so accept_ra after forwarding; then what they changed by themselves.
        let mut switched_back = false;
        for change in recorded.changes.iter().rev() {
            let Some(set) = &change.set else { continue };
            match sysctl::read(&change.key) {
                Ok(Some(now)) if now == *set => {
                    switched_back = true;
                    note(sysctl::ensure(&change.key, &change.was).map(drop));
                    point("guard.forwarding-half-back");
                }
                Ok(Some(now)) if now == change.was => {}
                Ok(Some(now)) => log::info!("{} stays {now}: somebody changed it since", change.key),
                // The device is gone.
                Ok(None) => {}
                Err(e) => note(Err(e)),
            }
        }
        for change in recorded.changes.iter().filter(|change| change.set.is_none() && switched_back) {
            match sysctl::read(&change.key) {
                Ok(Some(_)) => note(sysctl::ensure(&change.key, &change.was).map(drop)),
                Ok(None) => {}
                Err(e) => note(Err(e)),
            }
        }
        match first_error {
            // The record stays: the next run's end tries again.
            Some(e) => Err(e),
            None => state::remove(&self.state_file),
        }
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        if let Err(e) = self.put_back() {
            log::warn!("restoring forwarding: {e}");
        }
    }
}

impl Change {
    fn ours(key: &str, was: &str, set: &str) -> Change {
        Change { key: key.to_owned(), was: was.to_owned(), set: Some(set.to_owned()) }
    }

    fn side_effect(key: String, was: &str) -> Change {
        Change { key, was: was.to_owned(), set: None }
    }
}

fn recorded(state_file: &Path) -> Outcome<Changes> {
    let boot_id = state::boot_id();
    Ok(match state::load::<Changes>(state_file)? {
        Some(changes) if changes.boot_id == boot_id => changes,
        _ => Changes { boot_id, changes: Vec::new() },
    })
}

fn lock_shared(state_file: &Path) -> Outcome<Flock<File>> {
    let mut name = state_file.as_os_str().to_owned();
    name.push(".lock");
    let path = PathBuf::from(name);
    let failed = |e: io::Error| Failure::system(format!("locking {}", path.display()), e);
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    // Held exclusively only for the moment of restoring.
    Flock::lock(file, FlockArg::LockShared).map_err(|(_, e)| failed(e.into()))
}

const V4_FORWARD: &str = "net/ipv4/ip_forward";
const V4_REDIRECTS: &str = "net/ipv4/conf/all/accept_redirects";
const V4_SEND_REDIRECTS: &str = "net/ipv4/conf/all/send_redirects";
const V6_FORWARD: &str = "net/ipv6/conf/all/forwarding";
