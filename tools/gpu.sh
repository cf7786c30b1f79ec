#!/bin/sh
# tools/gpu.sh test|sanitize|bench: what needs an NVIDIA GPU, on the machine it is on. `test` runs the GPU
# tests, which fail here where there is no device; `sanitize [TOOL [GTEST_FILTER]]` runs each test of
# the kernels under compute-sanitizer (memcheck; racecheck has a build of its own, docs/testing.md), eight
# at a time and THRIFTATTN_SANITIZE_SECONDS (300) each at most, logs in out/sanitize/; `bench` writes
# out/gpu-bench.jsonl (and PyTorch's SDPA on the same shapes where it is installed), with date, device,
# driver and commit on top.
set -eu
cd "$(dirname "$0")/.."
if ! command -v nvidia-smi >/dev/null; then
  echo "gpu: no nvidia-smi here; run this on a machine with an NVIDIA GPU and its driver" >&2
  exit 1
fi
[ "${1:-}/${2:-}" = sanitize/racecheck ] || tools/build.sh release
case ${1:-} in
  test)
    status=0
    build/release/tests/test_cuda || status=1
    build/release/tests/test_engine --gtest_filter='Device*' || status=1
    # Once more where several processes share the device: kernels are interrupted then.
    shared=DeviceTest.PoliciesMatchTheCpu
    pids=
    for _ in 1 2 3 4 5 6; do
      build/release/tests/test_engine --gtest_brief=1 --gtest_filter=$shared & pids="$pids $!"
    done
    for pid in $pids; do wait "$pid" || status=1; done
    build/release/tests/test_bench --gtest_filter='Device*' || status=1
    build/release/tests/test_cli --gtest_filter='CliBench.Device*' || status=1
    exit $status
    ;;
  sanitize)
    tool=${2:-memcheck}
    out=out/sanitize
    build=build/release
    if [ "$tool" = racecheck ]; then
      build=build/racecheck
      cmake --preset release -B "$build" -DTHRIFTATTN_ARRIVE_EACH=ON -DTHRIFTATTN_CUDA_OTHERS=
      cmake --build "$build" --target test_cuda
    fi
    rm -rf "$out"
    mkdir -p "$out"
    # Last and alone, the test that takes all of the device's memory.
    alone=CudaFailures.WithoutMemoryTheCacheStaysUsable
    "$build/tests/test_cuda" --gtest_filter="${3:-*}" --gtest_list_tests |
      awk '/^[^ ]/ { suite = $1; next } { print suite $1 }' >"$out/list"
    # Tests make calls that fail, and some need no device.
    for parallel in 8 1; do
      case $parallel in 8) grep -vx "$alone" "$out/list" ;; *) grep -x "$alone" "$out/list" ;; esac |
        xargs -r -P $parallel -I '{}' sh -c '
          log=$0/$(printf %s "$2" | tr / _).log
          code=0
          timeout "$3" compute-sanitizer --tool "$1" --error-exitcode 9 --report-api-errors no \
            --require-cuda-init no "$4/tests/test_cuda" --gtest_filter="$2" >"$log" 2>&1 || code=$?
          echo "exit status $code" >>"$log"
          case $code in 0) ;; 124) echo "NOT FINISHED $2" ;; *) echo "FAILED $2 ($log)" ;; esac
        ' "$out" "$tool" '{}' "${THRIFTATTN_SANITIZE_SECONDS:-300}" "$build"
    done
    passed=$(grep -lx 'exit status 0' "$out"/*.log | wc -l)
    late=$(grep -lx 'exit status 124' "$out"/*.log | wc -l)
    failed=$(($(wc -l <"$out/list") - passed - late))
    echo "$tool: $passed passed, $failed failed, $late not finished"
    [ "$failed" = 0 ] && [ "$late" = 0 ]
    ;;
  bench)
    mkdir -p out
    rows=out/gpu-bench.jsonl
    {
      echo "# $(date -u +%Y-%m-%dT%H:%MZ), $(git rev-parse --short HEAD 2>/dev/null || echo unknown commit)"
      nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | sed 's/^/# /'
    } >"$rows"
    status=0
    build/release/thriftattn_cuda_bench >>"$rows" || status=1
    if python3 -c 'import torch' 2>/dev/null; then
      python3 bench/sdpa_bench.py "$rows" >"$rows.sdpa" || status=1
      cat "$rows.sdpa" >>"$rows"
      rm "$rows.sdpa"
    fi
    cat "$rows"
    exit $status
    ;;
  *)
    echo "usage: tools/gpu.sh test|sanitize|bench" >&2
    exit 2
    ;;
esac
