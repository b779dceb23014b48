"""The interpreter: whole ops against what they mean, and its arithmetic against Python's own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from schedule.whole_ops import run_all, run_op

from hxcomm import algorithms
from hxcomm.schedule import compile_plan, interpret
from hxcomm.schedule.interpret import Memory, bfloat16_to_float32, float32_to_bfloat16, transfer

ALGORITHMS = [(op, name) for op in algorithms.OPS for name in algorithms.names(op)]
Array = NDArray[Any]


@pytest.mark.parametrize("private", [True, False], ids=["private", "mapped"])
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_every_algorithm_computes_its_op_for_odd_and_short_counts(op: str, algorithm: str, private: bool) -> None:
    for n in (1, 2, 3, 5):
        for count in {0, 1, 2, 15, 16, 17, n - 1, n, 32 * n, 33 * n + 5}:
            run_op(op, algorithm, n, count, private)


@pytest.mark.parametrize("private", [True, False], ids=["private", "mapped"])
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_long_ops_in_segments_give_the_same(op: str, algorithm: str, private: bool) -> None:
    run_op(op, algorithm, 3, count=200, private=private, segment=64)


@pytest.mark.parametrize("private", [True, False], ids=["private", "mapped"])
def test_all_to_all_takes_a_count_of_its_own_for_every_pair(private: bool) -> None:
    for n in (1, 2, 3, 6):
        counts = [[(7 * s + 3 * d) % 40 if s != d else 0 for d in range(n)] for s in range(n)]
        run_op("all_to_all", "direct", n, counts, private)
        run_op("all_to_all", "direct", n, counts, private, segment=16)


def all_reduced(
    algorithm: str, dtype: str, reduce_op: str, inputs: Sequence[Array], hosts: Sequence[int] | None = None
) -> Array:
    blocks = [[array.copy()] for array in inputs]
    memory = Memory(dtype, blocks, blocks, hosts)
    run_all("all_reduce", algorithm, len(inputs), None, True, memory, reduce_op, 1 << 40, seed=1)
    for own in blocks[1:]:
        assert own[0].tobytes() == blocks[0][0].tobytes(), "ranks differ"
    return blocks[0][0]


FOLDS = {
    "sum": sum,
    "product": lambda values: np.prod(np.array(values, dtype=object)),
    "min": min,
    "max": max,
    "avg": sum,
    "band": lambda values: reduce(operator.and_, values),
    "bor": lambda values: reduce(operator.or_, values),
    "bxor": lambda values: reduce(operator.xor, values),
}


@pytest.mark.parametrize("reduce_op", FOLDS)
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8"])
def test_integers_wrap_and_their_average_is_cut_towards_zero(dtype: str, reduce_op: str) -> None:
    info = np.iinfo(dtype)
    rng = np.random.default_rng(5)
    inputs = [rng.integers(info.min, info.max, 40, dtype=dtype, endpoint=True) for _ in range(3)]
    bits = info.bits
    expected = []
    for values in zip(*inputs, strict=True):
        value = int(FOLDS[reduce_op]([int(each) for each in values])) & (2**bits - 1)
        value -= 2**bits if info.min < 0 and value >= 2 ** (bits - 1) else 0
        if reduce_op == "avg":
            value = value // 3 if value >= 0 else -(-value // 3)
        expected.append(value)
    for algorithm in algorithms.names("all_reduce"):
        assert all_reduced(algorithm, dtype, reduce_op, inputs).tolist() == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_floats_are_summed_in_float32_and_rounded_once(dtype: str) -> None:
    """1 + 3 * 2^-12: each step alone would round back to 1 in both types; the whole sum is past half a unit."""
    small = np.float32(2.0**-11 * 0.75 if dtype == "float16" else 2.0**-8 * 0.75)
    one = np.float32(1)
    expected = one + 3 * small
    if dtype == "float16":
        inputs = [np.full(20, x, np.float16) for x in (one, small, small, small)]
        assert np.float16(one + small) == 1
        assert all_reduced("two_shot", dtype, "sum", inputs).tolist() == [float(np.float16(expected))] * 20
    else:
        inputs = [float32_to_bfloat16(np.full(20, x, np.float32)) for x in (one, small, small, small)]
        result = bfloat16_to_float32(all_reduced("ring", dtype, "sum", inputs))
        assert result.tolist() == [1 + 2.0**-6] * 20 or result.tolist() == [1 + 2.0**-7] * 20
        assert float(result[0]) == _nearest_bfloat16(Fraction(float(expected)))


def _nearest_bfloat16(value: Fraction) -> float:
    """By exact arithmetic, for values in [1, 2): units of 2^-7, ties to even."""
    return float(Fraction(round(value * 128), 128))


def test_bfloat16_rounds_to_nearest_even_and_keeps_infinities_and_nan() -> None:
    values = [Fraction(1) + Fraction(i, 1024) for i in range(1024)]
    rounded = bfloat16_to_float32(float32_to_bfloat16(np.array([float(value) for value in values], np.float32)))
    assert rounded.tolist() == [_nearest_bfloat16(value) for value in values]
    special = np.array([np.inf, -np.inf, np.nan, -np.nan, -0.0, 3.4e38], np.float32)
    assert float32_to_bfloat16(special).tolist() == [0x7F80, 0xFF80, 0x7FC0, 0x7FC0, 0x8000, 0x7F80]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_have_the_bits_of_the_left_fold_in_rank_order(dtype: str) -> None:
    rng = np.random.default_rng(9)
    inputs = [rng.standard_normal(100).astype(dtype) for _ in range(4)]
    expected = ((inputs[0] + inputs[1]) + inputs[2]) + inputs[3]
    for algorithm in ("one_shot", "two_shot"):
        assert all_reduced(algorithm, dtype, "sum", inputs).tobytes() == expected.tobytes()
        assert all_reduced(algorithm, dtype, "avg", inputs).tobytes() == (expected / np.dtype(dtype).type(4)).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_minimum_and_maximum_propagate_nan_and_order_zeros(dtype: str) -> None:
    a = np.array([1, np.nan, 0.0, -0.0, np.nan, -np.inf], dtype)
    b = np.array([2, 1, -0.0, 0.0, np.nan, np.inf], dtype)
    for algorithm in algorithms.names("all_reduce"):
        for inputs in ([a, b], [b, a]):
            low = all_reduced(algorithm, dtype, "min", inputs)
            high = all_reduced(algorithm, dtype, "max", inputs)
            np.testing.assert_array_equal(low, np.array([1, np.nan, -0.0, -0.0, np.nan, -np.inf], dtype))
            np.testing.assert_array_equal(high, np.array([2, np.nan, 0.0, 0.0, np.nan, np.inf], dtype))
            assert np.signbit(low[2:4]).all() and not np.signbit(high[2:4]).any()


def test_bool_is_or_and_and_and_any_nonzero_byte_is_true() -> None:
    inputs = [np.array([0, 0, 7, 7], np.uint8), np.array([0, 2, 0, 2], np.uint8)]
    for reduce_op, expected in {
        "sum": [0, 1, 1, 1],
        "max": [0, 1, 1, 1],
        "product": [0, 0, 0, 1],
        "min": [0, 0, 0, 1],
        "bor": [0, 1, 1, 1],
        "band": [0, 0, 0, 1],
        "bxor": [0, 1, 1, 0],
    }.items():
        for algorithm in algorithms.names("all_reduce"):
            assert all_reduced(algorithm, "bool", reduce_op, inputs).tolist() == expected


def test_partial_results_are_not_divided_and_keep_the_accumulation_type() -> None:
    partial = np.zeros(2, np.float32)
    transfer(True, False, "float16", "avg", 4, [(np.array([1, 2], np.float16), False, 1.0)] * 2, [partial])
    assert partial.tolist() == [2.0, 4.0]
    final = np.zeros(2, np.float16)
    transfer(True, True, "float16", "avg", 4, [(partial, True, 1.0), (partial, True, 1.0)], [final, final])
    assert final.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("algorithm", algorithms.names("all_reduce"))
def test_complex_products_are_those_of_python(algorithm: str) -> None:
    inputs = [np.array([1 + 2j, -3j, 0.5]), np.array([2 - 1j, 1 + 1j, 4]), np.array([1j, 2, -1 - 1j])]
    expected = [complex(a) * complex(b) * complex(c) for a, b, c in zip(*inputs, strict=True)]
    assert all_reduced(algorithm, "complex128", "product", inputs).tolist() == expected
    total = inputs[0] + inputs[1] + inputs[2]
    mean = [complex(each.real / 3, each.imag / 3) for each in total]
    assert all_reduced(algorithm, "complex128", "avg", inputs).tolist() == mean


@pytest.mark.parametrize("algorithm", algorithms.names("all_reduce"))
def test_every_factor_multiplies_its_own_elements_once(algorithm: str) -> None:
    """255 * 1.0078125 + 0.03125 is 257.02: rounded to bfloat16 before the sum it would end at 256, not 258."""
    factors = [1.0078125, 2.0, -1.0]
    given = [np.full(40, each, np.float32) for each in (255, 0.015625, 0)]
    for dtype, expected in (("float32", 257.0234375), ("bfloat16", 258.0)):
        narrow = float32_to_bfloat16 if dtype == "bfloat16" else np.copy
        blocks = [[narrow(each)] for each in given]
        memory = Memory(dtype, blocks, blocks)
        plans = [compile_plan(algorithms.build("all_reduce", algorithm, 3, None), rank, True) for rank in range(3)]
        running = [
            interpret.run(plan, memory, "premul_sum", factor=factor)
            for plan, factor in zip(plans, factors, strict=True)
        ]
        for _ in range(1000):
            running = [each for each in running if next(each, None) is not None]
        assert not running
        for own in blocks:
            result = bfloat16_to_float32(own[0]) if dtype == "bfloat16" else own[0]
            assert result.tolist() == [expected] * 40


def test_a_reduction_that_has_no_meaning_is_refused() -> None:
    for dtype, reduce_op in (("bool", "avg"), ("complex64", "min"), ("int32", "xor"), ("int8", "premul_sum")):
        with pytest.raises(ValueError, match=f"cannot reduce {dtype} with {reduce_op}"):
            transfer(True, True, dtype, reduce_op, 2, [(np.zeros(1), False, 1.0)], [np.zeros(1)])
