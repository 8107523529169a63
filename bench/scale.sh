#!/usr/bin/env bash
# Many sessions: how fast they are made, what they cost, and how they share. Medians of several rounds.
#
#   bench/scale.sh [--rounds N] [--seconds N] [--sizes "10 100 1000"] [--out DIR]
#
# One round, every part with servers of its own, on the link that bench/run.sh uses, too:
#
#   handshakes   openssl s_server and s_time: mutual TLS 1.3 handshakes per second, new connections, no sessions
#   sessions     tunguard-swarm connect, 200 sessions, 8 at once: sessions per second
#   start        30 clients started at once, seconds until all say they are connected: tunguard's client, openvpn and
#                openconnect, a process and a device each; and tunguard-swarm, one process without devices
#   memory       PSS of the server's processes with idle sessions, less without, per session: with those 30 clients,
#                and with 100 of tunguard-swarm
#   share        100 sessions of which 1 or 100 exchange pings of 1400 bytes, 1600 under way in all: bits per second
#                each way, Jain's index
#   guard        CPU microseconds (user and kernel) of the guard per packet it reads from the device, with 10, 100 and
#                1000 sessions: ten of them active with 100 pings under way each; all of them active with 1000 pings
#                under way in all (few sessions get many packets at a time, many get one); and with one under way for
#                each session (every packet wakes a worker, whatever their number)
#
# Writes scale.json to DIR (target/bench). BIN is the directory of the programs (target/release).
set -euo pipefail
cd "$(dirname "$0")/.."
given=("$@")

rounds=3 seconds=5 sizes="10 100 1000" out=target/bench
while [ $# -gt 0 ]; do
    case $1 in
        --rounds) rounds=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        --sizes) sizes=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) echo "bench/scale.sh: unknown option $1: see the top of the script" >&2; exit 2 ;;
    esac
done
if [ "$(id -u)" != 0 ]; then
    echo "bench/scale.sh: makes network namespaces: run it as root" >&2
    exit 1
fi
BIN=$(cd "${BIN:-target/release}" && pwd)
export BIN PEERS="$PWD/bench/peers" NS_SERVER="tgs$$-s" NS_CLIENT="tgs$$-c" WORK
WORK=$(mktemp -d)
chmod 755 "$WORK"
ulimit -n 16384
. bench/lib.sh
command=$(spell bench/scale.sh "${given[@]}")

part=''
end_part() {
    [ -z "$part" ] || end_all "$WORK/$part"
    drop_namespaces
    wait
} 2>/dev/null
trap 'end_part; rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM HUP
begin_part() {
    end_part
    part=$1 dir=$WORK/$1
    rm -rf "$dir"
    mkdir -p "$dir"
    make_namespaces
}

lines=$WORK/scale.jsonl
measured() {
    record "$lines" "$1" "$round" "$2" "$3"
    say "  round $round  $1 $2: ${3:-failed}"
}
now() { echo "$EPOCHREALTIME"; }

clients=30
certificates=$WORK/certificates
largest=$(printf '%s\n' 200 $sizes | sort -n | tail -n 1)
"$BIN/tunguard-swarm" mint --dir "$certificates" --count "$largest" --server "$OUTER_SERVER"

# -- servers

tunguard_server() {
    cat >"$dir/server.toml" <<TOML
networks = ["10.9.0.0/16"]
max_clients = $((largest + 100))
# All clients are one host.
exempt_sources = ["0.0.0.0/0"]
state_dir = "$dir/state"
socket = "$dir/admin.sock"
[tls]
ca = "$certificates/ca.pem"
cert = "$certificates/server.pem"
key = "$certificates/server.key"
TOML
    background server "$NS_SERVER" "$BIN/tunguard" server --config "$dir/server.toml"
    eventually 100 grep -q 'is ready' "$dir/server.log" || { cat "$dir/server.log" >&2; exit 1; }
}
openvpn_server() {
    background server "$NS_SERVER" openvpn --dev tun --proto udp --port 1194 --topology subnet \
        --server 10.8.0.0 255.255.255.0 --ca "$certificates/ca.pem" --cert "$certificates/server.pem" \
        --key "$certificates/server.key" --dh none --data-ciphers AES-256-GCM --keepalive 10 60 --verb 3
    eventually 100 grep -q 'Initialization Sequence Completed' "$dir/server.log"
}
ocserv_server() {
    cp "$certificates"/{ca.pem,server.pem,server.key} "$dir"
    bash bench/peers/ocserv.sh config "$dir" >"$dir/ocserv.conf"
    background server "$NS_SERVER" ocserv -f -c "$dir/ocserv.conf"
    eventually 100 in_client bash -c "exec 3<>/dev/tcp/$OUTER_SERVER/4443"
}

