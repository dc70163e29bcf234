"""The command line: chooses the host and runs the command on it."""

import argparse
import os
import signal
import sys

from . import native, resident, setup
from .errors import HOST_FAILED, HostError, Interrupted
from .job import Channel, Job, follow
from .machine import Machine, Shape

USAGE = "kvm-host [OPTION]... [--] COMMAND [ARGUMENT]..."


def main(arguments):
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        return run(options)
    except HostError as error:
        print(f"kvm-host: {error}", file=sys.stderr)
        return HOST_FAILED
    except Interrupted as signalled:
        return 128 + signalled.number
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


def interrupt(number, _frame):
    # One is enough: what follows is the clean-up, which is short and must be whole.
    for further in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(further, signal.SIG_IGN)
    raise Interrupted(number)


def parse(arguments):
    parser = argparse.ArgumentParser("kvm-host", USAGE, __doc__, allow_abbrev=False)
    parser.add_argument("--icount", action="store_true", help="count instructions as time, on a host of its own")
    parser.add_argument("--plugin", default="", metavar="FILE[,...]", help="of QEMU's TCG, for a host of its own")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds for the command (600)")
    parser.add_argument("--memory", type=int, metavar="MIB", help="memory of the emulated host (4096)")
    parser.add_argument("--cpus", type=int, metavar="N", help="CPUs of the emulated host (1)")
    parser.add_argument("--private", action="store_true", help="do not use the resident host")
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("--start", action="store_true", help="start a resident host for the commands to come")
    verbs.add_argument("--stop", action="store_true", help="end the resident host")
    verbs.add_argument("--which", action="store_true", help="say where a command would run")
    verbs.add_argument("--install", action="store_true", help="install the Debian packages that are missing")
    parser.add_argument("--while", type=int, dest="companion", metavar="PID", help="--start: end with this process")
    parser.add_argument("--idle", type=float, default=300, metavar="S", help="--start: end after S idle seconds (300)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    verbs.add_argument("--missing", action="store_true", help="name the Debian packages that are missing")
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not (options.command or options.start or options.stop or options.which or options.install or options.missing):
        parser.error("a command is needed")
    return options


def shape_of(options):
    shape = Shape(icount=options.icount, plugin=options.plugin)
    shape.memory = options.memory or shape.memory
    shape.cpus = options.cpus or shape.cpus
    return shape


def run(options):
    if options.install:
        setup.install_packages()
        return 0
    if options.missing:
        print(" ".join(setup.missing_packages()))
        return 0
    if options.stop:
        return resident.stop()
    here = native.runs_here(options.icount)
    if options.which:
        print("native" if here else "resident" if resident.is_running() else "emulated")
        return 0
    if options.start:
        return 0 if here else resident.start(shape_of(options), options.idle, options.companion)
    if here:
        return native.run(options.command, options.timeout)
    own = options.private or options.plugin or options.icount or options.memory or options.cpus
    if not own:
        keeper = resident.connect()
        if keeper:
            return run_on_resident(options, keeper)
    return run_on_own(options)


def run_on_own(options):
    machine = Machine(shape_of(options))
    try:
        job = Job(machine.directory, options.command, machine.shape, machine.kernel.tree)
        machine.wait_ready()
        job.prepare()
        return follow(job, Channel(machine.channel, machine.last_words), options.timeout)
    finally:
        machine.close()


def run_on_resident(options, keeper):
    job = Job(keeper.directory, options.command, Shape(), setup.kernel().tree)
    try:
        job.prepare()
        return follow(job, Channel(keeper.socket, str), options.timeout)
    finally:
        keeper.socket.close()
        job.remove()
