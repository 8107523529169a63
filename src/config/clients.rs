//! `clients.d/NAME.toml`: what is fixed for each client, checked against the networks and each other.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;

use super::common::{quoted, reserved};
use super::reader::{self, Document, Value};
use super::server::{ClientEntry, ServerConfig, first_host};
use crate::exit::{Failure, Outcome};
use crate::wire::control::MAX_SUBNETS;

impl ServerConfig {
    /// Reads the clients' files anew.
    ///
    /// They are the regular files (or links to such) in `clients_dir` whose name ends in `.toml` and doesn't
    /// start with a dot. The directory may be missing where it is the default one.
    pub fn read_clients(&self) -> Outcome<BTreeMap<String, ClientEntry>> {
        let paths = match client_files(&self.clients_dir) {
            Ok(paths) => paths,
            Err((_, error)) if error.kind() == ErrorKind::NotFound && self.has_default_clients_dir() => {
                Vec::new()
            }
            // A directory that the configuration names; or one of the files in it.
            Err((path, error)) if path == self.clients_dir => {
                let (dir, file) = (path.display(), self.file.display());
                let text = format!(
                    "{file}: clients_dir = \"{dir}\" can't be read: {error}: make it, or name another"
                );
                return Err(Failure::usage(text));
            }
            Err((path, error)) => return Err(Failure::usage(format!("{}: {error}", path.display()))),
        };
        let read = |path: PathBuf| reader::read(&path).map(|(text, _)| (path, text));
        let files = paths.into_iter().map(read).collect::<Outcome<Vec<_>>>()?;
        self.parse_clients(&files)
    }

    /// Parses clients' files, given as path and text, and checks them against each other.
    pub fn parse_clients(&self, files: &[(PathBuf, String)]) -> Outcome<BTreeMap<String, ClientEntry>> {
        let mut entries = BTreeMap::new();
        let mut taken = Taken::default();
        let mut faults = Vec::new();
        for (path, text) in files {
            let parsed =
                identity(path).and_then(|name| Ok((name, Document::parse(path, &self.clients_dir, text)?)));
            match parsed {
                Ok((name, document)) => {
                    entries.insert(name.to_owned(), read_entry(&document, &self.networks, &mut taken));
                    faults.extend(document.faults());
                }
                Err(failure) => faults.push(failure.text),
            }
        }
        reader::outcome(Some(entries), faults)
    }
}

/// What was given to a client so far, and the place that did.
#[derive(Default)]
struct Taken {
    addresses: BTreeMap<IpAddr, String>,
    subnets: BTreeMap<IpNet, String>,
}

