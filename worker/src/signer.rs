//! The server's signature, for which this process hasn't the key: asked of the key holder, from inside the handshake.

use std::os::fd::OwnedFd;

use tunguard::exit::{Failure, Outcome};
use tunguard::key_ipc::{Signature, SignerEnd};
use tunguard::sys::seqpacket::Incoming;
use tunguard::time::Time;
use tunguard::tls::{Signer, ToSign};

/// Asks over `channel`, which is good for one signature, and waits until `deadline` at most.
pub fn asking(channel: OwnedFd, deadline: Time) -> Signer {
    let holder = SignerEnd::from_fd(channel);
    Box::new(move |wanted| ask(&holder, wanted, deadline))
}

/// The handshake can do nothing else meanwhile, and neither has this process. What goes wrong is this host's fault.
fn ask(holder: &SignerEnd, wanted: &ToSign, deadline: Time) -> Outcome<Vec<u8>> {
    match holder.send(wanted, &[]) {
        Ok(true) => {}
        Ok(false) => return Err(failed("it doesn't read")),
        Err(error) => return Err(failed(error)),
    }
    match holder.wait(deadline) {
        Ok(Incoming::Message(Signature::Made(signature), _)) => Ok(signature),
        Ok(Incoming::Message(Signature::Failed { text }, _)) => Err(failed(text)),
        Ok(Incoming::Nothing) => Err(failed("it doesn't answer")),
        Ok(Incoming::Closed) => Err(failed("it is gone")),
        Err(violation) => Err(failed(violation)),
    }
}

fn failed(why: impl std::fmt::Display) -> Failure {
    Failure::system("ask the key holder for a signature", why)
}
