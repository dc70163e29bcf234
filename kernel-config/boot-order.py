#!/usr/bin/env python3
"""boot-order.py VMLINUX NAMES: the file boot-order, from the names of functions that a start executes (`profile.py --order`).

Behind those come all functions with code that some CPU has the kernel change as it boots: alternatives (struct alt_instr), jump labels
(struct jump_entry) and static calls (struct static_call_site).
"""

import bisect
import struct
import sys

sys.dont_write_bytecode = True

from vmlinux import offset_of, symbols  # noqa: E402

# struct alt_instr: instr_offset, repl_offset, flags, instrlen, replacementlen. The first field of each kind of entry is the place of the
# code, relative to itself.
TABLES = {"__alt_instructions": ("__alt_instructions_end", 14), "__start___jump_table": ("__stop___jump_table", 16)}
TABLES["__start_static_call_sites"] = ("__stop_static_call_sites", 8)
# What krx-vmm copies.
ROOM = 2 << 20

HEAD = """\
# Functions of the guest's kernel that a start executes, then those that it may change as it boots: they come first in its text, see
# edit-source.sh. Made by boot-order.py. A name that the kernel does not have does nothing; one that is missing costs its page a fault.
"""


def changed(image, named):
    """Addresses of code that the kernel may change."""
    for begin, (end, size) in TABLES.items():
        for at in range(named[begin], named[end] - size + 1, size):
            yield at + struct.unpack_from("<i", image, offset_of(image, at))[0]


def main(path, names):
    image = open(path, "rb").read()
    executed = set(open(names).read().split())
    rows = symbols(path)
    named = {row[-1]: int(row[0], 16) for row in rows}
    low, high = named["_stext"], named["_etext"]
    functions = [(int(row[0], 16), int(row[1], 16), row[3]) for row in rows if len(row) == 4 and row[2] in "tTwW"]
    functions = [function for function in functions if low <= function[0] < high]
    starts = [function[0] for function in functions]
    sites = (bisect.bisect_right(starts, at) - 1 for at in changed(image, named) if low <= at < high)
    patched = {functions[index][2] for index in sites if index >= 0}
    groups = (("Executed.", executed), ("Changed.", patched - executed))
    total = 0
    print(HEAD, end="")
    for title, group in groups:
        listed = dict.fromkeys(name for _, _, name in functions if name in group)
        size = sum(size for _, size, name in functions if name in listed)
        total += size
        print(f"# {title}")
        print("\n".join(listed))
        print(f"{title} {len(listed)} functions, {size >> 10} KiB", file=sys.stderr)
    if total > ROOM:
        sys.exit(f"boot-order.py: {total >> 10} KiB are more than krx-vmm copies")


if __name__ == "__main__":
    main(*sys.argv[1:])
