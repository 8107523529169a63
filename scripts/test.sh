#!/usr/bin/env bash
# What `make test` (all) and `make check` (quick) do.
#
# The last line is `N passed, N failed, N skipped`: tests of all test binaries, and each check (format, lints,
# documentation, dependencies, build) counted as one. Everything is run to the end; any failure makes the exit
# code 1. Dependencies are checked where cargo-deny is installed.
#
# A test that finds that it can't run here (not root, no /dev/net/tun) appends `NAME: reason` to the file
# $TUNGUARD_SKIPPED_FILE, or to target/tmp/netns-skipped, and passes; it is counted as skipped here, and named.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}

PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:/usr/sbin:/sbin
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}
target=${CARGO_TARGET_DIR:-target}
passed=0 failed=0 skipped=0
bad=()
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TUNGUARD_SKIPPED_FILE=$work/skipped
marker=$target/tmp/netns-skipped

heading() { printf '\n== %s\n' "$*"; }

# check NAME COMMAND...
check() {
    local name=$1
    shift
    heading "$name: $*"
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        bad+=("$name")
    fi
}

# tests NAME COMMAND...: a cargo test run, whose results are added up
tests() {
    local name=$1 out=$work/out status p f
    shift
    heading "$name: $*"
    "$@" 2>&1 | tee "$out"
    status=${PIPESTATUS[0]}
    read -r p f < <(awk '
        /^test result: / {
            for (i = 2; i <= NF; i++) {
                if ($i == "passed;") p += $(i - 1)
                if ($i == "failed;") f += $(i - 1)
            }
        }
        END { print p + 0, f + 0 }' "$out")
    passed=$((passed + p))
    failed=$((failed + f))
    # Ignored tests are skipped ones, but those that another test runs by itself.
    local ignored
    ignored=$(grep -E '^test .* \.\.\. ignored' "$out" | grep -cv 'ignored, run by ')
    skipped=$((skipped + ignored))
    while read -r line; do
        bad+=("$line")
    done < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$out")
    # It didn't build, or a test binary died.
    if [ "$status" != 0 ] && [ "$f" = 0 ]; then
        failed=$((failed + 1))
        bad+=("$name: exit code $status")
    fi
}

for tool in cargo "cargo fmt" "cargo clippy"; do
    if ! $tool --version >/dev/null 2>&1; then
        case $tool in
            cargo) echo "cargo is missing: install Rust 1.88 or newer" >&2; exit 1 ;;
            *) rustup component add rustfmt clippy || { echo "$tool is missing" >&2; exit 1; } ;;
        esac
    fi
done
groups=(build)
[ "$what" = quick ] || [ "$(id -u)" != 0 ] || groups+=(run lab unit)
scripts/packages.sh "${groups[@]}" || exit 1

check format cargo fmt --all --check
check lints cargo clippy --locked --workspace --all-targets -- -D warnings

if [ "$what" = quick ]; then
    tests "unit tests" cargo test --locked --workspace --lib --bins --no-fail-fast
else
    RUSTDOCFLAGS="-D warnings" check documentation cargo doc --locked --workspace --no-deps --quiet
    if command -v cargo-deny >/dev/null; then
        check dependencies cargo deny --locked check
    else
        heading "dependencies: cargo-deny is not installed, so deny.toml is not checked"
    fi
    rm -f "$marker"
    # The e2e tests run the programs of all packages, which `cargo test` alone doesn't make, and some run rigged ones.
    check "rigged build" scripts/rigged.sh
    check build cargo build --locked --workspace
    # Most of the e2e tests wait for a network, not for a processor.
    RUST_TEST_THREADS=${RUST_TEST_THREADS:-$((2 * $(nproc)))} tests "all tests" cargo test --locked --workspace --no-fail-fast
fi

if [ -e "$TUNGUARD_SKIPPED_FILE" ] || [ -e "$marker" ]; then
    sort -u "$TUNGUARD_SKIPPED_FILE" "$marker" 2>/dev/null >"$work/all-skipped"
    n=$(wc -l <"$work/all-skipped")
    # The harness saw them pass.
    passed=$((passed - n))
    skipped=$((skipped + n))
    heading "skipped"
    cat "$work/all-skipped"
fi
if [ ${#bad[@]} != 0 ]; then
    heading "failed"
    printf '%s\n' "${bad[@]}"
fi
printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ]
