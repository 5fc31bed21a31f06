# shellcheck shell=bash
# cache.sh: where the guest scripts keep what they make, and how a step is done once only. Sourced.
#
# Everything lies under $TEREM_CACHE (default: ~/.cache/terem). A step's result is a folder of it, made under
# another name and then renamed, so it is there completely or not at all; the file `key` inside says what it was
# made from (the scripts' own text above all), so that an edit makes it anew.

CACHE=${TEREM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/terem}
mkdir -p "$CACHE"
CACHE=$(cd "$CACHE" && pwd -P)
# shellcheck disable=SC2034 # for the scripts that source this
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
ME=${0##*/}
# Tools that guest/setup fetched for a user who cannot install them come after the system's own. The sbin
# folders are not in an ordinary user's path, but mke2fs lies there.
PATH=$PATH:/usr/sbin:/sbin:$CACHE/tools/usr/bin:$CACHE/tools/usr/sbin:$CACHE/tools/bin:$CACHE/tools/sbin
export PATH

say() { echo "guest/$ME: $*" >&2; }
die() { say "error: $*"; exit 1; }

# key WORD... : a digest of the words and of the files among them.
key() {
  local word
  for word in "$@"; do
    if [ -f "$word" ]; then cat "$word"; else echo "$word"; fi
  done | sha256sum | cut -c1-16
}

# step NAME KEY FUNCTION: $CACHE/NAME made by FUNCTION, which is called with the folder to fill, unless a finished
# one of this key is there already. Two at once: the second waits, and then finds it done.
step() {
  local name=$1 key=$2 make=$3 folder=$CACHE/$1 work began=$SECONDS
  [ "$(cat "$folder/key" 2>/dev/null)" != "$key" ] || return 0
  exec 9>"$CACHE/.lock-$name"
  flock 9
  if [ "$(cat "$folder/key" 2>/dev/null)" != "$key" ]; then
    work=$CACHE/.new-$name
    remove "$work"
    mkdir -p "$work"
    "$make" "$work"
    echo "$key" >"$work/key"
    remove "$folder"
    mv "$work" "$folder"
    say "$name ready after $((SECONDS - began)) s: $folder"
  fi
  exec 9>&-
}

# remove FOLDER: with all in it, also read-only folders.
remove() {
  [ ! -e "$1" ] || { chmod -R u+w "$1" 2>/dev/null || true; rm -rf "$1"; }
}

# quietly COMMAND...: its output goes to $CACHE/log and is shown only when it fails.
quietly() {
  local log=$CACHE/log-$ME
  if ! "$@" >"$log" 2>&1 9>&-; then
    say "failed: $*"
    tail -15 "$log" >&2
    exit 1
  fi
}
