"""Calls that differ or are refused, and deadlines: every rank is told, and what goes on goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hxcomm import select

Pool = Callable[[int], Any]


def group_works() -> None:
    tensor = torch.full((33,), dist.get_rank() + 1.0)
    dist.all_reduce(tensor)
    assert tensor[0] == sum(range(dist.get_world_size() + 1))


def raised_by(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def algorithm_by_rank(*_: object) -> str:
    return "ring" if dist.get_rank() == 1 else "two_shot"


# What rank 1 calls, what the others call, and what of each must be in the table.
MISMATCHES: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[str, str]]] = {
    "op": (dist.barrier, lambda: dist.all_reduce(torch.ones(8)), ("barrier", "all_reduce")),
    "dtype": (
        lambda: dist.all_reduce(torch.ones(8, dtype=torch.float64)),
        lambda: dist.all_reduce(torch.ones(8)),
        ("float64", "float32"),
    ),
    "numel": (
        lambda: dist.all_reduce(torch.ones(1234)),
        lambda: dist.all_reduce(torch.ones(4321)),
        ("1234", "4321"),
    ),
    "reduce op": (
        lambda: dist.all_reduce(torch.ones(8), dist.ReduceOp.MAX),
        lambda: dist.all_reduce(torch.ones(8)),
        ("max", "sum"),
    ),
    "avg is not sum": (
        lambda: dist.all_reduce(torch.ones(8), dist.ReduceOp.AVG),
        lambda: dist.all_reduce(torch.ones(8)),
        ("avg", "sum"),
    ),
    "root": (lambda: dist.broadcast(torch.ones(8), 1), lambda: dist.broadcast(torch.ones(8), 2), ("| 1 ", "| 2 ")),
    "algorithm": (
        lambda: dist.all_reduce(torch.ones(777)),
        lambda: dist.all_reduce(torch.ones(777)),
        ("ring", "two_shot"),
    ),
}


def mismatched(rank: int, world_size: int, kind: str) -> list[tuple[str, str]]:
    theirs, ours, _ = MISMATCHES[kind]
    errors = []
    if kind == "algorithm":
        select.register_selector(algorithm_by_rank)
    try:
        for _ in range(3):  # every parity of the sequence
            errors.append(raised_by(theirs if rank == 1 else ours))
    finally:
        if kind == "algorithm":
            select._selectors.remove(algorithm_by_rank)
    group_works()
    return errors


@pytest.mark.parametrize("kind", MISMATCHES)
def test_each_kind_of_mismatch_raises_on_every_rank_and_the_group_goes_on(rank_pool: Pool, kind: str) -> None:
    results = rank_pool(3).run(mismatched, kind)
    assert results[0] == results[1] == results[2], "every rank shows the same table"
    for name, message in results[0]:
        assert name == "MismatchError", message
        assert all(f"rank {r} (host" in message for r in range(3)), message
        assert all(word in message for word in MISMATCHES[kind][2]), message


def mismatched_through_async(rank: int, world_size: int) -> list[str]:
    names = []
    work = dist.all_reduce(torch.ones(8 + rank), async_op=True)
    names.append(raised_by(work.wait)[0])
    names.append(raised_by(work.wait)[0])  # and again, whenever asked
    work = dist.all_reduce(torch.ones(8 + rank), async_op=True)
    names.append(raised_by(lambda: work.get_future().wait())[0])
    assert work.is_completed() and not work.is_success() and work.exception() is not None
    group_works()
    return names


def test_errors_keep_their_class_through_work_and_future(rank_pool: Pool) -> None:
    assert rank_pool(2).run(mismatched_through_async) == [["MismatchError"] * 3] * 2


def shapes(rank: int, world_size: int) -> tuple[str, str]:
    return raised_by(lambda: dist.all_reduce(torch.ones((2, 6) if rank else (3, 4))))


def test_equal_counts_of_different_shape_are_legal_unless_checked(rank_pool: Pool) -> None:
    assert rank_pool(2).run(shapes) == [("", "nothing was raised")] * 2
    for name, message in rank_pool(2).run(shapes, env={"HXCOMM_CHECK": "shape"}):
        assert name == "MismatchError" and "[2, 6]" in message and "[3, 4]" in message


# --- refused calls ---

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype": (lambda: dist.all_reduce(torch.ones(8).to(torch.float8_e4m3fn)), "dtype Float8_e4m3fn is not supported"),
    "average of bool": (lambda: dist.all_reduce(torch.ones(8, dtype=torch.bool), dist.ReduceOp.AVG), "bool"),
    "reduce op": (lambda: dist.all_reduce(torch.ones(8), dist.ReduceOp.BXOR), "BXOR of float32 has no meaning"),
    "sparse": (lambda: dist.all_reduce(torch.eye(4).to_sparse(), dist.ReduceOp.MAX), "can only be summed"),
    "unequal list": (lambda: dist.all_gather([torch.ones(8), torch.ones(9), torch.ones(8)], torch.ones(8)), "9"),
    "indivisible": (lambda: dist.reduce_scatter_tensor(torch.ones(8), torch.ones(25)), "25"),
    "splits": (lambda: dist.all_to_all_single(torch.ones(6), torch.ones(6), [1, 2, 3], [1, 2, 4]), "add up to 7"),
}


def refused_on_rank_1(rank: int, world_size: int, kind: str) -> list[tuple[str, str]]:
    errors = []
    good = torch.ones(8)
    for calls in (1, 2, 1, 3):  # alone, two and three in a row, each followed at once by a good call
        for _ in range(calls):
            errors.append(raised_by(REFUSED[kind][0] if rank == 1 else lambda: dist.all_reduce(good)))
        group_works()
    assert good.tolist() == [1.0] * 8, "a refused call wrote to a tensor"
    return errors


@pytest.mark.parametrize("kind", REFUSED)
def test_a_call_refused_on_one_rank_reaches_the_others(rank_pool: Pool, kind: str) -> None:
    results = rank_pool(3).run(refused_on_rank_1, kind)
    for name, message in results[1]:
        assert name == "ValueError" and REFUSED[kind][1] in message, message
    for rank in (0, 2):
        for name, message in results[rank]:
            assert name == "MismatchError" and "refused: " in message and REFUSED[kind][1] in message, message


# --- deadlines ---


def master_store() -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def late_rank(rank: int, world_size: int, how: str) -> list[tuple[str, str]]:
    """Rank 1 does not call; rank 0's timeout ends the group on both, and both make a new one."""
    store = master_store()
    if rank == 0:
        if how == "op":
            error = raised_by(lambda: dist.all_reduce(torch.ones(8)))
        else:
            work = dist.all_reduce(torch.ones(8), async_op=True)
            error = raised_by(lambda: work.wait(timedelta(milliseconds=200)))
        store.set("timed out", "")
    else:
        store.wait(["timed out"])
        error = raised_by(lambda: dist.all_reduce(torch.ones(8)))
    again = raised_by(lambda: dist.all_reduce(torch.ones(8)))
    dist.destroy_process_group()
    dist.init_process_group("hxcomm", store=dist.PrefixStore("again", store), rank=rank, world_size=world_size)
    group_works()
    return [error, again]


@pytest.mark.parametrize(("how", "op_timeout_s"), [("op", 1.0), ("wait", 600.0)])
def test_a_timeout_names_the_missing_rank_and_ends_the_group_only(
    rank_pool: Pool, how: str, op_timeout_s: float
) -> None:
    results = rank_pool(2).run(late_rank, how, op_timeout_s=op_timeout_s)
    for errors in results:
        assert [name for name, _ in errors] == ["CommTimeoutError"] * 2, errors
    if how == "op":
        assert "waiting for rank 1 (host" in results[0][0][1] and "has not called it" in results[0][0][1]
