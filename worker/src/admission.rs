//! From an accepted connection to a session: TLS, Hello, the guard's grant, Welcome. One thing after
//! the other, all under one deadline.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use tunguard::channel::{Broken, ControlChannel, Progress};
use tunguard::config::common::Suite;
use tunguard::epochs::Limits;
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::hardware;
use tunguard::ipc::{
    Cause, Claim, Grant, QueueNames, QueuePlan, Reply, Request, Resumption, Setup, WorkerEnd,
};
use tunguard::keys::{Role, Secret};
use tunguard::rate::Rate;
use tunguard::rigged::point;
use tunguard::session::{Session, Start};
use tunguard::sys::clock;
use tunguard::sys::mq::{QueueSize, Reader, Writer};
use tunguard::sys::poller::Interest;
use tunguard::sys::seqpacket::Incoming;
use tunguard::sys::shared::Viewer;
use tunguard::sys::tcp;
use tunguard::sys::tun::Tun;
use tunguard::sys::udp::Carrier;
use tunguard::time::Time;
use tunguard::tls::{self, Revoked, Stranger};
use tunguard::wire::control::{
    self, FEATURE_AES_HARDWARE, FEATURE_ON_DEMAND, Hello, Message, Reason, Resume, Welcome,
};

use crate::downlink::Downlink;
use crate::nursery::Prepared;
use crate::signer;
use crate::tickets::Tickets;
use crate::uplink::Uplink;

/// Everything an established session needs.
pub struct Admitted {
    /// The session.
    pub session: Session,
    /// Its control channel.
    pub control: ControlChannel,
    /// Its UDP slot.
    pub carrier: Carrier,
    /// Packets to the client.
    pub downlink: Downlink,
    /// Where the client's packets go.
    pub exit: TunExit,
    /// Who the client is.
    pub name: String,
    /// It comes and goes by itself, as its tunnel is used.
    pub on_demand: bool,
    /// How much it may send.
    pub rate_up: Option<Rate>,
}

/// Where a client's packets leave the worker.
pub enum TunExit {
    /// Straight into the device.
    Device(Tun),
    /// Through a queue to the guard, which checks and writes them.
    Guard(Uplink),
}

/// The queues of a worker, made before anything was read from the network.
pub struct Queues {
    downlink: Reader,
    downlink_size: QueueSize,
    /// With the bytes of a message.
    uplink: Option<(Writer, usize)>,
}

impl Queues {
    /// Makes them, for the worker with this number. It is its own user already.
    pub fn make(plan: &QueuePlan, number: u64) -> io::Result<Queues> {
        let QueueNames { down, up } = plan.names(number);
        let downlink = Reader::create(&down, plan.downlink)?;
        let uplink = match up.zip(plan.uplink) {
            Some((name, size)) => Some((Writer::create(&name, size)?, size.bytes)),
            None => None,
        };
        Ok(Queues { downlink, downlink_size: plan.downlink, uplink })
    }
}

/// Why there is no session, and whose doing it is.
pub struct NoSession {
    /// Whose doing.
    pub cause: Cause,
    /// Why.
    pub failure: Failure,
}

impl From<Failure> for NoSession {
    fn from(failure: Failure) -> NoSession {
        NoSession { cause: Cause::of(failure.exit), failure }
    }
}

/// What a worker has for its client before it knows it.
pub struct Connection {
    /// The channel to the guard.
    pub guard: &'static WorkerEnd,
    /// The client's.
    pub tcp: TcpStream,
    /// Its channel to the key holder, good for one signature.
    pub signing: OwnedFd,
    /// The queues of the session, or why they can't be made.
    pub queues: io::Result<Queues>,
    /// Until when there has to be a session.
    pub deadline: Time,
}

/// Makes the session, or says why there is none. A client that got as far as a TLS session is told, too.
pub fn admit(prepared: &Prepared, connection: Connection) -> Result<Admitted, NoSession> {
    let deadline = connection.deadline;
    let admitted = try_admit(prepared, connection);
    admitted.map_err(|none| match none.cause {
        Cause::Left if clock::now() >= deadline => NoSession { cause: Cause::Deadline, ..none },
        _ => none,
    })
}

fn try_admit(prepared: &Prepared, connection: Connection) -> Result<Admitted, NoSession> {
    let Connection { guard, tcp, signing, queues, deadline } = connection;
    // A client that vanished while idle: its session is given up after `linger`, as one whose connection broke.
    tcp::notice_silence(&tcp, Duration::from_millis(prepared.setup.linger_ms))
        .map_err(|e| Failure::system("prepare the control connection", e))?;
    let tickets = Tickets::new(guard, deadline);
    let ssl = tls::server_ssl_with(&prepared.context, signer::asking(signing, deadline), tickets.look_up)?;
    let mut admission = Admission {
        prepared,
        setup: &prepared.setup,
        guard,
        control: ControlChannel::new(ssl, tcp, Role::Server)?,
        deadline,
    };
    admission.handshake(&tickets.ordered)?;
    match admission.negotiate(queues) {
        Ok(made) => Ok(made.into_admitted(admission.control)),
        Err(Refusal { reason, failure }) => {
            let _ = admission.control.send(&Message::Bye(reason));
            admission.control.close();
            Err(failure.into())
        }
    }
}

