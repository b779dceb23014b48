"""TorchComms: works, batches, splits, hooks and the life of a communicator."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import torch

from hxcomm import torchcomms
from hxcomm.verify.communicators import OPS, CommCall
from hxcomm.verify.context import Context
from hxcomm.verify.registry import check

API = "torchcomms"
SUM = torchcomms.ReduceOp.SUM


def mine(context: Context, count: int = 1000) -> torch.Tensor:
    return context.full(count, context.rank + 1.0)


def require_sum(context: Context, tensor: torch.Tensor, what: str) -> None:
    total = context.world_size * (context.world_size + 1) / 2
    context.equal(tensor, torch.full((tensor.numel(),), total), what)


def comm_named(context: Context, name: str, **more: Any) -> Any:
    return torchcomms.new_comm(
        context.backend,
        context.device,
        name=name,
        abort_process_on_timeout_or_error=False,
        store=context.store,
        **more,
    )


@check("semantics", api=API, says="async_op=True returns before the peers have called", cases=OPS, min_ranks=2)
def async_returns_at_once(context: Context, op: str) -> None:
    call = CommCall(context, op, shape=(1000,))
    if context.rank != 0:
        context.await_key("issued")
    try:
        work = call.issue(async_op=True)
    finally:
        context.tell("issued")
    work.wait()
    context.expect(work.is_completed(), "is_completed() is false after wait()")
    call.verify()


@check("semantics", api=API, says="Works may be waited for in any order, a different one on each rank", min_ranks=2)
def waits_in_any_order(context: Context) -> None:
    tensors = [mine(context, count) for count in range(1, 60)]
    works = [context.comm.all_reduce(tensor, SUM, True) for tensor in tensors]
    order = list(range(len(works)))
    random.Random(context.rank).shuffle(order)
    for each in order:
        works[each].wait_blocking()
        require_sum(context, tensors[each], f"all_reduce {each}")


@check("semantics", api=API, says="A dropped work goes on, and a deleted input lives until it has ended", min_ranks=2)
def dropped_work(context: Context) -> None:
    output = context.full(50_000 * context.world_size, -1)
    context.comm.all_gather_single(output, context.full(50_000, context.rank + 1.0), True)
    overwriting = [context.full(50_000, -5) for _ in range(10)]
    context.comm.barrier(False)
    expected = torch.arange(1.0, context.world_size + 1).repeat_interleave(50_000)
    context.equal(output, expected, f"output of a dropped work ({len(overwriting)} allocations later)")


@check("semantics", api=API, says="A call may have a timeout and hints of its own", optional=True)
def per_call_options(context: Context) -> None:
    tensor = mine(context)
    context.comm.all_reduce(tensor, SUM, False, hints={}, timeout=timedelta(seconds=context.timeout_s))
    require_sum(context, tensor, "all_reduce with options")


@check("semantics", api=API, says="Several communicators on one store keep apart, and may be used in any order")
def several_communicators(context: Context) -> None:
    comms = [comm_named(context, f"comm {number}") for number in range(3)]
    tensors = [mine(context, 100 + number) for number in range(3)]
    order = list(range(3))
    random.Random(context.rank).shuffle(order)
    works = [(number, comms[number].all_reduce(tensors[number], SUM, True)) for number in order]
    for number, work in works:
        work.wait()
        require_sum(context, tensors[number], f"all_reduce on communicator {number}")
    for comm in comms:
        comm.finalize()


@check(
    "semantics",
    api=API,
    says="split() gives members a communicator in the given order, others None; also of a split",
    min_ranks=2,
    optional=True,
)
def split_in_levels(context: Context) -> None:
    backwards = list(reversed(range(context.world_size)))
    comm = context.comm.split(backwards, "backwards")
    context.expect(comm.get_rank() == context.last - context.rank, f"rank {comm.get_rank()} in the reversed split")
    pair = comm.split([0, 1], "pair")  # the last two of all
    context.expect(
        (pair is None) == (comm.get_rank() > 1), "a rank that is no member got a communicator, or a member none"
    )
    if pair is not None:
        context.expect((pair.get_size(), pair.get_name()) == (2, "pair"), f"{pair.get_size()} ranks, {pair.get_name()}")
        tensor = mine(context)
        pair.all_reduce(tensor, SUM, False)
        context.equal(tensor, torch.full((1000,), 2.0 * context.world_size - 1), "all_reduce of a split of a split")
        pair.finalize()
    tensor = mine(context)
    comm.broadcast(tensor, 0, False)
    context.equal(tensor, torch.full((1000,), float(context.world_size)), "broadcast of the split")
    comm.finalize()


@check("semantics", api=API, says="It says what it is")
def properties(context: Context) -> None:
    comm = context.comm
    found = (comm.get_rank(), comm.get_size(), comm.get_name(), comm.get_device().type, comm.get_backend())
    expected = (context.rank, context.world_size, "verify", context.device.type, context.backend)
    context.expect(found == expected, f"{found} instead of {expected}")


@check("semantics", api=API, says="Hooks see every operation before and after it, joined by one op id, until removed")
def hooks(context: Context) -> None:
    seen: list[tuple[Any, ...]] = []
    comm = comm_named(context, "hooked")
    before = comm.register_pre_hook(lambda name, op_id, args: seen.append((name.name, op_id, args.async_op)))
    after = comm.register_post_hook(lambda op_id, args: seen.append((op_id,)))
    for later in (False, True):
        comm.all_reduce(mine(context), SUM, later).wait()
    comm.barrier(False)
    before.remove()
    after.remove()
    comm.barrier(False)
    ids = [entry[0] for entry in seen if len(entry) == 1]
    expected = []
    calls = (("all_reduce", False), ("all_reduce", True), ("barrier", False))
    for (name, later), op_id in zip(calls, ids, strict=True):
        expected += [(name, op_id, later), (op_id,)]
    context.expect(seen == expected and len(set(ids)) == 3, f"hooks saw {seen}")
    comm.finalize()


# --- point to point ---


@check(
    "point_to_point",
    api=API,
    says="recv gets what send sent, in order, of any length",
    min_ranks=2,
    cases=[10, 300_001],
)
def send_and_recv(context: Context, count: int) -> None:
    if context.rank == 0:
        for turn in range(3):
            context.comm.send(context.full(count, float(turn)), context.last, False)
    elif context.rank == context.last:
        for turn in range(3):
            tensor = context.full(count, -1.0)
            context.comm.recv(tensor, 0, False)
            context.equal(tensor, torch.full((count,), float(turn)), f"message {turn}")


@check(
    "point_to_point",
    api=API,
    says="A batch of sends and receives in any order, both directions at once, does not deadlock",
    cases=[(count, later) for count in (10, 300_001) for later in ("sync", "async")],
    optional=True,
)
def batch(context: Context, count: int, later: str) -> None:
    peers = list(range(context.world_size))  # this rank itself, too
    batch = context.comm.batch_op_create()
    received = {peer: context.full(count, -1.0) for peer in peers}
    adding = [("send", peer) for peer in peers] + [("recv", peer) for peer in peers]
    random.Random(context.rank).shuffle(adding)
    for way, peer in adding:
        if way == "send":
            batch.send(context.full(count, context.rank * 100.0 + peer), peer)
        else:
            batch.recv(received[peer], peer)
    work = batch.issue(later == "async")
    work.wait()
    for peer in peers:
        context.equal(received[peer], torch.full((count,), peer * 100.0 + context.rank), f"message of rank {peer}")
