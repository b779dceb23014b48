"""hxcomm/sim/costs.py: the roofline in exact picoseconds, what replaces it, and errors that say what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hxcomm.sim.chips import Chip, Collective, Compute, Legal, Links, Memory
from hxcomm.sim.costs import CostError, CostModel, OpRecord


def chip(**changes: Any) -> Chip:
    """2e12 B/s of which half is achieved, 100e12 flops/s of which a tenth is."""
    values: dict[str, Any] = {
        "bandwidth": 2e12,
        "memory_achieved": 0.5,
        "flops": {"float32": 50e12, "float16": 100e12},
        "compute_achieved": 0.1,
        "fixed_ns": 0,
        **changes,
    }
    return Chip(
        name="test",
        description="",
        overlap_chunks=1,
        memory=Memory(values["bandwidth"], capacity_bytes=1e9, achieved=values["memory_achieved"]),
        compute=Compute(values["flops"], achieved=values["compute_achieved"], fixed_ns_per_op=values["fixed_ns"]),
        collective=Collective(),
        links=(Links("ring", 1e9, 100, "cut_through"),),
        legal=Legal(),
        power=None,
        sources={},
    )


def record(nbytes: int = 0, flops: int = 0, dtype: str = "float16", name: str = "aten::mm") -> OpRecord:
    return OpRecord(name, "weights", nbytes, flops, dtype)


def test_an_op_takes_what_its_bytes_or_its_flops_take_whichever_is_longer() -> None:
    model = CostModel(chip())
    assert model.op_ps(record(nbytes=3_000_000)) == 3_000_000  # 1e12 B/s: a byte a picosecond
    assert model.op_ps(record(flops=5_000_000)) == 500_000  # 10e12 flops/s
    assert model.op_ps(record(nbytes=3_000_000, flops=5_000_000)) == 3_000_000
    assert model.op_ps(record(nbytes=3_000_000, flops=50_000_000)) == 5_000_000


def test_the_fixed_cost_is_added_to_every_op_but_not_to_a_view() -> None:
    model = CostModel(chip(fixed_ns=2.5))
    assert model.op_ps(record(nbytes=1000)) == 1000 + 2500
    assert model.op_ps(record()) == 0


def test_every_rate_and_fraction_changes_the_time_that_depends_on_it() -> None:
    by_bytes, by_flops = record(nbytes=8_000_000), record(flops=8_000_000)
    before = CostModel(chip())
    for change, touched in (
        ({"bandwidth": 4e12}, by_bytes),
        ({"memory_achieved": 1.0}, by_bytes),
        ({"flops": {"float16": 200e12}}, by_flops),
        ({"compute_achieved": 0.2}, by_flops),
    ):
        assert CostModel(chip(**change)).op_ps(touched) * 2 == before.op_ps(touched), change
    assert CostModel(chip(fixed_ns=1)).op_ps(by_bytes) == before.op_ps(by_bytes) + 1000


@pytest.mark.parametrize(
    ("dtype", "picoseconds"),
    [("float16", 2), ("bfloat16", 2), ("float8", 2), ("int8", 2), ("int4", 2), ("float32", 4), ("float64", 4)],
)
def test_a_dtype_without_a_rate_goes_at_the_rate_of_the_next_wider_one(dtype: str, picoseconds: int) -> None:
    model = CostModel(chip(flops={"float32": 50e12, "float16": 100e12}, compute_achieved=1.0))
    assert model.op_ps(record(flops=200, dtype=dtype)) == picoseconds


def test_the_nearest_of_several_wider_dtypes_stands_in() -> None:
    model = CostModel(chip(flops={"float32": 1e12, "float16": 2e12, "float8": 4e12}, compute_achieved=1.0))
    assert model.op_ps(record(flops=8, dtype="int4")) == 2
    assert model.op_ps(record(flops=8, dtype="bfloat16")) == 4
    assert CostModel(chip(flops={"float16": 2e12}, compute_achieved=1.0)).op_ps(record(flops=8, dtype="float32")) == 4


def test_a_table_replaces_the_roofline_for_the_ops_that_it_names(tmp_path: Path) -> None:
    table = tmp_path / "ops.csv"
    table.write_text(
        "op,kind,dtype,nbytes,flops,time_ns\naten::mm,weights,float16,1000,,7.5\naten::mm,,float32,,,9\n\n,,,64,,0\n"
    )
    model = CostModel(chip(), f"table:{table}")
    assert model.op_ps(record(nbytes=1000, flops=123)) == 7500
    assert model.op_ps(record(nbytes=2000)) == 2000  # no row: the roofline
    assert model.op_ps(record(nbytes=2000, dtype="float32")) == 9000
    assert model.op_ps(record(nbytes=64)) == 0


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("op,time\n", ":1: the first line must be op,kind,dtype,nbytes,flops,time_ns"),
        ("op,kind,dtype,nbytes,flops,time_ns\naten::mm,,,\n", ":2: 4 cells"),
        ("op,kind,dtype,nbytes,flops,time_ns\naten::mm,heavy,,,,1\n", ":2: kind 'heavy' is none of weights, kv_cache"),
        ("op,kind,dtype,nbytes,flops,time_ns\n,,,,,1\naten::mm,,,-4,,1\n", ":3: nbytes '-4' is not a whole number"),
        ("op,kind,dtype,nbytes,flops,time_ns\naten::mm,,,,,nan\n", ":2: time_ns 'nan' is not a number of nanoseconds"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(tmp_path: Path, lines: str, expected: str) -> None:
    table = tmp_path / "ops.csv"
    table.write_text(lines)
    with pytest.raises(CostError) as caught:
        CostModel(chip(), f"table:{table}")
    assert str(table) + expected in str(caught.value)


def test_a_function_replaces_the_roofline_where_it_returns_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_costs.py").write_text(
        "def cycles(record, chip):\n    return 5 if record.flops == 1 else None\n"
        "def wrong(record, chip):\n    return 1.5\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = CostModel(chip(), "python:my_costs.cycles")
    assert model.op_ps(record(nbytes=100, flops=1)) == 5
    assert model.op_ps(record(nbytes=100)) == 100
    with pytest.raises(CostError, match=r"python:my_costs\.wrong: returned 1\.5 .*whole picoseconds"):
        CostModel(chip(), "python:my_costs.wrong").op_ps(record(nbytes=1))


@pytest.mark.parametrize(
    "table", ["ops.csv", "table:", "csv:ops.csv", "python:nothing_here.f", "python:json.no", "python:json"]
)
def test_a_cost_source_that_does_not_exist_is_refused_with_what_is_allowed(table: str) -> None:
    with pytest.raises(CostError):
        CostModel(chip(), table)
