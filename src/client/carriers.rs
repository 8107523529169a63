//! The client's UDP sockets, one for each link by which the server can be reached.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use super::ipc::CarrierName;
use crate::drops::DropReason;
use crate::egress::Outlet;
use crate::exit::{Failure, Outcome};
use crate::path::{INSIDE, Path};
use crate::sys::poller::{Interest, Poller};
use crate::sys::udp::{Carrier, ReceiveBuffers, Received, Unsent};

/// The sockets, best first.
#[derive(Debug)]
pub struct Carriers {
    list: Vec<Numbered>,
    /// The number of the next one.
    next: u8,
}

#[derive(Debug)]
struct Numbered {
    /// Tells its paths from those of others, also of such as were on the same link before.
    number: u8,
    name: CarrierName,
    carrier: Carrier,
}

impl Carriers {
    /// The first ones, at least one.
    pub fn new(carriers: Vec<(CarrierName, Carrier)>) -> Carriers {
        let mut fresh = Carriers { list: Vec::new(), next: 0 };
        for (name, carrier) in carriers {
            let number = fresh.number();
            fresh.list.push(Numbered { number, name, carrier });
        }
        fresh
    }

    /// The number of the best one.
    pub fn first(&self) -> u8 {
        self.list.first().map_or(0, |first| first.number)
    }

    /// Waits for what comes by any of them.
    pub fn watch(&self, poller: &Poller, token: u64) -> Outcome<()> {
        self.list.iter().try_for_each(|one| watch(poller, one, token))
    }

    /// Waits no more.
    pub fn forget(&self, poller: &Poller) {
        for one in &self.list {
            let _ = poller.remove(&one.carrier);
        }
    }

    /// These are the ones now. A link that was there before, with the same address, keeps its socket: packets are on
    /// their way to it. With none at all everything stays, as it may work again.
    pub fn replace(
        &mut self,
        poller: &Poller,
        token: u64,
        fresh: Vec<(CarrierName, Carrier)>,
    ) -> Outcome<()> {
        if fresh.is_empty() {
            return Ok(());
        }
        let mut before = std::mem::take(&mut self.list);
        for (name, carrier) in fresh {
            let same = before.iter().position(|one| one.name == name && name.source.is_some());
            let one = match same {
                Some(at) => before.swap_remove(at),
                None => {
                    let one = Numbered { number: self.number(), name, carrier };
                    watch(poller, &one, token)?;
                    one
                }
            };
            self.list.push(one);
        }
        for gone in before {
            let _ = poller.remove(&gone.carrier);
        }
        Ok(())
    }

    /// The paths to the server at `remote`, best first.
    pub fn ways(&self, remote: SocketAddr) -> Vec<Path> {
        self.list.iter().map(|one| Path::new(remote, None).by(one.number)).collect()
    }

    /// What they are bound to, and their numbers.
    pub fn names(&self) -> impl Iterator<Item = (&CarrierName, u8)> + Clone {
        self.list.iter().map(|one| (&one.name, one.number))
    }

    /// What the carrier of a path is called.
    pub fn name_of(&self, path: &Path) -> &str {
        match path.carrier {
            INSIDE => "the control connection",
            number => self.find(number).map_or("a carrier that is gone", |one| &one.name.name),
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// Receives by the `n`th of them ([`Carrier::receive`]).
    pub fn receive(
        &self,
        n: usize,
        buffers: &mut ReceiveBuffers,
        received: &mut Vec<Received>,
    ) -> io::Result<()> {
        received.clear();
        let Some(one) = self.list.get(n) else { return Ok(()) };
        one.carrier.receive(buffers, received)?;
        for run in received {
            run.path.carrier = one.number;
        }
        Ok(())
    }

    fn find(&self, number: u8) -> Option<&Numbered> {
        self.list.iter().find(|one| one.number == number)
    }

    /// A number that none has.
    fn number(&mut self) -> u8 {
        loop {
            let number = self.next;
            self.next = if self.next >= INSIDE - 1 { 0 } else { self.next + 1 };
            if self.find(number).is_none() {
                return number;
            }
        }
    }
}

fn watch(poller: &Poller, one: &Numbered, token: u64) -> Outcome<()> {
    let added = poller.add(one.carrier.as_fd(), token, Interest::Read);
    added.map_err(|e| Failure::system("fill the epoll set", e))
}

impl Outlet for Carriers {
    fn send(&self, path: &Path, ecn: u8, datagrams: &[u8], stride: usize) -> Result<(), Unsent> {
        match self.find(path.carrier) {
            Some(one) => one.carrier.send(path, ecn, datagrams, stride),
            None => {
                Err(Unsent { reason: DropReason::SendRefused, datagrams: datagrams.len().div_ceil(stride) })
            }
        }
    }

    fn send_whole(&self, path: &Path, datagram: &[u8]) -> Result<(), DropReason> {
        let one = self.find(path.carrier).ok_or(DropReason::SendRefused)?;
        Outlet::send_whole(&one.carrier, path, datagram)
    }

    fn max_segments(&self) -> usize {
        self.list.iter().map(|one| one.carrier.max_segments()).min().unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::sys::udp::bind_towards;

    fn carrier() -> Carrier {
        let peer = "127.0.0.1:9".parse().expect("an address");
        Carrier::new(bind_towards(peer).expect("binds").into()).expect("a carrier")
    }

    fn named(name: &str, source: &str) -> CarrierName {
        let source: IpAddr = source.parse().expect("an address");
        CarrierName { name: name.to_owned(), index: 7, source: Some(source) }
    }

    #[test]
    fn a_link_that_stays_keeps_its_number_and_others_get_new_ones() {
        let poller = Poller::new(4).expect("an epoll set");
        let mut carriers = Carriers::new(vec![
            (named("eth0", "10.0.0.1"), carrier()),
            (named("wlan0", "10.0.1.1"), carrier()),
        ]);
        carriers.watch(&poller, 1).expect("watches");
        let remote = "192.0.2.1:7".parse().expect("an address");
        let numbers = |carriers: &Carriers| -> Vec<u8> {
            carriers.ways(remote).iter().map(|path| path.carrier).collect()
        };
        assert_eq!(numbers(&carriers), [0, 1]);
        // Another address, and another order.
        let now = vec![(named("wlan0", "10.0.1.1"), carrier()), (named("eth0", "10.0.0.9"), carrier())];
        carriers.replace(&poller, 1, now).expect("replaces");
        assert_eq!(numbers(&carriers), [1, 2]);
        carriers.replace(&poller, 1, Vec::new()).expect("stays");
        assert_eq!(numbers(&carriers), [1, 2]);
        for _ in 0..600 {
            let fresh = vec![(named("wlan0", "10.0.1.1"), carrier()), (CarrierName::any(), carrier())];
            carriers.replace(&poller, 1, fresh).expect("replaces");
            assert_eq!(numbers(&carriers)[0], 1);
            assert_ne!(numbers(&carriers)[1], 1);
            assert_ne!(numbers(&carriers)[1], INSIDE);
        }
    }
}
