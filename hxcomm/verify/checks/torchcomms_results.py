"""TorchComms: exact results of every operation, by dtype, reduce op, count, root and layout, sync and async."""

from __future__ import annotations

import itertools

import torch

from hxcomm import torchcomms
from hxcomm.verify.checks.results import LARGE, promise, register
from hxcomm.verify.collectives import LAYOUTS
from hxcomm.verify.communicators import OPS, REDUCING, ROOTED, CommCall
from hxcomm.verify.context import Context
from hxcomm.verify.registry import check

API = "torchcomms"


for each in OPS:
    says = promise(each, each in REDUCING)
    register(each, CommCall, reduces=each in REDUCING, rooted=each in ROOTED, says=says, api=API)


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
