//! What the guard changes on the host, and undoes when it goes.

use nix::unistd::Uid;

use tunguard::config::server::{ServerConfig, TunWrite};
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::net::forwarding::Forwarding;
use tunguard::net::netlink::{Netlink, Route};
use tunguard::net::nft::{Table, TableSpec};
use tunguard::net::{quiet_device, sysctl};
use tunguard::rigged::point;
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
        let subnets: Vec<_> = config.clients.values().flat_map(|c| c.subnets.iter().copied()).collect();
        for subnet in &subnets {
            netlink.add_route(&Route::new(*subnet, index))?;
        }
        point("guard.routed");
        let v4 = config.networks.iter().any(|n| n.addr().is_ipv4());
        let v6 = config.networks.iter().any(|n| n.addr().is_ipv6());
        let forwards =
            config.nat || config.client_to_client || !config.push.routes.is_empty() || !subnets.is_empty();
        let forwarding = match forwards {
            true => Some(Forwarding::enable(v4, v6, &config.state_dir.join("forwarding.json"))?),
            false => None,
        };
        point("guard.forwarding");
        // A host may forward without our help, now or later: who reaches whom is decided here in any case.
        let spec = TableSpec {
            device: config.device.clone(),
            networks: config.networks.iter().chain(&subnets).copied().collect(),
            nat: config.nat,
            client_to_client: config.client_to_client,
            port: config.listen.port(),
        };
        let table = match Table::install(&spec) {
            Ok(table) => Some(table),
            Err(failure) if failure.exit == Exit::MissingProgram && !forwards && !host_forwards()? => {
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
    // Two a session, and those of sessions that drain.
    let count = usize::from(config.max_clients) * 3 + 64;
    let (messages, bytes) =
        if guard_writes { (DOWNLINK.messages, UPLINK.bytes) } else { (DOWNLINK.messages, DOWNLINK.bytes) };
    let limits = mq::prepare(messages, bytes, count)
        .map_err(|e| Failure::system("prepare the message queues (is CONFIG_POSIX_MQUEUE missing?)", e))?;
    // A worker's user is charged for its queue, and where we write to the device for a second one, to us.
    let share = |numerator: u64| QueueLimits { per_user: limits.per_user / 4 * numerator, ..limits };
    let downlink =
        QueueSize::within(DOWNLINK.messages, DOWNLINK.bytes, &share(if guard_writes { 1 } else { 4 }));
    let uplink = guard_writes.then(|| QueueSize::within(UPLINK.messages, UPLINK.bytes, &share(3)));
    let smallest = usize::from(config.mtu) + tunguard::batch::RECORD_LEN;
    if let Some(size) = uplink.filter(|size| size.bytes < smallest) {
        return Err(Failure::system(
            "prepare the message queues",
            format!(
                "messages of {} bytes are allowed here, {smallest} are needed for mtu = {} with tun_write = \
                 \"guard\": raise fs.mqueue.msgsize_max or RLIMIT_MSGQUEUE, or lower mtu",
                size.bytes, config.mtu
            ),
        ));
    }
    log::info!(
        "queues: {} messages of {} bytes each, {}",
        downlink.messages,
        downlink.bytes,
        if limits.private { "in an IPC namespace of their own" } else { "in the host's IPC namespace" },
    );
    Ok(Queues { private: limits.private, downlink, uplink })
}

/// The sessions' queues.
#[derive(Clone, Copy, Debug)]
pub struct Queues {
    /// They are in an IPC namespace of their own.
    pub private: bool,
    /// Size of the queue to a worker.
    pub downlink: QueueSize,
    /// Size of the queue from a worker, where we write to the device.
    pub uplink: Option<QueueSize>,
}

/// What is longer lies in the session's memory, and a message only says where. The charge stays within the default
/// RLIMIT_MSGQUEUE of 819,200 bytes.
const DOWNLINK: QueueSize = QueueSize { messages: 64, bytes: 8192 };
/// A super-packet fits.
const UPLINK: QueueSize = QueueSize { messages: 8, bytes: 67_000 };
