#!/usr/bin/env bash
# How long a VPN is silent when its client moves: tunguard beside the VPNs a user could pick instead, in one run, in
# turns, medians.
#
#   bench/roam.sh [--moves N] [--peer-moves N] [--rounds N] [--peers "tunguard ..."] [--kinds "address:up ..."]
#                 [--outage S] [--limit S] [--rtt MS] [--family 4|6] [--no-tcp] [--jobs N] [--out DIR]
#
# A peer is a script in bench/peers/ (bench/peers/README.md). For each turn network namespaces are made, the peer is
# started between them, moved, stopped, and the namespaces are removed.
#
#   client  wlan0 198.18.1.2 ---- 198.18.1.1 wlan0  router            without --rtt:
#           eth0  198.18.2.2 ---- 198.18.2.1 eth0   forwards,         wan 198.18.100.1 --- 198.18.100.2 eth0  server
#                                                   drops, NATs       with --rtt a namespace between, which gives
#           and 2001:db8:N::/64 of the same numbers                   every packet back later (tunguard-roam delay)
#
# Each carrier's network takes only packets from its own addresses, as real ones do (BCP 38).
#
# The client has a default route by each carrier, that of the one it prefers with the lower metric. Inside the VPN a
# program sends 500 packets of 200 bytes per second one way, up (by the client) or down (to a client that sends nothing
# itself). A move is one of:
#
#   address    the preferred carrier's address is replaced by another of its network, never by an earlier one
#   carrier    the default route changes to the other carrier, then the first loses its addresses and goes down
#   failover   the router drops all packets of the carrier in use, both ways; no link goes down
#   rebind     the router's NAT forgets all UDP flows and gives out other ports from now on
#   rebind-all the same for TCP, too
#   outage     the router drops all packets of all carriers for --outage seconds (60)
#   restart    the server's processes are killed, and it is started again
#   link       the preferred carrier's link goes down, which takes its routes along, and after 3 s comes up again with
#              the same address and the same default route; the other carrier is there all the time
#   resume     as carrier, on a path of --rtt (50 if that is 0): how long until there is a control connection by the other
#              carrier as well, told by the VPN's log; only for peers that say what to look for there (verb `resumed`)
#
# KIND:WAY:N asks for N moves at most, outage:up:1 for instance.
#
# What counts is the longest time without arrivals from the move on, for link until 2 s after it came back; for outage
# and restart it is the time from when the
# router drops nothing any more, or the server listens, to the first packet. At most --limit (20) seconds; a VPN that
# needs longer on the first three moves of a kind isn't asked again. A move around which the sender itself paused for more
# than 10 ms, because others used the machine, is repeated up to twice. --moves (10) of each kind in --rounds (2) turns,
# --peer-moves for all but tunguard. --jobs N (1) shares the peers out to N processes that run at the same time, each in
# namespaces of its own. How long it will take is said first.
# Then bytes go over one TCP connection while addresses and carriers change in turn, with their SHA-256 at both ends.
#
# Writes results.json, README.md and timelines to DIR (target/roam), see bench/roam/report.py. BIN is the directory of
# the programs (target/release), COMMIT what they were built from (HEAD), NOTE a sentence for the report.
set -euo pipefail
cd "$(dirname "$0")/.."
given=("$@")

moves=10 peer_moves='' rounds=2 outage=60 limit=20 rtt=0 family=4 tcp=yes jobs=1 out=target/roam
peers="tunguard tunguard-failover tunguard-redundant openvpn ocserv wireguard-go wireguard-go-hook"
kinds="address:up address:down carrier:up carrier:down failover:up failover:down rebind:up rebind-all:up
    link:up link:down outage:up:2 outage:down:2 restart:up restart:down resume:up resume:down"
