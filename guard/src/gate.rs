//! Who may knock: limits on connections before anything is known of those who make them.
//!
//! ```text
//!             +--penalised, unlucky, or no room to wait--> refused
//! connection--+--there is a place----> handshake --> session: its source is known from then on
//!             |                          ^     \---> failed: its source is charged for how
//!             +--its source has its share--> waits, not for long
//! ```
//! A source is an IPv4 address or an IPv6 /64: what one customer has. It may be one host, and it may be a school behind one
//! address, with thirty honest laptops and one that isn't. So:
//!
//! - **A share for each source.** Beyond it connections wait, accepted and unread. Closing them would be simpler, but
//!   thirty laptops at eight places would come back by their own timers for half a minute; waiting they are through within
//!   a second, as an honest handshake is over in milliseconds. What waits is bounded at all and for each source,
//!   every one for [`WAIT`] at most. Where all of the room is taken, those with the worst standing give way to better ones,
//!   strangers to known sources, and among equals the longest line does: who has hundreds waiting can't keep out who
//!   has one.
//! - **Early refusal**, as sshd's MaxStartups. Many sources together can fill all places, and shares don't help then. From half
//!   of the places on, strangers are refused by chance, more of them the fewer places are left, so that who tries
//!   again gets in at some time, and the last quarter is for sources that had a session lately. A source that failed is
//!   refused earlier than one that never did.
//! - **Penalties**, as sshd's PerSourcePenalties. Each failure is some seconds, which pass. From [`NARROW`] on a stranger has
//!   one place at a time, above [`FORBEARANCE`] its source is refused until that much has passed.
//!   What an honest client does by mistake (it shows an expired certificate, it goes away) never gets a source above
//!   that: behind one address are others, and with one place at a time, which is free again after milliseconds, they still
//!   get in. What none does (garbage; handshakes that are never finished) does, but not where sessions come from or came from
//!   in the last day: there the share must suffice. Only a worker that crashed or broke the rules counts against
//!   everybody: somebody there tries to take workers over.
//! - **Exempt sources** have no share, no chance and no penalties, only a place or none. Where there is none they wait, as many
//!   as there is room for: nobody else keeps them out.
//! - **While the gate is shut**, as nobody could be served, whoever isn't penalised waits, strangers as well.
//!
//! What a worker says of its client is used against that client's source only, and for it no more than a session would be.
//! Sources are remembered in bounded memory: those with nothing under way that are penalised least go first, those known
//! last. However many addresses somebody has, all places together are limited, and the last quarter isn't his.
//!
//! - `handle_*`: [`handle_connection`](Gate::handle_connection) first, then, of each that was served,
//!   [`handle_failed`](Gate::handle_failed) or [`handle_established`](Gate::handle_established), and
//!   [`handle_gone`](Gate::handle_gone) when its worker is
//! - `poll_*`: after each of these [`poll_next`](Gate::poll_next) and [`poll_dropped`](Gate::poll_dropped) until there is
//!   nothing; [`poll_timeout`](Gate::poll_timeout)

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ipnet::IpNet;

use tunguard::config::server::ServerConfig;
use tunguard::ipc::Cause;
use tunguard::time::Time;

use crate::host;

/// Where connections come from, as far as it can be told apart from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Source(IpAddr);

impl Source {
    /// The source of an address: an IPv4 address itself, an IPv6 address's /64, as whoever has one of its addresses has
    /// all of them.
    pub fn of(address: IpAddr) -> Source {
        match address.to_canonical() {
            IpAddr::V6(v6) => Source(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into()),
            v4 => Source(v4),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(v4) => v4.fmt(f),
            IpAddr::V6(v6) => write!(f, "{v6}/64"),
        }
    }
}

/// What the configuration allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Handshakes at once.
    pub handshakes: usize,
    /// Of these, from one source.
    pub per_source: usize,
    /// The longest refusal; `None`: no penalties.
    pub penalty: Option<Duration>,
    /// Sources without share, chance and penalties.
    pub exempt: Vec<IpNet>,
}

impl Limits {
    /// As configured, or fewer where the queues of all are charged to one allowance (`shared`).
    pub fn of(config: &ServerConfig, shared: bool) -> Limits {
        let handshakes = host::handshakes(config, shared);
        Limits {
            handshakes: handshakes.into(),
            per_source: config.max_handshakes_per_source.min(handshakes).into(),
            penalty: config.penalty,
            exempt: config.exempt_sources.clone(),
        }
    }
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It gets a worker.
    Serve,
    /// It waits under this number.
    Wait(u64),
    /// It is closed.
    Refuse(Refusal),
}

