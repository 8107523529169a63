#!/usr/bin/env bash
# tunguard that sends everything over both carriers of bench/roam.sh.
export MOBILITY='carriers = ["wlan0", "eth0"]
mode = "redundant"'
exec bash "$(dirname "$0")/tunguard.sh" "$@"
