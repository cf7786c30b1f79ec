#!/usr/bin/env python3
"""Draws the array that `thriftattn eval -o json` prints as an SVG: a table with bars.

  tools/plot_results.py out/demo.json --title "Demo model, 16384 tokens" --output docs/img/demo.svg

Needs nothing but Python. Bars of KL are logarithmic, of bits linear with BF16 as full length.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from html import escape
from pathlib import Path

ROW = 30
HEAD = 84
BAR = 110
# What is ours stands out from what others do.
OURS, THEIRS, INK, FAINT = "#1f7a5c", "#8a94a6", "#1b2430", "#66707f"
BACK = "#ffffff"


def size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1000 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


def small(x: float) -> str:
    if x == 0:
        return "0"
    return f"{x:.1e}" if abs(x) < 1e-7 else f"{x:.{min(8, max(1, 1 - math.floor(math.log10(abs(x)))))}f}"


def is_ours(row: dict) -> bool:
    """Layered caches report pages; the plain formats of others have none."""
    return row["promoted_fraction"] > 0 or row["skipped_fraction"] > 0


def columns(rows: list[dict]):
    """(head, unit, width, text of a row, bar length of a row in 0..1 or None)."""
    low = min((r["kl_mean"] for r in rows if r["kl_mean"] > 0), default=1e-6)
    floor = math.log10(low) - 0.5
    top = max(math.log10(max(r["kl_mean"] for r in rows) or 1.0), floor + 1)

    def kl_bar(r: dict) -> float:
        return (math.log10(r["kl_mean"]) - floor) / (top - floor) if r["kl_mean"] > 0 else 0.0

    yield "policy", "", 112, lambda r: r["policy"], None
    yield "KL to FP32", "nats per token, log scale", 62 + BAR, lambda r: small(r["kl_mean"]), kl_bar
    yield "KL 99.9 %", "", 88, lambda r: small(r["kl_p999"]), None
    yield "needles", "found", 72, lambda r: (
        "–" if r["needle_recall"] is None else f"{100 * r['needle_recall']:.0f} %"), None
    yield ("bits stored", "per K/V element", 44 + BAR, lambda r: f"{r['bits_stored_per_element']:.2f}",
           lambda r: r["bits_stored_per_element"] / 16)
    yield ("bits read", "when decoding", 44 + BAR, lambda r: f"{r['bits_read_per_element']:.2f}",
           lambda r: r["bits_read_per_element"] / 16)
    yield "KV cache", "", 84, lambda r: size(r["kv_bytes"]), None
    yield "of BF16", "", 66, lambda r: f"{100 * r['kv_bytes'] / r['kv_bytes_bf16']:.0f} %", None
    yield "time", "", 64, lambda r: f"{r['seconds']:.1f} s", None


def render(rows: list[dict], title: str) -> str:
    cols = list(columns(rows))
    gap = 16
    width = sum(c[2] for c in cols) + gap * (len(cols) + 1)
    height = HEAD + ROW * len(rows) + 18
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="{BACK}"/>',
        f'<text x="{gap}" y="26" font-size="15" font-weight="bold" fill="{INK}">{escape(title)}</text>',
    ]

    def text(x: float, y: float, content: str, colour: str, extra: str = "") -> None:
        out.append(f'<text x="{x:g}" y="{y:g}" fill="{colour}"{extra}>{escape(content)}</text>')

    x = gap
    for head, unit, wide, cell, bar in cols:
        first = x == gap
        right = ' text-anchor="end"' if not first and bar is None else ""
        at = x + wide if right else x
        text(at, 52, head, INK, right + ' font-weight="bold"')
        text(at, 67, unit, FAINT, right + ' font-size="10"')
        for i, row in enumerate(rows):
            y = HEAD + ROW * i + 14
            colour = OURS if is_ours(row) else THEIRS
            if bar is not None:
                number = wide - BAR - 6
                text(x + number, y, cell(row), INK, ' text-anchor="end"')
                share = min(1.0, max(0.0, bar(row)))
                out.append(f'<rect x="{x + number + 8:g}" y="{y - 11:g}" width="{max(1.0, share * (BAR - 2)):.1f}" '
                           f'height="13" rx="2" fill="{colour}"/>')
            else:
                bold = ' font-weight="bold"' if first and is_ours(row) else ""
                text(at, y, cell(row), OURS if bold else INK, right + bold)
        x += wide + gap
    out.append(f'<line x1="{gap}" y1="75" x2="{width - gap}" y2="75" stroke="{FAINT}" stroke-width="0.7"/>')
    return "\n".join(out) + "\n</svg>\n"


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("json", type=Path)
    ap.add_argument("--title", default="ThriftAttention")
    ap.add_argument("--output", type=Path, required=True)
    args = ap.parse_args()
    try:
        rows = json.loads(args.json.read_text(encoding="utf-8"))
        svg = render(rows, args.title)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"plot_results: {args.json} is not what 'thriftattn eval -o json' prints: {error}", file=sys.stderr)
        return 1
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
