//! The way out: super-packets from the device or the queue become sealed datagrams, in runs of one size that
//! one system call sends.
//!
//! 1. cut the super-packet into packets, each behind room for a header ([`crate::segment`])
//! 2. seal each in place ([`Session::seal`])
//! 3. append it to the run, or send the run first where it doesn't fit

use std::collections::VecDeque;
use std::time::Duration;

use crate::budget::Budget;
use crate::drops::DropReason;
use crate::path::{INSIDE, Path};
use crate::paths::Say;
use crate::segment::{Segment, Segments, addresses, clamp_mss, ecn, fragment, too_big};
use crate::session::{IN_BAND_LEN, Session};
use crate::sys::udp::{self, Carrier, Unsent};
use crate::time::Time;
use crate::wire::data::{HEADER_LEN, OVERHEAD, PARTIAL_CSUM, TAG_LEN};
use crate::wire::vnet::VnetHeader;

/// Sockets that runs go out by.
pub trait Outlet {
    /// Sends `datagrams`, each `stride` bytes but the last, which may be shorter, on `path`.
    fn send(&self, path: &Path, ecn: u8, datagrams: &[u8], stride: usize) -> Result<(), Unsent>;

    /// Sends one datagram that arrives whole or not at all; [`DropReason::TooBig`] where our own link can't carry it.
    fn send_whole(&self, path: &Path, datagram: &[u8]) -> Result<(), DropReason>;

    /// Datagrams one call can send.
    fn max_segments(&self) -> usize;
}

impl Outlet for Carrier {
    fn send(&self, path: &Path, ecn: u8, datagrams: &[u8], stride: usize) -> Result<(), Unsent> {
        Carrier::send(self, path, ecn, datagrams, stride)
    }

    fn send_whole(&self, path: &Path, datagram: &[u8]) -> Result<(), DropReason> {
        Carrier::send_whole(self, path, datagram).map_err(|error| udp::reason(&error))
    }

    fn max_segments(&self) -> usize {
        Carrier::max_segments(self)
    }
}

/// The run being filled.
pub struct Egress {
    bytes: Vec<u8>,
    /// Datagrams and bytes of the run.
    datagrams: usize,
    len: usize,
    /// Size of each but the last.
    stride: usize,
    /// The last one was shorter: nothing more fits behind it.
    closed: bool,
    /// ECN bits of the outer headers.
    ecn: u8,
    /// When the last of it came.
    now: Time,
    /// Where it goes, if flows are spread over several paths.
    lane: Option<Path>,
    /// For inner senders whose packets are too large.
    told: VecDeque<Vec<u8>>,
    /// How many more there may be for now, and since when.
    allowance: Budget,
}

impl Default for Egress {
    fn default() -> Egress {
        let bytes = vec![0; RUN_BYTES + u16::MAX as usize + OVERHEAD];
        Egress {
            bytes,
            datagrams: 0,
            len: 0,
            stride: 0,
            closed: false,
            ecn: 0,
            now: Time::default(),
            lane: None,
            told: VecDeque::new(),
            allowance: Budget::new(TOLD_AT_ONCE, TOLD_EVERY, Time::default()),
        }
    }
}

