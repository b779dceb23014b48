"""c10d backends with one fault each, for `hxcomm verify --import faulty_backends`: they carry out nothing."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future


class Wrong(dist.ProcessGroup):
    """Says that every all_reduce is done, and leaves the tensor as it was. Refuses to broadcast."""

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        future.set_result(tensors)
        return _create_work_from_future(future)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        raise NotImplementedError("this backend has no broadcast")


class Hanging(Wrong):
    """Never returns from an all_reduce. Writes its pid to the named pipe FAULTY_PIPE first, if there is one."""

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        if "FAULTY_PIPE" in os.environ:
            Path(os.environ["FAULTY_PIPE"]).write_text(f"{os.getpid()}\n")
        threading.Event().wait()
        return super().allreduce(tensors, options)


class Crashing(Wrong):
    """Dies in an all_reduce."""

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().allreduce(tensors, options)


class Unstartable(Wrong):
    """Cannot be made."""

    def __init__(self, rank: int, size: int) -> None:
        raise RuntimeError("there is no such device")


def register(name: str, kind: type[Wrong]) -> None:
    dist.Backend.register_backend(name, lambda _store, rank, size, _timeout: kind(rank, size), devices=["cpu"])


for each in (Wrong, Hanging, Crashing, Unstartable):
    register(each.__name__.lower(), each)
