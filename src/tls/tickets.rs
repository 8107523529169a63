//! TLS sessions that are taken up again (RFC 8446 section 2.2): neither end signs or checks a chain, and the keys are
//! fresh all the same, since both must do the (EC)DHE exchange (psk_dhe_ke).
//!
//! A ticket is a number and nothing else: the session behind it lies with the server's guard, which hands it out once,
//! to the worker of the connection that shows the number. So there is no key that opens the tickets of all clients.
//!
//! A resumed session's ticket is good for no longer than that of the session it all began with: until the first
//! certificate of that chain expires, and for a day at most ([`trusted_until`]). Then both ends show certificates again.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use openssl::error::ErrorStack;
use openssl::ssl::{SslContextBuilder, SslRef, SslSession, SslSessionCacheMode};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::time;
use super::verify::{Side, notes};
use crate::sys::tls_session;

/// A ticket's number, random.
pub type TicketId = [u8; 32];

/// A TLS session at rest, in OpenSSL's DER, with its pre-shared key and its peer's certificate; overwritten when
/// dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
pub struct SavedSession(Vec<u8>);

impl SavedSession {
    /// The session of these bytes.
    pub fn from_bytes(bytes: Vec<u8>) -> SavedSession {
        SavedSession(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether it is as short as sessions are.
    pub fn is_plausible(&self) -> bool {
        (1..=MAX_SESSION).contains(&self.0.len())
    }
}

impl fmt::Debug for SavedSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SavedSession")
    }
}

/// How a server's connection finds the session behind a ticket; asked for one ticket at most.
pub type LookUp = Box<dyn FnOnce(TicketId) -> Option<SavedSession> + Send>;

/// What a connection notes of tickets.
#[derive(Default)]
pub(crate) struct Desk {
    clerk: Mutex<Clerk>,
    issued: Mutex<Option<(TicketId, SavedSession)>>,
}

/// Who answers for tickets.
#[derive(Default)]
enum Clerk {
    #[default]
    Nobody,
    Ready(LookUp),
    /// A client that is sent back by a HelloRetryRequest shows its ticket again.
    Asked(TicketId, Option<SavedSession>),
}

impl Desk {
    /// One that answers with `look_up`.
    pub fn asking(look_up: LookUp) -> Desk {
        Desk { clerk: Mutex::new(Clerk::Ready(look_up)), issued: Mutex::default() }
    }
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Desk")
    }
}

/// The ticket issued on this connection (server) or received by it (client), once. To be called when the server's
/// first message after the handshake is there.
pub fn take_ticket(ssl: &SslRef) -> Option<(TicketId, SavedSession)> {
    lock(&notes(ssl)?.desk.issued).take()
}

/// Until when the certificates of a full handshake may stand for the sessions that follow from it; seconds since 1970.
pub fn trusted_until(ssl: &SslRef) -> i64 {
    let ends =
        ssl.verified_chain().into_iter().flatten().map(|cert| time::unix(cert.not_after()).unwrap_or(0));
    ends.chain([time::wall_clock() + LONGEST_CHAIN]).min().unwrap_or(0)
}

/// The handshake is done: no ticket will be looked up any more.
pub fn close_desk(ssl: &SslRef) {
    if let Some(notes) = notes(ssl) {
        *lock(&notes.desk.clerk) = Clerk::Nobody;
    }
}

/// Sets a context up: a server issues one ticket for each connection, a client keeps what it gets.
pub(super) fn set_tickets(context: &mut SslContextBuilder, side: Side) -> Result<(), ErrorStack> {
    let cache = match side {
        Side::Server => SslSessionCacheMode::SERVER,
        Side::Client => SslSessionCacheMode::CLIENT,
    };
    // The library's own memory of sessions would be one of this process only, and of all its peers.
    context.set_session_cache_mode(cache | SslSessionCacheMode::NO_INTERNAL);
    context.set_new_session_callback(|ssl, session| note(ssl, &session));
    if side == Side::Server {
        context.set_num_tickets(1)?;
        context.set_session_id_context(super::ALPN)?;
        tls_session::look_up_with(context, look_up);
    }
    Ok(())
}

fn look_up(ssl: &SslRef, id: &[u8]) -> Option<Vec<u8>> {
    let id = TicketId::try_from(id).ok()?;
    let mut clerk = lock(&notes(ssl)?.desk.clerk);
    let session = match std::mem::take(&mut *clerk) {
        Clerk::Ready(look_up) => look_up(id),
        Clerk::Asked(before, session) if before == id => session,
        _ => return None,
    };
    *clerk = Clerk::Asked(id, session.clone());
    session.map(|session| session.0.clone())
}

fn note(ssl: &SslRef, session: &SslSession) {
    let (Some(notes), Ok(der)) = (notes(ssl), session.to_der()) else { return };
    let der = Zeroizing::new(der);
    // On a client it is made from the ticket, and of no use.
    let Ok(id) = TicketId::try_from(session.id()) else { return };
    let session = SavedSession::from_bytes(der.to_vec());
    // With a certificate of that size every connection has a full handshake.
    if session.is_plausible() {
        *lock(&notes.desk.issued) = Some((id, session));
    }
}

fn lock<T>(place: &Mutex<T>) -> MutexGuard<'_, T> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of a session: a certificate with an RSA key of 4,096 bits and some names takes 2,000.
pub const MAX_SESSION: usize = 8_192;
/// Seconds. RFC 8446 section 4.6.1 asks for a limit.
pub const LONGEST_CHAIN: i64 = 86_400;
