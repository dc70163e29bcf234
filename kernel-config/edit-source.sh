#!/usr/bin/env bash
# Edits to the unpacked kernel source that no option can make: edit-source.sh TREE BOOT-ORDER
#
# Each one removes work from every boot of a guest, and takes nothing that a container needs. What they win, in counted milliseconds and VM
# exits, is in docs/benchmarks.md. An edit that finds neither its place nor its result fails, so that another version of
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

# Memory gets its `struct page`s when it is first needed, 32 MiB at a time, and not all of it before the first process: Linux does so until its threads
# for the rest have run, which are left out here. A guest of 1 GiB starts as one of 128 MiB does, and what it never uses costs its host nothing.
# What counts free memory counts this, too.
for line in \
    'void __meminit __init_single_page(struct page *page, unsigned long pfn,' \
    'static void __init deferred_free_pages(unsigned long pfn,' \
    'static unsigned long __init deferred_init_pages(struct zone *zone,' \
    'bool __init deferred_grow_zone(struct zone *zone, unsigned int order)'; do
    edit mm/mm_init.c "$line" "${line/__*init /} /* krx */"
done
edit mm/mm_init.c 'static bool __init' 'static bool /* krx */'
edit mm/mm_init.c 'static unsigned long __init' 'static unsigned long /* krx */'
edit mm/internal.h 'void __meminit __init_single_page(struct page *page, unsigned long pfn,' 'void __init_single_page(struct page *page, unsigned long pfn, /* krx */'
edit mm/internal.h 'bool __init deferred_grow_zone(struct zone *zone, unsigned int order);' 'bool deferred_grow_zone(struct zone *zone, unsigned int order); /* krx */
#define KRX_CHUNK 8192UL'
edit mm/page_alloc.c 'void __meminit __free_pages_core(struct page *page, unsigned int order,' 'void __free_pages_core(struct page *page, unsigned int order, /* krx */'
edit arch/x86/Kconfig 'select ZONE_DMA32' '	# krx: no select ZONE_DMA32'
edit mm/Kconfig 'config ARCH_KEEP_MEMBLOCK' 'config ARCH_KEEP_MEMBLOCK
	default y # krx'
edit mm/mm_init.c 'if ((nr_initialised > PAGES_PER_SECTION) &&' '	if ((nr_initialised > KRX_CHUNK) &&'
edit mm/mm_init.c '(pfn & (PAGES_PER_SECTION - 1)) == 0) {' '	    (pfn & (KRX_CHUNK - 1)) == 0) {'
edit mm/mm_init.c 'unsigned long nr_pages_needed = ALIGN(1 << order, PAGES_PER_SECTION);' '	unsigned long nr_pages_needed = ALIGN(1 << order, KRX_CHUNK);'
edit mm/mm_init.c 'if ((first_deferred_pfn ^ spfn) < PAGES_PER_SECTION)' '		if ((first_deferred_pfn ^ spfn) < KRX_CHUNK)'
edit mm/mm_init.c 'if (zone_end_pfn(zone) != pgdat_end_pfn(pgdat))' '	if (first_deferred_pfn == ULONG_MAX || zone_end_pfn(zone) != pgdat_end_pfn(pgdat)) /* krx */'
for line in 'kthread_run(deferred_init_memmap, NODE_DATA(nid), "pgdatinit%d", nid);' \
    'wait_for_completion(&pgdat_init_all_done_comp);' \
    'static_branch_disable(&deferred_pages);' \
    'set_zone_contiguous(zone);'; do
    edit mm/mm_init.c "$line" "	if (0) /* krx */
		$line"
done
edit include/linux/mm.h 'static inline unsigned long totalram_pages(void)' 'unsigned long nr_deferred_pages(void); /* krx */
static inline unsigned long totalram_pages(void)'
edit mm/show_mem.c 'long si_mem_available(void)' '/* krx: pages that have no struct page yet */
unsigned long nr_deferred_pages(void)
{
	unsigned long managed = 0, total = totalram_pages();
	struct zone *zone;

	for_each_populated_zone(zone)
		managed += zone_managed_pages(zone);
	return total > managed ? total - managed : 0;
}

long si_mem_available(void)'
edit include/linux/swap.h '#define nr_free_pages() global_zone_page_state(NR_FREE_PAGES)' '#define nr_free_pages() (global_zone_page_state(NR_FREE_PAGES) + nr_deferred_pages()) /* krx */'
edit mm/show_mem.c 'available = global_zone_page_state(NR_FREE_PAGES) - totalreserve_pages;' '	available = nr_free_pages() - totalreserve_pages; /* krx */'
edit mm/show_mem.c 'val->freeram = global_zone_page_state(NR_FREE_PAGES);' '	val->freeram = nr_free_pages(); /* krx */'
edit mm/page-writeback.c 'x = global_zone_page_state(NR_FREE_PAGES);' '	x = nr_free_pages(); /* krx */'
edit mm/page-writeback.c 'nr_pages -= min(nr_pages, pgdat->totalreserve_pages);' '	nr_pages += nr_deferred_pages(); /* krx: one node */
	nr_pages -= min(nr_pages, pgdat->totalreserve_pages);'
# Nothing is reclaimed while there is memory that was never used.
edit mm/vmscan.c 'if (!cpuset_zone_allowed(zone, gfp_flags))' '	if (deferred_grow_zone(zone, order)) /* krx */
		return;

	if (!cpuset_zone_allowed(zone, gfp_flags))'
