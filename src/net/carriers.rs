//! The links by which a server can be reached outside the tunnel.
//!
//! A socket that is bound to a link is routed by that link only, whatever other route would be better. Of the main
//! table it is the routes by other links that are passed over; an unreachable route in between is not (IPv4,
//! fib_table_lookup() in net/ipv4/fib_trie.c), and then the kernel takes the server for on-link. So each link needs its
//! own host route where the servers are kept out of the tunnel: [`RouteKeeper`](super::RouteKeeper) sees to it, and
//! [`ways_to`] comes after it.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::netlink::{HostAddress, Link, Netlink, PROTOCOL, Route, RouteFilter, RouteKind};
use crate::config::common::DeviceName;
use crate::exit::Outcome;

/// A link by which the server can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// The link's index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The address the kernel would send from.
    pub source: IpAddr,
    /// Metric of the route.
    pub metric: u32,
}

/// The links by which the kernel would reach `server` if the socket is bound to them, best first, without
/// `own_device`; with `wanted` only those, in that order. An address of this host has one, the loopback device.
pub fn ways_to(
    netlink: &mut Netlink,
    server: IpAddr,
    own_device: u32,
    wanted: Option<&[DeviceName]>,
) -> Outcome<Vec<Way>> {
    let links = links(netlink)?;
    let unbound = netlink.route_to(server)?;
    if let Some(local) = unbound.as_ref().filter(|to| to.local) {
        let way = links.get(&local.device).filter(|link| link.running);
        let way = way.map(|link| Way::new(link, local.source.unwrap_or(server), 0));
        return Ok(way.into_iter().collect());
    }
    // 1. Links with a route to it. The kernel's own choice may come from another table than the main one.
    let mut routes = routes_to(netlink, server, own_device)?;
    routes.retain(|route| leads_out(route.device, own_device, &links));
    if let Some(to) = unbound.filter(|to| leads_out(to.device, own_device, &links)) {
        match routes.iter().position(|route| route.device == to.device) {
            Some(place) => routes[..=place].rotate_right(1),
            None => {
                let route = Route { gateway: to.gateway, ..Route::new(server.into(), to.device) };
                routes.insert(0, route);
            }
        }
    }
    // 2. Of these the wanted ones.
    if let Some(wanted) = wanted {
        let place = |route: &Route| {
            let name = &links.get(&route.device)?.name;
            wanted.iter().position(|wanted| wanted.as_str() == name)
        };
        routes.retain(|route| place(route).is_some());
        routes.sort_by_key(place);
    }
    // 3. Of these the ones that have an address to send from.
    let addresses = netlink.host_addresses()?;
    let mut ways = Vec::new();
    for route in routes {
        let (Some(to), Some(link)) =
            (netlink.route_to_by(server, Some(route.device))?, links.get(&route.device))
        else {
            continue;
        };
        // Taken for on-link, because something bars the way to the gateway.
        let barred = route.gateway.is_some() && to.gateway.is_none();
        let source = to.source.filter(|source| may_send_from(*source, link, &addresses, &links));
        if let Some(source) = source.filter(|_| !to.local && to.device == route.device && !barred) {
            ways.push(Way::new(link, source, route.effective_metric()));
        }
    }
    ways.truncate(MAX_WAYS);
    Ok(ways)
}

/// All links by index.
pub(super) fn links(netlink: &mut Netlink) -> Outcome<HashMap<u32, Link>> {
    Ok(netlink.links()?.into_iter().map(|link| (link.index, link)).collect())
}

/// The best route to `server` by each device but `own_device`, best first, in the main table and without the host
/// routes that were made for it.
pub(super) fn routes_to(netlink: &mut Netlink, server: IpAddr, own_device: u32) -> Outcome<Vec<Route>> {
    let filter = RouteFilter { v6: Some(server.is_ipv6()), ..RouteFilter::default() };
    let host = IpNet::from(server);
    let mut routes = netlink.routes(&filter)?;
    routes.retain(|route| {
        route.kind == RouteKind::Unicast
            && route.device != own_device
            && route.destination.contains(&server)
            && !(route.destination == host && route.protocol == PROTOCOL)
    });
    Ok(best_of_each(routes))
}

/// Whether packets get out by this device, and not into our own tunnel.
pub(super) fn leads_out(device: u32, own_device: u32, links: &HashMap<u32, Link>) -> bool {
    device != own_device && links.get(&device).is_some_and(|link| link.running && !link.loopback)
}

/// Of each device the best route, all in the order of preference.
fn best_of_each(mut routes: Vec<Route>) -> Vec<Route> {
    routes.sort_by_key(|route| (Reverse(route.destination.prefix_len()), route.effective_metric()));
    let mut best: Vec<Route> = Vec::new();
    for route in routes {
        if best.iter().all(|better| better.device != route.device) {
            best.push(route);
        }
    }
    best
}

/// Only an address of the link itself, or of the loopback device, as unnumbered links have it: answers to another
/// link's would not come back by this one. And one that is not there yet, as far as others know, can't be used.
fn may_send_from(source: IpAddr, link: &Link, addresses: &[HostAddress], links: &HashMap<u32, Link>) -> bool {
    addresses.iter().filter(|held| held.net.addr() == source).any(|held| {
        let loopback = links.get(&held.device).is_some_and(|link| link.loopback);
        held.usable && (held.device == link.index || loopback)
    })
}

impl Way {
    fn new(link: &Link, source: IpAddr, metric: u32) -> Way {
        Way { index: link.index, name: link.name.clone(), source, metric }
    }
}

/// More links than these are not used at once.
pub const MAX_WAYS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, device: u32, metric: u32) -> Route {
        Route { metric: Some(metric), ..Route::new(destination.parse().expect("a network"), device) }
    }

    #[test]
    fn the_longest_prefix_comes_first_then_the_lowest_metric() {
        let routes = vec![
            route("0.0.0.0/0", 2, 600),
            route("0.0.0.0/0", 3, 100),
            route("192.0.2.0/24", 4, 900),
            route("192.0.0.0/16", 2, 0),
            route("0.0.0.0/0", 4, 50),
        ];
        let best: Vec<(u32, u8)> =
            best_of_each(routes).iter().map(|r| (r.device, r.destination.prefix_len())).collect();
        assert_eq!(best, [(4, 24), (2, 16), (3, 0)]);
    }

    #[test]
    fn sources_belong_to_their_link_and_are_ready() {
        let link = |index, loopback| Link { index, name: format!("l{index}"), running: true, loopback };
        let links = HashMap::from([(1, link(1, true)), (2, link(2, false)), (3, link(3, false))]);
        let held = |device, net: &str, usable| HostAddress { device, net: net.parse().expect("net"), usable };
        let addresses = [
            held(1, "198.51.100.1/32", true),
            held(2, "192.0.2.2/24", true),
            held(3, "192.0.2.3/24", true),
            held(2, "2001:db8::2/64", false),
        ];
        for (source, fits) in [
            ("192.0.2.2", true),
            ("192.0.2.3", false),
            ("198.51.100.1", true),
            ("2001:db8::2", false),
            ("192.0.2.9", false),
        ] {
            let source = source.parse().expect("an address");
            assert_eq!(may_send_from(source, &links[&2], &addresses, &links), fits, "{source}");
        }
    }
}
