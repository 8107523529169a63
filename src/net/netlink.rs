//! Links, addresses and routes over rtnetlink (rtnetlink(7), RFC 3549; netlink(7) for the framing).
//!
//! One request at a time: send, then read until the kernel's acknowledgement with our sequence number, or until
//! `ANSWER_WITHIN` is over.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE,
    NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, Parseable,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol,
    RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::exit::{Exit, Failure, Outcome};

/// The route protocol (`rtm_protocol`) of every route tunguard installs, `ip route show proto 116`. Numbers from
/// 5 up are free for user space (RTPROT_STATIC in linux/rtnetlink.h); 116, ASCII 't', is in none of
/// /etc/iproute2/rt_protos, FRR, BIRD, systemd-networkd and NetworkManager.
pub const PROTOCOL: u8 = b't';

/// What a route does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum RouteKind {
    /// Sends it on.
    Unicast,
    /// Refuses it with "host unreachable" (RTN_UNREACHABLE).
    Unreachable,
    /// Anything else, found in a dump: blackhole, prohibit, throw.
    Other,
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Route {
    /// Where it leads.
    pub destination: IpNet,
    /// The next hop; none means on-link. May be of the other family (RTA_VIA, RFC 5549).
    pub gateway: Option<IpAddr>,
    /// The device's index. 0 where the route has none ([`RouteKind::Unreachable`]), and in
    /// [`Netlink::del_route`] for "whichever".
    pub device: u32,
    /// Priority, the lowest wins; none is 0 for IPv4 and 1024 for IPv6.
    pub metric: Option<u32>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Who installed it, [`PROTOCOL`] for us.
    pub protocol: u8,
    /// What it does.
    pub kind: RouteKind,
}

impl Route {
    /// An on-link route of ours: `destination` by `device`.
    pub fn new(destination: IpNet, device: u32) -> Route {
        Route {
            destination: destination.trunc(),
            gateway: None,
            device,
            metric: None,
            source: None,
            protocol: PROTOCOL,
            kind: RouteKind::Unicast,
        }
    }

    /// The metric the kernel gives it.
    pub fn effective_metric(&self) -> u32 {
        match (self.metric, self.destination) {
            // IP6_RT_PRIO_USER in net/ipv6.h; IPv6 also reads 0 as "the default".
            (None | Some(0), IpNet::V6(_)) => 1024,
            (metric, _) => metric.unwrap_or(0),
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind == RouteKind::Unreachable {
            f.write_str("unreachable ")?;
        }
        write!(f, "{}", self.destination)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if self.device != 0 {
            write!(f, " dev {}", device_label(self.device))?;
        }
        match self.metric {
            Some(metric) if metric != 0 => write!(f, " metric {metric}"),
            _ => Ok(()),
        }
    }
}

/// How the kernel would send to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteTo {
    /// The next hop; none means the address is on-link, or ours.
    pub gateway: Option<IpAddr>,
    /// The device's index.
    pub device: u32,
    /// The source address the kernel would take.
    pub source: Option<IpAddr>,
    /// Whether it is an address of this host.
    pub local: bool,
}

/// Which routes of the main table to list; what is `None` isn't looked at.
#[derive(Clone, Debug, Default)]
pub struct RouteFilter {
    /// Only this address family: true for IPv6.
    pub v6: Option<bool>,
    /// Only routes by this device.
    pub device: Option<u32>,
    /// Only routes of this protocol.
    pub protocol: Option<u8>,
    /// Only routes to exactly this.
    pub destination: Option<IpNet>,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// It is set up, and has a carrier (IFF_UP and IFF_RUNNING).
    pub running: bool,
    /// It leads to this host itself.
    pub loopback: bool,
}

/// An address of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress {
    /// The device it belongs to.
    pub device: u32,
    /// The address, with its network's prefix.
    pub net: IpNet,
    /// It may be sent from: duplicate address detection is over, or was not needed, and found no other owner.
    pub usable: bool,
}

