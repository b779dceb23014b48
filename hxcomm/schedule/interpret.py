"""Runs plans on numpy arrays, one instruction at a time: the specification of an executor and the oracle of the C++ one.

Arithmetic, as csrc/core/reduce.h says it: a left fold over the sources in their order; float16 and bfloat16 in
float32, rounded once; integers wrap; AVG divides finished results, integers towards zero; MIN and MAX propagate NaN
and order -0.0 before +0.0; bool is or (SUM, MAX) and and (PRODUCT, MIN). bfloat16 arrays are uint16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hxcomm.schedule.extents import QUANTUM, piece_extent
from hxcomm.schedule.plan import Enter, Operand, Plan, Publish, TransferInstruction, Wait
from hxcomm.schedule.symbolic import Mark

Array: TypeAlias = NDArray[Any]

# dtype -> (as stored, as accumulated)
DTYPES: dict[str, tuple[DTypeLike, DTypeLike]] = {
    "float32": (np.float32, np.float32),
    "float64": (np.float64, np.float64),
    "bfloat16": (np.uint16, np.float32),
    "float16": (np.float16, np.float32),
    "int32": (np.int32, np.int32),
    "int64": (np.int64, np.int64),
    "uint8": (np.uint8, np.uint8),
    "bool": (np.uint8, np.uint8),
}
REDUCE_OPS = ("sum", "product", "min", "max", "avg")


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to nearest even; NaN becomes the quiet one without payload."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def transfer(
    reduce: bool,
    final: bool,
    dtype: str,
    reduce_op: str,
    world_size: int,
    sources: Sequence[tuple[Array, bool]],
    destinations: Sequence[Array],
) -> None:
    """One transfer. Arrays are 1-D and equally long; a source comes with whether it is partial.

    Arrays of partial results have the accumulation type, all others the stored one. A destination may be a source.
    Raises ValueError for an unknown dtype or reduce op, and for the average of bool, which has no meaning.
    """
    if dtype not in DTYPES or reduce_op not in REDUCE_OPS or (dtype, reduce_op) == ("bool", "avg"):
        raise ValueError(f"cannot reduce {dtype} with {reduce_op}: {', '.join(DTYPES)}; {', '.join(REDUCE_OPS)}")
    if not reduce:
        result = sources[0][0]
    else:
        result = _load(*sources[0], dtype).copy()
        with np.errstate(all="ignore"):
            for array, partial in sources[1:]:
                result = _combine(result, _load(array, partial, dtype), reduce_op, dtype)
            result = _settle(result, final, dtype, reduce_op, world_size)
    for destination in destinations:
        destination[:] = result


def _load(array: Array, partial: bool, dtype: str) -> Array:
    if dtype == "bfloat16" and not partial:
        return bfloat16_to_float32(array)
    return array.astype(DTYPES[dtype][1], copy=False)


def _combine(a: Array, b: Array, reduce_op: str, dtype: str) -> Array:
    if dtype == "bool":
        reduce_op = {"sum": "max", "product": "min"}.get(reduce_op, reduce_op)
    if reduce_op in ("sum", "avg"):
        return np.add(a, b, dtype=a.dtype)
    if reduce_op == "product":
        return np.multiply(a, b, dtype=a.dtype)
    result: Array = (np.minimum if reduce_op == "min" else np.maximum)(a, b)
    if a.dtype.kind == "f":
        # numpy returns either zero; the signs of equal values are or-ed for MIN, and-ed for MAX.
        signs = (np.logical_or if reduce_op == "min" else np.logical_and)(np.signbit(a), np.signbit(b))
        result = np.where((a == 0) & (b == 0), np.copysign(a, np.where(signs, -1, 1).astype(a.dtype)), result)
    return result


def _settle(result: Array, final: bool, dtype: str, reduce_op: str, world_size: int) -> Array:
    if dtype == "bool":
        return (result != 0).astype(np.uint8)
    if final and reduce_op == "avg":
        if result.dtype.kind == "f":
            result = result / result.dtype.type(world_size)
        else:  # towards zero; numpy's // goes to minus infinity
            quotient = np.abs(result.astype(object)) // world_size
            result = np.where(result < 0, -quotient, quotient).astype(result.dtype)
    if result.dtype.kind == "f":
        result = np.where(np.isnan(result), result.dtype.type(np.nan), result)
    if not final:
        return result
    return float32_to_bfloat16(result) if dtype == "bfloat16" else result.astype(DTYPES[dtype][0])


class Memory:
    """Inputs, outputs and scratch of all ranks of one op: [rank][block] arrays, scratch [rank][chunk] made on demand."""

    def __init__(self, dtype: str, inputs: Sequence[Sequence[Array]], outputs: Sequence[Sequence[Array]]) -> None:
        self.dtype = dtype
        self.blocks = {"input": inputs, "output": outputs}
        self.scratch: dict[tuple[int, int], Array] = {}
        self.progress = [0] * len(inputs)


def run(
    plan: Plan,
    memory: Memory,
    reduce_op: str = "sum",
    window: tuple[int, int] | None = None,
    sequence: int = 1,
    quantum: int = QUANTUM,
) -> Iterator[tuple[int, int]]:
    """One rank's part of one op (one segment of a long one, in elements: `window`).

    A generator: yields (peer, value) while it is blocked, that is until memory.progress[peer] >= value, and ends when
    the rank is done. Fingerprints, parity and order of ops are the communicator's.
    """
    header = plan.header()
    low, high = window if window is not None else (0, 1 << 62)

    def chunk_of(rank: int, buffer: str, chunk: int) -> Array:
        pieces = (header.input if buffer == "input" else header.output).pieces
        block = memory.blocks[buffer][rank][chunk // pieces]
        first, end = piece_extent(len(block), pieces, chunk % pieces, low, high, quantum)
        return block[first:end]

    def resolve(operand: Operand, count: int) -> Array:
        if operand.buffer != "scratch":
            return chunk_of(operand.rank, operand.buffer, operand.chunk)
        stored, accumulated = DTYPES[memory.dtype]
        dtype = np.dtype(accumulated if operand.mark == Mark.PARTIAL else stored)
        raw = memory.scratch.setdefault((operand.rank, operand.chunk), np.zeros(0, np.uint8))
        if len(raw) < count * dtype.itemsize:
            raw = memory.scratch[operand.rank, operand.chunk] = np.resize(raw, count * dtype.itemsize)
        return raw[: count * dtype.itemsize].view(dtype)

    def blocked(peer: int, number: int) -> Iterator[tuple[int, int]]:
        while memory.progress[peer] < (sequence << 16) + number + 1:
            yield peer, (sequence << 16) + number + 1

    for instruction in plan.instructions():
        if isinstance(instruction, TransferInstruction):
            count = len(chunk_of(header.rank, instruction.count_buffer, instruction.count_chunk))
            transfer(
                instruction.reduce,
                instruction.final,
                memory.dtype,
                reduce_op,
                header.world_size,
                [(resolve(each, count), each.mark == Mark.PARTIAL) for each in instruction.sources],
                [resolve(each, count) for each in instruction.destinations],
            )
        elif isinstance(instruction, Wait):
            yield from blocked(instruction.peer, instruction.round)
        elif isinstance(instruction, Publish):
            memory.progress[header.rank] = (sequence << 16) + instruction.round + 1
        elif isinstance(instruction, Enter):
            memory.progress[header.rank] = (sequence << 16) + 1
            for peer in range(header.world_size):
                yield from blocked(peer, 0)
