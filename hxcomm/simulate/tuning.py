"""`hxcomm tune --chip`: the table of choices of simulated links, in the format of measured ones.

It is for tensors of device hx, which are the simulated chips' own, and says of itself that it was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import hxcomm
from hxcomm import algorithms
from hxcomm.bench.arguments import UsageError
from hxcomm.schedule import OPS
from hxcomm.sim.chips import Chip
from hxcomm.sim.interconnect import Interconnect
from hxcomm.simulate import sweep
from hxcomm.simulate.arguments import ITEM_BYTES, Settings, block_bytes
from hxcomm.simulate.sweep import Sweep
from hxcomm.tune.arguments import BUDGET_S
from hxcomm.tune.arguments import Settings as TuneSettings
from hxcomm.tuning import Measured, Row, Table

DEVICE = "hx"
DTYPE = "float16"


def run(asked: TuneSettings, network: Interconnect, chip: Chip) -> int:
    """Writes the table and prints it. Raises UsageError where no op has a legal algorithm."""
    if asked.iterations is not None or asked.budget_s != BUDGET_S:
        raise UsageError("--iters and --budget-s are of measurements; with --chip nothing is measured: leave them out")
    sweeps = [_sweep(op, asked.sizes, network, chip) for op in asked.ops]
    table = table_of(sweeps, network, chip)
    if not table.rows:
        raise UsageError(f"no algorithm of {', '.join(asked.ops)} is legal on these links: see `hxcomm simulate`")
    asked.out.write_text(table.text(), encoding="utf-8")
    print(_text(table, sweeps))
    print(f"simulated, for {table.where()}: HXCOMM_TUNING={asked.out}")
    return 0


def table_of(sweeps: Sequence[Sweep], network: Interconnect, chip: Chip) -> Table:
    n = network.world_size
    simulated = {"chip": chip.name, "digest": chip.digest, "links": network.text(), "dtype": DTYPE}
    rows = [row for each in sweeps for row in _rows(each)]
    return Table(n, (0,) * n, hxcomm.__version__, {"simulated": simulated}, tuple(rows))


def _sweep(op: str, sizes: Sequence[int], network: Interconnect, chip: Chip) -> Sweep:
    """Sizes whose blocks are empty or equal to those of another size are left out. As on one host: simulated chips are
    the memory of one machine."""
    n, itemsize = network.world_size, ITEM_BYTES[DTYPE]
    blocks = {block_bytes(op, size, n, itemsize): size for size in sorted(sizes, reverse=True)}
    kept = tuple(sorted(size for nbytes, size in blocks.items() if nbytes))
    root = 0 if OPS[op].rooted else None
    settings = Settings(op, chip, network, kept, tuple(algorithms.names(op)), dtype=DTYPE, root=root)
    return sweep.run(settings, hosts=None)


def _rows(found: Sweep) -> list[Row]:
    """Between two sizes the border is the geometric mean of their blocks; as far beyond the largest the last row holds,
    as in measured tables."""
    rows = []
    sizes = sorted(found.fastest)
    for i, size in enumerate(sizes):
        best, *others = found.at(size)
        following = found.fastest[sizes[i + 1]].nbytes if i + 1 < len(sizes) else None
        up_to = 2 * best.nbytes if following is None else math.isqrt(best.nbytes * following)
        runner_up = Measured(others[0].algorithm, None, _us(others[0].total_ps)) if others else None
        us = _us(best.total_ps)
        rows.append(Row(found.settings.op, DEVICE, up_to, best.nbytes, best.algorithm, None, us, runner_up))
    return rows


def _us(ps: int) -> float:
    return ps / 10**6


def _text(table: Table, sweeps: Sequence[Sweep]) -> str:
    lines = [f"{'op':>14} {'up to (B)':>11} {'algorithm':>20} {'time (us)':>10}  next best"]
    for row in table.rows:
        other = f"{row.runner_up.algorithm} {row.runner_up.us:g} us" if row.runner_up else ""
        lines.append(f"{row.op:>14} {row.up_to_bytes:>11} {row.algorithm:>20} {row.us:>10g}  {other}".rstrip())
    lines += [
        f"left out: {each.settings.op}: no algorithm is legal on these links; the built-in choice holds"
        for each in sweeps
        if not each.rows
    ]
    return "\n".join(lines)
