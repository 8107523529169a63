//! The client's routes.
//!
//! ```text
//!   app -> 0.0.0.0/1, 128.0.0.0/1, ...  dev tg0                (into the tunnel; gone with the device)
//!   tg0 -> 192.0.2.1/32 via GATEWAY     dev eth0  metric N     (the server, outside it; journalled)
//!          192.0.2.1/32 via GATEWAY     dev wlan0 metric N + 2^16, for sockets that are bound to wlan0; and so on
//!          unreachable 192.0.2.1/32     metric 2^31 + N        (the server, when the line above is gone)
//! ```
//!
//! - A default route is installed as two halves: more specific than the host's own default route, so that one
//!   stays as it is, whoever manages it may change it, and it is in charge again the moment the halves go.
//! - The host route keeps the tunnel's own datagrams out of the tunnel. When its device goes down the kernel
//!   drops it; without the `unreachable` route behind it those datagrams would then be routed into the tunnel,
//!   sealed again, and so on.
//! - Each link that leads to the server has a host route of its own, the best one first: see
//!   [`carriers`](super::carriers).
//! - N is the tunnel device's index, so two tunnels to one server have a host route each, and a route the
//!   administrator made (usually with metric 0 on IPv4) isn't ours to take over or remove.
//! - The server's address itself is never routed into the tunnel.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::carriers::{MAX_WAYS, leads_out, links, routes_to};
use super::netlink::{Netlink, PROTOCOL, Route, RouteFilter, RouteKind};
use super::state;
use crate::config::common::DeviceName;
use crate::exit::{Failure, Outcome};
use crate::rigged::point;

/// A destination that could not be routed into the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// What was asked for.
    pub destination: IpNet,
    /// The route that has it; none where it is the server's own address.
    pub holder: Option<Route>,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.holder {
            Some(route) => write!(
                f,
                "{} does not go through the tunnel: the route {route} has it; remove that one, or leave this \
                 destination out",
                self.destination
            ),
            None => write!(f, "{} does not go through the tunnel: it is the server itself", self.destination),
        }
    }
}

/// Keeps a client's routes: [`set`](RouteKeeper::set) what goes into the tunnel,
/// [`protect`](RouteKeeper::protect) each server, and [`follow`](RouteKeeper::follow) whenever the network changed.
/// [`clear`](RouteKeeper::clear), or drop, removes everything.
#[derive(Debug)]
pub struct RouteKeeper {
    netlink: Netlink,
    device: u32,
    name: DeviceName,
    state_file: PathBuf,
    servers: Vec<IpAddr>,
    /// Those of them there is no way to.
    unreachable: Vec<IpAddr>,
    tunnel: Vec<IpNet>,
    journal: Journal,
}

/// What `state_file` holds: host routes that are there, or were about to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Journal {
    /// Routes don't outlive the kernel they were made in.
    boot_id: String,
    device: String,
    host_routes: Vec<Route>,
}

impl RouteKeeper {
    /// A keeper for the tunnel device; removes what a killed run with the same state file left behind.
    pub fn new(device_index: u32, device: &DeviceName, state_file: PathBuf) -> Outcome<RouteKeeper> {
        repair(&state_file)?;
        Ok(RouteKeeper {
            netlink: Netlink::open()?,
            device: device_index,
            name: device.clone(),
            state_file,
            servers: Vec::new(),
            unreachable: Vec::new(),
            tunnel: Vec::new(),
            journal: Journal {
                boot_id: state::boot_id(),
                device: device.to_string(),
                host_routes: Vec::new(),
            },
        })
    }

    /// Keeps the way to `server` outside the tunnel, from now on and by the present gateway. Where no tunnel
    /// route covers it there is nothing to do until one does. Without any way to it, it is made unreachable
    /// until the next call.
    pub fn protect(&mut self, server: IpAddr) -> Outcome<()> {
        let server = server.to_canonical();
        if !self.servers.contains(&server) {
            self.servers.push(server);
        }
        self.protect_covered()
    }

    /// The network changed: makes the ways to all protected servers what they should be now.
    pub fn follow(&mut self) -> Outcome<()> {
        self.protect_covered()
    }

    /// No longer keeps the way to `server`.
    pub fn unprotect(&mut self, server: IpAddr) -> Outcome<()> {
        let server = server.to_canonical();
        self.servers.retain(|s| *s != server);
        self.unreachable.retain(|s| *s != server);
        self.release_others()
    }

