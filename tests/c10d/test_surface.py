"""What hxcomm makes of torch's calls, beyond results: factors, handles of every call, refusals, profiler events."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import exact
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, AllreduceCoalescedOptions
from torch_arrays import from_torch, reduce_op_of, to_torch

import hxcomm
from hxcomm.schedule import Location, Schedule, copy

Pool = Callable[[int], Any]
CPU = torch.device("cpu")


def world_backend() -> Any:
    """The backend itself: torch's functions turn complex tensors into real ones before it sees them."""
    return dist.distributed_c10d._get_default_group()._get_backend(CPU)


def given(dtype: str, reduce_op: str, rank: int, count: int, block: int = 0) -> torch.Tensor:
    return to_torch(exact.store(exact.numbers(dtype, reduce_op, rank, block, count), dtype), dtype)


def reduced(dtype: str, reduce_op: str, n: int, count: int, block: int = 0) -> exact.Array:
    return exact.reduced([exact.numbers(dtype, reduce_op, r, block, count) for r in range(n)], dtype, reduce_op)


def equal(tensor: torch.Tensor, expected: exact.Array, what: str) -> None:
    np.testing.assert_array_equal(from_torch(tensor).reshape(-1), expected, err_msg=what)


# --- reduce ops ---


def complex_products(rank: int, n: int) -> None:
    for dtype in exact.COMPLEX:
        for reduce_op in ("sum", "product", "avg", "premul_sum"):
            options = dist.AllreduceOptions()
            options.reduceOp = reduce_op_of(reduce_op, rank)
            tensor = given(dtype, reduce_op, rank, 33)
            world_backend().allreduce([tensor], options).wait()
            equal(tensor, reduced(dtype, reduce_op, n, 33), f"{dtype} {reduce_op}")
    # A conjugated view has other bytes than it has numbers: on one rank only, as input only and as output only.
    numbers = torch.tensor([1 + 2j, 3 - 1j])
    view = numbers.conj().resolve_conj().conj() if rank == 0 else numbers.clone()
    world_backend().allreduce([view], dist.AllreduceOptions()).wait()
    assert torch.equal(view, n * numbers) and view.is_conj() == (rank == 0)
    into = torch.zeros(n, 2, dtype=torch.complex64)
    world_backend()._allgather_base(into, numbers.conj(), AllgatherOptions()).wait()
    assert all(torch.equal(row, numbers.conj()) for row in into)
    world_backend()._allgather_base(into.conj(), numbers, AllgatherOptions()).wait()
    assert all(torch.equal(row, numbers.conj()) for row in into)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_complex_tensors_are_numbers_not_pairs(rank_pool: Pool, world_size: int) -> None:
    rank_pool(world_size).run(complex_products)


