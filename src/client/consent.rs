//! What of the server's wishes this machine agrees to. The server is authenticated, and still has no say over
//! the host beyond what the configuration leaves to it.

use std::collections::HashSet;
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
    /// Inner addresses, as hosts: their networks are among the routes where this machine agrees.
    pub addresses: Vec<IpAddr>,
    /// Inner MTU.
    pub mtu: u16,
    /// What is routed into the tunnel: its own networks first.
    pub routes: Vec<IpNet>,
    /// Resolvers.
    pub dns: Vec<IpAddr>,
    /// What is not routed into the tunnel though a user may expect it, for the log.
    pub kept: Vec<Kept>,
}

/// A network of a device beside the tunnel's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OnLink {
    /// The network.
    pub net: IpNet,
    /// The device.
    pub device: String,
}

/// A network that the server would have in the tunnel, and that stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Kept {
    /// It would take over a network of this host.
    Lan(IpNet, OnLink),
    /// It is a public one around an inner address, which only `routes` puts into the tunnel.
    Public(IpNet),
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kept::Lan(net, OnLink { net: lan, device }) => write!(
                f,
                "{net} does not go through the tunnel: it overlaps with {lan} on {device}, which stays as it is; \
                 renumber one of them, or name what you need of it in `routes`"
            ),
            Kept::Public(net) => write!(
                f,
                "{net} does not go through the tunnel: it is a public network, and `routes` doesn't name it"
            ),
        }
    }
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
        self.kept.retain(|kept| match kept {
            Kept::Lan(net, _) | Kept::Public(net) => net.addr().is_ipv4(),
        });
        self
    }
}

/// Checks every value, then picks what the policy allows.
///
/// A wish the configuration doesn't allow is passed over; one that no server should have refuses the lot. `lans` are
/// the networks that this host is in without the tunnel.
pub fn judge(policy: &Policy, wishes: &Wishes, lans: &[OnLink]) -> Result<Plan, Refused> {
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
    let (mut routes, mut kept) = (Vec::new(), Vec::new());
    for net in wishes.addresses.iter().map(IpNet::trunc) {
        // A network of one address is that address, which the kernel routes to us anyway.
        match reason_to_keep(net, policy, lans).filter(|_| !is_host(&net)) {
            // Named in the list, it is routed all the same.
            Some(Kept::Public(_)) if more.iter().any(|m| m.contains(&net)) => {}
            Some(Kept::Lan(..)) if policy.routes != Routes::Pushed && more.contains(&net) => {}
            Some(reason) => kept.push(reason),
            None => routes.push(net),
        }
    }
    for net in more.iter().map(IpNet::trunc) {
        // The user's own list is the user's to answer for.
        match lans.iter().find(|lan| lan.net == net && policy.routes == Routes::Pushed) {
            Some(lan) => kept.push(Kept::Lan(net, lan.clone())),
            None => routes.push(net),
        }
    }
    let (mut seen, mut said) = (HashSet::new(), HashSet::new());
    routes.retain(|net| seen.insert(*net) && !wishes.addresses.iter().any(|a| IpNet::from(a.addr()) == *net));
    kept.retain(|kept| said.insert(kept.clone()));
    Ok(Plan {
        addresses: wishes.addresses.iter().map(IpNet::addr).collect(),
        mtu: wishes.mtu,
        routes,
        dns: if policy.accept_dns { wishes.settings.dns.clone() } else { Vec::new() },
        kept,
    })
}

/// Why the network around an inner address, which is the server's choice, stays out of the tunnel.
///
/// - Public networks are nobody's to take without `routes = "pushed"`.
/// - A LAN goes on working. What equals it or is within it would take it over. Where the server may push routes, a
///   larger network is like a default route: the kernel has the LAN's, which is more specific.
fn reason_to_keep(net: IpNet, policy: &Policy, lans: &[OnLink]) -> Option<Kept> {
    let pushed = policy.routes == Routes::Pushed;
    let takes = |lan: &&OnLink| lan.net.contains(&net) || (!pushed && net.contains(&lan.net));
    if let Some(lan) = lans.iter().find(takes) {
        return Some(Kept::Lan(net, lan.clone()));
    }
    (!pushed && !is_private(&net)).then_some(Kept::Public(net))
}

