//! The laboratory: namespaces, an authority, servers and clients in them, and nothing left afterwards.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use nix::unistd::Pid;
use serde_json::Value;

use crate::process::{Process, alive, field};

/// How long anything may take that has to happen: far beyond what the slowest machine needs.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The server's outer addresses.
pub const SERVER_V4: &str = "198.18.100.2";
pub const SERVER_V6: &str = "2001:db8:100::2";
/// Its inner ones.
pub const INNER_V4: &str = "10.9.0.1";
pub const INNER_V6: &str = "fd09::1";
/// The host behind it.
pub const LAN_V4: &str = "192.168.50.2";
pub const LAN_V6: &str = "fd50::2";
/// The server's address there.
pub const GATEWAY_V4: &str = "192.168.50.1";
pub const GATEWAY_V6: &str = "fd50::1";

/// The namespaces, the authority and the files of one test.
pub struct Lab {
    prefix: String,
    clients: usize,
    /// Programs that take orders, in a directory of the lab's own.
    rigged: Option<PathBuf>,
    /// Configurations, certificates, logs.
    pub dir: PathBuf,
}

impl Lab {
    /// A lab with `clients` client hosts, or `None` where this machine can't have one: the test is skipped.
    pub fn new(test: &str, clients: usize) -> Option<Lab> {
        if let Err(why) = available() {
            assert!(std::env::var_os("CI").is_none(), "no network namespaces for the test {test}: {why}");
            skipped(test, why);
            return None;
        }
        let prefix = format!("tg{}-{test}", std::process::id());
        let dir = std::env::temp_dir().join(&prefix);
        fs::DirBuilder::new().mode(0o700).create(&dir).expect("the lab's directory");
        let lab = Lab { prefix, clients, rigged: None, dir };
        lab.wire();
        lab.tunguard(&["pki", "init"]);
        lab.tunguard(&["pki", "server", "gate", "--san", SERVER_V4, "--san", SERVER_V6, "--san", "vpn.test"]);
        for client in 1..=clients {
            lab.tunguard(&["pki", "client", &format!("c{client}")]);
        }
        Some(lab)
    }

    /// A lab whose programs take the orders of src/rigged.rs, given by [`Lab::order`].
    pub fn rigged(test: &str, clients: usize) -> Option<Lab> {
        let mut lab = Lab::new(test, clients)?;
        let built = Path::new(tunguard()).with_file_name("rigged");
        let dir = built.join(&lab.prefix);
        for program in ["tunguard", "tunguard-guard", "tunguard-worker"] {
            assert!(
                built.join(program).exists(),
                "{} has no {program}: scripts/rigged.sh makes it",
                built.display()
            );
            fs::create_dir_all(&dir).expect("a directory for the programs");
            fs::hard_link(built.join(program), dir.join(program)).expect("a name for a program");
        }
        lab.rigged = Some(dir);
        Some(lab)
    }

    /// Orders for processes that start, or are forked, from now on.
    pub fn order(&self, orders: &[&str]) {
        let dir = self.rigged.as_ref().expect("a rigged lab");
        let orders: String = orders.iter().map(|order| format!("{order}\n")).collect();
        // Replaced as a whole: a process may be reading.
        fs::write(dir.join("orders.new"), orders).expect("orders");
        fs::rename(dir.join("orders.new"), dir.join("rigged.orders")).expect("orders");
    }

    /// One of its rigged programs.
    pub fn rigged_program(&self, name: &str) -> PathBuf {
        self.rigged.as_ref().expect("a rigged lab").join(name)
    }

    /// The program that servers and clients of this lab are.
    fn program(&self) -> String {
        self.rigged.as_ref().map_or_else(|| tunguard().to_owned(), |dir| shown(&dir.join("tunguard")))
    }

    /// The namespace of client `n`, from 1.
    pub fn c(&self, n: usize) -> Namespace {
        Namespace(format!("{}-c{n}", self.prefix))
    }

