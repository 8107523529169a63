//! Landlock (landlock(7)): access to files, ports and other processes given up for good, by a ruleset without rules.
//!
//! What there is to be given up depends on the kernel, which counts it by versions (ABI): files from 1 on (Linux 5.13),
//! binding and connecting TCP sockets from 4 (6.7), abstract Unix sockets and signals beyond the processes that gave up
//! the same from 6 (6.12). Guard and supervisor find out once; who is told a version and can't have it doesn't start.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope,
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
        (Landlock::Required, Ok(version)) => Ok(Some(version)),
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

/// Gives up what version `version` can give up. It has to be allowed no new privileges.
pub fn restrict(version: i32, what: GiveUp) -> Outcome<()> {
    let abi = ABI::from(version);
    let files = match what {
        GiveUp::AllButQueues => AccessFs::from_all(abi) & !(AccessFs::ReadFile | AccessFs::WriteFile),
        GiveUp::All => AccessFs::from_all(abi),
    };
    let failed = |error: landlock::RulesetError| Failure::system("give up files and ports (Landlock)", error);
    let restrict = || {
        let mut ruleset =
            Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(files)?;
        let (ports, scopes) = (AccessNet::from_all(abi), Scope::from_all(abi));
        if !ports.is_empty() {
            ruleset = ruleset.handle_access(ports)?;
        }
        if !scopes.is_empty() {
            ruleset = ruleset.scope(scopes)?;
        }
        ruleset.create()?.restrict_self()
    };
    match restrict().map_err(failed)?.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        less => Err(Failure::system("give up files and ports (Landlock)", format!("it is {less:?}"))),
    }
}

fn kernel_version() -> Result<i32, nix::errno::Errno> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the kernel takes no attributes, says its version, and makes nothing.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0usize, VERSION)
    };
    nix::errno::Errno::result(version).map(|version| version as i32)
}
