#!/usr/bin/env bash
# tunguard, the guard writes to the device.
TUN_WRITE=guard exec bash "$(dirname "$0")/tunguard.sh" "$@"
