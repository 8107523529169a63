//! Which packets bring the tunnel up: rules as the configuration has them, and what of a packet they look at.
//! Any bytes are accepted; what is no IP packet wakes nobody.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;

use crate::segment::is_noise;

/// One rule: `"10.0.0.0/8"`, `"tcp/22"`, `"10.1.0.0/16 udp/53"`, `"icmp"`. What it doesn't name may be anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WakeRule {
    /// Where the packet goes.
    net: Option<IpNet>,
    protocol: Option<Protocol>,
    /// The port it goes to.
    ports: Option<RangeInclusive<u16>>,
}

/// What a rule can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
    /// Of either version.
    Icmp,
}

impl WakeRule {
    /// What is accepted, as a noun.
    pub const WANTED: &'static str =
        r#"a rule, as in "10.0.0.0/8", "tcp/22", "10.1.0.0/16 udp/53" or "icmp""#;

    fn matches(&self, seen: &Seen) -> bool {
        self.net.is_none_or(|net| net.contains(&seen.destination))
            && self.protocol.is_none_or(|protocol| Some(protocol) == seen.known_protocol())
            && self.ports.as_ref().is_none_or(|ports| seen.port.is_some_and(|port| ports.contains(&port)))
    }
}

impl FromStr for WakeRule {
    type Err = String;

    /// The error is the end of a sentence that starts with the rule.
    fn from_str(text: &str) -> Result<WakeRule, String> {
        let mut rule = WakeRule::default();
        for word in text.split_whitespace() {
            if word.starts_with(|c: char| c.is_ascii_hexdigit() || c == ':') && word.contains(['.', ':']) {
                let net = read_net(word)?;
                if rule.net.replace(net).is_some() {
                    return Err("has two networks".to_owned());
                }
            } else {
                let (protocol, ports) = read_protocol(word)?;
                if rule.protocol.replace(protocol).is_some() {
                    return Err("has two protocols".to_owned());
                }
                rule.ports = ports;
            }
        }
        match rule == WakeRule::default() {
            true => Err(format!("is empty: give {}", WakeRule::WANTED)),
            false => Ok(rule),
        }
    }
}

/// In the form that parses again.
impl fmt::Display for WakeRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(net) = &self.net {
            write!(f, "{net}")?;
        }
        let Some(protocol) = self.protocol else { return Ok(()) };
        let space = if self.net.is_some() { " " } else { "" };
        write!(f, "{space}{}", protocol.name())?;
        match &self.ports {
            None => Ok(()),
            Some(ports) if ports.start() == ports.end() => write!(f, "/{}", ports.start()),
            Some(ports) => write!(f, "/{}-{}", ports.start(), ports.end()),
        }
    }
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Icmp => "icmp",
        }
    }
}

fn read_net(word: &str) -> Result<IpNet, String> {
    if let Ok(host) = word.parse::<IpAddr>() {
        return Ok(host.into());
    }
    let net: IpNet = word.parse().map_err(|_| format!("has no valid network: {word:?}"))?;
    match net.addr() == net.network() {
        true => Ok(net),
        false => Err(format!("has host bits set: \"{}\" was probably meant", net.trunc())),
    }
}

fn read_protocol(word: &str) -> Result<(Protocol, Option<RangeInclusive<u16>>), String> {
    let (name, ports) = match word.split_once('/') {
        Some((name, ports)) => (name, Some(ports)),
        None => (word, None),
    };
    let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Icmp].into_iter().find(|p| p.name() == name);
    let Some(protocol) = protocol else {
        return Err(format!("has {name:?}, which is no protocol: tcp, udp or icmp"));
    };
    let Some(ports) = ports else { return Ok((protocol, None)) };
    if protocol == Protocol::Icmp {
        return Err("has a port for icmp, which knows none".to_owned());
    }
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| digits(text) && *port > 0);
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => Ok((protocol, Some(first..=last))),
        _ => Err(format!("has the port {ports:?}: 1 to 65535, or a range such as 8000-8100")),
    }
}

/// All rules.
#[derive(Clone, Debug, Default)]
pub struct Wake {
    rules: Vec<WakeRule>,
}