while [ $# -gt 0 ]; do
    case $1 in
        --moves) moves=$2; shift 2 ;;
        --peer-moves) peer_moves=$2; shift 2 ;;
        --rounds) rounds=$2; shift 2 ;;
        --peers) peers=$2; shift 2 ;;
        --kinds) kinds=$2; shift 2 ;;
        --outage) outage=$2; shift 2 ;;
        --limit) limit=$2; shift 2 ;;
        --rtt) rtt=$2; shift 2 ;;
        --family) family=$2; shift 2 ;;
        --no-tcp) tcp=''; shift ;;
        --jobs) jobs=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) echo "bench/roam.sh: unknown option $1: see the top of the script" >&2; exit 2 ;;
    esac
done
peer_moves=${peer_moves:-$moves}
for each in $kinds; do
    if ! [[ $each =~ ^(address|carrier|failover|rebind|rebind-all|outage|restart|link|resume):(up|down)(:[0-9]+)?$ ]]; then
        echo "bench/roam.sh: no such kind of move: $each" >&2
        exit 2
    fi
done
if [ "$(id -u)" != 0 ]; then
    echo "bench/roam.sh: makes network namespaces: run it as root" >&2
    exit 1
fi
scripts/packages.sh run lab bench >&2
BIN=$(cd "${BIN:-target/release}" && pwd)
export BIN PEERS="$PWD/bench/peers" NS_SERVER="tgr$$-s" NS_CLIENT="tgr$$-c" NS_BETWEEN="tgr$$-r tgr$$-w" WORK MOBILE=yes
readonly ROUTER="tgr$$-r" WIRE="tgr$$-w" roam="$BIN/tunguard-roam"
case $family in
    4) OUTER_SERVER=198.18.100.2 OUTER_CLIENT=198.18.1.2 ;;
    6) OUTER_SERVER=2001:db8:100::2 OUTER_CLIENT=2001:db8:1::2 ;;
    *) echo "bench/roam.sh: --family 4 or 6" >&2; exit 2 ;;
esac
WORK=$(mktemp -d)
chmod 755 "$WORK"
. bench/lib.sh
command=$(spell bench/roam.sh "${given[@]}")

lines=$WORK/results.jsonl
peer=''
touch "$lines"

end_turn() {
    [ -z "$asleep" ] || kill "$asleep" || true
    # shellcheck disable=SC2086 # a list of numbers
    [ -z "$workers" ] || kill $workers || true
    end_flow
    [ -z "$peer" ] || bash "bench/peers/$peer.sh" stop || true
    [ -z "$wire" ] || kill "$wire" || true
    drop_namespaces
    wait
    rm -rf "$WORK/peer"
    peer='' wire='' workers='' asleep=''
} 2>/dev/null
end_flow() {
    # shellcheck disable=SC2086 # a list of numbers
    [ -z "$flow" ] || kill $flow || true
    # shellcheck disable=SC2086
    [ -z "$flow" ] || wait $flow || true
    flow=''
} 2>/dev/null
flow='' wire='' workers='' asleep=''
# A second signal doesn't cut it short: a terminal's goes to all jobs, and to the one that ends them.
trap 'trap "" INT TERM HUP; end_turn; rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM HUP
# A flow that ended early is noticed where it is read.
trap : PIPE
# `wait` is what a signal may end: it ends neither a command in the foreground, nor `read` without bash aborting (5.2).
# nap SECONDS
nap() {
    sleep "$1" &
    asleep=$!
    wait "$asleep" || true
    asleep=''
}
# hear SECONDS: the receiver's next line, in $heard
hear() {
    timeout "$1" head -n 1 <&"$said" >"$WORK/heard" &
    asleep=$!
    wait "$asleep" || true
    asleep=''
    heard=$(cat "$WORK/heard")
}

# -- the network

# 1 is wlan0, 2 is eth0
carriers=([1]=wlan0 [2]=eth0)

