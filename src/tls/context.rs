//! TLS 1.3 with a certificate on each side. There is nothing to configure here, on purpose.

use std::net::IpAddr;
use std::os::unix::net::UnixStream;

use openssl::error::ErrorStack;
use openssl::pkey::{PKeyRef, Private};
use openssl::ssl::{
    AlpnError, Ssl, SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions, SslStream, SslVerifyMode,
    SslVersion, select_next_proto,
};
use openssl::x509::X509PurposeId;
use openssl::x509::verify::{X509CheckFlags, X509VerifyFlags};

use super::credentials::{Certificates, Credentials, Loaded};
use super::signing::{Signer, Signing, signing_failure};
use super::tickets::{Desk, LookUp, SavedSession, set_tickets};
use super::verify::{Judge, Notes, Side, notes_index};
use super::{ALPN, clear_errors, library};
use crate::exit::{Exit, Failure, Outcome};
use crate::sys::{tls_key, tls_session};

/// What a server's workers accept clients with. It has no key: each connection brings its [`Signer`].
pub fn server_context(certificates: &Certificates) -> Outcome<SslContext> {
    let loaded = certificates.load()?;
    clear_errors();
    build(Side::Server, loaded, None).map_err(|e| library("setting up the server's TLS", &e))
}

/// What a client dials with.
pub fn client_context(credentials: &Credentials) -> Outcome<SslContext> {
    let (loaded, key) = credentials.load()?;
    clear_errors();
    build(Side::Client, loaded, Some(&key)).map_err(|e| library("setting up the client's TLS", &e))
}

/// One connection on the server, ready for `accept`; tickets are not taken.
pub fn server_ssl(context: &SslContext, signer: Signer) -> Outcome<Ssl> {
    clear_errors();
    accepting(context, signer, Desk::default()).map_err(|e| library("preparing a TLS connection", &e))
}

/// The same, where `look_up` knows the sessions behind tickets.
pub fn server_ssl_with(context: &SslContext, signer: Signer, look_up: LookUp) -> Outcome<Ssl> {
    clear_errors();
    accepting(context, signer, Desk::asking(look_up)).map_err(|e| library("preparing a TLS connection", &e))
}

/// One connection on the client, ready for `connect`. The server's certificate must carry `expected_name`, a DNS
/// name or an address, among its subject alternative names.
pub fn client_ssl(context: &SslContext, expected_name: &str) -> Outcome<Ssl> {
    let name = Name::parse(expected_name)?;
    clear_errors();
    dialling(context, &name, expected_name).map_err(|e| library("preparing a TLS connection", &e))
}

/// On a client: offers the server to go on with a session of before, made with a server of the same name. A server that
/// doesn't know it any more makes a new one.
pub fn offer_session(ssl: &mut Ssl, session: &SavedSession) -> Outcome<()> {
    clear_errors();
    tls_session::offer(ssl, session.as_bytes()).map_err(|e| library("offering a TLS session", &e))
}

/// Shakes hands with itself, as far as a client without a certificate gets: the library looks up and builds much at
/// its first handshake, which processes forked after this one have then.
pub fn warm_up(server: &SslContext, signer: Signer) -> Outcome<()> {
    clear_errors();
    let failed = |e: ErrorStack| library("trying out TLS", &e);
    let mut client = SslContext::builder(SslMethod::tls_client()).map_err(failed)?;
    client.set_verify(SslVerifyMode::NONE);
    client.set_alpn_protos(ALPN_WIRE).map_err(failed)?;
    let (ours, theirs) = UnixStream::pair().map_err(|e| Failure::system("try out TLS", e))?;
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).map_err(|e| Failure::system("try out TLS", e))?;
    }
    let mut server = SslStream::new(server_ssl(server, signer)?, ours).map_err(failed)?;
    let client = Ssl::new(&client.build()).map_err(failed)?;
    let mut client = SslStream::new(client, theirs).map_err(failed)?;
    // Hello, the server's flight, the client's, the server's refusal: each turn brings both a step on.
    for _ in 0..WARM_UP_TURNS {
        let _ = client.connect();
        if let Err(error) = server.accept()
            && let Some(failure) = signing_failure(server.ssl())
        {
            log::debug!("{error}");
            return Err(failure);
        }
    }
    clear_errors();
    if server.ssl().version2() == Some(SslVersion::TLS1_3) {
        return Ok(());
    }
    Err(Failure::new(Exit::Tls, "the TLS library doesn't get through a handshake of its own"))
}

fn build(side: Side, loaded: Loaded, key: Option<&PKeyRef<Private>>) -> Result<SslContext, ErrorStack> {
    let (method, peer, purpose) = match side {
        Side::Server => (SslMethod::tls_server(), Side::Client, X509PurposeId::SSL_CLIENT),
        Side::Client => (SslMethod::tls_client(), Side::Server, X509PurposeId::SSL_SERVER),
    };
    let mut context = SslContext::builder(method)?;

    // TLS 1.3, tickets that are numbers and nothing more (NO_TICKET), no early data.
    context.set_min_proto_version(Some(SslVersion::TLS1_3))?;
    context.set_max_proto_version(Some(SslVersion::TLS1_3))?;
    context.set_options(SslOptions::NO_COMPRESSION | SslOptions::NO_RENEGOTIATION | SslOptions::NO_TICKET);
    set_tickets(&mut context, side)?;
    context.set_max_early_data(0)?;
    // 112 bits: RSA from 2,048 bits, no SHA-1. The default differs between OpenSSL's versions.
    context.set_security_level(2);
    set_groups(&mut context)?;

    // Writes of a non-blocking socket take what fits, and we send the chain of tls.cert, not one that OpenSSL guesses.
    context.set_mode(
        SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER | SslMode::NO_AUTO_CHAIN,
    );
    set_alpn(&mut context, side)?;

    context.set_certificate(&loaded.cert)?;
    for cert in loaded.chain {
        context.add_extra_chain_cert(cert)?;
    }
    match key {
        Some(key) => {
            context.set_private_key(key)?;
            context.check_private_key()?;
        }
        None => tls_key::hear_messages(&mut context),
    }

    // The peer: a certificate, always, that leads to one of tls.ca within three steps.
    context.set_cert_store(loaded.trust);
    context.set_verify_depth(VERIFY_DEPTH);
    let param = context.verify_param_mut();
    param.set_purpose(purpose)?;
    param.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
    let judge = Judge { peer, ca: loaded.ca_name, revoked: loaded.revoked };
    context.set_verify_callback(
        SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT,
        move |sound, store| judge.verdict(sound, store),
    );
    Ok(context.build())
}

