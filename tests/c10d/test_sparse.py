"""all_reduce of sparse tensors (COO), against the sum of the dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch_arrays import TORCH

Pool = Callable[[int], Any]


def sparse(rank: int, dtype: torch.dtype, n: int) -> torch.Tensor:
    """rank + 1 elements, one place common to all, one given twice; of size [n + 1, 4, 2], the last dimension dense."""
    rows = torch.tensor([[0, *range(rank), rank], [3, *range(rank), 1]])[:, : rank + 2]
    rows = torch.cat([rows, rows[:, :1]], 1)
    values = (torch.arange(2 * rows.shape[1]).reshape(-1, 2) % 3 + 1).to(dtype)
    return torch.sparse_coo_tensor(rows, values, (n + 1, 4, 2), check_invariants=True)


def sparse_sums(rank: int, n: int) -> None:
    group = dist.distributed_c10d._get_default_group()
    for dtype in TORCH.values():
        dense = sum(sparse(r, torch.complex128 if dtype.is_complex else torch.float64, n).to_dense() for r in range(n))
        for async_op in (False, True):
            tensor = sparse(rank, dtype, n)
            options = dist.AllreduceOptions()
            options.asyncOp = async_op
            work = group.allreduce([tensor], options)
            assert work.wait() and work.result()[0].is_coalesced()
            assert tensor.is_coalesced() and tensor.dtype == dtype
            expected = (dense != 0) if dtype == torch.bool else dense.to(dtype)
            assert torch.equal(tensor.to_dense(), expected), f"{dtype}, async {async_op}"
    empty = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0), (5,), check_invariants=True)
    if rank == n - 1:
        empty = torch.sparse_coo_tensor([[2]], [7.0], (5,), check_invariants=True)
    dist.all_reduce(empty)
    assert empty.to_dense().tolist() == [0, 0, 7, 0, 0]
    # 16-bit values are added in float32: 256 + 1 + 1 would stay at 256.
    place = torch.sparse_coo_tensor([[1]], torch.tensor([256.0 if rank == 0 else 1.0]).bfloat16(), (2,))
    dist.all_reduce(place)
    assert place.to_dense()[1].item() == float(torch.tensor(255.0 + n).bfloat16())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sparse_tensors_are_summed_whatever_each_rank_has(rank_pool: Pool, world_size: int) -> None:
    rank_pool(world_size).run(sparse_sums)


def sparse_mistakes(rank: int, n: int) -> list[tuple[str, str]]:
    found = []
    size = (4 + rank,)
    calls = [
        lambda: dist.all_reduce(torch.sparse_coo_tensor([[1]], [1.0], size)),
        lambda: dist.all_reduce(torch.sparse_coo_tensor([[1]], [1.0], (4,)), dist.ReduceOp.MAX),
        lambda: dist.all_reduce(torch.sparse_coo_tensor([[1]], [1.0], (4,)) if rank else torch.ones(4)),
        lambda: dist.broadcast(torch.sparse_coo_tensor([[1]], [1.0], (4,)), 0),
    ]
    for call in calls:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found.append((type(error).__name__, str(error)))
        dist.barrier()
    return found


def test_sparse_tensors_that_differ_raise_on_every_rank(rank_pool: Pool) -> None:
    for found in rank_pool(2).run(sparse_mistakes):
        assert [name for name, _ in found[:3]] == ["MismatchError", "ValueError", "MismatchError"]
        assert "rank 0 has Float of [4]" in found[0][1] and "rank 1 has Float of [5]" in found[0][1]
        assert "only be summed" in found[1][1]
        assert len(found) == 4
