"""Runs as a container's process and compares what it sees with the bundle's config.json, which lies beside it.

Says "not ok WHAT: ..." for each difference and at last how many comparisons there were. What it knows of the runtime specification and of
Linux it knows by itself: nothing of krx.
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import signal
import stat
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
LIBC = ctypes.CDLL(None, use_errno=True)

CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE"
    " NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN"
    " SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE"
    " MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()
POLICIES = {"SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_IDLE": 5}
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
# x86-64's numbers of those that profiles of the tests speak of; called with nonsense, each has an errno of its own. The last two look at
# one argument alone, so that the others can be anything.
CALLS = {"mkdirat": 258, "syslog": 103, "acct": 163, "sched_get_priority_max": 146, "sched_get_priority_min": 147}
OPERATORS = {
    "SCMP_CMP_NE": lambda seen, value, _: seen != value,
    "SCMP_CMP_LT": lambda seen, value, _: seen < value,
    "SCMP_CMP_LE": lambda seen, value, _: seen <= value,
    "SCMP_CMP_EQ": lambda seen, value, _: seen == value,
    "SCMP_CMP_GE": lambda seen, value, _: seen >= value,
    "SCMP_CMP_GT": lambda seen, value, _: seen > value,
    "SCMP_CMP_MASKED_EQ": lambda seen, mask, value: seen & mask == value,
}
# Nodes, links and their targets that every container has ("Default Devices").
NODES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"}

comparisons = 0


def same(what, wanted, seen):
    global comparisons
    comparisons += 1
    if wanted != seen:
        print(f"not ok {what}: the bundle says {wanted!r}, it is {seen!r}")


def read(path):
    with open(path) as file:
        return file.read().strip()


def status():
    return dict(line.split(":", 1) for line in read("/proc/self/status").splitlines())


def check_process(process):
    same("process.args", process["args"], sys.orig_argv)
    with open("/proc/self/environ") as file:
        seen = file.read().split("\0")[:-1]
    if not any(variable.startswith("HOME=") for variable in process.get("env", [])):
        # As runc adds it.
        seen = [variable for variable in seen if not variable.startswith("HOME=")]
    same("process.env", process.get("env", []), seen)
    same("process.cwd", process["cwd"], os.getcwd())
    user = process.get("user", {})
    same("process.user.uid", (user.get("uid", 0),) * 3, os.getresuid())
    same("process.user.gid", (user.get("gid", 0),) * 3, os.getresgid())
    same("process.user.additionalGids", sorted(user.get("additionalGids", [])), sorted(os.getgroups()))
    same("process.user.umask", user.get("umask", 0o022), os.umask(0))
    same("process.terminal", process.get("terminal", False), os.isatty(1))
    for limit in process.get("rlimits", []):
        # RLIM_INFINITY is -1 in Python.
        seen = tuple(value % 2**64 for value in resource.getrlimit(getattr(resource, limit["type"])))
        same(f"process.rlimits {limit['type']}", (limit["soft"], limit["hard"]), seen)
    if "oomScoreAdj" in process:
        same("process.oomScoreAdj", process["oomScoreAdj"], int(read("/proc/self/oom_score_adj")))
    same("process.noNewPrivileges", process.get("noNewPrivileges", False), int(status()["NoNewPrivs"]) == 1)
    check_scheduling(process)
    check_capabilities(process.get("capabilities", {}), user.get("uid", 0))


def check_scheduling(process):
    wanted = process.get("scheduler", {"policy": "SCHED_OTHER"})
    same("process.scheduler.policy", POLICIES[wanted["policy"]], os.sched_getscheduler(0))
    same("process.scheduler.priority", wanted.get("priority", 0), os.sched_getparam(0).sched_priority)
    if wanted["policy"] in ("SCHED_OTHER", "SCHED_BATCH"):
        same("process.scheduler.nice", wanted.get("nice", 0), os.getpriority(os.PRIO_PROCESS, 0))
    if "ioPriority" in process:
        wanted = process["ioPriority"]
        seen = LIBC.syscall(252, 1, 0)  # ioprio_get of this process
        same("process.ioPriority", (IO_CLASSES[wanted["class"]], wanted.get("priority", 0)), (seen >> 13, seen & 7))


def check_capabilities(wanted, uid):
    """What the exec makes of the sets is capabilities(7)'s "Transformation of capabilities during execve()"."""

    def asked(name):
        return {capability.removeprefix("CAP_") for capability in wanted.get(name, [])}

    seen_status = status()

    def seen(field):
        mask = int(seen_status[field], 16)
        return {name for bit, name in enumerate(CAPABILITIES) if mask >> bit & 1}

    ambient = asked("ambient")
    permitted = asked("inheritable") | asked("bounding") if uid == 0 else ambient
    same("process.capabilities.bounding", asked("bounding"), seen("CapBnd"))
    same("process.capabilities.inheritable", asked("inheritable"), seen("CapInh"))
    same("process.capabilities.ambient", ambient, seen("CapAmb"))
    same("process.capabilities.permitted", permitted, seen("CapPrm"))
    same("process.capabilities.effective", permitted, seen("CapEff"))


