//! A new configuration for a running server, on SIGHUP or `tunguard reload`, and a new revocation list.
//!
//! ```text
//! read everything --> compare --> key holder --> change the host --> all of it is in force --> sessions --> nursery
//!        \-- faulty    \-- fixed key \-- bad key   \-- fails, undone
//!         +-------------+-------------+------------+--> refused: the old one stays in force, whole
//! ```
//! Key holder and nursery are processes that have to start: the guard serves its sessions meanwhile, one reload waits for
//! the other, and who asked for it is answered when it is known what became of it. A new list needs no key: it is in force
//! at once.
//!
//! What can fail comes first and changes nothing for good. What comes last fails closed: where no nursery can be made
//! that knows the new certificates and lists, none with the old ones goes on, and nobody is let in until one can be
//! made. Sessions go on meanwhile.

use std::collections::BTreeMap;
use std::fmt;

use tunguard::config::common::{Data, Sandbox};
use tunguard::config::server::{ClientEntry, Push, ServerConfig, ServerTls};
use tunguard::exit::{Exit, Failure, Outcome};
use tunguard::ipc::Reply;
use tunguard::rate::Rates;
use tunguard::rigged;
use tunguard::sys::clock;
use tunguard::sys::poller::Interest;
use tunguard::time::Time;
use tunguard::wire::control::Reason;

use crate::clients::{Phase, Session};
use crate::entrance::Accepting;
use crate::gate::Limits;
use crate::run::{Guard, Source};
use crate::spawn;
use crate::trust::Next;

/// What is different in a new configuration, by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Only a new start changes these.
    pub fixed: Vec<&'static str>,
    /// In force at once.
    pub at_once: Vec<&'static str>,
    /// For sessions to come.
    pub to_come: Vec<&'static str>,
    /// Clients whose entry is new, gone or another.
    pub clients: Vec<String>,
}

