//! What of the server's wishes this machine agrees to. The server is authenticated, and still has no say over
//! the host beyond what the configuration leaves to it.

use std::fmt;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::ipc::Wishes;
use crate::config::client::{ClientConfig, Routes};
use crate::wire::control::{MAX_ADDRESSES, MAX_RESOLVERS, MAX_ROUTES, MAX_SUBNETS};

/// What the configuration leaves to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Which routes.
    pub routes: Routes,
    /// Resolvers.
    pub accept_dns: bool,
}

impl Policy {
    /// The policy that `config` states.
    pub fn of(config: &ClientConfig) -> Policy {
        Policy { routes: config.routes.clone(), accept_dns: config.accept_dns }
    }
}

/// What the host is to be set up as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Inner addresses, as hosts: the networks they are in are among the routes.
    pub addresses: Vec<IpAddr>,
    /// Inner MTU.
    pub mtu: u16,
    /// What is routed into the tunnel: its own networks first.
    pub routes: Vec<IpNet>,
    /// Resolvers.
    pub dns: Vec<IpAddr>,
}

/// A wish that nobody should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused what the server asks for: {}", self.0)
    }
}

impl Plan {
    /// What is left of it on a host that has no IPv6.
    pub fn without_ipv6(mut self) -> Plan {
        self.addresses.retain(IpAddr::is_ipv4);
        self.routes.retain(|net| net.addr().is_ipv4());
        self.dns.retain(IpAddr::is_ipv4);
        self
    }
}

/// Checks every value, then picks what the policy allows.
///
/// A wish the configuration doesn't allow is passed over; one that no server should have refuses the lot.
pub fn judge(policy: &Policy, wishes: &Wishes) -> Result<Plan, Refused> {
    let no = |text: String| Err(Refused(text));
    if !(MTU_LEAST..=MTU_MOST).contains(&wishes.mtu) {
        return no(format!("an MTU of {} ({MTU_LEAST} to {MTU_MOST} are sane)", wishes.mtu));
    }
    count("inner addresses", wishes.addresses.len(), 1..=MAX_ADDRESSES)?;
    count("subnets", wishes.subnets.len(), 0..=MAX_SUBNETS)?;
    count("routes", wishes.settings.routes.len(), 0..=MAX_ROUTES)?;
    count("resolvers", wishes.settings.dns.len(), 0..=MAX_RESOLVERS)?;
    for address in &wishes.addresses {
        check_address(address)?;
    }
    for net in wishes.settings.routes.iter().chain(&wishes.subnets) {
        if let Some(what) = within_special(net) {
            return no(format!("the route {net}, which is within {what}"));
        }
    }
    for resolver in &wishes.settings.dns {
        if within_special(&IpNet::from(*resolver)).is_some() {
            return no(format!("the resolver {resolver}"));
        }
    }
    let more = match &policy.routes {
        Routes::Pushed => &wishes.settings.routes[..],
        Routes::None => &[],
        Routes::List(list) => &list[..],
    };
    let mut routes: Vec<IpNet> = Vec::new();
    for net in wishes.addresses.iter().chain(more).map(IpNet::trunc) {
        // A network of one address is that address, which the kernel routes to us anyway.
        let ours = wishes.addresses.iter().any(|a| IpNet::from(a.addr()) == net);
        if !ours && !routes.contains(&net) {
            routes.push(net);
        }
    }
    Ok(Plan {
        addresses: wishes.addresses.iter().map(IpNet::addr).collect(),
        mtu: wishes.mtu,
        routes,
        dns: if policy.accept_dns { wishes.settings.dns.clone() } else { Vec::new() },
    })
}

fn count(what: &str, number: usize, sane: std::ops::RangeInclusive<usize>) -> Result<(), Refused> {
    if sane.contains(&number) {
        return Ok(());
    }
    Err(Refused(format!("{number} {what} ({} to {} are sane)", sane.start(), sane.end())))
}

/// The network around an address is routed into the tunnel whatever `routes` says, so it has to be one that a
/// tunnel can own.
fn check_address(address: &IpNet) -> Result<(), Refused> {
    if let Some(what) = within_special(&IpNet::from(address.addr())) {
        return Err(Refused(format!("the inner address {address}, which is within {what}")));
    }
    let private = PRIVATE.iter().any(|net| net.to_net().contains(&address.addr()));
    let least = match (address, private) {
        (IpNet::V4(_), true) => 8,
        (IpNet::V4(_), false) => 16,
        (IpNet::V6(_), true) => 16,
        (IpNet::V6(_), false) => 32,
    };
    if address.prefix_len() < least {
        let text = format!("the inner address {address}, whose network is larger than a /{least}");
        return Err(Refused(text));
    }
    Ok(())
}

