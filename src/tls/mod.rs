//! The control channel's TLS: who may talk to whom, and what a refusal says.
//!
//! In the order a connection meets them:
//! 1. [`credentials`]: reads and checks our own files before anything is listening or dialled.
//!    A server's key is read elsewhere ([`server_key`]), by the process that signs ([`signing`]).
//! 2. [`context`]: TLS 1.3 with certificates on both sides, and nothing that can be switched off.
//! 3. [`verify`]: judges the peer's certificate inside the handshake, so that it is told why by an alert.
//! 4. [`failure`]: turns a failed handshake or a late alert into a sentence a user can act on.
//! 5. [`identity`]: who the peer is, once the handshake is done.
//! 6. [`tickets`]: the next connection may go on with this one's TLS session.
//! 7. [`export_secret`]: what the data channel's keys are made from; [`export_binding`]: what a proof is bound to.

pub mod context;
pub mod credentials;
pub mod failure;
pub mod identity;
pub mod revoked;
pub mod server_key;
pub mod signing;
pub mod tickets;
pub mod time;
pub mod verify;

pub use context::{
    client_context, client_ssl, offer_session, server_context, server_ssl, server_ssl_with, warm_up,
};
pub use credentials::{Certificates, Credentials};
pub use failure::{Stranger, failure_of_connect, failure_of_handshake, failure_of_io, stranger};
pub use identity::{CertId, Identity, confirm_peer, peer_identity};
pub use revoked::Revoked;
pub use server_key::{KeySource, SigningKey};
pub use signing::{Signer, ToSign, close_signing};
pub use tickets::{SavedSession, TicketId, close_desk, take_ticket, trusted_until};
pub use verify::Side;

use openssl::error::ErrorStack;
use openssl::pkey::Id;
use openssl::ssl::SslRef;
use zeroize::Zeroizing;

use crate::exit::{Exit, Failure, Outcome};

/// The secret of epoch 0, the same at both ends of `ssl` and of nowhere else (RFC 8446 section 7.5).
pub fn export_secret(ssl: &SslRef, session_id: &[u8; 8]) -> Outcome<Zeroizing<[u8; 32]>> {
    clear_errors();
    let mut secret = Zeroizing::new([0; 32]);
    ssl.export_keying_material(secret.as_mut(), EXPORTER_LABEL, Some(session_id))
        .map_err(|e| library("exporting the data channel's secret", &e))?;
    Ok(secret)
}

/// What names this connection to its two ends, and no other connection: a resumption's proof is made over it.
pub fn export_binding(ssl: &SslRef) -> Outcome<[u8; 32]> {
    clear_errors();
    let mut binding = [0; 32];
    ssl.export_keying_material(&mut binding, BINDING_LABEL, Some(&[]))
        .map_err(|e| library("exporting what names the connection", &e))?;
    Ok(binding)
}

/// What was negotiated, for a log line: `TLSv1.3 TLS_AES_256_GCM_SHA384 X25519MLKEM768`, and whether it was resumed.
pub fn summary(ssl: &SslRef) -> String {
    let cipher = ssl.current_cipher().map_or("no cipher", |c| c.name());
    let resumed = if ssl.session_reused() { " resumed" } else { "" };
    format!("{} {cipher} {}{resumed}", ssl.version_str(), group_name(ssl))
}

/// The key exchange's group. Either end's temporary key tells; a hybrid has no number in OpenSSL, and the only
/// one ever offered is X25519MLKEM768.
pub fn group_name(ssl: &SslRef) -> &'static str {
    let id = ssl.peer_tmp_key().map(|k| k.id()).or_else(|_| ssl.tmp_key().map(|k| k.id()));
    clear_errors();
    match id {
        Ok(Id::X25519) => "X25519",
        Ok(Id::EC) => "P-256",
        Ok(_) => "X25519MLKEM768",
        Err(_) => "unknown group",
    }
}

/// Drops what an earlier call left in this thread's error queue: OpenSSL looks at the queue to tell how an
/// operation on a connection went, so a leftover would be blamed on the wrong one.
pub fn clear_errors() {
    drop(ErrorStack::get());
}

/// A failure inside OpenSSL that no input explains.
pub(crate) fn library(what: &str, errors: &ErrorStack) -> Failure {
    Failure::new(Exit::Tls, format!("{what}: OpenSSL: {}", reason(errors)))
}

/// The innermost reason of an error stack, without file names and numbers.
pub(crate) fn reason(errors: &ErrorStack) -> String {
    match errors.errors().first() {
        Some(e) => match (e.reason(), e.data()) {
            (Some(reason), Some(data)) if !data.is_empty() => format!("{reason} ({})", data.escape_debug()),
            (Some(reason), _) => reason.to_owned(),
            (None, _) => format!("error {:#x}", e.code()),
        },
        None => "no reason given".to_owned(),
    }
}

/// ALPN: the protocol and its major version.
pub const ALPN: &[u8] = b"tunguard/1";

/// RFC 5705 label of the data channel's secret.
pub const EXPORTER_LABEL: &str = "EXPORTER-tunguard-data";

/// RFC 5705 label of what a resumption's proof is bound to.
pub const BINDING_LABEL: &str = "EXPORTER-tunguard-resume";
