"""The C++ unit tests of the core, the transport and the communicator: compiles each csrc/tests/*_test.cpp and runs it.

A new one is found by its name. reduce_test.cpp has a file of its own (test_reduce.py): it needs the kernels at -O3.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TESTS = sorted(path.stem for path in (CSRC / "tests").glob("*_test.cpp") if path.stem != "reduce_test")
# -O1 takes a third of the time of -O3 to compile; the flags that decide what is correct are the extension's.
FLAGS = ["-O1", "-std=c++20", "-g1", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-ffp-contract=off", "-pthread"]
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
ARCHIVER = shutil.which("ar")

pytestmark = pytest.mark.skipif(
    COMPILER is None or ARCHIVER is None, reason="needs a C++ compiler and ar: install g++ or set CXX"
)


def run(*command: str | Path | None, timeout_s: float) -> str:
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sources but the torch glue in one static archive, from which the linker takes what a test needs."""
    folder = tmp_path_factory.mktemp("cpp")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        run(COMPILER, *FLAGS, f"-I{CSRC}", "-c", source, "-o", target, timeout_s=120)
        return target

    sources = sorted(path for layer in ("core", "transport", "communicator") for path in (CSRC / layer).glob("*.cpp"))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    run(ARCHIVER, "rcs", folder / "hxcomm.a", *objects, timeout_s=30)
    return folder / "hxcomm.a"


def arguments_of(name: str) -> list[str]:
    """The wire finds the libzmq that pyzmq has loaded; a program without Python is told where that is."""
    if not name.startswith("wire"):
        return []
    import zmq  # noqa: F401

    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in maps if "libzmq" in line})


@pytest.mark.parametrize("name", TESTS)
def test_every_expectation_of_the_unit_test_holds(name: str, archive: Path, tmp_path: Path) -> None:
    program = tmp_path / name
    run(COMPILER, *FLAGS, f"-I{CSRC}", CSRC / "tests" / f"{name}.cpp", archive, "-o", program, timeout_s=120)
    printed = run(program, *arguments_of(name), timeout_s=60)
    assert "FAILED" not in printed
    assert " ok\n" in printed, printed