    /// The network between clients and server.
    pub fn net(&self) -> Namespace {
        Namespace(format!("{}-net", self.prefix))
    }

    /// The server's host.
    pub fn srv(&self) -> Namespace {
        Namespace(format!("{}-srv", self.prefix))
    }

    /// The host behind the server.
    pub fn lan(&self) -> Namespace {
        Namespace(format!("{}-lan", self.prefix))
    }

    /// A file of the lab's.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Puts a file into the lab's directory, for [`Config::set`] to name.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.join(name);
        fs::create_dir_all(path.parent().expect("inside the lab")).expect("a directory");
        fs::write(&path, content).expect("a file of the lab");
        path
    }

    /// Runs `tunguard` in the lab's directory, where it has to succeed.
    pub fn tunguard(&self, args: &[&str]) -> String {
        let out =
            Command::new(tunguard()).args(args).current_dir(&self.dir).output().expect("tunguard starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(out.status.success(), "tunguard {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }

    /// A server's configuration; start it with [`Lab::start_server`].
    pub fn server(&self) -> Config {
        Config::default()
            .set("listen", "'[::]:55555'")
            .set("networks", "['10.9.0.0/24', 'fd09::/64']")
            .set("socket", format_args!("'{}'", self.path("admin.sock").display()))
            .set("state_dir", "'server-state'")
            .set("tls.ca", "'certs/ca.pem'")
            .set("tls.cert", "'certs/gate.pem'")
            .set("tls.key", "'certs/gate.key'")
            .set("tls.crl", "'certs/crl.pem'")
    }

    /// The same of somebody else, with a certificate of an authority of his own.
    pub fn impostor(&self) -> Config {
        self.tunguard(&["pki", "init", "--dir", "elsewhere"]);
        self.tunguard(&["pki", "server", "--dir", "elsewhere", "gate", "--san", SERVER_V4]);
        self.server()
            .set("tls.ca", "'elsewhere/ca.pem'")
            .set("tls.cert", "'elsewhere/gate.pem'")
            .set("tls.key", "'elsewhere/gate.key'")
            .set("tls.crl", "'elsewhere/crl.pem'")
    }

    /// A client's configuration, with the certificate `cN` and the server's IPv4 address.
    pub fn client(&self, n: usize) -> Config {
        Config::default()
            .set("remote", format_args!("['{SERVER_V4}']"))
            .set("dns", "'none'")
            .set("state_dir", format_args!("'client-state-{n}'"))
            .set("tls.ca", "'certs/ca.pem'")
            .set("tls.cert", format_args!("'certs/clients/c{n}.pem'"))
            .set("tls.key", format_args!("'certs/clients/c{n}.key'"))
    }

    /// Starts a server that may fail.
    pub fn try_server(&self, config: &Config) -> Process {
        self.try_server_under(&[], config)
    }

    /// The same, by a program that turns into it.
    pub fn try_server_under(&self, launcher: &[&str], config: &Config) -> Process {
        let file = shown(&self.write("server.toml", config.text()));
        let program = self.program();
        let command = [launcher, &[&program, "server", "--config", &file]].concat();
        Process::start("server", &self.srv(), &self.dir, &command)
    }

    /// Starts a server and waits until it answers.
    pub fn start_server(&self, config: &Config) -> Process {
        let mut server = self.try_server(config);
        server.eventually("the server answers on its admin socket", || self.try_status().map(drop));
        server
    }

    /// Starts a client on host `n` that may fail.
    pub fn try_client(&self, n: usize, config: &Config) -> Process {
        self.try_client_under(&[], n, config)
    }

    /// The same, by a program that turns into it.
    pub fn try_client_under(&self, launcher: &[&str], n: usize, config: &Config) -> Process {
        let file = shown(&self.write(&format!("client{n}.toml"), config.text()));
        let program = self.program();
        let command = [launcher, &[&program, "client", "--config", &file]].concat();
        Process::start(&format!("client{n}"), &self.c(n), &self.dir, &command)
    }

    /// A client whose host has its own /etc, in the lab's directory `etc`, with these lines in `hosts`.
    pub fn client_with_own_etc(&self, n: usize, hosts: &str, config: &Config) -> Process {
        let etc = self.path("etc");
        if !etc.exists() {
            for name in ["passwd", "group", "nsswitch.conf"] {
                // A system without one does without.
                let content = fs::read(Path::new("/etc").join(name)).unwrap_or_default();
                self.write(&format!("etc/{name}"), content);
            }
            // Several lines of a name are all its addresses.
            self.write("etc/host.conf", "multi on\n");
            self.write("etc/resolv.conf", "nameserver 198.18.100.53\n");
        }
        self.write("etc/hosts", format!("127.0.0.1 localhost\n{hosts}"));
        // `ip netns exec` gives each program a mount namespace of its own.
        let script = format!("mount --bind {} /etc && exec \"$@\"", etc.display());
        self.try_client_under(&["sh", "-c", &script, "sh"], n, config)
    }

    /// The kernel says up to a second late that a new wire has a carrier, and a client would take that for a change of
    /// the network.
    pub fn wait_for_carrier(&self, n: usize) {
        for _ in 0..100 {
            if self.c(n).ip(&["link", "show", "eth0"]).contains("state UP") {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts a client on host `n` and waits until the tunnel carries packets.
    pub fn start_client(&self, n: usize, config: &Config) -> Process {
        self.wait_for_carrier(n);
        let mut client = self.try_client(n, config);
        self.wait_for_tunnel(n, &mut client);
        client
    }

    /// Waits until the server's inner address answers client `n`.
    pub fn wait_for_tunnel(&self, n: usize, client: &mut Process) {
        let inner = if self.inner(n).is_empty() { None } else { Some(()) };
        if inner.is_none() {
            client.eventually("the client's device has addresses", || {
                Some(self.inner(n)).filter(|addresses| !addresses.is_empty()).map(drop)
            });
        }
        let server = if self.inner(n).iter().any(IpAddr::is_ipv4) { INNER_V4 } else { INNER_V6 };
        client.eventually("the server answers through the tunnel", || {
            self.c(n).run(&["ping", "-n", "-c", "1", "-W", "1", server]).status.success().then_some(())
        });
    }

    /// Inner addresses of client `n`, IPv4 first.
    pub fn inner(&self, n: usize) -> Vec<IpAddr> {
        self.c(n).addresses("tg0")
    }

    /// The inner IPv4 address of client `n`.
    pub fn inner_v4(&self, n: usize) -> IpAddr {
        self.inner(n).into_iter().find(IpAddr::is_ipv4).expect("an inner IPv4 address")
    }

    /// The inner IPv6 address of client `n`.
    pub fn inner_v6(&self, n: usize) -> IpAddr {
        self.inner(n).into_iter().find(IpAddr::is_ipv6).expect("an inner IPv6 address")
    }

    /// What `tunguard status --json` says.
    pub fn status(&self) -> Value {
        eventually("the server's status", || self.try_status())
    }

    /// The same, where the server may be gone.
    pub fn try_status(&self) -> Option<Value> {
        let socket = self.path("admin.sock");
        let out = Command::new("timeout")
            .args(["10", tunguard(), "status", "--json", "--socket"])
            .arg(&socket)
            .output()
            .expect("tunguard starts");
        out.status.success().then(|| serde_json::from_slice(&out.stdout).expect("status --json is JSON"))
    }

    /// The sessions in the server's status.
    pub fn sessions(&self) -> Vec<Value> {
        self.status()["sessions"].as_array().expect("a list of sessions").clone()
    }

    /// The session of the client with this name.
    pub fn session(&self, name: &str) -> Option<Value> {
        self.sessions().into_iter().find(|s| s["name"] == name)
    }

    /// Waits until the server has exactly `n` sessions.
    pub fn wait_for_sessions(&self, n: usize) {
        eventually(&format!("{n} sessions at the server"), || (self.sessions().len() == n).then_some(()));
    }

    /// Waits until the server knows the client `c1` by an address that starts so.
    pub fn wait_for_peer(&self, start: &str) {
        eventually(&format!("a session with the peer {start}"), || {
            let session = self.session("c1")?;
            session["peer"].as_str().is_some_and(|peer| peer.starts_with(start)).then_some(())
        });
    }

    /// Gives client 1 a second link to the network, eth1, without a route by it.
    pub fn second_link(&self) {
        let client = self.c(1);
        self.net().ip(&["link", "add", "c1b", "type", "veth", "peer", "name", "eth1", "netns", &client.0]);
        self.net().ip(&["addr", "add", "198.18.201.1/24", "dev", "c1b"]);
        self.net().ip(&["link", "set", "c1b", "up"]);
        client.ip(&["addr", "add", "198.18.201.2/24", "dev", "eth1"]);
        client.ip(&["link", "set", "eth1", "up"]);
    }

    /// The router drops, without a word, what it forwards and one of these matches (nft).
    pub fn swallow(&self, matches: &[&str]) {
        let chain = "type filter hook forward priority 0;";
        let rules: String = matches.iter().map(|m| format!("{m} counter drop; ")).collect();
        self.net().must(&["nft", &format!("table inet hole {{ chain passing {{ {chain} {rules} }}; }}")]);
    }

    /// It does so no more.
    pub fn swallow_no_more(&self) {
        self.net().must(&["nft", "delete table inet hole"]);
    }

    /// Sets the MTU of every wire between clients and server.
    pub fn set_outer_mtu(&self, mtu: u32) {
        let mtu = mtu.to_string();
        for client in 1..=self.clients {
            self.c(client).ip(&["link", "set", "eth0", "mtu", &mtu]);
            self.net().ip(&["link", "set", &format!("c{client}"), "mtu", &mtu]);
        }
        self.net().ip(&["link", "set", "srv", "mtu", &mtu]);
        self.srv().ip(&["link", "set", "eth0", "mtu", &mtu]);
        self.srv().ip(&["link", "set", "eth1", "mtu", &mtu]);
        self.lan().ip(&["link", "set", "eth0", "mtu", &mtu]);
    }

    /// Makes the namespaces and the wires between them.
    fn wire(&self) {
        let names = self.names();
        let mut batch = String::new();
        for name in &names {
            batch += &format!("netns add {name}\n");
        }
        ip_batch(&[], &batch);

        let (net, srv, lan) = (self.net().0, self.srv().0, self.lan().0);
        let mut batch = String::from("link set lo up\n");
        for n in 1..=self.clients {
            let wire = wire_number(n);
            batch += &format!("link add c{n} type veth peer name eth0 netns {}\n", self.c(n).0);
            batch += &format!("addr add 198.18.{wire}.1/24 dev c{n}\n");
            batch += &format!("addr add 2001:db8:{wire}::1/64 dev c{n} nodad\n");
            batch += &format!("link set c{n} up\n");
        }
        batch += &format!("link add srv type veth peer name eth0 netns {srv}\n");
        batch += "addr add 198.18.100.1/24 dev srv\naddr add 2001:db8:100::1/64 dev srv nodad\n";
        batch += "link set srv up\n";
        ip_batch(&["-n", &net], &batch);

        for n in 1..=self.clients {
            let (v4, v6, wire) = (outer_v4(n), outer_v6(n), wire_number(n));
            let batch = format!(
                "link set lo up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n\
                 route add default via 198.18.{wire}.1\nroute add default via 2001:db8:{wire}::1\n"
            );
            ip_batch(&["-n", &self.c(n).0], &batch);
        }
        let batch = format!(
            "link set lo up\naddr add {SERVER_V4}/24 dev eth0\naddr add {SERVER_V6}/64 dev eth0 nodad\n\
             link set eth0 up\nroute add default via 198.18.100.1\nroute add default via 2001:db8:100::1\n\
             link add eth1 type veth peer name eth0 netns {lan}\n\
             addr add {GATEWAY_V4}/24 dev eth1\naddr add {GATEWAY_V6}/64 dev eth1 nodad\nlink set eth1 up\n"
        );
        ip_batch(&["-n", &srv], &batch);
        let batch = format!(
            "link set lo up\naddr add {LAN_V4}/24 dev eth0\naddr add {LAN_V6}/64 dev eth0 nodad\n\
             link set eth0 up\n"
        );
        ip_batch(&["-n", &lan], &batch);
        self.net().sysctl("net/ipv4/ip_forward", "1");
        self.net().sysctl("net/ipv6/conf/all/forwarding", "1");
        for name in [self.srv(), self.lan(), self.c(1)] {
            // Every ICMP error counts here.
            name.sysctl("net/ipv4/icmp_ratelimit", "0");
            name.sysctl("net/ipv6/icmp/ratelimit", "0");
        }
    }

    fn names(&self) -> Vec<String> {
        let clients = (1..=self.clients).map(|n| self.c(n).0);
        clients.chain([self.net().0, self.srv().0, self.lan().0]).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in self.names() {
            remove_namespace(&name);
        }
        // A directory left behind on a failure would hide the failure itself if this panicked.
        let _ = fs::remove_dir_all(&self.dir);
        if let Some(rigged) = &self.rigged {
            let _ = fs::remove_dir_all(rigged);
        }
    }
}

/// A configuration file: keys (with their section, as in `tls.ca`) and their values in TOML.
#[derive(Clone, Default)]
pub struct Config(BTreeMap<String, String>);

impl Config {
    /// Sets a key, in place of what it was.
    pub fn set(mut self, key: &str, value: impl std::fmt::Display) -> Config {
        self.0.insert(key.to_owned(), value.to_string());
        self
    }

    /// Leaves a key out.
    pub fn without(mut self, key: &str) -> Config {
        self.0.remove(key);
        self
    }

    /// The line of a key, from 1.
    pub fn line_of(&self, key: &str) -> usize {
        1 + self.0.keys().position(|k| k == key).expect("a key that was set")
    }

    pub fn text(&self) -> String {
        self.0.iter().map(|(key, value)| format!("{key} = {value}\n")).collect()
    }
}

/// A network namespace.
#[derive(Clone, Debug)]
pub struct Namespace(pub String);

impl Namespace {
    /// Does `work` in this namespace. Sockets made there stay there, wherever they are used.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.0)).expect("the namespace");
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                setns(file, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                work()
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The kernel here forgets the connections it tracks, and how it translated their addresses.
    pub fn forget_connections(&self) {
        let fd = self.within(|| {
            socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkNetFilter,
            )
        });
        let fd = fd.expect("a netlink socket");
        // nlmsghdr: 20 bytes, IPCTNL_MSG_CT_DELETE of NFNL_SUBSYS_CTNETLINK, NLM_F_REQUEST and _ACK, number 1;
        // nfgenmsg: any family. Without a tuple it means all of them.
        let mut message = 20u32.to_ne_bytes().to_vec();
        message.extend([(1u16 << 8 | 2).to_ne_bytes(), 5u16.to_ne_bytes()].concat());
        message.extend([1u32.to_ne_bytes(), [0; 4], [0; 4]].concat());
        send(fd.as_raw_fd(), &message, MsgFlags::empty()).expect("ask for it");
        let mut answer = [0; 64];
        let len = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty()).expect("an answer");
        assert!(len >= 20 && answer[16..20] == [0; 4], "nlmsgerr: {:?}", &answer[..len]);
    }

    /// Runs a program that ends by itself, at the latest after a minute.
    pub fn run(&self, command: &[&str]) -> Output {
        Command::new("ip")
            .args(["netns", "exec", &self.0, "timeout", "60"])
            .args(command)
            .stdin(Stdio::null())
            .output()
            .expect("ip starts")
    }

    /// Runs a program that has to succeed, for its output.
    pub fn must(&self, command: &[&str]) -> String {
        let out = self.run(command);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(
            out.status.success(),
            "{command:?} in {}: {}\n{text}{}",
            self.0,
            out.status,
            String::from_utf8_lossy(&out.stderr)
        );
        text
    }

    /// Runs `ip` there, which has to succeed.
    pub fn ip(&self, args: &[&str]) -> String {
        let out = Command::new("ip").args(["-n", &self.0]).args(args).output().expect("ip starts");
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "ip {args:?} in {}: {error}", self.0);
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Processes in it.
    pub fn pids(&self) -> Vec<i32> {
        let out = Command::new("ip").args(["netns", "pids", &self.0]).output();
        let list = out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default();
        list.lines().filter_map(|line| line.trim().parse().ok()).collect()
    }

    /// Writes a file of /proc/sys as it is there.
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{name}");
        self.within(|| fs::write(&path, value)).unwrap_or_else(|e| panic!("{path}: {e}"));
    }

    /// Global addresses of a device, IPv4 first; none where the device is missing.
    pub fn addresses(&self, device: &str) -> Vec<IpAddr> {
        let out = Command::new("ip")
            .args(["-n", &self.0, "-o", "addr", "show", "dev", device, "scope", "global"])
            .output()
            .expect("ip starts");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let mut addresses: Vec<IpAddr> = text
            .lines()
            .filter_map(|line| line.split_whitespace().nth(3)?.split('/').next()?.parse().ok())
            .collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        addresses
    }

    /// Both families' routes in all tables, one a line, but for what the kernel keeps for link-local addresses.
    pub fn routes(&self) -> Vec<String> {
        let all = ["route", "show", "table", "all"];
        let text = self.ip(&all) + &self.ip(&[&["-6"][..], &all].concat());
        let local = |line: &&str| line.contains("fe80:") || line.starts_with("multicast ");
        let mut lines: Vec<String> =
            text.lines().filter(|line| !local(line)).map(|line| line.trim().to_owned()).collect();
        lines.sort();
        lines
    }

    /// Pings, and says whether every answer came. Large answers may be lost to ping's own small buffer on a busy
    /// machine: there are three tries.
    pub fn pings(&self, to: impl ToString, size: usize, count: u32) -> bool {
        let (to, size, count) = (to.to_string(), size.to_string(), count.to_string());
        (0..3).any(|_| {
            let out = self
                .run(&["ping", "-n", "-i", "0.02", "-c", &count, "-s", &size, "-W", "3", "-M", "dont", &to]);
            String::from_utf8_lossy(&out.stdout).contains(&format!("{count} received"))
        })
    }

    /// Says that no ping comes back, after one second.
    pub fn cannot_ping(&self, to: impl ToString) -> bool {
        let out = self.run(&["ping", "-n", "-c", "3", "-i", "0.2", "-W", "1", &to.to_string()]);
        String::from_utf8_lossy(&out.stdout).contains(" 0 received") || !out.status.success()
    }
}

/// Waits until `probe` gives a value.
pub fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Two lists of lines are the same; otherwise says what differs.
pub fn same_lines(before: &[String], after: &[String], what: &str) {
    let gone: Vec<&String> = before.iter().filter(|line| !after.contains(line)).collect();
    let new: Vec<&String> = after.iter().filter(|line| !before.contains(line)).collect();
    assert!(gone.is_empty() && new.is_empty(), "{what}\n gone: {gone:#?}\n  new: {new:#?}");
}

/// The address with the port all servers here use.
pub fn outer(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse().expect("an address"), 55555)
}

/// The outer IPv4 address of client `n`.
pub fn outer_v4(n: usize) -> String {
    format!("198.18.{}.2", wire_number(n))
}

/// The outer IPv6 address of client `n`.
pub fn outer_v6(n: usize) -> String {
    format!("2001:db8:{}::2", wire_number(n))
}

/// What the addresses on client `n`'s wire have in common; 100 is the server's.
fn wire_number(n: usize) -> usize {
    assert!((1..255).contains(&n), "room for 254 clients");
    if n < 100 { n } else { n + 1 }
}

/// An address.
pub fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

/// The binary under test: that of this build, or of the directory in `TUNGUARD_TEST_BINARIES`.
pub fn tunguard() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    PATH.get_or_init(|| {
        let others = std::env::var("TUNGUARD_TEST_BINARIES").map(|dir| format!("{dir}/tunguard"));
        others.unwrap_or_else(|_| env!("CARGO_BIN_EXE_tunguard").to_owned())
    })
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn ip_batch(options: &[&str], batch: &str) {
    let mut child = Command::new("ip")
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ip starts");
    child.stdin.take().expect("a pipe").write_all(batch.as_bytes()).expect("ip reads");
    let out = child.wait_with_output().expect("ip ends");
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "ip {options:?} -batch: {error}\n{batch}");
}

