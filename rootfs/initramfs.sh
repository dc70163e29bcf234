#!/bin/sh
# Packs the guest agent as /init of the initramfs: initramfs.sh AGENT [OUT]
#
# The archive is an uncompressed cpio (newc): the kernel unpacks it with a copy, and has no decompressor built in.
# It is written here with printf, because that needs no root for the device nodes, no kernel source and no cpio program,
# and gives the same bytes for the same agent on every machine.
set -eu

usage() {
    echo "usage: initramfs.sh AGENT [OUT]   (OUT is target/guest/initramfs.cpio unless given)" >&2
    exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] || usage
case $1 in -*) usage ;; esac

top=$(cd "$(dirname "$0")/.." && pwd)
agent=$1
out=${2:-$top/target/guest/initramfs.cpio}
[ -f "$agent" ] || { echo "initramfs.sh: no agent at $agent: build it first" >&2; exit 1; }

if [ "$out" -nt "$agent" ] && [ "$out" -nt "$0" ]; then
    exit 0
fi

inode=0

# pad WRITTEN: zeroes up to the next multiple of four bytes, which every header and every content starts at.
pad() {
    count=$(((4 - $1 % 4) % 4))
    [ "$count" -eq 0 ] || head -c "$count" /dev/zero
}

# entry NAME MODE [CONTENT-FILE | MAJOR MINOR]: one member. Owner root, time 0, so that the bytes depend on the agent alone.
entry() {
    name=$1 mode=$2 content='' size=0 major=0 minor=0
    case $# in
    3) content=$3 size=$(wc -c <"$3") ;;
    4) major=$3 minor=$4 ;;
    esac
    inode=$((inode + 1))
    # magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    printf '070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\0' \
        "$inode" "$mode" 0 0 1 0 "$size" 0 0 "$major" "$minor" $((${#name} + 1)) 0 "$name"
    pad $((110 + ${#name} + 1))
    if [ -n "$content" ]; then
        cat "$content"
        pad "$size"
    fi
}

mkdir -p "$(dirname "$out")"
partial=$out.$$
trap 'rm -f "$partial"' EXIT
{
    # What the agent mounts on, and the nodes that PID 1 needs before it has mounted anything:
    # the kernel opens /dev/console as its stdio, and where there is no console Rust's runtime opens /dev/null instead.
    for directory in dev proc sys run; do
        entry "$directory" 0040755
    done
    entry dev/console 0020600 5 1
    entry dev/null 0020666 1 3
    # The agent says "PID 1 runs" through an I/O port before it mounts anything.
    entry dev/port 0020600 1 4
    # Its log goes to the kernel's, which the VMM reads out of a dead guest.
    entry dev/kmsg 0020600 1 11
    entry init 0100755 "$agent"
    entry 'TRAILER!!!' 0
} >"$partial"
mv "$partial" "$out"
echo "initramfs: $out, $(wc -c <"$out") bytes"
