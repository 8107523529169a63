#!/bin/sh
# What `make certs` and `make run-server` do after the build: certificates and a configuration where there are
# none, then the server.
#
#   scripts/run-server.sh certs|run TUNGUARD
#   REMOTE   what clients dial, a host name or address (several in quotes); this host's own names and addresses
#            are added
#   CERTS    directory of the authority, certs
#   CONFIG   configuration of the server, server.toml
set -eu
what=$1
tunguard=$2
certs=${CERTS:-certs}
config=${CONFIG:-server.toml}
cd "$(dirname "$0")/.."

# What clients may dial, one a line, without ports: the certificate is good for these names only.
names() {
    for remote in ${REMOTE:-}; do
        case $remote in
            \[*\]*) remote=${remote#[}; echo "${remote%%]*}" ;;
            *:*:*) echo "$remote" ;;
            *) echo "${remote%%:*}" ;;
        esac
    done
    hostname -f 2>/dev/null || hostname
    addresses
}

addresses() {
    if command -v ip >/dev/null; then
        ip -o addr show scope global | awk '{ sub("/.*", "", $4); print $4 }'
    else
        hostname -I | tr ' ' '\n'
    fi
}

make_certificates() {
    [ -e "$certs/ca.pem" ] || "$tunguard" pki init --dir "$certs" --name "tunguard CA of $(hostname)"
    if [ -e "$certs/server.pem" ]; then
        return
    fi
    set --
    seen=" "
    for name in $(names); do
        case $name in
            # Nobody's way to a server.
            localhost | localhost.*) continue ;;
            # What no certificate can carry.
            *[!A-Za-z0-9.:-]*) continue ;;
        esac
        case $seen in *" $name "*) continue ;; esac
        seen="$seen$name "
        set -- "$@" --san "$name"
    done
    if [ $# = 0 ]; then
        echo "this host has no address that clients could dial: add REMOTE=HOST" >&2
        exit 2
    fi
    echo "the server's certificate is for:$(echo " $*" | sed 's/ --san//g')"
    "$tunguard" pki server --dir "$certs" server "$@"
}

write_configuration() {
    [ -e "$config" ] && return
    if [ "$certs $config" = "certs server.toml" ]; then
        cp packaging/server.example.toml "$config"
    else
        sed "s|\"certs/|\"$(cd "$certs" && pwd)/|" packaging/server.example.toml >"$config"
    fi
    echo "$config: written, every key explained in it"
}

if [ "$what" = certs ]; then
    make_certificates
    exit
fi
if [ "$(id -u)" != 0 ]; then
    echo "the server makes a network device and starts its workers as other users: run it as root" >&2
    exit 16
fi
scripts/packages.sh run
make_certificates
write_configuration
first=$(for remote in ${REMOTE:-$(addresses)}; do echo "$remote"; break; done)
cat <<END

A client's profile:     make client NAME=laptop REMOTE=${first:-HOST}
on that machine then:   make run-client PROFILE=laptop.toml
Who is connected:       $tunguard status
Stop the server:        Ctrl-C

END
exec "$tunguard" server --config "$config"
