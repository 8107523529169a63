//! Configuration files: any text gives a configuration, or sentences that name the file and, but for what is missing,
//! a line of it.

use std::path::{Path, PathBuf};

use tunguard::config::client::ClientConfig;
use tunguard::config::server::ServerConfig;
use tunguard::exit::{Exit, Failure};

use super::input::Input;

/// Which file, and its text.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let which = input.u8();
    let text = String::from_utf8_lossy(input.rest());
    match which % 3 {
        0 => {
            let file = "/etc/tunguard/server.toml";
            if let Err(failure) = ServerConfig::parse(&text, Path::new(file)) {
                names_a_place(&failure, &[file], &text);
            }
        }
        1 => {
            let file = "/etc/tunguard/client.toml";
            if let Err(failure) = ClientConfig::parse(&text, Path::new(file)) {
                names_a_place(&failure, &[file], &text);
            }
        }
        _ => {
            let server =
                ServerConfig::parse(SERVER, Path::new("/etc/tunguard/server.toml")).expect("a configuration");
            // Two clients', so that they can want the same.
            let (one, other) = text.split_once("\n---\n").unwrap_or((&text, ""));
            let names = ["/etc/tunguard/clients.d/alice.toml", "/etc/tunguard/clients.d/bob.toml"];
            let files: Vec<_> =
                names.iter().zip([one, other]).map(|(n, t)| (PathBuf::from(n), t.to_owned())).collect();
            match server.parse_clients(&files) {
                Err(failure) => names_a_place(&failure, &names, &text),
                Ok(clients) => {
                    let (alice, bob) = (&clients["alice"], &clients["bob"]);
                    assert!(!alice.addresses.iter().any(|a| bob.addresses.contains(a)), "one address twice");
                    assert!(!alice.subnets.iter().any(|n| bob.subnets.contains(n)), "one subnet twice");
                }
            }
        }
    }
}

fn names_a_place(failure: &Failure, files: &[&str], text: &str) {
    assert_eq!(failure.exit, Exit::Usage);
    let most = text.lines().count() + 1;
    for line in failure.text.lines() {
        let rest = files.iter().find_map(|file| line.strip_prefix(file)?.strip_prefix(':'));
        let rest = rest.unwrap_or_else(|| panic!("names no file: {line:?}"));
        assert!(!line.contains(char::is_control), "control characters: {line:?}");
        if let Some((number, _)) = rest.split_once(':')
            && let Ok(number) = number.parse::<usize>()
        {
            assert!((1..=most).contains(&number), "there is no such line: {line:?}");
        }
    }
    assert!(!failure.text.is_empty());
}

const SERVER: &str = r#"
listen = "[::]:55555"
networks = ["10.9.0.0/24", "fd09::/64"]
[tls]
ca = "ca.pem"
cert = "server.pem"
key = "server.key"
"#;
