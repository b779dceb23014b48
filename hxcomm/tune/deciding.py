"""What is worth measuring, and which rows of the table follow from the times. Knows nothing of torch or of clocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hxcomm import algorithms
from hxcomm.schedule.crossing import ranks_by_host
from hxcomm.select import CROSSING_SEGMENT_BYTES, SEGMENT_BYTES, Layout, default_algorithm, keeps_rank_order
from hxcomm.tuning import Measured, Row

SEGMENTS = (256 << 10, 1 << 20, 2 << 20)
LARGE_BYTES = 1 << 20  # blocks from here on run in several windows of most of SEGMENTS
# By how much another choice must be faster than the built-in one: medians of two runs of the same plan differ by a few
# percent, and a table that changes from run to run without a reason helps nobody.
MARGIN = 0.05


@dataclass(frozen=True)
class Variant:
    """What is measured: an algorithm, with windows of `segment_bytes`; None: of the built-in length."""

    algorithm: str
    segment_bytes: int | None


def default_segment(layout: Layout) -> int:
    return SEGMENT_BYTES if layout.n_hosts == 1 else CROSSING_SEGMENT_BYTES


def candidates(op: str, layout: Layout, rank_order: bool) -> list[str]:
    """The algorithms that the built-in choice could make unasked: those in rank order, and, where ranks share hosts
    but not one, hierarchical ones. `rank_order`: that is asked for on any layout."""
    shared = layout.n_hosts > 1 and max(map(len, ranks_by_host(layout.hosts))) > 1

    def may_run(name: str) -> bool:
        if name == "hierarchical":
            return shared and (not rank_order or keeps_rank_order(op, name, layout))
        return keeps_rank_order(op, name, layout)

    return [name for name in algorithms.names(op) if may_run(name)]


def variants(op: str, block_bytes: int, device: str, layout: Layout, rank_order: bool) -> list[Variant]:
    """None where there is nothing to choose."""
    windows = SEGMENTS if device == "cpu" and block_bytes >= LARGE_BYTES else (None,)
    found = [Variant(name, segment) for name in candidates(op, layout, rank_order) for segment in windows]
    return found if len(found) > 1 else []


def decide(
    op: str,
    device: str,
    measured: Sequence[tuple[int, Mapping[Variant, float]]],
    layout: Layout,
    rank_order: bool,
) -> list[Row]:
    """One row for each block size; `measured` has them ascending, with the microseconds of each variant.

    Between two sizes the border is their geometric mean; as far beyond the largest the last row holds.
    """
    rows = []
    for i, (nbytes, times) in enumerate(measured):
        up_to = math.isqrt(nbytes * measured[i + 1][0]) if i + 1 < len(measured) else 2 * nbytes
        best = min(times, key=lambda variant: times[variant])
        built_in = _built_in(op, device, nbytes, times, layout, rank_order)
        if times[best] > (1 - MARGIN) * times[built_in]:
            best = built_in
        others = {variant: us for variant, us in times.items() if variant.algorithm != best.algorithm}
        second = min(others, key=lambda variant: others[variant], default=None)
        runner_up = None if second is None else _measured(second, others[second])
        rows.append(Row(op, device, up_to, nbytes, **_measured(best, times[best]).__dict__, runner_up=runner_up))
    return rows


def _built_in(
    op: str, device: str, nbytes: int, times: Mapping[Variant, float], layout: Layout, rank_order: bool
) -> Variant:
    name, _ = default_algorithm(op, nbytes, layout, mapped=device == "hx", rank_order=rank_order)
    plain = Variant(name, None)
    return plain if plain in times else Variant(name, default_segment(layout))


def _measured(variant: Variant, us: float) -> Measured:
    return Measured(variant.algorithm, variant.segment_bytes, float(f"{us:.3g}"))
