"""What a run would have cost on the simulated chips, for people and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from hxcomm.sim.pictures import ring_text, size_text, time_text
from hxcomm.virtual import clock, groups
from hxcomm.virtual.clock import CollectiveKey, Parts, Report

WIDTH = 78
MOST_ROWS = 12  # of a table
PARTS = (
    ("weights", "weights"),
    ("kv_cache", "KV cache"),
    ("other", "other ops"),
    ("exposed", "exposed communication"),
)
_told = False


def text(report: Report, steps: int, wall_ms_per_step: float | None = None, step: str = "token") -> str:
    """The screen after a run. `report` is of `steps` steps (tokens, say), and all times are of one of them."""
    global _told
    _told = True
    lines = [f"{f' predicted for {_chips(report)} ':─^{WIDTH}}", *_totals(report, steps, wall_ms_per_step, step), ""]
    lines += [*_regions(report, steps, step), ""] if len(report.regions) > 1 else []
    lines += [*_collectives(report, steps, step), ""] if report.collectives else []
    for name, links in link_uses(report).items():
        lines += [*([f"group {name}:"] if len(link_uses(report)) > 1 else []), ring_text(links, report.total_ps), ""]
    lines += [f"not timed: {count} {what}" for what, count in report.untimed.items() if count]
    return "\n".join(lines).rstrip()


def as_json(report: Report, steps: int, wall_ms_per_step: float | None = None) -> dict[str, Any]:
    """The same as numbers: times of one step in ms, of a collective's call in us."""

    def parts(of: Parts) -> dict[str, float]:
        names = [name for name, _ in PARTS] + ["hidden"]
        return {"total": _ms(of.total, steps), **{name: _ms(getattr(of, name), steps) for name in names}}

    return {
        "chip": report.chip,
        "network": {name: group.target.network.text() for name, group in groups.joined().items()},
        "steps": steps,
        "total_ps": report.total_ps,
        "ms_per_step": _ms(report.total_ps, steps),
        "wall_ms_per_step": wall_ms_per_step,
        "parts_ms": parts(report.parts),
        "regions_ms": {name: parts(each) for name, each in report.regions.items()},
        "collectives": [
            {
                "group": key.group,
                "op": key.op,
                "algorithm": key.algorithm,
                "nbytes": key.nbytes,
                "calls": row.calls,
                "mean_us": row.ps / row.calls / 1e6,
            }
            for key, row in report.collectives.items()
        ],
        "links": {
            name: [link._asdict() if hasattr(link, "_asdict") else vars(link) for link in links]
            for name, links in link_uses(report).items()
        },
        "untimed": dict(report.untimed),
    }


def _ms(ps: int, steps: int) -> float:
    return ps / steps / 1e9


def _chips(report: Report) -> str:
    n = groups.place().ranks_in_all
    return f"{n} simulated chips {report.chip}" if n > 1 else f"one simulated chip {report.chip}"


def _totals(report: Report, steps: int, wall_ms: float | None, step: str) -> Iterable[str]:
    total = report.total_ps
    for group in groups.joined().values():
        if len(group.global_ranks) == groups.place().ranks_in_all > 1:
            yield group.target.network.text()
            break
    rate = f"{1e12 * steps / total:,.0f} {step}s/s" if total else ""
    yield f"{f'predicted, per {step}':<24}{_ms(total, steps):>10.4f} ms   {rate}"
    if wall_ms is not None:
        yield f"{'this run took':<24}{wall_ms:>10.4f} ms"
    for name, title in PARTS:
        ps = getattr(report.parts, name)
        yield f"  {title:<22}{_ms(ps, steps):>10.4f} ms  {ps / total if total else 0:>6.1%}"
    yield f"  {'hidden communication':<22}{_ms(report.parts.hidden, steps):>10.4f} ms  (beside computation)"


def _regions(report: Report, steps: int, step: str) -> Iterable[str]:
    """A line for each region; regions in a row that look alike share one."""
    yield f"{f'us per {step}':<22}{'weights':>9}{'KV cache':>10}{'other':>9}{'exposed':>9}{'hidden':>9}{'total':>9}"
    rows: list[tuple[list[str], str]] = []
    for name, parts in report.regions.items():
        values = [*(getattr(parts, each) for each, _ in PARTS), parts.hidden, parts.total]
        widths = (9, 10, 9, 9, 9, 9)
        shown = "".join(f"{ps / steps / 1e6:>{width}.3f}" for ps, width in zip(values, widths, strict=True))
        if rows and rows[-1][1] == shown:
            rows[-1][0].append(name)
        else:
            rows.append(([name], shown))
    for names, shown in rows[: 2 * MOST_ROWS]:
        yield f"{names[0] if len(names) == 1 else f'{names[0]} to {names[-1].split()[-1]}, each':<22}{shown}"
    if len(rows) > 2 * MOST_ROWS:
        yield f"... and {sum(len(names) for names, _ in rows[2 * MOST_ROWS :])} more"


def _collectives(report: Report, steps: int, step: str) -> Iterable[str]:
    yield f"{'the chips run':<20}{'size':>10}  {'as':<22}{f'per {step}':>10}{'mean time':>13}"
    rows = sorted(report.collectives.items(), key=lambda row: -row[1].ps)
    for key, row in rows[:MOST_ROWS]:
        mean = time_text(row.ps / row.calls)
        yield f"{key.op:<20}{size_text(key.nbytes):>10}  {key.algorithm:<22}{row.calls / steps:>10.4g}{mean:>13}"
    if len(rows) > MOST_ROWS:
        yield f"... and {len(rows) - MOST_ROWS} more"


def link_uses(report: Report) -> dict[str, list[Any]]:
    """By group, what each link carried and how long it was busy, all calls together: LinkUse of hxcomm.sim.engine."""
    from hxcomm.sim.engine import LinkUse

    sums: dict[str, dict[tuple[int, int], list[int]]] = {}
    for key, row in report.collectives.items():
        group = groups.joined()[key.group]
        for link in _links_of(key):
            ends = tuple(group.global_ranks[node] if node < len(group.global_ranks) else node for node in link[:2])
            total = sums.setdefault(key.group, {}).setdefault((ends[0], ends[1]), [0, 0, 0])
            total[:] = (was + row.calls * each for was, each in zip(total, link[2:], strict=True))
    return {
        name: [LinkUse(*ends, *total) for ends, total in sorted(links.items())]
        for name, links in sums.items()
        if len(groups.joined()[name].global_ranks) > 1
    }


def _links_of(key: CollectiveKey) -> Sequence[tuple[int, int, int, int, int]]:
    """(source, target, bytes, busy ps, messages) of one call."""
    target = groups.joined()[key.group].target
    timing = groups.time(target, key.op, key.algorithm, key.nbytes, key.itemsize, key.root)
    return [(link.source, link.target, link.nbytes, link.busy_ps, link.messages) for link in timing.links]


def tell_at_exit() -> None:
    """Rank 0 says what the whole run would have cost, unless the program has told it."""
    report = clock.report()
    if _told or groups.place().rank != 0 or report.total_ps == 0:
        return
    print(text(report, 1, step="run"), file=sys.stderr, flush=True)
