#!/bin/sh
# Makes the root file system of the demo and of the end-to-end tests: Debian with python3.
#
#   python-rootfs.sh [OUT]          OUT is target/guest/python-rootfs unless given
#   MIRROR=http://...               Debian mirror; unless given, the one of this machine's apt sources, else deb.debian.org
#   SUITE=bookworm                  Debian release
#
# Needs root (debootstrap unpacks device nodes and runs package scripts in a chroot), but no systemd and no mounts of its own.
# The result appears under its name only when it is complete: a directory that exists is never rebuilt.
set -eu

suite=${SUITE:-bookworm}
packages=python3,ca-certificates
top=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$top/target/guest/python-rootfs}
say() { echo "python-rootfs: $*"; }
fail() { echo "python-rootfs: $*" >&2; exit 1; }

case $out in -*) fail "usage: python-rootfs.sh [OUT]" ;; esac
if [ -x "$out/usr/bin/python3" ]; then
    say "$out is there"
    exit 0
fi
[ ! -e "$out" ] || fail "$out exists, but has no python3 in it: remove it, or give another directory"
[ "$(id -u)" -eq 0 ] || fail "debootstrap needs root: run this with sudo"
command -v debootstrap >/dev/null || fail "no debootstrap: apt-get install debootstrap"

# The mirror which this machine already uses is more likely to answer, and to be near, than a fixed one.
apt_mirror() {
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
        sed -n -E 's#^(deb +(\[[^]]*\] +)?|URIs: *)(https?://[^ ]+/debian)/?( .*)?$#\3#p' | head -n 1
}
mirror=${MIRROR:-$(apt_mirror)}
mirror=${mirror:-http://deb.debian.org/debian}

mkdir -p "$(dirname "$out")"
work=$(mktemp -d "$out.XXXXXX")
log=$work.log
finish() {
    rm -rf "$work"
    rm -f "$log"
}
trap finish EXIT
trap 'exit 130' INT TERM

say "debootstrap of $suite with $packages from $mirror (about a minute)"
start=$(date +%s)
# debootstrap prints a line a package and step ("I: ..."): every tenth is enough to see that it lives.
status=$work.status
(
    set +e
    debootstrap --variant=minbase --include="$packages" "$suite" "$work" "$mirror" 2>&1
    echo $? >"$status"
) | tee "$log" | awk '/^I: / && ++n % 10 == 1 { sub(/^I: /, ""); print "python-rootfs: " $0; fflush() }'
code=$(cat "$status")
rm -f "$status"
if [ "$code" -ne 0 ]; then
    tail -n 20 "$log" "$work/debootstrap/debootstrap.log" >&2 2>/dev/null || true
    fail "debootstrap failed with status $code; its last lines are above"
fi

# What only an interactive or a growing system needs: package archives and lists, documentation, translations, logs.
rm -rf "$work"/var/cache/apt/* "$work"/var/lib/apt/lists/* "$work"/var/log/* "$work"/var/cache/debconf/*-old
rm -rf "$work"/usr/share/doc/* "$work"/usr/share/man/* "$work"/usr/share/info/* "$work"/usr/share/locale/* "$work"/usr/share/lintian
find "$work"/usr/lib/python3 "$work"/usr/lib/python3.* -depth -name test -type d -exec rm -rf {} +
# Files of this machine which debootstrap copies in; the runtime writes the pod's own.
rm -f "$work/etc/resolv.conf"
echo localhost >"$work/etc/hostname"
chmod 0755 "$work"

mv -T "$work" "$out"
say "$out, $(du -sm "$out" | cut -f 1) MiB, $(chroot "$out" python3 --version), $(($(date +%s) - start)) s"
