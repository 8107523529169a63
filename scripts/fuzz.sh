#!/usr/bin/env bash
# What `make fuzz` does: scripts/fuzz.sh SECONDS [TARGET...]
#
# Builds the fuzz targets with the address sanitizer and runs each (or those named) for so many seconds, from the seeds in
# fuzz/seeds and what earlier runs left in fuzz/corpus. The last line counts executions and crashes; with any crash the
# exit code is 1, and the inputs lie in fuzz/artifacts. A stable toolchain will do.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?how many seconds for each target}
shift

PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
scripts/packages.sh build fuzz
if ! command -v cargo-fuzz >/dev/null; then
    echo "cargo-fuzz is missing: installing it"
    cargo install --locked cargo-fuzz
fi
# shellcheck source=scripts/sanitizer-env.sh
. scripts/sanitizer-env.sh

[ $# -gt 0 ] || mapfile -t all < <(cargo fuzz list)
targets=("${@:-${all[@]}}")
cargo fuzz build
host=$(rustc -vV | sed -n 's/^host: //p')

executions=0
crashed=()
for target in "${targets[@]}"; do
    mkdir -p "fuzz/corpus/$target" "fuzz/artifacts/$target"
    options=("-max_total_time=$seconds" -timeout=30 -rss_limit_mb=4096 -print_final_stats=1 -len_control=10
        "-artifact_prefix=fuzz/artifacts/$target/")
    if [ -e "fuzz/dict/$target.dict" ]; then
        options+=("-dict=fuzz/dict/$target.dict")
    fi
    log=fuzz/target/$target.log
    status=0
    "fuzz/target/$host/release/$target" "${options[@]}" "fuzz/corpus/$target" "fuzz/seeds/$target" \
        >"$log" 2>&1 || status=$?
    n=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    executions=$((executions + ${n:-0}))
    printf '%-14s %9d executions in %d s\n' "$target" "${n:-0}" "$seconds"
    if [ $status != 0 ]; then
        crashed+=("$target")
        grep -E -m 5 'panicked at|ERROR: |SUMMARY: ' "$log" || true
        input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
        echo "    all of it: $log"
        echo "    again:     fuzz/target/$host/release/$target ${input:-INPUT}"
        echo "    to keep:   cp ${input:-INPUT} fuzz/seeds/$target/NAME; cargo test --test seeds replays it"
    fi
done

printf '\n%d targets, %d executions, %d crashed%s\n' \
    ${#targets[@]} "$executions" ${#crashed[@]} "${crashed[*]:+: ${crashed[*]}}"
[ ${#crashed[@]} = 0 ]