impl Changes {
    /// From `old` to `new`. No field is left out: one that is added has to be decided on here.
    pub fn between(old: &ServerConfig, new: &ServerConfig) -> Changes {
        let ServerConfig {
            // Where we read it from.
            file: _,
            listen,
            device,
            networks,
            mtu,
            max_clients,
            max_sessions_per_identity,
            on_too_many,
            limits: Rates { down, up },
            nat,
            client_to_client,
            push: Push { routes, dns },
            tls: ServerTls { ca, cert, key, crl },
            data: Data { suites, rekey, rekey_packets },
            tun_write,
            sandbox: Sandbox { landlock },
            single_uid,
            linger,
            idle,
            lease,
            socket,
            state_dir,
            worker_uids,
            max_handshakes,
            max_handshakes_per_source,
            penalty,
            exempt_sources,
            clients_dir,
            clients,
        } = old;
        let changed = |keys: &[(&'static str, bool)]| -> Vec<&'static str> {
            keys.iter().filter(|(_, changed)| *changed).map(|(key, _)| *key).collect()
        };
        Changes {
            fixed: changed(&[
                ("listen", *listen != new.listen),
                ("device", *device != new.device),
                // Every address and route of the device, and every session's.
                ("networks", *networks != new.networks),
                ("mtu", *mtu != new.mtu),
                ("socket", *socket != new.socket),
                ("state_dir", *state_dir != new.state_dir),
                ("worker_uids", *worker_uids != new.worker_uids),
                // The queues' sizes depend on it.
                ("data.tun_write", *tun_write != new.tun_write),
                ("sandbox.landlock", *landlock != new.sandbox.landlock),
                ("sandbox.single_uid", *single_uid != new.single_uid),
            ]),
            at_once: changed(&[
                ("max_clients", *max_clients != new.max_clients),
                ("max_sessions_per_identity", *max_sessions_per_identity != new.max_sessions_per_identity),
                ("on_too_many", *on_too_many != new.on_too_many),
                ("nat", *nat != new.nat),
                ("client_to_client", *client_to_client != new.client_to_client),
                ("push.routes", *routes != new.push.routes),
                ("push.dns", *dns != new.push.dns),
                ("idle", *idle != new.idle),
                ("lease", *lease != new.lease),
                ("max_handshakes", *max_handshakes != new.max_handshakes),
                ("max_handshakes_per_source", *max_handshakes_per_source != new.max_handshakes_per_source),
                ("penalty", *penalty != new.penalty),
                ("exempt_sources", *exempt_sources != new.exempt_sources),
                ("clients_dir", *clients_dir != new.clients_dir),
                ("tls.ca", *ca != new.tls.ca),
                ("tls.cert", *cert != new.tls.cert),
                ("tls.key", *key != new.tls.key),
                ("tls.crl", *crl != new.tls.crl),
            ]),
            to_come: changed(&[
                ("linger", *linger != new.linger),
                ("data.suites", *suites != new.data.suites),
                ("data.rekey", *rekey != new.data.rekey),
                ("data.rekey_packets", *rekey_packets != new.data.rekey_packets),
                ("limits.rate_down", *down != new.limits.down),
                ("limits.rate_up", *up != new.limits.up),
            ]),
            clients: changed_clients(clients, &new.clients),
        }
    }

    /// Whether clients are to be told of new settings.
    fn pushed(&self) -> bool {
        ["push.routes", "push.dns", "idle"].iter().any(|key| self.at_once.contains(key))
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("certificates and revocation list are read again")?;
        if !self.at_once.is_empty() {
            write!(f, "; changed: {}", self.at_once.join(", "))?;
        }
        if !self.clients.is_empty() {
            write!(f, "; changed clients: {}", self.clients.join(", "))?;
        }
        if !self.to_come.is_empty() {
            write!(f, "; for sessions to come: {}", self.to_come.join(", "))?;
        }
        Ok(())
    }
}

fn changed_clients(old: &BTreeMap<String, ClientEntry>, new: &BTreeMap<String, ClientEntry>) -> Vec<String> {
    let gone_or_other = old.iter().filter(|(name, entry)| new.get(*name) != Some(*entry));
    let added = new.keys().filter(|name| !old.contains_key(*name));
    let mut names: Vec<String> = gone_or_other.map(|(name, _)| name).chain(added).cloned().collect();
    names.sort();
    names
}

/// Whether a session has what the configuration wouldn't give it any more, or hasn't what it would.
fn is_outdated(session: &Session, clients: &BTreeMap<String, ClientEntry>) -> bool {
    let nothing = ClientEntry::default();
    // A limit is a session's from its start.
    let ClientEntry { addresses, subnets, rate_down: _, rate_up: _ } =
        clients.get(&session.name).unwrap_or(&nothing);
    let has = |address| session.addresses.iter().any(|own| own.addr() == address);
    let of_others = clients.iter().filter(|(name, _)| **name != session.name);
    let taken = of_others.flat_map(|(_, other)| &other.addresses).any(|address| has(*address));
    taken || addresses.iter().any(|address| !has(*address)) || session.subnets != *subnets
}

/// Reloads: the one under way, and those asked for meanwhile.
#[derive(Default)]
pub struct Reloads {
    current: Option<Reload>,
    /// SIGHUP came.
    signal: bool,
    /// Who asked on the admin socket.
    conversations: Vec<u64>,
}

struct Reload {
    wish: Wish,
    stage: Stage,
}

/// Who asked: SIGHUP, whose outcome is in the log, and these on the admin socket.
struct Wish {
    signal: bool,
    conversations: Vec<u64>,
}

enum Stage {
    /// Nothing is changed; the key holder that has the key starts.
    Key(Box<Prepared>),
    /// All of it is in force, and this has changed; the nursery starts.
    Workers(String),
}

/// What was read, and is in order as far as that can be seen without the key.
struct Prepared {
    config: ServerConfig,
    changes: Changes,
    next: Next,
}

impl Wish {
    /// Why, for the log.
    fn cause(&self) -> &'static str {
        if self.signal { "SIGHUP" } else { "asked to reload" }
    }
}

impl Reloads {
    fn next(&mut self) -> Option<Wish> {
        let wish = Wish {
            signal: std::mem::take(&mut self.signal),
            conversations: std::mem::take(&mut self.conversations),
        };
        (wish.signal || !wish.conversations.is_empty()).then_some(wish)
    }

    /// When [`Guard::go_on_reloading`] is due at the latest.
    pub fn deadline(&self) -> Option<Time> {
        match &self.current {
            Some(Reload { stage: Stage::Key(prepared), .. }) => Some(prepared.next.heir.deadline()),
            _ => None,
        }
    }

    /// A process has ended, with `code` if with any: whether it was the key holder of one.
    /// [`Guard::go_on_reloading`] comes next.
    pub fn ended(&mut self, pid: i32, code: Option<i32>) -> bool {
        match &mut self.current {
            Some(Reload { stage: Stage::Key(prepared), .. }) => prepared.next.heir.ended(pid, code),
            _ => false,
        }
    }
}

impl Guard {
    /// SIGHUP: what comes of it is in the log.
    pub(crate) fn reload_by_signal(&mut self) {
        self.reloads.signal = true;
        self.next_reload();
    }

