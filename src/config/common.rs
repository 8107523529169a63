//! What server and client configuration share.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::reader::{Section, Value, Word, abridged};
use crate::exit::{Failure, Outcome};
use crate::rate::{self, Rate};

/// The port where nothing else is said.
pub const DEFAULT_PORT: u16 = 55555;

/// A network device's name: 1 to 15 bytes, no '/', ':', white space or '%', not "." or ".."
/// (dev_valid_name() in net/core/dev.c), and printable ASCII, so that it is safe in logs and nft scripts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceName(String);

impl DeviceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Default for DeviceName {
    /// `tg0`.
    fn default() -> DeviceName {
        DeviceName("tg0".to_owned())
    }
}

impl FromStr for DeviceName {
    type Err = Failure;

    fn from_str(text: &str) -> Outcome<DeviceName> {
        from_word(text)
    }
}

impl Word for DeviceName {
    const WANTED: &'static str = r#"a device name, as in "tg0""#;

    fn from_word(text: &str) -> Result<DeviceName, String> {
        let fits = (1..=15).contains(&text.len())
            && text != "."
            && text != ".."
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if fits {
            Ok(DeviceName(text.to_owned()))
        } else {
            Err("is no device name: 1 to 15 letters, digits, '-', '_' or '.'".to_owned())
        }
    }
}

/// A suite of the data channel, in the protocol's spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Suite {
    /// AES-256 in Galois/Counter mode (RFC 5116 AEAD_AES_256_GCM).
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    /// ChaCha20-Poly1305 (RFC 8439).
    #[serde(rename = "chacha20-poly1305")]
    ChaCha20Poly1305,
    /// The classic composition: AES-256-CTR, then HMAC-SHA-256 over header and ciphertext.
    #[serde(rename = "aes-256-ctr-hmac-sha256")]
    Aes256CtrHmacSha256,
}

impl Suite {
    /// Every suite, in the default order of preference.
    pub const ALL: [Suite; 3] = [Suite::Aes256Gcm, Suite::ChaCha20Poly1305, Suite::Aes256CtrHmacSha256];

    /// The name on the wire and in files.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Aes256Gcm => "aes-256-gcm",
            Suite::ChaCha20Poly1305 => "chacha20-poly1305",
            Suite::Aes256CtrHmacSha256 => "aes-256-ctr-hmac-sha256",
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Suite {
    type Err = Failure;

    fn from_str(text: &str) -> Outcome<Suite> {
        from_word(text)
    }
}

impl Word for Suite {
    const WANTED: &'static str = r#""aes-256-gcm", "chacha20-poly1305" or "aes-256-ctr-hmac-sha256""#;

    fn from_word(text: &str) -> Result<Suite, String> {
        let suite = Suite::ALL.into_iter().find(|suite| suite.name() == text);
        suite.ok_or_else(|| format!("is no suite: {}", Suite::WANTED))
    }
}

/// What the processes that read from the network are locked in with, beyond what every kernel has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// `landlock = "required" | "off"`.
    pub landlock: Landlock,
}

/// Whether a kernel without Landlock will do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Landlock {
    /// No (the default).
    #[default]
    Required,
    /// Landlock isn't used.
    Off,
}

impl Sandbox {
    /// Reads what both sides have of `[sandbox]`.
    pub(super) fn read(section: &mut Section<'_>) -> Sandbox {
        let choices = [("required", Landlock::Required), ("off", Landlock::Off)];
        let landlock = section.value("landlock").and_then(|v| v.choice(&choices));
        Sandbox { landlock: landlock.unwrap_or_default() }
    }
}

/// Where PEM text comes from: a file (already made absolute), or the configuration itself (a profile).
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// A file to read.
    File(PathBuf),
    /// The text itself; `key` says which configuration key held it.
    Inline {
        /// Full key, as in `tls.cert`.
        key: &'static str,
        /// The PEM text.
        text: String,
    },
}

impl Pem {
    /// How errors call it: a file's path with `key`, the configuration key that names it, or the key that holds the text.
    pub fn name(&self, key: &str) -> String {
        match self {
            Pem::File(path) => format!("{} ({key})", path.display()),
            Pem::Inline { key, .. } => format!("in {key}"),
        }
    }
}

