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

impl ServerConfig {
    /// Reads the clients' files anew.
    ///
    /// They are the regular files (or links to such) in `clients_dir` whose name ends in `.toml` and doesn't start
    /// with a dot. The directory may be missing where it is the default one.
    pub fn read_clients(&self) -> Outcome<BTreeMap<String, ClientEntry>> {
        let paths = match client_files(&self.clients_dir) {
            Ok(paths) => paths,
            Err((_, error)) if error.kind() == ErrorKind::NotFound && self.has_default_clients_dir() => {
                Vec::new()
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
        } else if take(&mut taken.subnets, subnet, &value) {
            entry.subnets.push(subnet);
        }
    }
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
