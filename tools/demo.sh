#!/bin/sh
# The main job on the demo model: a question about a document of 12 K tokens under three policies,
# then one table of quality, memory and speed at 16384 tokens. Writes out/demo.json (the array that
# `thriftattn eval -o json` prints).
#   tools/demo.sh [THRIFTATTN]   the command to use (build/release/thriftattn)
set -eu
cd "$(dirname "$0")/.."
thriftattn=${1:-${THRIFTATTN:-build/release/thriftattn}}
demo=models/demo
model=$demo/thrift-demo.gguf
question='What is the access code of Amber Falcon?'
code=48213 # models/demo/document.txt says so

fail() {
  echo "demo: $1" >&2
  exit 1
}

[ -x "$thriftattn" ] || fail "$thriftattn is not there; run 'make build'"
mkdir -p out
start=$(date +%s)

echo "The question, about $(wc -w <$demo/document.txt) words of documentation: $question"
wrong=
for policy in exact thrifty balanced; do
  log=out/run-$policy.log
  "$thriftattn" run -m $model -f $demo/document.txt -p "$question" --policy $policy -n 32 \
    >out/answer.txt 2>"$log" || { tail -n 3 "$log" >&2; fail "'run' failed under $policy"; }
  printf '\n%-9s %s\n' "$policy" "$(cat out/answer.txt)"
  sed -n 's/^\(prefill\|KV cache\|bits\) */          /p' "$log"
  grep -q "$code" out/answer.txt || wrong="$wrong $policy"
done
rm -f out/answer.txt

printf '\nAll policies at 16384 tokens, against an FP32 cache, 16 facts to find:\n\n'
"$thriftattn" eval -m $model -f $demo/eval.txt -c 16384 --needles 16 \
  --policies exact,q8_0,fp8,q4_0,thrifty,balanced,swift --save out/demo.json

printf '\nThe table is in out/demo.json. The demo took %s s.\n' $(($(date +%s) - start))
[ -z "$wrong" ] || fail "the answer under$wrong is not $code, which the document gives"
