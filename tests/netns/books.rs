//! Double entry for datagrams: what one end sealed is what the other end opened and what was dropped in between, each
//! drop by its name. Counted by the programs, by nftables on the wires, and by the kernel in front of the sockets.
//!
//! ```text
//!  sealed - not sent | wire | entered | lost on purpose | wire | arrived | socket full | opened
//!       sender       |      |        the router         |      |       the receiver's host
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tunguard::drops::DropReason;

use crate::lab::{Lab, Namespace, PATIENCE, eventually, outer_v4, outer_v6};
use crate::process::{Process, descriptors};

/// The counters on the wires.
pub struct Books<'a> {
    lab: &'a Lab,
    sessions: usize,
    /// What the wires had dropped before: while they were laid, one end was up before the other.
    before: Wires,
}

/// Packets each wire dropped, by the side they were to leave from.
#[derive(Default)]
struct Wires {
    from_clients: Vec<u64>,
    to_clients: Vec<u64>,
    to_server: u64,
    from_server: u64,
}

impl Wires {
    fn now(lab: &Lab, sessions: usize) -> Wires {
        let router = Devices::of(&lab.net());
        Wires {
            from_clients: (1..=sessions).map(|n| Devices::of(&lab.c(n)).get("eth0").not_sent).collect(),
            to_clients: (1..=sessions).map(|n| router.get(&format!("c{n}")).not_sent).collect(),
            to_server: router.get("srv").not_sent,
            from_server: Devices::of(&lab.srv()).get("eth0").not_sent,
        }
    }
}

