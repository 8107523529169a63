//! What the guard changes on the host, and undoes when it goes.

use ipnet::IpNet;
use nix::unistd::Uid;

use tunguard::config::server::{ServerConfig, TunWrite};
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::net::forwarding::Forwarding;
use tunguard::net::netlink::{Netlink, Route};
use tunguard::net::nft::{Table, TableSpec};
use tunguard::net::{quiet_device, sysctl};
use tunguard::rigged::point;
use tunguard::sys::ids;
use tunguard::sys::mq::{self, QueueLimits, QueueSize};
use tunguard::sys::tun::{Offloads, Tun};

/// The device and everything around it. Dropping it undoes all of it: fields in this order, the device last.
pub struct Host {
    table: Option<Table>,
    forwarding: Option<Forwarding>,
    /// The device.
    pub tun: Tun,
    /// What it can do.
    pub offloads: Offloads,
}

impl Host {
    /// Makes the device, gives it its addresses and routes, and prepares the host to forward.
    pub fn set_up(config: &ServerConfig) -> Outcome<Host> {
        let (tun, offloads) = Tun::create(&config.device)?;
        // Before it goes up: it must not get a link-local address, nor count as a router's client.
        quiet_device(&config.device);
        point("guard.device-made");
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(config.device.as_str())?;
        netlink.set_link_up(index, config.mtu)?;
        for address in config.server_addresses() {
            netlink.add_address(index, address)?;
        }
        point("guard.addressed");
        for subnet in subnets(config) {
            netlink.add_route(&Route::new(subnet, index))?;
        }
        point("guard.routed");
        let forwarding = if forwards(config) { Some(forward(config)?) } else { None };
        point("guard.forwarding");
        // A host may forward without our help, now or later: who reaches whom is decided here in any case.
        let table = match Table::install(&rules(config)) {
            Ok(table) => Some(table),
            Err(failure)
                if failure.exit == Exit::MissingProgram && !forwards(config) && !host_forwards()? =>
            {
                log::warn!("{failure}; without it, should this host ever forward, clients reach each other");
                None
            }
            Err(failure) => return Err(failure),
        };
        point("guard.table-installed");
        log::info!(
            "device {}: {}, MTU {}{}",
            config.device,
            config.server_addresses().iter().map(|a| a.to_string()).collect::<Vec<_>>().join(" "),
            config.mtu,
            if offloads.uso { ", UDP segmentation" } else { "" },
        );
        Ok(Host { table, forwarding, tun, offloads })
    }

    /// Goes over from what one configuration wants of the host to what another one does. An error: everything is as it
    /// was.
    pub fn change(&mut self, old: &ServerConfig, new: &ServerConfig) -> Outcome<()> {
        let (before, after) = (subnets(old), subnets(new));
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(new.device.as_str())?;
        let mut added: Vec<&IpNet> = Vec::new();
        let mut changed = Ok(());
        for subnet in after.iter().filter(|subnet| !before.contains(subnet)) {
            changed = changed.and_then(|()| netlink.add_route(&Route::new(*subnet, index)));
            added.extend(changed.is_ok().then_some(subnet));
        }
        let mut forwarding = None;
        if forwards(new) && self.forwarding.is_none() {
            changed = changed.and_then(|()| forward(new).map(|on| forwarding = Some(on)));
        }
        if rules(old) != rules(new) || forwards(old) != forwards(new) {
            changed = changed.and_then(|()| self.install(&rules(new)));
        }
        if changed.is_err() {
            let undone = added.into_iter().map(|subnet| netlink.del_route(&Route::new(*subnet, index)));
            let forwarding = forwarding.map_or(Ok(()), Forwarding::restore);
            for failure in undone.chain([forwarding]).filter_map(Result::err) {
                log::error!("on undoing a change: {failure}");
            }
            return changed;
        }
        let routes = before.iter().filter(|subnet| !after.contains(subnet));
        let gone = routes.map(|subnet| netlink.del_route(&Route::new(*subnet, index)));
        for failure in gone.filter_map(Result::err) {
            log::warn!("{failure}");
        }
        match (forwards(new), forwarding) {
            (true, Some(on)) => self.forwarding = Some(on),
            (true, None) => {}
            (false, _) => {
                if let Some(Err(failure)) = self.forwarding.take().map(Forwarding::restore) {
                    log::error!("{failure}");
                }
            }
        }
        Ok(())
    }

