"""hxcomm/virtual/op_records.py: bytes and multiplications of ops, from shapes alone, in exact numbers."""

from __future__ import annotations

import pytest
import torch

from hxcomm.sim.costs import OpRecord
from hxcomm.virtual.op_records import TensorMeta, record_of


def meta(*shape: int, dtype: str = "float16") -> TensorMeta:
    return TensorMeta.of(torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))


def test_a_tensor_counts_the_bytes_that_it_addresses_not_those_that_it_repeats() -> None:
    whole = torch.empty(4, 8, dtype=torch.float32, device="meta")
    assert TensorMeta.of(whole) == TensorMeta((4, 8), (8, 1), "float32", 128)
    assert TensorMeta.of(whole[:, :2]).nbytes == 32
    assert TensorMeta.of(whole[:1].expand(4, 8)).nbytes == 32
    assert TensorMeta.of(whole[:0]).nbytes == 0


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten::mm", (meta(3, 64), meta(64, 32))),
        ("aten::addmm", (meta(32), meta(3, 64), meta(64, 32))),
        ("aten::linear", (meta(3, 64), meta(32, 64))),
    ],
)
def test_a_product_with_weights_reads_all_of_them_once(name: str, args: tuple[TensorMeta, ...]) -> None:
    output = meta(3, 32)
    nbytes = sum(each.nbytes for each in args) + 3 * 32 * 2
    assert record_of(name, args, [output]) == OpRecord(name, "weights", nbytes, 2 * 3 * 64 * 32, "float16")


def test_attention_reads_the_cache_once_for_all_heads_that_share_it() -> None:
    query, cache = meta(2, 8, 1, 64), meta(2, 2, 100, 64)
    record = record_of(
        "aten::_scaled_dot_product_flash_attention_for_cpu", (query, cache, cache, 0.0, False), [query, meta(2, 8, 1)]
    )
    nbytes = 2 * (2 * 8 * 64 * 2) + 2 * (2 * 2 * 100 * 64 * 2) + 2 * 8 * 2
    assert record == OpRecord(record.name, "kv_cache", nbytes, 2 * 2 * (2 * 8) * 100 * 64, "float16")
    short = record_of("aten::_scaled_dot_product_flash_attention_for_cpu", (query, cache, cache), [query])
    assert short.flops == record.flops  # the tensors suffice


@pytest.mark.parametrize(
    ("name", "args", "output", "nbytes"),
    [
        ("aten::embedding", (meta(1000, 64), meta(3, dtype="int64"), -1), meta(3, 64), 3 * 8 + 2 * 3 * 128),
        ("aten::index_select", (meta(1000, 64), 0, meta(3, dtype="int64")), meta(3, 64), 3 * 8 + 2 * 3 * 128),
        ("aten::index", (meta(1000, 64), [None, meta(3, dtype="int64")]), meta(1000, 3), 3 * 8 + 2 * 6000),
        ("aten::gather", (meta(9, 64), 1, meta(9, 2, dtype="int64")), meta(9, 2), 9 * 2 * 8 + 2 * 36),
    ],
)
def test_a_lookup_reads_only_the_rows_that_it_returns(
    name: str, args: tuple[object, ...], output: TensorMeta, nbytes: int
) -> None:
    assert record_of(name, args, [output]).nbytes == nbytes


def test_a_store_into_a_cache_writes_only_what_it_is_given() -> None:
    cache, rows, index = meta(1000, 64), meta(3, 64), meta(3, dtype="int64")
    assert record_of("aten::index_copy_", (cache, 0, index, rows), [cache]).nbytes == 3 * 8 + 2 * 3 * 128
    assert record_of("aten::_index_put_impl_", (cache, [index], rows), [cache]).nbytes == 3 * 8 + 2 * 3 * 128
    assert record_of("aten::copy_", (rows, rows), [rows]).nbytes == 2 * 3 * 128
    assert record_of("aten::zero_", (rows,), [rows]).nbytes == 3 * 128


@pytest.mark.parametrize(
    "name", ["view", "transpose", "slice", "t", "expand", "unbind", "empty", "_unsafe_view", "detach"]
)
def test_what_only_relabels_costs_nothing(name: str) -> None:
    record = record_of(f"aten::{name}", (meta(4, 4),), [meta(4, 4)])
    assert (record.nbytes, record.flops) == (0, 0)


@pytest.mark.parametrize(("name", "inputs"), [("add_", 2), ("silu", 1), ("clone", 1), ("mul", 2), ("cat", 3)])
def test_other_ops_read_their_arguments_and_write_their_result(name: str, inputs: int) -> None:
    args = [[meta(4, 4)] * inputs] if name == "cat" else [meta(4, 4)] * inputs
    record = record_of(f"aten::{name}", args, [meta(4, 4)])
    assert record == OpRecord(f"aten::{name}", "other", (inputs + 1) * 32, 0, "float16")


def test_the_flops_are_those_of_torchs_own_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    a, b = torch.empty(5, 7, 9, device="meta"), torch.empty(5, 9, 11, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.bmm(a, b)
    record = record_of("aten::bmm", (TensorMeta.of(a), TensorMeta.of(b)), [meta(5, 7, 11, dtype="float32")])
    assert record.flops == counter.get_total_flops()


def test_scalars_among_the_arguments_of_a_product_change_nothing() -> None:
    args = (meta(5, 7, 11), meta(5, 7, 9), meta(5, 9, 11))
    plain = record_of("aten::baddbmm", args, [meta(5, 7, 11)])
    assert record_of("aten::baddbmm", (*args, 1.0, 0.5), [meta(5, 7, 11)]) == plain
    assert plain.flops == 2 * 5 * 7 * 9 * 11


def test_an_op_of_another_library_counts_its_tensors() -> None:
    assert record_of("hxcomm::nothing_known", (meta(4, 4), 3), [meta(4)]).nbytes == 32 + 8
    assert record_of("nobody::nothing_known", (meta(4, 4), None), [meta(4)]).nbytes == 32 + 8
