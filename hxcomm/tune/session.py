"""One run of the measurement: a group for each variant, the ladder of sizes within the budget, and the table.

Control traffic goes over gloo, torch's default group here, as in hxcomm.bench.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import hxcomm
from hxcomm import environment
from hxcomm.bench.arguments import UsageError
from hxcomm.bench.operations import OPERATIONS, ROOT, Buffers, Case, Group, Operation, case_of
from hxcomm.bench.session import under_torchrun, use_chip
from hxcomm.bench.timing import BLOCKS, MAX_ITERATIONS, Step, idle, measure, over_ranks, sample, touching
from hxcomm.c10d import BACKEND, Options, register_backend
from hxcomm.select import Layout, register_selector
from hxcomm.tune import arguments
from hxcomm.tune.arguments import Settings
from hxcomm.tune.deciding import Variant, candidates, decide, default_segment, variants
from hxcomm.tuning import Table

TIMEOUT = datetime.timedelta(seconds=120)
ENOUGH_S = 0.8  # for one variant at one size; what small sizes leave of the budget goes to large ones
MIN_ITERATIONS = 5
Times = list[tuple[int, Mapping[Variant, float]]]  # by block size: microseconds of each variant


def _run_reduce(case: Case, buffers: Buffers, group: Group) -> Callable[[], object]:
    assert buffers.output is not None
    tensor = buffers.output.tensor
    return lambda: dist.reduce(tensor, dst=ROOT, group=group)


MEASURED: Mapping[str, Operation] = {**OPERATIONS, "reduce": replace(OPERATIONS["all_reduce"], run=_run_reduce)}


@dataclass(frozen=True)
class Cell:
    """One op at one size on one device, with what there is to choose from."""

    op: str
    device: str
    case: Case
    block_bytes: int
    variants: list[Variant]


class Session:
    """What the ranks of one run share. Every method is collective."""

    def __init__(self, settings: Settings) -> None:
        self.began = time.monotonic()
        self.settings = settings
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.rank_order = environment.DETERMINISM.get() == "layout"
        self.layout = _layout()
        self.groups: dict[Variant, Group] = {}
        self.left_out: list[Cell] = []

    def run(self) -> Table:
        times: dict[tuple[str, str], Times] = {}
        cells = self._cells()
        progress, say = _progress(cells, shown=self.rank == 0)
        for i, cell in enumerate(progress):
            say(f"{cell.op} {cell.case.nbytes} B {cell.device}")
            measured = self._measure(cell, len(cells) - i)
            if measured is None:
                self.left_out.append(cell)
            else:
                times.setdefault((cell.op, cell.device), []).append((cell.block_bytes, measured))
        rows = [
            row
            for (op, device), found in sorted(times.items())
            for row in decide(op, device, found, self.layout, self.rank_order)
        ]
        return Table(self.world_size, self.layout.hosts, hxcomm.__version__, _made(), tuple(rows))

    def _cells(self) -> list[Cell]:
        """Small sizes of all ops first: what the budget does not reach is the largest of each."""
        cells: dict[tuple[str, str, int], Cell] = {}
        for size in self.settings.sizes:
            for op in self.settings.ops:
                for device in self.settings.devices:
                    case = _case(op, size, self.rank, self.world_size, device)
                    block = case.count * case.torch_dtype.itemsize
                    if found := variants(op, block, device, self.layout, self.rank_order):
                        cells.setdefault((op, device, block), Cell(op, device, case, block, found))
        return list(cells.values())

    def _measure(self, cell: Cell, cells_left: int) -> Mapping[Variant, float] | None:
        """Microseconds of each variant; None where that would take more than what is left of the budget."""
        left_s = over_ranks(self.settings.budget_s - (time.monotonic() - self.began), op=dist.ReduceOp.MIN)
        if left_s <= 0:
            return None
        operation = MEASURED[cell.op]
        buffers = operation.make(cell.case)
        calls = {each: operation.run(cell.case, buffers, self._group(each)) for each in cell.variants}
        each_s = over_ranks(_seconds_of_each(list(calls.values()), buffers), op=dist.ReduceOp.MAX)
        share_s = min(ENOUGH_S * len(calls), left_s / cells_left)
        affordable = max(MIN_ITERATIONS, min(MAX_ITERATIONS, int(share_s / each_s) - BLOCKS))
        iterations = self.settings.iterations or affordable
        if (iterations + min(BLOCKS, iterations)) * each_s > left_s:
            return None
        # Touched at all sizes, unlike in hxcomm.bench: the times are compared with each other, and what is subtracted
        # is the same for all of them.
        names = {f"{each.algorithm} {each.segment_bytes}": each for each in calls}
        times = measure(
            {name: calls[each] for name, each in names.items()}, buffers, touched=True, iterations=iterations
        )
        return {names[name]: 1e6 * found.p50_s for name, found in times.items()}

    def _group(self, variant: Variant) -> Group:
        """Of all ranks, which runs every op that has the algorithm with it."""
        if variant not in self.groups:
            asked = {
                op: variant.algorithm
                for op in arguments.OPS
                if variant.algorithm in candidates(op, self.layout, self.rank_order)
            }
            segment = variant.segment_bytes or default_segment(self.layout)
            self.groups[variant] = _new_group(Options(asked, segment))
        return self.groups[variant]


def _case(op: str, size: int, rank: int, world_size: int, device: str) -> Case:
    like = "all_reduce" if op == "reduce" else op
    return case_of(like, size, "float32", "sum", rank, world_size, device)


def _seconds_of_each(calls: Sequence[Step], buffers: Buffers) -> float:
    """One iteration of every variant and of touching alone."""
    total = 0.0
    for call in [*calls, idle]:
        step = touching(call, buffers)
        step()  # makes the plan and touches new memory
        total += 1e-9 * min(sample(step, 2))
    return max(total, 1e-9)


def _new_group(options: Options) -> Group:
    return dist.new_group(backend=BACKEND, timeout=TIMEOUT, pg_options=options)


def _layout() -> Layout:
    """Where the ranks are, as a group of hxcomm has found out: it tells the selectors."""
    told: list[Layout] = []

    def listen(op: str, nbytes: int, dtype: str, layout: Layout, chip: str | None) -> None:
        told.append(layout)

    register_selector(listen)
    dist.barrier(group=_new_group(Options()))
    return told[-1]


def _made() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "on": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _progress(cells: list[Cell], *, shown: bool) -> tuple[Iterable[Cell], Callable[[str], object]]:
    """The cells with a bar on a terminal, and what writes beside it. Without tqdm there is none."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return cells, lambda text: None
    bar = tqdm(cells, unit="size", disable=None if shown else True, leave=False)
    return bar, bar.set_description