impl fmt::Debug for Pem {
    // A private key may be in it: never print the text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pem::File(path) => write!(f, "File({path:?})"),
            Pem::Inline { key, .. } => write!(f, "Inline({key})"),
        }
    }
}

/// `[data]` on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// Suites in order of preference, at least one, none twice.
    pub suites: Vec<Suite>,
    /// Age at which an epoch is replaced; default 15 min, at least 1 s. The hard stop is at twice this.
    pub rekey: Duration,
    /// Packets of one direction after which an epoch is replaced; default 2^30, 1,000 to 2^40.
    pub rekey_packets: u64,
}

impl Default for Data {
    fn default() -> Data {
        Data { suites: Suite::ALL.to_vec(), rekey: Duration::from_secs(15 * 60), rekey_packets: 1 << 30 }
    }
}

impl Data {
    /// Reads what both sides have in `[data]`; the caller ends the section.
    pub(super) fn read(section: &mut Section<'_>) -> Data {
        let default = Data::default();
        let suites = section.value("suites").map(|v| v.some_words::<Suite>());
        let rekey = section.value("rekey").and_then(|v| v.duration(Duration::from_secs(1)));
        let rekey_packets = section.value("rekey_packets").and_then(|v| v.integer(1_000..=1 << 40));
        Data {
            suites: suites
                .map_or(default.suites, |suites| suites.into_iter().map(|(suite, _)| suite).collect()),
            rekey: rekey.unwrap_or(default.rekey),
            rekey_packets: rekey_packets.unwrap_or(default.rekey_packets),
        }
    }
}

/// A rate as in "20Mbit/s", or `None` for "off".
impl Word for Option<Rate> {
    const WANTED: &'static str = r#""off", or a rate, as in "20Mbit/s" or "500Kbit/s""#;

    fn from_word(text: &str) -> Result<Option<Rate>, String> {
        if text == "off" {
            return Ok(None);
        }
        let (number, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
        let unit =
            rate::UNITS.iter().find(|(_, name)| name.eq_ignore_ascii_case(unit)).map(|(unit, _)| *unit);
        let (Some(unit), false) = (unit, number.is_empty()) else {
            let wanted = r#"a whole number with bit/s, Kbit/s, Mbit/s or Gbit/s, as in "20Mbit/s", or "off""#;
            return Err(format!("is no rate: {wanted}"));
        };
        // Digits that don't fit are too many for certain.
        let bits = number.parse::<u64>().unwrap_or(u64::MAX).saturating_mul(unit);
        let rate = Rate::from_bits(bits);
        rate.map(Some)
            .ok_or_else(|| format!("is out of range: {} to {}, or \"off\"", Rate::LEAST, Rate::MOST))
    }
}

impl Word for SocketAddr {
    const WANTED: &'static str = r#"ADDRESS:PORT, as in "[::]:55555" or "0.0.0.0:55555""#;

    fn from_word(text: &str) -> Result<SocketAddr, String> {
        let Ok(address) = text.parse::<SocketAddr>() else {
            // The same with another port is one.
            return Err(match text.rsplit_once(':') {
                Some((host, port))
                    if is_number(port) && format!("{host}:1").parse::<SocketAddr>().is_ok() =>
                {
                    format!("has port {}: 1 to 65535", abridged(port))
                }
                _ => format!("is not {}", SocketAddr::WANTED),
            });
        };
        if address.port() == 0 { Err("has port 0: 1 to 65535".to_owned()) } else { Ok(address) }
    }
}

impl Word for IpAddr {
    const WANTED: &'static str = r#"an IP address, as in "10.9.0.1" or "fd09::1""#;

    fn from_word(text: &str) -> Result<IpAddr, String> {
        let address = text.parse::<IpAddr>().map_err(|_| format!("is not {}", IpAddr::WANTED))?;
        if address.is_unspecified() || address.is_multicast() {
            return Err(format!("names no single host: give {}", IpAddr::WANTED));
        }
        Ok(address)
    }
}

impl Word for IpNet {
    const WANTED: &'static str = r#"a network, as in "10.9.0.0/24" or "fd09::/64""#;

