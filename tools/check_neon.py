#!/usr/bin/env python3
"""Compiles every SIMD source file for aarch64, whose baseline is NEON; nothing is run.

A SIMD file is a .cc under src/ that includes Highway or names a CPU's intrinsics. The compiler is
Clang with the cross headers of libstdc++-12-dev-arm64-cross (tools/setup.sh installs both), or
aarch64-linux-gnu-g++. Exits with 1 if a file does not compile, and without a compiler with 77
(ctest: skipped), or with 1 where CI is set. --self-test checks the checker.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIMD = re.compile(r'hwy/|immintrin\.h|arm_neon\.h|__(?:AVX|SSE|ARM|x86_64|aarch64)')
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
         "-Wno-missing-field-initializers", "-Wno-psabi"]
CANDIDATES = (["clang++", "--target=aarch64-linux-gnu"], ["aarch64-linux-gnu-g++"])
SKIPPED = 77
# Highway's own choice of target, which the sources depend on.
PROBE = """#include <vector>
#include "hwy/highway.h"
static_assert(HWY_STATIC_TARGET == HWY_NEON);
int f(const std::vector<int>& x) { return static_cast<int>(x.size()); }
"""


def compile_file(compiler, path, include=()):
    """The messages of the compiler; empty if all is well."""
    command = [*compiler, *FLAGS, *(f"-I{i}" for i in include), "-c", str(path), "-o", "/dev/null"]
    # Highway and other headers that do not depend on the CPU lie in the host's folder.
    command += ["-idirafter", "/usr/include"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    return result.stderr.strip() or f"exit code {result.returncode}"


def find_compiler():
    """(compiler, why not)."""
    why = []
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cc"
        probe.write_text(PROBE)
        for candidate in CANDIDATES:
            if not shutil.which(candidate[0]):
                why.append(f"{candidate[0]} is not installed")
                continue
            message = compile_file(candidate, probe)
            if not message:
                return candidate, ""
            why.append(f"{' '.join(candidate)}: {message.splitlines()[0]}")
    return None, "; ".join(why)


def without_compiler(why):
    print(f"check_neon: no cross compiler for aarch64 ({why}); as root run: "
          "apt-get install clang libstdc++-12-dev-arm64-cross")
    return 1 if os.environ.get("CI") else SKIPPED


def version_header(folder):
    """The header that CMake writes, for files that include it."""
    text = (ROOT / "cmake/version.h.in").read_text(encoding="utf-8")
    target = Path(folder) / "thriftattn/version.h"
    target.parent.mkdir()
    target.write_text(re.sub(r"@\w+@", "0", text))


def check_tree():
    compiler, why = find_compiler()
    if compiler is None:
        return without_compiler(why)
    files = [p for p in sorted((ROOT / "src").rglob("*.cc"))
             if SIMD.search(p.read_text(encoding="utf-8"))]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        version_header(folder)
        include = (ROOT / "include", ROOT / "src", folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            messages = pool.map(lambda p: compile_file(compiler, p, include), files)
            for path, message in zip(files, messages):
                if message:
                    failed += 1
                    print(f"{path.relative_to(ROOT)}: does not compile for aarch64:\n{message}")
    print(f"check_neon: {len(files)} files, {failed} do not compile ({' '.join(compiler)})")
    return 1 if failed or not files else 0


def self_test():
    assert SIMD.search('#include "hwy/highway.h"') and SIMD.search("#include <immintrin.h>")
    assert not SIMD.search("#include <vector>\nfloat why(float x);\n")
    compiler, why = find_compiler()
    if compiler is None:
        return without_compiler(why)
    with tempfile.TemporaryDirectory() as folder:
        def messages(text):
            path = Path(folder) / "x.cc"
            path.write_text(text)
            return compile_file(compiler, path)

        assert messages(PROBE) == ""
        assert messages("#include <arm_neon.h>\n"
                        "float32x4_t f(float32x4_t x) { return vaddq_f32(x, x); }\n") == ""
        assert "immintrin" in messages("#include <immintrin.h>\n")
        assert "HWY_AVX3" in messages(PROBE.replace("HWY_NEON", "HWY_AVX3"))
        assert messages("int f(int unused) { return 0; }\n")  # a warning is an error
    print("check_neon: self-test passed")
    return 0


if __name__ == "__main__":
    sys.exit(self_test() if "--self-test" in sys.argv[1:] else check_tree())
