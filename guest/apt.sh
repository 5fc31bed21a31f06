# shellcheck shell=bash
# apt.sh: an apt of our own, which needs no root and believes that nothing is installed. Sourced after cache.sh.
#
# It knows one Debian release and its backports, whatever the machine's own apt is set to, and takes the mirror
# from the machine's own sources.

SUITE=bookworm
APT=$CACHE/apt
APT_OPTIONS=(-q -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$APT/sources.d"
  -o "Dir::Etc::preferencesparts=/dev/null" -o "Dir::State::lists=$APT/lists" -o "Dir::State::status=$APT/status"
  -o "Dir::Cache=$APT/cache" -o APT::Sandbox::User= -o Acquire::Languages=none -o Acquire::Retries=3
  -o APT::Get::List-Cleanup=true)

# The mirror that the machine's own apt takes Debian from.
mirror() {
  local uri
  # shellcheck disable=SC2016 # apt's own variables
  uri=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT) $(LABEL)' 'Created-By: Packages' |
    awk '$2 == "main" && $3 == "Debian" {print $1; exit}')
  if [ -z "$uri" ]; then # indextargets knows only what an update has seen
    uri=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
      sed -n 's/^deb \(\[[^]]*\] \)\?\([^ ]*\) .* main.*/\2/p'
      sed -n 's/^URIs: *\([^ ]*\).*/\1/p' /etc/apt/sources.list.d/*.sources 2>/dev/null; } |
      grep '/debian/\?$' | head -1)
  fi
  [ -n "$uri" ] || die "no Debian mirror among apt's sources: add one to /etc/apt/sources.list.d and run apt-get update"
  echo "$uri"
}

# private_apt: makes the lists ready, fetched anew when older than a day (a mirror drops old package files).
private_apt() {
  local stamp=$APT/stamp key
  key=$(key "$HERE/apt.sh")
  exec 8>"$CACHE/.lock-apt"
  flock 8
  if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ] || [ -n "$(find "$stamp" -mmin +1440)" ]; then
    mkdir -p "$APT"/{sources.d,lists/partial,cache/archives/partial}
    : >"$APT/status"
    printf '%s\n' 'Types: deb' "URIs: $(mirror)" "Suites: $SUITE $SUITE-backports" 'Components: main' \
      'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' >"$APT/sources.d/debian.sources"
    quietly apt-get "${APT_OPTIONS[@]}" update
    echo "$key" >"$stamp"
  fi
  exec 8>&-
}

# fetch FOLDER PACKAGE[=VERSION|/SUITE]...: unpacks these packages (not what they depend on) into FOLDER.
fetch() {
  local folder=$1 debs deb
  shift
  private_apt
  debs=$(mktemp -d "$CACHE/.debs.XXXXXX")
  (cd "$debs" && quietly apt-get "${APT_OPTIONS[@]}" download "$@")
  mkdir -p "$folder"
  for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" "$folder"; done
  rm -rf "$debs"
}
