# SPDX-License-Identifier: Apache-2.0
"""Training loop: Muon for the matrices, AdamW for the embedding and the norms."""
from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .data import Sampler
from .model import Config, Model

# lr is a multiplier of the base rates, interpolated linearly over the minutes of the stage.
STAGES = {
    "short": dict(seq=2048, batch=32, p_needle=0.5, p_repeat=0.10, lr=(1.0, 1.0)),
    "full": dict(seq=16384, batch=8, p_needle=0.6, p_repeat=0.02, lr=(1.0, 0.0)),
}
MUON_LR, ADAM_LR = 0.02, 3e-3
WARMUP_STEPS = 100


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration of Muon (quintic coefficients) on a batch [n, rows, cols]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16) if g.is_cuda else g
    wide = x.shape[1] <= x.shape[2]
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        m = x @ x.mT
        x = a * x + (b * m + c * m @ m) @ x
    return (x if wide else x.mT).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon; matrices of one shape are orthogonalized as one batch."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(list(params), dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buf.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buf, group["momentum"]))
                scale = -group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalize(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=scale)


def to_bf16(o):
    """A copy of nested state with every floating tensor in BF16 (files of half the size)."""
    if isinstance(o, torch.Tensor):
        return o.to(torch.bfloat16) if o.is_floating_point() and o.dim() > 0 else o
    if isinstance(o, dict):
        return {k: to_bf16(v) for k, v in o.items()}
    return [to_bf16(v) for v in o] if isinstance(o, list) else o


def save(path: Path, model: Model, opts, info: dict) -> None:
    """Weights and optimizer state in BF16, the weights' format in the exported file."""
    path.mkdir(parents=True, exist_ok=True)
    tmp = path / "model.tmp"
    torch.save({"config": model.cfg.to_dict(), "model": to_bf16(dict(model.state_dict())), "info": info}, tmp)
    tmp.replace(path / "model.pt")
    torch.save([to_bf16(o.state_dict()) for o in opts], tmp)
    tmp.replace(path / "optim.pt")


def load(path: Path, device: str = "cpu") -> tuple[Model, dict]:
    blob = torch.load(path / "model.pt", map_location=device, weights_only=True)
    model = Model(Config(**blob["config"])).to(device)
    model.load_state_dict(blob["model"])  # widened to FP32
    return model, blob["info"]


class Batches(torch.utils.data.IterableDataset):
    """Endless batches; each worker process draws from a generator of its own."""

    def __init__(self, make_sampler, seed: int, batch: int, seq: int):
        self.make_sampler, self.seed, self.batch, self.seq = make_sampler, seed, batch, seq

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        sampler = self.make_sampler(self.seed + (worker.id if worker else 0))
        while True:
            ids, weights = sampler.batch(self.batch, self.seq)
            yield torch.from_numpy(ids), torch.from_numpy(weights)


@dataclass
class Tally:
    """Sums since the last log line, kept on the device so that no step waits for them."""
    text: torch.Tensor | float = 0.0
    n_text: torch.Tensor | float = 0.0
    answer: torch.Tensor | float = 0.0
    right: torch.Tensor | float = 0.0
    n_answer: torch.Tensor | float = 0.0

    @torch.no_grad()
    def add(self, each, is_text, is_answer, hit) -> None:
        self.text = self.text + (each * is_text).sum()
        self.n_text = self.n_text + is_text.sum()
        self.answer = self.answer + (each * is_answer).sum()
        self.right = self.right + (hit & is_answer).sum()
        self.n_answer = self.n_answer + is_answer.sum()

    def row(self) -> dict:
        n_text, n_answer = max(1.0, float(self.n_text)), max(1.0, float(self.n_answer))
        return dict(text=round(float(self.text) / n_text, 4), answer=round(float(self.answer) / n_answer, 4),
                    digits_right=round(float(self.right) / n_answer, 4))


def train(args) -> None:
    work = Path(args.work_dir)
    stage = dict(STAGES[args.stage])
    for key in ("seq", "batch", "p_needle", "p_repeat", "lr"):
        if getattr(args, key) is not None:
            stage[key] = getattr(args, key)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    if args.resume:
        model, info = load(work / args.resume, device)
    else:
        model, info = Model(Config()).to(device), {"steps": 0, "tokens": 0, "seconds": 0.0, "log": []}
    matrices = [p for n, p in model.blocks.named_parameters() if p.dim() == 2]
    other = [model.embd.weight, model.norm] + [p for p in model.blocks.parameters() if p.dim() == 1]
    opts = [Muon(matrices, lr=MUON_LR), torch.optim.AdamW(other, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)]
    if args.resume and (work / args.resume / "optim.pt").exists():
        for o, s in zip(opts, torch.load(work / args.resume / "optim.pt", map_location=device, weights_only=True)):
            o.load_state_dict(s)

    def make_sampler(seed: int) -> Sampler:
        return Sampler(work / "corpus.npy", work / "tokenizer.json", seed, stage["p_needle"], stage["p_repeat"],
                       max_facts=args.max_facts, max_questions=args.max_questions, answer_weight=args.answer_weight)

    batches = iter(torch.utils.data.DataLoader(
        Batches(make_sampler, args.seed + 1000 * info["steps"], stage["batch"], stage["seq"]), batch_size=None,
        num_workers=args.loaders, pin_memory=device == "cuda"))
    cast = torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")
    print(f"stage {args.stage} {stage} device {device} parameters {sum(p.numel() for p in model.parameters())} "
          f"from step {info['steps']}", flush=True)
    next(batches)  # the loaders' start is not training time
    begin = last_save = last_log = time.time()
    spent, step, tally = info["seconds"], 0, Tally()
    while True:
        now = time.time() - begin
        done = now >= args.minutes * 60 or (args.steps and step >= args.steps)
        if done or time.time() - last_save > args.save_minutes * 60:
            info["seconds"] = spent + now
            save(work / args.out, model, opts, info)
            last_save = time.time()
        if done:
            break
        lr = stage["lr"][0] + (stage["lr"][1] - stage["lr"][0]) * min(1.0, now / (args.minutes * 60))
        lr *= min(1.0, (info["steps"] + 1) / WARMUP_STEPS)
        for o, base in zip(opts, (MUON_LR, ADAM_LR)):
            for g in o.param_groups:
                g["lr"] = base * lr
        ids, w = (t.to(device, non_blocking=True) for t in next(batches))
        w = w[:, 1:].flatten()
        with cast:
            logits = model(ids[:, :-1]).flatten(0, 1)
        target = ids[:, 1:].flatten()
        each = F.cross_entropy(logits.float(), target, reduction="none")
        (each * w).sum().div(w.sum()).backward()
        torch.nn.utils.clip_grad_norm_(other, 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        info["steps"] += 1
        info["tokens"] += target.numel()
        tally.add(each.detach(), w == 1.0, w == args.answer_weight, logits.detach().argmax(-1) == target)
        if step % args.log_every == 0:
            rate = args.log_every * target.numel() / (time.time() - last_log)
            row = dict(stage=args.stage, step=info["steps"], tokens=info["tokens"], lr=round(lr, 4), **tally.row(),
                       tokens_per_s=round(rate), seconds=round(spent + time.time() - begin))
            info["log"].append(row)
            print(json.dumps(row), flush=True)
            last_log, tally = time.time(), Tally()
