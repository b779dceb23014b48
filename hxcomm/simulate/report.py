"""What `hxcomm simulate` prints: a table by size and algorithm, who wins where, links, and a critical path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from hxcomm.sim.engine import TimedEvent, Timing
from hxcomm.sim.pictures import ring_text, size_text, time_text
from hxcomm.simulate.sweep import Row, Sweep

SHOWN_EVENTS = 16  # of a critical path: half of them at its beginning, half at its end


def heading(sweep: Sweep) -> str:
    settings = sweep.settings
    root = "" if settings.root is None else f", root {settings.root}"
    lines = [
        f"{settings.op}{root}, {settings.n} chips {settings.chip.name}, {settings.dtype}, simulated",
        f"links: {settings.network.text()}",
    ]
    if sweep.rows:
        lines += [
            "size: bytes of the largest buffer (all_gather: all outputs together; reduce_scatter: the whole input);",
            "algbw: size/time; busbw: as NCCL-tests define it, to compare with a link's bandwidth; GB/s: 1e9 bytes/s.",
        ]
    return "\n".join(lines)


def table(sweep: Sweep) -> str:
    """Of each size the fastest algorithm first, the others with how much longer they take."""
    width = max(9, *(len(row.algorithm) for row in sweep.rows))
    lines = [
        f"{'size':>10}  {'algorithm':<{width}} {'time':>10} {'algbw':>9} {'busbw':>9}",
        f"{'':>10}  {'':<{width}} {'':>10} {'(GB/s)':>9} {'(GB/s)':>9}",
    ]
    for size, best in sweep.fastest.items():
        for row in sweep.at(size):
            name = size_text(size) if row is best else ""
            slower = "" if row is best else f"  {row.total_ps / best.total_ps:.2f}x" if best.total_ps else ""
            lines.append(
                f"{name:>10}  {row.algorithm:<{width}} {time_text(row.total_ps):>10} {row.algbw_gbps:>9.4g} "
                f"{row.busbw_gbps:>9.4g}{slower}"
            )
    return "\n".join(lines)


def winners(sweep: Sweep) -> str:
    """One line for each run of sizes with the same fastest algorithm."""
    lines = []
    for name, found in groupby(sweep.fastest.values(), key=lambda row: row.algorithm):
        rows = list(found)
        first, last = size_text(rows[0].size), size_text(rows[-1].size)
        lines.append(f"fastest {f'at {first}' if first == last else f'from {first} to {last}'}: {name}")
    return "\n".join(lines)


def refusals(sweep: Sweep) -> str:
    return "\n".join(["not legal on these links:", *(f"  {why}" for _, why in sweep.refused)])


def looked_into(sweep: Sweep, row: Row, timing: Timing) -> str:
    """Links and critical path of one algorithm at one size."""
    what = f"{sweep.settings.op} {row.algorithm}" + (f" of {size_text(row.size)}" if row.size else "")
    return "\n".join(
        [
            f"{what}: links",
            ring_text(timing.links, timing.total_ps),
            "",
            f"{what}: critical path, {_parts(timing)}",
            *_path_lines(timing.critical_path()),
        ]
    )


def _parts(timing: Timing) -> str:
    """What the time is made of: bytes on links, chips that reduce, and the rest, which is hops and launches."""
    path = timing.critical_path()
    links = sum(event.end_ps - event.start_ps for event in path if event.what.startswith("link "))
    chips = sum(event.end_ps - event.start_ps for event in path if event.what.startswith("chip "))
    rest = timing.total_ps - links - chips
    return (
        f"{time_text(timing.total_ps)}: {time_text(links)} on links, {time_text(chips)} reducing, "
        f"{time_text(rest)} hops and launch"
    )


def _path_lines(path: Sequence[TimedEvent]) -> Iterator[str]:
    yield f"{'begins':>10} {'takes':>10} {'after':>10}  what"
    half = SHOWN_EVENTS // 2
    ended = 0
    for i, event in enumerate(path):
        if len(path) <= SHOWN_EVENTS or i < half or i >= len(path) - half:
            took, waited = event.end_ps - event.start_ps, event.start_ps - ended
            carried = f", {size_text(event.nbytes)}" if event.nbytes else ""
            yield (
                f"{time_text(event.start_ps):>10} {time_text(took):>10} {time_text(max(0, waited)):>10}  "
                f"{event.what}, round {event.round}{carried}"
            )
        elif i == half:
            yield f"{'...':>10}  {len(path) - 2 * half} more"
        ended = event.end_ps


def as_object(sweep: Sweep, row: Row | None, timing: Timing | None) -> dict[str, Any]:
    """All that the texts say, for --json. Times are picoseconds, bandwidths 1e9 bytes/s."""
    settings = sweep.settings
    found: dict[str, Any] = {
        "simulated": True,
        "op": settings.op,
        "root": settings.root,
        "chips": settings.n,
        "chip": settings.chip.name,
        "chip_digest": settings.chip.digest,
        "links": settings.network.text(),
        "dtype": settings.dtype,
        "rows": [row.__dict__ for row in sweep.rows],
        "fastest": {str(size): best.algorithm for size, best in sweep.fastest.items()},
        "refused": dict(sweep.refused),
    }
    if row is not None and timing is not None:
        found["looked_into"] = {
            "size": row.size,
            "algorithm": row.algorithm,
            "total_ps": timing.total_ps,
            "links": [link._asdict() for link in timing.links],
            "critical_path": [event._asdict() for event in timing.critical_path()],
        }
    return found
