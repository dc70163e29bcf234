//! The registers of virtio-mmio devices as memory that the guest reads (virtio 1.2, section 4.2.2): a read of them costs no
//! exit, a write is one, as nobody but the VMM may write this memory (`KVM_MEM_READONLY`, kernel `Documentation/virt/kvm/api.rst`).
//!
//! What is read is what was stored here last. Whoever lets a write of the guest change a register stores it before the
//! guest goes on; a device that breaks tells so from its own thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{MmapRegion, VolatileMemory};

use crate::arch::x86_64::layout::VIRTIO_MMIO_SIZE;

/// Bytes of a device's configuration that are shown: more than any has.
const CONFIG_SIZE: usize = 256;

/// The registers of all slots, one after the other.
#[derive(Debug, Clone)]
pub(crate) struct RegisterFile(Arc<MmapRegion>);

impl RegisterFile {
    /// # Errors
    /// When the host is out of memory.
    pub(crate) fn new(slots: u32) -> io::Result<Self> {
        let size = usize::try_from(u64::from(slots) * VIRTIO_MMIO_SIZE).map_err(io::Error::other)?;
        Ok(Self(Arc::new(MmapRegion::new(size).map_err(io::Error::other)?)))
    }

    /// # Errors
    /// There is no such slot.
    pub(crate) fn slot(&self, slot: u32) -> io::Result<Registers> {
        let base = usize::try_from(u64::from(slot) * VIRTIO_MMIO_SIZE).map_err(io::Error::other)?;
        let size = usize::try_from(VIRTIO_MMIO_SIZE).map_err(io::Error::other)?;
        let end = base.checked_add(size).filter(|end| *end <= self.0.size());
        end.map(|_| Registers { memory: self.0.clone(), base, size })
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// For KVM to map.
    pub(crate) fn memory(&self) -> Arc<MmapRegion> {
        self.0.clone()
    }
}

/// The registers of one device. Clones are the same registers.
#[derive(Debug, Clone)]
pub struct Registers {
    memory: Arc<MmapRegion>,
    base: usize,
    size: usize,
}

impl Registers {
    /// Those of a device alone, which no guest reads by itself.
    ///
    /// # Errors
    /// When the host is out of memory.
    pub fn alone() -> io::Result<Self> {
        RegisterFile::new(1)?.slot(0)
    }

    /// Stores a register, named as in `linux/virtio_mmio.h`.
    pub(crate) fn set(&self, register: u32, value: u32) {
        self.with(register, |word| word.store(value.to_le(), Ordering::SeqCst));
    }

    /// Sets some bits of a register.
    pub(crate) fn raise(&self, register: u32, bits: u32) {
        self.with(register, |word| {
            word.fetch_or(bits.to_le(), Ordering::SeqCst);
        });
    }

    #[cfg(test)]
    pub(crate) fn get(&self, register: u32) -> u32 {
        let mut value = 0;
        self.with(register, |word| value = u32::from_le(word.load(Ordering::SeqCst)));
        value
    }

    /// Shows the device's configuration space, whose content `read` gives.
    pub(crate) fn set_config(&self, read: impl FnOnce(&mut [u8])) {
        let mut config = [0; CONFIG_SIZE];
        read(&mut config);
        for (offset, word) in (0..).step_by(4).zip(config.as_chunks::<4>().0) {
            self.set(VIRTIO_MMIO_CONFIG + offset, u32::from_le_bytes(*word));
        }
    }

    /// What the guest reads at an offset; beyond the registers there are zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = usize::try_from(offset) else { return };
        let left = self.size.saturating_sub(offset);
        let count = data.len().min(left);
        if let Ok(slice) = self.memory.get_slice(self.base + offset.min(self.size), count) {
            slice.copy_to(&mut data[..count]);
        }
    }

    /// Every register is a word within the slot; one that is not does not exist.
    fn with(&self, register: u32, operate: impl FnOnce(&AtomicU32)) {
        let register = usize::try_from(register).unwrap_or(usize::MAX);
        if register >= self.size {
            return;
        }
        if let Ok(word) = self.memory.get_atomic_ref::<AtomicU32>(self.base + register) {
            operate(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_apart() {
        let file = RegisterFile::new(2).unwrap();
        let (first, second) = (file.slot(0).unwrap(), file.slot(1).unwrap());
        assert!(file.slot(2).is_err() && file.slot(u32::MAX).is_err());
        first.set(0x70, 0x0102_0304);
        first.raise(0x70, 0x80);
        first.set(0x1000, 1);
        first.raise(u32::MAX - 3, 1);
        first.set(0x71, 1);
        assert_eq!((first.get(0x70), second.get(0x70), second.get(0)), (0x0102_0384, 0, 0));
        second.set_config(|config| config[..5].copy_from_slice(b"krx\0\x05"));
        let mut read = [0xff; 8];
        second.read(0x100, &mut read);
        assert_eq!(&read, b"krx\0\x05\0\0\0");
    }

    #[test]
    fn reads_of_any_width_and_place_are_harmless() {
        let registers = RegisterFile::new(1).unwrap().slot(0).unwrap();
        registers.set(0xffc, 0x0102_0304);
        for offset in (0xff0..0x1010).chain([u64::from(u32::MAX), u64::MAX]) {
            for width in [0, 1, 2, 3, 8, 16] {
                registers.read(offset, &mut vec![0xaa; width]);
            }
        }
        let mut end = [0xaa; 8];
        registers.read(0xffc, &mut end);
        assert_eq!(end, [4, 3, 2, 1, 0, 0, 0, 0]);
    }
}