/// Why a connection was closed unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its source failed too often.
    Penalised,
    /// Places are becoming few.
    Early,
    /// Too many wait already.
    Crowded,
    /// It waited in vain.
    Late,
}

impl Refusal {
    /// Every cause, in order.
    pub const ALL: [Refusal; 4] = [Refusal::Penalised, Refusal::Early, Refusal::Crowded, Refusal::Late];

    /// The name in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Refusal::Penalised => "penalised",
            Refusal::Early => "early",
            Refusal::Crowded => "crowded",
            Refusal::Late => "late",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Penalised => "too many handshakes from there have failed",
            Refusal::Early => "places for handshakes are becoming few",
            Refusal::Crowded => "too many wait for a place",
            Refusal::Late => "it waited in vain for a place",
        })
    }
}

/// How a handshake failed, or a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// The client went away, wouldn't have our certificate, or spoke out of place behind a good one of its own.
    Left,
    /// There was no certificate, or one that is refused.
    Certificate,
    /// What came is no TLS of ours.
    Garbage,
    /// It wasn't done in time.
    Deadline,
    /// The worker crashed.
    Crash,
    /// The worker broke the rules.
    Violation,
}

impl Failed {
    /// Every one, in order.
    pub const ALL: [Failed; 6] = [
        Failed::Left,
        Failed::Certificate,
        Failed::Garbage,
        Failed::Deadline,
        Failed::Crash,
        Failed::Violation,
    ];

    /// The name in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Failed::Left => "left",
            Failed::Certificate => "certificate",
            Failed::Garbage => "garbage",
            Failed::Deadline => "deadline",
            Failed::Crash => "crash",
            Failed::Violation => "violation",
        }
    }

    /// What a worker says; `None` where the client can't help it.
    pub fn of(cause: Cause) -> Option<Failed> {
        match cause {
            Cause::Ours | Cause::Refused => None,
            Cause::Left => Some(Failed::Left),
            Cause::Certificate => Some(Failed::Certificate),
            Cause::Garbage => Some(Failed::Garbage),
            Cause::Deadline => Some(Failed::Deadline),
        }
    }

    fn charge(self) -> Duration {
        Duration::from_secs(match self {
            // Less than what passes meanwhile of one that looks every other second whether we are there.
            Failed::Left => 1,
            // A client that is started again every few seconds stays below NARROW.
            Failed::Certificate => 3,
            Failed::Garbage => 5,
            // As long as it held the place.
            Failed::Deadline => 10,
            // One may be a fault of ours that its client comes upon again.
            Failed::Crash => 20,
            Failed::Violation => 40,
        })
    }

    /// How far it may get a source, which sessions came from lately or not.
    fn most(self, known: bool, penalty: Duration) -> Duration {
        match self {
            Failed::Left | Failed::Certificate => FORBEARANCE,
            Failed::Garbage | Failed::Deadline if known => FORBEARANCE,
            Failed::Garbage | Failed::Deadline | Failed::Crash | Failed::Violation => FORBEARANCE + penalty,
        }
    }
}

/// What a served connection counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// There is no session yet.
    Handshake,
    /// There is, or was.
    Session,
}

/// Limits what connections may come to, source by source.
#[derive(Debug)]
pub struct Gate {
    limits: Limits,
    /// Nobody can be served for now.
    shut: bool,
    records: HashMap<Source, Record>,
    /// Under way, of all sources.
    handshakes: usize,
    sessions: usize,
    /// By number: who came first has waited longest.
    waiting: BTreeMap<u64, Waiting>,
    next: u64,
    /// Who waits with a lower number than this did so while it was shut.
    opened_at: u64,
    /// Gave way while they waited.
    dropped: VecDeque<(u64, Refusal)>,
    refused: [u64; Refusal::ALL.len()],
    failed: [u64; Failed::ALL.len()],
}

/// What is known of a source.
#[derive(Debug, Default)]
struct Record {
    handshakes: usize,
    sessions: usize,
    waiting: VecDeque<u64>,
    /// A session was there less than a day ago, until then.
    known_until: Time,
    /// When its penalty has passed.
    clear_at: Time,
}

#[derive(Debug)]
struct Waiting {
    address: IpAddr,
    until: Time,
}

/// How a connection's source stands, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    Exempt,
    /// Sessions came from there lately.
    Known,
    /// Nothing is known against it.
    Clean,
    /// It failed lately.
    Marked,
    /// It is refused.
    Refused,
}

