#!/usr/bin/env bash
# Edits to the unpacked kernel source that no option can make: edit-source.sh TREE BOOT-ORDER
#
# Each one removes work from every boot of a guest, takes nothing from a container, and says what it wins: counted milliseconds
# (docs/benchmarks.md) and VM exits. An edit that finds neither its place nor its result fails, so that another version of
# the kernel cannot lose it silently. Doing it twice does nothing.
set -euo pipefail
tree=$1
order=$2

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

# What a start executes lies together at the beginning of the text, where krx-vmm copies it into huge pages rather than map it page by
# page: each page is a nested page fault. build.sh compiles each function to a section of its own.
sed -n 's/^\([A-Za-z0-9_.]\+\)$/*(.text.\1)/p' "$order" >"$tree/arch/x86/kernel/krx-order.new"
cmp -s "$tree/arch/x86/kernel/krx-order.new" "$tree/arch/x86/kernel/krx-order.h" ||
    cp "$tree/arch/x86/kernel/krx-order.new" "$tree/arch/x86/kernel/krx-order.h"
edit arch/x86/kernel/vmlinux.lds.S 'TEXT_TEXT' '#include "krx-order.h"
		TEXT_TEXT /* krx */'
edit include/asm-generic/vmlinux.lds.h '#define TEXT_MAIN .text' '#define TEXT_MAIN .text .text.[0-9a-zA-Z_]* /* krx */'

# Code that the CPU's features leave as it is was written all the same, with longer NOPs in the place of short ones: most pages of the text.
edit arch/x86/kernel/alternative.c 'memcpy(insn_buff, instr, a->instrlen);' '			continue; /* krx */
			memcpy(insn_buff, instr, a->instrlen);'

# The table of jump labels comes sorted (sort-jump-table.py).
edit kernel/jump_label.c 'sort(start, size, sizeof(struct jump_entry), jump_label_cmp, swapfn);' '	struct jump_entry *sorted = start; /* krx */
	while (sorted + 1 < stop && jump_label_cmp(sorted, sorted + 1) <= 0)
		sorted++;
	if (sorted + 1 >= stop)
		return;
	sort(start, size, sizeof(struct jump_entry), jump_label_cmp, swapfn);'

# Tables of pages are new, and need no clearing where no memory is.
edit arch/x86/mm/init_64.c '#include <asm/e820/api.h>' '#include <asm/e820/api.h>
#define e820__mapped_any(start, end, type) true /* krx */'

# Memory of the initramfs and of what only the boot needs is freed without being filled with a pattern, for debugging.
edit mm/page_alloc.c 'if ((unsigned int)poison <= 0xFF)' '		if (0) /* krx */'

# No files for the parameters of what is built in, but for that by which the agent announces disks.
edit kernel/params.c 'if (kp->perm == 0)' '		if (kp->perm == 0 || strncmp(kp->name, "virtio_mmio.", 12)) /* krx */'

# A guest of up to 128 MiB does not keep movable memory apart from other: six huge pages of its host hold what it has in use, not nine.
edit mm/page_alloc.c 'if (vm_total_pages < (pageblock_nr_pages * MIGRATE_TYPES))' '	if (vm_total_pages < (pageblock_nr_pages * 64)) /* krx */'

# The per-CPU areas of 180 KiB each need no huge page, which would be one more of the host's.
edit arch/x86/kernel/setup_percpu.c 'atom_size = PMD_SIZE;' '		atom_size = PAGE_SIZE; /* krx */'