/// An rtnetlink socket.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace; it stays in that one.
    pub fn open() -> Outcome<Netlink> {
        let failed = |e: io::Error| Failure::system("opening a netlink socket", e);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_WITHIN.as_secs() as i64, 0))
            .map_err(|e| failed(e.into()))?;
        // Comforts, each since Linux 4.20 or earlier: an error carries the kernel's own sentence instead of a copy
        // of the request, and dumps are filtered by the kernel.
        for comfort in
            [socket.set_cap_ack(true), socket.set_ext_ack(true), socket.set_netlink_get_strict_chk(true)]
        {
            if let Err(e) = comfort {
                log::debug!("netlink: an option is not supported: {e}");
            }
        }
        Ok(Netlink { socket, sequence: 0 })
    }

    /// The index of the device called `name`.
    pub fn link_index(&mut self, name: &str) -> Outcome<u32> {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let answers = self
            .request(RouteNetlinkMessage::GetLink(link), 0)
            .map_err(|e| e.into_failure(format_args!("looking up device {name}")))?;
        answers
            .into_iter()
            .find_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(link) => Some(link.header.index),
                _ => None,
            })
            .ok_or_else(|| Failure::system(format!("looking up device {name}"), "no answer"))
    }

    /// All devices.
    pub fn links(&mut self) -> Outcome<Vec<Link>> {
        let answers = self
            .request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)
            .map_err(|e| e.into_failure("listing devices"))?;
        Ok(answers
            .iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(message) => Some(parse_link(message)),
                _ => None,
            })
            .collect())
    }

    /// Sets the device up with this MTU.
    pub fn set_link_up(&mut self, index: u32, mtu: u16) -> Outcome<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        link.attributes.push(LinkAttribute::Mtu(mtu.into()));
        self.request(RouteNetlinkMessage::SetLink(link), 0).map(drop).map_err(|e| {
            e.into_failure(format_args!("setting device {} up with MTU {mtu}", device_label(index)))
        })
    }

    /// Sets how many packets the device's transmit queue holds (IFLA_TXQLEN).
    pub fn set_queue_len(&mut self, index: u32, packets: u32) -> Outcome<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes.push(LinkAttribute::TxQueueLen(packets));
        self.request(RouteNetlinkMessage::SetLink(link), 0).map(drop).map_err(|e| {
            e.into_failure(format_args!("setting the queue of device {} to {packets}", device_label(index)))
        })
    }

    /// Limits the super-packets the kernel builds for the device (IFLA_GSO_MAX_SIZE). Kernels differ in what
    /// they accept, and nothing breaks without it: callers may ignore the error.
    pub fn set_gso_max(&mut self, index: u32, bytes: u32) -> Outcome<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes.push(LinkAttribute::GsoMaxSize(bytes));
        self.request(RouteNetlinkMessage::SetLink(link), 0).map(drop).map_err(|e| {
            e.into_failure(format_args!(
                "limiting super-packets of device {} to {bytes} bytes",
                device_label(index)
            ))
        })
    }

    /// Gives the device an address. That it is there already is fine.
    ///
    /// The kernel adds a route to the prefix (`proto kernel`) that lives and dies with the address, on both
    /// families; an address alone is a /32 or /128, which has none. IPv6 addresses skip duplicate address
    /// detection (IFA_F_NODAD): on a point-to-point device nobody could answer, and a tentative address can't be
    /// used as a source for a second. One thing needs care: for an IPv6 address that is there with another
    /// prefix length, NLM_F_REPLACE succeeds and keeps the old length and its route (inet6_addr_modify() in
    /// net/ipv6/addrconf.c), so that one is removed first.
    pub fn add_address(&mut self, index: u32, address: IpNet) -> Outcome<()> {
        let what = || format!("adding address {address} to device {}", device_label(index));
        if let IpNet::V6(wanted) = address {
            for held in self.addresses(index)? {
                if held.addr() == wanted.addr() && held.prefix_len() != wanted.prefix_len() {
                    self.del_address(index, held)?;
                }
            }
        }
        let mut message = address_message(index, address);
        if address.addr().is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        self.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
            .map(drop)
            .map_err(|e| e.into_failure(what()))
    }

    /// Takes an address away from the device. That it isn't there is fine.
    pub fn del_address(&mut self, index: u32, address: IpNet) -> Outcome<()> {
        match self.request(RouteNetlinkMessage::DelAddress(address_message(index, address)), 0) {
            Ok(_) => Ok(()),
            Err(Refusal::Errno { errno: Errno::EADDRNOTAVAIL | Errno::ENODEV, .. }) => Ok(()),
            Err(e) => Err(e.into_failure(format_args!(
                "removing address {address} from device {}",
                device_label(index)
            ))),
        }
    }

    /// The device's addresses, of both families.
    pub fn addresses(&mut self, index: u32) -> Outcome<Vec<IpNet>> {
        let found = self
            .list_addresses(index)
            .map_err(|e| e.into_failure(format_args!("listing addresses of {}", device_label(index))))?;
        Ok(found.into_iter().filter(|held| held.device == index).map(|held| held.net).collect())
    }

    /// All addresses of all devices.
    pub fn host_addresses(&mut self) -> Outcome<Vec<HostAddress>> {
        self.list_addresses(0).map_err(|e| e.into_failure("listing addresses"))
    }

    /// Addresses of one device, or with index 0 of all; kernels before 4.20 don't filter.
    fn list_addresses(&mut self, index: u32) -> Result<Vec<HostAddress>, Refusal> {
        let mut filter = AddressMessage::default();
        filter.header.index = index;
        let answers = match self.request(RouteNetlinkMessage::GetAddress(filter), NLM_F_DUMP) {
            Err(Refusal::Errno { errno: Errno::ENODEV, .. }) => Vec::new(),
            answers => answers?,
        };
        Ok(answers
            .iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewAddress(message) => parse_address(message),
                _ => None,
            })
            .collect())
    }

    /// Adds a route to the main table. A route to the same destination with the same metric is an error that
    /// names it, also where it is the same route; see [`Netlink::replace_route`].
    pub fn add_route(&mut self, route: &Route) -> Outcome<()> {
        match self.try_add_route(route)? {
            true => Ok(()),
            false => Err(Failure::new(
                Exit::System,
                format!(
                    "adding route {route}: {} is there already; remove it or leave this destination out",
                    self.route_in_the_way(route)?.map_or_else(|| "such a route".into(), |r| r.to_string()),
                ),
            )),
        }
    }

    /// Adds a route, or puts it in place of the one with the same destination and metric, whoever installed that.
    pub fn replace_route(&mut self, route: &Route) -> Outcome<()> {
        self.new_route(route, NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(|e| e.into_failure(format_args!("replacing route {route}")))
    }

    /// Removes the route with this destination, protocol and metric, and this device and gateway where they are
    /// given. That it isn't there is fine.
    pub fn del_route(&mut self, route: &Route) -> Outcome<()> {
        let mut message = route_message(route);
        // "Any" of either (fib_table_delete() in net/ipv4/fib_trie.c).
        message.header.scope = RouteScope::NoWhere;
        message.header.kind = RouteType::Unspec;
        match self.request(RouteNetlinkMessage::DelRoute(message), 0) {
            Ok(_) => Ok(()),
            Err(Refusal::Errno { errno: Errno::ESRCH | Errno::ENODEV | Errno::ENOENT, .. }) => Ok(()),
            Err(e) => Err(e.into_failure(format_args!("removing route {route}"))),
        }
    }

    /// How the kernel would send to `address` now, all tables and rules considered; none where it can't.
    pub fn route_to(&mut self, address: IpAddr) -> Outcome<Option<RouteTo>> {
        self.route_to_by(address, None)
    }

    /// The same for a socket that is bound to a device. Where no IPv4 route by that device leads to it, the kernel
    /// takes the address for on-link (ip_route_output_key_hash_rcu() in net/ipv4/route.c).
    pub fn route_to_by(&mut self, address: IpAddr, device: Option<u32>) -> Outcome<Option<RouteTo>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(address.is_ipv6());
        message.header.destination_prefix_length = IpNet::from(address).prefix_len();
        message.attributes.push(RouteAttribute::Destination(address.into()));
        message.attributes.extend(device.map(RouteAttribute::Oif));
        let answers = match self.request(RouteNetlinkMessage::GetRoute(message), 0) {
            Ok(answers) => answers,
            // No route, an unreachable, prohibit or blackhole route (fib_props in net/ipv4/fib_semantics.c),
            // a kernel without this family, or a device that is down or gone.
            Err(Refusal::Errno {
                errno:
                    Errno::ENETUNREACH
                    | Errno::EHOSTUNREACH
                    | Errno::EACCES
                    | Errno::EINVAL
                    | Errno::EAFNOSUPPORT
                    | Errno::EOPNOTSUPP
                    | Errno::ENETDOWN
                    | Errno::ENODEV,
                ..
            }) => return Ok(None),
            Err(e) => return Err(e.into_failure(format_args!("looking up the route to {address}"))),
        };
        Ok(answers.into_iter().find_map(|answer| {
            let RouteNetlinkMessage::NewRoute(message) = answer else { return None };
            let local = message.header.kind == RouteType::Local;
            if !local && !matches!(message.header.kind, RouteType::Unicast | RouteType::Multicast) {
                return None;
            }
            let route = parse_route(&message)?;
            let (device, gateway) = hops(&message).into_iter().next()?;
            Some(RouteTo { gateway, device, source: route.source, local })
        }))
    }

    /// Routes of the main table, in the kernel's order, without dead ones. A route with several next hops counts
    /// as one for each living one.
    pub fn routes(&mut self, filter: &RouteFilter) -> Outcome<Vec<Route>> {
        let mut found = Vec::new();
        for v6 in [false, true] {
            if filter.v6.is_some_and(|only| only != v6) {
                continue;
            }
            if filter.destination.is_some_and(|only| only.addr().is_ipv6() != v6) {
                continue;
            }
            let mut message = RouteMessage::default();
            message.header.address_family = family(v6);
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            message.header.protocol = RouteProtocol::from(filter.protocol.unwrap_or(0));
            if let Some(device) = filter.device {
                message.attributes.push(RouteAttribute::Oif(device));
            }
            let answers = match self.request(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP) {
                Ok(answers) => answers,
                // No such device or table, or no such family in this kernel: no routes.
                Err(Refusal::Errno {
                    errno: Errno::ENODEV | Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP,
                    ..
                }) => continue,
                Err(e) => return Err(e.into_failure("listing routes")),
            };
            // Kernels before 4.20 don't filter, so do it here as well.
            found.extend(answers.into_iter().flat_map(|answer| {
                let RouteNetlinkMessage::NewRoute(message) = answer else { return Vec::new() };
                let table = message.attributes.iter().find_map(|a| match a {
                    RouteAttribute::Table(table) => Some(*table),
                    _ => None,
                });
                let fits = message.header.address_family == family(v6)
                    && table.unwrap_or(message.header.table.into()) == u32::from(RouteHeader::RT_TABLE_MAIN)
                    && !message.header.flags.contains(RouteFlags::Dead);
                let Some(route) = parse_route(&message).filter(|_| fits) else { return Vec::new() };
                let fits = |route: &Route| {
                    filter.device.is_none_or(|only| only == route.device)
                        && filter.protocol.is_none_or(|only| only == route.protocol)
                        && filter.destination.is_none_or(|only| only.trunc() == route.destination)
                };
                let by = |(device, gateway)| Route { device, gateway, ..route.clone() };
                hops(&message).into_iter().map(by).filter(fits).collect()
            }));
        }
        Ok(found)
    }

    /// Adds a route; false where one with the same destination and metric is there.
    pub(super) fn try_add_route(&mut self, route: &Route) -> Outcome<bool> {
        match self.new_route(route, NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => Ok(true),
            Err(Refusal::Errno { errno: Errno::EEXIST, .. }) => Ok(false),
            Err(e) => Err(e.into_failure(format_args!("adding route {route}"))),
        }
    }

    /// The route that made [`Netlink::try_add_route`] say false.
    pub(super) fn route_in_the_way(&mut self, route: &Route) -> Outcome<Option<Route>> {
        let filter = RouteFilter { destination: Some(route.destination), ..RouteFilter::default() };
        let there = self.routes(&filter)?;
        Ok(there.into_iter().find(|r| r.effective_metric() == route.effective_metric()))
    }

    fn new_route(&mut self, route: &Route, flags: u16) -> Result<(), Refusal> {
        let message = route_message(route);
        match self.request(RouteNetlinkMessage::NewRoute(message.clone()), flags) {
            // A gateway outside every on-link network, as clouds like to have it: the route it was copied from
            // works, so say that it is reachable by the device.
            Err(Refusal::Errno {
                errno: Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EINVAL, ..
            }) if route.gateway.is_some() && route.device != 0 => {
                let mut message = message;
                message.header.flags = RouteFlags::Onlink;
                self.request(RouteNetlinkMessage::NewRoute(message), flags).map(drop)
            }
            result => result.map(drop),
        }
    }

    /// Sends one request and returns what came before its acknowledgement (or the end of its dump).
    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, Refusal> {
        let dump = flags & NLM_F_DUMP == NLM_F_DUMP && is_get(&message);
        let deadline = Instant::now() + ANSWER_WITHIN;
        for _ in 0..DUMP_TRIES {
            match self.exchange(message.clone(), flags, dump, deadline)? {
                Some(answers) => return Ok(answers),
                None => log::debug!("netlink: the table changed while it was read; again"),
            }
        }
        Err(Refusal::Text("the kernel's table keeps changing while it is read".into()))
    }

    /// One round of [`Netlink::request`]; none where a dump was interrupted by a change.
    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        dump: bool,
        deadline: Instant,
    ) -> Result<Option<Vec<RouteNetlinkMessage>>, Refusal> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0).map_err(Refusal::io)?;

        let mut answers = Vec::new();
        let mut interrupted = false;
        let mut buffer: Vec<u8> = Vec::with_capacity(READ_BYTES);
        loop {
            buffer.clear();
            let from = match self.socket.recv_from(&mut buffer, 0) {
                Ok((_, from)) => from,
                Err(e) if e.kind() == io::ErrorKind::Interrupted && Instant::now() < deadline => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(Refusal::late()),
                Err(e) => return Err(Refusal::io(e)),
            };
            // Only the kernel is port 0: nobody else may answer.
            if from.port_number() != 0 {
                continue;
            }
            for bytes in split_messages(&buffer) {
                let Ok(header) = parse_header(bytes) else { continue };
                if header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                let message = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
                    Ok(message) => message,
                    Err(e) => {
                        // One exotic entry must not hide the others.
                        log::debug!("netlink: an answer was passed over: {e}");
                        continue;
                    }
                };
                match message.payload {
                    NetlinkPayload::Error(error) => {
                        let code = error.raw_code();
                        if code == 0 {
                            return Ok(Some(answers));
                        }
                        let errno = Errno::from_raw(code.unsigned_abs() as i32);
                        return Err(Refusal::Errno { errno, text: kernel_sentence(&error.header) });
                    }
                    NetlinkPayload::Done(_) if dump => {
                        return Ok((!interrupted).then_some(answers));
                    }
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
            if Instant::now() >= deadline {
                return Err(Refusal::late());
            }
        }
    }
}