build_network() {
    local ns n device
    add_namespaces "$NS_CLIENT" "$ROUTER" "$WIRE" "$NS_SERVER"
    for ns in "$ROUTER" "$WIRE"; do
        ip netns exec "$ns" sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
    done
    for n in 1 2; do
        device=${carriers[n]}
        ip link add "$device" netns "$ROUTER" type veth peer name "$device" netns "$NS_CLIENT"
        plug "$ROUTER" "$device" "$n" 1
    done
    host=([1]=2 [2]=2) preferred=1
    for n in 1 2; do plug_in "$n" $((n * 100)); done
    if [ "$lag" = 0 ]; then
        ip link add wan netns "$ROUTER" type veth peer name eth0 netns "$NS_SERVER"
        plug "$ROUTER" wan 100 1
    else
        ip link add wan netns "$ROUTER" type veth peer name r netns "$WIRE"
        ip link add s netns "$WIRE" type veth peer name eth0 netns "$NS_SERVER"
        plug "$ROUTER" wan 90 1
        plug "$WIRE" r 90 2
        plug "$WIRE" s 100 1
        lead_through_tun "$WIRE" "$lag"
        ip -n "$ROUTER" -batch - <<'IP'
route add default via 198.18.90.2
route add default via 2001:db8:90::2
IP
    fi
    plug "$NS_SERVER" eth0 100 2
    ip -n "$NS_SERVER" -batch - <<'IP'
route add default via 198.18.100.1
route add default via 2001:db8:100::1
IP
    nat=0 natted=none
    router_rules ''
}
# plug_in CARRIER METRIC: at the client
plug_in() {
    plug "$NS_CLIENT" "${carriers[$1]}" "$1" "${host[$1]}"
    default_route add "$1" "$2" | ip -n "$NS_CLIENT" -batch -
}
# default_route VERB CARRIER METRIC: for ip -batch
default_route() {
    echo "route $1 default via 198.18.$2.1 dev ${carriers[$2]} metric $3"
    echo "route $1 default via 2001:db8:$2::1 dev ${carriers[$2]} metric $3"
}

# router_rules NAT: what is NATed: nothing, "udp" or "all". A new zone of the tracker is what makes the router forget:
# no packet finds the entries of the former one, whichever way it goes.
router_rules() {
    local which zone="" source=""
    case $1 in
        udp) which='meta l4proto udp' ;;
        all) which='meta l4proto { tcp, udp }' ;;
    esac
    if [ -n "$1" ]; then
        nat=$((nat + 1))
        zone="$which ct zone set $nat"
        source="oifname wan $which masquerade to :$((20000 + nat * 100))-$((20099 + nat * 100))"
    fi
    ip netns exec "$ROUTER" nft -f - <<NFT
table inet roam
delete table inet roam
table inet roam {
    set holed { type ifname; }
    chain first { type filter hook prerouting priority raw; $zone; }
    chain between {
        type filter hook forward priority filter
        ct state established counter
        iifname wlan0 ip saddr != 198.18.1.0/24 drop
        iifname wlan0 ip6 saddr != 2001:db8:1::/64 drop
        iifname eth0 ip saddr != 198.18.2.0/24 drop
        iifname eth0 ip6 saddr != 2001:db8:2::/64 drop
        iifname @holed drop
        oifname @holed drop
    }
    chain last { type nat hook postrouting priority srcnat; $source; }
}
NFT
}
# hole add|delete CARRIER...
hole() {
    local verb=$1 devices
    shift
    devices=$(for n in "$@"; do echo "\"${carriers[n]}\""; done | paste -sd ,)
    ip netns exec "$ROUTER" nft "$verb element inet roam holed { $devices }"
}
# The carrier that carries packets; where both do it is the preferred one.
in_use() {
    local n before=() after=()
    for n in 1 2; do before[n]=$(packets "$n"); done
    nap 0.3
    for n in 1 2; do after[n]=$(packets "$n"); done
    local other=$((3 - preferred))
    if [ $((after[other] - before[other])) -gt $((2 * (after[preferred] - before[preferred]))) ]; then
        echo $other
    else
        echo $preferred
    fi
}
packets() { ip -n "$ROUTER" -s -j link show "${carriers[$1]}" | jq '.[0].stats64 | .rx.packets + .tx.packets'; }

