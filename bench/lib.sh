# What the scripts here and the peers share; sourced. Needs $NS_SERVER, $NS_CLIENT and $WORK; with a router $NS_BETWEEN, too.

export OUTER_SERVER=${OUTER_SERVER:-10.83.0.1} OUTER_CLIENT=${OUTER_CLIENT:-10.83.0.2}
# As it stands in URLs, and before a port.
case $OUTER_SERVER in
    *:*) readonly OUTER_HOST="[$OUTER_SERVER]" ;;
    *) readonly OUTER_HOST=$OUTER_SERVER ;;
esac

say() { echo "$*" >&2; }
in_server() { ip netns exec "$NS_SERVER" "$@"; }
in_client() { ip netns exec "$NS_CLIENT" "$@"; }

# spell COMMAND ARGUMENT...: as it would be typed, on one line
spell() {
    local each spelled=$1
    shift
    for each in "$@"; do
        case $each in
            '' | *[[:space:]]*) spelled="$spelled '$(tr -s '[:space:]' ' ' <<<"$each" | sed 's/ $//')'" ;;
            *) spelled="$spelled $each" ;;
        esac
    done
    echo "$spelled"
}

# describe_peers PEER...: which versions, in $WORK/peers.json
describe_peers() {
    local each
    for each in "$@"; do
        jq -cn --arg p "$each" --arg a "$(bash "bench/peers/$each.sh" about 2>/dev/null || echo missing)" '{key: $p, value: $a}'
    done | jq -s from_entries >"$WORK/peers.json"
}
# write_results DIR: results.json, of about.json and peers.json in $WORK, and of $lines
write_results() {
    mkdir -p "$1"
    jq -s --slurpfile about "$WORK/about.json" --slurpfile peers "$WORK/peers.json" \
        --arg after "$(cut -d ' ' -f 1-3 /proc/loadavg)" '$about[0] + {load_after: $after, peers: $peers[0], runs: .}' "$lines" >"$1/results.json"
}

# server vs 10.83.0.1 ---- 10.83.0.2 vc client, MTU 1500
make_namespaces() {
    ip netns add "$NS_SERVER"
    ip netns add "$NS_CLIENT"
    ip link add vs netns "$NS_SERVER" type veth peer name vc netns "$NS_CLIENT"
    ip -n "$NS_SERVER" addr add "$OUTER_SERVER/24" dev vs
    ip -n "$NS_CLIENT" addr add "$OUTER_CLIENT/24" dev vc
    local end ns device
    for end in "$NS_SERVER vs" "$NS_CLIENT vc"; do
        read -r ns device <<<"$end"
        ip -n "$ns" link set lo up
        ip -n "$ns" link set "$device" up
    done
}

# Also ends what is left in them; nobody else's processes are there.
drop_namespaces() {
    local ns pid
    for ns in "$NS_SERVER" "$NS_CLIENT" ${NS_BETWEEN:-}; do
        for pid in $(ip netns pids "$ns" 2>/dev/null); do kill -9 "$pid" 2>/dev/null || true; done
        ip netns del "$ns" 2>/dev/null || true
    done
}

# plug NAMESPACE DEVICE NETWORK HOST
plug() {
    ip -n "$1" -batch - <<IP
addr add 198.18.$3.$4/24 dev $2
addr add 2001:db8:$3::$4/64 dev $2 nodad
link set $2 up
IP
}
# add_namespaces NAMESPACE...: in them a packet may come by another way than its answer goes
add_namespaces() {
    local ns
    for ns in "$@"; do
        ip netns add "$ns"
        ip -n "$ns" link set lo up
        ip netns exec "$ns" sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
    done
}
# client  eth0 198.18.1.2 ---- 198.18.1.1 client  router  server 198.18.100.1 ---- 198.18.100.2 eth0  server
make_routed_namespaces() {
    add_namespaces "$NS_CLIENT" "$NS_BETWEEN" "$NS_SERVER"
    ip netns exec "$NS_BETWEEN" sysctl -qw net.ipv4.ip_forward=1
    ip link add client netns "$NS_BETWEEN" type veth peer name eth0 netns "$NS_CLIENT"
    ip link add server netns "$NS_BETWEEN" type veth peer name eth0 netns "$NS_SERVER"
    plug "$NS_CLIENT" eth0 1 2
    plug "$NS_SERVER" eth0 100 2
    plug "$NS_BETWEEN" client 1 1
    plug "$NS_BETWEEN" server 100 1
    ip -n "$NS_CLIENT" route add default via 198.18.1.1
    ip -n "$NS_SERVER" route add default via 198.18.100.1
}
# lead_through_tun NAMESPACE RTT: what it forwards between r (network 90) and s (network 100) comes out half of RTT later;
# the process that does it in $wire
lead_through_tun() {
    ip netns exec "$1" "$BIN/tunguard-roam" delay --device far --ms "$(reckon "$2 / 2")" &
    wire=$!
    promptly ip -n "$1" link show far
    ip -n "$1" -batch - <<'IP'
link set far up txqueuelen 10000
route add default dev far table 100
rule add iif r lookup 100
rule add iif s lookup 100
route add 198.18.0.0/16 via 198.18.90.1
IP
    ip -6 -n "$1" -batch - <<'IP'
route add default dev far table 100
rule add iif r lookup 100
rule add iif s lookup 100
route add 2001:db8::/32 via 2001:db8:90::1
IP
}