/// What no route into a tunnel leads to, if `net` is within it. Larger networks may hold such addresses: the
/// kernel has more specific routes for them.
fn within_special(net: &IpNet) -> Option<&'static str> {
    SPECIAL.iter().find(|(special, _)| special.to_net().contains(net)).map(|(_, what)| *what)
}

enum Known {
    V4([u8; 4], u8),
    V6([u16; 8], u8),
}

impl Known {
    fn to_net(&self) -> IpNet {
        match self {
            Known::V4(a, prefix) => IpNet::V4(Ipv4Net::new_assert((*a).into(), *prefix)),
            Known::V6(a, prefix) => IpNet::V6(Ipv6Net::new_assert((*a).into(), *prefix)),
        }
    }
}

const SPECIAL: [(Known, &str); 9] = [
    (Known::V4([0, 0, 0, 0], 8), "0.0.0.0/8 (\"this network\")"),
    (Known::V4([127, 0, 0, 0], 8), "127.0.0.0/8 (loopback)"),
    (Known::V4([169, 254, 0, 0], 16), "169.254.0.0/16 (link-local)"),
    (Known::V4([224, 0, 0, 0], 4), "224.0.0.0/4 (multicast)"),
    (Known::V4([255, 255, 255, 255], 32), "255.255.255.255/32 (broadcast)"),
    (Known::V6([0, 0, 0, 0, 0, 0, 0, 0], 127), "::/127 (unspecified and loopback)"),
    // Sockets take these for IPv4.
    (Known::V6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96), "::ffff:0:0/96 (mapped IPv4)"),
    (Known::V6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), "fe80::/10 (link-local)"),
    (Known::V6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), "ff00::/8 (multicast)"),
];

/// RFC 1918, RFC 6598 and RFC 4193.
const PRIVATE: [Known; 5] = [
    Known::V4([10, 0, 0, 0], 8),
    Known::V4([172, 16, 0, 0], 12),
    Known::V4([192, 168, 0, 0], 16),
    Known::V4([100, 64, 0, 0], 10),
    Known::V6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
];

