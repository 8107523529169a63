//! From a connected socket to a session: TLS, Hello, Welcome. Driven by readiness, as the session before goes on
//! carrying packets meanwhile.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use ipnet::IpNet;
use openssl::ssl::SslContext;

use super::attempts::{Failed, Finality};
use super::carriers::Carriers;
use super::carry::Link;
use super::ipc::{CarrierName, Setup, Ticket};
use crate::channel::{Broken, ControlChannel, Progress};
use crate::early::Early;
use crate::epochs::Limits;
use crate::exit::{Exit, Failure, Outcome};
use crate::hardware;
use crate::keys::{Role, Secret};
use crate::path::Path;
use crate::resume::ResumeSecret;
use crate::session::{Session, Start};
use crate::sys::poller::Interest;
use crate::sys::udp::Carrier;
use crate::time::Time;
use crate::tls;
use crate::wire::control::{self, FEATURE_ON_DEMAND, Hello, Message, Reason, Resume, Welcome};
use crate::wire::data::SessionId;

/// A connection on its way to a session: [`advance`](Connecting::advance) whenever the socket is ready, then
/// [`into_link`](Connecting::into_link).
pub struct Connecting {
    control: ControlChannel,
    /// The UDP sockets and what they are bound to, best first; at least one.
    carriers: Vec<(CarrierName, OwnedFd)>,
    /// The remote's name.
    pub host: String,
    /// Where it was reached.
    pub address: SocketAddr,
    expected_name: String,
    /// The end of the ticket it was offered with.
    offered_until: Option<i64>,
    greeted: bool,
    resuming: bool,
    resume_refused: bool,
}

/// What to ask the server for.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// Inner addresses we had before.
    pub addresses: &'a [IpAddr],
    /// The session that is to be taken up again, and its secret.
    pub resume: Option<(SessionId, &'a ResumeSecret)>,
    /// We come and go by ourselves, as the tunnel is used.
    pub on_demand: bool,
    /// Inner packets to be delivered as soon as there is a session, within the bounds of [`Early`]; the rest is left out.
    /// Not with `resume`: that session carries them.
    pub early: &'a [Vec<u8>],
}

impl Connecting {
    /// A connection as the supervisor hands it over: TCP first, then a UDP socket for each carrier. `ticket` is used up.
    pub fn new(
        setup: &Setup,
        context: &SslContext,
        (host, address): (String, SocketAddr),
        (carriers, fds): (Vec<CarrierName>, Vec<OwnedFd>),
        ticket: Option<Ticket>,
    ) -> Outcome<Connecting> {
        let mut fds = fds.into_iter();
        let (Some(tcp), false) = (fds.next(), carriers.is_empty() || carriers.len() != fds.len()) else {
            return Err(without_sockets());
        };
        // No certificate names the device a link-local address is reached by.
        let address_or_name = host.split('%').next().unwrap_or(&host);
        let expected_name = setup.server_name.clone().unwrap_or_else(|| address_or_name.to_owned());
        let mut ssl = tls::client_ssl(context, &expected_name)?;
        let fits =
            |ticket: &Ticket| ticket.server_name == expected_name && tls::time::wall_clock() < ticket.until;
        let ticket = ticket.filter(fits);
        if let Some(Ticket { session, .. }) = &ticket {
            tls::offer_session(&mut ssl, session)?;
        }
        Ok(Connecting {
            control: ControlChannel::new(ssl, TcpStream::from(tcp), Role::Client)?,
            carriers: carriers.into_iter().zip(fds).collect(),
            host,
            address,
            expected_name,
            offered_until: ticket.map(|ticket| ticket.until),
            greeted: false,
            resuming: false,
            resume_refused: false,
        })
    }

    /// What to wait for.
    pub fn interest(&self) -> Interest {
        self.control.interest()
    }

    /// Whether the server has been asked for a session: it may have given it to us, even if we never hear of it.
    pub fn greeted(&self) -> bool {
        self.greeted
    }

    /// Whether the server has refused to resume our session: without that wish it may give us one.
    pub fn resume_refused(&self) -> bool {
        self.resume_refused
    }

