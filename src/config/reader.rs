//! Reads TOML into typed values and keeps track of where each one stood.
//!
//! 1. [`read`] brings the text in, [`Document::parse`] its syntax.
//! 2. [`Document::root`] and [`Section::section`] give tables, [`Section::value`] a key's [`Value`].
//! 3. A `Value` turns into a type, or notes a fault that names file, line, key and what is accepted.
//! 4. [`Section::end`] notes every key that nobody asked for.
//! 5. [`Document::faults`] are all of them in the file's order; [`outcome`] makes one failure of them.
//!
//! So a reader of a file asks for everything, with defaults where something was wrong, and looks at the
//! faults once, at the end: the user learns of all mistakes at once.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::common::{Pem, parse_duration, quoted};
use crate::exit::{Failure, Outcome};

/// The text of the file at `path`, and the file's absolute path: its canonical directory and its name.
pub(super) fn read(path: &Path) -> Outcome<(String, PathBuf)> {
    let failed = |error: std::io::Error| Failure::usage(format!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(LONGEST_FILE + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > LONGEST_FILE {
        return Err(Failure::usage(format!("{}: longer than {LONGEST_FILE} bytes", path.display())));
    }
    let text = decode(path, bytes)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut absolute = directory.canonicalize().map_err(failed)?;
    absolute.extend(path.file_name());
    Ok((text, absolute))
}

/// The file's bytes as text.
fn decode(path: &Path, bytes: Vec<u8>) -> Outcome<String> {
    String::from_utf8(bytes).map_err(|error| {
        let line = line_of(error.as_bytes(), error.utf8_error().valid_up_to());
        Failure::usage(format!("{}:{line}: this line is not UTF-8", path.display()))
    })
}

/// `value`, or one failure with a line for each fault.
pub(super) fn outcome<T>(value: Option<T>, faults: Vec<String>) -> Outcome<T> {
    match value {
        Some(value) if faults.is_empty() => Ok(value),
        _ => Err(Failure::usage(faults.join("\n"))),
    }
}

/// One file: its syntax tree, and what was wrong with it so far.
pub(super) struct Document<'t> {
    /// The file as messages name it.
    shown: String,
    /// What relative paths are relative to.
    directory: PathBuf,
    text: &'t str,
    table: DeTable<'t>,
    faults: RefCell<Vec<Fault>>,
    unknown: RefCell<Vec<Unknown>>,
    known: RefCell<Vec<String>>,
}

/// What is wrong, and at which byte of the text; without a place it is something missing.
struct Fault {
    at: Option<usize>,
    text: String,
}

/// A key that nobody asked for.
struct Unknown {
    at: usize,
    prefix: String,
    key: String,
}

impl<'t> Document<'t> {
    /// The syntax tree of `text`, which stands in the file `shown`; relative paths start at `directory`.
    pub(super) fn parse(shown: &Path, directory: &Path, text: &'t str) -> Outcome<Document<'t>> {
        let shown = shown.display().to_string();
        let table = DeTable::parse(text).map_err(|error| {
            // Only the message: the error's own rendering quotes the line, which may hold a private key.
            let at = error.span().map_or(text.len(), |span| span.start).min(text.len());
            let (line, column) = (line_of(text.as_bytes(), at), column_of(text.as_bytes(), at));
            let key = match error.message() {
                "duplicate key" => {
                    error.span().and_then(|span| text.get(span)).map(|key| format!(" {}", quoted(key)))
                }
                _ => None,
            };
            let key = key.unwrap_or_default();
            Failure::usage(format!("{shown}:{line}:{column}: not valid TOML: {}{key}", error.message()))
        })?;
        Ok(Document {
            shown,
            directory: directory.to_owned(),
            text,
            table: table.into_inner(),
            faults: RefCell::default(),
            unknown: RefCell::default(),
            known: RefCell::default(),
        })
    }

    /// The keys before the first section.
    pub(super) fn root(&self) -> Section<'_> {
        Section { document: self, prefix: String::new(), found: Found::Table(&self.table), known: Vec::new() }
    }

    /// Every fault as a sentence, in the file's order; what is missing comes last.
    pub(super) fn faults(self) -> Vec<String> {
        let known = self.known.into_inner();
        let unknown = self.unknown.into_inner();
        let mut faults = self.faults.into_inner();
        faults.extend(unknown.iter().map(|u| Fault { at: Some(u.at), text: u.sentence(&known) }));
        faults.sort_by_key(|fault| fault.at.unwrap_or(usize::MAX));
        let sentence = |fault: Fault| match fault.at {
            Some(at) => format!("{}:{}: {}", self.shown, line_of(self.text.as_bytes(), at), fault.text),
            None => format!("{}: {}", self.shown, fault.text),
        };
        faults.into_iter().map(sentence).collect()
    }

    /// Every key that was asked for, in full.
    #[cfg(test)]
    pub(super) fn known(&self) -> Vec<String> {
        self.known.borrow().clone()
    }

    fn fault(&self, at: Option<usize>, text: String) {
        self.faults.borrow_mut().push(Fault { at, text });
    }
}

impl Unknown {
    /// Names the key that was probably meant: the same one in another section, else one spelled alike in the
    /// same section, else all of the section's.
    fn sentence(&self, known: &[String]) -> String {
        let start = format!("unknown key {}", quoted(&format!("{}{}", self.prefix, self.key)));
        let elsewhere = |full: &&String| full.rsplit('.').next() == Some(&self.key);
        let here: Vec<&str> = known
            .iter()
            .filter_map(|full| full.strip_prefix(&self.prefix))
            .filter(|key| !key.contains('.'))
            .collect();
        let meant = nearest(&self.key, &here).map(|key| format!("{}{key}", self.prefix));
        match known.iter().find(elsewhere).or(meant.as_ref()) {
            Some(full) if !self.prefix.is_empty() && !full.contains('.') => {
                format!("{start} ({full:?} belongs before the first [section])")
            }
            Some(full) => format!("{start} (did you mean {full:?}?)"),
            None => format!("{start} (known here: {})", here.join(", ")),
        }
    }
}

/// The candidate that `word` is a misspelling of, if one is near: at most a third of its letters differ, or
/// one.
fn nearest<'c>(word: &str, candidates: &[&'c str]) -> Option<&'c str> {
    let word = word.to_lowercase();
    if word.len() > LONGEST_SHOWN {
        return None;
    }
    let rank = |candidate: &&'c str| {
        let distance = strsim::osa_distance(&word, candidate);
        let near = distance <= (candidate.len() / 3).max(1) && distance < word.len();
        near.then(|| (distance, 1.0 - strsim::jaro_winkler(&word, candidate), *candidate))
    };
    let order = |a: &(usize, f64, &str), b: &(usize, f64, &str)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1));
    candidates.iter().filter_map(rank).min_by(order).map(|(_, _, candidate)| candidate)
}