/// Why the kernel didn't do as asked.
#[derive(Debug)]
enum Refusal {
    /// It said so, with a sentence of its own where it has one (NLMSGERR_ATTR_MSG).
    Errno { errno: Errno, text: Option<String> },
    /// It said nothing we understand.
    Text(String),
}

impl Refusal {
    fn io(error: io::Error) -> Refusal {
        match error.raw_os_error() {
            Some(code) => Refusal::Errno { errno: Errno::from_raw(code), text: None },
            None => Refusal::Text(error.to_string()),
        }
    }

    fn late() -> Refusal {
        Refusal::Text(format!("the kernel gave no answer within {} s", ANSWER_WITHIN.as_secs()))
    }

    fn into_failure(self, what: impl fmt::Display) -> Failure {
        match self {
            Refusal::Errno { errno: Errno::EPERM, .. } => Failure::new(
                Exit::Privilege,
                format!("{what}: not permitted: this needs CAP_NET_ADMIN; run tunguard as root"),
            ),
            Refusal::Errno { errno, text: None } => {
                Failure::system(what, format_args!("{} ({errno:?})", errno.desc()))
            }
            Refusal::Errno { errno, text: Some(text) } => {
                Failure::system(what, format_args!("{text} ({errno:?})"))
            }
            Refusal::Text(text) => Failure::system(what, text),
        }
    }
}