struct Admission<'a> {
    prepared: &'a Prepared,
    setup: &'a Setup,
    guard: &'a WorkerEnd,
    control: ControlChannel,
    deadline: Time,
}

/// Why there is no session: a code for the client, a sentence for the log.
struct Refusal {
    reason: Reason,
    failure: Failure,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        let reason = if failure.exit == Exit::Malformed { Reason::Protocol } else { Reason::Internal };
        Refusal { reason, failure }
    }
}

/// All of [`Admitted`] but the control channel.
struct Made {
    session: Session,
    carrier: Carrier,
    downlink: Downlink,
    exit: TunExit,
    name: String,
    on_demand: bool,
    rate_up: Option<Rate>,
}

impl Made {
    fn into_admitted(self, control: ControlChannel) -> Admitted {
        Admitted {
            session: self.session,
            control,
            carrier: self.carrier,
            downlink: self.downlink,
            exit: self.exit,
            name: self.name,
            on_demand: self.on_demand,
            rate_up: self.rate_up,
        }
    }
}

impl Admission<'_> {
    fn handshake(&mut self, ordered: &OnceLock<Reason>) -> Result<(), NoSession> {
        loop {
            let progress = self.control.handshake().map_err(|failure| match self.control.stranger() {
                Some(Stranger::Garbage) if failure.exit == Exit::Tls => {
                    NoSession { cause: Cause::Garbage, failure }
                }
                Some(Stranger::NoCertificate) => NoSession { cause: Cause::Certificate, failure },
                _ => failure.into(),
            })?;
            if let Some(reason) = ordered.get() {
                return Err(ordered_to_end(*reason).failure.into());
            }
            if progress == Progress::Done {
                break;
            }
            self.wait_for_client("the TLS handshake").map_err(|refusal| refusal.failure)?;
            point("worker.handshaking");
        }
        tls::close_desk(self.control.ssl());
        tls::close_signing(self.control.ssl());
        log::debug!("{}", tls::summary(self.control.ssl()));
        Ok(())
    }

    fn negotiate(&mut self, queues: io::Result<Queues>) -> Result<Made, Refusal> {
        // 1. Who is it?
        let revoked = self.revoked()?;
        let identity = tls::peer_identity(self.control.ssl(), revoked)?;
        point("worker.identified");
        // 2. What does it have and want?
        let hello = self.hello()?;
        let suite = choose_suite(&self.setup.suites, &hello)?;
        let on_demand = hello.features & FEATURE_ON_DEMAND != 0;
        // 3. The guard grants a session, addresses and a slot.
        let resume = hello.resume.map(|resume| self.resumption(resume)).transpose()?;
        let resumed = self.control.ssl().session_reused();
        let claim =
            Claim { name: identity.name.clone(), cert: identity.cert, resumed, want: hello.want, resume };
        self.ask(&Request::Claim(claim))?;
        point("worker.claimed");
        let (grant, fds) = match self.answer()? {
            (Reply::Granted(grant), fds) => (grant, fds),
            (Reply::Refused { reason, text }, _) => {
                return Err(Refusal { reason, failure: Failure::new(Exit::Refused, text) });
            }
            (other, _) => return Err(out_of_place(&other).into()),
        };
        point("worker.granted");
        // 4. The guard sends packets into our queue.
        let Queues { downlink, downlink_size, uplink } = queues.map_err(queue_failed)?;
        self.ask(&Request::Register { size: downlink_size })?;
        match self.answer()? {
            (Reply::Registered, _) => {}
            (Reply::Refused { reason, text }, _) => {
                return Err(Refusal { reason, failure: Failure::new(Exit::Refused, text) });
            }
            (other, _) => return Err(out_of_place(&other).into()),
        }
        point("worker.registered");
        let (carrier, memory, exit) = take_devices(fds, uplink)?;
        // 5. Keys, and the welcome.
        let mut session = self.session(&grant, suite)?;
        session.set_networks(grant.addresses.clone());
        self.welcome(&grant, suite)?;
        point("worker.welcomed");
        if let Some((id, session)) = tls::take_ticket(self.control.ssl()) {
            let until = tls::trusted_until(self.control.ssl());
            self.ask(&Request::Ticket { id, session, until })?;
        }
        log::info!(
            "session {} for {}: {suite}, {}",
            grant.session,
            identity.name,
            grant.addresses.iter().map(|a| a.addr().to_string()).collect::<Vec<_>>().join(" "),
        );
        let downlink = Downlink::new(downlink, memory, downlink_size.bytes);
        Ok(Made { session, carrier, downlink, exit, name: identity.name, on_demand, rate_up: grant.rate_up })
    }

    /// The revocation list, as long as it is valid: an old one says nothing of today.
    fn revoked(&self) -> Outcome<Option<&'_ Revoked>> {
        let revoked = self.prepared.revoked.as_ref();
        match revoked.and_then(|r| r.next_update()).filter(|end| *end < tls::time::wall_clock()) {
            None => Ok(revoked),
            Some(end) => {
                let text =
                    format!("the revocation list expired on {}: publish a new one", tls::time::date(end));
                Err(Failure::usage(text))
            }
        }
    }

    fn hello(&mut self) -> Result<Hello, Refusal> {
        let hello = match self.next_message("the client's first message")? {
            Message::Hello(hello) => hello,
            _ => {
                let failure = Failure::new(Exit::Malformed, "the client's first message is no Hello");
                return Err(Refusal { reason: Reason::Protocol, failure });
            }
        };
        if hello.version != control::VERSION {
            let text = format!(
                "the client speaks version {} of the protocol, this server {}",
                hello.version,
                control::VERSION
            );
            return Err(Refusal { reason: Reason::Incompatible, failure: Failure::new(Exit::Refused, text) });
        }
        Ok(hello)
    }

    /// What the guard needs to judge the client's proof: it keeps the secret, and this connection is ours alone.
    fn resumption(&self, Resume { session, proof }: Resume) -> Outcome<Resumption> {
        let binding = tls::export_binding(self.control.ssl())?;
        Ok(Resumption { session, proof, binding })
    }

    fn session(&self, grant: &Grant, suite: Suite) -> Outcome<Session> {
        let secret = tls::export_secret(self.control.ssl(), &grant.session.0)?;
        let inner = grant
            .addresses
            .iter()
            .map(|a| ipnet::IpNet::from(a.addr()))
            .chain(grant.subnets.iter().copied())
            .collect();
        let start = Start {
            role: Role::Server,
            id: grant.session,
            suite,
            secret: Secret::from_bytes(*secret),
            limits: Limits {
                age: Duration::from_millis(self.setup.rekey_ms),
                packets: self.setup.rekey_packets,
            },
            inner,
            linger: Duration::from_millis(self.setup.linger_ms),
            dialled: None,
            vouched: self.control.peer().map(|peer| peer.ip()),
        };
        Session::new(start, clock::now())
            .map_err(|_| Failure::new(Exit::MacLength, format!("the cipher library refuses {suite}")))
    }

    fn welcome(&mut self, grant: &Grant, suite: Suite) -> Outcome<()> {
        let welcome = Message::Welcome(Welcome {
            features: hardware::features(),
            session: grant.session,
            epoch: 0,
            suite,
            addresses: grant.addresses.clone(),
            subnets: grant.subnets.clone(),
            mtu: self.setup.mtu,
            settings: self.setup.settings.clone(),
            rekey_ms: self.setup.rekey_ms,
            rekey_packets: self.setup.rekey_packets,
            linger_ms: self.setup.linger_ms,
            resume_secret: grant.resume_secret.clone(),
        });
        self.control.send(&welcome).map_err(broken)
    }

    fn next_message(&mut self, what: &str) -> Result<Message, Refusal> {
        loop {
            if let Some(message) = self.control.receive().map_err(broken)? {
                return Ok(message);
            }
            self.wait_for_client(what)?;
        }
    }

    /// Waits until the client's connection is ready; the guard may end us meanwhile.
    fn wait_for_client(&self, what: &str) -> Result<(), Refusal> {
        let client = match self.control.interest() {
            Interest::Both | Interest::Write => PollFlags::POLLIN | PollFlags::POLLOUT,
            Interest::Read | Interest::Nothing => PollFlags::POLLIN,
        };
        let (_, guard) = self.wait(what, client)?;
        if guard {
            self.expect_no_order()?;
        }
        Ok(())
    }

    fn wait(&self, what: &str, client: PollFlags) -> Outcome<(bool, bool)> {
        let left = self.deadline.since(clock::now());
        if left.is_zero() {
            return Err(Failure::new(Exit::Tls, format!("{what} took too long")));
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds =
            [PollFd::new(self.control.as_fd(), client), PollFd::new(self.guard.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failure::system("poll", errno)),
        }
        Ok((fds[0].any().unwrap_or(false), fds[1].any().unwrap_or(false)))
    }

    /// An order of the guard while nothing was asked of it: only to report or to end.
    fn expect_no_order(&self) -> Result<(), Refusal> {
        match self.read_guard()? {
            None => Ok(()),
            Some((Reply::Query, _)) => Ok(self.ask(&Request::Report(Box::default()))?),
            // It is being heard just now.
            Some((Reply::Ask, _)) => Ok(self.ask(&Request::Heard)?),
            Some((Reply::End(reason), _)) => Err(ordered_to_end(reason)),
            Some((other, _)) => Err(out_of_place(&other).into()),
        }
    }

    fn ask(&self, request: &Request) -> Outcome<()> {
        match self.guard.send(request, &[]) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Failure::system("ask the guard", "it doesn't read")),
            Err(error) => Err(Failure::system("ask the guard", error)),
        }
    }

    fn answer(&self) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        loop {
            match self.read_guard()? {
                Some((Reply::Query, _)) => self.ask(&Request::Report(Box::default()))?,
                Some((Reply::Ask, _)) => self.ask(&Request::Heard)?,
                Some((Reply::End(reason), _)) => return Err(ordered_to_end(reason)),
                Some(answer) => return Ok(answer),
                None => {
                    self.wait("the guard's answer", PollFlags::empty())?;
                }
            }
        }
    }

    fn read_guard(&self) -> Outcome<Option<(Reply, Vec<OwnedFd>)>> {
        match self.guard.receive(true) {
            Ok(Incoming::Message(reply, fds)) => Ok(Some((reply, fds))),
            Ok(Incoming::Nothing) => Ok(None),
            Ok(Incoming::Closed) => Err(Failure::system("listen to the guard", "it is gone")),
            Err(violation) => Err(Failure::new(Exit::Malformed, format!("the guard sent {violation}"))),
        }
    }
}

