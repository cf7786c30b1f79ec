# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE tokenizer of the demo model (GGUF: model "gpt2", pre "qwen2")."""
from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from .needles import random_code, random_name, sentence

# llama.cpp's expression for pre = "qwen2"; there is no Unicode normalisation.
QWEN2 = (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BOS, EOS = "<|bos|>", "<|eos|>"


def train_tokenizer(files: list[Path], out: Path, vocab_size: int = 2048, sample: int = 3_000_000) -> None:
    """Train on a sample of every source plus fact sentences, so that the words
    of the names ("_Amber", "_Falcon") become single tokens."""
    tok = Tokenizer(BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    rng = random.Random(1)

    def lines():
        for f in files:
            text = f.read_text(encoding="utf-8")
            step = max(1, len(text) // sample)
            for i in range(0, len(text), 20_000 * step):
                yield text[i:i + 20_000].replace("\f", "\n")
        for _ in range(60_000):
            name = random_name(rng)
            yield f"{sentence(name, random_code(rng))}Question: What is the access code of {name}?\nAnswer:"

    tok.train_from_iterator(lines(), BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    out.parent.mkdir(parents=True, exist_ok=True)
    tok.save(str(out))


def load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))
