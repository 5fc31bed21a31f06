# shellcheck shell=bash
# sources.sh: source packages. Sourced after apt.sh.

# fetch_sources FOLDER PACKAGE...: the upstream archives of these source packages. Their list is one of its own, as
# nothing else needs it.
fetch_sources() {
  local folder=$1 options=("${APT_OPTIONS[@]}" -o "Dir::State::lists=$APT/source-lists"
    -o "Dir::Etc::sourceparts=$APT/source-sources.d")
  shift
  private_apt
  mkdir -p "$APT"/source-{sources.d,lists/partial}
  sed -e 's/^Types:.*/Types: deb-src/' -e "s/^Suites:.*/Suites: $SUITE/" "$APT/sources.d/debian.sources" \
    >"$APT/source-sources.d/debian.sources"
  quietly apt-get "${options[@]}" update
  (cd "$folder" && quietly apt-get "${options[@]}" source --only-source --download-only --tar-only "$@")
}