    /// Goes on as far as the socket allows; the server's welcome comes last.
    pub fn advance(&mut self, setup: &Setup, want: Wanted<'_>) -> Result<Option<Welcome>, Failed> {
        if !self.greeted {
            // What fails before the handshake is done may have been sent by anyone.
            let unproven = |failure| Failed::tls(failure, false);
            if self.control.handshake().map_err(unproven)? == Progress::Waiting {
                return Ok(None);
            }
            tls::confirm_peer(self.control.ssl(), None).map_err(unproven)?;
            let ssl = self.control.ssl();
            let resumed = if ssl.session_reused() { ", resumed" } else { "" };
            log::info!("TLS 1.3 with server {:?} ({}{resumed})", self.expected_name, tls::group_name(ssl));
            self.greet(setup, want)?;
        }
        self.control.flush().map_err(broken)?;
        loop {
            match self.control.receive().map_err(broken)? {
                None => return Ok(None),
                Some(Message::Welcome(welcome)) => return accept(setup, welcome).map(Some),
                Some(Message::Notice(text)) => log::info!("the server says {:?}", shorten(&text)),
                Some(Message::Bye(Reason::Forbidden)) if self.resuming => {
                    self.resume_refused = true;
                    let text = "the server refused to resume the session (its log says why): a new one will be \
                                asked for";
                    return Err(Failed::passing(Failure::new(Exit::Refused, text)));
                }
                Some(Message::Bye(reason)) => return Err(turned_away(reason)),
                Some(_) => {
                    let text = "the server's first message is neither a welcome nor a refusal";
                    return Err(Failed::passing(Failure::new(Exit::Malformed, text)));
                }
            }
        }
    }

    fn greet(&mut self, setup: &Setup, want: Wanted<'_>) -> Result<(), Failed> {
        let resume = want.resume.map(|(session, secret)| -> Outcome<Resume> {
            let binding = tls::export_binding(self.control.ssl())?;
            Ok(Resume { session, proof: secret.proof(session, &binding) })
        });
        let resume = resume.transpose().map_err(Failed::passing)?;
        self.resuming = resume.is_some();
        let hello = Hello {
            version: control::VERSION,
            features: hardware::features() | if want.on_demand { FEATURE_ON_DEMAND } else { 0 },
            suites: setup.suites.clone(),
            want: want.addresses.to_vec(),
            resume,
        };
        self.greeted = true;
        self.control.send(&Message::Hello(hello)).map_err(broken)?;
        let mut early = Early::default();
        let packets = if self.resuming { &[] } else { want.early };
        for packet in packets.iter().take_while(|packet| early.take(packet.len()).is_ok()) {
            self.control.send(&Message::Early(packet.clone())).map_err(broken)?;
        }
        Ok(())
    }

    /// The ticket the server gave us ahead of its welcome.
    pub fn take_ticket(&self) -> Option<Ticket> {
        let ssl = self.control.ssl();
        let (_, session) = tls::take_ticket(ssl)?;
        let until = match ssl.session_reused() {
            true => self.offered_until?,
            false => tls::trusted_until(ssl),
        };
        Some(Ticket { server_name: self.expected_name.clone(), session, until })
    }

    /// The session that `welcome` offers.
    pub fn into_link(self, setup: &Setup, welcome: Welcome, now: Time) -> Outcome<Link> {
        let secret = tls::export_secret(self.control.ssl(), &welcome.session.0)?;
        let inner = welcome
            .addresses
            .iter()
            .map(|a| IpNet::from(a.addr()))
            .chain(welcome.subnets.iter().copied())
            .collect();
        let start = Start {
            role: Role::Client,
            id: welcome.session,
            suite: welcome.suite,
            secret: Secret::from_bytes(*secret),
            limits: Limits {
                age: Duration::from_millis(setup.rekey_ms.min(welcome.rekey_ms)),
                packets: setup.rekey_packets.min(welcome.rekey_packets),
            },
            inner,
            linger: Duration::from_millis(welcome.linger_ms),
            dialled: Some(Path::new(self.address, None).by(0)),
            vouched: None,
        };
        let session = Session::new(start, now).map_err(|_| {
            Failure::new(Exit::MacLength, format!("the cipher library refuses {}", welcome.suite))
        })?;
        let carriers = Carriers::new(take_over(self.carriers)?);
        let ways = (carriers, setup.mode, setup.keepalive);
        Ok(Link::new(session, self.control, ways, (self.host, self.address), welcome, now))
    }

