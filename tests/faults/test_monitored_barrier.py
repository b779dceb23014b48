"""hxcomm.monitored_barrier: a barrier that says who is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hxcomm

Pool = Callable[[int], Any]
SHORT = timedelta(milliseconds=300)


def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def some_do_not_come(rank: int, world_size: int, absent: list[int], wait_all_ranks: bool) -> tuple[str, str, int]:
    hxcomm.monitored_barrier()  # everybody comes
    kind = message = ""
    if rank in absent:
        store().wait([f"raised/{each}" for each in range(world_size) if each not in absent])
        call: Callable[[], object] = dist.barrier
    else:

        def call() -> None:
            hxcomm.monitored_barrier(timeout=SHORT, wait_all_ranks=wait_all_ranks)

    try:
        call()
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    store().set(f"raised/{rank}", "")
    return kind, message, os.getpid()


@pytest.mark.parametrize(("absent", "wait_all_ranks"), [([1], False), ([1, 3], True), ([1, 3], False), ([0], True)])
def test_every_rank_that_came_names_exactly_the_missing_ones(
    rank_pool: Pool, absent: list[int], wait_all_ranks: bool
) -> None:
    results = rank_pool(4).run(some_do_not_come, absent, wait_all_ranks, op_timeout_s=600)
    named = absent if wait_all_ranks else absent[:1]
    for rank, (kind, message, _) in enumerate(results):
        assert kind == "CommTimeoutError", message
        # The ranks that did not come find the group closed, with the same reason.
        waited_for = message.split("waiting for ", 1)[1].split(". Group", 1)[0]
        for other, (_, _, pid) in enumerate(results):
            assert (f"pid {pid})" in waited_for) == (other in named), (rank, other, message)


def succeed_and_go_on(rank: int, world_size: int) -> None:
    pair = dist.new_group([0, 1])
    hxcomm.monitored_barrier(timeout=timedelta(seconds=20), wait_all_ranks=True)
    if rank < 2:
        hxcomm.monitored_barrier(pair)
    # The barrier's timeout is its own: this call waits longer than that of the one before.
    hxcomm.monitored_barrier(timeout=timedelta(seconds=5))
    if rank == 0:
        store().set("begun", "")
    else:
        store().wait(["begun"])
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    assert (tensor == world_size).all()


def test_it_is_a_barrier_on_any_group_and_leaves_it_usable(rank_pool: Pool) -> None:
    rank_pool(3).run(succeed_and_go_on)


def refused(rank: int, world_size: int) -> list[str]:
    texts = []
    gloo = dist.new_group([0, 1], backend="gloo")
    first_alone = dist.new_group([0])
    calls = [
        lambda: hxcomm.monitored_barrier(gloo),
        lambda: hxcomm.monitored_barrier(timeout=timedelta(0)),
        lambda: hxcomm.monitored_barrier(timeout=timedelta(hours=1)),
        lambda: hxcomm.monitored_barrier(first_alone) if rank == 1 else hxcomm.monitored_barrier(gloo),
    ]
    for call in calls:
        try:
            call()
            texts.append("nothing was raised")
        except ValueError as error:
            texts.append(str(error))
    hxcomm.monitored_barrier()  # nothing was sent, the group is as before
    return texts


def test_what_cannot_be_done_is_refused_before_anything_is_sent(rank_pool: Pool) -> None:
    for rank, texts in enumerate(rank_pool(2).run(refused)):
        assert "groups of backend hxcomm, and this one has cpu:gloo" in texts[0]
        assert "must be positive" in texts[1]
        assert "at most that of the group, 30.0" in texts[2]
        assert ("not in the group" if rank == 1 else "cpu:gloo") in texts[3]


def test_without_a_process_group_it_says_what_to_call() -> None:
    with pytest.raises(ValueError, match="call init_process_group first"):
        hxcomm.monitored_barrier()
