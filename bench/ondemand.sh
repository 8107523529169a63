#!/usr/bin/env bash
# How long the first packet waits for a tunnel that is made on demand, what becomes of the packets behind it, and whether
# anything is left of a connection that went away again.
#
#   bench/ondemand.sh [--rtts "0 50 100"] [--rounds N] [--bursts N] [--cycles N] [--quiet S] [--peers "openvpn ..."]
#                     [--out DIR]
#
#   client  eth0 198.18.90.1 ---- 198.18.90.2 r  far  s 198.18.100.1 ---- 198.18.100.2 eth0  server
#
# `far` gives every packet back later (tunguard-roam delay), so that a round trip takes the RTT; without an RTT it is the
# kernel that forwards. The client of tunguard has `[on_demand]` with `enabled = true` and `idle = "1s"`. It is asleep when
# its supervisor has no child.
#
#   fresh    the client was started, and slept since: a ping, from its first packet to the answer. --rounds (20) for each RTT
#   again    the same after a connection that went away for being idle
#   bursts   200 packets within 20 ms, to a client that sleeps: arrived, twice, out of order. --bursts (5) for each RTT
#   quiet    bytes on the client's link in --quiet (10) seconds of sleep: of the tunnel's port, and of anything
#   cycles   --cycles (100) times awake and asleep again, and what both ends hold before and after
#   peers    for comparison: from the start of OpenVPN's client to the first answer, and the first ping by wireguard-go with
#            a peer that has no session
#
# Writes results.json and README.md to DIR (target/ondemand), see bench/ondemand/report.py. BIN is the directory of the
# programs (target/release), COMMIT what they were built from (HEAD), NOTE a sentence for the report.
set -euo pipefail
cd "$(dirname "$0")/.."
given=("$@")

rtts="0 50 100" rounds=20 bursts=5 cycles=100 quiet=10 peers="openvpn wireguard-go" out=target/ondemand
while [ $# -gt 0 ]; do
    case $1 in
        --rtts) rtts=$2; shift 2 ;;
        --rounds) rounds=$2; shift 2 ;;
        --bursts) bursts=$2; shift 2 ;;
        --cycles) cycles=$2; shift 2 ;;
        --quiet) quiet=$2; shift 2 ;;
        --peers) peers=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) echo "bench/ondemand.sh: unknown option $1: see the top of the script" >&2; exit 2 ;;
    esac
done
if [ "$(id -u)" != 0 ]; then
    echo "bench/ondemand.sh: makes network namespaces: run it as root" >&2
    exit 1
fi
scripts/packages.sh run lab bench >&2
BIN=$(cd "${BIN:-target/release}" && pwd)
export BIN PEERS="$PWD/bench/peers" NS_SERVER="tgo$$-s" NS_CLIENT="tgo$$-c" NS_BETWEEN="tgo$$-w" WORK
export OUTER_SERVER=198.18.100.2 OUTER_CLIENT=198.18.90.1
readonly WIRE="tgo$$-w" burst="$PWD/bench/ondemand/burst.py"
WORK=$(mktemp -d)
chmod 755 "$WORK"
. bench/lib.sh
command=$(spell bench/ondemand.sh "${given[@]}")

lines=$WORK/results.jsonl dir=$WORK/peer
peer='' wire='' rtt=0
touch "$lines"

end_turn() {
    [ -z "$peer" ] || bash "bench/peers/$peer.sh" stop || true
    [ -z "$wire" ] || kill "$wire" || true
    drop_namespaces
    wait
    rm -rf "$dir"
    peer='' wire=''
} 2>/dev/null
trap 'end_turn; rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM HUP

build_network() {
    add_namespaces "$NS_CLIENT" "$WIRE" "$NS_SERVER"
    ip netns exec "$WIRE" sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
    ip link add eth0 netns "$NS_CLIENT" type veth peer name r netns "$WIRE"
    ip link add eth0 netns "$NS_SERVER" type veth peer name s netns "$WIRE"
    plug "$NS_CLIENT" eth0 90 1
    plug "$WIRE" r 90 2
    plug "$WIRE" s 100 1
    plug "$NS_SERVER" eth0 100 2
    ip -n "$NS_CLIENT" route add default via 198.18.90.2
    ip -n "$NS_SERVER" route add default via 198.18.100.1
    [ "$rtt" = 0 ] || lead_through_tun "$WIRE" "$rtt"
    # What the tunnel itself sends and receives.
    in_client nft -f - <<'NFT'
table inet carrier {
    counter tunnel { }
    chain sent { type filter hook output priority filter; meta l4proto { tcp, udp } th dport 55555 counter name tunnel; }
    chain came { type filter hook input priority filter; meta l4proto { tcp, udp } th sport 55555 counter name tunnel; }
}
NFT
    eventually 50 answers "$OUTER_SERVER"
}

