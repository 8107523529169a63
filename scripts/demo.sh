#!/usr/bin/env bash
# A server, a LAN host behind it and two clients, each in a network namespace of its own, and everything a user
# would want to see work between them. What `make demo` does after the build.
#
#   scripts/demo.sh BIN     BIN is the directory with the three programs
#
# Exit code 0 when every step passed. Whatever happens, every process started here is ended, and every namespace
# and file made here is removed.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$(cd "${1:-target/release}" && pwd) || exit 1
if [ "$(id -u)" != 0 ]; then
    echo "the demo makes network namespaces: run it as root" >&2
    exit 16
fi

readonly id=tgdemo$$
readonly gate=$id-gate lan=$id-lan net=$id-net alice=$id-alice bob=$id-bob
work=$(mktemp -d "/tmp/$id.XXXX")
pids=()
failures=0

clean_up() {
    local pid ns
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null; done
    # A goodbye takes a moment; then without.
    for _ in $(seq 40); do
        kill -0 "${pids[@]}" 2>/dev/null || break
        sleep 0.1
    done
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null; done
    for ns in $gate $lan $net $alice $bob; do
        # Helpers of what was started above, such as a forked socat, are in our namespaces and nobody else's.
        for pid in $(ip netns pids "$ns" 2>/dev/null); do kill -9 "$pid" 2>/dev/null; done
        ip netns del "$ns" 2>/dev/null
    done
    rm -rf "$work"
}
finish() {
    local code=$?
    trap - EXIT
    [ "$code" = 0 ] && [ "$failures" != 0 ] && code=1
    if [ "$code" -gt 128 ]; then
        printf '\nInterrupted.\n'
    elif [ "$code" != 0 ]; then
        for log in "$work"/*.log; do
            [ -s "$log" ] || continue
            printf '\n-- %s\n' "${log##*/}"
            tail -n 60 "$log"
        done
    fi
    clean_up 2>/dev/null
    if [ "$code" = 0 ]; then
        printf '\nEverything passed, in %d s. The namespaces and all files of the demo are removed.\n' "$SECONDS"
    elif [ "$code" -lt 128 ]; then
        printf '\nFailed steps: %d; the logs are above.\n' "$failures"
    fi
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# -- helpers

heading() { printf '\n== %s\n' "$*"; }
say() { printf '   %s\n' "$*"; }
pass() { printf '   PASS  %s\n' "$*"; }
fail() {
    printf '   FAIL  %s\n' "$*"
    failures=$((failures + 1))
}
# What can't be gone on from.
fatal() {
    fail "$@"
    exit 1
}
# expect TEXT COMMAND...: the command has to succeed
expect() {
    local text=$1 said
    shift
    if said=$("$@" 2>&1); then pass "$text"; else
        fail "$text"
        printf '%s\n' "$said" | sed 's/^/         /'
    fi
}
on() { ip netns exec "$@"; }
# start NAME NAMESPACE COMMAND...: in the background, its output in NAME.log, its process ID in $started
start() {
    local log=$work/$1.log ns=$2
    shift 2
    ip netns exec "$ns" "$@" </dev/null >>"$log" 2>&1 &
    started=$!
    pids+=("$started")
}
# eventually SECONDS COMMAND...
eventually() {
    local tries=$(($1 * 10))
    shift
    for _ in $(seq "$tries"); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    return 1
}
# stop PID: ends a process as Ctrl-C would, and waits; its exit code
stop() {
    kill -INT "$1" 2>/dev/null
    ( sleep 10; kill -9 "$1" 2>/dev/null ) &
    local killer=$!
    wait "$1"
    local code=$?
    kill "$killer" 2>/dev/null
    wait "$killer" 2>/dev/null
    return "$code"
}
tunguard() { "$bin/tunguard" "$@"; }
status() { timeout 5 "$bin/tunguard" status --socket "$work/admin.sock" "$@"; }
sessions() { status --json | grep -c '"slot":'; }
has_sessions() { [ "$(sessions)" = "$1" ]; }
up() { has_sessions "$1" && ping_ok "$alice" 10.9.0.1 && { [ "$1" = 1 ] || ping_ok "$bob" 10.9.0.1; }; }
inner() { ip -n "$1" -o addr show dev tg0 scope global | awk -v f="$2" '$3 == f { sub("/.*", "", $4); print $4; exit }'; }
ping_ok() { on "$1" ping -n -q -c 2 -i 0.05 -W 2 "$2"; }
no_ping() { ! on "$1" ping -n -q -c 2 -i 0.2 -W 1 "$2"; }