# -- moves: each says `begin` just before, and `whole` when the network is as good as it gets. after_* makes it ready for
# the next one.

begin() { echo move >&"$orders"; }
whole() { echo back >&"$orders"; }

move_address() {
    local n=$preferred old=${host[preferred]}
    another_address "$n"
    begin
    {
        echo "addr del 198.18.$n.$old/24 dev ${carriers[n]}"
        echo "addr del 2001:db8:$n::$old/64 dev ${carriers[n]}"
        echo "addr add 198.18.$n.${host[n]}/24 dev ${carriers[n]}"
        echo "addr add 2001:db8:$n::${host[n]}/64 dev ${carriers[n]} nodad"
        default_route replace "$n" 100
    } | ip -n "$NS_CLIENT" -batch -
    whole
}
after_address() { :; }
# One that the client never had, or long ago: whoever goes on with an old one gets no answer.
another_address() { host[$1]=$((host[$1] % 250 + 2)); }

move_carrier() {
    local old=$preferred
    preferred=$((3 - old))
    begin
    {
        default_route add "$preferred" 50
        echo "addr del 198.18.$old.${host[old]}/24 dev ${carriers[old]}"
        echo "addr del 2001:db8:$old::${host[old]}/64 dev ${carriers[old]}"
        echo "link set ${carriers[old]} down"
    } | ip -n "$NS_CLIENT" -batch -
    whole
}
# The new one has 100 from now on, the one that went comes back with 200, and with another address.
after_carrier() {
    local gone=$((3 - preferred))
    another_address "$gone"
    default_route add "$preferred" 100 | ip -n "$NS_CLIENT" -batch -
    { default_route del "$preferred" 50; default_route del "$preferred" 200; } | ip -n "$NS_CLIENT" -batch -
    plug_in "$gone" 200
}

move_failover() {
    local active
    active=$(in_use)
    begin
    hole add "$active"
    whole
}
after_failover() { ip netns exec "$ROUTER" nft flush set inet roam holed; }

move_rebind() {
    begin
    router_rules udp
    whole
}
after_rebind() { :; }

move_rebind-all() {
    begin
    router_rules all
    whole
}
after_rebind-all() { :; }

move_outage() {
    begin
    hole add 1 2
    nap "$outage"
    hole delete 1 2
    whole
}
after_outage() { :; }

move_restart() {
    begin
    bash "bench/peers/$peer.sh" crash
    bash "bench/peers/$peer.sh" again || say "  $peer: the server doesn't listen again"
    whole
}
after_restart() { :; }

move_link() {
    local n=$preferred
    begin
    ip -n "$NS_CLIENT" link set "${carriers[n]}" down
    nap 3
    # The kernel forgets IPv6 addresses of a link that goes down, and all routes by it.
    {
        echo "link set ${carriers[n]} up"
        echo "addr replace 198.18.$n.${host[n]}/24 dev ${carriers[n]}"
        echo "addr replace 2001:db8:$n::${host[n]}/64 dev ${carriers[n]} nodad"
        default_route replace "$n" 100
    } | ip -n "$NS_CLIENT" -batch -
    whole
}
after_link() { :; }

move_resume() { move_carrier; }
after_resume() { after_carrier; }

# The router NATs for the sake of rebind and rebind-all only, and resume needs a long path.
before() {
    local wanted=''
    case $1 in
        rebind) wanted=udp ;;
        rebind-all) wanted=all ;;
        resume)
            if [ "$lag" = 0 ]; then
                lag=50
                renew || return 1
            fi
            ;;
    esac
    [ "$natted" != "$wanted" ] || return 0
    natted=$wanted
    router_rules "$wanted"
}

# -- measuring

