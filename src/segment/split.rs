//! The way out of the TUN device: a super-packet cut into the packets it stands for, as the kernel would
//! (`tcp_gso_segment` in net/ipv4/tcp_offload.c, `__udp_gso_segment` in net/ipv4/udp_offload.c,
//! `inet_gso_segment` in net/ipv4/af_inet.c), except that checksums stay partial.

use super::SegmentError;
use super::checksum;
use super::inner::{
    CWR, FIN, Family, Layout, PSH, RST, SYN, TCP_FLAGS, TCP_SEQ, Transport, UDP_LENGTH, URG, V4_CHECKSUM,
    V4_ID, V4_LENGTH, V6_LEN, V6_LENGTH, be16, be32, parse, put16, v4_constant_sum,
};
use crate::wire::vnet::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader};

/// The packets in one read of the TUN device. Getters: [`Segments::max_len`], [`Segments::count`]. Call
/// [`Segments::next_into`] until it returns `None`.
#[derive(Clone, Debug)]
pub struct Segments<'a> {
    packet: &'a [u8],
    cut: Cut,
    /// Payload already out; packets already out where there is nothing to cut.
    done: usize,
    left: usize,
}

/// One packet written by [`Segments::next_into`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Bytes at the front of the buffer.
    pub len: usize,
    /// The checksum field holds only the pseudo-header's sum, and [`parse`] finds that field.
    pub partial_csum: bool,
}

#[derive(Clone, Debug)]
enum Cut {
    /// One packet, its checksum as it is.
    Whole {
        partial_csum: bool,
    },
    /// One packet whose partial checksum the receiver would not find: completed here.
    Complete {
        start: usize,
        offset: usize,
    },
    Super(SuperPacket),
}