# eventually TRIES COMMAND...: every 0.1 s
eventually() {
    local tries=$1
    shift
    for _ in $(seq "$tries"); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    return 1
}
# promptly COMMAND...: every 10 ms, for 10 s
promptly() {
    for _ in $(seq 1000); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.01
    done
    return 1
}
# listens u|t PORT: the server has it open
listens() { in_server ss -Hln"$1" "sport = :$2" | grep -q .; }
answers() { in_client ping -n -c 1 -W 1 "$1"; }

# background NAME NAMESPACE COMMAND...: output in $dir/NAME.log, process ID in $dir/NAME.pid
background() {
    local name=$1 ns=$2
    shift 2
    ip netns exec "$ns" "$@" </dev/null >"$dir/$name.log" 2>&1 &
    echo $! >"$dir/$name.pid"
}

# end_all DIR: SIGTERM to the process of each DIR/*.pid; waits 3 s at most, then without mercy
end_all() {
    local file pids=()
    for file in "$1"/*.pid; do
        [ ! -e "$file" ] || pids+=("$(cat "$file")")
        rm -f "$file"
    done
    [ ${#pids[@]} != 0 ] || return 0
    kill "${pids[@]}" 2>/dev/null || true
    for _ in $(seq 30); do
        kill -0 "${pids[@]}" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -9 "${pids[@]}" 2>/dev/null || true
}

# tree PID...: these and all that descend from them
tree() {
    ps -e -o pid=,ppid= | awk -v roots="$*" '
        BEGIN { n = split(roots, r, " "); for (i = 1; i <= n; i++) ours[r[i]] = 1 }
        { parent[$1] = $2 }
        END {
            do { grew = 0
                for (p in parent) if (!(p in ours) && (parent[p] in ours)) { ours[p] = 1; grew = 1 }
            } while (grew)
            for (p in ours) if (p in parent) print p
        }'
}
# trees_of DIR [NAME]: of the processes in DIR/*.pid
trees_of() {
    local files=("$1"/${2:-*}.pid)
    [ ! -e "${files[0]}" ] || tree "$(cat "${files[@]}" | tr '\n' ' ')"
}

# end_server DIR: without a word
end_server() {
    local pids
    pids=$(trees_of "$1" server)
    # shellcheck disable=SC2086 # a list of numbers
    kill -9 $pids
    rm -f "$1/server.pid"
    for _ in $(seq 500); do
        # shellcheck disable=SC2086
        kill -0 $pids 2>/dev/null || return 0
        sleep 0.01
    done
}

# cpu PID...: utime + stime of all, in seconds
cpu() {
    local pid
    for pid in "$@"; do cat "/proc/$pid/stat" 2>/dev/null || true; done |
        awk -v hz="$(getconf CLK_TCK)" '{ sub(/.*\) /, ""); sum += $12 + $13 } END { print (sum + 0) / hz }'
}
# busy: seconds all cores together have been busy with anything, by whomever
busy() { awk -v hz="$(getconf CLK_TCK)" '/^cpu / { print ($2 + $3 + $4 + $7 + $8) / hz }' /proc/stat; }
# quiet TRIES: waits for half a second in which less than 0.3 cores are busy; prints how many were in the last
quiet() {
    local before others
    for _ in $(seq "$1"); do
        before=$(busy)
        sleep 0.5
        others=$(reckon "($(busy) - $before) / 0.5")
        [ "$(reckon "$others < 0.3")" = 0 ] || break
    done
    echo "$others"
}
# pss PID...: bytes
pss() {
    local pid
    for pid in "$@"; do cat "/proc/$pid/smaps_rollup" 2>/dev/null || true; done |
        awk '/^Pss:/ { sum += $2 } END { print sum * 1024 }'
}
# reckon EXPRESSION
reckon() { awk "BEGIN { printf \"%.9g\", ($*) }"; }
# record JSON-LINES-FILE PEER ROUND MEASURE VALUE: an empty or impossible value becomes null
record() {
    jq -cn --arg p "$2" --argjson n "$3" --arg m "$4" --arg v "${5:-}" \
        '{peer: $p, round: $n, measure: $m, value: (try ($v | tonumber) catch null)}' >>"$1"
}
machine() {
    local cpu
    cpu=$(awk -F ': ' '/^model name/ { print $2; exit }' /proc/cpuinfo)
    echo "$cpu, $(nproc) cores, $(awk '/^MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo) GiB, Linux $(uname -r | cut -d - -f 1)"
}
