#!/usr/bin/env python3
"""Checks the include layering and the file conventions of docs/contributing.md.

A file in src/<layer>/ includes only its own or lower layers, public headers only public headers.
Includes are written from the root of src/ or as "thriftattn/x.h". Prints one line per finding
("file:line: what, remedy") and exits with 1 if there is any. --self-test checks the checker.
"""

import re
import sys
from pathlib import Path

LAYERS = ["base", "formats", "policy", "cache", "precision", "plan", "attend", "cuda",
          "bench", "engine", "cli"]
RANK = {name: i for i, name in enumerate(LAYERS)}
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.M)
MAX_LINES = 800


def check_file(path, text, exists):
    """Findings as (line, message). `path` is relative; `exists(p)` tells whether a file exists."""
    findings = []
    parts = path.split("/")
    public = parts[0] == "include"
    layer = parts[1] if parts[0] == "src" and len(parts) > 2 else None

    if not public and layer not in RANK:
        return [(1, f"is in no known layer: accepted are src/{{{','.join(LAYERS)}}}/")]
    for match in INCLUDE.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        kind, target = match.groups()
        first = target.split("/")[0]
        if kind == "<":
            if exists(f"src/{target}") or exists(f"include/{target}"):
                findings.append((line, f'<{target}> is ours: write "{target}"'))
            continue
        if ".." in target.split("/"):
            findings.append((line, f'"{target}": write it from the root of src/'))
        elif first == "thriftattn":
            if not exists(f"include/{target}") and target != "thriftattn/version.h":
                findings.append((line, f'"{target}" does not exist in include/'))
        elif public:
            findings.append((line, f'a public header includes "{target}": only "thriftattn/..." '
                                   "and <...> are installed"))
        elif first in RANK and "/" in target:
            if not exists(f"src/{target}"):
                findings.append((line, f'"{target}" does not exist in src/'))
            elif RANK[first] > RANK[layer]:
                findings.append((line, f'"{target}": layer {layer} must not know layer {first} '
                                       f"({' < '.join(LAYERS)})"))
        elif exists("/".join(parts[:-1] + [target])):
            findings.append((line, f'"{target}": write "{layer}/{target}"'))

    if not text.startswith("//"):
        findings.append((1, "starts without a comment that says what the file is for"))
    if path.endswith((".h", ".cuh")) and not path.endswith("-inl.h") and "#pragma once" not in text:
        findings.append((1, "has no #pragma once"))
    lines = text.count("\n")
    if lines > MAX_LINES:
        findings.append((lines, f"has {lines} lines, more than {MAX_LINES}: split it"))
    return findings


def check_tree(root):
    count = 0
    failed = 0
    for top in ("include", "src"):
        for path in sorted((root / top).rglob("*")):
            if path.suffix not in (".h", ".cc", ".cu", ".cuh"):
                continue
            count += 1
            name = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8")
            for line, message in check_file(name, text, lambda p: (root / p).is_file()):
                failed += 1
                print(f"{name}:{line}: {message}")
    print(f"check_layers: {count} files, {failed} findings")
    return 1 if failed or not count else 0


def self_test():
    files = {"include/thriftattn/policy.h", "src/base/a.h", "src/cache/c.h", "src/attend/t.h",
             "src/engine/e.h"}

    def findings(path, body, head="// What it is for.\n#pragma once\n"):
        return [m for _, m in check_file(path, head + body, files.__contains__)]

    good = '#include "base/a.h"\n#include "thriftattn/policy.h"\n#include <vector>\n'
    assert findings("src/cache/x.h", good) == []
    assert findings("src/cache/x.h", '#include "hwy/highway.h"\n#include "cache/c.h"\n') == []
    assert findings("include/thriftattn/x.h", '#include "thriftattn/policy.h"\n') == []
    bad = {
        ("src/cache/x.h", '#include "attend/t.h"\n'): "must not know layer attend",
        ("src/base/x.h", '  #  include "cache/c.h"\n'): "must not know layer cache",
        ("src/cache/x.h", '#include "c.h"\n'): 'write "cache/c.h"',
        ("src/cache/x.h", '#include "../base/a.h"\n'): "from the root of src/",
        ("src/cache/x.h", '#include "base/gone.h"\n'): "does not exist in src/",
        ("src/cache/x.h", '#include "thriftattn/gone.h"\n'): "does not exist in include/",
        ("src/cache/x.h", "#include <base/a.h>\n"): "is ours",
        ("include/thriftattn/x.h", '#include "base/a.h"\n'): "public header",
        ("src/other/x.h", ""): "no known layer",
        ("src/cache/x.h", "\n" * 900): "split it",
    }
    for (path, body), expected in bad.items():
        found = findings(path, body)
        assert len(found) == 1 and expected in found[0], (path, body, found)
    assert findings("src/cache/x.h", "", head="// c\n") == ["has no #pragma once"]
    assert findings("src/cache/x-inl.h", "", head="// c\n") == []
    assert "comment" in findings("src/cache/x.cc", "", head="#include <a>\n")[0]
    assert check_file("src/cache/x.h", '// c\n#pragma once\n\n#include "attend/t.h"\n',
                      files.__contains__)[0][0] == 4
    print("check_layers: self-test passed")
    return 0


if __name__ == "__main__":
    repository = Path(__file__).resolve().parent.parent
    sys.exit(self_test() if "--self-test" in sys.argv[1:] else check_tree(repository))
