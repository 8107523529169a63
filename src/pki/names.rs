//! What may be written where a certificate or a profile names something.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use crate::exit::{Failure, Outcome};

/// The name of a server or client: 1 to 64 letters, digits, '.', '_', '-' or '@'. It becomes the common name and
/// the name of files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

/// What a server is reached by, as its certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AltName {
    /// A host name, or `*.` and one.
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

/// A server as a profile names it: `HOST`, `HOST:PORT`, an address, or `[v6]:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteHost(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = Failure;

    fn from_str(text: &str) -> Outcome<Name> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-@".contains(&b);
        if !(1..=64).contains(&text.len()) || !text.bytes().all(allowed) || text.starts_with(['.', '-']) {
            return Err(Failure::usage(format!(
                "{text:?} can't be a name: 1 to 64 letters, digits, '.', '_', '-' or '@', not beginning with '.' \
                 or '-'"
            )));
        }
        if RESERVED.iter().any(|r| text.eq_ignore_ascii_case(r)) {
            return Err(Failure::usage(format!("{text:?} is the authority's own: choose another name")));
        }
        Ok(Name(text.to_owned()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for AltName {
    type Err = Failure;

    fn from_str(text: &str) -> Outcome<AltName> {
        if let Ok(ip) = text.parse() {
            return Ok(AltName::Ip(ip));
        }
        if is_host(text.strip_prefix("*.").unwrap_or(text)) {
            Ok(AltName::Dns(text.to_owned()))
        } else {
            Err(Failure::usage(format!(
                "{text:?} is neither a host name nor an address: write it without a port"
            )))
        }
    }
}

impl RemoteHost {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RemoteHost {
    type Err = Failure;

    fn from_str(text: &str) -> Outcome<RemoteHost> {
        let port = |p: &str| p.bytes().all(|b| b.is_ascii_digit()) && p.parse::<u16>().is_ok_and(|p| p > 0);
        let fits = if let Some(rest) = text.strip_prefix('[') {
            rest.split_once(']').is_some_and(|(address, after)| {
                let after_fits = after.is_empty() || after.strip_prefix(':').is_some_and(port);
                address.parse::<Ipv6Addr>().is_ok() && after_fits
            })
        } else if text.parse::<Ipv6Addr>().is_ok() {
            true
        } else {
            match text.split_once(':') {
                Some((host, p)) => is_host(host) && port(p),
                None => is_host(text),
            }
        };
        if fits {
            Ok(RemoteHost(text.to_owned()))
        } else {
            Err(Failure::usage(format!("{text:?} is no server: write HOST, HOST:PORT or [v6 address]:PORT")))
        }
    }
}

/// An authority's name is for people only, so any script will do.
pub(super) fn check_authority_name(name: &str) -> Outcome<()> {
    let length = name.chars().count();
    if (1..=64).contains(&length) && name.trim() == name && !name.chars().any(char::is_control) {
        Ok(())
    } else {
        Err(Failure::usage(format!(
            "{name:?} can't name an authority: 1 to 64 characters, none of them control"
        )))
    }
}

/// A host name or IPv4 address.
fn is_host(text: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

/// Files and directories of the authority itself.
const RESERVED: [&str; 4] = ["ca", "crl", "index", "clients"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let long = "x".repeat(64);
        for good in ["a", "server", "alice@example.org", "a-b_c.d", "ca2", "@", &long] {
            assert!(good.parse::<Name>().is_ok(), "{good:?}");
        }
        let too_long = "x".repeat(65);
        for bad in [
            "", ".", "..", ".x", "-x", "a/b", "a b", "a\nb", "\u{fc}", "ca", "CA", "crl", "clients", "index",
            &too_long,
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn alternative_names() {
        for good in ["vpn.example.org", "*.example.org", "localhost", "192.0.2.1", "2001:db8::1"] {
            assert!(good.parse::<AltName>().is_ok(), "{good:?}");
        }
        for bad in ["", "*", "a.*.b", "a:1", "a,DNS:b", "http://a", "a..b", "[::1]", "a b", "a.b."] {
            assert!(bad.parse::<AltName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn remotes() {
        for good in
            ["vpn.example.org", "vpn.example.org:1", "192.0.2.1:55555", "::1", "[::1]", "[2001:db8::1]:65535"]
        {
            assert!(good.parse::<RemoteHost>().is_ok(), "{good:?}");
        }
        for bad in ["", ":1", "a:", "a:0", "a:+1", "a:65536", "a:b", "[::1", "[::1]1", "[a]:1", "a'b", "a\nb"]
        {
            assert!(bad.parse::<RemoteHost>().is_err(), "{bad:?}");
        }
    }
}
