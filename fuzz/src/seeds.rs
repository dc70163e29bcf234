//! Where the fuzzers start: inputs that get far, made here rather than kept as files, so that they can be read.

use krx_proto::{Call, GuestInfo, Message, Request, VERSION};

/// Guest memory of the device targets.
pub const MEMORY: usize = 4 << 20;
/// Where the memory of the `klog` target is written.
pub const LOG_MEMORY: u64 = 0x10_0000;

/// Where the seeds put the rings of a queue: descriptors, 0x4000 behind them what is available, 0x8000 what is used.
#[must_use]
pub fn ring(queue: u8) -> u64 {
    0x1_0000 * (u64::from(queue % 4) + 1)
}

/// The seeds of a target.
///
/// # Panics
/// For a name that is no target's.
#[must_use]
pub fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "mmio_rng" => vec![rng()],
        "mmio_block" => block(),
        "mmio_vsock" => vsock(),
        "mmio_fs" => fs(),
        "mmio_net" => net(),
        "mmio_net_control" => net_control(),
        "vmm_config" => texts(&[
            r#"{"kernel":"/k","memory_mib":128,"vcpus":1}"#,
            r#"{"kernel":"/k","initramfs":"/i","cmdline":"a=b","memory_mib":4096,"vcpus":8,"console":true,
               "share":{"root":"/r","entries":[{"name":"rootfs","source":"/x","read_only":true}]},
               "vsock":"/v","net":[{"tap_fd":6,"mac":"02:00:00:00:00:01","mtu":9000}],"control":"/c","lifeline_fd":5,"state_dir":"/s","boot_timeout_ms":1000}"#,
        ]),
        "kernel" => vec![elf(2, 0x10_0000, 64), elf(1, 0x10_0000, 64), elf(2, u64::MAX - 8, 64), bzimage()],
        "klog" => vec![log()],
        "agent_frames" => frames(),
        "bundle" => texts(&[
            BUNDLE,
            CONFINED,
            TIMED,
            MAPPED,
            REFUSED,
            PROCESS,
            RESOURCES,
            r#"{"ociVersion":"1.2.0"}"#,
        ]),
        "image_archive" => vec![
            tar(&[
                (b'0', "manifest.json", DOCKER_IMAGES),
                (b'2', "l", "manifest.json"),
                (b'0', "c.json", "{}"),
            ]),
            tar(&[(b'0', "index.json", IMAGE_INDEX), (b'0', "blobs/sha256/x", "{}")]),
        ],
        "image_layer" => vec![
            tar(&[
                (b'5', "d/", ""),
                (b'0', "d/f", "data"),
                (b'2', "l", "d"),
                (b'1', "h", "d/f"),
                (b'6', "p", ""),
            ]),
            tar(&[
                (b'2', "up", ".."),
                (b'0', "up/secret", "mine"),
                (b'0', "d/.wh.f", ""),
                (b'0', ".wh..wh..opq", ""),
            ]),
            tar(&[(b'x', "e", "18 path=some/file\n12 uid=1000\n20 mtime=-1.250000\n"), (b'0', "f", "x")]),
            tar(&[
                (b'L', "e", "a/long/name"),
                (b'0', "f", "x"),
                (b'0', "../up", ""),
                (b'1', "s", "../../secret"),
            ]),
        ],
        "settings" => {
            texts(&[include_str!("../../dist/config.toml"), SETTINGS, "vm = {cpus = 2, console = true}\n"])
        }
        "annotations" => texts(&[
            "io.krx.memory=1G\nio.krx.cpus=2\nio.krx.kernel-args=quiet\nio.krx.console-log=true\n",
            "io.kubernetes.cri.sandbox-memory=1073741824\nio.kubernetes.cri.sandbox-cpu-period=100000\n\
             io.kubernetes.cri.sandbox-cpu-quota=150000\nio.kubernetes.cri.sandbox-cpu-shares=102\n",
            "io.krx.colour=red\n",
        ]),
        "shim_config" => texts(&[BUNDLE, CONFINED, MEMBER]),
        "pod_sandbox_config" => vec![pod_sandbox_config(), Vec::new()],
        "log_uri" => texts(&[
            "/run/containerd/fifo/1/c-stdout",
            "file:///var/log/c%20d.log?truncate=1#end",
            "binary:///usr/bin/logger?tag=a+b&-f=%2fx&tag=again&=",
            "binary:///bin/sh?-c=%zz",
            "npipe://./pipe/x",
        ]),
        "timings_request" => texts(&[
            "\u{7f}GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "\0GET /metrics?a=b HTTP/1.0\r\n\r\nmore",
            "\u{7f}PUT / HTTP/1.0\r\n\r\n",
            "\u{10}GET  /metrics HTTP/1.0\n\n",
        ]),
        other => panic!("no target {other}"),
    }
}