fn is_get(message: &RouteNetlinkMessage) -> bool {
    // NLM_F_DUMP's bits mean NLM_F_REPLACE | NLM_F_EXCL in requests that make something.
    use RouteNetlinkMessage::{GetAddress, GetLink, GetRoute};
    matches!(message, GetLink(_) | GetAddress(_) | GetRoute(_))
}

fn family(v6: bool) -> AddressFamily {
    if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr().is_ipv6());
    message.header.prefix_len = address.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address.addr()));
    message.attributes.push(AddressAttribute::Address(address.addr()));
    message
}

fn route_message(route: &Route) -> RouteMessage {
    let v6 = route.destination.addr().is_ipv6();
    let mut message = RouteMessage::default();
    message.header.address_family = family(v6);
    message.header.destination_prefix_length = route.destination.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(route.protocol);
    // IPv4 wants the scope to say whether the next hop is the destination itself; IPv6 knows no scopes.
    message.header.scope = match (v6, route.gateway, route.kind) {
        (false, None, RouteKind::Unicast) => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    message.header.kind = match route.kind {
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Unicast | RouteKind::Other => RouteType::Unicast,
    };
    message.attributes.push(RouteAttribute::Destination(route.destination.network().into()));
    if route.device != 0 {
        message.attributes.push(RouteAttribute::Oif(route.device));
    }
    message.attributes.extend(match route.gateway {
        Some(IpAddr::V6(gateway)) if !v6 => Some(RouteAttribute::Via(RouteVia::Inet6(gateway))),
        Some(gateway) => Some(RouteAttribute::Gateway(gateway.into())),
        None => None,
    });
    message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    message.attributes.extend(route.metric.map(RouteAttribute::Priority));
    message
}

fn parse_link(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    Link {
        index: message.header.index,
        name: link_name(message).unwrap_or_default().to_owned(),
        running: flags.contains(LinkFlags::Up | LinkFlags::Running),
        loopback: flags.contains(LinkFlags::Loopback),
    }
}

pub(super) fn link_name(message: &LinkMessage) -> Option<&str> {
    message.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn parse_address(message: &AddressMessage) -> Option<HostAddress> {
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    // IFA_LOCAL is ours and IFA_ADDRESS the peer's where both are there (if_addr.h); IPv6 mostly has
    // IFA_ADDRESS alone.
    let local = find(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None });
    let address =
        local.or_else(|| find(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None }))?;
    // The header has room for eight of the flags, IFA_FLAGS for all.
    let flags = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let flags = flags.unwrap_or(AddressFlags::from_bits_retain(message.header.flags.bits().into()));
    // An optimistic address is tentative, too, and may be used (RFC 4429).
    let pending = flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic);
    Some(HostAddress {
        device: message.header.index,
        net: IpNet::new(address, message.header.prefix_len).ok()?,
        usable: !pending && !flags.contains(AddressFlags::Dadfailed),
    })
}

