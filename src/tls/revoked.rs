//! Revoked certificates: lists (CRLs) signed by our CA, parsed into what a look-up needs.
//!
//! OpenSSL could check lists itself, but takes them only from files, and a worker has no file system. So the
//! lists are verified here once, and the handshake asks `Revoked::check_chain`.
//!
//! Everything fails closed: a list that is expired, partial (delta or distribution point), indirect or not signed by
//! one of our CAs is an error, and where there is a list, an issuer without one is refused.

use std::collections::{HashMap, HashSet};

use openssl::sha::sha256;
use openssl::x509::{X509, X509Crl, X509KeyUsage, X509Ref};

use super::identity::{CertId, canonical, shown_name};
use super::verify::Side;
use super::{clear_errors, reason, time};
use crate::exit::{Exit, Failure, Outcome};
use crate::sys::x509::Verdict;

/// The certificates our CAs took back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revoked {
    /// SHA-256 of an issuer's name -> serials it revoked, in [`CertId`]'s form.
    by_issuer: HashMap<[u8; 32], HashSet<Vec<u8>>>,
    /// When the first of the lists expires, if any does.
    next_update: Option<i64>,
}

impl Revoked {
    /// Parses every list in `crl_pem`, each of which must be signed by a CA in `ca_pem` and valid now.
    pub fn parse(crl_pem: &[u8], ca_pem: &[u8]) -> Outcome<Revoked> {
        clear_errors();
        let cas = X509::stack_from_pem(ca_pem)
            .map_err(|e| refuse(format!("its CA certificate can't be read: {}", reason(&e))))?;
        let mut revoked = Revoked::default();
        for pem in blocks(crl_pem)? {
            let crl =
                X509Crl::from_pem(pem).map_err(|e| refuse(format!("it is malformed: {}", reason(&e))))?;
            revoked.add(&crl, &cas)?;
        }
        // A trust anchor ends every chain below it, so no handshake would look at what its issuer says of it.
        for ca in &cas {
            if revoked.contains(&CertId::of(ca)?) {
                let name = shown_name(ca);
                return Err(refuse(format!(
                    "it revokes the CA {name}, which tls.ca trusts: take it out of there"
                )));
            }
        }
        Ok(revoked)
    }

    /// Whether `cert` was revoked.
    pub fn contains(&self, cert: &CertId) -> bool {
        self.by_issuer.get(&cert.issuer).is_some_and(|serials| serials.contains(&cert.serial))
    }

    /// Whether there is a list of `cert`'s issuer at all.
    pub fn covers(&self, cert: &CertId) -> bool {
        self.by_issuer.contains_key(&cert.issuer)
    }

    /// How many certificates are revoked.
    pub fn len(&self) -> usize {
        self.by_issuer.values().map(HashSet::len).sum()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When a newer list is needed, in seconds since 1970. From then on [`Revoked::parse`] refuses this one.
    pub fn next_update(&self) -> Option<i64> {
        self.next_update
    }

    /// Checks a verified chain, leaf first. Its last certificate is the trust anchor, which no list revokes.
    pub(crate) fn check_chain<'a>(
        &self,
        chain: impl ExactSizeIterator<Item = &'a X509Ref>,
        peer: Side,
    ) -> Result<(), (Verdict, Failure)> {
        let anchor = chain.len().saturating_sub(1);
        for (depth, cert) in chain.enumerate() {
            if depth == anchor && depth > 0 {
                break;
            }
            let id = CertId::of(cert).map_err(|failure| (Verdict::Rejected, failure))?;
            if self.contains(&id) {
                let text = format!(
                    "the {peer}'s certificate {} (serial {}) was revoked: issue another",
                    shown_name(cert),
                    id.serial_hex()
                );
                return Err((Verdict::Revoked, Failure::new(Exit::CertificateRevoked, text)));
            }
            if !self.covers(&id) {
                let text = format!(
                    "no revocation list covers the issuer of the {peer}'s certificate {}: add its list to tls.crl",
                    shown_name(cert)
                );
                return Err((Verdict::NoRevocationList, Failure::new(Exit::CertificateForeign, text)));
            }
        }
        Ok(())
    }

    fn add(&mut self, crl: &X509Crl, cas: &[X509]) -> Outcome<()> {
        let library = |e| refuse(format!("it is malformed: {}", reason(&e)));

        if !cas.iter().any(|ca| signed(crl, ca)) {
            clear_errors();
            return Err(refuse("it is not signed by our CA: make it with the CA of tls.ca"));
        }
        let now = time::wall_clock();
        let made = time::unix(crl.last_update()).map_err(library)?;
        if made > now {
            let made = time::utc(made);
            return Err(refuse(format!("it is not valid before {made}: check this machine's clock")));
        }
        if let Some(next) = crl.next_update() {
            let next = time::unix(next).map_err(library)?;
            if next <= now {
                let next = time::utc(next);
                return Err(refuse(format!(
                    "it expired on {next}: make a new one (any `tunguard pki revoke` does)"
                )));
            }
            self.next_update = Some(self.next_update.map_or(next, |first| first.min(next)));
        }
        let der = crl.to_der().map_err(library)?;
        if PARTIAL.iter().any(|oid| der.windows(oid.len()).any(|w| w == oid)) {
            return Err(refuse(
                "it is a delta, partitioned or indirect list: only complete lists are supported",
            ));
        }

        let issuer = sha256(&crl.issuer_name().to_der().map_err(library)?);
        let serials = self.by_issuer.entry(issuer).or_default();
        for entry in crl.get_revoked().into_iter().flatten() {
            let serial = entry.serial_number().to_bn().map_err(library)?;
            // A negative serial is refused by `CertId::of`, so leaving it out lets nobody in.
            if !serial.is_negative() {
                serials.insert(canonical(serial.to_vec()));
            }
        }
        Ok(())
    }
}

