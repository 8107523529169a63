#!/usr/bin/env bash
# ocserv and openconnect: certificates on both sides, data by DTLS; fails where that falls back to TCP. MOBILE: both
# ask soon whether the other is there, and the client is started again when it gives up, as a service would be.
set -eu
. "$(dirname "$0")/../lib.sh"
dir=$WORK/peer
server() {
    # What one that was killed left.
    rm -f ocserv.id ocserv.sock*
    background server "$NS_SERVER" ocserv -f -c ocserv.conf
}
case $1 in
    about) echo "$(ocserv --version 2>&1 | awk "NF { print; exit }"), $(openconnect --version 2>&1 | awk "NR == 1 { print \$1, \$3 }")" ;;
    start)
        mkdir -p "$dir"
        cd "$dir"
        "$BIN/tunguard-swarm" mint --dir . --count 1 --server "$OUTER_SERVER"
        bash "$PEERS/ocserv.sh" config "$dir" >ocserv.conf
        server
        eventually 100 in_client bash -c "exec 3<>/dev/tcp/$OUTER_SERVER/4443" || { cat server.log >&2; exit 1; }
        # Its usual script would rewrite the host's resolvers.
        cat >script <<'SH'
#!/bin/sh
[ "$reason" = connect ] || exit 0
ip addr add "$INTERNAL_IP4_ADDRESS/24" dev "$TUNDEV"
ip link set "$TUNDEV" mtu "$INTERNAL_IP4_MTU" up
SH
        chmod 755 script
        client=(openconnect --non-inter --interface oc0 --script "$dir/script" \
            --cafile ca.pem --certificate swarm-00000.pem --sslkey swarm-00000.key)
        url=https://$OUTER_HOST:4443
        if [ -n "${MOBILE:-}" ]; then
            # shellcheck disable=SC2016 # for the shell inside
            background client "$NS_CLIENT" bash -c 'while :; do "$@"; sleep 1; done' openconnect \
                "${client[@]}" --force-dpd 5 "$url"
        else
            background client "$NS_CLIENT" "${client[@]}" "$url"
        fi
        eventually 100 grep -q 'Established DTLS connection' client.log && eventually 50 answers 10.10.0.1 ||
            { cat server.log client.log >&2; exit 1; }
        echo 10.10.0.1
        ;;
    config)
        # config DIR: with the certificates of DIR; nothing that slows many clients down on purpose
        cat <<CONF
auth = "certificate"
cert-user-oid = 2.5.4.3
tcp-port = 4443
udp-port = 4443
run-as-user = nobody
run-as-group = nogroup
socket-file = $2/ocserv.sock
pid-file = $2/ocserv.id
server-cert = $2/server.pem
server-key = $2/server.key
ca-cert = $2/ca.pem
isolate-workers = true
max-clients = 0
max-same-clients = 0
rate-limit-ms = 0
max-ban-score = 0
keepalive = 300
dpd = $([ -z "${MOBILE:-}" ] && echo 60 || echo 5)
tls-priorities = "NORMAL:%SERVER_PRECEDENCE"
use-occtl = false
device = ocs
ipv4-network = 10.10.0.0/22
compression = false
CONF
        ;;
    crash) end_server "$dir" ;;
    again)
        cd "$dir"
        server
        promptly listens t 4443 && promptly listens u 4443
        ;;
    pids) trees_of "$dir" ;;
    stop) end_all "$dir" ;;
esac
