//! The way out: super-packets from the device or the queue become sealed datagrams, in runs of one size that
//! one system call sends.
//!
//! 1. cut the super-packet into packets, each behind room for a header ([`crate::segment`])
//! 2. seal each in place ([`Session::seal`])
//! 3. append it to the run, or send the run first where it doesn't fit

use crate::drops::DropReason;
use crate::path::Path;
use crate::segment::{Segments, ecn};
use crate::session::Session;
use crate::sys::udp::{Carrier, Unsent};
use crate::time::Time;
use crate::wire::data::{HEADER_LEN, OVERHEAD, PARTIAL_CSUM, TAG_LEN};
use crate::wire::vnet::VnetHeader;

/// Sockets that runs go out by.
pub trait Outlet {
    /// Sends `datagrams`, each `stride` bytes but the last, which may be shorter, on `path`.
    fn send(&self, path: &Path, ecn: u8, datagrams: &[u8], stride: usize) -> Result<(), Unsent>;

    /// Datagrams one call can send.
    fn max_segments(&self) -> usize;
}

impl Outlet for Carrier {
    fn send(&self, path: &Path, ecn: u8, datagrams: &[u8], stride: usize) -> Result<(), Unsent> {
        Carrier::send(self, path, ecn, datagrams, stride)
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
        let mut segments = match Segments::new(vnet, packet) {
            Ok(segments) => segments,
            Err(_) => return Egress::refuse(session),
        };
        session.taken(segments.count() as u64);
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
            let size = HEADER_LEN + segment.len + TAG_LEN;
            if !self.fits(size, carrier) {
                let at = self.len;
                self.flush(session, carrier);
                self.bytes.copy_within(at + HEADER_LEN..at + HEADER_LEN + segment.len, HEADER_LEN);
            }
            let flags = if segment.partial_csum { PARTIAL_CSUM } else { 0 };
            match session.seal(now, flags, &mut self.bytes[self.len..self.len + size]) {
                Ok(()) => self.append(size),
                Err(reason) => {
                    session.drops.add(reason, 1 + segments.count() as u64);
                    return;
                }
            }
        }
        // None is left, unless its checksum could not be completed.
        session.drops.add(DropReason::BadSuperPacket, segments.count() as u64);
    }

    /// Counts what came to be sent and makes no sense.
    pub fn refuse(session: &mut Session) {
        session.taken(1);
        session.drops.count(DropReason::BadSuperPacket);
    }

    /// Sends the run, on each path that data goes to. What got out by none of them is counted as dropped.
    pub fn flush(&mut self, session: &mut Session, carrier: &impl Outlet) {
        if self.datagrams > 0 {
            let (mut unsent, mut sent) = (None, 0);
            let targets = if self.lane.is_some() { 1 } else { session.targets() };
            for n in 0..targets {
                let path = match self.lane {
                    Some(lane) => session.lane_target(self.now, lane, self.datagrams, self.len),
                    None => session.target(self.now, n, self.len),
                };
                let Some(path) = path else { continue };
                match carrier.send(&path, self.ecn, &self.bytes[..self.len], self.stride) {
                    Ok(()) => sent += 1,
                    Err(failed) => unsent = unsent.or(Some(failed)),
                }
            }
            if sent > 1 {
                session.copied(self.datagrams as u64 * (sent - 1));
            } else if sent == 0 {
                let (reason, datagrams) = unsent.map_or((DropReason::Unproven, self.datagrams), |failed| {
                    (failed.reason, failed.datagrams)
                });
                session.drops.add(reason, datagrams as u64);
            }
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

/// UDP_MAX_SEGMENTS of kernels before 6.9 (net/ipv4/udp.c).
const RUN_DATAGRAMS: usize = 64;
/// Bytes of a run: below what one IP packet holds, as the kernel builds the run as one (udp_send_skb()).
const RUN_BYTES: usize = 65_000;
