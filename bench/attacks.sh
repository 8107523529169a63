#!/usr/bin/env bash
# Whose traffic can be moved by somebody without keys: tunguard beside the VPNs a user could pick instead.
#
#   bench/attacks.sh [--times N] [--peers "tunguard ..."] [--out DIR]
#
# A peer is a script in bench/peers/ (bench/peers/README.md), set up as somebody who moves would do it.
#
#   client  eth0 198.18.1.2 ---- 198.18.1.1 client  router  server 198.18.100.1 ---- 198.18.100.2 eth0  server
#                                                     |
#                                        tap: all UDP between the two, both ways
#                                        own: 198.18.3.0/24, the attacker's
#
# The attacker (tunguard-roam attack) sits in the router. Inside the VPN 500 packets of 200 bytes per second go to the client
# and 4 of 100 bytes come from it, so that there is always traffic to be had, and now and then something to copy. He has
# one address of his own for each attack, and what comes to him there he counts and never answers. --times (3) each:
#
#   race    for 2 s a copy of each datagram of the client's comes from him, 5 ms before the datagram itself
#   replay  a datagram that was delivered comes from him, 2 s later
#   older   a datagram that was taken from the client comes from him, 50 ms after a newer one of the client's
#   held    the newest datagram comes from him, and for 1 s nothing from the client
#
# Traffic has moved where it comes to him and none of it to the client; until 3 s after the last that he sent it is counted.
#
# Writes results.json and README.md to DIR (target/attacks), see bench/roam/attacks.py, and fails where tunguard's traffic
# moved, or somebody got more than three times the bytes that he sent it. BIN is the directory of the programs
# (target/release), COMMIT what they were built from (HEAD).
set -euo pipefail
cd "$(dirname "$0")/.."
given=("$@")

times=3 out=target/attacks
peers="tunguard openvpn ocserv wireguard-go"
while [ $# -gt 0 ]; do
    case $1 in
        --times) times=$2; shift 2 ;;
        --peers) peers=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) echo "bench/attacks.sh: unknown option $1: see the top of the script" >&2; exit 2 ;;
    esac
done
if [ "$(id -u)" != 0 ]; then
    echo "bench/attacks.sh: makes network namespaces: run it as root" >&2
    exit 1
fi
scripts/packages.sh run lab bench >&2
BIN=$(cd "${BIN:-target/release}" && pwd)
export BIN PEERS="$PWD/bench/peers" NS_SERVER="tga$$-s" NS_CLIENT="tga$$-c" NS_BETWEEN="tga$$-r" WORK MOBILE=yes
readonly roam="$BIN/tunguard-roam"
OUTER_SERVER=198.18.100.2 OUTER_CLIENT=198.18.1.2
WORK=$(mktemp -d)
chmod 755 "$WORK"
. bench/lib.sh
command=$(spell bench/attacks.sh "${given[@]}")

lines=$WORK/results.jsonl
peer='' attacker='' started=()
touch "$lines"

end_turn() {
    [ ${#started[@]} = 0 ] || kill "${started[@]}" || true
    [ -z "$attacker" ] || kill "$attacker" || true
    [ -z "$peer" ] || bash "bench/peers/$peer.sh" stop || true
    drop_namespaces
    wait
    rm -rf "$WORK/peer"
    peer='' attacker='' started=()
} 2>/dev/null
# A second signal doesn't cut it short.
trap 'trap "" INT TERM HUP; end_turn; rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM HUP

# The attacker is there from the start, and begins when there is traffic.
start_attacker() {
    local device
    ip netns exec "$NS_BETWEEN" "$roam" attack --tap tap --own own --client "$OUTER_CLIENT" --server "$OUTER_SERVER" \
        --network 198.18.3.0 --times "$times" >"$WORK/said" &
    attacker=$!
    for device in tap own; do promptly ip -n "$NS_BETWEEN" link show "$device"; done
    ip -n "$NS_BETWEEN" -batch - <<'IP'
link set tap up txqueuelen 10000
link set own up
route add 198.18.3.0/24 dev own
route add default dev tap table 100
rule add iif client ipproto udp lookup 100
rule add iif server ipproto udp to 198.18.1.0/24 lookup 100
IP
}
# flow FROM TO ADDRESS PORT PACKETS-PER-SECOND BYTES
flow() {
    ip netns exec "$2" socat -u "UDP-RECV:$4" OPEN:/dev/null &
    started+=($!)
    promptly ip netns exec "$2" sh -c "ss -Hlun sport = :$4 | grep -q ."
    ip netns exec "$1" "$roam" send --to "$3:$4" --rate "$5" --size "$6" &
    started+=($!)
}

turn() {
    local inner inner_client
    make_routed_namespaces
    start_attacker
    if ! inner=$(bash "bench/peers/$peer.sh" start); then
        say "  $peer doesn't start"
        return
    fi
    inner_client=$(in_client ip -j route get "$inner" | jq -r '.[0].prefsrc')
    flow "$NS_CLIENT" "$NS_SERVER" "$inner" 7001 4 100
    flow "$NS_SERVER" "$NS_CLIENT" "$inner_client" 7002 500 200
    wait "$attacker" || say "  $peer: the attacker gave up"
    attacker=''
    jq -c --arg p "$peer" '{peer: $p} + .' "$WORK/said" | tee -a "$lines" |
        jq -r '"  \(.peer): \(.attack): \(if .moved_ms > 0 then "moved for \(.moved_ms | round) ms" else "stays" end), \(.sent_bytes) bytes sent, \(.caught) packets and \(.caught_bytes) bytes to the attacker"' >&2
}

# An attack takes 3 s to come about and 3 s that are watched, after 4 s of even traffic.
say "this takes about $(($(wc -w <<<"$peers") * (times * 4 * 10 + 10) / 60 + 1)) minutes"
describe_peers $peers
for each in $peers; do
    peer=$each
    turn
    end_turn
done

mkdir -p "$out"
jq -s --arg command "$command" --arg machine "$(machine)" --arg date "$(date -u +%F)" --argjson times "$times" --arg peers "$peers" \
    --arg commit "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}" --slurpfile about "$WORK/peers.json" \
    '{command: $command, machine: $machine, date: $date, commit: $commit, times: $times, order: ($peers | [splits("\\s+")]),
      peers: $about[0], attacks: .}' "$lines" >"$out/results.json"
python3 bench/roam/attacks.py "$out"
