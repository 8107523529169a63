#!/usr/bin/env bash
# Measures tunguard beside the bare link and the VPNs a user could pick instead: in one run, in turns, medians.
#
#   bench/run.sh [--rounds N] [--seconds N] [--peers "veth tunguard ..."] [--scale] [--out DIR]
#
# A peer is a script in bench/peers/ (bench/peers/README.md). For each turn two network namespaces joined by a veth
# pair are made, the peer is started between them, measured, stopped, and the namespaces are removed: nobody shares
# memory or processor with a peer that idles. One turn:
#
#   strangers            cores busy with something else, just before; a turn waits up to 20 s for less than 0.3
#   rtt_idle             ping, 50 in one second; median, ms
#   tcp_up, tcp_down     iperf3, one stream, client to server and back; bit/s that arrived. Meanwhile:
#     rtt_up, rtt_down     ping beside that stream; median, ms
#     cpu_*                CPU seconds per 10^9 bytes: of the peer's processes (user and kernel time), and of the
#                          whole machine, iperf3, softirqs and strangers included
#   tcp_both, tcp_four   one stream each way at once, the sum; four streams up
#   udp_100, udp_1200    iperf3 -u -b 0, payloads of so many bytes; packets per second that the receiver read
#   pss                  memory of the peer's processes (PSS), after all that; bytes
#
# --scale runs bench/scale.sh, too. Writes results.json, README.md and plots to DIR (target/bench), see report.py.
# BIN is the directory of the programs (target/release), COMMIT what they were built from (HEAD), NOTE a sentence
# for the report.
set -euo pipefail
cd "$(dirname "$0")/.."
given=("$@")

rounds=5 seconds=5 scale='' out=target/bench
peers="veth tunguard tunguard-chacha20 tunguard-ctr-hmac tunguard-guard-writes openvpn ocserv wireguard-go"
while [ $# -gt 0 ]; do
    case $1 in
        --rounds) rounds=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        --peers) peers=$2; shift 2 ;;
        --scale) scale=yes; shift ;;
        --out) out=$2; shift 2 ;;
        *) echo "bench/run.sh: unknown option $1: see the top of the script" >&2; exit 2 ;;
    esac
done
if [ "$(id -u)" != 0 ]; then
    echo "bench/run.sh: makes network namespaces: run it as root" >&2
    exit 1
fi
scripts/packages.sh run lab bench >&2
BIN=$(cd "${BIN:-target/release}" && pwd)
export BIN PEERS="$PWD/bench/peers" NS_SERVER="tgb$$-s" NS_CLIENT="tgb$$-c" WORK
WORK=$(mktemp -d)
chmod 755 "$WORK"
. bench/lib.sh
command=$(spell bench/run.sh "${given[@]}")

peer=''
end_turn() {
    [ -z "$peer" ] || bash "bench/peers/$peer.sh" stop || true
    [ -z "${iperf:-}" ] || kill "$iperf" 2>/dev/null || true
    drop_namespaces
    wait
    rm -rf "$WORK/peer"
    peer='' iperf=''
} 2>/dev/null
trap 'end_turn; rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM HUP

# A second at the start doesn't count, where there is one.
omit=$((seconds > 1 ? 1 : 0))
lines=$WORK/results.jsonl

start_iperf() {
    in_server iperf3 -s >/dev/null 2>&1 &
    iperf=$!
    eventually 30 sh -c "ip netns exec $NS_SERVER ss -Hltn sport = :5201 | grep -q ."
}
# iperf NAME OPTION...: its JSON in $WORK/NAME.json. A second try where the first fails.
iperf() {
    local name=$1
    shift
    for _ in 1 2; do
        in_client timeout $((seconds + omit + 15)) iperf3 -J -c "$inner" -t "$seconds" "$@" \
            >"$WORK/$name.json" 2>/dev/null && return 0
        say "  $peer: iperf3 $* failed"
        kill "$iperf" 2>/dev/null || true
        wait "$iperf" 2>/dev/null || true
        start_iperf
    done
    echo '{}' >"$WORK/$name.json"
}
from() { jq -r "try ($2) catch null" "$WORK/$1.json"; }
# rtt SECONDS FILE
rtt() { in_client ping -n -i 0.02 -c $(($1 * 50)) -w $(($1 + 2)) "$inner" >"$2" 2>&1 || true; }
median_rtt() { sed -n 's/.* time=\([0-9.]*\) ms/\1/p' "$1" | sort -n | awk '{ v[NR] = $1 } END { if (NR) print v[int((NR + 1) / 2)] }'; }
measured() {
    record "$lines" "$peer" "$round" "$1" "$2"
    [ -n "$2" ] && [ "$2" != null ] || say "  $peer: no $1"
}

