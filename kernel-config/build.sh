#!/usr/bin/env bash
# Builds the guest kernel: build.sh [OUT]
#
# x86_64.config over `make allnoconfig` of Debian's linux-source package gives target/guest/vmlinux (or OUT), and a bzImage beside it. What is cached lies
# in target/guest/linux: src/ (the unpacked source), build/ (objects), stamp (what the vmlinux was made of, so that a call with
# nothing to do costs milliseconds).
#
#   KERNEL_SRC=DIR|TARBALL   other sources than those recorded in SOURCE
#   KERNEL=VMLINUX           no build at all: take this one
#   JOBS=N                   parallel compilations, otherwise one a CPU
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
guest=$(dirname "$here")/target/guest
out=${1:-$guest/vmlinux}
cache=$guest/linux
fragment=$here/x86_64.config
edits=$here/edit-source.sh
order=$here/boot-order
recorded=$here/SOURCE

say() { echo "kernel: $*"; }
fail() {
    echo "kernel: $*" >&2
    exit 1
}
case $out in -*) fail "usage: build.sh [OUT]" ;; esac

# ---- what the result depends on ----

source_field() { sed -n "s/^$1=//p" "$recorded"; }

# Size and time stand for the content of a tarball or of a kernel: hashing 150 MB each time would cost more than the check may.
file_identity() { stat -L -c '%n %s %y' "$1"; }

source=${KERNEL_SRC:-$(source_field file)}
if [[ -n ${KERNEL:-} ]]; then
    [[ -f $KERNEL ]] || fail "KERNEL=$KERNEL: no such file"
    identity="prebuilt $(file_identity "$KERNEL")"
elif [[ -d $source ]]; then
    [[ -f $source/Kbuild ]] || fail "KERNEL_SRC=$source: not a Linux source tree"
    identity="tree $(cd "$source" && pwd)"
elif [[ -f $source ]]; then
    identity="tarball $(file_identity "$source")"
elif [[ -n ${KERNEL_SRC:-} ]]; then
    fail "KERNEL_SRC=$source: no such file or directory"
else
    fail "no kernel source at $source: apt-get install $(source_field package), or name a tree or tarball by KERNEL_SRC="
fi
stamp=$({
    echo "$identity"
    cat "$fragment" "$edits" "$order" "$here/sort-jump-table.py" "$here/vmlinux.py" "${BASH_SOURCE[0]}"
} | sha256sum | cut -d ' ' -f 1)

mkdir -p "$cache" "$(dirname "$out")"
exec 9>"$cache/lock"
flock -n 9 || {
    say "waiting for another kernel build"
    flock 9
}
# A source tree is somebody's working copy: there make decides what is up to date.
if [[ $identity != tree* && -f $out && $(cat "$cache/stamp" 2>/dev/null) == "$stamp $out" ]]; then
    say "$out is up to date"
    exit 0
fi
rm -f "$cache/stamp"

install_kernel() { # FROM: under its name only when complete
    cp "$1" "$out.partial"
    [[ -n ${KERNEL:-} ]] || "$here/sort-jump-table.py" "$out.partial"
    strip --strip-debug "$out.partial"
    mv "$out.partial" "$out"
    echo "$stamp $out" >"$cache/stamp"
    say "$out: $(stat -c %s "$out") bytes in the file, $(size "$out" | awk 'NR == 2 { print $1 " text, " $2 " data, " $3 " bss" }')"
}

if [[ -n ${KERNEL:-} ]]; then
    [[ $(head -c 5 "$KERNEL" | od -An -tx1 | tr -d ' ') == 7f454c4602 ]] || fail "KERNEL=$KERNEL: not a 64-bit ELF file (a vmlinux, not a bzImage)"
    say "taking $KERNEL"
    install_kernel "$KERNEL"
    exit 0
fi

# ---- tools ----

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need make make
need gcc gcc
need ld binutils
need flex flex
need bison bison
need bc bc
need xz xz-utils
need gzip gzip
need python3 python3
if command -v gcc >/dev/null; then
    echo '#include <gelf.h>' | gcc -E -x c - >/dev/null 2>&1 || missing+=(libelf-dev)
    echo '#include <stdio.h>' | gcc -E -x c - >/dev/null 2>&1 || missing+=(libc6-dev)
