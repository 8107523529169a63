//! What the supervisor changes on the host: the device's addresses and MTU, routes, resolvers. Only differences
//! are applied, so that connections inside the tunnel outlive a change of session.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;

use super::consent::{OnLink, Plan};
use crate::config::client::ClientConfig;
use crate::config::common::DeviceName;
use crate::exit::Outcome;
use crate::net::{
    DnsKeeper, Link, Netlink, Route, RouteFilter, RouteKeeper, RouteKind, Way, device_label, dns,
    quiet_device, sysctl, ways_to,
};
use crate::rigged::point;

/// The host as we have set it up so far. [`clear`](Host::clear), or drop, undoes everything but the device, which
/// goes with its descriptors.
#[derive(Debug)]
pub struct Host {
    device: DeviceName,
    index: u32,
    /// Links that may carry the tunnel.
    carriers: Option<Vec<DeviceName>>,
    netlink: Netlink,
    routes: RouteKeeper,
    protected: Vec<IpAddr>,
    addresses: Vec<IpAddr>,
    mtu: Option<u16>,
    /// What was applied last.
    plan: Option<Plan>,
    dns: Option<DnsKeeper>,
    dns_servers: Vec<IpAddr>,
    dns_state: PathBuf,
    conflicts: Vec<String>,
    told_of_ipv6: bool,
}

/// This host's addresses, and its ways to some servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footing {
    /// The servers.
    pub servers: Vec<SocketAddr>,
    addresses: Vec<(u32, IpNet)>,
    ways: Vec<Vec<(u32, IpAddr)>>,
}

/// A device may come later; a misspelled one never does.
fn warn_of_missing(carriers: &[DeviceName], links: &[Link]) {
    for carrier in carriers.iter().filter(|carrier| links.iter().all(|link| link.name != carrier.as_str())) {
        log::warn!(
            "mobility.carriers: there is no device {carrier} now; it is used when it comes, if that is its name"
        );
    }
}

impl Host {
    /// Takes over the device of `config`, which is there and down, and repairs what a killed run left behind.
    pub fn new(config: &ClientConfig) -> Outcome<Host> {
        let device = &config.device;
        let state = |what: &str| config.state_dir.join(format!("client-{device}.{what}.json"));
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(device.as_str())?;
        // A killed run's resolvers may be behind a tunnel that is gone: no name could be looked up.
        let dns_state = state("dns");
        dns::repair(&dns_state)?;
        let routes = RouteKeeper::new(index, device, state("routes"))?;
        quiet_device(device);
        warn_of_missing(config.mobility.carriers.as_deref().unwrap_or_default(), &netlink.links()?);
        Ok(Host {
            device: device.clone(),
            index,
            carriers: config.mobility.carriers.clone(),
            netlink,
            routes,
            protected: Vec::new(),
            addresses: Vec::new(),
            mtu: None,
            plan: None,
            dns: None,
            dns_servers: Vec::new(),
            dns_state,
            conflicts: Vec::new(),
            told_of_ipv6: false,
        })
    }

    /// Keeps the way to `server` outside the tunnel.
    pub fn protect(&mut self, server: IpAddr) -> Outcome<()> {
        // Bound to its link by its scope, and within no route of ours (see `consent`).
        if matches!(server, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            return Ok(());
        }
        if !self.protected.contains(&server) {
            self.protected.push(server);
        }
        self.routes.protect(server)
    }

    /// Keeps the way to `server` outside the tunnel, and names the links by which it leads, best first; where none is
    /// known that is left to the kernel.
    pub fn ways_out(&mut self, server: SocketAddr) -> Outcome<Vec<String>> {
        self.protect(server.ip())?;
        Ok(self.ways_to(server)?.into_iter().map(|way| way.name).collect())
    }

    /// What connecting to these servers, or to others, depends on; another value says that the host has moved.
    pub fn footing(&mut self, servers: &[SocketAddr]) -> Outcome<Footing> {
        let own = self.index;
        let held = self.netlink.host_addresses()?.into_iter().filter(|held| held.device != own);
        let mut addresses: Vec<(u32, IpNet)> = held.map(|held| (held.device, held.net)).collect();
        addresses.sort_unstable();
        let ways = |server: &SocketAddr| -> Outcome<Vec<(u32, IpAddr)>> {
            Ok(self.ways_to(*server)?.iter().map(|way| (way.index, way.source)).collect())
        };
        let ways = servers.iter().chain(&ANYWHERE).map(ways).collect::<Outcome<_>>()?;
        Ok(Footing { servers: servers.to_vec(), addresses, ways })
    }

    /// Lets go of every protected server that isn't in `keep`.
    pub fn protect_only(&mut self, keep: &[IpAddr]) -> Outcome<()> {
        let (kept, gone): (Vec<_>, Vec<_>) = self.protected.iter().partition(|ip| keep.contains(ip));
        self.protected = kept;
        gone.into_iter().try_for_each(|server| self.routes.unprotect(server))
    }

    /// The network changed: keeps the ways to the servers outside the tunnel as they are now, and the device up.
    pub fn follow_network(&mut self) -> Outcome<()> {
        self.set_up_again()?;
        self.routes.follow()
    }

    /// Somebody set the device down, and with that the kernel took its routes and IPv6 addresses away: what belongs into
    /// the tunnel would go out in clear.
    fn set_up_again(&mut self) -> Outcome<()> {
        let Some(plan) = self.plan.clone() else { return Ok(()) };
        let index = self.index;
        if self.netlink.links()?.iter().any(|link| link.index == index && !link.running) {
            log::warn!(
                "somebody set {} down: it is set up again, with its addresses and routes",
                self.device
            );
            self.addresses.clear();
            self.mtu = None;
            self.apply(&plan)?;
        }
        Ok(())
    }

