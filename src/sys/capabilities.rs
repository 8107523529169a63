//! Capabilities (capabilities(7)): a process says which it keeps, each with a reason. All others are gone, for it and for
//! whatever it starts. They belong to threads: a thread that is running when others are dropped keeps what it has, and
//! has to [`renounce`] by itself.

use std::fmt;
use std::io::{self, ErrorKind};

use caps::{CapSet, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl;

pub use caps::Capability;

use crate::exit::{Exit, Failure, Outcome};

/// A capability that is kept, and why.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    capability: Capability,
    how: How,
    /// What for, as a noun.
    reason: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Used,
    UsedIfThere,
    HandedOn,
}

impl Kept {
    /// In force; without it there is no start.
    pub const fn used(capability: Capability, reason: &'static str) -> Kept {
        Kept { capability, how: How::Used, reason }
    }

    /// In force where there is such a thing: without it something else is done.
    pub const fn used_if_there(capability: Capability, reason: &'static str) -> Kept {
        Kept { capability, how: How::UsedIfThere, reason }
    }

    /// Which it is.
    pub fn capability(&self) -> Capability {
        self.capability
    }

    /// Not in force, but handed on to programs that are started; without it there is no start.
    pub const fn handed_on(capability: Capability, reason: &'static str) -> Kept {
        Kept { capability, how: How::HandedOn, reason }
    }
}

/// Keeps these capabilities, of those there are, and drops all others of this thread from every set, the bounding set
/// included: what it starts has no more. Nor does a set-user-ID program or one with file capabilities get more from here on
/// (no_new_privs).
///
/// Errors: [`Exit::Privilege`] where one that is needed isn't there; the sets aren't as they should be afterwards.
pub fn keep(kept: &[Kept]) -> Outcome<()> {
    let there = Sets::read().map_err(failed("read our capabilities"))?;
    let missing: Vec<&Kept> = kept.iter().filter(|kept| !there.have(kept)).collect();
    if !missing.is_empty() {
        return Err(Failure::new(Exit::Privilege, ask_for(&missing)));
    }
    let all = mask(kept.iter());
    let in_force = mask(kept.iter().filter(|kept| kept.how != How::HandedOn));
    let wanted = Sets {
        inheritable: 0,
        permitted: all & there.permitted,
        effective: in_force & there.permitted,
        bounding: all & there.bounding,
        ambient: 0,
    };
    // CAP_SETPCAP has to be in force for this one, so it comes first.
    if there.bounding != wanted.bounding {
        bound_to(wanted.bounding).map_err(failed("cut the capability bounding set"))?;
    }
    cut_others(&wanted).map_err(failed("drop capabilities"))?;
    prctl::set_no_new_privs().map_err(|errno| failed("forbid new privileges")(errno.into()))?;
    wanted.confirm()
}

/// Drops everything that there is, for a thread that needs nothing. Anybody may do that.
pub fn renounce() -> io::Result<()> {
    let there = Sets::read()?;
    if there.effective & Capability::CAP_SETPCAP.bitmask() != 0 {
        bound_to(0)?;
    }
    cut_others(&Sets::default())?;
    prctl::set_no_new_privs()?;
    match Sets::read()? {
        Sets { inheritable: 0, permitted: 0, effective: 0, ambient: 0, .. } => Ok(()),
        left => Err(io::Error::other(format!("capabilities are left: {}", Names(left.permitted)))),
    }
}

