//! The fuzz targets' bodies without a fuzzer: what was found once stays found, and random bytes find the rest that is
//! easy to find.

#[path = "../../fuzz/bodies/mod.rs"]
mod bodies;
#[path = "../common/mod.rs"]
#[allow(dead_code, reason = "for several test binaries, each of which needs a part")]
mod common;
mod written;

use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn every_seed_passes() {
    for (name, body) in bodies::TARGETS {
        let folder = folder(name);
        let seeds = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut replayed = 0;
        for seed in seeds {
            let path = seed.expect("an entry").path();
            // Shown if it fails.
            println!("{}", path.display());
            body(&fs::read(&path).expect("a readable file"));
            replayed += 1;
        }
        assert!(replayed > 0, "{name} has no seeds");
    }
}

#[test]
fn random_bytes_pass() {
    for (name, body) in bodies::TARGETS {
        for round in 0..ROUNDS {
            println!("{name}, input {round}");
            body(&random(round));
        }
    }
}

/// Those that are made of literal vectors and of words are what the code here makes of them. Certificates are others
/// each time.
#[test]
fn the_seeds_are_those_written_here() {
    for (name, seed, bytes) in written::fixed() {
        let path = folder(name).join(&seed);
        let committed = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}: {WRITE}", path.display()));
        assert!(committed == bytes, "{} is another: {WRITE}", path.display());
    }
}

#[test]
#[ignore = "run by hand: writes fuzz/seeds anew"]
fn write_seeds() {
    for (name, seed, bytes) in written::fixed().into_iter().chain(written::certificates()) {
        fs::create_dir_all(folder(name)).expect("a folder");
        fs::write(folder(name).join(seed), bytes).expect("writes");
    }
}

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target)
}

/// Some bytes, the same every time (xorshift64).
fn random(round: u64) -> Vec<u8> {
    let mut state = (round + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    let len = usize::from(next()) * 4;
    (0..len).map(|_| next()).collect()
}

const ROUNDS: u64 = 60;
const WRITE: &str = "cargo test --test seeds -- --ignored write_seeds";
