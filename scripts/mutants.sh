#!/usr/bin/env bash
# What `make mutants` does: scripts/mutants.sh [FILE...]
#
# Changes the code that decides who gets in and what is let through in small ways, one at a time, and runs the tests
# that should notice. docs/mutants.md has what is missed, and why that is right. Takes hours; the results are in
# mutants.out beside the build (target/mutants). Only what git tracks is copied and changed.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
scripts/packages.sh build
if ! command -v cargo-mutants >/dev/null; then
    echo "cargo-mutants is missing: installing it"
    cargo install --locked cargo-mutants
fi

out=$PWD/${CARGO_TARGET_DIR:-target}/mutants
export CARGO_TARGET_DIR=$out/build
mkdir -p "$out"

# mutants NAME PACKAGE "FILE..." TEST...: the tests are cargo test's own options
mutants() {
    local name=$1 files=$3 options=(--package "$2")
    shift 3
    for file in $files; do
        options+=(-f "$file")
    done
    for option in "$@"; do
        options+=("--cargo-arg=$option")
    done
    echo "== $name: $files"
    cargo mutants --jobs 1 --gitignore true --output "$out/$name" --minimum-test-timeout 120 \
        "${options[@]}" || failed=1
}

# The patterns are cargo-mutants' to expand.
set -f
failed=0
if [ $# -gt 0 ]; then
    mutants chosen tunguard "$*" --lib --test=stories --test=moving --test=keeping --test=path_mtu --test=tls
else
    mutants seals tunguard "src/replay.rs src/seal.rs src/resume.rs" --lib --test=stories --test=protocol_doc
    mutants certificates tunguard "src/tls/verify.rs src/tls/identity.rs src/tls/revoked.rs" --lib --test=tls
    mutants paths tunguard "src/path.rs src/paths/*.rs" --lib --test=stories --test=moving --test=keeping --test=path_mtu
    mutants guard tunguard-guard "guard/src/routes.rs guard/src/tickets.rs" --bins
fi
exit $failed
