#!/bin/sh
# Installs the Debian packages that building and testing need. Asks dpkg first, so it takes
# little time and needs neither network nor root when nothing is missing.
set -eu

# docs/dependencies.md says what each is for.
packages="
  g++ clang libclang-rt-14-dev cmake ninja-build pkg-config git python3
  libhwy-dev libtbb-dev libfmt-dev nlohmann-json3-dev
  libdnnl-dev ocl-icd-opencl-dev libpcre2-dev libxxhash-dev libcli11-dev
  libgtest-dev libgmock-dev
  libstdc++-12-dev-arm64-cross
"

fail() {
  echo "setup: $1" >&2
  exit 1
}

missing_packages() {
  for package in $packages; do
    status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) || status=
    [ "$status" = installed ] || printf ' %s' "$package"
  done
}

command -v dpkg-query >/dev/null ||
  fail "this is not a Debian system; install the equivalents of these and go on with 'cmake --preset release':" $packages

missing=$(missing_packages)
[ -n "$missing" ] || exit 0

echo "setup: installing$missing"
if [ "$(id -u)" = 0 ]; then
  as_root=
elif command -v sudo >/dev/null; then
  as_root=sudo
else
  fail "these packages are missing and neither root nor sudo is at hand; as root run: apt-get install$missing"
fi

install() {
  $as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get -q install -y --no-install-recommends -o Dpkg::Use-Pty=0 $missing
}

# Package lists may be absent or stale; only then is the slower update worth its time.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! install >"$log" 2>&1; then
  if ! { $as_root apt-get -q update && install; } >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "apt-get could not install$missing (log above); check the network and /etc/apt/sources.list, then repeat"
  fi
fi
missing=$(missing_packages)
[ -z "$missing" ] || fail "still missing after apt-get:$missing"
