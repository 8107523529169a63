//! The verdict on a peer's certificate, reached inside the handshake.
//!
//! OpenSSL builds and checks the chain (signatures, validity, use, expected name) and asks us at each step. We
//! add what it leaves open: extended key usage must be there, nothing may be revoked, a client needs a name, and
//! ALPN must have been agreed. What we refuse ends the handshake with the alert that fits, and the sentence for the
//! user is kept with the connection (`Notes`), because OpenSSL forgets a certificate it refused.

use std::fmt;
use std::sync::{Arc, OnceLock};

use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::ssl::{Ssl, SslRef};
use openssl::x509::{X509ExtendedKeyUsage, X509Ref, X509StoreContext, X509StoreContextRef};

use super::identity::{CertId, common_name, escaped, no_protocol, shown_name};
use super::revoked::Revoked;
use super::signing::Signing;
use super::tickets::Desk;
use super::{ALPN, time};
use crate::exit::{Exit, Failure};
use crate::sys::x509::Verdict;

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who dialled.
    Client,
    /// Who listens.
    Server,
}

/// What a context knows when it judges a peer.
#[derive(Debug)]
pub(crate) struct Judge {
    /// Whom it judges.
    pub peer: Side,
    /// Our CA as errors call it.
    pub ca: String,
    /// What was revoked, if there is a list.
    pub revoked: Option<Revoked>,
}

/// What is kept with a connection for the sentence that explains its end.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    /// The name the server must have, on the client.
    pub expected: Option<String>,
    /// The first refusal of this connection's peer.
    pub refusal: OnceLock<Failure>,
    /// Its tickets.
    pub desk: Desk,
    /// Its signature, on the server.
    pub signing: Option<Arc<Signing>>,
}

impl Judge {
    /// The verify callback: OpenSSL's opinion of one certificate of the chain, and then ours.
    pub fn verdict(&self, sound: bool, store: &mut X509StoreContextRef) -> bool {
        let verdict = if sound { self.ours(store) } else { Err((None, self.theirs(store))) };
        let Err((number, failure)) = verdict else {
            return true;
        };
        if let Some(notes) = connection(store).and_then(notes) {
            // The first refusal is the cause; a second one can't come, since we end the handshake here.
            let _ = notes.refusal.set(failure);
        }
        if let Some(number) = number {
            store.set_error(number.into());
        }
        false
    }

    /// What OpenSSL doesn't check. It calls from the anchor down to the leaf: ours wait for the leaf, when the
    /// chain is whole.
    fn ours(&self, store: &X509StoreContextRef) -> Result<(), (Option<Verdict>, Failure)> {
        if store.error_depth() != 0 {
            return Ok(());
        }
        let internal =
            || (Some(Verdict::Other), Failure::new(Exit::Tls, "OpenSSL gave no certificate to check"));
        let leaf = store.current_cert().ok_or_else(internal)?;
        let chain = store.chain().ok_or_else(internal)?;
        let ssl = connection(store).ok_or_else(internal)?;

        if ssl.selected_alpn_protocol() != Some(ALPN) {
            return Err((Some(Verdict::Other), no_protocol()));
        }
        if !self.peer.use_allowed(leaf) {
            return Err((Some(Verdict::WrongUse), self.wrong_use(leaf)));
        }
        CertId::of(leaf).map_err(|failure| (Some(Verdict::Rejected), failure))?;
        if self.peer == Side::Client {
            common_name(leaf).map_err(|failure| (Some(Verdict::Rejected), failure))?;
        }
        if let Some(revoked) = &self.revoked {
            revoked
                .check_chain(chain.iter(), self.peer)
                .map_err(|(verdict, failure)| (Some(verdict), failure))?;
        }
        Ok(())
    }

    /// OpenSSL's refusal in a sentence.
    fn theirs(&self, store: &X509StoreContextRef) -> Failure {
        let result = store.error();
        let peer = self.peer;
        let Some(cert) = store.current_cert() else {
            return Failure::new(
                Exit::CertificateForeign,
                format!("the {peer}'s certificate is refused: {result}"),
            );
        };
        let who = if store.error_depth() == 0 {
            format!("the {peer}'s certificate {}", shown_name(cert))
        } else {
            format!("the CA certificate {} above the {peer}'s", shown_name(cert))
        };
        match result.as_raw() {
            NOT_YET_VALID => {
                let begin = time::unix(cert.not_before()).map_or("later".to_owned(), time::utc);
                Failure::new(
                    Exit::CertificateExpired,
                    format!("{who} is not valid before {begin}: check the clocks of both machines"),
                )
            }
            EXPIRED => {
                let end = time::unix(cert.not_after()).map_or("earlier".to_owned(), time::utc);
                Failure::new(
                    Exit::CertificateExpired,
                    format!("{who} expired on {end}: issue another, or check this machine's clock"),
                )
            }
            WRONG_USE => self.wrong_use(cert),
            HOST_MISMATCH | IP_MISMATCH => {
                let expected = connection(store).and_then(notes).and_then(|n| n.expected.as_deref());
                Failure::new(
                    Exit::CertificateForeign,
                    format!(
                        "{who} is for {}, not for {}: set tls.server_name to a name it carries, or issue one with \
                         --san",
                        names_of(cert),
                        escaped(expected.unwrap_or_default())
                    ),
                )
            }
            NO_ISSUER | NO_LOCAL_ISSUER | NO_LEAF_SIGNATURE | SELF_SIGNED | SELF_SIGNED_ROOT
            | BAD_SIGNATURE => Failure::new(
                Exit::CertificateForeign,
                format!("{who} is not signed by our CA {} (tls.ca): {result}", self.ca),
            ),
            _ => Failure::new(Exit::CertificateForeign, format!("{who} is refused: {result}")),
        }
    }

