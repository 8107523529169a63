//! `tunguard pki`: certificates for those who have no authority of their own.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::exit::{Failure, Outcome};
use crate::pki::{AltName, Authority, CLIENT_DAYS, Files, Issued, Name, RemoteHost, SERVER_DAYS};
use crate::tls::time::{date, wall_clock};

/// Make and revoke certificates
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub enum PkiCommand {
    /// Make an authority: ca.pem, ca.key, and an empty crl.pem
    ///
    /// The authority signs servers and clients for ten years. Its key, ca.key, never has to leave this directory:
    /// keep a backup, and keep it off the server if you can.
    Init {
        /// The authority.
        #[command(flatten)]
        dir: Dir,
        /// What the authority is called in certificates and errors
        #[arg(long, default_value = "tunguard CA")]
        name: String,
    },
    /// Issue a server's certificate: NAME.pem and NAME.key
    Server {
        /// The authority.
        #[command(flatten)]
        dir: Dir,
        /// Name of the server; also names its files
        name: Name,
        /// What clients dial: a host name or an address (repeat it for more)
        #[arg(long = "san", value_name = "HOST_OR_IP", required = true)]
        alt_names: Vec<AltName>,
        /// How long it is valid
        #[arg(long, default_value_t = SERVER_DAYS, value_parser = days())]
        days: u32,
    },
    /// Issue a client's certificate: clients/NAME.pem and clients/NAME.key
    ///
    /// NAME is the client's identity: it is what logs, `tunguard status` and clients.d/NAME.toml on the server
    /// call it. A revoked name can be issued again; what was revoked stays revoked.
    Client {
        /// The authority.
        #[command(flatten)]
        dir: Dir,
        /// Identity of the client; also names its files
        name: Name,
        /// How long it is valid
        #[arg(long, default_value_t = CLIENT_DAYS, value_parser = days())]
        days: u32,
    },
    /// Print a client's configuration in one file, keys included
    ///
    /// The profile holds the client's private key: write it to a file only its user
    /// can read, and send it over a safe channel.
    ///
    ///   (umask 077; tunguard pki profile alice --remote vpn.example.org > alice.toml)
    #[command(verbatim_doc_comment)]
    Profile {
        /// The authority.
        #[command(flatten)]
        dir: Dir,
        /// Identity of the client
        name: Name,
        /// Where the server is; an IPv6 address with a port in brackets (repeat it, in order of preference)
        #[arg(long = "remote", value_name = "HOST[:PORT]", required = true)]
        remotes: Vec<RemoteHost>,
        /// Name the server's certificate must carry
        ///
        /// Without it: the first name of the server's certificate, if there is exactly one server here; else the
        /// client expects the host it dials.
        #[arg(long, value_name = "HOST_OR_IP")]
        server_name: Option<AltName>,
    },
    /// Revoke NAME's certificate: writes crl.pem
    ///
    /// A server whose tls.crl is this crl.pem cuts the session. Copy the file there if the server is elsewhere.
    Revoke {
        /// The authority.
        #[command(flatten)]
        dir: Dir,
        /// Whose certificate
        name: Name,
    },
    /// Show every certificate that was issued
    List {
        /// The authority.
        #[command(flatten)]
        dir: Dir,
    },
}

/// Where the authority is.
#[derive(Debug, Args)]
pub struct Dir {
    /// Directory of the authority
    #[arg(long, value_name = "DIR", default_value = "certs")]
    dir: PathBuf,
}

impl PkiCommand {
    /// Does it; results go to standard output.
    pub fn run(self) -> Outcome<()> {
        self.run_to(&mut std::io::stdout().lock())
    }

    fn run_to(self, out: &mut impl Write) -> Outcome<()> {
        let now = wall_clock();
        match self {
            PkiCommand::Init { dir: Dir { dir }, name } => {
                Authority::init(&dir, &name, now)?;
                let dir = dir.display();
                print(out, &format!("{dir}/ca.pem, {dir}/ca.key and {dir}/crl.pem: the authority {name:?}\n"))
            }
            PkiCommand::Server { dir: Dir { dir }, name, alt_names, days } => {
                let files = Authority::open(&dir)?.server(&name, &alt_names, days, now)?;
                print_files(out, &files)
            }
            PkiCommand::Client { dir: Dir { dir }, name, days } => {
                let files = Authority::open(&dir)?.client(&name, days, now)?;
                print_files(out, &files)
            }
            PkiCommand::Profile { dir: Dir { dir }, name, remotes, server_name } => {
                let server_name = server_name.map(server_name_text).transpose()?;
                print(out, &Authority::open(&dir)?.profile(&name, &remotes, server_name.as_deref(), now)?)
            }
            PkiCommand::Revoke { dir: Dir { dir }, name } => {
                let revoked = Authority::open(&dir)?.revoke(&name, now)?;
                let crl = dir.join("crl.pem");
                let lines = revoked.iter().map(|issued| {
                    format!("{}: revoked {}, serial {}\n", crl.display(), issued.name, issued.serial)
                });
                print(out, &lines.collect::<String>())
            }
            PkiCommand::List { dir: Dir { dir } } => print(out, &table(&Authority::open(&dir)?.list(now)?)),
        }
    }
}

