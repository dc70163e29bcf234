#!/usr/bin/env python3
"""profile.py [vm|container] [--runs N] [--top N]: where the counted time of a start goes, by owner and by function.

Runs starts in an emulated host that counts instructions as time, with a plugin of its emulator (counter.c) that counts
each block of code, on the host and in the guest alike. A counted millisecond is a million instructions: docs/benchmarks.md.
The same is drawn in target/bench/profile-vm.svg, of the guest's kernel by the files of its source.
"""

import argparse
import bisect
import collections
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGET = ROOT / "target"
# Bytes of a block by which its program is known; fewer are in each program.
TELLING = 12
KERNEL_HALF = 1 << 63
PAGE = 4096


class Symbols:
    """Addresses of functions, in order."""

    def __init__(self, pairs):
        self.pairs = sorted(set(pairs))
        self.addresses = [address for address, _ in self.pairs]

    def name(self, address):
        index = bisect.bisect_right(self.addresses, address) - 1
        return self.pairs[index][1] if index >= 0 else "?"

    def address(self, wanted):
        return next((address for address, name in self.pairs if name == wanted), None)


def symbols_of(program):
    listed = subprocess.run(["nm", "--defined-only", "--demangle", program], capture_output=True, text=True, check=True)
    fields = (line.split(maxsplit=2) for line in listed.stdout.splitlines())
    return Symbols((int(at, 16), name) for at, kind, name in fields if kind in "tTwW")


class Program:
    """An ELF file: its loaded segments, and its symbols as far as it has any."""

    def __init__(self, owner, path):
        self.owner = owner
        self.bytes = path.read_bytes()
        self.symbols = symbols_of(path)
        offset, = struct.unpack_from("<Q", self.bytes, 32)
        size, count = struct.unpack_from("<HH", self.bytes, 54)
        headers = (struct.unpack_from("<IIQQQQ", self.bytes, offset + size * index) for index in range(count))
        # (offset in the file, address, length)
        self.segments = [(at, address, length) for kind, _, at, address, _, length in headers if kind == 1]
        # Where its processes were loaded: differences of addresses in memory and in the file.
        self.loaded = collections.deque(maxlen=8)

    def holds(self, address):
        return any(start <= address < start + length for _, start, length in self.segments)

    def has_at(self, address, code):
        """Whether most of these bytes are at the address: Linux patches its code at boot."""
        for at, start, length in self.segments:
            if start <= address < start + length:
                own = self.bytes[at + address - start :][: len(code)]
                return sum(a == b for a, b in zip(own, code)) * 2 >= len(code)
        return False

    def function(self, address, code):
        """The function that has these bytes, wherever the program was loaded."""
        for found in (address - loaded for loaded in self.loaded):
            if found >= 0 and self.bytes[found : found + len(code)] == code:
                return self._name(found)
        found = self.bytes.find(code) if len(code) >= TELLING else -1
        if found < 0 or (address - found) % PAGE:
            return None
        self.loaded.appendleft(address - found)
        return self._name(found)

    def _name(self, found):
        for at, address, length in self.segments:
            if at <= found < at + length:
                return self.symbols.name(address + found - at)
        return None


class Host:
    """The emulated host's kernel, by its /proc/kallsyms."""

    def __init__(self, kallsyms):
        pairs = []
        for line in kallsyms.read_text().splitlines():
            at, kind, name, *module = line.split()
            if kind in "tTwW":
                pairs.append((int(at, 16), f"{name} {module[0]}" if module else name))
        self.symbols = Symbols(pairs)
        self.text = self.symbols.address("_stext"), self.symbols.address("_etext")


def attribute(block, guest, host, programs):
    address, code = block
    if address >= KERNEL_HALF:
        low, high = host.text
        if guest.holds(address) and (not low <= address < high or guest.has_at(address, code)):
            return guest.owner, guest.symbols.name(address)
        return "host kernel", host.symbols.name(address)
    for program in programs:
        function = program.function(address, code)
        if function:
            return program.owner, function
    # In long mode before the guest has its own page tables, or a program that is not looked into.
    return "others", "?"


