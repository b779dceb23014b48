"""Every operation of the TorchComms communicator: how it is called, and what must come out.

Inputs, expected values and layouts are those of collectives.py; only the calls differ. Knows nothing of hxcomm's own
backend: `context.comm` is a communicator of whichever backend is being held against the checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hxcomm import torchcomms
from hxcomm.verify.collectives import PREMUL_FACTOR, Call, reduced

REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_v")
ROOTED = ("reduce", "broadcast", "gather", "gather_single", "scatter")


def reduce_op(name: str) -> torchcomms.ReduceOp:
    if name == "premul_sum":
        return torchcomms.ReduceOp.PREMUL_SUM(PREMUL_FACTOR)
    op: torchcomms.ReduceOp = getattr(torchcomms.ReduceOp, name.upper())
    return op


class CommCall(Call):
    """As Call, issued on the communicator `comm` (default: the one over all ranks), which is in `group`."""

    @property
    def comm(self) -> Any:
        return self.group or self.context.comm

    def issue(self, async_op: bool = False, **more: Any) -> Any:
        return OPS[self.op](self)(async_op, **more)


Issue = Callable[..., Any]


def _all_reduce(call: CommCall) -> Issue:
    tensor = call.writing(call.input_of(call.me), reduced(call.inputs(), call.reduce_op), "result")
    return lambda later, **more: call.comm.all_reduce(tensor, reduce_op(call.reduce_op), later, **more)


def _reduce(call: CommCall) -> Issue:
    content = call.input_of(call.me)
    expected = reduced(call.inputs(), call.reduce_op) if call.at_root else content
    tensor = call.writing(content, expected, "result")
    return lambda later, **more: call.comm.reduce(tensor, call.root, reduce_op(call.reduce_op), later, **more)


def _broadcast(call: CommCall) -> Issue:
    tensor = call.writing(call.input_of(call.me), call.input_of(call.root), "result")
    return lambda later, **more: call.comm.broadcast(tensor, call.root, later, **more)


def _outputs(call: CommCall) -> list[torch.Tensor]:
    return [call.writing(None, part, f"block of rank {rank}") for rank, part in enumerate(call.inputs())]


def _parts(call: CommCall) -> list[torch.Tensor]:
    return [call.reading(call.input_of(call.me, block), f"input {block}") for block in range(call.size)]


def _whole(call: CommCall) -> torch.Tensor:
    return call.reading(torch.cat([call.input_of(call.me, block) for block in range(call.size)]), "input")


def _all_gather(call: CommCall) -> Issue:
    tensor, outputs = call.reading(call.input_of(call.me), "input"), _outputs(call)
    return lambda later, **more: call.comm.all_gather(outputs, tensor, later, **more)


def _all_gather_single(call: CommCall) -> Issue:
    tensor = call.reading(call.input_of(call.me), "input")
    output = call.writing(None, torch.cat(call.inputs()), "result")
    return lambda later, **more: call.comm.all_gather_single(output, tensor, later, **more)


def _uneven(content: torch.Tensor, rank: int) -> torch.Tensor:
    """What rank contributes where counts differ: all elements but the last `rank`."""
    return content.flatten()[: max(0, content.numel() - rank)]


def _all_gather_v(call: CommCall) -> Issue:
    tensor = call.reading(_uneven(call.input_of(call.me), call.me), "input")
    outputs = [
        call.writing(None, _uneven(part, rank), f"block of rank {rank}") for rank, part in enumerate(call.inputs())
    ]
    return lambda later, **more: call.comm.all_gather_v(outputs, tensor, later, **more)


def _reduce_scatter(call: CommCall) -> Issue:
    output = call.writing(None, reduced(call.inputs(call.me), call.reduce_op), "result")
    parts = _parts(call)
    return lambda later, **more: call.comm.reduce_scatter(output, parts, reduce_op(call.reduce_op), later, **more)


def _reduce_scatter_v(call: CommCall) -> Issue:
    expected = _uneven(reduced(call.inputs(call.me), call.reduce_op), call.me)
    output = call.writing(None, expected, "result")
    parts = [
        call.reading(_uneven(call.input_of(call.me, block), block), f"input {block}") for block in range(call.size)
    ]
    return lambda later, **more: call.comm.reduce_scatter_v(output, parts, reduce_op(call.reduce_op), later, **more)


def _reduce_scatter_single(call: CommCall) -> Issue:
    output = call.writing(None, reduced(call.inputs(call.me), call.reduce_op), "result")
    whole = _whole(call)
    return lambda later, **more: call.comm.reduce_scatter_single(
        output, whole, reduce_op(call.reduce_op), later, **more
    )


def _all_to_all(call: CommCall) -> Issue:
    parts = _parts(call)
    outputs = [call.writing(None, call.input_of(rank, call.me), f"block of rank {rank}") for rank in range(call.size)]
    return lambda later, **more: call.comm.all_to_all(outputs, parts, later, **more)


def _all_to_all_single(call: CommCall) -> Issue:
    whole = _whole(call)
    output = call.writing(None, torch.cat([call.input_of(rank, call.me) for rank in range(call.size)]), "result")
    return lambda later, **more: call.comm.all_to_all_single(output, whole, later, **more)


def _all_to_all_v_single(call: CommCall) -> Issue:
    """Rank r sends rank s its first (r + s) % 3 elements, or as many as there are."""

    def rows(a: int, b: int) -> int:
        return min((a + b) % 3, call.input_of(0).numel())

    def part(sender: int, receiver: int) -> torch.Tensor:
        return call.input_of(sender, receiver).flatten()[: rows(sender, receiver)]

    sent = call.reading(torch.cat([part(call.me, rank) for rank in range(call.size)]), "input")
    output = call.writing(None, torch.cat([part(rank, call.me) for rank in range(call.size)]), "result")
    splits = [rows(call.me, rank) for rank in range(call.size)]
    return lambda later, **more: call.comm.all_to_all_v_single(output, sent, splits, splits, later, **more)


def _scatter(call: CommCall) -> Issue:
    output = call.writing(None, call.input_of(call.root, call.me), "result")
    parts = _parts(call) if call.at_root else []
    return lambda later, **more: call.comm.scatter(output, parts, call.root, later, **more)


def _gather(call: CommCall) -> Issue:
    tensor = call.reading(call.input_of(call.me), "input")
    outputs = _outputs(call) if call.at_root else []
    return lambda later, **more: call.comm.gather(outputs, tensor, call.root, later, **more)


def _gather_single(call: CommCall) -> Issue:
    tensor = call.reading(call.input_of(call.me), "input")
    whole = torch.cat(call.inputs())
    # Others pass an output, too, which nobody writes.
    output = call.writing(torch.ones_like(whole), whole if call.at_root else torch.ones_like(whole), "result")
    return lambda later, **more: call.comm.gather_single(output, tensor, call.root, later, **more)


OPS: dict[str, Callable[[CommCall], Issue]] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_gather_v": _all_gather_v,
    "all_gather_single": _all_gather_single,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_v": _reduce_scatter_v,
    "reduce_scatter_single": _reduce_scatter_single,
    "all_to_all": _all_to_all,
    "all_to_all_single": _all_to_all_single,
    "all_to_all_v_single": _all_to_all_v_single,
    "scatter": _scatter,
    "gather": _gather,
    "gather_single": _gather_single,
}
