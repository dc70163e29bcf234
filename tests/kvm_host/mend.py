"""Mends a fault of QEMU's AMD-V in the process that was started: a guest could get one interrupt twice.

Where VMRUN injects an interrupt, TCG delivers it at once and leaves its vector in `exception_index` besides, from where it is
delivered again, with interrupts disabled or not, if the CPU's loop is left before another exit or exception: when the main
loop kicks it, or a slice of counted instructions ends. Linux in the guest then waits for a lock that it holds itself, or loses a
timer: once in some thousand starts, the more the busier the machine. QEMU 7.2 has it (helper_vmrun, SVM_EVTINJ_TYPE_INTR).

The store is overwritten in memory, before there is a guest. A QEMU whose code looks otherwise is left as it is.
"""

import os
import re

# mov %vector,exception_index(cpu); movl $0,exception_is_int; movq $-1,exception_next_eip; if the log wants it...; the
# third argument of do_interrupt_x86_hardirq(). Exceptions, which are to be left there, go on to another function.
STORE = re.compile(
    rb"(\x44?\x89[\x80-\xbf]...\xff)\xc7[\x80-\x87]....\0{4}\x48\xc7[\x80-\x87]....\xff{4}"
    rb"\xf6\x05....\x02(?:\x0f\x85....|\x75.)\xba\x01\0\0\0",
    re.DOTALL,
)
# By the length of what they replace.
NOPS = {6: b"\x66\x0f\x1f\x44\x00\x00", 7: b"\x0f\x1f\x80\x00\x00\x00\x00"}


def find(program):
    """Offset and bytes of the store in QEMU's file, or None."""
    found = list(STORE.finditer(program))
    return (found[0].start(1), found[0].group(1)) if len(found) == 1 else None


def mend(pid):
    """True if process `pid`, which is QEMU, is mended; not where the machine forbids to look into a child."""
    try:
        return _overwrite(pid)
    except OSError:
        return False


def _overwrite(pid):
    path = f"/proc/{pid}/exe"
    with open(path, "rb") as file:
        store = find(file.read())
    if store is None:
        return False
    offset, code = store
    address = _address(pid, os.stat(path).st_ino, offset)
    if address is None:
        return False
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        if memory.read(len(code)) != code:
            return False
        memory.seek(address)
        memory.write(NOPS[len(code)])
    return True


def _address(pid, inode, offset):
    """Where a place in a program's file is executed."""
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            span, permissions, first, _, number = line.split()[:5]
            begin, end = (int(part, 16) for part in span.split("-"))
            first = int(first, 16)
            if int(number) == inode and "x" in permissions and first <= offset < first + end - begin:
                return begin + offset - first
    return None