    fn from_word(text: &str) -> Result<IpNet, String> {
        if let Ok(host) = text.parse::<IpAddr>() {
            return Err(format!("has no prefix length: for this one host it is \"{}\"", IpNet::from(host)));
        }
        let net = text.parse::<IpNet>().map_err(|_| format!("is not {}", IpNet::WANTED))?;
        if net.addr() != net.network() {
            return Err(format!("has host bits set: \"{}\" was probably meant", net.trunc()));
        }
        Ok(net)
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// Why no client or tunnel can live in `net`, if so: the end of a sentence.
pub(super) fn reserved(net: &IpNet) -> Option<&'static str> {
    let overlaps = |other: IpNet| net.contains(&other) || other.contains(net);
    let v4 = |a, prefix| IpNet::V4(Ipv4Net::new_assert([a, 0, 0, 0].into(), prefix));
    let v6 = |a, prefix| IpNet::V6(Ipv6Net::new_assert([a, 0, 0, 0, 0, 0, 0, 0].into(), prefix));
    let reserved = [
        (v4(0, 8), "overlaps 0.0.0.0/8, which means \"this network\""),
        (v4(127, 8), "overlaps 127.0.0.0/8, the loopback addresses"),
        (v4(224, 3), "overlaps 224.0.0.0/3, multicast and reserved addresses"),
        (v6(0, 8), "overlaps ::/8, the loopback and other reserved addresses"),
        (v6(0xfe80, 10), "overlaps fe80::/10, the link-local addresses"),
        (v6(0xff00, 8), "overlaps ff00::/8, the multicast addresses"),
    ];
    reserved.into_iter().find(|(other, _)| overlaps(*other)).map(|(_, why)| why)
}

/// A duration as in "15m", "90s", "1h30m", "500ms", "24h": numbers with units d, h, m, s, ms, the largest
/// first, none twice, nothing in between. At most 365 days, so that adding one to a clock's reading can't
/// overflow.
///
/// The error is the end of a sentence that starts with the text.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let malformed = || {
        let units = r#"numbers with the units d, h, m, s or ms, the largest first, as in "1h30m""#;
        if text.starts_with(|c: char| c.is_ascii_digit()) && text.ends_with(|c: char| c.is_ascii_digit()) {
            format!("has no unit: {units}")
        } else {
            format!("is no duration: {units}")
        }
    };
    if text.is_empty() {
        return Err(malformed());
    }
    let mut units = UNITS.iter();
    let mut total: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.bytes().take_while(u8::is_ascii_digit).count());
        let (unit, after) = after.split_at(after.bytes().take_while(u8::is_ascii_lowercase).count());
        // Searching on from the last unit is what keeps them in order.
        let millis = units.find(|(name, _)| *name == unit).map(|(_, millis)| millis).ok_or_else(malformed)?;
        if number.is_empty() {
            return Err(malformed());
        }
        // Digits that don't fit are too long for certain.
        let number = number.parse::<u64>().unwrap_or(u64::MAX);
        total = total.saturating_add(number.saturating_mul(*millis));
        rest = after;
    }
    if total > LONGEST_DURATION {
        Err("is too long: at most 365d".to_owned())
    } else {
        Ok(Duration::from_millis(total))
    }
}

/// The text as a `T`; the failure's sentence starts with the text.
pub(super) fn from_word<T: Word>(text: &str) -> Outcome<T> {
    T::from_word(text).map_err(|why| Failure::usage(format!("{} {why}", quoted(text))))
}

/// The text in quotes as messages show it: never a key, never more than a line.
pub(super) fn quoted(text: &str) -> Cow<'static, str> {
    if text.contains("-----BEGIN") || text.contains("PRIVATE KEY") {
        Cow::Borrowed("(PEM text)")
    } else if text.contains('\n') {
        Cow::Borrowed("(several lines)")
    } else {
        Cow::Owned(format!("{:?}", abridged(text)))
    }
}