/// A table of the file. Ask it for every key it may hold, then [`end`](Section::end) it.
#[must_use = "a section that isn't ended accepts unknown keys"]
pub(super) struct Section<'d> {
    document: &'d Document<'d>,
    /// What stands before its keys in messages: "" or "tls.".
    prefix: String,
    found: Found<'d>,
    known: Vec<&'static str>,
}

/// What stands where a section may stand.
enum Found<'d> {
    Table(&'d DeTable<'d>),
    Nothing,
    /// Something that isn't a table, already noted as a fault.
    Else,
}

impl<'d> Section<'d> {
    /// The value of `key`, if there is one.
    pub(super) fn value(&mut self, key: &'static str) -> Option<Value<'d>> {
        self.known.push(key);
        let Found::Table(table) = self.found else { return None };
        let node = table.get(key)?;
        Some(Value { document: self.document, key: format!("{}{key}", self.prefix), node })
    }

    /// The value of `key`, which must be there; `wanted` says what it is.
    pub(super) fn required(&mut self, key: &'static str, wanted: &str) -> Option<Value<'d>> {
        let value = self.value(key);
        if value.is_none() && !matches!(self.found, Found::Else) {
            self.document.fault(None, format!("{}{key} is missing: give {wanted}", self.prefix));
        }
        value
    }

    /// The section of this name, empty if it isn't there.
    pub(super) fn section(&mut self, name: &'static str) -> Section<'d> {
        let found = match self.value(name) {
            None => Found::Nothing,
            Some(value) => match value.node.get_ref() {
                DeValue::Table(table) => Found::Table(table),
                _ => {
                    value.wrong_type::<()>("a section");
                    Found::Else
                }
            },
        };
        Section {
            document: self.document,
            prefix: format!("{}{name}.", self.prefix),
            found,
            known: Vec::new(),
        }
    }

    /// Notes every key that nobody asked for.
    pub(super) fn end(self) {
        if let Found::Table(table) = self.found {
            for (key, _) in table.iter().filter(|(key, _)| !self.known.contains(&key.get_ref().as_ref())) {
                let unknown = Unknown {
                    at: key.span().start,
                    prefix: self.prefix.clone(),
                    key: key.get_ref().clone().into_owned(),
                };
                self.document.unknown.borrow_mut().push(unknown);
            }
        }
        self.document.known.borrow_mut().extend(self.known.iter().map(|key| format!("{}{key}", self.prefix)));
    }
}

/// A type that is written as a string.
pub(super) trait Word: Sized {
    /// What is accepted, as a noun: "an address, as in ...".
    const WANTED: &'static str;

    /// The value, or what is wrong: the end of a sentence that starts with `key = "text"`.
    fn from_word(text: &str) -> Result<Self, String>;
}

/// One value of the file. The methods return `None` after noting a fault.
pub(super) struct Value<'d> {
    document: &'d Document<'d>,
    /// The full key, as in `push.routes[1]`.
    key: String,
    node: &'d Spanned<DeValue<'d>>,
}

impl<'d> Value<'d> {
    /// Notes that this value can't be accepted; `why` ends the sentence `key = value ...`.
    pub(super) fn fault(&self, why: impl Display) {
        let sentence = match shown(self.node.get_ref()) {
            Some(value) => format!("{} = {value} {why}", self.key),
            None => format!("{} {why}", self.key),
        };
        self.document.fault(Some(self.node.span().start), sentence);
    }

    /// Where the value stands: `file:line`.
    pub(super) fn place(&self) -> String {
        let at = self.node.span().start;
        format!("{}:{}", self.document.shown, line_of(self.document.text.as_bytes(), at))
    }

    /// `true` or `false`.
    pub(super) fn boolean(&self) -> Option<bool> {
        match self.node.get_ref() {
            DeValue::Boolean(value) => Some(*value),
            _ => self.wrong_type("true or false"),
        }
    }

    /// An integer within `range`.
    pub(super) fn integer<T>(&self, range: RangeInclusive<T>) -> Option<T>
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        let (first, last) = (range.start(), range.end());
        let DeValue::Integer(integer) = self.node.get_ref() else {
            return self.wrong_type(&format!("an integer, {first} to {last}"));
        };
        // What doesn't fit even here is out of every range.
        let value = i128::from_str_radix(integer.as_str(), integer.radix()).ok();
        match value.and_then(|value| T::try_from(value).ok()) {
            Some(value) if range.contains(&value) => Some(value),
            _ => {
                self.fault(format_args!("is out of range: {first} to {last}"));
                None
            }
        }
    }

    /// A string that is a `T`.
    pub(super) fn word<T: Word>(&self) -> Option<T> {
        let text = self.text(T::WANTED)?;
        T::from_word(text).map_err(|why| self.fault(why)).ok()
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let words: Vec<String> = choices.iter().map(|(word, _)| quoted(word).into_owned()).collect();
        let wanted = words.join(" or ");
        let text = self.text(&wanted)?;
        let choice = choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if choice.is_none() {
            self.fault(format_args!("is not accepted: {wanted}"));
        }
        choice
    }

    /// A duration of at least `least`.
    pub(super) fn duration(&self, least: Duration) -> Option<Duration> {
        let text = self.text(r#"a duration, as in "15m", "90s", "1h30m" or "500ms""#)?;
        match parse_duration(text) {
            Ok(duration) if duration >= least => Some(duration),
            Ok(_) => {
                self.fault(format_args!("is too short: at least {}s", least.as_secs()));
                None
            }
            Err(why) => {
                self.fault(why);
                None
            }
        }
    }

    /// A path, made absolute.
    pub(super) fn path(&self) -> Option<PathBuf> {
        let text = self.text("a path")?;
        if text.trim_start().starts_with(PEM_START) {
            self.fault("must be a path");
            None
        } else if text.is_empty() || text.len() > LONGEST_PATH || text.contains(|c: char| c.is_control()) {
            self.fault(format_args!("is no path: 1 to {LONGEST_PATH} bytes without control characters"));
            None
        } else {
            Some(self.document.directory.join(text))
        }
    }

    /// A path or PEM text; `key` is the full key.
    pub(super) fn pem(&self, key: &'static str) -> Option<Pem> {
        let text = self.text("a path or PEM text")?;
        if text.trim_start().starts_with(PEM_START) {
            Some(Pem::Inline { key, text: text.trim_start().to_owned() })
        } else if text.contains('\n') {
            self.fault(format_args!("is neither a path nor PEM text, which starts with {PEM_START}"));
            None
        } else {
            self.path().map(Pem::File)
        }
    }

    /// The string, if it is one.
    pub(super) fn text(&self, wanted: &str) -> Option<&'d str> {
        match self.node.get_ref() {
            DeValue::String(text) => Some(text),
            _ => self.wrong_type(wanted),
        }
    }

    /// Whether this is a string.
    pub(super) fn is_text(&self) -> bool {
        self.node.get_ref().is_str()
    }

    /// Whether this is an integer.
    pub(super) fn is_integer(&self) -> bool {
        self.node.get_ref().is_integer()
    }

    /// Whether this is a list.
    pub(super) fn is_list(&self) -> bool {
        self.node.get_ref().is_array()
    }

    /// The elements of a list.
    pub(super) fn list(&self, wanted: &str) -> Option<Vec<Value<'d>>> {
        let DeValue::Array(array) = self.node.get_ref() else {
            return self.wrong_type(&format!("a list of {wanted}"));
        };
        let element = |(i, node)| Value { document: self.document, key: format!("{}[{i}]", self.key), node };
        Some(array.iter().enumerate().map(element).collect())
    }

