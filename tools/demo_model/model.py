# SPDX-License-Identifier: Apache-2.0
"""Llama-architecture decoder with GQA and partial, interleaved RoPE (PyTorch).

The layout is the one of a GGUF file with general.architecture = "llama": the
first ``n_rot`` dimensions of every head are rotated in pairs (2i, 2i + 1) by
``pos * base ** (-2i / n_rot)``; the other dimensions carry no position.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocab_size: int = 2048
    n_embd: int = 384
    n_layer: int = 4
    n_head: int = 8
    n_kv: int = 2
    head_dim: int = 64
    n_rot: int = 32
    n_ff: int = 1024
    rope_base: float = 500000.0
    eps: float = 1e-5
    n_ctx: int = 16384

    def to_dict(self) -> dict:
        return asdict(self)


def rope_table(cfg: Config, start: int, n: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    inv = cfg.rope_base ** (-torch.arange(0, cfg.n_rot, 2, dtype=torch.float64) / cfg.n_rot)
    ang = torch.arange(start, start + n, dtype=torch.float64)[:, None] * inv[None]
    return ang.cos().float().to(device), ang.sin().float().to(device)  # [n, n_rot / 2]


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [batch, heads, n, head_dim]."""
    r = 2 * cos.shape[-1]
    pair = x[..., :r].unflatten(-1, (-1, 2))
    a, b = pair[..., 0], pair[..., 1]
    rot = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((rot.to(x.dtype), x[..., r:]), -1)


class Cache:
    """KV cache of one sequence batch; ``kv_dtype`` rounds what is stored."""

    def __init__(self, kv_dtype: torch.dtype | None = None):
        self.k: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}
        self.kv_dtype = kv_dtype

    @property
    def length(self) -> int:
        return self.k[0].shape[2] if self.k else 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        if self.kv_dtype is not None:
            k, v = k.to(self.kv_dtype).to(k.dtype), v.to(self.kv_dtype).to(v.dtype)
        if layer in self.k:
            k, v = torch.cat((self.k[layer], k), 2), torch.cat((self.v[layer], v), 2)
        self.k[layer], self.v[layer] = k, v
        return k, v

    def fork(self) -> "Cache":
        c = Cache(self.kv_dtype)
        c.k, c.v = dict(self.k), dict(self.v)
        return c


class Block(nn.Module):
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        d, h, kv, hd = cfg.n_embd, cfg.n_head, cfg.n_kv, cfg.head_dim
        self.attn_norm = nn.Parameter(torch.ones(d))
        self.q = nn.Linear(d, h * hd, bias=False)
        self.k = nn.Linear(d, kv * hd, bias=False)
        self.v = nn.Linear(d, kv * hd, bias=False)
        self.o = nn.Linear(h * hd, d, bias=False)
        self.ffn_norm = nn.Parameter(torch.ones(d))
        self.gate = nn.Linear(d, cfg.n_ff, bias=False)
        self.up = nn.Linear(d, cfg.n_ff, bias=False)
        self.down = nn.Linear(cfg.n_ff, d, bias=False)
        for m in (self.q, self.k, self.v, self.gate, self.up):
            nn.init.normal_(m.weight, std=d ** -0.5)
        for m in (self.o, self.down):
            nn.init.normal_(m.weight, std=0.3 * m.in_features ** -0.5 / cfg.n_layer ** 0.5)

    def forward(self, x, cos, sin, cache: Cache | None = None):
        c = self.cfg
        b, n, _ = x.shape
        y = F.rms_norm(x, (c.n_embd,), self.attn_norm, c.eps)
        q = rope(self.q(y).view(b, n, c.n_head, c.head_dim).transpose(1, 2), cos, sin)
        k = rope(self.k(y).view(b, n, c.n_kv, c.head_dim).transpose(1, 2), cos, sin)
        v = self.v(y).view(b, n, c.n_kv, c.head_dim).transpose(1, 2)
        past = 0
        if cache is not None:
            past = cache.length if self.layer == 0 else cache.k[self.layer].shape[2] if self.layer in cache.k else 0
            k, v = cache.append(self.layer, k, v)
        if past == 0:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif n == 1:
            a = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            mask = torch.ones(n, k.shape[2], dtype=torch.bool, device=x.device).tril(past)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, n, -1))
        y = F.rms_norm(x, (c.n_embd,), self.ffn_norm, c.eps)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.embd = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        nn.init.normal_(self.embd.weight, std=0.05)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.norm = nn.Parameter(torch.ones(cfg.n_embd))
        self._table: tuple[int, tuple[torch.Tensor, torch.Tensor]] = (0, (torch.empty(0), torch.empty(0)))

    def tables(self, start: int, n: int, device):
        if self._table[0] < start + n or self._table[1][0].device != device:
            self._table = (start + n, rope_table(self.cfg, 0, start + n, device))
        cos, sin = self._table[1]
        return cos[start:start + n], sin[start:start + n]

    def hidden(self, ids, cache: Cache | None = None):
        start = cache.length if cache is not None else 0
        cos, sin = self.tables(start, ids.shape[1], ids.device)
        x = self.embd(ids)
        for blk in self.blocks:
            x = blk(x, cos, sin, cache)
        return F.rms_norm(x, (self.cfg.n_embd,), self.norm, self.cfg.eps)

    def forward(self, ids, cache: Cache | None = None, last: bool = False):
        h = self.hidden(ids, cache)
        if last:
            h = h[:, -1:]
        return h @ self.embd.weight.t()

    @torch.no_grad()
    def greedy(self, ids: list[int], n: int, cache: Cache | None = None, stop: int | None = None):
        """Greedy continuation; returns token ids and the logits of every step."""
        cache = cache or Cache()
        dev = self.embd.weight.device
        logits = self(torch.tensor([ids], device=dev), cache, last=True)[0, -1]
        out, steps = [], []
        for i in range(n):
            steps.append(logits)
            t = int(logits.argmax())
            out.append(t)
            if t == stop or i + 1 == n:
                break
            logits = self(torch.tensor([[t]], device=dev), cache)[0, -1]
        return out, steps