def check_names(config):
    for field in ("hostname", "domainname"):
        if field in config:
            same(field, config[field], read(f"/proc/sys/kernel/{field}"))


def unescape(text):
    for code in ("040", "011", "012", "134"):
        text = text.replace("\\" + code, chr(int(code, 8)))
    return text


def mounted():
    """By mount point, the last one of a place: options, propagation, type, options of the file system."""
    found = {}
    for line in read("/proc/self/mountinfo").splitlines():
        left, right = (part.split() for part in line.split(" - "))
        found[unescape(left[4])] = (left[5].split(","), left[6:], right[0], right[2].split(","))
    return found


FLAGS = {
    "ro": ("ro", True), "rw": ("rw", True), "nosuid": ("nosuid", True), "suid": ("nosuid", False), "nodev": ("nodev", True),
    "dev": ("nodev", False), "noexec": ("noexec", True), "exec": ("noexec", False), "noatime": ("noatime", True),
    "relatime": ("relatime", True), "strictatime": ("relatime", False), "nodiratime": ("nodiratime", True),
    "nosymfollow": ("nosymfollow", True), "rro": ("ro", True), "rnosuid": ("nosuid", True), "rnoexec": ("noexec", True),
}
PROPAGATION = ("shared", "rshared", "slave", "rslave", "private", "rprivate", "unbindable", "runbindable")


def check_mounts(mounts):
    found = mounted()
    for mount in mounts:
        where, options = mount["destination"], mount.get("options", [])
        name = f"mounts {where}"
        same(name, True, where in found)
        if where not in found:
            continue
        flags, propagation, kind, parameters = found[where]
        is_bind = mount.get("type") == "bind" or {"bind", "rbind"} & set(options)
        if not is_bind:
            same(f"{name} type", {"cgroup": "cgroup2"}.get(mount["type"], mount["type"]), kind)
        last = {FLAGS[option][0]: FLAGS[option][1] for option in options if option in FLAGS}
        if "ro" in last and "rw" in last:
            del last["ro" if [o for o in options if o in ("ro", "rw")][-1] == "rw" else "rw"]
        for flag, there in last.items():
            same(f"{name} {flag}", there, flag in flags)
        wanted = [option for option in options if option in PROPAGATION]
        if wanted:
            same(f"{name} propagation", wanted[-1].endswith("shared"), any(p.startswith("shared:") for p in propagation))
            same(f"{name} unbindable", wanted[-1].endswith("unbindable"), "unbindable" in propagation)
        for option in options:
            if mount.get("type") == "tmpfs" and option.startswith(("size=", "mode=", "nr_inodes=")):
                # The mode that a tmpfs has unasked is not shown.
                shown = option != "mode=1777"
                same(f"{name} {option}", shown, option.replace("mode=0", "mode=") in parameters)


def check_root(config):
    same("root.readonly", config["root"].get("readonly", False), bool(os.statvfs("/").f_flag & os.ST_RDONLY))


def check_hidden(linux):
    for path in linux.get("maskedPaths", []):
        if os.path.isdir(path):
            same(f"linux.maskedPaths {path}", [], os.listdir(path))
            same(f"linux.maskedPaths {path} read-only", True, bool(os.statvfs(path).f_flag & os.ST_RDONLY))
        elif os.path.exists(path):
            same(f"linux.maskedPaths {path}", "", read(path))
    for path in linux.get("readonlyPaths", []):
        if os.path.exists(path):
            same(f"linux.readonlyPaths {path}", True, bool(os.statvfs(path).f_flag & os.ST_RDONLY))


