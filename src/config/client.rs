//! `client.toml`, and profiles: the same format with the PEMs inline.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

use super::common::{
    DEFAULT_PORT, Data, DeviceName, Pem, Sandbox, from_word, parse_duration, quoted, read_socket, reserved,
};
use super::reader::{self, Document, Section, Value, Word};
use crate::client::wake::WakeRule;
use crate::exit::{Failure, Outcome};
use crate::paths::{Keepalive, Mode};

/// One `remote`: `HOST`, `HOST:PORT`, an address, or `[v6]:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Remote {
    /// Name or address, without brackets.
    pub host: String,
    /// Port, 55555 where none was given.
    pub port: u16,
}

/// What the client lets the server route into the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Routes {
    /// Whatever the server pushes.
    Pushed,
    /// Only the tunnel's own networks, where they are private.
    None,
    /// These, whatever the server pushes.
    List(Vec<IpNet>),
}

/// `[tls]` of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    /// The CA that signs the server.
    pub ca: Pem,
    /// The client's certificate chain.
    pub cert: Pem,
    /// Its private key.
    pub key: Pem,
    /// The name the server's certificate must carry; default: the remote's host, as dialled.
    pub server_name: Option<String>,
}

/// `[mobility]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mobility {
    /// Devices that may carry the tunnel, best first; `None`, the default, means all that lead to the server.
    pub carriers: Option<Vec<DeviceName>>,
    /// What is done with several of them.
    pub mode: Mode,
    /// When something is sent only to keep a NAT's mapping.
    pub keepalive: Keepalive,
}

/// `[on_demand]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnDemand {
    /// Connect only when a packet asks for it; default no.
    pub enabled: bool,
    /// A session without inner data for so long is ended; default 5 min, at least 1 s.
    pub idle: Duration,
    /// Which packets ask for it; none, the default, means all that are no router noise.
    pub wake: Vec<WakeRule>,
    /// How many packets the device holds; default 500, 1 to 100,000.
    pub queue: u32,
    /// Senders are told that there is no session after so long; default 30 s, at least 1 s.
    pub give_up: Duration,
    /// Inner addresses with their networks' prefixes, where they are known; at most one of each family.
    pub addresses: Vec<IpNet>,
}

impl Default for OnDemand {
    fn default() -> OnDemand {
        OnDemand {
            enabled: false,
            idle: Duration::from_secs(5 * 60),
            wake: Vec::new(),
            queue: 500,
            give_up: Duration::from_secs(30),
            addresses: Vec::new(),
        }
    }
}

/// `client.toml`, whole and valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The file it came from, absolute.
    pub file: PathBuf,
    /// Servers in order, at least one; a single string is taken as a list of one.
    pub remote: Vec<Remote>,
    /// TUN device; default `tg0`.
    pub device: DeviceName,
    /// `routes`, default `"pushed"`.
    pub routes: Routes,
    /// Whether pushed resolvers are used: `dns = "pushed"` (the default) or `"none"`.
    pub accept_dns: bool,
    /// `[tls]`.
    pub tls: ClientTls,
    /// `[data]`.
    pub data: Data,
    /// `[sandbox]`.
    pub sandbox: Sandbox,
    /// `[mobility]`.
    pub mobility: Mobility,
    /// `[on_demand]`.
    pub on_demand: OnDemand,
    /// Unprivileged user of the tunnel process: `user`, a name or number, default `nobody`; never root.
    pub user: String,
    /// State that outlives the process (what to repair after a crash); `state_dir`, default `/run/tunguard`.
    pub state_dir: PathBuf,
    /// Admin socket; `socket`, default `client-DEVICE.sock` in `state_dir`.
    pub socket: PathBuf,
}

impl ClientConfig {
    /// Reads `path`. Errors name file, line and key.
    ///
    /// PEM files aren't opened here.
    pub fn load(path: &Path) -> Outcome<ClientConfig> {
        let (text, file) = reader::read(path)?;
        ClientConfig::parse_as(&text, path, file)
    }

    /// Parses the text of `client.toml` or of a profile as if it stood in `file`.
    pub fn parse(text: &str, file: &Path) -> Outcome<ClientConfig> {
        let absolute =
            std::path::absolute(file).map_err(|e| Failure::usage(format!("{}: {e}", file.display())))?;
        ClientConfig::parse_as(text, file, absolute)
    }