/// A route but for its next hops: those are in [`hops`].
fn parse_route(message: &RouteMessage) -> Option<Route> {
    let v6 = message.header.address_family == AddressFamily::Inet6;
    let any: IpNet = if v6 { Ipv6Net::default().into() } else { Ipv4Net::default().into() };
    let mut route = Route::new(any, 0);
    route.protocol = message.header.protocol.into();
    route.kind = match message.header.kind {
        RouteType::Unicast | RouteType::Local | RouteType::Multicast => RouteKind::Unicast,
        RouteType::Unreachable => RouteKind::Unreachable,
        _ => RouteKind::Other,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                route.destination = IpNet::new(ip(to)?, message.header.destination_prefix_length).ok()?;
            }
            RouteAttribute::PrefSource(source) => route.source = ip(source),
            RouteAttribute::Priority(metric) => route.metric = Some(*metric),
            _ => {}
        }
    }
    Some(route)
}

/// Device and gateway of each living next hop.
fn hops(message: &RouteMessage) -> Vec<(u32, Option<IpAddr>)> {
    let (mut device, mut via) = (0, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::MultiPath(hops) => {
                let living = hops.iter().filter(|hop| !hop.flags.contains(RouteNextHopFlags::Dead));
                return living
                    .map(|hop| (hop.interface_index, hop.attributes.iter().find_map(gateway)))
                    .collect();
            }
            RouteAttribute::Oif(index) => device = *index,
            other => via = gateway(other).or(via),
        }
    }
    vec![(device, via)]
}

