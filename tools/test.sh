#!/bin/bash
# Everything that CI requires: release build and all tests, then the address and
# undefined-behaviour sanitizers over the tests at small sizes, then the fuzzers.
#   THRIFTATTN_FUZZ_SECONDS  total over the fuzzers (60)
#   THRIFTATTN_JOBS          parallel jobs (one a core)
# Goes on after a failure; the last line counts the tests, the exit status is 0 if all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
jobs=${THRIFTATTN_JOBS:-$(nproc)}
fuzz_seconds=${THRIFTATTN_FUZZ_SECONDS:-60}
passed=0
failed=0
failures=()

fail() {
  failed=$((failed + 1))
  failures+=("$1")
}

step() { printf '\n== %s (%s)\n' "$1" "$(date +%H:%M:%S)"; }

# run_tests PRESET: adds up ctest's own results.
run_tests() {
  local summary total bad
  ctest --preset "$1" -j "$jobs" --output-junit tests.xml >"build/$1/tests.log" 2>&1
  local code=$?
  summary=$(grep -aE '^[0-9]+% tests passed' "build/$1/tests.log")
  if [ -z "$summary" ]; then
    tail -n 20 "build/$1/tests.log"
    fail "$1: ctest did not run (build/$1/tests.log)"
    return
  fi
  bad=$(sed -E 's/.* ([0-9]+) tests? failed out of.*/\1/' <<<"$summary")
  total=$(sed -E 's/.* out of ([0-9]+).*/\1/' <<<"$summary")
  if [ "$code" != 0 ]; then
    grep -aE '[*]{3}|: Failure$|runtime error:|Sanitizer:|does not exist$' "build/$1/tests.log" |
      head -n 60
    while read -r name; do failures+=("$1: $name"); done < <(
      # Skipped ones are in a list of their own, before.
      sed -nE '/^The following tests FAILED:/,$ s/^[[:space:]]*[0-9]+ - (.*) \([^()]*\).*/\1/p' \
        "build/$1/tests.log" | sort -u)
    [ "$bad" -gt 0 ] || bad=1
  fi
  failed=$((failed + bad))
  passed=$((passed + total - bad))
  echo "$1: $((total - bad)) of $total tests passed"
}

check_warnings() {
  local count
  count=$(grep -acE 'warning:' "build/$1/build.log" || true)
  [ "$count" = 0 ] && return
  grep -aE 'warning:' "build/$1/build.log" | sort -u | head -n 20
  if [ "${CI:-}" = true ]; then fail "$1: $count compiler warnings"; fi
}

for preset in release asan; do
  step "build $preset"
  # Pipes keep Ninja's output in build.log, where the warnings are counted.
  if tools/build.sh "$preset" | cat; then
    check_warnings "$preset"
    step "test $preset"
    run_tests "$preset"
  else
    fail "$preset: build"
  fi
done

shopt -s nullglob
fuzzers=(build/asan/fuzz/*_fuzz)
if [ ${#fuzzers[@]} -gt 0 ]; then
  # All at once, so long that they have fuzz_seconds of the cores together.
  together=$((jobs < ${#fuzzers[@]} ? jobs : ${#fuzzers[@]}))
  step "fuzz ($fuzz_seconds s over ${#fuzzers[@]} targets)"
  pids=()
  for fuzzer in "${fuzzers[@]}"; do
    name=$(basename "$fuzzer")
    corpus=build/asan/corpus/$name
    mkdir -p "$corpus" build/asan/artifacts
    seeds=()
    [ -d "tests/fuzz/corpus/$name" ] && seeds=("tests/fuzz/corpus/$name")
    dict=()
    [ -f "tests/fuzz/$name.dict" ] && dict=("-dict=tests/fuzz/$name.dict")
    "$fuzzer" "${dict[@]}" -max_total_time=$(((fuzz_seconds + together - 1) / together)) \
      -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=1 \
      -artifact_prefix="build/asan/artifacts/$name-" "$corpus" "${seeds[@]}" \
      >"build/asan/$name.log" 2>&1 &
    pids+=($!)
  done
  for i in "${!fuzzers[@]}"; do
    name=$(basename "${fuzzers[$i]}")
    if wait "${pids[$i]}"; then
      passed=$((passed + 1))
      echo "$name: $(sed -n 's/^stat::number_of_executed_units: *//p' "build/asan/$name.log") inputs"
    else
      grep -aE 'ERROR|SUMMARY|runtime error|Test unit written|Base64' "build/asan/$name.log"
      fail "fuzz: $name (build/asan/$name.log)"
    fi
  done
fi

step "summary"
for failure in "${failures[@]}"; do echo "FAILED $failure"; done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
