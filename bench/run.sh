#!/usr/bin/env bash
# Measures tunguard against the bare veth pair it runs over: one TCP stream up and down, in turns, medians.
#
#   bench/run.sh [--rounds N] [--seconds N] [--peers "veth tunguard ..."]
#
# Two network namespaces joined by a veth pair are made, and removed at the end whatever happens. A peer is a
# script in bench/peers/: `NAME.sh start` brings its tunnel up between $NS_SERVER and $NS_CLIENT and prints the
# inner address of the server, `NAME.sh stop` takes it down. Results: a table on stdout, JSON in target/bench/.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=5 seconds=5 peers="veth tunguard"
while [ $# -gt 0 ]; do
    case $1 in
        --rounds) rounds=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        --peers) peers=$2; shift 2 ;;
        *) echo "bench/run.sh: unknown option $1: see the top of the script" >&2; exit 2 ;;
    esac
done
if [ "$(id -u)" != 0 ]; then
    echo "bench/run.sh: makes network namespaces: run it as root" >&2
    exit 1
fi
for program in ip nft iperf3 jq; do
    if ! command -v "$program" >/dev/null; then
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q iproute2 nftables iperf3 jq >/dev/null
        break
    fi
done

export NS_SERVER="tgb$$-s" NS_CLIENT="tgb$$-c" BIN="$PWD/target/release" WORK
export OUTER_SERVER=10.83.0.1 OUTER_CLIENT=10.83.0.2
WORK=$(mktemp -d)
clean_up() {
    for peer in $peers; do bash "bench/peers/$peer.sh" stop >/dev/null 2>&1 || true; done
    [ -z "${iperf:-}" ] || kill "$iperf" 2>/dev/null || true
    ip netns del "$NS_SERVER" 2>/dev/null || true
    ip netns del "$NS_CLIENT" 2>/dev/null || true
    rm -rf "$WORK"
}
trap clean_up EXIT

ip netns add "$NS_SERVER"
ip netns add "$NS_CLIENT"
ip link add vs netns "$NS_SERVER" type veth peer name vc netns "$NS_CLIENT"
ip -n "$NS_SERVER" addr add $OUTER_SERVER/24 dev vs
ip -n "$NS_CLIENT" addr add $OUTER_CLIENT/24 dev vc
for end in "$NS_SERVER vs" "$NS_CLIENT vc"; do
    read -r ns device <<<"$end"
    ip -n "$ns" link set lo up
    ip -n "$ns" link set "$device" up
done
ip netns exec "$NS_SERVER" iperf3 -s >"$WORK/iperf3.log" 2>&1 &
iperf=$!

# one_stream ADDRESS DIRECTION: bits per second that arrived
one_stream() {
    local reverse=()
    [ "$2" = up ] || reverse=(-R)
    ip netns exec "$NS_CLIENT" iperf3 -J -c "$1" -t "$seconds" -O 1 "${reverse[@]}" |
        jq -e '.end.sum_received.bits_per_second'
}

declare -A inner
for peer in $peers; do
    inner[$peer]=$(bash "bench/peers/$peer.sh" start)
    echo "$peer: server at ${inner[$peer]}" >&2
done
results="$WORK/results.jsonl"
for round in $(seq "$rounds"); do
    for peer in $peers; do
        for direction in up down; do
            rate=$(one_stream "${inner[$peer]}" "$direction")
            jq -cn --arg p "$peer" --arg d "$direction" --argjson r "$rate" --argjson n "$round" \
                '{peer: $p, direction: $d, round: $n, bits_per_second: $r}' >>"$results"
            printf '  round %s  %-10s %-4s  %6.2f Gbit/s\n' "$round" "$peer" "$direction" \
                "$(jq -n "$rate / 1e9")" >&2
        done
    done
done

mkdir -p target/bench
jq -s --arg machine "$(uname -r), $(nproc) cores" --argjson seconds "$seconds" '
    def median: sort | if length % 2 == 1 then .[(length - 1) / 2] else (.[length / 2 - 1] + .[length / 2]) / 2 end;
    (group_by([.peer, .direction]) | map({key: (.[0].peer + " " + .[0].direction),
        value: (map(.bits_per_second) | median)}) | from_entries) as $medians
    | {machine: $machine, seconds: $seconds, medians: $medians, runs: .}' "$results" >target/bench/tcp.json
jq -r '
    .medians as $m
    | "| one TCP stream | Gbit/s | of the bare veth |", "|---|---|---|",
      ($m | to_entries[] | .key as $k | ($k | split(" ")) as [$peer, $direction]
       | "| \($peer), \(if $direction == "up" then "client to server" else "server to client" end) | "
         + "\(.value / 1e7 | round / 100) | \(if $m["veth " + $direction] then (.value / $m["veth " + $direction] * 1000 | round / 1000) else "-" end) |")
' target/bench/tcp.json
