#!/usr/bin/env bash
# tunguard as its users run it. SUITE and TUN_WRITE may choose others than the defaults, MOBILITY is the text of the
# client's [mobility], ON_DEMAND that of its [on_demand].
set -eu
. "$(dirname "$0")/../lib.sh"
dir=$WORK/peer
server() { background server "$NS_SERVER" "$BIN/tunguard" server --config server.toml; }
case $1 in
    about) "$BIN/tunguard" --version ;;
    start)
        mkdir -p "$dir"
        cd "$dir"
        "$BIN/tunguard" pki init >/dev/null
        "$BIN/tunguard" pki server server --san "$OUTER_SERVER" >/dev/null
        "$BIN/tunguard" pki client bench >/dev/null
        "$BIN/tunguard" pki profile bench --remote "$OUTER_HOST:55555" >client.toml
        sed -i '1,/^\[tls\]/ s/^\[tls\]/state_dir = "run"\n[tls]/' client.toml
        [ -z "${ON_DEMAND:-}" ] || printf '\n[on_demand]\n%s\n' "$ON_DEMAND" >>client.toml
        [ -z "${MOBILITY:-}" ] || printf '\n[mobility]\n%s\n' "$MOBILITY" >>client.toml
        cat >server.toml <<TOML
networks = ["10.9.0.0/24", "fd09::/64"]
state_dir = "state"
socket = "$dir/admin.sock"
[tls]
ca = "certs/ca.pem"
cert = "certs/server.pem"
key = "certs/server.key"
crl = "certs/crl.pem"
[data]
suites = ["${SUITE:-aes-256-gcm}"]
tun_write = "${TUN_WRITE:-direct}"
TOML
        server
        eventually 100 grep -q 'is ready' server.log || { cat server.log >&2; exit 1; }
        background client "$NS_CLIENT" "$BIN/tunguard" client --config client.toml
        eventually 100 answers 10.9.0.1 || { cat server.log client.log >&2; exit 1; }
        echo 10.9.0.1
        ;;
    crash) end_server "$dir" ;;
    again)
        cd "$dir"
        server
        promptly listens t 55555 && promptly listens u 55555
        ;;
    resumed)
        printf '%s\t%s\n' "$dir/client.log" 'tunnel up: '
        printf '%s\t%s\n' "$dir/server.log" ' resumes session '
        ;;
    pids) trees_of "$dir" ;;
    stop) end_all "$dir" ;;
esac
