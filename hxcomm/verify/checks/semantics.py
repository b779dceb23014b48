"""Semantics: async handles, order, threads, groups, buffers. What c10d's documentation says of Work and of groups."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from hxcomm.verify.collectives import OPS, Call
from hxcomm.verify.context import Context, Group
from hxcomm.verify.registry import check

COUNT = 1000


def total(context: Context, group: Group = None) -> float:
    """The sum of rank + 1 over a group."""
    ranks = range(context.world_size) if group is None else dist.get_process_group_ranks(group)
    return float(sum(rank + 1 for rank in ranks))


def mine(context: Context, count: int = COUNT) -> torch.Tensor:
    return context.full(count, context.rank + 1.0)


def require_sum(context: Context, tensor: torch.Tensor, what: str, group: Group = None) -> None:
    context.equal(tensor, torch.full((tensor.numel(),), total(context, group)), what)


@check(
    "semantics",
    says="async_op=True returns a Work before the peers have called; wait() gives the result (async collectives)",
    cases=OPS,
    min_ranks=2,
)
def async_returns_at_once(context: Context, op: str) -> None:
    call = Call(context, op, shape=(COUNT,))
    if context.rank != 0:
        context.await_key("issued")  # rank 0 cannot have waited for this one
    try:
        work = call.issue(async_op=True)
    finally:
        context.tell("issued")
    context.expect(work is not None, "no Work was returned")
    work.wait()
    context.expect(work.is_completed(), "is_completed() is false after wait()")
    call.verify()


@check(
    "semantics",
    says="is_completed() is false while a peer is missing, and becomes true without a wait() (Work.is_completed)",
    min_ranks=2,
)
def completes_without_wait(context: Context) -> None:
    tensor = mine(context, 300_001)
    if context.rank != 0:
        context.await_key("polled")
    work = dist.all_reduce(tensor, async_op=True)
    if context.rank == 0:
        early = work.is_completed()
        context.tell("polled")
        context.expect(not early, "is_completed() is true before the others have called")
    context.until(work.is_completed, "is_completed() becoming true")
    work.wait()
    require_sum(context, tensor, "all_reduce")


@check("semantics", says="Handles may be waited for in any order, a different one on each rank", min_ranks=2)
def waits_in_any_order(context: Context) -> None:
    tensors = [mine(context, count) for count in range(1, 101)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    order = list(range(len(works)))
    random.Random(context.rank).shuffle(order)
    for each in order:
        works[each].wait()
        require_sum(context, tensors[each], f"all_reduce {each} of {len(works)}")


@check("semantics", says="A sync collective may be called while async ones are under way", min_ranks=2)
def sync_among_async(context: Context) -> None:
    tensors = [mine(context, count) for count in (300_001, 10, 1000)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    between = mine(context)
    dist.all_reduce(between)
    require_sum(context, between, "sync all_reduce after three async ones")
    for work, tensor in zip(works, tensors, strict=True):
        work.wait()
        require_sum(context, tensor, "async all_reduce before a sync one")


@check("semantics", says="A Work that is dropped at once, and its tensors, live until the collective ends", min_ranks=2)
def dropped_work(context: Context) -> None:
    output = context.full(50_000 * context.world_size, -1)
    dist.all_gather_into_tensor(output, context.full(50_000, context.rank + 1.0), async_op=True)
    overwriting = [context.full(50_000, -5) for _ in range(10)]
    dist.barrier()
    expected = torch.arange(1.0, context.world_size + 1).repeat_interleave(50_000)
    context.equal(
        output, expected, f"output of a dropped all_gather_into_tensor ({len(overwriting)} allocations later)"
    )


@check("semantics", says="A tensor may be overwritten as soon as its collective has returned", cases=OPS, min_ranks=2)
def buffers_are_free_on_return(context: Context, op: str) -> None:
    for turn in range(20):
        call = Call(context, op, root=turn % context.world_size, shape=(COUNT + turn,))
        call.issue()
        call.verify(f" in turn {turn}")
        call.overwrite()


@check("semantics", says="get_future() completes with the result; then() runs after it (Work.get_future)", min_ranks=2)
def futures(context: Context) -> None:
    tensor = mine(context)
    future = dist.all_reduce(tensor, async_op=True).get_future()
    doubled: torch.futures.Future[torch.Tensor] = future.then(lambda done: 2 * done.value()[0])
    context.equal(doubled.wait(), torch.full((COUNT,), 2 * total(context)), "then() of all_reduce")
    context.expect(future.done(), "the future is not done after the one that then() returned")


@check("semantics", says="A wait with a generous timeout is a wait (Work.wait)", min_ranks=2)
def generous_timeout(context: Context) -> None:
    tensor = mine(context)
    dist.all_reduce(tensor, async_op=True).wait(timedelta(seconds=100))
    require_sum(context, tensor, "all_reduce")


@check("semantics", says="No rank leaves barrier() before every rank has entered it (barrier)", min_ranks=2)
def barrier(context: Context) -> None:
    for turn in range(50):
        context.tell(f"{turn}/{context.rank}")
        dist.barrier()
        entered = [f"{turn}/{rank}" for rank in range(context.world_size)]
        context.expect(context.store.check(entered), f"barrier {turn} returned before all had entered")


def in_threads(bodies: list[Callable[[], None]]) -> None:
    """Runs them at once; raises what the first of them raised."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@check("semantics", says="Several threads may use a process group each, at the same time", cases=[2, 4], min_ranks=2)
