#!/usr/bin/env bash
# tunguard as its users run it. SUITE and TUN_WRITE may choose others than the defaults.
set -eu
name=${PEER_NAME:-tunguard}
dir="$WORK/$name"
case $1 in
    start)
        mkdir -p "$dir"
        cd "$dir"
        "$BIN/tunguard" pki init >/dev/null
        "$BIN/tunguard" pki server server --san "$OUTER_SERVER" >/dev/null
        "$BIN/tunguard" pki client bench >/dev/null
        "$BIN/tunguard" pki profile bench --remote "$OUTER_SERVER:55555" >client.toml
        sed -i '1,/^\[tls\]/ s/^\[tls\]/state_dir = "run"\n[tls]/' client.toml
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
        ip netns exec "$NS_SERVER" "$BIN/tunguard" server --config server.toml >server.log 2>&1 &
        echo $! >server.pid
        for _ in $(seq 100); do grep -q 'is ready' server.log && break; sleep 0.1; done
        ip netns exec "$NS_CLIENT" "$BIN/tunguard" client --config client.toml >client.log 2>&1 &
        echo $! >client.pid
        for _ in $(seq 100); do
            ip netns exec "$NS_CLIENT" ping -c 1 -W 1 10.9.0.1 >/dev/null 2>&1 && { echo 10.9.0.1; exit 0; }
            sleep 0.1
        done
        cat server.log client.log >&2
        exit 1
        ;;
    stop)
        for end in client server; do
            [ ! -e "$dir/$end.pid" ] || kill "$(cat "$dir/$end.pid")" 2>/dev/null || true
        done
        sleep 0.5
        ;;
esac
