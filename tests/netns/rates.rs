//! A client's limit holds both ways, whoever writes to the device, and is nobody else's.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lab::{INNER_V4, Lab, Namespace, eventually, ip};
use crate::raw_client::{Dialler, RawClient};
use crate::traffic::{Noise, connect, transfer, udp_to};

#[test]
fn a_limit_holds_both_ways_and_is_nobody_elses() {
    for mode in ["direct", "guard"] {
        let Some(lab) = Lab::new(&format!("rates-{mode}"), 2) else { return };
        lab.write("clients.d/c1.toml", "limits = { rate_down = '8Mbit/s', rate_up = '8Mbit/s' }\n");
        let _server = lab.start_server(&lab.server().set("data.tun_write", format_args!("'{mode}'")));
        let _clients = [1, 2].map(|n| lab.start_client(n, &lab.client(n)));
        let limited = lab.session("c1").expect("a session");
        assert_eq!((&limited["rate_down"], &limited["rate_up"]), (&RATE.into(), &RATE.into()));
        let (near, far) = (lab.c(1), lab.srv());
        for (what, from, to, address) in
            [("up", &near, &far, ip(INNER_V4)), ("down", &far, &near, lab.inner_v4(1))]
        {
            let done = AtomicBool::new(false);
            let (took, rounds) = thread::scope(|scope| {
                let timed = scope.spawn(|| {
                    let took = one_way(from, to, address, SENT);
                    done.store(true, Ordering::Relaxed);
                    took
                });
                let mut rounds = 0;
                while !done.load(Ordering::Relaxed) && !timed.is_finished() {
                    transfer(&lab.c(2), &lab.srv(), ip(INNER_V4), 500_000);
                    rounds += 1;
                }
                (timed.join().expect("a transfer"), rounds)
            });
            // What may pass at once, and the last super-packet.
            let least = Duration::from_micros((SENT as u64 - BURST - 65_536) * 8_000_000 / RATE);
            assert!(took >= least, "{mode}, {what}: {SENT} bytes took {took:?}, at least {least:?}");
            // The one that the limited transfer's end interrupts doesn't count.
            assert!(rounds > 1, "{mode}, {what}: another client waits for the limited one");
        }
        let free = lab.session("c2").expect("a session");
        assert_eq!((&free["rate_down"], &free["rate_up"]), (&Value::Null, &Value::Null));
        assert_eq!(count(&free["guard_drops"], "rate_down") + count(&free["drops"], "rate_up"), 0);
    }
}

#[test]
fn what_is_too_much_is_dropped_and_counted() {
    let Some(lab) = Lab::new("toomuch", 1) else { return };
    let _server = lab
        .start_server(&lab.server().set("limits.rate_down", "'1Mbit/s'").set("limits.rate_up", "'1Mbit/s'"));
    let _client = lab.start_client(1, &lab.client(1));
    let (near, far) = (lab.c(1), lab.srv());
    // 1,000 bytes each: far more than the burst and what waits.
    for (from, to, address) in [(&near, &far, ip(INNER_V4)), (&far, &near, lab.inner_v4(1))] {
        let receiver = to.within(|| UdpSocket::bind((address, 0))).expect("bind");
        let target: SocketAddr = receiver.local_addr().expect("an address");
        let sender = udp_to(from, target).expect("a socket");
        let begun = Instant::now();
        for _ in 0..3_000 {
            let _ = sender.send(&[0x55; 1_000]);
        }
        receiver.set_read_timeout(Some(Duration::from_secs(2))).expect("a timeout");
        let mut got = 0;
        while receiver.recv(&mut [0; 1_000]).is_ok() {
            got += 1_000u64;
        }
        let most = BURST_LEAST + 65_536 + begun.elapsed().as_micros() as u64 / 8;
        assert!(got <= most, "{got} bytes of {most}");
        assert!(got >= 30_000, "{got} bytes are no rate");
    }
    let session = eventually("drops in the status", || {
        let session = lab.session("c1")?;
        let both = count(&session["drops"], "rate_up") > 0 && count(&session["guard_drops"], "rate_down") > 0;
        both.then_some(session)
    });
    let status = lab.status();
    assert_eq!(status["guard_drops"]["rate_down"], session["guard_drops"]["rate_down"]);
    let shown = lab.tunguard(&["status", "--socket", &lab.path("admin.sock").display().to_string()]);
    assert!(shown.contains("LIMITED") && shown.contains("1Mbit/s"), "{shown}");
}

