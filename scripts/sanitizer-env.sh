# shellcheck shell=bash
# Read by fuzz.sh and sanitize.sh: what builds with sanitizers need of their environment.

# Sanitizers are unstable options of rustc, and their run-time libraries come with the stable one, too.
export RUSTC_BOOTSTRAP=1
export RUST_BACKTRACE=${RUST_BACKTRACE:-1}

# OpenSSL takes minutes to build, and C isn't instrumented here anyway: where a build of the workspace has made it, that
# one is taken.
for openssl in "${CARGO_TARGET_DIR:-$PWD/target}"/*/build/openssl-sys-*/out/openssl-build/install; do
    if [ -e "$openssl/lib/libssl.a" ] || [ -e "$openssl/lib64/libssl.a" ]; then
        export OPENSSL_NO_VENDOR=1 OPENSSL_STATIC=1 OPENSSL_DIR="$openssl"
    fi
done
