//! Memory that one process fills and another one reads: the payload of a session's queue.
//!
//! The filler never reads it, and its size is sealed, so nothing the reader does to it harms the filler: not even
//! a signal, as memory whose file shrank would raise (memfd_create(2), F_SEAL_SHRINK).

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc::c_void;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

/// The end that fills the memory.
#[derive(Debug)]
pub struct Filler(Map);

/// The end that reads it.
#[derive(Debug)]
pub struct Viewer(Map);

#[derive(Debug)]
struct Map {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

impl Filler {
    /// Memory of `len` bytes, of which none costs anything before it is first filled; and its file, for the reader.
    pub fn create(name: &str, len: NonZeroUsize) -> io::Result<(Filler, OwnedFd)> {
        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&file, i64::try_from(len.get()).map_err(io::Error::other)?)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let map = Map::new(file.as_fd(), len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        Ok((Filler(map), file))
    }

    /// Bytes it holds.
    pub fn size(&self) -> usize {
        self.0.len.get()
    }

    /// Copies `bytes` to the place `at`; `false`, and nothing is copied, where they don't fit there.
    pub fn fill(&mut self, at: usize, bytes: &[u8]) -> bool {
        if at.checked_add(bytes.len()).is_none_or(|end| end > self.size()) {
            return false;
        }
        // SAFETY: `at` is inside the mapping, as just checked.
        let to = unsafe { self.0.start.as_ptr().cast::<u8>().add(at) };
        // SAFETY: the mapping is writable, ends behind the last byte, as just checked, can't shrink (sealed), and has
        // no reference into it in this process, so it doesn't overlap `bytes`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        true
    }

    /// Gives the memory back to the kernel; its contents are zero afterwards.
    pub fn forget(&mut self) -> io::Result<()> {
        // SAFETY: no reference into the mapping exists in this process, and any contents are as good as these.
        unsafe { madvise(self.0.start, self.size(), MmapAdvise::MADV_REMOVE)? };
        Ok(())
    }
}

impl Viewer {
    /// The memory in `file`, as a [`Filler`] made it.
    ///
    /// Errors: it could shrink under us, or is empty.
    pub fn open(file: OwnedFd) -> io::Result<Viewer> {
        let seals = SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS)?);
        let len = usize::try_from(fstat(&file)?.st_size).ok().and_then(NonZeroUsize::new);
        let (true, Some(len)) = (seals.contains(SealFlag::F_SEAL_SHRINK), len) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "its size is not sealed"));
        };
        Ok(Viewer(Map::new(file.as_fd(), len, ProtFlags::PROT_READ)?))
    }

    /// `len` bytes from `at` on; `None` where there are not so many.
    pub fn view(&self, at: usize, len: usize) -> Option<&[u8]> {
        if at.checked_add(len)? > self.0.len.get() {
            return None;
        }
        // SAFETY: `at` is inside the mapping, as just checked.
        let from = unsafe { self.0.start.as_ptr().cast::<u8>().add(at) };
        // SAFETY: readable, initialized (a file's bytes always are) and as long as the mapping, which can't shrink
        // (sealed). The other process leaves alone what it has announced to us until it sees that we took the next
        // announcement, and is trusted with that: it is our guard, and these are the bytes it would send us anyway.
        Some(unsafe { std::slice::from_raw_parts(from, len) })
    }
}

impl Map {
    fn new(file: BorrowedFd<'_>, len: NonZeroUsize, protection: ProtFlags) -> io::Result<Map> {
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Map { start, len })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length; all references into it borrow from self.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(len: usize) -> (Filler, Viewer) {
        let (filler, file) = Filler::create("tunguard-test", size(len)).expect("memory");
        (filler, Viewer::open(file).expect("the same memory"))
    }

    fn size(len: usize) -> NonZeroUsize {
        NonZeroUsize::new(len).expect("some")
    }

    #[test]
    fn what_is_filled_in_is_seen_and_nothing_beyond_the_end() {
        let (mut filler, viewer) = pair(10_000);
        assert!(filler.fill(9_990, b"0123456789"));
        assert_eq!(viewer.view(9_990, 10), Some(&b"0123456789"[..]));
        assert!(!filler.fill(9_991, b"0123456789"));
        assert!(!filler.fill(usize::MAX, b"0"));
        assert_eq!(viewer.view(9_991, 10), None);
        assert_eq!(viewer.view(usize::MAX, 2), None);
        filler.forget().expect("gives it back");
        assert_eq!(viewer.view(9_990, 10), Some(&[0; 10][..]));
    }

    #[test]
    fn the_reader_can_neither_shrink_it_nor_be_given_what_shrinks() {
        let (_, file) = Filler::create("tunguard-test", size(4096)).expect("memory");
        assert_eq!(ftruncate(&file, 0), Err(nix::errno::Errno::EPERM));
        let soft = memfd_create("tunguard-test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .expect("a file");
        ftruncate(&soft, 4096).expect("grows");
        assert_eq!(Viewer::open(soft).expect_err("it could shrink").kind(), io::ErrorKind::InvalidInput);
    }
}
