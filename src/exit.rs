//! How a command ends: one exit code and one sentence per kind of failure.

use std::fmt;
use std::process::ExitCode;

/// The exit codes of every tunguard binary. 1, 5 to 8, 11 and 12 are those of the simpletun design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[repr(u8)]
pub enum Exit {
    /// A system call failed; the sentence says which and why.
    System = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// A MAC of the wrong length came out of the cipher library.
    MacLength = 5,
    /// The TLS connection could not be made.
    Tls = 6,
    /// A certificate is missing or can't be read.
    CertificateUnreadable = 7,
    /// A private key is missing or can't be read.
    KeyUnreadable = 8,
    /// The private key doesn't belong to the certificate.
    KeyMismatch = 9,
    /// A certificate is expired or not yet valid.
    CertificateExpired = 10,
    /// The guard refused a registration, or the server refused the session.
    Refused = 11,
    /// A registration or a message was malformed.
    Malformed = 12,
    /// A certificate comes from a foreign CA, or is for another use or another name.
    CertificateForeign = 13,
    /// A certificate was revoked.
    CertificateRevoked = 14,
    /// There is no usable /dev/net/tun.
    NoTun = 15,
    /// The process lacks a privilege it needs.
    Privilege = 16,
    /// The port is in use.
    PortInUse = 17,
    /// The network device is in use.
    DeviceInUse = 18,
    /// A program the configuration calls for is not installed.
    MissingProgram = 19,
    /// The binaries beside this one are of another version, or are missing.
    Version = 20,
    /// A new configuration is in force, but nobody is let in for the moment: no worker can be started with it.
    NobodyLetIn = 21,
}

impl Exit {
    /// The code from a process's exit status, where it is one of ours.
    pub fn from_code(code: u8) -> Option<Exit> {
        use Exit::*;
        [
            System,
            Usage,
            MacLength,
            Tls,
            CertificateUnreadable,
            KeyUnreadable,
            KeyMismatch,
            CertificateExpired,
            Refused,
            Malformed,
            CertificateForeign,
            CertificateRevoked,
            NoTun,
            Privilege,
            PortInUse,
            DeviceInUse,
            MissingProgram,
            Version,
            NobodyLetIn,
        ]
        .into_iter()
        .find(|e| *e as u8 == code)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// An error that ends a command or a session: what to exit with, and a sentence that names the thing
/// (file, line, key, peer) and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit code that fits.
    pub exit: Exit,
    /// The sentence for the user, without a trailing full stop.
    pub text: String,
}

impl Failure {
    /// A failure of kind `exit` described by `text`.
    pub fn new(exit: Exit, text: impl Into<String>) -> Failure {
        Failure { exit, text: text.into() }
    }

    /// A failed system call: `what` names the attempt and its object.
    pub fn system(what: impl fmt::Display, error: impl fmt::Display) -> Failure {
        Failure::new(Exit::System, format!("{what}: {error}"))
    }

    /// Wrong usage or configuration.
    pub fn usage(text: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, text)
    }

    /// The same failure with `what` put in front of its sentence.
    pub fn context(self, what: impl fmt::Display) -> Failure {
        Failure { exit: self.exit, text: format!("{what}: {}", self.text) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

/// What fallible code of the shells returns.
pub type Outcome<T> = Result<T, Failure>;
