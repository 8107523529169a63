//! What the other benches work on: packets as the kernel hands them over, and random numbers that are the same
//! in every run.

use criterion::BatchSize;
use tunguard::segment::checksum;
use tunguard::wire::data::{HEADER_LEN, TAG_LEN};
use tunguard::wire::vnet::{GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader};

/// A flow between a client and a server; its packets have partial checksums, as those of local sockets.
#[derive(Clone, Copy)]
pub struct Flow {
    v6: bool,
    udp: bool,
    source_port: u16,
}

impl Flow {
    pub const TCP_V4: Flow = Flow { v6: false, udp: false, source_port: 40_000 };
    pub const TCP_V6: Flow = Flow { v6: true, ..Flow::TCP_V4 };
    pub const UDP_V4: Flow = Flow { udp: true, ..Flow::TCP_V4 };

    /// Another connection between the same two hosts.
    pub fn neighbour(self, index: usize) -> Flow {
        Flow { source_port: self.source_port + index as u16, ..self }
    }

    /// What a packet of [`PACKET_LEN`] bytes carries.
    pub fn payload_len(self) -> usize {
        PACKET_LEN - self.transport_at() - self.transport_len()
    }

    /// `payload` in packets of [`PACKET_LEN`] bytes.
    pub fn segments(self, payload: &[u8]) -> Vec<Vec<u8>> {
        let size = self.payload_len();
        let chunks = payload.chunks(size).enumerate();
        chunks
            .map(|(i, chunk)| self.packet(FIRST_ID + i as u16, FIRST_SEQ + (i * size) as u32, chunk))
            .collect()
    }

    /// `payload` in one super-packet that stands for [`Flow::segments`], and its virtio header.
    pub fn super_packet(self, payload: &[u8]) -> (VnetHeader, Vec<u8>) {
        let vnet = VnetHeader {
            gso_type: match (self.udp, self.v6) {
                (true, _) => GSO_UDP_L4,
                (false, false) => GSO_TCPV4,
                (false, true) => GSO_TCPV6,
            },
            gso_size: self.payload_len() as u16,
            hdr_len: (self.transport_at() + self.transport_len()) as u16,
            ..self.partial()
        };
        (vnet, self.packet(FIRST_ID, FIRST_SEQ, payload))
    }

    /// The virtio header of a packet that is none.
    pub fn partial(self) -> VnetHeader {
        VnetHeader {
            flags: NEEDS_CSUM,
            csum_start: self.transport_at() as u16,
            csum_offset: self.checksum_offset() as u16,
            ..VnetHeader::default()
        }
    }

    fn packet(self, id: u16, seq: u32, payload: &[u8]) -> Vec<u8> {
        let transport_len = (self.transport_len() + payload.len()) as u16;
        let protocol = if self.udp { 17 } else { 6 };
        let mut packet = if self.v6 {
            let mut ip = vec![0x60, 0, 0, 0];
            ip.extend(transport_len.to_be_bytes());
            ip.extend([protocol, 64]);
            ip.extend([0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
            ip.extend([0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            ip
        } else {
            let mut ip = vec![0x45, 0];
            ip.extend((20 + transport_len).to_be_bytes());
            ip.extend(id.to_be_bytes());
            ip.extend([0x40, 0, 64, protocol, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
            let checksum = checksum::finish(checksum::sum(&ip));
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
            ip
        };
        let addresses = if self.v6 { &packet[8..40] } else { &packet[12..20] };
        let pseudo = checksum::fold(checksum::pseudo_header(addresses, protocol, transport_len.into()));

        packet.extend(self.source_port.to_be_bytes());
        packet.extend(443u16.to_be_bytes());
        if self.udp {
            packet.extend(transport_len.to_be_bytes());
            packet.extend(pseudo.to_be_bytes());
        } else {
            packet.extend(seq.to_be_bytes());
            // Acknowledgement; data offset, ACK and window; checksum and urgent pointer; timestamps.
            packet.extend([1, 2, 3, 4, 0x80, 0x10, 1, 0xf5]);
            packet.extend(pseudo.to_be_bytes());
            packet.extend([0, 0, 1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9]);
        }
        packet.extend(payload);
        packet
    }

    fn transport_at(self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    fn transport_len(self) -> usize {
        if self.udp { 8 } else { 32 }
    }

    fn checksum_offset(self) -> usize {
        if self.udp { 6 } else { 16 }
    }
}

/// Random numbers (splitmix64).
pub struct Rng(u64);

impl Rng {
    pub fn new() -> Rng {
        Rng(0x7475_6e67_7561_7264)
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// `text` with the room that sealing needs around it.
pub fn datagram(text: &[u8]) -> Vec<u8> {
    [&[0; HEADER_LEN], text, &[0; TAG_LEN]].concat()
}

/// An inner packet that fills a datagram on most paths.
pub const PACKET_LEN: usize = 1400;
/// Packets of this size that go out or come in with one system call.
pub const RUN: usize = 45;
/// For what can be done only once to each datagram: fresh ones, made outside of the measured time, no more at once
/// than a run has, so that they are in the cache as a run is.
pub const FRESH_RUN: BatchSize = BatchSize::NumIterations(RUN as u64);

const FIRST_ID: u16 = 1000;
const FIRST_SEQ: u32 = 0xffff_0000;
