"""The emulated AMD-V host: virtiofsd and QEMU, as children that cannot outlive this process."""

import ctypes
import fcntl
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import mend, setup
from .errors import HostError

BOOT_SECONDS = 180
PREFIX = "krx-kvm-host."

# The machine's directories that the host covers with its own: nothing of the runner may lie there.
COVERED = ("/run/", "/dev/", "/proc/", "/sys/", "/var/run/")

# -pku: with it TCG reports an inconsistent XSAVE size. -erms,-fsrm: TCG runs `rep movsb` bytewise.
CPU = "max,+svm,-pku,-erms,-fsrm"

# Pages are kept while a file's mtime and size stay what they are, and that is asked for again after so many
# seconds. virtiofsd's default, cache=auto, drops a file's pages whenever somebody opens it: then each
# exec inside reads libc through the share again.
ASK_AGAIN = 1
# Waiting for an answer lets the clock of a counting host jump by seconds: what was read once is taken as it was.
ASK_AGAIN_COUNTED = 86400

# MiB of translated code that TCG keeps; then it forgets all of it. A store to a page that code was translated from goes through
# all that is kept of the page, and its own choice, 1 GiB, keeps that of guests long gone: clearing one page of theirs for
# another guest took 0.4 s, 2 MiB of them a minute and more, in which nothing else ran and all time limits passed at once.
TRANSLATED = 128

# A crash ends QEMU (panic=-1 and -no-reboot), so that it is an error and not a hang.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr cryptomgr.notests"
    " rootfstype=virtiofs root=rootfs rw"
)

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


# Lines of a log that are shown: its end, or from what killed the kernel on, whose stack trace is long.
END_LINES = 25
CRASH_LINES = 80
CRASH = re.compile(r"Kernel panic|BUG:|Oops:|Internal error")


def _end(lines):
    crash = next((index for index, line in enumerate(lines) if CRASH.search(line)), len(lines))
    return lines[max(0, min(crash, len(lines) - END_LINES)) :][:CRASH_LINES]


@dataclass
class Shape:
    """What can be chosen about a host."""

    icount: bool = False
    plugin: str = ""  # of TCG, with its arguments
    memory: int = 4096  # MiB
    # More than one is faster and now and then wrong: on several threads QEMU 7.2, and 10.0, runs code that was replaced
    # meanwhile. A guest triple-faults, or the host's kernel dies, once in a hundred boots, the more the busier
    # the machine; never when guests stay on their CPU, nor on one thread.
    cpus: int = 1

    @property
    def threads(self):
        return "single" if self.icount or self.cpus == 1 else "multi"

    @property
    def mode(self):
        return "icount" if self.icount else "emulated"


def die_with_parent():
    """For a child between fork and exec: the kernel kills it when the forking thread ends."""
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before the call.
    if os.getppid() != parent or parent == 1 and os.getpid() == 1:
        os._exit(1)


