//! One TCP connection that carries a given number of bytes, with their SHA-256 at both ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use ring::digest::{Context, Digest, SHA256};
use serde::Serialize;

use crate::{SECOND, now};

/// What both ends saw.
#[derive(Debug, Serialize)]
pub struct Transfer {
    bytes: u64,
    seconds: f64,
    /// Of what was sent.
    sha256: String,
    /// Of what arrived.
    sha256_there: String,
    /// They are the same.
    intact: bool,
    /// Longest time in which the other end got nothing.
    standstill_ms: f64,
}

/// Sends bytes that don't repeat, and waits for what the other end says about them.
pub fn send(to: SocketAddr, bytes: u64, rate: u64, patience: Duration) -> io::Result<Transfer> {
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_write_timeout(Some(patience))?;
    stream.set_read_timeout(Some(patience))?;
    let mut digest = Context::new(&SHA256);
    let mut noise = Noise(to.port().into());
    let mut chunk = vec![0; CHUNK];
    let start = now();
    let mut sent = 0;
    while sent < bytes {
        let due = start + sent * SECOND / rate;
        thread::sleep(Duration::from_nanos(due.saturating_sub(now())));
        let len = CHUNK.min((bytes - sent) as usize);
        noise.fill(&mut chunk[..len]);
        digest.update(&chunk[..len]);
        stream.write_all(&chunk[..len])?;
        sent += len as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    let seconds = (now() - start) as f64 / 1e9;
    let malformed = || io::Error::other(format!("the other end answers {answer:?}"));
    let (sha256_there, standstill) = answer.trim_end().split_once(' ').ok_or_else(malformed)?;
    let sha256 = hex(&digest.finish());
    Ok(Transfer {
        bytes,
        seconds,
        intact: sha256 == sha256_there,
        sha256,
        sha256_there: sha256_there.to_owned(),
        standstill_ms: standstill.parse().map_err(|_| malformed())?,
    })
}

/// Reads one connection to its end, and answers with the SHA-256 and the longest standstill in milliseconds.
pub fn receive(port: u16, patience: Duration) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(patience))?;
    let mut digest = Context::new(&SHA256);
    let mut buffer = vec![0; CHUNK];
    let (mut last, mut standstill) = (now(), 0);
    loop {
        let len = stream.read(&mut buffer)?;
        standstill = standstill.max(now() - last);
        last = now();
        if len == 0 {
            break;
        }
        digest.update(&buffer[..len]);
    }
    writeln!(stream, "{} {:.2}", hex(&digest.finish()), standstill as f64 / 1e6)
}

fn hex(digest: &Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of which no stretch is like another (xorshift64*).
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            self.0 = self.0.max(1);
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let word = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            part.copy_from_slice(&word[..part.len()]);
        }
    }
}

const CHUNK: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_agree() {
        let port =
            TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).expect("a port").port();
        let patience = Duration::from_secs(5);
        let receiver = thread::spawn(move || receive(port, patience));
        let to = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
        let sent = (0..100)
            .find_map(|_| {
                thread::sleep(Duration::from_millis(10));
                send(to, 100_001, 100_000_000, patience).ok()
            })
            .expect("a transfer");
        receiver.join().expect("a thread").expect("an answer");
        assert!(sent.intact);
        assert_eq!(sent.sha256.len(), 64);
    }
}
