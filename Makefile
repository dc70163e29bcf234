# krx: `make demo` shows it, `make test` tests it, `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help setup build programs install deb kernel initramfs rootfs containerd demo test e2e soak lint check bench profile fuzz fmt clean
export PATH := $(HOME)/.cargo/bin:$(PATH)

initramfs = scripts/agent && rootfs/initramfs.sh target/x86_64-unknown-linux-gnu/agent/krx-agent
unexport MAKEFLAGS

help: ## This list
	@sed -n -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: ## Install what is missing (as root), or say exactly what to install
	@scripts/setup

# The kernel beside the rest: an optimising linker leaves a processor idle.
build: setup ## Everything a user runs: krx, krx-vmm, the shim, guest kernel, initramfs
	@$(MAKE) --no-print-directory --jobs=2 kernel programs

programs: setup
	@$(initramfs) && scripts/programs

install: ## Install what is built; PREFIX=/usr/local and DESTDIR= say where
	@PREFIX="$(or $(PREFIX),/usr/local)" DESTDIR="$(DESTDIR)" scripts/install

deb: ## Debian package of what is built (needs cargo-deb)
	@scripts/deb

kernel: setup ## Guest kernel (target/guest/vmlinux); KERNEL_SRC= and KERNEL= override
	@kernel-config/build.sh

initramfs: setup ## Agent, static, in its initramfs (target/guest/initramfs.cpio)
	@$(initramfs)

rootfs: setup ## Root file systems of the tests and the demo (target/guest/python-rootfs and those of software-rootfs.sh)
	@rootfs/python-rootfs.sh && for set in software programs runtimes; do rootfs/software-rootfs.sh $$set || exit 1; done

containerd: setup ## Debian's containerd, runc and CNI plugins, unpacked for the tests (target/containerd)
	@scripts/containerd-tools

demo: build rootfs ## Run python3 in a micro-VM and show what ran where
	@scripts/demo

test: build rootfs containerd ## All tests: unit, VM and end to end
	@scripts/test

e2e: build rootfs containerd ## VM and end-to-end tests alone; TESTS=name filters
	@scripts/test --e2e $(TESTS)

soak: build rootfs containerd ## Failures under containerd, and programs, at length (some hours where KVM is emulated); KRX_SEED= repeats a run
	@scripts/test --soak

lint: setup ## Formatting, clippy, licences and advisories (where cargo-deny is installed)
	@cargo fmt --all --check && cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	@cargo fmt --manifest-path fuzz/Cargo.toml --check && cargo clippy --manifest-path fuzz/Cargo.toml --all-targets --locked --quiet --target-dir target -- -D warnings
	@if cargo deny --version >/dev/null 2>&1; then cargo deny --log-level error check; else echo "lint: cargo-deny is not installed, deny.toml not checked"; fi

check: lint test ## What CI runs

bench: build rootfs containerd ## Latency and memory in counted time, in the emulated host; BENCH=boot, containerd or throughput alone, ARGS="--runs N"
	@scripts/workload && rootfs/software-rootfs.sh throughput
	@failed=; for bench in $(or $(BENCH),boot containerd throughput); do \
		cargo bench --locked -p benches --bench $$bench -- --icount $(ARGS) || failed="$$failed $$bench"; done; [ -z "$$failed" ]

profile: build ## Where the counted time of a start goes, by function; WHAT=vm or container, ARGS="--runs N --top N"; WHAT=memory: what a guest's is for
	@if [ "$(WHAT)" = memory ]; then rootfs/python-rootfs.sh && benches/profile/memory.py; else \
		cargo build --locked --quiet --profile bench -p benches --bin profiled --bin flame && benches/profile/profile.py $(or $(WHAT),vm) $(ARGS); fi

fuzz: setup ## Every fuzz target for TIME=60 seconds (libFuzzer; needs g++)
	@fuzz/run $(or $(TIME),60)

fmt: ## Format the sources
	@cargo fmt --all

clean: ## Remove all that was built
	@rm -rf target