# start_peer: the network, and the VPN in it
start_peer() {
    build_network
    inner=$(bash "bench/peers/$peer.sh" start) || return 1
    inner_client=$(in_client ip -j route get "$inner" | jq -r '.[0].prefsrc')
}
renew() {
    local this=$peer
    say "  $peer is started anew"
    end_turn
    peer=$this
    start_peer
}
# A VPN that lost its way may find it again before the next move, with packets from the client.
revive() {
    for _ in $(seq 30); do
        ! answers "$inner" >/dev/null 2>&1 || return 0
    done
    renew
}

# start_flow WAY [LOG TEXT]
start_flow() {
    local awaited=()
    [ $# = 1 ] || awaited=(--log "$2" --line "$3")
    local from=$NS_CLIENT to=$NS_SERVER address=$inner
    [ "$1" = up ] || from=$NS_SERVER to=$NS_CLIENT address=$inner_client
    # Never the port of the flow before, of which packets may still be under way.
    port=$((port % 1000 + 6001))
    coproc RECEIVER { exec ip netns exec "$to" "$roam" receive --port "$port" --limit "$limit" "${awaited[@]}"; }
    exec {said}<&"${RECEIVER[0]}" {orders}>&"${RECEIVER[1]}"
    ip netns exec "$from" "$roam" send --to "$address:$port" &
    flow="$! $RECEIVER_PID"
}
port=0

# measure KIND WAY: its report in $report
measure() {
    local line='' log='' text='' resumed='' proof='' known=0
    report='{"steady": false}'
    if [ "$1" = resume ]; then
        { IFS=$'\t' read -r log text && IFS=$'\t' read -r resumed proof; } < <(logs_of_resumption)
        known=$(grep -cF -- "$proof" "$resumed" || true)
        start_flow "$2" "$log" "$text"
    else
        start_flow "$2"
    fi
    hear 30
    line=$heard
    if [ "$line" = steady ]; then
        # So that it comes at any moment between two keepalives, which tunguard has none of here.
        case $peer in
            tunguard*) nap "0.$((RANDOM % 900 + 100))" ;;
            *) nap "$((RANDOM % 5)).$((RANDOM % 900 + 100))" ;;
        esac
        "move_$1"
        hear $((limit + 10))
        report=${heard:-$report}
    fi
    end_flow
    exec {said}<&- {orders}>&-
    [ "$line" != steady ] || "after_$1"
    # A new session instead of a resumed one doesn't count.
    if [ "$1" = resume ] && [ "$(grep -cF -- "$proof" "$resumed" || true)" -le "$known" ]; then
        report=$(jq -c '.logged_ms = null' <<<"$report")
    fi
}
# For each end a log, and what a line of it says when a session was resumed; the client's comes first.
logs_of_resumption() { bash "bench/peers/$peer.sh" resumed; }

declare -A tried recovered
# moved KIND WAY: one move of the kind, recorded
moved() {
    local key="$peer $1 $2"
    if [ "${tried[$key]:-0}" -ge 3 ] && [ "${recovered[$key]:-0}" = 0 ]; then return 0; fi
    if [ "$1" = resume ] && [ -z "$(logs_of_resumption)" ]; then return 0; fi
    before "$1" || return 1
    for _ in 1 2 3; do
        measure "$1" "$2"
        if ! jq -e .steady <<<"$report" >/dev/null; then
            say "  $peer: no even flow $2 before $1"
            revive || return 1
            before "$1" || return 1
        elif jq -e '.recovered and .sender_ms > 10 and .silence_ms < 1000' <<<"$report" >/dev/null; then
            say "  $peer: $1 $2 once more: the sender itself paused for $(jq .sender_ms <<<"$report") ms"
        else
            break
        fi
    done
    tried[$key]=$((${tried[$key]:-0} + 1))
    jq -c --arg p "$peer" --arg k "$1" --arg w "$2" --argjson n "$round" --argjson l "$lag" \
        '{peer: $p, kind: $k, way: $w, round: $n, rtt: $l} + .' <<<"$report" >>"$lines"
    say "  round $round  $peer: $1 $2: $(jq -r --arg k "$1" '
        if .steady and .recovered then
            if $k == "outage" or $k == "restart" then "first packet after \(.first_ms) ms" else "silent for \(.silence_ms) ms" end
            + (if $k == "resume" then ", resumed after \(.logged_ms) ms" else "" end)
            + ", lost \(.lost), twice \(.duplicated), late \(.reordered)"
        elif .steady then "not in time" else "no even flow" end' <<<"$report")"
    if jq -e .recovered <<<"$report" >/dev/null; then
        recovered[$key]=$((${recovered[$key]:-0} + 1))
    else
        revive
    fi
}

