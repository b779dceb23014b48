"""A hook that finds NaN before a collective spreads it to every rank."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hxcomm.torchcomms.hook_args import OpName, PreHook, PreHookArgs, RemovableHandle
from hxcomm.torchcomms.hooks.operands import inputs, outputs


class NanFoundError(RuntimeError):
    """A tensor of a call holds NaN. The call was not started: nothing was sent, the communicator is usable."""


class _Communicator(Protocol):
    def get_name(self) -> str: ...
    def get_rank(self) -> int: ...
    def register_pre_hook(self, callback: PreHook) -> RemovableHandle: ...


class NanCheckHook:
    """Raises NanFoundError, naming rank, operation and element, before a call that would send a NaN.

    Args:
        check_inputs: what this rank's calls read. A broadcast is read on its root only.
        check_outputs: what they will write, too: useful only where outputs are meant to hold numbers already.

    Each call costs one pass over its tensors. The other ranks wait for a rank that has raised, as for any rank that did
    not come.
    """

    def __init__(self, check_inputs: bool = True, check_outputs: bool = False) -> None:
        self._check_inputs = check_inputs
        self._check_outputs = check_outputs
        self._handles: list[RemovableHandle] = []

    def register_with_comm(self, comm: _Communicator) -> None:
        """Checks every call of this communicator from now on."""

        def check(op: OpName, op_id: int, args: PreHookArgs) -> None:
            rank = comm.get_rank()
            for kind, tensors in (
                ("input", inputs(op, args, rank) if self._check_inputs else []),
                ("output", outputs(op, args, rank) if self._check_outputs else []),
            ):
                for index, tensor in enumerate(tensors):
                    name = kind if len(tensors) == 1 else f"{kind}[{index}]"
                    _check(tensor, f"{name} of {op.name} #{op_id} on rank {rank} of communicator {comm.get_name()!r}")

        self._handles.append(comm.register_pre_hook(check))

    def unregister(self) -> None:
        """Checks no communicator any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def is_enabled(self) -> bool:
        """Whether a communicator is registered."""
        return bool(self._handles)


def _check(tensor: Tensor, name: str) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # isnan is not defined for the 8-bit floats.
    nan = torch.isnan(tensor.float() if tensor.element_size() == 1 else tensor)
    if bool(nan.any()):
        places = nan.nonzero()
        raise NanFoundError(
            f"{name} holds NaN: {len(places)} of {tensor.numel()} elements, the first at {places[0].tolist()}"
        )
