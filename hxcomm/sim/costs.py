"""What an op costs on a chip: its bytes and its multiplications against the chip's rates (the roofline).

    time = max(bytes / achieved bandwidth, flops / achieved rate of the dtype) + fixed cost

(Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009.) A vendor who knows better replaces it op by op, with a
table of measured times or a function of his own. Knows neither torch nor who recorded the op.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from hxcomm.sim.chips import DTYPES, PS_PER_NS, PS_PER_S, Chip, ChipError, exact, ns_to_ps

KINDS = ("weights", "kv_cache", "other")


class CostError(ValueError):
    """A cost table or function that cannot be used. The text says where and what is allowed."""


class OpRecord(NamedTuple):
    """One executed op of one rank."""

    name: str  # aten::mm
    kind: str  # of KINDS: what most of its bytes are
    nbytes: int  # read and written in the chip's memory
    flops: int  # a multiplication and an addition are two
    dtype: str  # float16: at which rate the flops are done


# What a vendor's function may return: picoseconds, or None where the roofline shall stand.
Override = Callable[[OpRecord], "int | None"]


class CostModel:
    """The time of ops on one chip. `table` is `table:FILE.csv` or `python:MODULE.FUNCTION`; raises CostError."""

    def __init__(self, chip: Chip, table: str | None = None) -> None:
        self._bytes_per_s = chip.memory.achieved_bytes_per_s
        self._flops_per_s = {dtype: _rate(chip, dtype) for dtype in DTYPES}
        self._fixed_ps = ns_to_ps(chip.compute.fixed_ns_per_op)
        self._override = None if table is None else _override(table, chip)
        self._known: dict[OpRecord, int] = {}

    def op_ps(self, record: OpRecord) -> int:
        """How long the op takes. An op that touches nothing (a view, an allocation) takes no time at all."""
        time_ps = self._known.get(record)
        if time_ps is None:
            time_ps = self._known[record] = self._compute(record)
        return time_ps

    def _compute(self, record: OpRecord) -> int:
        if self._override is not None:
            time_ps = self._override(record)
            if time_ps is not None:
                return time_ps
        if record.nbytes == 0 and record.flops == 0:
            return 0
        longest = record.nbytes * PS_PER_S / self._bytes_per_s
        if record.flops:
            # float64 and int64, of which chip files know no rate, as the widest type that they may know.
            rate = self._flops_per_s.get(record.dtype, self._flops_per_s["float32"])
            longest = max(longest, record.flops * PS_PER_S / rate)
        return round(longest) + self._fixed_ps


def _rate(chip: Chip, dtype: str) -> Fraction:
    """Achieved, of the dtype or the next wider one, else of the widest one that the chip names: a run in float32 on a
    chip for float16 is costed as if it were in float16, rather than not at all.
    """
    try:
        peak = chip.compute.peak_flops_per_s(dtype)
    except ChipError:
        peak = next(chip.compute.flops_per_s[each] for each in DTYPES if each in chip.compute.flops_per_s)
    return exact(peak) * exact(chip.compute.achieved)


def _override(table: str, chip: Chip) -> Override:
    kind, colon, where = table.partition(":")
    if colon and where and kind == "table":
        return _read_table(Path(where))
    if colon and where and kind == "python":
        return _find_function(where, chip)
    raise CostError(
        f"{table!r} names no costs: write table:FILE.csv for a table of times, or python:MODULE.FUNCTION for a "
        "function of (record, chip) that returns picoseconds, or None for the roofline"
    )


COLUMNS = ("op", "kind", "dtype", "nbytes", "flops", "time_ns")


def _read_table(path: Path) -> Override:
    """Rows of COLUMNS; an empty cell matches anything, and the first row that matches counts."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise CostError(f"table:{path}: cannot be read: {error.strerror}") from None
    if not lines or tuple(lines[0]) != COLUMNS:
        raise CostError(f"{path}:1: the first line must be {','.join(COLUMNS)}")
    rows = [_read_row(f"{path}:{number}", cells) for number, cells in enumerate(lines[1:], start=2) if cells]

    def look_up(record: OpRecord) -> int | None:
        values = (record.name, record.kind, record.dtype, str(record.nbytes), str(record.flops))
        for wanted, time_ps in rows:
            if all(cell in ("", value) for cell, value in zip(wanted, values, strict=True)):
                return time_ps
        return None

    return look_up


def _read_row(where: str, cells: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """What a record must be (its fields as text, "" for any), and its time."""
    if len(cells) != len(COLUMNS):
        raise CostError(f"{where}: {len(cells)} cells, but the columns are {','.join(COLUMNS)}")
    *wanted, time = (cell.strip() for cell in cells)
    if wanted[1] not in ("", *KINDS):
        raise CostError(f"{where}: kind {wanted[1]!r} is none of {', '.join(KINDS)} (or empty for any)")
    for name, cell in zip(("nbytes", "flops"), wanted[3:], strict=True):
        if cell and not cell.isdecimal():
            raise CostError(f"{where}: {name} {cell!r} is not a whole number (or empty for any)")
    try:
        time_ps = round(float(time) * PS_PER_NS)
    except (ValueError, OverflowError):
        time_ps = -1
    if time_ps < 0:
        raise CostError(f"{where}: time_ns {time!r} is not a number of nanoseconds, 0 or more")
    return tuple(wanted), time_ps


def _find_function(where: str, chip: Chip) -> Override:
    module_name, _, name = where.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), name) if module_name else None
    except (ImportError, AttributeError) as error:
        raise CostError(f"python:{where}: {error}") from error
    if not callable(function):
        raise CostError(f"python:{where}: write MODULE.FUNCTION, of a function of (record, chip)")

    def ask(record: OpRecord) -> int | None:
        time_ps = function(record, chip)
        if time_ps is not None and (not isinstance(time_ps, int) or time_ps < 0):
            raise CostError(
                f"python:{where}: returned {time_ps!r} for {record}: it must be whole picoseconds, 0 or more, or None"
            )
        return time_ps

    return ask
