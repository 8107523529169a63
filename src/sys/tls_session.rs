//! Handing OpenSSL a TLS session to be taken up again.

use openssl::error::ErrorStack;
use openssl::ssl::{Ssl, SslContextBuilder, SslRef, SslSession};

/// On a server: asks `look_up` for the session, as DER, that belongs to a ticket's number. What doesn't decode counts
/// as not found.
pub fn look_up_with<F>(context: &mut SslContextBuilder, look_up: F)
where
    F: Fn(&SslRef, &[u8]) -> Option<Vec<u8>> + Send + Sync + 'static,
{
    let found = move |ssl: &mut SslRef, id: &[u8]| {
        let session = SslSession::from_der(&look_up(ssl, id)?);
        session.inspect_err(|_| crate::tls::clear_errors()).ok()
    };
    // SAFETY: the session returned may belong to no other context. It was decoded for this call, so it belongs to none.
    unsafe { context.set_get_session_callback(found) }
}

/// On a client: offers to go on with the session that `der` holds.
pub fn offer(ssl: &mut Ssl, der: &[u8]) -> Result<(), ErrorStack> {
    let session = SslSession::from_der(der)?;
    // SAFETY: the session may belong to no context other than the connection's. It was decoded just now, so it belongs
    // to none, and OpenSSL takes a reference of its own.
    unsafe { ssl.set_session(&session) }
}