def factors(rank: int, n: int) -> None:
    """Left folds of float32 products, as bytes, for a factor of each kind; 16-bit results round once."""
    numbers = [torch.randn(4001, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    own = [0.1 + 0.7 * r for r in range(n)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shared = [each.to(dtype) for each in numbers]
        total = shared[0].float() * np.float32(own[0])
        for r in range(1, n):
            total = total + shared[r].float() * np.float32(own[r])
        # Ranks may give their factor as a number or as a tensor.
        factor: Any = torch.tensor([own[rank]], dtype=torch.float64) if rank % 2 else own[rank]
        op = dist._make_nccl_premul_sum(factor)
        tensor = shared[rank].clone()
        dist.all_reduce(tensor, op)
        assert torch.equal(tensor, total.to(dtype))
        parts = torch.zeros(4001, dtype=dtype)
        dist.reduce_scatter(parts, [shared[rank]] * n, op)
        assert torch.equal(parts, total.to(dtype))


VARIANTS = [
    {},
    {"HXCOMM_SEGMENT": "1KiB"},
    {"HXCOMM_ALGO": "all_reduce:one_shot"},
    {"HXCOMM_EXECUTOR": "python"},
]


@pytest.mark.parametrize("env", VARIANTS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_multiplies_by_its_own_factor_before_the_sum(
    rank_pool: Pool, world_size: int, env: dict[str, str]
) -> None:
    rank_pool(world_size).run(factors, env=env)


def refused_reductions(rank: int, n: int) -> list[str]:
    messages = []
    for dtype, op in ((torch.complex64, "MIN"), (torch.float16, "BXOR"), (torch.bool, "AVG"), (torch.int8, "PREMUL")):
        options = dist.AllreduceOptions()
        options.reduceOp = dist._make_nccl_premul_sum(2.0) if op == "PREMUL" else getattr(dist.ReduceOp, op)
        tensor = torch.ones(3).to(dtype)
        try:
            world_backend().allreduce([tensor], options).wait()
        except ValueError as error:
            messages.append(str(error))
        assert (tensor == 1).all()
    check = torch.ones(3, dtype=torch.int16)
    dist.all_reduce(check)
    assert check.tolist() == [n] * 3, "the group stays usable"
    return messages


def test_a_reduction_without_a_meaning_names_itself_and_what_there_is(rank_pool: Pool) -> None:
    for complex_min, half_xor, bool_average, int8_factor in rank_pool(2).run(refused_reductions):
        assert "MIN of complex64" in complex_min and "complex64 has SUM, PRODUCT, AVG, PREMUL_SUM" in complex_min
        assert "BXOR of float16" in half_xor and "MAX" in half_xor
        assert "AVG of bool" in bool_average and "BOR" in bool_average
        assert "PREMUL_SUM of int8" in int8_factor and "BAND" in int8_factor


def copied_alone(world_size: int) -> Schedule:
    return Schedule(
        "reduce_scatter", "copied", 1, lambda: iter([[copy(0, Location(0, "input", 0), Location(0, "output", 0))]])
    )


def factor_of_a_copied_contribution(rank: int, n: int) -> str:
    hxcomm.register_algorithm("reduce_scatter", "copied", copied_alone)
    group = dist.new_group(pg_options=hxcomm.Options(algorithms={"reduce_scatter": "copied"}))
    output = torch.zeros(3)
    dist.reduce_scatter_tensor(output, torch.ones(3), group=group)
    assert output.tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="'copied' copies contributions to outputs") as error:
        dist.reduce_scatter_tensor(output, torch.ones(3), dist._make_nccl_premul_sum(2.0), group=group)
    return str(error.value)


def test_an_algorithm_that_cannot_multiply_contributions_refuses_a_factor(run_ranks: Callable[..., list[Any]]) -> None:
    # A fresh process: a registration lasts as long as its process.
    assert "choose another one" in run_ranks(factor_of_a_copied_contribution, 1)[0]


# --- lists of tensors ---


def unequal_mistakes(rank: int, n: int) -> list[tuple[str, str]]:
    found = []
    calls = [
        lambda: dist.all_gather([torch.zeros(r + 1) for r in range(n)], torch.zeros(rank + 1 + (rank == 1))),
        # Rank 1 expects more of rank 0 than that sends.
        lambda: dist.all_to_all([torch.zeros(1 + (rank == 1))] * n, [torch.zeros(1) for _ in range(n)]),
        lambda: dist.all_to_all([torch.zeros(1)] * (n - (rank == 0)), [torch.zeros(1) for _ in range(n)]),
    ]
    for call in calls:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found.append((type(error).__name__, str(error)))
        dist.barrier()
    return found


def test_sizes_that_do_not_fit_together_raise_on_every_rank(rank_pool: Pool) -> None:
    first, second = rank_pool(2).run(unequal_mistakes)
    assert [name for name, _ in first] == ["MismatchError", "MismatchError", "ValueError"]
    assert [name for name, _ in second] == ["ValueError", "MismatchError", "MismatchError"]
    assert "rank 1 with an input of 3 elements, but output 1 has 2" in second[0][1]
    assert "sends 1 elements to" in second[1][1] and "expects 2" in second[1][1]
    assert "a list of 1 tensors, but the group has 2 ranks" in first[2][1]


# --- several tensors at a time ---


def joined_handle(rank: int, n: int) -> None:
    group = dist.distributed_c10d._get_default_group()
    group._start_coalescing(CPU)
    first, second = torch.ones(100_000), torch.full((4,), float(rank))
    # In the manager, too, a sync call is done when it returns.
    dist.broadcast(second, n - 1)
    assert (second == n - 1).all()
    options = dist.AllreduceOptions()
    options.asyncOp = True
    group.allreduce([first], options)
    joined = group._end_coalescing(CPU)
    joined.wait(timedelta(seconds=20))
    assert joined.is_completed() and joined.is_success() and joined.exception() is None
    assert (first == n).all() and [each.numel() for each in joined.result()] == (
        [100_000] if rank == n - 1 else [4, 100_000]
    )
    assert joined.get_future().then(lambda done: len(done.value())).wait() == len(joined.result())
    group._start_coalescing(CPU)
    assert group._end_coalescing(CPU).wait()


def test_the_managers_handle_stands_for_all_calls_inside(rank_pool: Pool) -> None:
    rank_pool(2).run(joined_handle)


def refused_in_a_list(rank: int, n: int, async_op: bool) -> list[str]:
    """Rank 1's second tensor cannot be sent; each of the three calls takes its place in the order all the same."""
    errors = []
    tensors = [torch.ones(4), torch.ones(4), torch.ones(4)]
    if rank == 1:
        tensors[1] = torch.ones(4, dtype=torch.float8_e4m3fn)
    options = AllreduceCoalescedOptions()
    options.asyncOp = async_op
    try:
        world_backend().allreduce_coalesced(tensors, options).wait()
    except (ValueError, RuntimeError) as error:
        errors.append(type(error).__name__)
    assert all((each.float() == 1).all() for each in tensors)
    # Were a call of the list left over on some rank, this one would be added to it.
    after = torch.full((4,), 2.0)
    dist.all_reduce(after)
    assert after.tolist() == [2.0 * n] * 4
    return errors


@pytest.mark.parametrize("async_op", [False, True])
def test_a_refused_list_leaves_the_ranks_in_step(rank_pool: Pool, async_op: bool) -> None:
    assert rank_pool(2).run(refused_in_a_list, async_op) == [["MismatchError"], ["ValueError"]]


# --- handles, profiler ---


def handles_of_every_call(rank: int, n: int) -> None:
    def ones() -> torch.Tensor:
        return torch.ones(3)

    def many() -> list[torch.Tensor]:
        return [torch.zeros(3) for _ in range(n)]

    pair = torch.ones(n, 3)
    works = [
        dist.all_reduce(ones(), async_op=True),
        dist.all_gather(many(), ones(), async_op=True),
        dist.all_gather_into_tensor(torch.zeros(n, 3), ones(), async_op=True),
        dist.reduce_scatter(ones(), many(), async_op=True),
        dist.reduce_scatter_tensor(ones(), pair, async_op=True),
        dist.all_to_all(many(), many(), async_op=True),
        dist.all_to_all_single(torch.zeros(n), torch.ones(n), async_op=True),
        dist.broadcast(ones(), 0, async_op=True),
        dist.barrier(async_op=True),
        dist.all_reduce(torch.sparse_coo_tensor([[1]], [1.0], (4,)), async_op=True),
        world_backend().allreduce_coalesced([ones(), ones()]),
    ]
    lengths = []
    for work in works:
        assert work.wait(timedelta(seconds=20)) and work.is_completed() and work.is_success()
        assert work.exception() is None
        lengths.append(len(work.result()))
        chained = work.get_future().then(lambda done: len(done.value()))
        assert chained.wait() == lengths[-1]
    assert lengths == [1, n, 1, 1, 1, n, 1, 0 if rank == 0 else 1, 0, 1, 2]
    assert world_backend().allreduce_coalesced([]).wait()


def test_every_calls_handle_has_its_result_and_a_future(rank_pool: Pool) -> None:
    rank_pool(2).run(handles_of_every_call)


def events(rank: int, n: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        dist.all_reduce(torch.ones(3, 5))
        dist.all_reduce(torch.ones(7), async_op=True).wait()
        dist.all_gather([torch.zeros(4) for _ in range(n)], torch.ones(4))
        dist.all_to_all([torch.zeros(2) for _ in range(n)], [torch.zeros(2) for _ in range(n)])
        dist.reduce_scatter_tensor(torch.zeros(2), torch.ones(n, 2))
        world_backend().allreduce_coalesced([torch.ones(2), torch.ones(6)]).wait()
        dist.all_reduce(torch.sparse_coo_tensor([[1]], [1.0], (4,)))
        dist.barrier()
    shapes: dict[str, Any] = {}
    for event in profiler.events():
        if event.name.startswith("hxcomm:"):
            shapes.setdefault(event.name, []).append(event.input_shapes)
    return shapes


def test_the_profiler_shows_every_call_with_its_input_shapes(rank_pool: Pool) -> None:
    for shapes in rank_pool(2).run(events):
        assert shapes["hxcomm:all_reduce"] == [[[3, 5]], [[7]]]
        assert shapes["hxcomm:all_gather"] == [[[4]]]
        assert shapes["hxcomm:all_to_all"] == [[[2], [2]]]
        assert shapes["hxcomm:reduce_scatter_tensor"] == [[[2, 2]]]
        assert shapes["hxcomm:all_reduce_coalesced"] == [[[2], [6]]]
        assert shapes["hxcomm:barrier"] == [[]]
        assert "hxcomm:all_reduce_sparse" in shapes


def events_of_messages(rank: int, n: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        if rank == 0:
            dist.send(torch.ones(3), 1)
            dist.send(torch.ones(5), 1)
        else:
            dist.recv(torch.ones(3), 0)
            dist.recv(torch.ones(5))
        tensor = torch.ones(7)
        work = dist.all_reduce(tensor, async_op=True)
        while not work.is_completed():  # ends in the background thread, which is not profiled itself
            pass
    return {
        each.name: (each.input_shapes, each.is_async) for each in profiler.events() if each.name.startswith("hxcomm:")
    }


def test_the_profiler_shows_messages_and_calls_that_nobody_waits_for(rank_pool: Pool) -> None:
    sender, receiver = rank_pool(2).run(events_of_messages)
    assert sender == {"hxcomm:send": ([[5]], True), "hxcomm:all_reduce": ([[7]], True)}
    assert receiver == {
        "hxcomm:recv": ([[3]], True),
        "hxcomm:recvAnySource": ([[5]], True),
        "hxcomm:all_reduce": ([[7]], True),
    }


# --- large tensors ---


def beyond_2_gib(rank: int, n: int) -> int:
    count = 2**31 + 4097  # bytes: more than an int32 counts
    tensor = torch.full((count,), rank + 1, dtype=torch.uint8)
    tensor[2**31 :] = 10 + rank
    dist.all_reduce(tensor)
    body = tensor[: 2**31].view(torch.int64)
    # All eight bytes of each word are 1 + 2; reading them in pieces keeps temporaries small.
    for piece in body.split(2**24):
        assert piece.min() == piece.max() == 0x0303030303030303
    assert (tensor[2**31 :] == 21).all()
    return tensor.numel()


def test_a_tensor_of_more_than_2_gib_is_reduced_whole(rank_pool: Pool) -> None:
    # Two ranks' tensors and their windows: 4.3 GiB.
    assert rank_pool(2).run(beyond_2_gib, timeout_s=150, op_timeout_s=120) == [2**31 + 4097] * 2
