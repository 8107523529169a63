//! What our processes say to each other: a process that was taken over says anything. What decodes is sent on as the
//! same message, and what doesn't is refused.

use std::cell::RefCell;
use std::fmt::Debug;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{MsgFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tunguard::client::ipc as client;
use tunguard::ipc as server;
use tunguard::sys::seqpacket::{Channel, Incoming, MAX_MESSAGE, pair};

use super::input::Input;

/// The kind of channel, and bytes that came on it.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 7 {
        0 => hear::<server::Request>(input.rest()),
        1 => hear::<server::Reply>(input.rest()),
        2 => hear::<server::NurseryRequest>(input.rest()),
        3 => hear::<server::NurseryReply>(input.rest()),
        4 => hear::<client::Request>(input.rest()),
        5 => hear::<client::Reply>(input.rest()),
        _ => phases(&mut input),
    }
}

fn hear<T: Serialize + DeserializeOwned + Debug + PartialEq>(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(MAX_MESSAGE + 1)];
    if bytes.is_empty() {
        return;
    }
    let (theirs, ours) = ends::<T>();
    sendmsg::<()>(theirs.as_fd().as_raw_fd(), &[IoSlice::new(bytes)], &[], MsgFlags::empty(), None)
        .expect("sends");
    let Ok(Incoming::Message(message, fds)) = ours.receive(false) else { return };
    assert!(fds.is_empty());
    // Shown where it is out of place.
    assert!(!format!("{message:?}").is_empty());
    assert!(ours.send(&message, &[]).expect("sends"));
    match theirs.receive(false) {
        Ok(Incoming::Message(again, _)) => assert_eq!(again, message),
        other => panic!("{message:?} came back as {other:?}"),
    }
}

/// What a tunnel process may say when: whatever it says, one dial is under way at a time, nothing is set up for one that
/// has no connection, and nothing is heard of one that said its last word.
fn phases(input: &mut Input<'_>) {
    use client::{Phase, Request, Verdict};
    let mut phase = Phase::Fresh;
    let (mut dialling, mut connected, mut stopping, mut ended) = (false, false, false, false);
    while !input.is_empty() {
        let request = match input.u8() % 8 {
            0 => Request::Dial { remote: 0 },
            1 => Request::Ticket(client::Ticket {
                server_name: String::new(),
                session: tunguard::tls::SavedSession::from_bytes(vec![1]),
                until: 0,
            }),
            2 => Request::Report(Box::default()),
            3 => Request::Progress(client::Progress::Established),
            4 => Request::Ended { failure: None, permanent: false },
            // What the supervisor knows itself.
            5 if dialling => {
                let made = input.u8() & 1 != 0;
                phase = phase.dialled(made);
                (dialling, connected) = (false, connected || made);
                continue;
            }
            6 if !ended => {
                (phase, stopping) = (Phase::Stopping, true);
                continue;
            }
            _ => Request::Log { level: 3, text: String::new() },
        };
        let verdict = phase.allows(&request);
        if ended {
            assert_eq!(verdict, Verdict::Violation);
        }
        if verdict != Verdict::Allowed {
            continue;
        }
        match request {
            Request::Dial { .. } => {
                assert!(!dialling && !stopping, "two dials");
                (phase, dialling) = (phase.dialling(), true);
            }
            Request::Ticket(_) => assert!(connected && !stopping),
            Request::Progress(_) => assert!(connected || stopping),
            Request::Ended { .. } => (phase, ended) = (Phase::Ended, true),
            _ => {}
        }
    }
}

/// One pair of sockets for all inputs: a system call less for each.
fn ends<T: Serialize + DeserializeOwned>() -> (Channel<T, T>, Channel<T, T>) {
    thread_local! {
        static ENDS: RefCell<Option<[Channel<(), ()>; 2]>> = const { RefCell::new(None) };
    }
    ENDS.with_borrow_mut(|ends| {
        let [a, b] = ends.get_or_insert_with(|| {
            let (a, b) = pair::<(), ()>().expect("a socket pair");
            [a, Channel::from_fd(b)]
        });
        let copy =
            |end: &Channel<(), ()>| Channel::from_fd(end.as_fd().try_clone_to_owned().expect("a descriptor"));
        (copy(a), copy(b))
    })
}
