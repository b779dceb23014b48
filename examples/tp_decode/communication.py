"""The program's only calls into torch.distributed, each counted and timed, whichever the backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Tally:
    """Calls of one op by this rank, their payload and the time spent inside them (waiting for peers included)."""

    calls: int = 0
    nbytes: int = 0
    time_ns: int = 0


class Communication:
    """Collectives of the default group; without a process group (plain `python`) there is nobody to talk to."""

    def __init__(self, chunks: int = 1) -> None:
        """chunks: of a product whose sums travel while the next chunk is computed; 1: it is computed before."""
        self.chunks = chunks
        self.alone = not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank()
        self.world_size = 1 if self.alone else dist.get_world_size()
        self.tallies: dict[str, Tally] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over all ranks, in place; returns x."""
        if not self.alone:
            self.timed("all_reduce", x.nbytes, lambda: dist.all_reduce(x))
        return x

    def linear_all_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sum over all ranks of x @ weight.T."""
        if self.alone or self.chunks == 1:
            return self.all_reduce(F.linear(x, weight))
        begin = time.perf_counter_ns()
        y: Tensor = torch.ops.hxcomm.linear_all_reduce(x, weight, self.chunks)
        self.count("linear_all_reduce", y.nbytes, time.perf_counter_ns() - begin)
        return y

    def all_gather(self, x: Tensor) -> Tensor:
        """[n] of every rank -> [world_size, n], in rank order."""
        if self.alone:
            return x.unsqueeze(0)
        gathered = x.new_empty(self.world_size, x.numel())
        self.timed("all_gather", x.nbytes, lambda: dist.all_gather(list(gathered), x))
        return gathered

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if not self.alone:
            self.timed("barrier", 0, dist.barrier)

    def timed(self, op: str, nbytes: int, call: Callable[[], object]) -> None:
        begin = time.perf_counter_ns()
        call()
        self.count(op, nbytes, time.perf_counter_ns() - begin)

    def count(self, op: str, nbytes: int, time_ns: int) -> None:
        tally = self.tallies.setdefault(op, Tally())
        tally.time_ns += time_ns
        tally.calls += 1
        tally.nbytes += nbytes

    @property
    def time_ns(self) -> int:
        """Time spent inside collectives so far."""
        return sum(tally.time_ns for tally in self.tallies.values())