fn gateway(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// The device's name for people, or its index where it is gone.
pub fn device_label(index: u32) -> String {
    match nix::net::if_::if_indextoname(index) {
        Ok(name) => name.to_string_lossy().into_owned(),
        Err(_) => format!("#{index}"),
    }
}

/// Cuts what one read brought into messages: each says its length in its first four bytes and is padded to four.
pub(super) fn split_messages(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        let message = rest.get(..length).filter(|m| m.len() >= NETLINK_HEADER_BYTES)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(message)
    })
}

fn parse_header(bytes: &[u8]) -> Result<NetlinkHeader, DecodeError> {
    NetlinkHeader::parse(&NetlinkBuffer::new_checked(&bytes)?)
}

/// The text in the attributes behind an error: what follows the error code is the request's header (all of the
/// request's bytes with NETLINK_CAP_ACK off), then attributes of two-byte length and type.
fn kernel_sentence(after_code: &[u8]) -> Option<String> {
    let mut rest = after_code.get(NETLINK_HEADER_BYTES..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        if kind == NLMSGERR_ATTR_MSG {
            let text = value.split(|b| *b == 0).next()?;
            let text: String = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect();
            return (!text.is_empty()).then_some(text);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

const NETLINK_HEADER_BYTES: usize = 16;
/// NLMSGERR_ATTR_MSG in linux/netlink.h.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The kernel answers within the system call that sends the request; this only bounds the unforeseen.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Dumps come in reads of at most 32 KiB (netlink_dump() in net/netlink/af_netlink.c).
pub(super) const READ_BYTES: usize = 64 * 1024;
const DUMP_TRIES: usize = 5;