/// `socket`, which must fit into a socket address.
pub(super) fn read_socket(value: &Value<'_>) -> Option<PathBuf> {
    let path = value.path()?;
    if path.as_os_str().len() > LONGEST_SOCKET {
        value.fault(format_args!(
            "is too long for a socket: {} is over {LONGEST_SOCKET} bytes",
            path.display()
        ));
        return None;
    }
    Some(path)
}

/// `sun_path` without the NUL.
const LONGEST_SOCKET: usize = 107;

const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
/// In milliseconds.
const LONGEST_DURATION: u64 = 365 * 86_400_000;

#[cfg(test)]
mod tests {
    use super::*;

    /// What `T` says of `text`: the value, or the end of the sentence.
    fn word<T: Word>(text: &str) -> Result<T, String> {
        T::from_word(text)
    }

    #[test]
    fn durations() {
        for (text, millis) in [
            ("15m", 900_000),
            ("90s", 90_000),
            ("1h30m", 5_400_000),
            ("500ms", 500),
            ("24h", 86_400_000),
            ("1d2h3m4s5ms", 93_784_005),
            ("1m500ms", 60_500),
            ("0s", 0),
            ("365d", LONGEST_DURATION),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        let units = r#"numbers with the units d, h, m, s or ms, the largest first, as in "1h30m""#;
        for text in [
            "", "m", "15 m", "15M", "15min", "-1s", "+1s", "1.5h", "1m1m", "30s1m", "1ms1s", " 1s", "1s ",
            "1é",
        ] {
            assert_eq!(parse_duration(text), Err(format!("is no duration: {units}")), "{text}");
        }
        for text in ["15", "0", "1h30", "99999999999999999999999"] {
            assert_eq!(parse_duration(text), Err(format!("has no unit: {units}")), "{text}");
        }
        for text in ["366d", "365d1ms", "99999999999999999999999s", "18446744073709551615d1h"] {
            assert_eq!(parse_duration(text), Err("is too long: at most 365d".to_owned()), "{text}");
        }
    }

    #[test]
    fn rates() {
        let rate = |bits| Ok(Some(Rate::from_bits(bits).expect("a rate")));
        for (text, bits) in [
            ("64000bit/s", 64_000),
            ("64Kbit/s", 64_000),
            ("500kbit/s", 500_000),
            ("20Mbit/s", 20_000_000),
            ("100Gbit/s", 100_000_000_000),
        ] {
            assert_eq!(word::<Option<Rate>>(text), rate(bits), "{text}");
        }
        assert_eq!(word::<Option<Rate>>("off"), Ok(None));
        for text in [
            "",
            "20",
            "20M",
            "20Mbit",
            "20 Mbit/s",
            "1.5Mbit/s",
            "Mbit/s",
            "-1Mbit/s",
            "20MB/s",
            "20Tbit/s",
            "OFF",
        ] {
            let why = r#"is no rate: a whole number with bit/s, Kbit/s, Mbit/s or Gbit/s, as in "20Mbit/s", or "off""#;
            assert_eq!(word::<Option<Rate>>(text), Err(why.to_owned()), "{text}");
        }
        for text in ["0bit/s", "63Kbit/s", "101Gbit/s", "99999999999999999999999Gbit/s"] {
            let why = r#"is out of range: 64Kbit/s to 100Gbit/s, or "off""#;
            assert_eq!(word::<Option<Rate>>(text), Err(why.to_owned()), "{text}");
        }
    }

    #[test]
    fn device_names() {
        for text in ["tg0", "a", "..a", "tun-vpn_1.25", "fifteen-letters"] {
            assert_eq!(word::<DeviceName>(text).expect(text).as_str(), text);
        }
        for text in ["", ".", "..", "sixteen-letters.", "tg 0", "tg/0", "tg:0", "tg%d", "té0", "tg\n"] {
            let why = "is no device name: 1 to 15 letters, digits, '-', '_' or '.'";
            assert_eq!(word::<DeviceName>(text), Err(why.to_owned()), "{text:?}");
        }
        let failure = "a b".parse::<DeviceName>().expect_err("a space");
        assert_eq!(failure.text, r#""a b" is no device name: 1 to 15 letters, digits, '-', '_' or '.'"#);
    }

    #[test]
    fn suites() {
        for suite in Suite::ALL {
            assert_eq!(suite.name().parse(), Ok(suite));
        }
        let why =
            r#""AES-256-GCM" is no suite: "aes-256-gcm", "chacha20-poly1305" or "aes-256-ctr-hmac-sha256""#;
        assert_eq!("AES-256-GCM".parse::<Suite>(), Err(Failure::usage(why)));
    }

    #[test]
    fn socket_addresses() {
        for text in ["[::]:55555", "0.0.0.0:55555", "[fe80::1%2]:1", "192.0.2.1:65535"] {
            assert_eq!(word::<SocketAddr>(text).expect(text).to_string(), text);
        }
        for (text, port) in [("[::]:0", "0"), ("[::]:65536", "65536"), ("192.0.2.1:555555", "555555")] {
            assert_eq!(word::<SocketAddr>(text), Err(format!("has port {port}: 1 to 65535")), "{text}");
        }
        for text in [
            "",
            "0.0.0.0",
            "[::]",
            "::",
            ":55555",
            "55555",
            "*:55555",
            "localhost:55555",
            "[::]:",
            "::1:65536",
        ] {
            let why = r#"is not ADDRESS:PORT, as in "[::]:55555" or "0.0.0.0:55555""#;
            assert_eq!(word::<SocketAddr>(text), Err(why.to_owned()), "{text}");
        }
    }

    #[test]
    fn networks() {
        for text in ["10.9.0.0/24", "fd09::/64", "0.0.0.0/0", "::/0", "192.0.2.7/32"] {
            assert_eq!(word::<IpNet>(text).expect(text).to_string(), text);
        }
        let none = r#"is not a network, as in "10.9.0.0/24" or "fd09::/64""#;
        for (text, why) in [
            ("", none),
            ("10.9.0/24", none),
            ("10.9.0.0/33", none),
            ("10.9.0.0/255.255.255.0", none),
            ("10.9.0.0/", none),
            ("10.9.0.1/24", r#"has host bits set: "10.9.0.0/24" was probably meant"#),
            ("fd09::1/64", r#"has host bits set: "fd09::/64" was probably meant"#),
            ("10.9.0.0", r#"has no prefix length: for this one host it is "10.9.0.0/32""#),
            ("fd09::1", r#"has no prefix length: for this one host it is "fd09::1/128""#),
        ] {
            assert_eq!(word::<IpNet>(text), Err(why.to_owned()), "{text}");
        }
    }

    #[test]
    fn addresses() {
        for text in ["10.9.0.1", "fd09::1"] {
            assert_eq!(word::<IpAddr>(text).expect(text).to_string(), text);
        }
        let wanted = r#"an IP address, as in "10.9.0.1" or "fd09::1""#;
        for text in ["", "10.9.0", "10.9.0.256", "10.9.0.1/24", "[fd09::1]", "dns.example.org"] {
            assert_eq!(word::<IpAddr>(text), Err(format!("is not {wanted}")), "{text}");
        }
        for text in ["0.0.0.0", "::", "224.0.0.1", "ff02::1"] {
            assert_eq!(word::<IpAddr>(text), Err(format!("names no single host: give {wanted}")), "{text}");
        }
    }

    #[test]
    fn messages_hold_no_keys() {
        assert_eq!(quoted("-----BEGIN RSA"), "(PEM text)");
        assert_eq!(quoted("----BEGIN PRIVATE KEY"), "(PEM text)");
        assert_eq!(quoted("MII\nMII"), "(several lines)");
        assert_eq!(quoted("a\tb\u{1b}"), r#""a\tb\u{1b}""#);
        assert_eq!(quoted(&"é".repeat(100)), format!("\"{}...\"", "é".repeat(80)));
        let pem = Pem::Inline { key: "tls.key", text: "secret".to_owned() };
        assert_eq!(format!("{pem:?}"), "Inline(tls.key)");
        assert_eq!(pem.name("tls.key"), "in tls.key");
    }
}
