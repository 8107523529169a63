//! Logs that nobody reads, and that nobody can write (row 14 of the fault matrix): what is lost is lines.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tunguard::exit::Exit;

use crate::lab::{INNER_V4, Lab, eventually, ip, same_lines};
use crate::resume::cut;
use crate::traffic::Conversation;

/// Fault: the server's standard error is a full pipe that nobody reads. Pass: it starts, serves, answers for its status
/// and reads its certificates again, no session waits for a line, and it ends in time.
#[test]
fn a_server_whose_log_nobody_reads_goes_on() {
    let Some(lab) = Lab::new("srvpipe", 2) else { return };
    let pipe = FullPipe::new(&lab);
    server_goes_on(&lab, &pipe.launcher);
}

/// Fault: the server's standard error is a full disk. Pass: as above.
#[test]
fn a_server_whose_log_is_full_goes_on() {
    let Some(lab) = Lab::new("srvfull", 2) else { return };
    server_goes_on(&lab, &to("/dev/full"));
}

/// Fault: the client's standard error is a full pipe that nobody reads. Pass: it has a tunnel, moves on to another control
/// connection, answers for its status, and puts the host back when it is told to stop.
#[test]
fn a_client_whose_log_nobody_reads_goes_on() {
    let Some(lab) = Lab::new("clipipe", 1) else { return };
    let pipe = FullPipe::new(&lab);
    client_goes_on(&lab, &pipe.launcher);
}

/// Fault: the client's standard error is a full disk. Pass: as above, and an error has its exit code, if no words.
#[test]
fn a_client_whose_log_is_full_goes_on() {
    let Some(lab) = Lab::new("clifull", 1) else { return };
    let launcher = to("/dev/full");
    client_goes_on(&lab, &launcher);
    let launcher: Vec<&str> = launcher.iter().map(String::as_str).collect();
    let mut wrong = lab.try_client_under(&launcher, 1, &lab.client(1).set("tls.key", "'certs/nobody.key'"));
    assert_eq!(wrong.exit(), Exit::KeyUnreadable as i32);
}

/// Fault: the service manager reads nothing, and its socket is full. Pass: the server starts and serves, and a stop says
/// goodbye and ends.
#[test]
fn a_server_whose_service_manager_does_not_read_goes_on() {
    let Some(lab) = Lab::new("deaf", 1) else { return };
    let path = lab.path("notify");
    let _deaf = UnixDatagram::bind(&path).expect("binds");
    let other = UnixDatagram::unbound().expect("a socket");
    other.set_nonblocking(true).expect("doesn't block");
    while other.send_to(b"full", &path).is_ok() {}
    let manager = format!("NOTIFY_SOCKET={}", path.display());
    let mut server = lab.try_server_under(&["env", &manager], &lab.server());
    server.eventually("the server answers", || lab.try_status().map(drop));
    let mut client = lab.start_client(1, &lab.client(1));
    assert_eq!(server.stop(), 0, "{}", server.log());
    assert_eq!(server.log().matches("can't tell the service manager").count(), 2, "{}", server.log());
    client.wait_for_log("the server shut down");
}

fn server_goes_on(lab: &Lab, launcher: &[String]) {
    let launcher: Vec<&str> = launcher.iter().map(String::as_str).collect();
    let mut server = lab.try_server_under(&launcher, &lab.server());
    server.eventually("the server answers", || lab.try_status().map(drop));
    let _one = lab.start_client(1, &lab.client(1));
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    talk.exchange(10_000);
    for _ in 0..10 {
        server.signal(Signal::SIGHUP);
        talk.exchange(10_000);
    }
    let two = lab.start_client(2, &lab.client(2));
    drop(two);
    assert!(lab.session("c1").is_some());
    let begun = Instant::now();
    assert_eq!(server.stop(), 0);
    assert!(begun.elapsed() < Duration::from_secs(15), "it took {:?}", begun.elapsed());
    assert_eq!(lab.srv().pids(), Vec::<i32>::new(), "processes are left");
}

fn client_goes_on(lab: &Lab, launcher: &[String]) {
    let launcher: Vec<&str> = launcher.iter().map(String::as_str).collect();
    let _server = lab.start_server(&lab.server().set("push.routes", "['0.0.0.0/0']").set("nat", true));
    lab.wait_for_carrier(1);
    let routes = lab.c(1).routes();
    let mut client = lab.try_client_under(&launcher, 1, &lab.client(1));
    lab.wait_for_tunnel(1, &mut client);
    let mut talk = Conversation::start(&lab.c(1), &lab.srv(), ip(INNER_V4));
    for _ in 0..5 {
        let first = lab.session("c1").expect("a session")["session"].clone();
        cut(lab);
        eventually("another session", || lab.session("c1").filter(|session| session["session"] != first));
        talk.exchange(100_000);
    }
    let begun = Instant::now();
    assert_eq!(client.stop(), 0);
    assert!(begun.elapsed() < Duration::from_secs(15), "it took {:?}", begun.elapsed());
    same_lines(&routes, &lab.c(1).routes(), "the client's routes");
}

/// A pipe that is full from the start, and stays so.
struct FullPipe {
    _ends: File,
    launcher: Vec<String>,
}

impl FullPipe {
    fn new(lab: &Lab) -> FullPipe {
        let path = lab.path("pipe");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).expect("a named pipe");
        // Both ends at once: nobody waits for the other, and there is always a reader, who doesn't read.
        let both = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let mut ends = both.expect("both ends");
        let full = (0..1_000).find_map(|_| ends.write(&[b'.'; 4_096]).err()).expect("a pipe has an end");
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        while ends.write(b".").is_ok() {}
        FullPipe { _ends: ends, launcher: to(&path.display().to_string()) }
    }
}

/// Turns into the program that it precedes, with this standard error.
fn to(log: &str) -> Vec<String> {
    ["sh", "-c", "exec 2>\"$0\" \"$@\"", log].map(str::to_owned).to_vec()
}
