//! The server's private key is in one process, which signs for the others: it may die, hang and be replaced.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockaddrLike, SockaddrStorage, getsockname, send};
use nix::unistd::Pid;
use openssl::pkey::PKey;
use openssl::x509::X509;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tunguard::VERSION;
use tunguard::exit::Exit;
use tunguard::key_ipc::{
    HolderGuardEnd, HolderReply, HolderRequest, HolderSetup, KEY_HOLDER, MisuseGuardEnd, Signature, SignerEnd,
};
use tunguard::sys::seqpacket::{self, Channel, Incoming};
use tunguard::sys::{memfd, spawn};
use tunguard::tls::ToSign;
use tunguard::tls::server_key::KeyNames;
use tunguard::tls::signing::Hash;

use crate::certificates::{Wish, ed25519, key_pem, make, p384, pem, rsa4096, server_wish};
use crate::lab::{INNER_V4, Lab, SERVER_V4, eventually, ip, tunguard};
use crate::process::{Process, alive, children, field};
use crate::raw_client::Dialler;
use crate::traffic::Conversation;

#[test]
fn the_servers_key_is_in_the_key_holder_only() {
    let Some(lab) = Lab::new("keymem", 1) else { return };
    let file = lab.path("certs/gate.key");
    let text = fs::read_to_string(&file).expect("the server's key");
    for (key, files) in [(format!("'{}'", file.display()), true), (format!("'''\n{text}'''"), false)] {
        let server = lab.start_server(&lab.server().set("tls.key", key));
        let established = Dialler::new(&lab, 1).connect();
        // One that is about to shake hands, too.
        let _silent = Dialler::new(&lab, 1).tcp().expect("a connection");
        server.wait_for_children(2);
        let needles = traces(&text);
        let found = |pid: i32| needles.iter().any(|needle| holds(pid, needle));

        let holder = holder(&server);
        assert!(found(holder), "this test finds no key anywhere");
        for pid in children(server.pid()).into_iter().filter(|pid| *pid != holder) {
            assert!(!found(pid), "{:?} has the server's key", field(pid, "Name"));
        }
        // A text in the configuration is wiped, but the parser has had it: what is left of that isn't promised.
        assert!(!files || !found(server.pid()), "the guard has the server's key");

        let status = |name: &str| field(holder, name).expect(name);
        let uid = status("Uid");
        let worker = |pid: &i32| field(*pid, "Uid").expect("a user");
        assert!(!uid.contains("\t0"), "{uid}");
        assert!(
            server.children().iter().all(|pid| worker(pid) != uid),
            "the key holder's user is a worker's"
        );
        assert_eq!(
            (&status("CapPrm")[..], &status("CapBnd")[..]),
            (&"0".repeat(16)[..], &"0".repeat(16)[..])
        );
        assert_ne!(status("VmLck"), "0 kB");
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).expect("a namespace");
        assert_ne!(namespace(holder), namespace(server.pid()));
        assert_eq!(fs::read_link(format!("/proc/{holder}/root")).ok(), Some("/run/tunguard/empty".into()));
        drop(established);
    }
}

#[test]
fn a_key_holder_may_die_at_any_time() {
    let Some(lab) = Lab::new("killholder", 2) else { return };
    let server = lab.start_server(&lab.server());
    let _one = lab.start_client(1, &lab.client(1));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(10_000);
    let worker = server.wait_for_children(1);

    // While somebody shakes hands again and again.
    let dialler = Dialler::new(&lab, 2);
    let done = AtomicBool::new(false);
    let (got_in, kept_out) = thread::scope(|scope| {
        let dialling = scope.spawn(|| {
            let mut tries = (0, 0);
            while !done.load(Ordering::Relaxed) {
                match dialler.control() {
                    Ok(_) => tries.0 += 1,
                    Err(_) => tries.1 += 1,
                }
            }
            tries
        });
        let mut last = 0;
        for _ in 0..8 {
            talk.exchange(10_000);
            last = eventually("another key holder", || holders(&server).into_iter().find(|pid| *pid != last));
            thread::sleep(Duration::from_millis(u64::from(last.unsigned_abs()) % 60));
            kill(Pid::from_raw(last), Signal::SIGKILL).expect("kill the key holder");
            eventually("its end", || (!alive(last)).then_some(()));
        }
        done.store(true, Ordering::Relaxed);
        dialling.join().expect("the dialling thread")
    });
    eprintln!("{got_in} handshakes, and {kept_out} that failed");
    // Sessions have nothing to do with it, and whoever comes now gets in.
    talk.exchange(1_000_000);
    assert!(alive(worker[0]));
    let _two = lab.start_client(2, &lab.client(2));
    assert_eq!(holders(&server).len(), 1);
}