# -- clients: each prints the command of client NAME with certificate CERTIFICATE (without .pem)

tunguard_client() {
    cat >"$dir/client-$1.toml" <<TOML
remote = "$OUTER_SERVER"
device = "tg$1"
state_dir = "$dir/client-$1"
[tls]
ca = "$certificates/ca.pem"
cert = "$2.pem"
key = "$2.key"
TOML
    chmod 600 "$dir/client-$1.toml"
    echo "$BIN/tunguard client --config $dir/client-$1.toml"
}
openvpn_client() {
    echo "openvpn --client --dev tun --proto udp --remote $OUTER_SERVER 1194 --nobind --ca $certificates/ca.pem" \
        "--cert $2.pem --key $2.key --remote-cert-tls server --data-ciphers AES-256-GCM --verb 3"
}
ocserv_client() {
    echo "openconnect --non-inter --script /bin/true --interface oc$1 --cafile $certificates/ca.pem" \
        "--certificate $2.pem --sslkey $2.key https://$OUTER_SERVER:4443"
}

# -- parts

handshakes() {
    begin_part handshakes
    background server "$NS_SERVER" openssl s_server -accept "$OUTER_SERVER:4999" -tls1_3 -Verify 1 \
        -verify_return_error -CAfile "$certificates/ca.pem" -cert "$certificates/server.pem" \
        -key "$certificates/server.key" -quiet -www
    eventually 50 in_client bash -c "exec 3<>/dev/tcp/$OUTER_SERVER/4999"
    local start end made
    start=$(now)
    made=$(in_client openssl s_time -connect "$OUTER_SERVER:4999" -new -time "$seconds" -tls1_3 \
        -CAfile "$certificates/ca.pem" -cert "$certificates/swarm-00000.pem" \
        -key "$certificates/swarm-00000.key" 2>/dev/null | awk '/real seconds/ { print $1 }')
    end=$(now)
    measured openssl handshakes "$(reckon "$made / ($end - $start)")"
}

sessions() {
    begin_part sessions
    tunguard_server
    measured tunguard sessions "$(in_client timeout 60 "$BIN/tunguard-swarm" connect --dir "$certificates" \
        --server "$OUTER_SERVER:55555" --count 200 --parallel 8 | jq .per_second)"
}

server_pss() { pss $(trees_of "$dir" server); }

# start NAME PATTERN: PATTERN is what a client logs when it is connected
start() {
    begin_part "$1"
    "$1_server"
    local i before began ended connected=0
    before=$(server_pss)
    echo "echo \$\$ >$dir/clients.pid; echo \$EPOCHREALTIME >$dir/began" >"$dir/launch"
    for i in $(seq 0 $((clients - 1))); do
        echo "$("$1_client" "$i" "$certificates/$(printf 'swarm-%05d' "$i")") </dev/null >$dir/client-$i.log 2>&1 &"
    done >>"$dir/launch"
    echo wait >>"$dir/launch"
    in_client bash "$dir/launch" 2>/dev/null &
    for _ in $(seq 1500); do
        connected=$(cat "$dir"/client-*.log 2>/dev/null | grep -c "$2" || true)
        [ "$connected" -lt $clients ] || break
        sleep 0.01
    done
    ended=$(now)
    began=$(cat "$dir/began")
    if [ "$connected" = $clients ]; then
        measured "$1" start "$(reckon "$ended - $began")"
        # An openvpn client is the same program as its server, so they would share what PSS divides.
        [ "$1" != openvpn ] || return 0
        sleep 2
        measured "$1" "memory_$clients" "$(reckon "($(server_pss) - $before) / $clients")"
    else
        say "  $1: $connected of $clients connected"
        measured "$1" start ""
    fi
}

