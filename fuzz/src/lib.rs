//! The fuzz targets, as functions of bytes. A target passes when it returns: no panic, no hang, no abort. What a
//! parser answers is for its unit tests; here it only has to live.
//!
//! `fuzz/run` runs them under libFuzzer; `cargo test` runs each on its [`seeds`] and on changes of these.

mod device;
mod files;
mod input;
mod net_control;
pub mod seeds;

use std::cell::RefCell;
use std::io::Cursor;
use std::path::Path;

use krx_image::{Reference, Store};
use krx_proto::{Call, Message};
use krx_sandbox::bundle::{self, PodNamespaces};
use krx_sandbox::settings::annotations::Annotation;
use krx_sandbox::settings::{Settings, size};
use krx_shim::config_json::{ConfigJson, Role};
use krx_shim::http::{self, Head, MAX_HEAD, Taken};
use krx_shim::log_uri::LogUri;
use krx_shim::pod_config::PodSandboxConfig;
use krx_vmm::arch::x86_64::kernel;
use krx_vmm::config::Config;
use krx_vmm::config::interface::Mtu;
use krx_vmm::klog;
use krx_vmm::virtio::block::Block;
use krx_vmm::virtio::fs::Fs;
use krx_vmm::virtio::net::Net;
use krx_vmm::virtio::rng::{self, Rng};
use krx_vmm::virtio::vsock::Vsock;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::files::Scratch;
use crate::input::Input;

/// A target, by its name.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 19] = [
    ("mmio_rng", mmio_rng),
    ("mmio_block", mmio_block),
    ("mmio_vsock", mmio_vsock),
    ("mmio_fs", mmio_fs),
    ("mmio_net", mmio_net),
    ("mmio_net_control", mmio_net_control),
    ("vmm_config", vmm_config),
    ("kernel", kernel),
    ("klog", klog),
    ("agent_frames", agent_frames),
    ("bundle", bundle),
    ("image_archive", image_archive),
    ("image_layer", image_layer),
    ("settings", settings),
    ("annotations", annotations),
    ("shim_config", shim_config),
    ("pod_sandbox_config", pod_sandbox_config),
    ("log_uri", log_uri),
    ("timings_request", timings_request),
];

thread_local! {
    static SCRATCH: RefCell<Option<Scratch>> = const { RefCell::new(None) };
}

/// The files of this thread's targets.
fn with_scratch<T>(action: impl FnOnce(&Scratch) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| action(scratch.get_or_insert_with(Scratch::new)))
}

/// A guest at the registers and queues of the entropy device.
pub fn mmio_rng(data: &[u8]) {
    if let Ok(source) = rng::open() {
        device::drive(Box::new(Rng::new(source)), data, |_| ());
    }
}

/// The same of a disk, which stays as large as it is.
pub fn mmio_block(data: &[u8]) {
    const DISK: u64 = 1 << 20;
    with_scratch(|scratch| {
        let disk = scratch.disk(DISK);
        let Ok(writable) = disk.try_clone() else { return };
        if let Ok(block) = Block::new(writable, data.len().is_multiple_of(8)) {
            device::drive(Box::new(block), data, |_| ());
        }
        assert_eq!(disk.metadata().map(|metadata| metadata.len()).ok(), Some(DISK));
    });
}

/// The same of the vsock device, with a client of the host that also says what it likes.
pub fn mmio_vsock(data: &[u8]) {
    with_scratch(|scratch| {
        let socket = scratch.path("v");
        let Ok(vsock) = Vsock::new(3, socket.clone()) else { return };
        let mut clients = files::Clients::new(socket);
        device::drive(Box::new(vsock), data, |bytes| clients.say(bytes));
    });
}

/// The same of the file system device, on a directory that the guest may change.
pub fn mmio_fs(data: &[u8]) {
    with_scratch(|scratch| {
        if let Ok(fs) = Fs::new("krx", &scratch.fresh_share()) {
            device::drive(Box::new(fs), data, |_| ());
        }
    });
}

/// The same of the network device, with frames from outside.
pub fn mmio_net(data: &[u8]) {
    let (Ok(mac), Ok(mtu)) = ("02:00:00:00:00:01".parse(), Mtu::new(1500)) else { return };
    let Some((mut wire, near)) = files::Wire::new() else { return };
    if let Ok(net) = Net::over_socket(near, mac, mtu) {
        device::drive(Box::new(net), data, |bytes| wire.say(bytes));
    }
}

/// The same of its control queue.
pub fn mmio_net_control(data: &[u8]) {
    device::drive(Box::new(net_control::Control), data, |_| ());
}

/// What is typed, or sent by krx, as the VMM's configuration.
pub fn vmm_config(data: &[u8]) {
    if let Ok(config) = Config::from_json(data) {
        let _ = config.validate();
    }
}

/// A file that `--kernel` names.
pub fn kernel(data: &[u8]) {
    with_scratch(|scratch| {
        let memory = memory();
        let _ = kernel::load(&memory, &scratch.file("kernel", data));
    });
}

/// A guest's memory, and the kernel image its log is looked up with: the image's length, the image, the memory.
pub fn klog(data: &[u8]) {
    with_scratch(|scratch| {
        let mut input = Input::new(data);
        let length = input.word();
        let image = scratch.file("image", input.bytes(usize::from(length)));
        let memory = memory();
        // Behind the real-mode area, where kernels are; a hostile image may point anywhere else.
        let _ = memory.write_slice(input.rest(), GuestAddress(seeds::LOG_MEMORY));
        if let Ok(log) = klog::read(&memory, &image) {
            assert!(log.len() <= klog::MAX_LOG);
            assert!(log.bytes().all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte)));
        }
    });
}

