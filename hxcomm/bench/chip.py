"""A chip file of this machine: ranks that share memory, each with the core it runs on, as chips at one switch.

    torchrun --nproc-per-node 2 -m hxcomm.bench.chip --out here.toml        (or: hxcomm chips measure --out here.toml)

A pull is a load and a push a store of the core itself, so a chip's port to the switch is its core's loads and stores,
and what it carries is measured by an exchange: every rank adds to its share of all peers' buffers at once, as a rank of
a two-shot all_reduce does. Adding is in that rate. Nothing here runs an all_reduce of the sizes that are predicted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hxcomm import _core
from hxcomm.bench import chip_arguments
from hxcomm.bench.arguments import UsageError
from hxcomm.bench.chip_arguments import Settings
from hxcomm.bench.operations import case_of
from hxcomm.bench.probes import Probes
from hxcomm.bench.session import TIMEOUT, under_torchrun
from hxcomm.bench.timing import over_ranks, sample
from hxcomm.c10d import BACKEND, register_backend

ROUNDS = 12
CALLS = 300
# Of a round: each between two barriers. What was measured before has put something else into the caches.
EXCHANGES, WARM_UP = 24, 4
MATRIX = 512
# Larger than any cache: what a matrix of weights streams at.
STREAMED_BYTES = 64 << 20
SHARED_FOLDER = Path("/dev/shm")
Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Measured:
    """Of one rank while all ranks run, averaged over the ranks."""

    world_size: int
    cores: int
    buffer_bytes: int
    call_ns: float  # a barrier: a call that moves nothing
    hand_over_ns: float  # one, among all ranks, without a call around it
    link_bytes_per_s: float  # into a rank's port: what it loads and what peers store; out of it as much at once
    copied_bytes_per_s: float  # loaded and stored by memcpy of STREAMED_BYTES
    flops_per_s: float  # float32
    memory_bytes: int


class ChipProbes:
    """Making one is collective, and so is sample(): samples may be spread over another measurement."""

    def __init__(self, group: Any, probes: Probes, buffer_bytes: int) -> None:
        self.group, self.probes = group, probes
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.buffer_bytes = buffer_bytes
        self.buffers = _shared_buffers(self.rank, self.world_size, buffer_bytes // 4)
        self.hand_over = probes.floor(case_of("all_reduce", 64, "float32", "sum", self.rank, self.world_size), False)
        self.matrices = torch.rand(2, MATRIX, MATRIX)
        self.samples: dict[str, list[float]] = {"call": [], "exchange": [], "copy": [], "mm": []}

    def sample(self) -> None:
        barrier: Callable[[], object] = lambda: dist.barrier(group=self.group)  # noqa: E731
        self.samples["copy"].append(_core.copy_seconds(nbytes=STREAMED_BYTES, iterations=2))
        barrier()
        self.samples["mm"].append(_matrix_seconds(self.matrices))
        barrier()
        self.samples["call"].append(median(sample(barrier, CALLS)) * 1e-9)
        self.hand_over.sample()
        self.samples["exchange"].append(self._exchange_s())

    def _exchange_s(self) -> float:
        """Seconds: what two barriers take with an exchange between them, less what they take without."""
        own = self.buffers[self.rank]
        each = own.size // self.world_size
        share = slice(self.rank * each, (self.rank + 1) * each)
        others = [buffer[share] for rank, buffer in enumerate(self.buffers) if rank != self.rank]

        def exchange() -> None:
            for other in others:
                np.add(other, own[share], out=other)

        pairs = [
            (self._between_barriers_s(own, exchange), self._between_barriers_s(own, _nothing)) for _ in range(EXCHANGES)
        ]
        with_it, without = (median(times) for times in zip(*pairs[WARM_UP:], strict=True))
        return max(1e-9, float(with_it) - float(without))

    def _between_barriers_s(self, own: Array, step: Callable[[], None]) -> float:
        own.fill(0)  # written by its rank, as a program would
        dist.barrier(group=self.group)
        begin = time.perf_counter()
        step()
        dist.barrier(group=self.group)
        return time.perf_counter() - begin

    def result(self) -> Measured:
        """Medians of all samples, averaged over the ranks. Collective."""
        seconds = {name: over_ranks(median(samples)) for name, samples in self.samples.items()}
        loaded = self.buffer_bytes // self.world_size * (self.world_size - 1)
        return Measured(
            world_size=self.world_size,
            cores=len(os.sched_getaffinity(0)),
            buffer_bytes=self.buffer_bytes,
            call_ns=seconds["call"] * 1e9,
            hand_over_ns=self.hand_over.result().transfers_us * 1e3 / 2,
            link_bytes_per_s=2 * loaded / seconds["exchange"],  # as much is stored into it by peers
            copied_bytes_per_s=2 * STREAMED_BYTES / seconds["copy"],
            flops_per_s=2 * MATRIX**3 / seconds["mm"],
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.world_size,
        )


def _nothing() -> None:
    """What stands between two barriers where their own time is wanted."""


def _shared_buffers(rank: int, world_size: int, elements: int) -> list[Array]:
    """One buffer a rank, all of them mapped here. Collective."""
    folder = SHARED_FOLDER if SHARED_FOLDER.is_dir() else None
    with tempfile.NamedTemporaryFile(prefix="hxcomm-chip-", dir=folder) as file:
        file.truncate(elements * 4)
        names: list[Any] = [None] * world_size
        dist.all_gather_object(names, file.name)
        buffers = [np.memmap(name, dtype=np.float32, mode="r+", shape=(elements,)) for name in names]
        dist.barrier()  # before anybody removes the name
    return [np.asarray(buffer) for buffer in buffers]


def _matrix_seconds(matrices: torch.Tensor) -> float:
    a, b = matrices
    return median(sample(lambda: torch.mm(a, b), 3)) * 1e-9


def chip_text(measured: Measured, command: str) -> str:
    """The chip file."""
    m = measured
    source = f"measured: {command}"
    shared = f", {m.world_size} ranks on {m.cores} cores at once"
    values: list[tuple[str, str, str, str]] = [
        ("memory", "bandwidth_bytes_per_s", f"{m.copied_bytes_per_s:.3g}", f"{source}: memcpy of 64 MiB{shared}"),
        ("memory", "capacity_bytes", str(m.memory_bytes), f"{source}: the machine's memory / {m.world_size} ranks"),
        ("compute.flops_per_s", "float32", f"{m.flops_per_s:.3g}", f"{source}: torch.mm of 512x512{shared}"),
        (
            "collective",
            "launch_ns",
            f"{max(0.0, m.call_ns - m.hand_over_ns):.0f}",
            f"{source}: a barrier by c10d, less one hand-over",
        ),
        (
            "collective",
            "reduce_bytes_per_s",
            "1e15",
            "assumed: nothing more, as the exchange that gave the links' rate adds what it loads",
        ),
        (
            "links.0",
            "topology",
            '"switch"',
            "assumed: one port a chip, its core's loads and stores",
        ),
        (
            "links.0",
            "bandwidth_bytes_per_s",
            f"{m.link_bytes_per_s:.3g}",
            f"{source}: each rank adds to its share of peers' buffers of {m.buffer_bytes} bytes{shared}",
        ),
        (
            "links.0",
            "latency_ns",
            f"{m.hand_over_ns / 2:.0f}",
            f"{source}: half of one hand-over among all ranks, in and out of the switch",
        ),
        ("links.0", "forwarding", '"cut_through"', "assumed: there is nothing between two cores that would store"),
    ]
    lines = [
        'name = "this-machine"',
        f'description = "{m.world_size} ranks on {m.cores} cores, shared memory, buffers of {m.buffer_bytes} bytes"',
    ]
    table = ""
    for where, key, value, _ in values:
        if where != table:
            table = where
            lines += ["", "[[links]]" if where == "links.0" else f"[{where}]"]
        lines.append(f"{key} = {value}")
    lines += ["", "[sources]", *(f'"{where}.{key}" = "{text}"' for where, key, _, text in values)]
    return "\n".join(lines) + "\n"


def _line(m: Measured, out: Path) -> str:
    rates = f"{m.link_bytes_per_s / 1e9:.3g} GB/s a link, {m.copied_bytes_per_s / 1e9:.3g} GB/s of memory"
    return f"{out}: {rates}, {m.hand_over_ns:.0f} ns a hand-over, {m.call_ns / 1e3:.1f} us a call"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures on this rank; rank 0 writes the file. Returns 0, or 2 for a wrong command."""
    return under_torchrun("hxcomm.bench.chip", lambda: chip_arguments.parse(arguments), _measure)


def _measure(settings: Settings) -> int:
    torch.set_num_threads(1)  # a chip is a core
    world_size = dist.get_world_size()
    if world_size < 2:
        raise UsageError("one rank has no links: start two or more")
    register_backend()  # where hxcomm is used from its source tree, torch has not found it by itself
    group = dist.new_group(backend=BACKEND, timeout=TIMEOUT)
    probes = ChipProbes(group, Probes(dist.get_rank(), world_size), settings.buffer_bytes)
    for _ in range(ROUNDS):
        probes.sample()
    measured = probes.result()
    if dist.get_rank() == 0:
        command = f"hxcomm chips measure --ranks {world_size} --bytes {settings.buffer_bytes}"
        settings.out.write_text(chip_text(measured, command), encoding="utf-8")
        print(_line(measured, settings.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
