//! Which parts of a session's memory are in use: first fit, so that little of it is ever touched.

/// Parts of a memory of fixed size.
#[derive(Debug)]
pub struct Blocks {
    size: usize,
    /// First byte and the byte after the last, in order.
    taken: Vec<(usize, usize)>,
}

impl Blocks {
    /// Of a memory of `size` bytes, all of it free.
    pub fn new(size: usize) -> Blocks {
        Blocks { size, taken: Vec::new() }
    }

    /// Takes the first free `len` bytes, and says where they start; `None` where there are nowhere so many.
    pub fn take(&mut self, len: usize) -> Option<usize> {
        let mut start = 0;
        let mut at = 0;
        for (taken_from, taken_to) in &self.taken {
            if taken_from - start >= len {
                break;
            }
            start = *taken_to;
            at += 1;
        }
        if self.size - start < len || len == 0 {
            return None;
        }
        self.taken.insert(at, (start, start + len));
        Some(start)
    }

    /// Lengthens the block that starts at `start` by `by` bytes; `false` where what follows it is in use.
    pub fn extend(&mut self, start: usize, by: usize) -> bool {
        let Ok(at) = self.taken.binary_search_by_key(&start, |block| block.0) else { return false };
        let limit = self.taken.get(at + 1).map_or(self.size, |next| next.0);
        let end = &mut self.taken[at].1;
        let fits = limit - *end >= by;
        if fits {
            *end += by;
        }
        fits
    }

    /// Frees the block that starts at `start`.
    pub fn give(&mut self, start: usize) {
        if let Ok(at) = self.taken.binary_search_by_key(&start, |block| block.0) {
            self.taken.remove(at);
        }
    }

    /// Bytes in use.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.taken.iter().map(|(from, to)| to - from).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_gap_that_is_large_enough() {
        let mut blocks = Blocks::new(100);
        assert_eq!([40, 30, 30, 1].map(|len| blocks.take(len)), [Some(0), Some(40), Some(70), None]);
        blocks.give(40);
        assert_eq!(blocks.take(31), None);
        assert_eq!(blocks.take(20), Some(40));
        assert!(!blocks.extend(40, 11));
        assert!(blocks.extend(40, 10));
        assert!(!blocks.extend(41, 0), "no such block");
        assert_eq!(blocks.used(), 100);
        assert_eq!(blocks.take(0), None);
    }

    proptest! {
        #[test]
        fn blocks_never_overlap(steps in prop::collection::vec((0..3u8, 1..400usize), 1..200)) {
            let mut blocks = Blocks::new(1000);
            let mut mine: Vec<(usize, usize)> = Vec::new();
            for (what, n) in steps {
                match what {
                    0 => {
                        let start = blocks.take(n);
                        // Refused only where no gap is so long.
                        let mut edges: Vec<_> = mine.iter().copied().chain([(1000, 0)]).collect();
                        edges.sort();
                        let mut from = 0;
                        let mut gap = 0;
                        for (start, len) in edges {
                            gap = gap.max(start - from);
                            from = start + len;
                        }
                        prop_assert_eq!(start.is_some(), gap >= n);
                        mine.extend(start.map(|start| (start, n)));
                    }
                    1 if !mine.is_empty() => {
                        let (start, _) = mine.swap_remove(n % mine.len());
                        blocks.give(start);
                    }
                    2 if !mine.is_empty() => {
                        let at = n % mine.len();
                        if blocks.extend(mine[at].0, n) {
                            mine[at].1 += n;
                        }
                    }
                    _ => {}
                }
                mine.sort();
                prop_assert!(mine.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
                prop_assert!(mine.last().is_none_or(|(start, len)| start + len <= 1000));
                prop_assert_eq!(blocks.used(), mine.iter().map(|(_, len)| len).sum::<usize>());
            }
        }
    }
}
