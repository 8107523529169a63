//! TLS sessions taken up again: that they are, by whom, and where not.

use std::sync::{Arc, Mutex};

use super::plain_ssl;
use crate::common::{
    HOUR, Pair, Stream, Wish, ca, certificates, client, credentials, crl, make, meet, server_wish, signer,
};
use openssl::ssl::{Ssl, SslContext, SslMethod, SslRef};
use tunguard::exit::{Exit, Outcome};
use tunguard::tls::{
    Revoked, SavedSession, client_context, client_ssl, close_desk, confirm_peer, export_secret, group_name,
    offer_session, peer_identity, server_context, server_ssl, server_ssl_with, take_ticket, trusted_until,
};

struct Lab {
    ca: Pair,
    alice: Pair,
    gate: Pair,
    server: SslContext,
    client: SslContext,
}

const NAME: &str = "vpn.example.org";

impl Lab {
    fn new() -> Lab {
        let ca = ca("Lab CA");
        let (server, alice) = (make(&server_wish(), Some(&ca)), make(&client(), Some(&ca)));
        let context = server_context(&certificates(&ca, &server)).unwrap();
        let client = client_context(&credentials(&ca, &alice)).unwrap();
        Lab { ca, alice, gate: server, server: context, client }
    }

    /// A first connection: what the server keeps under which number, and what the client keeps.
    fn first(&self) -> (([u8; 32], SavedSession), SavedSession) {
        let (server, client) = meet(
            server_ssl(&self.server, signer(&self.gate)).unwrap(),
            client_ssl(&self.client, NAME).unwrap(),
        );
        let (server, client) = (server.unwrap(), client.unwrap());
        assert!(!reused(&server) && !reused(&client));
        let kept = take_ticket(server.ssl()).unwrap();
        assert!(take_ticket(server.ssl()).is_none(), "once");
        assert!(kept.1.is_plausible());
        (kept, take_ticket(client.ssl()).unwrap().1)
    }

    /// A second one that offers `ticket`, where the server's store has `held`. Says whether the store was asked.
    fn second(
        &self,
        held: Option<([u8; 32], SavedSession)>,
        ticket: &SavedSession,
    ) -> (bool, Outcome<Stream>, Outcome<Stream>) {
        self.second_by(client_ssl(&self.client, NAME).unwrap(), held, ticket)
    }

    /// The same by another client.
    fn second_by(
        &self,
        mut client: Ssl,
        held: Option<([u8; 32], SavedSession)>,
        ticket: &SavedSession,
    ) -> (bool, Outcome<Stream>, Outcome<Stream>) {
        let asked = Arc::new(Mutex::new(false));
        let note = asked.clone();
        let look_up = move |id| {
            *note.lock().unwrap() = true;
            held.filter(|(held, _)| *held == id).map(|(_, session)| session)
        };
        let server = server_ssl_with(&self.server, signer(&self.gate), Box::new(look_up)).unwrap();
        offer_session(&mut client, ticket).unwrap();
        let (server, client) = meet(server, client);
        let asked = *asked.lock().unwrap();
        (asked, server, client)
    }
}

fn reused(stream: &Stream) -> bool {
    stream.ssl().session_reused()
}

fn secret(ssl: &SslRef) -> [u8; 32] {
    *export_secret(ssl, &[1; 8]).unwrap()
}

#[test]
fn a_session_is_taken_up_again_with_fresh_keys_and_the_same_client() {
    let lab = Lab::new();
    let (mut held, mut ticket) = lab.first();
    let mut secrets = Vec::new();
    for _ in 0..3 {
        let (asked, server, client) = lab.second(Some(held), &ticket);
        let (server, client) = (server.unwrap(), client.unwrap());
        assert!(asked && reused(&server) && reused(&client));
        assert_ne!(group_name(server.ssl()), "unknown group", "an exchange of fresh keys");
        confirm_peer(client.ssl(), None).unwrap();
        assert_eq!(peer_identity(server.ssl(), None).unwrap().name, "alice");
        assert_eq!(secret(server.ssl()), secret(client.ssl()));
        secrets.push(secret(server.ssl()));
        // Each connection brings the next ticket.
        held = take_ticket(server.ssl()).unwrap();
        ticket = take_ticket(client.ssl()).unwrap().1;
    }
    secrets.sort_unstable();
    secrets.dedup();
    assert_eq!(secrets.len(), 3);
}

