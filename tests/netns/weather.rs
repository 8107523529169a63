//! A network that loses, duplicates and reorders at once (rows 7 and 16 of the fault matrix).
//!
//! ```text
//!   c1 ---- [198.18.1.1:55555 a relay] net ---- srv
//! ```

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use crate::lab::{INNER_V4, Lab, SERVER_V4, eventually, ip, outer};
use crate::resume::Stopper;
use crate::traffic::{Conversation, Noise, transfer};

/// Fault: of a hundred datagrams in each direction 30 are lost and 10 come twice, and each is late by up to 40 ms, while
/// both ends want new keys every two seconds. Pass: the session stays, keys are renewed, what is said inside TCP is heard
/// byte for byte, each copy is dropped as one, and nothing else is; in better weather it is as quick as ever.
#[test]
fn a_tunnel_stays_up_in_the_worst_weather() {
    let Some(lab) = Lab::new("weather", 1) else { return };
    let _server = lab.start_server(&lab.server().set("data.rekey", "'2s'"));
    let relay = Relay::default();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stopper = Stopper(&stop);
        relay.start(&lab, scope, &stop);
        let config = lab.client(1).set("remote", "['198.18.1.1']");
        let config = config.set("tls.server_name", format_args!("'{SERVER_V4}'")).set("data.rekey", "'2s'");
        let mut client = lab.start_client(1, &config);
        let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
        let first = lab.session("c1").expect("a session");
        relay.bad.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(15) {
            talk.exchange(500);
        }
        eventually("a ping in spite of it", || lab.c(1).pings(INNER_V4, 56, 1).then_some(()));
        relay.bad.store(false, Ordering::Relaxed);
        let session = lab.session("c1").expect("a session");
        assert_eq!(session["session"], first["session"], "it is another session:\n{}", client.log());
        let epochs = |s: &serde_json::Value| s["epoch"].as_u64().expect("an epoch");
        assert!(epochs(&session) >= epochs(&first) + 4, "{session}");
        // A copy may come when its keys are gone, or the window has moved on.
        let drops = session["drops"].as_object().expect("drops");
        for reason in drops.keys() {
            let of_a_copy = ["duplicate", "too_old", "unknown_epoch"].contains(&reason.as_str());
            assert!(of_a_copy, "{session}");
        }
        // How many there are depends on how much came through.
        assert!(drops["duplicate"].as_u64() > Some(0), "{session}");
        assert!(relay.lost.load(Ordering::Relaxed) > 5, "{relay:?}");
        transfer(&lab.c(1), &lab.srv(), ip(INNER_V4), 1 << 20);
        assert_eq!(client.stop(), 0);
    });
}

/// Somebody between client 1 and the server.
#[derive(Debug, Default)]
struct Relay {
    bad: AtomicBool,
    lost: AtomicU64,
}

impl Relay {
    fn start<'a>(&'a self, lab: &Lab, scope: &'a Scope<'a, '_>, stop: &'a AtomicBool) {
        let here: SocketAddr = "198.18.1.1:55555".parse().expect("an address");
        let server = outer(SERVER_V4);
        let (near, far, listener) = lab.net().within(|| {
            let far = UdpSocket::bind("198.18.100.1:0").expect("bind");
            far.connect(server).expect("connect");
            (UdpSocket::bind(here).expect("bind"), far, TcpListener::bind(here).expect("listen"))
        });
        listener.set_nonblocking(true).expect("a listener that doesn't wait");
        let net = lab.net();
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if let Ok((client, _)) = listener.accept() {
                    client.set_nonblocking(false).expect("a stream that waits");
                    let upstream = net.within(|| TcpStream::connect(server)).expect("the server");
                    join(client, upstream);
                }
                thread::sleep(Duration::from_millis(10));
            }
        });
        scope.spawn(move || self.carry(&near, &far, stop));
    }

    /// Datagrams in both directions, each in its time.
    fn carry(&self, near: &UdpSocket, far: &UdpSocket, stop: &AtomicBool) {
        let mut noise = Noise::new(7);
        let mut client = None;
        let mut late: BinaryHeap<Reverse<(Instant, bool, Vec<u8>)>> = BinaryHeap::new();
        for socket in [near, far] {
            socket.set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
        }
        let mut buffer = [0; 65_536];
        while !stop.load(Ordering::Relaxed) {
            for (from, up) in [(near, true), (far, false)] {
                for _ in 0..64 {
                    let got = from.recv_from(&mut buffer);
                    let Ok((len, peer)) = got else {
                        // An ICMP error of an earlier one may be reported here.
                        let kind = got.expect_err("not a datagram").kind();
                        if kind == ErrorKind::WouldBlock { break } else { continue }
                    };
                    if up {
                        client = Some(peer);
                    }
                    for delay in self.fate(&mut noise) {
                        late.push(Reverse((Instant::now() + delay, up, buffer[..len].to_vec())));
                    }
                }
            }
            while let Some(Reverse((_, up, datagram))) =
                late.peek().is_some_and(is_due).then(|| late.pop()).flatten()
            {
                // Lost where it can't be sent, as by any router.
                let _: io::Result<usize> = match (up, client) {
                    (true, _) => far.send(&datagram),
                    (false, Some(client)) => near.send_to(&datagram, client),
                    (false, None) => Ok(0),
                };
            }
        }
    }

    /// By how much each copy of a datagram is late; none where it is lost.
    fn fate(&self, noise: &mut Noise) -> Vec<Duration> {
        if !self.bad.load(Ordering::Relaxed) {
            return vec![Duration::ZERO];
        }
        let mut below = |n: u64| u64::from(noise.next().expect("noise")) * n / 256;
        let copies = match below(100) {
            0..30 => 0,
            30..40 => 2,
            _ => 1,
        };
        if copies == 0 {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        (0..copies).map(|_| Duration::from_millis(below(40))).collect()
    }
}

fn is_due(next: &Reverse<(Instant, bool, Vec<u8>)>) -> bool {
    next.0.0 <= Instant::now()
}

/// Two streams are one from now on.
fn join(a: TcpStream, b: TcpStream) {
    for (from, to) in [(&a, &b), (&b, &a)] {
        let both =
            (from.try_clone().expect("a second descriptor"), to.try_clone().expect("a second descriptor"));
        thread::spawn(move || {
            let (mut from, mut to) = both;
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Write);
        });
    }
}
