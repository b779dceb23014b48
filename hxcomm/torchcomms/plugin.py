"""hxcomm as a backend of the torchcomms package, where that is installed: `torchcomms.new_comm("hxcomm", ...)`.

The entry point "hxcomm" of the group "torchcomms.backends"; torchcomms loads it by name, and loading registers a class
whose calls go to a TorchComm of ours, so results, errors and speed are ours. Where torchcomms was installed with its
headers when hxcomm was built, that is a class in C++ (csrc/torchcomms/). Everywhere else it is the one below, which
gets from torchcomms no more than the operands. So this path has:

- the collectives, send and recv, split, the communicator's timeout, hints given to new_comm;
- no timeout or hints of one call: torchcomms drops them before they arrive;
- no PREMUL_SUM, unless this torchcomms lets Python read the factor (`ReduceOp.factor`): NotImplementedError;
- no batches, abort or reconfigure: torchcomms itself refuses them.

Windows and the persistent all_gather torchcomms refuses on both. A program that needs these imports hxcomm.torchcomms
instead, which is the same API with all of it.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch

import hxcomm.torchcomms as ours
from hxcomm.torchcomms.backend import NATIVE

OPERATIONS = (
    "send", "recv", "broadcast", "all_gather", "all_gather_v", "all_gather_single", "all_to_all_single",
    "all_to_all_v_single", "all_to_all", "barrier", "scatter", "gather", "gather_single",
)  # fmt: skip
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_v", "reduce_scatter_single")


def _reduction(op: Any) -> ours.ReduceOp:
    """Ours for theirs, which has the same kinds by name."""
    kind = op.type.name
    if kind != "PREMUL_SUM":
        reduction: ours.ReduceOp = getattr(ours.ReduceOp, kind)
        return reduction
    factor = getattr(op, "factor", None)
    if factor is None:
        raise NotImplementedError(
            "PREMUL_SUM on backend 'hxcomm' of torchcomms: this version of torchcomms does not show a Python backend "
            "the factor. Multiply before a SUM, or use hxcomm.torchcomms.new_comm, which has PREMUL_SUM"
        )
    return ours.ReduceOp.PREMUL_SUM(factor)


def _operation(name: str) -> Any:
    def method(self: Any, *arguments: Any) -> Any:
        *operands, async_op = arguments
        if name in REDUCTIONS:
            operands[-1] = _reduction(operands[-1])
        work = getattr(self._comm, name)(*operands, async_op=async_op)
        return work if async_op else None

    method.__name__ = name
    method.__doc__ = f"As TorchComm.{name}."
    return method


def make_backend(base: type) -> type:
    """The class that torchcomms registers; base: its TorchCommBackend."""

    def init(self: Any, device: torch.device, name: str, options: Any) -> None:
        self._comm = ours.new_comm(
            NATIVE,
            device,
            name,
            # torchcomms leaves what an error does to the process to the backend.
            abort_process_on_timeout_or_error=options.abort_process_on_timeout_or_error,
            timeout=options.timeout,
            store=options.store,
            hints=dict(options.hints),
        )

    def split(self: Any, ranks: list[int], name: str, options: Any) -> Any:
        child = self._comm.split(list(ranks), name, timeout=options.timeout, hints=dict(options.hints))
        if child is None:
            return None
        backend = type(self)()
        backend._comm = child
        if hasattr(backend, "_set_device_and_options"):
            backend._set_device_and_options(child.get_device(), options)
        return backend

    def set_timeout(self: Any, timeout: timedelta) -> None:
        self._comm.set_timeout(timeout)

    methods: dict[str, Any] = {name: _operation(name) for name in (*OPERATIONS, *REDUCTIONS)}
    methods |= {
        "__doc__": "hxcomm under torchcomms; see hxcomm.torchcomms.plugin for what this path cannot pass on.",
        "__module__": __name__,
        "init": init,
        "split": split,
        "set_timeout": set_timeout,
        "finalize": lambda self: self._comm.finalize(),
        "get_rank": lambda self: self._comm.get_rank(),
        "get_size": lambda self: self._comm.get_size(),
        "get_comm_name": lambda self: self._comm.get_name(),
        "get_backend_name": lambda self: NATIVE,
        "get_backend_version": lambda self: self._comm.get_backend_version(),
    }
    return type("HxcommBackend", (base,), methods)


def register() -> None:
    """Registers hxcomm with the installed torchcomms; does nothing where that is this package under another name.

    torch.distributed must know the name, too, before its `use_torchcomms` is switched on: importing hxcomm.torchcomms
    has seen to that.
    """
    theirs: Any = import_module("torchcomms._comms")
    if theirs.TorchCommBackend is ours.TorchCommBackend or theirs._is_backend_registered(NATIVE):
        return
    try:
        import_module("hxcomm._torchcomms")  # the C++ class registers itself
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            warnings.warn(
                f"hxcomm was built for another version of torchcomms and uses its Python plug-in instead ({error}); "
                "reinstall hxcomm to have per-call options, batches, abort and reconfigure there",
                stacklevel=2,
            )
        theirs.register_backend(NATIVE, make_backend(theirs.TorchCommBackend))


register()
