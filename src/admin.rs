//! An admin socket, of a server's guard or a client's supervisor: one line asks. `status` and `reload` are answered by one
//! JSON document; `watch` by a JSON document a line, for each thing that happens.
//!
//! ```text
//!   accept --> converse --> wait_for --> due --> answer --> (hung up)
//!                  |
//!                  +------> tell, tell, tell ...
//! ```
//! Who has the answer may have to ask other processes first, and doesn't wait for them for long. Conversations are
//! bounded in number, bytes and time.

use std::collections::HashSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::exit::{Exit, Failure, Outcome};
use crate::sys::poller::{Interest, Poller};
use crate::time::Time;

/// The socket and the conversations on it.
pub struct Admin {
    path: PathBuf,
    /// The listening socket.
    pub listener: UnixListener,
    /// A conversation's token in the epoll set, by its key.
    token: fn(u64) -> u64,
    next: u64,
    conversations: Vec<Conversation>,
}

/// What somebody wants of the socket's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Its status: [`Admin::wait_for`] comes next.
    Status,
    /// That it reads its configuration again: [`Admin::answer`] comes next, however long it takes.
    Reload,
}

struct Conversation {
    key: u64,
    stream: UnixStream,
    question: Vec<u8>,
    /// It has asked, and its answer is to come.
    asked: bool,
    /// It sends nothing more.
    silent: bool,
    /// Processes whose report is awaited, and how long.
    awaited: HashSet<u64>,
    until: Option<Time>,
    answer: Vec<u8>,
    /// It wants to hear of what happens.
    watches: bool,
    /// Gives up on a peer that neither asks nor reads.
    deadline: Time,
}

impl Admin {
    /// Listens on `path`, for root only. A socket that a dead process left is replaced. `who` listens, as a noun.
    ///
    /// Errors: [`Exit::DeviceInUse`] where another one answers on it.
    pub fn listen(path: &Path, who: &str, token: fn(u64) -> u64) -> Outcome<Admin> {
        let failed = |e| Failure::system(format!("listen on the socket {}", path.display()), e);
        if UnixStream::connect(path).is_ok() {
            let text =
                format!("another {who} answers on {}: stop it, or set another `socket`", path.display());
            return Err(Failure::new(Exit::DeviceInUse, text));
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        if fs::symlink_metadata(path).is_ok_and(|m| !m.file_type().is_socket()) {
            let text = format!("socket = {:?} is there and no socket: remove it, or set another", path);
            return Err(Failure::usage(text));
        }
        match fs::remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Admin { path: path.to_owned(), listener, token, next: 0, conversations: Vec::new() })
    }

    /// When the next conversation has to go on.
    pub fn deadline(&self) -> Option<Time> {
        let waiting = self.conversations.iter().filter(|c| c.has_deadline());
        waiting.map(|c| c.until.unwrap_or(c.deadline).min(c.deadline)).min()
    }

