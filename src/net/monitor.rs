//! What changes on the host's network, as the kernel announces it (rtnetlink(7), its multicast groups).
//!
//! Only that something changed is of interest, not what: who is told so looks at the whole again. So an event that
//! got lost, or that can't be read, is a change like any other.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::netlink::{PROTOCOL, READ_BYTES, link_name, split_messages};
use crate::exit::{Failure, Outcome};

/// A socket that hears of links, addresses and routes. Wait for it to be readable, then ask
/// [`changed`](Monitor::changed).
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
    seen: Seen,
}

impl Monitor {
    /// Hears of everything from now on but the routes of this program and `own_device`, of which it only hears that it was
    /// set down: nobody does that but somebody else.
    pub fn open(own_device: u32) -> Outcome<Monitor> {
        let failed = |e: io::Error| Failure::system("listening for changes of the network", e);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.set_non_blocking(true).map_err(failed)?;
        socket.bind(&SocketAddr::new(0, GROUPS)).map_err(failed)?;
        Ok(Monitor { socket, seen: Seen { own_device, own_up: false, links: HashMap::new() } })
    }

    /// Reads what has come, and says whether any of it matters. More may be left after `READS` of them: the socket
    /// stays readable then.
    pub fn changed(&mut self) -> Outcome<bool> {
        let mut changed = false;
        let mut buffer: Vec<u8> = Vec::with_capacity(READ_BYTES);
        for _ in 0..READS {
            buffer.clear();
            match self.socket.recv_from(&mut buffer, 0) {
                // Only the kernel is port 0.
                Ok((_, from)) if from.port_number() != 0 => {}
                Ok(_) => changed |= self.seen.changed_by(&buffer),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // More came than there was room for: some of it is lost.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.seen.links.clear();
                    changed = true;
                }
                Err(e) => return Err(Failure::system("hearing of changes of the network", e)),
            }
        }
        Ok(changed)
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What events are compared with.
#[derive(Debug)]
struct Seen {
    own_device: u32,
    own_up: bool,
    /// Name and state of each link that an event was about: most events, such as those of every Wi-Fi scan, change
    /// neither.
    links: HashMap<u32, (String, LinkFlags)>,
}

impl Seen {
    /// Whether anything in the bytes of one read matters.
    fn changed_by(&mut self, bytes: &[u8]) -> bool {
        let mut changed = false;
        for bytes in split_messages(bytes) {
            changed |= match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
                Ok(message) => match message.payload {
                    NetlinkPayload::InnerMessage(event) => self.matters(&event),
                    NetlinkPayload::Overrun(_) => true,
                    _ => false,
                },
                Err(e) => {
                    log::debug!("netlink: an event can't be read: {e}");
                    true
                }
            };
        }
        changed
    }

    fn matters(&mut self, event: &RouteNetlinkMessage) -> bool {
        match event {
            RouteNetlinkMessage::NewLink(link) if link.header.index == self.own_device => {
                let up = link.header.flags.contains(LinkFlags::Up);
                std::mem::replace(&mut self.own_up, up) && !up
            }
            RouteNetlinkMessage::NewLink(link) if self.is_foreign(link) => {
                let state = link.header.flags & (LinkFlags::Up | LinkFlags::Running);
                let now = (link_name(link).unwrap_or_default().to_owned(), state);
                self.links.insert(link.header.index, now.clone()) != Some(now)
            }
            RouteNetlinkMessage::DelLink(link) if self.is_foreign(link) => {
                self.links.remove(&link.header.index);
                true
            }
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
                address.header.index != self.own_device
            }
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                self.is_foreign_route(route)
            }
            _ => false,
        }
    }

    /// Not of our device, and no bridge's word about a port of its own (AF_BRIDGE).
    fn is_foreign(&self, link: &LinkMessage) -> bool {
        link.header.index != self.own_device && link.header.interface_family == AddressFamily::Unspec
    }

    /// Not ours, not by our device, not what comes with an address or is copied from another.
    fn is_foreign_route(&self, route: &RouteMessage) -> bool {
        let by_our_device = route
            .attributes
            .iter()
            .any(|a| matches!(a, RouteAttribute::Oif(index) if *index == self.own_device));
        let of_address = matches!(
            route.header.kind,
            RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast
        );
        let copied = route.header.flags.contains(RouteFlags::Cloned);
        u8::from(route.header.protocol) != PROTOCOL && !by_our_device && !of_address && !copied
    }
}