impl Egress {
    /// Takes in one packet or super-packet. Runs that are full are sent on the session's path; what doesn't
    /// become a datagram is counted in the session's drops.
    pub fn push(
        &mut self,
        session: &mut Session,
        carrier: &impl Outlet,
        now: Time,
        vnet: VnetHeader,
        packet: &[u8],
    ) {
        let narrow = session.narrow();
        let mut segments = match Segments::within(vnet, packet, narrow.unwrap_or(usize::MAX)) {
            Ok(segments) => segments,
            Err(_) => return Egress::refuse(session),
        };
        session.taken(segments.count() as u64);
        session.carries(now, packet);
        if session.path().is_none() {
            return session.drops.add(DropReason::NoPath, segments.count() as u64);
        }
        self.now = now;
        let lane = session.lane(now, packet);
        if self.lane != lane {
            self.flush(session, carrier);
            self.lane = lane;
        }
        // RFC 6040 section 4.1: the outer header takes the inner's bits.
        let ecn = ecn::ecn_of(packet).unwrap_or(0);
        if self.ecn != ecn {
            self.flush(session, carrier);
            self.ecn = ecn;
        }
        while let Some(segment) = segments.next_into(&mut self.bytes[self.len + HEADER_LEN..]) {
            let sealed = match narrow {
                None => self.seal(session, carrier, segment),
                Some(mtu) => self.seal_narrow(session, carrier, segment, mtu),
            };
            if let Err(reason) = sealed {
                session.drops.add(reason, 1 + segments.count() as u64);
                return;
            }
        }
        // None is left, unless its checksum could not be completed.
        session.drops.add(DropReason::BadSuperPacket, segments.count() as u64);
    }

    /// Seals the packet that lies behind the run, and appends it or begins the next run with it.
    fn seal(
        &mut self,
        session: &mut Session,
        carrier: &impl Outlet,
        segment: Segment,
    ) -> Result<(), DropReason> {
        let size = HEADER_LEN + segment.len + TAG_LEN;
        if !self.fits(size, carrier) {
            let at = self.len;
            self.flush(session, carrier);
            self.bytes.copy_within(at + HEADER_LEN..at + HEADER_LEN + segment.len, HEADER_LEN);
        }
        let flags = if segment.partial_csum { PARTIAL_CSUM } else { 0 };
        session.seal(self.now, flags, &mut self.bytes[self.len..self.len + size])?;
        self.append(size);
        Ok(())
    }

    /// The same where the path carries packets of `mtu` bytes, less than the device sends. What is larger and may be
    /// is fragmented. Of the rest the sender is told, and it goes all the same, in outer fragments: the news may
    /// never reach it.
    fn seal_narrow(
        &mut self,
        session: &mut Session,
        carrier: &impl Outlet,
        segment: Segment,
        mtu: usize,
    ) -> Result<(), DropReason> {
        let packet = &mut self.bytes[self.len + HEADER_LEN..][..segment.len];
        let announced = session.announced_mtu();
        if let Some(mtu) = announced {
            clamp_mss(packet, segment.partial_csum, mtu);
        }
        if segment.len <= mtu {
            return self.seal(session, carrier, segment);
        }
        let Some(fragments) = fragment(packet, segment.partial_csum, mtu) else {
            if let Some(mtu) = announced {
                self.tell(segment.len, mtu);
            }
            return self.seal(session, carrier, segment);
        };
        session.cut_further(fragments.len() as u64 - 1);
        let mut left = fragments.len() as u64;
        for fragment in fragments {
            left -= 1;
            self.bytes[self.len + HEADER_LEN..][..fragment.len()].copy_from_slice(&fragment);
            let one = Segment { len: fragment.len(), partial_csum: false };
            if let Err(reason) = self.seal(session, carrier, one) {
                // The caller counts one.
                session.drops.add(reason, left);
                return Err(reason);
            }
        }
        Ok(())
    }

    /// Tells the sender of the packet that lies behind the run, as if its destination did: that address is the one
    /// of which the device's host expects packets from there.
    fn tell(&mut self, len: usize, mtu: usize) {
        let packet = &self.bytes[self.len + HEADER_LEN..][..len];
        let Some(message) = addresses(packet).and_then(|(_, from)| too_big(packet, mtu, from)) else {
            return;
        };
        if self.allowance.take(self.now) {
            self.told.push_back(message);
        }
    }

    /// The next packet to be written to the device: news for one of its senders.
    pub fn poll_told(&mut self) -> Option<Vec<u8>> {
        self.told.pop_front()
    }

    /// Counts what came to be sent and makes no sense.
    pub fn refuse(session: &mut Session) {
        session.taken(1);
        session.drops.count(DropReason::BadSuperPacket);
    }

