#!/usr/bin/env bash
# WireGuard in userspace, as Debian packages it. MOBILE: with keepalives from the client; HOOK: and with one that names the
# server's endpoint anew when an address changes.
set -eu
. "$(dirname "$0")/../lib.sh"
dir=$WORK/peer
# Their control sockets are named after the devices, and the directory of those is everybody's.
server=wgs${WORK##*.} client=wgc${WORK##*.}
export LOG_LEVEL=error
mobile=()
[ -z "${MOBILE:-}" ] || mobile=(persistent-keepalive 5)
server() {
    background server "$NS_SERVER" wireguard-go -f "$server"
    promptly in_server wg show "$server"
    in_server wg set "$server" listen-port 51820 private-key server.key \
        peer "$(cat client.pub)" allowed-ips 10.7.0.2/32
    ip -n "$NS_SERVER" addr add 10.7.0.1/24 dev "$server"
    ip -n "$NS_SERVER" link set "$server" mtu 1420 up
}
case $1 in
    about) echo "wireguard-go $(dpkg-query -W -f '${Version}' wireguard-go 2>/dev/null)" ;;
    start)
        mkdir -p "$dir"
        cd "$dir"
        umask 077
        for end in server client; do wg genkey | tee $end.key | wg pubkey >$end.pub; done
        server
        background client "$NS_CLIENT" wireguard-go -f "$client"
        eventually 50 in_client wg show "$client"
        in_client wg set "$client" private-key client.key \
            peer "$(cat server.pub)" allowed-ips 10.7.0.0/24 endpoint "$OUTER_HOST:51820" "${mobile[@]}"
        ip -n "$NS_CLIENT" addr add 10.7.0.2/24 dev "$client"
        ip -n "$NS_CLIENT" link set "$client" mtu 1420 up
        # shellcheck disable=SC2016 # for the shell inside
        [ -z "${HOOK:-}" ] || background hook "$NS_CLIENT" \
            bash -c 'ip monitor address | while read -r _; do wg set "$@"; done' hook \
            "$client" peer "$(cat server.pub)" endpoint "$OUTER_HOST:51820"
        eventually 100 answers 10.7.0.1 || { cat server.log client.log >&2; exit 1; }
        echo 10.7.0.1
        ;;
    crash) end_server "$dir" ;;
    again)
        cd "$dir"
        server
        promptly listens u 51820
        ;;
    pids) trees_of "$dir" ;;
    stop) end_all "$dir" ;;
esac
