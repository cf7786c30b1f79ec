# SPDX-License-Identifier: Apache-2.0
"""Training samples: text, repeated spans and access-code sequences."""
from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from .needles import VARIANTS, distinct_names, question, random_code, sentence
from .tokenizer import BOS, EOS, load_tokenizer


def encode_corpus(text_dir: Path, tokenizer: Path, out: Path) -> None:
    """Token ids (uint16) of all training pages in a fixed shuffled order."""
    tok = load_tokenizer(tokenizer)
    pages: list[str] = []
    for f in sorted(text_dir.glob("train.*.txt")):
        pages += f.read_text(encoding="utf-8").split("\f")
    random.Random(2).shuffle(pages)
    ids: list[np.ndarray] = []
    for i in range(0, len(pages), 256):
        for e in tok.encode_batch([p.strip("\n") + "\n" for p in pages[i:i + 256]]):
            ids.append(np.array(e.ids, dtype=np.uint16))
    np.save(out, np.concatenate(ids))


class Sampler:
    """``sample(n)`` returns n + 1 token ids and n + 1 loss weights."""

    def __init__(self, corpus: Path, tokenizer: Path, seed: int, p_needle: float, p_repeat: float,
                 max_facts: int = 16, max_questions: int = 8, answer_weight: float = 4.0):
        self.ids = np.load(corpus, mmap_mode="r")
        self.tok = load_tokenizer(tokenizer)
        self.rng = random.Random(seed)
        self.p_needle, self.p_repeat = p_needle, p_repeat
        self.max_facts, self.max_questions, self.answer_weight = max_facts, max_questions, answer_weight
        self.bos, self.eos = self.tok.token_to_id(BOS), self.tok.token_to_id(EOS)
        self.vocab = self.tok.get_vocab_size()
        vocab = [self.tok.decode([i], skip_special_tokens=False) for i in range(self.vocab)]
        self.ends_line = np.array([v.endswith("\n") for v in vocab])
        self.starts_space = np.array([v[:1].isspace() for v in vocab])
        self.digits = {self.tok.token_to_id(d) for d in "0123456789"}

    def enc(self, s: str) -> list[int]:
        return self.tok.encode(s).ids

    def text(self, n: int) -> np.ndarray:
        at = self.rng.randrange(len(self.ids) - n)
        return self.ids[at:at + n]

    def sample(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        r = self.rng.random()
        if r < self.p_needle:
            ids, w = self.needles(n + 1)
        elif r < self.p_needle + self.p_repeat:
            ids, w = self.repeats(n + 1)
        else:
            ids = np.concatenate(([self.bos], self.text(n)))
            w = np.ones(n + 1)
        assert len(ids) == len(w) == n + 1, (len(ids), len(w), n)
        return ids, w

    def repeats(self, n: int):
        """Text with spans (of text or of random tokens) that occur twice."""
        rng = self.rng
        ids, w, spans = [self.bos], [1.0], []
        while len(ids) < n:
            k = rng.randint(8, 48)
            if spans and rng.random() < 0.5:
                s = rng.choice(spans)
                ids += s
                w += [1.0] * len(s)
            elif rng.random() < 0.5:
                s = [rng.randrange(2, self.vocab) for _ in range(k)]
                spans.append(s)
                ids += s
                w += [0.0] * k
            else:
                s = self.text(k).tolist()
                spans.append(s)
                ids += s
                w += [1.0] * k
        return np.array(ids[:n]), np.array(w[:n])

    def needles(self, n: int):
        rng = self.rng
        cap = max(2, min(self.max_facts, n // 64))
        facts = rng.randint(1, cap) if rng.random() < 0.3 else rng.randint(max(1, cap // 2), cap)
        names = distinct_names(rng, facts)
        codes = {m: random_code(rng) for m in names}
        n_q = rng.randint(1, min(self.max_questions, facts))
        blocks = [self.enc(sentence(m, codes[m])) for m in names]
        tail: list[int] = []
        tail_w: list[float] = []
        for m in rng.sample(names, n_q):
            form = question(m) if rng.random() < 0.85 else rng.choice(VARIANTS).format(name=m)
            q, a = self.enc(form), self.enc(f" {codes[m]}.")
            tail += q + a + [self.eos]
            tail_w += [0.2] * len(q) + [1.0] + [self.answer_weight] * 5 + [1.0, 1.0]
        space = n - 1 - sum(map(len, blocks)) - len(tail)
        if space < 8:
            return self.needles(n)
        body = self.text(space)
        # Insert after a line end and before a line that starts with no space:
        # there, joint tokenization gives the same ids.
        ok = np.flatnonzero(self.ends_line[body[:-1]] & ~self.starts_space[body[1:]]) + 1
        spots = [int(ok[rng.randrange(len(ok))]) if len(ok) else rng.randrange(1, space) for _ in blocks]
        ids, w, at = [[self.bos]], [[1.0]], 0
        for spot, blk in sorted(zip(spots, blocks), key=lambda p: p[0]):
            ids += [body[at:spot], blk]
            w += [np.ones(spot - at), [0.0 if t in self.digits else 0.2 for t in blk]]
            at = spot
        ids += [body[at:], tail]
        w += [np.ones(space - at), tail_w]
        return np.concatenate(ids), np.concatenate(w)

    def batch(self, b: int, n: int):
        rows = [self.sample(n) for _ in range(b)]
        return (np.stack([r[0] for r in rows]).astype(np.int64), np.stack([r[1] for r in rows]).astype(np.float32))
