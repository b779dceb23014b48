"""The device hx, step by step. 8: ranks, each with a chip, collect and send tensors where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hxcomm

Pool = Callable[[int], Any]
RANKS = 3
# Whole numbers: sums are exact in whatever order.
X = torch.arange(5.0 * 12).reshape(5, 12) % 7
UP, DOWN = torch.arange(12.0 * 24).reshape(24, 12) % 5 - 2, torch.arange(24.0 * 12).reshape(12, 24) % 3 - 1


def collect(rank: int, world_size: int) -> dict[str, Any]:
    torch.hx.set_device(rank)  # this rank's chip: what `hx` means from here on
    own = torch.full((4,), float(rank + 1), device="hx")
    total, everyones = own.clone(), torch.empty(world_size, 4, device="hx")
    dist.all_reduce(total)
    dist.all_gather_into_tensor(everyones, own)
    root = own.clone()
    dist.broadcast(root, src=2)
    return {
        "device": str(total.device),
        "total": total.tolist(),
        "everyones": everyones.tolist(),
        "root": root.tolist(),
        "memory": {row["memory"] for row in hxcomm.statistics()},
    }


def test_collectives_read_and_write_the_tensors_of_the_chips_without_staging(rank_pool: Pool) -> None:
    for rank, found in enumerate(rank_pool(RANKS).run(collect)):
        assert found == {
            "device": f"hx:{rank}",
            "total": [6.0] * 4,
            "everyones": [[1.0] * 4, [2.0] * 4, [3.0] * 4],
            "root": [3.0] * 4,
            "memory": {"mapped"},
        }


def tensor_parallel(rank: int, world_size: int) -> tuple[Tensor, int]:
    copies = torch.hx.output_copies()
    up, down = UP.chunk(world_size)[rank].hx(), DOWN.chunk(world_size, dim=1)[rank].hx()  # by column, then by row
    y = (X.hx() @ up.t()).relu() @ down.t()
    work = dist.all_reduce(y, async_op=True)
    assert work is not None
    work.wait()
    return y.cpu(), torch.hx.output_copies() - copies


def test_a_layer_that_is_split_over_the_ranks_is_the_whole_one(rank_pool: Pool) -> None:
    for y, copies in rank_pool(RANKS).run(tensor_parallel):
        assert y.equal((X @ UP.t()).relu() @ DOWN.t())
        assert copies == 0


def pass_on(rank: int, world_size: int) -> list[float]:
    """Each sends to the next one around the ring."""
    received = torch.zeros(3, device="hx")
    sent = torch.full((3,), float(rank), device="hx")
    for work in dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, (rank + 1) % world_size),
            dist.P2POp(dist.irecv, received, (rank - 1) % world_size),
        ]
    ):
        work.wait()
    return list(received.tolist())


def test_tensors_are_sent_from_chip_to_chip(rank_pool: Pool) -> None:
    assert rank_pool(RANKS).run(pass_on) == [[2.0] * 3, [0.0] * 3, [1.0] * 3]


def disagree(rank: int, world_size: int) -> list[float]:
    with pytest.raises(hxcomm.MismatchError, match="hx"):
        dist.all_reduce(torch.ones(4, device="cpu" if rank == 1 else "hx"))
    x = torch.ones(4, device="hx")
    dist.all_reduce(x)
    return list(x.tolist())


def test_a_rank_that_calls_with_a_cpu_tensor_is_named_before_a_byte_moves(rank_pool: Pool) -> None:
    assert rank_pool(RANKS).run(disagree) == [[3.0] * 4] * RANKS
