"""Calls that differ or are refused, across hosts: every rank of every host is told the same, and the group goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults.test_mismatches import MISMATCHES, REFUSED, group_works, mismatched, raised_by, refused_on_rank_1
from hosts.conformance import run_cases
from hosts.host_ids import group_on
from hosts.networks import Network

Networks = Callable[..., Network]
Pool = Callable[[int], Any]
ENV = {"HXCOMM_INSECURE": "1"}


def every_kind(rank: int, world_size: int) -> dict[str, Any]:
    return {
        **{f"mismatch: {kind}": mismatched(rank, world_size, kind) for kind in MISMATCHES},
        **{f"refused: {kind}": refused_on_rank_1(rank, world_size, kind) for kind in REFUSED},
    }


def every_kind_on(rank: int, world_size: int, hosts: tuple[int, ...]) -> dict[str, Any]:
    with group_on(hosts):
        return every_kind(rank, world_size)


def judge(results: list[dict[str, Any]]) -> None:
    for kind, (_, _, words) in MISMATCHES.items():
        told = [found[f"mismatch: {kind}"] for found in results]
        assert all(each == told[0] for each in told), f"{kind}: every rank shows the same table"
        for name, message in told[0]:
            assert name == "MismatchError", message
            assert all(f"rank {r} (host" in message for r in range(len(results))), message
            assert all(word in message for word in words), message
    for kind, (_, word) in REFUSED.items():
        for rank, found in enumerate(results):
            for name, message in found[f"refused: {kind}"]:
                assert word in message, message
                assert name == ("ValueError" if rank == 1 else "MismatchError"), message
                assert rank == 1 or "refused: " in message, message


# Rank 1 is the odd one: beside the leader, a leader with and without ranks beside it, and where hosts interleave.
@pytest.mark.parametrize("hosts", [(0, 0, 1), (0, 1, 1), (0, 1, 2), (0, 1, 0)], ids=str)
def test_whichever_rank_of_whichever_host_calls_differently_every_rank_is_told(
    rank_pool: Pool, hosts: tuple[int, ...]
) -> None:
    judge(rank_pool(3).run(every_kind_on, hosts, backend=None))


@pytest.mark.ranks
def test_the_same_is_told_over_a_network(network: Networks) -> None:
    judge(network(2).run_ranks(every_kind, (1, 2), env=ENV, op_timeout_s=20))


def misuse(rank: int, world_size: int, hosts: tuple[int, ...]) -> tuple[int, str]:
    with group_on(hosts):
        return run_cases(rank, world_size, "cpu", 20.0, ["misuse/*"])


@pytest.mark.parametrize("hosts", [(0, 1), (0, 0, 1, 1), (0, 1, 1, 2)], ids=str)
def test_what_verify_counts_as_misuse_raises_across_hosts(rank_pool: Pool, hosts: tuple[int, ...]) -> None:
    for passed, problem in rank_pool(len(hosts)).run(misuse, hosts, backend=None):
        assert problem == "" and passed > 30


def uneven(rank: int, world_size: int, hosts: tuple[int, ...]) -> list[tuple[str, str]]:
    """Counts that no two ranks see alike; then, on the last rank, one that does not fit what the others send."""
    with group_on(hosts):
        told = []
        for turn in range(6):
            sent = [(rank + 2 * to + turn) % 3 * 1000 for to in range(world_size)]
            expected = [(source + 2 * rank + turn) % 3 * 1000 for source in range(world_size)]
            taken = [torch.zeros(count) for count in expected]
            dist.all_to_all(taken, [torch.full((count,), float(rank)) for count in sent])
            assert all(bool((each == source).all()) for source, each in enumerate(taken))
            if rank == world_size - 1:
                taken[0] = torch.zeros(expected[0] + 1)
            given = [torch.full((count,), float(rank)) for count in sent]
            told.append(raised_by(lambda taken=taken, given=given: dist.all_to_all(taken, given)))
        group_works()
        return told


@pytest.mark.parametrize("hosts", [(0, 0, 1), (0, 1, 0), (0, 1, 2)], ids=str)
def test_counts_that_do_not_fit_are_found_before_anything_is_stored(rank_pool: Pool, hosts: tuple[int, ...]) -> None:
    results = rank_pool(3).run(uneven, hosts, backend=None)
    assert results[0] == results[1] == results[2]
    for turn, (name, message) in enumerate(results[0]):
        assert name == "MismatchError", message
        count = (4 + turn) % 3 * 1000
        assert f"sends {count} elements to" in message and f"expects {count + 1}" in message, message


def leave_after_a_mismatch(rank: int, world_size: int, hosts: tuple[int, ...], leaver: int) -> list[str]:
    """The group ends for `leaver` as soon as it has been told; the others are told the same, not that it left."""
    with group_on(hosts):
        names = []
        for _ in range(10):
            group = dist.new_group()
            dist.barrier(group)
            different = torch.ones(8 + (rank == leaver))
            names.append(raised_by(lambda tensor=different, group=group: dist.all_reduce(tensor, group=group))[0])
            dist.destroy_process_group(group)
            group = dist.new_group()  # the same, refused, where nobody waits
            refused = torch.ones(8).to(torch.float8_e4m3fn) if rank == leaver else torch.ones(8)
            names.append(raised_by(lambda tensor=refused, group=group: dist.all_reduce(tensor, group=group))[0])
            dist.destroy_process_group(group)
        return names


@pytest.mark.parametrize("leaver", [0, 1, 2, 3])
def test_a_rank_may_leave_right_after_a_mismatch(rank_pool: Pool, leaver: int) -> None:
    for hosts in ((0, 0, 1, 1), (0, 1, 2, 2)):
        for rank, names in enumerate(rank_pool(4).run(leave_after_a_mismatch, hosts, leaver, backend=None)):
            assert names == ["MismatchError", "ValueError" if rank == leaver else "MismatchError"] * 10, hosts