/// What the agent sends to the host, and the host to the agent.
pub fn agent_frames(data: &[u8]) {
    let mut from = Cursor::new(data);
    while krx_proto::read_frame::<Message>(&mut from).is_ok() {}
    let mut from = Cursor::new(data);
    while krx_proto::read_frame::<Call>(&mut from).is_ok() {}
    let mut received = data.to_vec();
    while let Ok(Some(_)) = krx_proto::take_frame::<Message>(&mut received) {}
}

/// A bundle's `config.json`, alone and in a pod, and the parts of it that come by themselves.
pub fn bundle(data: &[u8]) {
    with_scratch(|scratch| {
        let directory = scratch.bundle(data);
        let first =
            bundle::read("fuzz", &directory).map(|container| container.spec.process).unwrap_or_default();
        if let Some(filter) = &first.seccomp {
            assert!((1..=krx_proto::MAX_SECCOMP).contains(&filter.program.len()));
        }
        let pod = PodNamespaces {
            paths: vec!["/proc/7/ns/ipc".into()],
            is_sandbox: data.len().is_multiple_of(2),
            share_prefix: String::new(),
        };
        let _ = bundle::read_in_pod("fuzz", &directory, &pod);
        let _ = bundle::process(data, &first);
        let _ = bundle::resources(data);
        let _ = bundle::seccomp_profile(data, 0);
    });
}

/// An image in an archive.
pub fn image_archive(data: &[u8]) {
    with_scratch(|scratch| {
        let path = scratch.file("archive", data);
        for transport in ["oci-archive", "docker-archive"] {
            import(scratch, &format!("{transport}:{}", path.display()));
        }
    });
}

/// The layer of an image that is right otherwise.
pub fn image_layer(data: &[u8]) {
    with_scratch(|scratch| import(scratch, &format!("oci:{}", scratch.layout(data).display())));
}

/// Imports into an empty store. Nothing may be made outside of it, and of what is refused nothing is kept.
fn import(scratch: &Scratch, image: &str) {
    let store = scratch.empty("store");
    let (Ok(reference), Ok(opened)) = (Reference::parse(image), Store::open(&store)) else { return };
    let imported = opened.import(&reference, |_| ());
    let kept = |name: &str| std::fs::read_dir(store.join(name)).map_or(0, Iterator::count);
    assert!(kept("krx-tmp") == 0 && (imported.is_ok() || kept("krx-layers") == 0));
    assert_eq!(std::fs::read(scratch.path("secret")).ok().as_deref(), Some(&b"outside"[..]));
}

/// A file of a node's settings.
pub fn settings(data: &[u8]) {
    let mut settings = Settings::default();
    if let Err(error) = settings.apply(Path::new("config.toml"), data) {
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

/// A pod's annotations: lines of a name and a value.
pub fn annotations(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let settings = Settings { annotations: Annotation::ALL.into(), ..Settings::default() };
    match size::of_sandbox(&settings, pairs) {
        Ok(size) => assert!(size.memory <= settings.vm.max_memory && size.vcpus <= settings.vm.max_cpus),
        Err(error) => assert!(error.to_string().len() < 1024, "{error}"),
    }
}

/// What the shim itself reads of a bundle's `config.json`.
pub fn shim_config(data: &[u8]) {
    match ConfigJson::parse(data, Path::new("config.json")) {
        Ok(config) => {
            let member_of = if let Role::Member(sandbox) = &config.role { sandbox.as_str() } else { "none" };
            assert!(!member_of.is_empty());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The CRI's message of a pod, as the Sandbox service gets it.
pub fn pod_sandbox_config(data: &[u8]) {
    if let Ok(config) = PodSandboxConfig::parse(data) {
        let read = config.hostname.len() + config.cgroup_parent.len();
        let sysctls: usize = config.sysctls.iter().map(|(name, value)| name.len() + value.len()).sum();
        assert!(read + sysctls <= data.len(), "no more than was given");
    }
}

/// Where containerd's clients want output to go.
pub fn log_uri(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match LogUri::parse(&text) {
        Ok(Some(LogUri::File(path) | LogUri::Program { path, .. })) => {
            // Nothing that the system would read otherwise: a relative path, or one that ends at a zero byte.
            assert!(path.is_absolute() && !path.as_os_str().as_encoded_bytes().contains(&0));
        }
        Ok(None) => assert!(!text.contains("://")),
        Err(error) => assert!(error.to_string().len() < 1024, "{error}"),
    }
}

/// What a client of the timings' socket says, in parts as large as the first byte tells.
pub fn timings_request(data: &[u8]) {
    let Some((size, request)) = data.split_first() else { return };
    let mut head = Head::default();
    let mut parts = request.chunks(usize::from(*size) + 1);
    let taken = loop {
        match head.add(parts.next().unwrap_or_default()) {
            Taken::More => {}
            taken => break taken,
        }
    };
    let whole = if let Taken::Whole(head) = taken { Some(head) } else { None };
    // Each byte that is no UTF-8 has become three.
    assert!(whole.as_ref().is_none_or(|head| head.len() <= 3 * MAX_HEAD));
    let answer =
        http::answer(whole.as_deref(), |path| (path == "/metrics").then(|| ("text/plain", "x 1\n".into())));
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{answer}");
    assert_eq!(head.starts_with("HTTP/1.0 200 OK\r\n"), body == "x 1\n", "{answer}");
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).expect("guest memory")
}
