//! Text from a peer, made safe for a terminal and a log.

use std::fmt;

/// Shows `0` with every control character escaped, and everything that could pass for another line, colour or
/// direction of writing (CVE-2024-5594).
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| {
            if c == ' ' || c.is_ascii_graphic() || (c.is_alphanumeric() && !c.is_ascii()) {
                write!(f, "{c}")
            } else {
                write!(f, "{}", c.escape_default())
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_not_obeyed() {
        assert_eq!(Escaped("plain text, größer").to_string(), "plain text, größer");
        assert_eq!(Escaped("a\nb\x1b[31mc\u{202e}d\0").to_string(), "a\\nb\\u{1b}[31mc\\u{202e}d\\u{0}");
    }
}
