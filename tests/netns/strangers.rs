//! Floods and half connections before anybody has proved who he is (rows 1 and 2 of the fault matrix; silence, garbage and
//! slow senders are in garbage.rs, places held by silent connections in hardship.rs).

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tunguard::segment::checksum;

use crate::certificates::{Wish, client, credentials, make};
use crate::faults::{Baseline, Bystander};
use crate::identity::authority;
use crate::lab::{Lab, Namespace, PATIENCE, SERVER_V4};
use crate::raw_client::Dialler;
use crate::traffic::Noise;

/// Fault: SYNs with ever other sources, many more than the kernel keeps half connections for. Pass: no worker is started for
/// them, a client gets in meanwhile, the bystander loses nothing, and the server holds what it held.
#[test]
fn a_flood_of_syns_keeps_nobody_out() {
    let Some(lab) = Lab::new("synflood", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let _stopper = crate::resume::Stopper(&stop);
        scope.spawn(|| syns(&lab.c(1), &stop, &sent));
        // More than the kernel keeps.
        let overflown = || netstat(&lab.srv(), "TcpExt", "TCPReqQFullDoCookies") > 100;
        crate::lab::eventually("an overflow", || overflown().then_some(()));
        let mut client = Dialler::new(&lab, 1).connect();
        assert_eq!(client.ping(1), 1);
        bystander.is_unharmed(&lab, "a flood of SYNs");
        assert_eq!(lab.status()["handshakes"], 0, "{}", lab.status());
        client.leave();
    });
    println!("{} SYNs", sent.load(Ordering::Relaxed));
    baseline.is_back(&lab, &server, "a flood of SYNs");
}

/// Fault: clients with a good certificate that vanish after any number of bytes of their handshake. Pass: each ends its own
/// worker only, the bystander loses nothing, and the server holds what it held.
#[test]
fn handshakes_cut_anywhere_end_their_own_worker_only() {
    let Some(lab) = Lab::new("halfshake", 2) else { return };
    let server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    let dialler = Dialler::new(&lab, 1);
    let mut whole = 0;
    for bytes in (0..4_000).step_by(100) {
        let tcp = dialler.tcp().expect("the port is open");
        tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let half = Half { tcp, left: bytes };
        whole += usize::from(dialler.ssl().connect(half).is_ok());
    }
    assert!(whole > 0, "4,000 bytes are no whole handshake: what was cut was always its beginning");
    bystander.is_unharmed(&lab, "half handshakes");
    baseline.is_back(&lab, &server, "half handshakes");
    assert!(!server.log().contains("ERROR"), "{}", server.log());
    assert_eq!(dialler.connect().ping(1), 1);
}

/// Fault: a client whose certificate, signed by the right authority, is larger than a handshake may be. Pass: refused with
/// a reason in the log, its worker alone ends; its twin of a tenth of that gets in.
#[test]
fn a_huge_certificate_ends_its_own_worker() {
    let Some(lab) = Lab::new("hugecert", 2) else { return };
    let mut server = lab.start_server(&lab.server());
    let mut bystander = Bystander::start(&lab);
    let baseline = Baseline::of(&lab, &server);
    let ca = authority(&lab);
    let with_names = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("a-long-name-number-{n}.example.org")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        credentials(&ca, &make(&Wish { dns: &names, ..client() }, Some(&ca)))
    };
    // OpenSSL's own bound is 100 KiB for a chain (SSL_set_max_cert_list(3)), ours 64 KiB for a handshake.
    for (names, reason) in
        [(3_000, "excessive message size"), (2_000, "too much before the handshake was done")]
    {
        let huge = Dialler::with(&lab, 1, &with_names(names));
        // A client may be done before the server has judged it.
        let answer = huge.control().map(|control| huge.hello_over(control).1);
        assert!(!matches!(answer, Ok(Ok(_))), "{answer:?}");
        server.wait_for_log(reason);
    }
    bystander.is_unharmed(&lab, "a huge certificate");
    baseline.is_back(&lab, &server, "a huge certificate");
    assert_eq!(Dialler::with(&lab, 1, &with_names(300)).connect().ping(1), 1);
}

/// A connection that takes so many bytes and no more.
#[derive(Debug)]
struct Half {
    tcp: TcpStream,
    left: usize,
}

impl Read for Half {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.tcp.read(into)
    }
}

impl Write for Half {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let n = self.tcp.write(&bytes[..bytes.len().min(self.left)])?;
        self.left -= n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp.flush()
    }
}

/// SYNs to the server's port from 198.19.0.0/16, which nobody has, until it is told to stop.
fn syns(from: &Namespace, stop: &AtomicBool, sent: &AtomicU64) {
    // With the IP header in the packet (raw(7)).
    let raw = from.within(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW))));
    let raw = raw.expect("a raw socket");
    let server: Ipv4Addr = SERVER_V4.parse().expect("an address");
    let to = SockAddr::from(SocketAddrV4::new(server, 0));
    let mut noise = Noise::new(1);
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..1_000 {
            let random: [u8; 8] = std::array::from_fn(|_| noise.next().expect("noise"));
            let packet = syn([198, 19, random[0], random[1]], server.octets(), &random[2..]);
            if raw.send_to(&packet, &to).is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
        thread::yield_now();
    }
}

fn syn(source: [u8; 4], destination: [u8; 4], random: &[u8]) -> Vec<u8> {
    let port = [random[0] | 0x80, random[1]];
    let mut tcp = [&port[..], &55555u16.to_be_bytes(), &random[2..6], &[0; 4]].concat();
    // Five words, SYN, a window, no checksum yet, nothing urgent.
    tcp.extend([0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    let addresses = [source, destination].concat();
    let sum = checksum::pseudo_header(&addresses, 6, tcp.len() as u32) + checksum::sum(&tcp);
    tcp[16..18].copy_from_slice(&checksum::finish(sum).to_be_bytes());
    // The kernel fills in the header's checksum.
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    packet.extend(addresses);
    packet.extend(tcp);
    packet
}

/// A counter of /proc/net/netstat.
fn netstat(of: &Namespace, group: &str, name: &str) -> u64 {
    let text = of.within(|| std::fs::read_to_string("/proc/thread-self/net/netstat")).expect("netstat");
    let lines: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(": ")).collect();
    let [names, values] = &lines[..] else { panic!("{group}: {text}") };
    let at = names.split(' ').position(|n| n == name).expect(name);
    values.split(' ').nth(at).and_then(|value| value.parse().ok()).expect("a number")
}

/// IPPROTO_RAW.
const RAW: i32 = 255;
