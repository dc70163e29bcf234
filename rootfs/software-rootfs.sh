#!/bin/sh
# Makes a root file system of Debian's programs and what they need: of the tests on real software in pods redis, PostgreSQL and
# nginx; of those with `krx run` git, gcc, sqlite3, rsync, fio and python3's own tests, in another node, a JVM, nginx and curl;
# of the bench of throughput fio and iperf3.
#
#   software-rootfs.sh [software | programs | runtimes | throughput]
#                                   makes target/guest/SET-rootfs; beside it lies python-rootfs, the base
#
# The programs and the libraries that they are linked to, no more: an image of it is imported on an emulated host.
# Left out is PostgreSQL's compiler of queries, for which LLVM would have to be fetched.
# The result appears under its name only when it is complete, and is then left alone.
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
set=${1:-software}
out=$top/target/guest/$set-rootfs
base=$top/target/guest/python-rootfs
needless="perl* libperl* *llvm* libz3* locales libc-l10n ssl-cert ucf *-common sensible-utils netbase libcap2-bin libgdbm* libjson-perl
 net-tools *-man *-java fonts-* fontconfig-config"
postgres=usr/lib/postgresql/15
gcc=usr/lib/gcc/x86_64-linux-gnu/12
jvm=usr/lib/jvm/java-17-openjdk-amd64
say() { echo "$set-rootfs: $*"; }
fail() { echo "$set-rootfs: $*" >&2; exit 1; }
# Directories that are copied as they are, and libraries which programs load by themselves.
trees=
plugins=
case $set in
    software)
        wanted="redis-server redis-tools postgresql-15 postgresql-client-15 nginx"
        tried="redis-server redis-cli redis-benchmark nginx $postgres/bin/postgres"
        programs="usr/bin/redis-check-rdb usr/bin/redis-cli usr/bin/redis-benchmark usr/sbin/nginx
 $postgres/bin/initdb $postgres/bin/postgres $postgres/bin/psql $postgres/bin/pg_ctl $postgres/bin/pgbench"
        trees="usr/share/postgresql/15"
        plugins="$postgres/lib/*.so" ;;
    programs)
        wanted="sqlite3 git gcc-12 libc6-dev rsync fio libpython3.11-testsuite"
        tried="sqlite3 gcc rsync fio python3 tar"
        programs="usr/bin/sqlite3 usr/bin/git usr/bin/gcc-12 usr/bin/as usr/bin/ld usr/bin/rsync usr/bin/fio usr/bin/tar usr/bin/gzip
 usr/bin/python3.11 usr/bin/find usr/bin/sort usr/bin/head usr/bin/wc usr/bin/cmp usr/bin/mv usr/bin/ln usr/bin/sync usr/bin/timeout
 usr/bin/env usr/bin/dd usr/bin/sha256sum $gcc/cc1 $gcc/collect2"
        trees="usr/lib/git-core usr/share/git-core $gcc usr/include usr/lib/python3.11"
        plugins="usr/lib/python3.11/lib-dynload/*.so $gcc/liblto_plugin.so" ;;
    runtimes)
        wanted="nodejs openjdk-17-jre-headless nginx curl"
        tried="node nginx curl"
        programs="usr/bin/node usr/sbin/nginx usr/bin/curl usr/bin/head usr/bin/sha256sum usr/bin/timeout"
        trees="$jvm etc/java-17-openjdk usr/share/nodejs"
        plugins="$jvm/bin/* $jvm/lib/*.so $jvm/lib/server/*.so" ;;
    throughput)
        wanted="fio iperf3 iproute2"
        tried="fio iperf3"
        programs="usr/bin/fio usr/bin/iperf3 usr/bin/ip usr/bin/mount" ;;
    *) fail "usage: software-rootfs.sh [software | programs | runtimes | throughput]" ;;
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
download() { (cd "$work/archives" && apt-get -qq -o APT::Sandbox::User=root -o Dir::State::status="$base/var/lib/dpkg/status" download $packages); }
download || { refresh && download; } || fail "apt-get could not download them, see above"
# Not what is mounted there: debootstrap leaves /proc where something is busy in it.
cp -ax "$base/." "$work/all"
for archive in "$work"/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$archive" | tar -x -C "$work/all" --keep-directory-symlink
done
cd "$work/all"
# shellcheck disable=SC2086 # lists of files, and patterns of them
libraries=$(chroot . /bin/sh -c 'ldd "$@" 2>/dev/null' sh $programs $plugins | sed -n -E 's#^.*[[:space:]]/([^ ]+) \(0x.*#\1#p' | sort -u)
copy() { mkdir -p "$work/root/$(dirname "$1")" && cp -L "$1" "$work/root/$1"; }
for file in $programs; do copy "$file"; done
# Found by way of the links /lib and /lib64, which the result has, too.
for file in $libraries; do case $file in usr/lib/jvm/*) ;; *) copy "usr/${file#usr/}" ;; esac; done
for tree in $trees; do mkdir -p "$work/root/$tree" && cp -a "$tree/." "$work/root/$tree"; done
for directory in bin lib lib64 sbin; do mkdir -p "$work/root/usr/$directory" && ln -s "usr/$directory" "$work/root/$directory"; done
ln -s dash "$work/root/usr/bin/sh"
case $set in
    software)
        cp -rL "$postgres/lib" "$work/root/$postgres/lib"
        rm -rf "$work/root/$postgres/lib/bitcode" "$work/root/$postgres/lib"/llvmjit* "$work/root/$postgres/lib/pgxs"
        ln -s redis-check-rdb "$work/root/usr/bin/redis-server" ;;
    programs)
        ln -s gcc-12 "$work/root/usr/bin/gcc"
        ln -s python3.11 "$work/root/usr/bin/python3"
        # What is linked: the C library, dynamically, and its mathematics.
        for file in crt1.o crti.o crtn.o Scrt1.o libc.so libc_nonshared.a libm.so libmvec.so.1 libmvec.so; do
            cp -L "usr/lib/x86_64-linux-gnu/$file" "$work/root/usr/lib/x86_64-linux-gnu/$file"
        done
        cd "$work/root"
        rm -rf "$gcc/lto1" "$gcc"/lib*san* "$gcc/plugin" "$gcc"/libgomp* "$gcc"/libitm* "$gcc"/libquadmath* usr/lib/python3.11/lib2to3
        # Of git, the programs that talk to servers; of python3's tests, the modules that are run and what they import.
        rm -f usr/lib/git-core/git-http* usr/lib/git-core/git-remote-* usr/lib/git-core/git-imap* usr/lib/git-core/git-daemon
        find usr/lib/python3.11/test -mindepth 1 -maxdepth 1 ! -name '__*' ! -name support ! -name libregrtest ! -name '*_tests.py' \
            ! -name test_os.py ! -name test_tempfile.py ! -name test_threading.py ! -name test_subprocess.py ! -name test_socket.py \
            ! -name subprocessdata ! -name fork_wait.py ! -name tf_inherit_check.py -exec rm -rf {} +
        # No program writes to the root file system: what is not compiled now would be each time.
        chroot . python3 -c 'from test import test_os, test_tempfile, test_threading, test_subprocess, test_socket' ||
            fail "a module of python3's tests is missing"
        chroot . python3 -m compileall -q usr/lib/python3.11 >/dev/null || fail "python3 cannot compile its modules" ;;
    runtimes)
        rm -rf "$work/root/$jvm/man" "$work/root/$jvm/docs" "$work/root/$jvm/jmods"
        # What the package's own script does: an archive of classes, without which a start is twice as long. Java looks for itself in /proc.
        mkdir "$work/root/proc"
        unshare --mount sh -c 'mount -t proc proc "$1/proc" && exec chroot "$1" "$2/bin/java" -Xshare:dump' sh "$work/root" "/$jvm" >/dev/null ||
            fail "java does not run in what was made"
        # Debian's node loads some of its own modules from files.
        chroot "$work/root" node -e 0 || fail "node does not run in what was made" ;;
esac
cd "$work/root"
mkdir -p dev etc proc run sys tmp var/lib/nginx var/log/nginx root
chmod 1777 tmp
printf '%s\n' root:x:0:0:root:/root:/bin/sh nobody:x:65534:65534::/:/bin/sh web:x:1000:1000::/:/bin/sh >etc/passwd
printf '%s\n' root:x:0: web:x:1000: nogroup:x:65534: >etc/group
# Names that a pod's own network would have in any case.
printf '%s\n' '127.0.0.1 localhost' '::1 localhost' >etc/hosts
echo 'hosts: files dns' >etc/nsswitch.conf
for program in $tried; do
    chroot . "$program" -v >/dev/null 2>&1 || chroot . "$program" --version >/dev/null || fail "$program does not run in what was made"
done
cd "$top"
chmod 0755 "$work/root"

mv -T "$work/root" "$out"
say "$out, $(du -sm "$out" | cut -f 1) MiB"