def make_directory():
    """A directory that both sides see at the same path; its lock says that its maker lives."""
    base = tempfile.gettempdir()
    if base.startswith(COVERED) or any(c.isspace() for c in base):
        base = "/tmp"
    for stale in Path(base).glob(PREFIX + "*"):
        _remove_if_dead(stale)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    # Locked before it has its name: another runner that looks for stale directories must not find it free.
    lock = open(path / "lock.new", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (path / "lock.new").rename(path / "lock")
    (path / "jobs").mkdir()
    return path, lock


def _remove_if_dead(path):
    try:
        with open(path / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        # Someone's, or in the making.
        pass


class Machine:
    """A running host. `channel` is the socket behind which its PID 1 takes jobs."""

    def __init__(self, shape):
        if os.geteuid() != 0:
            raise HostError("the emulated host needs root: it serves the root file system as it is")
        setup.check_packages()
        self.shape = shape
        self.kernel = setup.kernel()
        self.directory, self._lock = make_directory()
        self._children = []
        self.mended = False
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self):
        self._write_files()
        mine, qemus = socket.socketpair()
        self.channel = mine
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.directory / "fs.sock"))
        listener.listen(1)
        ask_again = ASK_AGAIN_COUNTED if self.shape.icount else ASK_AGAIN
        with listener, qemus:
            self._spawn(
                [setup.VIRTIOFSD, f"--fd={listener.fileno()}", "-o", "source=/"]
                + ["-o", f"cache=always,timeout={ask_again}", "-o", "sandbox=chroot", "-o", "xattr"],
                "virtiofsd.log",
                listener,
            )
            self._spawn(self._qemu(qemus.fileno()), "qemu.log", qemus)
            # Popen returns when it is executed; a guest of its own it can only have in seconds.
            self.mended = mend.mend(self._children[-1].pid)

    def _write_files(self):
        init = self.directory / "init"
        shutil.copyfile(Path(__file__).with_name("init"), init)
        modprobe = self.directory / "modprobe"
        modprobe.write_text(f'#!/bin/busybox sh\nexec /sbin/modprobe -d {self._tree()} "$@"\n')
        for script in (init, modprobe):
            script.chmod(0o755)
        (self.directory / "config").write_text(
            f"mode={self.shape.mode}\nthreads={self.shape.threads}\nmodules={self._tree()}\n"
            f"insmod={shlex.quote(' '.join(self.kernel.load_order()))}\n"
            f"runner={shlex.quote(str(Path(__file__).parent))}\n"
        )

    def _tree(self):
        return shlex.quote(str(self.kernel.tree))

    def _qemu(self, channel):
        shape = self.shape
        command = [setup.QEMU, "-M", "q35", "-cpu", CPU, "-m", f"{shape.memory}M"]
        if shape.icount:
            command += ["-accel", "tcg,thread=single", "-smp", "1", "-icount", "shift=0,sleep=off"]
        else:
            # For one CPU alone TCG leaves out memory barriers and atomicity, as if nobody else were at that memory. But
            # virtiofsd is: without a barrier between asking for an interrupt and looking at the ring, the last interrupt
            # is lost once in a hundred runs, and all programs wait for their files. One that could get a second CPU has them.
            command += ["-accel", f"tcg,thread=multi,tb-size={TRANSLATED}", "-smp", f"{shape.cpus},maxcpus={max(shape.cpus, 2)}"]
        if shape.plugin:
            command += ["-plugin", shape.plugin]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-object", f"memory-backend-memfd,id=ram,size={shape.memory}M,share=on"]
        command += ["-numa", "node,memdev=ram"]
        command += ["-chardev", f"socket,id=fs,path={self.directory}/fs.sock"]
        command += ["-device", "vhost-user-fs-pci,chardev=fs,tag=rootfs"]
        command += ["-chardev", f"socket,id=jobs,fd={channel}"]
        command += ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=jobs,name=jobs"]
        command += ["-serial", f"file:{self.directory}/console.log"]
        command += ["-kernel", str(self.kernel.image)]
        command += ["-append", f"{KERNEL_ARGUMENTS} init={self.directory}/init"]
        return command

    def _spawn(self, command, log, passed):
        with open(self.directory / log, "w") as output:
            child = subprocess.Popen(
                command,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[passed.fileno()],
                preexec_fn=die_with_parent,
                # Ctrl-C is for the runner: it decides what ends, and in which order.
                start_new_session=True,
            )
        self._children.append(child)

    def wait_ready(self):
        deadline = time.monotonic() + BOOT_SECONDS
        greeting = b""
        while greeting != b"ready\n":
            left = deadline - time.monotonic()
            if left <= 0:
                raise HostError(f"the emulated host did not boot within {BOOT_SECONDS} s{self.last_words()}")
            if select.select([self.channel], [], [], min(left, 1))[0]:
                byte = self.channel.recv(1)
                if not byte:
                    raise HostError(f"the emulated host ended while it booted{self.last_words()}")
                greeting += byte
            elif self._children[0].poll() is not None:
                raise HostError(f"virtiofsd ended while the host booted{self.last_words()}")

    def last_words(self):
        """The end of what the host's kernel and the programs under it have said."""
        text = ""
        for name in ("virtiofsd.log", "qemu.log", "console.log"):
            try:
                lines = (self.directory / name).read_text(errors="replace").splitlines()
            except OSError:
                continue
            if name == "virtiofsd.log":
                lines = [line for line in lines if "rror" in line]
            if name == "qemu.log" and not self.mended:
                lines.append("(this QEMU is not known to kvm_host/mend.py: it may hang a guest now and then)")
            if lines:
                text += f"\n--- {name} (end)\n" + "\n".join(_end(lines))
        return text

    def close(self):
        """Ends everything at once; the jobs' output is in files by then."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()
