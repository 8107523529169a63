//! Landlock (landlock(7)): access to files, ports and other processes given up for good, by a ruleset without rules.
//!
//! What there is to be given up depends on the kernel, which counts it by versions (ABI): files from 1 on (Linux 5.13),
//! binding and connecting TCP sockets from 4 (6.7), abstract Unix sockets and signals beyond the processes that gave up
//! the same from 6 (6.12). Guard and supervisor find out once; who is told a version and can't have it doesn't start.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use nix::errno::Errno;

use crate::config::common::Landlock;
use crate::exit::{Exit, Failure, Outcome};

/// The version of Landlock to be used, `None` where it is to be done without.
///
/// Errors: it is required, and this kernel has none.
pub fn version(wanted: Landlock) -> Outcome<Option<i32>> {
    judge(wanted, kernel_version())
}

fn judge(wanted: Landlock, found: Result<i32, Errno>) -> Outcome<Option<i32>> {
    match (wanted, found) {
        (Landlock::Off, _) => Ok(None),
        // What is newer than the crate knows is not used.
        (Landlock::Required, Ok(version)) => Ok(Some(ABI::from(version) as i32)),
        (Landlock::Required, Err(errno)) => {
            let text = format!(
                "this kernel has no Landlock ({}): it needs Linux 5.13 with CONFIG_SECURITY_LANDLOCK, and `landlock` \
                 among the lsm= of its command line; `landlock = \"off\"` in [sandbox] does without",
                errno.desc()
            );
            Err(Failure::new(Exit::System, text))
        }
    }
}

/// Gives up, for the lookup helper, everything but to read files, and to ask name servers over TCP.
pub fn restrict_to_resolving(version: i32) -> Outcome<()> {
    let abi = ABI::from(version);
    let given_up = handle(abi, AccessFs::from_all(abi)).and_then(|ruleset| {
        let mut read = AccessFs::ReadFile | AccessFs::ReadDir;
        if abi >= ABI::V9 {
            // The local resolver's socket.
            read |= AccessFs::ResolveUnix;
        }
        let root = PathFd::new("/").map_err(|e| Failure::system("open /", e))?;
        let ruleset = ruleset.create().and_then(|made| made.add_rule(PathBeneath::new(root, read)));
        let ruleset = match abi >= ABI::V4 {
            true => ruleset.and_then(|made| made.add_rule(NetPort::new(DNS, AccessNet::ConnectTcp))),
            false => ruleset,
        };
        ruleset.map_err(failed)
    });
    enforce(given_up?)
}

/// Gives up what version `version` can give up. It has to be allowed no new privileges.
pub fn restrict(version: i32) -> Outcome<()> {
    let abi = ABI::from(version);
    enforce(handle(abi, AccessFs::from_all(abi))?.create().map_err(failed)?)
}

/// A ruleset that is about these uses of files, and about all there is of the rest.
fn handle(abi: ABI, files: BitFlags<AccessFs>) -> Outcome<Ruleset> {
    let (ports, scopes) = (AccessNet::from_all(abi), Scope::from_all(abi));
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset = ruleset.handle_access(files).map_err(failed)?;
    if !ports.is_empty() {
        ruleset = ruleset.handle_access(ports).map_err(failed)?;
    }
    if !scopes.is_empty() {
        ruleset = ruleset.scope(scopes).map_err(failed)?;
    }
    Ok(ruleset)
}

fn enforce(ruleset: RulesetCreated) -> Outcome<()> {
    match ruleset.restrict_self().map_err(failed)?.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        less => Err(failed(format!("it is {less:?}"))),
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::system("give up files, ports and other processes by Landlock", error)
}

fn kernel_version() -> Result<i32, Errno> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the kernel takes no attributes, says its version, and makes nothing.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0usize, VERSION)
    };
    Errno::result(version).map(|version| version as i32)
}

