//! What a pod asks for by annotations `io.krx.*`, as far as the node's settings let it. Pure.
//!
//! Whoever may make a pod may write these: names and values are hostile. One that is not known is refused by its name, lest
//! a pod run without what its author believes it has. Annotations of others are not looked at.

use std::fmt;
use std::str::FromStr;

use krx_vmm::config::{MemorySize, VcpuCount};

use super::Settings;
use super::units::{self, Bare, KernelArgs, KernelArgsError, MemoryError, Shown};

/// What krx's annotations begin with.
const PREFIX: &str = "io.krx.";

/// An annotation that krx knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Annotation {
    ConsoleLog,
    Cpus,
    KernelArgs,
    Memory,
}

impl Annotation {
    pub const ALL: [Self; 4] = [Self::ConsoleLog, Self::Cpus, Self::KernelArgs, Self::Memory];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ConsoleLog => "io.krx.console-log",
            Self::Cpus => "io.krx.cpus",
            Self::KernelArgs => "io.krx.kernel-args",
            Self::Memory => "io.krx.memory",
        }
    }
}

impl fmt::Display for Annotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Annotation {
    type Err = AnnotationError;

    fn from_str(name: &str) -> Result<Self, AnnotationError> {
        Self::ALL
            .into_iter()
            .find(|known| known.name() == name)
            .ok_or_else(|| AnnotationError::Unknown(Shown::of(name)))
    }
}

/// Why a pod does not get what it asks for.
#[derive(Debug, thiserror::Error)]
pub enum AnnotationError {
    #[error("Annotation {0} is not one of krx's: it knows {known}", known = known())]
    Unknown(Shown),
    #[error(
        "Annotation {0} may not be used on this node: leave it out, or add it to `allow` under [annotations] in the node's {path}",
        path = super::PATH
    )]
    NotAllowed(Annotation),
    #[error("Annotation io.krx.memory cannot be used")]
    Memory(#[source] MemoryError),
    #[error("Annotation io.krx.cpus is {value}: give a whole number from 1 to {max}", max = VcpuCount::MAX)]
    Cpus { value: Shown },
    #[error("Annotation io.krx.kernel-args cannot be used")]
    KernelArgs(#[source] KernelArgsError),
    #[error("Annotation io.krx.console-log is {value}: give `true` or `false`")]
    ConsoleLog { value: Shown },
    #[error(
        "Annotation {annotation} asks for {value}, this node gives a pod at most {limit} ({key} under [vm])"
    )]
    OverLimit { annotation: Annotation, value: u64, limit: u64, key: &'static str },
}

fn known() -> String {
    Annotation::ALL.map(Annotation::name).join(", ")
}

/// What a pod asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    pub memory: Option<MemorySize>,
    pub cpus: Option<VcpuCount>,
    /// Behind those of the settings.
    pub kernel_args: Option<KernelArgs>,
    /// Whether the guest kernel's console is logged.
    pub console_log: Option<bool>,
}

impl Wishes {
    /// Reads the annotations of a pod.
    ///
    /// # Errors
    /// The first of krx's that is not known, not allowed here, not of its form, or over a limit of the node.
    pub fn read<N: AsRef<str>, V: AsRef<str>>(
        annotations: impl IntoIterator<Item = (N, V)>,
        settings: &Settings,
    ) -> Result<Self, AnnotationError> {
        let mut wishes = Self::default();
        for (name, value) in annotations {
            if name.as_ref().starts_with(PREFIX) {
                let annotation = name.as_ref().parse::<Annotation>()?;
                if !settings.annotations.contains(&annotation) {
                    return Err(AnnotationError::NotAllowed(annotation));
                }
                wishes.add(annotation, value.as_ref())?;
            }
        }
        wishes.within(settings)
    }

    fn add(&mut self, annotation: Annotation, value: &str) -> Result<(), AnnotationError> {
        match annotation {
            Annotation::Memory => {
                let memory = units::memory(value, Bare::Mib).map_err(AnnotationError::Memory)?;
                self.memory = Some(memory);
            }
            Annotation::Cpus => {
                let count = value.parse().ok().and_then(|count| VcpuCount::new(count).ok());
                self.cpus = Some(count.ok_or_else(|| AnnotationError::Cpus { value: Shown::of(value) })?);
            }
            Annotation::KernelArgs => {
                self.kernel_args = Some(KernelArgs::new(value).map_err(AnnotationError::KernelArgs)?);
            }
            Annotation::ConsoleLog => {
                let wish =
                    value.parse().map_err(|_| AnnotationError::ConsoleLog { value: Shown::of(value) })?;
                self.console_log = Some(wish);
            }
        }
        Ok(())
    }

