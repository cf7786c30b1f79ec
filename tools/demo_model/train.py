# SPDX-License-Identifier: Apache-2.0
"""Training loop: Muon for the matrices, AdamW for the embedding and the norms."""
from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .data import Sampler
from .init import structured_init
from .model import Config, Model

# Stage presets; every value can be overridden on the command line.
# lr is a multiplier, interpolated linearly over the minutes of the stage.
STAGES = {
    "short": dict(seq=512, batch=10, p_needle=0.45, p_repeat=0.10, lr=(0.7, 0.7)),
    "mid": dict(seq=1024, batch=8, p_needle=0.40, p_repeat=0.05, lr=(1.0, 0.6)),
    "long": dict(seq=4096, batch=2, p_needle=0.40, p_repeat=0.05, lr=(0.6, 0.3)),
    "full": dict(seq=16384, batch=1, p_needle=0.70, p_repeat=0.0, lr=(0.3, 0.02)),
}


def orthogonalize(g: torch.Tensor, steps: int = 4) -> torch.Tensor:
    """Newton-Schulz iteration of Muon (quintic coefficients)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    t = g.shape[0] > g.shape[1]
    x = g.t() if t else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        m = x @ x.t()
        x = a * x + (b * m + c * m @ m) @ x
    return x.t() if t else x


class Muon(torch.optim.Optimizer):
    """Muon; with several workers each orthogonalizes a share of the matrices."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01,
                 rank: int = 0, world: int = 1):
        super().__init__(list(params), dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.rank, self.world = rank, world

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            params.sort(key=lambda p: -p.numel())
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
            at = 0
            for i, p in enumerate(params):
                buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                if i % self.world == self.rank:
                    update = orthogonalize(p.grad.lerp(buf, group["momentum"]))
                    flat[at:at + p.numel()] = update.flatten()
                at += p.numel()
            if self.world > 1:
                dist.all_reduce(flat)
            at = 0
            for p in params:
                update = flat[at:at + p.numel()].view_as(p)
                at += p.numel()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def save(path: Path, model: Model, opts, info: dict) -> None:
    """Weights (FP32) and optimizer state (BF16) go to two files, each small."""
    path.mkdir(parents=True, exist_ok=True)
    tmp = path / "model.tmp"
    torch.save({"config": model.cfg.to_dict(), "model": model.state_dict(), "info": info}, tmp)
    tmp.replace(path / "model.pt")

    def half(o):
        if isinstance(o, torch.Tensor) and o.dim() > 0:
            return o.to(torch.bfloat16)
        if isinstance(o, dict):
            return {k: half(v) for k, v in o.items()}
        return [half(v) for v in o] if isinstance(o, list) else o

    torch.save([half(o.state_dict()) for o in opts], tmp)
    tmp.replace(path / "optim.pt")


def load(path: Path, device: str = "cpu") -> tuple[Model, dict]:
    blob = torch.load(path / "model.pt", map_location=device, weights_only=True)
    model = Model(Config(**blob["config"])).to(device)
    model.load_state_dict(blob["model"])
    return model, blob["info"]


def _worker(rank: int, args) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(args.port))
    dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    torch.set_num_threads(args.threads or 1)
    run(args, rank, args.workers)
    dist.destroy_process_group()


def train(args) -> None:
    """Train in this process, or data-parallel in ``--workers`` processes.

    On a shared CPU, one single-threaded process per core loses far less to
    other load than one process with a thread per core.
    """
    if args.workers > 1:
        torch.multiprocessing.spawn(_worker, (args,), nprocs=args.workers)
    else:
        run(args, 0, 1)


