//! `server.toml` and `clients.d/NAME.toml`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::common::{DEFAULT_PORT, Data, DeviceName, Pem, reserved};
use super::reader::{self, Document, Value};
use crate::exit::{Failure, Outcome};

/// Who writes a client's packets to the TUN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunWrite {
    /// The session's worker (the default).
    Direct,
    /// The guard, after it checked the source address; the worker never holds the device.
    Guard,
}

/// What clients are offered beyond their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Push {
    /// Destinations to be routed into the tunnel.
    pub routes: Vec<IpNet>,
    /// Resolvers.
    pub dns: Vec<IpAddr>,
}

/// `[tls]` of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// The CA that signs clients.
    pub ca: Pem,
    /// The server's certificate chain.
    pub cert: Pem,
    /// Its private key.
    pub key: Pem,
    /// Revoked certificates, if there is a list.
    pub crl: Option<PathBuf>,
}

/// `clients.d/NAME.toml`: what is fixed for the client whose identity is NAME.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientEntry {
    /// Fixed inner addresses, at most one of each family, each inside one of `networks`, none twice over all
    /// clients, none the server's.
    pub addresses: Vec<IpAddr>,
    /// Subnets behind this client, routed to it; none twice over all clients, none overlapping `networks`.
    pub subnets: Vec<IpNet>,
}

/// `server.toml`, whole and valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// The file it came from, absolute.
    pub file: PathBuf,
    /// TCP and UDP; an unspecified IPv6 address means dual-stack. Default `[::]:55555`.
    pub listen: SocketAddr,
    /// TUN device; default `tg0`.
    pub device: DeviceName,
    /// Inner networks: one or two, at most one of each family, written as network addresses, not smaller than
    /// /30 or /126. The first host address of each is the server's.
    pub networks: Vec<IpNet>,
    /// Inner MTU; default 1420, 1280 to 65,000 (576 where no network is IPv6).
    pub mtu: u16,
    /// Sessions at once; default 250, 1 to 16,000.
    pub max_clients: u16,
    /// Masquerade what leaves the tunnel for other networks; default false.
    pub nat: bool,
    /// Whether clients reach each other; default false.
    pub client_to_client: bool,
    /// `[push]` or `push = { .. }`.
    pub push: Push,
    /// `[tls]`.
    pub tls: ServerTls,
    /// `[data]`.
    pub data: Data,
    /// `[data] tun_write = "direct" | "guard"`.
    pub tun_write: TunWrite,
    /// How long a session without control channel and without authenticated packets is kept; `linger`,
    /// default 10 min, at least 1 s.
    pub linger: Duration,
    /// How long a lease stays reserved after its session; `lease`, default 24 h.
    pub lease: Duration,
    /// Admin socket; `socket`, default `/run/tunguard/DEVICE.sock`.
    pub socket: PathBuf,
    /// Leases and the like; `state_dir`, default `/var/lib/tunguard`.
    pub state_dir: PathBuf,
    /// User IDs of workers, one per session: `worker_uids = [first, last]`, default 65536 to 524287, at least
    /// `max_clients` + 64 of them, never 0 or below 1,000, and never 65534 (nobody), 65535 or 4294967295.
    pub worker_uids: (u32, u32),
    /// Handshakes in progress at once; `max_handshakes`, default 64, 1 to 4,096.
    pub max_handshakes: u16,
    /// Where the clients' files are; `clients_dir`, default `clients.d` beside the file.
    pub clients_dir: PathBuf,
    /// From `clients_dir`, default `clients.d` beside the file (which may be missing): identity -> entry.
    pub clients: BTreeMap<String, ClientEntry>,
}

impl ServerConfig {
    /// Reads `path` and the clients' files. Errors name file, line and key.
    ///
    /// PEM files aren't opened here.
    pub fn load(path: &Path) -> Outcome<ServerConfig> {
        let (text, file) = reader::read(path)?;
        let mut config = ServerConfig::parse_as(&text, path, file)?;
        config.clients = config.read_clients()?;
        Ok(config)
    }

    /// Parses the text of `server.toml` as if it stood in `file`, without the clients' files.
    pub fn parse(text: &str, file: &Path) -> Outcome<ServerConfig> {
        let absolute =
            std::path::absolute(file).map_err(|e| Failure::usage(format!("{}: {e}", file.display())))?;
        ServerConfig::parse_as(text, file, absolute)
    }

