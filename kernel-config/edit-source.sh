#!/usr/bin/env bash
# Edits to the unpacked kernel source that no option can make: edit-source.sh TREE
#
# Each one removes work from every boot of a guest, takes nothing from a container, and says what it wins: counted milliseconds
# (docs/benchmarks.md) and VM exits. An edit that finds neither its place nor its result fails, so that another version of
# the kernel cannot lose it silently. Doing it twice does nothing.
set -euo pipefail
tree=$1

# edit FILE FROM TO: the line that reads FROM, without its indentation, becomes TO.
edit() {
    python3 - "$tree/$1" "$2" "$3" <<'PYTHON'
import sys

path, old, new = sys.argv[1:]
text = open(path).read()
if new in text:
    sys.exit()
lines = text.split("\n")
places = [number for number, line in enumerate(lines) if line.strip() == old]
if len(places) != 1:
    sys.exit(f"edit-source.sh: {path}: {len(places)} lines read `{old}`, there should be one")
lines[places[0]] = new
open(path, "w").write("\n".join(lines))
PYTHON
}

# No /sys/kernel/slab: 2,400 of the 3,500 files that sysfs has at boot, for debugging allocators, which is not compiled in.
edit mm/slab.h '#if defined(CONFIG_SYSFS) && !defined(CONFIG_SLUB_TINY)' '#if 0 /* krx: no files of slabs */'

# Without interrupt remapping there is nothing to save around the switch to x2APIC, and firmware has left nothing unmasked:
# 192 exits, 8 for each pin of the IOAPIC.
edit arch/x86/kernel/apic/apic.c 'ret = save_ioapic_entries();' '	if (ir_stat < 0) { /* krx */
		local_irq_save(flags);
		try_to_enable_x2apic(ir_stat);
		local_irq_restore(flags);
		return;
	}

	ret = save_ioapic_entries(); /* krx */'

# One CPUID for each leaf, not two for each bit of it: 60 exits.
edit arch/x86/kernel/cpu/scattered.c 'max_level = cpuid_eax(cb->level & 0xffff0000);' '		if (cb == cpuid_bits || (cb->level ^ cb[-1].level) & 0xffff0000) /* krx */
			max_level = cpuid_eax(cb->level & 0xffff0000);'
edit arch/x86/kernel/cpu/scattered.c 'cpuid_count(cb->level, cb->sub_leaf, &regs[CPUID_EAX],' '		if (cb == cpuid_bits || cb->level != cb[-1].level || cb->sub_leaf != cb[-1].sub_leaf) /* krx */
		cpuid_count(cb->level, cb->sub_leaf, &regs[CPUID_EAX],'

# krx's devices need no acknowledgement of used buffers (vmm/src/virtio/irq.rs): an exit for each interrupt. The vendor is krx's.
edit drivers/virtio/virtio_mmio.c 'writel(status, vm_dev->base + VIRTIO_MMIO_INTERRUPT_ACK);' '	if (vm_dev->vdev.id.vendor != 0x58524b || status & ~VIRTIO_MMIO_INT_VRING) /* krx */
		writel(status, vm_dev->base + VIRTIO_MMIO_INTERRUPT_ACK);'

# Disks come while the guest runs: the agent announces them where the command line announces the other devices.
edit drivers/virtio/virtio_mmio.c 'device_param_cb(device, &vm_cmdline_param_ops, NULL, S_IRUSR);' 'device_param_cb(device, &vm_cmdline_param_ops, NULL, S_IRUSR | S_IWUSR); /* krx */'
