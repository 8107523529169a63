//! What the guard may do, and why: of root's capabilities those listed here, and no others, for it and for what it
//! starts. A list for the start, and a shorter one for the rest of its life.

use tunguard::sys::capabilities::{Capability, Kept};

/// From the first lines of the program until the host is set up.
pub const START: &[Kept] = &[
    NET_ADMIN,
    KILL,
    DAC_OVERRIDE,
    // No further: what needs them is done when the server is ready.
    Kept::used_if_there(
        Capability::CAP_SYS_ADMIN,
        "an IPC namespace of its own (unshare(2)); without it the queues are in the host's",
    ),
    Kept::used_if_there(Capability::CAP_NET_BIND_SERVICE, "a port below 1024, if `listen` says so"),
    Kept::used_if_there(
        Capability::CAP_SYS_RESOURCE,
        "more descriptors and larger queues than the limits it finds",
    ),
    // In force, to cut this list down to the next.
    Kept::used(Capability::CAP_SETPCAP, "dropping capabilities"),
    SETUID,
    SETGID,
    SYS_CHROOT,
];

/// While it serves, and when it puts the host back.
pub const LIFE: &[Kept] = &[NET_ADMIN, KILL, DAC_OVERRIDE, SETUID, SETGID, SYS_CHROOT, SETPCAP];

const NET_ADMIN: Kept = Kept::used(
    Capability::CAP_NET_ADMIN,
    "the device with its addresses and routes, and forwarding and nftables, which are put back at the end",
);
/// The kernel asks for it as well, when it kills the workers of a guard that died (PR_SET_PDEATHSIG): it does so in the
/// guard's name, and they are other users'.
const KILL: Kept = Kept::used(Capability::CAP_KILL, "ending workers, which run as other users");
/// To open them by their mode, everybody would have to be let in. To read is not enough: the guard writes.
const DAC_OVERRIDE: Kept = Kept::used(
    Capability::CAP_DAC_OVERRIDE,
    "the queues that workers make, and keys and directories that belong to other users",
);

// Permitted, so that the nursery gets them, but never in force in the guard.
const SETUID: Kept = Kept::handed_on(Capability::CAP_SETUID, "workers, each with a user of its own");
const SETGID: Kept = Kept::handed_on(Capability::CAP_SETGID, "workers, each with a group of its own");
const SYS_CHROOT: Kept = Kept::handed_on(Capability::CAP_SYS_CHROOT, "workers, in an empty root");
const SETPCAP: Kept = Kept::handed_on(Capability::CAP_SETPCAP, "workers, with an empty bounding set");

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const UNIT: &str = include_str!("../../packaging/tunguard.service");

    #[test]
    fn the_unit_allows_what_is_on_the_list() {
        let line = UNIT.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
        let allowed: BTreeSet<String> =
            line.expect("the unit has a list").split_whitespace().map(str::to_owned).collect();
        let kept: BTreeSet<String> = START.iter().map(|kept| kept.capability().to_string()).collect();
        assert_eq!(allowed, kept);
        assert!(LIFE.iter().all(|kept| kept_at_start(kept.capability())), "nothing is won on the way");
    }

    fn kept_at_start(capability: Capability) -> bool {
        START.iter().any(|kept| kept.capability() == capability)
    }
}
