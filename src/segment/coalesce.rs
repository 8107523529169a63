//! The way in to the TUN device: consecutive packets of one flow merged into a super-packet, under rules
//! that make cutting it exact: each segment that `tcp_gso_segment` (net/ipv4/tcp_offload.c) or
//! `__udp_gso_segment` (net/ipv4/udp_offload.c) cuts is, byte for byte, a packet that went in. The kernel's
//! own rules for merging are `tcp_gro_receive` and `inet_gro_receive`; these are stricter.

use super::SegmentError;
use super::checksum;
use super::inner::{
    CWR, FIN, Family, Layout, PSH, RST, SYN, TCP_DATA_OFFSET, TCP_FLAGS, TCP_SEQ, Transport, UDP_LENGTH, URG,
    V4_CHECKSUM, V4_FRAGMENT, V4_ID, V4_LENGTH, V6_LEN, V6_LENGTH, be16, be32, parse, put16, v4_constant_sum,
};
use crate::wire::vnet::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader};

/// A packet as it came out of its datagram.
#[derive(Clone, Copy, Debug)]
pub struct Inner<'a> {
    /// From the IP header on.
    pub packet: &'a [u8],
    /// The checksum field holds only the pseudo-header's sum.
    pub partial_csum: bool,
}

/// The packets at the front of a list that go out in one write: `vnet`, then [`Run::head`], then
/// `packet[payload_offset()..]` of the first `count` packets.
#[derive(Clone, Debug)]
pub struct Run {
    /// How many packets; never 0.
    pub count: usize,
    /// The virtio header of the write.
    pub vnet: VnetHeader,
    head: [u8; MAX_HEAD],
    payload_offset: usize,
}

impl Run {
    /// The super-packet's headers; empty where the one packet goes out as it is.
    pub fn head(&self) -> &[u8] {
        &self.head[..self.payload_offset]
    }

    /// Where the part to write starts in each packet of the run: 0 where the one packet goes out as it is.
    pub fn payload_offset(&self) -> usize {
        self.payload_offset
    }

    fn alone(vnet: VnetHeader) -> Run {
        Run { count: 1, vnet, head: [0; MAX_HEAD], payload_offset: 0 }
    }
}

/// How many packets at the front of `inners` merge into one super-packet, and its headers.
///
/// Only packets with a partial checksum merge, and only where the same bytes come out again: see
/// [`Segments`](super::Segments). UDP merges only with `uso`, which says that the TUN device takes UDP
/// super-packets (Linux 6.2). A packet with a full checksum is not even looked at.
///
/// # Errors
/// Only where the first packet has a partial checksum and its headers don't parse, so that nobody knows
/// where that checksum goes: drop exactly this packet and go on with the next. The reasons are those of
/// [`parse`]. `Empty` where `inners` is.
pub fn next_run(inners: &[Inner<'_>], uso: bool) -> Result<Run, SegmentError> {
    let (first, others) = inners.split_first().ok_or(SegmentError::Empty)?;
    if !first.partial_csum {
        return Ok(Run::alone(VnetHeader::default()));
    }
    let layout = parse(first.packet)?;
    let vnet = VnetHeader {
        flags: NEEDS_CSUM,
        csum_start: layout.transport_at as u16,
        csum_offset: layout.transport.checksum_offset() as u16,
        ..VnetHeader::default()
    };
    let mut run = Run::alone(vnet);
    if others.is_empty() || (layout.transport == Transport::Udp && !uso) {
        return Ok(run);
    }
    let Some(mut merge) = Merge::start(first.packet, layout) else { return Ok(run) };
    let most = match layout.transport {
        Transport::Tcp => MAX_RUN,
        Transport::Udp => MAX_UDP_RUN,
    };
    for next in others.iter().take(most - 1) {
        if !next.partial_csum || !merge.take(next.packet) {
            break;
        }
    }
    if merge.count > 1 {
        merge.finish(&mut run);
    }
    Ok(run)
}

/// A run being collected.
struct Merge<'a> {
    /// The first packet's headers.
    first: &'a [u8],
    layout: Layout,
    count: usize,
    /// Payload of every packet but the last.
    gso_size: usize,
    /// Payload of all packets so far.
    payload_len: usize,
    /// PSH and FIN of the last packet.
    last_flags: u8,
    /// The last packet was short or had PSH or FIN: nothing may follow.
    closed: bool,
    /// Sum of the IPv4 header without the fields that differ between segments.
    ip_sum: u32,
    /// Sum of the pseudo-header without the length.
    pseudo_sum: u32,
}

