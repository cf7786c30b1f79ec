#!/usr/bin/env python3
"""Checks that what the documentation names exists.

- In every Markdown file: relative links, and words in backticks or code blocks that look like a
  path of this repository ("src/cache/page_layout.h", "tests/<layer>/<name>_test.cc", "src/*.cc").
- In every source file: the Markdown files and tools it names.
- In README.md: commands in code blocks marked sh are make targets, presets, tools or subcommands
  of thriftattn that exist; a subcommand must also be run by a test in tests/cli.
Prints one line per finding and exits with 1 if there is any. --self-test checks the checker.
"""

import itertools
import json
import re
import sys
import tempfile
from pathlib import Path

TOP = (".ci", "bench", "cmake", "docs", "examples", "include", "models", "src", "tests", "tools")
NOT_OURS = {".git", "build", "out"}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"^(?:\./)?((?:%s)/[\w.*<>{},/-]*[\w*>}/])" % "|".join(map(re.escape, TOP)))
NAMED_IN_SOURCE = re.compile(r"\b((?:docs|tools)/[\w/-]+\.(?:md|sh|py))\b")
SOURCES = (".cc", ".h", ".py", ".sh", ".cmake", ".txt")


def expand(path):
    """"a/{b,c}/<d>.h" as glob patterns: "a/b/*.h", "a/c/*.h"."""
    path = re.sub(r"<[^>]*>", "*", path)
    pieces = re.split(r"\{([^}]*)\}", path)
    choices = [p.split(",") if i % 2 else [p] for i, p in enumerate(pieces)]
    return ["".join(c) for c in itertools.product(*choices)]


def is_missing(root, path):
    # Downloaded and built files are named in documentation but not in the repository.
    if re.match(r"models/(?!demo)", path):
        return None
    for pattern in expand(path.rstrip("/")):
        try:
            if not any(True for _ in root.glob(pattern)):
                return pattern
        except ValueError:
            return pattern
    return None


def paths_in_words(text):
    for word in text.split():
        match = PATH.match(word.strip("'\"()[],;"))
        if match:
            yield match.group(1)


def check_markdown(root, path, text):
    findings = []
    fence = None
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            fence = None if fence is not None else line.strip().strip("`").strip()
            continue
        named = []
        if fence is not None:
            named += paths_in_words(line)
        else:
            for code in CODE.findall(line):
                named += paths_in_words(code)
            for target in LINK.findall(CODE.sub("", line)):
                target = target.split("#")[0]
                if not target or re.match(r"[a-z]+:", target):
                    continue
                if not ((path.parent / target).exists() or (root / target).exists()):
                    findings.append((number, f"the link to {target} leads nowhere"))
        for name in named:
            missing = is_missing(root, name)
            if missing:
                findings.append((number, f"{missing} does not exist"))
    return findings


def logical_lines(text):
    """(line number, command) of the code blocks marked sh; continued lines are joined."""
    inside = False
    pending = ""
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("```"):
            inside = not inside and line.strip() in ("```sh", "```bash", "```console")
            pending = ""
        elif inside:
            pending += line.split(" # ")[0].strip()
            if pending.endswith("\\"):
                pending = pending[:-1] + " "
            else:
                if pending and not pending.startswith("#"):
                    yield number, pending
                pending = ""


def read_or_empty(path):
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def check_commands(root, text):
    targets = set(re.findall(r"^([a-z][\w-]*):", read_or_empty(root / "Makefile"), re.M))
    presets = {p["name"] for p in json.loads(read_or_empty(root / "CMakePresets.json") or "{}")
               .get("configurePresets", [])}
    cli_tests = "".join(p.read_text(encoding="utf-8")
                        for p in sorted((root / "tests/cli").glob("*_test.cc")))
    findings = []
    for number, command in logical_lines(text):
        words = command.removeprefix("$ ").split()
        if words and words[0] == "sudo":
            words = words[1:]
        program, arguments = words[0], words[1:]
        if program == "make":
            for target in arguments:
                if "=" not in target and target not in targets:
                    findings.append((number, f"the Makefile has no target {target}"))
        elif program == "cmake" and "--preset" in arguments:
            preset = (arguments + [""])[arguments.index("--preset") + 1]
            if preset not in presets:
                findings.append((number, f"CMakePresets.json has no preset {preset}"))
        elif program.split("/")[-1] == "thriftattn":
            subcommand = arguments[0] if arguments else "--help"
            if f'"{subcommand}"' not in cli_tests and f" {subcommand} " not in cli_tests:
                findings.append((number, f"no test in tests/cli runs 'thriftattn {subcommand}'"))
        elif program in ("cmake", "git", "cd", "bash", "sh"):
            pass  # paths in them are checked like all others
        elif not PATH.match(program):
            findings.append((number, f"'{program}' is no command that this check knows: mark the "
                                     "block as text, or teach tools/check_docs.py"))
    return findings


