"""The collectives that are measured: each a record of a few functions, as in nccl-tests.

Sizes and counts are nccl-tests': `nbytes` is the largest buffer of the op (all_gather: the whole output;
reduce_scatter: the whole input), `count` the elements that one rank contributes (all_gather), gets (reduce_scatter) or
passes (the others). Inputs are small whole numbers that every dtype adds, multiplies and averages exactly, so results
are compared with `==`.

Source of sizes and bandwidths: nccl-tests, doc/PERFORMANCE.md and the files of src/ named after the ops.
"""

from __future__ import annotations

import copy
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hxcomm.bench.arguments import ITEM_BYTES
from hxcomm.torchcomms import ReduceOp, TorchComm

Group = Any  # torch.distributed.ProcessGroup, which has no usable annotations, or a TorchComm
ROOT = 0  # of broadcast
# Inputs repeat with this period: prime, so that chunks which land in the wrong place are seen.
PERIOD = 8191
# By how much the last rank comes late to the check of barrier: longer than a busy machine may hold up the others.
LATE_S = 0.05
REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "avg": dist.ReduceOp.AVG,
}


@dataclass(frozen=True)
class Case:
    """One line of the table, seen by one rank."""

    nbytes: int  # the size column
    count: int  # the count column
    dtype: str
    reduce_op: str  # "" for ops that do not reduce
    rank: int
    world_size: int
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class Buffer:
    """Memory for `count` elements, and the same memory as words for touching it, whatever the dtype.

    `tensor` is on the device that is measured, `cpu` a CPU tensor over the same bytes: what other backends are given,
    and what is filled and checked. numpy over 64-bit words has the least overhead: 0.3 us to write 64 bytes and 1.2 us
    to read them, where torch's fill_ and sum take 1.3 and 3.9.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: str = "cpu") -> None:
        nbytes = count * dtype.itemsize
        padded = (nbytes + 63) // 64 * 64
        self.storage = torch.zeros(padded, dtype=torch.uint8, device=device)  # keeps what `words` points to
        self.tensor = self.storage[:nbytes].view(dtype)
        if device == "cpu":
            on_cpu = self.storage
        else:  # hx: simulated memory, which the CPU reaches as its own
            memory: Any = (ctypes.c_uint8 * padded).from_address(self.storage.data_ptr()) if padded else bytearray()
            on_cpu = torch.from_numpy(np.frombuffer(memory, np.uint8))
        self.cpu = on_cpu[:nbytes].view(dtype)
        self.words: np.ndarray[Any, np.dtype[np.int64]] = on_cpu.numpy().view(np.int64)

    def on_cpu(self) -> Buffer:
        """The same memory, for a backend that knows CPU tensors only."""
        other = copy.copy(self)
        other.tensor = self.cpu
        return other


@dataclass
class Buffers:
    """What one rank passes to the op; one buffer where the op works in place."""

    input: Buffer | None
    output: Buffer | None

    def on_cpu(self) -> Buffers:
        if self.input is self.output:
            same = self.input.on_cpu() if self.input is not None else None
            return Buffers(same, same)
        return Buffers(*(None if each is None else each.on_cpu() for each in (self.input, self.output)))


@dataclass(frozen=True)
class Operation:
    """A collective as the benchmark needs it.

    run(case, buffers, group) is blocking; group is a process group, or the TorchComm of backend "torchcomm".
    counts(elements, world_size): the count column, and nbytes divided by the item size, for a size of `elements`.
    make: buffers of a case. fill: the exact inputs. expected: what the output must be.
    bus_factor(world_size): busbw / algbw, what each rank's link must carry of the size (nccl-tests, PERFORMANCE.md).
    """

    reduces: bool
    counts: Callable[[int, int], tuple[int, int]]
    make: Callable[[Case], Buffers]
    fill: Callable[[Case, Buffers], None]
    run: Callable[[Case, Buffers, Group], Callable[[], object]]
    expected: Callable[[Case], torch.Tensor]
    bus_factor: Callable[[int], float]


def case_of(op: str, nbytes: int, dtype: str, reduce_op: str, rank: int, world_size: int, device: str = "cpu") -> Case:
    """The case nearest to `nbytes`: counts per rank are rounded down to 16 bytes, as in nccl-tests, but never to 0."""
    operation = OPERATIONS[op]
    item = ITEM_BYTES[dtype]
    count, elements = operation.counts(max(1, nbytes // item), world_size)
    if elements > count:
        count = max(1, count // max(1, 16 // item) * max(1, 16 // item))
        elements = count * world_size
    return Case(elements * item, count, dtype, reduce_op if operation.reduces else "", rank, world_size, device)


def count_wrong(op: str, case: Case, buffers: Buffers, group: Group) -> int:
    """Runs the op once on exact inputs and returns how many elements of this rank's output are wrong."""
    operation = OPERATIONS[op]
    if op == "barrier":
        return _left_early(case, operation.run(case, buffers, group))
    assert buffers.output is not None
    if buffers.output is not buffers.input:
        buffers.output.words.fill(-1)
    operation.fill(case, buffers)
    operation.run(case, buffers, group)()
    return int((buffers.output.cpu != operation.expected(case)).sum())