    /// The links by which `server` is reached, best first.
    pub fn ways_to(&mut self, server: SocketAddr) -> Outcome<Vec<Way>> {
        let wanted = self.carriers.as_deref();
        let mut ways = ways_to(&mut self.netlink, server.ip().to_canonical(), self.index, wanted)?;
        // A link-local address is one of its own link only.
        if let SocketAddr::V6(v6) = server
            && v6.ip().is_unicast_link_local()
        {
            ways.retain(|way| way.index == v6.scope_id());
        }
        Ok(ways)
    }

    /// The devices that have `address`.
    pub fn holders(&mut self, address: IpAddr) -> Outcome<Vec<u32>> {
        let held = self.netlink.host_addresses()?;
        Ok(held.iter().filter(|held| held.net.addr() == address).map(|held| held.device).collect())
    }

    /// Inner addresses on the device.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// The device's index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The networks that other devices are in.
    pub fn lans(&mut self) -> Outcome<Vec<OnLink>> {
        let routes = self.netlink.routes(&RouteFilter::default())?;
        let lans = routes.iter().filter(|route| self.is_lan(route));
        Ok(lans.map(|r| OnLink { net: r.destination, device: device_label(r.device) }).collect())
    }

    /// The route that comes with an address, whoever manages the network: not one somebody made by hand, and none
    /// of another tunnel.
    fn is_lan(&self, route: &Route) -> bool {
        let automatic = [libc::RTPROT_KERNEL, RTPROT_RA, RTPROT_DHCP].contains(&route.protocol);
        let other = route.device != self.index && route.kind == RouteKind::Unicast;
        automatic && other && route.gateway.is_none() && route.destination.prefix_len() > 0
    }

    /// The device holds so many packets for whoever reads it: its ring has as many places as its transmit queue
    /// (tun_queue_resize() in drivers/net/tun.c). What comes beyond is dropped, and counted by the device.
    pub fn set_queue(&mut self, packets: u32) -> Outcome<()> {
        self.netlink.set_queue_len(self.index, packets)
    }

    /// Makes the host what `plan` says.
    pub fn apply(&mut self, plan: &Plan) -> Outcome<()> {
        // 0. What this host can't do at all.
        let v4_only;
        let plan = match self.lacks_ipv6(plan)? {
            true => {
                v4_only = plan.clone().without_ipv6();
                &v4_only
            }
            false => plan,
        };
        // 1. New addresses, before routes that name them as sources.
        for address in plan.addresses.iter().filter(|a| !self.addresses.contains(a)) {
            self.netlink.add_address(self.index, IpNet::from(*address))?;
        }
        if self.mtu != Some(plan.mtu) {
            self.netlink.set_link_up(self.index, plan.mtu)?;
            self.mtu = Some(plan.mtu);
        }
        point("supervisor.addressed");
        // 2. Routes; what somebody else has is said once.
        let conflicts = self.routes.set(&plan.routes, &plan.addresses)?;
        let conflicts = conflicts.iter().map(ToString::to_string);
        let conflicts: Vec<String> = conflicts.chain(plan.kept.iter().map(ToString::to_string)).collect();
        for conflict in conflicts.iter().filter(|c| !self.conflicts.contains(c)) {
            log::warn!("{conflict}");
        }
        self.conflicts = conflicts;
        // 3. Old addresses, after routes that named them.
        for address in self.addresses.iter().filter(|a| !plan.addresses.contains(a)) {
            self.netlink.del_address(self.index, IpNet::from(*address))?;
        }
        self.addresses.clone_from(&plan.addresses);
        self.plan = Some(plan.clone());
        self.set_dns(&plan.dns);
        Ok(())
    }

    /// Whether the plan needs IPv6 beside IPv4 on a host where it is switched off, everywhere, so that nothing of
    /// it can pass the tunnel by either.
    fn lacks_ipv6(&mut self, plan: &Plan) -> Outcome<bool> {
        let both = [IpAddr::is_ipv4, IpAddr::is_ipv6].iter().all(|family| plan.addresses.iter().any(family));
        // The file is missing where the kernel was told to go without (ipv6.disable=1).
        let off = sysctl::read("net/ipv6/conf/all/disable_ipv6")?.is_none_or(|value| value != "0");
        if both && off && !self.told_of_ipv6 {
            log::warn!("IPv6 is switched off on this host: the tunnel carries IPv4 only");
            self.told_of_ipv6 = true;
        }
        Ok(both && off)
    }

    /// Names that can't be looked up inside the tunnel are no reason to be without one.
    fn set_dns(&mut self, servers: &[IpAddr]) {
        if servers == self.dns_servers {
            return;
        }
        if let Some(keeper) = self.dns.take()
            && let Err(failure) = keeper.clear()
        {
            log::warn!("restoring the resolvers: {failure}");
        }
        match DnsKeeper::apply(&self.device, self.index, servers, self.dns_state.clone()) {
            Ok(keeper) => {
                self.dns = keeper;
                self.dns_servers = servers.to_vec();
            }
            Err(failure) => {
                self.dns_servers.clear();
                log::warn!("the server's resolvers are not used: {failure}");
            }
        }
    }

    /// Puts back resolvers and routes.
    pub fn clear(mut self) -> Outcome<()> {
        let dns = self.dns.take().map_or(Ok(()), DnsKeeper::clear);
        dns.and(self.routes.clear())
    }
}

// linux/rtnetlink.h: the prefixes of router advertisements, and those that dhcpcd keeps itself.
const RTPROT_RA: u8 = 9;
const RTPROT_DHCP: u8 = 16;

/// Stands for servers whose names couldn't be looked up (addresses of RFC 5737 and RFC 3849).
const ANYWHERE: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 0),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 0),
];
