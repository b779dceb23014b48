"""HXCOMM_EXECUTOR=python: the communicator's transfers done by the numpy interpreter instead of the C++ loop.

Waiting and publishing stay with the core; only loads, reductions and stores are replaced. Slow; it exists to hold the
two executors against each other in a real group. Knows numpy and addresses; nothing of torch.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from hxcomm.schedule import interpret


def _bytes_at(address: int, nbytes: int) -> NDArray[np.uint8]:
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(memory, dtype=np.uint8)