#[test]
fn a_key_holder_that_hangs_costs_handshakes_and_no_session() {
    let Some(lab) = Lab::new("hangholder", 1) else { return };
    let mut server = lab.start_server(&lab.server());
    let _one = lab.start_client(1, &lab.client(1));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(10_000);
    let stopped = holder(&server);
    kill(Pid::from_raw(stopped), Signal::SIGSTOP).expect("stop the key holder");
    assert!(Dialler::new(&lab, 1).control().is_err(), "who has signed this?");
    server.wait_for_log("ask the key holder for a signature: it doesn't answer");
    talk.exchange(1_000_000);
    kill(Pid::from_raw(stopped), Signal::SIGCONT).expect("let it go on");
    Dialler::new(&lab, 1).control().expect("a handshake");
}

#[test]
fn a_new_key_is_taken_over_and_a_wrong_one_is_not() {
    let Some(lab) = Lab::new("newkey", 1) else { return };
    lab.tunguard(&["pki", "server", "other", "--san", SERVER_V4]);
    let put = |from: &str, to: &str| replace(&lab.path(from), &lab.path(to));
    put("certs/gate.pem", "own.pem");
    put("certs/gate.key", "own.key");
    let config = lab.server().set("tls.cert", "'own.pem'").set("tls.key", "'own.key'");
    let mut server = lab.start_server(&config);
    let shown = || {
        let control = Dialler::new(&lab, 1).control().expect("a handshake");
        control.ssl().peer_certificate().expect("the server's certificate").to_pem().expect("PEM")
    };
    let first = |name: &str| {
        let text = fs::read(lab.path(name)).expect("a certificate");
        X509::from_pem(&text).expect("a certificate").to_pem().expect("PEM")
    };
    let (gate, other) = (first("certs/gate.pem"), first("certs/other.pem"));
    assert_eq!(shown(), gate);
    let old = holder(&server);

    // Half of the exchange: the key is that of the next certificate.
    put("certs/other.key", "own.key");
    server.signal(Signal::SIGHUP);
    server.wait_for_log("own.key (tls.key) doesn't belong to the certificate");
    assert_eq!((shown() == gate, holder(&server)), (true, old), "the old one stays");
    // Even if it has to be started again now.
    kill(Pid::from_raw(old), Signal::SIGKILL).expect("kill the key holder");
    eventually("another key holder", || holders(&server).into_iter().find(|pid| *pid != old));
    assert_eq!(shown(), gate);
    lab.write("junk", "junk");
    put("junk", "own.key");
    server.signal(Signal::SIGHUP);
    server.wait_for_log("there is no PEM private key in it");
    assert_eq!(shown(), gate);

    // The other half.
    put("certs/other.key", "own.key");
    put("certs/other.pem", "own.pem");
    let old = holder(&server);
    server.signal(Signal::SIGHUP);
    server.wait_for_log("are read again");
    assert_eq!(shown(), other);
    eventually("the old key holder ends", || (!alive(old)).then_some(()));
    assert_eq!(holders(&server).len(), 1);

    // Written over in place, the key is gone for a key holder that has to be started.
    fs::write(lab.path("own.key"), "junk").expect("written");
    kill(holder_pid(&server), Signal::SIGKILL).expect("kill the key holder");
    server.wait_for_log("start the key holder again");
    put("certs/other.key", "own.key");
    server.signal(Signal::SIGHUP);
    eventually("a key holder", || holders(&server).first().copied());
    assert_eq!(shown(), other);
}

