"""The reduce kernels: compiles csrc/tests/reduce_test.cpp with the flags of the extension and runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = ["core/reduce.cpp", "core/reduce_scalar.cpp", "core/reduce_avx2.cpp"]
FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-ffp-contract=off", "-pthread"]
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: install g++ or set CXX")


def run(*command: str | Path, timeout_s: float = 150) -> str:
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The object file of each kernel and of the test, compiled two at a time."""
    folder = tmp_path_factory.mktemp("reduce")

    def compiled(source: str) -> Path:
        target = folder / Path(source).with_suffix(".o").name
        level = "-O3" if source.startswith("core/") else "-O2"
        run(COMPILER, *FLAGS, level, f"-I{CSRC}", "-c", CSRC / source, "-o", target)
        return target

    sources = [*KERNELS, "tests/reduce_test.cpp"]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(sources, pool.map(compiled, sources), strict=True))


def test_kernels_equal_the_reference_and_avx2_gives_the_bits_of_scalar(
    objects: dict[str, Path], tmp_path: Path
) -> None:
    program = tmp_path / "reduce_test"
    run(COMPILER, *objects.values(), "-o", program)
    printed = run(program)
    assert "FAILED" not in printed
    assert printed.count(" ok\n") >= 9, printed


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_avx2_code_shares_no_function_with_code_for_any_cpu(objects: dict[str, Path]) -> None:
    """A weak function compiled for AVX2 could be the copy that the linker keeps, and crash an older CPU."""
    weak = [line for line in run("nm", "-C", objects["core/reduce_avx2.cpp"]).splitlines() if line[17:18] in "WwVi"]
    assert not weak