/// An archive of entries: type, name, and what they hold, or lead to.
fn tar(entries: &[(u8, &str, &str)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (kind, name, content) in entries {
        let mut header = [0; 512];
        let is_link = matches!(kind, b'1' | b'2');
        let data = if is_link { "" } else { content };
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, "0000644");
        put(124, &format!("{:011o}", data.len()));
        put(148, "        ");
        put(257, "ustar");
        put(263, "00");
        if is_link {
            put(157, content);
        }
        header[156] = *kind;
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        archive.extend(header);
        archive.extend(data.as_bytes());
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

const SETTINGS: &str = "[guest]\nkernel = '/k'\ninitramfs = \"\"\nkernel_args = 'quiet'\n[vm]\nmemory_mib = 512\noverhead_mib = 32\n\
cpus = 2\nmax_memory_mib = 1024\nmax_cpus = 4\nboot_timeout_s = 5\nconsole = true\n[vmm]\npath = '/v'\n[annotations]\n\
allow = ['io.krx.kernel-args']\n[log]\nlevel = 'debug'\n";

const BUNDLE: &str = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs","readonly":true},"hostname":"h",
"process":{"args":["sh"],"cwd":"/","env":["A=b"],"user":{"uid":1,"gid":2,"additionalGids":[3],"umask":18},
"capabilities":{"bounding":["CAP_KILL"],"effective":[],"permitted":[]},"noNewPrivileges":true,"terminal":true,
"consoleSize":{"height":24,"width":80},"rlimits":[{"type":"RLIMIT_NOFILE","hard":9,"soft":8}]},
"mounts":[{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec"]},
{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["mode=755","size=65536k"]},
{"destination":"/data","type":"bind","source":"/tmp","options":["rbind","ro"]}],
"linux":{"namespaces":[{"type":"pid"},{"type":"mount"}],"maskedPaths":["/proc/kcore"],
"readonlyPaths":["/proc/sys"],"sysctl":{"net.ipv4.ip_forward":"1"},"rootfsPropagation":"private"}}"#;

const MEMBER: &str = r#"{"ociVersion":"1.2.0","annotations":{"io.kubernetes.cri.container-type":"container",
"io.kubernetes.cri.sandbox-id":"p","io.kubernetes.cri.sandbox-cpu-quota":"50000","io.kubernetes.cri.sandbox-cpu-period":"100000"},
"linux":{"cgroupsPath":"a.slice:b:c","namespaces":[{"type":"network","path":"/run/netns/x"}]}}"#;

const DOCKER_IMAGES: &str = r#"[{"Config":"c.json","RepoTags":["a:1"],"Layers":["l"]}]"#;
const IMAGE_INDEX: &str = r#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",
    "digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}]}"#;
