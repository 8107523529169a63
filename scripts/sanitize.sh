#!/usr/bin/env bash
# What `make sanitize` does: runs the tests of the unsafe layer (src/sys) and those of TLS, where most calls into C are,
# under the address sanitizer, which looks for leaks as well. Rust's own library and OpenSSL are not instrumented, but
# what they allocate is watched. A stable toolchain will do.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
scripts/packages.sh build fuzz
# shellcheck source=scripts/sanitizer-env.sh
. scripts/sanitizer-env.sh
# With a target named, build scripts and macros are not instrumented.
host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="-Zsanitizer=address ${RUSTFLAGS:-}"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/sanitize
export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1:${ASAN_OPTIONS:-}
cargo test --locked --target "$host" --lib -- sys::
cargo test --locked --target "$host" --test tls
cargo test --locked --target "$host" --test seeds
