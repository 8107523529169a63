//! How tunguard configures the host: links, addresses and routes over netlink, forwarding, nftables, DNS.
//!
//! Everything here is synchronous and bounded in time, and whatever lives outside the tunnel device (which the
//! kernel removes with its process) is written to a state file *before* it is done, so that the next start
//! puts right what a SIGKILL left behind:
//!
//! | what | undone by the kernel with the device | journal |
//! |---|---|---|
//! | addresses, routes into the tunnel | yes | - |
//! | host routes to the servers ([`routes`]) | no | `RouteKeeper`'s state file, [`routes::repair`] |
//! | forwarding and `accept_ra` ([`forwarding`]) | no | `Forwarding`'s state file, read by the next `enable` |
//! | the nftables table ([`nft`]) | no | none: its name is known, the next `install` replaces it |
//! | resolvers ([`dns`]) | only those of systemd-resolved | `DnsKeeper`'s state file, [`dns::repair`] |
//!
//! None of it goes through a shell, and every function acts in the network namespace of the calling thread.

pub mod carriers;
mod counters;
pub mod dns;
pub mod forwarding;
pub mod monitor;
pub mod netlink;
pub mod nft;
mod programs;
pub mod quiet;
pub mod routes;
pub(crate) mod state;
pub mod sysctl;

pub use carriers::{Way, ways_to};
pub use counters::device_full;
pub use dns::DnsKeeper;
pub use forwarding::Forwarding;
pub use monitor::Monitor;
pub use netlink::{
    HostAddress, Link, Netlink, PROTOCOL, Route, RouteFilter, RouteKind, RouteTo, device_label,
};
pub use nft::{Table, TableSpec};
pub use quiet::quiet_device;
pub use routes::{Conflict, RouteKeeper};
