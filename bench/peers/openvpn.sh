#!/usr/bin/env bash
# OpenVPN over UDP, TLS 1.3 with certificates on both sides, AES-256-GCM; everything else as it comes.
set -eu
. "$(dirname "$0")/../lib.sh"
dir=$WORK/peer
case $1 in
    about) { openvpn --version || true; } | awk 'NR == 1 { print $1, $2 }' ;;
    start)
        mkdir -p "$dir"
        cd "$dir"
        "$BIN/tunguard-swarm" mint --dir . --count 1 --server "$OUTER_SERVER"
        background server "$NS_SERVER" openvpn --dev tun --proto udp --port 1194 --topology subnet \
            --server 10.8.0.0 255.255.255.0 --ca ca.pem --cert server.pem --key server.key --dh none \
            --data-ciphers AES-256-GCM --keepalive 10 60 --verb 3
        eventually 100 grep -q 'Initialization Sequence Completed' server.log || { cat server.log >&2; exit 1; }
        background client "$NS_CLIENT" openvpn --client --dev tun --proto udp --remote "$OUTER_SERVER" 1194 --nobind \
            --ca ca.pem --cert swarm-00000.pem --key swarm-00000.key --remote-cert-tls server \
            --data-ciphers AES-256-GCM --verb 3
        eventually 100 answers 10.8.0.1 || { cat server.log client.log >&2; exit 1; }
        echo 10.8.0.1
        ;;
    pids) trees_of "$dir" ;;
    stop) end_all "$dir" ;;
esac
