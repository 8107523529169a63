#!/usr/bin/env bash
# The link itself, without any tunnel.
set -eu
case $1 in
    start) echo "$OUTER_SERVER" ;;
    stop) ;;
esac