    fn install(&mut self, rules: &TableSpec) -> Outcome<()> {
        match &mut self.table {
            Some(table) => table.replace(rules),
            None => Table::install(rules).map(|table| self.table = Some(table)),
        }
    }

    /// Undoes everything, and says what could not be undone.
    pub fn restore(self) {
        let table = self.table.map_or(Ok(()), Table::remove);
        point("guard.table-removed");
        let forwarding = self.forwarding.map_or(Ok(()), Forwarding::restore);
        for failure in [table, forwarding].into_iter().filter_map(Result::err) {
            log::error!("on leaving: {failure}");
        }
        point("guard.host-restored");
    }
}

/// Networks behind clients.
fn subnets(config: &ServerConfig) -> Vec<IpNet> {
    config.clients.values().flat_map(|c| c.subnets.iter().copied()).collect()
}

/// Whether the host has to forward packets.
fn forwards(config: &ServerConfig) -> bool {
    let others = !config.push.routes.is_empty() || !subnets(config).is_empty();
    config.nat || config.client_to_client || others
}

fn forward(config: &ServerConfig) -> Outcome<Forwarding> {
    let v4 = config.networks.iter().any(|n| n.addr().is_ipv4());
    let v6 = config.networks.iter().any(|n| n.addr().is_ipv6());
    Forwarding::enable(v4, v6, &config.state_dir.join("forwarding.json"))
}

fn rules(config: &ServerConfig) -> TableSpec {
    TableSpec {
        device: config.device.clone(),
        networks: config.networks.iter().copied().chain(subnets(config)).collect(),
        nat: config.nat,
        client_to_client: config.client_to_client,
        port: config.listen.port(),
    }
}

/// A server needs root: devices, routes, other users for its workers.
pub fn require_root() -> Outcome<()> {
    if Uid::effective().is_root() {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Privilege,
        "the server makes a network device and starts its workers as other users: run it as root",
    ))
}

/// Whether the kernel forwards packets already.
fn host_forwards() -> Outcome<bool> {
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        if sysctl::read(key)?.is_some_and(|value| value.trim() != "0") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The queues' namespace, and the size the sessions' queues get in it.
pub fn prepare_queues(config: &ServerConfig) -> Outcome<Queues> {
    let guard_writes = config.tun_write == TunWrite::Guard;
    let (messages, bytes) =
        if guard_writes { (DOWNLINK.messages, UPLINK.bytes) } else { (DOWNLINK.messages, DOWNLINK.bytes) };
    // Where one user has them all, and in a user namespace, where the kernel charges whoever made that.
    let shared = config.single_uid.is_some() || !ids::in_initial_namespace();
    let sharers = if shared { sharers(config) } else { 1 };
    let charge = DOWNLINK.charge() + if guard_writes { UPLINK.charge() } else { 0 };
    let limits = mq::prepare(messages, bytes, queues_needed(config), charge * sharers)
        .map_err(|e| Failure::system("prepare the message queues (is CONFIG_POSIX_MQUEUE missing?)", e))?;
    let allowance = limits.per_user / sharers;
    // A worker's user is charged for its queue, and where we write to the device for a second one, to us.
    let share = |numerator: u64| QueueLimits { per_user: allowance / 4 * numerator, ..limits };
    let share_down = share(if guard_writes { 1 } else { 4 });
    let downlink = if shared {
        QueueSize::sharing(DOWNLINK.messages, LEAST_MESSAGE, DOWNLINK.bytes, &share_down)
            .ok_or_else(|| no_room(&limits, config.max_clients))?
    } else {
        QueueSize::within(DOWNLINK.messages, DOWNLINK.bytes, &share_down)
    };
    let uplink = guard_writes.then(|| QueueSize::within(UPLINK.messages, UPLINK.bytes, &share(3)));
    let smallest = usize::from(config.mtu) + tunguard::batch::RECORD_LEN;
    if let Some(size) = uplink.filter(|size| size.bytes < smallest) {
        return Err(Failure::system(
            "prepare the message queues",
            format!(
                "messages of {} bytes are allowed here, {smallest} are needed for mtu = {} with tun_write = \
                 \"guard\": raise fs.mqueue.msgsize_max or RLIMIT_MSGQUEUE, or lower mtu{}",
                size.bytes,
                config.mtu,
                if shared { ", or max_clients, as all sessions share one allowance here" } else { "" },
            ),
        ));
    }
    log::info!(
        "queues: {} messages of {} bytes each, {}{}",
        downlink.messages,
        downlink.bytes,
        if limits.private { "in an IPC namespace of their own" } else { "in the host's IPC namespace" },
        if shared { ", from one allowance for all" } else { "" },
    );
    Ok(Queues { private: limits.private, sharers: shared.then_some(sharers), downlink, uplink })
}

/// Two a worker, and those of sessions that drain.
fn queues_needed(config: &ServerConfig) -> usize {
    usize::from(config.max_clients) * 3 + usize::from(config.max_handshakes) * 2 + 64
}

/// Workers that have queues at once.
fn sharers(config: &ServerConfig) -> u64 {
    ServerConfig::workers_at_once(config.max_clients, handshakes(config, true))
}

/// Handshakes at once: fewer where all have one allowance for their queues, or strangers could use it up.
pub fn handshakes(config: &ServerConfig, shared: bool) -> u16 {
    match shared {
        true => config.max_handshakes.min((config.max_clients / 4).max(HANDSHAKES_SHARED)),
        false => config.max_handshakes,
    }
}

fn no_room(limits: &QueueLimits, max_clients: u16) -> Failure {
    Failure::system(
        "prepare the message queues",
        format!(
            "all sessions share one allowance here (RLIMIT_MSGQUEUE, {} bytes), which is too little for \
             max_clients = {max_clients}: lower that, or raise the limit",
            limits.per_user
        ),
    )
}

/// The sessions' queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queues {
    /// They are in an IPC namespace of their own.
    pub private: bool,
    /// All of them are charged to one allowance, and sized so that so many workers have theirs.
    pub sharers: Option<u64>,
    /// Size of the queue to a worker.
    pub downlink: QueueSize,
    /// Size of the queue from a worker, where we write to the device.
    pub uplink: Option<QueueSize>,
}

