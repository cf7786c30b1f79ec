#!/usr/bin/env python3
"""Breaks one key line at a time and checks that a test turns red.

Reads tests/mutations.json: a list of {"file", "old", "new", "test", "why"}; "old" must occur
exactly once in the file, "test" is a CTest name pattern. For each entry the line is changed,
the build directory rebuilt and the tests run; the entry passes if they fail. The file is restored
whatever happens. With --markdown the outcome is printed as the table of docs/testing.md.

With --cuda it reads tests/mutations-cuda.json, of the CUDA kernels, and no GPU is needed:
test_cuda_emulated (tests/emulator) is built as it is; of an entry only the objects that read its
file are compiled again, in a folder of their own where a changed copy of the file comes first, and
linked with the others. Sources and build are not touched, and nvcc has no part in it. "test" is a
GoogleTest filter, which must be green without the change. Failed tests, crashes, the emulator's
errors (threads that wait for ever among them) and no end within the time limit are red. Optional:
"dims": only the instantiations of these head_dims are compiled (the kernels have an object each),
"objects": only objects whose name this expression finds;
"seeds": 4 tries the emulator's first four orders of warps; "from", beside several equal lines: text
behind which "old" occurs first.

Usage: tools/mutation_test.py --build build/release [--cuda] [--only SUBSTRING] [--markdown]
                              [--shard I/N]
"""

import argparse
import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(command, **options):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", check=False, **options)


def mutated(entry):
    """The file with the change, or None and what is wrong."""
    text = (ROOT / entry["file"]).read_text()
    start = 0
    if "from" in entry:
        if text.count(entry["from"]) != 1:
            return None, f"STALE: \"from\" occurs {text.count(entry['from'])} times"
        start = text.index(entry["from"])
    count = text.count(entry["old"], start)
    if count == 0 or (count > 1 and "from" not in entry):
        return None, f"STALE: the line occurs {count} times"
    return text[:start] + text[start:].replace(entry["old"], entry["new"], 1), None


class CTest:
    """Entries of the CPU: changed in place, everything rebuilt."""

    path = "tests/mutations.json"

    def __init__(self, build, part):
        self.build = build

    def outcome(self, entry):
        path = ROOT / entry["file"]
        original = path.read_text()
        text, wrong = mutated(entry)
        if text is None:
            return wrong
        try:
            path.write_text(text)
            built = run(["cmake", "--build", self.build])
            if built.returncode != 0:
                return "does not compile: " + built.stdout.strip().splitlines()[-1]
            tested = run(["ctest", "--test-dir", self.build, "-R", entry["test"],
                          "--no-tests=error", "--stop-on-failure"])
            if tested.returncode == 0:
                return "SURVIVED"
            failed = [line for line in tested.stdout.splitlines() if "***" in line]
            return "red" + (": " + failed[0].split()[3]
                            if failed and len(failed[0].split()) > 3 else "")
        finally:
            path.write_text(original)

    def close(self):
        run(["cmake", "--build", self.build])