    /// Takes in somebody who wants to ask.
    pub fn accept(&mut self, poller: &Poller, now: Time) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.conversations.len() >= MAX_CONVERSATIONS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let key = self.next;
            self.next += 1;
            if poller.add(stream.as_fd(), (self.token)(key), Interest::Read).is_err() {
                continue;
            }
            self.conversations.push(Conversation {
                key,
                stream,
                question: Vec::new(),
                asked: false,
                silent: false,
                awaited: HashSet::new(),
                until: None,
                answer: Vec::new(),
                watches: false,
                deadline: now + PATIENCE,
            });
        }
    }

    /// A conversation's socket is ready. What is asked for, if it is the owner's to answer.
    pub fn converse(&mut self, key: u64, poller: &Poller) -> Option<Question> {
        let at = self.conversations.iter().position(|c| c.key == key)?;
        let conversation = &mut self.conversations[at];
        if !conversation.answer.is_empty() {
            self.say(at, poller);
            return None;
        }
        let watchers = self.conversations.iter().filter(|c| c.watches).count();
        let reloaders = self.conversations.iter().filter(|c| c.takes_its_time()).count();
        let conversation = &mut self.conversations[at];
        let mut bytes = [0; MAX_QUESTION];
        match conversation.stream.read(&mut bytes) {
            // It has asked, and sends nothing more: the answer is on its way, and next is heard that nobody is there.
            Ok(0) if conversation.asked && !conversation.silent => {
                conversation.silent = true;
                let (fd, token) = (conversation.stream.as_fd(), (self.token)(key));
                let _ = poller.modify(fd, token, Interest::Nothing);
                return None;
            }
            Ok(0) => {
                self.hang_up(at, poller);
                return None;
            }
            Ok(n) => conversation.question.extend(&bytes[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return None,
            Err(_) => {
                self.hang_up(at, poller);
                return None;
            }
        }
        match conversation.question.iter().position(|b| *b == b'\n') {
            Some(end) if &conversation.question[..end] == b"status" && !conversation.asked => {
                conversation.asked = true;
                return Some(Question::Status);
            }
            Some(end) if &conversation.question[..end] == b"reload" && !conversation.asked => {
                if reloaders >= MAX_RELOADERS {
                    let text = format!(
                        "nothing is changed: {reloaders} others wait for a reload: ask when it is over"
                    );
                    conversation.answer = document(&serde_json::json!({ "error": text }));
                    self.say(at, poller);
                    return None;
                }
                conversation.asked = true;
                return Some(Question::Reload);
            }
            Some(end)
                if &conversation.question[..end] == b"watch"
                    && !conversation.asked
                    && !conversation.watches
                    && watchers < MAX_WATCHERS =>
            {
                conversation.watches = true;
            }
            // What a watcher says next ends it.
            _ if conversation.watches => self.hang_up(at, poller),
            None if conversation.question.len() < MAX_QUESTION => {}
            _ => {
                conversation.answer =
                    b"{\"error\": \"unknown question: ask for status, reload or watch; or too many watch\"}\n"
                        .to_vec();
                self.say(at, poller);
            }
        }
        None
    }

    /// Something happened: whoever watches is told.
    pub fn tell(&mut self, line: &str, poller: &Poller) {
        for at in (0..self.conversations.len()).rev() {
            let conversation = &mut self.conversations[at];
            if !conversation.watches {
                continue;
            }
            conversation.answer.extend(line.as_bytes());
            match conversation.answer.len() {
                // It doesn't read.
                MAX_UNREAD.. => self.hang_up(at, poller),
                _ => self.say(at, poller),
            }
        }
    }

    /// The answer comes when these have reported. One that is stopped or busy doesn't hold it up.
    pub fn wait_for(&mut self, key: u64, awaited: HashSet<u64>, now: Time) {
        if let Some(conversation) = self.conversations.iter_mut().find(|c| c.key == key) {
            conversation.awaited = awaited;
            conversation.until = Some(now + REPORT_WAIT);
        }
    }

    /// This one reported, or won't any more.
    pub fn reported(&mut self, by: u64) {
        for conversation in &mut self.conversations {
            conversation.awaited.remove(&by);
        }
    }

    /// A conversation that waits for nobody any more: its [`Admin::answer`] is due. Gives up on the deaf and dumb.
    pub fn due(&mut self, now: Time, poller: &Poller) -> Option<u64> {
        let mut at = 0;
        while let Some(conversation) = self.conversations.get(at) {
            let ready = |until| conversation.awaited.is_empty() || now >= until;
            if conversation.until.is_some_and(ready) {
                return Some(conversation.key);
            }
            match now >= conversation.deadline && conversation.has_deadline() {
                true => self.hang_up(at, poller),
                false => at += 1,
            }
        }
        None
    }

    /// Answers.
    pub fn answer(&mut self, key: u64, answer: Vec<u8>, poller: &Poller) {
        if let Some(at) = self.conversations.iter().position(|c| c.key == key) {
            self.conversations[at].until = None;
            self.conversations[at].answer = answer;
            self.say(at, poller);
        }
    }

    fn say(&mut self, at: usize, poller: &Poller) {
        let conversation = &mut self.conversations[at];
        loop {
            match conversation.stream.write(&conversation.answer) {
                Ok(n) => {
                    conversation.answer.drain(..n);
                    if conversation.answer.is_empty() && !conversation.watches {
                        return self.hang_up(at, poller);
                    }
                    if conversation.answer.is_empty() {
                        let token = (self.token)(conversation.key);
                        let _ = poller.modify(conversation.stream.as_fd(), token, Interest::Read);
                        return;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return self.hang_up(at, poller),
            }
        }
        let (fd, token) = (conversation.stream.as_fd(), (self.token)(conversation.key));
        let _ = poller.modify(fd, token, Interest::Write).or_else(|_| poller.add(fd, token, Interest::Write));
    }

    fn hang_up(&mut self, at: usize, poller: &Poller) {
        let conversation = self.conversations.swap_remove(at);
        let _ = poller.remove(conversation.stream.as_fd());
    }
}

impl Conversation {
    /// Whoever watches may be silent, and who waits for an answer that takes its time, too.
    fn has_deadline(&self) -> bool {
        !self.watches && !self.takes_its_time()
    }

    /// Whether it waits for an answer that comes when it comes, as that to a reload.
    fn takes_its_time(&self) -> bool {
        self.asked && self.until.is_none() && self.answer.is_empty()
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A status as it is sent.
pub fn document(status: &serde_json::Value) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(status).unwrap_or_default();
    text.push(b'\n');
    text
}

const MAX_CONVERSATIONS: usize = 24;
/// Fewer than that, both together: there is always one left to ask for the status.
const MAX_WATCHERS: usize = 8;
const MAX_RELOADERS: usize = 8;
/// Bytes of events that may wait for somebody who watches.
const MAX_UNREAD: usize = 64 << 10;
const MAX_QUESTION: usize = 256;
const PATIENCE: Duration = Duration::from_secs(5);
const REPORT_WAIT: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const START: Time = Time::from_nanos(0);

    struct Desk {
        admin: Admin,
        poller: Poller,
        path: PathBuf,
        _directory: tempfile::TempDir,
    }

    impl Desk {
        fn new() -> Desk {
            let directory = tempfile::tempdir().expect("a directory");
            let path = directory.path().join("run/tg0.sock");
            let admin = Admin::listen(&path, "server", |key| key).expect("listens");
            Desk { admin, poller: Poller::new(8).expect("an epoll set"), path, _directory: directory }
        }

        fn caller(&mut self, question: &[u8]) -> UnixStream {
            let mut stream = UnixStream::connect(&self.path).expect("connects");
            stream.write_all(question).expect("asks");
            self.admin.accept(&self.poller, START);
            stream
        }
    }

    #[test]
    fn a_socket_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().join("tg0.sock");
        let failure = Admin::listen(&path, "server", |key| key).err().expect("below a file");
        let sentence = format!("listen on the socket {}: ", path.display());
        assert!(failure.text.starts_with(&sentence), "{failure}");
    }

    fn said(mut stream: UnixStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("it hangs up");
        text
    }

    #[test]
    fn the_socket_is_roots_and_goes_with_its_owner() {
        let desk = Desk::new();
        assert_eq!(fs::metadata(&desk.path).expect("is there").mode() & 0o777, 0o600);
        let again = Admin::listen(&desk.path, "server", |key| key);
        assert_eq!(again.err().map(|failure| failure.exit), Some(Exit::DeviceInUse));
        let (path, _directory) = (desk.path.clone(), desk._directory);
        drop(desk.admin);
        assert!(!path.exists());
        // What a killed one leaves.
        drop(UnixListener::bind(&path).expect("binds"));
        assert!(path.exists());
        drop(Admin::listen(&path, "server", |key| key).expect("replaces it"));
        fs::write(&path, "somebody's").expect("writes");
        let other = Admin::listen(&path, "server", |key| key);
        assert_eq!(other.err().map(|failure| failure.exit), Some(Exit::Usage));
        assert_eq!(fs::read(&path).expect("still there"), b"somebody's");
    }

    #[test]
    fn an_answer_waits_for_reports_but_not_for_long() {
        let mut desk = Desk::new();
        let callers = [desk.caller(b"status\n"), desk.caller(b"status\n")];
        for key in [0, 1] {
            assert_eq!(desk.admin.converse(key, &desk.poller), Some(Question::Status));
            desk.admin.wait_for(key, HashSet::from([7, 8 + key]), START);
        }
        assert_eq!(desk.admin.due(START, &desk.poller), None);
        desk.admin.reported(7);
        assert_eq!(desk.admin.due(START, &desk.poller), None);
        desk.admin.reported(8);
        assert_eq!(desk.admin.due(START, &desk.poller), Some(0));
        desk.admin.answer(0, b"{}".to_vec(), &desk.poller);
        assert_eq!(desk.admin.due(START, &desk.poller), None, "9 is missing");
        assert_eq!(desk.admin.deadline(), Some(START + REPORT_WAIT));
        assert_eq!(desk.admin.due(START + REPORT_WAIT, &desk.poller), Some(1));
        desk.admin.answer(1, b"{}".to_vec(), &desk.poller);
        assert_eq!(callers.map(said), ["{}", "{}"]);
        assert_eq!(desk.admin.deadline(), None);
    }

    #[test]
    fn an_answer_may_take_its_time_even_for_one_who_says_no_more() {
        let mut desk = Desk::new();
        let callers = [desk.caller(b"reload\n"), desk.caller(b"reload\n")];
        for key in [0, 1] {
            assert_eq!(desk.admin.converse(key, &desk.poller), Some(Question::Reload));
        }
        callers[1].shutdown(std::net::Shutdown::Write).expect("shut down");
        assert_eq!(desk.admin.converse(1, &desk.poller), None);
        assert_eq!(desk.poller.wait(Some(Duration::ZERO)).expect("waits").count(), 0, "again and again");
        assert_eq!(desk.admin.deadline(), None);
        assert_eq!(desk.admin.due(START + PATIENCE * 5, &desk.poller), None);
        for key in [0, 1] {
            desk.admin.answer(key, b"{}".to_vec(), &desk.poller);
        }
        assert_eq!(callers.map(said), ["{}", "{}"]);
    }

    #[test]
    fn who_waits_for_an_answer_and_is_gone_leaves_its_place() {
        let mut desk = Desk::new();
        let caller = desk.caller(b"reload\n");
        assert_eq!(desk.admin.converse(0, &desk.poller), Some(Question::Reload));
        caller.shutdown(std::net::Shutdown::Write).expect("shut down");
        assert_eq!(desk.admin.converse(0, &desk.poller), None);
        assert_eq!(desk.poller.wait(Some(Duration::ZERO)).expect("waits").count(), 0);
        drop(caller);
        let heard: Vec<u64> =
            desk.poller.wait(Some(Duration::ZERO)).expect("waits").map(|r| r.token).collect();
        assert_eq!(heard, [0]);
        assert_eq!(desk.admin.converse(0, &desk.poller), None);
        assert_eq!(desk.admin.conversations.len(), 0);
        desk.admin.answer(0, b"{}".to_vec(), &desk.poller);
    }

    #[test]
    fn watchers_and_those_who_wait_for_a_reload_leave_room_for_a_status() {
        let mut desk = Desk::new();
        let mut key = 0..;
        let mut next = || key.next().expect("a key");
        let _watchers: Vec<UnixStream> = (0..MAX_WATCHERS).map(|_| desk.caller(b"watch\n")).collect();
        for _ in 0..MAX_WATCHERS {
            assert_eq!(desk.admin.converse(next(), &desk.poller), None);
        }
        let waiting: Vec<UnixStream> = (0..MAX_RELOADERS).map(|_| desk.caller(b"reload\n")).collect();
        for _ in 0..MAX_RELOADERS {
            assert_eq!(desk.admin.converse(next(), &desk.poller), Some(Question::Reload));
        }
        let one_more = desk.caller(b"reload\n");
        assert_eq!(desk.admin.converse(next(), &desk.poller), None);
        assert!(said(one_more).contains("nothing is changed: 8 others wait for a reload"));
        let _status = desk.caller(b"status\n");
        let asks = next();
        assert_eq!(desk.admin.converse(asks, &desk.poller), Some(Question::Status));
        desk.admin.wait_for(asks, HashSet::from([1]), START);
        // One that has its answer makes room.
        desk.admin.answer(MAX_WATCHERS as u64, b"{}".to_vec(), &desk.poller);
        let _again = desk.caller(b"reload\n");
        assert_eq!(desk.admin.converse(next(), &desk.poller), Some(Question::Reload));
        drop(waiting);
    }

    #[test]
    fn a_question_may_come_in_pieces_and_another_is_answered_with_an_error() {
        let mut desk = Desk::new();
        let mut slow = desk.caller(b"sta");
        assert_eq!(desk.admin.converse(0, &desk.poller), None);
        slow.write_all(b"tus\n").expect("asks");
        assert_eq!(desk.admin.converse(0, &desk.poller), Some(Question::Status));
        let endless = desk.caller(&[b'x'; MAX_QUESTION]);
        assert_eq!(desk.admin.converse(1, &desk.poller), None);
        let other = desk.caller(b"stop\n");
        assert_eq!(desk.admin.converse(2, &desk.poller), None);
        for stream in [endless, other] {
            assert!(said(stream).contains("unknown question"));
        }
    }

    #[test]
    fn watchers_are_told_until_they_hang_up() {
        let mut desk = Desk::new();
        let mut watchers: Vec<UnixStream> = (0..MAX_WATCHERS + 1).map(|_| desk.caller(b"watch\n")).collect();
        for key in 0..=MAX_WATCHERS as u64 {
            assert_eq!(desk.admin.converse(key, &desk.poller), None);
        }
        assert!(said(watchers.pop().expect("one too many")).contains("too many"));
        assert_eq!(desk.admin.due(START + PATIENCE * 2, &desk.poller), None);
        assert_eq!(desk.admin.deadline(), None);
        drop(watchers.remove(0));
        desk.admin.tell("{}\n", &desk.poller);
        desk.admin.tell("{1}\n", &desk.poller);
        assert_eq!(desk.admin.conversations.len(), MAX_WATCHERS - 1, "one is gone");
        let mut line = [0; 7];
        watchers[0].read_exact(&mut line).expect("two lines");
        assert_eq!(&line, b"{}\n{1}\n");
        // One that says more, and those that read nothing.
        watchers[0].write_all(b"status\n").expect("says");
        desk.admin.converse(1, &desk.poller);
        let long = "x".repeat(MAX_UNREAD / 2);
        for _ in 0..20 {
            desk.admin.tell(&long, &desk.poller);
        }
        assert_eq!(desk.admin.conversations.len(), 0);
    }

    #[test]
    fn callers_who_say_nothing_are_few_and_hung_up_on() {
        let mut desk = Desk::new();
        let silent: Vec<UnixStream> = (0..MAX_CONVERSATIONS + 3).map(|_| desk.caller(b"")).collect();
        assert_eq!(desk.admin.conversations.len(), MAX_CONVERSATIONS);
        assert_eq!(desk.admin.due(START + PATIENCE, &desk.poller), None);
        assert_eq!(desk.admin.deadline(), None);
        for stream in silent {
            assert_eq!(said(stream), "");
        }
    }
}
