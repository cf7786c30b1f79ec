#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write goldens.json and tokenizer_goldens.json for the C++ tests.

Weights and tokenizer are read back from the GGUF file; everything is computed
in FP32 by PyTorch, once plainly and once with K (after RoPE) and V rounded to
BF16 before they are used.
"""
from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch

from demo_model.export import read_gguf, read_tokenizer
from demo_model.model import Cache
from demo_model.needles import question, sentence

STRINGS = [
    "", " ", "a", "Hello, world!", "  leading and trailing  ", "one  two   three    four", "tabs\tand\t\ttabs",
    "line\nline\n\nline\n\n\nline", "\n", "\n\n", " \n", "\n \n  x", "windows\r\nline ends\r\n", "trailing spaces   \nnext",
    "The access code of Amber Falcon is 12345.\n", question("Amber Falcon"), " 12345.", " 48213", "1234567890", "3.14159", "v2.0.1-rc3", "a1b2c3", "x = 10_000",
    "It's we're I've I'm you'll he'd can't", "IT'S WE'RE I'VE I'M YOU'LL HE'D", "'s't're 'tis",
    "na\u00efve caf\u00e9 \u00fcber stra\u00dfe", "e\u0301 versus \u00e9", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c", "\uc548\ub155\ud558\uc138\uc694", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea", "x\u00a0y\u2003z", "\u0661\u0662\u0663 \u00bd \u2167", "\u201cquotes\u201d \u2014 and \u2026 dashes",
    "def f(x):\n    return x ** 2  # square\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }", "SELECT * FROM t WHERE id <> 42;",
    "https://example.org/a?b=c&d=%20#e", "<|notspecial|> <b>bold</b>", "-----\n=====\n*****", "...!!!???", "_private __dunder__ CamelCase snake_case",
    "\\n is not a newline, \\t not a tab", "a\u0000b", "mixed \u4f60\u597d123abc \U0001f600!\n",
]


def rounded(v: torch.Tensor) -> list[float]:
    return [float(f"{x:.7g}") for x in v.tolist()]


def run(model, ids: list[int], n: int, kv_dtype) -> dict:
    out, steps = model.greedy(ids, n, Cache(kv_dtype))
    top = [torch.topk(s, 2) for s in steps]
    return {
        "prompt_logits_first_256": rounded(steps[0][:256]),
        "prompt_argmax": int(steps[0].argmax()),
        "greedy_ids": out,
        "top2_ids": [t.indices.tolist() for t in top],
        "top2_logits": [rounded(t.values) for t in top],
    }


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--demo", type=Path, default=Path("models/demo"))
    args = ap.parse_args()
    gguf = args.demo / "thrift-demo.gguf"
    model, tok = read_gguf(gguf), read_tokenizer(gguf)
    doc = (args.demo / "document.txt").read_text(encoding="utf-8")
    held = (args.demo / "eval.txt").read_text(encoding="utf-8")
    lines = held.split("\n")
    start = next(i for i, ln in enumerate(lines) if ln.startswith("Programming languages support"))
    short = "\n".join(lines[start:start + 3]) + "\n"
    middle = next(i for i in range(start + 4, len(lines)) if not lines[i])
    needle = ("\n".join(lines[start:middle]) + "\n" + sentence("Amber Falcon", "48213")
              + sentence("Amber Harbor", "70956") + "\n".join(lines[middle:middle + 12]) + question("Amber Falcon"))
    long = tok.decode(tok.encode(doc).ids[:600])
    long = long[:long.rfind("\n") + 1]
    result = {"gguf_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
              "note": "prompt_ids start with the BOS token; top2_logits[i] belong to the step that chose greedy_ids[i]",
              "prompts": []}
    for name, text in (("text", short), ("needle", needle), ("long", long)):
        ids = [tok.token_to_id("<|bos|>")] + tok.encode(text).ids
        result["prompts"].append({"name": name, "text": text, "prompt_ids": ids,
                                  "fp32": run(model, ids, 64, None), "bf16_kv": run(model, ids, 64, torch.bfloat16)})
        print(name, len(ids), "tokens ->", repr(tok.decode(result["prompts"][-1]["fp32"]["greedy_ids"])))
    (args.demo / "goldens.json").write_text(json.dumps(result, ensure_ascii=True) + "\n")
    pairs = [{"text": s, "ids": tok.encode(s).ids} for s in STRINGS]
    for p in pairs:
        assert tok.decode(p["ids"], skip_special_tokens=False) == p["text"], p
    (args.demo / "tokenizer_goldens.json").write_text(
        json.dumps({"note": "no BOS token; text is not normalised", "cases": pairs}, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
