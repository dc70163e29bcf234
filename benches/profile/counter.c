/*
 * A plugin for QEMU's emulator (TCG) that counts how often each block of instructions is executed, on the emulated host and in
 * the guests of its KVM alike, between two marks that a program sets (mark.c).
 *
 * counter.so,out=FILE: after the second mark FILE has a line for each block: its address, its instructions, how often it was
 * executed, and its first bytes, by which profile.py tells whose it is.
 *
 * The interface is version 1 of QEMU's qemu-plugin.h (docs/devel/tcg-plugins.rst), declared here as far as it is used, as no
 * package of Debian 12 has that file.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { ADD_U64 = 0 };
enum { NO_REGISTERS = 0 };

extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned, void *), int, void *);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
extern size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

/* Of a block's bytes, as many are kept as tell it from others at its address. */
enum { KEPT = 32, BUCKETS = 1 << 16 };

struct block {
	struct block *next;
	uint64_t address, instructions, before, executed;
	unsigned char bytes[KEPT];
	size_t length;
};

static struct block *blocks[BUCKETS];
static const char *out;

/* A `nop` with an operand that nobody else uses; the last byte says which mark it is. */
static const unsigned char MARK[] = { 0x0f, 0x1f, 0x84, 0x00, 'k', 'r', 'x' };

static void begin(unsigned cpu, void *data)
{
	(void)cpu, (void)data;
	for (size_t i = 0; i < BUCKETS; i++)
		for (struct block *block = blocks[i]; block; block = block->next)
			block->before = block->executed;
}

static void end(unsigned cpu, void *data)
{
	(void)cpu, (void)data;
	FILE *file = fopen(out, "w");
	if (!file) {
		perror(out);
		return;
	}
	for (size_t i = 0; i < BUCKETS; i++) {
		for (struct block *block = blocks[i]; block; block = block->next) {
			if (block->executed == block->before)
				continue;
			fprintf(file, "%llx %llu %llu ", (unsigned long long)block->address,
				(unsigned long long)block->instructions,
				(unsigned long long)(block->executed - block->before));
			for (size_t j = 0; j < block->length; j++)
				fprintf(file, "%02x", block->bytes[j]);
			fputc('\n', file);
		}
	}
	fclose(file);
}

/* The same code is translated again and again, as QEMU drops what it has translated. */
static struct block *find(const struct block *wanted)
{
	size_t bucket = (wanted->address ^ wanted->address >> 16 ^ wanted->instructions << 11) % BUCKETS;
	for (struct block *block = blocks[bucket]; block; block = block->next)
		if (block->address == wanted->address && block->instructions == wanted->instructions &&
		    block->length == wanted->length && !memcmp(block->bytes, wanted->bytes, wanted->length))
			return block;
	struct block *block = malloc(sizeof *block);
	if (!block)
		abort();
	*block = *wanted;
	block->next = blocks[bucket];
	blocks[bucket] = block;
	return block;
}

static void translated(plugin_id id, struct qemu_plugin_tb *tb)
{
	(void)id;
	struct block block = { .address = qemu_plugin_tb_vaddr(tb), .instructions = qemu_plugin_tb_n_insns(tb) };
	for (size_t i = 0; i < block.instructions; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		const unsigned char *bytes = qemu_plugin_insn_data(insn);
		size_t size = qemu_plugin_insn_size(insn);
		size_t kept = size < KEPT - block.length ? size : KEPT - block.length;
		memcpy(block.bytes + block.length, bytes, kept);
		block.length += kept;
		if (size == sizeof MARK + 1 && !memcmp(bytes, MARK, sizeof MARK))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, bytes[7] == 1 ? begin : end, NO_REGISTERS, NULL);
	}
	qemu_plugin_register_vcpu_tb_exec_inline(tb, ADD_U64, &find(&block)->executed, 1);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
	(void)info;
	for (int i = 0; i < argc; i++)
		if (!strncmp(argv[i], "out=", 4))
			out = strdup(argv[i] + 4);
	if (!out) {
		fprintf(stderr, "counter: out=FILE is missing\n");
		return 1;
	}
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