# transfer WAY: TCP meanwhile
transfer() {
    local from=$NS_CLIENT to=$NS_SERVER address=$inner n=0 result sender
    [ "$1" = up ] || from=$NS_SERVER to=$NS_CLIENT address=$inner_client
    if [ "$lag" != "$rtt" ]; then
        lag=$rtt
        renew || return 1
    fi
    before none
    revive || return 1
    port=$((port % 1000 + 6001))
    exec {orders}>/dev/null
    ip netns exec "$to" "$roam" tcp receive --port "$port" &
    flow=$!
    promptly ip netns exec "$to" sh -c "ss -Hltn sport = :$port | grep -q ."
    ip netns exec "$from" timeout 120 "$roam" tcp send --to "$address:$port" --bytes 30000000 >"$WORK/tcp.json" &
    sender=$!
    flow="$flow $sender"
    nap 2
    while kill -0 "$sender" 2>/dev/null; do
        if [ $((n % 2)) = 0 ]; then move_address; else move_carrier; nap 1; after_carrier; fi
        n=$((n + 1))
        nap 3
    done
    result=$(jq -c . "$WORK/tcp.json" 2>/dev/null) || true
    end_flow
    exec {orders}>&-
    jq -cn --arg p "$peer" --arg w "$1" --argjson n "$round" --argjson m "$n" --argjson r "${result:-null}" \
        '{peer: $p, kind: "tcp", way: $w, round: $n, moves: $m, intact: false} + ($r // {})' >>"$lines"
    say "  round $round  $peer: TCP $1 over $n moves: ${result:-failed}"
}

# moves_of PEER KIND:WAY[:N]
moves_of() {
    local most=$peer_moves count=${2#*:*:}
    case $1 in tunguard*) most=$moves ;; esac
    if [ "$count" = "$2" ] || [ "$count" -gt "$most" ]; then count=$most; fi
    echo "$count"
}

turn() {
    local each count kind way lag=$rtt
    jq -cn --arg p "$peer" --argjson n "$round" --argjson s "$(quiet "${QUIET:-40}")" \
        '{peer: $p, kind: "strangers", way: "", round: $n, cores: $s}' >>"$lines"
    if ! start_peer; then
        say "  $peer doesn't start"
        jq -cn --arg p "$peer" --argjson n "$round" '{peer: $p, kind: "start", way: "", round: $n}' >>"$lines"
        return
    fi
    for each in $kinds; do
        count=$(moves_of "$peer" "$each")
        IFS=: read -r kind way _ <<<"$each"
        for _ in $(seq $((count * (round - 1) / rounds + 1)) $((count * round / rounds))); do
            moved "$kind" "$way" || return 0
        done
    done
    if [ -n "$tcp" ]; then
        transfer up || return 0
        transfer down || return 0
    fi
}

# estimate PEER: seconds that it takes, and that it takes where the VPN never recovers
estimate() {
    local each kind each_takes whole=$((rounds * 10)) worst count
    [ -z "$tcp" ] || whole=$((whole + rounds * 40))
    worst=$whole
    for each in $kinds; do
        kind=${each%%:*}
        count=$(moves_of "$1" "$each")
        # The flow is steady after a second, then comes the nap before the move, and 2 s after it that have to be even.
        each_takes=6
        case $1 in tunguard*) each_takes=4 ;; esac
        case $kind in
            link) each_takes=$((each_takes + 3)) ;;
            outage) each_takes=$((each_takes + outage)) ;;
            restart) each_takes=$((each_takes + 1)) ;;
            resume) case $1 in tunguard*) ;; *) count=0 ;; esac ;;
        esac
        whole=$((whole + count * each_takes))
        [ "$count" -le 3 ] || count=3
        # It is started anew after each.
        worst=$((worst + count * (each_takes + limit + 10)))
    done
    case $1 in tunguard*) worst=$whole ;; esac
    echo "$whole $worst"
}

