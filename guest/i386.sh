# shellcheck shell=bash
# i386.sh: 32-bit packages beside the machine's own. Sourced after apt.sh and initramfs.sh.

# as_i386 COMMAND...: runs the command with apt.sh's functions turned to Debian's i386 architecture, which has lists
# of its own.
as_i386() (
  APT=$APT-i386
  # The last one of an option counts.
  APT_OPTIONS+=(-o "Dir::Etc::sourceparts=$APT/sources.d" -o "Dir::State::lists=$APT/lists"
    -o "Dir::State::status=$APT/status" -o "Dir::Cache=$APT/cache" -o APT::Architecture=i386
    -o APT::Architectures::=i386)
  "$@"
)

# busybox_i386: as busybox, for 32-bit guests.
busybox_i386() {
  step busybox-i386 "$(key "$HERE/i386.sh" "$HERE/initramfs.sh" "$HERE/apt.sh")" fetch_busybox_i386
  echo "$CACHE/busybox-i386/bin/busybox"
}

fetch_busybox_i386() {
  as_i386 fetch_busybox "$1"
}