# start_peer NAME RTT
start_peer() {
    peer=$1 rtt=$2
    build_network
    inner=$(bash "bench/peers/$peer.sh" start)
}

# note KIND JSON
note() {
    jq -cn --arg p "$peer" --arg k "$1" --argjson rtt "$rtt" --argjson v "$2" '{peer: $p, kind: $k, rtt: $rtt} + $v' >>"$lines"
}

supervisor() { cat "$dir/client.pid"; }
is_asleep() { [ -d "/proc/$(supervisor)" ] && [ -z "$(cat "/proc/$(supervisor)"/task/*/children)" ]; }
# Asleep, and whatever the kernel has to say about the connection that was is said.
fall_asleep() {
    eventually 200 is_asleep || { say "the client doesn't fall asleep"; tail -n 20 "$dir/client.log" >&2; return 1; }
    sleep 0.2
}
status() { "$BIN/tunguard" status --json --socket "$dir/run/client-tg0.sock" 2>/dev/null || echo '{}'; }

# again_client: the client is started once more, as it was, and sleeps
again_client() {
    local program=() pid
    pid=$(supervisor)
    mapfile -d '' program <"/proc/$pid/cmdline"
    kill "$pid"
    promptly sh -c "! kill -0 $pid"
    (cd "$dir" && background client "$NS_CLIENT" "${program[@]}")
    promptly leads_inside
}
# The device is set up again, as it was.
leads_inside() { in_client ip -j route get "$inner" | jq -e '.[0].dev == "tg0"'; }

# first_ping: milliseconds from the first packet to the first answer, or nothing
first_ping() {
    in_client ping -n -c 1 -W 10 "$1" | awk -F 'time=' '/time=/ { print $2 + 0; exit }' || true
}

# start_of KIND: one wake, recorded
start_of() {
    local ms warm
    ms=$(first_ping "$inner")
    warm=$(status | jq '.on_demand.recent[0].warm // null')
    note "$1" "$(jq -cn --arg ms "$ms" --argjson warm "$warm" '{ms: ($ms | tonumber? // null), warm: $warm}')"
    say "  RTT $rtt  $1: ${ms:-no answer} ms"
}

burst_of() {
    local receiver said sent
    coproc RECEIVER { exec ip netns exec "$NS_SERVER" python3 "$burst" receive "$inner" 6000 5; }
    exec {said}<&"${RECEIVER[0]}"
    receiver=$RECEIVER_PID
    read -rt 10 -u "$said" || true
    sent=$(in_client python3 "$burst" send "$inner" 6000 200 20)
    local arrived='{}'
    read -rt 10 -u "$said" arrived || true
    exec {said}<&-
    wait "$receiver" || true
    note burst "$(jq -cn --argjson s "$sent" --argjson a "${arrived:-{\}}" '$s + $a')"
    say "  RTT $rtt  burst: ${arrived:-nothing}"
}

tunnel_bytes() { in_client nft -j list counter inet carrier tunnel | jq '[.nftables[].counter // empty | .bytes] | add'; }
link_bytes() { ip -n "$NS_CLIENT" -s -j link show eth0 | jq '.[0].stats64 | .rx.bytes + .tx.bytes'; }
quiet_time() {
    local tunnel link
    tunnel=$(tunnel_bytes) link=$(link_bytes)
    sleep "$quiet"
    tunnel=$(($(tunnel_bytes) - tunnel)) link=$(($(link_bytes) - link))
    note quiet "{\"seconds\": $quiet, \"tunnel_bytes\": $tunnel, \"link_bytes\": $link}"
    say "  RTT $rtt  quiet: $tunnel bytes of the tunnel, $link of anything, in $quiet s"
}

