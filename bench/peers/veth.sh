#!/usr/bin/env bash
# The link itself, without any tunnel.
set -eu
case $1 in
    about) echo "the bare link" ;;
    start) echo "$OUTER_SERVER" ;;
    pids | stop) ;;
esac
