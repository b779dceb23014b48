"""How a communicator's call becomes nodes of a graph: an operator, and copies over the caller's tensors.

The operators (operators.py) return new tensors. They are copied over the caller's when the call, or wait(), ends;
functionalization removes the copies, except into the graph's inputs. Everything here is traced by Dynamo.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hxcomm.torchcomms.batch import P2POp, P2POpType
from hxcomm.torchcomms.comm import TorchComm
from hxcomm.torchcomms.reduce_op import RedOpType, ReduceOp

if TYPE_CHECKING:
    from hxcomm.torchcomms.options import BatchP2POptions

Hints = dict[str, str] | None
_NAMESPACE = torch.ops.hxcomm
blocks: list[list[Issued]] = []  # of coalesce() blocks that are open


class Issued:
    """The handle of what a stand-in has issued: as much of TorchWork as means anything in a graph."""

    def __init__(self, outputs: list[Tensor], results: list[Tensor], held: list[Tensor], ticket: Tensor | None) -> None:
        """held: read until the end; the graph must not use their memory for something else before."""
        self._outputs, self._results, self._held, self._ticket = outputs, results, held, ticket

    def wait(self) -> None:
        """The results are in the caller's tensors after it."""
        if self._ticket is not None:
            results = _NAMESPACE.wait(self._results, self._held, self._ticket)
            self._ticket = None
            for output, result in zip(self._outputs, results, strict=True):
                output.copy_(result)

    def wait_blocking(self) -> None:
        """As wait()."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether it was waited for."""
        return self._ticket is None


class AllIssued:
    """Several, as one to wait for."""

    def __init__(self, issued: list[Issued]) -> None:
        self._issued = issued

    def wait(self) -> None:
        """Waits for all."""
        for each in self._issued:
            each.wait()

    def wait_blocking(self) -> None:
        """As wait()."""
        self.wait()


class Scaled:
    """ReduceOp.PREMUL_SUM(tensor) in a graph, where a ReduceOp is a constant, and a tensor is none."""

    def __init__(self, factor: Tensor) -> None:
        self._type, self.factor = RedOpType.PREMUL_SUM, factor


def premul_sum(factor: float | Tensor) -> ReduceOp | Scaled:
    """In place of ReduceOp.PREMUL_SUM."""
    return Scaled(factor) if isinstance(factor, Tensor) else ReduceOp(RedOpType.PREMUL_SUM, factor)


class Batch:
    """BatchSendRecv in a graph."""

    def __init__(self, comm: TorchComm) -> None:
        self._comm = comm
        self.ops: list[P2POp] = []

    def send(self, tensor: Tensor, dst: int) -> None:
        """Adds a send."""
        self.ops.append(P2POp(P2POpType.SEND, tensor, dst))

    def recv(self, tensor: Tensor, src: int) -> None:
        """Adds a receive."""
        self.ops.append(P2POp(P2POpType.RECV, tensor, src))

    def issue(self, async_op: bool, options: BatchP2POptions | None = None) -> Issued:
        """All of them in one operator."""
        ops, self.ops = self.ops, []
        sent = [each.tensor for each in ops if each.type is P2POpType.SEND]
        received = [each.tensor for each in ops if each.type is P2POpType.RECV]
        # A rank to send to as it is, one to receive from as -1 - rank: the order of both matters.
        peers = [each.peer if each.type is P2POpType.SEND else -1 - each.peer for each in ops]
        hints = None if options is None else options.hints
        return issue(self._comm, "batch", sent, received, peers, None, async_op, hints, None, received)


def issue(
    comm: TorchComm,
    name: str,
    given: list[Tensor],
    like: list[Tensor],
    numbers: list[int],
    op: ReduceOp | Scaled | None,
    async_op: bool,
    hints: Hints,
    timeout: timedelta | None,
    outputs: list[Tensor],
) -> Issued:
    """One call. given, like and numbers are the operator's; outputs are the caller's tensors for its results."""
    comm._prepare_to_compile()  # type: ignore[attr-defined]  # stand_ins.py adds it
    words = [] if hints is None else [word for pair in hints.items() for word in pair]
    kind, factor, scale = "", None, None
    if op is not None:
        kind = op._type.name
        if isinstance(op.factor, Tensor):
            scale = op.factor
        elif op.factor is not None:
            factor = float(op.factor)
    results, ticket = getattr(_NAMESPACE, name)(
        comm, given, like, numbers, kind, factor, scale, async_op, words, timeout
    )
    issued = Issued(outputs, results, given, ticket if async_op else None)
    if async_op:
        if blocks:
            blocks[-1].append(issued)
        return issued
    for output, result in zip(outputs, results, strict=True):
        output.copy_(result)
    return issued