/// Drops from the bounding set what isn't in the mask, including what this library has no name for.
pub(super) fn bound_to(mask: u64) -> io::Result<()> {
    for capability in (0..u64::BITS).filter(|number| mask & (1 << number) == 0) {
        // SAFETY: PR_CAPBSET_DROP takes numbers only; it touches no memory.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match Errno::result(dropped) {
            Ok(_) => {}
            // Beyond the kernel's last capability.
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn cut_others(wanted: &Sets) -> io::Result<()> {
    let cut = || {
        caps::clear(None, CapSet::Ambient)?;
        caps::clear(None, CapSet::Inheritable)?;
        caps::set(None, CapSet::Effective, &named(wanted.effective))?;
        caps::set(None, CapSet::Permitted, &named(wanted.permitted))
    };
    cut().map_err(|error: caps::errors::CapsError| io::Error::other(error.to_string()))
}

/// The capability sets of a thread, a bit for each capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sets {
    inheritable: u64,
    permitted: u64,
    effective: u64,
    bounding: u64,
    ambient: u64,
}

impl Sets {
    /// Of the calling thread, as the kernel tells everybody.
    fn read() -> io::Result<Sets> {
        let status = std::fs::read_to_string("/proc/thread-self/status")?;
        Sets::parse(&status).ok_or_else(|| {
            io::Error::new(ErrorKind::InvalidData, "no capability sets in /proc/thread-self/status")
        })
    }

    fn parse(status: &str) -> Option<Sets> {
        let set = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            u64::from_str_radix(line.trim(), 16).ok()
        };
        Some(Sets {
            inheritable: set("CapInh")?,
            permitted: set("CapPrm")?,
            effective: set("CapEff")?,
            bounding: set("CapBnd")?,
            // Since Linux 4.3.
            ambient: set("CapAmb").unwrap_or_default(),
        })
    }

    /// Whether what is asked for is there, or isn't needed.
    fn have(&self, kept: &Kept) -> bool {
        let from = match kept.how {
            How::Used => self.permitted,
            How::HandedOn => self.permitted & self.bounding,
            How::UsedIfThere => return true,
        };
        from & kept.capability.bitmask() != 0
    }

    /// Reads back what is in force.
    fn confirm(&self) -> Outcome<()> {
        let found = Sets::read().map_err(failed("read our capabilities back"))?;
        let forbidden =
            prctl::get_no_new_privs().map_err(|errno| failed("read no_new_privs back")(errno.into()))?;
        let sets = [
            ("inheritable", found.inheritable, self.inheritable),
            ("permitted", found.permitted, self.permitted),
            ("effective", found.effective, self.effective),
            ("bounding", found.bounding, self.bounding),
            ("ambient", found.ambient, self.ambient),
        ];
        if let Some((name, found, wanted)) = sets.into_iter().find(|(_, found, wanted)| found != wanted) {
            let text = format!("the {name} set is {}, not {}", Names(found), Names(wanted));
            return Err(Failure::system("drop capabilities", text));
        }
        if !forbidden {
            return Err(Failure::system("forbid new privileges", "the kernel says it isn't done"));
        }
        Ok(())
    }
}

/// The sentence for whoever started us.
fn ask_for(missing: &[&Kept]) -> String {
    let each: Vec<String> =
        missing.iter().map(|kept| format!("{} (for {})", kept.capability, kept.reason)).collect();
    let names: Vec<String> = missing.iter().map(|kept| kept.capability.to_string()).collect();
    format!(
        "missing: {}. Run it as root; where a service or a container limits what root may do, allow it there \
         (systemd: CapabilityBoundingSet={}, docker: --cap-add)",
        each.join(", "),
        names.join(" ")
    )
}

fn mask<'a>(kept: impl Iterator<Item = &'a Kept>) -> u64 {
    kept.fold(0, |mask, kept| mask | kept.capability.bitmask())
}

fn named(mask: u64) -> CapsHashSet {
    caps::all().into_iter().filter(|capability| mask & capability.bitmask() != 0).collect()
}

fn failed(what: &str) -> impl Fn(io::Error) -> Failure + '_ {
    move |error| Failure::system(what, error)
}