impl Books<'_> {
    /// Begins to count, and to lose `permille` of what crosses the router between clients and server.
    pub fn open(lab: &Lab, sessions: usize, permille: u32) -> Books<'_> {
        // A datagram a packet, or a counter would take a run of them for one.
        for n in 1..=sessions {
            lab.c(n).ip(&["link", "set", "eth0", "gso_max_segs", "1"]);
        }
        lab.srv().ip(&["link", "set", "eth0", "gso_max_segs", "1"]);
        // Inner fragments wait here for those that were lost; the default bound is too low for 100 sessions' and the
        // kernel would drop more of them, which is nothing of ours.
        for bound in ["ipv4/ipfrag", "ipv6/ip6frag", "netfilter/nf_conntrack_frag6"] {
            lab.srv().sysctl(&format!("net/{bound}_high_thresh"), FRAGMENT_BYTES);
        }

        let all = 1..=sessions;
        let map = |key: &dyn Fn(usize) -> String, counter: &str| {
            let elements: Vec<String> =
                all.clone().map(|n| format!("{} : \"{counter}_{n}\"", key(n))).collect();
            format!("map {{ {} }}", elements.join(", "))
        };
        let counters = |names: &[&str]| -> String {
            let each = |n| names.iter().map(move |name| format!("counter {name}_{n} {{ }}\n"));
            all.clone().flat_map(each).collect()
        };
        let device = |n| format!("\"c{n}\"");
        let lose = format!("numgen random mod 1000 < {permille}");
        let router = format!(
            "{}set blocked {{ type ifname; }}\nchain enter {{\ntype filter hook prerouting priority raw\n\
             udp dport 55555 counter name iifname {}\n\
             udp sport 55555 counter name ip daddr {}\n\
             udp sport 55555 counter name ip6 daddr {}\n}}\n\
             chain lose {{\ntype filter hook forward priority filter\n\
             udp dport 55555 iifname @blocked counter name iifname {} drop\n\
             udp sport 55555 oifname @blocked counter name oifname {} drop\n\
             udp dport 55555 {lose} counter name iifname {} drop\n\
             udp sport 55555 {lose} counter name oifname {} drop\n\
             tcp dport 55555 {lose} drop\ntcp sport 55555 {lose} drop\n}}\n",
            counters(&["up_entered", "up_lost", "down_entered", "down_lost"]),
            map(&device, "up_entered"),
            map(&outer_v4, "down_entered"),
            map(&outer_v6, "down_entered"),
            map(&device, "up_lost"),
            map(&device, "down_lost"),
            map(&device, "up_lost"),
            map(&device, "down_lost"),
        );
        let books = Books { lab, sessions, before: Wires::now(lab, sessions) };
        books.table(&lab.net(), "router", &router);
        let server = format!(
            "{}chain arrive {{\ntype filter hook prerouting priority raw\n\
             udp dport 55555 counter name ip saddr {}\nudp dport 55555 counter name ip6 saddr {}\n}}\n",
            counters(&["up_arrived"]),
            map(&outer_v4, "up_arrived"),
            map(&outer_v6, "up_arrived"),
        );
        books.table(&lab.srv(), "server", &server);
        for n in all {
            let client = format!(
                "counter down_arrived_{n} {{ }}\nchain arrive {{\ntype filter hook prerouting priority raw\n\
                 udp sport 55555 counter name \"down_arrived_{n}\"\n}}\n"
            );
            books.table(&lab.c(n), "client", &client);
        }
        books
    }

    fn table(&self, namespace: &Namespace, name: &str, rules: &str) {
        let file = self.lab.write(&format!("{name}.nft"), format!("table inet books {{\n{rules}}}\n"));
        namespace.must(&["nft", "-f", &file.display().to_string()]);
    }

    /// Loses all UDP of client `n`, or no more than of the others.
    pub fn block(&self, n: usize, blocked: bool) {
        let what = if blocked { "add" } else { "delete" };
        let element = format!("{what} element inet books blocked {{ \"c{n}\" }}");
        self.lab.net().must(&["nft", &element]);
    }

    fn counters(&self, namespace: &Namespace) -> BTreeMap<String, u64> {
        let text = namespace.must(&["nft", "-j", "list", "counters", "table", "inet", "books"]);
        let listed: Value = serde_json::from_str(&text).expect("nft's JSON");
        let items = listed["nftables"].as_array().expect("a list").iter();
        items
            .filter_map(|item| {
                let counter = item.get("counter")?;
                Some((counter["name"].as_str()?.to_owned(), counter["packets"].as_u64()?))
            })
            .collect()
    }

    /// Stops the loss and all traffic, waits until nothing is on its way, ends the clients, and reads every counter.
    pub fn close(&self, server: &mut Process, clients: &mut [Process]) -> Balance {
        self.lab.net().must(&["nft", "flush", "chain", "inet", "books", "lose"]);
        // Who sent last has an answer then, and doesn't ask later whether the other is still there.
        for n in 1..=self.sessions {
            eventually("a ping without loss", || {
                self.lab.c(n).pings(crate::lab::INNER_V4, 56, 1).then_some(())
            });
        }
        for n in 1..=self.sessions {
            self.lab.c(n).ip(&["link", "set", "tg0", "down"]);
        }
        self.lab.srv().ip(&["link", "set", "tg0", "down"]);
        let tunnels: Vec<i32> = clients.iter().map(|client| client.wait_for_children(1)[0]).collect();
        let status = self.wait_for_silence(&tunnels);

        let sockets = sockets(&self.lab.srv());
        let mut accounts: Vec<Account> = Vec::new();
        for n in 1..=self.sessions {
            let session = session(&status, n);
            let worker = udp_socket(session["pid"].as_i64().expect("a worker") as i32, &sockets);
            let far = udp_socket(tunnels[n - 1], &self::sockets(&self.lab.c(n)));
            let devices = Devices::of(&self.lab.c(n));
            accounts.push(Account {
                queued: number(session, "queued_packets"),
                device_reads: devices.get("tg0").sent,
                client_device_dropped: devices.get("tg0").not_sent,
                socket_full: [worker.drops, far.drops],
                ..Account::default()
            });
        }
        let device = Devices::of(&self.lab.srv()).get("tg0");

        clients.iter().for_each(|client| client.signal(Signal::SIGTERM));
        for client in &mut *clients {
            assert_eq!(client.exit(), 0, "{}", client.log());
        }
        self.lab.wait_for_sessions(0);
        let said = eventually("every worker's last line", || {
            let log = server.log();
            (1..=self.sessions).all(|n| last_line(&log, n).is_some()).then_some(log)
        });
        let router = self.counters(&self.lab.net());
        let arrived = self.counters(&self.lab.srv());
        let wires = Wires::now(self.lab, self.sessions);
        for (n, account) in (1..).zip(&mut accounts) {
            let log = clients[n - 1].log();
            let lines: Vec<&str> = log.lines().filter(|line| line.contains(" this session read ")).collect();
            assert_eq!(lines.len(), 1, "client {n} had another session meanwhile:\n{log}");
            account.client = Ledger::parse(lines[0]);
            account.server = Ledger::parse(last_line(&said, n).expect("it was there"));
            let down = self.counters(&self.lab.c(n));
            let read = |from: &BTreeMap<String, u64>, name: &str| from[&format!("{name}_{n}")];
            account.entered = [read(&router, "up_entered"), read(&router, "down_entered")];
            account.lost = [read(&router, "up_lost"), read(&router, "down_lost")];
            account.arrived = [read(&arrived, "up_arrived"), read(&down, "down_arrived")];
            account.wire_dropped = [
                wires.from_clients[n - 1] - self.before.from_clients[n - 1],
                wires.to_clients[n - 1] - self.before.to_clients[n - 1],
            ];
        }
        Balance {
            accounts,
            guard_read: number(&status, "device_packets"),
            guard_queued: number(&status, "queued_packets"),
            guard_drops: counts(&status["guard_drops"]),
            device,
            shared_wire_dropped: [
                wires.to_server - self.before.to_server,
                wires.from_server - self.before.from_server,
            ],
        }
    }

    /// Waits until all sockets and queues are empty and no counter moves; the server's status then.
    fn wait_for_silence(&self, tunnels: &[i32]) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut before = None;
        loop {
            let status = self.lab.status();
            let sockets = sockets(&self.lab.srv());
            let waiting: u64 = (1..=self.sessions)
                .map(|n| {
                    let session = session(&status, n);
                    let worker = udp_socket(session["pid"].as_i64().expect("a worker") as i32, &sockets);
                    let client = udp_socket(tunnels[n - 1], &self::sockets(&self.lab.c(n)));
                    let queue = number(session, "queue_depth") + number(session, "backlog_bytes");
                    worker.waiting + client.waiting + queue
                })
                .sum();
            let moving = ["read_packets", "sent_in_band", "received_packets", "received_in_band", "drops"];
            let now: Vec<Value> = (1..=self.sessions)
                .flat_map(|n| moving.map(|key| session(&status, n)[key].clone()))
                .collect();
            let now = (now, self.counters(&self.lab.net()), self.counters(&self.lab.srv()));
            if waiting == 0 && before.as_ref() == Some(&now) {
                return status;
            }
            assert!(Instant::now() < deadline, "it doesn't get quiet: {waiting} bytes wait; {status}");
            before = Some(now);
            thread::sleep(Duration::from_millis(500));
        }
    }
}

