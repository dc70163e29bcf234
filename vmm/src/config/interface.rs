//! A network interface of the VM: what is typed, and what is valid.

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// More interfaces are refused: a pod has one, few have a second, and each has a thread and a slot of its own.
pub const MAX_INTERFACES: usize = 4;
/// Pairs of queues of an interface: each has a thread of the host's kernel, and buffers of the guest.
pub const MAX_PAIRS: usize = 4;

/// One network interface as described by a user or a caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// An inherited descriptor of a tap, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap_fd: RawFd,
    /// Further descriptors of the same tap, opened with `IFF_MULTI_QUEUE`, too: one for each pair of queues that the guest
    /// may have beyond the first. They are used with vhost-net only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queue_fds: Vec<RawFd>,
    /// Six pairs of hexadecimal digits with colons between them.
    pub mac: String,
    #[serde(default = "default_mtu")]
    pub mtu: u32,
}

fn default_mtu() -> u32 {
    1500
}

/// An [`Interface`] that a device can be made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidInterface {
    pub tap_fd: RawFd,
    pub queue_fds: Vec<RawFd>,
    pub mac: Mac,
    pub mtu: Mtu,
}

/// Why an [`Interface`] cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    #[error("{0} network interfaces are too many: give at most {MAX_INTERFACES}")]
    TooMany(usize),
    #[error("{0} pairs of queues are too many for an interface: give at most {MAX_PAIRS}")]
    TooManyQueues(usize),
    #[error("tap_fd {0} cannot be an inherited descriptor: 0 to 2 are the standard streams")]
    Descriptor(RawFd),
    #[error("Descriptor {0} is given twice")]
    DescriptorTwice(RawFd),
    #[error("MAC address {0:?} is not six pairs of hexadecimal digits with colons, or is zero or a group's")]
    Mac(String),
    #[error("MTU {0} is out of range: give {min} to {max}", min = Mtu::MIN, max = Mtu::MAX)]
    Mtu(u32),
}

/// The address of one interface: neither zero nor that of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac([u8; 6]);

impl Mac {
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = InterfaceError;

