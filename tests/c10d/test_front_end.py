"""What a torch.distributed program sees beyond results: groups, handles, options, choices, registration."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hxcomm
from hxcomm import algorithms
from hxcomm.schedule import Location, Schedule, copy, reduce

Pool = Callable[[int], Any]
Run = Callable[..., list[Any]]
ROOT = Path(__file__).resolve().parents[2]


def total(world_size: int) -> float:
    return float(sum(range(1, world_size + 1)))


def ones(rank: int, count: int = 33) -> torch.Tensor:
    return torch.full((count,), rank + 1.0)


def algorithms_used(op: str) -> set[str]:
    return {row["algorithm"] for row in hxcomm.statistics() if row["op"] == op}


# --- bits ---


def numbers(rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(5003, generator=generator) * 10.0 ** torch.randint(-3, 4, (5003,), generator=generator)).to(
        dtype
    )


def bits(rank: int, world_size: int) -> list[bytes]:
    """all_reduce and reduce_scatter of numbers whose sums round, as bytes."""
    results = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            tensor = numbers(rank, dtype)
            dist.all_reduce(tensor, op)
            results.append(tensor.view(torch.uint8).numpy().tobytes())
            parts = torch.zeros(5003, dtype=dtype)
            dist.reduce_scatter(parts, [numbers(rank, dtype)] * world_size, op)
            assert torch.equal(parts, tensor)
    return results


def left_fold(world_size: int) -> list[bytes]:
    results = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for average in (False, True):
            value = numbers(0, dtype).float()
            for rank in range(1, world_size):
                value = value + numbers(rank, dtype).float()
            value = (value / world_size if average else value).to(dtype)
            results.append(value.view(torch.uint8).numpy().tobytes())
    return results


VARIANTS = [{}, {"HXCOMM_SEGMENT": "1KiB"}, {"HXCOMM_ALGO": "all_reduce:one_shot"}, {"HXCOMM_EXECUTOR": "python"}]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("env", VARIANTS)
def test_results_have_the_bits_of_the_left_fold_in_rank_order(
    rank_pool: Pool, world_size: int, env: dict[str, str]
) -> None:
    expected = left_fold(world_size)
    for rank_bits in rank_pool(world_size).run(bits, env=env):
        assert rank_bits == expected


def test_the_instruction_set_changes_no_bit(run_ranks: Run) -> None:
    assert run_ranks(scalar_bits, 2, env={"HXCOMM_ISA": "scalar"}) == [left_fold(2)] * 2


def scalar_bits(rank: int, world_size: int) -> list[bytes]:
    from hxcomm import _core

    assert _core.reduce_isa() == "scalar"
    return bits(rank, world_size)


# --- groups ---


def init_again(rank: int, world_size: int) -> None:
    for _ in range(4):  # over the same store (env://), as programs do that restart themselves in place
        dist.init_process_group("hxcomm", timeout=timedelta(seconds=30))
        part = dist.new_group(sorted({0, world_size - 1}))
        tensor = ones(rank)
        dist.all_reduce(tensor)
        assert (tensor == total(world_size)).all()
        if rank in (0, world_size - 1):
            dist.barrier(part)
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 3])
def test_destroy_and_init_again_in_one_process(rank_pool: Pool, world_size: int) -> None:
    rank_pool(world_size).run(init_again, backend=None)


# --- choices ---


def used_for_all_reduce(rank: int, world_size: int) -> set[str]:
    tensor = ones(rank, 5000)
    dist.all_reduce(tensor)
    assert (tensor == total(world_size)).all()
    return algorithms_used("all_reduce")


@pytest.mark.parametrize("name", algorithms.names("all_reduce"))
def test_the_environment_chooses_the_algorithm(rank_pool: Pool, name: str) -> None:
    assert rank_pool(3).run(used_for_all_reduce, env={"HXCOMM_ALGO": f"all_reduce:{name}"}) == [{name}] * 3


def used_with_options(rank: int, world_size: int) -> tuple[set[str], set[str]]:
    options = hxcomm.Options(algorithms={"all_reduce": "ring"}, segment_bytes=4096)
    part = dist.new_group(pg_options=options)
    dist.all_reduce(ones(rank, 5000), group=part)
    by_option = algorithms_used("all_reduce")
    return by_option, used_for_all_reduce(rank, world_size)


def test_options_choose_the_algorithm_of_one_group_and_win_over_the_environment(rank_pool: Pool) -> None:
    for by_option, both in rank_pool(3).run(used_with_options, env={"HXCOMM_ALGO": "all_reduce:one_shot"}):
        assert by_option == {"ring"} and both == {"ring", "one_shot"}


def unknown_names(rank: int, world_size: int) -> list[str]:
    messages = []
    for asked in ({"all_reduce": "quick"}, {"all_reduced": "ring"}):
        try:
            dist.new_group(pg_options=hxcomm.Options(algorithms=asked))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_unknown_names_raise_listing_those_that_exist(rank_pool: Pool) -> None:
    for unknown_algorithm, unknown_op in rank_pool(2).run(unknown_names):
        assert "'quick'" in unknown_algorithm and all(n in unknown_algorithm for n in algorithms.names("all_reduce"))
        assert "'all_reduced'" in unknown_op and all(op in unknown_op for op in algorithms.OPS)


def all_through_rank_0(world_size: int) -> Schedule:
    """Rank 0 reduces everything in one round; the others fetch the result in the next."""

    def rounds() -> Iterator[Any]:
        result = Location(0, "output", 0)
        yield [reduce(0, [Location(r, "input", 0) for r in range(world_size)], result)]
        yield [copy(r, result, Location(r, "output", 0)) for r in range(1, world_size)]

    return Schedule("all_reduce", "all_through_rank_0", world_size, rounds)


def by_size(op: str, nbytes: int, dtype: str, layout: Any, chip: str | None) -> str | None:
    if op != "all_reduce" or dtype != "float64":
        return None
    return "all_through_rank_0" if nbytes > 1000 else "ring"


def own_algorithm_and_selector(rank: int, world_size: int) -> set[str]:
    hxcomm.register_algorithm("all_reduce", "all_through_rank_0", all_through_rank_0)
    hxcomm.register_selector(by_size)
    dist.init_process_group("hxcomm", timeout=timedelta(seconds=30))
    for count in (10, 1000, 100_000):
        tensor = ones(rank, count).double()
        dist.all_reduce(tensor)
        assert (tensor == total(world_size)).all()
    used = algorithms_used("all_reduce")
    dist.destroy_process_group()
    return used


def test_a_users_algorithm_and_selector_run_in_a_real_group(run_ranks: Run) -> None:
    # Fresh processes: a registration lasts as long as its process.
    assert run_ranks(own_algorithm_and_selector, 3, backend=None) == [{"all_through_rank_0", "ring"}] * 3


# --- registration ---


def python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program in `folder`, where Python looks for modules first."""
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_backend_is_there_without_an_import_and_changes_no_cpu_program(tmp_path: Path) -> None:
    done = python(
        "import torch, torch.distributed as dist\n"
        "before = dist.Backend.default_device_backend_map['cpu']\n"
        "dist.init_process_group('hxcomm', store=dist.HashStore(), rank=0, world_size=1)\n"
        "t = torch.ones(3); dist.all_reduce(t); dist.destroy_process_group()\n"
        "dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)\n"
        "print(before, dist.get_backend_config())\n"
        "dist.destroy_process_group()",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gloo ") and "cpu:gloo" in done.stdout and "hxcomm" not in done.stdout


def test_import_torch_survives_a_broken_installation(tmp_path: Path) -> None:
    """The package is there, its extensions are not those of this torch: a warning, and an error when it is used."""
    broken = tmp_path / "hxcomm"
    shutil.copytree(ROOT / "hxcomm", broken, ignore=shutil.ignore_patterns("__pycache__"))
    (broken / "_build_info.py").write_text('TORCH_VERSION = "1.0.0"\n')
    done = python(
        "import torch, torch.distributed as dist, hxcomm\n"
        f"assert hxcomm.__file__.startswith({str(tmp_path)!r}), hxcomm.__file__\n"
        "print(torch.ones(2).sum().item())\n"
        "try: dist.init_process_group('hxcomm', store=dist.HashStore(), rank=0, world_size=1)\n"
        "except ImportError as error: print(error)",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2.0") and "hxcomm was built for torch 1.0.0" in done.stdout
    (broken / "c10d.py").write_text("raise RuntimeError('broken on purpose')\n")
    done = python("import torch; print('imported')", tmp_path)
    assert done.returncode == 0 and "imported" in done.stdout, done.stderr
    assert "broken on purpose" in done.stderr


def detail(rank: int, world_size: int) -> list[str]:
    dist.init_process_group("hxcomm", timeout=timedelta(seconds=30))
    tensor = ones(rank)
    dist.all_reduce(tensor)
    names = []
    try:
        dist.all_reduce(torch.ones(8), dist.ReduceOp.MAX if rank else dist.ReduceOp.SUM)
    except Exception as error:
        names.append(type(error).__name__)
    dist.destroy_process_group()
    return [str(tensor[0].item()), *names]


def test_torchs_detail_debugging_goes_together_with_typed_errors(run_ranks: Run) -> None:
    env = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    assert run_ranks(detail, 2, backend=None, env=env) == [["3.0", "MismatchError"]] * 2