    /// The elements of a list of strings that are each a `T`, none twice; faulty ones are left out.
    pub(super) fn words<T: Word + PartialEq>(&self) -> Vec<(T, Value<'d>)> {
        let mut words: Vec<(T, Value<'d>)> = Vec::new();
        for value in self.list(&format!("strings, each {}", T::WANTED)).unwrap_or_default() {
            let Some(word) = value.word::<T>() else { continue };
            match words.iter().find(|(earlier, _)| *earlier == word) {
                Some((_, earlier)) => value.fault(format_args!("is already in the list: {}", earlier.key)),
                None => words.push((word, value)),
            }
        }
        words
    }

    /// As [`words`](Value::words), at least one.
    pub(super) fn some_words<T: Word + PartialEq>(&self) -> Vec<(T, Value<'d>)> {
        if self.node.get_ref().as_array().is_some_and(|array| array.is_empty()) {
            self.fault(format_args!("is empty: at least one is needed, {}", T::WANTED));
        }
        self.words()
    }

    /// Notes that the value is of the wrong type.
    pub(super) fn wrong_type<T>(&self, wanted: &str) -> Option<T> {
        let is = match self.node.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a number with a fraction",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date or time",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        self.fault(format_args!("is {is}, not {wanted}"));
        None
    }
}

/// The value as the user wrote it, where that is one short thing.
fn shown<'v>(value: &'v DeValue<'_>) -> Option<Cow<'v, str>> {
    match value {
        DeValue::String(text) => Some(quoted(text)),
        DeValue::Integer(integer) => Some(Cow::Owned(abridged(&integer.to_string()))),
        DeValue::Float(float) => Some(Cow::Owned(abridged(float.as_str()))),
        DeValue::Boolean(boolean) => Some(Cow::Borrowed(if *boolean { "true" } else { "false" })),
        DeValue::Datetime(datetime) => Some(Cow::Owned(datetime.to_string())),
        DeValue::Array(_) | DeValue::Table(_) => None,
    }
}

/// `text`, cut where it is too long for a message.
pub(super) fn abridged(text: &str) -> String {
    match text.char_indices().nth(LONGEST_SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The line that byte `at` stands in, from 1.
fn line_of(text: &[u8], at: usize) -> usize {
    1 + text[..at].iter().filter(|byte| **byte == b'\n').count()
}

/// The column of byte `at` in its line, from 1, in characters.
fn column_of(text: &[u8], at: usize) -> usize {
    let line = text[..at].rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    1 + String::from_utf8_lossy(line).chars().count()
}

/// How PEM text starts.
const PEM_START: &str = "-----BEGIN";
/// Longest file that is read: far above any profile.
const LONGEST_FILE: u64 = 1 << 20;
/// PATH_MAX without the NUL.
const LONGEST_PATH: usize = 4095;
/// Characters of a value that a message shows.
const LONGEST_SHOWN: usize = 80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax_errors_name_line_and_column() {
        for (text, sentence) in [
            (
                "a = 1\nb = ",
                "f.toml:2:5: not valid TOML: string values must be quoted, expected literal string",
            ),
            ("a = 1\na = 2", "f.toml:2:1: not valid TOML: duplicate key \"a\""),
            ("[a]\n[a]", "f.toml:2:2: not valid TOML: duplicate key \"a\""),
            ("[a\n", "f.toml:1:3: not valid TOML: unclosed table, expected `]`"),
            (
                "é = 1",
                "f.toml:1:1: not valid TOML: invalid unquoted key, expected letters, numbers, `-`, `_`",
            ),
        ] {
            let failure = Document::parse(Path::new("f.toml"), Path::new("/"), text).err().expect(text);
            assert_eq!((failure.exit, failure.text.as_str()), (crate::exit::Exit::Usage, sentence));
        }
    }

    #[test]
    fn syntax_errors_show_no_values() {
        let text = "key = \"\"\"-----BEGIN PRIVATE KEY-----\nsecret\\q\n\"\"\"";
        let failure = Document::parse(Path::new("f.toml"), Path::new("/"), text).err().expect("a bad escape");
        assert!(failure.text.starts_with("f.toml:2:"), "{failure}");
        assert!(!failure.text.contains("secret"), "{failure}");
    }

    #[test]
    fn deep_nesting_is_refused() {
        let text = format!("a = {}", "[".repeat(1 << 16));
        assert!(Document::parse(Path::new("f.toml"), Path::new("/"), &text).is_err());
        let text = format!("a{} = 1", ".a".repeat(1 << 16));
        assert!(Document::parse(Path::new("f.toml"), Path::new("/"), &text).is_err());
    }

    #[test]
    fn faults_come_in_the_files_order() {
        let text = "z = 1\nb = 'x'\n[t]\nq = 1\nf = 1.5\n";
        let document = Document::parse(Path::new("f.toml"), Path::new("/"), text).expect("valid TOML");
        let mut root = document.root();
        let mut section = root.section("t");
        assert_eq!(section.value("f").and_then(|v| v.boolean()), None);
        assert!(section.required("must", "a thing").is_none());
        section.end();
        assert_eq!(root.value("b").and_then(|v| v.integer(0u8..=9)), None);
        root.end();
        let faults = [
            r#"f.toml:1: unknown key "z" (known here: t, b)"#,
            r#"f.toml:2: b = "x" is a string, not an integer, 0 to 9"#,
            r#"f.toml:4: unknown key "t.q" (known here: f, must)"#,
            "f.toml:5: t.f = 1.5 is a number with a fraction, not true or false",
            "f.toml: t.must is missing: give a thing",
        ];
        assert_eq!(document.faults(), faults);
    }

    #[test]
    fn nearest_keys() {
        let keys = ["ca", "cert", "key", "crl", "networks", "max_clients"];
        for (word, meant) in [
            ("netwroks", Some("networks")),
            ("network", Some("networks")),
            ("NETWORKS", Some("networks")),
            ("max-clients", Some("max_clients")),
            ("maxclients", Some("max_clients")),
            ("crt", Some("cert")),
            ("cer", Some("cert")),
            ("keys", Some("key")),
            ("k", None),
            ("mtu", None),
            ("password", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, &keys), meant, "{word}");
        }
        assert_eq!(nearest(&"n".repeat(1 << 20), &keys), None);
    }

    #[test]
    fn files_that_cannot_be_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("f.toml");
        let name = path.display();
        let sentence = |path: &Path| read(path).expect_err("unreadable").text;
        assert_eq!(sentence(&path), format!("{name}: No such file or directory (os error 2)"));
        std::fs::write(&path, b"a = 1\nb = '\xff'\n").expect("a file");
        assert_eq!(sentence(&path), format!("{name}:2: this line is not UTF-8"));
        std::fs::write(&path, vec![b'#'; LONGEST_FILE as usize + 1]).expect("a file");
        assert_eq!(sentence(&path), format!("{name}: longer than 1048576 bytes"));
        let directory = directory.path();
        assert_eq!(sentence(directory), format!("{}: Is a directory (os error 21)", directory.display()));
    }
}