/// The server's order decides among what the client has; without AES instructions at either end the suite that
/// doesn't need them goes first.
fn choose_suite(ours: &[Suite], hello: &Hello) -> Result<Suite, Refusal> {
    let common: Vec<Suite> = ours.iter().copied().filter(|s| hello.suites.contains(s)).collect();
    let fast_aes = hello.features & hardware::features() & FEATURE_AES_HARDWARE != 0;
    let soft = common.iter().copied().find(|s| *s == Suite::ChaCha20Poly1305).filter(|_| !fast_aes);
    soft.or(common.first().copied()).ok_or_else(|| {
        let failure = Failure::new(Exit::Refused, "the client has none of our suites");
        Refusal { reason: Reason::Incompatible, failure }
    })
}

fn take_devices(fds: Vec<OwnedFd>, uplink: Option<(Writer, usize)>) -> Outcome<(Carrier, Viewer, TunExit)> {
    let mut fds = fds.into_iter();
    let missing = || Failure::new(Exit::Malformed, "the guard's grant came without its descriptors");
    let slot = fds.next().ok_or_else(missing)?;
    let carrier = Carrier::new(slot).map_err(|e| Failure::system("take over the UDP slot", e))?;
    let memory = Viewer::open(fds.next().ok_or_else(missing)?)
        .map_err(|e| Failure::system("map the memory of the session's queue", e))?;
    let exit = match uplink {
        Some((writer, bytes)) => TunExit::Guard(Uplink::new(writer, bytes)),
        None => TunExit::Device(Tun::from_fd(fds.next().ok_or_else(missing)?)),
    };
    Ok((carrier, memory, exit))
}

