//! The admin socket: whoever may open it says what he likes, in pieces, reads or doesn't, and hangs up.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tempfile::TempDir;
use tunguard::admin::{Admin, Question, document};
use tunguard::sys::poller::Poller;
use tunguard::time::Time;

use super::input::Input;

/// A few callers and what they do.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let directory = directory();
    let path = directory.path().join("tg0.sock");
    let mut admin = Admin::listen(&path, "server", |key| key).expect("listens");
    let poller = Poller::new(8).expect("an epoll set");
    let mut now = Time::default() + Duration::from_secs(1);
    let mut callers: Vec<(u64, UnixStream, Vec<u8>)> = Vec::new();
    let mut next = 0;
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        let step = input.u8();
        match step % 8 {
            0 if callers.len() < 20 => {
                let mut stream = UnixStream::connect(&path).expect("connects");
                stream.set_nonblocking(true).expect("a socket");
                admin.accept(&poller, now);
                // One too many is hung up on at once.
                if !matches!(stream.read(&mut [0]), Ok(0)) {
                    callers.push((next, stream, Vec::new()));
                    next += 1;
                }
            }
            1..4 if !callers.is_empty() => {
                let at = input.place(callers.len());
                let said = if step & 0x80 != 0 { b"status\n" as &[u8] } else { input.chunk() };
                let (key, stream, heard) = &mut callers[at];
                // It may have been hung up on.
                if stream.write(said).is_ok() {
                    heard.extend(said);
                }
                match admin.converse(*key, &poller) {
                    Some(Question::Status) => {
                        assert!(heard.starts_with(b"status"), "{heard:02x?} asks for no status");
                        let awaited = (0..u64::from(step >> 4 & 3)).collect::<HashSet<u64>>();
                        admin.wait_for(*key, awaited, now);
                    }
                    Some(Question::Reload) => {
                        assert!(heard.starts_with(b"reload"), "{heard:02x?} asks for no reload");
                        admin.answer(*key, document(&"done".into()), &poller);
                    }
                    None => {}
                }
            }
            4 => {
                let line = String::from_utf8_lossy(input.chunk()).into_owned();
                admin.tell(&line, &poller);
            }
            5 => admin.reported(u64::from(step >> 4)),
            6 if !callers.is_empty() => drop(callers.swap_remove(input.place(callers.len()))),
            _ => now = admin.deadline().filter(|_| step & 0x80 != 0).unwrap_or(now).max(now),
        }
        settle(&mut admin, &poller, now);
    }
    // Everybody who doesn't watch is answered or given up on in the end.
    now = now + Duration::from_secs(60);
    settle(&mut admin, &poller, now);
    settle(&mut admin, &poller, now);
    assert_eq!(admin.deadline(), None, "somebody is waited for for ever");
    for (_, mut stream, _) in callers {
        let mut bytes = [0; 4_096];
        while matches!(stream.read(&mut bytes), Ok(n) if n > 0) {}
    }
}

fn settle(admin: &mut Admin, poller: &Poller, now: Time) {
    for round in 0.. {
        assert!(round < 40, "an answer is due for ever");
        let Some(key) = admin.due(now, poller) else { return };
        admin.answer(key, document(&serde_json::json!({ "up": true })), poller);
    }
}

/// One for all inputs of this process.
fn directory() -> std::rc::Rc<TempDir> {
    thread_local! {
        static DIRECTORY: std::rc::Rc<TempDir> =
            std::rc::Rc::new(tempfile::tempdir().expect("a directory"));
    }
    DIRECTORY.with(std::rc::Rc::clone)
}

const MOST_STEPS: usize = 60;
