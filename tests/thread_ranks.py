"""Ranks as threads of one process, without torch: each has its own segment, and they share real memory as processes do.

A rank that blocks releases the GIL; every call has a deadline of its own, so a deadlock is a CommTimeoutError with the
rank that was missed in it, not a hung test.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from exact import Array

from hxcomm import _core
from hxcomm.schedule.ops import OPS
from hxcomm.select import Layout, Planner

TIMEOUT_S = 30.0
JOIN_S = 170.0
_SEGMENT = 64 << 20  # address space of one rank
_nonces = iter(range(1, 1 << 30))


def call(
    op: str,
    dtype: str,
    input: Sequence[Array],
    output: Sequence[Array],
    *,
    reduce_op: str = "sum",
    root: int = -1,
    count: int | None = None,
    uneven: bool = False,
    factor: float = 1.0,
    device: str = "cpu",
    timeout_s: float = TIMEOUT_S,
) -> _core.Call:
    """A Call on arrays, which must outlive it. `count` is that of the first block where it is left out."""
    blocks = [*input, *output]
    return _core.Call(
        op=op,
        dtype=dtype,
        reduce_op=reduce_op,
        root=root if OPS[op].rooted else -1,
        input=[(array.ctypes.data, array.size) for array in input],
        output=[(array.ctypes.data, array.size) for array in output],
        count=count if count is not None else (blocks[0].size if blocks and not uneven else 0),
        uneven=uneven,
        factor=factor,
        device=device,
        timeout_s=timeout_s,
    )


class HxMemory:
    """Arrays in a rank's segment, which its peers reach: memory of device hx. All together at most `nbytes`."""

    def __init__(self, runtime: _core.Runtime, nbytes: int = 4 << 20) -> None:
        address = runtime.allocate(nbytes)
        self.nbytes, self._used = nbytes, 0
        self._bytes = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)

    def clear(self) -> None:
        self._used = 0

    def place(self, array: Array) -> Array:
        """A copy of an array, at a cache line."""
        at = self._used
        self._used = (at + array.nbytes + 63) // 64 * 64
        assert self._used <= self.nbytes, "an HxMemory is full"
        placed: Array = self._bytes[at : at + array.nbytes].view(array.dtype)
        placed[:] = array
        return placed


class Page:
    """The control page of a rank, found as any process with the memfd could: through /proc/self/fd."""

    def __init__(self, runtime: _core.Runtime, offset: int) -> None:
        for fd in Path("/proc/self/fd").iterdir():
            if not (fd.is_symlink() and str(fd.readlink()).startswith("/memfd:hxcomm")):
                continue
            memory = mmap.mmap(int(fd.name), 0)
            if runtime.nonce in memory[:64]:
                self.memory, self.offset = memory, offset
                return
        raise AssertionError("no segment of that runtime")

    def get(self, word: int) -> int:
        return struct.unpack_from("<Q", self.memory, self.offset + 8 * word)[0]

    def put(self, word: int, value: int) -> None:
        struct.pack_into("<Q", self.memory, self.offset + 8 * word, value)


class ThreadRanks:
    """`groups[r]` is rank r's end of a new group. Several may be made over the same runtimes.

    `runtimes` shares the segments of the given number of processes' ends among the ranks (large worlds: descriptors of
    all pairs would be the square of the ranks).
    """

    def __init__(
        self,
        world_size: int,
        *,
        algorithms: Mapping[str, str] | None = None,
        window_bytes: int = 4096,
        first_sequence: int = 1,
        transfer: Callable[..., Any] | None = None,
        runtimes: Sequence[_core.Runtime] | int | None = None,
        spin_ns: int = -1,
        compare_shapes: bool = False,
    ) -> None:
        if not isinstance(runtimes, Sequence):
            runtimes = [_core.Runtime(_SEGMENT) for _ in range(runtimes or world_size)]
        self.runtimes = runtimes
        self.world_size = world_size
        nonce = next(_nonces)
        home = [runtimes[rank % len(runtimes)] for rank in range(world_size)]
        self.groups = [
            _core.Group(
                home[rank],
                name="threads",
                rank=rank,
                world_size=world_size,
                label=f"rank {rank}",
                nonce=nonce,
                first_sequence=first_sequence,
                spin_ns=spin_ns,
                compare_shapes=compare_shapes,
            )
            for rank in range(world_size)
        ]
        for rank, group in enumerate(self.groups):
            for peer in range(world_size):
                if peer != rank:
                    group.connect(
                        rank=peer,
                        address=home[peer].address,
                        nonce=home[peer].nonce,
                        control_offset=self.groups[peer].control_offset,
                        label=f"rank {peer}",
                        timeout_ms=10_000,
                    )
            planner = Planner(rank, Layout(world_size), "threads", dict(algorithms or {}), window_bytes)
            group.start(planner=planner, transfer=transfer)

    def each(self, function: Callable[[int, _core.Group], Any]) -> list[Any]:
        """function(rank, group) in a thread a rank; what they returned. Raises the first rank's exception, if any."""
        outcomes = self.outcomes(function)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    def outcomes(self, function: Callable[[int, _core.Group], Any]) -> list[Any]:
        """As each(), with a rank's exception in the place of its result."""
        results: list[Any] = [None] * self.world_size

        def run(rank: int) -> None:
            try:
                results[rank] = function(rank, self.groups[rank])
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(JOIN_S)
            assert not thread.is_alive(), "a rank is blocked beyond every deadline"
        return results

    def all_reduce_works(self) -> bool:
        """Whether the group carries out an all_reduce right, on every rank."""

        def run(rank: int, group: _core.Group) -> bool:
            array = np.full(33, rank + 1, np.int32)
            group.run(call("all_reduce", "int32", [array], [array]))
            return bool((array == sum(range(self.world_size + 1))).all())

        return all(self.each(run))

    def __enter__(self) -> ThreadRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in self.groups:
            group.leave()
