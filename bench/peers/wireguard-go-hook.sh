#!/usr/bin/env bash
# wireguard-go with a hook that tells it when the client's addresses change.
HOOK=yes exec bash "$(dirname "$0")/wireguard-go.sh" "$@"
