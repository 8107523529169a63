//! Users for workers: one each from a range, used in turn, or one for all where that is what was configured.

use std::collections::HashSet;
use std::io;

use tunguard::config::server::ServerConfig;
use tunguard::exit::{Failure, Outcome};
use tunguard::random;
use tunguard::sys::ids::{self, IdMap};

/// User IDs, each with the group of the same number.
#[derive(Debug)]
pub enum Uids {
    /// One for each worker.
    Own(Range),
    /// This one for all of them.
    Shared(u32),
}

/// Used in turn, so that one rests as long as possible before it is used again.
#[derive(Debug)]
pub struct Range {
    first: u32,
    last: u32,
    next: u32,
    used: HashSet<u32>,
}

impl Uids {
    /// As configured, if these users exist here.
    pub fn new(config: &ServerConfig) -> Outcome<Uids> {
        let failed = |e: io::Error| Failure::system("read which user IDs are mapped here", e);
        let (users, groups) = (IdMap::users().map_err(failed)?, IdMap::groups().map_err(failed)?);
        must_be_mapped(config, &users, &groups)?;
        ids::groups_can_be_left()
            .map_err(|e| Failure::system("drop the workers' supplementary groups", e))?;
        let Some(uid) = config.single_uid else {
            return Ok(Uids::range(workers_of(config.worker_uids), random::bytes()?));
        };
        log::warn!(
            "weaker mode, sandbox.single_uid: all workers are user {uid}, with one allowance for their queues, and \
             only their filters keep one that is taken over from sending signals to the others"
        );
        Ok(Uids::Shared(uid))
    }

    /// Starts anywhere: another guard of this host may have the same range, and RLIMIT_MSGQUEUE is charged by
    /// user across all of them.
    fn range((first, last): (u32, u32), random: [u8; 4]) -> Uids {
        let mut range = Range { first, last, next: first, used: HashSet::new() };
        range.next = range.place(random);
        Uids::Own(range)
    }

    /// One for a worker; `None` while all are in use.
    pub fn take(&mut self) -> Option<u32> {
        match self {
            Uids::Own(range) => range.take(),
            Uids::Shared(uid) => Some(*uid),
        }
    }

    /// Goes on somewhere else: those that come next may be in use by another server of this host.
    pub fn jump(&mut self, random: [u8; 4]) {
        if let Uids::Own(range) = self {
            range.next = range.place(random);
        }
    }

    /// Whether one could be taken.
    pub fn has_one(&self) -> bool {
        match self {
            // No more are in use than the range has.
            Uids::Own(range) => range.used.len() <= (range.last - range.first) as usize,
            Uids::Shared(_) => true,
        }
    }

    /// Takes it back.
    pub fn release(&mut self, uid: u32) {
        if let Uids::Own(range) = self {
            range.used.remove(&uid);
        }
    }
}

impl Range {
    fn place(&self, random: [u8; 4]) -> u32 {
        self.first + u32::from_le_bytes(random) % (self.last - self.first + 1)
    }

    fn take(&mut self) -> Option<u32> {
        for _ in 0..=self.last - self.first {
            let uid = self.next;
            self.next = if uid == self.last { self.first } else { uid + 1 };
            if self.used.insert(uid) {
                return Some(uid);
            }
        }
        None
    }
}

/// The last user of the range is the key holder's.
fn workers_of((first, last): (u32, u32)) -> (u32, u32) {
    (first, last - 1)
}

/// Refuses users that don't exist in our user namespace: no worker could become one of them.
fn must_be_mapped(config: &ServerConfig, users: &IdMap, groups: &IdMap) -> Outcome<()> {
    let (key, first, last) = match config.single_uid {
        Some(uid) => (format!("sandbox.single_uid = {uid}"), uid, uid),
        None => {
            let (first, last) = config.worker_uids;
            (format!("worker_uids = [{first}, {last}]"), first, last)
        }
    };
    let (no_users, no_groups) = (users.lacks(first, last), groups.lacks(first, last));
    if no_users.is_empty() && no_groups.is_empty() {
        return Ok(());
    }
    let way_out = match config.single_uid {
        Some(_) => "set one that is mapped as user and as group, and not 0".to_owned(),
        None => format!(
            "set worker_uids to at least {} that are mapped as users and as groups, or, which is weaker (see the \
             documentation), sandbox.single_uid to one that is, and not 0",
            ServerConfig::worker_uids_needed(config.max_clients, config.max_handshakes)
        ),
    };
    Err(Failure::usage(format!(
        "{}: {key}: not mapped in this user namespace: users {no_users}; groups {no_groups}. Mapped are users \
         {users}; groups {groups}: {way_out}",
        config.file.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use tunguard::exit::Exit;

    #[test]
    fn user_ids_rest_before_they_are_used_again() {
        // The fourth is the key holder's.
        let mut uids = Uids::range(workers_of((70_000, 70_003)), [0; 4]);
        assert_eq!([uids.take(), uids.take()], [Some(70_000), Some(70_001)]);
        uids.release(70_000);
        assert!(uids.has_one());
        assert_eq!([uids.take(), uids.take(), uids.take()], [Some(70_002), Some(70_000), None]);
        assert!(!uids.has_one());
        uids.release(70_001);
        assert!(uids.has_one());
        assert_eq!(uids.take(), Some(70_001));
        uids.jump([0, 0, 0, 1]);
        assert_eq!(uids.take(), None, "all are in use");
        uids.release(70_000);
        uids.jump([1, 0, 0, 0]);
        assert_eq!(uids.take(), Some(70_000));
    }

    #[test]
    fn one_user_is_there_for_all() {
        let mut uids = Uids::Shared(900);
        assert_eq!([uids.take(), uids.take()], [Some(900), Some(900)]);
        assert!(uids.has_one());
        uids.release(900);
        assert_eq!(uids.take(), Some(900));
    }

    #[test]
    fn users_that_do_not_exist_are_refused_with_the_ways_out() {
        let least = "networks = ['10.9.0.0/24']\n[tls]\nca = 'ca'\ncert = 'cert'\nkey = 'key'\n";
        let config =
            |more: &str| ServerConfig::parse(&format!("{least}{more}"), Path::new("/s.toml")).expect("valid");
        let map = |text: &str| IdMap::parse(text).expect(text);
        let (all, some) = (map("0 0 4294967295"), map("0 100000 65536"));
        assert_eq!(must_be_mapped(&config(""), &all, &all), Ok(()));
        assert_eq!(must_be_mapped(&config("[sandbox]\nsingle_uid = 900"), &some, &some), Ok(()));

        let refused = must_be_mapped(&config(""), &some, &all).expect_err("no such users");
        assert_eq!(refused.exit, Exit::Usage);
        assert_eq!(
            refused.text,
            "/s.toml: worker_uids = [65536, 99999]: not mapped in this user namespace: users 65536-99999; groups \
             none. Mapped are users 0-65535; groups 0-4294967294: set worker_uids to at least 379 that are mapped \
             as users and as groups, or, which is weaker (see the documentation), sandbox.single_uid to one that \
             is, and not 0"
        );
        let refused =
            must_be_mapped(&config("[sandbox]\nsingle_uid = 70000"), &all, &some).expect_err("group");
        assert_eq!(
            refused.text,
            "/s.toml: sandbox.single_uid = 70000: not mapped in this user namespace: users none; groups 70000. \
             Mapped are users 0-4294967294; groups 0-65535: set one that is mapped as user and as group, and not 0"
        );
    }
}