    /// Makes `destinations` the routes into the tunnel: what is missing is added, what is there and not wanted
    /// is removed, what fits stays untouched. `sources` are our inner addresses, the first of a family becomes
    /// the preferred source of its routes.
    ///
    /// Destinations that something else has already, such as the very same LAN prefix, come back as conflicts;
    /// all others are in place then. The caller says whether that is a warning or the end.
    pub fn set(&mut self, destinations: &[IpNet], sources: &[IpAddr]) -> Outcome<Vec<Conflict>> {
        let mut conflicts = Vec::new();
        let mut wanted: Vec<Route> = Vec::new();
        for destination in destinations.iter().copied().flat_map(halve_default) {
            let mut route = Route::new(destination, self.device);
            let v6 = destination.addr().is_ipv6();
            // A LAN's own IPv6 prefix has metric 256: what is told to go into the tunnel must come before it.
            route.metric = v6.then_some(1);
            route.source = sources.iter().copied().find(|source| source.is_ipv6() == v6);
            if self.servers.iter().any(|server| IpNet::from(*server) == destination) {
                conflicts.push(Conflict { destination, holder: None });
            } else if !wanted.contains(&route) {
                wanted.push(route);
            }
        }

        // The servers first: not one datagram may find the tunnel route without them.
        self.tunnel = wanted.iter().map(|route| route.destination).collect();
        self.protect_covered()?;

        let there = self.tunnel_routes()?;
        for route in &wanted {
            let same_place = |r: &&Route| {
                r.destination == route.destination && r.effective_metric() == route.effective_metric()
            };
            match there.iter().find(same_place) {
                Some(held) if held.source == route.source && held.gateway.is_none() => {}
                Some(_) => self.netlink.replace_route(route)?,
                None if self.netlink.try_add_route(route)? => {}
                None => match self.netlink.route_in_the_way(route)? {
                    // The prefix of the tunnel device's own address.
                    Some(holder) if holder.device == self.device => {}
                    holder => {
                        conflicts.push(Conflict { destination: route.destination, holder });
                    }
                },
            }
            point("supervisor.routes-half");
        }
        for route in there.iter().filter(|held| !self.tunnel.contains(&held.destination)) {
            self.netlink.del_route(route)?;
        }
        self.release_others()?;
        Ok(conflicts)
    }

    /// Removes every route of ours. The keeper can be used again afterwards.
    pub fn clear(&mut self) -> Outcome<()> {
        self.tunnel.clear();
        self.servers.clear();
        self.unreachable.clear();
        let mut result = Ok(());
        for route in self.tunnel_routes()? {
            result = result.and(self.netlink.del_route(&route));
            point("supervisor.routes-half-gone");
        }
        result.and(self.release_others())
    }

    fn tunnel_routes(&mut self) -> Outcome<Vec<Route>> {
        self.netlink.routes(&RouteFilter {
            device: Some(self.device),
            protocol: Some(PROTOCOL),
            ..RouteFilter::default()
        })
    }

    /// Makes the host routes of every server that a tunnel route covers what they should be now.
    fn protect_covered(&mut self) -> Outcome<()> {
        for server in self.servers.clone() {
            if self.covered(server) {
                self.protect_now(server)?;
            }
        }
        Ok(())
    }

    fn covered(&self, server: IpAddr) -> bool {
        self.tunnel.iter().any(|net| net.contains(&server))
    }

    fn protect_now(&mut self, server: IpAddr) -> Outcome<()> {
        // One of our own addresses: the kernel's local table comes before every route.
        let Some(mut planned) = self.ways_outside(server)? else { return Ok(()) };
        self.note_reachable(server, !planned.is_empty());
        let mut guard = Route::new(server.into(), 0);
        guard.kind = RouteKind::Unreachable;
        guard.metric = Some(GUARD_METRIC.saturating_add(self.device));
        planned.push(guard);

        self.journal_also(&planned)?;
        point("supervisor.host-routes-noted");
        for route in &planned {
            self.install_host_route(route)?;
            point("supervisor.host-routes-half");
        }
        self.remove_host_routes(|held| {
            held.destination.addr() == server && planned.iter().all(|route| route.metric != held.metric)
        })
    }

    /// Says so once.
    fn note_reachable(&mut self, server: IpAddr, reachable: bool) {
        let was_reachable = !self.unreachable.contains(&server);
        if was_reachable && !reachable {
            log::warn!("there is no route to {server} outside {}: it is unreachable for now", self.name);
            self.unreachable.push(server);
        } else if reachable {
            self.unreachable.retain(|s| *s != server);
        }
    }

    fn install_host_route(&mut self, route: &Route) -> Outcome<()> {
        if self.netlink.try_add_route(route)? {
            return Ok(());
        }
        match self.netlink.route_in_the_way(route)? {
            // Ours, perhaps by another gateway by now.
            Some(held) if held.protocol == PROTOCOL => {
                if held.gateway != route.gateway || held.device != route.device {
                    self.netlink.replace_route(route)?;
                }
                Ok(())
            }
            // Somebody else's that does the same: theirs to remove.
            Some(held) if held.gateway == route.gateway && held.device == route.device => Ok(()),
            Some(held) => Err(Failure::system(
                format!("adding host route {route}"),
                format_args!("the route {held} has its place; remove that one"),
            )),
            None => self.netlink.add_route(route),
        }
    }

