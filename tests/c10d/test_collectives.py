"""Every collective of torch.distributed on CPU tensors, against exact references, on warm ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import exact
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from exact import Array
from torch_arrays import TORCH, from_torch, reduce_op_of, to_torch

WORLD_SIZES = (1, 2, 3, 4)
COUNTS = (0, 1, 33, 1021)
LONG = 150_001  # several staging windows of the default size in every dtype

Pool = Callable[[int], Any]


def same(tensor: torch.Tensor, expected: Array, what: str) -> None:
    np.testing.assert_array_equal(from_torch(tensor).reshape(-1), expected, err_msg=what)


def cells(op: str) -> list[tuple[str, str, int]]:
    """(dtype, reduce op, count): every dtype and reduce op at odd counts, one long call for each dtype."""
    reduce_ops = exact.REDUCE_OPS if op in ("all_reduce", "reduce", "reduce_scatter") else ("sum",)
    return [
        (dtype, reduce_op, count)
        for dtype in exact.DTYPES
        for reduce_op in reduce_ops
        if exact.supported(dtype, reduce_op)
        if op != "all_reduce" or dtype not in exact.COMPLEX or reduce_op != "product"  # torch refuses it by itself
        for count in (*COUNTS, *((LONG,) if reduce_op == "sum" else ()))
    ]


def run_one(op: str, dtype: str, reduce_op: str, count: int, root: int, form: str, async_op: bool) -> None:
    """One call through one of torch's forms; asserts outputs, and inputs where they are not outputs."""
    rank, n = dist.get_rank(), dist.get_world_size()
    given = [to_torch(block, dtype) for block in exact.inputs(op, dtype, reduce_op, rank, n, root, count)]
    expected = exact.outputs(op, dtype, reduce_op, rank, n, root, count)
    what = f"{op} ({form}) {dtype} {reduce_op}, {count} elements, root {root}, rank {rank} of {n}"
    before = [from_torch(tensor).copy() for tensor in given]
    taken = [torch.zeros(count, dtype=TORCH[dtype]) for _ in expected or []]
    kind = reduce_op_of(reduce_op, rank)
    match op, form:
        case "all_reduce", _:
            work, taken = dist.all_reduce(given[0], kind, async_op=async_op), given
        case "broadcast", _:
            work, taken = dist.broadcast(given[0], root, async_op=async_op), given
        case "reduce", _:
            work = dist.reduce(given[0], root, kind, async_op=async_op)
            taken = given if rank == root else []
        case "all_gather", "list":
            work = dist.all_gather(taken, given[0], async_op=async_op)
        case "all_gather", _:
            whole = torch.zeros(n * count, dtype=TORCH[dtype])
            work = dist.all_gather_into_tensor(whole, given[0], async_op=async_op)
            taken = list(whole.chunk(n)) if count else []
        case "reduce_scatter", "list":
            work = dist.reduce_scatter(taken[0], given, kind, async_op=async_op)
        case "reduce_scatter", _:
            work = dist.reduce_scatter_tensor(taken[0], torch.cat(given), kind, async_op=async_op)
        case "gather", _:
            work = dist.gather(given[0], taken if rank == root else None, root, async_op=async_op)
        case "scatter", _:
            work = dist.scatter(taken[0], given if rank == root else None, root, async_op=async_op)
        case _:
            whole, joined = torch.zeros(n * count, dtype=TORCH[dtype]), torch.cat(given)
            work = dist.all_to_all_single(whole, joined, async_op=async_op)
            taken = list(whole.chunk(n)) if count else []
    if async_op:
        work.wait()
    for tensor, block in zip(taken, expected or [], strict=count > 0 and expected is not None):
        same(tensor, block, what)
    if taken is not given:
        for tensor, block in zip(given, before, strict=True):
            same(tensor, block, what + ": the input changed")


FORMS = [
    ("all_reduce", "tensor"),
    ("broadcast", "tensor"),
    ("reduce", "tensor"),
    ("all_gather", "list"),
    ("all_gather", "tensor"),
    ("reduce_scatter", "list"),
    ("reduce_scatter", "tensor"),
    ("gather", "list"),
    ("scatter", "list"),
    ("all_to_all", "single"),
]


def sweep(rank: int, world_size: int, op: str, form: str) -> int:
    calls = 0
    for root in range(world_size) if op in ("broadcast", "reduce", "gather", "scatter") else (-1,):
        for dtype, reduce_op, count in cells(op):
            run_one(op, dtype, reduce_op, count, root, form, async_op=calls % 2 == 1)
            calls += 1
    return calls


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("op", "form"), FORMS)
def test_every_form_gives_the_exact_result(rank_pool: Pool, op: str, form: str, world_size: int) -> None:
    assert all(rank_pool(world_size).run(sweep, op, form))


# --- all_to_all_single with splits ---


