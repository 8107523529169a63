//! A client's first inner packets, that come with its Hello: how many and how large.

use std::fmt;

use crate::wire::control::{MAX_EARLY, MAX_EARLY_BYTES, MAX_EARLY_PACKET};

/// Counts the packets of one connection, at either end. No I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Early {
    packets: usize,
    bytes: usize,
    /// Another message came after the Hello: no more of these may.
    closed: bool,
}

/// A packet that may not come early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotEarly {
    /// Something else was said before.
    Closed,
    /// Too many, or too many bytes.
    TooMuch,
    /// Empty, or larger than one may be.
    Size,
}

impl fmt::Display for NotEarly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NotEarly::Closed => "an early packet after other messages",
            NotEarly::TooMuch => "more early packets than may come with a Hello",
            NotEarly::Size => "an early packet of a size that none has",
        })
    }
}

impl Early {
    /// Takes one of `len` bytes, if it may come. After an error none may.
    pub fn take(&mut self, len: usize) -> Result<(), NotEarly> {
        let fault = if self.closed {
            NotEarly::Closed
        } else if len == 0 || len > MAX_EARLY_PACKET {
            NotEarly::Size
        } else if self.packets == MAX_EARLY || self.bytes + len > MAX_EARLY_BYTES {
            NotEarly::TooMuch
        } else {
            self.packets += 1;
            self.bytes += len;
            return Ok(());
        };
        self.closed = true;
        Err(fault)
    }

    /// Another message came.
    pub fn close(&mut self) {
        self.closed = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_are_taken_and_no_eleventh() {
        let mut early = Early::default();
        for _ in 0..10 {
            assert_eq!(early.take(1_000), Ok(()));
        }
        assert_eq!(early.take(1), Err(NotEarly::TooMuch));
        assert_eq!(early.take(1), Err(NotEarly::Closed));
    }

    #[test]
    fn twelve_thousand_bytes_are_taken_and_no_more() {
        let mut early = Early::default();
        for _ in 0..8 {
            assert_eq!(early.take(1_500), Ok(()));
        }
        assert_eq!(early.take(1), Err(NotEarly::TooMuch));
    }

    #[test]
    fn sizes_and_place() {
        assert_eq!(Early::default().take(0), Err(NotEarly::Size));
        assert_eq!(Early::default().take(1_501), Err(NotEarly::Size));
        let mut early = Early::default();
        assert_eq!(early.take(1), Ok(()));
        early.close();
        assert_eq!(early.take(1), Err(NotEarly::Closed));
    }
}