/// Each worker lets as much pass as its client may send, and the guard lets all of them together.
#[test]
fn several_sessions_share_the_limit_where_the_guard_writes() {
    let Some(lab) = Lab::new("shared", 1) else { return };
    let config = lab.server().set("max_sessions_per_identity", 4).set("data.tun_write", "'guard'");
    let _server = lab.start_server(&config.set("limits.rate_up", "'64Kbit/s'"));
    let dialler = Dialler::new(&lab, 1);
    let mut sessions: Vec<RawClient> = (0..4).map(|_| dialler.connect()).collect();
    let begun = Instant::now();
    for session in &mut sessions {
        for n in 0..100 {
            let datagram = session.seal(&filler(session.address(), n));
            session.send(&datagram);
            // Each is heard before its socket is full.
            thread::sleep(Duration::from_millis(1));
        }
    }
    let (dropped, passed) = eventually("all of it is counted", || {
        let sessions = lab.sessions();
        let sum =
            |section: &str, reason: &str| sessions.iter().map(|s| count(&s[section], reason)).sum::<u64>();
        let taken: u64 = sessions.iter().filter_map(|s| s["received_packets"].as_u64()).sum();
        let (worker, guard) = (sum("drops", "rate_up"), sum("guard_drops", "rate_up"));
        (taken + worker == 400 && guard > 0).then_some((guard, taken))
    });
    // Twice the burst, for what comes bunched, and the rate.
    let most = 2 * BURST_LEAST / 1_000 + begun.elapsed().as_millis() as u64 / 125 + 1;
    assert!(passed - dropped <= most, "{passed} - {dropped} of {most}");
    assert_eq!(lab.status()["guard_drops"]["rate_up"], dropped);
}

/// An IPv4 packet of 1,000 bytes to a closed port of the server.
fn filler(source: std::net::Ipv4Addr, n: u16) -> Vec<u8> {
    let mut packet = crate::raw_client::echo_request(source, n);
    packet.resize(1_000, 0);
    packet[2..4].copy_from_slice(&1_000u16.to_be_bytes());
    // An experimental protocol (RFC 3692), so that nobody answers but by an ICMP error; header checksum anew.
    packet[9] = 253;
    packet[10..12].copy_from_slice(&[0, 0]);
    let sum = tunguard::segment::checksum::finish(tunguard::segment::checksum::sum(&packet[..20]));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// `bytes` by TCP, one way: the time from the first byte until the last arrived.
fn one_way(from: &Namespace, to: &Namespace, address: IpAddr, bytes: usize) -> Duration {
    let (mut near, mut far) = connect(from, to, address);
    let begun = Instant::now();
    let sending = thread::spawn(move || {
        let mut chunk = vec![0; 50_000];
        let mut noise = Noise::new(7);
        for _ in 0..bytes / chunk.len() {
            noise.fill(&mut chunk);
            near.write_all(&chunk).expect("the connection takes it");
        }
        near.shutdown(Shutdown::Write).expect("it ends");
        near
    });
    let mut got = 0;
    let mut chunk = vec![0; 65_536];
    loop {
        match far.read(&mut chunk).expect("the connection goes on") {
            0 => break,
            n => got += n,
        }
    }
    let took = begun.elapsed();
    drop(sending.join().expect("the sending thread"));
    assert_eq!(got, bytes);
    took
}

fn count(drops: &Value, reason: &str) -> u64 {
    drops[reason].as_u64().unwrap_or(0)
}

const RATE: u64 = 8_000_000;
/// What passes in 100 ms.
const BURST: u64 = RATE / 80;
const BURST_LEAST: u64 = 65_536;
const SENT: usize = 4_000_000;