    /// Parses `text`; messages name the file `shown`, its absolute path is `file`.
    fn parse_as(text: &str, shown: &Path, file: PathBuf) -> Outcome<ClientConfig> {
        let directory = file.parent().unwrap_or(Path::new("/")).to_owned();
        let document = Document::parse(shown, &directory, text)?;
        let config = ClientConfig::read(&document, file);
        reader::outcome(config, document.faults())
    }

    /// Asks for every key. `None` where something that has no default is missing or faulty.
    fn read(document: &Document<'_>, file: PathBuf) -> Option<ClientConfig> {
        let mut root = document.root();
        let remote = root.required("remote", Remote::WANTED);
        let remote = remote.map(|v| read_remote(&v)).unwrap_or_default();
        let device = root.value("device").and_then(|v| v.word());
        let routes = root.value("routes").and_then(|v| read_routes(&v));
        let accept_dns = root.value("dns").and_then(|v| v.choice(&[("pushed", true), ("none", false)]));
        let user = root.value("user").and_then(|v| read_user(&v));
        let state_dir = root.value("state_dir").and_then(|v| v.path());
        let socket = root.value("socket").and_then(|v| read_socket(&v));

        let mut section = root.section("tls");
        let ca = section.required("ca", "a path or PEM text").and_then(|v| v.pem("tls.ca"));
        let cert = section.required("cert", "a path or PEM text").and_then(|v| v.pem("tls.cert"));
        let key = section.required("key", "a path or PEM text").and_then(|v| v.pem("tls.key"));
        let server_name = section.value("server_name").and_then(|v| v.word::<Host>());
        section.end();

        let mut section = root.section("data");
        let data = Data::read(&mut section);
        section.end();

        let mut section = root.section("mobility");
        let own_device = device.clone().unwrap_or_default();
        let carriers = section.value("carriers").map(|v| read_carriers(&v, &own_device));
        let mode = section.value("mode").and_then(|v| v.choice(MODES));
        let keepalive = section.value("keepalive").and_then(|v| read_keepalive(&v));
        section.end();
        let on_demand = read_on_demand(root.section("on_demand"));
        let mut section = root.section("sandbox");
        let sandbox = Sandbox::read(&mut section);
        section.end();
        root.end();

        let device = device.unwrap_or_default();
        let state_dir = state_dir.unwrap_or_else(|| PathBuf::from("/run/tunguard"));
        Some(ClientConfig {
            file,
            remote,
            socket: socket.unwrap_or_else(|| state_dir.join(format!("client-{device}.sock"))),
            device,
            routes: routes.unwrap_or(Routes::Pushed),
            accept_dns: accept_dns.unwrap_or(true),
            tls: ClientTls { ca: ca?, cert: cert?, key: key?, server_name: server_name.map(|host| host.0) },
            data,
            mobility: Mobility {
                carriers,
                mode: mode.unwrap_or_default(),
                keepalive: keepalive.unwrap_or_default(),
            },
            on_demand,
            sandbox,
            user: user.unwrap_or_else(|| "nobody".to_owned()),
            state_dir,
        })
    }
}

/// `remote`: one or a list of them.
fn read_remote(value: &Value<'_>) -> Vec<Remote> {
    if value.is_text() {
        value.word().into_iter().collect()
    } else if value.is_list() {
        value.some_words().into_iter().map(|(remote, _)| remote).collect()
    } else {
        value.wrong_type(&format!("{}, or a list of such", Remote::WANTED)).unwrap_or_default()
    }
}

/// `routes`: a word or a list of networks.
fn read_routes(value: &Value<'_>) -> Option<Routes> {
    if value.is_list() {
        let list: Vec<IpNet> = value.words().into_iter().map(|(net, _)| net).collect();
        Some(if list.is_empty() { Routes::None } else { Routes::List(list) })
    } else if value.is_text() {
        let word = value.text("")?;
        match word {
            "pushed" => Some(Routes::Pushed),
            "none" => Some(Routes::None),
            _ => {
                value.fault(format_args!("is not accepted: {ROUTES_WANTED}"));
                None
            }
        }
    } else {
        value.wrong_type(ROUTES_WANTED)
    }
}

/// `carriers`: some devices, the tunnel's own not among them.
fn read_carriers(value: &Value<'_>, own_device: &DeviceName) -> Vec<DeviceName> {
    let carriers = value.some_words::<DeviceName>();
    for (_, element) in carriers.iter().filter(|(device, _)| device == own_device) {
        element.fault("is the tunnel's own device");
    }
    carriers.into_iter().map(|(device, _)| device).collect()
}