# -- the network

heading "Five hosts in network namespaces"
cat <<'END'

   alice 198.51.100.2
         2001:db8:a::2 --\
                          net --- 192.0.2.2      gate  192.168.50.1 --- 192.168.50.2  lan
   bob   203.0.113.2   --/        2001:db8:c::2        fd50::1          fd50::2
         2001:db8:b::2   (router)
                                  tg0 10.9.0.1, fd09::1                 (knows no way to the tunnel)

END
for ns in $gate $lan $net $alice $bob; do
    ip netns add "$ns" || fatal "no network namespace can be made here"
    ip -n "$ns" link set lo up
done
# wire NAMESPACE DEVICE ADDRESS ADDRESS NAMESPACE DEVICE ADDRESS ADDRESS
wire() {
    ip link add "$2" netns "$1" type veth peer name "$6" netns "$5" || fatal "no veth pair can be made here"
    local ns device
    while [ $# -gt 0 ]; do
        ns=$1 device=$2
        ip -n "$ns" addr add "$3" dev "$device"
        ip -n "$ns" addr add "$4" dev "$device" nodad
        ip -n "$ns" link set "$device" up
        shift 4
    done
}
wire $alice eth0 198.51.100.2/24 2001:db8:a::2/64 $net alice 198.51.100.1/24 2001:db8:a::1/64
wire $bob eth0 203.0.113.2/24 2001:db8:b::2/64 $net bob 203.0.113.1/24 2001:db8:b::1/64
wire $gate eth0 192.0.2.2/24 2001:db8:c::2/64 $net gate 192.0.2.1/24 2001:db8:c::1/64
wire $gate eth1 192.168.50.1/24 fd50::1/64 $lan eth0 192.168.50.2/24 fd50::2/64
for ns in "$alice 198.51.100.1 2001:db8:a::1" "$bob 203.0.113.1 2001:db8:b::1" "$gate 192.0.2.1 2001:db8:c::1"; do
    read -r name v4 v6 <<<"$ns"
    ip -n "$name" route add default via "$v4"
    ip -n "$name" -6 route add default via "$v6"
done
on $net sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
eventually 5 ping_ok $alice 192.0.2.2 && eventually 5 ping_ok $bob 2001:db8:c::2 ||
    fatal "the hosts don't reach each other outside the tunnel"
pass "alice and bob reach gate, outside of any tunnel"

# -- certificates and configuration

heading "Certificates, and a profile for each client"
( umask 077
  tunguard pki init --dir "$work/certs" --name "demo CA" &&
      tunguard pki server --dir "$work/certs" server --san 192.0.2.2 --san 2001:db8:c::2 &&
      tunguard pki client --dir "$work/certs" alice &&
      tunguard pki client --dir "$work/certs" bob ) >"$work/pki.log" 2>&1 || fatal "tunguard pki"
# Both clients' files are on one machine here, so each gets a state directory of its own.
( umask 077
  for client in "alice 192.0.2.2" "bob [2001:db8:c::2]:55555"; do
      read -r name remote <<<"$client"
      echo "state_dir = \"$work/$name-state\""
      tunguard pki profile --dir "$work/certs" "$name" --remote "$remote"
  done >"$work/both" ) 2>>"$work/pki.log" || fatal "tunguard pki profile"
csplit -s -f "$work/profile" "$work/both" '/^state_dir/' '{*}'
mv "$work/profile01" "$work/alice.toml" && mv "$work/profile02" "$work/bob.toml" || fatal "tunguard pki profile"
rm -f "$work/both" "$work/profile00"
chmod 600 "$work"/*.toml
say "$(tunguard pki list --dir "$work/certs" | cut -c 1-76 | sed '2,$s/^/   /')"

server_config() {
    cat >"$work/server.toml" <<END
listen = "[::]:55555"
networks = ["10.9.0.0/24", "fd09::/64"]
nat = true
client_to_client = $1
push = { routes = ["192.168.50.0/24", "fd50::/64"] }
socket = "$work/admin.sock"
state_dir = "$work/server-state"
[tls]
ca = "certs/ca.pem"
cert = "certs/server.pem"
key = "certs/server.key"
crl = "certs/crl.pem"
END
}
start_server() {
    server_config "$1"
    start server $gate "$bin/tunguard" server --config "$work/server.toml"
    server=$started
    eventually 10 status || fatal "the server doesn't answer on its admin socket"
}

# -- up

heading "The server, and two clients: alice dials over IPv4, bob over IPv6"
routes_before=$(ip -n $alice route; ip -n $alice -6 route)
forwarding_before=$(on $gate cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding)
start_server false
pass "the server answers on its admin socket"
start alice $alice "$bin/tunguard" client --config "$work/alice.toml"
alice_pid=$started
start bob $bob "$bin/tunguard" client --config "$work/bob.toml"
bob_pid=$started
eventually 15 up 2 || fatal "the clients have no tunnel within 15 s"
pass "both tunnels are up, $SECONDS s after the start"

heading "Processes: guard, nursery and supervisors as root, a worker per client and the tunnel processes without"
ps -o pid,ppid,uid,comm,args --forest --sort pid -p "$server,$alice_pid,$bob_pid" --ppid "$server,$alice_pid,$bob_pid" |
    sed "s|$bin/||g; s|$work/||g" | cut -c 1-100 | sed 's/^/   /'
# The server's children but key holder and nursery, which are there as long as the server.
worker_uids() { ps -o comm=,uid= --ppid "$server" | awk '$1 !~ /^tg-/ { print $2 }'; }
expect "two workers, each with a user ID of its own" [ "$(worker_uids | sort -u | wc -l)" = 2 ]
expect "no worker is root" [ "$(worker_uids | grep -cx 0)" = 0 ]
tunnel_uids() { ps -o uid= --ppid "$alice_pid,$bob_pid"; }
expect "no tunnel process is root" sh -c "[ -n '$(tunnel_uids | tr -d ' \n')' ] && ! echo '$(tunnel_uids | tr -d ' ' | tr '\n' ' ')' | grep -qw 0"

heading "Addresses"
for host in "gate $gate" "alice $alice" "bob $bob"; do
    read -r name ns <<<"$host"
    say "$(printf '%-5s  %-12s %s' "$name" "$(inner "$ns" inet)" "$(inner "$ns" inet6)")"
done
a4=$(inner $alice inet) a6=$(inner $alice inet6) b4=$(inner $bob inet) b6=$(inner $bob inet6)
expect "each client has an IPv4 and an IPv6 address" [ -n "$a4" -a -n "$a6" -a -n "$b4" -a -n "$b6" ]

heading "tunguard status"
status | sed 's/^/   /'
expect "it knows both sessions" has_sessions 2

# -- traffic

heading "Ping through the tunnel, both ways, both families"
expect "alice -> gate 10.9.0.1" ping_ok $alice 10.9.0.1
expect "alice -> gate fd09::1" ping_ok $alice fd09::1
expect "bob   -> gate 10.9.0.1" ping_ok $bob 10.9.0.1
expect "bob   -> gate fd09::1" ping_ok $bob fd09::1
expect "gate  -> alice $a4" ping_ok $gate "$a4"
expect "gate  -> alice $a6" ping_ok $gate "$a6"
expect "gate  -> bob $b4" ping_ok $gate "$b4"
expect "gate  -> bob $b6" ping_ok $gate "$b6"

heading "A file through the tunnel, to the server and back"
head -c 33554432 /dev/urandom >"$work/file"
# copy FROM_NAMESPACE TO_NAMESPACE ADDRESS RESULT: the receiver listens on its inner address
copy() {
    local listen=TCP4-LISTEN to=$3
    case $3 in *:*) listen=TCP6-LISTEN to="[$3]" ;; esac
    rm -f "$4"
    start copy "$2" socat -u "$listen:7000,bind=$to,reuseaddr" "CREATE:$4"
    local receiver=$started
    eventually 5 sh -c "ip netns exec $2 cat /proc/net/tcp /proc/net/tcp6 | grep -q ':1B58 0*:0000 0A'" || return 1
    on "$1" timeout 20 socat -u "OPEN:$work/file" "TCP:$to:7000" && wait "$receiver"
}
sum() { sha256sum <"$1" | cut -d ' ' -f 1; }
want=$(sum "$work/file")
say "32 MiB, SHA-256 ${want:0:32}..."
for way in "alice gate 10.9.0.1" "gate alice $a6" "bob gate fd09::1" "gate bob $b4"; do
    read -r from to address <<<"$way"
    if copy "$id-$from" "$id-$to" "$address" "$work/copy" && [ "$(sum "$work/copy")" = "$want" ]; then
        pass "$from -> $to ($address): the same SHA-256"
    else
        fail "$from -> $to ($address)"
    fi
done
rm -f "$work/copy"

heading "The LAN behind the server, through NAT"
for listen in TCP4-LISTEN:8080 TCP6-LISTEN:8080,ipv6only=1; do
    # shellcheck disable=SC2016 # the shell that socat starts knows the variable
    start web $lan socat -T 5 "$listen,reuseaddr,fork" 'SYSTEM:echo you are $SOCAT_PEERADDR'
done
expect "alice -> lan 192.168.50.2" ping_ok $alice 192.168.50.2
expect "bob   -> lan fd50::2" ping_ok $bob fd50::2
who() { on "$1" timeout 5 socat -u "TCP:$2:8080" - 2>&1; }
eventually 5 who $lan 127.0.0.1 && eventually 5 who $lan '[::1]'
seen=$(who $alice 192.168.50.2)
say "the LAN host tells alice: $seen"
expect "the LAN host sees the server's address, not alice's" [ "$seen" = "you are 192.168.50.1" ]
seen=$(who $bob '[fd50::2]')
say "the LAN host tells bob: $seen"
expect "the same over IPv6" [ "$seen" = "you are [fd50:0000:0000:0000:0000:0000:0000:0001]" ]

heading "iperf3, one TCP stream, 3 s each way"
start iperf $gate iperf3 -s -B 10.9.0.1
sleep 0.5
iperf() {
    local rate
    rate=$(on $alice timeout 20 iperf3 -c 10.9.0.1 -t 3 -f m "$@" | awk '/receiver/ { print $7, $8 }')
    [ -n "$rate" ] && echo "$rate"
}
if rate=$(iperf); then pass "alice -> gate $rate"; else fail "iperf3 alice -> gate"; fi
if rate=$(iperf -R); then pass "gate -> alice $rate"; else fail "iperf3 gate -> alice"; fi

# -- client to client

heading "Client to client: refused as long as the server's configuration doesn't allow it"
said=$(on $alice ping -n -c 2 -i 0.2 -W 1 "$b4" 2>&1)
say "$(printf '%s\n' "$said" | grep -m 1 -i -E 'filtered|prohibited|unreachable|100% packet loss')"
expect "alice can't reach bob" no_ping $alice "$b4"
expect "bob can't reach alice over IPv6" no_ping $bob "$a6"

heading "The same with client_to_client = true: the server starts again, the clients come back by themselves"
stop "$server" || fail "the server ended with exit code $?"
gone=$SECONDS
start_server true
eventually 30 up 2 || fatal "the clients are not back within 30 s"
pass "both clients are back $((SECONDS - gone)) s after the server went"
expect "with the same addresses" [ "$(inner $alice inet) $(inner $bob inet6)" = "$a4 $b6" ]
expect "alice -> bob $b4" ping_ok $alice "$b4"
expect "bob   -> alice $a6" ping_ok $bob "$a6"

# -- moving

heading "Alice moves to another network and back, in the middle of a transfer"
wire $alice wlan0 198.51.101.2/24 2001:db8:d::2/64 $net alicew 198.51.101.1/24 2001:db8:d::1/64
eventually 5 ping_ok $alice 198.51.101.1 || fail "alice's second network"
[ -n "$(on $gate ss -Hltn sport = :5201)" ] || start iperf $gate iperf3 -s -B 10.9.0.1
eventually 5 sh -c "ip netns exec $gate ss -Hltn sport = :5201 | grep -q ."
on $gate ping -D -n -i 0.01 -w 9 "$a4" >"$work/pings" 2>&1 &
pings=$!
on $alice timeout 20 iperf3 -c 10.9.0.1 -t 8 -b 300M -J >"$work/moving.json" 2>&1 &
transfer=$!
is_at() { status --json | grep -Eq "\"peer\": ?\"$1:"; }
sleep 1.5
# What happens where the Wi-Fi takes over from the cable, and the other way round.
ip -n $alice link set eth0 down
ip -n $alice route add default via 198.51.101.1
expect "the server follows her to 198.51.101.2" eventually 10 is_at 198.51.101.2
sleep 1.5
ip -n $alice link set eth0 up
ip -n $alice route replace default via 198.51.100.1
ip -n $alice link set wlan0 down
expect "and back to 198.51.100.2" eventually 10 is_at 198.51.100.2
# The link took its IPv6 address and route along.
ip -n $alice link del wlan0
ip -n $alice addr add 2001:db8:a::2/64 dev eth0 nodad
ip -n $alice -6 route add default via 2001:db8:a::1
if wait "$transfer"; then
    pass "one TCP connection lived through both moves: $(awk -F '[:,]' '/"sum_received"/ { on = 1 } on && /"bytes"/ { printf "%d MB arrived", $2 / 1e6; exit }' "$work/moving.json")"
else
    fail "the transfer did not live through the moves"
fi
wait "$pings"
# Answers come every 10 ms.
gap=$(awk -F '[][]' '/bytes from/ { if (last && $2 - last > most) most = $2 - last; last = $2 } END { printf "%d", most * 1000 }' "$work/pings")
lost=$(sed -n 's/.* \([0-9]*\) packets transmitted, \([0-9]*\) received.*/\1 \2/p; s/^\([0-9]*\) packets transmitted, \([0-9]*\) received.*/\1 \2/p' "$work/pings" | awk '{ print $1 - $2; exit }')
say "gate pinged her 100 times a second meanwhile: $lost pings lost, the longest silence was $gap ms"
expect "no silence was longer than a second" [ "$gap" -lt 1000 ]

# -- on demand

heading "Bob connects on demand: a packet brings the tunnel up, and after a second without any it is gone"
stop "$bob_pid" || fail "bob ended with exit code $?"
printf '\n[on_demand]\nenabled = true\nidle = "1s"\n' >>"$work/bob.toml"
start bob $bob "$bin/tunguard" client --config "$work/bob.toml"
bob_pid=$started
bob_status() { timeout 5 "$bin/tunguard" status --socket "$work/bob-state/client-tg0.sock" "$@"; }
session_of() { status | grep -q "^$1 .* established"; }
without_session_of() { ! session_of "$1"; }
asleep() { bob_status | grep -q ', asleep,' && [ -z "$(ps -o pid= --ppid "$bob_pid")" ] && without_session_of bob; }
first_ping() { on $bob ping -n -c 1 -W 5 10.9.0.1 | sed -n 's/.*time=//p' | grep .; }
# His first connection is made for the addresses.
expect "he sleeps: no tunnel process, and no session or worker at the server" eventually 15 asleep
expect "his addresses stay, and so do his routes" [ "$(inner $bob inet) $(inner $bob inet6)" = "$b4 $b6" ]
if took=$(first_ping); then pass "the first ping is answered, after $took"; else fail "the first ping"; fi
expect "now there is a session" session_of bob
expect "and a second later none" eventually 5 asleep
if took=$(first_ping); then pass "and again, after $took"; else fail "the next ping"; fi
say "tunguard status, of his client:"
bob_status | cut -c 1-100 | sed 's/^/      /'

# -- down

heading "Leaving"
stop "$alice_pid" || fail "alice ended with exit code $?"
expect "alice left: her session is gone" eventually 5 without_session_of alice
expect "alice's device is gone" sh -c "! ip -n $alice link show tg0"
expect "alice's routes are what they were" [ "$(ip -n $alice route; ip -n $alice -6 route)" = "$routes_before" ]
expect "bob still reaches the server" ping_ok $bob 10.9.0.1
stop "$bob_pid" || fail "bob ended with exit code $?"
expect "no session is left" eventually 5 has_sessions 0
expect "no worker is left" [ -z "$(worker_uids)" ]
stop "$server" || fail "the server ended with exit code $?"
expect "the server's device is gone" sh -c "! ip -n $gate link show tg0"
expect "its nftables table is gone" sh -c "! ip netns exec $gate nft list ruleset | grep tunguard"
expect "forwarding is as it was" \
    [ "$(on $gate cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding)" = "$forwarding_before" ]

[ "$failures" = 0 ]
