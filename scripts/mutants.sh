#!/usr/bin/env bash
# What `make mutants` does: scripts/mutants.sh [FILE...]
#
# Changes the code that decides who gets in and what is let through in small ways, one at a time, and runs the tests
# that should notice. docs/mutants.md has what is missed, and why that is right. The results are in target/mutants.
#
# Certificates, paths and the guard take minutes, with all their mutants in one program (scripts/cutdown.sh,
# scripts/mutants.py). All else takes hours, as cargo-mutants builds for each. Only what git tracks is copied and
# changed. With AGAIN=1, of the first three only what was missed the last time is run.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
scripts/packages.sh build mutants
if ! command -v cargo-mutants >/dev/null; then
    echo "cargo-mutants is missing: installing it"
    cargo install --locked cargo-mutants
fi

out=$PWD/${CARGO_TARGET_DIR:-target}/mutants
mkdir -p "$out"

# mutants NAME "FILE..." TEST...: one by one; the tests are cargo test's own options
mutants() {
    local name=$1 files=$2 options=(--package tunguard)
    shift 2
    for file in $files; do
        options+=(-f "$file")
    done
    for option in "$@"; do
        options+=("--cargo-arg=$option")
    done
    echo "== $name: $files"
    CARGO_TARGET_DIR=$out/build cargo mutants --jobs 1 --gitignore true --output "$out/$name" \
        --minimum-test-timeout 120 "${options[@]}" || failed=1
}

# together GROUP FILE...: results are in GROUP.txt
together() {
    local group=$1
    shift
    echo "== $group: $*"
    scripts/cutdown.sh "$group" "$out/$group"
    CARGO_TARGET_DIR=$out/$group/target scripts/mutants.py ${AGAIN:+--again} "$out/$group" "$out/$group.txt" "$@" ||
        failed=1
}

# The patterns are cargo-mutants' to expand.
set -f
failed=0
if [ $# -gt 0 ]; then
    paths=() certificates=() guard=() others=()
    for file in "$@"; do
        case $file in
            src/path.rs | src/paths/*) paths+=("$file") ;;
            src/tls/verify.rs | src/tls/identity.rs | src/tls/revoked.rs) certificates+=("$file") ;;
            guard/*) guard+=("$file") ;;
            *) others+=("$file") ;;
        esac
    done
    [ ${#paths[@]} = 0 ] || together paths "${paths[@]}"
    [ ${#certificates[@]} = 0 ] || together certificates "${certificates[@]}"
    [ ${#guard[@]} = 0 ] || together guard "${guard[@]}"
    [ ${#others[@]} = 0 ] || mutants chosen "${others[*]}" \
        --lib --test=stories --test=moving --test=keeping --test=path_mtu --test=tls
else
    mutants seals "src/replay.rs src/seal.rs src/resume.rs" --lib --test=stories --test=protocol_doc
    together certificates src/tls/verify.rs src/tls/identity.rs src/tls/revoked.rs
    together paths src/path.rs src/paths/*.rs
    together guard guard/src/{accounts,away,clients,entrance,gate,grants,leases,lives,meters,routes}.rs \
        guard/src/{slots,starting,succession,tickets}.rs
fi
exit $failed