impl Gate {
    /// Nobody came yet.
    pub fn new(limits: Limits) -> Gate {
        Gate {
            limits,
            shut: false,
            records: HashMap::new(),
            handshakes: 0,
            sessions: 0,
            waiting: BTreeMap::new(),
            next: 0,
            opened_at: 0,
            dropped: VecDeque::new(),
            refused: [0; Refusal::ALL.len()],
            failed: [0; Failed::ALL.len()],
        }
    }

    /// Other limits, for connections to come.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// While it is shut nobody is served: who comes waits, as long and as many as wait for a place.
    pub fn set_shut(&mut self, shut: bool) {
        if self.shut && !shut {
            self.opened_at = self.next;
        }
        self.shut = shut;
    }

    /// Whether it is.
    pub fn is_shut(&self) -> bool {
        self.shut
    }

    /// Whether one that waits, or waited until now, did so while it was shut: it may have lost patience with us.
    pub fn was_held_up(&self, number: u64) -> bool {
        self.shut || number < self.opened_at
    }

    /// How many handshakes are under way.
    pub fn handshakes(&self) -> usize {
        self.handshakes
    }

    /// How many connections wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// How many sources are remembered.
    pub fn sources(&self) -> usize {
        self.records.len()
    }

    /// Connections refused for this.
    pub fn refused(&self, why: Refusal) -> u64 {
        self.refused[why as usize]
    }

    /// Handshakes that failed so.
    pub fn failed(&self, how: Failed) -> u64 {
        self.failed[how as usize]
    }

    /// Sources that are refused, and for how long, the longest first; not all of very many.
    pub fn penalised(&self, now: Time) -> Vec<(Source, Duration)> {
        let excess = |record: &Record| record.clear_at.since(now).saturating_sub(FORBEARANCE);
        let refused = self.records.iter().map(|(source, record)| (*source, excess(record)));
        let mut refused: Vec<_> = refused.filter(|(_, excess)| !excess.is_zero()).collect();
        refused.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        refused.truncate(MOST_SHOWN);
        refused
    }

    /// Somebody connected. `luck` is drawn by lot.
    pub fn handle_connection(&mut self, address: IpAddr, luck: u16, now: Time) -> Verdict {
        let standing = self.standing(address, now);
        if standing == Standing::Refused {
            return self.refuse(Refusal::Penalised);
        }
        if self.shut {
            return self.wait(address, standing, now);
        }
        let record = self.records.get(&Source::of(address));
        let first = record.is_none_or(|record| record.waiting.is_empty());
        if !first || record.map_or(0, |r| r.handshakes) >= self.share(address, standing, now) {
            return self.wait(address, standing, now);
        }
        let chance = chance_of_refusal(standing, self.handshakes, self.limits.handshakes);
        if u32::from(luck) >= chance {
            self.record(address, now).handshakes += 1;
            self.handshakes += 1;
            return Verdict::Serve;
        }
        match standing {
            Standing::Exempt | Standing::Known => self.wait(address, standing, now),
            Standing::Clean | Standing::Marked | Standing::Refused => self.refuse(Refusal::Early),
        }
    }

    /// A connection that was served came to nothing, or its worker to a bad end. `true`: its source is refused from
    /// now on.
    pub fn handle_failed(&mut self, address: IpAddr, how: Failed, now: Time) -> bool {
        self.failed[how as usize] += 1;
        let Some(penalty) = self.limits.penalty.filter(|_| !self.is_exempt(address)) else { return false };
        let before = self.standing(address, now);
        let record = self.record(address, now);
        let owed = record.clear_at.since(now);
        let most = how.most(record.is_known(now), penalty);
        record.clear_at = now + owed.max((owed + how.charge()).min(most));
        let refused = self.standing(address, now) == Standing::Refused;
        if refused {
            let waiting = std::mem::take(&mut self.record(address, now).waiting);
            for number in waiting {
                self.waiting.remove(&number);
                self.drop_waiting(number, Refusal::Penalised);
            }
        }
        refused && before != Standing::Refused
    }

    /// A handshake became a session.
    pub fn handle_established(&mut self, address: IpAddr, now: Time) {
        one_less(&mut self.handshakes);
        self.sessions += 1;
        let record = self.record(address, now);
        one_less(&mut record.handshakes);
        record.sessions += 1;
        record.known_until = now + KNOWN_FOR;
    }

