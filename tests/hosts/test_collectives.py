"""Every collective and message of the c10d front end across hosts: exact results in every layout, and the same bits."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import program_steps
import programs
import pytest
import torch
import torch.distributed as dist
from hosts.conformance import run_cases
from hosts.host_ids import group_on
from hosts.networks import Network

import hxcomm

Networks = Callable[..., Network]
Pool = Callable[[int], Any]
ENV = {"HXCOMM_INSECURE": "1"}


def shared_out(world_size: int, parts: int, part: int) -> programs.Program:
    """A part of all pairs of op, dtype and reduce op, in the groups of programs.groups by turns: everybody, some of
    several hosts, inside one host."""
    steps = programs.sweep(world_size).steps[part::parts]
    turned = tuple(dataclasses.replace(step, group=number % 5) for number, step in enumerate(steps))
    return programs.Program(world_size, turned)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "parts", "part"), [((1, 1), 1, 0), ((2, 2), 3, 0), ((1, 3), 3, 1), ((1, 1, 2), 3, 2)], ids=str
)
def test_every_op_gives_the_exact_result_in_every_dtype(
    network: Networks, layout: tuple[int, ...], parts: int, part: int
) -> None:
    program = shared_out(sum(layout), parts, part)
    found = network(len(layout)).run_ranks(program_steps.execute, layout, program, env=ENV, op_timeout_s=20)
    problems = [f"rank {rank}: {problem}" for rank, each in enumerate(found) for problem in each[:2]]
    assert not problems, "\n".join(problems)


ON_HX = [f"results/{name}" for name in ("large", "layout", "zero_elements", "subgroup", "all_reduce")]


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [(1, 2), (2, 1)], ids=str)
def test_tensors_of_device_hx_are_sent_as_those_of_the_cpu(network: Networks, layout: tuple[int, ...]) -> None:
    patterns = [*ON_HX, "point_to_point/*"] if layout == (1, 2) else ["results/reduce_scatter*", "semantics/*"]
    for passed, problem in network(2).run_ranks(
        run_cases, layout, "hx:0", 20.0, patterns, env=ENV, op_timeout_s=20, timeout_s=90
    ):
        assert problem == "" and passed > 40


@pytest.mark.ranks
@pytest.mark.parametrize(("layout", "device"), [((1, 2), "cpu"), ((2, 1), "hx:0")])
def test_a_communicator_keeps_its_promises_across_hosts(
    network: Networks, layout: tuple[int, ...], device: str
) -> None:
    patterns = ["results/*[[]float32*", "results/large", "results/zero_elements", "results/premul_factor"]
    patterns += ["semantics/*", "point_to_point/*", "misuse/*"]
    for passed, problem in network(2).run_ranks(
        run_cases, layout, device, 20.0, patterns, "torchcomms", env=ENV, op_timeout_s=20, timeout_s=120
    ):
        assert problem == "" and passed > 70


# --- which way a group's ranks take ---


def algorithms_of(group: Any, device: str) -> dict[str, str]:
    """Of one all_reduce of 40 KB and one broadcast in it, by op; both checked."""
    members = dist.get_process_group_ranks(group)
    before = {id_of(row): row["calls"] for row in hxcomm.statistics()}
    tensor = torch.full((10_000,), float(dist.get_rank()), device=device)
    dist.all_reduce(tensor, group=group)
    assert bool((tensor == sum(members)).all())
    dist.broadcast(tensor, group=group, group_src=len(members) - 1)
    assert bool((tensor == sum(members)).all())
    return {
        row["op"]: row["algorithm"]
        for row in hxcomm.statistics()
        if row["calls"] != before.get(id_of(row), 0) and row["op"] in ("all_reduce", "broadcast")
    }


def id_of(row: Any) -> tuple[Any, ...]:
    return row["group"], row["op"], row["algorithm"], row["dtype"], row["memory"], row["nbytes"]


MEMBERS = {
    "host 0": [0, 1],
    "host 1": [2, 3, 4],
    "one of each": [1, 3],
    "mixed": [0, 3, 4],
    "one of each again": [0, 2],
}


def in_groups(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    groups = {name: dist.new_group(members) for name, members in MEMBERS.items()}
    for device in ("cpu", "hx"):
        for name, members in MEMBERS.items():
            if rank in members:
                found[f"{name}, {device}"] = algorithms_of(groups[name], device)
    found["all"] = algorithms_of(dist.group.WORLD, "cpu")
    # Posted in another order by each rank, waited for in the order of the other one.
    pair, again = groups["one of each"], groups["one of each again"]
    tensors = [torch.full((300_001,), float(rank)), torch.full((5,), float(rank))]
    order = [(group, tensor) for group, tensor in ((pair, tensors[0]), (again, tensors[1])) if rank_in(group)]
    works = [
        dist.all_reduce(tensor, group=group, async_op=True) for group, tensor in (order if rank % 2 else order[::-1])
    ]
    for work in reversed(works):
        work.wait()
    for group, tensor in order:
        assert bool((tensor == sum(dist.get_process_group_ranks(group))).all())
    return found


def rank_in(group: Any) -> bool:
    return group is not dist.GroupMember.NON_GROUP_MEMBER


ALONE = {"all_reduce": "two_shot", "broadcast": "direct"}
EACH_ON_ITS_OWN = {"all_reduce": "one_shot", "broadcast": "direct"}
SHARED = {"all_reduce": "hierarchical", "broadcast": "hierarchical"}


@pytest.mark.ranks
def test_each_group_takes_the_way_of_its_own_layout(network: Networks) -> None:
    ways = {"host 0": ALONE, "host 1": ALONE, "mixed": SHARED, "one of each": EACH_ON_ITS_OWN}
    ways["one of each again"] = EACH_ON_ITS_OWN
    for rank, found in enumerate(network(2).run_ranks(in_groups, (2, 3), env=ENV, op_timeout_s=20)):
        assert found.pop("all") == SHARED
        assert set(found) == {
            f"{name}, {device}" for name in MEMBERS for device in ("cpu", "hx") if rank in MEMBERS[name]
        }
        for name, used in found.items():
            assert used == ways[name.split(",")[0]], name


def splits_and_windows(rank: int, world_size: int, hosts: tuple[int, ...]) -> None:
    with group_on(hosts):
        device = torch.device("hx:0")
        for members in ([[0, 2], [1, 3]], [[0, 1, 2, 3]], [[1, 2, 3]]):
            mine = [part for part in members if rank in part]
            group = dist.split_group(split_ranks=members)
            assert (group is not None) == bool(mine)
            if group is not None:
                assert algorithms_of(group, "cpu")["all_reduce"] == algorithms_of(group, "hx")["all_reduce"]
        # Several windows, the last one short, of numbers whose sums are exact; each rank's own factor.
        for count in (5_000_003, 0, 1):
            for where in ("cpu", device):
                numbers = (torch.arange(count) % 1000 + rank).to(torch.float32).to(where)
                dist.all_reduce(numbers)
                expected = (torch.arange(count) % 1000 * world_size + sum(range(world_size))).to(torch.float32)
                assert torch.equal(numbers.cpu(), expected)
                numbers = torch.full((count,), 3.0, device=where)
                dist.all_reduce(numbers, op=dist._make_nccl_premul_sum(rank + 1.0))
                assert torch.equal(numbers.cpu(), torch.full((count,), 30.0))


@pytest.mark.parametrize("hosts", [(0, 1, 0, 1), (0, 0, 0, 1)], ids=str)
def test_split_groups_large_tensors_and_factors(rank_pool: Pool, hosts: tuple[int, ...]) -> None:
    rank_pool(4).run(splits_and_windows, hosts, backend=None)


def ahead_of_the_root(rank: int, world_size: int) -> None:
    """Ranks that only send to the root of a long reduction end it, and say that they are in the next call, while the
    root has yet to hear of all that they are in this one."""
    with group_on(range(world_size)):
        for windows in (1, 2, 3, 4):
            for turn in range(12):
                numbers = torch.full((windows * 500_000,), rank + 1.0)
                root = turn % world_size
                dist.reduce(numbers, root)
                assert rank != root or bool((numbers == 10).all())
                uneven = [(source + turn) % 3 for source in range(world_size)]
                taken = torch.zeros(sum(uneven))
                dist.all_to_all_single(taken, torch.full((uneven[rank] * world_size,), 1.0), uneven, [uneven[rank]] * 4)
                assert bool((taken == 1).all())


def test_a_host_may_be_an_operation_of_many_windows_ahead_of_another(rank_pool: Pool) -> None:
    rank_pool(4).run(ahead_of_the_root, backend=None)


# --- the same bits ---

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def digests(rank: int, world_size: int) -> dict[str, list[str]]:
    """Of every reduction, of numbers of many magnitudes: another order of addition gives other bits."""
    made: dict[str, list[str]] = {}
    for order in ("layout", "none"):
        os.environ["HXCOMM_DETERMINISM"] = order
        group = dist.new_group()
        for dtype in DTYPES:
            for count in (1, 1001, 700_003):
                random = torch.Generator().manual_seed(rank)
                scale = 10.0 ** torch.randint(-3, 4, (count,), generator=random)
                numbers = (torch.randn(count, generator=random) * scale).to(dtype)
                every = numbers.clone()
                dist.all_reduce(every, group=group)
                at_root = numbers.clone()
                dist.reduce(at_root, 1, group=group)
                part = torch.empty(count, dtype=dtype)
                dist.reduce_scatter_tensor(part, numbers.repeat(world_size), group=group)
                on_hx = numbers.to("hx:0")
                dist.all_reduce(on_hx, group=group)
                results = [every, at_root if rank == 1 else every, part, on_hx.cpu()]
                made.setdefault(order, []).extend(
                    hashlib.sha256(each.view(torch.uint8).numpy().tobytes()).hexdigest() for each in results
                )
    return made


def digests_on(rank: int, world_size: int, hosts: Sequence[int]) -> dict[str, list[str]]:
    with group_on(hosts):
        return digests(rank, world_size)


@pytest.mark.ranks
def test_results_have_the_same_bits_on_every_rank_and_in_every_run_and_if_asked_in_every_layout(
    network: Networks, rank_pool: Pool
) -> None:
    layouts = [(0, 0, 0, 0), (0, 0, 1, 1), (0, 0, 1, 1), (0, 1, 1, 1), (0, 1, 0, 1), (0, 1, 2, 3), (0, 1, 1, 2)]
    runs = [rank_pool(4).run(digests_on, hosts, backend=None) for hosts in layouts]
    runs.append(network(2).run_ranks(digests, (2, 2), env=ENV))
    for run in runs:
        assert all(found == run[0] for found in run), "ranks differ"
        assert run[0]["layout"] == runs[0][0]["layout"], "layouts differ"
    assert runs[1] == runs[2] == runs[-1], "runs differ"
    # Else the numbers would not tell one order from another.
    assert runs[1][0]["none"] != runs[0][0]["none"]
