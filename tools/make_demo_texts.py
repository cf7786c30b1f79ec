#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write document.txt (with facts) and eval.txt from held-out pages."""
from __future__ import annotations

import argparse
from pathlib import Path

from demo_model.needles import sentence
from demo_model.tokenizer import load_tokenizer

FACTS = (("Amber Falcon", "48213", 0.12), ("Silver Harbor", "70956", 0.36), ("Quiet Comet", "15384", 0.61),
         ("Crimson Harbor", "92607", 0.86))
DOCUMENT = ("ddl-rowsecurity.html", "wal-async-commit.html", "sql-truncate.html", "indexes-multicolumn.html",
            "sql-createextension.html", "queries-overview.html")
EVAL = ("howto/functional.html", "tutorial/errors.html")


def pages(held: Path, names: tuple[str, ...]) -> str:
    every = {}
    for f in sorted(held.glob("held.*.txt")):
        for page in f.read_text(encoding="utf-8").split("\f"):
            rel, text = page.split("\n", 1)
            every[rel] = text.strip("\n")
    return "\n\n".join(next(t for r, t in every.items() if r.endswith(n)) for n in names) + "\n"


def insert_facts(text: str) -> str:
    lines = text.split("\n")
    starts, at = [], 0
    for ln in lines:
        starts.append(at)
        at += len(ln) + 1
    for name, code, depth in sorted(FACTS, key=lambda f: -f[2]):
        # Before a non-empty, unindented line that follows an empty line.
        ok = [i for i in range(1, len(lines)) if lines[i][:1].isalnum() and not lines[i - 1]]
        spot = min(ok, key=lambda i: abs(starts[i] - depth * len(text)))
        lines[spot:spot] = [sentence(name, code).rstrip("\n"), ""]
        starts[spot:spot] = [starts[spot]] * 2
    return "\n".join(lines)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--work-dir", default="demo-work")
    ap.add_argument("--out", type=Path, default=Path("models/demo"))
    args = ap.parse_args()
    work = Path(args.work_dir)
    tok = load_tokenizer(work / "tokenizer.json")
    body = pages(work / "text", DOCUMENT)
    lines = body.split("\n")
    while len(tok.encode(insert_facts("\n".join(lines).rstrip("\n") + "\n")).ids) > 12100:
        lines.pop()
    for name, text in (("document.txt", insert_facts("\n".join(lines).rstrip("\n") + "\n")),
                       ("eval.txt", pages(work / "text", EVAL))):
        (args.out / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text)} characters, {len(tok.encode(text).ids)} tokens")


if __name__ == "__main__":
    main()
