"""What the scripts beside this want to know of a kernel's ELF file."""

import struct
import subprocess


def symbols(path):
    """Fields of nm's lines: address, size where there is one, kind, name; in order of the addresses."""
    listed = subprocess.run(["nm", "-S", "-n", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in listed.splitlines()]


def offset_of(image, address):
    """Where an address lies in the file, by its program headers."""
    (table,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    for index in range(count):
        kind, _, offset, start, _, length = struct.unpack_from("<IIQQQQ", image, table + size * index)
        if kind == 1 and start <= address < start + length:
            return offset + address - start
    raise ValueError(f"{address:#x} is in no segment")
