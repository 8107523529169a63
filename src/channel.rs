//! The control channel: messages over TLS over a non-blocking TCP connection.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use openssl::ssl::{ErrorCode, ShutdownResult, Ssl, SslRef, SslStream};

use crate::exit::{Exit, Failure};
use crate::keys::Role;
use crate::path::canonical;
use crate::sys::poller::Interest;
use crate::sys::tcp::make_nonblocking;
use crate::tls::{self, Stranger};
use crate::wire::control::{self, LENGTH_LEN, MAX_MESSAGE, Message};

/// The control channel.
///
/// In this order: [`handshake`](ControlChannel::handshake) until it is done, then
/// [`receive`](ControlChannel::receive) whenever the socket can be read and
/// [`send`](ControlChannel::send)/[`flush`](ControlChannel::flush) whenever it can be written, each as
/// [`interest`](ControlChannel::interest) says; [`close`](ControlChannel::close) last.
pub struct ControlChannel {
    stream: SslStream<Capped>,
    role: Role,
    input: Vec<u8>,
    output: Vec<u8>,
    wants_write: bool,
    /// What a handshake that failed says of the peer.
    stranger: Option<Stranger>,
}

/// How far the handshake is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Done: messages may flow.
    Done,
    /// The socket has to become ready first.
    Waiting,
}

/// Why the control channel is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// It ended without a goodbye: the connection was lost, and the session may live on.
    Lost(String),
    /// The peer closed it after close_notify.
    Closed,
    /// The peer sent what is no message, or refused our certificate: the session should end.
    Refused(Failure),
}

impl ControlChannel {
    /// A channel over `tcp`, nothing sent yet.
    pub fn new(ssl: Ssl, tcp: TcpStream, role: Role) -> Result<ControlChannel, Failure> {
        let setup = |e: io::Error| Failure::system("prepare the control connection", e);
        make_nonblocking(&tcp).map_err(setup)?;
        tcp.set_nodelay(true).map_err(setup)?;
        let capped = Capped { tcp, left: Some(HANDSHAKE_BYTES) };
        let stream = SslStream::new(ssl, capped).map_err(|e| Failure::new(Exit::Tls, e.to_string()))?;
        Ok(ControlChannel {
            stream,
            role,
            input: Vec::new(),
            output: Vec::new(),
            wants_write: false,
            stranger: None,
        })
    }

