#!/bin/sh
# The Debian packages tunguard needs beside a Rust toolchain: the one list of them, and the check for it.
#
#   scripts/packages.sh GROUP...    GROUP is build, run, lab, unit, bench, fuzz or mutants
#
# Installs what is missing when run as root; otherwise names the command that does, and fails.
set -eu

# build  gcc libc6-dev make perl     OpenSSL (built from its source) and ring; perl-base alone lacks FindBin
#                                    and IPC::Cmd, which OpenSSL's Configure uses
# run    nftables                    nat, client_to_client and pushed routes; the server calls nft
# lab    iproute2 iputils-ping       demo, e2e tests and bench: namespaces, and traffic through them
#        iperf3 socat procps
# unit   systemd                     packaging/tunguard.service is tried with it, booted in namespaces
# bench  jq python3 openssl         reads results, writes the report and its plots; handshakes to compare with
#        openvpn ocserv openconnect     the peers
#        wireguard-go wireguard-tools
# fuzz   g++                         libFuzzer, built from its source
# mutants python3 libssl-dev         programs with the system's OpenSSL (scripts/mutants.py)
#        pkg-config
packages() {
    case $1 in
        build) echo gcc libc6-dev make perl ;;
        run) echo nftables ;;
        lab) echo iproute2 iputils-ping iperf3 socat procps ;;
        unit) echo systemd ;;
        bench) echo jq openvpn ocserv openconnect wireguard-go wireguard-tools openssl python3 ;;
        fuzz) echo g++ ;;
        mutants) echo python3 libssl-dev pkg-config ;;
        *) echo "packages.sh: no group $1: build, run, lab, unit, bench, fuzz or mutants" >&2; exit 2 ;;
    esac
}

# By what is used of it: a package may be there under another name, or half removed.
present() {
    case $1 in
        gcc) command -v cc ;;
        libc6-dev) echo '#include <stdlib.h>' | cc -E -o /dev/null - ;;
        make) command -v make ;;
        perl) perl -MFindBin -MIPC::Cmd -MFile::Compare -MTime::Piece -e 1 ;;
        nftables) command -v nft ;;
        iproute2) command -v ip ;;
        iputils-ping) command -v ping ;;
        iperf3) command -v iperf3 ;;
        socat) command -v socat ;;
        procps) command -v ps ;;
        systemd) [ -x /lib/systemd/systemd ] && command -v systemctl ;;
        libssl-dev) echo '#include <openssl/ssl.h>' | cc -E -o /dev/null - ;;
        jq | python3 | pkg-config | openssl | openvpn | ocserv | openconnect | wireguard-go) command -v "$1" ;;
        wireguard-tools) command -v wg ;;
        g++) command -v c++ ;;
    esac >/dev/null 2>&1
}

# A plain user's PATH often lacks these.
PATH=$PATH:/usr/sbin:/sbin

missing=
for group in "$@"; do
    for package in $(packages "$group"); do
        present "$package" || missing="$missing $package"
    done
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "missing here (Debian's package names):$missing" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "missing packages; as root run:" >&2
    echo "    apt-get update && apt-get install -y --no-install-recommends$missing" >&2
    exit 1
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# shellcheck disable=SC2086 # a list of words
apt-get install -q -y --no-install-recommends $missing </dev/null
for package in $missing; do
    present "$package" || { echo "$package was installed, and what is used of it is still missing" >&2; exit 1; }
done
