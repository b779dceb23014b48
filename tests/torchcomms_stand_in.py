"""What a backend written in Python meets in the torchcomms package: the interface of its plug-ins, and nothing else.

Facts taken from its sources (PyTorchCommBackend, register_backend, _load_backend): a backend is loaded by the entry
point of its name, made without arguments, then given init(device, name, options); an operation gets its operands and
async_op by position, never hints or a timeout, and returns None or an object with wait(); batches are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from enum import Enum
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import torch

RedOpType = Enum("RedOpType", "SUM PRODUCT MIN MAX BAND BOR BXOR PREMUL_SUM AVG")


class ReduceOp:
    """A kind; its factor is not shown to Python."""

    def __init__(self, kind: RedOpType) -> None:
        self.type = kind

    @staticmethod
    def PREMUL_SUM(factor: float) -> ReduceOp:  # noqa: N802
        return ReduceOp(RedOpType.PREMUL_SUM)


for _kind in RedOpType:
    if _kind is not RedOpType.PREMUL_SUM:
        setattr(ReduceOp, _kind.name, ReduceOp(_kind))


class CommOptions:
    def __init__(self) -> None:
        self.abort_process_on_timeout_or_error = True
        self.timeout = timedelta(seconds=600)
        self.high_priority_stream = False
        self.store = None
        self.enable_reconfigure = False
        self.hints: dict[str, str] = {}


class TorchCommBackend:
    def __init__(self) -> None:
        self.device_and_options: tuple[object, object] | None = None

    def _set_device_and_options(self, device: torch.device, options: CommOptions) -> None:
        self.device_and_options = device, options


_registered: dict[str, type] = {}


def register_backend(name: str, backend_class: type) -> None:
    if name in _registered:
        raise RuntimeError(f"Backend {name} already registered")
    _registered[name] = backend_class


def _is_backend_registered(name: str) -> bool:
    return name in _registered


class TorchWork:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def wait(self) -> None:
        if self._handle is not None:
            self._handle.wait()


class TorchComm:
    def __init__(self, backend: Any, options: CommOptions) -> None:
        self.backend, self.options = backend, options

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.backend, name)
        if name.startswith("get_") or name in ("finalize", "set_timeout"):
            return method

        def operation(*operands: Any, async_op: bool) -> TorchWork:
            return TorchWork(method(*operands, async_op))

        return operation

    def split(self, ranks: list[int], name: str) -> TorchComm | None:
        child = self.backend.split(ranks, name, self.options)
        return None if child is None else TorchComm(child, self.options)


def new_comm(backend: str, device: torch.device, name: str, **given: Any) -> TorchComm:
    if not _is_backend_registered(backend):
        (found,) = entry_points(group="torchcomms.backends", name=backend)
        found.load()
    options = CommOptions()
    for option, value in given.items():
        setattr(options, option, value)
    instance = _registered[backend]()
    instance.init(device, name, options)
    return TorchComm(instance, options)


def install() -> ModuleType:
    """Puts it under the name of the package, as if that were installed."""
    package = ModuleType("torchcomms")
    package._comms = sys.modules[__name__]  # type: ignore[attr-defined]
    sys.modules |= {"torchcomms": package, "torchcomms._comms": sys.modules[__name__]}
    return sys.modules[__name__]
