# shellcheck shell=bash
# sides.sh: the two programs that are compared, started with the same machine. Sourced by the benchmarks.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
TEREM=${TEREM:-${CARGO_TARGET_DIR:-$ROOT/target}/release/terem}
# shellcheck disable=SC2034 # for the scripts that source this
SIDES='terem qemu'

say() { echo "bench/${0##*/}: $*" >&2; }
die() { say "error: $*"; exit 1; }

# need PROGRAM...: is it there?
need() {
  local program
  for program in "$@"; do command -v "$program" >/dev/null || die "no $program: run guest/setup --test and cargo build --release"; done
}

# side NAME KERNEL INITRD CMDLINE CPUS MIB [DISK...]: sets the array `command`. Guest memory is in a memfd on both sides,
# so that it can be told from the program's own. A disk is FORMAT:FILE, and what is written to it is thrown away.
side() {
  local name=$1 disk
  case $name in
    terem)
      command=("$TEREM" run --name "bench-$$-$RANDOM" --cpus "$5" --memory "${6}M" --net none
        --kernel "$2" --initrd "$3" --cmdline "$4")
      [ "$(model)" = default ] || command+=(--cpu "$(model)")
      ;;
    qemu)
      command=(qemu-system-x86_64 -accel "tcg,thread=multi" -cpu max -machine "q35,memory-backend=ram"
        -object "memory-backend-memfd,id=ram,size=${6}M" -m "${6}M" -smp "$5" -nodefaults -display none
        -no-reboot -serial stdio -device virtio-rng-pci -kernel "$2" -initrd "$3" -append "$4")
      ;;
  esac
  shift 6
  for disk in "$@"; do
    case $name in
      terem) command+=(--disk "${disk#*:},format=${disk%%:*},snapshot") ;;
      qemu) command+=(-drive "if=virtio,format=${disk%%:*},file=${disk#*:},snapshot=on") ;;
    esac
  done
}

# model: terem's CPU model with all that it can, as QEMU's `max` is.
model() {
  if "$TEREM" run --cpu max --kernel /dev/null --net none --plan >/dev/null 2>&1; then echo max; else echo default; fi
}

# median NUMBER...
median() {
  printf '%s\n' "$@" | sort -n | awk '{a[NR] = $1} END {print NR % 2 ? a[(NR + 1) / 2] : (a[NR / 2] + a[NR / 2 + 1]) / 2}'
}

# warm DIRECTORY MIB: has the host of a virtual machine give it that much memory, by a file that is removed again. Memory that
# the machine did not use for some seconds is taken away by some hosts; without this, who comes first pays for it.
warm() {
  dd if=/dev/zero of="$1/warm" bs=1M count="$2" status=none
  rm "$1/warm"
}

# cpu_seconds PID: what a process (with its threads) has used so far.
cpu_seconds() {
  local stat ticks
  stat=$(<"/proc/$1/stat")
  read -r -a ticks <<<"${stat##*) }"
  awk -v ticks=$((ticks[11] + ticks[12])) -v second="$(getconf CLK_TCK)" 'BEGIN {printf "%.2f", ticks / second}'
}

# What the numbers were measured on, as a JSON object.
machine_json() {
  printf '{"cpu": "%s", "cpus": %d, "kernel": "%s", "qemu": "%s", "terem": "%s"}' \
    "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -1)" "$(nproc)" "$(uname -r)" \
    "$(qemu-system-x86_64 --version | sed -n '1s/.*version \([^ ]*\).*/\1/p')" "$("$TEREM" --version | head -1)"
}
