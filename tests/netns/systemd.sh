#!/bin/sh
# Boots systemd in the network namespace it is called in, with tunguard installed, for tests/netns/unit.rs; ends it on SIGTERM.
#
#   systemd.sh NAME DIR PROGRAMS    NAME is its control group's, DIR (empty) takes mounts, PROGRAMS has the three programs
#
# Mounts, processes, IPC and control groups are namespaces of its own; the machine's files stay as they are, as /etc, /run, /var,
# /usr/local and /dev are others there. Of the machine's own services only the journal is started.
set -eu
name=$1 dir=$2 programs=$3
source=$(cd "$(dirname "$0")/../.." && pwd)

mount --make-rprivate /
mount -t cgroup2 cgroup2 "$dir"
mkdir "$dir/$name"
echo 0 >"$dir/$name/cgroup.procs"
# shellcheck disable=SC2016 # expanded by the inner shell
unshare --mount --pid --fork --kill-child=KILL --uts --ipc --cgroup sh -euc '
    source=$1 programs=$2
    mount -t proc proc /proc
    mount -t cgroup2 cgroup2 /sys/fs/cgroup

    etc=$(mktemp -d)
    mount -t tmpfs -o mode=755 tmpfs "$etc"
    for file in passwd group nsswitch.conf ld.so.cache; do
        [ ! -e "/etc/$file" ] || cp "/etc/$file" "$etc"
    done
    # Without one, systemd takes this for a first boot and enables all it knows.
    tr -d - </proc/sys/kernel/random/uuid >"$etc/machine-id"
    mkdir -p "$etc/systemd/system"
    mount --move "$etc" /etc
    rmdir "$etc"
    for dir in /run /var /usr/local /dev; do
        mount -t tmpfs -o mode=755 tmpfs "$dir"
    done
    mkdir /var/lib /var/log /var/tmp /dev/net /dev/pts /dev/shm /dev/mqueue
    ln -s /run /var/run
    mount -t devpts devpts /dev/pts
    mount -t mqueue mqueue /dev/mqueue
    for node in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0" "net/tun 10 200"; do
        # shellcheck disable=SC2086 # three words
        set -- $node
        mknod -m 666 "/dev/$1" c "$2" "$3"
    done
    ln -s /proc/self/fd /dev/fd

    units=/usr/lib/systemd/system
    for wants in "$units"/*.target.wants; do
        mount -t tmpfs tmpfs "$wants"
    done
    ln -s ../systemd-journald.service "$units/sysinit.target.wants/"
    printf "[Unit]\nDescription=What there is beside tunguard\n" >/etc/systemd/system/default.target

    make -s -C "$source" -o build install PREFIX=/usr/local RELEASE="$programs"
    # Built for tests, `tunguard` does not know that prefix.
    ln -s ../libexec/tunguard/tunguard-guard ../libexec/tunguard/tunguard-worker /usr/local/bin/
    exec env -i container=tunguard-test PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system
' sh "$source" "$programs" &
machine=$!
asked=
trap 'asked=yes; kill -KILL "$machine"' TERM
# The first one is cut short by the signal.
wait "$machine" || wait "$machine" || true
echo 0 >"$dir/cgroup.procs"
until grep -q "^populated 0" "$dir/$name/cgroup.events"; do
    sleep 0.1
done
find "$dir/$name" -depth -type d -exec rmdir {} +
umount "$dir"
[ "$asked" ]
