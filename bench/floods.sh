#!/usr/bin/env bash
# What clients notice while somebody floods their server: tunguard beside OpenVPN, each with the same offered load and the same
# flood.
#
#   bench/floods.sh [--rounds N] [--seconds N] [--floods "connect unknown live"] [--out DIR]
#
#   client  eth0 198.18.1.2 ---- 198.18.1.1 client  router  server 198.18.100.1 ---- 198.18.100.2 eth0  server
#                                                     |
#                                         the attacker: 198.18.3.1 - 100
#
# An established session carries a TCP stream from client to server at half of what OpenVPN carries undisturbed. Meanwhile the
# attacker (tunguard-flood) sends from the router:
#
#   connect  TCP connections that say nothing, from 100 addresses in turn, each for a second; OpenVPN serves TCP for this one
#   unknown  UDP datagrams of 120 random bytes from addresses that nobody has
#   live     UDP datagrams of 120 bytes with the client's own address and port, that begin as its own do: tunguard's with
#            session ID, epoch and flags, OpenVPN's with opcode and peer ID
#
# as many per second as halve what OpenVPN still carries, found by doubling (1000 and up). Then --rounds (3) times in turns,
# --seconds (5) each: without and with the flood. The attacker takes its share of the same cores from both.
#
# Writes results.json and README.md to DIR (target/floods), see bench/flood/report.py. BIN is the directory of the programs
# (target/release), COMMIT what they were built from (HEAD).
set -euo pipefail
cd "$(dirname "$0")/.."
given=("$@")

rounds=3 seconds=5 out=target/floods floods="connect unknown live"
while [ $# -gt 0 ]; do
    case $1 in
        --rounds) rounds=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        --floods) floods=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) echo "bench/floods.sh: unknown option $1: see the top of the script" >&2; exit 2 ;;
    esac
done
if [ "$(id -u)" != 0 ]; then
    echo "bench/floods.sh: makes network namespaces: run it as root" >&2
    exit 1
fi
scripts/packages.sh run lab bench >&2
BIN=$(cd "${BIN:-target/release}" && pwd)
export BIN PEERS="$PWD/bench/peers" NS_SERVER="tgf$$-s" NS_CLIENT="tgf$$-c" NS_BETWEEN="tgf$$-r" WORK PROTO
OUTER_SERVER=198.18.100.2 OUTER_CLIENT=198.18.1.2
WORK=$(mktemp -d)
chmod 755 "$WORK"
. bench/lib.sh
command=$(spell bench/floods.sh "${given[@]}")
ulimit -n 16384

lines=$WORK/results.jsonl
touch "$lines"
peer='' inner='' flooding='' listening=''

end_turn() {
    [ -z "$flooding" ] || kill "$flooding" || true
    [ -z "$listening" ] || kill "$listening" || true
    [ -z "$peer" ] || bash "bench/peers/$peer.sh" stop || true
    drop_namespaces
    wait
    rm -rf "$WORK/peer"
    peer='' flooding='' listening=''
} 2>/dev/null
# A second signal doesn't cut it short.
trap 'trap "" INT TERM HUP; end_turn; rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM HUP

build_network() {
    local n
    make_routed_namespaces
    for n in $(seq 100); do echo "addr add 198.18.3.$n/32 dev lo"; done | ip -n "$NS_BETWEEN" -batch -
}

# begin PEER FLOOD: with a session, and somebody who takes what comes through it
begin() {
    build_network
    peer=$1 PROTO=udp
    [ "$2" != connect ] || PROTO=tcp
    if ! inner=$(bash "bench/peers/$peer.sh" start); then
        say "  $peer doesn't start"
        return 1
    fi
    in_server iperf3 -s -B "$inner" >/dev/null 2>&1 &
    listening=$!
    promptly listens t 5201
}

# carried BITS-PER-SECOND: how many of them arrive; 0 is as many as go
carried() {
    in_client timeout $((seconds + 20)) iperf3 -c "$inner" -b "$1" -t "$seconds" -J 2>/dev/null |
        jq -r '.end.sum_received.bits_per_second // 0' || echo 0
}

# flooded BITS-PER-SECOND FLOOD RATE: the same during a flood, in $WORK/through, and what was sent per second in $WORK/sent
flooded() {
    local arguments
    case $2 in
        connect) arguments=(connect --from $(seq -f '198.18.3.%g' 100)) ;;
        unknown) arguments=(unknown --from 198.18.3.0) ;;
        live)
            case $peer in tunguard) arguments=(10) ;; *) arguments=(4) ;; esac
            arguments=(live --client "$OUTER_CLIENT" --keep "${arguments[@]}")
            ;;
    esac
    # It begins before the stream and ends after it.
    ip netns exec "$NS_BETWEEN" "$BIN/tunguard-flood" --rate "$3" --seconds $((seconds + 2)) \
        --to "$OUTER_SERVER:$(port_of "$2")" "${arguments[@]}" >"$WORK/flood" 2>"$WORK/flood.err" &
    flooding=$!
    [ "$2" != live ] || answers "$inner" >/dev/null || true
    sleep 1
    carried "$1" >"$WORK/through"
    wait "$flooding" || { say "the flood failed: $(cat "$WORK/flood.err")"; exit 1; }
    flooding=''
    jq -r ".sent / ($seconds + 2)" "$WORK/flood" >"$WORK/sent"
}
port_of() { case $peer in tunguard) echo 55555 ;; *) echo 1194 ;; esac; }

for flood in $floods; do
    begin openvpn "$flood" || exit 1
    most=$(carried 0)
    load=$(reckon "int($most / 2)")
    say "$flood: OpenVPN carries $(reckon "$most / 1e6") Mbit/s undisturbed; offered are $(reckon "$load / 1e6")"
    rate=500
    halved=no
    while [ "$rate" -lt 1000000 ]; do
        rate=$((rate * 2))
        flooded "$load" "$flood" "$rate"
        through=$(cat "$WORK/through")
        sent=$(cat "$WORK/sent")
        say "  $rate per second (sent $sent): OpenVPN carries $(reckon "$through / $load") of it"
        if [ "$(reckon "$through < 0.5 * $load")" = 1 ]; then
            halved=yes
            break
        fi
        # The attacker is at his own limit.
        [ "$(reckon "$sent < 0.6 * $rate")" = 0 ] || break
    done
    end_turn
    for round in $(seq "$rounds"); do
        for each in openvpn tunguard; do
            begin "$each" "$flood" || continue
            before=$(carried "$load")
            flooded "$load" "$flood" "$rate"
            jq -cn --arg peer "$each" --arg flood "$flood" --argjson round "$round" --argjson rate "$rate" --arg halved "$halved" \
                --argjson load "$load" --argjson before "$before" --argjson during "$(cat "$WORK/through")" --argjson sent "$(cat "$WORK/sent")" \
                '{peer: $peer, flood: $flood, round: $round, rate: $rate, halved: $halved, load: $load, before: $before,
                  during: $during, sent: $sent}' | tee -a "$lines" |
                jq -r '"  \(.peer): \(.flood), \(.sent | round) per second: \(.during / .before * 1000 | round / 10) %"' >&2
            end_turn
        done
    done
done

describe_peers tunguard openvpn
jq -n --arg command "$command" --arg machine "$(machine)" --arg date "$(date -u +%F)" --arg before "$(cut -d ' ' -f 1-3 /proc/loadavg)" \
    --arg commit "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}" \
    '{command: $command, machine: $machine, date: $date, commit: $commit}' >"$WORK/about.json"
write_results "$out"
python3 bench/flood/report.py "$out"
