//! The form of a settings file: what may be typed. Each value becomes its valid type while it is read, so that the
//! parser knows the line of one that cannot be.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use krx_vmm::config::{MemorySize, VcpuCount};
use serde::de::{Deserialize, Deserializer, Error as _};

use super::annotations::Annotation;
use super::units::KernelArgs;
use super::{LogLevel, OverheadMib, Place, Settings, boot_timeout};

/// A file: what it does not say stays as it is.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    guest: Guest,
    vm: Vm,
    vmm: Vmm,
    annotations: Annotations,
    log: Log,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Guest {
    #[serde(deserialize_with = "place")]
    kernel: Option<Place>,
    #[serde(deserialize_with = "place")]
    initramfs: Option<Place>,
    #[serde(deserialize_with = "kernel_args")]
    kernel_args: Option<KernelArgs>,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Vm {
    #[serde(deserialize_with = "memory")]
    memory_mib: Option<MemorySize>,
    #[serde(deserialize_with = "overhead")]
    overhead_mib: Option<OverheadMib>,
    #[serde(deserialize_with = "cpus")]
    cpus: Option<VcpuCount>,
    #[serde(deserialize_with = "memory")]
    max_memory_mib: Option<MemorySize>,
    #[serde(deserialize_with = "cpus")]
    max_cpus: Option<VcpuCount>,
    #[serde(deserialize_with = "timeout")]
    boot_timeout_s: Option<Duration>,
    console: Option<bool>,
    vhost_net: Option<bool>,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Vmm {
    #[serde(deserialize_with = "place")]
    path: Option<Place>,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Annotations {
    #[serde(deserialize_with = "annotations")]
    allow: Option<BTreeSet<Annotation>>,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Log {
    level: Option<LogLevel>,
}

/// What is wrong with a file, and in which of its lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) line: usize,
    pub(super) what: String,
}

impl File {
    pub(super) fn parse(content: &[u8]) -> Result<Self, Fault> {
        let text = str::from_utf8(content).map_err(|error| Fault {
            line: line(content, error.valid_up_to()),
            what: "File is not UTF-8 text".into(),
        })?;
        toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            // The parser puts details on further lines; an error of ours has one.
            Fault { line: line(content, at), what: error.message().replace('\n', ", ") }
        })
    }

    /// Changes what this file sets. A list is replaced, not added to: so a later file can also take away.
    pub(super) fn apply(self, settings: &mut Settings) {
        let Self { guest, vm, vmm, annotations, log } = self;
        set(&mut settings.guest.kernel, guest.kernel);
        set(&mut settings.guest.initramfs, guest.initramfs);
        set(&mut settings.guest.kernel_args, guest.kernel_args);
        set(&mut settings.vm.memory, vm.memory_mib);
        set(&mut settings.vm.overhead, vm.overhead_mib);
        set(&mut settings.vm.cpus, vm.cpus);
        set(&mut settings.vm.max_memory, vm.max_memory_mib);
        set(&mut settings.vm.max_cpus, vm.max_cpus);
        set(&mut settings.vm.boot_timeout, vm.boot_timeout_s);
        set(&mut settings.vm.console, vm.console);
        set(&mut settings.vm.vhost_net, vm.vhost_net);
        set(&mut settings.vmm, vmm.path);
        set(&mut settings.annotations, annotations.allow);
        set(&mut settings.log_level, log.level);
    }
}

fn line(content: &[u8], at: usize) -> usize {
    content.iter().take(at).filter(|byte| **byte == b'\n').count() + 1
}

fn set<T>(value: &mut T, typed: Option<T>) {
    if let Some(typed) = typed {
        *value = typed;
    }
}

fn valid<'de, D, T, V, E>(from: D, make: impl FnOnce(T) -> Result<V, E>) -> Result<Option<V>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
    E: Display,
{
    make(T::deserialize(from)?).map(Some).map_err(D::Error::custom)
}

fn memory<'de, D: Deserializer<'de>>(from: D) -> Result<Option<MemorySize>, D::Error> {
    valid(from, MemorySize::from_mib)
}

fn overhead<'de, D: Deserializer<'de>>(from: D) -> Result<Option<OverheadMib>, D::Error> {
    valid(from, OverheadMib::new)
}

fn cpus<'de, D: Deserializer<'de>>(from: D) -> Result<Option<VcpuCount>, D::Error> {
    valid(from, VcpuCount::new)
}

fn timeout<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    valid(from, boot_timeout)
}

fn kernel_args<'de, D: Deserializer<'de>>(from: D) -> Result<Option<KernelArgs>, D::Error> {
    valid(from, |text: String| KernelArgs::new(&text))
}

fn place<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Place>, D::Error> {
    valid(from, |text: String| match Path::new(&text) {
        _ if text.is_empty() => Ok(Place::Installed),
        path if path.is_absolute() && !text.contains('\0') => Ok(Place::At(path.into())),
        _ => Err(
            "Path is not absolute: give one that begins with `/`, or \"\" for the file installed with krx",
        ),
    })
}

fn annotations<'de, D: Deserializer<'de>>(from: D) -> Result<Option<BTreeSet<Annotation>>, D::Error> {
    valid(from, |names: Vec<String>| {
        names.iter().map(|name| name.parse::<Annotation>()).collect::<Result<_, _>>()
    })
}
