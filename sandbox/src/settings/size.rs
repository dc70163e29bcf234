//! The size of a pod's VM: from the node's settings, the pod's limits and its annotations. Pure.
//!
//! A VM has its size before the first container is known. The kubelet therefore tells the sum of the pod's limits when the
//! sandbox is made (CRI, `LinuxPodSandboxConfig.resources`, Kubernetes 1.23), and containerd 1.6 and later pass it on in
//! annotations of the sandbox.

use krx_vmm::config::{MemorySize, VcpuCount};
use oci_spec::runtime::LinuxResources;

use super::Settings;
use super::annotations::{AnnotationError, Wishes};
use super::units::{KernelArgs, KernelArgsError, Shown};

const MIB: u64 = 1 << 20;
/// What Linux takes where no period is given, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// `io.kubernetes.cri.sandbox-cpu-shares` is left alone: a share is a weight among pods, not a number of CPUs.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";

/// Why a pod has no size.
#[derive(Debug, thiserror::Error)]
pub enum SizeError {
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    #[error("Annotation {name} is {value}, which is no number of containerd's")]
    Limit { name: &'static str, value: Shown },
    #[error(
        "Memory limits of the pod are {limits_mib} MiB, with {overhead_mib} MiB for the guest over the {max_mib} MiB that this node gives a pod (max_memory_mib under [vm]): lower them"
    )]
    Memory { limits_mib: u64, overhead_mib: u64, max_mib: u64 },
    #[error("Kernel arguments of the node and the pod's io.krx.kernel-args do not fit together")]
    KernelArgs(#[source] KernelArgsError),
}

/// What a pod's containers may use together; nothing where they have no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    memory_bytes: Option<u64>,
    /// CPU time, in microseconds of each period.
    cpu_quota: Option<u64>,
    cpu_period: Option<u64>,
}

impl Limits {
    /// From the annotations that containerd writes on a sandbox.
    ///
    /// # Errors
    /// One that is no decimal number.
    pub fn of_sandbox<N: AsRef<str>, V: AsRef<str>>(
        annotations: impl IntoIterator<Item = (N, V)>,
    ) -> Result<Self, SizeError> {
        let mut limits = Self::default();
        for (name, value) in annotations {
            let (name, limit) = match name.as_ref() {
                MEMORY => (MEMORY, &mut limits.memory_bytes),
                CPU_PERIOD => (CPU_PERIOD, &mut limits.cpu_period),
                CPU_QUOTA => (CPU_QUOTA, &mut limits.cpu_quota),
                _ => continue,
            };
            let value = value.as_ref();
            let number = value.parse().map_err(|_| SizeError::Limit { name, value: Shown::of(value) })?;
            *limit = positive(number);
        }
        Ok(limits)
    }

    /// Memory in bytes, and CPU time of each period in microseconds; zero and less mean no limit.
    #[must_use]
    pub fn new(memory: i64, cpu_quota: i64, cpu_period: i64) -> Self {
        Self {
            memory_bytes: positive(memory),
            cpu_quota: positive(cpu_quota),
            cpu_period: positive(cpu_period),
        }
    }

    /// From the resources of the one container of a pod that no CRI makes.
    #[must_use]
    pub fn of_container(resources: &LinuxResources) -> Self {
        let (memory, cpu) = (resources.memory().as_ref(), resources.cpu().as_ref());
        Self {
            memory_bytes: memory.and_then(|memory| memory.limit()).and_then(positive),
            cpu_quota: cpu.and_then(|cpu| cpu.quota()).and_then(positive),
            cpu_period: cpu.and_then(|cpu| cpu.period()).filter(|period| *period > 0),
        }
    }
}

/// 0 is CRI's "not given", -1 the kernel's "no limit".
fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

/// What a pod's VM is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSize {
    pub memory: MemorySize,
    pub vcpus: VcpuCount,
    pub kernel_args: KernelArgs,
    pub console: bool,
}

/// Decides: what the pod asks for, else what its limits need, else the node's default.
///
/// # Errors
/// What the pod needs is more than the node gives.
pub fn size(settings: &Settings, wishes: &Wishes, limits: &Limits) -> Result<PodSize, SizeError> {
    let vm = &settings.vm;
    let memory = match (wishes.memory, limits.memory_bytes) {
        (Some(memory), _) => memory,
        (None, Some(bytes)) => for_limits(settings, bytes.div_ceil(MIB))?,
        (None, None) => vm.memory,
    };
    let vcpus = match (wishes.cpus, limits.cpu_quota) {
        (Some(cpus), _) => cpus,
        (None, Some(quota)) => {
            let period = limits.cpu_period.unwrap_or(DEFAULT_PERIOD);
            // A cgroup in the guest limits the time; the VM needs not more CPUs than can be used.
            VcpuCount::clamped(quota.div_ceil(period)).min(vm.max_cpus)
        }
        (None, None) => vm.cpus,
    };
    let kernel_args = match &wishes.kernel_args {
        Some(more) => settings.guest.kernel_args.and(more).map_err(SizeError::KernelArgs)?,
        None => settings.guest.kernel_args.clone(),
    };
    Ok(PodSize { memory, vcpus, kernel_args, console: wishes.console_log.unwrap_or(vm.console) })
}

