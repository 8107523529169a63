//! Inner addresses: which identity has which, and for how long it stays reserved.
//!
//! An identity keeps its addresses across sessions and restarts. Fixed addresses (`clients.d/`) are nobody
//! else's, ever. When a pool is used up, the lease that has been unused longest goes, if its time is over.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use tunguard::config::server::ServerConfig;
use tunguard::exit::{Failure, Outcome};

use crate::routes::Routes;

/// The leases.
pub struct Leases {
    file: PathBuf,
    networks: Vec<IpNet>,
    reserve: Duration,
    fixed: HashMap<IpAddr, String>,
    /// Behind clients.
    subnets: Routes,
    subnet_owners: Vec<String>,
    /// The server's own: nobody's.
    server: HashSet<IpAddr>,
    by_name: BTreeMap<String, Lease>,
    by_address: HashMap<IpAddr, String>,
    /// So many are kept.
    most: usize,
    /// Changed since it was written.
    dirty: bool,
}

/// One identity's addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Lease {
    addresses: Vec<IpAddr>,
    /// Seconds since 1970, when its last session ended (or began, while one lasts).
    last_used: u64,
    #[serde(skip)]
    sessions: u32,
    /// Packets that came for it since.
    #[serde(skip)]
    missed: u64,
}

/// Whose an inner address is that no session carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A client's that has no session.
    Away,
    /// A client's that has one, but no packets go there (any more, or yet).
    Connecting,
    /// A host address of the server's networks that nobody has.
    Nobody,
    /// Something else.
    Unknown,
}

/// A client that has a lease and no session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away<'a> {
    /// Who.
    pub name: &'a str,
    /// Its addresses.
    pub addresses: &'a [IpAddr],
    /// Seconds since its last session ended.
    pub since: u64,
    /// Packets that came for it since then, or since the server started.
    pub missed: u64,
}

/// Every address of a network is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exhausted(pub IpNet);

