"""One command on an emulated host: its environment, its streams, its end.

The command's streams are files in the job's directory, which both sides see: binary-clean, and still
there when the host dies. The channel carries only the news.
"""

import os
import re
import select
import shlex
import shutil
import stat
import sys
import time
import urllib.parse
import uuid

from .errors import TIMED_OUT, HostError

POLL_SECONDS = 0.02
# From `stop` to the report: two seconds of SIGTERM inside, and the way out.
STOP_SECONDS = 10
# QEMU 7.2 changes its note of what interrupts wait, at each entry to a guest and each exit from it, without a lock against its own main
# loop, and now and then loses the timer's: a host that is idle then has nothing to wake it, ever. Any other interrupt makes up for it.
TICK_SECONDS = 1
CHUNK = 1 << 18
ENDED = "the emulated host has ended under the command"

# What means something only to the processes of this machine.
NOT_PASSED = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CARGO_MAKEFLAGS", "SHLVL", "_", "OLDPWD", "PWD"}


def environment(mode, tree):
    """The caller's environment, as the command inside will have it."""
    passed = {name: value for name, value in os.environ.items() if name not in NOT_PASSED}
    passed["KRX_KVM_HOST_INSIDE"] = mode
    # For modprobe(8) where the machine has no /lib/modules.
    passed["MODPROBE_OPTIONS"] = f"-d {tree}"
    return passed


class Job:
    def __init__(self, directory, command, shape, tree):
        self.name = uuid.uuid4().hex[:12]
        self.path = directory / "jobs" / self.name
        self.path.mkdir()
        self.is_counted = shape.icount
        (self.path / "run").write_bytes(self._script(command, environment(shape.mode, tree)))
        for name in ("stdout", "stderr"):
            (self.path / name).touch()
        self._merged = _same_stream(1, 2)
        self._open_stdin()
        self._sent = {1: 0, 2: 0}

    def _script(self, command, variables):
        mask = os.umask(0)
        os.umask(mask)
        lines = [f"cd {shlex.quote(os.getcwd())} || exit 125", f"umask {mask:03o}"]
        for name, value in variables.items():
            # The rest could not be said in sh, and is not seen by most programs.
            if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                lines.append(f"export {name}={shlex.quote(value)}")
        lines.append("exec " + shlex.join(command))
        return os.fsencode("\n".join(lines) + "\n")

    def _open_stdin(self):
        """Decides what stdin is; a pipe is copied while the host boots and while the job runs."""
        self._stdin = None
        self._stdin_size = 0
        self._kind = "null"
        try:
            mode = os.fstat(0).st_mode
        except OSError:
            return
        if stat.S_ISREG(mode):
            self._kind = "file"
            with open(self.path / "stdin", "wb") as copy, open(0, "rb", closefd=False) as source:
                shutil.copyfileobj(source, copy)
        elif stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            self._kind = "stream"
            self._stdin = open(self.path / "stdin", "wb", buffering=0)

    def take_stdin(self):
        """Copies what is there; True while there may be more."""
        if self._stdin is None:
            return False
        while select.select([0], [], [], 0)[0]:
            data = os.read(0, CHUNK)
            if not data:
                self._end_stdin()
                return False
            self._stdin.write(data)
            self._stdin_size += len(data)
        return True

    def _end_stdin(self):
        self._stdin.close()
        self._stdin = None
        end = self.path / "stdin.new"
        end.write_text(f"{self._stdin_size}\n")
        end.rename(self.path / "stdin.eof")

    def prepare(self):
        """The last thing before `run`."""
        more = self.take_stdin()
        if more and self.is_counted:
            self._end_stdin()
            print("kvm-host: stdin is still open: a counted job gets what was there", file=sys.stderr)
        kind = self._kind + ("+merged" if self._merged else "+")
        (self.path / "kind").write_text(kind + "\n")

    def pump(self):
        """Copies new output to the runner's own stdout and stderr; True if there was any."""
        return any([self._pump(1, "stdout"), self._pump(2, "stderr")])

    def _pump(self, fd, name):
        moved = False
        with open(self.path / name, "rb") as source:
            source.seek(self._sent[fd])
            while data := source.read(CHUNK):
                self._sent[fd] += len(data)
                moved = True
                while data:
                    data = data[os.write(fd, data) :]
        return moved

    def remove(self):
        shutil.rmtree(self.path, ignore_errors=True)


def _same_stream(one, other):
    """`2>&1`: then the command gets one pipe for both, which keeps the order of what it says."""
    try:
        one, other = os.fstat(one), os.fstat(other)
    except OSError:
        return False
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def follow(job, host, timeout):
    """Runs a prepared job to its end and returns its exit status."""
    try:
        return _follow(job, host, timeout)
    except HostError:
        # What it said before the end may be the best hint.
        job.pump()
        raise


def _follow(job, host, timeout):
    host.send(f"run {job.name}")
    deadline = time.monotonic() + timeout
    tick = time.monotonic() + TICK_SECONDS
    stopped = None
    while True:
        job.take_stdin()
        busy = job.pump()
        for words in host.receive(0 if busy else POLL_SECONDS):
            if words[:2] == ["exit", job.name]:
                job.pump()
                return _status(int(words[2]), stopped, timeout)
        now = time.monotonic()
        if now >= tick and not job.is_counted:
            host.send(f"tick {job.name}")
            tick = now + TICK_SECONDS
        if stopped is None and now >= deadline:
            stopped = now
            host.send(f"stop {job.name}")
        elif stopped and now >= stopped + STOP_SECONDS:
            job.pump()
            print(f"kvm-host: no end after {timeout:g} s, and the host does not answer", file=sys.stderr)
            return TIMED_OUT


def _status(status, stopped, timeout):
    if stopped is None:
        return status
    print(f"kvm-host: stopped after {timeout:g} s (--timeout)", file=sys.stderr)
    return TIMED_OUT


class Channel:
    """Lines to and from the host's PID 1, directly or through a resident host's keeper."""

    def __init__(self, sock, last_words):
        self._socket = sock
        self._last_words = last_words
        self._buffer = b""

    def send(self, line):
        try:
            self._socket.sendall(line.encode() + b"\n")
        except OSError as error:
            raise HostError(ENDED + self._last_words()) from error

    def receive(self, seconds):
        """The messages that arrive within the time, as lists of words."""
        if select.select([self._socket], [], [], seconds)[0]:
            try:
                data = self._socket.recv(CHUNK)
            except ConnectionError:
                data = b""
            if not data:
                raise HostError(ENDED + self._last_words())
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        messages = [line.decode(errors="replace").split() for line in lines]
        for words in messages:
            if words[:1] == ["gone"]:
                raise HostError(ENDED + urllib.parse.unquote("".join(words[1:])))
        return messages
