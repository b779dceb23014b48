"""The scripts that compare with other runtimes: their tables, and that peers are measured as we are."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from hxcomm.bench import arguments, timing
from hxcomm.bench.results import Row

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def constants(path: Path) -> dict[str, object]:
    """NAME = value at the top of a file that cannot be imported here, because mpi4py is not installed."""
    found: dict[str, object] = {}
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        names = [each.id for each in (target.elts if isinstance(target, ast.Tuple) else [target])]
        if all(name.isupper() for name in names) and "MPI" not in ast.unparse(node.value):
            value = eval(ast.unparse(node.value), {})
            found.update(zip(names, value if len(names) > 1 else [value], strict=True))
    return found


def test_mpi_is_measured_with_the_same_blocks_budget_and_touching() -> None:
    theirs = constants(SCRIPTS / "bench_mpi.py")
    for name in ("BLOCKS", "BUDGET_S", "MIN_ITERATIONS", "MAX_ITERATIONS"):
        assert theirs[name] == getattr(timing, name)
    assert theirs["TOUCHED_BYTES"] == arguments.TOUCHED_BYTES


def test_a_row_of_mpi_has_the_fields_of_ours() -> None:
    for node in ast.walk(ast.parse((SCRIPTS / "bench_mpi.py").read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "measure":
            answer = node.body[-1]
            assert isinstance(answer, ast.Return)
            assert isinstance(answer.value, ast.Dict)
            assert [ast.literal_eval(key) for key in answer.value.keys if key] == [field.name for field in fields(Row)]


def test_the_table_of_peers_takes_medians_of_rounds_and_the_better_mpi() -> None:
    times = {
        ("hxcomm", 4096): [2.0, 9.0, 1.0],
        ("gloo", 4096): [100.0],
        ("mpich", 4096): [6.0],
        ("openmpi", 4096): [5.0],
    }
    lines = load("bench_peers").markdown(times, 2, 3, "hxcomm").splitlines()
    assert lines[2] == "| bytes | hxcomm | gloo | mpich | openmpi | gloo / hxcomm | better MPI / hxcomm |"
    assert lines[4] == "| 4096 | 2.0 | 100.0 | 6.0 | 5.0 | 50.0x | 2.50x |"


def test_the_table_of_peers_says_which_are_not_installed() -> None:
    table = load("bench_peers").markdown({("hxcomm", 64): [1.0], ("gloo", 64): [3.0]}, 2, 1, "hxcomm")
    assert "Not installed here: mpich, openmpi" in table
    assert "better MPI" not in table


def test_the_table_of_decoding_compares_with_gloo_and_one_process() -> None:
    bench = load("bench_decode")
    speeds = {(None, 1, 2): 30.0, ("hxcomm", 2, 1): 24.0, ("gloo", 2, 1): 12.0}
    results = {
        ("135M", bench.Configuration(*key)): [bench.Decoded(speed, 0.25, (1, 2, 3))] for key, speed in speeds.items()
    }
    table = bench.markdown(results, 1, 64)
    assert "| 135M | 1 process, 2 threads | 30.0 | - | - | - |" in table
    assert "| 135M | 2 ranks, hxcomm | 24.0 | 25 % | 2.00x | 0.80x |" in table
    assert "all runs made the same tokens" in table
    results["135M", bench.Configuration("gloo", 4, 1)] = [bench.Decoded(1.0, 0.9, (1, 2, 4))]
    assert "2 DIFFERENT texts" in bench.markdown(results, 1, 64)


@pytest.mark.parametrize(
    ("script", "words", "advice"),
    [
        ("bench_peers.py", ["--ranks", "1"], "--ranks must be at least 2"),
        ("bench_decode.py", ["--models", "7B"], "known are 135M, 15M random"),
        ("bench_decode.py", ["--ranks", "3"], "--ranks 3"),
    ],
)
def test_a_wrong_argument_of_a_script_is_refused(script: str, words: list[str], advice: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert advice in done.stderr
