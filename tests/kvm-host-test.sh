#!/bin/sh
# Tests of the KVM host runner, by its command line. Prints `kvm-host-test: N passed`.
set -u
cd "$(dirname "$0")/.."
work=$(mktemp -d)
passed=0
failed=0
# A resident host of this test's own, with the unpacked host kernel of everybody.
kernel=$(pwd)/target/kvm-host/linux
export KRX_KVM_HOST_CACHE="$work/cache"
mkdir "$work/cache"
where=$(tests/kvm-host --which)

clean() {
    tests/kvm-host --stop
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 1' INT TERM

ok() {
    passed=$((passed + 1))
    echo "ok   $1"
}

# check WHAT EXPECTED FOUND
check() {
    if [ "$2" = "$3" ]; then ok "$1"; else
        failed=$((failed + 1))
        printf 'FAIL %s\n  expected: %s\n  found:    %s\n' "$1" "$2" "$3"
    fi
}

# The hosts of this test: their directory is in the command line of each of their processes.
hosts() { pgrep -f "$work/krx-kvm-host[.]" | wc -l; }

# gone WHAT: nothing of a host is left, at the latest after five seconds.
gone() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [ "$(hosts)" -eq 0 ] && break
        sleep 0.5
    done
    check "$1: no process is left" 0 "$(hosts)"
}

# Waits until a file has something in it.
wait_for() {
    for _ in $(seq 600); do
        [ -s "$1" ] && return 0
        sleep 0.1
    done
    echo "  $1 stayed empty"
}

run() { TMPDIR="$work" tests/kvm-host "$@"; }

begin() {
    start=$(date +%s%N)
}

seconds() { echo "$((($(date +%s%N) - start) / 100000000))" | sed 's/\(.\)$/.\1/; s/^\./0./'; }

# Command line
run 2>/dev/null
check "no command is a usage error" 2 $?
run --no-such-option true 2>/dev/null
check "an unknown option is a usage error" 2 $?
KRX_KVM_HOST=nonsense run true 2>"$work/err"
check "a wrong KRX_KVM_HOST is named" 1 "$(grep -c nonsense "$work/err")"

# One command on a host of its own: everything of it arrives, both ways
[ "$where" = native ] || { ln -s "$kernel" "$work/cache/linux"; [ -d "$kernel" ] || KRX_KVM_HOST_CACHE='' tests/kvm-host --private true; }
head -c 300000 /dev/urandom >"$work/in"
begin
# shellcheck disable=SC2016 # for the shell inside
GREETING='two words' run --timeout 120 -- sh -c '
    cat; echo "$GREETING in $PWD" >&2; ls -l /dev/kvm >&2; echo x >"$1/from-inside"; exit 7' sh "$work" \
    <"$work/in" >"$work/out" 2>"$work/err"
check "the exit status is the command's" 7 $?
echo "     host and command took $(seconds) s"
check "stdin to stdout is binary-clean" "$(sha256sum <"$work/in")" "$(sha256sum <"$work/out")"
check "environment and directory are the caller's" "two words in $(pwd)" "$(head -n 1 "$work/err")"
check "there is a /dev/kvm" 1 "$(grep -c /dev/kvm "$work/err")"
if [ "$where" = emulated ]; then
    check "this machine's QEMU is one that is mended" True "$(TMPDIR="$work" python3 -c '
import sys
sys.path.insert(0, "tests")
sys.dont_write_bytecode = True
from kvm_host.machine import Machine, Shape
machine = Machine(Shape())
print(machine.mended)
machine.close()')"
fi
check "files written inside are here" x "$(cat "$work/from-inside")"
gone "after the end"

run -- /nonexistent/program 2>"$work/err"
check "a command that is missing is 127" 127 $?
run --timeout 2 -- sleep 1000 2>"$work/err"
check "a timeout is 124" 124 $?
check "and says so" 1 "$(grep -c 'stopped after 2 s' "$work/err")"
gone "after a timeout"

# Ends from outside
for signal in INT TERM KILL; do
    : >"$work/up"
    # Not by `run`, so that $! is the runner. A background job of sh ignores SIGINT, env does not know that.
    TMPDIR="$work" env --default-signal=INT tests/kvm-host -- sh -c "echo up >$work/up; exec sleep 1000" &
    runner=$!
    wait_for "$work/up"
    kill -s "$signal" "$runner"
    wait "$runner" 2>/dev/null
    status=$?
    case $signal in INT) want=130 ;; TERM) want=143 ;; KILL) want=137 ;; esac
    check "SIG$signal ends the runner with $want" "$want" "$status"
    gone "after SIG$signal"
    [ "$where" != native ] || check "SIG$signal ends the command" 0 "$(pgrep -fc "sleep 100[0]")"
done
run true
check "what a killed runner leaves is the next one's to remove" 0 "$(find "$work" -maxdepth 1 -name 'krx-kvm-host.*' | wc -l)"

if [ "$where" != native ]; then
    # A host that dies under its command
    run --timeout 60 -- sh -c 'echo last words; sleep 1; echo c >/proc/sysrq-trigger; sleep 1000' >"$work/out" 2>"$work/err"
    check "a host that crashes is 125" 125 $?
    check "what was said before is kept" "last words" "$(cat "$work/out")"
    check "and the crash is shown" yes "$(grep -q 'Kernel panic.*sysrq' "$work/err" && echo yes)"
    gone "after a crash"

    # Several commands on one host
    begin
    run --start --while $$
    check "a resident host starts" 0 $?
    echo "     cold start of the emulated host took $(seconds) s"
    check "and is found" resident "$(run --which)"
    for number in 1 2 3; do
        run -- sh -c "sleep 1; echo $number; exit $number" >"$work/out$number" &
        eval "pid$number=$!"
    done
    begin
    for number in 1 2 3; do
        eval "wait \$pid$number"
        check "command $number of three at once has its status" "$number" $?
        check "and its output" "$number" "$(cat "$work/out$number")"
    done
    run --timeout 1 -- sleep 1000 2>/dev/null
    check "a timeout ends one command" 124 $?
    check "and not the host" still "$(run -- echo still)"
    check "nor leaves the command" 0 "$(run -- sh -c 'pgrep -fc "sleep 100[0]"')"
    run --stop
    check "the resident host stops" emulated "$(run --which)"
    gone "after the resident host"

    # Counted time. All that runs lies on a tmpfs inside: waiting for the share lets the clock jump.
    # shellcheck disable=SC2016 # for the shell inside
    run --icount --timeout 120 -- sh -c '
        cp /bin/busybox /dev/shm/busybox
        exec /dev/shm/busybox sh -c "$1"' sh '
            now() { read -r up _ </proc/uptime; at=${up%.*}${up#*.}; }
            loop() { i=0; while [ $i -lt 50000 ]; do i=$((i + 1)); done; }
            loop; now; a=$at; loop; now; b=$at; loop; now; echo $((b - a)) $((at - b))' >"$work/out"
    check "a counted command runs" 0 $?
    read -r first second <"$work/out"
    difference=$((first > second ? first - second : second - first))
    echo "     the same loop twice: $first and $second hundredths of a counted second"
    check "the same work takes the same counted time, within 5 %" yes \
        "$([ "$first" -gt 0 ] && [ $((difference * 100)) -le $((first * 5)) ] && echo yes)"
    gone "after a counted command"
fi

echo "kvm-host-test: $passed passed, $failed failed on $where KVM"
[ "$failed" -eq 0 ]
