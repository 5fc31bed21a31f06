# Teremok: what there is to do, and how. All of it runs on a Debian 12 machine with a Rust toolchain and make; what else
# it takes is installed by guest/setup.

.PHONY: all demo test check shellcheck guests fuzz bench clean

FUZZ_SECONDS ?= 10
SCRIPTS := .ci/run .ci/fuzz guest/setup guest/i386.sh guest/sources.sh guest/kernel guest/minimal guest/memtest guest/debian guest/debian-demo \
  guest/debian-task guest/tree guest/demo bench/boot bench/guest bench/start bench/cpu bench/block tests/qemu-iotests bench/nbd bench/luks bench/sides.sh bench/programs/run \
  tests/guests/lasting/run
SH_SCRIPTS := guest/minimal-init guest/debian-init bench/programs/work.sh

all:
	cargo build --release --workspace

# Builds everything and runs a Debian guest: with a login prompt on a terminal, unattended otherwise.
demo:
	@guest/demo

# All tests; some minutes, most of them for the guests that they run.
test: guests
	cargo test --release --workspace --no-fail-fast
	.ci/fuzz $(FUZZ_SECONDS)

# The quick loop: format, lints, unit tests.
check: shellcheck
	guest/setup --test
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo test --workspace --lib --bins

shellcheck:
	@if command -v shellcheck >/dev/null; then shellcheck $(SCRIPTS) && shellcheck -s dash $(SH_SCRIPTS); \
	else echo "no shellcheck here: the scripts are not checked"; fi

# What the tests run: kernels, the minimal guests, the Debian guests.
guests:
	guest/setup --test
	guest/minimal 6.1
	guest/minimal 6.12
	guest/minimal 6.1-686-pae
	guest/minimal 6.1-686
	cargo build --release --workspace
	guest/debian
	guest/debian tools

# Each fuzz target for FUZZ_SECONDS.
fuzz:
	guest/setup --test
	.ci/fuzz $(FUZZ_SECONDS)

# Against QEMU, both sides in one run.
bench: guests
	bench/start
	bench/boot
	bench/guest
	bench/cpu
	bench/block
	bench/nbd
	cargo build --release -p terem-crypt --example speed
	bench/luks

# The guests' files stay: they are in $$TEREM_CACHE, or ~/.cache/terem.
clean:
	cargo clean
	rm -rf fuzz/corpus fuzz/artifacts fuzz/target
