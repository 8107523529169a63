#!/bin/sh
# What `make client` does after the build: a client's certificate if it has none, and its profile.
#
#   scripts/client-profile.sh TUNGUARD
#   NAME     the client's identity; REMOTE  HOST[:PORT] to dial (several in quotes)
#   CERTS    directory of the authority, certs
set -eu
tunguard=$1
certs=${CERTS:-certs}
cd "$(dirname "$0")/.."

if [ -z "${NAME:-}" ] || [ -z "${REMOTE:-}" ]; then
    echo "usage: make client NAME=laptop REMOTE=HOST[:PORT]" >&2
    exit 2
fi
profile=$NAME.toml
if [ -e "$profile" ]; then
    echo "$profile exists and stays as it is: move it away first" >&2
    exit 2
fi
if [ ! -e "$certs/ca.key" ]; then
    echo "there is no authority in $certs: \`make run-server\` or \`make certs\` makes one" >&2
    exit 2
fi
[ -e "$certs/clients/$NAME.pem" ] || "$tunguard" pki client --dir "$certs" "$NAME"
set --
for remote in $REMOTE; do set -- "$@" --remote "$remote"; done
# Readable by its owner only, and never over a file that appeared meanwhile.
umask 077
set -C
exec 3>"$profile"
trap 'rm -f "$profile"' EXIT
"$tunguard" pki profile --dir "$certs" "$NAME" "$@" >&3
trap - EXIT
echo "$profile holds the client's private key: take it to the client over a safe channel, then there:"
echo "    make run-client PROFILE=$profile      or: tunguard client --config $profile"
