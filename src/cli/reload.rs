//! `tunguard reload`: has a running server read its configuration again, and says what came of it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use super::status::{ask_for, usual_sockets};
use crate::escape::Escaped;
use crate::exit::{Exit, Failure, Outcome};

/// `tunguard reload`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ReloadCommand {
    /// The server's admin socket, where there are several or it is configured
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl ReloadCommand {
    /// Asks for it, and prints what has changed.
    pub fn run(self) -> Outcome<()> {
        let socket = match self.socket {
            Some(socket) => socket,
            None => the_only_server(usual_sockets()?)?,
        };
        let answer = ask_for("reload", &socket, ANSWER_WITHIN)?;
        println!("{}", judge(&answer).map_err(|failure| failure.context(socket.display()))?);
        Ok(())
    }
}

/// What the server answers: one of the two.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Answer {
    reloaded: Option<String>,
    error: Option<String>,
    exit: Option<u8>,
}

fn judge(answer: &str) -> Outcome<String> {
    if answer.is_empty() {
        return Err(Failure::system("wait for its answer", "it hung up: its log says what came of it"));
    }
    match serde_json::from_str(answer) {
        Ok(Answer { reloaded: Some(text), error: None, .. }) => Ok(Escaped(&text).to_string()),
        Ok(Answer { error: Some(text), exit, .. }) => {
            let lines: Vec<String> = text.lines().map(|line| Escaped(line).to_string()).collect();
            Err(Failure::new(exit.and_then(Exit::from_code).unwrap_or(Exit::Usage), lines.join("\n")))
        }
        Ok(_) => Err(Failure::new(Exit::Malformed, "the answer says nothing")),
        Err(e) => Err(Failure::new(Exit::Malformed, format!("the answer makes no sense: {e}"))),
    }
}

/// Clients' sockets are named so, and clients don't reload.
fn the_only_server(mut sockets: Vec<PathBuf>) -> Outcome<PathBuf> {
    sockets.retain(|socket| {
        !socket.file_name().is_some_and(|name| name.to_string_lossy().starts_with("client-"))
    });
    match &sockets[..] {
        [socket] => Ok(socket.clone()),
        [] => Err(Failure::system("find a server", "none seems to run here (--socket PATH)")),
        several => {
            let list: Vec<String> = several.iter().map(|s| s.display().to_string()).collect();
            Err(Failure::usage(format!("several servers run here: give --socket one of {}", list.join(", "))))
        }
    }
}

/// It waits for two processes that start, 11 s each at most, and before that perhaps for another reload that does.
const ANSWER_WITHIN: Duration = Duration::from_secs(50);

const EXAMPLES: &str = "\
Examples:
  tunguard reload
  tunguard reload --socket /run/tunguard/tg1.sock

Exit codes:
  0   it is in force
  1   no server has answered: none runs here, or it stopped or took too long, and its log says what came of it
  2   nothing is changed: something is wrong with it, or can't change while the server runs; or wrong usage
  12  the answer makes no sense, as that of another version may
  21  it is in force, but nobody is let in for the moment: no worker can be started with it";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_what_has_changed_or_an_error_with_its_exit_code() {
        assert_eq!(judge(r#"{"reloaded": "push\u001b"}"#), Ok("push\\u{1b}".to_owned()));
        let refused = judge(r#"{"error": "server.toml:1: no\nserver.toml:2: no", "exit": 2}"#);
        assert_eq!(refused, Err(Failure::usage("server.toml:1: no\nserver.toml:2: no")));
        assert_eq!(judge(r#"{"error": "x", "exit": 21}"#).map_err(|f| f.exit), Err(Exit::NobodyLetIn));
        assert_eq!(judge(r#"{"error": "x"}"#).map_err(|f| f.exit), Err(Exit::Usage), "an older server");
        assert_eq!(judge("").map_err(|f| f.exit), Err(Exit::System), "it ended");
        for nothing in ["{}", "7"] {
            assert_eq!(judge(nothing).map_err(|f| f.exit), Err(Exit::Malformed), "{nothing}");
        }
    }

    #[test]
    fn the_only_server_is_found_beside_clients() {
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(the_only_server(paths(&["/r/client-tg0.sock", "/r/tg0.sock"])), Ok("/r/tg0.sock".into()));
        assert!(the_only_server(paths(&["/r/client-tg0.sock"])).is_err());
        let several = the_only_server(paths(&["/r/tg0.sock", "/r/tg1.sock"]));
        assert_eq!(several.map_err(|failure| failure.exit), Err(Exit::Usage));
    }
}
