//! A tunnel device that says nothing by itself.

use super::sysctl;
use crate::config::common::DeviceName;

/// Keeps the kernel from chattering on the tunnel, best effort; call it before the device is set up, because a
/// link-local address made at that moment stays.
///
/// - `addr_gen_mode = 1`: no link-local address (IN6_ADDR_GEN_MODE_NONE in linux/if_link.h), and with none no MLD
///   reports and no neighbour discovery of the kernel's own.
/// - `accept_ra = 0`, `router_solicitations = 0`: nobody in the tunnel is our router.
/// - `send_redirects = 0`: see [`forwarding`](super::forwarding). IPv6 redirects need a link-local address.
///
/// `rp_filter` stays as the administrator has it.
pub fn quiet_device(name: &DeviceName) {
    for (family, setting, value) in [
        ("ipv6", "addr_gen_mode", "1"),
        ("ipv6", "accept_ra", "0"),
        ("ipv6", "router_solicitations", "0"),
        ("ipv4", "send_redirects", "0"),
    ] {
        let key = format!("net/{family}/conf/{name}/{setting}");
        // Without IPv6 there is nothing to quiet.
        if let Ok(Some(_)) = sysctl::read(&key)
            && let Err(e) = sysctl::ensure(&key, value)
        {
            log::debug!("{e}");
        }
    }
}
