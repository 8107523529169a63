//! IPv4 ICMP echo (RFC 792): the one inner protocol every server answers.

use std::net::Ipv4Addr;

use tunguard::segment::checksum;

/// An echo request of `size` bytes in all.
pub fn request(source: Ipv4Addr, destination: Ipv4Addr, size: usize, sequence: u16) -> Vec<u8> {
    let size = size.max(HEADERS);
    let mut packet = vec![0; size];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(size as u16).to_be_bytes());
    packet[6] = 0x40;
    packet[8] = 64;
    packet[9] = ICMP;
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&destination.octets());
    let sum = checksum::finish(checksum::sum(&packet[..IP]));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet[20] = ECHO_REQUEST;
    packet[26..28].copy_from_slice(&sequence.to_be_bytes());
    let sum = checksum::finish(checksum::sum(&packet[IP..]));
    packet[22..24].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Whether this is an answer to one.
pub fn is_reply(packet: &[u8]) -> bool {
    packet.len() >= HEADERS && packet[9] == ICMP && packet[20] == ECHO_REPLY
}

const IP: usize = 20;
const HEADERS: usize = 28;
const ICMP: u8 = 1;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