def uneven(rank: int, world_size: int) -> None:
    def rows(source: int, target: int) -> int:
        return (source * 3 + target) % 4 if (source + target) % 3 else 0

    sent = [rows(rank, other) for other in range(world_size)]
    got = [rows(other, rank) for other in range(world_size)]
    for dtype in TORCH.values():
        for columns in ((), (1,), (5,), (1000, 3)):
            given = torch.empty(sum(sent), *columns).fill_(0).to(dtype)
            at = 0
            for target, count in enumerate(sent):
                given[at : at + count] = rank * 4 + target + 1
                at += count
            taken = torch.zeros(sum(got), *columns, dtype=dtype)
            dist.all_to_all_single(taken, given, got, sent)
            at = 0
            for source, count in enumerate(got):
                assert (taken[at : at + count] == torch.tensor(source * 4 + rank + 1).to(dtype)).all()
                at += count


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_uneven_all_to_all_moves_each_pair_its_rows(rank_pool: Pool, world_size: int) -> None:
    rank_pool(world_size).run(uneven)


def splits_on_one_rank_only(rank: int, world_size: int) -> list[float]:
    taken, given = torch.zeros(world_size), torch.arange(world_size) + 10.0 * rank
    equal = [1] * world_size
    dist.all_to_all_single(taken, given, *((equal, equal) if rank == 0 else (None, None)))
    return taken.tolist()


def test_equal_splits_may_be_written_out_on_some_ranks(rank_pool: Pool) -> None:
    assert rank_pool(3).run(splits_on_one_rank_only) == [[0, 10, 20], [1, 11, 21], [2, 12, 22]]


# --- functional, coalesced, object collectives, barrier ---


def functional_forms(rank: int, world_size: int) -> None:
    world = dist.group.WORLD
    mine = torch.full((2, 3), float(rank))
    gathered = functional.all_gather_tensor(mine, 0, world)
    assert torch.equal(gathered.wait() if hasattr(gathered, "wait") else gathered, expected_rows(world_size))
    both = functional.all_gather_into_tensor_coalesced([mine, mine.to(torch.int64)], world)
    for tensor in both:
        assert torch.equal(torch.as_tensor(tensor + 0).float(), expected_rows(world_size))
    assert torch.equal(functional.all_reduce(mine, "sum", world) + 0, torch.full((2, 3), float(sum(range(world_size)))))
    parts = functional.reduce_scatter_tensor(torch.ones(2 * world_size, 3), "sum", 0, world)
    assert torch.equal(parts + 0, torch.full((2, 3), float(world_size)))
    many = functional.reduce_scatter_tensor_coalesced(
        [torch.ones(world_size, 1), torch.ones(world_size, 4)], "sum", [0, 0], world
    )
    assert all(bool((part + 0 == world_size).all()) for part in many)
    root = functional.broadcast(mine, world_size - 1, world)
    assert torch.equal(root + 0, torch.full((2, 3), world_size - 1.0))
    swapped = functional.all_to_all_single(torch.arange(world_size) + 10 * rank, None, None, world)
    assert (swapped + 0).tolist() == [10 * other + rank for other in range(world_size)]


def expected_rows(world_size: int) -> torch.Tensor:
    return torch.arange(world_size, dtype=torch.float32).repeat_interleave(2)[:, None].expand(-1, 3)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_functional_collectives_give_the_exact_result(rank_pool: Pool, world_size: int) -> None:
    rank_pool(world_size).run(functional_forms)


def objects(rank: int, world_size: int) -> None:
    mine = {"rank": rank, "text": "x" * (1 + 1000 * rank)}
    every: list[Any] = [None] * world_size
    dist.all_gather_object(every, mine)
    assert [each["rank"] for each in every] == list(range(world_size))
    assert [len(each["text"]) for each in every] == [1 + 1000 * r for r in range(world_size)]
    last = world_size - 1
    listed = [mine, rank] if rank == last else [None, None]
    dist.broadcast_object_list(listed, last)
    assert listed[0]["rank"] == last and listed[1] == last
    into = [None] * world_size if rank == last else None
    dist.gather_object(mine, into, last)
    assert into is None or [each["rank"] for each in into] == list(range(world_size))
    got: list[Any] = [None]
    dist.scatter_object_list(got, [f"for {r}" for r in range(world_size)] if rank == last else None, last)
    assert got == [f"for {rank}"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_object_collectives_carry_objects_of_different_sizes(rank_pool: Pool, world_size: int) -> None:
    rank_pool(world_size).run(objects)


def stragglers(rank: int, world_size: int) -> list[str]:
    """Each rank in turn stores a key and enters the barrier; whoever comes out must find all keys."""
    store = dist.distributed_c10d._get_default_store()
    missing = []
    for turn in range(20):
        store.set(f"{turn}/{rank}", "here")
        dist.barrier()
        missing += [f"{turn}/{r}" for r in range(world_size) if not store.check([f"{turn}/{r}"])]
    return missing


def test_nobody_leaves_a_barrier_before_all_have_entered(rank_pool: Pool) -> None:
    assert rank_pool(4).run(stragglers) == [[], [], [], []]