    /// Somebody asks for it on the admin socket, and is told what came of it.
    pub(crate) fn reload_and_tell(&mut self, conversation: u64) {
        self.reloads.conversations.push(conversation);
        self.next_reload();
    }

    /// The folder of the revocation list was changed. What the list says is in force at once, whatever a reload waits for.
    pub(crate) fn reload_list(&mut self) {
        if !self.trust.list_changed() || self.accepting == Accepting::No {
            return;
        }
        match self.trust.read_list(&self.config.tls) {
            Ok(true) => {
                log::info!("the revocation list changed, and is read again");
                self.end_revoked();
                self.renew_nursery();
            }
            // Written again, or told of twice.
            Ok(false) => {}
            Err(failure) => {
                log::error!("the revocation list changed, but the one before stays in force: {failure}");
            }
        }
    }

    /// Begins with the next one, if there is none under way.
    fn next_reload(&mut self) {
        while self.reloads.current.is_none() && self.accepting != Accepting::No {
            let Some(wish) = self.reloads.next() else { return };
            rigged::read_orders();
            match self.read_everything() {
                Ok(prepared) => {
                    let stage = Stage::Key(Box::new(prepared));
                    self.reloads.current = Some(Reload { wish, stage });
                }
                Err(failure) => self.refuse_reload(wish, failure),
            }
        }
    }

    /// The key holder of a reload has said something, or ended, or its time may be over.
    pub(crate) fn go_on_reloading(&mut self, now: Time) {
        let Some(Reload { stage: Stage::Key(prepared), .. }) = &mut self.reloads.current else { return };
        let Some(started) = prepared.next.heir.poll(now, &self.poller) else { return };
        let Some(Reload { wish, stage: Stage::Key(prepared) }) = self.reloads.current.take() else { return };
        match started.and_then(|()| self.take_over(*prepared)) {
            Ok(changes) => self.apply(wish, &changes),
            Err(failure) => self.refuse_reload(wish, failure),
        }
        self.next_reload();
    }

    /// A nursery has started, or it hasn't: where it is that of a reload, that is over.
    pub(crate) fn finish_reload(&mut self, started: Outcome<()>) {
        let Some(Reload { wish, stage: Stage::Workers(text) }) =
            self.reloads.current.take_if(|reload| matches!(reload.stage, Stage::Workers(_)))
        else {
            return;
        };
        rigged::point("guard.reloaded");
        if started.is_ok() && matches!(self.accepting, Accepting::Paused(_)) {
            // What it waited for is there.
            self.open_listener();
        }
        let outcome = started.map(|()| text).map_err(|failure| {
            Failure::new(Exit::NobodyLetIn, failure.context(RELOADED_WITHOUT_WORKERS).text)
        });
        self.answer_reload(wish, outcome);
        self.next_reload();
    }

    /// The server stops.
    pub(crate) fn stop_reloading(&mut self) {
        let stops = || Failure::system("reload", "the server stops");
        match self.reloads.current.take() {
            Some(Reload { wish, stage: Stage::Key(prepared) }) => {
                prepared.next.heir.abandon();
                self.refuse_reload(wish, stops());
            }
            Some(Reload { wish, stage: Stage::Workers(_) }) => self.answer_reload(wish, Err(stops())),
            None => {}
        }
        while let Some(wish) = self.reloads.next() {
            self.refuse_reload(wish, stops());
        }
    }

    /// Reads and checks it, and starts a key holder with the key. Nothing of it is in force.
    fn read_everything(&mut self) -> Outcome<Prepared> {
        let mut new = ServerConfig::load(&self.config.file)?;
        let changes = Changes::between(&self.config, &new);
        if !changes.fixed.is_empty() {
            let (keys, it) = (changes.fixed.join(", "), if changes.fixed.len() > 1 { "them" } else { "it" });
            return Err(Failure::usage(format!(
                "{}: {keys} can't change while the server runs: restart the server to change {it}",
                new.file.display()
            )));
        }
        if new.max_clients > self.room_for {
            return Err(Failure::usage(format!(
                "{}: max_clients = {} is more than the {} there were at the start: restart the server to change it",
                new.file.display(),
                new.max_clients,
                self.room_for
            )));
        }
        self.queues.suffice(&new)?;
        let next = self.trust.prepare(&mut new, &self.poller)?;
        Ok(Prepared { config: new, changes, next })
    }