impl Queues {
    /// Whether all of them are charged to one allowance.
    pub fn shared(&self) -> bool {
        self.sharers.is_some()
    }

    /// Whether they would do for another configuration of the same server: sizes stay what they were at the start.
    pub fn suffice(&self, config: &ServerConfig) -> Outcome<()> {
        let needed = sharers(config);
        match self.sharers {
            Some(sharers) if needed > sharers => Err(Failure::usage(format!(
                "{}: max_handshakes = {} needs queues for {needed} workers, and all share one allowance here, sized for \
                 {sharers} at the start: restart the server to change it",
                config.file.display(),
                config.max_handshakes
            ))),
            _ => Ok(()),
        }
    }

    /// As many may be made as another configuration needs.
    pub fn make_room(&self, config: &ServerConfig) {
        if self.private {
            mq::make_room_for(queues_needed(config));
        }
    }
}

/// Where queues share an allowance and clients are few.
const HANDSHAKES_SHARED: u16 = 8;
/// What is longer lies in the session's memory, and a message only says where. The charge stays within the default
/// RLIMIT_MSGQUEUE of 819,200 bytes.
const DOWNLINK: QueueSize = QueueSize { messages: 64, bytes: 8192 };
/// Bytes of a message at least, where many queues share an allowance: several times what says where a batch is.
const LEAST_MESSAGE: usize = 64;
/// A super-packet fits.
const UPLINK: QueueSize = QueueSize { messages: 8, bytes: 67_000 };

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn queues_of_one_allowance_suffice_for_those_they_were_sized_for() {
        let config = |lines: &str| {
            let text =
                format!("networks = ['10.9.0.0/24']\n{lines}\n[tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\n");
            ServerConfig::parse(&text, Path::new("/s.toml")).expect(lines)
        };
        let size = QueueSize::KERNEL_DEFAULT;
        let at_start = config("max_clients = 100\nmax_handshakes = 4");
        let own = Queues { private: true, sharers: None, downlink: size, uplink: None };
        let shared = Queues { sharers: Some(sharers(&at_start)), ..own };
        let more = config("max_clients = 100\nmax_handshakes = 5");
        assert_eq!((own.suffice(&more), shared.suffice(&at_start)), (Ok(()), Ok(())));
        assert_eq!(
            shared.suffice(&more).map_err(|failure| failure.text),
            Err("/s.toml: max_handshakes = 5 needs queues for 131 workers, and all share one allowance here, sized for \
                 130 at the start: restart the server to change it"
                .to_owned())
        );
        // Fewer clients leave room for it.
        assert_eq!(shared.suffice(&config("max_clients = 90\nmax_handshakes = 16")), Ok(()));
    }
}
