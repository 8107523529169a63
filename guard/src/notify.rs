//! Tells the service manager how the server is, where `NOTIFY_SOCKET` names somebody who waits for it (sd_notify(3)).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Clients are served. Waits for a manager that is busy, as it would end a service that never got ready; but not for long,
/// for one that never reads.
pub fn ready() {
    tell(|to| send(to, b"READY=1\n", Some(READY_WAIT)));
}

/// The server stops. Waits for nothing.
pub fn stopping() {
    tell(|to| send(to, b"STOPPING=1\n", None));
}

fn tell(send: impl Fn(&OsStr) -> io::Result<()>) {
    let Some(to) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&to) {
        log::warn!("can't tell the service manager (NOTIFY_SOCKET) how we are: {error}");
    }
}

/// Sends `state` to `to`, a path or an abstract name behind an `@`; what there is no room for is waited for at most this long.
fn send(to: &OsStr, state: &[u8], wait: Option<Duration>) -> io::Result<()> {
    let address = match to.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(to)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(wait.is_none())?;
    socket.set_write_timeout(wait)?;
    socket.send_to_addr(state, &address).map(drop)
}

const READY_WAIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    fn heard(manager: &UnixDatagram) -> Vec<u8> {
        manager.set_nonblocking(true).expect("doesn't block");
        let mut bytes = [0; 64];
        let len = manager.recv(&mut bytes).expect("a message");
        bytes[..len].to_vec()
    }

    #[test]
    fn a_manager_is_told_by_path_and_by_abstract_name() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("binds");
        send(path.as_os_str(), b"READY=1\n", Some(READY_WAIT)).expect("sent");
        assert_eq!(heard(&manager), b"READY=1\n");

        let name = format!("tunguard-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let manager = UnixDatagram::bind_addr(&address).expect("binds");
        send(OsStr::new(&format!("@{name}")), b"STOPPING=1\n", None).expect("sent");
        assert_eq!(heard(&manager), b"STOPPING=1\n");
    }

    #[test]
    fn a_manager_that_does_not_read_or_is_not_there_holds_nothing_up() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("notify");
        assert!(send(path.as_os_str(), b"READY=1\n", Some(READY_WAIT)).is_err(), "nobody is there");
        let _deaf = UnixDatagram::bind(&path).expect("binds");
        let refused =
            std::iter::repeat_with(|| send(path.as_os_str(), b"STOPPING=1\n", None)).find_map(Result::err);
        assert_eq!(refused.map(|error| error.kind()), Some(ErrorKind::WouldBlock));
        let late = send(path.as_os_str(), b"READY=1\n", Some(Duration::from_millis(1)));
        assert_eq!(late.map_err(|error| error.kind()), Err(ErrorKind::WouldBlock));
    }
}
