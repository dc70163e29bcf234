#!/usr/bin/env python3
"""sort-jump-table.py VMLINUX: sorts the table of jump labels as the kernel does at boot (jump_label_cmp in kernel/jump_label.c).

An entry is struct jump_entry (linux/jump_label.h): two addresses of four bytes and one of eight, each relative to itself; the last
has flags in its two lowest bits.
"""

import struct
import sys

sys.dont_write_bytecode = True

from vmlinux import offset_of, symbols  # noqa: E402

ENTRY = struct.Struct("<iiq")
FLAGS = 3


def main(path):
    image = bytearray(open(path, "rb").read())
    named = {row[-1]: int(row[0], 16) for row in symbols(path)}
    start, stop = named["__start___jump_table"], named["__stop___jump_table"]
    offset = offset_of(image, start)
    entries = []
    for at in range(0, stop - start, ENTRY.size):
        code, target, key = ENTRY.unpack_from(image, offset + at)
        entries.append(((key & ~FLAGS) + start + at + 8, code + start + at, target + start + at + 4, key & FLAGS))
    entries.sort(key=lambda entry: entry[:2])
    for index, (key, code, target, flags) in enumerate(entries):
        at = start + index * ENTRY.size
        ENTRY.pack_into(image, offset + at - start, code - at, target - at - 4, key - at - 8 | flags)
    open(path, "wb").write(image)


main(sys.argv[1])
