#!/usr/bin/env bash
# Whether a server that holds many sessions for long grows: memory, descriptors, queues, processes.
#
#   bench/hold.sh [--idle N] [--active N] [--minutes N] [--out DIR]
#
# tunguard-swarm holds --idle (1000) + --active (100) sessions for --minutes (30), renews keys every 5 minutes as clients do, and
# each active one sends 10 pings of 1000 bytes per second. Every minute the server's processes are looked at; the first 5 minutes
# don't count, as buffers are made when they are first used. Then everybody leaves, and what stays is held against what was there
# before.
#
# Writes hold.json to DIR (target/bench) and fails where a session was lost, something grew, or stayed. BIN is the directory of
# the programs (target/release).
set -euo pipefail
cd "$(dirname "$0")/.."
given=("$@")

idle=1000 active=100 minutes=30 out=target/bench
while [ $# -gt 0 ]; do
    case $1 in
        --idle) idle=$2; shift 2 ;;
        --active) active=$2; shift 2 ;;
        --minutes) minutes=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) echo "bench/hold.sh: unknown option $1: see the top of the script" >&2; exit 2 ;;
    esac
done
if [ "$(id -u)" != 0 ]; then
    echo "bench/hold.sh: makes network namespaces: run it as root" >&2
    exit 1
fi
scripts/packages.sh run lab bench >&2
BIN=$(cd "${BIN:-target/release}" && pwd)
export BIN NS_SERVER="tgh$$-s" NS_CLIENT="tgh$$-c" WORK
WORK=$(mktemp -d)
chmod 755 "$WORK"
ulimit -n 16384
. bench/lib.sh
command=$(spell bench/hold.sh "${given[@]}")
dir=$WORK/hold
mkdir "$dir"
count=$((idle + active))

finish() {
    end_all "$dir"
    drop_namespaces
    wait
    rm -rf "$WORK"
} 2>/dev/null
trap 'trap "" INT TERM HUP; finish' EXIT
trap 'exit 130' INT TERM HUP
make_namespaces

"$BIN/tunguard-swarm" mint --dir "$dir/certificates" --count "$count" --server "$OUTER_SERVER"
cat >"$dir/server.toml" <<TOML
networks = ["10.9.0.0/16"]
max_clients = $((count + 100))
# No other server of this host has these.
worker_uids = [400000, 419999]
state_dir = "$dir/state"
socket = "$dir/admin.sock"
[tls]
ca = "$dir/certificates/ca.pem"
cert = "$dir/certificates/server.pem"
key = "$dir/certificates/server.key"
[data]
rekey = "5m"
TOML
background server "$NS_SERVER" "$BIN/tunguard" server --config "$dir/server.toml"
eventually 100 grep -q 'is ready' "$dir/server.log" || { cat "$dir/server.log" >&2; exit 1; }
server=$(cat "$dir/server.pid")

# look: one JSON object
look() {
    local workers
    workers=$(tree "$server" | grep -vx "$server" | tr '\n' ' ')
    # shellcheck disable=SC2086 # lists of numbers
    jq -cn --argjson at "$SECONDS" --argjson guard "$(pss "$server")" --argjson workers "$(pss $workers)" \
        --argjson processes "$(wc -w <<<"$workers")" --argjson fds "$(descriptors "$server")" \
        --argjson worker_fds "$(descriptors $workers)" --argjson queues "$(queues "$server")" \
        --argjson sessions "$("$BIN/tunguard" status --json --socket "$dir/admin.sock" | jq '.sessions | length')" \
        '{seconds: $at, sessions: $sessions, guard_bytes: $guard, other_bytes: $workers, processes: $processes,
          guard_descriptors: $fds, other_descriptors: $worker_fds, queues: $queues}'
}
descriptors() {
    local pid
    for pid in "$@"; do ls "/proc/$pid/fd" 2>/dev/null; done | wc -l
}
# queues PID: queues that the process has open
queues() { find "/proc/$1/fd" -lname '/[0-9a-z]*' -printf '%l\n' 2>/dev/null | grep -c '^/tunguard-' || true; }

before=$(look)
say "before: $before"
background swarm "$NS_CLIENT" "$BIN/tunguard-swarm" hold --dir "$dir/certificates" --server "$OUTER_SERVER:55555" \
    --count "$count" --active "$active" --seconds $((minutes * 60))
eventually 3000 grep -q connected "$dir/swarm.log" || { cat "$dir/swarm.log" >&2; exit 1; }
SECONDS=0
while [ "$SECONDS" -lt $((minutes * 60 - 20)) ]; do
    sleep 5
    [ $((SECONDS % 60)) -lt 5 ] || continue
    look | tee -a "$WORK/looks" >&2
done
wait "$(cat "$dir/swarm.pid")" || { cat "$dir/swarm.log" >&2; exit 1; }
held=$(grep '^{' "$dir/swarm.log")
say "$held"
eventually 300 bash -c "[ \"\$('$BIN/tunguard' status --json --socket '$dir/admin.sock' | jq .workers)\" = 0 ]" || true
after=$(look)
say "after: $after"

mkdir -p "$out"
jq -s --arg command "$command" --arg machine "$(machine)" --arg date "$(date -u +%F)" --argjson before "$before" \
    --argjson after "$after" --argjson held "$held" --argjson panics "$(grep -ci panicked "$dir/server.log" || true)" \
    --arg commit "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}" '
    [.[] | select(.seconds > 300)] as $counted |
    def grew($key): ($counted | last[$key]) / ($counted | first[$key]) - 1;
    {command: $command, machine: $machine, date: $date, commit: $commit, held: $held, panics: $panics, before: $before,
     after: $after, looks: .,
     grew: (if ($counted | length) > 1 then {guard_bytes: grew("guard_bytes"), other_bytes: grew("other_bytes"),
            guard_descriptors: grew("guard_descriptors"), other_descriptors: grew("other_descriptors")} else null end)}
    ' "$WORK/looks" >"$out/hold.json"
jq '{held, grew, panics, before, after}' "$out/hold.json"
# Memory by 2 %, nothing else by one.
jq -e --argjson count "$count" '
    .held.standing == $count and .panics == 0
    and (.grew == null or (.grew.guard_bytes < 0.02 and .grew.other_bytes < 0.02 and .grew.guard_descriptors <= 0
                           and .grew.other_descriptors <= 0))
    and .after.processes == .before.processes and .after.guard_descriptors == .before.guard_descriptors
    and .after.sessions == 0' "$out/hold.json" >/dev/null || { say "a session was lost, or something grew or stayed"; exit 1; }