    /// Puts it in force, or says why not and has changed nothing. The key holder is ready.
    fn take_over(&mut self, prepared: Prepared) -> Outcome<Changes> {
        let Prepared { config: new, changes, next } = prepared;
        if let Some(watch) = next.watch() {
            let added = self.poller.add(watch, Source::Trust.token(), Interest::Read);
            added.map_err(|e| Failure::system("watch for a new revocation list", e))?;
        }
        // The last that can fail.
        self.host.change(&self.config, &new)?;
        self.trust.follow(next);
        self.config = new;
        // The list may have changed since it was read. What is wrong with it then, its watch tells of.
        let _ = self.trust.read_list(&self.config.tls);
        self.queues.make_room(&self.config);
        self.gate.set_limits(Limits::of(&self.config, self.queues.shared()));
        let ServerConfig { max_clients, max_sessions_per_identity, .. } = self.config;
        self.tickets.set_sessions(max_clients.into(), max_sessions_per_identity.into());
        self.leases.configure(&self.config);
        Ok(changes)
    }

    /// It is in force: sessions that it ends, clients that have to know, workers to come.
    fn apply(&mut self, wish: Wish, changes: &Changes) {
        log::info!("{}: {changes}", wish.cause());
        rigged::point("guard.reloading");
        self.end_revoked();
        self.end_outdated();
        if changes.pushed() {
            self.pushed_since = clock::now();
            let all: Vec<u64> = self.workers.iter().map(|(key, _)| key).collect();
            all.into_iter().for_each(|key| self.push_to(key));
        }
        self.reloads.current = Some(Reload { wish, stage: Stage::Workers(changes.to_string()) });
        self.renew_nursery();
    }

    fn refuse_reload(&mut self, wish: Wish, why: Failure) {
        log::error!("{}, but what was there before stays in force: {why}", wish.cause());
        self.answer_reload(wish, Err(Failure::usage(format!("nothing is changed: {why}"))));
    }

    /// Errors: [`Exit::Usage`] where nothing has changed; [`Exit::NobodyLetIn`] where it is in force, and nobody is let in
    /// until workers can be started; [`Exit::System`] where it is, and the server stops.
    fn answer_reload(&mut self, wish: Wish, outcome: Outcome<String>) {
        let answer = tunguard::admin::document(&match outcome {
            Ok(text) => serde_json::json!({ "reloaded": text }),
            Err(failure) => serde_json::json!({ "error": failure.text, "exit": failure.exit as u8 }),
        });
        for conversation in wish.conversations {
            self.admin.answer(conversation, answer.clone(), &self.poller);
        }
    }

    /// Workers to come know what is in force now; others than these there won't be. Their nursery starts.
    fn renew_nursery(&mut self) {
        self.tickets.clear();
        self.trusted_since = clock::now();
        let started = self
            .spawner
            .prepare(&self.config, &self.trust.certificates, self.host.offloads.uso)
            .and_then(|()| self.spawner.has_nursery(&mut self.trust.holder, &self.poller));
        if let Err(failure) = started {
            self.pause(&failure.text);
            self.finish_reload(Err(failure));
        }
    }

    fn end_revoked(&mut self) {
        self.end_where(Reason::Revoked, |guard, session| guard.trust.is_revoked(&session.cert));
    }

    /// Its client comes back at once, and gets what is fixed for it now.
    fn end_outdated(&mut self) {
        self.end_where(Reason::Changed, |guard, session| is_outdated(session, &guard.config.clients));
    }

    fn end_where(&mut self, reason: Reason, is_over: impl Fn(&Guard, &Session) -> bool) {
        let over = self.workers.iter().filter(|(_, w)| w.session.as_ref().is_some_and(|s| is_over(self, s)));
        let over: Vec<u64> = over.map(|(key, _)| key).collect();
        for key in over {
            self.end_worker(key, reason);
        }
    }

    /// Tells a session's client what is pushed now.
    pub(crate) fn push_to(&mut self, key: u64) {
        let established = self.workers.get(key).is_some_and(|worker| worker.phase == Phase::Established);
        if established {
            self.reply(key, &Reply::Update(spawn::settings(&self.config)));
        }
    }
}

const RELOADED_WITHOUT_WORKERS: &str = "it is in force, but nobody is let in for the moment";

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const TLS: &str = "[tls]\nca = 'ca'\ncert = 'cert'\nkey = 'key'\n";

    fn parse(line: &str) -> ServerConfig {
        let text = match line.split_once(" = ") {
            Some(("networks" | "tls.ca" | "tls.cert" | "tls.key", _)) => panic!("set it otherwise"),
            _ => format!("networks = ['10.9.0.0/24']\n{line}\n{TLS}"),
        };
        ServerConfig::parse(&text, Path::new("/etc/tunguard/server.toml")).expect(line)
    }