    /// Where the other end is, while there is a connection.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.stream.get_ref().tcp.peer_addr().ok().map(canonical)
    }

    /// Goes on with the TLS handshake as far as the socket allows.
    pub fn handshake(&mut self) -> Result<Progress, Failure> {
        tls::clear_errors();
        let step = match self.role {
            Role::Client => self.stream.connect(),
            Role::Server => self.stream.accept(),
        };
        match step {
            Ok(()) => {
                self.wants_write = false;
                self.stream.get_mut().left = None;
                Ok(Progress::Done)
            }
            Err(e) if e.code() == ErrorCode::WANT_READ => {
                self.wants_write = false;
                Ok(Progress::Waiting)
            }
            Err(e) if e.code() == ErrorCode::WANT_WRITE => {
                self.wants_write = true;
                Ok(Progress::Waiting)
            }
            Err(e) => {
                self.stranger = Some(tls::stranger(&e));
                Err(tls::failure_of_handshake(self.stream.ssl(), &e))
            }
        }
    }

    /// What the handshake says of the peer, where it failed.
    pub fn stranger(&self) -> Option<Stranger> {
        self.stranger
    }

    /// The TLS session, for the peer's identity and the exporter.
    pub fn ssl(&self) -> &SslRef {
        self.stream.ssl()
    }

    /// Queues a message and sends what the socket takes.
    pub fn send(&mut self, message: &Message) -> Result<(), Broken> {
        let bytes = control::encode(message).map_err(|m| Broken::Lost(format!("can't send {m}")))?;
        if self.output.len() + bytes.len() > OUTPUT_BYTES {
            return Err(Broken::Lost("the peer doesn't read".into()));
        }
        self.output.extend(bytes);
        self.flush()
    }

    /// Bytes that the socket hasn't taken yet.
    pub fn unsent(&self) -> usize {
        self.output.len()
    }

    /// Sends what is queued, as far as the socket takes it.
    pub fn flush(&mut self) -> Result<(), Broken> {
        self.wants_write = false;
        while !self.output.is_empty() {
            tls::clear_errors();
            match self.stream.ssl_write(&self.output) {
                Ok(n) => {
                    self.output.drain(..n);
                }
                Err(e) => match e.code() {
                    ErrorCode::WANT_WRITE => {
                        self.wants_write = true;
                        return Ok(());
                    }
                    ErrorCode::WANT_READ => return Ok(()),
                    _ => {
                        let broken = self.broken(e);
                        return Err(self.last_word().unwrap_or(broken));
                    }
                },
            }
        }
        Ok(())
    }

    /// Why the peer doesn't take what we send any more, if it said so. A server that refuses our certificate
    /// closes while our next words are on their way, so that its alert is here, and our write fails all the same.
    fn last_word(&mut self) -> Option<Broken> {
        tls::clear_errors();
        let mut bytes = [0; LENGTH_LEN + MAX_MESSAGE];
        match self.stream.ssl_read(&mut bytes) {
            Err(e) if e.code() == ErrorCode::SSL => Some(self.broken(e)),
            _ => None,
        }
    }

    /// The next whole message, `None` where more bytes have to come first.
    pub fn receive(&mut self) -> Result<Option<Message>, Broken> {
        loop {
            match control::decode(&self.input) {
                Ok(Some((message, used))) => {
                    self.input.drain(..used);
                    return Ok(Some(message));
                }
                Ok(None) => {}
                Err(malformed) => {
                    let text = format!("the peer sent {malformed}");
                    return Err(Broken::Refused(Failure::new(Exit::Malformed, text)));
                }
            }
            tls::clear_errors();
            let mut bytes = [0; LENGTH_LEN + MAX_MESSAGE];
            match self.stream.ssl_read(&mut bytes) {
                Ok(n) => self.input.extend(&bytes[..n]),
                Err(e) => match e.code() {
                    ErrorCode::WANT_READ | ErrorCode::WANT_WRITE => return Ok(None),
                    ErrorCode::ZERO_RETURN => return Err(Broken::Closed),
                    _ => return Err(self.broken(e)),
                },
            }
        }
    }

    /// Whether a message is there already, so that the socket says nothing of it any more: for a caller that stopped
    /// before [`ControlChannel::receive`] had no more.
    pub fn has_message(&self) -> bool {
        self.stream.ssl().pending() > 0 || !matches!(control::decode(&self.input), Ok(None))
    }

    /// What to wait for on [`ControlChannel::as_fd`].
    pub fn interest(&self) -> Interest {
        if self.wants_write { Interest::Both } else { Interest::Read }
    }

    /// Sends what is still queued and close_notify, as far as the socket takes them now.
    pub fn close(mut self) {
        let _ = self.flush();
        tls::clear_errors();
        let _ = matches!(self.stream.shutdown(), Ok(ShutdownResult::Sent | ShutdownResult::Received));
    }

    fn broken(&self, error: openssl::ssl::Error) -> Broken {
        // Anyone on the path can end a TCP connection, or put garbage into it; only an alert that TLS has
        // authenticated is the peer's own word.
        let alert = error
            .ssl_error()
            .is_some_and(|stack| stack.errors().iter().any(|e| e.reason_code() >= ALERT_REASONS));
        if alert {
            return Broken::Refused(tls::failure_of_handshake(self.stream.ssl(), &error));
        }
        if error.code() == ErrorCode::SSL {
            return Broken::Lost(tls::failure_of_handshake(self.stream.ssl(), &error).text);
        }
        match error.io_error() {
            Some(io) => Broken::Lost(io.to_string()),
            None => Broken::Lost("the connection ended without a goodbye".into()),
        }
    }
}

impl AsFd for ControlChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.get_ref().tcp.as_fd()
    }
}

/// The connection, with a cap on what a stranger may send before the handshake is done.
#[derive(Debug)]
struct Capped {
    tcp: TcpStream,
    left: Option<usize>,
}

impl Read for Capped {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = self.left.unwrap_or(usize::MAX).min(into.len());
        if most == 0 && !into.is_empty() {
            return Err(io::Error::other("the peer sent too much before the handshake was done"));
        }
        let n = self.tcp.read(&mut into[..most])?;
        if let Some(left) = &mut self.left {
            *left -= n;
        }
        Ok(n)
    }
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tcp.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp.flush()
    }
}

/// OpenSSL's reason codes from here on are alerts of the peer (SSL_AD_REASON_OFFSET in include/openssl/sslerr.h).
const ALERT_REASONS: i32 = 1000;
/// Bytes of a handshake: a chain of four RSA-4096 certificates and a post-quantum key share fit four times.
const HANDSHAKE_BYTES: usize = 64 * 1024;
/// Bytes waiting for a peer that doesn't read.
const OUTPUT_BYTES: usize = 64 * 1024;
