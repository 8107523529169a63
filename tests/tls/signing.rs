//! A server whose key is elsewhere: what is signed for it, by which keys, and what a failure looks like.

use std::sync::{Arc, Mutex};

use openssl::nid::Nid;
use openssl::ssl::{SslContextBuilder, SslMethod};

use super::{Lab, both_failed, plain_ssl, says};
use crate::common::{
    MakeKey, Pair, Wish, certificates, ec, make, meet, p256, p384, rsa4096, server_wish, signer, signing_key,
};
use tunguard::exit::{Exit, Failure};
use tunguard::tls::signing::Hash;
use tunguard::tls::{Signer, ToSign, server_context, server_ssl};

/// A client that has all a server asks for, and goes its own way in TLS.
fn peculiar(lab: &Lab, set: impl FnOnce(&mut SslContextBuilder)) -> openssl::ssl::Ssl {
    plain_ssl(SslMethod::tls_client(), |builder| {
        builder.set_certificate(&lab.client.cert).unwrap();
        builder.set_private_key(&lab.client.key).unwrap();
        builder.set_alpn_protos(b"\x0atunguard/1").unwrap();
        set(builder);
    })
}

/// Notes what it is asked to sign, and signs.
fn noting(own: &Pair) -> (Signer, Arc<Mutex<Vec<ToSign>>>) {
    let noted = Arc::new(Mutex::new(Vec::new()));
    let (ours, signer) = (noted.clone(), signer(own));
    let note = move |wanted: &ToSign| {
        ours.lock().unwrap().push(wanted.clone());
        signer(wanted)
    };
    (Box::new(note), noted)
}

#[test]
fn one_handshake_is_signed_once_whatever_the_client_prefers() {
    let lab = Lab::new();
    let context = server_context(&lab.server_certificates()).unwrap();
    type Set = fn(&mut SslContextBuilder);
    let ways: [(&str, usize, Set); 4] = [
        ("SHA-256", 32, |b| b.set_ciphersuites("TLS_AES_128_GCM_SHA256").unwrap()),
        ("SHA-384", 48, |b| b.set_ciphersuites("TLS_AES_256_GCM_SHA384").unwrap()),
        ("ChaCha20", 32, |b| b.set_ciphersuites("TLS_CHACHA20_POLY1305_SHA256").unwrap()),
        // It guesses wrong, and is sent back for a share of a group that the server takes.
        ("a retry", 48, |b| b.set_groups_list("P-521:X25519").unwrap()),
    ];
    for (what, bytes, set) in ways {
        let (signer, noted) = noting(&lab.server);
        let (server, client) = meet(server_ssl(&context, signer).unwrap(), peculiar(&lab, set));
        client.expect(what);
        server.expect(what);
        let noted = noted.lock().unwrap();
        assert_eq!(noted.len(), 1, "{what}");
        assert_eq!((noted[0].hash, noted[0].transcript.len()), (Hash::Sha256, bytes), "{what}");
    }
}

#[test]
fn each_kind_of_key_signs_with_its_hashes() {
    type Set = fn(&mut SslContextBuilder);
    let any: Set = |_| {};
    let kinds: [(&str, MakeKey, Set, Hash); 6] = [
        ("P-256", p256, any, Hash::Sha256),
        ("P-384", p384, any, Hash::Sha384),
        ("P-521", || ec(Nid::SECP521R1), any, Hash::Sha512),
        ("RSA", rsa4096, |b| b.set_sigalgs_list("RSA-PSS+SHA256:ECDSA+SHA256").unwrap(), Hash::Sha256),
        ("RSA", rsa4096, |b| b.set_sigalgs_list("RSA-PSS+SHA384:ECDSA+SHA256").unwrap(), Hash::Sha384),
        ("RSA", rsa4096, |b| b.set_sigalgs_list("RSA-PSS+SHA512:ECDSA+SHA256").unwrap(), Hash::Sha512),
    ];
    for (what, key, set, hash) in kinds {
        let lab = Lab::with_server(Wish { key, ..server_wish() });
        let context = server_context(&lab.server_certificates()).unwrap();
        let (signer, noted) = noting(&lab.server);
        let (server, client) = meet(server_ssl(&context, signer).unwrap(), peculiar(&lab, set));
        client.unwrap_or_else(|f| panic!("{what}: {f}"));
        server.unwrap_or_else(|f| panic!("{what}: {f}"));
        assert_eq!(noted.lock().unwrap()[0].hash, hash, "{what}");
    }
}