const CONFINED: &str = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},
"process":{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0},"apparmorProfile":"unconfined","oomScoreAdj":5},
"linux":{"namespaces":[{"type":"network"},{"type":"ipc","path":"/proc/7/ns/ipc"},{"type":"uts"}],
"devices":[{"path":"/dev/null","type":"c","major":1,"minor":3,"fileMode":438,"uid":0,"gid":0}],
"resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":136,"access":"rw"}],
"memory":{"limit":1048576,"swap":2097152,"reservation":4096},"cpu":{"shares":1024,"quota":5000,"period":10000,"cpus":"0-1"},
"pids":{"limit":9},"hugepageLimits":[{"pageSize":"2MB","limit":0}],"unified":{"memory.oom.group":"1"}},
"seccomp":{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,"architectures":["SCMP_ARCH_X86_64"],
"flags":["SECCOMP_FILTER_FLAG_LOG"],"syscalls":[{"names":["read","write"],"action":"SCMP_ACT_ALLOW"},
{"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
{"names":["socket"],"action":"SCMP_ACT_KILL","args":[{"index":0,"value":40,"op":"SCMP_CMP_GT"},
{"index":0,"value":4,"op":"SCMP_CMP_LE"}]},{"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}}}"#;
const TIMED: &str = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},"hostname":"h","domainname":"d","annotations":{"a":"b"},
"process":{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0},"scheduler":{"policy":"SCHED_FIFO","priority":3,"flags":["SCHED_FLAG_RECLAIM"]},
"ioPriority":{"class":"IOPRIO_CLASS_BE","priority":4},"execCPUAffinity":{"initial":"0","final":"0-1"}},
"hooks":{"createContainer":[{"path":"/h","args":["h"],"env":["A=1"],"timeout":5}],"startContainer":[{"path":"/s"}]},
"linux":{"namespaces":[{"type":"uts"},{"type":"time"},{"type":"user"}],"uidMappings":[{"containerID":0,"hostID":100000,"size":65536}],
"gidMappings":[{"containerID":0,"hostID":100000,"size":1000},{"containerID":1000,"hostID":7,"size":1}],"timeOffsets":{"monotonic":{"secs":-1,"nanosecs":5},"boottime":{"secs":7}},
"personality":{"domain":"LINUX32"}}}"#;
const MAPPED: &str = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},
"process":{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0},"capabilities":{"inheritable":["CAP_KILL"],"ambient":["CAP_KILL"]}},
"mounts":[{"destination":"/a","type":"bind","source":"/tmp","options":["rbind","ridmap"],
"uidMappings":[{"containerID":0,"hostID":5,"size":9}],"gidMappings":[{"containerID":7,"hostID":0,"size":4294967295}]},
{"destination":"/b","type":"bind","source":"/tmp","options":["idmap"]},
{"destination":"/c","type":"tmpfs","options":["tmpcopyup","mode=700"]}],
"linux":{"resources":{"cpu":{"mems":"0"}},"namespaces":[{"type":"user"}],"uidMappings":[{"containerID":0,"hostID":1,"size":9}],
"gidMappings":[{"containerID":0,"hostID":1,"size":9}]}}"#;
const REFUSED: &str = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},"windows":{},"zos":{},"vm":{},"solaris":{},
"process":{"args":["sh"],"commandLine":"sh","cwd":"/","user":{"uid":0,"gid":0,"username":"u"},"selinuxLabel":"l"},
"linux":{"mountLabel":"m","intelRdt":{"closID":"c"},"memoryPolicy":{"mode":"MPOL_BIND"},"netDevices":{"eth0":{}}}}"#;
const PROCESS: &str = r#"{"args":["ls"],"cwd":"/","user":{"uid":1,"gid":2},"terminal":true,"consoleSize":{"height":24,"width":80}}"#;
const RESOURCES: &str =
    r#"{"memory":{"limit":-1},"cpu":{"quota":-1,"idle":1,"burst":5},"blockIO":{"weight":500}}"#;

/// A host name, a parent cgroup, a kernel parameter, and limits (k8s.io/cri-api, `api.proto`).
fn pod_sandbox_config() -> Vec<u8> {
    let field = |number: u8, bytes: &[u8]| {
        [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap_or(0)], bytes].concat()
    };
    let sysctl = field(3, &[field(1, b"net.core.somaxconn"), field(2, b"64")].concat());
    let limits = field(5, &[1 << 3, 100, 2 << 3, 50, 4 << 3, 0x80, 0x01]);
    let linux = field(8, &[field(1, b"/kubepods"), sysctl, limits].concat());
    [field(1, b"metadata"), field(2, b"web-0"), linux].concat()
}

/// Steps of a driver, as `device` reads them.
struct Steps(Vec<u8>);

