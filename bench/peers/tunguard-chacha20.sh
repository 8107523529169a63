#!/usr/bin/env bash
# tunguard, the ChaCha20-Poly1305 suite.
SUITE=chacha20-poly1305 exec bash "$(dirname "$0")/tunguard.sh" "$@"
