//! What the last session was like, in a file: so that a client that connects on demand can set its host up before it has
//! a connection. What is remembered is the server's wishes as they came; whether this machine agrees is judged again
//! each time ([`super::consent`]), so that a changed configuration counts.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::ipc::Wishes;
use crate::config::client::{ClientConfig, Remote, Routes};
use crate::exit::Outcome;
use crate::net::state;
use crate::wire::control::Settings;

/// The file's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// The remotes as configured then: another list may mean another network.
    remotes: Vec<String>,
    /// The one that the session was with, and where.
    remote: usize,
    /// None where it may have moved.
    server: Option<String>,
    addresses: Vec<IpNet>,
    mtu: u16,
    subnets: Vec<IpNet>,
    routes: Vec<IpNet>,
    dns: Vec<IpAddr>,
}

/// Where it is.
pub fn file(config: &ClientConfig) -> PathBuf {
    config.state_dir.join(format!("client-{}.remembered.json", config.device))
}

impl Remembered {
    /// A session with the remote at this place of the configuration, made at `server`.
    pub fn of(config: &ClientConfig, wishes: &Wishes, remote: usize, server: SocketAddr) -> Remembered {
        Remembered {
            remotes: names(config),
            remote,
            server: Some(server.to_string()),
            addresses: wishes.addresses.clone(),
            mtu: wishes.mtu,
            subnets: wishes.subnets.clone(),
            routes: wishes.settings.routes.clone(),
            dns: wishes.settings.dns.clone(),
        }
    }

    /// From the file, if there is one for the same remotes.
    pub fn load(config: &ClientConfig) -> Outcome<Option<Remembered>> {
        let found: Option<Remembered> = state::load(&file(config))?;
        Ok(found.filter(|found| found.remotes == names(config)))
    }

    /// To the file, whole or not at all, for root to read only.
    pub fn store(&self, path: &Path) -> Outcome<()> {
        state::store(path, self)
    }

    /// The remote that it was with, and where.
    pub fn server(&self) -> Option<(usize, SocketAddr)> {
        Some((self.remote, self.server.as_ref()?.parse().ok()?))
    }

    /// No session could be made: a server that has a name may have moved. Whether that is news.
    pub fn doubt_server(&mut self, config: &ClientConfig) -> bool {
        let named = config.remote.get(self.remote).is_some_and(|remote| !is_address(remote));
        named && self.server.take().is_some()
    }

    fn wishes(&self) -> Wishes {
        Wishes {
            addresses: self.addresses.clone(),
            mtu: self.mtu,
            subnets: self.subnets.clone(),
            settings: Settings { routes: self.routes.clone(), dns: self.dns.clone(), ..Settings::default() },
            server: self.server().map_or(NOWHERE, |(_, server)| server.ip()),
        }
    }
}

/// What the host is to be set up for before there is a connection: with the addresses of the configuration, or else
/// those of the last session. `None` where that isn't enough, and a first connection has to be made:
///
/// - No address is known.
/// - Routes or resolvers are the server's to say, and it hasn't said them yet: what they are for would go out in clear, and
///   wake nobody.
/// - A server's name could be looked up by nobody once the routes into the tunnel are there.
pub fn at_start(config: &ClientConfig, last: Option<&Remembered>) -> Option<Wishes> {
    let reachable = last.is_some_and(|last| last.server().is_some());
    if !reachable && !config.remote.iter().any(is_address) {
        return None;
    }
    if last.is_none() && (config.routes == Routes::Pushed || config.accept_dns) {
        return None;
    }
    let mut wishes = match last {
        Some(last) => last.wishes(),
        None => Wishes {
            addresses: Vec::new(),
            mtu: USUAL_MTU,
            subnets: Vec::new(),
            settings: Settings::default(),
            server: NOWHERE,
        },
    };
    if !config.on_demand.addresses.is_empty() {
        wishes.addresses.clone_from(&config.on_demand.addresses);
    }
    Some(wishes).filter(|wishes| !wishes.addresses.is_empty())
}

fn is_address(remote: &Remote) -> bool {
    remote.host.split('%').next().is_some_and(|host| host.parse::<IpAddr>().is_ok())
}

fn names(config: &ClientConfig) -> Vec<String> {
    config.remote.iter().map(Remote::to_string).collect()
}

