//! Certificates and the revocation list, as they are now, and the key holder with the key that goes with them; and the
//! watch that notices when the list changes.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use tunguard::config::server::{ServerConfig, ServerTls};
use tunguard::exit::{Failure, Outcome};
use tunguard::sandbox::Means;
use tunguard::sys::poller::Poller;
use tunguard::tls::{CertId, Certificates, Revoked, time};

use crate::holder::{Heir, KeyHolder};

/// What decides who is let in.
pub struct Trust {
    /// What is watched.
    list: Option<PathBuf>,
    /// For the workers.
    pub certificates: Certificates,
    /// It has the server's key.
    pub holder: KeyHolder,
    revoked: Revoked,
    watch: Option<Inotify>,
}

/// What another configuration decides by.
pub struct Next {
    list: Option<PathBuf>,
    certificates: Certificates,
    revoked: Revoked,
    watch: Option<Inotify>,
    /// It has to be ready before [`Trust::follow`].
    pub heir: Heir,
}

impl Next {
    /// The watch, where there is a list.
    pub fn watch(&self) -> Option<BorrowedFd<'_>> {
        self.watch.as_ref().map(|w| w.as_fd())
    }
}

impl Trust {
    /// Reads and checks everything, and starts to watch the revocation list.
    pub fn load(config: &mut ServerConfig, sandbox: Means) -> Outcome<Trust> {
        let (certificates, revoked, watch) = watch_and_read(&config.tls)?;
        let holder = KeyHolder::start(config, &certificates, sandbox)?;
        Ok(Trust { list: config.tls.crl.clone(), certificates, holder, revoked, watch })
    }

    /// Reads and checks what another configuration names, and starts the heir of the key holder, of which `poller` tells.
    /// Nothing of it is in force before [`Trust::follow`].
    pub fn prepare(&self, config: &mut ServerConfig, poller: &Poller) -> Outcome<Next> {
        let (certificates, revoked, watch) = watch_and_read(&config.tls)?;
        let heir = self.holder.heir(config, &certificates, poller)?;
        Ok(Next { list: config.tls.crl.clone(), certificates, revoked, watch, heir })
    }

    /// Puts it in force.
    pub fn follow(&mut self, next: Next) {
        let Next { list, certificates, revoked, watch, heir } = next;
        self.holder.follow(heir);
        (self.list, self.certificates, self.revoked, self.watch) = (list, certificates, revoked, watch);
    }

    /// Takes over what the list says now; whether that is anything new. An error changes nothing.
    pub fn read_list(&mut self, tls: &ServerTls) -> Outcome<bool> {
        let certificates = self.certificates.with_list_of(tls)?;
        if certificates == self.certificates {
            return Ok(false);
        }
        self.revoked = revoked(&certificates)?;
        self.certificates = certificates;
        Ok(true)
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
        // One without a name says that some were lost, or that the folder is another: the list may be among them.
        events.iter().any(|e| e.name.is_none() || e.name.as_deref() == name.map(OsStr::new))
    }
}

/// The watch comes first: a list that is replaced meanwhile is news.
fn watch_and_read(tls: &ServerTls) -> Outcome<(Certificates, Revoked, Option<Inotify>)> {
    let watch = watch(tls);
    // What is wrong with the files themselves is said in better words.
    let certificates = Certificates::read_server(tls)?;
    let revoked = revoked(&certificates)?;
    Ok((certificates, revoked, watch?))
}

fn revoked(certificates: &Certificates) -> Outcome<Revoked> {
    let Some(crl) = &certificates.crl else { return Ok(Revoked::default()) };
    let revoked = Revoked::parse(crl, &certificates.ca)?;
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
