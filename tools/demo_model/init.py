# SPDX-License-Identifier: Apache-2.0
"""Structured initial weights: layers 0 and 1 start as an induction circuit.

Layer 0: head j attends to the token j + 1 places back (RoPE with a constant
query and key) and copies a projection of it into a subspace of its own.
Layer 1: the unrotated dimensions compare "this token and the ones before it"
with "the token before that position and the ones before it", and copy the
token found there; with tied embeddings copying is an identity.  Everything is
trained afterwards; the structure only saves the millions of tokens that it
takes for such heads to appear, which matters on a small CPU budget.
"""
from __future__ import annotations

import torch

from .model import Model


@torch.no_grad()
def structured_init(model: Model, seed: int = 0, rank: int = 48, const: float = 0.9) -> None:
    c = model.cfg
    g = torch.Generator().manual_seed(seed)
    assert c.n_kv == 1 and (c.n_head + 1) * rank < c.n_embd
    basis = torch.randn(c.n_embd, c.n_embd, generator=g)
    basis[:, 0] = 0
    basis[0] = 0
    basis[0, 0] = 1
    basis, _ = torch.linalg.qr(basis)  # column 0 is the constant direction
    a = basis[:, 1:1 + rank].t()
    b = [basis[:, 1 + rank * (j + 1):1 + rank * (j + 2)].t() for j in range(c.n_head)]
    emb = model.embd.weight
    emb.normal_(0, 0.15)
    emb[:, 0] = const  # constant in all rows: no effect on the logits' softmax
    model.norm.fill_(0.33)
    rms = float((emb.pow(2).sum(1).mean() / c.n_embd).sqrt())
    feature = const / rms
    hd, pairs = c.head_dim, 12
    # fast pairs select the offset, slower ones suppress far aliases
    share = torch.tensor([1.0, 1.0, 0.6, 0.5, 0.4, 0.4, 0.4, 0.4, 0.3, 0.3, 0.3, 0.3]).sqrt()
    theta = c.rope_base ** (-torch.arange(0, c.n_rot, 2) / c.n_rot)

    first, second = model.blocks[0], model.blocks[1]
    first.q.weight.mul_(0.02)
    first.k.weight.mul_(0.02)
    amp = share * 200.0 ** 0.5 / feature
    first.k.weight[0:2 * pairs:2, 0] = amp
    for j in range(c.n_head):
        # rotating the key by -(j + 1) steps equals rotating the query by j + 1 less
        ang = -theta[:pairs] * (j + 1)
        first.q.weight[j * hd:j * hd + 2 * pairs:2, 0] = amp * ang.cos()
        first.q.weight[j * hd + 1:j * hd + 2 * pairs:2, 0] = amp * ang.sin()
    first.v.weight[:rank] = a
    gain = 3.0
    first.o.weight.mul_(0.1)
    for j in range(c.n_head):
        first.o.weight[:, j * hd:j * hd + rank] = b[j].t() * (gain * rms)

    slow = c.n_rot - 8  # the slowest pairs hardly turn within the context
    nope = hd - slow
    proj = [torch.linalg.qr(torch.randn(rank, nope, generator=g))[0].t() for _ in range(c.n_head)]  # [nope, rank]
    second.q.weight.mul_(0.05)
    second.k.weight.mul_(0.05)
    second.k.weight[slow:] = sum(proj[j] @ b[j] for j in range(c.n_head))
    for h in range(c.n_head):
        q = 6.0 * proj[0] @ a
        for j in range(1, h + 1):
            q = q + 2.0 * proj[j] @ b[j - 1]
        second.q.weight[h * hd + slow:(h + 1) * hd] = q
        second.o.weight[:, h * hd:h * hd + rank] = 1.2 * a.t()
    second.v.weight[:rank] = a
