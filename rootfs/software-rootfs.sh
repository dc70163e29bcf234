#!/bin/sh
# Makes a root file system of Debian's programs and what they need: of the tests on real software redis, PostgreSQL and nginx,
# of the bench of throughput fio and iperf3.
#
#   software-rootfs.sh [software | throughput]        makes target/guest/SET-rootfs; beside it lies python-rootfs, the base
#
# The programs and the libraries that they are linked to, no more: an image of it is imported on an emulated host.
# Left out is PostgreSQL's compiler of queries, for which LLVM would have to be fetched.
# The result appears under its name only when it is complete, and is then left alone.
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
set=${1:-software}
out=$top/target/guest/$set-rootfs
base=$top/target/guest/python-rootfs
needless="perl* libperl* *llvm* libz3* locales libc-l10n ssl-cert ucf *-common sensible-utils netbase libcap2-bin libgdbm* libjson-perl"
postgres=usr/lib/postgresql/15
say() { echo "$set-rootfs: $*"; }
fail() { echo "$set-rootfs: $*" >&2; exit 1; }
case $set in
    software)
        wanted="redis-server redis-tools postgresql-15 postgresql-client-15 nginx"
        tried="redis-server redis-cli redis-benchmark nginx"
        programs="usr/bin/redis-check-rdb usr/bin/redis-cli usr/bin/redis-benchmark usr/sbin/nginx
 $postgres/bin/initdb $postgres/bin/postgres $postgres/bin/psql $postgres/bin/pg_ctl" ;;
    throughput)
        wanted="fio iperf3 iproute2"
        tried="fio iperf3"
        programs="usr/bin/fio usr/bin/iperf3 usr/bin/ip usr/bin/mount" ;;
    *) fail "usage: software-rootfs.sh [software | throughput]" ;;
esac
programs="$programs
 usr/bin/dash usr/bin/cat usr/bin/chmod usr/bin/cp usr/bin/echo usr/bin/grep usr/bin/id usr/bin/ls usr/bin/mkdir usr/bin/rm
 usr/bin/sed usr/bin/seq usr/bin/sleep usr/bin/stat usr/bin/tail usr/bin/touch usr/bin/true"

# It has its name only since it is complete.
if [ -x "$out/usr/bin/sh" ]; then
    say "$out is there"
    exit 0
fi
[ ! -e "$out" ] || fail "$out exists, but has no shell in it: remove it"
[ -f "$base/var/lib/dpkg/status" ] || fail "no $base: run rootfs/python-rootfs.sh first"
[ "$(id -u)" -eq 0 ] || fail "libraries are looked for in a chroot: run this with sudo"

work=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# A fresh machine knows of no packages; one that was left alone, of old ones.
refresh() {
    say "apt-get update"
    apt-get -qq update >/dev/null || fail "apt-get update failed, see above"
}
# shellcheck disable=SC2086 # a list of packages
apt-get -s -qq install $wanted >/dev/null 2>&1 || refresh

# What apt would install in the base.
# shellcheck disable=SC2086 # lists of packages
needed=$(apt-get -s -qq --no-install-recommends -o Dir::State::status="$base/var/lib/dpkg/status" install $wanted |
    sed -n 's/^Inst \([^ ]*\) .*/\1/p') || fail "apt does not know all of: $wanted"
set -f
packages=
for package in $needed; do
    for pattern in $needless; do
        # shellcheck disable=SC2254 # a pattern
        case $package in $pattern) continue 2 ;; esac
    done
    packages="$packages $package"
done
set +f
say "fetching$packages"
mkdir "$work/archives" "$work/all" "$work/root"
# shellcheck disable=SC2086 # a list of packages
download() { (cd "$work/archives" && apt-get -qq -o APT::Sandbox::User=root download $packages); }
download || { refresh && download; } || fail "apt-get could not download them, see above"
cp -a "$base/." "$work/all"
for archive in "$work"/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$archive" | tar -x -C "$work/all" --keep-directory-symlink
done
cd "$work/all"
# shellcheck disable=SC2086 # a list of files
libraries=$(chroot . ldd $programs "$postgres"/lib/*.so 2>/dev/null | sed -n -E 's#^.*[[:space:]]/([^ ]+) \(0x.*#\1#p' | sort -u)
copy() { mkdir -p "$work/root/$(dirname "$1")" && cp -L "$1" "$work/root/$1"; }
for file in $programs; do copy "$file"; done
# Found by way of the links /lib and /lib64, which the result has, too.
for file in $libraries; do copy "usr/${file#usr/}"; done
for directory in bin lib lib64 sbin; do mkdir -p "$work/root/usr/$directory" && ln -s "usr/$directory" "$work/root/$directory"; done
ln -s dash "$work/root/usr/bin/sh"
if [ "$set" = software ]; then
    mkdir -p "$work/root/usr/share/postgresql" "$work/root/$postgres"
    cp -r usr/share/postgresql/15 "$work/root/usr/share/postgresql/15"
    cp -rL "$postgres/lib" "$work/root/$postgres/lib"
    rm -rf "$work/root/$postgres/lib/bitcode" "$work/root/$postgres/lib"/llvmjit* "$work/root/$postgres/lib/pgxs"
    ln -s redis-check-rdb "$work/root/usr/bin/redis-server"
fi
cd "$work/root"
mkdir -p dev etc proc run sys tmp var/lib/nginx var/log/nginx root
chmod 1777 tmp
printf '%s\n' root:x:0:0:root:/root:/bin/sh nobody:x:65534:65534::/:/bin/sh web:x:1000:1000::/:/bin/sh >etc/passwd
printf '%s\n' root:x:0: web:x:1000: nogroup:x:65534: >etc/group
for program in $tried; do
    chroot . "$program" -v >/dev/null 2>&1 || chroot . "$program" --version >/dev/null || fail "$program does not run in what was made"
done
[ "$set" != software ] || chroot . "/$postgres/bin/postgres" --version >/dev/null || fail "PostgreSQL does not run in what was made"
cd "$top"
chmod 0755 "$work/root"

mv -T "$work/root" "$out"
say "$out, $(du -sm "$out" | cut -f 1) MiB"
