"""hxcomm: collective communication for a simulated ring of AI chips.

`torch.distributed` programs use it with `backend="hxcomm"` and no import: torch calls `_autoload` by an entry point.
Importing this package is cheap and imports no torch; what needs torch is imported when it is asked for.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from hxcomm import build_check

if TYPE_CHECKING:
    from hxcomm.algorithms import register as register_algorithm
    from hxcomm.c10d import Options, monitored_barrier, statistics
    from hxcomm.errors import (
        AbortedError,
        AuthError,
        CommTimeoutError,
        InitError,
        MismatchError,
        PeerFailedError,
    )
    from hxcomm.select import register_selector
    from hxcomm.torchcomms import ReduceOp, TorchComm, new_comm

__version__ = "0.1.0"
__all__ = [
    "AbortedError",
    "AuthError",
    "CommTimeoutError",
    "InitError",
    "MismatchError",
    "Options",
    "PeerFailedError",
    "ReduceOp",
    "TorchComm",
    "monitored_barrier",
    "new_comm",
    "register_algorithm",
    "register_selector",
    "statistics",
]

_HOMES = {
    "AbortedError": "hxcomm.errors",
    "AuthError": "hxcomm.errors",
    "CommTimeoutError": "hxcomm.errors",
    "InitError": "hxcomm.errors",
    "MismatchError": "hxcomm.errors",
    "PeerFailedError": "hxcomm.errors",
    "Options": "hxcomm.c10d",
    "monitored_barrier": "hxcomm.c10d",
    "statistics": "hxcomm.c10d",
    "register_selector": "hxcomm.select",
    "ReduceOp": "hxcomm.torchcomms",
    "TorchComm": "hxcomm.torchcomms",
    "new_comm": "hxcomm.torchcomms",
}

if (_problem := build_check.problem()) is not None:
    warnings.warn(_problem, RuntimeWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    import importlib

    if name == "register_algorithm":
        return importlib.import_module("hxcomm.algorithms").register
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hxcomm' has no attribute {name!r}")


def _autoload() -> None:
    """Entry point `torch.backends`: runs in `import torch`, registers device and backend, and has engines find them.

    Never raises, since torch would turn it into a failed `import torch`; except with HXCOMM_CPU=1, where a program that
    went on would quietly use another backend.
    """
    steps = {
        "device": _register_device,  # first: the backend serves it
        "backend": _register_backend,
        "operators": _register_operators,
        "engines": _watch_engines,
    }
    for what, register in steps.items():
        try:
            register()
        except Exception as error:
            if _is_asked_for():
                raise
            warnings.warn(f"hxcomm could not register its {what}: {error}", RuntimeWarning, stacklevel=2)


def _register_device() -> None:
    from hxcomm.device import registration

    if registration.register():
        from hxcomm.device import lifecycle

        lifecycle.when_made(_start_clock)


def _start_clock() -> None:
    from hxcomm import environment

    if environment.SIM.get() is not None:
        from hxcomm.virtual import clock

        clock.start()


def _register_backend() -> None:
    from hxcomm.c10d import register_backend

    register_backend()


def _register_operators() -> None:
    from hxcomm import linear_all_reduce

    linear_all_reduce.register()


def _watch_engines() -> None:
    from hxcomm.engines import watching

    watching.watch()


def _is_asked_for() -> bool:
    from hxcomm import environment

    try:
        return environment.CPU.get()
    except ValueError:  # neither 0 nor 1
        return True
