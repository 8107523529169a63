#!/usr/bin/env bash
# tunguard, the classic suite.
SUITE=aes-256-ctr-hmac-sha256 exec bash "$(dirname "$0")/tunguard.sh" "$@"
