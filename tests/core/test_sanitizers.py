"""Streams of operations between ranks that are threads, under the compiler's sanitizers: no race, no memory error.

What runs is scripts/sanitize.py --quick; it keeps its objects in build/, so only what changed is compiled. The unit
tests under sanitizers take minutes: scripts/sanitize.sh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
LIBRARIES = {"thread": ("libtsan.so",), "address,undefined": ("libasan.so", "libubsan.so")}


def has_library(name: str) -> bool:
    # Where the compiler has no such file it prints the name as it was given.
    done = subprocess.run([str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True, timeout=30)
    return done.stdout.strip() != name


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: install g++ or set CXX")
@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_sanitizer_finds_nothing_in_streams_of_operations(kind: str) -> None:
    for library in LIBRARIES[kind]:
        if not has_library(library):
            pytest.skip(f"the compiler's {library} is not installed: it comes with g++ (Debian, Ubuntu)")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "sanitize.py"), "--quick", kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout
    assert f"{kind}: stress: ok" in done.stdout
