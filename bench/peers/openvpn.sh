#!/usr/bin/env bash
# OpenVPN over UDP, TLS 1.3 with certificates on both sides, AES-256-GCM; everything else as it comes. MOBILE: as who
# moves would have it. PROTO=tcp: over TCP.
set -eu
. "$(dirname "$0")/../lib.sh"
dir=$WORK/peer
family=4
[ "$OUTER_HOST" = "$OUTER_SERVER" ] || family=6
case ${PROTO:-udp} in
    udp) proto=udp$family client_proto=udp$family ;;
    tcp) proto=tcp$family-server client_proto=tcp$family-client ;;
esac
keepalive=(--keepalive 10 60) mobile=()
[ -z "${MOBILE:-}" ] || keepalive=(--keepalive 5 15) mobile=(--float --persist-tun --persist-key)
server() {
    background server "$NS_SERVER" openvpn --dev tun --proto $proto --port 1194 --topology subnet \
        --server 10.8.0.0 255.255.255.0 --ca ca.pem --cert server.pem --key server.key --dh none \
        --data-ciphers AES-256-GCM "${keepalive[@]}" "${mobile[@]}" --verb 3
}
case $1 in
    about) { openvpn --version || true; } | awk 'NR == 1 { print $1, $2 }' ;;
    start)
        mkdir -p "$dir"
        cd "$dir"
        "$BIN/tunguard-swarm" mint --dir . --count 1 --server "$OUTER_SERVER"
        server
        eventually 100 grep -q 'Initialization Sequence Completed' server.log || { cat server.log >&2; exit 1; }
        background client "$NS_CLIENT" openvpn --client --dev tun --proto $client_proto --remote "$OUTER_SERVER" 1194 --nobind \
            --ca ca.pem --cert swarm-00000.pem --key swarm-00000.key --remote-cert-tls server \
            --data-ciphers AES-256-GCM "${mobile[@]}" --verb 3
        eventually 100 answers 10.8.0.1 || { cat server.log client.log >&2; exit 1; }
        echo 10.8.0.1
        ;;
    crash) end_server "$dir" ;;
    again)
        cd "$dir"
        server
        promptly listens u 1194
        ;;
    pids) trees_of "$dir" ;;
    stop) end_all "$dir" ;;
esac
