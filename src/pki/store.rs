//! The authority's directory: one command at a time, and no file that is ever half written.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use zeroize::Zeroizing;

use crate::exit::{Failure, Outcome};

/// A directory that is ours until this is dropped.
pub struct Directory {
    root: PathBuf,
    /// The lock goes with the descriptor, so also when the process dies.
    _lock: Flock<File>,
}

/// Who may read a file.
#[derive(Clone, Copy)]
pub enum Secrecy {
    /// Everybody (0644).
    Public,
    /// The owner (0600).
    Private,
}

impl Directory {
    /// Makes the directory (0700) if it isn't there, and locks it.
    pub fn create(root: &Path) -> Outcome<Directory> {
        make_private(root)?;
        Directory::lock(root)
    }

    /// Locks a directory that must be there.
    pub fn open(root: &Path) -> Outcome<Directory> {
        if !root.join("ca.pem").exists() {
            return Err(Failure::usage(format!(
                "there is no authority in {}: make one with `tunguard pki init`, or name its --dir",
                root.display()
            )));
        }
        Directory::lock(root)
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path of `file` below the directory.
    pub fn path(&self, file: &str) -> PathBuf {
        self.root.join(file)
    }

    /// Whether something of that name is there, be it a dangling link.
    pub fn exists(&self, file: &str) -> bool {
        self.path(file).symlink_metadata().is_ok()
    }

    /// The file's bytes; wiped when dropped, since some are keys.
    pub fn read(&self, file: &str) -> Outcome<Zeroizing<Vec<u8>>> {
        let path = self.path(file);
        fs::read(&path)
            .map(Zeroizing::new)
            .map_err(|e| Failure::usage(format!("{} can't be read: {e}", path.display())))
    }

    /// Writes a file that must not be there yet.
    pub fn write_new(&self, file: &str, secrecy: Secrecy, bytes: &[u8]) -> Outcome<()> {
        self.write(file, secrecy, bytes, |temporary, path| temporary.persist_noclobber(path))
    }

    /// Writes a file in the place of the one that may be there: readers see the old one or the new one.
    pub fn replace(&self, file: &str, secrecy: Secrecy, bytes: &[u8]) -> Outcome<()> {
        self.write(file, secrecy, bytes, |temporary, path| temporary.persist(path))
    }

    fn write(
        &self,
        file: &str,
        secrecy: Secrecy,
        bytes: &[u8],
        persist: impl FnOnce(tempfile::NamedTempFile, &Path) -> Result<File, tempfile::PersistError>,
    ) -> Outcome<()> {
        let path = self.path(file);
        let parent = path.parent().unwrap_or(&self.root);
        make_private(parent)?;
        let failed = |e: std::io::Error| Failure::system(format_args!("writing {}", path.display()), e);
        // Made with mode 0600, and removed if anything below fails.
        let mut temporary = tempfile::Builder::new().prefix(".new-").tempfile_in(parent).map_err(failed)?;
        temporary.write_all(bytes).map_err(failed)?;
        if let Secrecy::Public = secrecy {
            temporary.as_file().set_permissions(Permissions::from_mode(0o644)).map_err(failed)?;
        }
        temporary.as_file().sync_all().map_err(failed)?;
        persist(temporary, &path).map_err(|e| failed(e.error))?;
        // The name, too, must survive a power cut.
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed)
    }

    fn lock(root: &Path) -> Outcome<Directory> {
        let path = root.join(".lock");
        let failed = |e: std::io::Error| Failure::system(format_args!("locking {}", path.display()), e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| failed(e.into()))?;
        Ok(Directory { root: root.to_owned(), _lock: lock })
    }
}

/// Makes a directory for keys; one that is there stays as it is.
fn make_private(dir: &Path) -> Outcome<()> {
    match DirBuilder::new().recursive(false).mode(0o700).create(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) => Err(Failure::system(format_args!("making the directory {}", dir.display()), e)),
    }
}