fn queue_failed(error: io::Error) -> Refusal {
    let what = "create the session's queue";
    match error.raw_os_error().map(Errno::from_raw) {
        // As mq_open(3) says it.
        Some(Errno::EMFILE) => {
            let text = "the allowance for queues is used up: raise RLIMIT_MSGQUEUE, or lower max_clients";
            Refusal { reason: Reason::NoRoom, failure: Failure::system(what, text) }
        }
        Some(Errno::ENOSPC) => {
            let text = "there are too many queues: raise fs.mqueue.queues_max, or lower max_clients";
            Refusal { reason: Reason::NoRoom, failure: Failure::system(what, text) }
        }
        _ => Failure::system(what, error).into(),
    }
}

/// The client is told the guard's reason.
fn ordered_to_end(reason: Reason) -> Refusal {
    Refusal { reason, failure: Failure::new(Exit::Refused, reason.to_string()) }
}

fn out_of_place(reply: &Reply) -> Failure {
    Failure::new(Exit::Malformed, format!("the guard's answer is out of place: {reply:?}"))
}

fn broken(broken: Broken) -> Failure {
    match broken {
        Broken::Lost(text) => Failure::new(Exit::Tls, format!("the client's connection was lost: {text}")),
        Broken::Closed => Failure::new(Exit::Tls, "the client closed the connection"),
        Broken::Refused(failure) => failure,
    }
}