    fn changed(line: &str) -> Changes {
        Changes::between(&parse(""), &parse(line))
    }

    #[test]
    fn each_key_is_fixed_or_changes_at_once_or_for_sessions_to_come() {
        let fixed = |keys: &[&'static str]| Changes { fixed: keys.to_vec(), ..Changes::default() };
        let at_once = |keys: &[&'static str]| Changes { at_once: keys.to_vec(), ..Changes::default() };
        let to_come = |keys: &[&'static str]| Changes { to_come: keys.to_vec(), ..Changes::default() };
        for (line, changes) in [
            ("", Changes::default()),
            ("nat = false", Changes::default()),
            ("listen = '[::]:1'", fixed(&["listen"])),
            ("device = 'tg1'\nsocket = '/run/tunguard/tg0.sock'", fixed(&["device"])),
            ("mtu = 1400", fixed(&["mtu"])),
            ("socket = '/run/x.sock'", fixed(&["socket"])),
            ("state_dir = '/x'", fixed(&["state_dir"])),
            ("worker_uids = [70000, 80000]", fixed(&["worker_uids"])),
            ("data.tun_write = 'guard'", fixed(&["data.tun_write"])),
            ("max_clients = 7", at_once(&["max_clients"])),
            ("nat = true", at_once(&["nat"])),
            ("client_to_client = true", at_once(&["client_to_client"])),
            ("push.routes = ['10.0.0.0/8']", at_once(&["push.routes"])),
            ("push.dns = ['10.9.0.1']", at_once(&["push.dns"])),
            ("idle = '1m'", at_once(&["idle"])),
            ("lease = '1m'", at_once(&["lease"])),
            ("max_handshakes = 63", at_once(&["max_handshakes"])),
            ("max_handshakes_per_source = 9", at_once(&["max_handshakes_per_source"])),
            ("penalty = 'off'", at_once(&["penalty"])),
            ("exempt_sources = ['10.0.0.0/8']", at_once(&["exempt_sources"])),
            ("clients_dir = 'c'", at_once(&["clients_dir"])),
            ("linger = '1m'", to_come(&["linger"])),
            ("data.suites = ['aes-256-gcm']", to_come(&["data.suites"])),
            ("data.rekey = '1m'", to_come(&["data.rekey"])),
            ("data.rekey_packets = 1000", to_come(&["data.rekey_packets"])),
            ("limits.rate_down = '1Mbit/s'", to_come(&["limits.rate_down"])),
            ("limits.rate_up = '1Mbit/s'", to_come(&["limits.rate_up"])),
            ("max_sessions_per_identity = 2", at_once(&["max_sessions_per_identity"])),
            ("on_too_many = 'refuse'", at_once(&["on_too_many"])),
            ("sandbox.landlock = 'off'", fixed(&["sandbox.landlock"])),
            ("sandbox.single_uid = 900", fixed(&["sandbox.single_uid"])),
        ] {
            assert_eq!(changed(line), changes, "{line}");
        }
        let mut other = parse("");
        other.networks.push("fd09::/64".parse().expect("a network"));
        assert_eq!(Changes::between(&parse(""), &other), fixed(&["networks"]));
        let mut other = parse("");
        other.tls.crl = Some("/crl.pem".into());
        other.tls.cert = other.tls.ca.clone();
        assert_eq!(Changes::between(&parse(""), &other), at_once(&["tls.cert", "tls.crl"]));
    }

    #[test]
    fn clients_that_are_new_gone_or_other_are_named() {
        let entry = |address: &str| ClientEntry {
            addresses: vec![address.parse().expect("an address")],
            ..ClientEntry::default()
        };
        let (mut old, mut new) = (parse(""), parse(""));
        old.clients.extend([
            ("gone".into(), entry("10.9.0.2")),
            ("other".into(), entry("10.9.0.3")),
            ("same".into(), entry("10.9.0.4")),
        ]);
        new.clients.extend([
            ("new".into(), entry("10.9.0.2")),
            ("other".into(), entry("10.9.0.5")),
            ("same".into(), entry("10.9.0.4")),
        ]);
        let changes = Changes::between(&old, &new);
        assert_eq!(changes.clients, ["gone", "new", "other"]);
        assert_eq!(
            changes.to_string(),
            "certificates and revocation list are read again; changed clients: gone, new, other"
        );
    }
}
