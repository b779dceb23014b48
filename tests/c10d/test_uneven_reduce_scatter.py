"""reduce_scatter of a list whose tensors differ in size: rank r gets element r of the list, reduced over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import exact
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch_arrays import from_torch, reduce_op_of, to_torch

Pool = Callable[[int], Any]


def sizes(n: int, unit: int) -> list[int]:
    """Some are 0, and the largest is not that of the last rank."""
    return [(r * 3 + 2) % 4 * unit for r in range(n)]


def parts_of(dtype: str, reduce_op: str, rank: int, counts: list[int]) -> list[torch.Tensor]:
    arrays = [exact.store(exact.numbers(dtype, reduce_op, rank, i, k), dtype) for i, k in enumerate(counts)]
    return [to_torch(each, dtype) for each in arrays]


def every_dtype_and_op(rank: int, n: int) -> None:
    for dtype in exact.DTYPES:
        if dtype in exact.COMPLEX:
            continue  # torch's function passes their parts on as floats
        for reduce_op in exact.REDUCE_OPS:
            if not exact.supported(dtype, reduce_op):
                continue
            for unit in (1, 700):
                counts = sizes(n, unit)
                output = to_torch(np.full(counts[rank], 1, exact.STORED[dtype]), dtype)
                work = dist.reduce_scatter(
                    output,
                    parts_of(dtype, reduce_op, rank, counts),
                    reduce_op_of(reduce_op, rank),
                    async_op=unit == 1,
                )
                if work is not None:
                    work.wait()
                given = [exact.numbers(dtype, reduce_op, r, rank, counts[rank]) for r in range(n)]
                expected = exact.reduced(given, dtype, reduce_op)
                np.testing.assert_array_equal(from_torch(output), expected, err_msg=f"{dtype} {reduce_op} {counts}")


VARIANTS = [
    {},
    {"HXCOMM_SEGMENT": "1KiB"},
    {"HXCOMM_ALGO": "reduce_scatter:ring"},
    {"HXCOMM_EXECUTOR": "python"},
]


@pytest.mark.parametrize("env", VARIANTS)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_each_rank_gets_its_own_part_of_an_uneven_list_reduced(
    rank_pool: Pool, world_size: int, env: dict[str, str]
) -> None:
    rank_pool(world_size).run(every_dtype_and_op, env=env)


def matrices_of_unequal_rows(rank: int, n: int) -> None:
    rows = [torch.full((r + 1, 3), float(rank + r)) for r in range(n)]
    columns = torch.zeros(3, rank + 1).t()  # not contiguous
    dist.reduce_scatter(columns, rows)
    assert torch.equal(columns, torch.full((rank + 1, 3), float(sum(range(n)) + n * rank)))


def test_unequal_rows_arrive_in_a_tensor_that_is_not_contiguous(rank_pool: Pool) -> None:
    rank_pool(3).run(matrices_of_unequal_rows)


def lists_that_differ(rank: int, n: int, counts: list[list[int]], output: list[int]) -> str:
    """The error of a call in which rank r gives parts of counts[r] elements, into an output of output[r]."""
    into = torch.full((output[rank],), 7.0)
    message = "none"
    try:
        dist.reduce_scatter(into, [torch.ones(k) for k in counts[rank]])
    except (dist.DistBackendError, ValueError) as error:
        message = f"{type(error).__name__}: {error}"
    assert (into == 7).all(), "nothing is stored"
    check = torch.ones(3)
    dist.all_reduce(check)
    assert check.tolist() == [n] * 3, "the group stays usable, and in step"
    return message


def test_an_uneven_list_on_one_rank_and_an_even_one_on_another_are_a_mismatch(rank_pool: Pool) -> None:
    messages = rank_pool(3).run(lists_that_differ, [[4, 4, 4], [4, 4, 5], [4, 4, 5]], [4, 4, 5])
    assert all(each.startswith("MismatchError") and "uneven" in each for each in messages), messages


@pytest.mark.parametrize("last", [[1, 2, 3], [3, 2, 2]])
def test_uneven_lists_that_differ_raise_on_every_rank_naming_the_part(rank_pool: Pool, last: list[int]) -> None:
    messages = rank_pool(3).run(lists_that_differ, [[1, 2, 2], [1, 2, 2], last], [1, 2, last[2]])
    part = next(i for i in range(3) if last[i] != [1, 2, 2][i])
    for each in messages:
        assert each.startswith("MismatchError") and f"input {part} has {[1, 2, 2][part]} elements on rank 0" in each
        assert f"and {last[part]} on rank 2" in each


def test_an_output_that_is_not_as_long_as_the_own_part_is_refused(rank_pool: Pool) -> None:
    own, *others = rank_pool(3).run(lists_that_differ, [[1, 2, 3]] * 3, [2, 2, 3])
    assert own.startswith("ValueError") and "an output of 2 elements, but input 0 has 1" in own
    assert all(each.startswith("MismatchError") and "input 0 has 1" in each for each in others), others