def check_devices(linux):
    for name, numbers in NODES.items():
        seen = os.stat(f"/dev/{name}")
        same(f"/dev/{name}", numbers, (os.major(seen.st_rdev), os.minor(seen.st_rdev)))
        with open(f"/dev/{name}", "rb") if name != "tty" else open("/dev/null") as node:
            node.read(1)
    for name, target in LINKS.items():
        same(f"/dev/{name}", target, os.readlink(f"/dev/{name}"))
    for device in linux.get("devices", []):
        seen, path = os.stat(device["path"]), device["path"]
        same(f"linux.devices {path} type", device["type"] in "cu", stat.S_ISCHR(seen.st_mode))
        if device["type"] == "b":
            # A disk has other numbers in here, and is known by what the tests wrote to it.
            same(f"linux.devices {path} is a disk", True, stat.S_ISBLK(seen.st_mode))
            with open(path, "rb") as disk:
                same(f"linux.devices {path} content", path.encode(), disk.read(len(path)))
        else:
            numbers = (os.major(seen.st_rdev), os.minor(seen.st_rdev))
            same(f"linux.devices {path}", (device["major"], device["minor"]), numbers)
        same(f"linux.devices {path} mode", device.get("fileMode", 0o666), stat.S_IMODE(seen.st_mode))
        same(f"linux.devices {path} owner", (device.get("uid", 0), device.get("gid", 0)), (seen.st_uid, seen.st_gid))


def check_namespaces(linux):
    own = {namespace["type"] for namespace in linux.get("namespaces", [])}
    same("namespace pid", "pid" in own, os.getpid() == 1)
    same("namespace cgroup", "cgroup" in own, read("/proc/self/cgroup") == "0::/")
    offsets = {line.split()[0]: line.split()[1:] for line in read("/proc/self/timens_offsets").splitlines()}
    for clock in ("monotonic", "boottime"):
        wanted = linux.get("timeOffsets", {}).get(clock, {})
        same(f"linux.timeOffsets.{clock}", [str(wanted.get("secs", 0)), str(wanted.get("nanosecs", 0))], offsets[clock])
    ahead = linux.get("timeOffsets", {}).get("boottime", {}).get("secs", 0)
    # The offsets of who follows and of this process itself are two things.
    same("clock of the time namespace", True, abs(time.clock_gettime(time.CLOCK_BOOTTIME) - ahead) < 1000)
    for name, value in linux.get("sysctl", {}).items():
        same(f"linux.sysctl {name}", value, read("/proc/sys/" + name.replace(".", "/")))
    if "personality" in linux:
        same("linux.personality", {"LINUX": 0, "LINUX32": 8}[linux["personality"]["domain"]], LIBC.personality(0xFFFFFFFF))


def mapped(linux, kind, outside):
    """The ID in here of one outside of the user namespace; nobody's has the overflow ID."""
    mappings = linux.get(kind, [{"containerID": 0, "hostID": 0, "size": 2**32 - 1}])
    found = [one["containerID"] + outside - one["hostID"] for one in mappings if 0 <= outside - one["hostID"] < one["size"]]
    return found[0] if found else 65534


def owner_of(namespace):
    """The inode of the user namespace that owns one of this process; None where it is out of reach."""
    with open(f"/proc/self/ns/{namespace}") as file:
        try:
            owner = fcntl.ioctl(file, 0xB701)  # NS_GET_USERNS
        except PermissionError:
            return None
    return os.fstat(owner).st_ino