    fn within(self, settings: &Settings) -> Result<Self, AnnotationError> {
        let (max_memory, max_cpus) = (settings.vm.max_memory, settings.vm.max_cpus);
        if let Some(memory) = self.memory.filter(|memory| *memory > max_memory) {
            return Err(AnnotationError::OverLimit {
                annotation: Annotation::Memory,
                value: memory.mib(),
                limit: max_memory.mib(),
                key: "max_memory_mib",
            });
        }
        if let Some(cpus) = self.cpus.filter(|cpus| *cpus > max_cpus) {
            return Err(AnnotationError::OverLimit {
                annotation: Annotation::Cpus,
                value: cpus.get().into(),
                limit: max_cpus.get().into(),
                key: "max_cpus",
            });
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use super::*;

    fn open() -> Settings {
        let mut settings = Settings { annotations: Annotation::ALL.into(), ..Settings::default() };
        settings.vm.max_memory = MemorySize::clamped(4096);
        settings.vm.max_cpus = VcpuCount::clamped(4);
        settings
    }

    fn read(name: &str, value: &str) -> Result<Wishes, AnnotationError> {
        Wishes::read([(name, value)], &open())
    }

    #[test]
    fn all_of_them_are_read_from_either_map() {
        let all = [
            ("io.krx.memory", "1G"),
            ("io.krx.cpus", "2"),
            ("io.krx.kernel-args", "quiet"),
            ("io.krx.console-log", "true"),
            ("io.kubernetes.cri.sandbox-id", "x"),
            ("other", ""),
            ("io.krx", ""),
            ("io.krxy.memory", "9"),
        ];
        let all = all.map(|(name, value)| (name.to_string(), value.to_string()));
        let wishes = Wishes::read(&BTreeMap::from(all.clone()), &open()).unwrap();
        assert_eq!(wishes, Wishes::read(&HashMap::from(all), &open()).unwrap());
        assert_eq!((wishes.memory.unwrap().mib(), wishes.cpus.unwrap().get()), (1024, 2));
        assert_eq!((wishes.kernel_args.unwrap().as_str(), wishes.console_log), ("quiet", Some(true)));
        assert_eq!(read("io.krx.memory", "512").unwrap().memory.unwrap().mib(), 512);
    }

    #[test]
    fn unknown_ones_are_refused_by_name() {
        for name in
            ["io.krx.", "io.krx.memry", "io.krx.Memory", "io.krx.memory ", "io.krx.memory\0", "io.krx.cpus/x"]
        {
            let error = read(name, "1").unwrap_err().to_string();
            assert!(
                error.contains(&name.escape_default().to_string()) && error.contains("io.krx.cpus"),
                "{error}"
            );
        }
        let error = read(&format!("io.krx.{}", "a".repeat(1 << 20)), "1").unwrap_err().to_string();
        assert!(error.len() < 256, "{}", error.len());
    }

    #[test]
    fn hostile_values_are_refused_in_few_words() {
        let endless = "9".repeat(1 << 20);
        let values = [
            "",
            "-1",
            "+1",
            "0",
            "1e3",
            "0x10",
            " 1",
            "1 ",
            "1\0",
            "\u{661}",
            "18446744073709551616",
            "yes",
            &endless,
        ];
        for annotation in [Annotation::Memory, Annotation::Cpus, Annotation::ConsoleLog] {
            for value in values {
                // Rust's parser of numbers takes a plus sign, and so may a pod.
                if (annotation, value) == (Annotation::Cpus, "+1") {
                    continue;
                }
                let error = read(annotation.name(), value).unwrap_err().to_string();
                assert!(
                    error.contains(annotation.name()) && error.len() < 256 && !error.contains('\0'),
                    "{error}"
                );
            }
        }
        for value in ["a\0", "a\nb", "\u{e4}", &endless] {
            assert!(matches!(read("io.krx.kernel-args", value), Err(AnnotationError::KernelArgs(_))));
        }
    }

    #[test]
    fn settings_limit_what_may_be_asked_for() {
        for (name, value) in [("io.krx.memory", "4097"), ("io.krx.memory", "1T"), ("io.krx.cpus", "5")] {
            assert!(matches!(read(name, value), Err(AnnotationError::OverLimit { .. })), "{name}");
        }
        assert!(read("io.krx.memory", "4096").is_ok() && read("io.krx.cpus", "4").is_ok());
        let error = Wishes::read([("io.krx.kernel-args", "a")], &Settings::default()).unwrap_err();
        assert!(error.to_string().contains("may not be used on this node"), "{error}");
    }
}