/// A set, as a list of names.
struct Names(u64);

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<String> = named(self.0).iter().map(Capability::to_string).collect();
        names.sort();
        let unnamed = self.0 & !named(self.0).iter().fold(0, |mask, capability| mask | capability.bitmask());
        if unnamed != 0 {
            names.push(format!("{unnamed:#x}"));
        }
        match &names[..] {
            [] => f.write_str("empty"),
            names => f.write_str(&names.join(" ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const STATUS: &str = "Name:\tx\nCapInh:\t0000000000000001\nCapPrm:\t00000000000010c0\n\
                          CapEff:\t0000000000001000\nCapBnd:\t000001ffffffffff\nCapAmb:\t0000000000000000\n";

    #[test]
    fn sets_are_read_from_the_kernels_text() {
        let sets = Sets::parse(STATUS).expect("five sets");
        let names = [sets.inheritable, sets.permitted, sets.ambient].map(|set| Names(set).to_string());
        assert_eq!(names, ["CAP_CHOWN", "CAP_NET_ADMIN CAP_SETGID CAP_SETUID", "empty"]);
        assert_eq!((sets.effective, sets.bounding), (0x1000, 0x1ff_ffff_ffff));
        assert_eq!(Names(1 << 63 | 1 << 5).to_string(), "CAP_KILL 0x8000000000000000");
        assert_eq!(Sets::parse("Name:\tx\n"), None);
        assert_eq!(Sets::parse(&STATUS.replace("CapBnd:\t0", "CapBnd:\tx")), None);
    }

    #[test]
    fn what_is_missing_is_named_with_its_reason() {
        let sets = Sets::parse(STATUS).expect("five sets");
        let used = Kept::used(Capability::CAP_KILL, "ending workers");
        assert!(!sets.have(&used));
        assert!(sets.have(&Kept::used_if_there(Capability::CAP_KILL, "")));
        assert!(sets.have(&Kept::used(Capability::CAP_SETUID, "")));
        assert!(sets.have(&Kept::handed_on(Capability::CAP_SETUID, "")));
        let bounded = Sets { bounding: 0, ..sets };
        assert!(bounded.have(&Kept::used(Capability::CAP_SETUID, "")));
        assert!(!bounded.have(&Kept::handed_on(Capability::CAP_SETUID, "")), "nobody would get it");
        let other = Kept::handed_on(Capability::CAP_SYS_CHROOT, "their root");
        assert_eq!(
            ask_for(&[&used, &other]),
            "missing: CAP_KILL (for ending workers), CAP_SYS_CHROOT (for their root). Run it as root; where a \
             service or a container limits what root may do, allow it there (systemd: \
             CapabilityBoundingSet=CAP_KILL CAP_SYS_CHROOT, docker: --cap-add)"
        );
    }

    #[test]
    fn a_thread_that_renounces_has_nothing() {
        // Capabilities are a thread's own: the other tests keep theirs.
        let left = thread::spawn(|| renounce().and_then(|()| Sets::read())).join().expect("no panic");
        let left = left.expect("possible for everybody");
        assert_eq!(left, Sets { bounding: left.bounding, ..Sets::default() });
    }

    #[test]
    fn a_thread_keeps_what_it_says() {
        let before = Sets::read().expect("readable");
        let needed = [Capability::CAP_SETPCAP, Capability::CAP_KILL, Capability::CAP_SETUID];
        if needed.iter().any(|c| before.effective & before.bounding & c.bitmask() == 0) {
            return eprintln!("SKIPPED: not root");
        }
        let thread = thread::spawn(|| {
            let more = Kept::used(Capability::CAP_SYS_CHROOT, "a root of its own");
            let table = [
                Kept::used(Capability::CAP_KILL, "ending others"),
                Kept::handed_on(Capability::CAP_SETUID, "users of others"),
            ];
            keep(&table).expect("less than there was");
            let sets = Sets::read().expect("readable");
            (sets, keep(&[table[0], more]).expect_err("it is gone"))
        });
        let (sets, refused) = thread.join().expect("no panic");
        let (kill, setuid) = (Capability::CAP_KILL.bitmask(), Capability::CAP_SETUID.bitmask());
        assert_eq!((sets.effective, sets.permitted, sets.bounding), (kill, kill | setuid, kill | setuid));
        assert_eq!((sets.inheritable, sets.ambient), (0, 0));
        assert_eq!(refused.exit, Exit::Privilege);
        assert!(refused.text.starts_with("missing: CAP_SYS_CHROOT (for a root of its own)."), "{refused}");
    }
}