/// Whether labs can be made here; the answer is the same for all tests of a process.
fn available() -> Result<(), &'static str> {
    static ANSWER: OnceLock<Result<(), String>> = OnceLock::new();
    let answer = ANSWER.get_or_init(|| {
        // The list of skipped tests starts anew with each run.
        let _ = fs::remove_file(SKIPPED);
        if !nix::unistd::geteuid().is_root() {
            return Err("not root".to_owned());
        }
        if !Path::new("/dev/net/tun").exists() {
            return Err("no /dev/net/tun".to_owned());
        }
        for program in ["ip", "ping", "nft", "timeout"] {
            let found = std::env::var_os("PATH")
                .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()));
            if !found {
                return Err(format!("the program {program} is missing"));
            }
        }
        sweep();
        let probe = format!("tg{}-probe", std::process::id());
        let out = Command::new("ip").args(["netns", "add", &probe]).output().map_err(|e| e.to_string())?;
        if !out.status.success() {
            return Err(String::from_utf8_lossy(&out.stderr).trim().to_owned());
        }
        remove_namespace(&probe);
        for binary in ["tunguard-guard", "tunguard-worker"] {
            let path = Path::new(tunguard()).with_file_name(binary);
            assert!(path.exists(), "{} is missing: `cargo build --workspace` makes it", path.display());
        }
        Ok(())
    });
    answer.as_ref().copied().map_err(String::as_str)
}

