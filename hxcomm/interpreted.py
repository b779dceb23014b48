"""HXCOMM_EXECUTOR=python: the communicator's transfers done by the numpy interpreter instead of the C++ loop.

Waiting and publishing stay with the core; loads, reductions and stores are replaced. Slow: it exists to hold the two
executors against each other in a real group. Knows numpy and addresses; nothing of torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hxcomm.schedule import interpret


def _array(address: int, partial: bool, dtype: str, count: int) -> NDArray[Any]:
    stored, accumulated = interpret.DTYPES[dtype]
    kind = np.dtype(accumulated if partial else stored)
    memory = (ctypes.c_uint8 * (count * kind.itemsize)).from_address(address)
    array: NDArray[Any] = np.frombuffer(memoryview(memory).cast("B"), dtype=kind)
    return array


def transfer(
    reduce: bool,
    final: bool,
    dtype: str,
    reduce_op: str,
    world_size: int,
    count: int,
    sources: Sequence[tuple[int, bool, float]],
    destinations: Sequence[tuple[int, bool, float]],
) -> None:
    """One transfer on mapped memory: sources and destinations are (address, holds a partial result, factor)."""
    interpret.transfer(
        reduce,
        final,
        dtype,
        reduce_op,
        world_size,
        [(_array(address, partial, dtype, count), partial, factor) for address, partial, factor in sources],
        [_array(address, partial, dtype, count) for address, partial, _ in destinations],
    )
