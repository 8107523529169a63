//! Landlock (landlock(7)): access to files, ports and other processes given up for good, by a ruleset without rules.
//!
//! What there is to be given up depends on the kernel, which counts it by versions (ABI): files from 1 on (Linux 5.13),
//! binding and connecting TCP sockets from 4 (6.7), abstract Unix sockets and signals beyond the processes that gave up
//! the same from 6 (6.12). Guard and supervisor find out once; who is told a version and can't have it doesn't start.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::config::common::Landlock;
use crate::exit::{Exit, Failure, Outcome};

/// What is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// Everything but to read and to write files: a message queue that is still to be made is one, and no rule can be
    /// written for a place that no directory leads to.
    AllButQueues,
    /// Everything.
    All,
}

/// The version of Landlock to be used, `None` where it is to be done without.
///
/// Errors: it is required, and this kernel has none.
pub fn version(wanted: Landlock) -> Outcome<Option<i32>> {
    match (wanted, kernel_version()) {
        // What is newer than the crate knows is not used.
        (Landlock::Required, Ok(version)) => Ok(Some(ABI::from(version) as i32)),
        (Landlock::Off, _) => Ok(None),
        (Landlock::Required, Err(errno)) => {
            let text = format!(
                "this kernel has no Landlock ({errno}; Linux 5.13, CONFIG_SECURITY_LANDLOCK, and landlock among the lsm= \
                 of its command line): `landlock = \"off\"` in [sandbox] does without"
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
pub fn restrict(version: i32, what: GiveUp) -> Outcome<()> {
    let abi = ABI::from(version);
    let files = match what {
        GiveUp::AllButQueues => AccessFs::from_all(abi) & !(AccessFs::ReadFile | AccessFs::WriteFile),
        GiveUp::All => AccessFs::from_all(abi),
    };
    enforce(handle(abi, files)?.create().map_err(failed)?)
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

fn kernel_version() -> Result<i32, nix::errno::Errno> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the kernel takes no attributes, says its version, and makes nothing.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0usize, VERSION)
    };
    nix::errno::Errno::result(version).map(|version| version as i32)
}

const DNS: u16 = 53;