/// What one end said when its session was over.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Packets and super-packets read, and what they were cut into.
    pub read: u64,
    pub cut: u64,
    /// Sealed, packets and in-band messages.
    pub sent: u64,
    pub sent_in_band: u64,
    /// Opened and delivered, and in-band messages.
    pub received: u64,
    pub received_in_band: u64,
    /// Of what was sealed, sent once more by another path.
    pub copies: u64,
    /// Of what was sealed, and of what was opened or dropped then, that went inside the control connection.
    pub sent_inside: u64,
    pub received_inside: u64,
    /// Dropped, by reason.
    pub drops: BTreeMap<String, u64>,
}

impl Ledger {
    fn parse(line: &str) -> Ledger {
        let after = |marker: &str| -> &str {
            line.split_once(marker).unwrap_or_else(|| panic!("no {marker:?} in {line}")).1
        };
        let number = |text: &str| -> u64 {
            let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap_or_else(|_| panic!("no number at {text:?} in {line}"))
        };
        let then = |text: &str, marker: &str| number(text.split_once(marker).expect(marker).1);
        let in_band = |text: &str| then(text, " and ");
        let (sent, received) = (after(", sent "), after(", received "));
        let list = after("; dropped: ");
        let drops = list.split(", ").filter(|item| *item != "nothing").map(|item| {
            let (reason, packets) = item.split_once(' ').expect("a reason and a number");
            (reason.to_owned(), number(packets))
        });
        Ledger {
            read: number(after(" read ")),
            cut: number(after(" cut into ")),
            sent: number(sent),
            sent_in_band: in_band(sent),
            received: number(received),
            received_in_band: in_band(received),
            copies: then(sent, ", with "),
            sent_inside: then(sent, " copies and "),
            received_inside: then(received, ", with "),
            drops: drops.collect(),
        }
    }

