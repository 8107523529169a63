//! The client: a supervisor with the host's routes in its hands, and a tunnel process with the network's bytes
//! in its.
//!
//! ```text
//!   supervisor (root)            SEQPACKET          tunnel process (unprivileged, locked in)
//!   dial, routes, DNS, device  <- requests --       TLS, keys, data path
//!                               -- replies ->
//!   lookup helper (unprivileged, lives for one name)
//! ```
//!
//! In the order of a connection:
//! 1. [`supervisor`]: reads configuration and credentials, makes the device, starts the tunnel process
//! 2. [`attempts`]: which remote to try when, and when to give up (pure)
//! 3. [`dial`], with the names looked up by [`lookup`]: a connected TCP socket, and a UDP socket for each carrier
//! 4. [`connect`]: TLS, Hello, Welcome
//! 5. [`consent`]: what of the server's wishes this machine agrees to (pure); [`host`] carries it out
//! 6. `carry`: `tun_to_server` and `server_to_tun`
//!
//! [`moves`] is what the supervisor does when the network changes, and hands over sockets for it.
//! [`settings`] says when the server's later wishes are passed on (pure).
//!
//! [`admin`] is what the supervisor tells `tunguard status`, with [`starts`] if it connects on demand (both pure but for
//! the socket).
//!
//! [`ipc`] is all that the two processes say to each other, [`tunnel`] the unprivileged one's start and loop.

pub mod admin;
pub mod attempts;
pub mod carriers;
mod carry;
pub mod connect;
pub mod consent;
pub mod dial;
pub mod host;
pub mod ipc;
pub mod lookup;
pub mod moves;
mod nats;
pub mod on_demand;
pub mod remembered;
pub mod settings;
pub mod starts;
pub mod supervisor;
pub mod tunnel;
mod tunnel_log;
pub mod wake;

pub use supervisor::{require_root, run};

/// First arguments by which this program starts itself in another role; not for users.
pub mod role {
    /// The tunnel process.
    pub const TUNNEL: &str = "client-tunnel";
    /// The helper that looks up one name.
    pub const LOOKUP: &str = "client-lookup";
}