#[test]
fn a_ticket_nobody_knows_leads_to_a_full_handshake() {
    let lab = Lab::new();
    let (held, ticket) = lab.first();
    // A server that was started again, one that has another session under that number, one whose memory is damaged.
    let damaged = (held.0, SavedSession::from_bytes(vec![0x30, 0x03, 1, 2, 3]));
    for held in [None, Some(([0; 32], held.1.clone())), Some(damaged)] {
        let (asked, server, client) = lab.second(held, &ticket);
        let (server, client) = (server.unwrap(), client.unwrap());
        assert!(asked && !reused(&server) && !reused(&client));
        assert_eq!(peer_identity(server.ssl(), None).unwrap().name, "alice");
    }
    // And one whose desk is closed is not even asked.
    let server = server_ssl_with(&lab.server, signer(&lab.gate), Box::new(|_| panic!("asked"))).unwrap();
    close_desk(&server);
    let mut client = client_ssl(&lab.client, NAME).unwrap();
    offer_session(&mut client, &ticket).unwrap();
    let (server, _) = meet(server, client);
    assert!(!reused(&server.unwrap()));
}

#[test]
fn anothers_session_under_a_tickets_number_is_of_no_use() {
    let lab = Lab::new();
    let (held, ticket) = lab.first();
    let (other, _) = lab.first();
    let (_, server, client) = lab.second(Some((held.0, other.1)), &ticket);
    // The binder is made from another key (RFC 8446 section 4.2.11.2).
    assert!(server.is_err() && client.is_err());
}

#[test]
fn a_client_that_was_revoked_meanwhile_is_refused() {
    let lab = Lab::new();
    let (held, ticket) = lab.first();
    let (_, server, _) = lab.second(Some(held), &ticket);
    let server = server.unwrap();
    assert!(reused(&server));
    let list = |revoked: &[&Pair]| {
        Revoked::parse(&crl(&lab.ca, revoked, (-HOUR, HOUR)), &credentials(&lab.ca, &lab.alice).ca).unwrap()
    };
    peer_identity(server.ssl(), Some(&list(&[]))).unwrap();
    let failure = peer_identity(server.ssl(), Some(&list(&[&lab.alice]))).expect_err("revoked");
    assert_eq!(failure.exit, Exit::CertificateRevoked, "{failure}");
}

/// A client whose first choice of groups isn't the server's is sent back for another key share.
#[test]
fn a_client_that_is_sent_back_shows_its_ticket_again() {
    let lab = Lab::new();
    let (held, ticket) = lab.first();
    let client = plain_ssl(SslMethod::tls_client(), |builder| {
        builder.set_alpn_protos(b"\x0atunguard/1").unwrap();
        builder.set_groups_list("P-384:X25519").unwrap();
    });
    let (asked, server, client) = lab.second_by(client, Some(held), &ticket);
    let (server, client) = (server.unwrap(), client.unwrap());
    assert_eq!((asked, group_name(server.ssl())), (true, "X25519"));
    assert!(reused(&server) && reused(&client));
}

#[test]
fn a_certificate_too_large_to_keep_gets_no_ticket_and_gets_in() {
    let mut lab = Lab::new();
    let names: Vec<String> = (0..400).map(|n| format!("a-long-name-number-{n}.example.org")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    lab.alice = make(&Wish { dns: &names, ..client() }, Some(&lab.ca));
    lab.client = client_context(&credentials(&lab.ca, &lab.alice)).unwrap();
    let (server, client) =
        meet(server_ssl(&lab.server, signer(&lab.gate)).unwrap(), client_ssl(&lab.client, NAME).unwrap());
    let server = server.unwrap();
    assert!(take_ticket(server.ssl()).is_none());
    assert_eq!(peer_identity(server.ssl(), None).unwrap().name, "alice");
    assert!(
        take_ticket(client.unwrap().ssl()).is_some(),
        "it keeps the server's certificate, which is small"
    );
}

#[test]
fn a_chain_of_tickets_ends_within_a_day_and_with_the_first_certificate() {
    let lab = Lab::new();
    let (server, client) =
        meet(server_ssl(&lab.server, signer(&lab.gate)).unwrap(), client_ssl(&lab.client, NAME).unwrap());
    let now = tunguard::tls::time::wall_clock();
    // The lab's certificates are good for an hour.
    for stream in [server.unwrap(), client.unwrap()] {
        let until = trusted_until(stream.ssl()) - now;
        assert!((HOUR - 60..=HOUR).contains(&until), "{until} s");
    }
}

#[test]
fn sessions_at_rest_are_bounded_and_not_shown() {
    let (held, ticket) = Lab::new().first();
    assert!(!SavedSession::from_bytes(vec![0; 8_193]).is_plausible());
    assert!(!SavedSession::from_bytes(Vec::new()).is_plausible());
    assert_eq!(format!("{:?} {ticket:?}", held.1), "SavedSession SavedSession");
}