/// `keepalive`: a word or a duration.
fn read_keepalive(value: &Value<'_>) -> Option<Keepalive> {
    let why = match value.text(KEEPALIVE_WANTED)? {
        "auto" => return Some(Keepalive::Auto),
        "off" => return Some(Keepalive::Off),
        text => match parse_duration(text) {
            Ok(silence) if silence >= LEAST_KEEPALIVE => return Some(Keepalive::Every(silence)),
            Ok(_) => format!("is too short: at least {}s, or \"off\"", LEAST_KEEPALIVE.as_secs()),
            Err(_) => format!("is not accepted: {KEEPALIVE_WANTED}"),
        },
    };
    value.fault(why);
    None
}

/// `[on_demand]`.
fn read_on_demand(mut section: Section<'_>) -> OnDemand {
    let default = OnDemand::default();
    let enabled = section.value("enabled").and_then(|v| v.boolean());
    let idle = section.value("idle").and_then(|v| v.duration(LEAST_WAIT));
    let wake = section.value("wake").map(|v| v.some_words::<WakeRule>());
    let queue = section.value("queue").and_then(|v| v.integer(1..=100_000));
    let give_up = section.value("give_up").and_then(|v| v.duration(LEAST_WAIT));
    let addresses = section.value("addresses").map(|v| read_addresses(&v));
    section.end();
    OnDemand {
        enabled: enabled.unwrap_or(default.enabled),
        idle: idle.unwrap_or(default.idle),
        wake: wake.map_or(default.wake, |rules| rules.into_iter().map(|(rule, _)| rule).collect()),
        queue: queue.unwrap_or(default.queue),
        give_up: give_up.unwrap_or(default.give_up),
        addresses: addresses.unwrap_or(default.addresses),
    }
}

/// `addresses`: one of each family at most.
fn read_addresses(value: &Value<'_>) -> Vec<IpNet> {
    let addresses = value.words::<InnerAddress>();
    for (place, (address, element)) in addresses.iter().enumerate() {
        if addresses[..place].iter().any(|(other, _)| other.0.addr().is_ipv4() == address.0.addr().is_ipv4())
        {
            element.fault("is the second one of its family");
        }
    }
    addresses.into_iter().map(|(address, _)| address.0).collect()
}

/// An address with the prefix length of its network.
#[derive(PartialEq)]
struct InnerAddress(IpNet);

impl Word for InnerAddress {
    const WANTED: &'static str = r#"an inner address with its network's prefix length, as in "10.9.0.5/24""#;

    fn from_word(text: &str) -> Result<InnerAddress, String> {
        if text.parse::<IpAddr>().is_ok() {
            return Err("has no prefix length: give that of the server's network".to_owned());
        }
        let address: IpNet = text.parse().map_err(|_| format!("is not {}", InnerAddress::WANTED))?;
        match reserved(&IpNet::from(address.addr())) {
            Some(why) => Err(why.to_owned()),
            None => Ok(InnerAddress(address)),
        }
    }
}

impl Word for WakeRule {
    const WANTED: &'static str = WakeRule::WANTED;

    fn from_word(text: &str) -> Result<WakeRule, String> {
        text.parse()
    }
}

/// `user`: a name or a number.
fn read_user(value: &Value<'_>) -> Option<String> {
    if value.is_integer() {
        // The last user ID, -1, means "unchanged" to the kernel.
        return value.integer(1..=u32::MAX - 1).map(|uid| uid.to_string());
    }
    value.word::<User>().map(|user| user.0)
}

impl Remote {
    /// What is accepted, as a noun.
    const WANTED: &'static str = r#"HOST or HOST:PORT, as in "vpn.example.org" or "[2001:db8::1]:55555""#;
}

impl fmt::Display for Remote {
    /// In the form that parses again: `host:port`, an IPv6 address in brackets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Remote {
    type Err = Failure;

    fn from_str(text: &str) -> Outcome<Remote> {
        from_word(text)
    }
}

impl Word for Remote {
    const WANTED: &'static str = Remote::WANTED;

    fn from_word(text: &str) -> Result<Remote, String> {
        if text.contains("://") {
            return Err(format!("is a URL: give {}", Remote::WANTED));
        }
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or("has no \"]\" after the address")?;
            if !is_ipv6(host) {
                return Err("has no IPv6 address between the brackets".to_owned());
            }
            match rest.strip_prefix(':') {
                None if rest.is_empty() => (host, None),
                None => return Err("has something else than \":PORT\" after the \"]\"".to_owned()),
                Some(port) => (host, Some(port)),
            }
        } else if is_ipv6(text) {
            (text, None)
        } else {
            match text.rsplit_once(':') {
                None => (text, None),
                Some((host, _)) if host.contains(':') => {
                    return Err(
                        "is no IPv6 address; with a port it is written \"[2001:db8::1]:55555\"".to_owned()
                    );
                }
                Some((host, port)) => (host, Some(port)),
            }
        };
        let Host(host) = Host::from_word(host)?;
        Ok(Remote { host, port: port.map_or(Ok(DEFAULT_PORT), parse_port)? })
    }
}

