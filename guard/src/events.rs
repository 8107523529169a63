//! What happened lately, for those who watch.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// The last few events, oldest first.
#[derive(Debug, Default)]
pub struct Events(VecDeque<Value>);

/// A client that is heard somewhere.
#[derive(Clone, Copy, Debug)]
pub struct Heard<'a> {
    /// Whose session.
    pub name: &'a str,
    /// Its ID.
    pub session: &'a str,
    /// Where it was before; `None` where this session wasn't heard before.
    pub from: Option<SocketAddr>,
    /// Where it is.
    pub to: SocketAddr,
    /// Milliseconds since it was last heard where it was.
    pub after_ms: Option<u64>,
    /// Its packets come inside the control connection.
    pub inside: bool,
}

impl Events {
    /// Takes in that a client was heard somewhere, and hands it out as a line.
    pub fn add(&mut self, heard: Heard<'_>) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event = json!({
            "time_ms": now.as_millis() as u64,
            "event": if heard.from.is_some() { "moved" } else { "heard" },
            "name": heard.name,
            "session": heard.session,
            "from": heard.from.map(|from| from.to_string()),
            "to": heard.to.to_string(),
            "after_ms": heard.after_ms,
            "inside": heard.inside,
        });
        let line = format!("{event}\n");
        if self.0.len() >= MOST {
            self.0.pop_front();
        }
        self.0.push_back(event);
        line
    }

    /// All of them.
    pub fn list(&self) -> Vec<&Value> {
        self.0.iter().collect()
    }
}

const MOST: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_kept() {
        let mut events = Events::default();
        for port in 0..50 {
            let heard = Heard {
                name: "laptop",
                session: "0001",
                from: (port > 0).then(|| ([192, 0, 2, 1], 1).into()),
                to: ([192, 0, 2, 1], port).into(),
                after_ms: None,
                inside: false,
            };
            let line = events.add(heard);
            assert_eq!(line.matches('\n').count(), 1);
            let what = if port == 0 { "\"heard\"" } else { "\"moved\"" };
            assert!(line.contains(what), "{line}");
        }
        let list = events.list();
        assert_eq!(list.len(), MOST);
        assert_eq!(list[MOST - 1]["to"], "192.0.2.1:49");
    }
}
