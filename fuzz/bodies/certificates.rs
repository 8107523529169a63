//! What certificates, revocation lists, saved TLS sessions and names of people may be made of: whatever the bytes are,
//! they are judged, and nothing that is let through is unfit for a log line or a file's name.

use openssl::ssl::{SslContext, SslMethod};
use openssl::x509::{X509, X509Ref};
use tunguard::exit::Failure;
use tunguard::pki::{AltName, Name, RemoteHost};
use tunguard::sys::tls_session;
use tunguard::tls::identity::{acceptable, common_name};
use tunguard::tls::verify::Side;
use tunguard::tls::{CertId, Revoked, clear_errors};

use super::input::Input;

/// What it is, and its bytes.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 5 {
        0 => {
            if let Ok(cert) = X509::from_der(input.rest()) {
                look_at(&cert);
            }
            clear_errors();
        }
        1 => {
            for cert in X509::stack_from_pem(input.rest()).unwrap_or_default() {
                look_at(&cert);
            }
            clear_errors();
        }
        2 => {
            let ca = input.chunk();
            judge(Revoked::parse(input.rest(), ca).map(drop));
        }
        3 => {
            let context = SslContext::builder(SslMethod::tls_client()).expect("a context").build();
            let mut ssl = openssl::ssl::Ssl::new(&context).expect("a connection");
            let _ = tls_session::offer(&mut ssl, input.rest());
            clear_errors();
        }
        _ => named(&String::from_utf8_lossy(input.rest())),
    }
}

fn look_at(cert: &X509Ref) {
    match common_name(cert) {
        Ok(name) => is_harmless(&name),
        Err(failure) => judge(Err(failure)),
    }
    match CertId::of(cert) {
        Ok(id) => {
            assert!((1..=20).contains(&id.serial.len()));
            assert!(!format!("{id:?}").contains(char::is_control));
        }
        Err(failure) => judge(Err(failure)),
    }
    let _ = [Side::Client, Side::Server].map(|side| side.use_allowed(cert));
}

fn named(text: &str) {
    if acceptable(text) {
        is_harmless(text);
    }
    match text.parse::<Name>() {
        // What we issue is let in.
        Ok(name) => assert!(acceptable(name.as_str()) && !name.as_str().starts_with(['.', '-'])),
        Err(failure) => judge(Err(failure)),
    }
    match text.parse::<AltName>() {
        Ok(AltName::Dns(host)) => assert!(host.is_ascii() && !host.contains([' ', '/', '\0'])),
        Ok(AltName::Ip(_)) => {}
        Err(failure) => judge(Err(failure)),
    }
    judge(text.parse::<RemoteHost>().map(|host| is_harmless(host.as_str())));
}

fn is_harmless(name: &str) {
    assert!(name.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'/'), "{name:?}");
    assert!(!name.is_empty() && name.trim() == name);
}

/// A refusal is a sentence that can be shown.
fn judge(outcome: Result<(), Failure>) {
    if let Err(failure) = outcome {
        assert!(!failure.text.is_empty() && !failure.text.contains(char::is_control), "{failure}");
    }
}