    /// Sends the run, on each path that data goes to. What got out by none of them is counted as dropped.
    pub fn flush(&mut self, session: &mut Session, carrier: &impl Outlet) {
        if self.datagrams > 0 {
            let (mut unsent, mut sent, mut out) = (None, 0, 0);
            let targets = if self.lane.is_some() { 1 } else { session.targets() };
            for n in 0..targets {
                let path = match self.lane {
                    Some(lane) => session.lane_target(self.now, lane, self.datagrams, self.len),
                    None => session.target(self.now, n, self.len),
                };
                let Some(path) = path else { continue };
                match carrier.send(&path, self.ecn, &self.bytes[..self.len], self.stride) {
                    Ok(()) => {
                        sent += 1;
                        out += self.datagrams;
                        if path.carrier == INSIDE {
                            session.went_inside(self.datagrams as u64);
                        }
                    }
                    Err(failed) => {
                        out += self.datagrams.saturating_sub(failed.datagrams);
                        unsent = unsent.or(Some(failed));
                    }
                }
            }
            if sent > 0 {
                session.handle_sent(self.now, self.stride);
            }
            // The link is gone, and nobody has said so yet.
            if sent == 0
                && unsent.is_some_and(|failed| failed.reason == DropReason::SendRefused)
                && let Some(path) = session.way_out(self.now)
                && carrier.send(&path, self.ecn, &self.bytes[..self.len], self.stride).is_ok()
            {
                sent = 1;
                out += self.datagrams;
                if path.carrier == INSIDE {
                    session.went_inside(self.datagrams as u64);
                }
            }
            let mut dropped = 0;
            if sent == 0 {
                let (reason, datagrams) = unsent.map_or((DropReason::Unproven, self.datagrams), |failed| {
                    (failed.reason, failed.datagrams)
                });
                dropped = datagrams;
                session.drops.add(reason, datagrams as u64);
            }
            session.copied((out + dropped).saturating_sub(self.datagrams) as u64);
        }
        (self.datagrams, self.len, self.closed) = (0, 0, false);
    }

    fn fits(&self, size: usize, carrier: &impl Outlet) -> bool {
        self.datagrams == 0
            || (!self.closed
                && size <= self.stride
                && self.datagrams < carrier.max_segments().min(RUN_DATAGRAMS)
                && self.len + size <= RUN_BYTES)
    }

    fn append(&mut self, size: usize) {
        if self.datagrams == 0 {
            self.stride = size;
        }
        self.closed = size < self.stride;
        self.datagrams += 1;
        self.len += size;
    }
}

/// Seals an in-band message and sends it on its path; what becomes of nothing is counted in the session's drops.
pub fn say(session: &mut Session, carrier: &impl Outlet, now: Time, say: &Say) {
    let mut datagram = vec![0; IN_BAND_LEN.max(say.pad)];
    let sent = session.seal_in_band(now, say, &mut datagram).and_then(|len| {
        if say.is_probe() {
            return carrier.send_whole(&say.path, &datagram[..len]);
        }
        carrier.send(&say.path, 0, &datagram[..len], len).map_err(|unsent| unsent.reason)
    });
    match sent {
        Ok(()) if say.path.carrier == INSIDE => session.went_inside(1),
        Ok(()) => {}
        Err(DropReason::TooBig) if say.is_probe() => session.handle_refused(now, say),
        Err(reason) => session.drops.count(reason),
    }
}

/// News for inner senders: a few at once, then ten a second.
const TOLD_AT_ONCE: u32 = 20;
const TOLD_EVERY: Duration = Duration::from_millis(100);
/// UDP_MAX_SEGMENTS of kernels before 6.9 (net/ipv4/udp.c).
const RUN_DATAGRAMS: usize = 64;
/// Bytes of a run: below what one IP packet holds, as the kernel builds the run as one (udp_send_skb()).
const RUN_BYTES: usize = 65_000;