impl Leases {
    /// Reads the state file, if there is one. What no longer fits the configuration is forgotten.
    ///
    /// Errors: its directory can't be made or written to (a usage error); it exists and can't be read or is no lease file;
    /// it is not overwritten.
    pub fn load(config: &ServerConfig) -> Outcome<Leases> {
        let mut leases = Leases::new(config);
        // Found out now, and not when there is something to write down.
        prepare(&config.state_dir)?;
        let text = match std::fs::read_to_string(&leases.file) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(leases),
            Err(e) => return Err(Failure::system(format!("read {}", leases.file.display()), e)),
        };
        let stored: BTreeMap<String, Lease> = serde_json::from_str(&text).map_err(|e| {
            Failure::usage(format!(
                "{}: no lease file ({e}): remove it, and clients get new addresses",
                leases.file.display()
            ))
        })?;
        for (name, lease) in stored {
            leases.remember(name, lease);
        }
        Ok(leases)
    }

    fn new(config: &ServerConfig) -> Leases {
        let mut leases = Leases {
            file: config.state_dir.join(format!("{}.leases", config.device)),
            networks: config.networks.clone(),
            reserve: config.lease,
            fixed: HashMap::new(),
            subnets: Routes::default(),
            subnet_owners: Vec::new(),
            server: config.server_addresses().iter().map(|a| a.addr()).collect(),
            by_name: BTreeMap::new(),
            by_address: HashMap::new(),
            most: MOST,
            dirty: false,
        };
        leases.configure(config);
        leases
    }

    /// Takes over what a configuration says of leases; device, networks and state directory stay as they are. What
    /// is somebody else's now is nobody's lease any more.
    pub fn configure(&mut self, config: &ServerConfig) {
        self.reserve = config.lease;
        self.fixed = config
            .clients
            .iter()
            .flat_map(|(name, entry)| entry.addresses.iter().map(|a| (*a, name.clone())))
            .collect();
        (self.subnets, self.subnet_owners) = (Routes::default(), Vec::new());
        for (name, entry) in &config.clients {
            let owner = self.subnet_owners.len() as u64;
            entry.subnets.iter().for_each(|net| self.subnets.insert(*net, owner));
            self.subnet_owners.push(name.clone());
        }
        let fixed = &self.fixed;
        let is_others = |name: &str, a: &IpAddr| fixed.get(a).is_some_and(|owner| owner != name);
        for (name, lease) in &mut self.by_name {
            let before = lease.addresses.len();
            lease.addresses.retain(|a| !is_others(name, a));
            self.dirty |= lease.addresses.len() != before;
        }
        self.by_address.retain(|a, name| !is_others(name, a));
    }

    fn remember(&mut self, name: String, mut lease: Lease) {
        lease.addresses.retain(|a| self.may_have(&name, *a) && !self.by_address.contains_key(a));
        // The clock was wrong when it was written: or else it would be reserved until then.
        lease.last_used = lease.last_used.min(now());
        if !lease.addresses.is_empty() {
            self.by_address.extend(lease.addresses.iter().map(|a| (*a, name.clone())));
            self.by_name.insert(name, lease);
        }
    }

    /// Which of the first `seats` seats of `name` has one of these addresses.
    pub fn seat_with(&self, name: &str, addresses: &[IpAddr], seats: u16) -> Option<u16> {
        let has = |seat: &u16| {
            let lease = self.by_name.get(&*holder(name, *seat));
            lease.is_some_and(|lease| lease.addresses.iter().any(|a| addresses.contains(a)))
        };
        if addresses.is_empty() { None } else { (0..seats).find(has) }
    }

    /// An address of each network for `name` (a [`holder`]), with the network's prefix length: its fixed one, the one it had, the
    /// one it would like, or a free one. Counts a session until [`Leases::release`].
    pub fn grant(&mut self, name: &str, want: &[IpAddr]) -> Result<Vec<IpNet>, Exhausted> {
        if self.by_name.len() >= self.most && !self.by_name.contains_key(name) {
            self.forget_oldest();
        }
        let had = self.by_name.get(name).map(|l| l.addresses.clone()).unwrap_or_default();
        let mut addresses = Vec::new();
        for network in self.networks.clone() {
            let address = self.choose(name, &network, &had, want).ok_or(Exhausted(network))?;
            addresses.push((address, network));
        }
        for gone in had.iter().filter(|a| !addresses.iter().any(|(b, _)| *a == b)) {
            self.by_address.remove(gone);
        }
        for (address, _) in &addresses {
            self.by_address.insert(*address, name.to_owned());
        }
        let sessions = self.by_name.get(name).map_or(0, |l| l.sessions) + 1;
        let kept = addresses.iter().map(|(a, _)| *a).collect();
        self.by_name
            .insert(name.to_owned(), Lease { addresses: kept, last_used: now(), sessions, missed: 0 });
        self.dirty = true;
        Ok(addresses
            .into_iter()
            .filter_map(|(address, network)| IpNet::new(address, network.prefix_len()).ok())
            .collect())
    }

    /// A session of `name` is over; the lease stays reserved.
    pub fn release(&mut self, name: &str) {
        if let Some(lease) = self.by_name.get_mut(name) {
            lease.sessions = lease.sessions.saturating_sub(1);
            lease.last_used = now();
            self.dirty = true;
        }
    }

    /// A packet came for `destination`, and no session carries it: whose it is, where it is counted.
    pub fn miss(&mut self, destination: IpAddr) -> Owner {
        let is_host = self.is_host(destination);
        let owner = match is_host {
            true => self.by_address.get(&destination).or_else(|| self.fixed.get(&destination)),
            false => self.subnets.lookup(destination).and_then(|at| self.subnet_owners.get(at as usize)),
        };
        match owner.map(|name| self.by_name.get_mut(name)) {
            Some(Some(lease)) => {
                lease.missed += 1;
                if lease.sessions > 0 { Owner::Connecting } else { Owner::Away }
            }
            // It was never here, but may come.
            Some(None) => Owner::Away,
            None if is_host && !self.server.contains(&destination) => Owner::Nobody,
            None => Owner::Unknown,
        }
    }

    /// Who has a lease and no session, by name.
    pub fn away(&self) -> impl Iterator<Item = Away<'_>> {
        let now = now();
        self.by_name.iter().filter(|(_, lease)| lease.sessions == 0).map(move |(name, lease)| Away {
            name,
            addresses: &lease.addresses,
            since: now.saturating_sub(lease.last_used),
            missed: lease.missed,
        })
    }

    /// Whether there is something to write.
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// How long to leave the state file alone after it was written, so that writing takes little of the guard's time. A
    /// guard that is killed meanwhile forgets the leases made since: while they are few, none that a client knows of, as
    /// the worker tells it of its lease in a later turn of the guard's.
    pub fn rest(&self) -> Duration {
        (WRITING_A_LEASE * 50 * self.by_name.len() as u32).min(LONGEST_REST)
    }

    /// Writes the state file, atomically: it is the old or the new one, whatever happens.
    pub fn save(&mut self) -> Outcome<()> {
        let failed = |e| Failure::system(format!("write {}", self.file.display()), e);
        let folder = self.file.parent().unwrap_or(&self.file);
        std::fs::create_dir_all(folder).map_err(failed)?;
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        let text = serde_json::to_string_pretty(&self.by_name).map_err(|e| failed(e.into()))?;
        file.write_all(text.as_bytes()).map_err(failed)?;
        // No fsync: it would hold up every session while the disk is busy. A killed guard loses nothing by that, and
        // a lease lost with the power only means another address.
        file.persist(&self.file).map_err(|e| failed(e.error))?;
        self.dirty = false;
        Ok(())
    }

    fn choose(&mut self, name: &str, network: &IpNet, had: &[IpAddr], want: &[IpAddr]) -> Option<IpAddr> {
        let fixed = self.fixed.iter().find(|(a, n)| *n == name && network.contains(*a)).map(|(a, _)| *a);
        if let Some(fixed) = fixed {
            return Some(fixed);
        }
        let inside = |a: &&IpAddr| network.contains(*a) && self.may_have(name, **a);
        if let Some(had) = had.iter().find(inside) {
            return Some(*had);
        }
        let free = |a: &IpAddr| self.may_have(name, *a) && !self.by_address.contains_key(a);
        if let Some(wanted) = want.iter().find(|a| network.contains(*a) && free(a)) {
            return Some(*wanted);
        }
        // At most as many are taken as there are leases and fixed addresses: the search ends soon.
        let most = self.by_address.len() + self.fixed.len() + self.server.len() + 2;
        if let Some(address) = network.hosts().take(most).find(free) {
            return Some(address);
        }
        self.reclaim(network)
    }

    /// The address of `network` whose lease has been over longest.
    fn reclaim(&mut self, network: &IpNet) -> Option<IpAddr> {
        let over = now().saturating_sub(self.reserve.as_secs());
        let spare = |a: &IpAddr| network.contains(a) && !self.fixed.contains_key(a);
        let (_, name, address) = self
            .by_name
            .iter()
            .filter(|(_, l)| l.sessions == 0 && l.last_used <= over)
            .filter_map(|(n, l)| Some((l.last_used, n.clone(), *l.addresses.iter().find(|a| spare(a))?)))
            .min()?;
        for address in self.by_name.remove(&name)?.addresses {
            self.by_address.remove(&address);
        }
        Some(address)
    }

    /// Forgets the lease that has been unused longest: an IPv6 network never runs out of addresses.
    fn forget_oldest(&mut self) {
        let unused = self.by_name.iter().filter(|(_, lease)| lease.sessions == 0);
        let oldest = unused.map(|(name, lease)| (lease.last_used, name.clone())).min();
        if let Some(lease) = oldest.and_then(|(_, name)| self.by_name.remove(&name)) {
            lease.addresses.iter().for_each(|address| drop(self.by_address.remove(address)));
        }
    }

    /// Whether `name` may hold `address` at all: a host of one of the networks, and nobody else's fixed one.
    fn may_have(&self, name: &str, address: IpAddr) -> bool {
        self.is_host(address)
            && !self.server.contains(&address)
            && self.fixed.get(&address).is_none_or(|owner| owner == name)
    }

    fn is_host(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|n| {
            let edge = match n {
                // The network's and the broadcast address are nobody's; in IPv6 the first is the routers'.
                IpNet::V4(v4) => IpAddr::V4(v4.broadcast()),
                IpNet::V6(v6) => IpAddr::V6(v6.network()),
            };
            n.contains(&address) && address != n.network() && address != edge
        })
    }
}