    /// Dropped at this stage.
    fn dropped(&self, stage: Stage) -> u64 {
        let reasons = DropReason::ALL.into_iter().filter(|reason| stage_of(*reason) == stage);
        reasons.filter_map(|reason| self.drops.get(reason.name())).sum()
    }
}

/// Where on a packet's way a reason to drop it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    BeforeSealing,
    Sending,
    Receiving,
    /// Could be before sealing or in receiving.
    Either,
}

fn stage_of(reason: DropReason) -> Stage {
    use DropReason::*;
    match reason {
        NoPath | BadSuperPacket => Stage::BeforeSealing,
        Unproven | SocketFull | SendRefused | TooBig => Stage::Sending,
        TooShort | Flags | WrongSession | UnknownEpoch | Duplicate | TooOld | BadTag | BadInBand
        | BadInner | SourceNotOurs | DestinationNotOurs | RateUp | Congested | TunRefused | UplinkFull => {
            Stage::Receiving
        }
        KeysExpired => Stage::Either,
    }
}

/// One session's counters; pairs are to the server and to the client.
#[derive(Clone, Debug, Default)]
pub struct Account {
    pub client: Ledger,
    pub server: Ledger,
    /// Handed to the worker by the guard.
    queued: u64,
    /// Read from the client's device, as the kernel counts.
    device_reads: u64,
    /// What the client's device had no room for.
    pub client_device_dropped: u64,
    /// Datagrams that were never sealed, sent to the server from the client's host.
    pub forged: u64,
    entered: [u64; 2],
    lost: [u64; 2],
    arrived: [u64; 2],
    /// What the receiving tunnel socket had no room for.
    pub socket_full: [u64; 2],
    /// Dropped by the wire of this session alone, whatever they were.
    wire_dropped: [u64; 2],
}

impl Account {
    /// Datagrams put on the wire.
    fn put(&self, way: usize) -> i64 {
        let sender = [&self.client, &self.server][way];
        let forged = if way == 0 { self.forged } else { 0 };
        let sealed = sender.sent + sender.sent_in_band + sender.copies + forged;
        sealed as i64 - (sender.dropped(Stage::Sending) + sender.sent_inside) as i64
    }

    /// Datagrams that left the receiving socket, or came inside the control connection.
    fn taken(&self, way: usize) -> u64 {
        let receiver = [&self.server, &self.client][way];
        receiver.received + receiver.received_in_band + receiver.dropped(Stage::Receiving)
    }

    /// Datagrams that went missing on the wires before and behind the router.
    fn missing(&self, way: usize) -> [i64; 2] {
        let [entered, lost, arrived] = [self.entered, self.lost, self.arrived].map(|pair| pair[way] as i64);
        [self.put(way) - entered, entered - lost - arrived]
    }

    /// Everything dropped between being read at one end and being delivered at the other.
    pub fn dropped_on_the_way(&self, way: usize) -> u64 {
        let [sender, receiver] =
            if way == 0 { [&self.client, &self.server] } else { [&self.server, &self.client] };
        let wires: i64 = self.missing(way).iter().sum();
        let ends = sender.dropped(Stage::BeforeSealing)
            + sender.dropped(Stage::Sending)
            + receiver.dropped(Stage::Receiving);
        ends + self.lost[way] + self.socket_full[way] + wires.max(0) as u64
    }

