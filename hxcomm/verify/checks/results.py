"""Exact results: every collective x dtype x reduce op x count x layout x root x group, sync and async."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.distributed_c10d import _coalescing_manager

from hxcomm.verify.collectives import (
    DTYPES,
    EXPECTED_DTYPES,
    EXPECTED_REDUCE_OPS,
    LAYOUTS,
    OPS,
    REDUCE_OPS,
    REDUCING,
    ROOTED,
    Call,
    meaningful,
    reduced,
    values,
)
from hxcomm.verify.context import Context
from hxcomm.verify.registry import check

COUNTS = (1, 7, 1023)
LARGE = 300_001  # odd, and more than a mebibyte of float32: longer than any staging buffer is likely to be


def may_refuse(dtype: str, reduce_op: str = "sum") -> bool:
    return dtype not in EXPECTED_DTYPES or reduce_op not in EXPECTED_REDUCE_OPS


def register(op: str, call: type[Call], *, reduces: bool, rooted: bool, says: str, api: str = "c10d") -> None:
    """The check of one op, under its own name: `call` runs it with all counts and roots, sync and async."""

    def in_every_way(context: Context, dtype: str, reduce_op: str = "sum") -> None:
        roots = range(context.world_size) if rooted else (0,)
        for count, root, later in itertools.product(COUNTS, roots, (False, True)):
            issued = call(context, op, DTYPES[dtype], reduce_op, root, (count,))
            issued.run(later, f", root {root}" if rooted else "")

    pairs = [(dtype, reduce_op) for dtype in DTYPES for reduce_op in REDUCE_OPS if meaningful(dtype, reduce_op)]
    # Every pair once; the other reductions share its arithmetic.
    chosen = [pair for pair in pairs if op == "all_reduce" or pair[0] == "float32" or pair[1] == "sum"]
    check("results", api=api, name=op, says=says, cases=chosen if reduces else DTYPES, optional=may_refuse)(
        in_every_way
    )


def promise(op: str, reduces: bool) -> str:
    if reduces:
        return f"{op} reduces the elements of all ranks with the given ReduceOp"
    return f"{op} delivers every element to its place"


for each in OPS:
    says = f"{promise(each, each in REDUCING)} (torch.distributed, {each})"
    register(each, Call, reduces=each in REDUCING, rooted=each in ROOTED, says=says)


@check("results", says="A message of any length is right, however it is cut into pieces", cases=OPS)
def large(context: Context, op: str) -> None:
    for later in (False, True):
        Call(context, op, root=context.last, shape=(LARGE,)).run(later)


@check(
    "results",
    says="A tensor's strides and storage offset are honoured: its elements are sent and written, nothing beside them",
    cases=itertools.product(OPS, (*LAYOUTS, "one_transposed")),
    optional=lambda op, layout: layout != "offset",
)
def layout(context: Context, op: str, layout: str) -> None:
    """A tensor transposed on one rank only shows what sends storage instead of elements."""
    for root in range(context.world_size) if op in ROOTED else (0,):
        for later in (False, True):
            own = layout
            if layout == "one_transposed":
                own = "transposed" if context.rank == context.last else ""
            Call(context, op, root=root, shape=(4, 3), layout=own).run(later, f", {layout}, root {root}")


@check("results", says="A tensor of no elements is a tensor like others", cases=OPS)
def zero_elements(context: Context, op: str) -> None:
    for shape in ((0,), (0, 3)):
        for later in (False, True):
            Call(context, op, shape=shape).run(later)
    Call(context, op).run()  # and the stream goes on


@check(
    "results",
    says="A 0-dim tensor is one element",
    cases=["all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter"],
)
def zero_dim(context: Context, op: str) -> None:
    for later in (False, True):
        Call(context, op, shape=()).run(later)


@check(
    "results",
    says="In a subgroup only its members take part, and group ranks and roots count within it (new_group)",
    cases=OPS,
    min_ranks=2,
)
def subgroup(context: Context, op: str) -> None:
    parts = [[context.last, 0], list(range(1, context.world_size)), [0]]
    groups = [context.new_group(part) for part in parts]
    for members, group in zip(parts, groups, strict=True):
        ordered = sorted(members)  # new_group sorts
        if context.rank in ordered:
            for root in range(len(ordered)) if op in ROOTED else (0,):
                for later in (False, True):
                    call = Call(context, op, root=root, members=ordered, group=group)
                    call.run(later, f" in group {ordered}, root {root} of it")


@check(
    "results",
    says="NaN on any rank gives NaN in MIN and MAX on every rank, as torch.min and torch.max do",
    cases=itertools.product(("min", "max"), ("float32", "float64", "float16", "bfloat16")),
    min_ranks=2,
)
def nan_propagates(context: Context, reduce_op: str, dtype: str) -> None:
    op = getattr(dist.ReduceOp, reduce_op.upper())
    for holder in range(context.world_size):
        tensor = torch.arange(40).to(DTYPES[dtype]) - context.rank
        expected = torch.arange(40).to(DTYPES[dtype]) - (context.last if reduce_op == "min" else 0)
        expected[holder::7] = float("nan")
        if context.rank == holder:
            tensor[holder::7] = float("nan")
        tensor = context.on_device(tensor)
        dist.all_reduce(tensor, op)
        context.equal(tensor, expected, f"{reduce_op} with NaN on rank {holder}")


def block(sender: int, receiver: int, rows: int) -> torch.Tensor:
    """What `sender` has for `receiver` in an exchange of unequal parts: `rows` rows of two."""
    return values(torch.float32, "sum", sender, receiver, (rows, 2), 1)


def rows(sender: int, receiver: int) -> int:
    """How many; none among them."""
    return (sender * 2 + receiver * 3) % 5


@check(
    "results",
    says="all_gather takes tensors, all_to_all_single input_split_sizes and output_split_sizes of unequal sizes",
    cases=["all_to_all_single", "all_to_all", "all_gather"],
)
def uneven(context: Context, op: str) -> None:
    me, everyone = context.rank, range(context.world_size)
    sent = [block(me, rank, rows(me, rank)) for rank in everyone]
    receiver = 0 if op == "all_gather" else me  # what is gathered is the same for all
    expected = [block(rank, receiver, rows(rank, receiver)) for rank in everyone]
    for later in (False, True):
        output: torch.Tensor | None = None
        parts = [context.on_device(torch.zeros_like(each)) for each in expected]
        if op == "all_to_all":
            work = dist.all_to_all(parts, [context.on_device(each) for each in sent], async_op=later)
        elif op == "all_gather":
            work = dist.all_gather(parts, context.on_device(expected[me]), async_op=later)
        else:
            output = context.on_device(torch.zeros_like(torch.cat(expected)))
            counts = [len(each) for each in expected], [len(each) for each in sent]
            work = dist.all_to_all_single(output, context.on_device(torch.cat(sent)), *counts, async_op=later)
        if work is not None:
            work.wait()
        context.equal(torch.cat(parts) if output is None else output, torch.cat(expected), "result")


@check(
    "results",
    says="Random streams of collectives, sync and async, in several groups, give what each gives alone",
    cases=range(1, 11),
    min_ranks=2,
)
def stream(context: Context, seed: int) -> None:
    random = Random(seed)  # the same on every rank, so all make the same choices
    everyone = list(range(context.world_size))
    parts = [everyone, everyone[:-1], everyone[1:]]
    groups = [None, *(context.new_group(part) for part in parts[1:])]
    under_way: list[tuple[Call, Any]] = []
    for number in range(40):
        op, dtype = random.choice(list(OPS)), random.choice(EXPECTED_DTYPES)
        of = random.randrange(len(parts))
        root, count, later = (
            random.randrange(len(parts[of])),
            random.choice((0, 1, 5, 255, 20_011)),
            random.random() < 0.5,
        )
        reduction = random.choice(EXPECTED_REDUCE_OPS) if op in REDUCING else "sum"
        if context.rank in parts[of]:
            call = Call(context, op, DTYPES[dtype], reduction, root, (count,), "", parts[of], groups[of])
            work = call.issue(later)
            if later:
                under_way.append((call, work))
            else:
                call.verify(f", number {number}")
        for finished, work in [under_way.pop(0) for _ in range(min(len(under_way), random.randrange(3)))]:
            work.wait()
            finished.verify(f", async, before number {number}")
    for call, work in under_way:
        work.wait()
        call.verify(", async, at the end")


@check(
    "results",
    says="A leaf that requires a gradient is written as any other tensor, and so is a part of it",
    cases=["whole", "column"],
    optional=lambda part: part != "whole",
)
def leaf(context: Context, part: str) -> None:
    for later in (False, True):
        parameter = torch.nn.Parameter(context.full(8, context.rank + 1.0).reshape(4, 2))
        expected = parameter.detach().clone()
        with torch.no_grad():
            tensor, where = (parameter, expected) if part == "whole" else (parameter[:, 0], expected[:, 0])
            where.fill_(sum(range(1, context.world_size + 1)))
            work = dist.all_reduce(tensor, async_op=later)
        if work is not None:
            work.wait()
        context.equal(parameter, expected, f"the {part} of a leaf")


@check("results", says="The object collectives carry any picklable object", min_ranks=2)
def objects(context: Context) -> None:
    def of(rank: int) -> dict[str, Any]:
        return {"rank": rank, "text": "ab" * (rank + 1), "list": [rank] * 5}

    everyone = [of(rank) for rank in range(context.world_size)]
    gathered: list[Any] = [None] * context.world_size
    dist.all_gather_object(gathered, of(context.rank))
    context.expect(gathered == everyone, f"all_gather_object gave {gathered}")
    carried = everyone if context.rank == context.last else [None] * context.world_size
    dist.broadcast_object_list(carried, context.last)
    context.expect(carried == everyone, f"broadcast_object_list gave {carried}")
    received: list[Any] = [None]
    dist.scatter_object_list(received, everyone if context.rank == 0 else None, 0)
    context.expect(received[0] == of(context.rank), f"scatter_object_list gave {received[0]}")
    collected: list[Any] | None = [None] * context.world_size if context.rank == 0 else None
    dist.gather_object(of(context.rank), collected, 0)
    context.expect(collected in (None, everyone), f"gather_object gave {collected}")


@check(
    "results",
    says="Collectives issued together under the coalescing manager give what each gives alone",
    cases=["all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"],
    optional=True,
)
def coalesced(context: Context, op: str) -> None:
    for later in (False, True):
        calls = [Call(context, op, shape=(count,)) for count in (1, 33, 1000)]
        with _coalescing_manager(device=context.device, async_ops=later) as manager:
            for call in calls:
                call.issue()
        if later:
            manager.wait()
        for call in calls:
            call.verify(" coalesced")


@check(
    "results",
    says="Functional collectives return a new tensor and leave their input alone",
    cases=["all_reduce", "all_gather_tensor", "reduce_scatter_tensor", "broadcast", "all_to_all_single"],
)
def functional_form(context: Context, op: str) -> None:
    group = dist.distributed_c10d._get_default_group()
    everyone = [
        values(torch.float32, "sum", rank, 0, (6 * context.world_size,), 1) for rank in range(context.world_size)
    ]
    mine = context.on_device(everyone[context.rank])
    if op == "all_reduce":
        result, expected = functional.all_reduce(mine, "sum", group), reduced(everyone, "sum")
    elif op == "all_gather_tensor":
        result, expected = functional.all_gather_tensor(mine, 0, group), torch.cat(everyone)
    elif op == "broadcast":
        result, expected = functional.broadcast(mine, context.last, group), everyone[-1]
    elif op == "all_to_all_single":
        result = functional.all_to_all_single(mine, None, None, group)
        expected = torch.cat([each.chunk(context.world_size)[context.rank] for each in everyone])
    else:
        result = functional.reduce_scatter_tensor(mine, "sum", 0, group)
        expected = reduced(everyone, "sum").chunk(context.world_size)[context.rank]
    context.equal(result + 0, expected, op)  # what a functional collective returns waits when it is used
    context.equal(mine, everyone[context.rank], "input")


@check(
    "results",
    says="Functional collectives of several tensors give what each gives alone",
    cases=["all_gather_into_tensor", "reduce_scatter_tensor"],
    optional=True,
)
def functional_coalesced(context: Context, op: str) -> None:
    group = dist.distributed_c10d._get_default_group()
    size = context.world_size
    everyone = [[values(torch.float32, "sum", rank, n, (n * size, 3), 1) for n in (1, 5)] for rank in range(size)]
    mine = [context.on_device(tensor) for tensor in everyone[context.rank]]
    if op == "all_gather_into_tensor":
        results = functional.all_gather_into_tensor_coalesced(mine, group)
        expected = [torch.cat(list(tensors)) for tensors in zip(*everyone, strict=True)]
    else:
        results = functional.reduce_scatter_tensor_coalesced(mine, "sum", [0] * len(mine), group)
        sums = [reduced(tensors, "sum") for tensors in zip(*everyone, strict=True)]
        expected = [total.chunk(size)[context.rank] for total in sums]
    for result, tensor in zip(results, expected, strict=True):
        context.equal(result + 0, tensor, op)
