//! The TUN device, with virtio headers and offloads.
//!
//! Opened here rather than by the `tun-tap` crate, which can't set `IFF_VNET_HDR`: without that header every
//! packet crosses the device alone, and there are no super-packets.
//! Source: drivers/net/tun.c and include/uapi/linux/if_tun.h.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::sys::uio::writev;

use crate::config::common::DeviceName;
use crate::exit::{Exit, Failure, Outcome};
use crate::wire::vnet::VNET_LEN;

/// An open TUN device, non-blocking. Reads and writes are a virtio header and one packet or super-packet.
#[derive(Debug)]
pub struct Tun {
    fd: OwnedFd,
}

/// What the kernel can do on this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// UDP super-packets (Linux 6.2 or newer).
    pub uso: bool,
}

impl Tun {
    /// Creates the device `name`, which goes when the last descriptor of it is closed.
    ///
    /// Errors: [`Exit::NoTun`] without /dev/net/tun, [`Exit::Privilege`], [`Exit::DeviceInUse`].
    pub fn create(name: &DeviceName) -> Outcome<(Tun, Offloads)> {
        let file = open_clone_device()?;
        let mut request = interface_request(name);
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one struct ifreq, which outlives the call.
        let made = unsafe { ioctl::tunsetiff(file.as_raw_fd(), (&raw const request).cast()) };
        made.map_err(|errno| refused(name, errno))?;
        let header: libc::c_int = VNET_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
        let sized = unsafe { ioctl::tunsetvnethdrsz(file.as_raw_fd(), &header) };
        sized.map_err(|errno| Failure::system(format!("set the header size of {name}"), errno))?;
        let offloads = Tun::enable_offloads(&file, name)?;
        Ok((Tun { fd: file.into() }, offloads))
    }

    fn enable_offloads(file: &File, name: &DeviceName) -> Outcome<Offloads> {
        let base = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        let with_uso = unsafe { ioctl::tunsetoffload(file.as_raw_fd(), base | TUN_F_USO4 | TUN_F_USO6) };
        if with_uso.is_ok() {
            return Ok(Offloads { uso: true });
        }
        // SAFETY: as above.
        let without = unsafe { ioctl::tunsetoffload(file.as_raw_fd(), base) };
        without.map_err(|errno| Failure::system(format!("turn on the offloads of {name}"), errno))?;
        Ok(Offloads { uso: false })
    }

    /// A device handed over by another process.
    pub fn from_fd(fd: OwnedFd) -> Tun {
        Tun { fd }
    }

    /// Reads one header and packet; `None` when none is waiting. Never blocks: O_NONBLOCK belongs to the file
    /// description, which is shared with whoever else holds the device, so each call says so itself.
    pub fn read(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        // SAFETY: one iovec that describes `into`, which is ours alone for the call; the kernel writes at most its
        // length. Offset -1 reads as read(2) does.
        let len = unsafe { libc::preadv2(self.fd.as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
        match usize::try_from(len) {
            Ok(len) => Ok(Some(len)),
            Err(_) => match Errno::last() {
                Errno::EAGAIN => Ok(None),
                errno => Err(errno.into()),
            },
        }
    }

    /// Whether an error of [`Tun::read`] means that the device is gone (tun_chr_read_iter()).
    pub fn is_gone(error: &io::Error) -> bool {
        error.raw_os_error() == Some(libc::EBADFD)
    }

    /// Writes one header and packet, gathered from `parts`.
    pub fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        writev(&self.fd, parts)?;
        Ok(())
    }

    /// The descriptor, to be handed to another process.
    pub fn as_owned_fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open_clone_device() -> Outcome<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(CLONE_DEVICE).map_err(
        |error| match error.kind() {
            ErrorKind::NotFound => Failure::new(
                Exit::NoTun,
                format!("{CLONE_DEVICE} is missing: load the module (modprobe tun), or let the container have the device"),
            ),
            ErrorKind::PermissionDenied => Failure::new(
                Exit::Privilege,
                format!("may not open {CLONE_DEVICE}: run as root"),
            ),
            _ if error.raw_os_error() == Some(libc::ENODEV) || error.raw_os_error() == Some(libc::ENXIO) => {
                Failure::new(Exit::NoTun, format!("{CLONE_DEVICE} is there, but the kernel has no TUN driver: modprobe tun"))
            }
            _ => Failure::system(format!("open {CLONE_DEVICE}"), error),
        },
    )
}

fn refused(name: &DeviceName, errno: Errno) -> Failure {
    match errno {
        Errno::EPERM | Errno::EACCES => Failure::new(
            Exit::Privilege,
            format!("may not create the network device {name}: run as root, or with CAP_NET_ADMIN"),
        ),
        Errno::EBUSY => Failure::new(
            Exit::DeviceInUse,
            format!("the device {name} is in use by another process: stop it, or set another `device`"),
        ),
        Errno::EINVAL => Failure::new(
            Exit::DeviceInUse,
            format!("{name} exists and is no TUN device of this kind: set another `device`"),
        ),
        errno => Failure::system(format!("create the network device {name}"), errno),
    }
}

fn interface_request(name: &DeviceName) -> libc::ifreq {
    // SAFETY: struct ifreq is plain data; all zeroes is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // DeviceName holds at most 15 ASCII bytes, so a terminating zero always remains.
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
        *to = from as libc::c_char;
    }
    request
}

mod ioctl {
    // Source of the numbers: include/uapi/linux/if_tun.h.
    nix::ioctl_write_ptr_bad!(tunsetiff, nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()), u8);
    nix::ioctl_write_int_bad!(tunsetoffload, nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>()));
    nix::ioctl_write_ptr!(tunsetvnethdrsz, b'T', 216, libc::c_int);
}

const CLONE_DEVICE: &str = "/dev/net/tun";
const TUN_F_CSUM: libc::c_int = 0x01;
const TUN_F_TSO4: libc::c_int = 0x02;
const TUN_F_TSO6: libc::c_int = 0x04;
const TUN_F_TSO_ECN: libc::c_int = 0x08;
const TUN_F_USO4: libc::c_int = 0x20;
const TUN_F_USO6: libc::c_int = 0x40;
