"""Several operations as one to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import RankPool

Pool = Callable[[int], RankPool]


def communicator(device: str = "cpu") -> Any:
    from hxcomm.torchcomms import new_comm

    return new_comm("hxcomm", device, "coalescing", abort_process_on_timeout_or_error=False)


def blocks(rank: int, world_size: int, device: str) -> None:
    from hxcomm.torchcomms import ReduceOp, TorchWork
    from hxcomm.torchcomms.coalescing import coalesce

    comm = communicator(device)
    total = world_size * (world_size + 1) / 2
    many = [torch.full((100 * each + 1,), float(rank + 1), device=device) for each in range(10)]
    gathered, own = torch.empty(2 * world_size, device=device), torch.full((2,), float(rank), device=device)
    scattered = torch.empty(3, device=device)
    with coalesce(comm) as block:
        for each in many:
            comm.all_reduce(each, ReduceOp.SUM, async_op=True)
        comm.all_gather_single(gathered, own, async_op=True)
        comm.reduce_scatter_single(scattered, torch.ones(3 * world_size, device=device), ReduceOp.SUM, async_op=True)
    assert isinstance(block.work, TorchWork)
    block.wait()
    assert all(each.eq(total).all() for each in many)
    assert gathered.tolist() == [float(each) for each in range(world_size) for _ in range(2)]
    assert scattered.tolist() == [float(world_size)] * 3
    with pytest.raises(RuntimeError, match="each block can be waited for once"):
        block.wait()
    with coalesce(comm) as block:
        comm.all_reduce(own, ReduceOp.MAX, async_op=False)
        assert own.tolist() == [world_size - 1.0] * 2  # a blocking call ends in the block
    block.wait()
    comm.finalize()


@pytest.mark.parametrize("device", ["cpu", "hx"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_block_of_operations_has_one_handle(rank_pool: Pool, world_size: int, device: str) -> None:
    rank_pool(world_size).run(blocks, device, backend=None)


def wrong_uses(rank: int, world_size: int) -> None:
    from hxcomm.torchcomms import ReduceOp
    from hxcomm.torchcomms.coalescing import coalesce

    comm = communicator()
    with coalesce(comm) as block:
        pass
    assert block.work is None
    block.wait()
    with pytest.raises(RuntimeError, match="is not coalescing"):
        comm.end_coalescing()
    with coalesce(comm), pytest.raises(RuntimeError, match="is coalescing already"):
        comm.start_coalescing()
    ones = torch.ones(2)
    with pytest.raises(KeyError), coalesce(comm):
        comm.all_reduce(ones, ReduceOp.SUM, async_op=True)
        raise KeyError
    twos = torch.full((2,), 2.0)
    with coalesce(comm) as block:  # the last one has ended, in spite of the error
        comm.all_reduce(twos, ReduceOp.SUM, async_op=True)
    block.wait()
    assert (ones.tolist(), twos.tolist()) == ([2.0, 2.0], [4.0, 4.0])
    comm.finalize()


def test_blocks_are_not_nested_and_end_with_an_error_inside(rank_pool: Pool) -> None:
    rank_pool(2).run(wrong_uses, backend=None)