    fn from_str(text: &str) -> Result<Self, InterfaceError> {
        let refused = || InterfaceError::Mac(text.into());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().ok_or_else(refused)?;
            // The standard library would take a sign for a digit.
            if pair.len() != 2 || !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(refused());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| refused())?;
        }
        let is_group = bytes[0] & 1 == 1;
        if pairs.next().is_some() || is_group || bytes == [0; 6] { Err(refused()) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Largest packet of an interface, without the Ethernet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mtu(u16);

impl Mtu {
    /// What every IPv4 host has to take (RFC 791), and the least that Linux gives an Ethernet interface.
    pub const MIN: u32 = 68;
    /// What Linux gives a tap at most: 65,535 with the Ethernet header.
    pub const MAX: u32 = 65_521;

    /// # Errors
    /// [`InterfaceError::Mtu`] out of the range.
    pub fn new(mtu: u32) -> Result<Self, InterfaceError> {
        match u16::try_from(mtu) {
            Ok(small) if (Self::MIN..=Self::MAX).contains(&mtu) => Ok(Self(small)),
            _ => Err(InterfaceError::Mtu(mtu)),
        }
    }

    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

/// Checks all interfaces; `taken` are other descriptors that the VMM is to take over.
///
/// # Errors
/// The first value that cannot be.
pub fn validate(
    interfaces: &[Interface],
    taken: impl IntoIterator<Item = RawFd>,
) -> Result<Vec<ValidInterface>, InterfaceError> {
    if interfaces.len() > MAX_INTERFACES {
        return Err(InterfaceError::TooMany(interfaces.len()));
    }
    let mut taken: Vec<RawFd> = taken.into_iter().collect();
    let mut valid = Vec::with_capacity(interfaces.len());
    for Interface { tap_fd, queue_fds, mac, mtu } in interfaces {
        if queue_fds.len() >= MAX_PAIRS {
            return Err(InterfaceError::TooManyQueues(queue_fds.len() + 1));
        }
        for fd in [tap_fd].into_iter().chain(queue_fds) {
            if *fd < 3 {
                return Err(InterfaceError::Descriptor(*fd));
            }
            if taken.contains(fd) {
                return Err(InterfaceError::DescriptorTwice(*fd));
            }
            taken.push(*fd);
        }
        let (mac, mtu) = (mac.parse()?, Mtu::new(*mtu)?);
        valid.push(ValidInterface { tap_fd: *tap_fd, queue_fds: queue_fds.clone(), mac, mtu });
    }
    Ok(valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(tap_fd: RawFd) -> Interface {
        Interface { tap_fd, queue_fds: Vec::new(), mac: "02:00:00:00:00:01".into(), mtu: 1500 }
    }

    #[test]
    fn mac_addresses_are_those_of_one_interface() {
        let mac: Mac = "0a:FF:00:12:34:56".parse().unwrap();
        assert_eq!(mac.bytes(), [0x0a, 0xff, 0, 0x12, 0x34, 0x56]);
        assert_eq!(mac.to_string(), "0a:ff:00:12:34:56");
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "02:00:00:00:00:01:",
            "02-00-00-00-00-01",
            "2:0:0:0:0:1",
            "02:00:00:00:00:0g",
            "02:00:00:00:00:+1",
            "02:00:00:00:00:é",
            "00:00:00:00:00:00",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert!(matches!(bad.parse::<Mac>(), Err(InterfaceError::Mac(text)) if text == bad), "{bad}");
        }
    }

    #[test]
    fn mtu_out_of_range_is_refused() {
        for mtu in [0, 67, 65_522, 65_536 + 1500, u32::MAX] {
            assert!(matches!(Mtu::new(mtu), Err(InterfaceError::Mtu(m)) if m == mtu));
        }
        assert_eq!(Mtu::new(68).unwrap().get(), 68);
        assert_eq!(Mtu::new(65_521).unwrap().get(), 65_521);
    }

    #[test]
    fn queues_are_inherited_too_and_few() {
        let with = |queue_fds: &[RawFd]| Interface { queue_fds: queue_fds.into(), ..interface(5) };
        assert_eq!(validate(&[with(&[6, 7, 8])], []).unwrap()[0].queue_fds, [6, 7, 8]);
        assert!(matches!(validate(&[with(&[6, 7, 8, 9])], []), Err(InterfaceError::TooManyQueues(5))));
        assert!(matches!(validate(&[with(&[5])], []), Err(InterfaceError::DescriptorTwice(5))));
        assert!(matches!(validate(&[with(&[6]), interface(6)], []), Err(InterfaceError::DescriptorTwice(6))));
        assert!(matches!(validate(&[with(&[1])], []), Err(InterfaceError::Descriptor(1))));
    }

    #[test]
    fn descriptors_are_inherited_ones_and_distinct() {
        for fd in [-1, 0, 2] {
            assert!(matches!(validate(&[interface(fd)], []), Err(InterfaceError::Descriptor(f)) if f == fd));
        }
        for (fds, taken) in [([5, 5], None), ([5, 6], Some(6))] {
            let refused = validate(&fds.map(interface), taken);
            assert!(matches!(refused, Err(InterfaceError::DescriptorTwice(_))), "{fds:?} {taken:?}");
        }
        assert_eq!(validate(&[interface(5), interface(6)], Some(7)).unwrap().len(), 2);
    }

    #[test]
    fn interfaces_are_at_most_four() {
        let of = |count| (3..3 + count).map(interface).collect::<Vec<_>>();
        assert!(validate(&of(4), []).is_ok());
        assert!(matches!(validate(&of(5), []), Err(InterfaceError::TooMany(5))));
    }
}
