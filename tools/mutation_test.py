#!/usr/bin/env python3
"""Breaks one key line at a time and checks that a test turns red.

Reads tests/mutations.json: a list of {"file", "old", "new", "test", "why"}; "old" must occur
exactly once in the file, "test" is a CTest name pattern. For each entry the line is changed,
the build directory rebuilt and the tests run; the entry passes if they fail (or the change does
not compile). The file is restored whatever happens. With --markdown the outcome is printed as
the table of docs/testing.md.

Usage: tools/mutation_test.py --build build/release [--only SUBSTRING] [--markdown]
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(command):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False)


def try_mutation(entry, build):
    path = ROOT / entry["file"]
    original = path.read_text()
    if original.count(entry["old"]) != 1:
        return f"STALE: the line occurs {original.count(entry['old'])} times"
    try:
        path.write_text(original.replace(entry["old"], entry["new"]))
        built = run(["cmake", "--build", build])
        if built.returncode != 0:
            return "does not compile: " + built.stdout.strip().splitlines()[-1]
        tested = run(["ctest", "--test-dir", build, "-R", entry["test"], "--no-tests=error",
                      "--stop-on-failure"])
        if tested.returncode == 0:
            return "SURVIVED"
        failed = [line for line in tested.stdout.splitlines() if "***" in line]
        return "red" + (": " + failed[0].split()[3] if failed and len(failed[0].split()) > 3 else "")
    finally:
        path.write_text(original)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", required=True, help="a configured build directory with tests")
    parser.add_argument("--only", default="", help="only entries whose file or why contains this")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    entries = json.loads((ROOT / "tests/mutations.json").read_text())
    bad = 0
    if args.markdown:
        print("| file | key line | broken to | turns red |\n|---|---|---|---|")
    for entry in entries:
        if args.only not in entry["file"] + entry["why"]:
            continue
        outcome = try_mutation(entry, args.build)
        red = outcome.startswith("red")
        bad += not red
        if args.markdown:
            broken = " ".join(entry["new"].split()).replace("|", "\\|")
            print(f"| `{entry['file']}` | {entry['why']} | `{broken}` | {outcome} |",
                  flush=True)
        else:
            print(f"{'ok ' if red else 'BAD'} {entry['file']}: {entry['why']}: {outcome}", flush=True)
    run(["cmake", "--build", args.build])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
