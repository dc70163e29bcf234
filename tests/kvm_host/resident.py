"""A host that stays for several commands, and its keeper.

The keeper is a process of its own, which owns the machine and relays lines between the runners and the
host's PID 1. It ends when it is told to, when nobody asked anything of it for a while, when the process
that it was started for ends, or with its host. A runner that goes away takes its job with it.
"""

import contextlib
import fcntl
import json
import os
import select
import selectors
import shutil
import signal
import socket
import time
import urllib.parse
from pathlib import Path

from . import setup
from .errors import HostError, Interrupted
from .machine import Machine

# How long runners may take to fetch the last output after the host's end.
FAREWELL_SECONDS = 5
STOP_SECONDS = 10


def _note():
    """The file that says where the keeper listens."""
    return setup.cache_dir() / "resident.json"


class Connection:
    """The keeper, as a runner sees it."""

    def __init__(self, sock, directory):
        self.socket = sock
        self.directory = directory


def connect():
    """The way to the resident host, or None where none runs."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        note = json.loads(_note().read_text())
        sock.connect(note["socket"])
    except (OSError, ValueError, KeyError):
        sock.close()
        return None
    return Connection(sock, Path(note["directory"]))


def is_running():
    connection = connect()
    if connection:
        connection.socket.close()
    return connection is not None


def stop():
    """Ends the resident host, if there is one, and waits for its end."""
    connection = connect()
    if connection:
        with connection.socket as sock, contextlib.suppress(OSError):
            sock.sendall(b"shutdown\n")
            sock.settimeout(STOP_SECONDS)
            while sock.recv(4096):
                pass
    return 0


def start(shape, idle, companion):
    """Returns when the resident host takes commands."""
    cache = setup.cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "resident.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_running():
            return 0
        return _start(shape, idle, companion, lock)


def _start(shape, idle, companion, lock):
    pidfd = None
    if companion is not None:
        try:
            pidfd = os.pidfd_open(companion)
        except OSError as error:
            raise HostError(f"process {companion} of --while: {error.strerror}") from error
    news, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(news)
        lock.close()
        os._exit(_keep(shape, idle, pidfd, told))
    os.close(told)
    try:
        with open(news) as report:
            said = report.read()
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if said != "ready":
        os.waitpid(child, 0)
        raise HostError(said or "the keeper of the resident host ended early")
    return 0


def _keep(shape, idle, pidfd, told):
    """The keeper's whole life, from the fork on."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    try:
        machine = Machine(shape)
        try:
            machine.wait_ready()
            Keeper(machine, idle, pidfd).serve(told)
        finally:
            _note().unlink(missing_ok=True)
            machine.close()
        return 0
    except HostError as error:
        with contextlib.suppress(OSError):
            os.write(told, str(error).encode())
        return 1
    except Interrupted as signalled:
        return 128 + signalled.number


class Keeper:
    def __init__(self, machine, idle, pidfd):
        self._machine = machine
        self._idle = idle
        self._owners = {}  # job name -> the runner's socket, or None for a job whose runner is gone
        self._buffers = {}  # socket -> the start of a line
        self._end = False
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(machine.directory / "keeper.sock"))
        self._listener.listen(64)
        self._watch(self._listener, self._accept)
        self._watch(machine.channel, self._from_host)
        if pidfd is not None:
            self._watch(pidfd, self._finish)

    def _watch(self, source, action):
        self._selector.register(source, selectors.EVENT_READ, action)

    def serve(self, told):
        note = _note()
        new = note.with_suffix(".new")
        new.write_text(
            json.dumps({"socket": str(self._machine.directory / "keeper.sock"), "directory": str(self._machine.directory)})
        )
        new.rename(note)
        os.write(told, b"ready")
        os.close(told)
        used = time.monotonic()
        while not self._end:
            events = self._selector.select(1)
            for key, _ in events:
                key.data(key.fileobj)
            if events or self._owners:
                used = time.monotonic()
            elif time.monotonic() > used + self._idle:
                self._end = True

    def _finish(self, _pidfd):
        self._end = True

    def _accept(self, listener):
        runner, _ = listener.accept()
        self._buffers[runner] = b""
        self._watch(runner, self._from_runner)

    def _lines(self, source):
        """Complete lines that have arrived, or None at the end."""
        try:
            data = source.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            return None
        *lines, self._buffers[source] = (self._buffers.get(source, b"") + data).split(b"\n")
        return [line.decode(errors="replace").split() for line in lines]

    def _from_runner(self, runner):
        lines = self._lines(runner)
        if lines is None:
            self._drop(runner)
            return
        for words in lines:
            if words == ["shutdown"]:
                self._end = True
            elif len(words) == 2:
                if words[0] == "run":
                    self._owners[words[1]] = runner
                self._to_host(*words)

    def _drop(self, runner):
        self._selector.unregister(runner)
        runner.close()
        del self._buffers[runner]
        for name, owner in self._owners.items():
            if owner is runner:
                self._owners[name] = None
                self._to_host("stop", name)

    def _to_host(self, verb, name):
        with contextlib.suppress(OSError):
            self._machine.channel.sendall(f"{verb} {name}\n".encode())

    def _from_host(self, channel):
        lines = self._lines(channel)
        if lines is None:
            self._farewell()
            return
        for words in lines:
            if words[:1] != ["exit"] or len(words) != 3:
                continue
            runner = self._owners.pop(words[1], None)
            if runner is None:
                shutil.rmtree(self._machine.directory / "jobs" / words[1], ignore_errors=True)
            else:
                self._tell(runner, " ".join(words))

    def _tell(self, runner, line):
        with contextlib.suppress(OSError):
            runner.sendall(line.encode() + b"\n")

    def _farewell(self):
        """The host has died: says so with its last words, and lets the runners read what is left."""
        self._end = True
        _note().unlink(missing_ok=True)
        words = urllib.parse.quote(self._machine.last_words())
        waiting = [runner for runner in self._owners.values() if runner]
        for runner in waiting:
            self._tell(runner, f"gone {words}")
        deadline = time.monotonic() + FAREWELL_SECONDS
        while waiting and time.monotonic() < deadline:
            for runner in select.select(waiting, [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    if runner.recv(4096):
                        continue
                waiting.remove(runner)
