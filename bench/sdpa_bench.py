#!/usr/bin/env python3
"""sdpa_bench.py [ROWS]: PyTorch's scaled_dot_product_attention (flash and cuDNN backends), BF16, on the
decode shapes of thriftattn_cuda_bench and on its causal prefill of 32768 tokens: one JSON line each. Decode
caches rotate through more than twice the L2; medians of CUDA graph replays between events.

With ROWS, what thriftattn_cuda_bench has written, it adds a line for each row of these shapes: the faster
backend's time and the speed-up against it."""

import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

KV_HEADS, HEAD_DIM = 8, 128
BACKENDS = (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION))
DECODE = [(batch, ctx, heads) for batch, ctx in ((4, 131072), (1, 131072), (8, 32768)) for heads in (32, 64)]
PREFILL = [(1, 32768, 32)]


def time_graph(calls, backend):
    """Milliseconds of one of `calls`, the median of replays of a graph of all."""
    with sdpa_kernel(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    call()
            times = []
            for _ in range(15):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(stream)
                graph.replay()
                end.record(stream)
                stream.synchronize()
                times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times[2:])


def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def decode(batch, ctx, heads):
    sets = max(1, min(8, (300 << 20) // (batch * ctx * KV_HEADS * HEAD_DIM * 4) + 1))
    # The query heads of a group as query rows: SDPA's own grouped form is slower at one query.
    q = normal(batch, KV_HEADS, heads // KV_HEADS, HEAD_DIM)
    kv = [[normal(batch, KV_HEADS, ctx, HEAD_DIM) for _ in "kv"] for _ in range(sets)]
    run = torch.nn.functional.scaled_dot_product_attention
    return [lambda k=k, v=v: run(q, k, v) for k, v in kv]


def prefill(batch, ctx, heads):
    q = normal(batch, heads, ctx, HEAD_DIM)
    k, v = (normal(batch, KV_HEADS, ctx, HEAD_DIM) for _ in "kv")
    run = torch.nn.functional.scaled_dot_product_attention
    return [lambda: run(q, k, v, is_causal=True, enable_gqa=True)]


def shape_of(row):
    return tuple(row[key] for key in ("op", "batch", "ctx", "q_heads", "kv_heads", "head_dim"))


def rows_of(path):
    """Decode of one query, and prefill of a whole context."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.startswith("{")]
    whole = {"decode": lambda row: 1, "prefill": lambda row: row["ctx"]}
    return [row for row in rows if row["op"] in whole and row["queries"] == whole[row["op"]](row)]


def main():
    best = {}  # shape: (ms, backend)
    for op, calls_of, shapes in (("decode", decode, DECODE), ("prefill", prefill, PREFILL)):
        for batch, ctx, heads in shapes:
            for name, backend in BACKENDS:
                row = {"op": op, "policy": f"sdpa-{name}", "backend": "cuda", "ctx": ctx, "batch": batch,
                       "q_heads": heads, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
                try:
                    ms = time_graph(calls_of(batch, ctx, heads), backend)
                    row["ms_median"] = round(ms, 5)
                    if op == "decode":
                        row["gb_s"] = round(batch * ctx * KV_HEADS * HEAD_DIM * 4 / ms * 1e-6, 1)
                    else:
                        row["tflop_s"] = round(2 * batch * heads * HEAD_DIM * ctx * (ctx + 1) / ms * 1e-9, 1)
                    shape = shape_of(row)
                    best[shape] = min(best.get(shape, (ms, name)), (ms, name))
                except Exception as error:  # a backend may refuse a shape: say so in the line
                    row["error"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
                print(json.dumps(row), flush=True)
                torch.cuda.empty_cache()
    for row in rows_of(sys.argv[1]) if len(sys.argv) > 1 else []:
        if shape_of(row) not in best:
            continue
        ms, name = best[shape_of(row)]
        print(json.dumps({**{key: row[key] for key in ("op", "policy", "backend", "ctx", "batch", "q_heads",
                                                       "kv_heads", "head_dim", "ms_median")},
                          "sdpa": name, "ms_sdpa": round(ms, 5),
                          "speedup_vs_sdpa": round(ms / row["ms_median"], 3)}))


if __name__ == "__main__":
    main()
