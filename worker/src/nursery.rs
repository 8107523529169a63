//! The nursery: this program as the guard starts it, once. It reads what every worker is told, makes the cipher
//! library and the TLS context ready, and then, for each connection, makes a worker by fork: a copy of pages that
//! hold the setup and nothing of any session, so that a worker costs neither an exec nor memory of its own for all
//! that.
//!
//! ```text
//! guard --exec--> nursery (waits for orders only) --fork--> worker (child of the guard; locks itself in)
//! ```
//! Workers of one nursery share the places of code and data in memory, so the guard starts a new one as soon as a
//! worker crashes: nobody learns those places by trying.

use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use openssl::ssl::SslContext;

use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::{NurseryEnd, NurseryReply, NurseryRequest, Setup, WorkerEnd};
use tunguard::rigged;
use tunguard::seal;
use tunguard::sys::clock;
use tunguard::sys::seqpacket::Incoming;
use tunguard::sys::spawn::{self, Forked};
use tunguard::tls::{self, Revoked};

use crate::signer;

/// What is made ready once, for every worker.
pub struct Prepared {
    /// What the guard told us.
    pub setup: Setup,
    /// Certificates, in the cipher library's form.
    pub context: SslContext,
    /// Whom not to let in.
    pub revoked: Option<Revoked>,
}

impl Prepared {
    /// Makes everything ready that doesn't depend on the client.
    pub fn new(setup: Setup, signing: OwnedFd) -> Outcome<Prepared> {
        rigged::point("nursery.started");
        // The cipher library works, or nobody's traffic is touched.
        seal::self_test()?;
        let certificates = &setup.certificates;
        let context = tls::server_context(certificates)?;
        let revoked =
            certificates.crl.as_ref().map(|crl| Revoked::parse(crl, &certificates.ca)).transpose()?;
        // The workers open no files.
        tls::time::first_date();
        // What the library looks up and builds at its first handshake, every worker has then. It is signed as theirs
        // will be.
        tls::warm_up(&context, signer::asking(signing, clock::now() + SIGNATURE_WAIT))?;
        Ok(Prepared { setup, context, revoked })
    }
}

/// A worker just forked: who it is to be, and what it holds.
pub struct Newborn {
    /// Its user.
    pub uid: u32,
    /// Its number, for the names of its queues.
    pub number: u64,
    /// Its channel to the guard.
    pub guard: WorkerEnd,
    /// Its client.
    pub tcp: TcpStream,
    /// Its channel to the key holder.
    pub signing: OwnedFd,
}

/// Obeys the guard until it is gone (`None`), or until this is the worker it ordered.
pub fn run(guard: NurseryEnd) -> Outcome<Option<Newborn>> {
    say(&guard, &NurseryReply::Ready)?;
    loop {
        let mut fds = [PollFd::new(guard.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failure::system("wait for orders", errno)),
        }
        let (uid, number, fds) = match guard.receive(true) {
            Ok(Incoming::Message(NurseryRequest::Start { uid, number }, fds)) => (uid, number, fds),
            Ok(Incoming::Nothing) => continue,
            Ok(Incoming::Closed) => return Ok(None),
            Err(violation) => {
                return Err(Failure::new(Exit::Malformed, format!("the guard sent {violation}")));
            }
        };
        let Ok([channel, tcp, signing]) = <[OwnedFd; 3]>::try_from(fds) else {
            return Err(Failure::new(Exit::Malformed, "the guard's order came without its descriptors"));
        };
        rigged::read_orders();
        rigged::point("nursery.ordered");
        #[cfg(feature = "rigged")]
        crate::red_team::look_around();
        match spawn::fork_sibling() {
            Ok(Forked::Child) => {
                let guard = WorkerEnd::from_fd(channel);
                return Ok(Some(Newborn { uid, number, guard, tcp: TcpStream::from(tcp), signing }));
            }
            Ok(Forked::Parent(pid)) => {
                rigged::point("nursery.forked");
                say(&guard, &NurseryReply::Started { pid })?;
            }
            Err(error) => say(&guard, &NurseryReply::Failed { text: error.to_string() })?,
        }
    }
}

fn say(guard: &NurseryEnd, reply: &NurseryReply) -> Outcome<()> {
    match guard.send(reply, &[]) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::system("answer the guard", "it doesn't read")),
        Err(error) => Err(Failure::system("answer the guard", error)),
    }
}

/// For the signature of the first handshake.
const SIGNATURE_WAIT: Duration = Duration::from_secs(5);