def main(argv: Sequence[str] | None = None) -> int:
    """Measures on this rank; rank 0 writes the table. Returns 0, or 2 for a wrong command."""

    def prepare() -> Settings:
        settings = arguments.parse(argv)
        if "hx" in settings.devices:
            use_chip()
        return settings

    return under_torchrun("hxcomm.tune", prepare, _run)


def _run(settings: Settings) -> int:
    if dist.get_world_size() == 1:
        raise UsageError("there is nothing to choose for one rank: start 2 or more")
    register_backend()  # where hxcomm is used from its source tree, torch has not found it by itself
    session = Session(settings)
    table = session.run()
    if session.rank == 0:
        settings.out.write_text(table.text(), encoding="utf-8")
        print(summary(table, session), flush=True)
    dist.barrier()
    return 0


def summary(table: Table, session: Session) -> str:
    """What is in the table, a line a row, and what is not."""
    lines = [f"{'op':>14} {'device':>6} {'up to B':>10} {'algorithm':>14} {'segment':>9} {'us':>9}  runner-up"]
    for row in table.rows:
        other = f"{row.runner_up.algorithm} {row.runner_up.us:g}" if row.runner_up else "-"
        segment = row.segment_bytes or "-"
        line = f"{row.op:>14} {row.device:>6} {row.up_to_bytes:>10} {row.algorithm:>14} {segment:>9} {row.us:>9g}"
        lines.append(f"{line}  {other}")
    for cell in session.left_out:
        lines.append(
            f"left out: {cell.op} of {cell.case.nbytes} bytes on {cell.device}, which does not fit in "
            f"--budget-s {session.settings.budget_s:g}; the built-in choice holds there"
        )
    lines.append(f"for {table.where()}: HXCOMM_TUNING={session.settings.out}")
    return "\n".join(lines)