fn for_limits(settings: &Settings, limits_mib: u64) -> Result<MemorySize, SizeError> {
    let (overhead_mib, max) = (settings.vm.overhead.get(), settings.vm.max_memory);
    let mib = limits_mib.saturating_add(overhead_mib);
    if mib > max.mib() {
        return Err(SizeError::Memory { limits_mib, overhead_mib, max_mib: max.mib() });
    }
    Ok(MemorySize::clamped(mib))
}

/// The size of a pod's VM by the annotations of its sandbox, as the CRI passes them on.
///
/// # Errors
/// As [`Wishes::read`], [`Limits::of_sandbox`] and [`size`].
pub fn of_sandbox<N: AsRef<str>, V: AsRef<str>>(
    settings: &Settings,
    annotations: impl IntoIterator<Item = (N, V)> + Clone,
) -> Result<PodSize, SizeError> {
    let wishes = Wishes::read(annotations.clone(), settings)?;
    size(settings, &wishes, &Limits::of_sandbox(annotations)?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};

    use super::super::annotations::Annotation;
    use super::*;

    fn settings() -> Settings {
        let mut settings = Settings { annotations: Annotation::ALL.into(), ..Settings::default() };
        settings.vm.max_memory = MemorySize::clamped(8192);
        settings.vm.max_cpus = VcpuCount::clamped(4);
        settings.guest.kernel_args = KernelArgs::new("quiet").unwrap();
        settings
    }

    type Pairs<'a> = &'a [(&'a str, &'a str)];

    fn sized(annotations: Pairs<'_>) -> Result<(u64, u8), SizeError> {
        let annotations: BTreeMap<_, _> = annotations.iter().copied().collect();
        let size = of_sandbox(&settings(), &annotations)?;
        Ok((size.memory.mib(), size.vcpus.get()))
    }

    #[test]
    fn pods_have_the_size_of_their_limits() {
        let table: [(Pairs<'_>, (u64, u8)); 12] = [
            (&[], (256, 1)),
            (&[(MEMORY, "1073741824"), (CPU_PERIOD, "100000"), (CPU_QUOTA, "150000")], (1088, 2)),
            // A pod with requests and without limits, as the kubelet says it.
            (
                &[
                    (MEMORY, "0"),
                    (CPU_PERIOD, "100000"),
                    (CPU_QUOTA, "0"),
                    ("io.kubernetes.cri.sandbox-cpu-shares", "102"),
                ],
                (256, 1),
            ),
            (&[(MEMORY, "-1"), (CPU_QUOTA, "-1")], (256, 1)),
            (&[(MEMORY, "1")], (65, 1)),
            (&[(CPU_QUOTA, "1"), (CPU_PERIOD, "100000")], (256, 1)),
            (&[(CPU_QUOTA, "400000")], (256, 4)),
            (&[(CPU_QUOTA, "400000"), (CPU_PERIOD, "0")], (256, 4)),
            (&[(CPU_QUOTA, "9223372036854775807"), (CPU_PERIOD, "1")], (256, 4)),
            (&[(MEMORY, "1073741824"), ("io.krx.memory", "2G")], (2048, 1)),
            (&[(CPU_QUOTA, "400000"), ("io.krx.cpus", "1")], (256, 1)),
            (&[(MEMORY, "8522825728")], (8192, 1)),
        ];
        for (annotations, expected) in table {
            assert_eq!(sized(annotations).unwrap(), expected, "{annotations:?}");
        }
    }

    #[test]
    fn hostile_limits_are_refused() {
        let endless = "9".repeat(1 << 20);
        for name in [MEMORY, CPU_PERIOD, CPU_QUOTA] {
            for value in ["", "-", "a", "1.5", " 1", "1\0", "9223372036854775808", &endless] {
                let error = sized(&[(name, value)]).unwrap_err().to_string();
                assert!(error.contains(name) && error.len() < 256 && !error.contains('\0'), "{error}");
            }
        }
        for value in ["9223372036854775807", "8522825729"] {
            assert!(matches!(sized(&[(MEMORY, value)]), Err(SizeError::Memory { .. })), "{value}");
        }
        assert!(matches!(sized(&[("io.krx.colour", "red")]), Err(SizeError::Annotation(_))));
    }

    #[test]
    fn kernel_arguments_are_added_to_the_node_s() {
        let with = |value: &str| {
            of_sandbox(&settings(), [("io.krx.kernel-args", value), ("io.krx.console-log", "true")])
        };
        let size = with("debug").unwrap();
        assert_eq!((size.kernel_args.as_str(), size.console), ("quiet debug", true));
        assert!(matches!(with(&"a".repeat(1020)), Err(SizeError::KernelArgs(_))));
    }

    #[test]
    fn container_without_a_cri_has_the_size_of_its_own_limits() {
        let memory = LinuxMemoryBuilder::default().limit(100_i64 << 20).build().unwrap();
        let cpu = LinuxCpuBuilder::default().quota(250_000_i64).period(100_000_u64).build().unwrap();
        let resources = LinuxResourcesBuilder::default().memory(memory).cpu(cpu).build().unwrap();
        let size = size(&settings(), &Wishes::default(), &Limits::of_container(&resources)).unwrap();
        assert_eq!((size.memory.mib(), size.vcpus.get()), (164, 3));
        assert_eq!(Limits::of_container(&LinuxResources::default()).cpu_quota, None);
    }
}