fn is_ipv6(text: &str) -> bool {
    text.parse::<Ipv6Addr>().is_ok() || scoped(text).is_some()
}

/// A link-local address with the device it is reached by: `fe80::1%eth0`.
fn scoped(text: &str) -> Option<(Ipv6Addr, DeviceName)> {
    let (ip, device) = text.split_once('%')?;
    let ip = ip.parse().ok().filter(Ipv6Addr::is_unicast_link_local)?;
    Some((ip, device.parse().ok()?))
}

/// A port in decimal digits.
fn parse_port(text: &str) -> Result<u16, String> {
    let port = if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().unwrap_or(0) } else { 0 };
    if port == 0 { Err(format!("has the port {}: 1 to 65535", quoted(text))) } else { Ok(port) }
}

/// A host name or an address, the latter in its usual form.
#[derive(PartialEq)]
struct Host(String);

impl Word for Host {
    const WANTED: &'static str = r#"a host name or an address, as in "vpn.example.org" or "192.0.2.1""#;

    fn from_word(text: &str) -> Result<Host, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return if address.is_unspecified() || address.is_multicast() {
                Err("names no single host".to_owned())
            } else {
                Ok(Host(address.to_string()))
            };
        }
        if let Some((ip, device)) = scoped(text) {
            return Ok(Host(format!("{ip}%{}", device.as_str())));
        }
        let fits = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if text.is_empty() {
            return Err("has no host".to_owned());
        }
        if text.len() > 253 || !text.split('.').all(fits) {
            return Err("has no valid host name: labels of letters, digits, '-' and '_', separated by dots"
                .to_owned());
        }
        // No top-level domain is a number, so this is a mistyped address; resolvers take "10.1" for 10.0.0.1.
        if text.rsplit('.').next().is_some_and(|label| label.bytes().all(|b| b.is_ascii_digit())) {
            return Err("is neither an address nor a host name".to_owned());
        }
        Ok(Host(text.to_owned()))
    }
}

/// A user that isn't root, by name or number.
struct User(String);

impl Word for User {
    const WANTED: &'static str = r#"a user's name or number, as in "nobody""#;

    fn from_word(text: &str) -> Result<User, String> {
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            match text.parse::<u32>() {
                Ok(0) => Err(IS_ROOT.to_owned()),
                Ok(uid) if uid != u32::MAX => Ok(User(uid.to_string())),
                _ => Err(format!("is out of range: 1 to {}", u32::MAX - 1)),
            }
        } else if text == "root" {
            Err(IS_ROOT.to_owned())
        } else if (1..=32).contains(&text.len())
            && !text.starts_with('-')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.$".contains(&b))
        {
            Ok(User(text.to_owned()))
        } else {
            Err("is no user's name: 1 to 32 letters, digits, '-', '_', '.' or '$'".to_owned())
        }
    }
}

/// What `mode` may be.
const MODES: &[(&str, Mode)] =
    &[("failover", Mode::Failover), ("redundant", Mode::Redundant), ("balance", Mode::Balance)];