impl<'a> Segments<'a> {
    /// Looks at `packet` (from its IP header on) and the virtio header in front of it.
    ///
    /// A packet that is no super-packet is never refused for what is in it, only where it is empty or
    /// where the checksum to complete lies outside.
    ///
    /// # Errors
    /// `TooShort`, `BadChecksumStart`; for super-packets also those of [`parse`], `BadGsoType`,
    /// `ZeroGsoSize`, `LengthMismatch` and `TooManySegments`.
    pub fn new(vnet: VnetHeader, packet: &'a [u8]) -> Result<Segments<'a>, SegmentError> {
        Segments::within(vnet, packet, usize::MAX)
    }

    /// Like [`Segments::new`], but cuts TCP into segments of at most `mtu` bytes, IP header included, where the
    /// kernel's would be longer: super-packets, and packets that are none, as if they were.
    ///
    /// What can't be cut stays longer, as [`Segments::max_len`] says: UDP, whose datagrams have their borders; segments
    /// with SYN, RST or URG; a packet whose full checksum is wrong, so that its receiver finds that out; one whose
    /// headers leave no room.
    ///
    /// # Errors
    /// Those of [`Segments::new`].
    pub fn within(vnet: VnetHeader, packet: &'a [u8], mtu: usize) -> Result<Segments<'a>, SegmentError> {
        if packet.is_empty() {
            return Err(SegmentError::TooShort);
        }
        if vnet.gso_type != GSO_NONE {
            return Ok(Segments::of(packet, SuperPacket::parse(vnet, packet)?.within(packet, mtu)?));
        }
        if packet.len() > mtu
            && let Some(packets) = SuperPacket::of_large(vnet, packet, mtu)
        {
            return Ok(Segments::of(packet, packets));
        }
        let cut = if !vnet.needs_csum() {
            Cut::Whole { partial_csum: false }
        } else if parse(packet).is_ok_and(|layout| is_checksum_of(vnet, &layout)) {
            Cut::Whole { partial_csum: true }
        } else {
            let (start, offset) = (usize::from(vnet.csum_start), usize::from(vnet.csum_offset));
            if start + offset + 2 > packet.len() {
                return Err(SegmentError::BadChecksumStart);
            }
            Cut::Complete { start, offset }
        };
        Ok(Segments { packet, cut, done: 0, left: 1 })
    }

    fn of(packet: &'a [u8], packets: SuperPacket) -> Segments<'a> {
        let left = packets.segments();
        Segments { packet, cut: Cut::Super(packets), done: 0, left }
    }

    /// Length in bytes of the longest packet: what `out` of [`Segments::next_into`] must have room for.
    pub fn max_len(&self) -> usize {
        match &self.cut {
            Cut::Whole { .. } | Cut::Complete { .. } => self.packet.len(),
            Cut::Super(packets) => packets.layout.payload_at + packets.gso_size.min(packets.payload_len),
        }
    }

    /// Packets still to come.
    pub fn count(&self) -> usize {
        self.left
    }

    /// Writes the next packet to the front of `out`; `None` when all are out.
    ///
    /// Also `None`, with [`Segments::count`] as before, where `out` is too short for the packet: can't
    /// happen with [`Segments::max_len`] bytes.
    pub fn next_into(&mut self, out: &mut [u8]) -> Option<Segment> {
        if self.left == 0 {
            return None;
        }
        let segment = match &self.cut {
            &Cut::Whole { partial_csum } => {
                out.get_mut(..self.packet.len())?.copy_from_slice(self.packet);
                Segment { len: self.packet.len(), partial_csum }
            }
            &Cut::Complete { start, offset } => {
                let out = out.get_mut(..self.packet.len())?;
                out.copy_from_slice(self.packet);
                checksum::complete(out, start, offset)?;
                Segment { len: self.packet.len(), partial_csum: false }
            }
            Cut::Super(packets) => {
                let from = self.done;
                let payload_len = packets.gso_size.min(packets.payload_len - from);
                let len = packets.layout.payload_at + payload_len;
                let (head, payload) = out.get_mut(..len)?.split_at_mut(packets.layout.payload_at);
                packets.write_head(self.packet, head, from, payload_len);
                let start = packets.layout.payload_at + from;
                payload.copy_from_slice(&self.packet[start..start + payload_len]);
                self.done += payload_len;
                Segment { len, partial_csum: true }
            }
        };
        self.left -= 1;
        Some(segment)
    }
}

/// Cuts a super-packet into smaller ones of at most `max_len` bytes (virtio header not counted), for
/// queues whose messages are small. Returns how many there are.
///
/// `emit` gets each as virtio header, headers and payload. A packet that fits is emitted unchanged and
/// unread, as `(vnet, packet, &[])`. Every piece carries as many whole segments as fit; one that carries a
/// single segment is no super-packet, but a packet with a partial checksum.
///
/// # Errors
/// Before anything is emitted: `TooLong` where one segment, or a packet that can't be cut, is longer than
/// `max_len`; `BadHeaderLength` where the headers are longer than 256 bytes; those of [`Segments::new`].
pub fn pieces(
    vnet: VnetHeader,
    packet: &[u8],
    max_len: usize,
    mut emit: impl FnMut(VnetHeader, &[u8], &[u8]),
) -> Result<usize, SegmentError> {
    if packet.len() <= max_len {
        emit(vnet, packet, &[]);
        return Ok(1);
    }
    if vnet.gso_type == GSO_NONE {
        return Err(SegmentError::TooLong);
    }
    let packets = SuperPacket::parse(vnet, packet)?;
    let head_len = packets.layout.payload_at;
    let mut buffer = [0; MAX_PIECE_HEAD];
    let head = buffer.get_mut(..head_len).ok_or(SegmentError::BadHeaderLength)?;
    let whole = max_len.saturating_sub(head_len) / packets.gso_size * packets.gso_size;
    if whole == 0 {
        return Err(SegmentError::TooLong);
    }

    let mut emitted = 0;
    for (index, payload) in packet[head_len..].chunks(whole).enumerate() {
        packets.write_head(packet, head, index * whole, payload.len());
        emit(packets.piece_vnet(index == 0, payload.len()), head, payload);
        emitted += 1;
    }
    Ok(emitted)
}

/// What the segments of a super-packet have in common.
#[derive(Clone, Debug)]
struct SuperPacket {
    layout: Layout,
    gso_type: u8,
    /// Never 0.
    gso_size: usize,
    payload_len: usize,
    /// Sum of the IPv4 header without the fields that differ between segments.
    ip_sum: u32,
    /// Sum of the pseudo-header without the length.
    pseudo_sum: u32,
}

impl SuperPacket {
    fn parse(vnet: VnetHeader, packet: &[u8]) -> Result<SuperPacket, SegmentError> {
        let expected = match vnet.gso_type {
            GSO_UDP_L4 => (None, Transport::Udp),
            tcp if tcp & !GSO_ECN == GSO_TCPV4 => (Some(Family::V4), Transport::Tcp),
            tcp if tcp & !GSO_ECN == GSO_TCPV6 => (Some(Family::V6), Transport::Tcp),
            _ => return Err(SegmentError::BadGsoType),
        };
        if vnet.gso_size == 0 {
            return Err(SegmentError::ZeroGsoSize);
        }
        let layout = parse(packet)?;
        if layout.transport != expected.1 || expected.0.is_some_and(|family| family != layout.family) {
            return Err(SegmentError::BadGsoType);
        }
        if vnet.needs_csum() && !is_checksum_of(vnet, &layout) {
            return Err(SegmentError::BadChecksumStart);
        }
        let transport = &packet[layout.transport_at..];
        // Without jumbograms a packet's length fits in 17 bits.
        let transport_len = transport.len() as u32;
        if layout.transport == Transport::Udp && u32::from(be16(transport, UDP_LENGTH)) != transport_len {
            return Err(SegmentError::LengthMismatch);
        }
        let pseudo_sum = if vnet.needs_csum() {
            // Taken from the field, as the kernel does: with a routing header the sum is that of the last
            // destination, which is not the one in the IP header.
            let field = be16(transport, layout.transport.checksum_offset());
            let len = checksum::fold(transport_len);
            u32::from(field) + u32::from(!len)
        } else {
            let addresses = &packet[layout.family.addresses()];
            checksum::pseudo_header(addresses, layout.transport.protocol(), 0)
        };
        let ip_sum = match layout.family {
            Family::V4 => v4_constant_sum(&packet[..layout.transport_at]),
            Family::V6 => 0,
        };
        let packets = SuperPacket {
            layout,
            gso_type: vnet.gso_type,
            gso_size: usize::from(vnet.gso_size),
            payload_len: packet.len() - layout.payload_at,
            ip_sum,
            pseudo_sum,
        };
        packets.bounded()
    }

    /// A TCP packet longer than `mtu` that is no super-packet, to be cut as if it were; `None` where it can't be.
    fn of_large(vnet: VnetHeader, packet: &[u8], mtu: usize) -> Option<SuperPacket> {
        let layout = parse(packet).ok()?;
        if layout.transport != Transport::Tcp || (!vnet.needs_csum() && !is_intact(packet, &layout)) {
            return None;
        }
        let gso_type = match layout.family {
            Family::V4 => GSO_TCPV4,
            Family::V6 => GSO_TCPV6,
        };
        let whole = VnetHeader { gso_type, gso_size: u16::MAX, ..vnet };
        let packets = SuperPacket::parse(whole, packet).ok()?.within(packet, mtu).ok()?;
        (packets.segments() > 1).then_some(packets)
    }

    /// With segments of at most `mtu` bytes, if they can be.
    fn within(mut self, packet: &[u8], mtu: usize) -> Result<SuperPacket, SegmentError> {
        let room = mtu.saturating_sub(self.layout.payload_at);
        if room < self.gso_size
            && room > 0
            && self.layout.transport == Transport::Tcp
            && packet[self.layout.transport_at + TCP_FLAGS] & (SYN | RST | URG) == 0
        {
            self.gso_size = room;
            return self.bounded();
        }
        Ok(self)
    }

    fn bounded(self) -> Result<SuperPacket, SegmentError> {
        if self.segments() > MAX_SEGMENTS { Err(SegmentError::TooManySegments) } else { Ok(self) }
    }

    fn segments(&self) -> usize {
        // A bare header is still one packet.
        self.payload_len.div_ceil(self.gso_size).max(1)
    }

    /// Writes the headers of the packet that carries `payload_len` bytes of payload from `from` on, which
    /// is a multiple of the GSO size. `head` is as long as the headers of `packet`.
    fn write_head(&self, packet: &[u8], head: &mut [u8], from: usize, payload_len: usize) {
        let Layout { family, transport, transport_at, payload_at } = self.layout;
        head.copy_from_slice(&packet[..payload_at]);
        let packet_len = payload_at + payload_len;
        match family {
            Family::V4 => {
                let len = packet_len as u16;
                // At most MAX_SEGMENTS.
                let id = be16(head, V4_ID).wrapping_add((from / self.gso_size) as u16);
                put16(head, V4_LENGTH, len);
                put16(head, V4_ID, id);
                put16(head, V4_CHECKSUM, checksum::finish(self.ip_sum + u32::from(len) + u32::from(id)));
            }
            Family::V6 => put16(head, V6_LENGTH, (packet_len - V6_LEN) as u16),
        }

        let transport_len = (packet_len - transport_at) as u16;
        let head = &mut head[transport_at..];
        match transport {
            Transport::Tcp => {
                let seq = be32(head, TCP_SEQ).wrapping_add(from as u32);
                head[TCP_SEQ..TCP_SEQ + 4].copy_from_slice(&seq.to_be_bytes());
                if from > 0 {
                    head[TCP_FLAGS] &= !CWR;
                }
                if from + payload_len < self.payload_len {
                    head[TCP_FLAGS] &= !(PSH | FIN);
                }
            }
            Transport::Udp => put16(head, UDP_LENGTH, transport_len),
        }
        let pseudo_sum = checksum::fold(self.pseudo_sum + u32::from(transport_len));
        put16(head, transport.checksum_offset(), pseudo_sum);
    }

    fn piece_vnet(&self, first: bool, payload_len: usize) -> VnetHeader {
        let position = VnetHeader {
            flags: NEEDS_CSUM,
            csum_start: self.layout.transport_at as u16,
            csum_offset: self.layout.transport.checksum_offset() as u16,
            ..VnetHeader::default()
        };
        if payload_len <= self.gso_size {
            return position;
        }
        let gso_type = if first { self.gso_type } else { self.gso_type & !GSO_ECN };
        let hdr_len = self.layout.payload_at as u16;
        VnetHeader { gso_type, hdr_len, gso_size: self.gso_size as u16, ..position }
    }
}

/// Whether the packet's full checksum is right.
fn is_intact(packet: &[u8], layout: &Layout) -> bool {
    let transport = &packet[layout.transport_at..];
    let addresses = &packet[layout.family.addresses()];
    let pseudo_sum = checksum::pseudo_header(addresses, layout.transport.protocol(), transport.len() as u32);
    checksum::fold(pseudo_sum + checksum::sum(transport)) == 0xffff
}

fn is_checksum_of(vnet: VnetHeader, layout: &Layout) -> bool {
    usize::from(vnet.csum_start) == layout.transport_at
        && usize::from(vnet.csum_offset) == layout.transport.checksum_offset()
}

/// Most segments of one super-packet. The kernel's smallest MSS (`TCP_MIN_SND_MSS`, 48 with options) aside,
/// 64 KiB of the 536-byte segments that every host takes are 123; this allows segments of 64 bytes, and
/// bounds the work that one read with a GSO size of 1 makes.
pub const MAX_SEGMENTS: usize = 1024;

/// Longest headers of a piece: IPv4 needs at most 120 bytes, IPv6 100 and its extension headers.
const MAX_PIECE_HEAD: usize = 256;
