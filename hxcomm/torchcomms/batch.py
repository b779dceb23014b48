"""Sends and receives that begin together, so their order cannot deadlock."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

import torch

from hxcomm.torchcomms.options import NO_TIMEOUT, BatchP2POptions
from hxcomm.torchcomms.work import TorchWork

if TYPE_CHECKING:
    from hxcomm.torchcomms.comm import TorchComm


class P2POpType(Enum):
    """Which way a P2POp goes."""

    SEND = auto()
    RECV = auto()


class P2POp:
    """One send to, or receive from, `peer`."""

    __slots__ = ("peer", "tensor", "type")

    def __init__(self, type: P2POpType, tensor: torch.Tensor, peer: int) -> None:
        self.type, self.tensor, self.peer = type, tensor, peer

    def __repr__(self) -> str:
        return f"P2POp({self.type.name}, {list(self.tensor.shape)}, peer={self.peer})"


class BatchSendRecv:
    """Collects sends and receives; `issue` starts all of them, in any order and both directions at once.

    Messages between two ranks are matched in the order in which each side added them.
    """

    ops: list[P2POp]
    """What issue() will start."""

    def __init__(self, comm: TorchComm) -> None:
        self._comm = comm
        self.ops = []

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Adds a send. Nothing is moved before issue()."""
        self.ops.append(P2POp(P2POpType.SEND, tensor, dst))

    def recv(self, tensor: torch.Tensor, src: int) -> None:
        """Adds a receive. Nothing is moved before issue()."""
        self.ops.append(P2POp(P2POpType.RECV, tensor, src))

    def issue(self, async_op: bool, options: BatchP2POptions | None = None) -> TorchWork:
        """Starts all, waits for them unless async_op, and empties the batch. One handle for all.

        ValueError, and nothing is sent, where a peer is out of range, or sends to this rank itself are not as many as
        receives from it. MismatchError on both sides where a message does not fit its receive.
        """
        ops, self.ops = self.ops, []
        options = options or BatchP2POptions()
        timeout = None if options.timeout == NO_TIMEOUT else options.timeout
        return self._comm._issue_batch(ops, async_op, options.hints, timeout)
