//! Traffic between namespaces, checked byte for byte.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ring::digest::{Context, Digest, SHA256};

use crate::lab::{Namespace, PATIENCE};

/// TCP from `from` to `address` in `to`, `bytes` in each direction at once, the SHA-256 of what was sent
/// compared with that of what arrived.
pub fn transfer(from: &Namespace, to: &Namespace, address: IpAddr, bytes: usize) {
    let (near, far) = connect(from, to, address);
    let up = send(&near, 1, bytes);
    let down = send(&far, 2, bytes);
    let arrived_up = receive(&far);
    let arrived_down = receive(&near);
    let join = |what: &str, thread: JoinHandle<io::Result<Digest>>| {
        let digest = thread.join().expect("a thread of the transfer");
        digest.unwrap_or_else(|e| panic!("{what} between {from:?} and {address}: {e}"))
    };
    let (up, down) = (join("sending up", up), join("sending down", down));
    let (got_up, got_down) = (join("receiving up", arrived_up), join("receiving down", arrived_down));
    assert_eq!(got_up.as_ref(), up.as_ref(), "{bytes} bytes from {from:?} to {address}");
    assert_eq!(got_down.as_ref(), down.as_ref(), "{bytes} bytes from {address} to {from:?}");
}

/// A TCP connection between two namespaces: both ends.
pub fn connect(from: &Namespace, to: &Namespace, address: IpAddr) -> (TcpStream, TcpStream) {
    let listener = to.within(|| TcpListener::bind((address, 0))).expect("listen");
    let target = listener.local_addr().expect("an address");
    let near = from.within(|| TcpStream::connect_timeout(&target, PATIENCE));
    let near = near.unwrap_or_else(|e| panic!("connect from {from:?} to {target}: {e}"));
    let (far, _) = listener.accept().expect("the connection that was just made");
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    }
    (near, far)
}

/// Whether TCP reaches a port that is open.
pub fn can_connect(from: &Namespace, to: &Namespace, address: IpAddr) -> bool {
    let listener = to.within(|| TcpListener::bind((address, 0))).expect("listen");
    let target = listener.local_addr().expect("an address");
    from.within(|| TcpStream::connect_timeout(&target, Duration::from_secs(2))).is_ok()
}

/// The address from which `to` sees a connection come that `from` makes to `address`.
pub fn seen_as(from: &Namespace, to: &Namespace, address: IpAddr) -> IpAddr {
    connect(from, to, address).1.peer_addr().expect("a peer").ip()
}

/// A connection that stays open: says things and expects to hear them back.
pub struct Conversation {
    near: TcpStream,
    round: u64,
}

impl Conversation {
    /// A connection from `from` to a server in `to` that repeats what it hears.
    pub fn start(from: &Namespace, to: &Namespace, address: IpAddr) -> Conversation {
        let (near, far) = connect(from, to, address);
        // Whoever speaks may be silent for as long as he likes.
        far.set_read_timeout(None).expect("no timeout");
        thread::spawn(move || {
            let (mut reader, mut writer) = (&far, &far);
            // Ends with the connection.
            let _ = io::copy(&mut reader, &mut writer);
        });
        Conversation { near, round: 0 }
    }

    /// Says `bytes` of noise and hears the same back.
    pub fn exchange(&mut self, bytes: usize) {
        self.round += 1;
        let said: Vec<u8> = Noise::new(self.round).take(bytes).collect();
        let mut heard = vec![0; bytes];
        thread::scope(|scope| {
            let mut writer = &self.near;
            let said = &said;
            let writing = scope.spawn(move || writer.write_all(said));
            (&self.near).read_exact(&mut heard).expect("the echo");
            writing.join().expect("the writing thread").expect("say something");
        });
        assert!(said == heard, "the echo of round {} differs", self.round);
    }
}

/// Sends a datagram of `size` bytes and hears it back. A datagram may be lost: three tries.
pub fn udp_echo(from: &Namespace, to: &Namespace, address: IpAddr, size: usize) {
    let server = to.within(|| UdpSocket::bind((address, 0))).expect("bind");
    let target = server.local_addr().expect("an address");
    let client = udp_to(from, target).expect("a socket");
    server.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
    client.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout");
    let said: Vec<u8> = Noise::new(size as u64).take(size).collect();
    let done = AtomicBool::new(false);
    let heard = thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = vec![0; 65_536];
            while !done.load(Ordering::Relaxed) {
                if let Ok((n, peer)) = server.recv_from(&mut buffer) {
                    // An ICMP error of an earlier one may be reported here.
                    let _ = server.send_to(&buffer[..n], peer);
                }
            }
        });
        let mut buffer = vec![0; 65_536];
        let heard = (0..3).find_map(|_| {
            // An error of an earlier try would be said again by the lack of an answer.
            let _ = client.send(&said);
            client.recv(&mut buffer).ok()
        });
        done.store(true, Ordering::Relaxed);
        heard.map(|n| buffer[..n].to_vec())
    });
    match heard {
        Some(heard) => assert!(heard == said, "the echo of {size} bytes differs"),
        None => panic!("no echo of {size} bytes between {from:?} and {target}"),
    }
}

/// Sends a datagram to a port nobody listens on, and says what comes of it.
pub fn udp_to_closed_port(from: &Namespace, address: IpAddr) -> io::Error {
    let socket = udp_to(from, SocketAddr::new(address, 9)).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout");
    for _ in 0..3 {
        match socket.send(b"anybody?").and_then(|_| socket.recv(&mut [0; 64])) {
            Ok(n) => panic!("{n} bytes came back from a closed port"),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return e,
        }
    }
    ErrorKind::TimedOut.into()
}

/// A UDP socket in a namespace, connected to `target`.
pub fn udp_to(from: &Namespace, target: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = match target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    from.within(|| {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(target)?;
        Ok(socket)
    })
}

/// Bytes that don't compress and don't repeat: xorshift64*.
pub struct Noise(u64);

impl Noise {
    /// The noise of this seed.
    pub fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Fills `bytes` with it.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let word = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

impl Iterator for Noise {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        let mut byte = [0];
        self.fill(&mut byte);
        Some(byte[0])
    }
}

fn send(stream: &TcpStream, seed: u64, bytes: usize) -> JoinHandle<io::Result<Digest>> {
    let mut stream = stream.try_clone().expect("a second descriptor");
    thread::spawn(move || {
        let mut noise = Noise::new(seed);
        let mut context = Context::new(&SHA256);
        let mut chunk = vec![0; CHUNK];
        let mut left = bytes;
        while left > 0 {
            let n = left.min(CHUNK);
            noise.fill(&mut chunk[..n]);
            context.update(&chunk[..n]);
            stream.write_all(&chunk[..n])?;
            left -= n;
        }
        stream.shutdown(Shutdown::Write)?;
        Ok(context.finish())
    })
}

fn receive(stream: &TcpStream) -> JoinHandle<io::Result<Digest>> {
    let mut stream = stream.try_clone().expect("a second descriptor");
    thread::spawn(move || {
        let mut context = Context::new(&SHA256);
        let mut chunk = vec![0; CHUNK];
        loop {
            match stream.read(&mut chunk)? {
                0 => return Ok(context.finish()),
                n => context.update(&chunk[..n]),
            }
        }
    })
}

const CHUNK: usize = 64 * 1024;