    /// What doesn't add up in this session.
    fn faults(&self) -> Vec<String> {
        let mut equations = Vec::new();
        for (who, ledger) in [("client", &self.client), ("worker", &self.server)] {
            let sealed = ledger.sent + ledger.dropped(Stage::BeforeSealing);
            equations.push((format!("{who}: packets cut = sealed + dropped before"), ledger.cut, sealed));
            equations.push((format!("{who}: none past its keys' end"), ledger.dropped(Stage::Either), 0));
        }
        let text = "client: read from its device, as it and as the kernel says";
        equations.push((text.to_owned(), self.client.read, self.device_reads));
        let text = "queued by the guard = read by the worker";
        equations.push((text.to_owned(), self.queued, self.server.read));
        for (way, name) in [(0, "to the server"), (1, "to the client")] {
            let [sender, receiver] = [[&self.client, &self.server], [&self.server, &self.client]][way];
            let text = format!("{name}: datagrams arrived, also inside = socket full + opened + dropped");
            let arrived = self.arrived[way] + receiver.received_inside;
            equations.push((text, arrived, self.socket_full[way] + self.taken(way)));
            // TCP loses none.
            let text = format!("{name}: sent inside the control connection = received");
            equations.push((text, sender.sent_inside, receiver.received_inside));
        }
        let mut faults: Vec<String> = equations
            .into_iter()
            .filter(|(_, left, right)| left != right)
            .map(|(text, left, right)| format!("{text}: {left} and {right}"))
            .collect();
        for (way, name) in [(0, "to the server"), (1, "to the client")] {
            // Of the two wires one is this session's alone: first on the way up, last on the way down.
            let missing = self.missing(way);
            if missing.iter().any(|n| *n < 0) || missing[way] > self.wire_dropped[way] as i64 {
                faults.push(format!(
                    "{name}: put on the wire {}, entered the router {}, lost {}, arrived {}; its wire dropped {}",
                    self.put(way),
                    self.entered[way],
                    self.lost[way],
                    self.arrived[way],
                    self.wire_dropped[way],
                ));
            }
        }
        faults
    }
}

/// All sessions' accounts, and what they share.
pub struct Balance {
    pub accounts: Vec<Account>,
    guard_read: u64,
    guard_queued: u64,
    guard_drops: BTreeMap<String, u64>,
    device: Device,
    /// Dropped by the wire all sessions share, between the server and the router.
    shared_wire_dropped: [u64; 2],
}

