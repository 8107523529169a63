//! Numbered UDP packets at an even pace, one way.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use crate::judge::{Arrival, Bounds, Report, Watch};
use crate::now;

/// Sends until the process is ended. While there is no way out numbers are spent all the same: that is loss.
pub fn send(to: SocketAddr, rate: u64, size: usize) -> io::Result<()> {
    let here: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(here)?;
    socket.set_nonblocking(true)?;
    let mut packet = vec![0; size.max(SENT.end)];
    let start = now();
    for sequence in 0.. {
        let due = start + sequence * crate::SECOND / rate;
        thread::sleep(Duration::from_nanos(due.saturating_sub(now())));
        packet[SEQUENCE].copy_from_slice(&sequence.to_be_bytes());
        packet[SENT].copy_from_slice(&now().to_be_bytes());
        let _ = socket.send_to(&packet, to);
    }
    Ok(())
}

/// Receives around one move. `log` is a file and the text of a line in it that is waited for.
pub fn receive(port: u16, bounds: &Bounds, log: Option<(&Path, String)>) -> io::Result<Report> {
    // Whatever happens to the address inside the VPN, this socket stays.
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
    socket.set_read_timeout(Some(TICK))?;
    let (sender, orders) = mpsc::channel();
    if let Some((path, text)) = log {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(0))?;
        follow(file, text, sender.clone());
    }
    take_orders(sender);
    let mut watch = Watch::new(now());
    let mut buffer = [0; 2048];
    loop {
        match socket.recv(&mut buffer) {
            Ok(len) => {
                if let Some(arrival) = parse(&buffer[..len]) {
                    watch.arrived(arrival, bounds);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        while let Ok((order, at)) = orders.try_recv() {
            match order.as_str() {
                "move" => watch.moves(at),
                "back" => watch.back(at),
                LOGGED => watch.logged(at),
                other => return Err(io::Error::other(format!("no such order: {other}"))),
            }
        }
        let now = now();
        if watch.is_newly_steady(now) {
            println!("steady");
            io::stdout().flush()?;
        }
        if watch.is_over(now, bounds) {
            return Ok(watch.report(now, bounds));
        }
    }
}

/// Lines of standard input, each with the time at which it came.
fn take_orders(orders: Sender<(String, u64)>) {
    thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if orders.send((line, now())).is_err() {
                return;
            }
        }
    });
}

/// Says when `file` grows by a line that has `text` in it, to the millisecond.
fn follow(file: File, text: String, orders: Sender<(String, u64)>) {
    thread::spawn(move || {
        let mut file = BufReader::new(file);
        let mut line = Vec::new();
        // At the end of the file there may be part of a line.
        while file.read_until(b'\n', &mut line).is_ok() {
            if !line.ends_with(b"\n") {
                thread::sleep(LOOK);
                continue;
            }
            if String::from_utf8_lossy(&line).contains(&text)
                && orders.send((LOGGED.to_owned(), now())).is_err()
            {
                return;
            }
            line.clear();
        }
    });
}

fn parse(packet: &[u8]) -> Option<Arrival> {
    let number = |at: Range<usize>| Some(u64::from_be_bytes(packet.get(at)?.try_into().ok()?));
    Some(Arrival { at: now(), sequence: number(SEQUENCE)?, sent: number(SENT)? })
}

const SEQUENCE: Range<usize> = 0..8;
const SENT: Range<usize> = 8..16;
/// How often the receiver looks at the clock while nothing comes.
const TICK: Duration = Duration::from_millis(20);
/// How often a log is looked at.
const LOOK: Duration = Duration::from_millis(1);
const LOGGED: &str = "logged";