fn is_host(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// All of `net` is private.
fn is_private(net: &IpNet) -> bool {
    PRIVATE.iter().any(|private| private.to_net().contains(net))
}

fn count(what: &str, number: usize, sane: std::ops::RangeInclusive<usize>) -> Result<(), Refused> {
    if sane.contains(&number) {
        return Ok(());
    }
    Err(Refused(format!("{number} {what} ({} to {} are sane)", sane.start(), sane.end())))
}

/// The network around an address may be routed into the tunnel, so it has to be one that a tunnel can own.
fn check_address(address: &IpNet) -> Result<(), Refused> {
    if let Some(what) = within_special(&IpNet::from(address.addr())) {
        return Err(Refused(format!("the inner address {address}, which is within {what}")));
    }
    let least = match (address, is_private(address)) {
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
            settings: Settings {
                routes: nets(&["0.0.0.0/0", "10.1.0.0/16"]),
                dns: ips(&["10.9.0.1"]),
                idle: None,
            },
            server: IpAddr::from([192, 0, 2, 1]),
        }
    }

    fn judge(policy: &Policy, wishes: &Wishes) -> Result<Plan, Refused> {
        super::judge(policy, wishes, &[])
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

    fn lan(net: &str) -> Vec<OnLink> {
        vec![OnLink { net: net.parse().expect("a network"), device: "eth0".to_owned() }]
    }

    /// The routes around one address, and whether the user is told of one that is missing.
    fn around(routes: &Routes, address: &str, lans: &[OnLink]) -> (Vec<IpNet>, usize) {
        let settings = Settings::default();
        let wishes = Wishes { addresses: nets(&[address]), settings, ..wishes() };
        let policy = Policy { routes: routes.clone(), accept_dns: false };
        let plan = super::judge(&policy, &wishes, lans).expect("a plan");
        assert_eq!(plan.addresses, [wishes.addresses[0].addr()], "the address itself is ours");
        (plan.routes, plan.kept.len())
    }

    #[test]
    fn public_networks_need_pushed_routes() {
        for (address, net, public) in [
            ("10.9.0.2/8", "10.0.0.0/8", false),
            ("100.64.0.2/10", "100.64.0.0/10", false),
            ("fd09::2/64", "fd09::/64", false),
            ("203.0.113.9/24", "203.0.113.0/24", true),
            ("192.168.0.2/16", "192.168.0.0/16", false),
            ("172.31.0.2/16", "172.31.0.0/16", false),
            ("2001:db8::2/32", "2001:db8::/32", true),
        ] {
            assert_eq!(around(&Routes::Pushed, address, &[]), (nets(&[net]), 0), "{address}");
            let expected = if public { (nets(&[]), 1) } else { (nets(&[net]), 0) };
            assert_eq!(around(&Routes::None, address, &[]), expected, "{address}");
        }
        assert_eq!(around(&Routes::None, "203.0.113.9/32", &[]), (nets(&[]), 0), "nothing is missing");
        let list = Routes::List(nets(&["203.0.112.0/22"]));
        assert_eq!(around(&list, "203.0.113.9/24", &[]), (nets(&["203.0.112.0/22"]), 0), "named");
    }

    #[test]
    fn a_lan_keeps_working() {
        // The very LAN, a part of it, and a network around it.
        for (address, net) in [("192.168.1.2/24", "192.168.1.0/24"), ("192.168.1.2/25", "192.168.1.0/25")] {
            assert_eq!(around(&Routes::Pushed, address, &lan("192.168.1.0/24")), (nets(&[]), 1), "{address}");
            assert_eq!(around(&Routes::None, address, &lan("192.168.1.0/24")), (nets(&[]), 1), "{address}");
            assert_eq!(around(&Routes::None, address, &lan("192.168.2.0/24")), (nets(&[net]), 0));
        }
        let larger = ("10.9.0.2/8", lan("10.1.2.0/24"));
        assert_eq!(around(&Routes::Pushed, larger.0, &larger.1), (nets(&["10.0.0.0/8"]), 0));
        assert_eq!(around(&Routes::None, larger.0, &larger.1), (nets(&[]), 1));
        for routes in [Routes::Pushed, Routes::None] {
            assert_eq!(around(&routes, "2001:db8::2/64", &lan("2001:db8::/64")), (nets(&[]), 1));
            assert_eq!(around(&routes, "2001:db8::2/65", &lan("2001:db8::/64")), (nets(&[]), 1));
        }
        // A pushed route is no different, but a part of the LAN may be meant.
        let push = |route: &str| {
            let settings = Settings { routes: nets(&[route]), ..Settings::default() };
            let wishes = Wishes { addresses: nets(&["fd09::2/128"]), settings, ..wishes() };
            super::judge(&pushed(), &wishes, &lan("192.168.1.0/24")).expect("a plan").routes
        };
        assert_eq!(push("192.168.1.0/24"), nets(&[]));
        for route in ["192.168.1.7/32", "192.168.0.0/16", "0.0.0.0/0"] {
            assert_eq!(push(route), nets(&[route]));
        }
        // What the user names is routed, and needs no word.
        let named = Routes::List(nets(&["192.168.1.0/24"]));
        let lan = lan("192.168.1.0/24");
        assert_eq!(around(&named, "192.168.1.2/24", &lan), (nets(&["192.168.1.0/24"]), 0));
    }

    #[test]
    fn the_user_reads_which_network_stays() {
        let kept = Kept::Lan("192.168.1.0/24".parse().expect("a network"), lan("192.168.0.0/16").remove(0));
        let text = kept.to_string();
        assert!(text.contains("192.168.1.0/24") && text.contains("192.168.0.0/16 on eth0"), "{text}");
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
            // Private, in networks that aren't.
            "192.168.0.2/15",
            "172.16.0.2/8",
            "100.64.0.2/8",
            "::/64",
            "::1/128",
            "::ffff:10.9.0.2/120",
            "fe80::1/64",
            "ff02::1/64",
            "fd00::2/8",
            "fd00::2/6",
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
            settings: Settings { routes: nets(&[route]), ..Settings::default() },
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
            Wishes { settings: Settings { routes, ..Settings::default() }, ..wishes() }
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
            let wishes =
                Wishes { settings: Settings { dns: dns.clone(), ..Settings::default() }, ..wishes() };
            assert_eq!(judge(&pushed(), &wishes).is_ok(), fine, "{dns:?}");
        }
    }
}
