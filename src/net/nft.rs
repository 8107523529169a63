//! The server's nftables table (nft(8)), one per device, installed and replaced in one transaction.
//!
//! It works beside other tables, never in their place: its chains have `policy accept`, and a packet must be
//! accepted by every table's chains on a hook to pass. So where a host's own forward chain drops what it doesn't
//! know (ufw, firewalld, Docker), the administrator has to allow the tunnel device there; no table of ours can
//! overrule it, and none should.

use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::programs;
use crate::config::common::DeviceName;
use crate::exit::{Exit, Failure, Outcome};

/// What the table is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableSpec {
    /// The tunnel device; it need not exist yet.
    pub device: DeviceName,
    /// Sources to masquerade: the tunnel's networks, and subnets behind clients where they need it.
    pub networks: Vec<IpNet>,
    /// Whether to masquerade them when they leave by another device.
    pub nat: bool,
    /// Whether packets may go from the tunnel into the tunnel.
    pub client_to_client: bool,
    /// The server's own port, which no translated packet may come from: what others send there would be taken for
    /// answers, and go to whoever's packet it was (CVE-2021-3773).
    pub port: u16,
}

impl TableSpec {
    /// The table's name in family `inet`. An nft identifier may hold everything a [`DeviceName`] may, '-' and '.'
    /// included (`string` in nftables' src/scanner.l), and the prefix keeps it from being a keyword: so the name
    /// goes in as it is, and two devices never share a table.
    pub fn table(&self) -> String {
        format!("tunguard_{}", self.device)
    }

    /// Ports that translated packets may come from: none of those that belong to services, and not our own.
    fn ports(&self) -> RangeInclusive<u16> {
        match self.port {
            below if below < FIRST_PORT => FIRST_PORT..=u16::MAX,
            low if low < u16::MAX / 2 => low + 1..=u16::MAX,
            high => FIRST_PORT..=high - 1,
        }
    }

    /// The transaction: an empty table is made where there was none, so that it can be deleted in any case, and
    /// with it everything a crashed run left; then the new one. nft hands all of it to the kernel as one batch.
    pub fn script(&self) -> String {
        let table = self.table();
        // By name, not by index: the rules outlive a device that is made anew.
        let tun = format!("\"{}\"", self.device);
        let mut s = String::new();
        let mut line = |text: &str| {
            s.push_str(text);
            s.push('\n');
        };
        line(&format!("table inet {table}"));
        line(&format!("delete table inet {table}"));
        line(&format!("table inet {table} {{"));
        if !self.client_to_client {
            // Refused, not dropped in silence: a user who tries gets "Packet filtered" at once instead of a
            // timeout to puzzle over. Nothing is given away that the client's own address doesn't tell, and the
            // kernel limits the rate of these errors (icmp_ratelimit, icmp_ratemask).
            line("  chain forward {");
            line("    type filter hook forward priority filter; policy accept;");
            line(&format!("    iifname {tun} oifname {tun} counter reject with icmpx type admin-prohibited"));
            line("  }");
        }
        // TCP through the tunnel fits without path MTU discovery, which too many networks break. `rt mtu` is the
        // smaller of the MTUs of both directions less the headers, and never raises what the SYN says
        // (net/netfilter/nft_rt.c, nft_exthdr.c).
        line("  chain forward_mss {");
        line("    type filter hook forward priority mangle; policy accept;");
        for direction in ["iifname", "oifname"] {
            line(&format!(
                "    {direction} {tun} tcp flags & (syn | rst) == syn counter tcp option maxseg size set rt mtu"
            ));
        }
        line("  }");
        if self.nat && !self.networks.is_empty() {
            line("  chain postrouting {");
            line("    type nat hook postrouting priority srcnat; policy accept;");
            for network in &self.networks {
                let family = if network.addr().is_ipv6() { "ip6" } else { "ip" };
                let ours = format!("    oifname != {{ \"lo\", {tun} }} {family} saddr {}", network.trunc());
                // A port within the range stays what it is, as without one (nf_nat_core.c).
                let ports = self.ports();
                line(&format!(
                    "{ours} meta l4proto {{ tcp, udp }} counter masquerade to :{}-{}",
                    ports.start(),
                    ports.end()
                ));
                line(&format!("{ours} counter masquerade"));
            }
            line("  }");
        }
        line("}");
        s
    }
}

/// An installed table; dropping it removes it, best effort.
#[derive(Debug)]
pub struct Table {
    /// None once removed.
    name: Option<String>,
}

impl Table {
    /// Installs the table, replacing one a crashed run left.
    pub fn install(spec: &TableSpec) -> Outcome<Table> {
        nft(&spec.script())
            .map_err(|e| e.context(format!("installing nftables table inet {}", spec.table())))?;
        Ok(Table { name: Some(spec.table()) })
    }

    /// Puts other rules in its place, in one transaction: no packet meets half of them.
    pub fn replace(&mut self, spec: &TableSpec) -> Outcome<()> {
        nft(&spec.script())
            .map_err(|e| e.context(format!("replacing nftables table inet {}", spec.table())))?;
        self.name = Some(spec.table());
        Ok(())
    }

    /// Removes it. That it is gone already (`nft flush ruleset`) is fine.
    pub fn remove(mut self) -> Outcome<()> {
        self.take_away()
    }

    fn take_away(&mut self) -> Outcome<()> {
        let Some(name) = self.name.take() else { return Ok(()) };
        nft(&format!("table inet {name}\ndelete table inet {name}\n"))
            .map_err(|e| e.context(format!("removing nftables table inet {name}")))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if let Err(e) = self.take_away() {
            log::warn!("{e}");
        }
    }
}

fn nft(script: &str) -> Outcome<()> {
    let Some(program) = programs::find("nft") else {
        return Err(Failure::new(Exit::MissingProgram, "nft is not installed: apt install nftables"));
    };
    programs::run_well(&program, &["-f", "-"], script).map_err(|e| match e.text.contains("ermitted") {
        true => Failure::new(Exit::Privilege, format!("{e}; this needs CAP_NET_ADMIN: run tunguard as root")),
        false => e,
    })
}

/// Below it are the ports of services (ip_unprivileged_port_start).
const FIRST_PORT: u16 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translated_packets_come_from_no_services_port_and_not_from_ours() {
        for (port, ports) in [
            (443, 1024..=65535),
            (1023, 1024..=65535),
            (1024, 1025..=65535),
            (1194, 1195..=65535),
            (40_000, 1024..=39_999),
            (55_555, 1024..=55_554),
            (65_535, 1024..=65_534),
        ] {
            let device = "tg0".parse().expect("a name");
            let spec = TableSpec { device, networks: vec![], nat: true, client_to_client: false, port };
            assert_eq!(spec.ports(), ports);
        }
    }
}
