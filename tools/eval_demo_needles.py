#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Needle recall of the demo model, in PyTorch, greedy and exact match.

Every context is text with facts at spread depths; each question is asked on
its own after the same context.  Prompt plus answer take exactly --context
tokens.

  eval_demo_needles.py --gguf models/demo/thrift-demo.gguf --text models/demo/eval.txt
"""
from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch

from demo_model.export import read_gguf, read_tokenizer
from demo_model.model import Cache
from demo_model.needles import distinct_names, question, random_code, sentence


def build(rng: random.Random, tok, text: list[int], n: int, facts: int):
    """Token ids of a context of n tokens, and its facts as (name, code, depth)."""
    names = distinct_names(rng, facts)
    codes = [random_code(rng) for _ in names]
    blocks = [tok.encode(sentence(m, c)).ids for m, c in zip(names, codes)]
    space = n - 1 - sum(map(len, blocks))
    at = rng.randrange(max(1, len(text) - space))
    body = text[at:at + space]
    while len(body) < space:
        body += text[:space - len(body)]
    line = [i + 1 for i, t in enumerate(body) if tok.decode([t]).endswith("\n")] or [space]
    ids, last, out = [tok.token_to_id("<|bos|>")], 0, []
    for i, (m, c, b) in enumerate(zip(names, codes, blocks)):
        want = int(space * (i + rng.random()) / facts)
        spot = max(last, min(line, key=lambda p: abs(p - want)))
        ids += body[last:spot]
        out.append((m, c, len(ids) / n))
        ids += b
        last = spot
    ids += body[last:]
    return ids, out


def recall(model, tok, text: list[int], context: int, contexts: int, facts: int, per: int, seed: int,
           kv_dtype=None, verbose: bool = True) -> tuple[int, int]:
    rng = random.Random(seed)
    right = total = 0
    room = len(tok.encode(question("Amber Falcon")).ids) + 7
    for c in range(contexts):
        t0 = time.time()
        ids, known = build(rng, tok, text, context - room, facts)
        cache = Cache(kv_dtype)
        with torch.no_grad():
            model.hidden(torch.tensor([ids]), cache)
        for m, code, depth in rng.sample(known, min(per, facts)):
            got, _ = model.greedy(tok.encode(question(m)).ids, 7, cache.fork())
            answer = tok.decode(got)
            ok = answer.startswith(f" {code}.")
            right, total = right + ok, total + 1
            if verbose and not ok:
                print(f"  miss: {m} at {depth:.2f}: expected {code}, got {answer!r}", flush=True)
        if verbose:
            print(f"context {c}: {right}/{total} ({time.time() - t0:.0f} s)", flush=True)
    return right, total


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--gguf", type=Path, default=Path("models/demo/thrift-demo.gguf"))
    ap.add_argument("--text", type=Path, default=Path("models/demo/eval.txt"))
    ap.add_argument("--context", type=int, default=16384)
    ap.add_argument("--contexts", type=int, default=8)
    ap.add_argument("--facts", type=int, default=16)
    ap.add_argument("--questions", type=int, default=8, help="questions per context")
    ap.add_argument("--seed", type=int, default=7)
    ap.add_argument("--bf16-kv", action="store_true", help="round cached K and V to BF16")
    ap.add_argument("--loss", action="store_true", help="also measure the text loss on --text")
    args = ap.parse_args()
    model, tok = read_gguf(args.gguf), read_tokenizer(args.gguf)
    text = tok.encode(args.text.read_text(encoding="utf-8")).ids
    if args.loss:
        n = min(args.context, len(text))
        ids = torch.tensor([[tok.token_to_id("<|bos|>")] + text[:n]])
        with torch.no_grad():
            each = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")
        size = len(tok.decode(text[:n]).encode())
        print(f"text loss {each.mean():.4f} nats per token, {each.sum() / size / 0.693147:.4f} bits per byte, {n} tokens; "
              f"last quarter {each[-n // 4:].mean():.4f}")
    right, total = recall(model, tok, text, args.context, args.contexts, args.facts, args.questions, args.seed,
                          torch.bfloat16 if args.bf16_kv else None)
    print(f"needle recall at {args.context} tokens: {right}/{total} = {right / total:.4f}")


if __name__ == "__main__":
    main()
