"""What the emulated host is made of: Debian's packages, and an unpacked host kernel.

Nothing here is installed behind the user's back: missing packages are named, and the kernel's package
is unpacked into the cache directory, never installed.
"""

import fcntl
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .errors import HostError

QEMU = "/usr/bin/qemu-system-x86_64"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
BUSYBOX = "/bin/busybox"

# File that must exist -> Debian package that has it.
NEEDS = {
    QEMU: "qemu-system-x86",
    VIRTIOFSD: "qemu-system-common",
    "/sbin/depmod": "kmod",
    BUSYBOX: "busybox-static",
    "/usr/bin/setsid": "util-linux",
}

KERNEL_METAPACKAGE = "linux-image-6.12-cloud-amd64"

# Loaded at boot. The order among them does not matter, their dependencies are added in front.
MODULES = ["kvm-amd", "tun", "vhost_vsock", "vhost_net", "overlay", "loop", "veth", "bridge"]
# Of a pod's network: what joins its interface to a tap. What iptables' rules need, the kernel asks modprobe for.
MODULES += ["sch_ingress", "cls_matchall", "act_mirred"]

MAKE_IT_FRESH = "remove {} to make it again"


def cache_dir():
    """Where the host kernel and the resident host's address are kept."""
    default = Path(__file__).resolve().parents[2] / "target" / "kvm-host"
    return Path(os.environ.get("KRX_KVM_HOST_CACHE") or default)


def missing_packages():
    return sorted({package for path, package in NEEDS.items() if not os.path.exists(path)})


def install_line():
    missing = missing_packages()
    return ["apt-get", "install", "-y", "--no-install-recommends", *missing] if missing else None


def check_packages():
    line = install_line()
    if line:
        raise HostError("the emulated host needs packages that are missing; run\n    " + " ".join(line))


def install_packages():
    line = install_line()
    if line and subprocess.run(line, stdin=subprocess.DEVNULL).returncode != 0:
        raise HostError("apt-get could not install the packages (run `apt-get update` first?)")


class Kernel:
    """An unpacked host kernel: an image, and a tree with lib/modules/RELEASE."""

    def __init__(self, tree):
        self.tree = tree
        self.release = (tree / "release").read_text().strip()
        self.image = tree / "boot" / f"vmlinuz-{self.release}"

    def load_order(self):
        """Paths below the tree of MODULES and what they depend on, in an order that insmod accepts."""
        base = Path("lib/modules") / self.release
        depends = {}
        for line in (self.tree / base / "modules.dep").read_text().splitlines():
            path, _, rest = line.partition(":")
            depends[path] = rest.split()
        by_name = {Path(path).name.removesuffix(".ko").replace("-", "_"): path for path in depends}
        order = []
        for name in MODULES:
            path = by_name.get(name.replace("-", "_"))
            if path is None:
                raise HostError(f"the host kernel has no module {name}")
            # modules.dep lists dependencies so that the last one is to be loaded first.
            for wanted in [*reversed(depends[path]), path]:
                if wanted not in order:
                    order.append(wanted)
        return [str(base / path) for path in order]


def kernel():
    """The host kernel, downloaded and unpacked on first use."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / "linux"
    with open(cache / "linux.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (tree / "release").exists():
            _unpack_kernel(cache, tree)
    return Kernel(tree)


def _unpack_kernel(cache, tree):
    package = _kernel_package()
    print(f"kvm-host: fetching {package} (once, not installed)", file=sys.stderr)
    work = cache / "linux.part"
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(tree, ignore_errors=True)
    work.mkdir()
    _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], work, "download the host kernel")
    archive = next(work.glob("*.deb"))
    _run(["dpkg", "-x", str(archive), "."], work, "unpack the host kernel")
    archive.unlink()
    release = next((work / "lib" / "modules").iterdir()).name
    # busybox' insmod and an emulated CPU are both better off with plain modules.
    for packed in (work / "lib" / "modules").rglob("*.ko.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    _run(["/sbin/depmod", "-b", ".", release], work, "index the host kernel's modules")
    (work / "release").write_text(release + "\n")
    work.rename(tree)


def _kernel_package():
    told = subprocess.run(["apt-cache", "depends", KERNEL_METAPACKAGE], capture_output=True, text=True)
    found = re.search(r"Depends: (linux-image-\S+)", told.stdout)
    if not found:
        raise HostError(f"apt knows no package {KERNEL_METAPACKAGE}; run\n    apt-get update")
    return found.group(1)


def _run(command, where, purpose):
    done = subprocess.run(command, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise HostError(f"cannot {purpose}: `{' '.join(command)}` says\n{done.stderr.strip()}")
