#!/bin/sh
# Builds the three programs with the feature `rigged` (src/rigged.rs), for the tests that need it, into target/debug/rigged.
set -eu
cd "$(dirname "$0")/.."
debug=${CARGO_TARGET_DIR:-target}/debug
cargo build --locked -p tunguard -p tunguard-guard -p tunguard-worker --bins \
    --features tunguard/rigged,tunguard-guard/rigged,tunguard-worker/rigged
mkdir -p "$debug/rigged"
for program in tunguard tunguard-guard tunguard-worker; do
    # The next build puts its own program in place of this one, and leaves the file that both names stand for.
    ln -f "$debug/$program" "$debug/rigged/$program"
done