const GROUPS: u32 = (libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE) as u32;
/// Reads of one turn.
const READS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u32 = 9;

    /// A message with its header: length, type, flags, sequence, port.
    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::from((16 + body.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::from((4 + value.len() as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// ifinfomsg: family, padding, type ARPHRD_ETHER, index, flags, change mask; then IFLA_IFNAME.
    fn link(kind: u16, family: u8, index: u32, flags: u32, name: &str) -> Vec<u8> {
        let mut body = vec![family, 0, 1, 0];
        for word in [index, flags, u32::MAX] {
            body.extend(word.to_ne_bytes());
        }
        body.extend(attribute(3, &[name.as_bytes(), b"\0"].concat()));
        message(kind, &body)
    }

    /// ifaddrmsg: family, prefix length, flags, scope, index; then IFA_ADDRESS.
    fn address(kind: u16, index: u32) -> Vec<u8> {
        let mut body = vec![2, 24, 0x80, 0];
        body.extend(index.to_ne_bytes());
        body.extend(attribute(1, &[192, 0, 2, 7]));
        message(kind, &body)
    }

    /// rtmsg: family, both prefix lengths, TOS, table, protocol, scope, type, flags; then RTA_OIF.
    fn route(kind: u16, protocol: u8, rtype: u8, flags: u32, device: u32) -> Vec<u8> {
        let mut body = vec![2, 0, 0, 0, 254, protocol, 0, rtype];
        body.extend(flags.to_ne_bytes());
        body.extend(attribute(4, &device.to_ne_bytes()));
        message(kind, &body)
    }

    const NEWLINK: u16 = libc::RTM_NEWLINK;
    const DELLINK: u16 = libc::RTM_DELLINK;
    const UP: u32 = 0x1;
    const RUNNING: u32 = 0x41;
    const PROMISCUOUS: u32 = 0x141;

    #[test]
    fn links_matter_when_they_come_go_or_change() {
        let mut seen = Seen { own_device: OWN, own_up: false, links: HashMap::new() };
        for (what, bytes, matters) in [
            ("a new one", link(NEWLINK, 0, 3, UP, "eth0"), true),
            ("the same again", link(NEWLINK, 0, 3, UP, "eth0"), false),
            ("a carrier", link(NEWLINK, 0, 3, RUNNING, "eth0"), true),
            ("somebody listens", link(NEWLINK, 0, 3, PROMISCUOUS, "eth0"), false),
            ("a bridge's port", link(DELLINK, 7, 3, RUNNING, "eth0"), false),
            ("another name", link(NEWLINK, 0, 3, RUNNING, "lan0"), true),
            ("gone", link(DELLINK, 0, 3, 0, "lan0"), true),
            ("back", link(NEWLINK, 0, 3, RUNNING, "lan0"), true),
            ("our own", link(NEWLINK, 0, OWN, 0, "tg0"), false),
            ("our own, set up", link(NEWLINK, 0, OWN, RUNNING, "tg0"), false),
            ("our own, set down", link(NEWLINK, 0, OWN, 0, "tg0"), true),
            ("our own, set down already", link(NEWLINK, 0, OWN, 0, "tg0"), false),
            ("our own is gone", link(DELLINK, 0, OWN, 0, "tg0"), false),
        ] {
            assert_eq!(seen.changed_by(&bytes), matters, "{what}");
        }
    }

    #[test]
    fn addresses_and_routes_matter_unless_they_are_ours() {
        let mut seen = Seen { own_device: OWN, own_up: false, links: HashMap::new() };
        let (newroute, delroute) = (libc::RTM_NEWROUTE, libc::RTM_DELROUTE);
        for (what, bytes, matters) in [
            ("an address", address(libc::RTM_NEWADDR, 3), true),
            ("an address is gone", address(libc::RTM_DELADDR, 3), true),
            ("an inner address", address(libc::RTM_NEWADDR, OWN), false),
            ("a default route", route(newroute, 3, 1, 0, 3), true),
            ("a default route is gone", route(delroute, 16, 1, 0, 3), true),
            ("a host route of ours", route(newroute, PROTOCOL, 1, 0, 3), false),
            ("a prefix of our device", route(newroute, 2, 1, 0, OWN), false),
            ("an address's own", route(newroute, 2, 2, 0, 3), false),
            ("a copy", route(newroute, 2, 1, 0x200, 3), false),
            ("an unreachable one", route(newroute, 4, 7, 0, 0), true),
            ("a neighbour", message(libc::RTM_NEWNEIGH, &[0; 12]), false),
        ] {
            assert_eq!(seen.changed_by(&bytes), matters, "{what}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_a_change_and_hides_nothing() {
        let mut seen = Seen { own_device: OWN, own_up: false, links: HashMap::new() };
        assert!(seen.changed_by(&message(NEWLINK, &[0, 0])));
        assert!(!seen.changed_by(&[]) && !seen.changed_by(&[7; 3]));
        let several = [address(libc::RTM_NEWADDR, OWN), address(libc::RTM_NEWADDR, 3)].concat();
        assert!(seen.changed_by(&several));
    }
}