impl<'a> Merge<'a> {
    /// `None` where nothing can be merged to this packet.
    fn start(packet: &'a [u8], layout: Layout) -> Option<Merge<'a>> {
        let (first, payload) = packet.split_at_checked(layout.payload_at)?;
        if payload.is_empty() || (layout.family == Family::V6 && layout.transport_at != V6_LEN) {
            return None;
        }
        if layout.transport == Transport::Tcp
            && first[layout.transport_at + TCP_FLAGS] & (SYN | RST | URG | PSH | FIN) != 0
        {
            return None;
        }
        let merge = Merge {
            first,
            layout,
            count: 0,
            gso_size: payload.len(),
            payload_len: 0,
            last_flags: 0,
            closed: false,
            ip_sum: match layout.family {
                Family::V4 => v4_constant_sum(&first[..layout.transport_at]),
                Family::V6 => 0,
            },
            pseudo_sum: checksum::pseudo_header(
                &first[layout.family.addresses()],
                layout.transport.protocol(),
                0,
            ),
        };
        merge.has_own_fields(first, payload.len()).then_some(Merge {
            count: 1,
            payload_len: payload.len(),
            ..merge
        })
    }

    /// Whether `packet` continues the run; it is part of it then.
    fn take(&mut self, packet: &[u8]) -> bool {
        let Some((head, payload)) = packet.split_at_checked(self.first.len()) else { return false };
        if self.closed
            || payload.is_empty()
            || payload.len() > self.gso_size
            || self.first.len() + self.payload_len + payload.len() > MAX_SUPER_PACKET
            || !self.same_flow(head)
            || !self.has_own_fields(head, payload.len())
        {
            return false;
        }
        if self.layout.transport == Transport::Tcp {
            self.last_flags = head[self.layout.transport_at + TCP_FLAGS] & (PSH | FIN);
        }
        self.closed = payload.len() < self.gso_size || self.last_flags != 0;
        self.payload_len += payload.len();
        self.count += 1;
        true
    }

    /// Whether the fields that segments share are those of the first packet. Everything is compared that
    /// [`Merge::has_own_fields`] doesn't check, so a header that passes both has the first one's layout.
    fn same_flow(&self, head: &[u8]) -> bool {
        let (first_ip, first_transport) = self.first.split_at(self.layout.transport_at);
        let (ip, transport) = head.split_at(self.layout.transport_at);
        let same_ip = match self.layout.family {
            // Version, IHL and TOS; fragment field, TTL and protocol; addresses and options.
            Family::V4 => {
                ip[..V4_LENGTH] == first_ip[..V4_LENGTH]
                    && ip[V4_FRAGMENT..V4_CHECKSUM] == first_ip[V4_FRAGMENT..V4_CHECKSUM]
                    && ip[12..] == first_ip[12..]
            }
            // Version, traffic class and flow label; next header and hop limit; addresses.
            Family::V6 => ip[..V6_LENGTH] == first_ip[..V6_LENGTH] && ip[6..] == first_ip[6..],
        };
        let same_transport = match self.layout.transport {
            // Ports; acknowledgement and data offset; flags; window; urgent pointer and options.
            Transport::Tcp => {
                transport[..TCP_SEQ] == first_transport[..TCP_SEQ]
                    && transport[8..=TCP_DATA_OFFSET] == first_transport[8..=TCP_DATA_OFFSET]
                    && transport[TCP_FLAGS] & !(PSH | FIN) == first_transport[TCP_FLAGS] & !CWR
                    && transport[14..16] == first_transport[14..16]
                    && transport[18..] == first_transport[18..]
            }
            Transport::Udp => transport[..UDP_LENGTH] == first_transport[..UDP_LENGTH],
        };
        same_ip && same_transport
    }

    /// Whether the fields that differ between segments are those that cutting would write for the next
    /// one: lengths, ID, sequence number and both checksum fields.
    fn has_own_fields(&self, head: &[u8], payload_len: usize) -> bool {
        let (ip, transport) = head.split_at(self.layout.transport_at);
        let transport_len = transport.len() + payload_len;
        let packet_len = ip.len() + transport_len;
        let own_ip = match self.layout.family {
            Family::V4 => {
                let id = be16(self.first, V4_ID).wrapping_add(self.count as u16);
                let sum = self.ip_sum + packet_len as u32 + u32::from(id);
                usize::from(be16(ip, V4_LENGTH)) == packet_len
                    && be16(ip, V4_ID) == id
                    && be16(ip, V4_CHECKSUM) == checksum::finish(sum)
            }
            Family::V6 => usize::from(be16(ip, V6_LENGTH)) == packet_len - V6_LEN,
        };
        let own_transport = match self.layout.transport {
            Transport::Tcp => {
                let first_seq = be32(self.first, self.layout.transport_at + TCP_SEQ);
                be32(transport, TCP_SEQ) == first_seq.wrapping_add(self.payload_len as u32)
            }
            Transport::Udp => usize::from(be16(transport, UDP_LENGTH)) == transport_len,
        };
        own_ip
            && own_transport
            && be16(transport, self.layout.transport.checksum_offset())
                == checksum::fold(self.pseudo_sum + transport_len as u32)
    }

    /// The super-packet's headers: the first packet's, with the lengths and checksums of the whole.
    fn finish(&self, run: &mut Run) {
        let Layout { family, transport, transport_at, payload_at } = self.layout;
        let Some(head) = run.head.get_mut(..payload_at) else { return };
        head.copy_from_slice(self.first);
        let packet_len = payload_at + self.payload_len;
        match family {
            Family::V4 => {
                let sum = self.ip_sum + packet_len as u32 + u32::from(be16(head, V4_ID));
                put16(head, V4_LENGTH, packet_len as u16);
                put16(head, V4_CHECKSUM, checksum::finish(sum));
            }
            Family::V6 => put16(head, V6_LENGTH, (packet_len - V6_LEN) as u16),
        }

        let transport_len = packet_len - transport_at;
        let head = &mut head[transport_at..];
        let gso_type = match (transport, family) {
            (Transport::Udp, _) => {
                put16(head, UDP_LENGTH, transport_len as u16);
                GSO_UDP_L4
            }
            (Transport::Tcp, family) => {
                let ecn = if head[TCP_FLAGS] & CWR != 0 { GSO_ECN } else { 0 };
                head[TCP_FLAGS] |= self.last_flags;
                ecn | if family == Family::V4 { GSO_TCPV4 } else { GSO_TCPV6 }
            }
        };
        let pseudo_sum = checksum::fold(self.pseudo_sum + transport_len as u32);
        put16(head, transport.checksum_offset(), pseudo_sum);

        run.count = self.count;
        run.payload_offset = payload_at;
        run.vnet.gso_type = gso_type;
        run.vnet.gso_size = self.gso_size as u16;
        run.vnet.hdr_len = payload_at as u16;
    }
}

/// Most packets in one run, and so the most parts of a gathered write but two. It is what the kernel allows
/// itself in a UDP super-packet (`UDP_MAX_SEGMENTS`, include/linux/udp.h: at first 64, now 128).
pub const MAX_RUN: usize = 128;
/// Datagrams of a run: UDP_MAX_SEGMENTS of kernels before 6.9, which refuse longer ones (virtio_net_hdr_to_skb()).
const MAX_UDP_RUN: usize = 64;

/// Longest super-packet with its headers: IPv4's total length, and for IPv6 the same, since the kernel's
/// own stay below (`GSO_LEGACY_MAX_SIZE`, include/linux/netdevice.h).
const MAX_SUPER_PACKET: usize = 65_535;

/// IPv4 and TCP header with all options.
const MAX_HEAD: usize = 120;