class Emulated:
    """Entries of the CUDA kernels, run by tests/emulator on this CPU."""

    path = "tests/mutations-cuda.json"
    target = "test_cuda_emulated"

    def __init__(self, build, part):
        self.build = pathlib.Path(build).resolve()
        if run(["cmake", "--build", build, "--target", self.target]).returncode != 0:
            sys.exit(f"mutations: {self.target} does not build in {build}")
        lines = run(["ninja", "-C", str(self.build), "-t", "commands", self.target]).stdout
        self.commands, self.link = {}, None
        for line in lines.splitlines():
            words = line.split("&&")[1 if line.startswith(": ") else 0]
            words = shlex.split(words) if "-o " in words else []
            if not words:
                continue
            output = words[words.index("-o") + 1]
            if output.endswith("/" + self.target):
                self.link = words
            else:
                self.commands[output] = words
        self.objects = [w for w in self.link if w in self.commands and "/src/cuda/" in w]
        used = self.link + [w for o in self.objects for w in self.commands[o]]
        if any(os.path.basename(w).startswith("nvcc") for w in used):
            sys.exit("mutations: nvcc has a part in this build")
        self.reads = {}
        for block in run(["ninja", "-C", str(self.build), "-t", "deps"]).stdout.split("\n\n"):
            name, _, rest = block.partition(":")
            self.reads[name.strip()] = {os.path.realpath(self.build / line.strip())
                                        for line in rest.splitlines()[1:]}
        # The same name each time, which compiler caches like; so one run of a shard at a time.
        self.lock = open(self.build / f"mutation-{part}.lock", "w", encoding="utf-8")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("mutations: another run has this shard of this build")
        self.out = self.build / f"mutation-{part}"
        self.seconds = {}  # of a filter and seed without a change; None: red

    def close(self):
        shutil.rmtree(self.out, ignore_errors=True)

    def objects_of(self, entry):
        path = os.path.realpath(ROOT / entry["file"])
        found = [o for o in self.objects if path in self.reads.get(o, ())]
        if "objects" in entry:
            found = [o for o in found if re.search(entry["objects"], os.path.basename(o))]
        if "dims" not in entry:
            return found
        other = re.compile(r"_(64|128|192|256)\.cu\.o$")
        return [o for o in found
                if not other.search(o) or int(other.search(o)[1]) in entry["dims"]]

    def compile(self, entry, text):
        """The changed program; None and the compiler's last words."""
        overlay = self.out / "overlay"
        copy = overlay / pathlib.Path(entry["file"]).relative_to("src")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
        rebuilt = {}
        try:
            for number, name in enumerate(self.objects_of(entry)):
                words = list(self.commands[name])
                to = str(self.out / f"{number}.o")
                words[words.index("-o") + 1] = to
                words[words.index("-MF") + 1] = to + ".d"
                # Before src, behind the emulator's own headers.
                words.insert(words.index(f"-I{ROOT}/src"), f"-I{overlay}")
                source = words.index("-c") + 1
                if os.path.realpath(words[source]) == os.path.realpath(ROOT / entry["file"]):
                    words[source] = str(copy)
                # Of the tests' seconds and the compiler's minutes.
                words = ["-O1" if w == "-O3" else w for w in words]
                done = run(words)
                if done.returncode != 0:
                    errors = [w for w in done.stdout.splitlines() if "error" in w]
                    return None, (errors or done.stdout.splitlines() or ["?"])[0]
                rebuilt[name] = to
        finally:
            copy.unlink()
        if not rebuilt:
            return None, "no object of the program reads the file"
        program = self.out / "program"
        words = [w for w in self.link if w not in rebuilt]
        words[words.index("-o") + 1] = str(program)
        # First, so that of functions which several objects have the changed one is taken.
        at = next(i for i, w in enumerate(words) if w.endswith(".o"))
        words[at:at] = list(rebuilt.values())
        done = subprocess.run(words, cwd=self.build, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            return None, done.stdout.strip().splitlines()[-1]
        return program, None

    def judge(self, program, test, seed, limit):
        """None where all tests pass, else what happened."""
        environment = dict(os.environ, THRIFTATTN_EMULATOR_SEED=str(seed),
                           GTEST_BREAK_ON_FAILURE="1")
        try:
            done = run([str(program), "--gtest_filter=" + test], timeout=limit, env=environment)
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as late:
            output, code = (late.stdout or b""), None
            output = output if isinstance(output, str) else output.decode(errors="replace")
        tests = re.findall(r"^\[ RUN      \] (\S+)", output, re.M)
        if not tests:
            return "no test: " + test
        if code == 0:
            return None
        name = tests[-1].rstrip("\r")
        if code is None:
            return f"{name} (no end within {limit:.0f} s)"
        said = re.search(r"^emulator: kernel (\w+).*?: (.*)$", output, re.M)
        if said:
            return f"{name} (`{said[1]}`: {said[2]})"
        if ": Failure" in output:
            return name
        if code < 0:
            return f"{name} ({signal.Signals(-code).name})"
        return f"{name} (exit status {code})"

    def unchanged(self, test, seed):
        if (test, seed) not in self.seconds:
            start = time.time()
            wrong = self.judge(self.build / "tests" / self.target, test, seed, 600)
            self.seconds[test, seed] = None if wrong else time.time() - start
        return self.seconds[test, seed]

    def outcome(self, entry):
        text, wrong = mutated(entry)
        if text is None:
            return wrong
        program, wrong = self.compile(entry, text)
        if program is None:
            return "does not compile: " + wrong
        for seed in range(1, entry.get("seeds", 1) + 1):
            seconds = self.unchanged(entry["test"], seed)
            if seconds is None:
                return f"{entry['test']} is red without the change"
            red = self.judge(program, entry["test"], seed, 30 + 10 * seconds)
            if red is not None:
                return "red: " + red + (f", seed {seed}" if seed > 1 else "")
        return "SURVIVED"


def table_row(entry, outcome):
    broken = " ".join(entry["new"].split()).replace("|", "\\|") or "(left out)"
    return f"| `{entry['file']}` | {entry['why']} | `{broken}` | {outcome} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", required=True, help="a configured build directory with tests")
    parser.add_argument("--cuda", action="store_true", help="tests/mutations-cuda.json, emulated")
    parser.add_argument("--only", default="", help="only entries whose file or why contains this")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--shard", default="0/1", help="every N-th entry, from I on")
    args = parser.parse_args()
    kind = Emulated if args.cuda else CTest
    entries = json.loads((ROOT / kind.path).read_text())
    entries = [e for e in entries if args.only in e["file"] + e["why"]]
    part, parts = map(int, args.shard.split("/"))
    tool = kind(args.build, part)
    bad = 0
    if args.markdown:
        print("| file | key line | broken to | turns red |\n|---|---|---|---|")
    try:
        for entry in entries[part::parts]:
            outcome = tool.outcome(entry)
            red = outcome.startswith("red")
            bad += not red
            if args.markdown:
                print(table_row(entry, outcome), flush=True)
            else:
                print(f"{'ok ' if red else 'BAD'} {entry['file']}: {entry['why']}: {outcome}",
                      flush=True)
    finally:
        tool.close()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