    /// What was served is over.
    pub fn handle_gone(&mut self, address: IpAddr, stage: Stage, now: Time) {
        let record = self.record(address, now);
        match stage {
            Stage::Handshake => one_less(&mut record.handshakes),
            Stage::Session => {
                one_less(&mut record.sessions);
                record.known_until = now + KNOWN_FOR;
            }
        }
        if record.is_blank(now) {
            self.records.remove(&Source::of(address));
        }
        match stage {
            Stage::Handshake => one_less(&mut self.handshakes),
            Stage::Session => one_less(&mut self.sessions),
        }
    }

    /// The next that waits and has a place now, which it holds with this.
    pub fn poll_next(&mut self, now: Time) -> Option<u64> {
        if self.shut {
            return None;
        }
        let mut best: Option<(Standing, usize, u64)> = None;
        for (number, waiting) in &self.waiting {
            let standing = self.standing(waiting.address, now);
            let own = self.records.get(&Source::of(waiting.address)).map_or(0, |record| record.handshakes);
            let place = chance_of_refusal(standing, self.handshakes, self.limits.handshakes) == 0;
            if place && own < self.share(waiting.address, standing, now) {
                let candidate = (standing, own, *number);
                best = Some(best.map_or(candidate, |best| best.min(candidate)));
            }
        }
        let (_, _, number) = best?;
        let Waiting { address, .. } = self.waiting.remove(&number)?;
        let record = self.record(address, now);
        record.waiting.retain(|other| *other != number);
        record.handshakes += 1;
        self.handshakes += 1;
        Some(number)
    }

    /// The next that waits no longer, and is to be closed.
    pub fn poll_dropped(&mut self, now: Time) -> Option<(u64, Refusal)> {
        while let Some((number, _)) =
            self.waiting.first_key_value().filter(|(_, waiting)| waiting.until <= now)
        {
            self.leave_line(*number, Refusal::Late, now);
        }
        self.dropped.pop_front()
    }

    /// When somebody has waited long enough.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.waiting.first_key_value().map(|(_, waiting)| waiting.until)
    }

    fn wait(&mut self, address: IpAddr, standing: Standing, now: Time) -> Verdict {
        let own = self.records.get(&Source::of(address)).map_or(0, |record| record.waiting.len());
        let line_is_full = own >= MOST_WAITING_OF_ONE && standing != Standing::Exempt;
        if line_is_full || (self.waiting.len() >= MOST_WAITING && !self.make_way(standing, own, now)) {
            return self.refuse(Refusal::Crowded);
        }
        let number = self.next;
        self.next += 1;
        self.record(address, now).waiting.push_back(number);
        self.waiting.insert(number, Waiting { address, until: now + WAIT });
        Verdict::Wait(number)
    }

    /// The last of the longest line among those with the worst standing gives way to one with a better one, or with the
    /// same where its line, which has `own`, is shorter.
    fn make_way(&mut self, standing: Standing, own: usize, now: Time) -> bool {
        let rank = |(number, waiting): (&u64, &Waiting)| {
            let length =
                self.records.get(&Source::of(waiting.address)).map_or(0, |record| record.waiting.len());
            (self.standing(waiting.address, now), length, *number)
        };
        let Some((worst, longest, number)) = self.waiting.iter().map(rank).max() else { return false };
        if worst < standing || (worst == standing && longest <= own + 1) {
            return false;
        }
        self.leave_line(number, Refusal::Crowded, now);
        true
    }

    /// One that waits is dropped; its source is forgotten where there is nothing else to it.
    fn leave_line(&mut self, number: u64, why: Refusal, now: Time) {
        let Some(Waiting { address, .. }) = self.waiting.remove(&number) else { return };
        let record = self.record(address, now);
        record.waiting.retain(|other| *other != number);
        if record.is_blank(now) {
            self.records.remove(&Source::of(address));
        }
        self.drop_waiting(number, why);
    }

    fn drop_waiting(&mut self, number: u64, why: Refusal) {
        self.refused[why as usize] += 1;
        self.dropped.push_back((number, why));
    }

    fn refuse(&mut self, why: Refusal) -> Verdict {
        self.refused[why as usize] += 1;
        Verdict::Refuse(why)
    }

    fn standing(&self, address: IpAddr, now: Time) -> Standing {
        if self.is_exempt(address) {
            return Standing::Exempt;
        }
        let Some(record) = self.records.get(&Source::of(address)) else { return Standing::Clean };
        let owed = match self.limits.penalty {
            Some(penalty) => record.clear_at.since(now).min(FORBEARANCE + penalty),
            None => Duration::ZERO,
        };
        match (record.is_known(now), owed) {
            (_, owed) if owed > FORBEARANCE => Standing::Refused,
            (true, owed) if owed <= NARROW => Standing::Known,
            (true, _) | (false, Duration::ZERO) => Standing::Clean,
            (false, _) => Standing::Marked,
        }
    }

    /// How many handshakes a source may have under way.
    fn share(&self, address: IpAddr, standing: Standing, now: Time) -> usize {
        let owed = self.records.get(&Source::of(address)).map_or(Duration::ZERO, |r| r.clear_at.since(now));
        match standing {
            Standing::Exempt => usize::MAX,
            Standing::Known | Standing::Clean => self.limits.per_source,
            Standing::Marked if owed <= NARROW => self.limits.per_source,
            Standing::Marked => 1,
            Standing::Refused => 0,
        }
    }

    fn is_exempt(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.limits.exempt.iter().any(|net| net.contains(&address))
    }

    /// A source's record; where there is none, room is made for it.
    fn record(&mut self, address: IpAddr, now: Time) -> &mut Record {
        let source = Source::of(address);
        if !self.records.contains_key(&source) {
            self.forget_some(now);
        }
        self.records.entry(source).or_default()
    }

    /// Keeps the number of records with nothing under way below its bound. Many go at a time, so that it costs each of a
    /// spray of sources little.
    fn forget_some(&mut self, now: Time) {
        let busy = self.handshakes + self.sessions + self.waiting.len();
        if self.records.len() < MOST_IDLE + busy {
            return;
        }
        self.records.retain(|_, record| !record.is_blank(now));
        if self.records.len() < MOST_IDLE + busy {
            return;
        }
        let idle = self.records.iter().filter(|(_, record)| record.is_idle());
        let mut least: Vec<_> = idle.map(|(s, r)| (r.known_until.max(now), r.clear_at, *s)).collect();
        least.sort_unstable();
        for (_, _, source) in least.into_iter().take(FORGOTTEN_AT_ONCE) {
            self.records.remove(&source);
        }
    }
}