def run(args, rank: int, world: int) -> None:
    work = Path(args.work_dir)
    stage = dict(STAGES[args.stage])
    for key in ("seq", "batch", "p_needle", "p_repeat"):
        if getattr(args, key) is not None:
            stage[key] = getattr(args, key)
    if args.lr is not None:
        stage["lr"] = tuple(args.lr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.resume:
        model, info = load(work / args.resume, device)
    else:
        model, info = Model(Config()), {"steps": 0, "tokens": 0, "seconds": 0.0, "log": []}
        structured_init(model, args.seed)
        model.to(device)
    matrices = [p for n, p in model.blocks.named_parameters() if p.dim() == 2]
    other = [model.embd.weight, model.norm] + [p for p in model.blocks.parameters() if p.dim() == 1]
    opts = [Muon(matrices, rank=rank, world=world), torch.optim.AdamW(other, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    if args.resume and (work / args.resume / "optim.pt").exists():
        for o, s in zip(opts, torch.load(work / args.resume / "optim.pt", map_location=device, weights_only=True)):
            o.load_state_dict(s)
    base = [0.02 * args.lr_scale, 3e-3 * args.lr_scale]
    sampler = Sampler(work / "corpus.npy", work / "tokenizer.json", args.seed + 8 * info["steps"] + rank, stage["p_needle"],
                      stage["p_repeat"], max_facts=args.max_facts, max_questions=args.max_questions)
    hidden = torch.compile(model.hidden) if args.compile else model.hidden
    cast = torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")
    n_par = sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(f"stage {args.stage} {stage} workers {world} device {device} parameters {n_par} resume steps {info['steps']}",
              flush=True)
    begin = last_save = time.time()
    parent = os.getppid()
    spent0 = info["seconds"]
    total = args.minutes * 60
    acc = dict(text=0.0, n_text=0, ans=0.0, hit=0, n_ans=0, tokens=0, t=time.time())
    step = 0
    while True:
        now = time.time() - begin
        if world > 1 and os.getppid() != parent:
            return  # the launcher is gone
        if world > 1:  # rank 0's clock decides
            clock = torch.tensor([now], dtype=torch.float64)
            dist.broadcast(clock, 0)
            now = float(clock)
        done = now >= total or (args.steps and step >= args.steps)
        if done or time.time() - last_save > args.save_minutes * 60:
            info["seconds"] = spent0 + now
            if rank == 0:
                save(work / args.out, model, opts, info)
            last_save = time.time()
        if done:
            break
        frac = min(1.0, now / total)
        lr = stage["lr"][0] + (stage["lr"][1] - stage["lr"][0]) * frac
        if info["steps"] < 50:
            lr *= (info["steps"] + 1) / 50
        for o, b in zip(opts, base):
            for g in o.param_groups:
                g["lr"] = b * lr
        ids, w = sampler.batch(max(1, stage["batch"] // world), stage["seq"])
        ids, w = torch.from_numpy(ids).to(device), torch.from_numpy(w).to(device)[:, 1:].flatten()
        with cast:
            h = hidden(ids[:, :-1])
            logits = (h @ model.embd.weight.t()).flatten(0, 1)
        target = ids[:, 1:].flatten()
        each = F.cross_entropy(logits.float(), target, reduction="none")
        (each * w).sum().div(w.sum()).backward()
        if world > 1:
            flat = torch.cat([p.grad.flatten() for p in model.parameters()])
            dist.all_reduce(flat)
            flat /= world
            at = 0
            for p in model.parameters():
                p.grad.copy_(flat[at:at + p.numel()].view_as(p))
                at += p.numel()
        model.embd.weight.grad[:, 0] = 0  # the constant feature (init.py) stays
        torch.nn.utils.clip_grad_norm_(other, 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        info["steps"] += 1
        info["tokens"] += target.numel() * world
        with torch.no_grad():
            a, t = w == sampler.answer_weight, w == 1.0
            acc["text"] += float(each[t].sum())
            acc["n_text"] += int(t.sum())
            acc["ans"] += float(each[a].sum())
            acc["hit"] += int((logits[a].argmax(-1) == target[a]).sum())
            acc["n_ans"] += int(a.sum())
            acc["tokens"] += target.numel() * world
        if step % args.log_every == 0:
            dt = time.time() - acc["t"]
            row = dict(stage=args.stage, step=info["steps"], tokens=info["tokens"], lr=round(lr, 4),
                       text=round(acc["text"] / max(1, acc["n_text"]), 4),
                       answer=round(acc["ans"] / max(1, acc["n_ans"]), 4),
                       digit_acc=round(acc["hit"] / max(1, acc["n_ans"]), 4),
                       tok_s=round(acc["tokens"] / dt), seconds=round(spent0 + time.time() - begin))
            info["log"].append(row)
            if rank == 0:
                print(json.dumps(row), flush=True)
            acc = dict(text=0.0, n_text=0, ans=0.0, hit=0, n_ans=0, tokens=0, t=time.time())