def threads(context: Context, count: int) -> None:
    groups = [context.new_group() for _ in range(count)]

    def body(number: int) -> None:
        for turn in range(30):
            tensor = context.full(100 * number + turn + 1, context.rank + number)
            dist.all_reduce(tensor, group=groups[number])
            expected = sum(rank + number for rank in range(context.world_size))
            context.equal(tensor, torch.full_like(tensor.cpu(), expected), f"thread {number}, turn {turn}")

    in_threads([lambda number=number: body(number) for number in range(count)])  # type: ignore[misc]


@check("semantics", says="A job may have many groups, all usable side by side (new_group)", min_ranks=2)
def many_groups(context: Context) -> None:
    groups = [context.new_group() for _ in range(32)]
    tensors = [mine(context, number + 1) for number in range(len(groups))]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor, group in zip(tensors, groups, strict=True)]
    for tensor, work in zip(tensors, works, strict=True):
        work.wait()
        require_sum(context, tensor, "all_reduce in one of 32 groups")


@check(
    "semantics",
    says="Async collectives of different groups may be issued in a different order on each rank, then a sync one",
    min_ranks=2,
)
def groups_in_different_orders(context: Context) -> None:
    groups = [context.new_group() for _ in range(4)]
    order = groups[context.rank % 4 :] + groups[: context.rank % 4]
    for count in (10, 5000, 300_001):
        tensors = [mine(context, count) for _ in order]
        works = [
            dist.all_reduce(tensor, group=group, async_op=True)
            for tensor, group in zip(tensors[:-1], order[:-1], strict=True)
        ]
        dist.all_reduce(tensors[-1], group=order[-1])  # every rank blocks in another group
        for work in works:
            work.wait()
        for tensor in tensors:
            require_sum(context, tensor, "all_reduce in one of four groups")


@check(
    "semantics", says="Overlapping groups of two do not disturb one another, in whatever order they come", min_ranks=3
)
def overlapping_groups(context: Context) -> None:
    world = range(context.world_size)
    pairs = [context.new_group([low, high]) for high in reversed(world) for low in range(high)]
    members = [group for group in pairs if dist.get_rank(group) >= 0]
    works = []
    for group in members if context.rank % 2 else reversed(members):
        tensor = mine(context)
        works.append((dist.all_reduce(tensor, group=group, async_op=True), tensor, group))
    for work, tensor, group in works:
        work.wait()
        require_sum(context, tensor, f"all_reduce in {dist.get_process_group_ranks(group)}", group)


@check("semantics", says="A callback of a future may itself issue a collective", min_ranks=2, optional=True)
def collective_in_a_callback(context: Context) -> None:
    other = context.new_group()
    second = mine(context)
    first = dist.all_reduce(mine(context), async_op=True).get_future()
    chained = first.then(lambda _: dist.all_reduce(second, group=other))
    chained.wait()
    require_sum(context, second, "all_reduce issued by a callback")


@check("semantics", says="new_group(use_local_synchronization=True) needs its members only (new_group)", min_ranks=3)
def group_made_by_its_members(context: Context) -> None:
    if context.rank < 2:
        group = context.new_group([0, 1], use_local_synchronization=True)
        tensor = mine(context)
        dist.all_reduce(tensor, group=group)
        require_sum(context, tensor, "all_reduce", group)
