#!/bin/sh
# tools/emulate.sh [GTEST_FILTER]: every test of the CUDA kernels on this CPU, as sm_90a, as sm_80 and with
# races looked for, and those of the engine's device code (tests/emulator/emulator.h); about two hours on
# two cores. Logs are kept in out/emulate/.
set -eu
cd "$(dirname "$0")/.."
filter=${1:-*}
if [ ! -f build/release/build.ninja ]; then cmake --preset release >/dev/null; fi
if ! cmake --build --preset release --target help | grep -q test_engine_emulated; then
  echo "emulate: needs nvcc's headers, GCC and x86-64; see build/release/CMakeCache.txt (THRIFTATTN_CUDA)" >&2
  exit 1
fi
names="test_cuda_emulated test_cuda_emulated_sm80 test_cuda_emulated_races test_engine_emulated"
# shellcheck disable=SC2086
cmake --build --preset release --target $names
rm -rf out/emulate
mkdir -p out/emulate
for name in $names; do
  program=build/release/tests/$name
  "$program" --gtest_filter="$filter" --gtest_list_tests |
    awk -v p="$program" '/^[^ ]/ { suite = $1; next } { print p, suite $1 }'
done >out/emulate/list
if [ ! -s out/emulate/list ]; then
  echo "emulate: no test is called $filter" >&2
  exit 1
fi
# One process a test: out/emulate/TEST.log, its last line the exit status.
xargs -P "${THRIFTATTN_JOBS:-$(nproc)}" -L 1 sh -c '
  log=out/emulate/$(basename "$0")-$(printf %s "$1" | tr / _).log
  code=0
  "$0" --gtest_filter="$1" >"$log" 2>&1 || code=$?
  echo "exit status $code" >>"$log"
  if [ "$code" != 0 ]; then echo "FAILED $1 ($log)"; fi' <out/emulate/list
passed=$(grep -lx 'exit status 0' out/emulate/*.log | wc -l)
failed=$(($(wc -l <out/emulate/list) - passed))
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
