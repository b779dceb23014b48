"""hxcomm as a C++ backend of torchcomms, built against a stand-in of its headers: what a Python plug-in cannot get."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

import hxcomm
from hxcomm.errors import AbortedError, CommTimeoutError

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).resolve().parent / "stand_in"
KINDS = ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM", "AVG"]
STATUSES = ["NOT_STARTED", "INPROGRESS", "COMPLETED", "TIMEDOUT", "ERROR"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plug-in and its driver in one file. Takes 20 s on an idle core, 1 s where ccache has it."""
    built = tmp_path_factory.mktemp("plug_in") / "driver.so"
    includes = [*cpp_extension.include_paths("cpu"), sysconfig.get_path("include")]
    command = [
        *(["ccache"] if shutil.which("ccache") else []),
        *shlex.split("c++ -O0 -std=c++20 -Wall -Wextra -Werror -fvisibility=hidden -fPIC"),
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        *(f"-I{folder}" for folder in (ROOT / "csrc", STAND_IN)),
        *(word for folder in includes for word in ("-isystem", folder)),
    ]
    folder = cpp_extension.library_paths("cpu")[0]
    objects = [*command, "-c", str(STAND_IN / "driver.cpp"), "-o", f"{built}.o"]
    link = ["c++", "-shared", f"{built}.o", "-o", str(built), f"-L{folder}", f"-Wl,-rpath,{folder}"]
    for step in (objects, [*link, "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]):
        done = subprocess.run(step, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr[-4000:]
    return str(built)


def load(library: str, name: str) -> ModuleType:
    if name not in sys.modules:
        loader = importlib.machinery.ExtensionFileLoader(name, library)
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        loader.exec_module(sys.modules[name])
    return sys.modules[name]


def new_backend(library: str, name: str = "world", hints: dict[str, str] | None = None) -> Any:
    load(library, "_torchcomms")
    return load(library, "driver").new_backend("hxcomm", name, hints or {})


def reduced(backend: Any, values: list[float], kind: str, factor: object = None) -> list[float]:
    tensor = torch.tensor(values)
    backend.all_reduce(tensor, KINDS.index(kind), factor, False, {}, 0)
    result: list[float] = tensor.tolist()
    return result


def everything_passes_through(rank: int, n: int, library: str) -> None:
    backend = new_backend(library)
    assert (backend.rank(), backend.size()) == (rank, n)
    assert backend.names() == ["hxcomm", hxcomm.__version__, "world", "cpu"]
    mine = [float(rank + 1)]
    results = {kind: reduced(backend, mine, kind) for kind in ("SUM", "PRODUCT", "MIN", "MAX", "AVG")}
    assert results == {"SUM": [6], "PRODUCT": [6], "MIN": [1], "MAX": [3], "AVG": [2]}
    bits = torch.tensor([1 << rank, 7])
    backend.all_reduce(bits, KINDS.index("BXOR"), None, False, {}, 0)
    assert bits.tolist() == [7, 7]
    assert reduced(backend, mine, "PREMUL_SUM", 0.5) == [3]
    assert reduced(backend, mine, "PREMUL_SUM", torch.tensor([float(rank)])) == [8]
    out = [torch.zeros(1) for _ in range(n)]
    backend.all_gather(out, torch.tensor(mine))
    assert [each.item() for each in out] == [1, 2, 3]
    backend.all_to_all_v_single(got := torch.zeros(n), torch.full((n,), mine[0]), [1] * n)
    assert got.tolist() == [1, 2, 3]
    work = backend.exchange(torch.tensor(mine), got := torch.zeros(1), (rank + 1) % n, (rank - 1) % n)
    work.wait()
    assert got.item() == (rank - 1) % n + 1 and STATUSES[work.status()] == "COMPLETED"
    pair = backend.split([2, 0], "pair")
    assert (pair is None) == (rank == 1)
    if pair is not None:
        assert (pair.rank(), pair.size(), pair.names()[2]) == ([2, 0].index(rank), 2, "pair")
        assert reduced(pair, mine, "SUM") == [4]
        pair.finalize()
    with pytest.raises(ValueError, match="there is no hint 'chunks'"):
        backend.all_reduce(torch.ones(1), 0, None, False, {"chunks": "1"}, 0)
    backend.barrier()
    backend.finalize()


def test_what_torchcomms_keeps_from_python_backends_passes_through(
    rank_pool: Callable[[int], Any], library: str
) -> None:
    rank_pool(3).run(everything_passes_through, library, backend=None)


def errors_pass_through(rank: int, n: int, library: str) -> None:
    backend = new_backend(library, hints={"algorithm": "all_reduce:one_shot"})
    until_then = new_backend(library, "until then")
    if rank == 0:
        work = backend.all_reduce(torch.ones(1), 0, None, True, {"chunk": "4KiB"}, 300)
        assert STATUSES[work.status()] == "INPROGRESS"
        with pytest.raises(CommTimeoutError):
            work.wait()
        assert STATUSES[work.status()] == "TIMEDOUT"
    until_then.barrier()
    for each in (backend, until_then):
        each.finalize()


def test_a_timeout_of_one_call_raises_the_typed_error(rank_pool: Callable[[int], Any], library: str) -> None:
    rank_pool(2).run(errors_pass_through, library, backend=None)


def abort_passes_through(rank: int, n: int, library: str) -> None:
    backend, until_then = new_backend(library), new_backend(library, "until then")
    if rank == 0:
        work = backend.all_reduce(torch.ones(1), 0, None, True, {}, 0)
        backend.abort()
        with pytest.raises(AbortedError):
            work.wait()
        assert STATUSES[work.status()] == "ERROR"
        with pytest.raises(AbortedError, match="only reconfigure"):
            backend.barrier()
    until_then.barrier()
    for each in (backend, until_then):
        each.finalize()


def test_an_abort_ends_what_is_pending(rank_pool: Callable[[int], Any], library: str) -> None:
    rank_pool(2).run(abort_passes_through, library, backend=None)
