"""What the tests of windows share: a communicator, tensors that windows take, and what a call raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from hxcomm import torchcomms
from hxcomm.torchcomms import ReduceOp, TorchComm


@contextmanager
def communicator(device: str, name: str, timeout_s: float = 20.0) -> Iterator[TorchComm]:
    comm = torchcomms.new_comm(
        "hxcomm", device, name, abort_process_on_timeout_or_error=False, timeout=timedelta(seconds=timeout_s)
    )
    try:
        yield comm
    finally:
        comm.finalize()


def zeros(comm: TorchComm, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that windows take, on the communicator's device."""
    with comm.mem_allocator:
        return torch.zeros(*size, dtype=dtype, device=comm.get_device())


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def works(comm: TorchComm) -> bool:
    """Whether the communicator carries an all_reduce out right."""
    ones = torch.ones(100, device=comm.get_device())
    comm.all_reduce(ones, ReduceOp.SUM, False)
    return bool((ones.cpu() == comm.get_size()).all())
