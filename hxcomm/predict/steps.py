"""What a rank does in one forward pass, in order: ops, collectives, and products whose sum over ranks may overlap.

Plain data between who records (recording.py) and who times (timing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hxcomm.decoder.shards import even
from hxcomm.sim.costs import OpRecord


class ModelError(ValueError):
    """The model cannot be recorded. The text says why."""


class Collective(NamedTuple):
    """Of all ranks. `nbytes` are of one block of the call: all of an all_reduce, one rank's part of an all_gather."""

    op: str
    nbytes: int
    itemsize: int


class LinearAllReduce(NamedTuple):
    """The sum over ranks of x @ weight.T: [rows, inputs] and [columns, inputs] -> [rows, columns].

    One product and one all_reduce, or as many of both as the chip overlaps, each of some columns.
    """

    rows: int
    inputs: int
    columns: int
    itemsize: int  # of x and of the result
    weight_bits: int  # of an element of the weight, as it is stored
    dtype: str  # in which it is multiplied

    def widths(self, chunks: int) -> list[int]:
        """Columns of each chunk, as torch.tensor_split makes them."""
        return even(self.columns, min(chunks, self.columns))

    def product(self, columns: int) -> OpRecord:
        """Of so many columns: x is read again for each chunk."""
        activations = self.rows * (self.inputs + columns) * self.itemsize
        nbytes = activations + self.inputs * columns * self.weight_bits // 8
        return OpRecord("aten::mm", "weights", nbytes, 2 * self.rows * self.inputs * columns, self.dtype)

    def sum(self, columns: int) -> Collective:
        return Collective("all_reduce", self.rows * columns * self.itemsize, self.itemsize)


Step = OpRecord | Collective | LinearAllReduce


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank needs. `activations` is an estimate: the most that one op reads and writes besides the rest."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True)
class Stream:
    """One rank's forward pass."""

    steps: tuple[Step, ...]
    memory: Memory


@dataclass(frozen=True)
class Pass:
    """One forward pass of all ranks. Ranks with equal shards share a stream; all streams have the same collectives."""

    streams: tuple[Stream, ...]
    stream_of_rank: Sequence[int]

    @property
    def world_size(self) -> int:
        return len(self.stream_of_rank)

    @property
    def memory(self) -> Memory:
        """Of the rank that needs most."""
        return max((stream.memory for stream in self.streams), key=lambda memory: memory.total)