/// Whether `ca` issued and signed `crl`, and may.
fn signed(crl: &X509Crl, ca: &X509) -> bool {
    let same_name = crl.issuer_name().try_cmp(ca.subject_name()).is_ok_and(|order| order.is_eq());
    let may_sign = ca.key_usage().is_none_or(|usage| usage.contains(X509KeyUsage::CRL_SIGN));
    same_name && may_sign && ca.public_key().and_then(|key| crl.verify(&key)).unwrap_or(false)
}

/// The lists of a PEM file; text between them is ignored, as everywhere in PEM.
fn blocks(pem: &[u8]) -> Outcome<Vec<&[u8]>> {
    let find = |from: usize, what: &[u8]| {
        pem[from..].windows(what.len()).position(|w| w == what).map(|at| from + at)
    };
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(begin) = find(from, BEGIN) {
        let end =
            find(begin, END).ok_or_else(|| refuse("it is cut short: the END line is missing"))? + END.len();
        found.push(&pem[begin..end]);
        from = end;
    }
    if found.is_empty() {
        return Err(refuse("there is no X509 CRL in it"));
    }
    Ok(found)
}

/// A sentence's second half; whoever knows the file puts its name in front.
fn refuse(why: impl Into<String>) -> Failure {
    Failure::usage(why).context("the revocation list can't be used")
}

const BEGIN: &[u8] = b"-----BEGIN X509 CRL-----";
const END: &[u8] = b"-----END X509 CRL-----";

/// DER of the extensions that make a list say less than it seems to: deltaCRLIndicator,
/// issuingDistributionPoint, and certificateIssuer of an entry (RFC 5280 sections 5.2.4, 5.2.5, 5.3.3).
const PARTIAL: [[u8; 5]; 3] =
    [[0x06, 0x03, 0x55, 0x1d, 0x1b], [0x06, 0x03, 0x55, 0x1d, 0x1c], [0x06, 0x03, 0x55, 0x1d, 0x1d]];

#[cfg(test)]
mod tests {
    use openssl::asn1::{Asn1Integer, Asn1Time};
    use openssl::bn::BigNum;
    use openssl::error::ErrorStack;
    use openssl::hash::MessageDigest;
    use openssl::nid::Nid;
    use openssl::pkey::PKey;
    use openssl::x509::{X509Builder, X509Name};

    use super::*;

    /// With serial number 7, unsigned as far as anybody looks here.
    fn cert(name: &str, issuer: &str) -> X509 {
        let make = || -> Result<X509, ErrorStack> {
            let called = |name: &str| {
                let mut builder = X509Name::builder()?;
                builder.append_entry_by_nid(Nid::COMMONNAME, name)?;
                Ok::<_, ErrorStack>(builder.build())
            };
            let key = PKey::generate_ed25519()?;
            let mut cert = X509Builder::new()?;
            cert.set_serial_number(&*Asn1Integer::from_bn(&*BigNum::from_u32(7)?)?)?;
            cert.set_subject_name(&*called(name)?)?;
            cert.set_issuer_name(&*called(issuer)?)?;
            cert.set_not_before(&*Asn1Time::from_unix(0)?)?;
            cert.set_not_after(&*Asn1Time::from_unix(1)?)?;
            cert.set_pubkey(&key)?;
            cert.sign(&key, MessageDigest::null())?;
            Ok(cert.build())
        };
        make().expect("a certificate")
    }

    /// Lists of those who issued `covered`, which take back `revoked`.
    fn lists(covered: &[&X509], revoked: &[&X509]) -> Revoked {
        let mut lists = Revoked::default();
        let ids = |certs: &[&X509]| -> Vec<CertId> {
            certs.iter().map(|cert| CertId::of(cert).expect("an ID")).collect()
        };
        for id in ids(covered) {
            lists.by_issuer.entry(id.issuer).or_default();
        }
        for id in ids(revoked) {
            lists.by_issuer.entry(id.issuer).or_default().insert(id.serial);
        }
        lists
    }

    #[test]
    fn every_certificate_below_the_anchor_is_looked_up() {
        let (leaf, office) = (cert("alice", "Office CA"), cert("Office CA", "Below CA"));
        // No list says anything of who issued the anchor: it is trusted by itself.
        let (below, anchor) = (cert("Below CA", "Lab CA"), cert("Lab CA", "Elsewhere"));
        let chain = [&leaf, &office, &below, &anchor];
        let check = |lists: &Revoked, chain: &[&X509]| {
            let chain = chain.iter().map(|cert| cert.as_ref());
            lists.check_chain(chain, Side::Client).map_err(|(_, failure)| failure.exit)
        };
        let covered = &chain[..3];
        assert_eq!(check(&lists(covered, &[]), &chain), Ok(()));
        for spoiled in covered {
            assert_eq!(check(&lists(covered, &[spoiled]), &chain), Err(Exit::CertificateRevoked));
            let others: Vec<&X509> = covered.iter().copied().filter(|cert| cert != spoiled).collect();
            assert_eq!(check(&lists(&others, &[]), &chain), Err(Exit::CertificateForeign));
        }
        // One that is trusted by itself and shown as a peer's is still a peer's.
        assert_eq!(check(&lists(&[&leaf], &[&leaf]), &[&leaf]), Err(Exit::CertificateRevoked));
        assert_eq!(check(&lists(&[], &[]), &[&leaf]), Err(Exit::CertificateForeign));
    }
}
