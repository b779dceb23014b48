"""Runs plans on numpy arrays: the specification of an executor, and the oracle that the C++ one is tested against.

Arithmetic, as csrc/core/reduce.h says it: a left fold over the sources in their order; float16 and bfloat16 in
float32, rounded once; integers wrap; AVG divides finished results, integers towards zero; MIN and MAX propagate NaN
and order -0.0 before +0.0; bool is or (SUM, MAX, BOR) and and (PRODUCT, MIN, BAND). PREMUL_SUM multiplies each rank's
elements by its factor as the rank reads them, in the accumulation type. bfloat16 arrays are uint16, bool uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hxcomm.schedule.extents import piece_extent
from hxcomm.schedule.plan import Agree, Enter, Operand, Plan, Publish, Receive, TransferInstruction, Wait
from hxcomm.schedule.schedule import USER_BUFFERS
from hxcomm.schedule.symbolic import Mark

Array: TypeAlias = NDArray[Any]

# name -> (as stored, as accumulated)
DTYPES: dict[str, tuple[str, str]] = {
    name: (name, name)
    for name in ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "complex64", "complex128")
} | {"float16": ("float16", "float32"), "bfloat16": ("uint16", "float32"), "bool": ("uint8", "uint8")}
REDUCE_OPS = ("sum", "product", "min", "max", "avg", "band", "bor", "bxor", "premul_sum")


def has_meaning(dtype: str, reduce_op: str) -> bool:
    """Whether the pair is carried out: complex numbers have no order, floats no bits, truth values no quotients."""
    if reduce_op in ("sum", "product"):
        return True
    if dtype.startswith("complex"):
        return reduce_op in ("avg", "premul_sum")
    if "float" in dtype:
        return reduce_op not in ("band", "bor", "bxor")
    return reduce_op != "premul_sum" and (dtype, reduce_op) != ("bool", "avg")


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to nearest even; NaN becomes the quiet one without payload."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def transfer(
    reduce: bool,
    final: bool,
    dtype: str,
    reduce_op: str,
    world_size: int,
    sources: Sequence[tuple[Array, bool, float]],
    destinations: Sequence[Array],
) -> None:
    """One transfer. Arrays are 1-D and equally long; a source comes with whether it is partial, and with its factor.

    Partial results have the accumulation type, all else the stored one. A destination may be the memory of a source.
    Raises ValueError for an unknown dtype or reduce op, and for pairs of them without a meaning.
    """
    if dtype not in DTYPES or reduce_op not in REDUCE_OPS or not has_meaning(dtype, reduce_op):
        raise ValueError(f"cannot reduce {dtype} with {reduce_op}: {', '.join(DTYPES)}; {', '.join(REDUCE_OPS)}")
    result = sources[0][0]
    if reduce:
        with np.errstate(all="ignore"):
            result = _load(*sources[0], dtype, reduce_op)
            for source in sources[1:]:
                result = _combine(result, _load(*source, dtype, reduce_op), reduce_op, dtype)
            result = _settle(result, final, dtype, reduce_op, world_size)
    for destination in destinations:
        destination[:] = result


def _load(array: Array, partial: bool, factor: float, dtype: str, reduce_op: str) -> Array:
    """As accumulated. Complex numbers become their parts, side by side: numpy's own products round otherwise."""
    wide = bfloat16_to_float32(array) if dtype == "bfloat16" and not partial else array.astype(DTYPES[dtype][1])
    if dtype.startswith("complex"):
        wide = wide.view(np.float32 if dtype == "complex64" else np.float64)
    return wide * wide.dtype.type(factor) if reduce_op == "premul_sum" else wide


