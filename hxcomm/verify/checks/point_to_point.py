"""Point to point: send, recv, tags, any source, batches, messages that come in another order than they are wanted."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hxcomm.verify.collectives import DTYPES, LAYOUTS, place, values
from hxcomm.verify.context import IDLE, Context, Idle
from hxcomm.verify.registry import check

COUNTS = (1, 33, 4097)
LARGE = 2_000_003  # 8 MB: no eager buffer holds it


def message(sender: int, number: int, count: int = 33, dtype: str = "float32") -> torch.Tensor:
    return values(DTYPES[dtype], "sum", sender, number, (count,), 1)


def outgoing(context: Context, number: int, count: int = 33, dtype: str = "float32") -> torch.Tensor:
    return context.on_device(message(context.rank, number, count, dtype))


def empty(context: Context, count: int = 33, dtype: str = "float32") -> torch.Tensor:
    return torch.full((count,), 1, dtype=DTYPES[dtype], device=context.device)


def receive(context: Context, sender: int, number: int, count: int = 33, dtype: str = "float32", **more: Any) -> None:
    tensor = empty(context, count, dtype)
    source = dist.recv(tensor, sender, **more)
    context.expect(source == sender, f"recv from {sender} returned {source}")
    context.equal(tensor, message(sender, number, count, dtype), f"message {number} of rank {sender}")


@check(
    "point_to_point",
    says="send and recv carry a message from rank to rank (send, recv)",
    cases=DTYPES,
    min_ranks=2,
    optional=lambda dtype: dtype.startswith(("complex", "int8", "int16", "bool")),
)
def send_recv(context: Context, dtype: str) -> None:
    """Around the ring, so that every rank does both."""
    following, before = (context.rank + 1) % context.world_size, (context.rank - 1) % context.world_size
    for number, count in enumerate(COUNTS):
        if context.rank == 0:
            dist.send(outgoing(context, number, count, dtype), following)
        receive(context, before, number, count, dtype)
        if context.rank != 0:
            dist.send(outgoing(context, number, count, dtype), following)


@check("point_to_point", says="isend and irecv return before the peer has called (isend, irecv)", min_ranks=2)
def isend_irecv(context: Context) -> None:
    """Everybody with everybody; all receives are posted before any send."""
    others = [rank for rank in range(context.world_size) if rank != context.rank]
    incoming = {rank: empty(context) for rank in others}
    works = [dist.irecv(incoming[rank], rank) for rank in others]
    context.meet()
    works += [dist.isend(outgoing(context, rank), rank) for rank in others]
    for work in works:
        context.expect(work is not None, "no Work was returned")
        assert work is not None
        work.wait()
    for rank in others:
        context.equal(incoming[rank], message(rank, context.rank), f"from rank {rank}")


@check(
    "point_to_point",
    says="A tag selects among messages of one sender, whatever their order and length (recv, tag)",
    cases=[33, 20_000],
    min_ranks=2,
)
def tags(context: Context, count: int) -> Idle | None:
    """Two messages of each tag, last tag first: more than are likely to find room in a receiver's buffers."""
    if context.rank > 1:
        return IDLE
    if context.rank == 0:
        kept = [outgoing(context, number, count) for number in range(40)]
        sent = [dist.isend(tensor, 1, tag=number // 2) for number, tensor in enumerate(kept)]
        for work in sent:
            assert work is not None
            work.wait()
    else:
        for tag in reversed(range(20)):
            for number in (2 * tag, 2 * tag + 1):
                receive(context, 0, number, count, tag=tag)
    return None


@check("point_to_point", says="Messages of one sender and tag arrive in the order in which they were sent", min_ranks=2)
def order_within_a_tag(context: Context) -> Idle | None:
    if context.rank > 1:
        return IDLE
    if context.rank == 0:
        kept = [outgoing(context, number, 1 + number * 37) for number in range(60)]
        works = [dist.isend(tensor, 1) for tensor in kept]
        for work in works:
            assert work is not None
            work.wait()
    else:
        for number in range(60):
            receive(context, 0, number, 1 + number * 37)
    return None


@check("point_to_point", says="recv without a source takes a message of any rank, and says whose (recv)", min_ranks=2)
def any_source(context: Context) -> None:
    if context.rank != 0:
        for number in range(3):
            dist.send(outgoing(context, number), 0, tag=7)
        return
    seen = dict.fromkeys(range(1, context.world_size), 0)
    for _ in range(3 * len(seen)):
        tensor = empty(context)
        source = dist.recv(tensor, tag=7)
        context.expect(seen.get(source, 3) < 3, f"a message of rank {source} after {seen}")
        context.equal(tensor, message(source, seen[source]), f"message {seen[source]} of rank {source}, as recv says")
        seen[source] += 1


@check("point_to_point", says="batch_isend_irecv runs its sends and receives at once (batch_isend_irecv)", min_ranks=2)
def batch(context: Context) -> None:
    following, before = (context.rank + 1) % context.world_size, (context.rank - 1) % context.world_size
    for count in (*COUNTS, LARGE):
        tensor = empty(context, count)
        operations = [
            dist.P2POp(dist.isend, outgoing(context, 0, count), following),
            dist.P2POp(dist.irecv, tensor, before),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        context.equal(tensor, message(before, 0, count), f"{count} elements")


@check("point_to_point", says="A rank may send to itself", optional=True)
def self_send(context: Context) -> None:
    tensor = empty(context)
    group = dist.distributed_c10d._get_default_group()  # dist.send refuses it before the backend is asked
    try:
        receiving = group.recv([tensor], context.rank, 0)
        group.send([outgoing(context, 0)], context.rank, 0).wait()
        receiving.wait()
    except RuntimeError as error:
        raise NotImplementedError(str(error)) from error
    context.equal(tensor, message(context.rank, 0), "its own message")


@check("point_to_point", says="A long message arrives whole, in both directions at once", min_ranks=2)
def large(context: Context) -> Idle | None:
    if context.rank > 1:
        return IDLE
    peer = 1 - context.rank
    sending = dist.isend(outgoing(context, 0, LARGE), peer)
    receive(context, peer, 0, LARGE)
    assert sending is not None
    sending.wait()
    return None


@check("point_to_point", says="Messages wait for their receiver while collectives of the group go on", min_ranks=2)
def beside_collectives(context: Context) -> None:
    """Everybody sends to everybody, and receives only after a few all_reduces."""
    others = [rank for rank in range(context.world_size) if rank != context.rank]
    kept = [outgoing(context, rank) for rank in others]
    works = [dist.isend(tensor, rank) for tensor, rank in zip(kept, others, strict=True)]
    for _ in range(5):
        tensor = context.full(100, 1)
        dist.all_reduce(tensor)
        context.equal(tensor, torch.full((100,), float(context.world_size)), "all_reduce among messages")
    for rank in others:
        receive(context, rank, context.rank)
    for work in works:
        assert work is not None
        work.wait()


@check(
    "point_to_point",
    says="A tensor's strides and offset are honoured",
    cases=LAYOUTS,
    min_ranks=2,
    optional=lambda layout: layout != "offset",
)
def layout(context: Context, layout: str) -> Idle | None:
    if context.rank > 1:
        return IDLE
    content = values(torch.float32, "sum", 0, 0, (4, 3), 1)
    if context.rank == 0:
        dist.send(place(context.on_device(content), layout)[0], 1)
    else:
        view, base = place(context.on_device(torch.zeros_like(content)), layout)
        before = base.clone()
        dist.recv(view, 0)
        context.equal(view, content, layout)
        before.as_strided(view.size(), view.stride(), view.storage_offset()).copy_(view)
        context.equal(base, before, "what stands around the tensor")
    return None


@check("point_to_point", says="A message of no elements is a message", min_ranks=2)
def zero_elements(context: Context) -> Idle | None:
    if context.rank > 1:
        return IDLE
    if context.rank == 0:
        dist.send(empty(context, 0), 1)
        dist.send(outgoing(context, 1), 1)
    else:
        dist.recv(empty(context, 0), 0)
        receive(context, 0, 1)
    return None


@check(
    "point_to_point", says="In a subgroup, peers are named by global rank, or by group_src and group_dst", min_ranks=3
)
def subgroup(context: Context) -> Idle | None:
    group = context.new_group([1, context.last])
    if dist.get_rank(group) < 0:
        return IDLE
    if context.rank == 1:
        dist.send(outgoing(context, 0), context.last, group=group)
        dist.send(outgoing(context, 1), group=group, group_dst=1)
    else:
        receive(context, 1, 0, group=group)
        tensor = empty(context)
        dist.recv(tensor, group=group, group_src=0)
        context.equal(tensor, message(1, 1), "received by group_src")
    return None


@check("point_to_point", says="The object forms of send and recv carry any picklable object", min_ranks=2)
def objects(context: Context) -> Idle | None:
    if context.rank > 1:
        return IDLE
    sent = [{"a": [1, 2, 3]}, "text", None]
    if context.rank == 0:
        dist.send_object_list(sent, 1)
    else:
        received: list[Any] = [None] * len(sent)
        dist.recv_object_list(received, 0)
        context.expect(received == sent, f"received {received}")
    return None