/// The hybrid post-quantum group first, where the library has it (OpenSSL 3.5).
fn set_groups(context: &mut SslContextBuilder) -> Result<(), ErrorStack> {
    context.set_groups_list(GROUPS_HYBRID).or_else(|_| {
        clear_errors();
        context.set_groups_list(GROUPS_CLASSIC)
    })
}

/// A client that offers other protocols only is refused with no_application_protocol; one that offers none at all
/// gets as far as the judge.
fn set_alpn(context: &mut SslContextBuilder, side: Side) -> Result<(), ErrorStack> {
    match side {
        Side::Client => context.set_alpn_protos(ALPN_WIRE),
        Side::Server => {
            context.set_alpn_select_callback(|_, offered| {
                select_next_proto(ALPN_WIRE, offered).map(|_| ALPN).ok_or(AlpnError::ALERT_FATAL)
            });
            Ok(())
        }
    }
}

fn accepting(context: &SslContext, signer: Signer, desk: Desk) -> Result<Ssl, ErrorStack> {
    let mut ssl = Ssl::new(context)?;
    let public = match ssl.certificate() {
        Some(cert) => cert.public_key()?,
        None => return Err(ErrorStack::get()),
    };
    let signing = Some(Signing::prepare(&mut ssl, &public, signer)?);
    ssl.set_ex_data(notes_index()?, Notes { desk, signing, ..Notes::default() });
    ssl.set_accept_state();
    Ok(ssl)
}

fn dialling(context: &SslContext, name: &Name, expected: &str) -> Result<Ssl, ErrorStack> {
    let mut ssl = Ssl::new(context)?;
    ssl.set_ex_data(notes_index()?, Notes { expected: Some(expected.to_owned()), ..Notes::default() });
    let param = ssl.param_mut();
    param.set_hostflags(X509CheckFlags::NO_PARTIAL_WILDCARDS | X509CheckFlags::NEVER_CHECK_SUBJECT);
    match name {
        Name::Ip(ip) => param.set_ip(*ip)?,
        Name::Dns(host) => {
            param.set_host(host)?;
            ssl.set_hostname(host)?;
        }
    }
    ssl.set_connect_state();
    Ok(ssl)
}

/// The name a server must have, in the form OpenSSL compares.
#[derive(Debug, PartialEq, Eq)]
enum Name {
    Ip(IpAddr),
    Dns(String),
}

impl Name {
    /// Only host names get through: OpenSSL takes an empty name for "any", and ".example.org" for any name below.
    fn parse(text: &str) -> Outcome<Name> {
        // A link-local address may carry its interface, which no certificate does.
        let address = text.split('%').next().unwrap_or_default();
        if let Ok(ip) = address.parse() {
            return Ok(Name::Ip(ip));
        }
        let host = text.strip_suffix('.').unwrap_or(text);
        let label = |l: &str| {
            (1..=63).contains(&l.len())
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if host.len() <= 253 && host.split('.').all(label) {
            Ok(Name::Dns(host.to_owned()))
        } else {
            Err(Failure::usage(format!(
                "tls.server_name {text:?} is neither a host name nor an address: write it as the server's \
                 certificate does"
            )))
        }
    }
}

/// Intermediate certificates between a peer and our CA.
const VERIFY_DEPTH: u32 = 3;

const GROUPS_HYBRID: &str = "X25519MLKEM768:X25519:P-256";
const GROUPS_CLASSIC: &str = "X25519:P-256";

const WARM_UP_TURNS: usize = 3;
/// [`ALPN`] as it is on the wire: length, name.
const ALPN_WIRE: &[u8] = b"\x0atunguard/1";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expected_names_are_hosts_or_addresses() {
        let dns = |s: &str| Name::Dns(s.to_owned());
        let ip = |s: &str| Name::Ip(s.parse().expect("an address"));
        for (text, name) in [
            ("vpn.example.org", dns("vpn.example.org")),
            ("vpn.example.org.", dns("vpn.example.org")),
            ("localhost", dns("localhost")),
            ("192.0.2.1", ip("192.0.2.1")),
            ("2001:db8::1", ip("2001:db8::1")),
            ("fe80::1%eth0", ip("fe80::1")),
        ] {
            assert_eq!(Name::parse(text), Ok(name));
        }
    }

    #[test]
    fn names_that_openssl_would_take_for_a_pattern_are_refused() {
        let long = format!("{}.org", "x".repeat(64));
        for text in
            ["", ".", ".example.org", "*.example.org", "a..b", "a b", "a\0b", "b\u{fc}ro.example", &long]
        {
            let failure = Name::parse(text).expect_err(text);
            assert!(failure.text.contains("tls.server_name"), "{failure}");
        }
    }

    #[test]
    fn alpn_on_the_wire_is_its_length_and_its_name() {
        assert_eq!(ALPN_WIRE.split_first(), Some((&10, ALPN)));
    }
}