impl Wake {
    /// These rules; without any, everything that isn't [noise](is_noise).
    pub fn new(rules: Vec<WakeRule>) -> Wake {
        Wake { rules }
    }

    /// Whether this IP packet brings the tunnel up. Noise never does.
    pub fn matches(&self, packet: &[u8]) -> bool {
        if is_noise(packet) {
            return false;
        }
        let Some(seen) = Seen::of(packet) else { return false };
        self.rules.is_empty() || self.rules.iter().any(|rule| rule.matches(&seen))
    }
}

/// The packet for the log: `10.9.0.2 -> 10.9.0.1 tcp/22`.
pub fn describe(packet: &[u8]) -> String {
    Seen::of(packet).map_or_else(|| "no IP packet".to_owned(), |seen| seen.to_string())
}

/// Where the packet goes.
pub fn destination(packet: &[u8]) -> Option<(IpAddr, Option<u16>)> {
    Seen::of(packet).map(|seen| (seen.destination, seen.port))
}

/// What is looked at of a packet. Lengths are not: super-packets have their own.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    source: IpAddr,
    destination: IpAddr,
    /// Its number; of IPv6 what is behind the extension headers.
    protocol: u8,
    /// Destination port of TCP and UDP; none of a fragment other than the first.
    port: Option<u16>,
}

impl Seen {
    fn of(packet: &[u8]) -> Option<Seen> {
        let (source, destination, protocol, transport): (IpAddr, IpAddr, u8, Option<&[u8]>) =
            match packet.first()? >> 4 {
                4 => {
                    let header = packet.first_chunk::<20>()?;
                    let source = Ipv4Addr::new(header[12], header[13], header[14], header[15]);
                    let destination = Ipv4Addr::new(header[16], header[17], header[18], header[19]);
                    let length = usize::from(header[0] & 0x0f) * 4;
                    let offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
                    let transport = packet.get(length..).filter(|_| offset == 0 && length >= 20);
                    (source.into(), destination.into(), header[9], transport)
                }
                6 => {
                    let header = packet.first_chunk::<40>()?;
                    let address = |at: usize| -> Option<Ipv6Addr> {
                        Some(Ipv6Addr::from(*header.get(at..at + 16)?.first_chunk::<16>()?))
                    };
                    let (protocol, transport) = behind_extensions(packet);
                    (address(8)?.into(), address(24)?.into(), protocol, transport)
                }
                _ => return None,
            };
        let port = transport.filter(|_| [TCP, UDP].contains(&protocol)).and_then(|t| t.get(2..4));
        Some(Seen {
            source,
            destination,
            protocol,
            port: port.map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]])),
        })
    }

    fn known_protocol(&self) -> Option<Protocol> {
        match (self.protocol, self.source) {
            (TCP, _) => Some(Protocol::Tcp),
            (UDP, _) => Some(Protocol::Udp),
            (ICMP, IpAddr::V4(_)) | (ICMP_V6, IpAddr::V6(_)) => Some(Protocol::Icmp),
            _ => None,
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} ", self.source, self.destination)?;
        match self.known_protocol() {
            Some(protocol) => f.write_str(protocol.name())?,
            None => write!(f, "protocol {}", self.protocol)?,
        }
        self.port.map_or(Ok(()), |port| write!(f, "/{port}"))
    }
}

/// Number of the upper-layer protocol, and its header where it is in this packet.
fn behind_extensions(packet: &[u8]) -> (u8, Option<&[u8]>) {
    let (mut at, mut protocol, mut later_fragment) = (40, packet[6], false);
    for _ in 0..MAX_EXTENSIONS {
        if ![HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS].contains(&protocol) {
            break;
        }
        // The rest of a later fragment's headers is in the first one.
        let Some(header) =
            packet.get(at..).and_then(|rest| rest.first_chunk::<8>()).filter(|_| !later_fragment)
        else {
            return (protocol, None);
        };
        let length = match protocol {
            FRAGMENT => {
                later_fragment = u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0;
                8
            }
            _ => (usize::from(header[1]) + 1) * 8,
        };
        protocol = header[0];
        at += length;
    }
    (protocol, packet.get(at..).filter(|_| !later_fragment))
}