impl Balance {
    /// Everything that doesn't add up; nothing, if all is well.
    pub fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> = Vec::new();
        for (n, account) in (1..).zip(&self.accounts) {
            faults.extend(account.faults().into_iter().map(|fault| format!("session {n}: {fault}")));
        }
        let dropped: u64 = READ_AND_DROPPED.iter().map(|reason| self.guard_drops[*reason]).sum();
        if self.guard_read != self.guard_queued + dropped {
            faults.push(format!(
                "guard: read {}, queued {}, dropped {:?}",
                self.guard_read, self.guard_queued, self.guard_drops
            ));
        }
        let queued: u64 = self.accounts.iter().map(|account| account.queued).sum();
        if queued != self.guard_queued {
            faults.push(format!("guard: queued {}, for its sessions {queued}", self.guard_queued));
        }
        if self.guard_drops["device_full"] != self.device.not_sent {
            faults
                .push(format!("device_full is {:?}, of {:?}", self.guard_drops["device_full"], self.device));
        }
        if self.device.sent != self.guard_read {
            faults.push(format!("guard: read {}, the device says {}", self.guard_read, self.device.sent));
        }
        for way in [0, 1] {
            let missing: i64 = self.accounts.iter().map(|account| account.missing(way)[1 - way]).sum();
            if missing > self.shared_wire_dropped[way] as i64 {
                faults.push(format!(
                    "the server's wire, way {way}: {missing} are missing, it says it dropped {}",
                    self.shared_wire_dropped[way]
                ));
            }
        }
        faults
    }

    /// The sums, as a table.
    pub fn table(&self) -> String {
        let mut text = format!("{:<44}{:>12}{:>12}\n", "datagrams", "to server", "to client");
        let mut row = |name: &str, value: &dyn Fn(&Account, usize) -> i64| {
            let [up, down] = [0, 1].map(|way| self.accounts.iter().map(|a| value(a, way)).sum::<i64>());
            if up != 0 || down != 0 {
                let _ = writeln!(text, "{name:<44}{up:>12}{down:>12}");
            }
        };
        let sender = |a: &Account, way: usize| if way == 0 { a.client.clone() } else { a.server.clone() };
        let receiver = |a: &Account, way: usize| sender(a, 1 - way);
        let of = |ledger: &Ledger, reason: DropReason| {
            ledger.drops.get(reason.name()).copied().unwrap_or_default() as i64
        };
        row("read from device or queue", &|a, way| sender(a, way).read as i64);
        row("cut into packets", &|a, way| sender(a, way).cut as i64);
        for reason in DropReason::ALL.into_iter().filter(|r| stage_of(*r) == Stage::BeforeSealing) {
            row(&format!("- {}", reason.name()), &|a, way| of(&sender(a, way), reason));
        }
        row("sealed: packets", &|a, way| sender(a, way).sent as i64);
        row("sealed: in-band messages", &|a, way| sender(a, way).sent_in_band as i64);
        for reason in DropReason::ALL.into_iter().filter(|r| stage_of(*r) == Stage::Sending) {
            row(&format!("- {}", reason.name()), &|a, way| of(&sender(a, way), reason));
        }
        row("+ sent by another path as well", &|a, way| sender(a, way).copies as i64);
        row("- sent inside the control connection", &|a, way| sender(a, way).sent_inside as i64);
        row("+ forged", &|a, way| if way == 0 { a.forged as i64 } else { 0 });
        row("- dropped by the wire to the router", &|a, way| a.missing(way)[0]);
        row("entered the router", &|a, way| a.entered[way] as i64);
        row("- dropped by the nftables rule", &|a, way| a.lost[way] as i64);
        row("- dropped by the wire from the router", &|a, way| a.missing(way)[1]);
        row("arrived", &|a, way| a.arrived[way] as i64);
        row("+ came inside the control connection", &|a, way| receiver(a, way).received_inside as i64);
        row("- dropped by the kernel: socket full", &|a, way| a.socket_full[way] as i64);
        for reason in DropReason::ALL.into_iter().filter(|r| stage_of(*r) == Stage::Receiving) {
            row(&format!("- {}", reason.name()), &|a, way| of(&receiver(a, way), reason));
        }
        row("opened: in-band messages", &|a, way| receiver(a, way).received_in_band as i64);
        row("opened: packets delivered", &|a, way| receiver(a, way).received as i64);
        let drops: Vec<String> =
            self.guard_drops.iter().filter(|(_, n)| **n > 0).map(|(k, n)| format!("{k} {n}")).collect();
        let _ = writeln!(
            text,
            "guard: read {} = queued {} + dropped; dropped, device_full before that: [{}]",
            self.guard_read,
            self.guard_queued,
            drops.join(", "),
        );
        text
    }

    /// Dropped between the server's kernel and the queues, for whichever session.
    pub fn dropped_by_guard(&self) -> u64 {
        self.guard_drops.values().sum()
    }

    /// Dropped by the guard for this reason.
    pub fn guard_dropped(&self, reason: &str) -> u64 {
        self.guard_drops[reason]
    }
}

/// A UDP socket's line in /proc/net.
#[derive(Clone, Copy, Debug, Default)]
struct UdpSocketState {
    /// Bytes that wait to be received.
    waiting: u64,
    /// Datagrams there was no room for.
    drops: u64,
}

/// The UDP sockets of a namespace, by inode.
fn sockets(namespace: &Namespace) -> BTreeMap<u64, UdpSocketState> {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let text = namespace.within(|| read("/proc/thread-self/net/udp") + &read("/proc/thread-self/net/udp6"));
    let parse = |line: &str| -> Option<(u64, UdpSocketState)> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let waiting = u64::from_str_radix(fields.get(4)?.split_once(':')?.1, 16).ok()?;
        let drops = fields.get(12)?.parse().ok()?;
        Some((fields.get(9)?.parse().ok()?, UdpSocketState { waiting, drops }))
    };
    text.lines().filter_map(parse).collect()
}

/// Datagrams that the socket with this inode had no room for.
pub fn drops_of(namespace: &Namespace, inode: u64) -> u64 {
    sockets(namespace).get(&inode).expect("the socket is there").drops
}

/// Datagrams that the one UDP socket of a process had no room for.
pub fn drops_of_process(namespace: &Namespace, pid: i32) -> u64 {
    udp_socket(pid, &sockets(namespace)).drops
}

/// The inode of a socket.
pub fn socket_inode(pid: i32, descriptor: i32) -> u64 {
    let target = fs::read_link(format!("/proc/{pid}/fd/{descriptor}")).expect("a descriptor");
    inode(&target.display().to_string()).expect("a socket")
}

