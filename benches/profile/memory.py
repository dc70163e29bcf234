#!/usr/bin/env python3
"""memory.py: what the memory of a guest of 128 MiB is used for when a container has just begun, in MiB.

The guest's kernel tells what it has given to whom (/proc/meminfo, proc_meminfo(5)); what it consists of itself is told by its symbols.
"""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TARGET = ROOT / "target"
MEMORY = 128
# Of `struct page`, for each page of 4 KiB.
STRUCT_PAGE = 64
# Parts of the kernel: name, and the symbols at both ends (arch/x86/kernel/vmlinux.lds.S).
PARTS = [
    ("kernel: text", "_stext", "_etext"),
    ("kernel: read-only data", "__start_rodata", "__end_rodata"),
    ("kernel: data", "_sdata", "_edata"),
    ("kernel: variables that begin as zero", "__bss_start", "__bss_stop"),
]
# Of /proc/meminfo. What is in files of a tmpfs, the initramfs among them, counts as cached.
KINDS = [
    ("slabs", ["Slab"]),
    ("stacks of the kernel", ["KernelStack"]),
    ("tables of pages", ["PageTables", "SecPageTables"]),
    ("variables of CPUs", ["Percpu"]),
    ("memory of processes: agent and container", ["AnonPages"]),
    ("files: agent, container's program, tmpfs", ["Cached", "Buffers"]),
]


def symbols():
    listed = subprocess.run(["nm", TARGET / "guest/vmlinux"], capture_output=True, text=True, check=True).stdout
    fields = (line.split() for line in listed.splitlines())
    return {line[-1]: int(line[0], 16) for line in fields if len(line) == 3}


def guest():
    command = [ROOT / "tests/kvm-host", "--timeout", "300", "--", TARGET / "release/krx", "run", "--memory", f"{MEMORY}M"]
    command += ["--rootfs", TARGET / "guest/python-rootfs", "--", "cat", "/proc/meminfo", "/proc/zoneinfo"]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    meminfo = {words[0].rstrip(":"): int(words[1]) for words in (line.split() for line in told) if len(words) == 3 and words[2] == "kB"}
    managed = sum(int(line.split()[1]) for line in told if line.split()[:1] == ["managed"])
    # Free, but not to be seen as such: each CPU has some at hand.
    at_hand = sum(int(line.split()[1]) for line in told if line.split()[:1] == ["count:"])
    return meminfo, managed, at_hand


def main():
    meminfo, managed, at_hand = guest()
    at = symbols()
    rows = [(name, (at[end] - at[begin]) / 1024) for name, begin, end in PARTS]
    rows.append((f"page structs, of the {managed * 4 // 1024} MiB that are in use or ready for it", managed * STRUCT_PAGE / 1024))
    rows += [(name, sum(meminfo.get(kind, 0) for kind in kinds)) for name, kinds in KINDS]
    rows.append(("free pages that CPUs have at hand", at_hand * 4))
    given = meminfo["MemTotal"] - meminfo["MemFree"]
    rows.append(("else that the kernel has given away: buffers of devices and the like", given - sum(kib for _, kib in rows[len(PARTS) + 1 :])))
    for name, kib in rows:
        print(f"{kib / 1024:8.2f}  {name}")
    print(f"{sum(kib for _, kib in rows) / 1024:8.2f}  in all; the host gives it in pages of 2 MiB where it can, see `guest memory resident` of the bench")


if __name__ == "__main__":
    sys.exit(main())
