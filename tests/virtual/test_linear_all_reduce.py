"""torch.ops.hxcomm.linear_all_reduce: the unfused result, whatever the chunks, and less communication that shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chip_file import write_chip
from ranks import RankPool

Run = Callable[..., list[Any]]


def fused_and_not(rank: int, world_size: int, device: str, dtype: torch.dtype) -> list[bool]:
    """Small whole numbers, so that every order of additions gives the same bits."""
    generator = torch.Generator().manual_seed(rank)
    equal = []
    for rows, columns in (((), 7), ((1,), 576), ((2, 3), 65)):
        x = torch.randint(-3, 4, (*rows, 32), generator=generator).to(dtype).to(device)
        weight = torch.randint(-2, 3, (columns, 32), generator=generator).to(dtype).to(device)
        expected = torch.nn.functional.linear(x, weight)
        dist.all_reduce(expected)
        for chunks in (1, 2, 5, columns, 1000):
            result = torch.ops.hxcomm.linear_all_reduce(x, weight, chunks)
            equal.append(torch.equal(result.cpu(), expected.cpu()) and result.shape == expected.shape)
    named = torch.ops.hxcomm.linear_all_reduce(x, weight, 2, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    return [*equal, torch.equal(named.cpu(), expected.cpu())]


@pytest.mark.parametrize("device", ["cpu", "hx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing_of_the_result(
    rank_pool: Callable[[int], RankPool], device: str, dtype: torch.dtype
) -> None:
    for found in rank_pool(3).run(fused_and_not, device, dtype):
        assert found == [True] * len(found)


def test_one_process_without_a_group_gets_the_product() -> None:
    x, weight = torch.randn(2, 8), torch.randn(5, 8)
    assert torch.equal(torch.ops.hxcomm.linear_all_reduce(x, weight, 3), torch.nn.functional.linear(x, weight))


def test_meta_tensors_give_the_shape() -> None:
    x, weight = torch.empty(2, 3, 8, device="meta"), torch.empty(5, 8, device="meta")
    assert torch.ops.hxcomm.linear_all_reduce(x, weight, 2).shape == (2, 3, 5)


@pytest.mark.parametrize(
    ("x", "weight", "chunks", "said"),
    [((2, 8), (5, 8), 0, "0 chunks"), ((2, 8), (5, 7), 1, r"\[5, 7\]"), ((2, 8), (8,), 1, r"\[8\]")],
)
def test_wrong_shapes_and_numbers_are_named(x: tuple[int], weight: tuple[int], chunks: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        torch.ops.hxcomm.linear_all_reduce(torch.empty(x), torch.empty(weight), chunks)


def test_gradients_are_refused() -> None:
    weight = torch.empty(5, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        torch.ops.hxcomm.linear_all_reduce(torch.empty(2, 8), weight, 1)
    with torch.no_grad():
        torch.ops.hxcomm.linear_all_reduce(torch.empty(2, 8), weight, 1)


def exposed_by_chunks(rank: int, world_size: int) -> dict[int, tuple[int, int]]:
    from hxcomm import virtual

    x, weight = torch.ones(1, 4096, device="hx"), torch.ones(4096, 4096, device="hx")
    found = {}
    for chunks in (1, 4):
        before = virtual.report()
        torch.ops.hxcomm.linear_all_reduce(x, weight, chunks)
        parts = (virtual.report() - before).parts
        found[chunks] = (parts.exposed, parts.hidden)
    return found


def test_chunks_hide_communication_behind_the_product(run_ranks: Run, tmp_path: Path) -> None:
    chip = write_chip(tmp_path, "round")
    for found in run_ranks(exposed_by_chunks, 2, env={"HXCOMM_SIM": chip}):
        (whole, nothing), (tail, hidden) = found[1], found[4]
        assert nothing == 0
        assert hidden > 0
        assert tail < whole / 2
