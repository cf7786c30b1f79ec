# SPDX-License-Identifier: Apache-2.0
"""Corpus preparation: unpacked Debian documentation packages -> plain text.

The input is a folder with one sub-folder per unpacked package (see
models/demo/README.md).  Only the Python standard library is used.
"""
from __future__ import annotations

import hashlib
import multiprocessing
import re
from html.parser import HTMLParser
from pathlib import Path

# One entry per source: package folder, page filter, byte cap of the extracted
# text.  Generated indexes and source listings are left out.
SOURCES = {
    "python": ("python3.11-doc", r"/html/(?!genindex|_sources|_static|whatsnew/changelog|py-modindex|search).*\.html$", 12_000_000),
    "postgresql": ("postgresql-doc-15", r"/html/(?!bookindex|release-).*\.html$", 9_000_000),
    "rust": ("rust-doc", r"/html/(book/(?!(second|first|2018)-edition)|reference/|nomicon/|rust-by-example/|edition-guide/|embedded-book/|rustc/|cargo/|std/).*\.html$", 9_000_000),
    "llvm": ("llvm-14-doc", r"/html/(?!AMDGPU/|genindex|search|_static|_sources).*\.html$", 8_000_000),
    "erlang": ("erlang-doc", r"\.html$", 9_000_000),
    "sqlite": ("sqlite3-doc", r"/sqlite3/(?!releaselog/).*\.html$", 8_000_000),
    "django": ("python-django-doc", r"/html/(?!genindex|_modules|py-modindex|search).*\.html$", 8_000_000),
    "cmake": ("cmake-doc", r"/html/(?!genindex|search).*\.html$", 4_000_000),
    "nodejs": ("nodejs-doc", r"/api/(?!all|index).*\.html$", 4_000_000),
    "boost": ("libboost1.74-doc", r"/doc/html/.*\.html$", 5_000_000),
    "pandas": ("python-pandas-doc", r"/html/(user_guide|getting_started|development|reference/api)/.*\.html$", 6_000_000),
    "scipy": ("python-scipy-doc", r"/html/(tutorial|reference/generated)/.*\.html$", 5_000_000),
}

# Pages that are always held out (document.txt and eval.txt come from these).
HELD_OUT = {"html/book/ch04-", "html/book/ch10-", "html/howto/functional.html", "html/tutorial/classes"}

BLOCK = {"p", "div", "br", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table", "pre", "h1", "h2", "h3", "h4", "h5", "h6",
         "section", "article", "blockquote", "main", "hr", "details", "summary"}
SKIP = {"script", "style", "nav", "head", "svg", "button", "noscript", "select", "form", "footer", "aside"}
SKIP_CLASS = re.compile(r"sphinxsidebar|related|headerlink|navheader|navfooter|sidebar|nav-wrapper|menu-bar|navbar|footer|leftnav|"
                        r"innertube|src-view-link|srclink|out-of-band|rightside|anchor|erlang-logo|copyright")
VOID = {"br", "hr", "img", "input", "meta", "link", "col", "wbr", "area", "base", "source"}


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.stack: list[tuple[str, bool]] = []
        self.skip = 0
        self.pre = 0

    def handle_starttag(self, tag, attrs):
        if tag in BLOCK:
            self.out.append("\n" if tag not in ("p", "h1", "h2", "h3", "h4", "pre", "table") else "\n\n")
        if tag in VOID:
            return
        cls = (dict(attrs).get("class") or "")
        hide = tag in SKIP or bool(SKIP_CLASS.search(cls))
        self.stack.append((tag, hide))
        self.skip += hide
        self.pre += tag == "pre"

    def handle_endtag(self, tag):
        if tag in VOID or not any(t == tag for t, _ in self.stack):
            return
        while self.stack:
            t, hide = self.stack.pop()
            self.skip -= hide
            self.pre -= t == "pre"
            if t == tag:
                break
        if tag in BLOCK:
            self.out.append("\n")

    def handle_data(self, data):
        if self.skip:
            return
        self.out.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_to_text(html: str) -> str:
    p = _Text()
    p.feed(html)
    text = "".join(p.out).replace("\u00b6", "").replace("\u00a0", " ").replace("\r", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    lines, text = text.split("\n"), None
    lines = [ln if ln.startswith("  ") else ln.strip() for ln in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _bucket(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % 100


def _extract_source(job: tuple[str, Path, Path, set[str]]) -> str:
    src, raw, out, held_out = job
    folder, pattern, cap = SOURCES[src]
    rx = re.compile(pattern)
    base = raw / folder
    pages = [p for p in base.rglob("*.html") if rx.search(str(p)) and not p.is_symlink()]
    pages.sort(key=lambda p: hashlib.sha256(str(p.relative_to(base)).encode()).digest())
    train, held, size, seen = [], [], 0, set()
    for p in pages:
        rel = str(p.relative_to(base))
        if size > cap:
            break
        try:
            text = html_to_text(p.read_text(encoding="utf-8", errors="replace"))
        except (OSError, AssertionError):
            continue
        if len(text) < 600:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        text = text[:400_000]
        if _bucket(rel) < 2 or any(h in rel for h in held_out):
            held.append(f"{rel}\n{text}")
        else:
            train.append(text)
            size += len(text)
    (out / f"train.{src}.txt").write_text("\f".join(train), encoding="utf-8")
    (out / f"held.{src}.txt").write_text("\f".join(held), encoding="utf-8")
    return f"{src}: {len(train)} pages, {size} characters; held out {len(held)} pages"


def extract(raw: Path, out: Path, held_out: set[str]) -> None:
    """Write ``train.<source>.txt`` and ``held.<source>.txt`` (2 % of the pages).

    Pages are separated by a form feed.  The caps are applied in hash order so
    that every part of a source is represented.
    """
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(src, raw, out, held_out) for src in SOURCES]
    with multiprocessing.Pool() as pool:
        for line in pool.imap_unordered(_extract_source, jobs):
            print(line, flush=True)
