"""CPU tensors that peers on this host can map: made in the process's shared segment, where tensors of hx lie, too."""

from __future__ import annotations

import functools
import threading
from types import TracebackType
from typing import Any

import torch

from hxcomm.device import lifecycle, registration


class MemAllocator:
    """`with allocator:` makes this thread's CPU tensors in memory that peers map; `allocator.empty(...)` one of them.

    They are ordinary CPU tensors, and freed as any. They count towards the memory of the chip that is this thread's
    current one (HXCOMM_HBM), and torch.OutOfMemoryError says when that is used up. RuntimeError where this process has
    no device hx, whose memory it is.
    """

    def __init__(self) -> None:
        self._entered = threading.local()

    def __enter__(self) -> MemAllocator:
        if (problem := registration.problem()) is not None:
            raise RuntimeError(f"memory that peers can map is that of device hx, and this process has none: {problem}")
        extension = lifecycle.extension()
        before = extension.device_exchange_kernel_chip(extension.device_current())
        self._chips().append(before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lifecycle.extension().device_exchange_kernel_chip(self._chips().pop())

    def _chips(self) -> list[int]:
        """What each `with` that this thread is in has to put back."""
        if not hasattr(self._entered, "chips"):
            self._entered.chips = []
        chips: list[int] = self._entered.chips
        return chips

    def empty(self, *size: Any, **options: Any) -> torch.Tensor:
        """torch.empty(*size, **options) on cpu, in memory that peers map."""
        with self:
            return torch.empty(*size, device="cpu", **options)

    def __repr__(self) -> str:
        return "hxcomm.torchcomms.get_mem_allocator('hxcomm')"


@functools.cache
def mem_allocator() -> MemAllocator:
    """That of backend hxcomm."""
    return MemAllocator()
