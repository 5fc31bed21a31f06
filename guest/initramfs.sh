# shellcheck shell=bash
# initramfs.sh: makes small initramfs archives of busybox, kernel modules and an init script. Sourced after
# cache.sh and apt.sh.

# module_order KERNEL NAME...: the files of these modules of a kernel folder and of all that they depend on, each
# after what it depends on. A module that is built into the kernel has no file and is left out.
module_order() {
  local kernel=$1 name
  shift
  declare -A seen=()
  for name in "$@"; do module_visit "$kernel" "$name"; done
}

module_visit() {
  local kernel=$1 name=${2//-/_} file depends depend
  [ -z "${seen[$name]:-}" ] || return 0
  seen[$name]=1
  # A file's name may have dashes where the module's has underscores.
  file=$(find "$kernel/lib/modules" -name "${name//_/[-_]}.ko*" -print -quit)
  [ -n "$file" ] || return 0
  depends=$(module_text "$file" | tr '\0' '\n' | sed -n 's/^depends=//p')
  for depend in ${depends//,/ }; do module_visit "$kernel" "$depend"; done
  echo "$file"
}

module_text() {
  case $1 in *.xz) xz -dc "$1" ;; *.zst) zstd -dc "$1" ;; *) cat "$1" ;; esac
}

# add_modules KERNEL ROOT NAME...: puts the modules into ROOT/modules, unpacked, and for each NAME a file NAME.order
# with the files to load, in their order.
add_modules() {
  local kernel=$1 root=$2 name file base
  shift 2
  mkdir -p "$root/modules"
  for name in "$@"; do
    for file in $(module_order "$kernel" "$name"); do
      base=${file##*/}
      base=${base%%.ko*}.ko
      [ -e "$root/modules/$base" ] || module_text "$file" >"$root/modules/$base"
      echo "/modules/$base"
    done >"$root/modules/$name.order"
  done
}

# busybox: Debian's static one, fetched once; prints its path.
busybox() {
  step busybox "$(key "$HERE/initramfs.sh" "$HERE/apt.sh")" fetch_busybox
  echo "$CACHE/busybox/bin/busybox"
}

fetch_busybox() {
  say "fetching busybox-static"
  fetch "$1" busybox-static
  if [ -e "$1/usr/bin/busybox" ]; then mkdir -p "$1/bin" && mv "$1/usr/bin/busybox" "$1/bin/busybox"; fi
  rm -rf "${1:?}"/{usr,etc}
}

# pack ROOT ARCHIVE: ROOT as an initramfs owned by root, not compressed: unpacking takes long in an emulated guest.
pack() {
  local box
  box=$(busybox)
  (cd "$1" && find . | sort | "$box" cpio -o -H newc -R 0:0 2>/dev/null) >"$2"
}