const DNS: u16 = 53;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{ErrorKind, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
    use std::thread;

    use nix::errno::Errno;
    use nix::sys::signal::kill;
    use nix::unistd::getppid;

    use super::*;

    /// What is given up is given up by a thread, and by those it starts: each test has one of its own.
    fn version() -> i32 {
        super::version(Landlock::Required)
            .expect("Landlock on the machine that tests this")
            .expect("a version")
    }

    #[test]
    fn a_kernel_without_it_will_do_only_where_that_is_configured() {
        let refused = judge(Landlock::Required, Err(Errno::EOPNOTSUPP)).expect_err("required");
        assert_eq!(refused.exit, Exit::System);
        assert!(refused.text.contains(r#"landlock = "off""#), "{}", refused.text);
        assert_eq!(judge(Landlock::Required, Ok(7)), Ok(Some(7)));
        assert_eq!(judge(Landlock::Off, Ok(7)), Ok(None));
        assert_eq!(judge(Landlock::Off, Err(Errno::ENOSYS)), Ok(None));
        let newest = judge(Landlock::Required, Ok(1_000)).expect("usable").expect("a version");
        assert!(newest < 1_000, "what nobody here knows is not promised");
    }

    #[test]
    fn files_ports_and_other_processes_are_given_up_and_what_is_open_stays() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        let mut open = File::create(&file).expect("a file");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address");
        let mut connected = TcpStream::connect(port).expect("connects");
        let name =
            SocketAddr::from_abstract_name(format!("tunguard-{}", std::process::id())).expect("a name");
        let _abstract = UnixListener::bind_addr(&name).expect("binds");
        let version = version();
        let judged = thread::spawn(move || {
            restrict(version).expect("restricts");
            let denied = |error: std::io::Error| error.kind() == ErrorKind::PermissionDenied;
            assert!(File::open(&file).is_err_and(denied));
            assert!(File::create(file.with_extension("new")).is_err_and(denied));
            assert!(std::fs::read_dir("/").is_err_and(denied));
            open.write_all(b"as before").expect("what is open stays so");
            connected.write_all(b"as before").expect("what is connected stays so");
            UdpSocket::bind("127.0.0.1:0").expect("UDP is no matter of Landlock's");
            if version >= 4 {
                assert!(TcpStream::connect(port).is_err_and(denied));
                assert!(TcpListener::bind("127.0.0.1:0").is_err_and(denied));
            }
            if version >= 6 {
                assert!(UnixStream::connect_addr(&name).is_err_and(denied));
                assert_eq!(kill(getppid(), None), Err(Errno::EPERM));
            }
        });
        judged.join().expect("everything as expected");
        drop(listener);
    }

    #[test]
    fn a_queue_that_was_made_before_is_used_and_no_other_is_made() {
        use crate::sys::mq::{QueueSize, Reader, Writer, unlink};
        let version = version();
        let judged = thread::spawn(move || {
            let size = QueueSize { messages: 2, bytes: 100 };
            let name = |at: &str| format!("/tunguard-landlock-{at}-{}", std::process::id());
            let before = Reader::create(&name("before"), size).expect("a queue");
            let writer = Writer::open(&name("before")).expect("its other end");
            unlink(&name("before")).expect("its name goes");
            restrict(version).expect("restricts");
            assert!(writer.send(b"as before").expect("room"));
            let mut buffer = [0; 100];
            assert_eq!(before.receive(&mut buffer).expect("a message"), Some(9));
            let refused = Reader::create(&name("after"), size).expect_err("none");
            let _ = unlink(&name("after"));
            assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        });
        judged.join().expect("everything as expected");
    }

    #[test]
    fn who_resolves_reads_files_and_reaches_name_servers_only() {
        let version = version();
        let judged = thread::spawn(move || {
            restrict_to_resolving(version).expect("restricts");
            File::open("/etc/passwd").expect("the host's files are read");
            let denied = |error: std::io::Error| error.kind() == ErrorKind::PermissionDenied;
            let new = std::env::temp_dir().join(format!("tunguard-landlock-{}", std::process::id()));
            assert!(File::create(new).is_err_and(denied));
            assert!(std::process::Command::new("/bin/true").status().is_err_and(denied));
            if version >= 4 {
                assert!(TcpStream::connect("127.0.0.1:1").is_err_and(denied));
                let asked = TcpStream::connect("127.0.0.1:53");
                assert!(asked.is_ok() || asked.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused));
            }
        });
        judged.join().expect("everything as expected");
    }
}