/// What `keepalive` may be.
const KEEPALIVE_WANTED: &str = r#""auto", "off", or a duration, as in "25s""#;
const LEAST_KEEPALIVE: Duration = Duration::from_secs(1);
/// Of `[on_demand]`.
const LEAST_WAIT: Duration = Duration::from_secs(1);
/// What `routes` may be.
const ROUTES_WANTED: &str = r#""pushed", "none" or a list of networks"#;
/// Why root is refused.
const IS_ROOT: &str = "is root: the tunnel process needs an unprivileged user";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::uncommented;
    use crate::exit::Exit;
    use proptest::prelude::*;

    const EXAMPLE: &str = include_str!("../../packaging/client.example.toml");
    const LEAST: &str = "remote = 'vpn.example.org'\n[tls]\nca = 'ca'\ncert = 'cert'\nkey = 'key'\n";

    fn parse(text: &str) -> Outcome<ClientConfig> {
        ClientConfig::parse(text, Path::new("/etc/tunguard/client.toml"))
    }

    fn remote(host: &str, port: u16) -> Remote {
        Remote { host: host.to_owned(), port }
    }

    #[test]
    fn defaults() {
        let file = |name| Pem::File(PathBuf::from("/etc/tunguard").join(name));
        let expected = ClientConfig {
            file: "/etc/tunguard/client.toml".into(),
            remote: vec![remote("vpn.example.org", 55555)],
            device: "tg0".parse().expect("a name"),
            routes: Routes::Pushed,
            accept_dns: true,
            tls: ClientTls { ca: file("ca"), cert: file("cert"), key: file("key"), server_name: None },
            data: Data::default(),
            sandbox: Sandbox::default(),
            mobility: Mobility { carriers: None, mode: Mode::Failover, keepalive: Keepalive::Auto },
            on_demand: OnDemand::default(),
            user: "nobody".to_owned(),
            state_dir: "/run/tunguard".into(),
            socket: "/run/tunguard/client-tg0.sock".into(),
        };
        assert_eq!(parse(LEAST), Ok(expected));
    }

    #[test]
    fn everything_set() {
        let text = r#"
            remote = ["vpn.example.org:4444", "192.0.2.1", "2001:db8::1"]
            device = "vpn"
            routes = ["10.0.0.0/8"]
            dns = "none"
            user = 1000
            state_dir = "state"
            [tls]
            ca = "-----BEGIN CERTIFICATE-----\n"
            cert = "-----BEGIN CERTIFICATE-----\n"
            key = "-----BEGIN PRIVATE KEY-----\n"
            server_name = "server.lab"
            [data]
            suites = ["aes-256-gcm"]
            rekey = "1h30m"
            rekey_packets = 5000
            [mobility]
            carriers = ["wlan0", "eth0"]
            mode = "redundant"
            keepalive = "45s"
            [on_demand]
            enabled = true
            idle = "10m"
            wake = ["10.0.0.0/8", "tcp/22", "10.1.0.0/16 udp/53"]
            queue = 100
            give_up = "1m"
            addresses = ["10.9.0.5/24", "fd09::5/64"]
        "#;
        let config = parse(text).expect("valid");
        let remotes =
            [remote("vpn.example.org", 4444), remote("192.0.2.1", 55555), remote("2001:db8::1", 55555)];
        assert_eq!(config.remote, remotes);
        assert_eq!(config.device.as_str(), "vpn");
        assert_eq!(config.routes, Routes::List(vec!["10.0.0.0/8".parse().expect("a network")]));
        assert!(!config.accept_dns);
        assert_eq!(config.user, "1000");
        assert_eq!(config.state_dir, Path::new("/etc/tunguard/state"));
        assert_eq!(config.socket, Path::new("/etc/tunguard/state/client-vpn.sock"));
        let key = Pem::Inline { key: "tls.key", text: "-----BEGIN PRIVATE KEY-----\n".to_owned() };
        assert_eq!(config.tls.key, key);
        assert_eq!(config.tls.server_name.as_deref(), Some("server.lab"));
        assert_eq!(config.data.suites.len(), 1);
        assert_eq!((config.data.rekey.as_secs(), config.data.rekey_packets), (5400, 5000));
        let carriers = ["wlan0", "eth0"].map(|name| name.parse().expect("a name")).to_vec();
        let keepalive = Keepalive::Every(Duration::from_secs(45));
        assert_eq!(config.mobility, Mobility { carriers: Some(carriers), mode: Mode::Redundant, keepalive });
        let on_demand = OnDemand {
            enabled: true,
            idle: Duration::from_secs(600),
            wake: ["10.0.0.0/8", "tcp/22", "10.1.0.0/16 udp/53"]
                .map(|rule| rule.parse().expect("a rule"))
                .to_vec(),
            queue: 100,
            give_up: Duration::from_secs(60),
            addresses: ["10.9.0.5/24", "fd09::5/64"].map(|net| net.parse().expect("an address")).to_vec(),
        };
        assert_eq!(config.on_demand, on_demand);
    }

    #[test]
    fn remotes() {
        for (text, host, port) in [
            ("vpn.example.org", "vpn.example.org", 55555),
            ("vpn.example.org:4444", "vpn.example.org", 4444),
            ("localhost:1", "localhost", 1),
            ("VPN_1.example.org", "VPN_1.example.org", 55555),
            ("192.0.2.1", "192.0.2.1", 55555),
            ("192.0.2.1:65535", "192.0.2.1", 65535),
            ("2001:db8::1", "2001:db8::1", 55555),
            ("2001:DB8:0::1", "2001:db8::1", 55555),
            ("[2001:db8::1]", "2001:db8::1", 55555),
            ("[2001:db8::1]:4444", "2001:db8::1", 4444),
        ] {
            let parsed: Remote = text.parse().expect(text);
            assert_eq!(parsed, remote(host, port));
            assert_eq!(parsed.to_string().parse(), Ok(parsed), "{text}");
        }
        let name = "has no valid host name: labels of letters, digits, '-' and '_', separated by dots";
        let neither = "is neither an address nor a host name";
        let long = ["a".repeat(63).as_str(); 4].join(".");
        for (text, why) in [
            ("", "has no host"),
            (":55555", "has no host"),
            ("vpn:", r#"has the port "": 1 to 65535"#),
            ("vpn:0", r#"has the port "0": 1 to 65535"#),
            ("vpn:65536", r#"has the port "65536": 1 to 65535"#),
            ("vpn:+5", r#"has the port "+5": 1 to 65535"#),
            ("vpn:http", r#"has the port "http": 1 to 65535"#),
            ("[::1", r#"has no "]" after the address"#),
            ("[]:5", "has no IPv6 address between the brackets"),
            ("[192.0.2.1]:5", "has no IPv6 address between the brackets"),
            ("[vpn]:5", "has no IPv6 address between the brackets"),
            ("[2001:db8::1]5", r#"has something else than ":PORT" after the "]""#),
            ("[2001:db8::1]:", r#"has the port "": 1 to 65535"#),
            ("2001:db8:::1", r#"is no IPv6 address; with a port it is written "[2001:db8::1]:55555""#),
            (
                "https://vpn:5",
                r#"is a URL: give HOST or HOST:PORT, as in "vpn.example.org" or "[2001:db8::1]:55555""#,
            ),
            ("vpn.example.org.", name),
            ("vpn..org", name),
            ("-vpn", name),
            ("vpn-", name),
            ("vpn example", name),
            ("vpn/24", name),
            ("vpné.org", name),
            ("vpn\0", name),
            (&"a".repeat(64), name),
            (&long, name),
            ("192.0.2.256", neither),
            ("192.0.2", neither),
            ("10.1:55555", neither),
            ("0.0.0.0", "names no single host"),
            ("[::]:5", "names no single host"),
            ("224.0.0.1", "names no single host"),
        ] {
            let failure = text.parse::<Remote>().expect_err(text);
            assert_eq!(failure.text, format!("{} {why}", quoted(text)));
        }
        assert_eq!(long[..253].parse(), Ok(remote(&long[..253], 55555)));
    }

    #[test]
    fn accepted() {
        for (line, routes) in [
            ("routes = 'pushed'", Routes::Pushed),
            ("routes = 'none'", Routes::None),
            ("routes = []", Routes::None),
            ("routes = ['::/0']", Routes::List(vec!["::/0".parse().expect("a network")])),
        ] {
            assert_eq!(parse(&format!("{line}\n{LEAST}")).map(|config| config.routes), Ok(routes), "{line}");
        }
        for (line, user) in
            [("user = 'vpn-user'", "vpn-user"), ("user = '0065534'", "65534"), ("user = 1", "1")]
        {
            assert_eq!(
                parse(&format!("{line}\n{LEAST}")).map(|config| config.user),
                Ok(user.to_owned()),
                "{line}"
            );
        }
    }

    #[test]
    fn rejected() {
        let remote = r#"HOST or HOST:PORT, as in "vpn.example.org" or "[2001:db8::1]:55555""#;
        let routes = r#""pushed", "none" or a list of networks"#;
        let known =
            "remote, device, routes, dns, user, state_dir, socket, tls, data, mobility, on_demand, sandbox";
        let device = "1 to 15 letters, digits, '-', '_' or '.'";
        for (line, sentence) in [
            ("remote = []", &*format!("remote is empty: at least one is needed, {remote}")),
            ("remote = 5", &format!("remote = 5 is an integer, not {remote}, or a list of such")),
            ("remote = ''", r#"remote = "" has no host"#),
            (
                "remote = 'https://vpn.example.org'",
                &format!(r#"remote = "https://vpn.example.org" is a URL: give {remote}"#),
            ),
            ("remote = ['vpn', 'vpn:0']", r#"remote[1] = "vpn:0" has the port "0": 1 to 65535"#),
            ("remote = ['vpn', 'vpn:55555']", r#"remote[1] = "vpn:55555" is already in the list: remote[0]"#),
            ("device = ''", r#"device = "" is no device name: 1 to 15 letters, digits, '-', '_' or '.'"#),
            ("routes = 'all'", &format!(r#"routes = "all" is not accepted: {routes}"#)),
            ("routes = true", &format!("routes = true is a boolean, not {routes}")),
            (
                "routes = ['10.0.0.1/8']",
                r#"routes[0] = "10.0.0.1/8" has host bits set: "10.0.0.0/8" was probably meant"#,
            ),
            ("dns = 'push'", r#"dns = "push" is not accepted: "pushed" or "none""#),
            ("dns = []", r#"dns is a list, not "pushed" or "none""#),
            ("user = 'root'", r#"user = "root" is root: the tunnel process needs an unprivileged user"#),
            ("user = '00'", r#"user = "00" is root: the tunnel process needs an unprivileged user"#),
            ("user = 0", "user = 0 is out of range: 1 to 4294967294"),
            ("user = '4294967295'", r#"user = "4294967295" is out of range: 1 to 4294967294"#),
            ("user = ''", r#"user = "" is no user's name: 1 to 32 letters, digits, '-', '_', '.' or '$'"#),
            (
                "user = 'a:b'",
                r#"user = "a:b" is no user's name: 1 to 32 letters, digits, '-', '_', '.' or '$'"#,
            ),
            ("user = true", r#"user = true is a boolean, not a user's name or number, as in "nobody""#),
            ("state_dir = ''", r#"state_dir = "" is no path: 1 to 4095 bytes without control characters"#),
            (
                "mobility.carriers = []",
                r#"mobility.carriers is empty: at least one is needed, a device name, as in "tg0""#,
            ),
            (
                "mobility.carriers = 'eth0'",
                r#"mobility.carriers = "eth0" is a string, not a list of strings, each a device name, as in "tg0""#,
            ),
            (
                "mobility.carriers = ['eth0', 'a/b']",
                &format!(r#"mobility.carriers[1] = "a/b" is no device name: {device}"#),
            ),
            (
                "mobility.carriers = ['eth0', 'eth0']",
                r#"mobility.carriers[1] = "eth0" is already in the list: mobility.carriers[0]"#,
            ),
            ("mobility.carriers = ['tg0']", r#"mobility.carriers[0] = "tg0" is the tunnel's own device"#),
            (
                "mobility.mode = 'both'",
                r#"mobility.mode = "both" is not accepted: "failover" or "redundant" or "balance""#,
            ),
            (
                "mobility.keepalive = 'often'",
                r#"mobility.keepalive = "often" is not accepted: "auto", "off", or a duration, as in "25s""#,
            ),
            ("mobility.keepalive = '0s'", r#"mobility.keepalive = "0s" is too short: at least 1s, or "off""#),
            (
                "mobility.keepalive = 25",
                r#"mobility.keepalive = 25 is an integer, not "auto", "off", or a duration, as in "25s""#,
            ),
            (
                "mobility.link = 'eth0'",
                r#"unknown key "mobility.link" (known here: carriers, mode, keepalive)"#,
            ),
            ("kill_switch = {}", &format!(r#"unknown key "kill_switch" (known here: {known})"#)),
            ("on_demand.idle = '10ms'", r#"on_demand.idle = "10ms" is too short: at least 1s"#),
            ("on_demand.queue = 0", "on_demand.queue = 0 is out of range: 1 to 100000"),
            (
                "on_demand.wake = []",
                r#"on_demand.wake is empty: at least one is needed, a rule, as in "10.0.0.0/8", "tcp/22", "10.1.0.0/16 udp/53" or "icmp""#,
            ),
            (
                "on_demand.wake = ['gre']",
                r#"on_demand.wake[0] = "gre" has "gre", which is no protocol: tcp, udp or icmp"#,
            ),
            (
                "on_demand.addresses = ['10.9.0.5']",
                r#"on_demand.addresses[0] = "10.9.0.5" has no prefix length: give that of the server's network"#,
            ),
            (
                "on_demand.addresses = ['10.9.0.5/24', '10.9.0.6/24']",
                r#"on_demand.addresses[1] = "10.9.0.6/24" is the second one of its family"#,
            ),
            ("route = []", r#"unknown key "route" (did you mean "routes"?)"#),
            (
                "data.tun_write = 'guard'",
                r#"unknown key "data.tun_write" (known here: suites, rekey, rekey_packets)"#,
            ),
            ("data.rekey_packets = 1", "data.rekey_packets = 1 is out of range: 1000 to 1099511627776"),
        ] {
            let rest =
                if line.starts_with("remote") { LEAST.replace("remote", "#") } else { LEAST.to_owned() };
            let failure = parse(&format!("#\n{line}\n{rest}")).expect_err(line);
            assert_eq!(failure.text, format!("/etc/tunguard/client.toml:2: {sentence}"));
            assert_eq!(failure.exit, Exit::Usage);
        }
        let failure = parse(&format!("{LEAST}server_name = 'a b'")).expect_err("no name");
        let why = "has no valid host name: labels of letters, digits, '-' and '_', separated by dots";
        assert_eq!(failure.text, format!(r#"/etc/tunguard/client.toml:6: tls.server_name = "a b" {why}"#));
        let failure = parse(&format!("{LEAST}crl = 'crl'")).expect_err("no CRL");
        let sentence =
            r#"/etc/tunguard/client.toml:6: unknown key "tls.crl" (known here: ca, cert, key, server_name)"#;
        assert_eq!(failure.text, sentence);
    }

    #[test]
    fn missing_keys_are_all_named() {
        let file = "/etc/tunguard/client.toml";
        let faults = [
            format!(r#"{file}: remote is missing: give {}"#, Remote::WANTED),
            format!("{file}: tls.ca is missing: give a path or PEM text"),
            format!("{file}: tls.cert is missing: give a path or PEM text"),
            format!("{file}: tls.key is missing: give a path or PEM text"),
        ];
        assert_eq!(parse("").expect_err("nothing").text, faults.join("\n"));
    }

    #[test]
    fn load_resolves_paths() {
        let directory = tempfile::tempdir().expect("a directory");
        let real = directory.path().canonicalize().expect("a path");
        let path = directory.path().join("client.toml");
        let missing = ClientConfig::load(&path).expect_err("no file");
        assert_eq!(missing.text, format!("{}: No such file or directory (os error 2)", path.display()));
        std::fs::write(&path, LEAST).expect("a file");
        let config = ClientConfig::load(&path).expect("valid");
        assert_eq!((config.file, config.tls.key), (real.join("client.toml"), Pem::File(real.join("key"))));
    }

    #[test]
    fn example_shows_every_key_with_its_default() {
        let config = parse(EXAMPLE).expect("valid");
        let file = |name| Pem::File(PathBuf::from("/etc/tunguard/certs").join(name));
        let tls = ClientTls {
            ca: file("ca.pem"),
            cert: file("client.pem"),
            key: file("client.key"),
            server_name: None,
        };
        assert_eq!(config, ClientConfig { tls, ..parse(LEAST).expect("valid") });

        let text = uncommented(EXAMPLE);
        let mut full = parse(&text).expect("valid");
        assert_eq!(full.tls.server_name.take().as_ref(), Some(&config.remote[0].host));
        assert!(full.mobility.carriers.take().is_some(), "all is no list");
        assert!(!std::mem::take(&mut full.on_demand.wake).is_empty(), "neither is this");
        assert!(!std::mem::take(&mut full.on_demand.addresses).is_empty());
        assert_eq!(full, config);
        let document = Document::parse(Path::new("f"), Path::new("/"), &text).expect("valid");
        assert!(ClientConfig::read(&document, "/f".into()).is_some());
        for full in document.known() {
            let key = full.rsplit('.').next().unwrap_or_default();
            let shown = [format!("\n{key} = "), format!("\n[{key}]\n")];
            assert!(shown.iter().any(|s| text.contains(s)), "{full} isn't in the example");
        }
    }

    #[test]
    fn link_local_remotes_name_their_device() {
        for text in ["fe80::1%eth0", "[fe80::1%eth0]", "[FE80:0::1%eth0]:55555"] {
            let remote: Remote = text.parse().expect(text);
            assert_eq!(remote, Remote { host: "fe80::1%eth0".to_owned(), port: DEFAULT_PORT });
            assert_eq!(remote.to_string().parse(), Ok(remote));
        }
        for text in ["2001:db8::1%eth0", "fe80::1%", "[fe80::1%a b]", "192.0.2.1%eth0", "fe80::1%eth0:7"] {
            assert!(text.parse::<Remote>().is_err(), "{text}");
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
            let _ = parse(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn remotes_print_as_they_parse(text in "[a-z0-9:.%\\[\\]-]{0,20}") {
            if let Ok(remote) = text.parse::<Remote>() {
                prop_assert_eq!(remote.to_string().parse(), Ok(remote));
            }
        }
    }
}
