"""Inputs that are exact in every dtype, and what a collective must make of them, computed in integers and float64.

Results compare with ==: sums of small integers round nowhere before the one rounding that reduce.h allows. Arrays are
as hxcomm stores them: bfloat16 as uint16, bool as uint8. Complex numbers have whole parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hxcomm.schedule.ops import OPS

Array = NDArray[Any]

STORED = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "bool": np.uint8,
    "int8": np.int8,
    "int16": np.int16,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
DTYPES = tuple(STORED)
REDUCE_OPS = ("sum", "product", "min", "max", "avg", "band", "bor", "bxor", "premul_sum")
COMPLEX = ("complex64", "complex128")
FLOATS = ("float32", "float64", "bfloat16", "float16")
BITWISE = {"band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor}


def supported(dtype: str, reduce_op: str) -> bool:
    """Complex numbers have no order, integers no fractions to be scaled to, floats no bits; bool has no quotient."""
    if dtype in COMPLEX:
        return reduce_op in ("sum", "product", "avg", "premul_sum")
    if dtype in FLOATS:
        return reduce_op not in BITWISE
    return reduce_op != "premul_sum" and (dtype, reduce_op) != ("bool", "avg")


def factor(reduce_op: str, rank: int) -> float:
    """What a rank multiplies its own elements by (PREMUL_SUM), another one for each; halves, exact in every dtype."""
    return (1.5, -0.5, 2.0, 0.5)[rank % 4] if reduce_op == "premul_sum" else 1.0


def store(values: Array, dtype: str) -> Array:
    """Numbers as `dtype`, rounded to nearest even. Integers wrap."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    if dtype == "bool":
        return (values != 0).astype(np.uint8)
    return values.astype(STORED[dtype])


def numbers(dtype: str, reduce_op: str, rank: int, block: int, count: int) -> Array:
    """A rank's own elements, as integers: they differ by rank, block and position; negative where the dtype can."""
    if dtype in COMPLEX:
        parts = numbers("float64", reduce_op, rank, block, 2 * count)
        return parts[:count] - 1j * parts[count:]
    mixed = (np.arange(count, dtype=np.int64) * 7 + rank * 5 + block * 3) % 11
    if reduce_op == "product":
        mixed = 1 + mixed % 2  # at five ranks 32 at most: exact everywhere
    elif dtype not in ("uint8", "bool"):
        mixed -= 5
    return mixed % 3 // 2 if dtype == "bool" else mixed


def inputs(op: str, dtype: str, reduce_op: str, rank: int, world_size: int, root: int, count: int) -> list[Array]:
    """The input blocks of a rank; none where the op gives it none."""
    meaning = OPS[op]
    blocks = {"none": 0, "one": 1, "each": world_size}[meaning.input]
    if meaning.input_at_root_only and rank != root:
        blocks = 0
    return [store(numbers(dtype, reduce_op, rank, block, count), dtype) for block in range(blocks)]


def reduced(parts: Sequence[Array], dtype: str, reduce_op: str) -> Array:
    """The integers `parts` of all ranks, reduced as `dtype`."""
    stack = np.stack(list(parts))
    if reduce_op == "premul_sum":
        return store(sum(factor(reduce_op, rank) * part for rank, part in enumerate(parts)), dtype)
    if reduce_op in BITWISE:
        return store(BITWISE[reduce_op].reduce(stack.astype(np.int64), axis=0), dtype)
    if dtype == "bool":
        return store(stack.any(axis=0) if reduce_op in ("sum", "max") else stack.all(axis=0), dtype)
    if dtype in COMPLEX and reduce_op == "avg":
        parts = stack.sum(axis=0).view(np.float64).astype(np.float64 if dtype == "complex128" else np.float32)
        return (parts / parts.dtype.type(len(stack))).view(dtype)
    if reduce_op != "avg":
        function = {"sum": np.sum, "product": np.prod, "min": np.min, "max": np.max}[reduce_op]
        return store(function(stack, axis=0), dtype)
    total = store(stack.sum(axis=0), dtype if dtype.startswith(("int", "uint")) else "int64")
    if dtype.startswith(("int", "uint")):
        return np.trunc(total / len(parts)).astype(STORED[dtype])
    accumulation = np.float64 if dtype == "float64" else np.float32
    return store(total.astype(accumulation) / accumulation(len(parts)), dtype)


def outputs(
    op: str, dtype: str, reduce_op: str, rank: int, world_size: int, root: int, count: int
) -> list[Array] | None:
    """What must be in the output blocks of a rank; None where the op leaves it no output."""
    meaning = OPS[op]
    blocks = {"none": 0, "one": 1, "each": world_size}[meaning.output]
    expected = []
    for block in range(blocks):
        result = meaning.result(rank, block, world_size, root)
        if result is None:
            return None
        ranks, taken = result
        parts = [numbers(dtype, reduce_op, r, taken, count) for r in ranks]
        expected.append(reduced(parts, dtype, reduce_op) if meaning.reduces else store(parts[0], dtype))
    return expected
