#!/bin/sh
# Builds all three programs: scripts/build.sh debug|release. Without cargo (as under sudo) what was built
# before is used.
set -eu
profile=$1
cd "$(dirname "$0")/.."
out=${CARGO_TARGET_DIR:-target}/$profile

if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH=$HOME/.cargo/bin:$PATH
fi
if command -v cargo >/dev/null; then
    scripts/packages.sh build
    case $profile in
        release) exec cargo build --locked --workspace --release ;;
        *) exec cargo build --locked --workspace ;;
    esac
fi
for program in tunguard tunguard-guard tunguard-worker; do
    if [ ! -x "$out/$program" ]; then
        echo "no cargo in this user's PATH, and $out/$program isn't built: install Rust 1.88 or newer" >&2
        echo "or run \`make build\` as the user who has it" >&2
        exit 1
    fi
done
echo "no cargo in this user's PATH: using what is in $out"