/// Says so where it is seen, and in the list.
pub fn skipped(test: &str, why: &str) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
    // Not by eprintln!, which the test runner swallows.
    let _ = writeln!(std::io::stderr(), "SKIPPED: netns test {test}: {why} ({count} so far)");
    let file = File::options().create(true).append(true).open(SKIPPED);
    let _ = file.and_then(|mut file| writeln!(file, "{test}: {why}"));
}

/// Removes what test processes left that are no more.
fn sweep() {
    let in_use = |name: &str| {
        let pid = name.strip_prefix("tg").and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid);
        let Some(pid) = pid.filter(|pid| !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit())) else {
            return true;
        };
        // The number may be somebody else's by now, or a zombie's.
        let pid: i32 = pid.parse().unwrap_or(0);
        alive(pid) && field(pid, "Name").is_some_and(|name| name.starts_with("netns-"))
    };
    let names = |dir: &Path| -> Vec<String> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.filter_map(|e| e.file_name().into_string().ok()).filter(|name| !in_use(name)).collect()
    };
    for name in names(Path::new("/run/netns")) {
        remove_namespace(&name);
    }
    for dir in [std::env::temp_dir(), Path::new(tunguard()).with_file_name("rigged")] {
        for name in names(&dir) {
            let _ = fs::remove_dir_all(dir.join(name));
        }
    }
}

/// Ends the processes in a namespace of ours and deletes it.
pub fn remove_namespace(name: &str) {
    for pid in Namespace(name.to_owned()).pids() {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}

const SKIPPED: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/netns-skipped");