    /// Tells the server that nothing comes of it.
    pub fn give_up(mut self, reason: Reason) {
        if self.greeted {
            let _ = self.control.send(&Message::Bye(reason));
            self.control.close();
        }
    }
}

impl AsFd for Connecting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }
}

/// The sockets as the data path uses them.
pub(super) fn take_over(carriers: Vec<(CarrierName, OwnedFd)>) -> Outcome<Vec<(CarrierName, Carrier)>> {
    let carriers = carriers.into_iter().map(|(name, socket)| Ok((name, Carrier::new(socket)?)));
    carriers.collect::<io::Result<_>>().map_err(|e| Failure::system("take over the UDP sockets", e))
}

/// The supervisor broke its own rules.
pub(super) fn without_sockets() -> Failure {
    Failure::new(Exit::Malformed, "the supervisor's message came without its sockets")
}

/// A welcome that makes sense. What it wants of the host is judged by the supervisor ([`super::consent`]).
fn accept(setup: &Setup, welcome: Welcome) -> Result<Welcome, Failed> {
    let fault = if welcome.epoch != 0 {
        "its first epoch isn't 0"
    } else if !setup.suites.contains(&welcome.suite) {
        "it chose a suite that we didn't offer"
    } else if welcome.addresses.is_empty() || welcome.addresses.len() > control::MAX_ADDRESSES {
        "it has no inner address for us, or too many"
    } else if welcome.subnets.len() > control::MAX_SUBNETS {
        "it has too many subnets for us"
    } else if !(REKEY_MS_LEAST..=REKEY_MS_MOST).contains(&welcome.rekey_ms)
        || welcome.rekey_packets < REKEY_PACKETS_LEAST
        || welcome.linger_ms > LINGER_MS_MOST
    {
        "its timers are out of range"
    } else {
        return Ok(welcome);
    };
    Err(Failed::passing(Failure::new(
        Exit::Malformed,
        format!("the server's welcome makes no sense: {fault}"),
    )))
}

/// The server's word before there is a session. It comes inside TLS, so it is the server's.
fn turned_away(reason: Reason) -> Failed {
    let (exit, finality, advice) = match reason {
        Reason::Revoked => (Exit::CertificateRevoked, Finality::Final, "ask for another"),
        Reason::Forbidden => (Exit::Refused, Finality::Lasting, "the server's log says why"),
        Reason::Incompatible => {
            (Exit::Refused, Finality::Lasting, "compare [data] suites and versions on both sides")
        }
        Reason::TooMany => (
            Exit::Refused,
            Finality::Passing,
            "another machine uses this certificate: give each its own, or wait until that one leaves",
        ),
        Reason::NoRoom => (Exit::Refused, Finality::Passing, "its log says of what"),
        _ => (Exit::Refused, Finality::Passing, "the server's log may say more"),
    };
    let failure = Failure::new(exit, format!("the server refused the session: {reason} ({advice})"));
    Failed { failure, finality }
}

fn broken(broken: Broken) -> Failed {
    let tls = |text: String| Failed::passing(Failure::new(Exit::Tls, text));
    match broken {
        Broken::Lost(text) => tls(format!("the connection was lost: {text}")),
        Broken::Closed => tls("the server closed the connection".to_owned()),
        Broken::Refused(failure) => Failed::tls(failure, true),
    }
}

/// Text from the server, as much as a log line takes.
pub(super) fn shorten(text: &str) -> String {
    text.chars().take(NOTICE_CHARS).collect()
}

const NOTICE_CHARS: usize = 200;
/// As in the configuration's `rekey` and `rekey_packets`.
const REKEY_MS_LEAST: u64 = 1_000;
const REKEY_MS_MOST: u64 = 365 * 86_400_000;
const REKEY_PACKETS_LEAST: u64 = 1_000;
const LINGER_MS_MOST: u64 = 365 * 86_400_000;