#[test]
fn every_kind_of_key_serves_or_is_refused_with_its_name() {
    let Some(lab) = Lab::new("keykinds", 1) else { return };
    let ca = crate::certificates::Pair {
        cert: X509::from_pem(&fs::read(lab.path("certs/ca.pem")).expect("the CA")).expect("the CA"),
        key: PKey::private_key_from_pem(&fs::read(lab.path("certs/ca.key")).expect("its key"))
            .expect("its key"),
    };
    let config = lab.server().set("tls.cert", "'own.pem'").set("tls.key", "'own.key'").without("tls.crl");
    for (kind, key) in [("RSA", rsa4096 as crate::certificates::MakeKey), ("P-384", p384)] {
        let own = make(&Wish { key, ip: &[SERVER_V4], ..server_wish() }, Some(&ca));
        lab.write("own.pem", pem(&own));
        lab.write("own.key", key_pem(&own).as_slice());
        let server = lab.start_server(&config);
        Dialler::new(&lab, 1).control().unwrap_or_else(|f| panic!("{kind}: {f}"));
        drop(server);
    }
    let own = make(&Wish { key: ed25519, ip: &[SERVER_V4], ..server_wish() }, Some(&ca));
    lab.write("own.pem", pem(&own));
    lab.write("own.key", key_pem(&own).as_slice());
    let mut server = lab.try_server(&config);
    assert_eq!(server.exit(), Exit::KeyUnreadable as i32, "{}", server.log());
    for part in ["own.key", "Ed25519", "tunguard pki server"] {
        assert!(server.log().contains(part), "{}", server.log());
    }
}

#[test]
fn a_worker_that_cheats_the_key_holder_is_killed() {
    let Some(lab) = Lab::new("cheat", 1) else { return };
    // Its source would be refused for a while.
    let mut server = lab.start_server(&lab.server().set("penalty", "'off'"));
    server.breaks_rules();
    let before = holder(&server);
    let _silent = Dialler::new(&lab, 1).tcp().expect("a connection");
    let worker = server.wait_for_children(1)[0];
    let signing = eventually("the worker's channel to the key holder", || signing_channel(worker));
    send(signing.as_raw_fd(), b"no request", MsgFlags::empty()).expect("said in the worker's name");
    server.wait_for_log("broke the rules: to the key holder: a message that doesn't decode");
    eventually("the worker's end", || (!alive(worker)).then_some(()));
    // The key holder has more to do.
    Dialler::new(&lab, 1).control().expect("a handshake");
    assert_eq!(holder(&server), before);
}

#[test]
fn a_channel_gives_one_signature_and_garbage_is_told() {
    let Some(lab) = Lab::new("onesig", 1) else { return };
    let (guard, misuse, holder) = start_holder(&lab);
    let ask = |number: u64| -> SignerEnd {
        let (theirs, ours) = seqpacket::pair::<(), ()>().expect("a pair");
        assert!(guard.send(&HolderRequest::Serve { channel: number }, &[theirs.as_fd()]).expect("sent"));
        SignerEnd::from_fd(ours)
    };
    let wanted = ToSign { hash: Hash::Sha256, transcript: vec![7; 32] };

    let channel = ask(0);
    assert!(channel.send(&wanted, &[]).expect("sent"));
    assert!(matches!(message(&channel), Some(Signature::Made(made)) if !made.is_empty()));
    assert!(channel.send(&wanted, &[]).is_err(), "it is closed");
    assert!(message(&channel).is_none(), "a second signature");
    // Two requests at once. (A socket that is closed over unread messages takes its answers along.)
    let channel = ask(1);
    assert!(channel.send(&wanted, &[]).expect("sent"));
    let _ = channel.send(&wanted, &[]);
    let made = std::iter::from_fn(|| message(&channel)).count();
    assert!(made <= 1, "{made} signatures");

    for (number, transcript, hash) in [(2, vec![7; 31], Hash::Sha256), (3, vec![7; 48], Hash::Sha384)] {
        let channel = ask(number);
        assert!(channel.send(&ToSign { hash, transcript }, &[]).expect("sent"));
        assert!(message(&channel).is_none(), "signed for channel {number}");
        let report = message(&misuse).expect("a report");
        assert_eq!(
            (report.channel, &report.what[..]),
            (number, "a signature that no handshake with this key needs")
        );
    }
    let channel = ask(4);
    send(channel.as_fd().as_raw_fd(), b"junk", MsgFlags::empty()).expect("sent");
    assert!(message(&channel).is_none());
    assert_eq!(message(&misuse).expect("a report").channel, 4);

    // Without a guard it serves what is open, and ends.
    let channel = ask(5);
    drop(guard);
    assert!(channel.send(&wanted, &[]).expect("sent"));
    assert!(matches!(message(&channel), Some(Signature::Made(_))));
    let mut holder = holder;
    assert!(holder.wait().expect("our child").success());
}

