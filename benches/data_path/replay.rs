//! The window against replays.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use tunguard::replay::{Replayed, WINDOW, Window};

use crate::packets::Rng;

pub fn benches(criterion: &mut Criterion) {
    let in_order: Vec<u64> = (0..WINDOW).collect();
    let mut shuffled = in_order.clone();
    Rng::new().shuffle(&mut shuffled);

    let mut group = criterion.benchmark_group("replay");
    group.throughput(Throughput::Elements(1));
    for (name, order) in [("in_order", in_order), ("random_order", shuffled)] {
        let mut window = Window::default();
        for counter in Counters::new(&order).take(order.len() * 3) {
            assert!(accept(&mut window, counter).is_ok());
            assert_eq!(accept(&mut window, counter), Err(Replayed::Duplicate));
        }

        let (mut window, mut counters) = (Window::default(), Counters::new(&order));
        group.bench_function(name, |b| {
            b.iter(|| {
                counters.next().map(|counter| accept(&mut window, black_box(counter)).expect("is new"))
            });
        });
    }
    group.finish();
}

fn accept(window: &mut Window, counter: u64) -> Result<bool, Replayed> {
    window.check(counter).map(|()| window.commit(counter))
}

/// Every counter once, without end: one window's length in the order given, then the next. So none is ever a
/// replay or too old.
struct Counters<'a> {
    order: &'a [u64],
    base: u64,
    at: usize,
}

impl Counters<'_> {
    fn new(order: &[u64]) -> Counters<'_> {
        Counters { order, base: 0, at: 0 }
    }
}

impl Iterator for Counters<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.at == self.order.len() {
            (self.base, self.at) = (self.base + self.order.len() as u64, 0);
        }
        self.at += 1;
        Some(self.base + self.order[self.at - 1])
    }
}