/// Under which name a seat of an identity has its lease: the first under the identity's own. A '/' is in no identity's
/// name, so it is nobody else's.
pub fn holder(name: &str, seat: u16) -> Cow<'_, str> {
    match seat {
        0 => Cow::Borrowed(name),
        _ => Cow::Owned(format!("{name}/{}", seat + 1)),
    }
}

/// Leases that are kept: more than twice as many as there can be sessions.
const MOST: usize = 65_536;

/// Makes `folder` where there is none, and a file there that has no name and is gone at once.
fn prepare(folder: &Path) -> Outcome<()> {
    let prepared = std::fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder).map(drop));
    match prepared {
        // A disk that is full by now may have room later.
        Err(e) if !matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            Err(Failure::usage(format!(
                "state_dir = {folder:?} can't be written to: {e}: let root make files there, or set another `state_dir`"
            )))
        }
        _ => Ok(()),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// About what [`Leases::save`] takes for each lease.
const WRITING_A_LEASE: Duration = Duration::from_micros(1);
const LONGEST_REST: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use tunguard::config::server::ClientEntry;
    use tunguard::exit::Exit;

    fn config(networks: &str, folder: &Path, lease: &str) -> ServerConfig {
        let text = format!(
            "networks = {networks}\nlease = \"{lease}\"\nstate_dir = {folder:?}\n\
             [tls]\nca = \"a\"\ncert = \"b\"\nkey = \"c\"\n"
        );
        ServerConfig::parse(&text, Path::new("server.toml")).expect("a valid configuration")
    }

    fn texts(granted: &[IpNet]) -> Vec<String> {
        granted.iter().map(|n| n.to_string()).collect()
    }

    #[test]
    fn leases_stick_across_restarts() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = config("[\"10.9.0.0/24\", \"fd09::/64\"]", folder.path(), "24h");
        let mut leases = Leases::load(&config).expect("no file yet");
        assert_eq!(texts(&leases.grant("ann", &[]).expect("room")), ["10.9.0.2/24", "fd09::2/64"]);
        assert_eq!(texts(&leases.grant("bob", &[]).expect("room")), ["10.9.0.3/24", "fd09::3/64"]);
        leases.release("ann");
        leases.save().expect("writes");
        let mut again = Leases::load(&config).expect("reads");
        assert_eq!(texts(&again.grant("cid", &[]).expect("room")), ["10.9.0.4/24", "fd09::4/64"]);
        assert_eq!(texts(&again.grant("bob", &[]).expect("room")), ["10.9.0.3/24", "fd09::3/64"]);
        assert_eq!(texts(&again.grant("ann", &[]).expect("room")), ["10.9.0.2/24", "fd09::2/64"]);
    }

    #[test]
    fn a_lease_of_the_future_is_one_of_today() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = config("[\"10.9.0.0/30\"]", folder.path(), "0s");
        let mut leases = Leases::load(&config).expect("no file yet");
        leases.grant("ann", &[]).expect("room");
        leases.release("ann");
        // Its session ended while the clock was ten years ahead.
        leases.by_name.get_mut("ann").expect("a lease").last_used += 10 * 365 * 86_400;
        leases.save().expect("writes");
        let mut again = Leases::load(&config).expect("reads");
        assert_eq!(texts(&again.grant("bob", &[]).expect("the lease is over")), ["10.9.0.2/30"]);
    }

    #[test]
    fn a_few_leases_are_written_at_once_and_many_at_most_twice_a_second() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = config("[\"10.0.0.0/16\"]", folder.path(), "0s");
        let mut leases = Leases::load(&config).expect("no file yet");
        leases.grant("ann", &[]).expect("room");
        assert!(leases.rest() < Duration::from_millis(1));
        for n in 0..20_000 {
            let lease = Lease { addresses: vec![], last_used: 0, sessions: 0, missed: 0 };
            leases.by_name.insert(n.to_string(), lease);
        }
        assert_eq!(leases.rest(), LONGEST_REST);
    }

    #[test]
    fn fixed_addresses_are_nobody_elses_and_wishes_are_heard() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = config("[\"10.9.0.0/24\"]", folder.path(), "24h");
        let entry =
            ClientEntry { addresses: vec!["10.9.0.2".parse().expect("an address")], ..Default::default() };
        config.clients.insert("ann".into(), entry);
        let mut leases = Leases::load(&config).expect("no file yet");
        let want =
            ["10.9.0.2", "10.9.0.1", "10.9.0.255", "10.9.0.77"].map(|a| a.parse().expect("an address"));
        assert_eq!(texts(&leases.grant("bob", &want).expect("room")), ["10.9.0.77/24"]);
        assert_eq!(texts(&leases.grant("cid", &want).expect("room")), ["10.9.0.3/24"]);
        assert_eq!(texts(&leases.grant("ann", &[]).expect("room")), ["10.9.0.2/24"]);
    }

    #[test]
    fn each_seat_has_addresses_of_its_own_and_the_first_has_what_is_fixed() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = config("[\"10.9.0.0/24\"]", folder.path(), "24h");
        let fixed = "10.9.0.9".parse().expect("an address");
        let entry = ClientEntry { addresses: vec![fixed], ..Default::default() };
        config.clients.insert("ann".into(), entry);
        let mut leases = Leases::load(&config).expect("no file yet");
        for (seat, address) in [(0, "10.9.0.9/24"), (1, "10.9.0.2/24"), (2, "10.9.0.3/24")] {
            assert_eq!(texts(&leases.grant(&holder("ann", seat), &[fixed]).expect("room")), [address]);
        }
        let with = |leases: &Leases, text: &str, seats| {
            leases.seat_with("ann", &[text.parse().expect("an address")], seats)
        };
        assert_eq!(with(&leases, "10.9.0.3", 3), Some(2));
        assert_eq!(with(&leases, "10.9.0.3", 2), None);
        assert_eq!(leases.seat_with("ann", &[], 3), None);
        leases.release(&holder("ann", 2));
        assert_eq!(leases.away().map(|a| a.name.to_owned()).collect::<Vec<_>>(), ["ann/3"]);
        leases.save().expect("writes");
        let mut again = Leases::load(&config).expect("reads");
        assert_eq!(texts(&again.grant(&holder("ann", 2), &[]).expect("room")), ["10.9.0.3/24"]);
    }

    #[test]
    fn an_address_that_is_fixed_later_changes_hands() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = config("[\"10.9.0.0/24\"]", folder.path(), "24h");
        let mut leases = Leases::load(&config).expect("no file yet");
        assert_eq!(texts(&leases.grant("ann", &[]).expect("room")), ["10.9.0.2/24"]);
        let entry =
            ClientEntry { addresses: vec!["10.9.0.2".parse().expect("an address")], ..Default::default() };
        config.clients.insert("bob".into(), entry);
        leases.configure(&config);
        assert_eq!(texts(&leases.grant("bob", &[]).expect("room")), ["10.9.0.2/24"]);
        // Ann's session may last a little longer than the new one of hers that it makes room for.
        assert_eq!(texts(&leases.grant("ann", &[]).expect("room")), ["10.9.0.3/24"]);
        leases.release("ann");
        assert_eq!(leases.away().count(), 0);
        leases.release("ann");
        assert_eq!(leases.away().map(|away| away.addresses.len()).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn a_full_pool_gives_up_only_leases_that_are_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut leases = Leases::load(&config("[\"10.9.0.0/30\"]", folder.path(), "24h")).expect("none yet");
        assert_eq!(texts(&leases.grant("ann", &[]).expect("room")), ["10.9.0.2/30"]);
        leases.release("ann");
        assert!(leases.grant("bob", &[]).is_err(), "still reserved for ann");
        let mut leases = Leases::load(&config("[\"10.9.0.0/30\"]", folder.path(), "0s")).expect("none yet");
        assert_eq!(texts(&leases.grant("ann", &[]).expect("room")), ["10.9.0.2/30"]);
        assert!(leases.grant("bob", &[]).is_err(), "in use");
        leases.release("ann");
        assert_eq!(texts(&leases.grant("bob", &[]).expect("room")), ["10.9.0.2/30"]);
    }

    #[test]
    fn of_too_many_leases_the_oldest_goes() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut leases = Leases::load(&config("[\"fd09::/64\"]", folder.path(), "24h")).expect("none yet");
        leases.most = 10;
        leases.grant("stays", &[]).expect("room");
        for n in 0..100 {
            let name = format!("c{n}");
            leases.grant(&name, &[]).expect("room");
            leases.release(&name);
            leases.by_name.get_mut(&name).expect("just granted").last_used = n;
            assert!(leases.by_name.len() <= 10 && leases.by_address.len() <= 10);
        }
        let left: Vec<&str> = leases.by_name.keys().map(String::as_str).collect();
        assert_eq!(left, ["c91", "c92", "c93", "c94", "c95", "c96", "c97", "c98", "c99", "stays"]);
    }

    #[test]
    fn packets_for_those_who_are_away_are_counted() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = config("[\"10.9.0.0/24\", \"fd09::/64\"]", folder.path(), "24h");
        let entry = ClientEntry {
            addresses: vec!["10.9.0.9".parse().expect("an address")],
            subnets: vec!["192.168.7.0/24".parse().expect("a network")],
            ..Default::default()
        };
        config.clients.insert("dan".into(), entry);
        let mut leases = Leases::load(&config).expect("no file yet");
        let miss = |leases: &mut Leases, address: &str| leases.miss(address.parse().expect("an address"));
        leases.grant("ann", &[]).expect("room");
        assert_eq!(miss(&mut leases, "10.9.0.2"), Owner::Connecting);
        leases.release("ann");
        assert_eq!(miss(&mut leases, "10.9.0.2"), Owner::Away);
        assert_eq!(miss(&mut leases, "fd09::2"), Owner::Away);
        let away: Vec<_> = leases.away().map(|a| (a.name.to_owned(), a.addresses.len(), a.missed)).collect();
        assert_eq!(away, [("ann".to_owned(), 2, 3)]);
        // It is back, with the addresses it had, and nothing missed.
        assert_eq!(texts(&leases.grant("ann", &[]).expect("room")), ["10.9.0.2/24", "fd09::2/64"]);
        assert_eq!(leases.away().count(), 0);
        leases.release("ann");
        assert_eq!(leases.away().map(|a| a.missed).sum::<u64>(), 0);
        // One that has been here never, but has its place.
        assert_eq!(miss(&mut leases, "10.9.0.9"), Owner::Away);
        assert_eq!(miss(&mut leases, "192.168.7.7"), Owner::Away);
        for (address, owner) in [
            ("10.9.0.77", Owner::Nobody),
            ("fd09::77", Owner::Nobody),
            ("10.9.0.1", Owner::Unknown),
            ("10.9.0.0", Owner::Unknown),
            ("10.9.0.255", Owner::Unknown),
            ("fd09::", Owner::Unknown),
            ("224.0.0.251", Owner::Unknown),
            ("ff02::1", Owner::Unknown),
            ("192.0.2.1", Owner::Unknown),
        ] {
            assert_eq!(miss(&mut leases, address), owner, "{address}");
        }
    }

    /// Leases as a file has them, used longest ago first.
    fn stored(folder: &Path, leases: &[(&str, &[&str])]) {
        let lease =
            |n: usize, addresses| serde_json::json!({ "addresses": addresses, "last_used": 1_000 + n });
        let leases = leases.iter().enumerate().map(|(n, (name, a))| ((*name).to_owned(), lease(n, *a)));
        let text = serde_json::Value::Object(leases.collect()).to_string();
        std::fs::write(folder.join("tg0.leases"), text).expect("writes");
    }

    fn fix(config: &mut ServerConfig, name: &str, address: &str) {
        let addresses = vec![address.parse().expect("an address")];
        config.clients.insert(name.into(), ClientEntry { addresses, ..Default::default() });
    }

    #[test]
    fn of_a_file_only_what_each_may_have_is_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = config("[\"10.9.0.0/24\"]", folder.path(), "24h");
        fix(&mut config, "fay", "10.9.0.9");
        stored(
            folder.path(),
            &[
                ("ann", &["10.9.0.5"]),
                // In the order of names: the second that has it.
                ("bob", &["10.9.0.5", "10.9.0.6"]),
                ("cid", &["192.0.2.1", "10.9.0.1", "10.9.0.0", "10.9.0.255", "10.9.0.9"]),
                ("fay", &["10.9.0.9"]),
            ],
        );
        let mut leases = Leases::load(&config).expect("reads");
        let kept: Vec<_> = leases.by_name.iter().map(|(n, l)| (n.as_str(), l.addresses.clone())).collect();
        let ip = |text: &str| -> IpAddr { text.parse().expect("an address") };
        assert_eq!(
            kept,
            [("ann", vec![ip("10.9.0.5")]), ("bob", vec![ip("10.9.0.6")]), ("fay", vec![ip("10.9.0.9")])]
        );
        assert_eq!(leases.by_address.len(), 3);
        assert_eq!(texts(&leases.grant("bob", &[]).expect("room")), ["10.9.0.6/24"]);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_no_empty_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = config("[\"10.9.0.0/24\"]", folder.path(), "24h");
        std::fs::create_dir(folder.path().join("tg0.leases")).expect("a folder in its place");
        let failure = Leases::load(&config).err().expect("refused");
        assert!(failure.text.contains("tg0.leases"), "{failure}");
    }

    #[test]
    fn what_changed_is_to_be_written_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = config("[\"10.9.0.0/24\"]", folder.path(), "24h");
        let mut leases = Leases::load(&config).expect("no file yet");
        assert!(!leases.is_dirty());
        let changed = |leases: &mut Leases| {
            let dirty = leases.is_dirty();
            leases.save().expect("writes");
            assert!(!leases.is_dirty());
            dirty
        };
        leases.grant("ann", &[]).expect("room");
        assert!(changed(&mut leases));
        leases.release("nobody");
        assert!(!changed(&mut leases));
        leases.release("ann");
        assert!(changed(&mut leases));
        leases.configure(&config);
        assert!(!changed(&mut leases));
        // Her own.
        fix(&mut config, "ann", "10.9.0.2");
        leases.configure(&config);
        assert!(!changed(&mut leases));
        config.clients.clear();
        fix(&mut config, "bob", "10.9.0.2");
        leases.configure(&config);
        assert!(changed(&mut leases), "somebody else's now");
        leases.grant("cid", &[]).expect("room");
        leases.configure(&config);
        assert!(changed(&mut leases), "still");
    }

    #[test]
    fn what_is_fixed_for_another_is_at_once_nobody_elses_and_the_rest_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = config("[\"10.9.0.0/24\"]", folder.path(), "24h");
        let mut leases = Leases::load(&config).expect("no file yet");
        for name in ["ann", "cid"] {
            leases.grant(name, &[]).expect("room");
        }
        fix(&mut config, "bob", "10.9.0.2");
        leases.configure(&config);
        let ip = |text: &str| -> IpAddr { text.parse().expect("an address") };
        assert_eq!(leases.miss(ip("10.9.0.2")), Owner::Away, "bob's, who isn't here, and not ann's, who is");
        assert_eq!(leases.miss(ip("10.9.0.3")), Owner::Connecting);
        leases.release("ann");
        leases.release("cid");
        let away: Vec<_> = leases.away().map(|a| (a.name, a.addresses.to_vec(), a.missed)).collect();
        assert_eq!(away, [("ann", vec![], 0), ("cid", vec![ip("10.9.0.3")], 1)]);
        // What somebody had before an address was fixed for her is free again.
        fix(&mut config, "cid", "10.9.0.9");
        leases.configure(&config);
        assert_eq!(texts(&leases.grant("cid", &[]).expect("room")), ["10.9.0.9/24"]);
        assert_eq!(texts(&leases.grant("dan", &[]).expect("room")), ["10.9.0.3/24"]);
        assert_eq!(texts(&leases.grant("cid", &[]).expect("room")), ["10.9.0.9/24"]);
        assert_eq!(leases.miss(ip("10.9.0.9")), Owner::Connecting);
    }

    #[test]
    fn a_lease_gives_way_to_one_that_gains_by_it_and_never_a_fixed_address() {
        let folder = tempfile::tempdir().expect("a folder");
        // Five addresses for clients, of which three are fixed; the file, made by hand, gives fay two.
        let mut config = config("[\"10.9.0.0/29\", \"fd09::/64\"]", folder.path(), "0s");
        for (name, address) in [("fay", "10.9.0.4"), ("gus", "10.9.0.5"), ("hal", "10.9.0.6")] {
            fix(&mut config, name, address);
        }
        stored(
            folder.path(),
            &[
                ("ann", &["fd09::7"]),
                ("bob", &["10.9.0.2", "fd09::2"]),
                ("fay", &["10.9.0.4", "10.9.0.3"]),
                ("gus", &["10.9.0.5"]),
            ],
        );
        let mut leases = Leases::load(&config).expect("reads");
        let mut granted =
            |name| leases.grant(name, &[]).map(|granted| texts(&granted)).map_err(|full| full.0.to_string());
        assert_eq!(granted("cid").expect("bob's"), ["10.9.0.2/29", "fd09::2/64"]);
        assert_eq!(granted("dan").expect("what fay had beside her own")[0], "10.9.0.3/29");
        assert_eq!(granted("eve"), Err("10.9.0.0/29".into()), "the others are fixed, or in use");
        let left: Vec<&str> = leases.by_name.keys().map(String::as_str).collect();
        assert_eq!(left, ["ann", "cid", "dan", "gus"]);
        assert_eq!(texts(&leases.grant("fay", &[]).expect("hers"))[0], "10.9.0.4/29");
    }

    #[test]
    fn a_lease_tells_when_it_was_used() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut leases = Leases::load(&config("[\"10.9.0.0/24\"]", folder.path(), "24h")).expect("none yet");
        let wall = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let before = wall();
        leases.grant("ann", &[]).expect("room");
        assert!((before..=wall()).contains(&leases.by_name["ann"].last_used));
        leases.release("ann");
        leases.by_name.get_mut("ann").expect("a lease").last_used -= 1_000;
        assert!((1_000..1_000 + 600).contains(&leases.away().map(|a| a.since).sum::<u64>()));
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named_at_the_start() {
        let folder = tempfile::tempdir().expect("a folder");
        let (file, below) = (folder.path().join("file"), folder.path().join("file/state"));
        std::fs::write(&file, "").expect("writes");
        let failure = Leases::load(&config("[\"10.9.0.0/24\"]", &below, "24h")).err().expect("refused");
        let what =
            format!("state_dir = {below:?} can't be written to: Not a directory (os error 20): let root");
        assert!(failure.exit == Exit::Usage && failure.text.starts_with(&what), "{failure}");
        let missing = folder.path().join("a/b");
        Leases::load(&config("[\"10.9.0.0/24\"]", &missing, "24h")).expect("makes it");
        assert_eq!(std::fs::read_dir(&missing).expect("it is made").count(), 0, "nothing stays there");
    }

    #[test]
    fn a_damaged_file_is_refused_and_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = config("[\"10.9.0.0/24\"]", folder.path(), "24h");
        let file = folder.path().join("tg0.leases");
        std::fs::write(&file, "{ half").expect("writes");
        let failure = Leases::load(&config).err().expect("refused");
        assert!(failure.text.contains("tg0.leases: no lease file"), "{failure}");
        assert_eq!(std::fs::read_to_string(&file).expect("reads"), "{ half");
    }
}