/// What a server has where its configuration says nothing.
const USUAL_MTU: u16 = 1420;
const NOWHERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn config(remote: &str, more: &str, state_dir: &Path) -> ClientConfig {
        let state_dir = state_dir.display();
        let text = format!(
            "remote = '{remote}'\nstate_dir = '{state_dir}'\n{more}\n[tls]\nca = 'ca'\ncert = 'cert'\nkey = 'key'\n"
        );
        ClientConfig::parse(&text, Path::new("/etc/tunguard/client.toml")).expect("valid")
    }

    fn wishes() -> Wishes {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().expect("a network")).collect();
        Wishes {
            addresses: nets(&["10.9.0.2/24", "fd09::2/64"]),
            mtu: 1380,
            subnets: nets(&["192.168.7.0/24"]),
            settings: Settings {
                routes: nets(&["0.0.0.0/0"]),
                dns: vec!["10.9.0.1".parse().expect("an address")],
                ..Settings::default()
            },
            server: IpAddr::from([192, 0, 2, 1]),
        }
    }

    #[test]
    fn what_was_written_is_read_by_the_same_configuration() {
        let directory = tempfile::tempdir().expect("a directory");
        let named = config("vpn.example.org", "", directory.path());
        let server = "192.0.2.1:55555".parse().expect("an address");
        assert_eq!(Remembered::load(&named), Ok(None));
        let remembered = Remembered::of(&named, &wishes(), 0, server);
        remembered.store(&file(&named)).expect("written");
        let mode = std::fs::metadata(file(&named)).expect("a file").mode();
        assert_eq!(mode & 0o777, 0o600);
        let read = Remembered::load(&named).expect("read").expect("there");
        assert_eq!((&read, read.server()), (&remembered, Some((0, server))));
        assert_eq!(at_start(&named, Some(&read)), Some(wishes()));
        let other = config("other.example.org", "", directory.path());
        assert_eq!(Remembered::load(&other), Ok(None));
        std::fs::write(file(&named), "{").expect("damaged");
        assert_eq!(Remembered::load(&named), Ok(None));
    }

    #[test]
    fn configured_addresses_come_first() {
        let directory = tempfile::tempdir().expect("a directory");
        let plain = config("192.0.2.1", "", directory.path());
        assert_eq!(at_start(&plain, None), None, "no addresses");
        let fixed = "on_demand = { enabled = true, addresses = ['10.9.0.77/24'] }";
        // What the server would push has to be learned first.
        for (more, enough) in [
            ("", false),
            ("routes = 'none'", false),
            ("dns = 'none'", false),
            ("routes = 'none'\ndns = 'none'", true),
            ("routes = ['10.0.0.0/8']\ndns = 'none'", true),
        ] {
            let by_address = config("192.0.2.1", &format!("{more}\n{fixed}"), directory.path());
            assert_eq!(at_start(&by_address, None).is_some(), enough, "{more:?}");
            let last = Remembered::of(&by_address, &wishes(), 0, "192.0.2.1:7".parse().expect("an address"));
            assert!(at_start(&by_address, Some(&last)).is_some(), "{more:?}");
        }
        let fixed = format!("routes = 'none'\ndns = 'none'\n{fixed}");
        let by_address = config("192.0.2.1", &fixed, directory.path());
        let start = at_start(&by_address, None).expect("known");
        assert_eq!((start.addresses, start.mtu), (vec!["10.9.0.77/24".parse().expect("one")], 1420));
        let by_name = config("vpn.example.org", &fixed, directory.path());
        assert_eq!(at_start(&by_name, None), None, "its name could not be looked up");
        let last = Remembered::of(&by_name, &wishes(), 0, "192.0.2.1:7".parse().expect("an address"));
        let start = at_start(&by_name, Some(&last)).expect("known");
        assert_eq!((start.addresses.len(), start.mtu, start.settings.routes.len()), (1, 1380, 1));
    }

    #[test]
    fn a_server_with_a_name_may_have_moved() {
        let directory = tempfile::tempdir().expect("a directory");
        let server = "192.0.2.1:7".parse().expect("an address");
        let by_name = config("vpn.example.org", "", directory.path());
        let mut last = Remembered::of(&by_name, &wishes(), 0, server);
        assert!(at_start(&by_name, Some(&last)).is_some());
        assert!(last.doubt_server(&by_name) && !last.doubt_server(&by_name));
        last.store(&file(&by_name)).expect("written");
        let read = Remembered::load(&by_name).expect("read").expect("there");
        assert_eq!((at_start(&by_name, Some(&read)), read.server()), (None, None), "it is looked up first");
        let by_address = config("192.0.2.1", "", directory.path());
        let mut last = Remembered::of(&by_address, &wishes(), 0, server);
        assert!(!last.doubt_server(&by_address));
        assert_eq!(last.server(), Some((0, server)));
    }
}
