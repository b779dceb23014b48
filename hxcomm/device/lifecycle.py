"""When the device is made: at the first use, not at `import torch`. Also what it counts.

torch calls `_lazy_init()` before it makes the first tensor; all that needs the device calls `init()`, C++ included.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from typing import Any, TypedDict

from hxcomm import environment

FALLBACK_MODES = {"run": 0, "warn": 1, "raise": 2}

_pid: int | None = None  # of the process that has made the device
_lock = threading.RLock()
_seed_at_start: int | None = None
_when_made: list[Callable[[], None]] = []


class OpCount(TypedDict):
    """How often an operator has run on hx: without boxing, and by the general way."""

    fast: int
    boxed: int


def init() -> None:
    """Makes the device. Harmless when called again; raises RuntimeError in a forked child of a process that has it."""
    global _pid
    if _pid == os.getpid():
        return
    with _lock:
        if _is_in_bad_fork():
            raise RuntimeError(
                "Cannot re-initialize hx in forked subprocess: the chips' memory is not mapped there. To use hx with "
                "multiprocessing, you must use the 'spawn' start method"
            )
        if _pid is not None:
            return
        from hxcomm import _C, bootstrap

        fallback = FALLBACK_MODES[environment.FALLBACK.get()]
        environment.warn_about_unknown()
        _C.device_start(bootstrap.runtime().memory())
        atexit.register(_finish)
        _C.device_fallback(fallback)
        _pid = os.getpid()
        if _seed_at_start is not None:
            for chip in range(environment.CHIPS.get()):
                _C.device_generator(chip).manual_seed(_seed_at_start)
        for callback in _when_made:
            callback()


def when_made(callback: Callable[[], None]) -> None:
    """Calls it right after the device has been made."""
    _when_made.append(callback)


def _finish() -> None:
    if is_initialized():  # a forked child has none of the threads
        extension().device_finish()


_lazy_init = init  # the name by which torch calls it


def is_initialized() -> bool:
    """Whether this process has made the device."""
    return _pid == os.getpid()


def _is_in_bad_fork() -> bool:
    return _pid is not None and _pid != os.getpid()


def seed_at_start(seed: int) -> None:
    """What the generators begin with: torch.manual_seed() does not make the device."""
    global _seed_at_start
    _seed_at_start = seed


def extension() -> Any:
    """hxcomm._C, with the device made."""
    init()
    from hxcomm import _C

    return _C


def op_counts() -> dict[str, OpCount]:
    """Operator -> how often it has run in this process, and how."""
    counts = extension().device_op_counts().items()
    return {name: OpCount(fast=fast, boxed=boxed) for name, (fast, boxed) in sorted(counts)}


def output_copies() -> int:
    """Results of operations that had to be copied into a chip's memory. 0, unless a kernel allocates in a thread."""
    return int(extension().device_output_copies())


def segment_offset(tensor: Any) -> int | None:
    """Where the tensor's memory begins in this process's shared segment, as peers address it; None: not on a chip."""
    nbytes = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    offset = int(extension().device_segment_offset(tensor.data_ptr(), nbytes))
    return None if offset < 0 else offset