fn inode(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The one UDP socket a process has.
fn udp_socket(pid: i32, sockets: &BTreeMap<u64, UdpSocketState>) -> UdpSocketState {
    let held: Vec<UdpSocketState> =
        descriptors(pid).iter().filter_map(|target| sockets.get(&inode(target)?).copied()).collect();
    assert_eq!(held.len(), 1, "process {pid} has other than one UDP socket");
    held[0]
}

/// What a device says of packets that were to leave by it.
#[derive(Clone, Copy, Debug, Default)]
struct Device {
    sent: u64,
    not_sent: u64,
}

struct Devices(BTreeMap<String, Device>);

impl Devices {
    fn of(namespace: &Namespace) -> Devices {
        let text = namespace.within(|| fs::read_to_string("/proc/thread-self/net/dev")).expect("devices");
        let parse = |line: &str| {
            let (name, rest) = line.split_once(':')?;
            let numbers: Vec<u64> = rest.split_whitespace().filter_map(|n| n.parse().ok()).collect();
            // Eight columns of what was received come first.
            Some((name.trim().to_owned(), Device { sent: *numbers.get(9)?, not_sent: *numbers.get(11)? }))
        };
        Devices(text.lines().filter_map(parse).collect())
    }

    fn get(&self, name: &str) -> Device {
        *self.0.get(name).unwrap_or_else(|| panic!("no device {name}"))
    }
}

fn session(status: &Value, n: usize) -> &Value {
    let name = format!("c{n}");
    let mut sessions = status["sessions"].as_array().expect("a list of sessions").iter();
    sessions.find(|s| s["name"] == name.as_str()).unwrap_or_else(|| panic!("no session of {name}: {status}"))
}

fn number(object: &Value, key: &str) -> u64 {
    object[key].as_u64().unwrap_or_else(|| panic!("no {key} in {object}"))
}

fn counts(object: &Value) -> BTreeMap<String, u64> {
    let object = object.as_object().expect("counters by name");
    object.iter().map(|(name, n)| (name.clone(), n.as_u64().expect("a number"))).collect()
}

/// What the worker of client `n` said in the end.
fn last_line(log: &str, n: usize) -> Option<&str> {
    let start = format!(" c{n}: read ");
    log.lines().find(|line| line.contains(&start))
}

/// What the guard drops after it read it from the device.
const READ_AND_DROPPED: [&str; 5] = ["no_route", "away", "bad_inner", "queue_full", "codel"];
/// Of memory for incomplete packets.
const FRAGMENT_BYTES: &str = "268435456";

#[test]
fn what_goes_inside_the_control_connection_is_on_no_wire() {
    // As the programs say it.
    let traffic = |sent_inside, received_inside| tunguard::session::Traffic {
        read_packets: 90,
        cut_packets: 100,
        sent_packets: 100,
        sent_in_band: 7,
        received_packets: 100,
        received_in_band: 7,
        copies: 3,
        sent_inside,
        received_inside,
        ..Default::default()
    };
    let ledger = |sent_inside, received_inside| {
        // One copy of three was lost, the others came twice.
        Ledger::parse(&format!(
            " this session {}; dropped: duplicate 2",
            traffic(sent_inside, received_inside)
        ))
    };
    // 110 datagrams with the copies: to the server 40 inside and 70 by wire, to the client 25 and 85.
    let account = Account {
        client: ledger(40, 25),
        server: ledger(25, 40),
        queued: 90,
        device_reads: 90,
        entered: [70, 85],
        lost: [1, 1],
        arrived: [69, 84],
        ..Account::default()
    };
    assert_eq!(account.faults(), Vec::<String>::new());
    let faults = |change: &dyn Fn(&mut Account)| {
        let mut changed = account.clone();
        change(&mut changed);
        changed.faults().len()
    };
    assert_ne!(faults(&|a| a.client.sent_inside -= 1), 0);
    assert_ne!(faults(&|a| a.server.received_inside += 1), 0);
    assert_ne!(faults(&|a| a.client.copies = 0), 0);
    assert_ne!(faults(&|a| a.server = Ledger { copies: 0, ..a.server.clone() }), 0);
    // As many on both sides, but they were seen on the wire as well.
    assert_ne!(faults(&|a| (a.client.sent_inside, a.server.received_inside) = (41, 41)), 0);
}