def _combine(a: Array, b: Array, reduce_op: str, dtype: str) -> Array:
    if dtype == "bool":
        a, b = np.asarray(a != 0, np.uint8), np.asarray(b != 0, np.uint8)
        reduce_op = {"sum": "bor", "product": "band"}.get(reduce_op, reduce_op)
    if reduce_op in ("band", "bor", "bxor"):
        return np.asarray({"band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor}[reduce_op](a, b))
    if reduce_op == "product" and dtype.startswith("complex"):
        product = np.empty_like(a)
        product[0::2] = a[0::2] * b[0::2] - a[1::2] * b[1::2]
        product[1::2] = a[0::2] * b[1::2] + a[1::2] * b[0::2]
        return product
    if reduce_op in ("sum", "avg", "premul_sum", "product"):
        return np.asarray(a * b if reduce_op == "product" else a + b)
    result = np.minimum(a, b) if reduce_op == "min" else np.maximum(a, b)
    if a.dtype.kind == "f":  # of two zeros numpy returns either
        negative = (np.logical_or if reduce_op == "min" else np.logical_and)(np.signbit(a), np.signbit(b))
        result = np.where((a == 0) & (b == 0), np.where(negative, -0.0, 0.0).astype(a.dtype), result)
    return np.asarray(result)


def _settle(result: Array, final: bool, dtype: str, reduce_op: str, world_size: int) -> Array:
    if dtype == "bool":
        return np.asarray(result != 0, np.uint8)
    if result.dtype.kind != "f":
        if final and reduce_op == "avg":  # numpy's // rounds to minus infinity, its remainder has the divisor's sign
            wide = result.astype(np.int64)
            result = ((wide - np.fmod(wide, world_size)) // world_size).astype(result.dtype)
        return result
    if final and reduce_op == "avg":
        result = result / result.dtype.type(world_size)
    result = np.where(np.isnan(result), result.dtype.type(np.nan), result)
    if dtype.startswith("complex"):
        return np.asarray(result.view(dtype))
    bfloat16 = final and dtype == "bfloat16"
    return float32_to_bfloat16(result) if bfloat16 else result.astype(DTYPES[dtype][0 if final else 1])


class Memory:
    """What the ranks of one op see: blocks[buffer][rank][block] are arrays; scratch (rank, chunk) appears on demand.

    messages: those that were sent, by sequence, the rank that gets it, number. hosts: of the ranks, if several.
    """

    def __init__(
        self,
        dtype: str,
        inputs: Sequence[Sequence[Array]],
        outputs: Sequence[Sequence[Array]],
        hosts: Sequence[int] | None = None,
    ) -> None:
        self.dtype = dtype
        self.hosts = hosts or [0] * len(inputs)
        self.messages: dict[tuple[int, int, int], Array] = {}
        self.blocks = {"input": inputs, "output": outputs}
        self.scratch: dict[tuple[int, int], Array] = {}
        self.progress = [0] * len(inputs)

    def chunk(self, operand: Operand, count: int, partial: bool) -> Array:
        """A scratch chunk, as `count` elements of the dtype or, where it is partial, of the accumulation type."""
        dtype = np.dtype(DTYPES[self.dtype][partial])
        raw = self.scratch.get((operand.rank, operand.chunk), np.empty(0, np.uint8))
        if len(raw) < count * dtype.itemsize:
            raw = self.scratch[operand.rank, operand.chunk] = np.empty(count * dtype.itemsize, np.uint8)
        return raw[: count * dtype.itemsize].view(dtype)


def run(
    plan: Plan,
    memory: Memory,
    reduce_op: str = "sum",
    window: tuple[int, int] = (0, 1 << 62),
    sequence: int = 1,
    factor: float = 1.0,
    agreed: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[int, int]]:
    """One rank's part of one op, or of one segment of a long one: elements `window` of each block.

    `factor` is this rank's own, for PREMUL_SUM, which takes private plans only: contributions then lie in scratch
    multiplied, in the accumulation type, since no rank knows a peer's factor.

    A generator: yields (peer, value) while it is blocked, that is until memory.progress[peer] >= value, and ends when
    the rank is done. It also yields while a message from `peer` has not arrived, and until all hosts have `agreed`.
    Fingerprints, verdicts, parity of scratch and the order of ops are the communicator's.
    """
    header = plan.header()

    def chunk_of(rank: int, buffer: str, chunk: int) -> Array:
        block, piece = divmod(chunk, (header.input if buffer == "input" else header.output).pieces)
        array = memory.blocks[buffer][rank][block]
        return array[slice(*piece_extent(len(array), header.input.pieces, piece, *window))]

    premultiplied = reduce_op == "premul_sum"

    def is_partial(at: Operand) -> bool:
        return at.mark == Mark.PARTIAL or (premultiplied and at.mark == Mark.FRESH and at.buffer not in USER_BUFFERS)

    def is_scaled(at: Operand) -> bool:
        return premultiplied and at.mark == Mark.FRESH and at.buffer in USER_BUFFERS

    def memory_of(at: Operand, count: int) -> Array:
        if at.buffer == "message":
            return memory.messages[sequence, at.rank, at.chunk]
        if at.buffer == "scratch":
            return memory.chunk(at, count, is_partial(at))
        return chunk_of(at.rank, at.buffer, at.chunk)

    for step in plan.instructions():
        waits: list[tuple[int, int]] = []
        if isinstance(step, TransferInstruction):
            count = len(chunk_of(header.rank, step.count_buffer, step.count_chunk))
            sources = [
                (memory_of(each, count), is_partial(each), factor if is_scaled(each) else 1.0) for each in step.sources
            ]
            destinations = [memory_of(each, count) for each in step.destinations if each.buffer != "message"]
            sent = [each for each in step.destinations if each.buffer == "message"]
            if sent:  # one outgoing buffer, whoever gets it
                destinations.append(np.empty(count, DTYPES[memory.dtype][is_partial(sent[0])]))
            reduce = step.reduce or is_scaled(step.sources[0])  # a copy that multiplies is one
            transfer(reduce, step.final, memory.dtype, reduce_op, header.world_size, sources, destinations)
            memory.messages.update({(sequence, each.rank, each.chunk): destinations[-1] for each in sent})
        elif isinstance(step, Receive):
            while (sequence, header.rank, step.number) not in memory.messages:
                yield step.peer, step.number
        elif isinstance(step, Agree):
            while not agreed():
                yield header.rank, 0
        elif isinstance(step, Wait):
            waits = [(step.peer, (sequence << 16) + step.round + 1)]
        elif isinstance(step, Publish):
            memory.progress[header.rank] = (sequence << 16) + step.round + 1
        elif isinstance(step, Enter):
            memory.progress[header.rank] = (sequence << 16) + 1
            own = memory.hosts[header.rank]
            waits = [(peer, (sequence << 16) + 1) for peer, host in enumerate(memory.hosts) if host == own]
        for peer, value in waits:
            while memory.progress[peer] < value:
                yield peer, value
