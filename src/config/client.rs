//! `client.toml`, and profiles: the same format with the PEMs inline.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::IpNet;

use super::common::{DEFAULT_PORT, Data, DeviceName, Pem, from_word, quoted};
use super::reader::{self, Document, Value, Word};
use crate::exit::{Failure, Outcome};

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
    /// Only the tunnel's own networks.
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
    /// Unprivileged user of the tunnel process: `user`, a name or number, default `nobody`; never root.
    pub user: String,
    /// State that outlives the process (what to repair after a crash); `state_dir`, default `/run/tunguard`.
    pub state_dir: PathBuf,
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

        let mut section = root.section("tls");
        let ca = section.required("ca", "a path or PEM text").and_then(|v| v.pem("tls.ca"));
        let cert = section.required("cert", "a path or PEM text").and_then(|v| v.pem("tls.cert"));
        let key = section.required("key", "a path or PEM text").and_then(|v| v.pem("tls.key"));
        let server_name = section.value("server_name").and_then(|v| v.word::<Host>());
        section.end();

        let mut section = root.section("data");
        let data = Data::read(&mut section);
        section.end();
        root.end();

        Some(ClientConfig {
            file,
            remote,
            device: device.unwrap_or_default(),
            routes: routes.unwrap_or(Routes::Pushed),
            accept_dns: accept_dns.unwrap_or(true),
            tls: ClientTls { ca: ca?, cert: cert?, key: key?, server_name: server_name.map(|host| host.0) },
            data,
            user: user.unwrap_or_else(|| "nobody".to_owned()),
            state_dir: state_dir.unwrap_or_else(|| PathBuf::from("/run/tunguard")),
        })
    }
}

/// `remote`: one or a list of them.
fn read_remote(value: &Value<'_>) -> Vec<Remote> {
    if value.is_text() {
        value.word().into_iter().collect()
    } else {
        value.some_words().into_iter().map(|(remote, _)| remote).collect()
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
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or("has no \"]\" after the address")?;
            if host.parse::<Ipv6Addr>().is_err() {
                return Err("has no IPv6 address between the brackets".to_owned());
            }
            match rest.strip_prefix(':') {
                None if rest.is_empty() => (host, None),
                None => return Err("has something else than \":PORT\" after the \"]\"".to_owned()),
                Some(port) => (host, Some(port)),
            }
        } else if text.parse::<Ipv6Addr>().is_ok() {
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

/// What `routes` may be.
const ROUTES_WANTED: &str = r#""pushed", "none" or a list of networks"#;
/// Why root is refused.
const IS_ROOT: &str = "is root: the tunnel process needs an unprivileged user";