def own_files(root):
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if not path.is_file() or relative.parts[0] in NOT_OURS or ".git" in relative.parts:
            continue
        if not relative.parts[0].startswith("build"):
            yield path, relative


def check_tree(root):
    count = failed = 0

    def report(relative, findings):
        nonlocal failed
        for line, message in findings:
            failed += 1
            print(f"{relative}:{line}: {message}")

    for path, relative in own_files(root):
        if path.suffix == ".md":
            count += 1
            report(relative, check_markdown(root, path, path.read_text(encoding="utf-8")))
        elif path.suffix in SOURCES and path.name != "check_docs.py":
            text = path.read_text(encoding="utf-8", errors="replace")
            for match in NAMED_IN_SOURCE.finditer(text):
                if is_missing(root, match.group(1)):
                    line = text.count("\n", 0, match.start()) + 1
                    report(relative, [(line, f"{match.group(1)} does not exist")])
    report("README.md", check_commands(root, read_or_empty(root / "README.md")))
    print(f"check_docs: {count} Markdown files, {failed} findings")
    return 1 if failed or not count else 0


def self_test():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("src/cache/page.h", "docs/a.md", "tools/run.sh", "tests/cli/run_test.cc"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text('RunCli({"run", "-m"});\n')
        (root / "Makefile").write_text("demo: build\n\ttrue\nbuild:\n")
        (root / "CMakePresets.json").write_text('{"configurePresets": [{"name": "release"}]}')

        def markdown(text):
            return [m for _, m in check_markdown(root, root / "docs/b.md", text)]

        assert markdown("`src/cache/page.h` [a](a.md) [b](../tools/run.sh) [c](docs/a.md)") == []
        assert markdown("`src/<layer>/{page,page}.h` `src/cache/*.h:12` `1/2` `a/b`") == []
        assert markdown("`models/x.gguf` `build/release/thriftattn` [w](https://x.y/z)") == []
        assert markdown("`src/cache/gone.h`") == ["src/cache/gone.h does not exist"]
        assert markdown("`src/{cache,gone}/*.h`") == ["src/gone/*.h does not exist"]
        assert markdown("see [x](gone.md#part)") == ["the link to gone.md leads nowhere"]
        assert markdown("```sh\nbash tools/gone.sh x\n```\n") == ["tools/gone.sh does not exist"]
        assert markdown("`models/demo/gone.md`") == ["models/demo/gone.md does not exist"]

        def commands(text):
            return [m for _, m in check_commands(root, f"```sh\n{text}\n```\n")]

        assert commands("make demo  # it\nsudo make build\ncmake --preset release") == []
        assert commands("build/release/thriftattn run \\\n  -m x\ntools/run.sh") == []
        assert commands("make gone") == ["the Makefile has no target gone"]
        assert commands("cmake --preset gone") == ["CMakePresets.json has no preset gone"]
        assert "tests/cli" in commands("thriftattn eval -m x")[0]
        assert "no command" in commands("frobnicate")[0]
        assert check_commands(root, "```text\nfrobnicate\n```\n") == []
    print("check_docs: self-test passed")
    return 0


if __name__ == "__main__":
    repository = Path(__file__).resolve().parent.parent
    sys.exit(self_test() if "--self-test" in sys.argv[1:] else check_tree(repository))
