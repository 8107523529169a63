//! Which session an inner address belongs to: the longest prefix decides. Or which client, where it has none: the
//! numbers are the caller's.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// Inner addresses and subnets, each with the worker that carries it.
pub struct Routes {
    hosts: HashMap<IpAddr, u64>,
    v4: PrefixMap<Ipv4Net, u64>,
    v6: PrefixMap<Ipv6Net, u64>,
    /// The last answer: packets come in trains.
    last: Option<(IpAddr, u64)>,
}

impl Default for Routes {
    fn default() -> Routes {
        Routes { hosts: HashMap::new(), v4: PrefixMap::new(), v6: PrefixMap::new(), last: None }
    }
}

impl Routes {
    /// Sends packets to `net` to `worker`, whoever had them before.
    pub fn insert(&mut self, net: IpNet, worker: u64) {
        self.last = None;
        match net {
            net if net.prefix_len() == net.max_prefix_len() => {
                self.hosts.insert(net.addr(), worker);
            }
            IpNet::V4(net) => {
                self.v4.insert(net, worker);
            }
            IpNet::V6(net) => {
                self.v6.insert(net, worker);
            }
        }
    }

    /// Takes `net` back, unless another worker has it by now.
    pub fn remove(&mut self, net: IpNet, worker: u64) {
        self.last = None;
        match net {
            net if net.prefix_len() == net.max_prefix_len() => {
                if self.hosts.get(&net.addr()) == Some(&worker) {
                    self.hosts.remove(&net.addr());
                }
            }
            IpNet::V4(net) => {
                if self.v4.get(&net) == Some(&worker) {
                    self.v4.remove(&net);
                }
            }
            IpNet::V6(net) => {
                if self.v6.get(&net) == Some(&worker) {
                    self.v6.remove(&net);
                }
            }
        }
    }

    /// The worker that carries `ip`.
    pub fn lookup(&mut self, ip: IpAddr) -> Option<u64> {
        if let Some((last, worker)) = self.last
            && last == ip
        {
            return Some(worker);
        }
        // A host route is the longest prefix there can be.
        let worker = self.hosts.get(&ip).copied().or_else(|| match ip {
            IpAddr::V4(v4) => self.v4.get_lpm(&Ipv4Net::from(v4)).map(|(_, worker)| *worker),
            IpAddr::V6(v6) => self.v6.get_lpm(&Ipv6Net::from(v6)).map(|(_, worker)| *worker),
        })?;
        self.last = Some((ip, worker));
        Some(worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a network")
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn the_longest_prefix_decides() {
        let mut routes = Routes::default();
        routes.insert(net("192.168.0.0/16"), 1);
        routes.insert(net("192.168.7.0/24"), 2);
        routes.insert(net("192.168.7.9/32"), 3);
        routes.insert(net("fd09::2/128"), 4);
        routes.insert(net("fd77::/48"), 5);
        for (address, worker) in [
            ("192.168.1.1", Some(1)),
            ("192.168.7.1", Some(2)),
            ("192.168.7.9", Some(3)),
            ("10.0.0.1", None),
            ("fd09::2", Some(4)),
            ("fd09::3", None),
            ("fd77:0:0:1::9", Some(5)),
        ] {
            assert_eq!(routes.lookup(ip(address)), worker, "{address}");
            assert_eq!(routes.lookup(ip(address)), worker, "{address}, remembered");
        }
    }

    #[test]
    fn a_newer_session_is_not_removed_by_the_old_ones_end() {
        let mut routes = Routes::default();
        for n in ["10.9.0.2/32", "192.168.7.0/24", "fd77::/48"] {
            routes.insert(net(n), 1);
            assert_eq!(routes.lookup(net(n).addr()), Some(1));
            routes.insert(net(n), 2);
            routes.remove(net(n), 1);
            assert_eq!(routes.lookup(net(n).addr()), Some(2));
            routes.remove(net(n), 2);
            assert_eq!(routes.lookup(net(n).addr()), None);
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_linear_search(
            nets in prop::collection::vec((any::<u32>(), 8u8..=32), 1..40),
            probes in prop::collection::vec(any::<u32>(), 1..40),
        ) {
            let mut routes = Routes::default();
            let mut linear: HashMap<IpNet, u64> = HashMap::new();
            for (worker, (bits, len)) in nets.iter().enumerate() {
                let net = IpNet::V4(Ipv4Net::new((*bits & 0x0f0f_ffff).into(), *len).expect("a length").trunc());
                routes.insert(net, worker as u64);
                linear.insert(net, worker as u64);
            }
            for probe in probes {
                let ip = IpAddr::V4((probe & 0x0f0f_ffff).into());
                let longest = linear.iter().filter(|(n, _)| n.contains(&ip)).max_by_key(|(n, _)| n.prefix_len());
                prop_assert_eq!(routes.lookup(ip), longest.map(|(_, worker)| *worker));
            }
        }
    }
}