def count(what, runs):
    """Lines of the plugin's file, and the host's symbols."""
    with tempfile.TemporaryDirectory(prefix="krx-profile-", dir=TARGET) as scratch:
        scratch = pathlib.Path(scratch)
        compiler = ["gcc", "-O2", "-Wall", "-Wextra"]
        subprocess.run([*compiler, "-shared", "-fPIC", "-o", scratch / "counter.so", HERE / "counter.c"], check=True)
        subprocess.run([*compiler, "-static", "-o", scratch / "mark", HERE / "mark.c"], check=True)
        plugin = f"{scratch}/counter.so,out={scratch}/blocks"
        command = [ROOT / "tests/kvm-host", "--icount", "--timeout", "1500", "--plugin", plugin, "--"]
        command += [TARGET / "release/profiled", what, str(runs), scratch]
        subprocess.run(command, check=True)
        lines = (scratch / "blocks").read_text().splitlines()
        return lines, Host(scratch / "kallsyms")


def profile(what, runs):
    lines, host = count(what, runs)
    guest = Program("guest kernel", TARGET / "guest/vmlinux")
    paths = {"krx-vmm": "release/krx-vmm", "krx": "release/krx", "agent": "x86_64-unknown-linux-gnu/agent/krx-agent"}
    programs = [Program(owner, TARGET / path) for owner, path in paths.items()]
    totals = collections.Counter()
    for line in lines:
        address, instructions, executed, code = line.split()
        found = attribute((int(address, 16), bytes.fromhex(code)), guest, host, programs)
        totals[found] += int(instructions) * int(executed)
    return {key: total / runs / 1e6 for key, total in totals.items()}


def sources(build):
    """Which file of the kernel's source a function is in, by the objects it was built from; of a name in several, none."""
    objects = sorted(path for path in build.rglob("*.o") if not path.name.startswith((".", "vmlinux", "built-in")))
    files = {}
    for first in range(0, len(objects), 200):
        listed = subprocess.run(["nm", "--defined-only", "--print-file-name", *objects[first : first + 200]], capture_output=True, text=True, check=False)
        for line in listed.stdout.splitlines():
            path, symbol = line.split(":", 1)
            _, kind, name = symbol.split(maxsplit=2)
            if kind in "tTwW":
                files.setdefault(name, set()).add(pathlib.Path(path).relative_to(build).with_suffix(".c"))
    return {name: paths.pop() for name, paths in files.items() if len(paths) == 1}


def folded(figures, files):
    """Lines of stacks for a flame graph, in counted microseconds: an owner, where the function is from, its name."""
    lines = []
    for (owner, name), cms in sorted(figures.items()):
        where = []
        if owner == "guest kernel":
            where = files.get(name.split(".")[0], pathlib.Path("elsewhere")).parts
        elif "::" in name:
            where = [name.lstrip("<&").split("::")[0]]
        stack = ";".join(part.replace(";", ":") for part in (owner, *where, name))
        if round(cms * 1000):
            lines.append(f"{stack} {round(cms * 1000)}")
    return "\n".join(lines) + "\n"


def draw(figures, what):
    drawing = TARGET / f"bench/profile-{what}.svg"
    drawing.parent.mkdir(exist_ok=True)
    stacks = folded(figures, sources(TARGET / "guest/linux/build"))
    title = f"A start of a {what}, in counted microseconds"
    subprocess.run([TARGET / "release/flame", title, drawing], input=stacks, text=True, check=True)
    print(f"Drawn in {drawing.relative_to(ROOT)}")


def show(figures, top):
    owners = collections.Counter()
    for (owner, _), cms in figures.items():
        owners[owner] += cms
    print(f"{'cms':>8}  owner, and the first {top} of its functions")
    for owner, cms in owners.most_common():
        print(f"{cms:8.2f}  {owner}")
        own = collections.Counter({name: cms for (whose, name), cms in figures.items() if whose == owner})
        for name, cms in own.most_common(top):
            print(f"{cms:8.3f}      {name}")
    print(f"{sum(owners.values()):8.2f}  in all, the bench's own work among others")


def main():
    parser = argparse.ArgumentParser("profile.py", description=__doc__)
    parser.add_argument("what", nargs="?", default="vm", choices=["vm", "container"])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--top", type=int, default=40, help="functions of each owner (40)")
    parser.add_argument("--order", action="store_true", help="only names of the guest's functions, for kernel-config/boot-order.py")
    options = parser.parse_args()
    if not shutil.which("gcc"):
        sys.exit("profile.py: gcc is missing: apt-get install gcc")
    figures = profile(options.what, options.runs)
    if options.order:
        print("\n".join(sorted(name for owner, name in figures if owner == "guest kernel")))
    else:
        show(figures, options.top)
        draw(figures, options.what)


if __name__ == "__main__":
    main()