impl Steps {
    fn register(mut self, register: u16, value: u32) -> Self {
        self.0.push(0);
        self.0.extend(register.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Negotiates and starts a device with these sizes of its queues (virtio 1.2, 3.1.1 and 4.2.3.2).
    fn start(sizes: &[u32]) -> Self {
        Self::start_with(0, sizes)
    }

    /// The same with device-specific features.
    fn start_with(features: u32, sizes: &[u32]) -> Self {
        let mut steps = Self(Vec::new()).register(0x70, 0).register(0x70, 1).register(0x70, 3);
        steps = steps.register(0x24, 0).register(0x20, features).register(0x24, 1).register(0x20, 1);
        steps = steps.register(0x70, 11);
        for (queue, size) in (0_u8..).zip(sizes) {
            let low = |address: u64| u32::try_from(address).unwrap_or_default();
            steps = steps.register(0x30, queue.into()).register(0x38, *size);
            steps = steps.register(0x80, low(ring(queue))).register(0x90, low(ring(queue) + 0x4000));
            steps = steps.register(0xa0, low(ring(queue) + 0x8000)).register(0x44, 1);
        }
        steps.register(0x70, 15)
    }

    fn write(mut self, at: u32, bytes: &[u8]) -> Self {
        self.0.push(2);
        self.0.extend(at.to_le_bytes());
        self.0.push(u8::try_from(bytes.len()).unwrap_or(u8::MAX));
        self.0.extend(bytes);
        self
    }

    fn describe(mut self, queue: u8, index: u8, at: u32, length: u32, flags: u8) -> Self {
        self.0.extend([3, queue, index]);
        self.0.extend(at.to_le_bytes());
        self.0.extend(length.to_le_bytes());
        self.0.extend([flags, index + 1]);
        self
    }

    fn offer(mut self, queue: u8, head: u8) -> Self {
        self.0.extend([4, queue, head]);
        self
    }

    fn run(mut self) -> Self {
        self.0.push(6);
        self
    }

    fn outside(mut self, bytes: &[u8]) -> Self {
        self.0.extend([7, u8::try_from(bytes.len()).unwrap_or(u8::MAX)]);
        self.0.extend(bytes);
        self
    }
}

fn rng() -> Vec<u8> {
    let steps = Steps::start(&[8]).describe(0, 0, 0x10_0000, 64, 2).offer(0, 0).run();
    steps.register(0x70, 0).0
}

/// Reads, writes, flushes, discards and zeroes a disk; with data in one piece and in two.
fn block() -> Vec<Vec<u8>> {
    const REQUEST: u32 = 0x20_0000;
    let session = |(kind, flags): (u32, u8)| {
        let extent = [3_u64.to_le_bytes().to_vec(), 5_u32.to_le_bytes().to_vec(), vec![0; 4]].concat();
        let request =
            [kind.to_le_bytes().to_vec(), vec![0; 4], 7_u64.to_le_bytes().to_vec(), extent].concat();
        let steps = Steps::start_with(1 << 9 | 1 << 13 | 1 << 14, &[128]).write(REQUEST, &request);
        let steps = steps.describe(0, 0, REQUEST, 16, 1).describe(0, 1, REQUEST + 16, 16, flags | 1);
        let steps = steps.describe(0, 2, 0x30_0000, 1, 2).offer(0, 0);
        let steps = steps.describe(0, 3, REQUEST, 16, 1).describe(0, 4, 0x28_0000, 512, flags | 1);
        let steps = steps.describe(0, 5, 0x29_0000, 512, flags | 1).describe(0, 6, 0x30_0000, 1, 2);
        steps.offer(0, 3).run().0
    };
    [(0, 2), (1, 0), (4, 0), (8, 2), (11, 0), (13, 0)].map(session).to_vec()
}

/// The 44 bytes of `struct virtio_vsock_hdr`.
fn vsock_header(ports: (u32, u32), op: u16, length: u32) -> Vec<u8> {
    let mut header = [3_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat();
    for word in [ports.0, ports.1, length] {
        header.extend(word.to_le_bytes());
    }
    header.extend([1_u16.to_le_bytes(), op.to_le_bytes()].concat());
    for word in [3_u32, 65_536, 0] {
        header.extend(word.to_le_bytes());
    }
    header
}

fn vsock() -> Vec<Vec<u8>> {
    let start = || {
        let mut steps = Steps::start(&[16, 16, 16]);
        for index in 0..8_u8 {
            steps = steps.describe(0, index, 0x10_0000 + u32::from(index) * 4096, 4096, 2).offer(0, index);
        }
        steps
    };
    let send = |steps: Steps, slot: u8, header: &[u8], payload: u32| {
        let at = 0x20_0000 + u32::from(slot) * 8192;
        steps.write(at, header).describe(1, slot, at, 44 + payload, 0).offer(1, slot).run()
    };
    // The first of the host's own ports.
    let host = 1 << 30;
    let client = start().outside(b"\0CONNECT 7\n").run();
    let client = send(client, 0, &vsock_header((7, host), 2, 0), 0);
    let client = send(client, 1, &vsock_header((7, host), 5, 1000), 1000).outside(b"\x01bytes").run();
    let client = send(client, 2, &vsock_header((7, host), 4, 0), 0);
    let stray = send(start(), 0, &vsock_header((7, 1024), 1, 0), 0);
    vec![client.0, stray.0]
}

/// A FUSE request (`struct fuse_in_header` and what follows).
fn fuse(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + body.len()).unwrap_or_default();
    let mut request = [length.to_le_bytes(), opcode.to_le_bytes()].concat();
    request.extend([9_u64.to_le_bytes(), node.to_le_bytes()].concat());
    request.extend([0; 16]);
    request.extend(body);
    request
}

fn fs() -> Vec<Vec<u8>> {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let init = fuse(26, 0, &words(&[7, 31, 0, 0x40_0020]));
    // LOOKUP, OPEN, READ, WRITE, MKDIR, RENAME, SYMLINK, READDIRPLUS, UNLINK, FORGET
    let requests: [&[(u32, u64, Vec<u8>)]; 3] = [
        &[
            (1, 1, b"file\0".to_vec()),
            (14, 2, words(&[2, 0])),
            (15, 2, words(&[1, 0, 0, 0, 4096, 0, 0, 0, 0, 0])),
            (16, 2, [words(&[1, 0, 0, 0, 5, 0, 0, 0, 0, 0]), b"hello".to_vec()].concat()),
        ],
        &[
            (9, 1, [words(&[0o755, 0]), b"new\0".to_vec()].concat()),
            (12, 1, [words(&[1, 0]), b"new\0old\0".to_vec()].concat()),
            (6, 1, b"link\0../../etc\0".to_vec()),
            (10, 1, b"link\0".to_vec()),
        ],
        &[
            (27, 1, words(&[0, 0])),
            (44, 1, words(&[1, 0, 0, 0, 4096, 0, 0, 0, 0, 0])),
            (1, 1, b"up\0".to_vec()),
            (5, 2, Vec::new()),
            (2, 2, words(&[1, 0])),
        ],
    ];
    let session = |requests: &[(u32, u64, Vec<u8>)]| {
        let mut steps = Steps::start(&[16, 16]);
        let all = std::iter::once(init.clone())
            .chain(requests.iter().map(|(op, node, body)| fuse(*op, *node, body)));
        for (slot, request) in (0_u8..).zip(all) {
            let (head, at) = (slot * 2, 0x10_0000 + u32::from(slot) * 16384);
            let length = u32::try_from(request.len()).unwrap_or_default();
            steps = steps.write(at, &request).describe(1, head, at, length, 1);
            steps = steps.describe(1, head + 1, at + 8192, 8192, 2).offer(1, head).run();
        }
        steps.0
    };
    requests.into_iter().map(session).collect()
}

/// Without features; with mergeable buffers; with these and all offloads (virtio 1.2, 5.1.3).
fn net() -> Vec<Vec<u8>> {
    let session = |features: u32| {
        let mut steps = Steps::start_with(features, &[16, 16]);
        for index in 0..16_u8 {
            steps = steps.describe(0, index, 0x10_0000 + u32::from(index) * 8192, 8192, 2).offer(0, index);
        }
        // NEEDS_CSUM, TCP over IPv4 in segments of 1,448 bytes.
        let header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
        steps = steps.write(0x20_0000, &[0; 12]).write(0x21_0000, &header);
        steps = steps.describe(1, 0, 0x20_0000, 112, 0).offer(1, 0);
        steps = steps.describe(1, 1, 0x21_0000, 12, 1).describe(1, 2, 0x21_1000, 3000, 0).offer(1, 1).run();
        steps = steps.outside(&[0]).outside(&[&[4], &[0; 12][..]].concat());
        steps.outside(&[&[200], &header[..]].concat()).run().outside(&[2]).run().0
    };
    [0, 0x8000, 0x1_99ab].map(session).to_vec()
}

fn net_control() -> Vec<Vec<u8>> {
    let session = |command: [u8; 4]| {
        let steps = Steps::start(&[16]).write(0x20_0000, &command);
        // The command in two parts and in one, and the answer.
        let steps = steps.describe(0, 0, 0x20_0000, 2, 1).describe(0, 1, 0x20_0002, 2, 1);
        let steps = steps.describe(0, 2, 0x20_1000, 1, 2).offer(0, 0);
        steps.describe(0, 3, 0x20_0000, 4, 0).offer(0, 3).run().0
    };
    [[4, 0, 2, 0], [4, 0, 4, 0], [4, 0, 9, 0], [1, 0, 0, 0]].map(session).to_vec()
}

/// An ELF file of `class` (1: 32 bit, 2: 64 bit) with one segment.
fn elf(class: u8, load: u64, memory_size: u64) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', class, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [load, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend([0; 4]);
    for value in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend([1_u32, 7].map(u32::to_le_bytes).concat());
    for value in [120, load, load, 8, memory_size, 4096] {
        file.extend(value.to_le_bytes());
    }
    file.extend([0xf4; 8]);
    file
}

/// The setup header of a bzImage (Linux' `boot.rst`) with nothing behind it.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[0x1f1] = 1;
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
    file[0x211] = 1;
    file[0x236] = 1;
    file
}

