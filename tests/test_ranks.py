"""The tests' own way of running ranks, held against gloo, which needs nothing of ours."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from ranks import RankPool, RanksFailedError, run_ranks


class Sum(int):
    """A class of this file, to travel as an argument and as a result."""


def sum_of_ranks(rank: int, world_size: int, scale: Sum) -> Sum:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([(rank + 1) * int(scale)])
    dist.all_reduce(tensor)
    return Sum(tensor.item())


def process_and_variable(rank: int, world_size: int) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("TEST_VARIABLE")


def raise_on_rank_1(rank: int, world_size: int) -> str:
    print(f"last words of {rank}")
    if rank == 1:
        raise LookupError("nothing here")
    return "fine"


def die_on_rank_0(rank: int, world_size: int) -> int:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def hang_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        threading.Event().wait()


@pytest.mark.ranks
def test_a_function_runs_on_every_rank_in_a_process_group_and_returns_its_value() -> None:
    assert run_ranks(sum_of_ranks, 2, Sum(10), backend="gloo") == [30, 30]


@pytest.mark.ranks
def test_a_rank_that_raises_fails_the_run_and_shows_what_every_rank_printed() -> None:
    with pytest.raises(RanksFailedError, match=r"(?s)rank 1 raised LookupError.*last words of 0.*last words of 1") as e:
        run_ranks(raise_on_rank_1, 2, backend=None)
    assert "nothing here" in str(e.value)


@pytest.mark.ranks
def test_an_expected_exception_and_an_expected_death_are_returned_as_such() -> None:
    fine, raised = run_ranks(raise_on_rank_1, 2, backend=None, expect={1: "LookupError"})
    assert fine == "fine"
    assert (raised.error, raised.message) == ("LookupError", "nothing here")
    assert run_ranks(die_on_rank_0, 2, backend=None, expect={0: signal.SIGKILL}) == [None, 1]


@pytest.mark.ranks
def test_a_death_that_nobody_expected_names_the_signal() -> None:
    with pytest.raises(RanksFailedError, match="rank 0 was killed by SIGKILL"):
        run_ranks(die_on_rank_0, 2, backend=None)


@pytest.mark.ranks
def test_a_rank_that_hangs_is_ended_and_its_stack_is_shown() -> None:
    with pytest.raises(RanksFailedError, match=r"(?s)rank 1 did not end in time.*hang_on_rank_1"):
        run_ranks(hang_on_rank_1, 2, backend=None, timeout_s=3)


@pytest.mark.ranks
def test_a_script_runs_with_the_environment_of_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "print(dist.get_rank(), dist.get_world_size(), *sys.argv[1:])\n"
        "dist.destroy_process_group()\n"
    )
    assert run_ranks(script, 2, "--flag") == ["0 2 --flag\n", "1 2 --flag\n"]


@pytest.mark.ranks
def test_a_pool_keeps_its_processes_until_a_function_fails_on_them() -> None:
    pool = RankPool(2)
    try:
        first = pool.run(process_and_variable, backend=None, env={"TEST_VARIABLE": "set"})
        assert pool.run(sum_of_ranks, Sum(1), backend="gloo") == [3, 3]
        assert pool.run(sum_of_ranks, Sum(2), backend="gloo") == [6, 6]
        second = pool.run(process_and_variable, backend=None)
        assert [pid for pid, _ in first] == [pid for pid, _ in second]
        assert [variable for _, variable in first + second] == ["set", "set", None, None]
        with pytest.raises(RanksFailedError, match="LookupError"):
            pool.run(raise_on_rank_1, backend=None)
        third = pool.run(process_and_variable, backend=None)
        assert not {pid for pid, _ in third} & {pid for pid, _ in first}
    finally:
        pool.close()


def test_a_function_inside_another_is_refused_before_anything_starts() -> None:
    def inner(rank: int, world_size: int) -> None: ...

    with pytest.raises(ValueError, match="top level of the test file"):
        run_ranks(inner, 2)