/// What every IPv4 host takes in one piece (RFC 791).
const MTU_LEAST: u16 = 576;
const MTU_MOST: u16 = 65_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::Settings;

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().expect("a network")).collect()
    }

    fn ips(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|ip| ip.parse().expect("an address")).collect()
    }

    fn wishes() -> Wishes {
        Wishes {
            addresses: nets(&["10.9.0.2/24", "fd09::2/64"]),
            mtu: 1420,
            subnets: nets(&["192.168.7.0/24"]),
            settings: Settings { routes: nets(&["0.0.0.0/0", "10.1.0.0/16"]), dns: ips(&["10.9.0.1"]) },
            server: IpAddr::from([192, 0, 2, 1]),
        }
    }

    fn pushed() -> Policy {
        Policy { routes: Routes::Pushed, accept_dns: true }
    }

    #[test]
    fn the_configuration_decides() {
        let plan = judge(&pushed(), &wishes()).expect("a plan");
        assert_eq!(plan.addresses, ips(&["10.9.0.2", "fd09::2"]));
        assert_eq!(plan.routes, nets(&["10.9.0.0/24", "fd09::/64", "0.0.0.0/0", "10.1.0.0/16"]));
        assert_eq!((plan.dns, plan.mtu), (ips(&["10.9.0.1"]), 1420));

        let none = Policy { routes: Routes::None, accept_dns: false };
        let plan = judge(&none, &wishes()).expect("a plan");
        assert_eq!(plan.routes, nets(&["10.9.0.0/24", "fd09::/64"]));
        assert_eq!(plan.dns, ips(&[]));

        let list = Policy { routes: Routes::List(nets(&["10.2.0.0/16"])), accept_dns: true };
        let plan = judge(&list, &wishes()).expect("a plan");
        assert_eq!(plan.routes, nets(&["10.9.0.0/24", "fd09::/64", "10.2.0.0/16"]));
    }

    #[test]
    fn our_own_address_is_no_route() {
        let wishes = Wishes { addresses: nets(&["10.9.0.2/32"]), ..wishes() };
        let none = Policy { routes: Routes::None, accept_dns: false };
        assert_eq!(judge(&none, &wishes).expect("a plan").routes, nets(&[]));
    }

    #[test]
    fn addresses_accepted_and_refused() {
        for address in
            ["10.0.0.2/8", "100.64.0.9/10", "203.0.113.9/24", "198.51.0.1/16", "fd00::2/16", "2001:db8::2/32"]
        {
            let wishes = Wishes { addresses: nets(&[address]), ..wishes() };
            assert!(judge(&pushed(), &wishes).is_ok(), "{address}");
        }
        for address in [
            "0.0.0.0/24",
            "127.0.0.1/8",
            "169.254.1.1/16",
            "224.0.0.1/24",
            "255.255.255.255/32",
            "10.0.0.2/7",
            "10.9.0.2/0",
            "203.0.113.9/15",
            "::/64",
            "::1/128",
            "::ffff:10.9.0.2/120",
            "fe80::1/64",
            "ff02::1/64",
            "fd00::2/8",
            "2001:db8::2/31",
            "2001:db8::2/0",
        ] {
            let wishes = Wishes { addresses: nets(&[address]), ..wishes() };
            assert!(judge(&pushed(), &wishes).is_err(), "{address}");
        }
    }

    #[test]
    fn routes_accepted_and_refused() {
        let with = |route: &str| Wishes {
            settings: Settings { routes: nets(&[route]), dns: Vec::new() },
            ..wishes()
        };
        for route in ["0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "10.9.9.9/32", "::/0", "::/1", "2000::/3"] {
            assert!(judge(&pushed(), &with(route)).is_ok(), "{route}");
        }
        for route in [
            "0.0.0.0/8",
            "127.0.0.0/8",
            "127.0.0.1/32",
            "169.254.0.0/16",
            "169.254.169.254/32",
            "224.0.0.0/4",
            "239.1.2.3/32",
            "255.255.255.255/32",
            "::1/128",
            "::/128",
            "::ffff:0:0/96",
            "fe80::/10",
            "fe80::/64",
            "ff00::/8",
            "ff02::fb/128",
        ] {
            assert!(judge(&pushed(), &with(route)).is_err(), "{route}");
            // Not even where it would have been passed over.
            let none = Policy { routes: Routes::None, accept_dns: false };
            assert!(judge(&none, &with(route)).is_err(), "{route}");
        }
    }

    #[test]
    fn numbers_accepted_and_refused() {
        for mtu in [0, 575, 65_001, u16::MAX] {
            assert!(judge(&pushed(), &Wishes { mtu, ..wishes() }).is_err(), "{mtu}");
        }
        for mtu in [576, 1280, 1420, 9_000, 65_000] {
            assert!(judge(&pushed(), &Wishes { mtu, ..wishes() }).is_ok(), "{mtu}");
        }
        let many = |n: usize| (0..n).map(|i| IpNet::from(IpAddr::from([10, 8, i as u8, 1])));
        for (n, fine) in [(0, false), (1, true), (4, true), (5, false)] {
            assert_eq!(judge(&pushed(), &Wishes { addresses: many(n).collect(), ..wishes() }).is_ok(), fine);
        }
        let many_routes = |n: usize| {
            let routes =
                (0..n).map(|i| IpNet::from(IpAddr::from([10, (i >> 8) as u8, i as u8, 1]))).collect();
            Wishes { settings: Settings { routes, dns: Vec::new() }, ..wishes() }
        };
        assert!(judge(&pushed(), &many_routes(256)).is_ok());
        assert!(judge(&pushed(), &many_routes(257)).is_err());
        for (dns, fine) in [
            (ips(&["10.9.0.1"; 8]), true),
            (ips(&["10.9.0.1"; 9]), false),
            (ips(&["127.0.0.53"]), false),
            (ips(&["0.0.0.0"]), false),
            (ips(&["fe80::1"]), false),
        ] {
            let wishes = Wishes { settings: Settings { routes: Vec::new(), dns: dns.clone() }, ..wishes() };
            assert_eq!(judge(&pushed(), &wishes).is_ok(), fine, "{dns:?}");
        }
    }
}