/// An image whose symbol table has the log's ring buffer, and a ring buffer with nothing in it.
fn log() -> Vec<u8> {
    const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
    let strings = b"\0prb\0printk_rb_static\0";
    let symbol = |name: u32, value: u64| {
        let mut symbol = name.to_le_bytes().to_vec();
        symbol.extend([0x11, 0, 1, 0]);
        symbol.extend([value.to_le_bytes(), 8_u64.to_le_bytes()].concat());
        symbol
    };
    let table =
        [symbol(0, 0), symbol(1, KERNEL_MAP + LOG_MEMORY), symbol(5, KERNEL_MAP + LOG_MEMORY + 0x100)]
            .concat();
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    let sections = 64_u64;
    for value in [0, 0, sections] {
        image.extend(value.to_le_bytes());
    }
    image.extend([0; 4]);
    for value in [64_u16, 56, 0, 64, 3, 0] {
        image.extend(value.to_le_bytes());
    }
    let (table_at, strings_at) = (64 + 3 * 64_u64, 64 + 3 * 64 + table.len() as u64);
    let section = |kind: u32, at: u64, size: u64, link: u32, entry: u64| {
        let mut section = [0_u32.to_le_bytes(), kind.to_le_bytes()].concat();
        for value in [0, 0, at, size] {
            section.extend(value.to_le_bytes());
        }
        section.extend([link.to_le_bytes(), 0_u32.to_le_bytes()].concat());
        section.extend([8_u64.to_le_bytes(), entry.to_le_bytes()].concat());
        section
    };
    image.extend(section(0, 0, 0, 0, 0));
    image.extend(section(2, table_at, table.len() as u64, 2, 24));
    image.extend(section(3, strings_at, strings.len() as u64, 0, 0));
    image.extend(table);
    image.extend(strings);
    let mut data = u16::try_from(image.len()).unwrap_or_default().to_le_bytes().to_vec();
    data.extend(image);
    // The pointer, then the ring: 8 descriptors, 256 bytes of text.
    let mut memory = vec![0; 0x400];
    let mut put = |at: usize, value: u64| memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    put(0, KERNEL_MAP + LOG_MEMORY + 0x100);
    put(0x100, 3);
    put(0x108, KERNEL_MAP + LOG_MEMORY + 0x200);
    put(0x110, KERNEL_MAP + LOG_MEMORY + 0x280);
    put(0x130, 8);
    put(0x138, KERNEL_MAP + LOG_MEMORY + 0x300);
    data.extend(memory);
    data
}

fn frames() -> Vec<Vec<u8>> {
    let hello = Message::Hello { version: VERSION, guest: GuestInfo::default() };
    let reply = Message::Reply { number: 1, result: Ok(krx_proto::Answer::Done) };
    let call = Call { number: 1, request: Request::Shutdown };
    let mut both = krx_proto::encode(&hello).unwrap_or_default();
    both.extend(krx_proto::encode(&reply).unwrap_or_default());
    vec![both, krx_proto::encode(&call).unwrap_or_default(), vec![0xff; 64]]
}
