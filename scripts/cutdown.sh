#!/usr/bin/env bash
# scripts/cutdown.sh GROUP DIRECTORY: a small crate to run mutants in, made of the real files
#
# GROUP is what is changed: certificates, paths or guard. The crate of the first two has only the modules that takes,
# links the system's OpenSSL, and is one test program: unit tests of what is changed, and the tests of tests/ that
# drive it. So a mutant takes seconds where the whole workspace takes a minute (scripts/mutants.sh). For the guard
# all that git tracks is copied, as its unit tests are one program already.
#
# DIRECTORY is emptied but for target/: it must be new, or one that this script has made.
set -euo pipefail
group=${1:?} dir=$(realpath -m "${2:?}")
cd "$(dirname "$0")/.."

mark=made-by-cutdown
if [ -n "$(ls -A "$dir" 2>/dev/null)" ] && [ ! -f "$dir/$mark" ]; then
    echo "$0: $dir has files, and this script didn't make it: name a new directory, or delete that one" >&2
    exit 2
fi

case $group in
    certificates)
        changed="tls/verify tls/identity tls/revoked"
        modules="exit tls/mod tls/context tls/credentials tls/failure tls/server_key tls/signing tls/tickets tls/time
            sys/memfd sys/tls_key sys/tls_session sys/x509"
        sys="memfd tls_key tls_session x509"
        tests="tls"
        ;;
    paths)
        changed="path paths/mod $(cd src && echo paths/[!m]*.rs paths/mtu.rs | sed 's/\.rs//g')"
        modules="budget drops egress epochs exit idle keys pmtu random replay resume seal session time
            segment/* sys/udp sys/wipe wire/*"
        sys="udp wipe"
        tests="stories moving keeping path_mtu"
        ;;
    guard) ;;
    *)
        echo "$0: no such group: $group (certificates, paths, guard)" >&2
        exit 2
        ;;
esac

mkdir -p "$dir"
touch "$dir/$mark"
find "$dir" -mindepth 1 -maxdepth 1 ! -name target ! -name "$mark" -exec rm -rf {} +
if [ "$group" = guard ]; then
    git ls-files -z | tar --null -cT - | tar -xmC "$dir"
    # The methods of Guard need a device, workers and a network, which no unit test has.
    mkdir "$dir/.cargo"
    echo 'exclude_re = ["\\bGuard::"]' >"$dir/.cargo/mutants.toml"
    exit
fi
mkdir "$dir/src"
cp Cargo.lock "$dir"
cp -r tests "$dir"
sed -i 's/crate::common/super::common/' "$dir"/tests/tls/*.rs

# place FILE: at its place, as it is
place() {
    mkdir -p "$dir/$(dirname "$1")"
    cp "$1" "$dir/$1"
}
for module in $changed; do
    place "src/$module.rs"
done
# What they use comes without its own tests.
for module in $modules; do
    for file in src/$module.rs; do
        place "$file"
        perl -0pi -e 's/\n#\[cfg\(test\)\]\nmod tests( \{.*|;\n)//s' "$dir/$file"
    done
done

# item FILE BEGIN: one item of a file whose rest takes too much
item() {
    sed -n "/^$2/,/^}/p" "src/$1"
}
{
    echo "#![allow(dead_code, missing_docs, unsafe_code)]"
    echo "#[cfg(test)] extern crate self as tunguard;"
    # The first test that fails ends the run: what is asked is only whether one does. (Of the others some panic.)
    [ "$group" != paths ] || cat <<'END'
#[cfg(test)]
#[used]
#[unsafe(link_section = ".init_array")]
static FIRST: extern "C" fn() = {
    extern "C" fn end_with_the_first() {
        std::panic::set_hook(Box::new(|panic| {
            eprintln!("{panic}");
            std::process::exit(101);
        }));
    }
    end_with_the_first
};
END
    for module in $changed $modules; do
        case $module in
            segment/\* | wire/\*) echo "pub mod ${module%/*};" ;;
            */mod) echo "pub mod ${module%/mod};" ;;
            */*) ;;
            *) echo "pub mod $module;" ;;
        esac
    done
    echo "pub mod sys {"
    for module in $sys; do
        echo "    pub mod $module;"
    done
    echo "}"
    echo "pub mod config {"
    echo "    pub mod common {"
    echo "        use std::fmt; use std::path::PathBuf;"
    echo "        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]"
    item config/common.rs "pub enum Suite"
    item config/common.rs "impl Suite"
    item config/common.rs "impl fmt::Display for Suite"
    echo "        #[derive(Clone, Debug, PartialEq, Eq)]"
    item config/common.rs "pub enum Pem"
    item config/common.rs "impl Pem"
    echo "    }"
    echo "    pub mod client { use super::common::Pem;"
    item config/client.rs "pub struct ClientTls"
    echo "    }"
    echo "    pub mod server { use super::common::Pem; use std::path::PathBuf;"
    item config/server.rs "pub struct ServerTls"
    echo "    }"
    echo "}"
    if [ "$group" = paths ]; then
        echo "pub mod inside { use std::net::SocketAddr; use crate::path::{INSIDE, Path};"
        item inside.rs "pub fn path"
        echo "}"
    fi
    for test in $tests; do
        file=../tests/$test.rs
        [ -d "tests/$test" ] && file=../tests/$test/main.rs
        echo "#[cfg(test)] #[path = \"$file\"] mod ${test}_tests;"
    done
} >"$dir/src/lib.rs"

{
    cat <<END
[package]
name = "tunguard"
version = "0.0.0"
edition = "2024"
publish = false

autotests = false

[lib]
doctest = false

[workspace]

# Tests of hours in virtual time take longer than to compile them.
[profile.dev]
opt-level = 1
debug = false
[profile.dev.package."*"]
opt-level = 2

END
    # Dependencies as they are, without what links slowly or isn't used.
    sed -n '/^\[workspace.dependencies\]/,/^$/p' Cargo.toml | sed 's/^\[workspace\./[/' |
        grep -Ev '^(tunguard|caps|clap|criterion|env_logger|landlock|netlink.*|posixmq|prefix-trie|seccompiler|rustix|serde_json|signal-hook|strsim|toml) '
} >"$dir/Cargo.toml"