def check_user_namespace(linux):
    for field in ("uid", "gid"):
        wanted = linux.get(f"{field}Mappings", [{"containerID": 0, "hostID": 0, "size": 2**32 - 1}])
        wanted = [[one["containerID"], one["hostID"], one["size"]] for one in wanted]
        seen = [[int(number) for number in line.split()] for line in read(f"/proc/self/{field}_map").splitlines()]
        same(f"linux.{field}Mappings", sorted(wanted), sorted(seen))
    same("setgroups", "allow", read("/proc/self/setgroups"))
    types = {namespace["type"] for namespace in linux.get("namespaces", [])}
    ours = os.stat("/proc/self/ns/user").st_ino
    if "user" in types:
        files = {"pid": "pid", "mount": "mnt", "uts": "uts", "ipc": "ipc", "cgroup": "cgroup", "time": "time"}
        for name, file in files.items():
            same(f"owner of the namespace {name}", name in types or name == "mount", owner_of(file) == ours)
        # The network is the machine's.
        same("owner of the namespace network", None, owner_of("net"))
    seen = os.stat("/usr/bin")
    same("owner of /usr/bin", (mapped(linux, "uidMappings", 0), mapped(linux, "gidMappings", 0)), (seen.st_uid, seen.st_gid))
    # What the tests put into a volume: a directory of the container's root, with a file of the host's.
    if os.path.isdir("/media/mapped"):
        seen = os.stat("/media/mapped")
        same("owner of a volume", (0, 0), (seen.st_uid, seen.st_gid))
        with open("/media/mapped/made", "w") as file:
            file.write("by root")
        same("owner of a new file", os.geteuid(), os.stat("/media/mapped/made").st_uid)
        for change in (lambda: open("/media/mapped/foreign", "w"), lambda: os.chown("/media/mapped/foreign", 0, 0)):
            try:
                change()
                same("file of the host's root", errno.EACCES, 0)
            except PermissionError as error:
                same("file of the host's root", True, error.errno in (errno.EACCES, errno.EPERM))
    for directory in ("/tmp", "/dev/shm", "/dev/mqueue"):
        if not os.path.isdir(directory) or os.statvfs(directory).f_flag & os.ST_RDONLY:
            continue
        path = f"{directory}/check"
        with open(path, "w") as file:
            same(f"owner in {directory}", os.geteuid(), os.fstat(file.fileno()).st_uid)
        os.unlink(path)
    with open("/dev/null", "w") as null:
        same("/dev/null", 4, null.write("void"))
    if os.isatty(0):
        same("terminal", (os.geteuid(), "/dev/pts/0"), (os.fstat(0).st_uid, os.ttyname(0)))
        same("/dev/console", os.fstat(0).st_rdev, os.stat("/dev/console").st_rdev)