/// The clients' files of a directory, by name; an error comes with the path it is about.
fn client_files(directory: &Path) -> Result<Vec<PathBuf>, (PathBuf, io::Error)> {
    let about = |error| (directory.to_owned(), error);
    let mut paths = Vec::new();
    for file in fs::read_dir(directory).map_err(about)? {
        let file = file.map_err(about)?;
        let name = file.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(b".") || !name.ends_with(b".toml") {
            continue;
        }
        let path = file.path();
        if fs::metadata(&path).map_err(|error| (path.clone(), error))?.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// The client that a file is about: its name without `.toml`.
fn identity(path: &Path) -> Outcome<&str> {
    let name = path.file_stem().unwrap_or_default();
    match name.to_str() {
        Some(name) if (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic()) => {
            Ok(name)
        }
        _ => Err(Failure::usage(format!(
            "{}: {} is no client's name: 1 to 64 ASCII characters without spaces",
            path.display(),
            quoted(&name.to_string_lossy())
        ))),
    }
}

/// One file, checked against what is taken.
fn read_entry(document: &Document<'_>, networks: &[IpNet], taken: &mut Taken) -> ClientEntry {
    let mut root = document.root();
    let mut entry = ClientEntry::default();
    for (address, value) in root.value("addresses").map(|v| v.words::<IpAddr>()).unwrap_or_default() {
        if let Err(why) = check_address(address, networks) {
            value.fault(why);
        } else if entry.addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            value.fault(format_args!("is a second {family} address: one of each family at most"));
        } else if take(&mut taken.addresses, address, &value) {
            entry.addresses.push(address);
        }
    }
    for (subnet, value) in root.value("subnets").map(|v| v.words::<IpNet>()).unwrap_or_default() {
        if let Some(why) = reserved(&subnet) {
            value.fault(why);
        } else if let Some(net) = networks.iter().find(|net| net.contains(&subnet) || subnet.contains(*net)) {
            value.fault(format_args!("overlaps {net}, one of the server's networks"));
        } else if entry.subnets.len() >= MAX_SUBNETS {
            value.fault(format_args!("is one too many: a client takes at most {MAX_SUBNETS}"));
            break;
        } else if take(&mut taken.subnets, subnet, &value) {
            entry.subnets.push(subnet);
        }
    }
    let mut limits = root.section("limits");
    entry.rate_down = limits.value("rate_down").and_then(|v| v.word());
    entry.rate_up = limits.value("rate_up").and_then(|v| v.word());
    limits.end();
    root.end();
    entry
}

/// Why no client can have `address`, if so.
fn check_address(address: IpAddr, networks: &[IpNet]) -> Result<(), String> {
    let Some(net) = networks.iter().find(|net| net.contains(&address)) else {
        let networks: Vec<String> = networks.iter().map(IpNet::to_string).collect();
        return Err(format!("is outside the server's networks: {}", networks.join(" and ")));
    };
    if address == net.network() {
        Err(format!("is the network address of {net}"))
    } else if address.is_ipv4() && address == net.broadcast() {
        Err(format!("is the broadcast address of {net}"))
    } else if address == first_host(net).addr() {
        Err(format!("is the server's own address in {net}"))
    } else {
        Ok(())
    }
}

/// Takes `item` for the client whose file holds `value`, unless another one has it.
fn take<T: Ord>(taken: &mut BTreeMap<T, String>, item: T, value: &Value<'_>) -> bool {
    match taken.entry(item) {
        Entry::Occupied(earlier) => {
            value.fault(format_args!("is already another client's: {}", earlier.get()));
            false
        }
        Entry::Vacant(vacant) => {
            vacant.insert(value.place());
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::Rate;
    use proptest::prelude::*;

    fn server() -> ServerConfig {
        let text = "networks = ['10.9.0.0/24', 'fd09::/64']\n[tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\n";
        ServerConfig::parse(text, Path::new("/etc/tunguard/server.toml")).expect("valid")
    }

    /// Clients' files by name.
    fn parse(files: &[(&str, &str)]) -> Outcome<BTreeMap<String, ClientEntry>> {
        let file = |(name, text): &(&str, &str)| (PathBuf::from(format!("/c/{name}.toml")), text.to_string());
        server().parse_clients(&files.iter().map(file).collect::<Vec<_>>())
    }

    #[test]
    fn accepted() {
        let clients = parse(&[
            ("alice", "addresses = ['10.9.0.2', 'fd09::2']\nsubnets = ['192.168.1.0/24', 'fd10::/48']"),
            (
                "bob@example.org",
                "addresses = ['fd09:0:0:0:ffff:ffff:ffff:ffff']\nsubnets = ['192.168.0.0/16']",
            ),
            ("carol.lab", "addresses = ['10.9.0.254']"),
            ("dave", ""),
            ("erin", "limits = { rate_down = '5Mbit/s' }"),
            ("frank", "[limits]\nrate_up = 'off'"),
        ]);
        let clients = clients.expect("valid");
        assert_eq!(
            clients.keys().collect::<Vec<_>>(),
            ["alice", "bob@example.org", "carol.lab", "dave", "erin", "frank"]
        );
        assert_eq!(clients["alice"].addresses.len(), 2);
        assert_eq!(clients["alice"].subnets.len(), 2);
        assert_eq!(clients["dave"], ClientEntry::default());
        assert_eq!((clients["erin"].rate_down, clients["erin"].rate_up), (Some(rate(5_000_000)), None));
        assert_eq!((clients["frank"].rate_down, clients["frank"].rate_up), (None, Some(None)));
        assert_eq!(parse(&[(&"n".repeat(64), "")]).map(|clients| clients.len()), Ok(1));
    }

    fn rate(bits: u64) -> Option<Rate> {
        Rate::from_bits(bits)
    }

    #[test]
    fn a_clients_own_limits_and_sessions() {
        let text = "networks = ['10.9.0.0/24', 'fd09::/64']\nmax_sessions_per_identity = 3\nlimits.rate_up = '1Mbit/s'\n\
                    [tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\n";
        let mut config = ServerConfig::parse(text, Path::new("/etc/tunguard/server.toml")).expect("valid");
        config.clients = parse(&[
            ("down", "limits.rate_down = '5Mbit/s'"),
            ("free", "limits.rate_up = 'off'"),
            ("fixed", "addresses = ['10.9.0.2']"),
            ("behind", "subnets = ['192.168.1.0/24']"),
        ])
        .expect("valid");
        let rates = |name: &str| (config.rates_of(name).down, config.rates_of(name).up);
        assert_eq!(rates("stranger"), (None, rate(1_000_000)));
        assert_eq!(rates("down"), (rate(5_000_000), rate(1_000_000)));
        assert_eq!(rates("free"), (None, None));
        let sessions = ["stranger", "down", "fixed", "behind"].map(|name| config.sessions_of(name));
        assert_eq!(sessions, [3, 3, 1, 1]);
    }

    #[test]
    fn rejected() {
        for (line, sentence) in [
            ("adresses = []", r#"unknown key "adresses" (did you mean "addresses"?)"#),
            ("address = []", r#"unknown key "address" (did you mean "addresses"?)"#),
            ("rate_up = 'off'", r#"unknown key "rate_up" (did you mean "limits.rate_up"?)"#),
            (
                "limits.rate_up = '9'",
                r#"limits.rate_up = "9" is no rate: a whole number with bit/s, Kbit/s, Mbit/s or Gbit/s, as in "20Mbit/s", or "off""#,
            ),
            (
                "addresses = '10.9.0.5'",
                r#"addresses = "10.9.0.5" is a string, not a list of strings, each an IP address, as in "10.9.0.1" or "fd09::1""#,
            ),
            (
                "addresses = ['10.9.0.5/24']",
                r#"addresses[0] = "10.9.0.5/24" is not an IP address, as in "10.9.0.1" or "fd09::1""#,
            ),
            (
                "addresses = ['10.8.0.5']",
                r#"addresses[0] = "10.8.0.5" is outside the server's networks: 10.9.0.0/24 and fd09::/64"#,
            ),
            (
                "addresses = ['::ffff:10.9.0.5']",
                r#"addresses[0] = "::ffff:10.9.0.5" is outside the server's networks: 10.9.0.0/24 and fd09::/64"#,
            ),
            (
                "addresses = ['10.9.0.0']",
                r#"addresses[0] = "10.9.0.0" is the network address of 10.9.0.0/24"#,
            ),
            ("addresses = ['fd09::']", r#"addresses[0] = "fd09::" is the network address of fd09::/64"#),
            (
                "addresses = ['10.9.0.255']",
                r#"addresses[0] = "10.9.0.255" is the broadcast address of 10.9.0.0/24"#,
            ),
            (
                "addresses = ['10.9.0.1']",
                r#"addresses[0] = "10.9.0.1" is the server's own address in 10.9.0.0/24"#,
            ),
            (
                "addresses = ['fd09::1']",
                r#"addresses[0] = "fd09::1" is the server's own address in fd09::/64"#,
            ),
            (
                "addresses = ['10.9.0.5', '10.9.0.6']",
                r#"addresses[1] = "10.9.0.6" is a second IPv4 address: one of each family at most"#,
            ),
            (
                "addresses = ['fd09::5', 'fd09::6']",
                r#"addresses[1] = "fd09::6" is a second IPv6 address: one of each family at most"#,
            ),
            (
                "addresses = ['10.9.0.5', '10.9.0.5']",
                r#"addresses[1] = "10.9.0.5" is already in the list: addresses[0]"#,
            ),
            (
                "addresses = ['10.9.0.2']",
                r#"addresses[0] = "10.9.0.2" is already another client's: /c/alice.toml:1"#,
            ),
            (
                "subnets = ['10.9.0.128/25']",
                r#"subnets[0] = "10.9.0.128/25" overlaps 10.9.0.0/24, one of the server's networks"#,
            ),
            (
                "subnets = ['10.0.0.0/8']",
                r#"subnets[0] = "10.0.0.0/8" overlaps 10.9.0.0/24, one of the server's networks"#,
            ),
            (
                "subnets = ['192.168.1.1/24']",
                r#"subnets[0] = "192.168.1.1/24" has host bits set: "192.168.1.0/24" was probably meant"#,
            ),
            (
                "subnets = ['127.1.0.0/16']",
                r#"subnets[0] = "127.1.0.0/16" overlaps 127.0.0.0/8, the loopback addresses"#,
            ),
            (
                "subnets = ['192.168.1.0/24']",
                r#"subnets[0] = "192.168.1.0/24" is already another client's: /c/alice.toml:2"#,
            ),
        ] {
            let alice = "addresses = ['10.9.0.2']\nsubnets = ['192.168.1.0/24']";
            let failure = parse(&[("alice", alice), ("bob", &format!("#\n\n{line}"))]).expect_err(line);
            assert_eq!(failure.text, format!("/c/bob.toml:3: {sentence}"));
        }
    }

    #[test]
    fn names_rejected() {
        for name in ["a b", "é", "a\tb", &"n".repeat(65)] {
            let failure = parse(&[(name, "")]).expect_err(name);
            let sentence = format!(
                "/c/{name}.toml: {name:?} is no client's name: 1 to 64 ASCII characters without spaces"
            );
            assert_eq!(failure.text, sentence);
        }
    }

    #[test]
    fn faults_of_all_files_are_reported_together() {
        let failure =
            parse(&[("a", "x = 1"), ("b", "addresses ="), ("c", "subnets = 1")]).expect_err("faults");
        let faults = [
            r#"/c/a.toml:1: unknown key "x" (known here: addresses, subnets, limits)"#,
            "/c/b.toml:1:12: not valid TOML: string values must be quoted, expected literal string",
            r#"/c/c.toml:1: subnets = 1 is an integer, not a list of strings, each a network, as in "10.9.0.0/24" or "fd09::/64""#,
        ];
        assert_eq!(failure.text, faults.join("\n"));
    }

    proptest! {
        #[test]
        fn random_text_never_panics(text in "\\PC*|(addresses|subnets) = \\[('[0-9a-f:./]*',){0,3}\\]") {
            let _ = parse(&[("a", &text), ("b", &text)]);
        }
    }
}