def _left_early(case: Case, barrier: Callable[[], object]) -> int:
    """1 when this rank left the barrier before the last one had entered it. Ranks of one host share the clock."""
    dist.barrier()
    if case.rank == case.world_size - 1:
        time.sleep(LATE_S)  # makes a barrier that waits for nobody visible
    entered = time.monotonic_ns()
    barrier()
    left = time.monotonic_ns()
    last = torch.tensor([entered])
    dist.all_reduce(last, op=dist.ReduceOp.MAX)
    return int(left < int(last))


def _pattern(case: Case, rank: int) -> torch.Tensor:
    """One period of what `rank` passes, as int64."""
    small = ((torch.arange(PERIOD) * 2654435761 + rank * 1013904223) >> 8) % 4
    if case.reduce_op == "product":
        # At most 2^8: whole powers of two up to there fit every dtype.
        return 1 + small % 2 if rank < 8 else torch.ones_like(small)
    if case.reduce_op == "avg":
        return small * case.world_size  # so that the average is whole
    return small


def _repeated(pattern: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    return pattern.to(dtype).repeat(count // PERIOD + 1)[:count]


def _reduced(case: Case, count: int) -> torch.Tensor:
    each = torch.stack([_pattern(case, rank) for rank in range(case.world_size)])
    if case.dtype == "bool":
        each = each.ne(0).long()
    total = {
        "sum": lambda: each.sum(0),
        "product": lambda: each.prod(0),
        "min": lambda: each.amin(0),
        "max": lambda: each.amax(0),
        "avg": lambda: each.sum(0) // case.world_size,
    }[case.reduce_op]()
    return _repeated(total, count, case.torch_dtype)


def _in_place(case: Case) -> Buffers:
    buffer = Buffer(case.count, case.torch_dtype, case.device)
    return Buffers(buffer, buffer)


def _broadcast_buffers(case: Case) -> Buffers:
    buffer = Buffer(case.count, case.torch_dtype, case.device)
    return Buffers(buffer if case.rank == ROOT else None, buffer)


def _split_buffers(inputs: int, outputs: int) -> Callable[[Case], Buffers]:
    """Buffers where one side has a block for each rank: 0 stands for that side."""

    def make(case: Case) -> Buffers:
        n = case.world_size
        return Buffers(
            Buffer(case.count * (inputs or n), case.torch_dtype, case.device),
            Buffer(case.count * (outputs or n), case.torch_dtype, case.device),
        )

    return make


def _fill(case: Case, buffers: Buffers) -> None:
    if buffers.input is not None:
        tensor = buffers.input.cpu
        tensor.copy_(_repeated(_pattern(case, case.rank), tensor.numel(), tensor.dtype))
    elif buffers.output is not None:
        buffers.output.words.fill(-1)


def _run_all_reduce(case: Case, buffers: Buffers, group: Group) -> Callable[[], object]:
    tensor, op = _tensor(buffers.output), REDUCE_OPS[case.reduce_op]
    if isinstance(group, TorchComm):
        kind = getattr(ReduceOp, case.reduce_op.upper())
        return lambda: group.all_reduce(tensor, kind, async_op=False)
    return lambda: dist.all_reduce(tensor, op=op, group=group)


def _run_all_gather(case: Case, buffers: Buffers, group: Group) -> Callable[[], object]:
    output, own = _tensor(buffers.output), _tensor(buffers.input)
    if isinstance(group, TorchComm):
        return lambda: group.all_gather_single(output, own, async_op=False)
    return lambda: dist.all_gather_single(output, own, group=group)


def _run_broadcast(case: Case, buffers: Buffers, group: Group) -> Callable[[], object]:
    tensor = _tensor(buffers.output)
    if isinstance(group, TorchComm):
        return lambda: group.broadcast(tensor, ROOT, async_op=False)
    return lambda: dist.broadcast(tensor, src=ROOT, group=group)


def _run_reduce_scatter(case: Case, buffers: Buffers, group: Group) -> Callable[[], object]:
    output, whole, op = _tensor(buffers.output), _tensor(buffers.input), REDUCE_OPS[case.reduce_op]
    if isinstance(group, TorchComm):
        kind = getattr(ReduceOp, case.reduce_op.upper())
        return lambda: group.reduce_scatter_single(output, whole, kind, async_op=False)
    return lambda: dist.reduce_scatter_single(output, whole, op=op, group=group)


def _run_barrier(case: Case, buffers: Buffers, group: Group) -> Callable[[], object]:
    if isinstance(group, TorchComm):
        return lambda: group.barrier(async_op=False)
    return lambda: dist.barrier(group=group)


def _tensor(buffer: Buffer | None) -> torch.Tensor:
    assert buffer is not None
    return buffer.tensor


def _gathered(case: Case) -> torch.Tensor:
    return torch.cat([_repeated(_pattern(case, r), case.count, case.torch_dtype) for r in range(case.world_size)])


def _scattered(case: Case) -> torch.Tensor:
    return _reduced(case, case.count * case.world_size)[case.rank * case.count :][: case.count]


OPERATIONS: dict[str, Operation] = {
    "all_reduce": Operation(
        reduces=True,
        counts=lambda elements, n: (elements, elements),
        make=_in_place,
        fill=_fill,
        run=_run_all_reduce,
        expected=lambda case: _reduced(case, case.count),
        bus_factor=lambda n: 2 * (n - 1) / n,
    ),
    "all_gather": Operation(
        reduces=False,
        counts=lambda elements, n: (elements // n, elements),
        make=_split_buffers(inputs=1, outputs=0),
        fill=_fill,
        run=_run_all_gather,
        expected=_gathered,
        bus_factor=lambda n: (n - 1) / n,
    ),
    "broadcast": Operation(
        reduces=False,
        counts=lambda elements, n: (elements, elements),
        make=_broadcast_buffers,
        fill=_fill,
        run=_run_broadcast,
        expected=lambda case: _repeated(_pattern(case, ROOT), case.count, case.torch_dtype),
        bus_factor=lambda n: 1.0,
    ),
    "reduce_scatter": Operation(
        reduces=True,
        counts=lambda elements, n: (elements // n, elements),
        make=_split_buffers(inputs=0, outputs=1),
        fill=_fill,
        run=_run_reduce_scatter,
        expected=_scattered,
        bus_factor=lambda n: (n - 1) / n,
    ),
    "barrier": Operation(
        reduces=False,
        counts=lambda elements, n: (0, 0),
        make=lambda case: Buffers(None, None),
        fill=lambda case, buffers: None,
        run=_run_barrier,
        expected=lambda case: torch.empty(0),
        bus_factor=lambda n: 0.0,
    ),
}
