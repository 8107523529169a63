//! Which users and groups there are: inside a user namespace (user_namespaces(7)) only those that it maps.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};

use nix::unistd::{getgroups, setgroups};

/// The user or group IDs that exist for this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap(Vec<(u32, u32)>);

impl IdMap {
    /// The users.
    pub fn users() -> io::Result<IdMap> {
        IdMap::read("/proc/self/uid_map")
    }

    /// The groups.
    pub fn groups() -> io::Result<IdMap> {
        IdMap::read("/proc/self/gid_map")
    }

    fn read(file: &str) -> io::Result<IdMap> {
        let text = fs::read_to_string(file)?;
        IdMap::parse(&text)
            .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("{file}: {text:?} is no map")))
    }

    /// Of the kernel's text, each line: the first ID inside, the first one outside, how many.
    pub fn parse(text: &str) -> Option<IdMap> {
        let range = |line: &str| {
            let numbers: Vec<u32> = line.split_whitespace().map(|n| n.parse().ok()).collect::<Option<_>>()?;
            let &[first, _, count] = &numbers[..] else { return None };
            Some((first, first.checked_add(count.checked_sub(1)?)?))
        };
        let mut ranges: Vec<(u32, u32)> = text.lines().map(range).collect::<Option<_>>()?;
        ranges.sort_unstable();
        // Two that touch are one, to whoever reads it.
        ranges.dedup_by(|next, last| {
            let touch = last.1.checked_add(1) == Some(next.0);
            if touch {
                last.1 = next.1;
            }
            touch
        });
        Some(IdMap(ranges))
    }

    /// Of the IDs from `first` to `last`, those that aren't there.
    pub fn lacks(&self, first: u32, last: u32) -> IdMap {
        let mut missing = Vec::new();
        let mut next = u64::from(first);
        let last = u64::from(last);
        for &(from, to) in &self.0 {
            let (from, to) = (u64::from(from), u64::from(to));
            if to < next || from > last {
                continue;
            }
            if from > next {
                missing.push((next as u32, (from - 1) as u32));
            }
            next = to + 1;
        }
        if next <= last {
            missing.push((next as u32, last as u32));
        }
        IdMap(missing)
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for IdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (place, (first, last)) in self.0.iter().enumerate() {
            let comma = if place == 0 { "" } else { ", " };
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

/// Whether this is the user namespace of the whole system: in any other, the kernel charges all users together with
/// whoever made it.
pub fn in_initial_namespace() -> bool {
    // PROC_USER_INIT_INO, include/linux/proc_ns.h. A kernel without user namespaces has no such file.
    fs::read_link("/proc/self/ns/user").map_or(true, |link| link.as_os_str() == "user:[4026531837]")
}

/// Leaves all supplementary groups.
pub fn leave_groups() -> io::Result<()> {
    // A user namespace may forbid even to leave none, see `groups_can_be_left`.
    if getgroups()?.is_empty() {
        return Ok(());
    }
    Ok(setgroups(&[])?)
}

/// Whether somebody with the capability to leave groups could: a user namespace may forbid it, and there may be none.
pub fn groups_can_be_left() -> io::Result<()> {
    let groups = getgroups()?;
    let denied = || fs::read_to_string("/proc/self/setgroups").is_ok_and(|says| says.trim() == "deny");
    if groups.is_empty() || !denied() {
        return Ok(());
    }
    let list: Vec<String> = groups.iter().map(|group| group.to_string()).collect();
    Err(io::Error::new(
        ErrorKind::PermissionDenied,
        format!(
            "this user namespace forbids it (/proc/self/setgroups says \"deny\"), and there are some: {}. Start it \
             without them (setpriv --clear-groups), or make the namespace with a helper that allows it (newgidmap)",
            list.join(" ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read_and_shown() {
        let whole = IdMap::parse("         0          0 4294967295\n").expect("the initial namespace's");
        assert_eq!(whole.to_string(), "0-4294967294");
        assert!(whole.lacks(65_536, 99_999).is_empty());
        let usual = IdMap::parse("1 100000 65536\n0 1000 1\n").expect("rootless");
        assert_eq!(usual.to_string(), "0-65536");
        assert_eq!(IdMap::parse("5 5 1\n").expect("one").to_string(), "5");
        assert_eq!(IdMap::parse("").expect("not written yet").to_string(), "none");
        for bad in ["0 0", "0 0 0", "0 0 1 2", "a 0 1", "4294967295 0 2"] {
            assert_eq!(IdMap::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_not_mapped_is_told() {
        let map = IdMap::parse("0 0 1000\n2000 5000 1000\n").expect("two ranges");
        for (range, lacks) in [
            ((0, 999), "none"),
            ((2_000, 2_999), "none"),
            ((999, 1_000), "1000"),
            ((500, 2_500), "1000-1999"),
            ((1_500, 3_500), "1500-1999, 3000-3500"),
            ((4_000, u32::MAX - 1), "4000-4294967294"),
        ] {
            assert_eq!(map.lacks(range.0, range.1).to_string(), lacks, "{range:?}");
        }
        let last = IdMap::parse("4294967294 0 1").expect("the last");
        assert_eq!(last.lacks(4_294_967_293, 4_294_967_294).to_string(), "4294967293");
    }

    /// Against a map as a set of its members.
    #[test]
    fn agrees_with_a_naive_model() {
        let map = IdMap::parse("3 0 2\n7 0 1\n8 0 3\n20 0 1\n").expect("four ranges");
        let there = |id: u32| matches!(id, 3 | 4 | 7..=10 | 20);
        for first in 0..24 {
            for last in first..24 {
                let lacks = map.lacks(first, last);
                let listed: Vec<u32> = lacks.0.iter().flat_map(|(from, to)| *from..=*to).collect();
                let naive: Vec<u32> = (first..=last).filter(|id| !there(*id)).collect();
                assert_eq!(listed, naive, "{first} to {last}");
            }
        }
    }
}
