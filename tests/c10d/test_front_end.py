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


# --- tensors of every kind ---


def odd_tensors(rank: int, world_size: int) -> None:
    whole = torch.full((6, 8), -1.0)
    for view in (whole[:, ::2], whole.t()[1:5], whole[::3, 1]):
        view.fill_(rank + 1.0)
        outside = whole.clone()
        dist.all_reduce(view)
        assert (view == total(world_size)).all()
        outside_view = outside.as_strided(view.size(), view.stride(), view.storage_offset())
        outside_view.copy_(view)
        assert torch.equal(outside, whole), "elements between the strides changed"
        whole.fill_(-1.0)
    spread = torch.zeros(world_size * 2, 3)[:, 1]
    dist.all_gather_into_tensor(spread, torch.full((2,), float(rank)))
    assert spread.tolist() == [float(r) for r in range(world_size) for _ in range(2)]
    scalar = torch.tensor(rank + 1.0)
    dist.all_reduce(scalar)
    assert scalar.dim() == 0 and scalar.item() == total(world_size)
    for empty in (torch.empty(0), torch.empty(3, 0, 2)):
        dist.all_reduce(empty)
        dist.broadcast(empty, 0)
        dist.all_gather([torch.empty_like(empty) for _ in range(world_size)], empty)
    expanded = torch.ones(1).expand(5) * (rank + 1)
    dist.all_reduce(expanded)
    assert (expanded == total(world_size)).all()
    transposed = torch.arange(6.0).reshape(2, 3).t()
    dist.broadcast(transposed, world_size - 1)
    assert torch.equal(transposed, torch.arange(6.0).reshape(2, 3).t())
    with torch.no_grad():
        leaf = torch.nn.Parameter(ones(rank))
        dist.all_reduce(leaf)
        assert (leaf == total(world_size)).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_strided_scalar_and_empty_tensors_are_normal_tensors(rank_pool: Pool, world_size: int) -> None:
    rank_pool(world_size).run(odd_tensors)


def nan_in_min_and_max(rank: int, world_size: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX):
            for holder in range(world_size):
                tensor = torch.arange(40, dtype=dtype) - rank
                if rank == holder:
                    tensor[holder::7] = float("nan")
                dist.all_reduce(tensor, op)
                assert tensor.isnan().nonzero().flatten().tolist() == list(range(holder, 40, 7))


def test_nan_wins_in_min_and_max_whichever_rank_holds_it(rank_pool: Pool) -> None:
    rank_pool(3).run(nan_in_min_and_max)


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


# --- handles ---


def handles(rank: int, world_size: int) -> None:
    # Many outstanding, waited for in reverse order.
    tensors = [ones(rank, count) for count in range(100)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for tensor, work in reversed(list(zip(tensors, works, strict=True))):
        assert work.wait() and work.is_completed() and work.is_success() and work.exception() is None
        assert (tensor == total(world_size)).all()
    # The handle and its input are dropped at once.
    kept = torch.zeros(world_size, 100_000)
    dist.all_gather_into_tensor(kept.view(-1), ones(rank, 100_000), async_op=True)
    junk = [torch.full((100_000,), -5.0) for _ in range(10)]
    dist.barrier()
    assert [row[0].item() for row in kept] == [r + 1.0 for r in range(world_size)]
    assert all((row == row[0]).all() for row in kept) and len(junk) == 10
    # Futures: then() runs with the result, and may itself call collectives.
    tensor = ones(rank)
    future = dist.all_reduce(tensor, async_op=True).get_future()
    doubled = future.then(lambda done: [2 * each for each in done.value()])
    assert (doubled.wait()[0] == 2 * total(world_size)).all()
    # A generous timeout is no timeout.
    assert dist.all_reduce(ones(rank), async_op=True).wait(timedelta(seconds=100))
    strided = torch.zeros(10, 2)[:, 0]
    strided += rank + 1
    dist.all_reduce(strided, async_op=True).wait()
    assert (strided == total(world_size)).all(), "a temporary is copied back before wait() returns"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_handles_may_be_kept_dropped_chained_and_waited_for_in_any_order(rank_pool: Pool, world_size: int) -> None:
    rank_pool(world_size).run(handles)


# --- groups ---


def subgroups(rank: int, world_size: int) -> None:
    pairs = [dist.new_group([a, b]) for a in range(world_size) for b in range(a + 1, world_size)]
    backwards = dist.new_group(list(reversed(range(world_size))))
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    for group in (g for g in pairs if dist.get_rank(g) >= 0):
        members = dist.get_process_group_ranks(group)
        tensor = ones(rank)
        dist.all_reduce(tensor, group=group)
        assert (tensor == sum(r + 1 for r in members)).all()
        tensor = torch.full((5,), float(rank))
        dist.broadcast(tensor, members[1], group=group)
        assert (tensor == members[1]).all()
    tensor = ones(rank)
    dist.all_reduce(tensor, group=backwards)
    assert (tensor == total(world_size)).all()
    tensor = ones(rank)
    dist.all_reduce(tensor, group=alone)
    assert (tensor == rank + 1).all()
    mine = [g for g in pairs if dist.get_rank(g) >= 0]
    dist.destroy_process_group(mine[0])
    tensor = ones(rank)
    dist.all_reduce(tensor)
    assert (tensor == total(world_size)).all(), "destroying a subgroup leaves the others alone"


def test_groups_of_some_ranks_work_side_by_side(rank_pool: Pool) -> None:
    rank_pool(4).run(subgroups)


def crossed_groups(rank: int, world_size: int) -> None:
    """Each rank posts to three groups in another order, and waits in yet another."""
    groups = [dist.new_group() for _ in range(3)]
    for turn in range(30):
        tensors = [ones(rank, count) for count in (10, 5000, 300_000)]
        works = {}
        for i in range(3):
            which = (i + rank + turn) % 3
            works[which] = dist.all_reduce(tensors[which], group=groups[which], async_op=True)
        for i in range(3):
            which = (2 * i + rank) % 3
            works[which].wait()
            assert (tensors[which] == total(world_size)).all()
    first, second = (groups[0], groups[1]) if rank % 2 else (groups[1], groups[0])
    posted = dist.all_reduce(ones(rank), group=first, async_op=True)
    if rank % 2:  # these block in the second group while the others block in the first
        dist.all_reduce(ones(rank), group=second)
        posted.wait()
    else:
        dist.all_reduce(ones(rank), group=second)
        posted.wait()


def test_groups_may_be_used_in_different_orders_on_different_ranks(rank_pool: Pool) -> None:
    rank_pool(3).run(crossed_groups)


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