#[test]
fn a_key_signs_for_handshakes_of_its_kind_only() {
    let transcript = vec![7; 32];
    let lab = Lab::new();
    let key = signing_key(&lab.server);
    let wanted = ToSign { hash: Hash::Sha256, transcript: transcript.clone() };
    let made = key.sign(&wanted).unwrap().expect("a signature");
    // What is signed can't be anything but a server's CertificateVerify.
    let content = wanted.content().unwrap();
    assert_eq!(&content[..64], &[b' '; 64]);
    assert_eq!(&content[64..98], b"TLS 1.3, server CertificateVerify\0");
    assert_eq!(&content[98..], &transcript[..]);
    let mut verifier =
        openssl::sign::Verifier::new(openssl::hash::MessageDigest::sha256(), &lab.server.key).unwrap();
    assert!(verifier.verify_oneshot(&made, &content).unwrap());

    for hash in [Hash::Sha384, Hash::Sha512] {
        assert_eq!(key.sign(&ToSign { hash, transcript: transcript.clone() }).unwrap(), None);
    }
    for bytes in [0, 1, 31, 33, 47, 49, 64, 1000] {
        let wanted = ToSign { hash: Hash::Sha256, transcript: vec![0; bytes] };
        assert_eq!(key.sign(&wanted).unwrap(), None, "a transcript hash of {bytes} bytes");
    }
}

#[test]
fn a_signature_by_another_key_convinces_nobody() {
    let lab = Lab::new();
    let other = make(&server_wish(), Some(&lab.ca));
    let context = server_context(&lab.server_certificates()).unwrap();
    let server = server_ssl(&context, signer(&other)).unwrap();
    let (_, client) = both_failed(meet(server, lab.client_end()));
    says(&client, Exit::Tls, &["signature"]);
}

#[test]
fn a_server_without_a_signature_says_whose_fault_it_is() {
    for key in [p256 as MakeKey, rsa4096] {
        let lab = Lab::with_server(Wish { key, ..server_wish() });
        let context = server_context(&lab.server_certificates()).unwrap();
        let none: Signer = Box::new(|_| Err(Failure::system("sign", "the key holder is gone")));
        let (server, client) = both_failed(meet(server_ssl(&context, none).unwrap(), lab.client_end()));
        says(&server, Exit::System, &["the key holder is gone"]);
        assert_eq!(client.exit, Exit::Tls, "{client}");
        // Too long or too short, it goes nowhere.
        for bytes in [0, 5000] {
            let wrong: Signer = Box::new(move |_| Ok(vec![7; bytes]));
            both_failed(meet(server_ssl(&context, wrong).unwrap(), lab.client_end()));
        }
        let panics: Signer = Box::new(|_| panic!("on purpose"));
        both_failed(meet(server_ssl(&context, panics).unwrap(), lab.client_end()));
    }
}

#[test]
fn a_servers_context_holds_no_key() {
    let lab = Lab::new();
    let context = server_context(&certificates(&lab.ca, &lab.server)).unwrap();
    assert!(context.private_key().is_none());
    // A certificate of which nobody could have the key is no hindrance before something is to be signed.
    let ed25519 = make(&Wish { key: super::ed25519, ..server_wish() }, Some(&lab.ca));
    let context = server_context(&certificates(&lab.ca, &ed25519)).unwrap();
    assert!(server_ssl(&context, signer(&lab.server)).is_err());
}
