//! For tests: a build with the cargo feature `rigged` takes orders from the file `rigged.orders` beside its program, one a line:
//!
//! ```text
//! halt POINT       go no further than POINT, so that a test can kill the process exactly there
//! leave-out LAYER  lock in without one layer of the sandbox, so that a test sees that it was needed
//! act NAME         what a worker under foreign control would try (worker/src/red_team.rs)
//! with WHAT        what an act needs to know
//! ```
//! Any other build takes none: the functions are empty, and no file is looked for. A rigged program has a version of its
//! own, so that it works with none that isn't.

/// Reads the orders: at the start of a process, before it is locked in, and again before another is forked.
pub fn read_orders() {
    #[cfg(feature = "rigged")]
    orders::read();
}

/// A point that `halt` may name: `process.state`, with the state that the process has just reached.
#[inline]
pub fn point(_name: &str) {
    #[cfg(feature = "rigged")]
    orders::halt_at(_name);
}

/// Whether the sandbox is to do without this layer.
#[cfg(feature = "rigged")]
pub fn leaves_out(layer: &str) -> bool {
    orders::has("leave-out", layer)
}

/// What a worker is to try.
#[cfg(feature = "rigged")]
pub fn acts() -> Vec<String> {
    orders::all("act")
}

/// What its acts need to know.
#[cfg(feature = "rigged")]
pub fn with() -> Option<String> {
    orders::all("with").pop()
}

#[cfg(feature = "rigged")]
mod orders {
    use std::sync::Mutex;

    static ORDERS: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

    pub fn read() {
        let program = std::fs::read_link("/proc/self/exe").expect("our own program");
        let text = std::fs::read_to_string(program.with_file_name("rigged.orders")).unwrap_or_default();
        let orders = text.lines().filter_map(|line| line.split_once(' '));
        *ORDERS.lock().expect("one thread") = orders.map(|(verb, what)| (verb.into(), what.into())).collect();
    }

    pub fn has(verb: &str, what: &str) -> bool {
        ORDERS.lock().expect("one thread").iter().any(|(v, w)| v == verb && w == what)
    }

    pub fn all(verb: &str) -> Vec<String> {
        let orders = ORDERS.lock().expect("one thread");
        orders.iter().filter(|(v, _)| v == verb).map(|(_, what)| what.clone()).collect()
    }

    pub fn halt_at(name: &str) {
        if has("halt", name) {
            log::warn!("halted at {name}");
            // Without a system call, as none may be permitted here.
            loop {
                std::hint::spin_loop();
            }
        }
    }
}
