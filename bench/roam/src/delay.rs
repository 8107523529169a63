//! A long way: a TUN device that gives each packet back as it was, virtio header and all, a while later. Routes send
//! both directions through it; what comes back out is routed on by the kernel.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use tunguard::config::common::DeviceName;
use tunguard::sys::tun::Tun;

use crate::{SECOND, now};

/// Goes on until the process is ended or the device removed.
pub fn relay(device: &DeviceName, delay: u64) -> io::Result<()> {
    let (tun, _) = Tun::create(device).map_err(io::Error::other)?;
    let mut waiting: VecDeque<(u64, Vec<u8>)> = VecDeque::new();
    let mut buffer = vec![0; 1 << 17];
    loop {
        while let Some(len) = tun.read(&mut buffer)? {
            waiting.push_back((now() + delay, buffer[..len].to_vec()));
        }
        while waiting.front().is_some_and(|(due, _)| *due <= now()) {
            let Some((_, packet)) = waiting.pop_front() else { break };
            match tun.write(&[IoSlice::new(&packet)]) {
                // A packet that the kernel doesn't take is lost, as anywhere on the Internet.
                Err(error) if error.kind() == ErrorKind::InvalidInput => {}
                other => other?,
            }
        }
        let wait = waiting.front().map(|(due, _)| {
            let wait = due.saturating_sub(now());
            TimeSpec::new((wait / SECOND) as i64, (wait % SECOND) as i64)
        });
        match ppoll(&mut [PollFd::new(tun.as_fd(), PollFlags::POLLIN)], wait, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
