//! The wall clock jumps while everything runs (row 15 of the fault matrix): by an hour and by ten years, in both
//! directions. Timers go by `CLOCK_BOOTTIME`; only the validity of certificates moves.
//!
//! The machine's clock isn't touched: tests/netns/clock.c is loaded into the programs by an /etc/ld.so.preload of their
//! own, as the environment of workers and tunnel processes is empty.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use tunguard::exit::Exit;

use crate::lab::{INNER_V4, Lab, eventually, ip};
use crate::resume::cut;
use crate::traffic::Conversation;

/// Fault: the server's wall clock jumps by an hour and by ten years, forth and back. Pass: a session goes on, loses no
/// byte and renews its keys in time; new connections are judged by the clock as it is; a session whose certificate is
/// over ends within the minute and says so; with the right time the client is back by itself.
#[test]
fn a_servers_clock_that_jumps_moves_nothing_but_validity() {
    let Some(lab) = Lab::new("clocksrv", 2) else { return };
    let clock = Clock::new(&lab, "srv");
    let config = lab.server().set("data.rekey", "'2s'");
    let mut server = lab.try_server_under(&clock.launcher(), &config);
    server.eventually("the server answers", || lab.try_status().map(drop));
    let mut client = lab.start_client(1, &lab.client(1));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    let first = lab.session("c1").expect("a session")["session"].clone();
    for (shift, refused) in [(HOUR, false), (-HOUR, true), (-10 * YEAR, true)] {
        clock.set(shift);
        goes_on(&lab, &mut talk);
        assert_eq!(lab.session("c1").expect("a session")["session"], first, "after a jump by {shift} s");
        let mut other = lab.try_client(2, &lab.client(2));
        if refused {
            // What the server's alert can say of it; its log has the date.
            assert_eq!(other.exit(), Exit::CertificateForeign as i32, "{shift} s: {}", other.log());
            assert!(other.log().contains("not valid yet by the clock there"), "{}", other.log());
            server.wait_for_log("is not valid before");
        } else {
            lab.wait_for_tunnel(2, &mut other);
            assert_eq!(other.stop(), 0);
        }
    }
    clock.set(10 * YEAR);
    let begun = Instant::now();
    while lab.session("c1").is_some() {
        assert!(begun.elapsed() < Duration::from_secs(150), "an expired certificate's session goes on");
        thread::sleep(Duration::from_millis(500));
    }
    server.wait_for_log("expired");
    client.wait_for_log("expired");
    clock.set(0);
    lab.wait_for_tunnel(1, &mut client);
    Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4)).exchange(1_000_000);
}

/// Fault: the client's wall clock jumps by an hour and by ten years, forth and back. Pass: the session goes on, loses no
/// byte and renews its keys in time; a lost control connection isn't made anew with a certificate that is over, while
/// packets go on; with the right time it is, by itself.
#[test]
fn a_clients_clock_that_jumps_moves_nothing_but_validity() {
    let Some(lab) = Lab::new("clockcli", 1) else { return };
    let clock = Clock::new(&lab, "c1");
    let _server = lab.start_server(&lab.server());
    let config = lab.client(1).set("data.rekey", "'2s'");
    lab.wait_for_carrier(1);
    let mut client = lab.try_client_under(&clock.launcher(), 1, &config);
    lab.wait_for_tunnel(1, &mut client);
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    for shift in [HOUR, -HOUR, -10 * YEAR, 10 * YEAR] {
        clock.set(shift);
        goes_on(&lab, &mut talk);
    }
    let first = lab.session("c1").expect("a session")["session"].clone();
    cut(&lab);
    client.wait_for_log("expired");
    talk.exchange(100_000);
    assert_eq!(lab.session("c1").expect("a session")["session"], first);
    clock.set(0);
    eventually("another session", || {
        let session = lab.session("c1")?;
        (session["session"] != first && session["control"] != "lost").then_some(())
    });
    talk.exchange(100_000);
    assert_eq!(client.stop(), 0);
}

/// The session carries, and has new keys every two seconds: two more times from now on.
fn goes_on(lab: &Lab, talk: &mut Conversation) {
    let epoch = || lab.session("c1").and_then(|s| s["epoch"].as_u64());
    let before = epoch().expect("a session");
    talk.exchange(100_000);
    eventually("keys are renewed", || {
        talk.exchange(1_000);
        epoch().filter(|now| *now >= before + 2)
    });
    assert!(talk_is_quick(talk), "it works, but slowly");
}

/// No timer went off that a jump had made due: a round trip inside takes far less than a second.
fn talk_is_quick(talk: &mut Conversation) -> bool {
    (0..10).any(|_| {
        let begun = Instant::now();
        talk.exchange(1_000);
        begun.elapsed() < Duration::from_millis(500)
    })
}

/// The wall clock of one program and those it starts.
struct Clock {
    etc: PathBuf,
    shift: File,
}

impl Clock {
    fn new(lab: &Lab, name: &str) -> Clock {
        let library = lab.path("clock.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/netns/clock.c");
        let built =
            Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).status();
        assert!(built.expect("a C compiler").success(), "{} doesn't compile", source.display());
        for file in ["passwd", "group", "nsswitch.conf"] {
            let content = fs::read(Path::new("/etc").join(file)).unwrap_or_default();
            lab.write(&format!("etc-{name}/{file}"), content);
        }
        lab.write(&format!("etc-{name}/resolv.conf"), "");
        lab.write(&format!("etc-{name}/ld.so.preload"), format!("{}\n", library.display()));
        let shift = lab.write(&format!("etc-{name}/clock-shift"), 0i64.to_ne_bytes());
        let shift = File::options().write(true).open(shift).expect("the shift");
        Clock { etc: lab.path(&format!("etc-{name}")), shift }
    }

    /// Turns into the program that it precedes.
    fn launcher(&self) -> [&str; 4] {
        // `ip netns exec` gives each program a mount namespace of its own.
        const SCRIPT: &str = "mount --bind \"$0\" /etc && exec \"$@\"";
        ["sh", "-c", SCRIPT, self.etc.to_str().expect("a path in UTF-8")]
    }

    /// Ahead of the machine's by so many seconds.
    fn set(&self, seconds: i64) {
        self.shift.write_all_at(&seconds.to_ne_bytes(), 0).expect("set the clock");
    }
}

const HOUR: i64 = 3_600;
const YEAR: i64 = 365 * 86_400;
