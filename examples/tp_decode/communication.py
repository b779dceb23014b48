"""The program's only calls into torch.distributed, each counted and timed, whichever the backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

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

    def __init__(self) -> None:
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
        return self.all_reduce(F.linear(x, weight))

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
        tally = self.tallies.setdefault(op, Tally())
        begin = time.perf_counter_ns()
        call()
        tally.time_ns += time.perf_counter_ns() - begin
        tally.calls += 1
        tally.nbytes += nbytes

    @property
    def time_ns(self) -> int:
        """Time spent inside collectives so far."""
        return sum(tally.time_ns for tally in self.tallies.values())
