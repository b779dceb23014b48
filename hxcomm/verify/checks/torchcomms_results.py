"""TorchComms: exact results of every operation, by dtype, reduce op, count, root and layout, sync and async."""

from __future__ import annotations

import itertools

import torch

from hxcomm import torchcomms
from hxcomm.verify.checks.results import COUNTS, LARGE, may_refuse
from hxcomm.verify.collectives import DTYPES, LAYOUTS, REDUCE_OPS, meaningful
from hxcomm.verify.communicators import OPS, REDUCING, ROOTED, CommCall
from hxcomm.verify.context import Context
from hxcomm.verify.registry import check

API = "torchcomms"


def in_every_way(context: Context, op: str, dtype: str, reduce_op: str = "sum") -> None:
    roots = range(context.world_size) if op in ROOTED else (0,)
    for count, root, later in itertools.product(COUNTS, roots, (False, True)):
        CommCall(context, op, DTYPES[dtype], reduce_op, root, (count,)).run(later, f", root {root}")


def register(op: str) -> None:
    """The check of one operation, under its own name."""
    if op not in REDUCING:

        @check(
            "results",
            api=API,
            name=op,
            says=f"{op} delivers every element to its place",
            cases=DTYPES,
            optional=may_refuse,
        )
        def moving(context: Context, dtype: str) -> None:
            in_every_way(context, op, dtype)

        return
    pairs = [(dtype, reduce_op) for dtype in DTYPES for reduce_op in REDUCE_OPS if meaningful(dtype, reduce_op)]

    @check(
        "results",
        api=API,
        name=op,
        says=f"{op} reduces the elements of all ranks with the given ReduceOp",
        cases=[pair for pair in pairs if op == "all_reduce" or pair[0] == "float32" or pair[1] == "sum"],
        optional=may_refuse,
    )
    def reducing(context: Context, dtype: str, reduce_op: str) -> None:
        in_every_way(context, op, dtype, reduce_op)


for each in OPS:
    register(each)


@check("results", api=API, says="A message of any length is right, however it is cut into pieces", cases=OPS)
def large(context: Context, op: str) -> None:
    for later in (False, True):
        CommCall(context, op, root=context.last, shape=(LARGE,)).run(later)


@check(
    "results",
    api=API,
    says="A tensor's strides and storage offset are honoured; a backend may refuse strides",
    cases=itertools.product([op for op in OPS if not op.endswith("_v") and "_v_" not in op], LAYOUTS),
    optional=lambda op, layout: layout != "offset",
)
def layout(context: Context, op: str, layout: str) -> None:
    for later in (False, True):
        CommCall(context, op, root=context.last, shape=(4, 3), layout=layout).run(later, f", {layout}")


@check("results", api=API, says="A tensor of no elements is a tensor like others", cases=OPS)
def zero_elements(context: Context, op: str) -> None:
    for later in (False, True):
        CommCall(context, op, shape=(0,)).run(later)
    CommCall(context, op).run()


@check(
    "results",
    api=API,
    says="PREMUL_SUM takes a number or a tensor as factor, a different one on each rank",
    cases=["float", "tensor"],
    optional=True,
)
def premul_factor(context: Context, kind: str) -> None:
    factor = float(2 ** (context.rank + 1))
    given = factor if kind == "float" else context.on_device(torch.tensor(factor))
    tensor = context.full(33, context.rank + 1.0)
    context.comm.all_reduce(tensor, torchcomms.ReduceOp.PREMUL_SUM(given), False)
    total = sum(2.0 ** (rank + 1) * (rank + 1) for rank in range(context.world_size))
    context.equal(tensor, torch.full((33,), total), "result")


@check("results", api=API, says="A persistent all_gather fills the same output again and again", optional=True)
def persistent_all_gather(context: Context) -> None:
    output = context.full(10 * context.world_size, -1.0)
    handle = context.comm.all_gather_p_init(output)
    for turn in range(5):
        later = turn % 2 == 1
        work = context.comm.all_gather_p_exec(handle, context.full(10, context.rank + 10.0 * turn), later)
        work.wait()
        expected = torch.arange(context.world_size).repeat_interleave(10) + 10.0 * turn
        context.equal(output, expected.float(), f"output in turn {turn}")
    context.comm.all_gather_p_free(handle)
    context.raises(
        lambda: context.comm.all_gather_p_exec(handle, context.full(10, 1.0), False), "exec of a freed handle"
    )
