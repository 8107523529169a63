//! The way in: runs of datagrams become packets, and runs of packets super-packets for the device.
//!
//! 1. open each datagram in place ([`Session::open`]): nothing before its tag changes state
//! 2. take the outer congestion mark in (RFC 6040)
//! 3. check whose packet it is, and that its sender may send so much
//! 4. merge runs of consecutive segments and write each with one gathered write ([`crate::segment::next_run`])

use std::io::{self, IoSlice};

use crate::drops::DropReason;
use crate::keys::Role;
use crate::rate::{Bucket, Rate};
use crate::segment::{Inner, MAX_RUN, clamp_mss, ecn, inner, next_run};
use crate::session::{Opened, Session};
use crate::sys::udp::{ReceiveBuffers, Received};
use crate::time::Time;

/// Packets that were opened and wait to be written: where they are in the receive buffers.
#[derive(Default)]
pub struct Ingress {
    opened: Vec<Place>,
    /// How much the peer may send.
    limit: Option<Bucket>,
}

struct Place {
    buffer: usize,
    start: usize,
    end: usize,
    partial_csum: bool,
}

impl Ingress {
    /// For a peer that may send so much.
    pub fn limited(limit: Option<Rate>, now: Time) -> Ingress {
        let bucket = |rate: Rate| Bucket::new(rate, rate.burst(), now);
        Ingress { opened: Vec::new(), limit: limit.map(bucket) }
    }

    /// Opens the run of datagrams that `received` says is in `buffer`. Which inner addresses are right depends
    /// on our end: a server takes packets *from* the session's addresses, a client packets *to* them.
    pub fn open(
        &mut self,
        session: &mut Session,
        role: Role,
        now: Time,
        received: &Received,
        buffer: &mut [u8],
    ) {
        let mut start = 0;
        for datagram in buffer[..received.len].chunks_mut(received.stride) {
            let base = start;
            start += datagram.len();
            let opened = session.open(now, received.path, datagram);
            let (text, partial_csum) = match opened {
                Ok(Opened::Packet { text, partial_csum }) => (text, partial_csum),
                Ok(Opened::InBand) => continue,
                Err(reason) => {
                    session.drops.count(reason);
                    continue;
                }
            };
            let admitted = admit(session, role, received.ecn, &mut datagram[text.clone()]);
            match admitted.and_then(|()| self.police(now, text.len())) {
                Ok(()) => {
                    session.carried(now, &datagram[text.clone()]);
                    // So that what comes back fits, too.
                    if let Some(mtu) = session.announced_mtu() {
                        clamp_mss(&mut datagram[text.clone()], partial_csum, mtu);
                    }
                    self.opened.push(Place {
                        buffer: received.buffer,
                        start: base + text.start,
                        end: base + text.end,
                        partial_csum,
                    });
                }
                Err(reason) => session.drops.count(reason),
            }
        }
    }

    /// Takes in a packet that came with the client's Hello, from the first `len` bytes of the first buffer.
    pub fn take_early(&mut self, session: &mut Session, now: Time, len: usize, buffers: &mut ReceiveBuffers) {
        let packet = &mut buffers[0][..len];
        match admit(session, Role::Server, 0, packet).and_then(|()| self.police(now, len)) {
            Ok(()) => {
                session.carried(now, packet);
                session.delivered_early();
                self.opened.push(Place { buffer: 0, start: 0, end: len, partial_csum: false });
            }
            Err(reason) => session.drops.count(reason),
        }
    }

    /// Each packet by itself, before they are merged: what is left of a flow is to be without large gaps.
    fn police(&mut self, now: Time, bytes: usize) -> Result<(), DropReason> {
        let passes = self.limit.as_mut().is_none_or(|limit| limit.pass(now, bytes));
        if passes { Ok(()) } else { Err(DropReason::RateUp) }
    }

    /// Hands everything that was opened to `write`, each call one virtio header and one packet or super-packet
    /// in pieces, and forgets it.
    pub fn write_out(
        &mut self,
        session: &mut Session,
        buffers: &ReceiveBuffers,
        uso: bool,
        mut write: impl FnMut(&[IoSlice<'_>]) -> Result<(), DropReason>,
    ) {
        let inners: Vec<Inner<'_>> = self
            .opened
            .iter()
            .map(|p| Inner { packet: &buffers[p.buffer][p.start..p.end], partial_csum: p.partial_csum })
            .collect();
        let mut rest = &inners[..];
        while !rest.is_empty() {
            let Ok(run) = next_run(rest, uso) else {
                session.drops.count(DropReason::BadInner);
                rest = &rest[1..];
                continue;
            };
            let (members, others) = rest.split_at(run.count);
            rest = others;
            let vnet = run.vnet.emit();
            let mut parts = Vec::with_capacity(2 + MAX_RUN);
            parts.push(IoSlice::new(&vnet));
            parts.push(IoSlice::new(run.head()));
            parts.extend(members.iter().map(|m| IoSlice::new(&m.packet[run.payload_offset()..])));
            match write(&parts) {
                Ok(()) => {
                    let bytes = members.iter().map(|m| m.packet.len() as u64).sum();
                    session.delivered(run.count as u64, bytes);
                }
                Err(reason) => session.drops.add(reason, run.count as u64),
            }
        }
        self.opened.clear();
    }
}

/// What a failed write to the TUN device is counted as; it is never more than that.
pub fn tun_refused(_error: &io::Error) -> DropReason {
    DropReason::TunRefused
}

fn admit(session: &Session, role: Role, outer_ecn: u8, packet: &mut [u8]) -> Result<(), DropReason> {
    let (source, destination) = inner::addresses(packet).ok_or(DropReason::BadInner)?;
    match role {
        Role::Server if !session.owns(source) => return Err(DropReason::SourceNotOurs),
        Role::Client if !session.owns(destination) => return Err(DropReason::DestinationNotOurs),
        _ => {}
    }
    ecn::decapsulate(outer_ecn, packet).map_err(|_| DropReason::Congested)
}
