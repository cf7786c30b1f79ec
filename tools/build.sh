#!/bin/sh
# tools/build.sh PRESET: configures (once, or when the options changed) and builds a CMake preset.
# Quiet when nothing is to do; the whole log stays in build/PRESET/build.log.
set -eu
cd "$(dirname "$0")/.."
preset=$1
log=build/$preset/build.log
mkdir -p "build/$preset"

run() {
  "$@" >>"$log" 2>&1 && return
  code=$?
  grep -aE 'error:|CMake Error|undefined reference' -A 5 "$log" | head -n 60 >&2 || true
  echo "build: '$*' failed; the whole log is in $log" >&2
  exit "$code"
}

# One build at a time in a directory: the sources are shared, Ninja's log is not made for two.
exec 9>"build/$preset/lock"
if command -v flock >/dev/null; then flock 9; fi

: >"$log"
jobs=${THRIFTATTN_JOBS:-$(nproc)}
start=$(date +%s)
# Ninja configures again by itself when a CMakeLists.txt or the set of sources changes.
if [ ! -f "build/$preset/build.ninja" ] || [ CMakePresets.json -nt "build/$preset/build.ninja" ]; then
  run cmake --preset "$preset"
fi
echo "build: preset $preset with $jobs jobs"
if [ -t 1 ]; then
  # A terminal sees Ninja's own progress line.
  cmake --build --preset "$preset" -- -j"$jobs" || exit 1
else
  run cmake --build --preset "$preset" -- -j"$jobs"
fi
echo "build: build/$preset is up to date ($(($(date +%s) - start)) s)"
