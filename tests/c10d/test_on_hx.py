"""backend="hxcomm" on tensors of device hx: nothing is staged, device-bound groups, split_group, a nameless group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hxcomm
from hxcomm import algorithms
from hxcomm.schedule import lower, ring_hop_bytes

Pool = Callable[[int], Any]
Run = Callable[..., list[Any]]
COUNT = 3000


def every_collective(rank: int, world_size: int) -> list[Any]:
    n, hx = world_size, "hx"
    one, many = torch.ones(COUNT, device=hx), torch.ones(n * COUNT, device=hx)
    each = [torch.ones(COUNT, device=hx) for _ in range(n)]
    dist.all_reduce(one)
    dist.all_reduce(torch.ones(10, device=hx))
    dist.broadcast(one, 1)
    dist.reduce(one, 1)
    dist.all_gather(each, one)
    dist.all_gather_into_tensor(many, one)
    dist.reduce_scatter_tensor(one, many)
    dist.reduce_scatter(one, each)
    dist.gather(one, each if rank == 1 else None, 1)
    dist.scatter(one, each if rank == 1 else None, 1)
    dist.all_to_all_single(torch.empty_like(many), many)
    dist.all_reduce(one, op=dist._make_nccl_premul_sum(2.0))
    dist.all_reduce(torch.ones(COUNT))
    return [dict(row) for row in hxcomm.statistics() if row["dtype"] == "float32"]


def test_no_collective_on_hx_is_staged_but_premul_sum(rank_pool: Pool) -> None:
    n = 3
    for rows in rank_pool(n).run(every_collective):
        calls = {row["op"]: row["calls"] for row in rows if row["memory"] == "mapped"}
        assert calls == {
            **dict.fromkeys(["broadcast", "reduce", "gather", "scatter", "all_to_all"], 1),
            **dict.fromkeys(["all_gather", "reduce_scatter"], 2),
            "all_reduce": 2,  # a short and a long one, of one algorithm
        }
        staged = [row for row in rows if row["memory"] == "staged"]
        assert [(row["op"], row["calls"]) for row in staged] == [("all_reduce", 2)]  # of PREMUL_SUM, and on the CPU


def hops(rank: int, world_size: int) -> list[tuple[str, list[int]]]:
    dist.all_reduce(torch.ones(COUNT, device="hx"))
    dist.all_reduce(torch.ones(COUNT))
    return [(row["memory"], row["hop_bytes"]) for row in hxcomm.statistics()]


def test_hop_bytes_are_those_of_the_form_that_ran(rank_pool: Pool) -> None:
    expected = {
        memory: ring_hop_bytes(
            lower(algorithms.build("all_reduce", "two_shot", 3, None), private=memory == "staged"), COUNT, 4
        )
        for memory in ("mapped", "staged")
    }
    for found in rank_pool(3).run(hops):
        assert dict(found) == expected


def sums(group: Any, rank: int) -> list[float]:
    results = []
    for device in ("hx", "cpu"):
        tensor = torch.full((COUNT,), float(rank + 1), device=device)
        dist.all_reduce(tensor, group=group)
        results.append(tensor[-1].item())
    return results


def split(rank: int, world_size: int) -> dict[str, Any]:
    options = hxcomm.Options(algorithms={"all_reduce": "ring"})
    dist.init_process_group("hxcomm", device_id=torch.device("hx", rank), pg_options=options)
    torch.hx.set_device(rank)
    found: dict[str, Any] = {"all": sums(None, rank)}
    pairs = dist.split_group(split_ranks=[[0, 2], [1, 3]])
    assert pairs is not None
    found["pair"] = dist.get_rank(pairs), dist.get_world_size(pairs), sums(pairs, rank)
    some = dist.split_group(split_ranks=[[1, 2, 3]], pg_options=hxcomm.Options(algorithms={"all_reduce": "two_shot"}))
    found["some"] = None if some is None else sums(some, rank)
    again = dist.split_group(parent_pg=pairs, split_ranks=[[1]])
    found["again"] = None if again is None else sums(again, rank)
    group = dist.new_group([0, 3])  # torch asks those who are not in it, too, where a group is bound to a device
    found["new"] = sums(group, rank) if rank in (0, 3) else None
    found["algorithms"] = {row["algorithm"] for row in hxcomm.statistics() if row["op"] == "all_reduce"}
    dist.destroy_process_group()
    return found


def test_split_group_makes_groups_of_its_members_and_none_elsewhere(rank_pool: Pool) -> None:
    results = rank_pool(4).run(split, backend=None)
    for rank, found in enumerate(results):
        assert found["all"] == [10.0, 10.0]
        assert found["pair"] == (rank // 2, 2, [4.0, 4.0] if rank % 2 == 0 else [6.0, 6.0])
        assert found["some"] == (None if rank == 0 else [9.0, 9.0])
        assert found["again"] == ([rank + 1.0] * 2 if rank >= 2 else None)
        assert found["new"] == ([5.0, 5.0] if rank in (0, 3) else None)
        # A split group has its parent's options, unless it is given its own.
        assert found["algorithms"] == {"ring", "two_shot"}


def bound_and_untouched(rank: int, world_size: int, bound: bool) -> list[Any]:
    dist.init_process_group("hxcomm", device_id=torch.device("hx", rank) if bound else None)
    dist.barrier()
    objects: list[Any] = [None] * world_size
    dist.all_gather_object(objects, {"rank": rank})
    dist.destroy_process_group()
    return objects


@pytest.mark.parametrize("bound", [True, False])
def test_a_barrier_may_be_the_first_use_of_the_device(run_ranks: Run, bound: bool) -> None:
    assert run_ranks(bound_and_untouched, 2, bound, backend=None) == [[{"rank": 0}, {"rank": 1}]] * 2


def nameless(rank: int, world_size: int, bound: bool) -> list[float]:
    dist.init_process_group(device_id=torch.device("hx", rank) if bound else None)
    found = sums(None, rank) + sums(dist.new_group([0, 1]), rank)
    dist.destroy_process_group()
    return found


def test_a_group_without_a_named_backend_serves_cpu_and_hx(rank_pool: Pool) -> None:
    for bound in (False, True):
        assert rank_pool(2).run(nameless, bound, backend=None) == [[3.0] * 4] * 2


def nameless_on_several_hosts(rank: int, world_size: int) -> str:
    dist.init_process_group()
    config = dist.get_backend_config()
    dist.barrier()  # gloo's other rank may still be connecting
    dist.destroy_process_group()
    return config


def test_a_nameless_group_of_several_hosts_is_left_to_gloo(rank_pool: Pool) -> None:
    assert rank_pool(2).run(nameless_on_several_hosts, backend=None, env={"LOCAL_WORLD_SIZE": "1"}) == ["cpu:gloo"] * 2