/// The key holder of a guard that is this test, which is its parent.
fn start_holder(lab: &Lab) -> (HolderGuardEnd, MisuseGuardEnd, std::process::Child) {
    let root = lab.path("empty");
    fs::create_dir(&root).expect("a directory");
    let names = KeyNames { key: "gate.key".to_owned(), cert: "gate.pem".to_owned() };
    let setup = HolderSetup {
        guard: std::process::id() as i32,
        uid: 99_999,
        root,
        cert: fs::read(lab.path("certs/gate.pem")).expect("a certificate"),
        names,
        channels: 4,
        landlock: None,
    };
    let setup = memfd::sealed("setup", &setup.encode()).expect("a memory file");
    let key = OwnedFd::from(File::open(lab.path("certs/gate.key")).expect("a key"));
    let (guard, theirs) = seqpacket::pair().expect("a pair");
    let (misuse, told) = seqpacket::pair().expect("a pair");
    let fds = [theirs.as_fd(), setup.as_fd(), key.as_fd(), told.as_fd()];
    let program = Path::new(tunguard()).with_file_name("tunguard-worker");
    let child = spawn::spawn(&program, &[VERSION, KEY_HOLDER], &fds).expect("starts");
    assert_eq!(message(&guard), Some(HolderReply::Ready));
    (guard, misuse, child)
}

/// The next message, or `None` at the end.
fn message<Tx: serde::Serialize, Rx: serde::de::DeserializeOwned>(channel: &Channel<Tx, Rx>) -> Option<Rx> {
    eventually("a message or the end", || match channel.receive(false) {
        Ok(Incoming::Message(message, _)) => Some(Some(message)),
        Ok(Incoming::Nothing) => None,
        Ok(Incoming::Closed) | Err(_) => Some(None),
    })
}

pub fn holders(server: &Process) -> Vec<i32> {
    let mut found = children(server.pid());
    found.retain(|pid| alive(*pid) && field(*pid, "Name").as_deref() == Some("tg-keyholder"));
    found
}

fn holder(server: &Process) -> i32 {
    eventually("the key holder", || match holders(server)[..] {
        [only] => Some(only),
        _ => None,
    })
}

fn holder_pid(server: &Process) -> Pid {
    Pid::from_raw(holder(server))
}

/// Puts a copy of a file in the place of another, at once.
fn replace(from: &Path, to: &Path) {
    let next: PathBuf = to.with_extension("next");
    fs::copy(from, &next).expect("copied");
    fs::rename(&next, to).expect("renamed");
}

/// What of a key in PEM can be found in memory: its number, either way round, and each line of the text.
fn traces(text: &str) -> Vec<Vec<u8>> {
    let key = PKey::private_key_from_pem(text.as_bytes()).and_then(|key| key.ec_key()).expect("a key");
    let number = key.private_key().to_vec();
    let reversed = number.iter().rev().copied().collect();
    let lines =
        text.lines().filter(|line| line.len() > 40 && !line.contains("---")).map(|l| l.as_bytes().to_vec());
    // The first line has the beginning of the number in it; later ones have the public key, which is everybody's.
    [number, reversed].into_iter().chain(lines.take(1)).collect()
}

/// Whether `needle` is in the memory of a process.
fn holds(pid: i32, needle: &[u8]) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its memory");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("its memory");
    maps.lines().any(|line| {
        let mut words = line.split(' ');
        let (Some(range), Some(mode)) = (words.next(), words.next()) else { return false };
        if !mode.starts_with('r') || line.ends_with("[vvar]") || line.ends_with("[vsyscall]") {
            return false;
        }
        let (from, to) = range.split_once('-').expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("a number");
        let (from, to) = (number(from), number(to));
        let mut bytes = vec![0; (to - from) as usize];
        // What can't be read isn't there (pages beyond a file's end).
        let read = memory.read_at(&mut bytes, from).unwrap_or(0);
        contains(&bytes[..read], needle)
    })
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|byte| *byte == needle[0]) {
        from += at;
        if bytes[from..].starts_with(needle) {
            return true;
        }
        from += 1;
    }
    false
}

/// A copy of a worker's channel to the key holder: it came right behind its client's connection.
fn signing_channel(worker: i32) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(worker)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let copy = |number: i32| pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok();
    let inet = |fd: &OwnedFd| {
        let family = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(|name| name.family());
        matches!(family, Some(AddressFamily::Inet | AddressFamily::Inet6))
    };
    (field(worker, "Name").as_deref() == Some("tunguard-worker")).then_some(())?;
    let connection = (3..24).find(|number| copy(*number).as_ref().is_some_and(inet))?;
    copy(connection + 1)
}