    fn wrong_use(&self, cert: &X509Ref) -> Failure {
        let peer = self.peer;
        Failure::new(
            Exit::CertificateForeign,
            format!(
                "the {peer}'s certificate {} is no {peer} certificate (its extended key usage lacks {}): issue one \
                 with `tunguard pki {peer}`",
                shown_name(cert),
                peer.use_name()
            ),
        )
    }
}

impl Side {
    /// Who is at the other end of `ssl`.
    pub fn peer_of(ssl: &SslRef) -> Side {
        if ssl.is_server() { Side::Client } else { Side::Server }
    }

    /// The extended key usage of this side's certificates.
    pub fn use_name(self) -> &'static str {
        match self {
            Side::Client => "clientAuth",
            Side::Server => "serverAuth",
        }
    }

    /// Whether `cert` says that it may be used on this side. OpenSSL takes a missing extension for a yes.
    pub fn use_allowed(self, cert: &X509Ref) -> bool {
        let wanted = match self {
            Side::Client => X509ExtendedKeyUsage::SSL_CLIENT,
            Side::Server => X509ExtendedKeyUsage::SSL_SERVER,
        };
        cert.extended_key_usage().is_some_and(|uses| uses.contains(wanted))
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Client => "client",
            Side::Server => "server",
        })
    }
}

/// The notes kept with `ssl`; none if it wasn't made by [`super::server_ssl`] or [`super::client_ssl`].
pub(crate) fn notes(ssl: &SslRef) -> Option<&Notes> {
    ssl.ex_data(notes_index().ok()?)
}

/// Where OpenSSL keeps our [`Notes`] in a connection.
pub(crate) fn notes_index() -> Result<Index<Ssl, Notes>, ErrorStack> {
    static INDEX: OnceLock<Index<Ssl, Notes>> = OnceLock::new();
    if let Some(index) = INDEX.get() {
        return Ok(*index);
    }
    // Two threads may both make one; the loser's is never used.
    let index = Ssl::new_ex_index()?;
    Ok(*INDEX.get_or_init(|| index))
}

fn connection(store: &X509StoreContextRef) -> Option<&SslRef> {
    store.ex_data(X509StoreContext::ssl_idx().ok()?)
}

/// The names a server's certificate carries, for an error's text.
fn names_of(cert: &X509Ref) -> String {
    let mut names: Vec<String> = Vec::new();
    for name in cert.subject_alt_names().into_iter().flatten() {
        if let Some(dns) = name.dnsname() {
            names.push(escaped(dns));
        } else if let Some(ip) = name.ipaddress().and_then(address) {
            names.push(ip.to_string());
        }
    }
    if names.len() > SHOWN {
        let rest = names.len() - SHOWN;
        names.truncate(SHOWN);
        names.push(format!("{rest} more"));
    }
    if names.is_empty() {
        "no name at all (it has no subject alternative name)".to_owned()
    } else {
        names.join(", ")
    }
}

/// An iPAddress of a certificate.
pub(crate) fn address(bytes: &[u8]) -> Option<std::net::IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(std::net::IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(std::net::IpAddr::from)).ok()
}

/// Names that an error lists.
const SHOWN: usize = 8;

// X509_V_ERR_* of include/openssl/x509_vfy.h.
const NO_ISSUER: i32 = 2;
const BAD_SIGNATURE: i32 = 7;
const NOT_YET_VALID: i32 = 9;
const EXPIRED: i32 = 10;
const SELF_SIGNED: i32 = 18;
const SELF_SIGNED_ROOT: i32 = 19;
const NO_LOCAL_ISSUER: i32 = 20;
const NO_LEAF_SIGNATURE: i32 = 21;
const WRONG_USE: i32 = 26;
const HOST_MISMATCH: i32 = 62;
const IP_MISMATCH: i32 = 64;