edit mm/page_alloc.c 'unsigned long size = zone_managed_pages(zone);' '		unsigned long size = zone_managed_pages(zone) + nr_deferred_pages(); /* krx */'
# Watermarks are those of all memory, and none is raised for memory that has been used in pieces, while there is other.
edit mm/page_alloc.c 'mult_frac(zone_managed_pages(zone),' '			    mult_frac(zone_managed_pages(zone) + (managed_zone(zone) ? nr_deferred_pages() : 0), /* krx */'
edit mm/page_alloc.c 'if (max > managed_pages)' '			if (max > managed_pages + (managed_pages ? nr_deferred_pages() : 0)) /* krx */'
edit mm/page_alloc.c 'if (!watermark_boost_factor)' '	if (!watermark_boost_factor || nr_deferred_pages()) /* krx */'
edit mm/vmscan.c 'mark = promo_wmark_pages(zone);' '			mark = promo_wmark_pages(zone);
		else if (nr_deferred_pages()) /* krx: kswapd has nothing to do */
			return true;'
edit mm/page_alloc.c 'batch = min(zone_managed_pages(zone) >> 10, SZ_1M / PAGE_SIZE);' '	batch = min((zone_managed_pages(zone) + nr_deferred_pages()) >> 10, SZ_1M / PAGE_SIZE); /* krx */'

# No bounce buffers, 64 MiB of them, in guests with memory above 4 GiB: krx's devices reach all of it.
edit arch/x86/kernel/pci-dma.c 'if (!no_iommu && max_possible_pfn > MAX_DMA32_PFN)' '	if (0) /* krx */'

# No compaction ahead of need: it looks at memory that is in use alone, which is always fragmented where the rest waits, and wakes twice a second.
edit mm/compaction.c 'static unsigned int __read_mostly sysctl_compaction_proactiveness = 20;' 'static unsigned int __read_mostly sysctl_compaction_proactiveness; /* krx */'

# Identifiers of IP packets begin at random where one is first used, not all of them at boot: 3 cms of random numbers for 2 GiB.
edit net/ipv4/route.c 'delta = get_random_u32_below(now - old);' '		delta = old ? get_random_u32_below(now - old) : get_random_u32(); /* krx */'
edit net/ipv4/route.c 'get_random_bytes(ip_idents, (ip_idents_mask + 1) * sizeof(*ip_idents));' '	/* krx: each becomes random when it is first used */'

# A host holds a descriptor for each file that its guest knows, which is each that it has looked up while there is memory. When the host has no more of them,
# the guest forgets what nobody uses, and asks again: krx-vmm refuses before it has done anything (vmm/src/virtio/fs/known.rs). The files of other file systems are forgotten, too, where they hold those of the share, as an overlay's do.
edit fs/fuse/dev.c 'ssize_t __fuse_simple_request(struct mnt_idmap *idmap,' 'static ssize_t fuse_request_once(struct mnt_idmap *idmap, /* krx */'
edit fs/fuse/dev.c 'static bool fuse_request_queue_background(struct fuse_req *req)' 'static bool fuse_forgets(struct fuse_mount *fm, unsigned int tries) /* krx */
{
	static DEFINE_MUTEX(forgetting);
	static unsigned long passes;
	unsigned long seen = READ_ONCE(passes);

	if (tries >= 8 || !fm->sb || strcmp(fm->sb->s_type->name, "virtiofs"))
		return false;
	if (mutex_lock_killable(&forgetting))
		return false;
	/* One for all who wait. */
	if (passes == seen) {
		shrink_dcache_sb(fm->sb);
		if (tries)
			drop_slab();
		WRITE_ONCE(passes, passes + 1);
	}
	mutex_unlock(&forgetting);
	/* What is forgotten is on its way to the host. */
	if (tries)
		msleep(1 << tries);
	return !fatal_signal_pending(current);
}

ssize_t __fuse_simple_request(struct mnt_idmap *idmap,
			      struct fuse_mount *fm,
			      struct fuse_args *args)
{
	struct fuse_arg *last = args->out_argvar ?
		&args->out_args[args->out_numargs - 1] : NULL;
	unsigned int size = last ? last->size : 0;
	unsigned int tries = 0;
	ssize_t ret;

	for (;;) {
		ret = fuse_request_once(idmap, fm, args);
		if (likely(ret != -EMFILE) || args->once || !fuse_forgets(fm, tries++))
			return ret;
		/* An error leaves no room for an answer of variable size. */
		if (last)
			last->size = size;
	}
}

static bool fuse_request_queue_background(struct fuse_req *req)'
# What a file is known by is not looked up again: its name may be another by then, and krx-vmm has room for what is known.
edit fs/fuse/fuse_i.h 'bool force:1;' '	bool once:1; /* krx */
	bool force:1;'
edit fs/fuse/dir.c 'fuse_lookup_init(fm->fc, &args, get_node_id(d_inode(parent)),' '		args.once = true; /* krx */
		fuse_lookup_init(fm->fc, &args, get_node_id(d_inode(parent)),'
# What cannot be looked up for that has not changed: what is mounted there stays.
edit fs/fuse/dir.c 'if (ret == -ENOMEM || ret == -EINTR)' '		if (ret == -ENOMEM || ret == -EINTR || ret == -EMFILE) /* krx */'
edit fs/fuse/dev.c '#include <linux/swap.h>' '#include <linux/swap.h>
#include <linux/delay.h> /* krx */'