# What one end holds.
descriptors() { find "/proc/$1/fd" -mindepth 1 2>/dev/null | wc -l; }
rss() { awk '/^VmRSS:/ { print $2 * 1024 }' "/proc/$1/status"; }
# The guard's queues are in an IPC namespace of its own.
queues() {
    # shellcheck disable=SC2016 # for the shell inside
    nsenter -t "$1" -i unshare -m sh -c 'd=$(mktemp -d) && mount -t mqueue none "$d" && ls "$d" | wc -l; umount "$d"; rmdir "$d"'
}
rules() { ip netns exec "$1" nft list ruleset | sed 's/packets [0-9]* bytes [0-9]*//' | sha256sum | cut -c 1-16; }
routes() { { ip -n "$1" route show table all; ip -n "$1" -6 route show table all; } | sed 's/ expires [0-9]*sec//' | sort | sha256sum | cut -c 1-16; }
# snapshot WHEN
snapshot() {
    local guard nursery client each=()
    guard=$(cat "$dir/server.pid") client=$(supervisor)
    nursery=$(pgrep -P "$guard" -x tg-nursery | head -n 1)
    for one in "guard $guard" "nursery $nursery" "supervisor $client"; do
        read -r name pid <<<"$one"
        each+=("\"$name\": {\"descriptors\": $(descriptors "$pid"), \"rss\": $(rss "$pid"), \"pss\": $(pss "$pid")}")
    done
    local list
    list=$(IFS=,; echo "${each[*]}")
    note held "{\"when\": \"$1\", \"cycles\": $done_cycles, \"of\": {$list},
        \"processes\": $(trees_of "$dir" | wc -l), \"queues\": $(queues "$guard"),
        \"sessions\": $("$BIN/tunguard" status --json --socket "$dir/admin.sock" | jq '.sessions | length'),
        \"rules\": \"$(rules "$NS_SERVER")\", \"client_rules\": \"$(rules "$NS_CLIENT")\",
        \"routes\": \"$(routes "$NS_SERVER")\", \"client_routes\": \"$(routes "$NS_CLIENT")\"}"
}
cycle_time() {
    local failed=0
    done_cycles=0
    # What is allocated once is there after a few.
    for _ in $(seq "$((cycles < 20 ? 2 : 10))"); do one_cycle || failed=$((failed + 1)); done
    snapshot before
    for done_cycles in $(seq "$cycles"); do
        one_cycle || failed=$((failed + 1))
        [ $((done_cycles % 100)) != 0 ] || { say "  cycles: $done_cycles"; snapshot during; }
    done
    snapshot after
    note cycles "{\"cycles\": $cycles, \"unanswered\": $failed}"
}
one_cycle() {
    local ms
    ms=$(first_ping "$inner")
    fall_asleep
    [ -n "$ms" ]
}

# OpenVPN's client is started again by its own command line.
openvpn_start() {
    local program=() pid begin
    pid=$(supervisor)
    mapfile -d '' program <"/proc/$pid/cmdline"
    kill "$pid"
    promptly sh -c "! kill -0 $pid"
    sleep 1
    begin=$(date +%s%N)
    (cd "$dir" && background client "$NS_CLIENT" "${program[@]}")
    for _ in $(seq 2000); do
        # With -w it goes on until there is an answer; without a route it ends at once.
        if in_client ping -n -q -c 1 -i 0.01 -w 10 "$inner" >/dev/null 2>&1; then
            reckon "($(date +%s%N) - $begin) / 1e6"
            return
        fi
        sleep 0.01
    done
}
# The peer is made anew, so that the first packet has to wait for a handshake.
wireguard_start() {
    local device key
    device=wgc${WORK##*.}
    key=$(in_client wg show "$device" peers)
    in_client wg showconf "$device" >"$dir/again.conf"
    in_client wg set "$device" peer "$key" remove
    in_client wg setconf "$device" "$dir/again.conf"
    # A responder takes one handshake of a peer each 20 ms.
    sleep 0.1
    first_ping "$inner"
}
peer_time() {
    local ms
    for _ in $(seq "$rounds"); do
        case $peer in
            openvpn) ms=$(openvpn_start) ;;
            wireguard-go) ms=$(wireguard_start) ;;
            *) say "no way to start $peer"; return ;;
        esac
        note start "$(jq -cn --arg ms "$ms" '{ms: ($ms | tonumber? // null)}')"
        say "  RTT $rtt  $peer: ${ms:-no answer} ms"
    done
}

load=$(cut -d ' ' -f 1-3 /proc/loadavg)
jq -n --arg command "$command" --arg machine "$(machine)" --arg load "$load" --arg date "$(date -u +%F)" \
    --arg note "${NOTE:-}" --arg commit "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}" \
    --argjson rounds "$rounds" --argjson bursts "$bursts" --argjson cycles "$cycles" --argjson quiet "$quiet" \
    --arg rtts "$rtts" '{command: $command, note: $note, machine: $machine, load_before: $load, date: $date,
      commit: $commit, rounds: $rounds, bursts: $bursts, cycles: $cycles, quiet: $quiet,
      rtts: ($rtts | [splits("\\s+") | tonumber])}' >"$WORK/about.json"
describe_peers tunguard $peers

export ON_DEMAND='enabled = true
idle = "1s"'
for each in $rtts; do
    start_peer tunguard "$each"
    fall_asleep
    for _ in $(seq "$rounds"); do
        again_client
        fall_asleep
        start_of fresh
        fall_asleep
    done
    for _ in $(seq "$rounds"); do
        start_of again
        fall_asleep
    done
    for _ in $(seq "$bursts"); do
        burst_of
        fall_asleep
    done
    quiet_time
    end_turn
done
if [ "$cycles" != 0 ]; then
    start_peer tunguard 0
    fall_asleep
    cycle_time
    end_turn
fi
for each in $rtts; do
    for name in $peers; do
        start_peer "$name" "$each"
        peer_time
        end_turn
    done
done

write_results "$out"
python3 bench/ondemand/report.py "$out"
