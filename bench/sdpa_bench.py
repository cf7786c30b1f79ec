#!/usr/bin/env python3
"""Times PyTorch's scaled_dot_product_attention (flash and cuDNN backends) at decode, BF16, on the
shapes of thriftattn_cuda_bench: one JSON line each. Caches rotate through more than twice the L2;
medians of CUDA graph replays between events."""

import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def measure(batch, ctx, q_heads, kv_heads, dim, backend):
    sets = max(1, min(8, (300 << 20) // (batch * ctx * kv_heads * dim * 4) + 1))
    kv = [[torch.randn(batch, kv_heads, ctx, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
          for _ in range(sets)]
    # The query heads of a group as query rows: SDPA's own grouped form is slower at one query.
    q = torch.randn(batch, kv_heads, q_heads // kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    run = torch.nn.functional.scaled_dot_product_attention
    best = None
    with sdpa_kernel(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for k, v in kv:
                run(q, k, v)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for k, v in kv:
                    run(q, k, v)
            times = []
            for _ in range(15):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(stream)
                graph.replay()
                end.record(stream)
                stream.synchronize()
                times.append(begin.elapsed_time(end) / sets)
            best = statistics.median(times[2:])
    return best


for batch, ctx in ((4, 131072), (1, 131072), (8, 32768)):
    for heads in (32, 64):
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            row = {"op": "decode", "policy": f"sdpa-{name}", "device": "cuda", "ctx": ctx, "batch": batch,
                   "q_heads": heads, "kv_heads": 8, "head_dim": 128}
            try:
                row["ms_median"] = round(measure(batch, ctx, heads, 8, 128, backend), 5)
                row["gb_s"] = round(batch * ctx * 8 * 128 * 4 / row["ms_median"] * 1e-6, 1)
            except Exception as error:  # a backend may refuse a shape: say so in the line
                row["error"] = str(error).splitlines()[0][:200]
            print(json.dumps(row), flush=True)
            torch.cuda.empty_cache()