// IANA's protocol numbers.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP_V6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// As many as [`crate::segment`] follows.
const MAX_EXTENSIONS: usize = 8;

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An IPv4 packet with these addresses and ports.
    pub fn v4(source: [u8; 4], destination: [u8; 4], protocol: u8, port: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, protocol, 0, 0];
        packet.extend(source);
        packet.extend(destination);
        packet.extend([0x30, 0x39]);
        packet.extend(port.to_be_bytes());
        packet.extend([0, 8, 0, 0]);
        packet
    }

    fn v6(source: &str, destination: &str, next: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, rest.len() as u8, next, 64];
        for address in [source, destination] {
            packet.extend(address.parse::<Ipv6Addr>().expect("an address").octets());
        }
        packet.extend(rest);
        packet
    }

    fn wake(rules: &[&str]) -> Wake {
        Wake::new(rules.iter().map(|rule| rule.parse().expect(rule)).collect())
    }

    const ME: [u8; 4] = [10, 9, 0, 2];

    #[test]
    fn literal_packets() {
        // ping -c 1 10.9.0.1, as it comes from the device.
        let ping = [
            0x45, 0x00, 0x00, 0x54, 0x1c, 0x46, 0x40, 0x00, 0x40, 0x01, 0x0a, 0x4f, 0x0a, 0x09, 0x00, 0x02,
            0x0a, 0x09, 0x00, 0x01, 0x08, 0x00, 0xf1, 0x4b, 0x00, 0x01, 0x00, 0x01,
        ];
        assert!(wake(&[]).matches(&ping));
        assert_eq!(describe(&ping), "10.9.0.2 -> 10.9.0.1 icmp");
        // A router solicitation from :: to ff02::2, and the same from a link-local address.
        let solicitation = [133, 0, 0x7b, 0xb8, 0, 0, 0, 0];
        assert!(!wake(&[]).matches(&v6("::", "ff02::2", 58, &solicitation)));
        assert!(!wake(&["icmp"]).matches(&v6("fe80::1", "ff02::2", 58, &solicitation)));
        // An MLDv2 report behind a router alert option.
        let report = [58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0, 0, 0, 0, 0];
        assert!(!wake(&[]).matches(&v6("fd09::2", "fd09::1", 0, &report)));
        // IGMP, mDNS, DHCP.
        assert!(!wake(&[]).matches(&v4(ME, [224, 0, 0, 22], 2, 0)));
        assert!(!wake(&[]).matches(&v4(ME, [10, 9, 0, 1], 2, 0)));
        assert!(!wake(&["udp"]).matches(&v4(ME, [224, 0, 0, 251], 17, 5353)));
        assert!(!wake(&[]).matches(&v4([0; 4], [255; 4], 17, 67)));
        // An echo request is no chatter.
        let echo = v6("fd09::2", "fd09::1", 58, &[128, 0, 0, 0, 0, 1, 0, 1]);
        assert!(wake(&["icmp"]).matches(&echo));
        assert_eq!(describe(&echo), "fd09::2 -> fd09::1 icmp");
    }

    #[test]
    fn rules_look_at_destination_protocol_and_port() {
        let ssh = v4(ME, [10, 1, 2, 3], 6, 22);
        let dns = v4(ME, [10, 1, 2, 3], 17, 53);
        for (rules, by_ssh, by_dns) in [
            (&[][..], true, true),
            (&["10.0.0.0/8"], true, true),
            (&["192.168.0.0/16"], false, false),
            (&["tcp/22"], true, false),
            (&["tcp"], true, false),
            (&["10.1.0.0/16 udp/53"], false, true),
            (&["udp/53 10.1.0.0/16"], false, true),
            (&["10.2.0.0/16 udp/53"], false, false),
            (&["icmp"], false, false),
            (&["icmp", "udp/1-1024"], false, true),
            (&["udp/54-1024", "10.1.2.3"], true, true),
            (&["fd00::/8"], false, false),
        ] {
            let wake = wake(rules);
            assert_eq!((wake.matches(&ssh), wake.matches(&dns)), (by_ssh, by_dns), "{rules:?}");
        }
        let dns6 = v6("fd09::2", "fd09::1", 17, &[0, 9, 0, 53, 0, 8, 0, 0]);
        assert!(wake(&["fd00::/8 udp/53"]).matches(&dns6));
        assert_eq!(describe(&dns6), "fd09::2 -> fd09::1 udp/53");
    }

    #[test]
    fn fragments() {
        let mut first = v4(ME, [10, 9, 0, 1], 17, 53);
        first[6] = 0x20;
        assert!(wake(&["udp/53"]).matches(&first));
        let mut later = first.clone();
        later[7] = 100;
        assert!(!wake(&["udp/53"]).matches(&later), "it has no port");
        assert!(wake(&["udp"]).matches(&later) && wake(&[]).matches(&later));
        let udp = [0, 9, 0, 53, 0, 8, 0, 0];
        let fragment = |offset: u8| {
            let rest = [&[17, 0, 0, offset, 0, 0, 0, 1][..], &udp].concat();
            v6("fd09::2", "fd09::1", 44, &rest)
        };
        assert!(wake(&["udp/53"]).matches(&fragment(1)));
        assert!(!wake(&["udp/53"]).matches(&fragment(8)));
        assert!(wake(&["udp"]).matches(&fragment(8)));
    }

    #[test]
    fn rejected_rules() {
        for (text, why) in [
            ("", "is empty: give"),
            ("  ", "is empty: give"),
            ("10.0.0.1/8", "has host bits set: \"10.0.0.0/8\" was probably meant"),
            ("10.0.0.0/33", "has no valid network: \"10.0.0.0/33\""),
            ("tcp udp", "has two protocols"),
            ("10.0.0.0/8 fd00::/8", "has two networks"),
            ("tcp/0", "has the port \"0\""),
            ("tcp/65536", "has the port \"65536\""),
            ("tcp/+5", "has the port \"+5\""),
            ("tcp/", "has the port \"\""),
            ("tcp/9-8", "has the port \"9-8\""),
            ("icmp/8", "has a port for icmp"),
            ("gre", "has \"gre\", which is no protocol"),
            ("TCP", "has \"TCP\", which is no protocol"),
        ] {
            let said = text.parse::<WakeRule>().expect_err(text);
            assert!(said.starts_with(why), "{text:?}: {said}");
        }
    }

    proptest! {
        #[test]
        fn rules_print_as_they_parse(text in "([0-9a-f:.]{2,12}/[0-9]{1,2})? ?((tcp|udp|icmp)(/[0-9]{1,5}(-[0-9]{1,5})?)?)?") {
            if let Ok(rule) = text.parse::<WakeRule>() {
                prop_assert_eq!(rule.to_string().parse(), Ok(rule));
            }
        }

        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..120), first in any::<u8>()) {
            let mut bytes = bytes;
            if let Some(version) = bytes.first_mut() {
                *version = if first & 1 == 0 { 0x40 | first >> 4 } else { 0x60 };
            }
            let all = Wake::default();
            prop_assert_eq!(all.matches(&bytes), !is_noise(&bytes));
            let _ = describe(&bytes);
        }

        #[test]
        fn a_rule_wakes_for_less_than_none(
            destination in any::<[u8; 4]>(), protocol in 0u8..60, port in any::<u16>(), prefix in 0u8..=32,
        ) {
            let packet = v4(ME, destination, protocol, port);
            let net = IpNet::new(destination.into(), prefix).expect("a prefix").trunc();
            let by_net = Wake::new(vec![WakeRule { net: Some(net), ..WakeRule::default() }]);
            // Its own network matches wherever anything does.
            prop_assert_eq!(by_net.matches(&packet), !is_noise(&packet));
            if port > 0 {
                let by_port: WakeRule = format!("udp/{port}").parse().expect("a rule");
                prop_assert_eq!(Wake::new(vec![by_port]).matches(&packet), protocol == 17 && !is_noise(&packet));
            }
        }
    }
}
