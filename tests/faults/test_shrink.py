"""torch.distributed's shrink_group: the ranks that remain go on in a group of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import SHRINK_ABORT, shrink_group

import hxcomm

Run = Callable[..., list[Any]]


def total(group: dist.ProcessGroup | None = None) -> float:
    """The sum of the numbers 10, 11, ... that the processes of a group have had from the start."""
    tensor = torch.tensor([10.0 + int(os.environ["RANK"])])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


def shrink_after_deaths(rank: int, world_size: int, victims: list[int]) -> tuple[int, int, float, float]:
    """The victims are killed one after the other, each in the group that is left; the rest shrink it every time."""
    dist.new_group(list(range(world_size)))  # a second one, which torch ends with the default group
    for number in victims:
        total()
        if rank == number:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(hxcomm.PeerFailedError, match="killed by SIGKILL") as caught:
            while True:
                total()
        assert caught.value.rank == dist.get_process_group_ranks(dist.group.WORLD).index(number)
        shrink_group([caught.value.rank])
    pair = dist.new_group([0, 1])
    return dist.get_rank(), dist.get_world_size(), total(), total(pair) if dist.get_rank() < 2 else 0.0


@pytest.mark.parametrize("victims", [[1], [3, 0]])
def test_survivors_of_a_death_go_on_in_the_shrunken_default_group(run_ranks: Run, victims: list[int]) -> None:
    results = run_ranks(shrink_after_deaths, 4, victims, expect=dict.fromkeys(victims, signal.SIGKILL))
    left = [number for number in range(4) if number not in victims]
    pair = sum(10 + number for number in left[:2])
    for index, number in enumerate(left):
        expected = (index, len(left), sum(10 + each for each in left), pair if index < 2 else 0)
        assert results[number] == expected


def shrink_a_subgroup(rank: int, world_size: int) -> list[float]:
    group = dist.new_group([0, 1, 2])
    if rank == 3:
        return [total()]
    before = total(group)
    if rank == 1:
        dist.destroy_process_group(group)
        return [total()]
    smaller = shrink_group([1], group=group, pg_options=hxcomm.Options(algorithms={"all_reduce": "one_shot"}))
    sums = [before, total(smaller), total()]
    assert {row["algorithm"] for row in hxcomm.statistics() if row["group"].endswith("without 1")} == {"one_shot"}
    return sums


def test_a_subgroup_shrinks_with_options_of_its_own_and_the_world_stays(run_ranks: Run) -> None:
    assert run_ranks(shrink_a_subgroup, 4) == [[33, 22, 46], [46], [33, 22, 46], [46]]


def shrink_with_abort(rank: int, world_size: int) -> float | str:
    if rank == 2:
        with pytest.raises(hxcomm.AbortedError) as caught:
            total()
        return str(caught.value)
    store = dist.distributed_c10d._get_default_store()
    store.add("called", 1)
    shrink_group([2], shrink_flags=SHRINK_ABORT)
    return total()


def test_shrinking_with_abort_releases_a_rank_that_waits_in_the_old_group(run_ranks: Run) -> None:
    first, second, text = run_ranks(shrink_with_abort, 3)
    assert (first, second) == (21, 21)
    assert "SHRINK_ABORT" in text and "rank " in text


def shrink_without_enough(rank: int, world_size: int) -> str:
    total()
    if rank > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(hxcomm.PeerFailedError):
        while True:
            total()
    with pytest.raises(hxcomm.InitError) as caught:
        shrink_group([1])
    return str(caught.value)


def test_shrinking_names_a_rank_that_should_remain_but_is_dead_and_does_not_wait_for_it(run_ranks: Run) -> None:
    text, *_ = run_ranks(shrink_without_enough, 3, expect={1: signal.SIGKILL, 2: signal.SIGKILL}, op_timeout_s=600)
    assert "without 1" in text and "rank 2 (host" in text and "killed by SIGKILL" in text
