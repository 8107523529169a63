#!/usr/bin/env bash
# tunguard that knows both carriers of bench/roam.sh and uses one at a time.
export MOBILITY='carriers = ["wlan0", "eth0"]
mode = "failover"'
exec bash "$(dirname "$0")/tunguard.sh" "$@"