def check_resources(wanted):
    # "/" in a cgroup namespace of its own.
    directory = "/sys/fs/cgroup" + read("/proc/self/cgroup").removeprefix("0::")

    def limit(file, value):
        same(f"linux.resources {file}", str(value), read(f"{directory}/{file}"))

    def bytes_or_max(value):
        return "max" if value < 0 else value

    memory, cpu = wanted.get("memory", {}), wanted.get("cpu", {})
    if "limit" in memory:
        limit("memory.max", bytes_or_max(memory["limit"]))
    if "reservation" in memory:
        limit("memory.low", memory["reservation"])
    if "swap" in memory and not os.path.exists(f"{directory}/memory.swap.max"):
        # Where there is no swap, any limit of it is kept.
        same("swap", "0", dict(line.split()[:2] for line in read("/proc/meminfo").splitlines())["SwapTotal:"])
    elif "swap" in memory:
        limit("memory.swap.max", bytes_or_max(memory["swap"] - memory["limit"]))
    if "shares" in cpu:
        limit("cpu.weight", 1 + (cpu["shares"] - 2) * 9999 // 262142)
    if "quota" in cpu:
        limit("cpu.max", f"{bytes_or_max(cpu['quota'])} {cpu.get('period', 100000)}")
    files = {"cpus": "cpuset.cpus", "mems": "cpuset.mems", "burst": "cpu.max.burst", "idle": "cpu.idle"}
    for name in files.keys() & cpu.keys():
        limit(files[name], cpu[name])
    if "limit" in wanted.get("pids", {}):
        limit("pids.max", bytes_or_max(wanted["pids"]["limit"]))
    for file, value in wanted.get("unified", {}).items():
        limit(file, value)


def check_seccomp(linux):
    profile = linux.get("seccomp")
    same("linux.seccomp", 2 if profile else 0, int(status()["Seccomp"]))
    for rule in profile["syscalls"] if profile else []:
        for name in CALLS.keys() & rule["names"]:
            for arguments in worth_trying(rule):
                wanted, seen = outcome(decides(profile, name, arguments)), call(name, arguments)
                what = f"linux.seccomp {name}{arguments if rule.get('args') else ''}"
                if wanted is None:
                    # By the kernel, whatever it says: no rule's.
                    same(f"{what} let through", False, seen in {outcome(rule) for rule in profile["syscalls"]})
                else:
                    same(what, wanted, seen)


def worth_trying(rule):
    """Arguments about each value that a rule compares with, in the lower and the upper half, where all others hold and where none does."""
    calls = [[2**64 - 1] * 6, [0] * 6]
    for held in [[0] * 6, [condition_met(rule, index) for index in range(6)]]:
        for condition in rule.get("args", []):
            for value in {condition["value"], condition.get("valueTwo", 0)}:
                for tried in (value - 1, value, value + 1, value + 2**32, value ^ 2**63):
                    calls.append(list(held))
                    calls[-1][condition["index"]] = tried % 2**64
    return [tuple(arguments) for arguments in calls] if rule.get("args") else [(2**64 - 1,) * 6]


def condition_met(rule, index):
    """A value for which a condition of that argument holds."""
    for condition in rule.get("args", []):
        value, two = condition["value"], condition.get("valueTwo", 0)
        for tried in (value, two, value + 1, value - 1, 0):
            if condition["index"] == index and OPERATORS[condition["op"]](tried % 2**64, value, two):
                return tried % 2**64
    return 0


def decides(profile, name, arguments):
    """The rule for a call: of libseccomp's an unconditional one before others, and of those the first that holds."""

    def holds(rule):
        by_index = {}
        for condition in rule.get("args", []):
            seen = arguments[condition["index"]]
            held = OPERATORS[condition["op"]](seen, condition["value"], condition.get("valueTwo", 0))
            by_index.setdefault(condition["index"], []).append(held)
        return all(any(held) for held in by_index.values())

    rules = [rule for rule in profile["syscalls"] if name in rule["names"] and holds(rule)]
    rules.sort(key=lambda rule: bool(rule.get("args")))
    return rules[0] if rules else {"action": profile["defaultAction"]}


def outcome(rule):
    """The errno by which an action shows, or the signal; None for what the kernel goes on with."""
    return {
        "SCMP_ACT_ERRNO": rule.get("errnoRet", 1), "SCMP_ACT_TRACE": errno.ENOSYS, "SCMP_ACT_TRAP": "SIGSYS", "SCMP_ACT_KILL": "SIGSYS",
        "SCMP_ACT_KILL_THREAD": "SIGSYS", "SCMP_ACT_KILL_PROCESS": "SIGSYS", "SCMP_ACT_LOG": None, "SCMP_ACT_ALLOW": None,
    }[rule["action"]]


def call(name, arguments):
    """What becomes of a process that makes a call: its errno, 0, or the signal that ended it."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        failed = LIBC.syscall(CALLS[name], *map(ctypes.c_ulong, arguments)) < 0
        os.write(its, str(ctypes.get_errno() if failed else 0).encode())
        os._exit(0)
    os.close(its)
    with open(ours) as pipe:
        said = pipe.read()
    ended = os.waitpid(child, 0)[1]
    return signal.Signals(os.WTERMSIG(ended)).name if os.WIFSIGNALED(ended) else int(said)


def check_hooks(config):
    """Hooks of the tests keep what they have read in /tmp/NAME-INDEX."""
    for name, when in (("createContainer", "creating"), ("startContainer", "created")):
        for index, _ in enumerate(config.get("hooks", {}).get(name, [])):
            path = f"/tmp/{name}-{index}"
            same(f"hooks.{name}[{index}]", True, os.path.exists(path))
            if os.path.exists(path):
                state = json.loads(read(path))
                same(f"hooks.{name} status", when, state["status"])
                same(f"hooks.{name} annotations", config.get("annotations", {}), state["annotations"])
                same(f"hooks.{name} pid", os.getpid(), state["pid"])
                same(f"hooks.{name} state", True, state["ociVersion"].startswith("1.") and {"id", "bundle"} <= set(state))


def main():
    with open(f"{HERE}/config.json") as file:
        config = json.load(file)
    linux = config.get("linux", {})
    check_process(config["process"])
    check_names(config)
    check_mounts(config.get("mounts", []))
    check_root(config)
    check_hidden(linux)
    check_devices(linux)
    check_namespaces(linux)
    check_user_namespace(linux)
    check_resources(linux.get("resources", {}))
    check_seccomp(linux)
    check_hooks(config)
    print(f"{comparisons} comparisons")


main()