swarm_start() {
    begin_part swarm
    tunguard_server
    measured tunguard-swarm start "$(in_client timeout 30 "$BIN/tunguard-swarm" connect --dir "$certificates" \
        --server "$OUTER_SERVER:55555" --count $clients --parallel $clients | jq .seconds)"
}

memory() {
    begin_part memory
    tunguard_server
    local before
    before=$(server_pss)
    in_client "$BIN/tunguard-swarm" connect --dir "$certificates" --server "$OUTER_SERVER:55555" --count 100 \
        --hold 5 >"$dir/connected" 2>/dev/null &
    eventually 200 test -s "$dir/connected"
    sleep 2
    measured tunguard memory_100 "$(reckon "($(server_pss) - $before) / 100")"
}

share() {
    local active result
    for active in 1 100; do
        begin_part share
        tunguard_server
        result=$(in_client timeout $((seconds + 60)) "$BIN/tunguard-swarm" traffic --dir "$certificates" \
            --server "$OUTER_SERVER:55555" --count 100 --active $active --window $((1600 / active)) \
            --seconds "$seconds" --size 1400 || echo '{}')
        measured tunguard throughput_$active "$(jq .bits_per_second_each_way <<<"$result")"
        [ $active = 1 ] || measured tunguard jain "$(jq .jain <<<"$result")"
    done
}

# What the kernel handed to whoever reads the device.
device_packets() { awk '$1 == "tg0:" { print $11 }' "/proc/$1/net/dev"; }
guard() {
    local count
    for count in $sizes; do guard_cost "$count" 10 100 guard_ten; done
    for count in $sizes; do guard_cost "$count" "$count" $((1000 / count)) guard; done
    for count in $sizes; do guard_cost "$count" "$count" 1 guard_lone; done
}
# guard_cost SESSIONS ACTIVE WINDOW MEASURE
guard_cost() {
    local guard cpu0 packets0 cpu1 packets1
    begin_part guard
    tunguard_server
    guard=$(cat "$dir/server.pid")
    in_client timeout $((seconds + 90)) "$BIN/tunguard-swarm" traffic --dir "$certificates" \
        --server "$OUTER_SERVER:55555" --count "$1" --active "$2" --window "$3" \
        --seconds $((seconds + 2)) --size 1400 >/dev/null 2>&1 &
    # All are connected once packets come in numbers.
    for _ in $(seq 300); do
        [ "$(device_packets "$guard")" -lt 10000 ] || break
        sleep 0.1
    done
    sleep 0.3
    cpu0=$(cpu "$guard") packets0=$(device_packets "$guard")
    sleep "$seconds"
    cpu1=$(cpu "$guard") packets1=$(device_packets "$guard")
    if [ "$packets1" = "$packets0" ]; then
        measured tunguard "$4_us_$1" ""
        return
    fi
    measured tunguard "$4_us_$1" "$(reckon "($cpu1 - $cpu0) / ($packets1 - $packets0) * 1e6")"
    measured tunguard "$4_packets_$1" "$(reckon "($packets1 - $packets0) / $seconds")"
}

for round in $(seq "$rounds"); do
    handshakes
    sessions
    start tunguard 'tunnel up'
    start openvpn 'Initialization Sequence Completed'
    start ocserv 'Configured as'
    swarm_start
    memory
    share
    guard
done
mkdir -p "$out"
jq -s --arg command "$command" --arg machine "$(machine)" '{command: $command, machine: $machine, runs: .}' "$lines" >"$out/scale.json"
