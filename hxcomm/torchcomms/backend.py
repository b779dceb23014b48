"""Backends that somebody else wrote: the class they derive from, and where `new_comm` finds them.

A backend supplies transport and execution. Validation, hooks, recording and the tracking of work belong to TorchComm
and cost a backend nothing. A backend is registered, or installed with an entry point of the group "torchcomms.backends"
whose module registers it (or which is the class itself). Does not know hxcomm's own backend beyond its name.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch

from hxcomm.torchcomms import options as call_options
from hxcomm.torchcomms import validation
from hxcomm.torchcomms.batch import P2POp, P2POpType
from hxcomm.torchcomms.hook_args import OpName
from hxcomm.torchcomms.options import CommOptions

NATIVE = "hxcomm"
ENTRY_POINT_GROUP = "torchcomms.backends"

# The class of the `options` argument of each operation, for backends that take one.
_OPTIONS: dict[str, type[call_options.CallOptions]] = {
    "send": call_options.SendOptions,
    "recv": call_options.RecvOptions,
    "broadcast": call_options.BroadcastOptions,
    "all_reduce": call_options.AllReduceOptions,
    "reduce": call_options.ReduceOptions,
    "all_gather": call_options.AllGatherOptions,
    "all_gather_v": call_options.AllGatherOptions,
    "all_gather_single": call_options.AllGatherSingleOptions,
    "reduce_scatter": call_options.ReduceScatterOptions,
    "reduce_scatter_v": call_options.ReduceScatterOptions,
    "reduce_scatter_single": call_options.ReduceScatterSingleOptions,
    "all_to_all_single": call_options.AllToAllSingleOptions,
    "all_to_all_v_single": call_options.AllToAllvSingleOptions,
    "all_to_all": call_options.AllToAllOptions,
    "barrier": call_options.BarrierOptions,
    "scatter": call_options.ScatterOptions,
    "gather": call_options.GatherOptions,
    "gather_single": call_options.GatherSingleOptions,
    "batch_op_issue": call_options.BatchP2POptions,
}


class TorchCommBackend:
    """Base of every backend written in Python. `new_comm` makes one with no arguments, then calls init.

    An operation takes TorchComm's operands in the same order and async_op, and last, where the method names it,
    `options` (of the operation's class: timeout and hints). It returns None when it is done, else an object with
    wait(); is_completed() is asked where it exists. Tensors have been checked: device, dtypes, counts, root, peer,
    and that they are dense and contiguous.
    batch_op_issue(ops, async_op) takes a list of P2POp, in any order and both directions.
    What a backend does not define raises NotImplementedError naming backend and operation.
    """

    _device: torch.device | None = None
    _options: CommOptions | None = None

    def init(self, device: torch.device, name: str, options: CommOptions) -> None:
        """Joins the group. options.store is never None: the store of this communicator alone."""
        raise self._missing("init")

    def finalize(self) -> None:
        """Leaves the group and frees what it holds."""
        raise self._missing("finalize")

    def get_rank(self) -> int:
        raise self._missing("get_rank")

    def get_size(self) -> int:
        raise self._missing("get_size")

    def get_backend_name(self) -> str:
        return type(self).__name__

    def get_backend_version(self) -> str:
        return "unknown"

    def get_comm_name(self) -> str:
        raise self._missing("get_comm_name")

    def get_device(self) -> torch.device | None:
        return self._device

    def get_options(self) -> CommOptions | None:
        return self._options

    def _set_device_and_options(self, device: torch.device, options: CommOptions) -> None:
        """What the shared layer knows of the backend: called before init, and by a split for what it returns."""
        self._device, self._options = device, options

    def split(self, ranks: list[int], name: str, options: CommOptions) -> TorchCommBackend | None:
        """The backend of a group of these ranks, in this order; None where this rank is no member."""
        raise self._missing("split")

    def set_timeout(self, timeout: timedelta) -> None:
        raise self._missing("set_timeout")

    def new_window(self, tensor: torch.Tensor | None = None) -> Any:
        raise self._missing("new_window")

    def abort(self) -> None:
        """Ends all pending work, from any thread, without waiting."""
        raise self._missing("abort")

    def get_mem_allocator(self) -> Any:
        raise self._missing("get_mem_allocator")

    def _missing(self, operation: str) -> NotImplementedError:
        try:
            name = self.get_backend_name()
        except NotImplementedError:
            name = type(self).__name__
        return NotImplementedError(
            f"backend {name!r} does not implement {operation}: {type(self).__qualname__} must define it"
        )


def _undefined(operation: str) -> Any:
    def method(self: TorchCommBackend, *operands: Any, **more: Any) -> Any:
        raise self._missing(operation)

    method.__name__ = operation
    method.__qualname__ = f"TorchCommBackend.{operation}"
    method.__doc__ = f"TorchComm.{operation}; see the class."
    return method


for _operation in _OPTIONS:
    setattr(TorchCommBackend, _operation, _undefined(_operation))

_registered: dict[str, type[TorchCommBackend]] = {}
_lock = threading.Lock()


def register_backend(name: str, backend_class: type[TorchCommBackend]) -> None:
    """Makes `new_comm(name, ...)` run backend_class.

    Raises TypeError where it is no TorchCommBackend, ValueError where the name is taken by another class.
    """
    if not (isinstance(backend_class, type) and issubclass(backend_class, TorchCommBackend)):
        raise TypeError(
            f"register_backend({name!r}, ...) takes a class derived from TorchCommBackend, got {backend_class!r}"
        )
    with _lock:
        if name == NATIVE or _registered.get(name, backend_class) is not backend_class:
            holder = "hxcomm itself" if name == NATIVE else _registered[name].__qualname__
            raise ValueError(f"backend {name!r} is already registered by {holder}; choose another name")
        _registered[name] = backend_class


def _is_backend_registered(name: str) -> bool:
    """Whether new_comm would find this backend without loading an entry point."""
    return name == NATIVE or name in _registered


def is_backend_built(backend: str) -> bool:
    """Whether new_comm can be asked for this backend: ours, registered, or installed. Loads nothing."""
    return backend in built_backends()


def built_backends() -> list[str]:
    """The names that new_comm takes, ours first. Loads nothing."""
    installed = sorted(each.name for each in _installed())
    return list(dict.fromkeys([NATIVE, *_registered, *installed]))


def _installed() -> tuple[EntryPoint, ...]:
    # Our own entry of the group is the plug-in for torchcomms, which is another package: not a backend here.
    return tuple(each for each in entry_points(group=ENTRY_POINT_GROUP) if each.name != NATIVE)


def backend_class(name: str) -> type[TorchCommBackend]:
    """The class registered under this name; loads an entry point where there is none.

    Raises ModuleNotFoundError listing the known names, ImportError where the entry point cannot be loaded, TypeError
    where it registers nothing.
    """
    if name not in _registered:
        _load_backend(name)
    return _registered[name]


def _load_backend(backend: str) -> None:
    """Loads the entry point of a backend, which registers it. Does nothing for one that is registered."""
    if _is_backend_registered(backend):
        return
    found = [each for each in _installed() if each.name == backend]
    if not found:
        raise ModuleNotFoundError(
            f"no backend {backend!r}: known are {', '.join(built_backends())}. Register one with register_backend(), "
            f"or install a package with an entry point {backend!r} in the group {ENTRY_POINT_GROUP!r}"
        )
    try:
        loaded = found[0].load()
    except Exception as error:
        raise ImportError(
            f"backend {backend!r}: its entry point {found[0].value!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if isinstance(loaded, type) and issubclass(loaded, TorchCommBackend):
        register_backend(backend, loaded)
    if not _is_backend_registered(backend):
        raise TypeError(
            f"backend {backend!r}: its entry point {found[0].value!r} registered nothing under this name, and is no "
            "class derived from hxcomm.torchcomms.TorchCommBackend"
        )


def get_mem_allocator(backend: str) -> Any:
    """The allocator whose memory this backend's windows and zero-copy paths take."""
    if backend == NATIVE:
        from hxcomm.torchcomms.mem_allocator import mem_allocator  # which maps memory: only where it is asked for

        return mem_allocator()
    return backend_class(backend)().get_mem_allocator()


_takes: dict[tuple[type, str], bool] = {}  # inspecting a signature takes 10 us: once for each class and operation


def _takes_options(backend: type[TorchCommBackend], operation: str) -> bool:
    known = _takes.get((backend, operation))
    if known is None:
        parameters = inspect.signature(getattr(backend, operation)).parameters.values()
        known = any(each.name == "options" or each.kind is each.VAR_KEYWORD for each in parameters)
        _takes[backend, operation] = known
    return known


class PlugIn:
    """The calls of one communicator that somebody else's backend carries out: checked here, then passed on."""

    def __init__(self, backend: TorchCommBackend, device: torch.device) -> None:
        """backend: one that has joined its group."""
        self.backend = backend
        self.rank, self.size = backend.get_rank(), backend.get_size()
        self._where: dict[str, Any] = {"rank": self.rank, "size": self.size, "device": device}

    @classmethod
    def create(cls, name: str, *, comm_name: str, device: torch.device, options: CommOptions) -> PlugIn:
        """A new backend of this name, joined. options.store is the part of the store that belongs to comm_name."""
        backend = backend_class(name)()
        backend._set_device_and_options(device, options)
        backend.init(device, comm_name, options)
        return cls(backend, device)

    def call(
        self,
        op: OpName,
        operands: Sequence[Any],
        async_op: bool,
        hints: Mapping[str, str] | None,
        timeout: timedelta | None,
    ) -> Any:
        """Carries the operation out (None) or starts it (an object with wait())."""
        validation.check(op, operands, **self._where)
        return self._pass_on(op.name, operands, async_op, hints, timeout)

    def batch(
        self,
        sends: Sequence[bool],
        tensors: Sequence[torch.Tensor],
        peers: Sequence[int],
        async_op: bool,
        hints: Mapping[str, str] | None,
        timeout: timedelta | None,
    ) -> Any:
        """Starts all of them at once; the backend gets one list of P2POp."""
        kinds = [P2POpType.SEND if send else P2POpType.RECV for send in sends]
        ops = [P2POp(kind, tensor, peer) for kind, tensor, peer in zip(kinds, tensors, peers, strict=True)]
        validation.check_batch(ops, **self._where)
        return self._pass_on("batch_op_issue", [ops], async_op, hints, timeout)

    def split(self, ranks: Sequence[int], name: str, options: CommOptions) -> PlugIn | None:
        """The same for a group of these ranks, in this order; None where this rank is no member."""
        validation.check_split(ranks, rank=self._where["rank"], size=self._where["size"])
        backend = self.backend.split(list(ranks), name, options)
        if backend is None:
            return None
        backend._set_device_and_options(self._where["device"], options)
        return PlugIn(backend, self._where["device"])

    def _pass_on(
        self,
        operation: str,
        operands: Sequence[Any],
        async_op: bool,
        hints: Mapping[str, str] | None,
        timeout: timedelta | None,
    ) -> Any:
        """Raises ValueError where the call has hints or a timeout and the backend's method takes no options: dropping
        them silently would run another call than the one asked for."""
        method = getattr(self.backend, operation)
        if _takes_options(type(self.backend), operation):
            return method(*operands, async_op, options=_OPTIONS[operation].of(timeout, hints))
        if hints or timeout is not None:
            given = " and ".join(f"{name}={value}" for name, value in (("hints", hints), ("timeout", timeout)) if value)
            raise ValueError(
                f"backend {self.backend.get_backend_name()!r} takes no options for {operation}, so {given} cannot be "
                "passed on: leave it out, or give the method an `options` parameter"
            )
        return method(*operands, async_op)