turn() {
    local direction pids cpu0 busy0 cpu1 busy1 pings bytes options
    measured strangers "$(quiet 40)"
    make_namespaces
    if ! inner=$(bash "bench/peers/$peer.sh" start); then
        say "  $peer doesn't start"
        return
    fi
    start_iperf
    pids=$(bash "bench/peers/$peer.sh" pids)
    rtt 1 "$WORK/ping"
    measured rtt_idle "$(median_rtt "$WORK/ping")"
    for direction in up down; do
        options=()
        [ "$direction" = up ] || options=(-R)
        cpu0=$(cpu $pids) busy0=$(busy)
        rtt "$((seconds + omit))" "$WORK/ping" &
        pings=$!
        iperf $direction -O "$omit" "${options[@]}"
        cpu1=$(cpu $pids) busy1=$(busy)
        wait "$pings"
        measured "tcp_$direction" "$(from $direction .end.sum_received.bits_per_second)"
        measured "rtt_$direction" "$(median_rtt "$WORK/ping")"
        bytes=$(from $direction '[.intervals[].sum.bytes] | add')
        if [ "${bytes:-null}" != null ]; then
            [ -z "$pids" ] || measured "cpu_$direction" "$(reckon "($cpu1 - $cpu0) / $bytes * 1e9")"
            measured "cpu_machine_$direction" "$(reckon "($busy1 - $busy0) / $bytes * 1e9")"
        fi
    done
    iperf both -O "$omit" --bidir
    measured tcp_both "$(from both '.end.sum_received.bits_per_second + .end.sum_received_bidir_reverse.bits_per_second')"
    iperf four -O "$omit" -P 4
    measured tcp_four "$(from four .end.sum_received.bits_per_second)"
    # Without -O: iperf3 counts what was lost before as lost, and not as sent.
    for size in 100 1200; do
        iperf udp -u -b 0 -l $size
        measured udp_$size "$(from udp '.end.sum | (.packets - .lost_packets) / .seconds')"
    done
    [ -z "$pids" ] || measured pss "$(pss $pids)"
    jq -r --arg p "$peer" --argjson n "$round" -s '
        map(select(.peer == $p and .round == $n)) | map({key: .measure, value}) | from_entries
        | "  round \($n)  \($p): up \((.tcp_up // 0) / 1e7 | round / 100), down \((.tcp_down // 0) / 1e7 | round / 100) Gbit/s, ping \(.rtt_idle) ms"' "$lines" >&2
}

load=$(cut -d ' ' -f 1-3 /proc/loadavg)
jq -n --arg command "$command" --arg machine "$(machine)" --arg load "$load" --arg date "$(date -u +%F)" \
    --argjson rounds "$rounds" --argjson seconds "$seconds" --arg note "${NOTE:-}" \
    --arg commit "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}" \
    '{command: $command, note: $note, machine: $machine, load_before: $load, date: $date, commit: $commit,
      rounds: $rounds, seconds: $seconds}' >"$WORK/about.json"
describe_peers $peers
for round in $(seq "$rounds"); do
    for peer in $peers; do
        this=$peer
        turn
        end_turn
        peer=$this
    done
    peer=''
done

mkdir -p "$out"
if [ -n "$scale" ]; then
    bench/scale.sh --rounds "$rounds" --seconds "$seconds" --out "$out"
fi
write_results "$out"
python3 bench/report.py "$out"
