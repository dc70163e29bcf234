//! What the CRI says of a pod, as containerd 2 hands it to a sandbox that is made by its shim: a message
//! `runtime.v1.PodSandboxConfig`, of which a few fields are of use here.
//!
//! The message is read by the numbers of its fields (k8s.io/cri-api, `api.proto`): its whole definition is a thousand
//! lines, for four values.

use containerd_shim_protos::protobuf::{CodedInputStream, Error as ProtobufError, rt::WireType};

/// More than the kubelet would ever write.
const MAX_CONFIG: usize = 4 << 20;
const MAX_ENTRIES: usize = 4096;

/// Fields of `PodSandboxConfig`, `LinuxPodSandboxConfig`, `LinuxContainerResources`, and of a map's entry.
const HOSTNAME: u32 = 2;
const LINUX: u32 = 8;
const CGROUP_PARENT: u32 = 1;
const SYSCTLS: u32 = 3;
const RESOURCES: u32 = 5;
const CPU_PERIOD: u32 = 1;
const CPU_QUOTA: u32 = 2;
const MEMORY_LIMIT: u32 = 4;
const KEY: u32 = 1;
const VALUE: u32 = 2;

/// The fields that are of use.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PodSandboxConfig {
    pub hostname: String,
    pub cgroup_parent: String,
    pub sysctls: Vec<(String, String)>,
    pub cpu_period: i64,
    pub cpu_quota: i64,
    /// Bytes.
    pub memory_limit: i64,
}

impl PodSandboxConfig {
    /// Reads the message.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MAX_CONFIG {
            return Err(format!("The pod's configuration is over {MAX_CONFIG} bytes"));
        }
        let mut config = Self::default();
        let parsed = fields(bytes, |field, input| {
            match field {
                HOSTNAME => config.hostname = input.read_string()?,
                LINUX => config.linux(&input.read_bytes()?)?,
                _ => return Ok(false),
            }
            Ok(true)
        });
        parsed
            .map_err(|error| format!("The pod's configuration is no PodSandboxConfig of the CRI: {error}"))?;
        Ok(config)
    }

    fn linux(&mut self, bytes: &[u8]) -> Result<(), ProtobufError> {
        fields(bytes, |field, input| {
            match field {
                CGROUP_PARENT => self.cgroup_parent = input.read_string()?,
                SYSCTLS if self.sysctls.len() < MAX_ENTRIES => {
                    self.sysctls.push(entry(&input.read_bytes()?)?);
                }
                RESOURCES => self.resources(&input.read_bytes()?)?,
                _ => return Ok(false),
            }
            Ok(true)
        })
    }

    fn resources(&mut self, bytes: &[u8]) -> Result<(), ProtobufError> {
        fields(bytes, |field, input| {
            match field {
                CPU_PERIOD => self.cpu_period = input.read_int64()?,
                CPU_QUOTA => self.cpu_quota = input.read_int64()?,
                MEMORY_LIMIT => self.memory_limit = input.read_int64()?,
                _ => return Ok(false),
            }
            Ok(true)
        })
    }
}

fn entry(bytes: &[u8]) -> Result<(String, String), ProtobufError> {
    let (mut key, mut value) = (String::new(), String::new());
    fields(bytes, |field, input| {
        match field {
            KEY => key = input.read_string()?,
            VALUE => value = input.read_string()?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok((key, value))
}

/// Calls `read` with each field's number; a field of which it says that it has not read it is skipped.
fn fields(
    bytes: &[u8],
    mut read: impl FnMut(u32, &mut CodedInputStream<'_>) -> Result<bool, ProtobufError>,
) -> Result<(), ProtobufError> {
    let mut input = CodedInputStream::from_bytes(bytes);
    while !input.eof()? {
        let tag = input.read_raw_varint32()?;
        let kind = WireType::new(tag & 7).unwrap_or(WireType::EndGroup);
        if !read(tag >> 3, &mut input)? {
            input.skip_field(kind)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field `number` with these bytes.
    fn text(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut field = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        field.extend(bytes);
        field
    }

    #[test]
    fn the_fields_are_found_among_others() {
        let sysctl = text(3, &[text(1, b"net.core.somaxconn"), text(2, b"64")].concat());
        let resources = text(5, &[1 << 3, 100, 2 << 3, 50, 4 << 3, 0x80, 0x01]);
        let linux = text(8, &[text(1, b"/kubepods"), sysctl, resources].concat());
        let bytes = [text(1, b"metadata"), text(2, b"web-0"), linux, vec![9 << 3, 7]].concat();
        let config = PodSandboxConfig::parse(&bytes).unwrap();
        assert_eq!((config.hostname.as_str(), config.cgroup_parent.as_str()), ("web-0", "/kubepods"));
        assert_eq!(config.sysctls, [("net.core.somaxconn".to_string(), "64".to_string())]);
        assert_eq!((config.cpu_period, config.cpu_quota, config.memory_limit), (100, 50, 128));
        assert_eq!(PodSandboxConfig::parse(b"").unwrap(), PodSandboxConfig::default());
    }

    #[test]
    fn nonsense_is_an_error_and_not_a_panic() {
        for seed in 0..=u8::MAX {
            let bytes: Vec<u8> = (0..64_u8).map(|i| i.wrapping_mul(37) ^ seed).collect();
            let _ = PodSandboxConfig::parse(&bytes);
        }
        assert!(PodSandboxConfig::parse(&text(2, b"\xff\xff")).is_err());
        assert!(PodSandboxConfig::parse(&[2 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 0x0f]).is_err());
        assert!(PodSandboxConfig::parse(&vec![0; MAX_CONFIG + 1]).is_err());
    }
}