impl Record {
    fn is_known(&self, now: Time) -> bool {
        self.sessions > 0 || self.known_until > now
    }

    /// Nothing is under way.
    fn is_idle(&self) -> bool {
        self.handshakes == 0 && self.sessions == 0 && self.waiting.is_empty()
    }

    /// There is nothing to remember.
    fn is_blank(&self, now: Time) -> bool {
        self.is_idle() && self.known_until <= now && self.clear_at <= now
    }
}

/// One that was counted is over. A count that was wrong must neither end the guard nor shut everybody out.
fn one_less(count: &mut usize) {
    debug_assert!(*count > 0, "nothing was under way");
    *count = count.saturating_sub(1);
}

/// How probably a connection is refused with so many handshakes under way, of [`SURE`]: never as long as there are many
/// places, and more the fewer are left.
fn chance_of_refusal(standing: Standing, handshakes: usize, most: usize) -> u32 {
    let (start, full) = match standing {
        Standing::Exempt | Standing::Known => (most, most),
        Standing::Clean => (most.div_ceil(2), most - most / 4),
        Standing::Marked => (most.div_ceil(4), most.div_ceil(2)),
        Standing::Refused => (0, 0),
    };
    if handshakes >= full {
        return SURE;
    }
    if handshakes < start {
        return 0;
    }
    let (above, range) = ((handshakes - start) as u64, (full - start) as u64);
    RATE + (u64::from(SURE - RATE) * above / range) as u32
}

/// A refusal that no luck averts: one more than the largest lot.
const SURE: u32 = 1 << 16;
/// Where refusals begin, as sshd does: 30 in 100.
const RATE: u32 = SURE / 10 * 3;
/// A source that owes more is refused.
const FORBEARANCE: Duration = Duration::from_secs(30);
/// A stranger that owes more has one place at a time.
const NARROW: Duration = Duration::from_secs(15);
/// How long a source is known after its last session.
const KNOWN_FOR: Duration = Duration::from_secs(24 * 3_600);
/// How long a connection waits: with the handshake behind it still less than a client's patience of 15 s.
const WAIT: Duration = Duration::from_secs(4);
/// Connections that wait, each with its descriptor.
const MOST_WAITING: usize = 256;
/// Of these, from one source that isn't exempt: two classes behind one address.
const MOST_WAITING_OF_ONE: usize = 64;
/// Sources remembered with nothing under way.
const MOST_IDLE: usize = 4_096;
/// Of these, when one more comes.
const FORGOTTEN_AT_ONCE: usize = MOST_IDLE / 16;
/// Penalised sources in `status`.
const MOST_SHOWN: usize = 16;

#[cfg(test)]
mod tests;
