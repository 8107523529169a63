//! Certificates, the server's key and the revocation list, as they are now; and the watch that notices when
//! the list changes.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use tunguard::config::server::{ServerConfig, ServerTls};
use tunguard::exit::{Failure, Outcome};
use tunguard::tls::{CertId, Credentials, Revoked, time};

/// What decides who is let in.
pub struct Trust {
    /// What is watched.
    list: Option<PathBuf>,
    /// For the workers.
    pub credentials: Credentials,
    revoked: Revoked,
    watch: Option<Inotify>,
}

impl Trust {
    /// Reads and checks everything, and starts to watch the revocation list.
    pub fn load(config: &ServerConfig) -> Outcome<Trust> {
        let credentials = Credentials::read_server(&config.tls)?;
        let revoked = revoked(&credentials)?;
        Ok(Trust { list: config.tls.crl.clone(), credentials, revoked, watch: watch(&config.tls)? })
    }

    /// Reads everything again. Where something is wrong with it, what we have stays.
    pub fn read_again(&mut self, config: &ServerConfig) -> Outcome<()> {
        let credentials = Credentials::read_server(&config.tls)?;
        self.revoked = revoked(&credentials)?;
        self.credentials = credentials;
        Ok(())
    }

    /// Whether `cert` was revoked.
    pub fn is_revoked(&self, cert: &CertId) -> bool {
        self.revoked.contains(cert)
    }

    /// The watch, where there is a list.
    pub fn watch(&self) -> Option<BorrowedFd<'_>> {
        self.watch.as_ref().map(|w| w.as_fd())
    }

    /// Whether the watch has seen the list change.
    pub fn list_changed(&self) -> bool {
        let name = self.list.as_ref().and_then(|path| path.file_name());
        let events = self.watch.as_ref().and_then(|w| w.read_events().ok()).unwrap_or_default();
        events.iter().any(|e| e.name.as_deref() == name.map(OsStr::new))
    }
}

fn revoked(credentials: &Credentials) -> Outcome<Revoked> {
    let Some(crl) = &credentials.crl else { return Ok(Revoked::default()) };
    let revoked = Revoked::parse(crl, &credentials.ca)?;
    if let Some(end) = revoked.next_update().filter(|end| *end < time::wall_clock() + 7 * time::DAY) {
        log::warn!("the revocation list expires on {}: nobody gets in after that", time::date(end));
    }
    Ok(revoked)
}

/// The folder is watched, not the file: a list is replaced by renaming a new one onto it.
fn watch(tls: &ServerTls) -> Outcome<Option<Inotify>> {
    let Some(folder) = tls.crl.as_ref().and_then(|path| path.parent()) else { return Ok(None) };
    let failed = |e| Failure::system(format!("watch {} for a new revocation list", folder.display()), e);
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(failed)?;
    let flags = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO;
    inotify.add_watch(folder, flags).map_err(failed)?;
    Ok(Some(inotify))
}
