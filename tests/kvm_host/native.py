"""Running the command on this very machine, and knowing when that will do."""

import os
import re
import signal
import subprocess
import sys

from .errors import TIMED_OUT, HostError
from .machine import die_with_parent

INSIDE = "KRX_KVM_HOST_INSIDE"


def runs_here(icount):
    """Whether the command needs no emulated host."""
    inside = os.environ.get(INSIDE)
    if inside:
        if icount and inside != "icount":
            raise HostError("a counting host cannot be had inside a host that does not count")
        return True
    if icount:
        return False
    choice = os.environ.get("KRX_KVM_HOST")
    if choice not in (None, "", "native", "emulated"):
        raise HostError(f"KRX_KVM_HOST is `{choice}`; it may be native or emulated")
    return choice == "native" if choice else kvm_runs_linux()


def kvm_runs_linux():
    """A /dev/kvm alone says little: it may be one that runs paravirtual guests only."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        with open("/proc/cpuinfo") as cpuinfo:
            return re.search(r"^flags\s*:.*\b(vmx|svm)\b", cpuinfo.read(), re.MULTILINE) is not None
    except OSError:
        return False


def run(command, timeout):
    try:
        child = subprocess.Popen(command, preexec_fn=die_with_parent, process_group=0)
    except OSError as error:
        print(f"kvm-host: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
    try:
        status = child.wait(timeout)
        return status if status >= 0 else 128 - status
    except subprocess.TimeoutExpired:
        print(f"kvm-host: stopped after {timeout:g} s (--timeout)", file=sys.stderr)
        return TIMED_OUT
    finally:
        _end(child)


def _end(child):
    if child.poll() is not None:
        return
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(2)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