    /// The server's own addresses, each with its network's prefix length, in the order of `networks`.
    pub fn server_addresses(&self) -> Vec<IpNet> {
        self.networks.iter().map(first_host).collect()
    }

    /// The IPv4 network, if there is one.
    pub fn v4(&self) -> Option<Ipv4Net> {
        self.networks.iter().find_map(|net| if let IpNet::V4(net) = net { Some(*net) } else { None })
    }

    /// The IPv6 network, if there is one.
    pub fn v6(&self) -> Option<Ipv6Net> {
        self.networks.iter().find_map(|net| if let IpNet::V6(net) = net { Some(*net) } else { None })
    }

    /// Parses `text`; messages name the file `shown`, its absolute path is `file`.
    fn parse_as(text: &str, shown: &Path, file: PathBuf) -> Outcome<ServerConfig> {
        let directory = file.parent().unwrap_or(Path::new("/")).to_owned();
        let document = Document::parse(shown, &directory, text)?;
        let config = ServerConfig::read(&document, file, &directory);
        reader::outcome(config, document.faults())
    }

    /// Asks for every key. `None` where something that has no default is missing or faulty.
    fn read(document: &Document<'_>, file: PathBuf, directory: &Path) -> Option<ServerConfig> {
        let mut root = document.root();
        let listen = root.value("listen").and_then(|v| v.word());
        let device: DeviceName = root.value("device").and_then(|v| v.word()).unwrap_or_default();
        let networks = root.required("networks", r#"a list as in ["10.9.0.0/24", "fd09::/64"]"#);
        let networks = networks.map(|v| read_networks(&v)).unwrap_or_default();
        let v6 = networks.is_empty() || networks.iter().any(|net| matches!(net, IpNet::V6(_)));
        let mtu = root.value("mtu").and_then(|v| v.integer(if v6 { 1280 } else { 576 }..=65_000));
        let max_clients = root.value("max_clients").and_then(|v| v.integer(1..=16_000)).unwrap_or(250);
        let nat = root.value("nat").and_then(|v| v.boolean());
        let client_to_client = root.value("client_to_client").and_then(|v| v.boolean());
        let linger = root.value("linger").and_then(|v| v.duration(Duration::from_secs(1)));
        let lease = root.value("lease").and_then(|v| v.duration(Duration::ZERO));
        let socket = root.value("socket").and_then(|v| read_socket(&v));
        let state_dir = root.value("state_dir").and_then(|v| v.path());
        let worker_uids = root.value("worker_uids").and_then(|v| read_worker_uids(&v, max_clients));
        let max_handshakes = root.value("max_handshakes").and_then(|v| v.integer(1..=4_096));
        let clients_dir = root.value("clients_dir").and_then(|v| v.path());

        let mut section = root.section("push");
        let push = Push {
            routes: section.value("routes").map(|v| without_place(v.words())).unwrap_or_default(),
            dns: section.value("dns").map(|v| without_place(v.words())).unwrap_or_default(),
        };
        section.end();

        let mut section = root.section("tls");
        let ca = section.required("ca", "a path or PEM text").and_then(|v| v.pem("tls.ca"));
        let cert = section.required("cert", "a path or PEM text").and_then(|v| v.pem("tls.cert"));
        let key = section.required("key", "a path or PEM text").and_then(|v| v.pem("tls.key"));
        let crl = section.value("crl").and_then(|v| v.path());
        section.end();

        let mut section = root.section("data");
        let data = Data::read(&mut section);
        let writers = [("direct", TunWrite::Direct), ("guard", TunWrite::Guard)];
        let tun_write = section.value("tun_write").and_then(|v| v.choice(&writers));
        section.end();
        root.end();

        Some(ServerConfig {
            listen: listen.unwrap_or(SocketAddr::from((Ipv6Addr::UNSPECIFIED, DEFAULT_PORT))),
            networks,
            mtu: mtu.unwrap_or(1420),
            max_clients,
            nat: nat.unwrap_or(false),
            client_to_client: client_to_client.unwrap_or(false),
            push,
            tls: ServerTls { ca: ca?, cert: cert?, key: key?, crl },
            data,
            tun_write: tun_write.unwrap_or(TunWrite::Direct),
            linger: linger.unwrap_or(Duration::from_secs(10 * 60)),
            lease: lease.unwrap_or(Duration::from_secs(24 * 60 * 60)),
            socket: socket.unwrap_or_else(|| PathBuf::from(format!("/run/tunguard/{device}.sock"))),
            state_dir: state_dir.unwrap_or_else(|| PathBuf::from("/var/lib/tunguard")),
            worker_uids: worker_uids.unwrap_or(DEFAULT_WORKER_UIDS),
            max_handshakes: max_handshakes.unwrap_or(64),
            clients_dir: clients_dir.unwrap_or_else(|| directory.join(DEFAULT_CLIENTS_DIR)),
            clients: BTreeMap::new(),
            device,
            file,
        })
    }

    /// Whether the clients' directory is the default one, which may be missing.
    pub(super) fn has_default_clients_dir(&self) -> bool {
        self.file.parent().is_some_and(|directory| self.clients_dir == directory.join(DEFAULT_CLIENTS_DIR))
    }
}

/// The first host address of the network, with the network's prefix length.
pub(super) fn first_host(net: &IpNet) -> IpNet {
    // No overflow: the network's own address is even, as it isn't smaller than /30 or /126.
    match net {
        IpNet::V4(net) => {
            let host = Ipv4Addr::from_bits(net.network().to_bits() | 1);
            IpNet::V4(Ipv4Net::new_assert(host, net.prefix_len()))
        }
        IpNet::V6(net) => {
            let host = Ipv6Addr::from_bits(net.network().to_bits() | 1);
            IpNet::V6(Ipv6Net::new_assert(host, net.prefix_len()))
        }
    }
}

/// `networks`.
fn read_networks(value: &Value<'_>) -> Vec<IpNet> {
    let mut networks: Vec<IpNet> = Vec::new();
    for (net, value) in value.some_words::<IpNet>() {
        let (family, longest) = match net {
            IpNet::V4(_) => ("IPv4", 30),
            IpNet::V6(_) => ("IPv6", 126),
        };
        if let Some(why) = reserved(&net) {
            value.fault(why);
        } else if net.prefix_len() > longest {
            value.fault(format_args!("is too small for a server and a client: at most /{longest}"));
        } else if networks.iter().any(|other| other.max_prefix_len() == net.max_prefix_len()) {
            value.fault(format_args!("is a second {family} network: one of each family at most"));
        } else {
            networks.push(net);
        }
    }
    networks
}

/// `socket`, which must fit into a socket address.
fn read_socket(value: &Value<'_>) -> Option<PathBuf> {
    let path = value.path()?;
    if path.as_os_str().len() > LONGEST_SOCKET {
        value.fault(format_args!(
            "is too long for a socket: {} is over {LONGEST_SOCKET} bytes",
            path.display()
        ));
        return None;
    }
    Some(path)
}

/// `worker_uids = [first, last]`.
fn read_worker_uids(value: &Value<'_>, max_clients: u16) -> Option<(u32, u32)> {
    let bounds = value.list("two user IDs, [first, last]")?;
    let [first, last] = &bounds[..] else {
        value.fault(format_args!("has {} elements: two are needed, [first, last]", bounds.len()));
        return None;
    };
    // The last user ID, -1, means "unchanged" to the kernel.
    let (first, last) = (first.integer(1_000..=u32::MAX - 1), last.integer(1_000..=u32::MAX - 1));
    let (first, last) = (first?, last?);
    let needed = u64::from(max_clients) + SPARE_WORKER_UIDS;
    let found = (u64::from(last) + 1).saturating_sub(first.into());
    if found < needed {
        value.fault(format_args!(
            "= [{first}, {last}] is {found} user IDs: at least {needed} are needed, max_clients + {SPARE_WORKER_UIDS}"
        ));
        return None;
    }
    if first <= 65_535 && last >= 65_534 {
        value.fault(format_args!(
            "= [{first}, {last}] holds 65534 or 65535, which stand for nobody and no user: choose others"
        ));
        return None;
    }
    Some((first, last))
}

/// The parsed words alone.
fn without_place<T>(words: Vec<(T, Value<'_>)>) -> Vec<T> {
    words.into_iter().map(|(word, _)| word).collect()
}

/// Where clients' files are unless `clients_dir` says otherwise.
const DEFAULT_CLIENTS_DIR: &str = "clients.d";
/// Above the IDs of users, services and nobody, below those that containers take.
const DEFAULT_WORKER_UIDS: (u32, u32) = (65_536, 524_287);
/// User IDs beyond `max_clients`, for workers that are starting or ending.
const SPARE_WORKER_UIDS: u64 = 64;
/// `sun_path` without the NUL.
const LONGEST_SOCKET: usize = 107;