    /// How the server is reached without the tunnel: a host route for each link that leads to it, the best one first;
    /// `None` where it is this host itself.
    fn ways_outside(&mut self, server: IpAddr) -> Outcome<Option<Vec<Route>>> {
        let host = IpNet::from(server);
        let links = links(&mut self.netlink)?;
        let leads_out = |route: &Route| leads_out(route.device, self.device, &links);
        // 1. What the main table says without our routes. Links without a carrier are better than nothing.
        let routes = routes_to(&mut self.netlink, server, self.device)?;
        let (running, silent): (Vec<Route>, Vec<Route>) = routes.into_iter().partition(leads_out);
        let mut ways = if running.is_empty() { silent } else { running };
        // 2. As long as nothing of ours is in the way, the kernel's own answer is the best: it knows all tables.
        if !self.journal.host_routes.iter().any(|r| r.destination == host)
            && let Some(to) = self.netlink.route_to(server)?
        {
            if to.local {
                return Ok(None);
            }
            let route = Route { gateway: to.gateway, ..Route::new(host, to.device) };
            if to.device != self.device && (leads_out(&route) || ways.is_empty()) {
                ways.retain(|way| way.device != to.device);
                ways.insert(0, route);
            }
        }
        ways.truncate(MAX_WAYS);
        Ok(Some((0..).zip(ways).map(|(place, way)| self.host_route(host, place, &way)).collect()))
    }

    /// The host route at this place among those to one server.
    fn host_route(&self, host: IpNet, place: u32, way: &Route) -> Route {
        let metric = Some(self.device.saturating_add(place << 16));
        Route { gateway: way.gateway, metric, ..Route::new(host, way.device) }
    }

    /// Removes the host routes of servers that are no longer protected or no longer covered.
    fn release_others(&mut self) -> Outcome<()> {
        let servers: Vec<IpAddr> = self.servers.iter().copied().filter(|s| self.covered(*s)).collect();
        self.remove_host_routes(|held| !servers.contains(&held.destination.addr()))
    }

    fn remove_host_routes(&mut self, gone: impl Fn(&Route) -> bool) -> Outcome<()> {
        let (gone, kept): (Vec<Route>, Vec<Route>) = self.journal.host_routes.iter().cloned().partition(gone);
        for route in &gone {
            self.netlink.del_route(&by_place(route))?;
        }
        if !gone.is_empty() || kept.is_empty() {
            self.journal.host_routes = kept;
            self.store_journal()?;
        }
        Ok(())
    }

    /// Writes down what is about to be installed. A route is known by destination and metric: those are also
    /// what it is removed by, so that a change of gateway can't leave a second one behind.
    fn journal_also(&mut self, routes: &[Route]) -> Outcome<()> {
        let before = self.journal.clone();
        for route in routes {
            self.journal
                .host_routes
                .retain(|r| (r.destination, r.metric) != (route.destination, route.metric));
            self.journal.host_routes.push(route.clone());
        }
        if self.journal != before { self.store_journal() } else { Ok(()) }
    }

    fn store_journal(&self) -> Outcome<()> {
        match self.journal.host_routes.is_empty() {
            true => state::remove(&self.state_file),
            false => state::store(&self.state_file, &self.journal),
        }
    }
}

impl Drop for RouteKeeper {
    fn drop(&mut self) {
        if let Err(e) = self.clear() {
            log::warn!("removing routes of {}: {e}", self.name);
        }
    }
}

/// Removes the host routes a killed run noted in `state_file`, where they still are there and ours.
pub fn repair(state_file: &Path) -> Outcome<()> {
    let Some(journal) = state::load::<Journal>(state_file)? else {
        return state::remove(state_file);
    };
    if journal.boot_id == state::boot_id() {
        let mut netlink = Netlink::open()?;
        for route in &journal.host_routes {
            log::info!(
                "removing the host route to {}, which a killed run on {} left behind",
                route.destination,
                journal.device
            );
            netlink.del_route(&by_place(route))?;
        }
    }
    state::remove(state_file)
}

/// What identifies a route of ours, wherever it leads by now.
fn by_place(route: &Route) -> Route {
    Route { device: 0, gateway: None, source: None, protocol: PROTOCOL, ..route.clone() }
}

/// Both halves of a default route; anything else as it is.
fn halve_default(destination: IpNet) -> Vec<IpNet> {
    let destination = destination.trunc();
    if destination.prefix_len() > 0 {
        return vec![destination];
    }
    match destination {
        IpNet::V4(_) => Ipv4Net::default().subnets(1).map(|halves| halves.map(IpNet::V4).collect()),
        IpNet::V6(_) => Ipv6Net::default().subnets(1).map(|halves| halves.map(IpNet::V6).collect()),
    }
    .unwrap_or_default()
}

/// Behind every metric in use; the device's index is added.
const GUARD_METRIC: u32 = 1 << 31;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_become_halves() {
        let nets = |list: &[&str]| list.iter().map(|n| n.parse().expect("net")).collect::<Vec<IpNet>>();
        assert_eq!(halve_default("0.0.0.0/0".parse().expect("net")), nets(&["0.0.0.0/1", "128.0.0.0/1"]));
        assert_eq!(halve_default("::/0".parse().expect("net")), nets(&["::/1", "8000::/1"]));
        assert_eq!(halve_default("10.1.2.3/8".parse().expect("net")), nets(&["10.0.0.0/8"]));
    }
}