# A job is a process that measures some of the peers; the next peer goes to the one that has least to do so far.
declare -a job_peers job_whole job_worst
share_out() {
    local each n least whole worst
    for n in $(seq "$jobs"); do job_peers[n]='' job_whole[n]=0 job_worst[n]=0; done
    while read -r _ whole worst each; do
        least=1
        for n in $(seq "$jobs"); do
            [ $((job_whole[n] + job_worst[n])) -ge $((job_whole[least] + job_worst[least])) ] || least=$n
        done
        job_peers[least]="${job_peers[least]} $each"
        job_whole[least]=$((job_whole[least] + whole)) job_worst[least]=$((job_worst[least] + worst))
    done < <(for each in $peers; do
        read -r whole worst <<<"$(estimate "$each")"
        echo "$((whole + worst)) $whole $worst $each"
    done | sort -rn)
}
most() { printf '%s\n' "$@" | sort -n | tail -1; }
share_out
[ -n "${QUIET:-}" ] || say "this takes about $(($(most "${job_whole[@]}") / 60 + 1)) minutes, and up to $(($(most "${job_worst[@]}") / 60 + 1))" \
    "where the others never recover from a move; more if the machine has other things to do"

# Each writes its results to a directory of its own.
run_jobs() {
    local n others options
    options=(--moves "$moves" --peer-moves "$peer_moves" --rounds "$rounds" --kinds "$kinds" --outage "$outage"
        --limit "$limit" --rtt "$rtt" --family "$family")
    [ -n "$tcp" ] || options+=(--no-tcp)
    for n in $(seq "$jobs"); do
        [ -n "${job_peers[n]}" ] || continue
        # No job waits for the others to be quiet, or says how long it takes.
        QUIET=1 bash bench/roam.sh "${options[@]}" --peers "${job_peers[n]# }" --out "$WORK/job-$n" >/dev/null &
        workers="$workers $!"
    done
    while [ -n "$workers" ]; do
        read -r n others <<<"$workers"
        wait "$n" || { say "bench/roam.sh: a job failed"; return 1; }
        workers=$others
    done
    jq -c '.runs[]' "$WORK"/job-*/results.json >"$lines"
}

load=$(cut -d ' ' -f 1-3 /proc/loadavg)
jq -n --arg command "$command" --arg machine "$(machine)" --arg load "$load" --arg date "$(date -u +%F)" \
    --arg note "${NOTE:-}" --arg commit "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}" \
    --argjson moves "$moves" --argjson peer_moves "$peer_moves" --argjson jobs "$jobs" --argjson rounds "$rounds" --argjson outage "$outage" --argjson limit "$limit" \
    --argjson rtt "$rtt" --argjson family "$family" --arg kinds "$kinds" --arg peers "$peers" \
    '{command: $command, note: $note, machine: $machine, load_before: $load, date: $date, commit: $commit,
      moves: $moves, peer_moves: $peer_moves, jobs: $jobs, rounds: $rounds, outage: $outage, limit: $limit, rtt: $rtt, family: $family,
      kinds: ($kinds | [splits("\\s+")]), order: ($peers | [splits("\\s+")])}' >"$WORK/about.json"
describe_peers $peers
if [ "$jobs" -gt 1 ]; then
    run_jobs
else
    for round in $(seq "$rounds"); do
        for each in $peers; do
            peer=$each
            turn
            end_turn
        done
    done
fi

write_results "$out"
python3 bench/roam/report.py "$out"