fn print_files(out: &mut impl Write, files: &Files) -> Outcome<()> {
    print(
        out,
        &format!(
            "{}, {}: valid until {}\n",
            files.cert.display(),
            files.key.display(),
            date(files.not_after)
        ),
    )
}

/// What a client compares with: a pattern is for certificates only.
fn server_name_text(name: AltName) -> Outcome<String> {
    match name {
        AltName::Ip(ip) => Ok(ip.to_string()),
        AltName::Dns(host) if host.starts_with('*') => {
            Err(Failure::usage(format!("--server-name {host}: write one name, without '*'")))
        }
        AltName::Dns(host) => Ok(host),
    }
}

fn table(all: &[Issued]) -> String {
    let mut rows = vec![["NAME", "KIND", "SERIAL", "NOT AFTER", "STATE"].map(str::to_owned)];
    rows.extend(all.iter().map(|issued| {
        [
            issued.name.clone(),
            issued.kind.to_string(),
            issued.serial.clone(),
            date(issued.not_after),
            issued.state.to_string(),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn print(out: &mut impl Write, text: &str) -> Outcome<()> {
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| Failure::system("writing to standard output", e))
}

/// Up to the authority's own ten years.
fn days() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=3_650)
}

const EXAMPLES: &str = "\
Examples:
  tunguard pki init
  tunguard pki server gate --san vpn.example.org
  tunguard pki client alice
  (umask 077; tunguard pki profile alice --remote vpn.example.org > alice.toml)
  tunguard pki revoke alice";

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::pki::State;
    use crate::tls::verify::Side;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        command: PkiCommand,
    }

    fn run(line: &str) -> Result<Outcome<String>, clap::Error> {
        let cli = Cli::try_parse_from(line.split(' '))?;
        let mut out = Vec::new();
        let outcome = cli.command.run_to(&mut out);
        Ok(outcome.map(|()| String::from_utf8(out).expect("text")))
    }

    #[test]
    fn commands_work_from_end_to_end() {
        let temp = tempfile::tempdir().expect("a directory");
        let dir = temp.path().join("certs");
        for (line, printed) in [
            (
                "pki init --dir DIR --name Lab",
                "DIR/ca.pem, DIR/ca.key and DIR/crl.pem: the authority \"Lab\"\n",
            ),
            (
                "pki server --dir DIR gate --san vpn.example.org --san 192.0.2.1",
                "DIR/gate.pem, DIR/gate.key: valid",
            ),
            (
                "pki client alice --dir DIR --days 30",
                "DIR/clients/alice.pem, DIR/clients/alice.key: valid until 20",
            ),
            (
                "pki profile --dir DIR alice --remote a:1 --remote [::1]:2",
                "remote = [\"a:1\", \"[::1]:2\"]\n",
            ),
            ("pki profile --dir DIR alice --remote a --server-name ::1", "server_name = \"::1\"\n"),
            ("pki revoke --dir DIR alice", "DIR/crl.pem: revoked alice, serial "),
            ("pki list --dir DIR", "revoked on 20"),
        ] {
            let [line, printed] = [line, printed].map(|text| text.replace("DIR", &dir.display().to_string()));
            let out = run(&line).expect("a command line").expect("a success");
            assert!(out.contains(&printed), "{out}");
        }
        assert!(dir.join("clients/alice.pem").exists());
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_the_command_line() {
        for line in [
            "pki server gate",
            "pki server gate --san a:1",
            "pki client ../x",
            "pki client ca",
            "pki client alice --days 0",
            "pki client alice --days 3651",
            "pki profile alice",
            "pki profile alice --remote a:0",
            "pki revoke",
        ] {
            assert!(run(line).is_err(), "{line}");
        }
        let pattern = "pki profile alice --remote a --server-name *.a";
        assert!(run(pattern).expect("a command line").is_err());
    }

    #[test]
    fn the_table_is_aligned() {
        let issued = |name: &str, kind, state| Issued {
            name: name.to_owned(),
            kind,
            serial: "0A1B".to_owned(),
            not_after: 0,
            state,
        };
        let rows = [
            issued("gate", Side::Server, State::Valid),
            issued("alice@example.org", Side::Client, State::Revoked(86_400)),
            issued("bob", Side::Client, State::Expired),
        ];
        let expected = "\
NAME               KIND    SERIAL  NOT AFTER   STATE
gate               server  0A1B    1970-01-01  valid
alice@example.org  client  0A1B    1970-01-01  revoked on 1970-01-02
bob                client  0A1B    1970-01-01  expired
";
        assert_eq!(table(&rows), expected);
    }
}