fi
[[ ${#missing[@]} -eq 0 ]] || fail "tools are missing: apt-get install ${missing[*]}"

# ---- source ----

# Code no option of ours can reach. Kconfig files stay: the configuration reads all of them, whatever is switched off.
unreachable=(
    '*/drivers/gpu/*.[ch]' '*/drivers/media/*.[ch]' '*/drivers/net/ethernet/*.[ch]' '*/drivers/net/wireless/*.[ch]'
    '*/drivers/scsi/*.[ch]' '*/drivers/infiniband/*.[ch]' '*/drivers/staging/*.[ch]' '*/drivers/usb/*.[ch]'
    '*/drivers/clk/*.[ch]' '*/drivers/pinctrl/*.[ch]' '*/sound/*.[ch]'
    '*/arch/[!x]*/*.[chS]' '*/arch/xtensa/*.[chS]' '*/Documentation/*/*' '*/tools/testing' '*/tools/perf' '*.dts' '*.dtsi'
)
if [[ -d $source ]]; then
    tree=$(cd "$source" && pwd)
else
    tree=$cache/src
    # Other edits begin with what they were made for, not with what others have left.
    unpacked="$identity without ${unreachable[*]}, $(sha256sum <"$edits")"
    if [[ $(cat "$cache/unpacked" 2>/dev/null) != "$unpacked" ]]; then
        say "unpacking $source"
        rm -rf "$tree" "$cache/unpacked" "$cache/build"
        mkdir -p "$tree"
        if [[ -z ${KERNEL_SRC:-} && $(sha256sum "$source" | cut -d ' ' -f 1) != "$(source_field sha256)" ]]; then
            say "note: $source is not the one recorded in SOURCE (another package version?); building from it all the same"
        fi
        case $source in
        *.xz) decompress=(xz -dc -T0) ;;
        *.gz) decompress=(gzip -dc) ;;
        *) decompress=(cat) ;;
        esac
        "${decompress[@]}" "$source" | tar -x -C "$tree" --strip-components=1 "${unreachable[@]/#/--exclude=}"
        echo "$unpacked" >"$cache/unpacked"
    fi
    # Somebody's own tree is left as it is.
    "$edits" "$tree" "$order"
fi
flags=()
[[ ! -f $tree/arch/x86/kernel/krx-order.h ]] || flags=(KCFLAGS=-ffunction-sections)

# ---- configuration ----

export ARCH=x86_64
# The same source gives the same bytes, whoever builds it and when.
export KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_VERSION=1 KBUILD_BUILD_USER=krx KBUILD_BUILD_HOST=krx
build=$cache/build
mkdir -p "$build"
kmake() { make -C "$tree" O="$build" "$@"; }

say "configuring ($(basename "$fragment") over allnoconfig)"
KCONFIG_ALLCONFIG=$fragment kmake allnoconfig >"$build/config.log" 2>&1 || {
    cat "$build/config.log" >&2
    fail "make allnoconfig failed, see above"
}
# Kconfig drops silently what lacks a dependency: compare what was asked for with what came out.
dropped=$(awk '
    FNR == NR { if (/^CONFIG_/) { eq = index($0, "="); got[substr($0, 1, eq - 1)] = substr($0, eq + 1) } ; next }
    /^CONFIG_/ {
        eq = index($0, "="); name = substr($0, 1, eq - 1); want = substr($0, eq + 1)
        have = (name in got) ? got[name] : "n"
        if (have != want) print "  " name ": asked for " want ", got " have
    }' "$build/.config" "$fragment")
[[ -z $dropped ]] || fail "options of x86_64.config that did not take (a missing dependency, or one that forces them):
$dropped"

# ---- compilation ----

jobs=${JOBS:-$(nproc)}
say "compiling $(grep -c '=y$' "$build/.config") options' worth with $jobs jobs; log in $build/make.log"
objects=0 shown=0
SECONDS=0
if ! kmake -j"$jobs" "${flags[@]}" vmlinux bzImage 2>&1 | tee "$build/make.log" | while IFS= read -r line; do
    case $line in
    *'  CC '* | *'  AS '*) objects=$((objects + 1)) ;;
    *'  LD '*vmlinux* | *'  SORTTAB '*) say "linking ${line##* } after $objects objects, $SECONDS s" ;;
    esac
    if ((SECONDS >= shown + 5)); then
        shown=$SECONDS
        say "$objects objects of about 1150, $SECONDS s (${line##* })"
    fi
done; then
    grep -n -B 2 -A 8 -m 5 -E 'error:|Error [0-9]|undefined reference' "$build/make.log" >&2 || tail -n 30 "$build/make.log" >&2
    fail "make failed; the whole log is $build/make.log"
fi
say "compiled in $SECONDS s"
# The same kernel as a bzImage, for those who boot it elsewhere.
cp "$build/arch/x86/boot/bzImage" "$(dirname "$out")/bzImage"
install_kernel "$build/vmlinux"
