//! `server.toml` and `clients.d/NAME.toml`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::common::{DEFAULT_PORT, Data, DeviceName, Pem, Sandbox, parse_duration, read_socket, reserved};
use super::reader::{self, Document, Value, Word};
use crate::exit::{Failure, Outcome};
use crate::rate::{Rate, Rates};
use crate::wire::control::{IDLE_SECONDS_LEAST, MAX_RESOLVERS, MAX_ROUTES};

/// Who writes a client's packets to the TUN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunWrite {
    /// The session's worker (the default).
    Direct,
    /// The guard, after it checked the source address; the worker never holds the device.
    Guard,
}

/// What becomes of a session that would be one too many of its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTooMany {
    /// It takes the place of the oldest one (the default).
    Newest,
    /// It is refused, unless the client of another one isn't there any more.
    Refuse,
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
    /// `[limits] rate_down` where the file has it, "off" being no limit.
    pub rate_down: Option<Option<Rate>>,
    /// `[limits] rate_up`, the same.
    pub rate_up: Option<Option<Rate>>,
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
    /// Sessions at once of one identity; default 1, 1 to 100. See [`ServerConfig::sessions_of`].
    pub max_sessions_per_identity: u16,
    /// What becomes of one more; default "newest".
    pub on_too_many: OnTooMany,
    /// `[limits] rate_down` and `rate_up`: each client's, but for those with their own; default none. See
    /// [`ServerConfig::rates_of`].
    pub limits: Rates,
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
    /// `[sandbox]`.
    pub sandbox: Sandbox,
    /// How long a session without control channel and without authenticated packets is kept; `linger`,
    /// default 10 min, at least 1 s.
    pub linger: Duration,
    /// How long a session may carry nothing whose client comes and goes by itself; `idle`, "off" (the default) or at
    /// least 10 s.
    pub idle: Option<Duration>,
    /// How long a lease stays reserved after its session; `lease`, default 24 h.
    pub lease: Duration,
    /// Admin socket; `socket`, default `/run/tunguard/DEVICE.sock`.
    pub socket: PathBuf,
    /// Leases and the like; `state_dir`, default `/var/lib/tunguard`.
    pub state_dir: PathBuf,
    /// User IDs of workers, one each, the last one the key holder's: `worker_uids = [first, last]`, default 65536 to
    /// 99999, at least `max_clients` + a quarter of it, rounded up, + `max_handshakes` + 2 of them, never 0 or below
    /// 1,000, and never 65534 (nobody), 65535 or 4294967295.
    pub worker_uids: (u32, u32),
    /// One user ID for all workers, in place of `worker_uids`: `[sandbox] single_uid`, "off" (the default) or a number,
    /// never 0, 65534 (nobody), 65535 or 4294967295.
    pub single_uid: Option<u32>,
    /// Handshakes in progress at once; `max_handshakes`, default 64, 1 to 4,096.
    pub max_handshakes: u16,
    /// Of these, from one source, an IPv4 address or an IPv6 /64; `max_handshakes_per_source`, default 8, 1 to
    /// `max_handshakes`.
    pub max_handshakes_per_source: u16,
    /// How long at most a source is refused for failed handshakes; `penalty`, "off" or at least 1 s, default 10 min.
    pub penalty: Option<Duration>,
    /// Sources that are never refused nor limited for what they did: `exempt_sources`, default none.
    pub exempt_sources: Vec<IpNet>,
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

    /// Sessions at once that this identity may have: those with something fixed have one, as two can't have that.
    pub fn sessions_of(&self, name: &str) -> u16 {
        let fixed = |entry: &ClientEntry| !entry.addresses.is_empty() || !entry.subnets.is_empty();
        if self.clients.get(name).is_some_and(fixed) { 1 } else { self.max_sessions_per_identity }
    }

    /// What this identity may send and be sent.
    pub fn rates_of(&self, name: &str) -> Rates {
        let entry = self.clients.get(name);
        Rates {
            down: entry.and_then(|e| e.rate_down).unwrap_or(self.limits.down),
            up: entry.and_then(|e| e.rate_up).unwrap_or(self.limits.up),
        }
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
        let networks = root.required("networks", r#"a list, as in ["10.9.0.0/24", "fd09::/64"]"#);
        let networks = networks.map(|v| read_networks(&v)).unwrap_or_default();
        let v6 = networks.is_empty() || networks.iter().any(|net| matches!(net, IpNet::V6(_)));
        let mtu = root.value("mtu").and_then(|v| v.integer(if v6 { 1280 } else { 576 }..=65_000));
        let max_clients = root.value("max_clients").and_then(|v| v.integer(1..=16_000)).unwrap_or(250);
        let max_sessions = root.value("max_sessions_per_identity").and_then(|v| v.integer(1..=100));
        let policies = [("newest", OnTooMany::Newest), ("refuse", OnTooMany::Refuse)];
        let on_too_many = root.value("on_too_many").and_then(|v| v.choice(&policies));
        let nat = root.value("nat").and_then(|v| v.boolean());
        let client_to_client = root.value("client_to_client").and_then(|v| v.boolean());
        let linger = root.value("linger").and_then(|v| v.duration(Duration::from_secs(1)));
        let idle = root.value("idle").and_then(|v| read_idle(&v));
        let lease = root.value("lease").and_then(|v| v.duration(Duration::ZERO));
        let socket = root.value("socket").and_then(|v| read_socket(&v));
        let state_dir = root.value("state_dir").and_then(|v| v.path());
        let max_handshakes = root.value("max_handshakes").and_then(|v| v.integer(1..=4_096)).unwrap_or(64);
        let worker_uids =
            root.value("worker_uids").and_then(|v| read_worker_uids(&v, max_clients, max_handshakes));
        let per_source = root.value("max_handshakes_per_source").and_then(|v| v.integer(1..=max_handshakes));
        let penalty = root.value("penalty").and_then(|v| read_penalty(&v));
        let exempt_sources =
            root.value("exempt_sources").map(|v| without_place(v.words())).unwrap_or_default();
        let clients_dir = root.value("clients_dir").and_then(|v| v.path());

        let mut section = root.section("push");
        let push = Push {
            routes: section.value("routes").map(|v| read_pushed(&v, MAX_ROUTES)).unwrap_or_default(),
            dns: section.value("dns").map(|v| read_pushed(&v, MAX_RESOLVERS)).unwrap_or_default(),
        };
        section.end();

        let mut section = root.section("limits");
        let limits = Rates {
            down: section.value("rate_down").and_then(|v| v.word()).flatten(),
            up: section.value("rate_up").and_then(|v| v.word()).flatten(),
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
        let mut section = root.section("sandbox");
        let sandbox = Sandbox::read(&mut section);
        let single_uid = section.value("single_uid").and_then(|v| read_single_uid(&v));
        section.end();
        root.end();

        Some(ServerConfig {
            listen: listen.unwrap_or(SocketAddr::from((Ipv6Addr::UNSPECIFIED, DEFAULT_PORT))),
            networks,
            mtu: mtu.unwrap_or(1420),
            max_clients,
            max_sessions_per_identity: max_sessions.unwrap_or(1),
            on_too_many: on_too_many.unwrap_or(OnTooMany::Newest),
            limits,
            nat: nat.unwrap_or(false),
            client_to_client: client_to_client.unwrap_or(false),
            push,
            tls: ServerTls { ca: ca?, cert: cert?, key: key?, crl },
            data,
            tun_write: tun_write.unwrap_or(TunWrite::Direct),
            sandbox,
            linger: linger.unwrap_or(Duration::from_secs(10 * 60)),
            idle: idle.flatten(),
            lease: lease.unwrap_or(Duration::from_secs(24 * 60 * 60)),
            socket: socket.unwrap_or_else(|| PathBuf::from(format!("/run/tunguard/{device}.sock"))),
            state_dir: state_dir.unwrap_or_else(|| PathBuf::from("/var/lib/tunguard")),
            worker_uids: worker_uids.unwrap_or(DEFAULT_WORKER_UIDS),
            single_uid: single_uid.flatten(),
            max_handshakes,
            max_handshakes_per_source: per_source.unwrap_or(HANDSHAKES_PER_SOURCE.min(max_handshakes)),
            penalty: penalty.unwrap_or(Some(PENALTY)),
            exempt_sources,
            clients_dir: clients_dir.unwrap_or_else(|| directory.join(DEFAULT_CLIENTS_DIR)),
            clients: BTreeMap::new(),
            device,
            file,
        })
    }

    /// Workers at once: every client's, those of clients whose older session drains (a quarter of them and one: it takes
    /// seconds, and few are taken over at once), and those that have no session yet.
    pub fn workers_at_once(max_clients: u16, max_handshakes: u16) -> u64 {
        let clients = u64::from(max_clients);
        clients + clients.div_ceil(4) + 1 + u64::from(max_handshakes)
    }

    /// How many user IDs are needed for [`ServerConfig::workers_at_once`] and the key holder.
    pub fn worker_uids_needed(max_clients: u16, max_handshakes: u16) -> u64 {
        ServerConfig::workers_at_once(max_clients, max_handshakes) + 1
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

/// `idle`: a duration, or none.
fn read_idle(value: &Value<'_>) -> Option<Option<Duration>> {
    read_limit(value, IDLE_LEAST)
}

/// `penalty`: a duration, or none.
fn read_penalty(value: &Value<'_>) -> Option<Option<Duration>> {
    read_limit(value, Duration::from_secs(1))
}

/// A duration, or "off".
fn read_limit(value: &Value<'_>, least: Duration) -> Option<Option<Duration>> {
    let why = match value.text(LIMIT_WANTED)? {
        "off" => return Some(None),
        text => match parse_duration(text) {
            Ok(limit) if limit >= least => return Some(Some(limit)),
            Ok(_) => format!("is too short: at least {}s, or \"off\"", least.as_secs()),
            Err(_) => format!("is not accepted: {LIMIT_WANTED}"),
        },
    };
    value.fault(why);
    None
}

/// `worker_uids = [first, last]`.
fn read_worker_uids(value: &Value<'_>, max_clients: u16, max_handshakes: u16) -> Option<(u32, u32)> {
    let bounds = value.list("two user IDs, [first, last]")?;
    let [first, last] = &bounds[..] else {
        value
            .fault(format_args!("is a list of {}, but two user IDs are needed, [first, last]", bounds.len()));
        return None;
    };
    // The last user ID, -1, means "unchanged" to the kernel.
    let (first, last) = (first.integer(1_000..=u32::MAX - 1), last.integer(1_000..=u32::MAX - 1));
    let (first, last) = (first?, last?);
    let needed = ServerConfig::worker_uids_needed(max_clients, max_handshakes);
    let found = (u64::from(last) + 1).saturating_sub(first.into());
    if found < needed {
        value.fault(format_args!(
            "= [{first}, {last}] is {found} user IDs: at least {needed} are needed, max_clients = {max_clients}, {} \
             for older sessions that drain, max_handshakes = {max_handshakes}, and 1 for the key holder",
            needed - u64::from(max_clients) - u64::from(max_handshakes) - 1
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

/// `sandbox.single_uid`: a user ID, or none.
fn read_single_uid(value: &Value<'_>) -> Option<Option<u32>> {
    if value.is_text() {
        return match value.text(SINGLE_UID_WANTED)? {
            "off" => Some(None),
            _ => {
                value.fault(format_args!("is not accepted: {SINGLE_UID_WANTED}"));
                None
            }
        };
    }
    let uid = value.integer(1..=u32::MAX - 1)?;
    if matches!(uid, 65_534 | 65_535) {
        value.fault("stands for nobody or for no user: choose another");
        return None;
    }
    Some(Some(uid))
}

/// A list that is sent to clients, so not longer than they take.
fn read_pushed<T: Word + PartialEq>(value: &Value<'_>, most: usize) -> Vec<T> {
    let words = without_place(value.words());
    if words.len() > most {
        value.fault(format_args!("has {} elements: a client takes at most {most}", words.len()));
    }
    words
}

/// The parsed words alone.
fn without_place<T>(words: Vec<(T, Value<'_>)>) -> Vec<T> {
    words.into_iter().map(|(word, _)| word).collect()
}

/// Where clients' files are unless `clients_dir` says otherwise.
const DEFAULT_CLIENTS_DIR: &str = "clients.d";
/// Above the IDs of users, services and nobody, below those that /etc/subuid gives users for their containers.
const DEFAULT_WORKER_UIDS: (u32, u32) = (65_536, 99_999);
/// What `sandbox.single_uid` may be.
const SINGLE_UID_WANTED: &str = r#""off", or a user ID other than 0"#;
/// Handshakes at once from one source, unless `max_handshakes` allows fewer at all.
const HANDSHAKES_PER_SOURCE: u16 = 8;
/// The longest refusal of a source.
const PENALTY: Duration = Duration::from_secs(10 * 60);
/// What `idle` and `penalty` may be.
const LIMIT_WANTED: &str = r#""off", or a duration, as in "10m""#;
/// A shorter limit would end sessions that wait for an answer.
const IDLE_LEAST: Duration = Duration::from_secs(IDLE_SECONDS_LEAST as u64);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::common::{Landlock, Suite};
    use crate::config::uncommented;
    use crate::exit::Exit;
    use proptest::prelude::*;

    const EXAMPLE: &str = include_str!("../../packaging/server.example.toml");
    /// The least there can be: 1 line of `networks`, then `[tls]` in lines 2 to 5.
    const LEAST: &str =
        "networks = ['10.9.0.0/24', 'fd09::/64']\n[tls]\nca = 'ca'\ncert = 'cert'\nkey = 'key'\n";
    const TLS: &str = "\n[tls]\nca = 'ca'\ncert = 'cert'\nkey = 'key'\n";

    fn parse(text: &str) -> Outcome<ServerConfig> {
        ServerConfig::parse(text, Path::new("/etc/tunguard/server.toml"))
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect(text)
    }

    #[test]
    fn defaults() {
        let file = |name| Pem::File(PathBuf::from("/etc/tunguard").join(name));
        let expected = ServerConfig {
            file: "/etc/tunguard/server.toml".into(),
            listen: "[::]:55555".parse().expect("an address"),
            device: "tg0".parse().expect("a name"),
            networks: vec![net("10.9.0.0/24"), net("fd09::/64")],
            mtu: 1420,
            max_clients: 250,
            max_sessions_per_identity: 1,
            on_too_many: OnTooMany::Newest,
            limits: Rates::default(),
            nat: false,
            client_to_client: false,
            push: Push { routes: vec![], dns: vec![] },
            tls: ServerTls { ca: file("ca"), cert: file("cert"), key: file("key"), crl: None },
            data: Data {
                suites: Suite::ALL.to_vec(),
                rekey: Duration::from_secs(900),
                rekey_packets: 1_073_741_824,
            },
            tun_write: TunWrite::Direct,
            sandbox: Sandbox::default(),
            linger: Duration::from_secs(600),
            idle: None,
            lease: Duration::from_secs(86_400),
            socket: "/run/tunguard/tg0.sock".into(),
            state_dir: "/var/lib/tunguard".into(),
            worker_uids: (65_536, 99_999),
            single_uid: None,
            max_handshakes: 64,
            max_handshakes_per_source: 8,
            penalty: Some(Duration::from_secs(600)),
            exempt_sources: vec![],
            clients_dir: "/etc/tunguard/clients.d".into(),
            clients: BTreeMap::new(),
        };
        assert_eq!(parse(LEAST), Ok(expected));
    }

    #[test]
    fn everything_set() {
        let text = r#"
            listen = "192.0.2.1:443"
            device = "vpn"
            networks = ["fd09:1::/126", "10.0.0.0/8"]
            mtu = 65_000
            max_clients = 16000
            max_sessions_per_identity = 100
            on_too_many = "refuse"
            nat = true
            client_to_client = true
            linger = "1s"
            idle = "10s"
            lease = "0s"
            socket = "run/admin.sock"
            state_dir = "../state"
            worker_uids = [100_000, 124_097]
            max_handshakes = 0x1000
            max_handshakes_per_source = 4096
            penalty = "off"
            exempt_sources = ["192.0.2.0/24", "2001:db8::/32"]
            clients_dir = "/srv/clients"
            push.routes = ["0.0.0.0/0", "::/0"]
            push.dns = ["10.0.0.1", "fd09:1::1"]
            limits.rate_down = "20Mbit/s"
            limits.rate_up = "64Kbit/s"
            [tls]
            ca = """
            -----BEGIN CERTIFICATE-----
            """
            cert = "/srv/cert.pem"
            key = "key.pem"
            crl = "crl.pem"
            [data]
            suites = ["chacha20-poly1305"]
            rekey = "1s"
            rekey_packets = 1_000
            tun_write = "guard"
            [sandbox]
            single_uid = 900
            landlock = "off"
        "#;
        let config = parse(text).expect("valid");
        assert_eq!(config.listen.to_string(), "192.0.2.1:443");
        assert_eq!(config.device.as_str(), "vpn");
        assert_eq!(config.networks, [net("fd09:1::/126"), net("10.0.0.0/8")]);
        assert_eq!((config.mtu, config.max_clients, config.max_handshakes), (65_000, 16_000, 4_096));
        assert_eq!((config.max_sessions_per_identity, config.on_too_many), (100, OnTooMany::Refuse));
        let rates = config.limits;
        assert_eq!((rates.down, rates.up), (Rate::from_bits(20_000_000), Rate::from_bits(64_000)));
        assert_eq!((config.max_handshakes_per_source, config.penalty), (4_096, None));
        assert_eq!(config.exempt_sources, [net("192.0.2.0/24"), net("2001:db8::/32")]);
        assert!(config.nat && config.client_to_client);
        assert_eq!(config.single_uid, Some(900));
        assert_eq!((config.linger, config.lease), (Duration::from_secs(1), Duration::ZERO));
        assert_eq!(config.idle, Some(Duration::from_secs(10)));
        assert_eq!(config.socket, Path::new("/etc/tunguard/run/admin.sock"));
        assert_eq!(config.state_dir, Path::new("/etc/tunguard/../state"));
        assert_eq!(config.worker_uids, (100_000, 124_097));
        assert_eq!(config.clients_dir, Path::new("/srv/clients"));
        assert_eq!(config.push.routes, [net("0.0.0.0/0"), net("::/0")]);
        assert_eq!(config.push.dns.len(), 2);
        let inline = "-----BEGIN CERTIFICATE-----\n            ".to_owned();
        assert_eq!(config.tls.ca, Pem::Inline { key: "tls.ca", text: inline });
        assert_eq!(config.tls.cert, Pem::File("/srv/cert.pem".into()));
        assert_eq!(config.tls.crl, Some("/etc/tunguard/crl.pem".into()));
        assert_eq!(config.data.suites, [Suite::ChaCha20Poly1305]);
        assert_eq!((config.data.rekey, config.data.rekey_packets), (Duration::from_secs(1), 1_000));
        assert_eq!(config.tun_write, TunWrite::Guard);
        assert_eq!(config.sandbox.landlock, Landlock::Off);
        assert_eq!(config.server_addresses(), [net("fd09:1::1/126"), net("10.0.0.1/8")]);
        assert_eq!(config.v4(), Some("10.0.0.0/8".parse().expect("a network")));
        assert_eq!(config.v6(), Some("fd09:1::/126".parse().expect("a network")));
    }

    #[test]
    fn the_default_user_ids_suffice_for_any_number_of_clients() {
        let (first, last) = DEFAULT_WORKER_UIDS;
        assert_eq!(ServerConfig::worker_uids_needed(16_000, 4_096), 16_000 + 4_000 + 1 + 4_096 + 1);
        assert!(u64::from(last - first) + 1 >= ServerConfig::worker_uids_needed(16_000, 4_096));
    }

    #[test]
    fn accepted() {
        for line in [
            "mtu = 1280",
            "max_clients = 1",
            "max_sessions_per_identity = 1",
            "on_too_many = 'newest'",
            "limits = { rate_down = 'off' }",
            "max_handshakes = 1",
            "push = {}",
            "push = { routes = [], dns = [] }",
            "push = { routes = ['10.0.0.0/8', '10.1.0.0/16'] }",
            "worker_uids = [1000, 1378]",
            "worker_uids = [1000, 1364]\nmax_handshakes = 50",
            "worker_uids = [1000, 1005]\nmax_clients = 2\nmax_handshakes = 1",
            "worker_uids = [65536, 4294967294]",
            "worker_uids = [1000, 65533]",
            "data.rekey_packets = 1_099_511_627_776",
            "data.suites = ['aes-256-ctr-hmac-sha256', 'aes-256-gcm']",
            "lease = '365d'",
        ] {
            assert_eq!(parse(&format!("{line}\n{LEAST}")).map(|_| ()), Ok(()), "{line}");
        }
        for networks in ["['10.9.0.0/30']", "['10.9.0.0/24']"] {
            let config = parse(&format!("networks = {networks}\nmtu = 576{TLS}")).expect(networks);
            assert_eq!((config.mtu, config.v6()), (576, None));
        }
        assert_eq!(parse(&format!("\u{feff}{LEAST}")).map(|_| ()), Ok(()), "byte order mark");
        assert_eq!(parse(&LEAST.replace('\n', "\r\n")).map(|_| ()), Ok(()), "CR LF");
    }

    #[test]
    fn rejected() {
        let units = r#"numbers with the units d, h, m, s or ms, the largest first, as in "1h30m""#;
        let long = "d".repeat(200);
        for (line, sentence) in [
            ("netwroks = 1", r#"unknown key "netwroks" (did you mean "networks"?)"#),
            ("ca = 'ca'", r#"unknown key "ca" (did you mean "tls.ca"?)"#),
            ("push.rotues = []", r#"unknown key "push.rotues" (did you mean "push.routes"?)"#),
            (
                "push.dns = ['10.0.0.1', '10.0.0.2', '10.0.0.3', '10.0.0.4', '10.0.0.5', '10.0.0.6', '10.0.0.7', \
                 '10.0.0.8', '10.0.0.9']",
                "push.dns has 9 elements: a client takes at most 8",
            ),
            ("push.x = 1", r#"unknown key "push.x" (known here: routes, dns)"#),
            ("data.mtu = 1280", r#"unknown key "data.mtu" ("mtu" belongs before the first [section])"#),
            ("push = 5", "push = 5 is an integer, not a section"),
            ("data = []", "data is a list, not a section"),
            (
                "listen = 5",
                r#"listen = 5 is an integer, not ADDRESS:PORT, as in "[::]:55555" or "0.0.0.0:55555""#,
            ),
            (
                "listen = '0.0.0.0'",
                r#"listen = "0.0.0.0" is not ADDRESS:PORT, as in "[::]:55555" or "0.0.0.0:55555""#,
            ),
            ("listen = '[::]:0'", r#"listen = "[::]:0" has port 0: 1 to 65535"#),
            (
                "device = 'tg 0'",
                r#"device = "tg 0" is no device name: 1 to 15 letters, digits, '-', '_' or '.'"#,
            ),
            ("device = true", r#"device = true is a boolean, not a device name, as in "tg0""#),
            ("mtu = 70000", "mtu = 70000 is out of range: 1280 to 65000"),
            ("mtu = 1279", "mtu = 1279 is out of range: 1280 to 65000"),
            ("mtu = -1", "mtu = -1 is out of range: 1280 to 65000"),
            (
                "mtu = 0x1_0000_0000_0000_0000_0000_0000_0000_0000_0000",
                "mtu = 0x1000000000000000000000000000000000000 is out of range: 1280 to 65000",
            ),
            ("mtu = '1420'", r#"mtu = "1420" is a string, not an integer, 1280 to 65000"#),
            ("mtu = 1420.0", "mtu = 1420.0 is a number with a fraction, not an integer, 1280 to 65000"),
            ("mtu = 2025-01-01", "mtu = 2025-01-01 is a date or time, not an integer, 1280 to 65000"),
            ("max_clients = 0", "max_clients = 0 is out of range: 1 to 16000"),
            ("max_clients = 16001", "max_clients = 16001 is out of range: 1 to 16000"),
            ("max_sessions_per_identity = 0", "max_sessions_per_identity = 0 is out of range: 1 to 100"),
            ("max_sessions_per_identity = 101", "max_sessions_per_identity = 101 is out of range: 1 to 100"),
            ("on_too_many = 'oldest'", r#"on_too_many = "oldest" is not accepted: "newest" or "refuse""#),
            (
                "limits.rate_down = 20",
                r#"limits.rate_down = 20 is an integer, not "off", or a rate, as in "20Mbit/s" or "500Kbit/s""#,
            ),
            (
                "limits.rate_up = '20M'",
                r#"limits.rate_up = "20M" is no rate: a whole number with bit/s, Kbit/s, Mbit/s or Gbit/s, as in "20Mbit/s", or "off""#,
            ),
            (
                "limits.rate_up = '1Kbit/s'",
                r#"limits.rate_up = "1Kbit/s" is out of range: 64Kbit/s to 100Gbit/s, or "off""#,
            ),
            ("limits.rate = 'off'", r#"unknown key "limits.rate" (known here: rate_down, rate_up)"#),
            ("max_handshakes = 0", "max_handshakes = 0 is out of range: 1 to 4096"),
            ("max_handshakes = 4097", "max_handshakes = 4097 is out of range: 1 to 4096"),
            ("max_handshakes_per_source = 65", "max_handshakes_per_source = 65 is out of range: 1 to 64"),
            ("max_handshakes_per_source = 0", "max_handshakes_per_source = 0 is out of range: 1 to 64"),
            ("penalty = '999ms'", r#"penalty = "999ms" is too short: at least 1s, or "off""#),
            (
                "exempt_sources = ['10.0.0.1/8']",
                r#"exempt_sources[0] = "10.0.0.1/8" has host bits set: "10.0.0.0/8" was probably meant"#,
            ),
            ("nat = 'yes'", r#"nat = "yes" is a string, not true or false"#),
            ("client_to_client = 1", "client_to_client = 1 is an integer, not true or false"),
            (
                "push.routes = '::/0'",
                r#"push.routes = "::/0" is a string, not a list of strings, each a network, as in "10.9.0.0/24" or "fd09::/64""#,
            ),
            (
                "push.routes = ['::/0', '10.0.0.1/8']",
                r#"push.routes[1] = "10.0.0.1/8" has host bits set: "10.0.0.0/8" was probably meant"#,
            ),
            (
                "push.routes = ['::/0', '0::/0']",
                r#"push.routes[1] = "0::/0" is already in the list: push.routes[0]"#,
            ),
            (
                "push.dns = [1]",
                r#"push.dns[0] = 1 is an integer, not an IP address, as in "10.9.0.1" or "fd09::1""#,
            ),
            (
                "push.dns = ['dns']",
                r#"push.dns[0] = "dns" is not an IP address, as in "10.9.0.1" or "fd09::1""#,
            ),
            ("linger = '999ms'", r#"linger = "999ms" is too short: at least 1s"#),
            ("idle = '9s'", r#"idle = "9s" is too short: at least 10s, or "off""#),
            ("idle = 'never'", r#"idle = "never" is not accepted: "off", or a duration, as in "10m""#),
            (
                "linger = 10",
                r#"linger = 10 is an integer, not a duration, as in "15m", "90s", "1h30m" or "500ms""#,
            ),
            ("lease = '1 day'", &format!(r#"lease = "1 day" is no duration: {units}"#)),
            ("lease = '24'", &format!(r#"lease = "24" has no unit: {units}"#)),
            ("lease = '366d'", r#"lease = "366d" is too long: at most 365d"#),
            ("socket = ''", r#"socket = "" is no path: 1 to 4095 bytes without control characters"#),
            (
                &format!("socket = '{long}'"),
                &format!(
                    r#"socket = "{}..." is too long for a socket: /etc/tunguard/{long} is over 107 bytes"#,
                    &long[..80]
                ),
            ),
            (
                r#"state_dir = "a\u0000b""#,
                r#"state_dir = "a\0b" is no path: 1 to 4095 bytes without control characters"#,
            ),
            ("clients_dir = ['a']", "clients_dir is a list, not a path"),
            (
                "worker_uids = 1000",
                "worker_uids = 1000 is an integer, not a list of two user IDs, [first, last]",
            ),
            (
                "worker_uids = [1000]",
                "worker_uids is a list of 1, but two user IDs are needed, [first, last]",
            ),
            ("worker_uids = [999, 9999]", "worker_uids[0] = 999 is out of range: 1000 to 4294967294"),
            (
                "worker_uids = [1000, 4294967295]",
                "worker_uids[1] = 4294967295 is out of range: 1000 to 4294967294",
            ),
            (
                "worker_uids = [1000, 1377]",
                "worker_uids = [1000, 1377] is 378 user IDs: at least 379 are needed, max_clients = 250, 64 for older \
                 sessions that drain, max_handshakes = 64, and 1 for the key holder",
            ),
            (
                "worker_uids = [1000, 1378]\nmax_handshakes = 4096",
                "worker_uids = [1000, 1378] is 379 user IDs: at least 4411 are needed, max_clients = 250, 64 for older \
                 sessions that drain, max_handshakes = 4096, and 1 for the key holder",
            ),
            (
                "worker_uids = [1000, 1003]\nmax_clients = 2\nmax_handshakes = 1",
                "worker_uids = [1000, 1003] is 4 user IDs: at least 6 are needed, max_clients = 2, 2 for older \
                 sessions that drain, max_handshakes = 1, and 1 for the key holder",
            ),
            (
                "worker_uids = [2000, 1000]",
                "worker_uids = [2000, 1000] is 0 user IDs: at least 379 are needed, max_clients = 250, 64 for older \
                 sessions that drain, max_handshakes = 64, and 1 for the key holder",
            ),
            (
                "worker_uids = [60000, 65534]",
                "worker_uids = [60000, 65534] holds 65534 or 65535, which stand for nobody and no user: choose others",
            ),
            (
                "worker_uids = [65535, 70000]",
                "worker_uids = [65535, 70000] holds 65534 or 65535, which stand for nobody and no user: choose others",
            ),
            (
                "data.suites = []",
                r#"data.suites is empty: at least one is needed, "aes-256-gcm", "chacha20-poly1305" or "aes-256-ctr-hmac-sha256""#,
            ),
            (
                "data.suites = ['aes']",
                r#"data.suites[0] = "aes" is no suite: "aes-256-gcm", "chacha20-poly1305" or "aes-256-ctr-hmac-sha256""#,
            ),
            (
                "data.suites = ['aes-256-gcm', 'aes-256-gcm']",
                r#"data.suites[1] = "aes-256-gcm" is already in the list: data.suites[0]"#,
            ),
            ("data.rekey = '0s'", r#"data.rekey = "0s" is too short: at least 1s"#),
            (
                "sandbox.single_uid = 'on'",
                r#"sandbox.single_uid = "on" is not accepted: "off", or a user ID other than 0"#,
            ),
            ("sandbox.single_uid = 0", "sandbox.single_uid = 0 is out of range: 1 to 4294967294"),
            (
                "sandbox.single_uid = 65534",
                "sandbox.single_uid = 65534 stands for nobody or for no user: choose another",
            ),
            ("data.rekey_packets = 999", "data.rekey_packets = 999 is out of range: 1000 to 1099511627776"),
            (
                "data.rekey_packets = 1099511627777",
                "data.rekey_packets = 1099511627777 is out of range: 1000 to 1099511627776",
            ),
            (
                "data.tun_write = 'worker'",
                r#"data.tun_write = "worker" is not accepted: "direct" or "guard""#,
            ),
            (
                "sandbox.landlock = 'optional'",
                r#"sandbox.landlock = "optional" is not accepted: "required" or "off""#,
            ),
        ] {
            let failure = parse(&format!("#\n{line}\n{LEAST}")).expect_err(line);
            assert_eq!(failure.text, format!("/etc/tunguard/server.toml:2: {sentence}"));
            assert_eq!(failure.exit, Exit::Usage);
        }
    }

    #[test]
    fn networks_rejected() {
        let wanted = r#"a network, as in "10.9.0.0/24" or "fd09::/64""#;
        for (networks, sentence) in [
            ("[]", &*format!("networks is empty: at least one is needed, {wanted}")),
            (
                "'10.9.0.0/24'",
                &format!(r#"networks = "10.9.0.0/24" is a string, not a list of strings, each {wanted}"#),
            ),
            (
                "['10.9.0.0']",
                r#"networks[0] = "10.9.0.0" has no prefix length: for this one host it is "10.9.0.0/32""#,
            ),
            (
                "['10.9.0.1/24']",
                r#"networks[0] = "10.9.0.1/24" has host bits set: "10.9.0.0/24" was probably meant"#,
            ),
            (
                "['10.9.0.0/31']",
                r#"networks[0] = "10.9.0.0/31" is too small for a server and a client: at most /30"#,
            ),
            (
                "['fd09::/127']",
                r#"networks[0] = "fd09::/127" is too small for a server and a client: at most /126"#,
            ),
            (
                "['10.9.0.0/24', '10.10.0.0/24']",
                r#"networks[1] = "10.10.0.0/24" is a second IPv4 network: one of each family at most"#,
            ),
            (
                "['fd09::/64', 'fd0a::/64']",
                r#"networks[1] = "fd0a::/64" is a second IPv6 network: one of each family at most"#,
            ),
            (
                "['10.9.0.0/24', '10.9.0.0/24']",
                r#"networks[1] = "10.9.0.0/24" is already in the list: networks[0]"#,
            ),
            ("['0.0.0.0/0']", r#"networks[0] = "0.0.0.0/0" overlaps 0.0.0.0/8, which means "this network""#),
            (
                "['127.9.0.0/16']",
                r#"networks[0] = "127.9.0.0/16" overlaps 127.0.0.0/8, the loopback addresses"#,
            ),
            (
                "['239.0.0.0/24']",
                r#"networks[0] = "239.0.0.0/24" overlaps 224.0.0.0/3, multicast and reserved addresses"#,
            ),
            (
                "['::/64']",
                r#"networks[0] = "::/64" overlaps ::/8, the loopback and other reserved addresses"#,
            ),
            ("['fe80::/64']", r#"networks[0] = "fe80::/64" overlaps fe80::/10, the link-local addresses"#),
            ("['ff00::/8']", r#"networks[0] = "ff00::/8" overlaps ff00::/8, the multicast addresses"#),
        ] {
            let failure = parse(&format!("networks = {networks}{TLS}")).expect_err(networks);
            assert_eq!(failure.text, format!("/etc/tunguard/server.toml:1: {sentence}"));
        }
        let failure = parse(&format!("networks = ['10.9.0.0/24']\nmtu = 575{TLS}")).expect_err("MTU");
        assert_eq!(failure.text, "/etc/tunguard/server.toml:2: mtu = 575 is out of range: 576 to 65000");
    }

    #[test]
    fn tls_rejected() {
        for (line, sentence) in [
            ("ca = ''", r#"tls.ca = "" is no path: 1 to 4095 bytes without control characters"#),
            ("ca = 1", "tls.ca = 1 is an integer, not a path or PEM text"),
            (
                "ca = \"----BEGIN\\nMII\"",
                "tls.ca = (several lines) is neither a path nor PEM text, which starts with -----BEGIN",
            ),
            ("ca = 'ca'\ncrl = '-----BEGIN X509 CRL-----'", "tls.crl = (PEM text) must be a path"),
            ("ca = 'ca'\ncrt = 'ca'", r#"unknown key "tls.crt" (did you mean "tls.cert"?)"#),
            ("ca = 'ca'\nmtu = 1280", r#"unknown key "tls.mtu" ("mtu" belongs before the first [section])"#),
        ] {
            let failure = parse(&LEAST.replace("ca = 'ca'", line)).expect_err(line);
            let at = if line.contains("'ca'\n") { 4 } else { 3 };
            assert_eq!(failure.text, format!("/etc/tunguard/server.toml:{at}: {sentence}"));
        }
    }

    #[test]
    fn missing_keys_are_all_named() {
        let file = "/etc/tunguard/server.toml";
        let networks =
            format!(r#"{file}: networks is missing: give a list, as in ["10.9.0.0/24", "fd09::/64"]"#);
        let tls = |key| format!("{file}: tls.{key} is missing: give a path or PEM text");
        let failure = parse("").expect_err("nothing");
        assert_eq!(failure.text, [networks.clone(), tls("ca"), tls("cert"), tls("key")].join("\n"));
        let failure = parse("tls = 1").expect_err("no section");
        let not_a_section = format!("{file}:1: tls = 1 is an integer, not a section");
        assert_eq!(failure.text, [not_a_section, networks].join("\n"));
    }

    #[test]
    fn faults_are_reported_together() {
        let failure = parse(&format!("mtu = 1\nnatt = true\n{LEAST}")).expect_err("two faults");
        let faults = [
            "/etc/tunguard/server.toml:1: mtu = 1 is out of range: 1280 to 65000",
            r#"/etc/tunguard/server.toml:2: unknown key "natt" (did you mean "nat"?)"#,
        ];
        assert_eq!(failure.text, faults.join("\n"));
    }

    #[test]
    fn server_addresses_are_the_first_hosts() {
        for (network, host) in [
            ("10.9.0.0/24", "10.9.0.1/24"),
            ("10.9.0.252/30", "10.9.0.253/30"),
            ("fd09::/64", "fd09::1/64"),
            ("fd09::fffc/126", "fd09::fffd/126"),
        ] {
            let config = parse(&format!("networks = ['{network}']{TLS}")).expect(network);
            assert_eq!(config.server_addresses(), [net(host)]);
        }
    }

    #[test]
    fn load_resolves_paths_and_reads_clients() {
        let directory = tempfile::tempdir().expect("a directory");
        let real = directory.path().canonicalize().expect("a path");
        let path = directory.path().join("server.toml");
        let missing = ServerConfig::load(&path).expect_err("no file");
        assert_eq!(missing.text, format!("{}: No such file or directory (os error 2)", path.display()));
        assert_eq!(missing.exit, Exit::Usage);

        std::fs::write(&path, LEAST).expect("a file");
        let config = ServerConfig::load(&directory.path().join("./server.toml")).expect("no clients.d");
        assert_eq!(config.file, real.join("server.toml"));
        assert_eq!(config.tls.ca, Pem::File(real.join("ca")));
        assert!(config.clients.is_empty());

        let clients = real.join("clients.d");
        std::fs::create_dir(&clients).expect("a directory");
        std::fs::create_dir(clients.join("directory.toml")).expect("a directory");
        for name in [".hidden.toml", "README", "alice.toml.bak"] {
            std::fs::write(clients.join(name), "not TOML").expect("a file");
        }
        std::fs::write(clients.join("alice.toml"), "addresses = ['10.9.0.5']").expect("a file");
        std::os::unix::fs::symlink("alice.toml", clients.join("bob@example.org.toml")).expect("a link");
        let failure = ServerConfig::load(&path).expect_err("one address for two");
        let clash = format!(
            r#"{0}/bob@example.org.toml:1: addresses[0] = "10.9.0.5" is already another client's: {0}/alice.toml:1"#,
            clients.display()
        );
        assert_eq!(failure.text, clash);

        std::fs::remove_file(clients.join("bob@example.org.toml")).expect("a link");
        let config = ServerConfig::load(&path).expect("one client");
        assert_eq!(config.clients.keys().collect::<Vec<_>>(), ["alice"]);

        std::fs::write(&path, format!("clients_dir = 'elsewhere'\n{LEAST}")).expect("a file");
        let failure = ServerConfig::load(&path).expect_err("a named directory must be there");
        assert_eq!(
            failure.text,
            format!(
                "{}: clients_dir = {:?} can't be read: No such file or directory (os error 2): make it, or name another",
                real.join("server.toml").display(),
                real.join("elsewhere")
            )
        );
    }

    #[test]
    fn example_shows_every_key_with_its_default() {
        let config = parse(EXAMPLE).expect("valid");
        let least = parse(LEAST).expect("valid");
        let file = |name| Pem::File(PathBuf::from("/etc/tunguard/certs").join(name));
        let tls = ServerTls {
            ca: file("ca.pem"),
            cert: file("server.pem"),
            key: file("server.key"),
            crl: Some("/etc/tunguard/certs/crl.pem".into()),
        };
        assert_eq!(config, ServerConfig { tls, ..least });

        let text = uncommented(EXAMPLE);
        assert_eq!(parse(&text).expect("valid"), config);
        let document = Document::parse(Path::new("f"), Path::new("/"), &text).expect("valid");
        assert!(ServerConfig::read(&document, "/f".into(), Path::new("/")).is_some());
        for full in document.known() {
            let key = full.rsplit('.').next().unwrap_or_default();
            let shown = [format!("\n{key} = "), format!("\n[{key}]\n"), format!(" {key} = ")];
            assert!(shown.iter().any(|s| text.contains(s)), "{full} isn't in the example");
        }
    }

    proptest! {
        #[test]
        fn random_text_never_panics(text in "\\PC*|([a-z_]{0,8}(\\.[a-z]{1,3})? ?= ?[\\[\\]'\"{}0-9a-z,./: -]*\n){0,6}") {
            let _ = parse(&text);
        }

        #[test]
        fn mutated_text_never_panics(at in 0..EXAMPLE.len(), byte: u8) {
            let mut bytes = uncommented(EXAMPLE).into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(config) = parse(&String::from_utf8_lossy(&bytes)) {
                prop_assert_eq!(config.server_addresses().len(), config.networks.len());
            }
        }
    }
}
