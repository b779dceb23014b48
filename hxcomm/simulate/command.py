"""Runs `hxcomm simulate`: times, prints, draws and writes what the settings ask for."""

from __future__ import annotations

import json
import sys

from hxcomm.bench.arguments import UsageError
from hxcomm.sim import pictures
from hxcomm.sim.engine import Timing
from hxcomm.sim.trace import write_trace
from hxcomm.simulate import report, sweep
from hxcomm.simulate.arguments import Settings
from hxcomm.simulate.sweep import Row, Sweep


def run(settings: Settings) -> int:
    """The exit status: 1 where an algorithm that was named, or all of them, cannot run on these links."""
    found = sweep.run(settings, settings.network.hosts)
    row = _point(found)
    timing = None if row is None else found.look_into(row.size, row.algorithm)
    if settings.json:
        print(json.dumps(report.as_object(found, row, timing)))
    else:
        _print(found, row, timing)
    if row is not None and timing is not None:
        _write(found, row, timing)
    wrong = bool(found.refused) and (settings.forced or not found.rows)
    if wrong and settings.json:
        print(report.refusals(found), file=sys.stderr)
    return 1 if wrong else 0


def _point(found: Sweep) -> Row | None:
    """What to look into: what was asked for, or the fastest at the largest size. Raises UsageError."""
    asked = found.settings.point
    if asked is None or not found.rows:
        return found.fastest[max(found.fastest)] if found.rows else None
    size, algorithm = asked
    if algorithm not in found.schedules:
        raise UsageError(f"--critical-path: {algorithm} is not legal on these links: {dict(found.refused)[algorithm]}")
    matching = [row for row in found.rows if (row.size, row.algorithm) == asked]
    if not matching:
        sizes = ", ".join(pictures.size_text(each) for each in found.settings.sizes)
        raise UsageError(f"--critical-path: {size} bytes are not among the sizes of this run: {sizes}")
    return matching[0]


def _print(found: Sweep, row: Row | None, timing: Timing | None) -> None:
    parts = [report.heading(found)]
    if found.rows:
        parts += [report.table(found), report.winners(found)]
    if found.refused:
        parts.append(report.refusals(found))
    if row is not None and timing is not None:
        parts.append(report.looked_into(found, row, timing))
    print("\n\n".join(parts))


def _write(found: Sweep, row: Row, timing: Timing) -> None:
    settings = found.settings
    title = f"{settings.op}, {settings.n} chips {settings.chip.name}, {settings.dtype}"
    what = f"{title}: {row.algorithm}, {pictures.size_text(row.size)}, {pictures.time_text(timing.total_ps)}"
    if settings.plot is not None:
        times: dict[str, dict[int, int]] = {}
        for each in found.rows:
            times.setdefault(each.algorithm, {})[each.size] = each.total_ps
        pictures.latency_picture(settings.plot, times, f"{title}\n{settings.network.text()}")
    if settings.links_plot is not None:
        pictures.ring_picture(settings.links_plot, timing.links, timing.total_ps, what)
    if settings.timeline_plot is not None:
        pictures.timeline_picture(settings.timeline_plot, sweep.events(timing, settings.network), what)
    if settings.trace is not None:
        write_trace(settings.trace, sweep.events(timing, settings.network))
