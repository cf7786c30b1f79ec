#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the demo model: prepare the corpus, train in stages, export a GGUF file.

  train_demo_model.py prepare --raw RAW --work-dir WORK
  train_demo_model.py train --work-dir WORK --stage short --minutes 2.5
  train_demo_model.py train --work-dir WORK --stage full --resume ckpt --minutes 6
  train_demo_model.py export --work-dir WORK --resume ckpt --gguf models/demo/thrift-demo.gguf

models/demo/README.md gives the whole recipe.
"""
from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="cmd", required=True)
    p = sub.add_parser("prepare", help="unpacked documentation packages -> text, tokenizer, token ids")
    p.add_argument("--raw", required=True, help="folder with one unpacked package per sub-folder")
    p.add_argument("--work-dir", default="demo-work")
    p.add_argument("--vocab", type=int, default=2048)

    p = sub.add_parser("train", help="one training stage")
    p.add_argument("--work-dir", default="demo-work")
    p.add_argument("--stage", required=True, choices=("short", "full"))
    p.add_argument("--minutes", type=float, required=True, help="wall time of the stage")
    p.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: only by time)")
    p.add_argument("--resume", help="checkpoint folder below --work-dir to start from")
    p.add_argument("--out", default="ckpt", help="checkpoint folder below --work-dir to write")
    p.add_argument("--seq", type=int, help="tokens per sequence")
    p.add_argument("--batch", type=int, help="sequences per step")
    p.add_argument("--p-needle", type=float, help="share of the sequences with access codes")
    p.add_argument("--p-repeat", type=float, help="share of the sequences with repeated spans")
    p.add_argument("--lr", type=float, nargs=2, metavar=("START", "END"), help="learning-rate multipliers")
    p.add_argument("--max-facts", type=int, default=16)
    p.add_argument("--max-questions", type=int, default=16)
    p.add_argument("--answer-weight", type=float, default=4.0, help="loss weight of an answer's digits")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--loaders", type=int, default=4, help="processes that make batches")
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--save-minutes", type=float, default=2.0)

    p = sub.add_parser("export", help="checkpoint -> GGUF")
    p.add_argument("--work-dir", default="demo-work")
    p.add_argument("--resume", default="ckpt")
    p.add_argument("--gguf", default="models/demo/thrift-demo.gguf")

    args = ap.parse_args()
    work = Path(args.work_dir)
    if args.cmd == "prepare":
        from demo_model.corpus import HELD_OUT, extract
        from demo_model.data import encode_corpus
        from demo_model.tokenizer import train_tokenizer
        extract(Path(args.raw), work / "text", HELD_OUT)
        train_tokenizer(sorted((work / "text").glob("train.*.txt")), work / "tokenizer.json", args.vocab)
        encode_corpus(work / "text", work / "tokenizer.json", work / "corpus.npy")
    elif args.cmd == "train":
        from demo_model.train import train
        train(args)
    else:
        from demo_model.export import export
        from demo_model.train import load
        model, _ = load(work / args.resume)
        export(model, work / "tokenizer.json", Path(args.gguf))


if __name__ == "__main__":
    main()
