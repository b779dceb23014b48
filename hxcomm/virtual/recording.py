"""The trace of a run and its pictures, in the folder that HXCOMM_SIM_OUT names.

Each rank leaves what it has recorded there when its process ends, and the last one writes trace.json (virtual and real
time of all ranks, and the links), ring.png and timeline.png from it. No rank waits for another one.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack

from hxcomm import algorithms
from hxcomm.sim import pictures
from hxcomm.sim.trace import Event, write_trace
from hxcomm.virtual import clock, groups, summary

SHOWN_COLLECTIVES = 24  # in the picture of the timeline: the last ones


def write_at_exit(folder: str) -> None:
    atexit.register(_leave_part, Path(folder))


def _leave_part(folder: Path) -> None:
    place = groups.place()
    try:
        path = _part_path(folder, place.rank, place.ranks_in_all)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(msgpack.packb(_part()))
        fresh.replace(path)
        paths = [_part_path(folder, rank, place.ranks_in_all) for rank in range(place.ranks_in_all)]
        if all(each.exists() for each in paths):
            _write_all(folder, [msgpack.unpackb(each.read_bytes(), strict_map_key=False) for each in paths])
            for each in paths:
                each.unlink(missing_ok=True)
    except OSError as error:
        print(f"hxcomm: rank {place.rank}: no trace in {folder}: {error}", file=sys.stderr, flush=True)


def forget_older(folder: str, place: groups.Place) -> None:
    """What a run that was cut off has left under this rank's name. Before any rank of this run can end."""
    _part_path(Path(folder), place.rank, place.ranks_in_all).unlink(missing_ok=True)


def _part_path(folder: Path, rank: int, ranks: int) -> Path:
    return folder / f"rank{rank}of{ranks}.part"


def _part() -> dict[str, Any]:
    from hxcomm import _C

    ops, lost = _C.clock_events()
    names = {number: name for name, number in clock._regions.items()}
    calls = [
        (group, *key, starts, end_ps, began_ns, ended_ns)
        for group, _, _, _, events in _C.clock_collectives()
        for key, starts, end_ps, began_ns, ended_ns in events
    ]
    mine = {name: group.global_ranks.index(groups.place().rank) for name, group in groups.joined().items()}
    return {"rank": groups.place().rank, "regions": names, "ops": ops, "calls": calls, "lost": lost, "mine": mine}


def _write_all(folder: Path, parts: list[dict[str, Any]]) -> None:
    events = [event for part in parts for event in _events(part)]
    events += _link_events(parts[0])
    write_trace(folder / "trace.json", events)
    lost = sum(part["lost"] for part in parts)
    note = f" ({lost} later operations were too many to keep)" if lost else ""
    print(f"hxcomm: wrote {folder / 'trace.json'}{note}; https://ui.perfetto.dev opens it", file=sys.stderr, flush=True)
    try:
        pictures.timeline_picture(folder / "timeline.png", _last(events))
        report = clock.report()
        for links in list(summary.link_uses(report).values())[:1]:
            pictures.ring_picture(folder / "ring.png", links, report.total_ps)
    except pictures.PictureError as error:
        print(f"hxcomm: no pictures in {folder}: {error}", file=sys.stderr, flush=True)


def _events(part: dict[str, Any]) -> Iterator[Event]:
    rank, regions = part["rank"], part["regions"]
    for name, region, start_ps, duration_ps, start_ns, duration_ns in part["ops"]:
        args = {"region": regions[region]}
        if duration_ps:
            yield Event("virtual", rank, "ops", name, start_ps, duration_ps, args)
        yield Event("real", rank, "ops", name, 1000 * start_ns, 1000 * duration_ns, args)
    for group, op, algorithm, nbytes, _, _, starts, end_ps, began_ns, ended_ns in part["calls"]:
        name = algorithms.OPS[op]
        args = {"group": group, "algorithm": algorithm, "nbytes": nbytes}
        start_ps = starts[part["mine"][group]]
        yield Event("virtual", rank, "collectives", name, start_ps, end_ps - start_ps, args)
        yield Event("real", rank, "collectives", name, 1000 * began_ns, 1000 * (ended_ns - began_ns), args)


def _link_events(part: dict[str, Any]) -> Iterator[Event]:
    """What travelled on each link, by the calls of one rank: every rank of a group would tell the same."""
    known: dict[tuple[Any, ...], list[tuple[str, int, int, int]]] = {}
    for group_name, op, algorithm, nbytes, itemsize, root, starts, *_ in part["calls"]:
        group = groups.joined().get(group_name)
        if group is None:  # of other ranks than this process
            continue
        first = min(starts)
        key = (group_name, op, algorithm, nbytes, itemsize, root, tuple(start - first for start in starts))
        if key not in known:
            known[key] = list(_link_times(group, *key[1:]))
        for lane, start_ps, end_ps, link_bytes in known[key]:
            args = {"nbytes": link_bytes, "algorithm": algorithm}
            yield Event("virtual", 0, lane, algorithms.OPS[op], first + start_ps, end_ps - start_ps, args)


def _link_times(
    group: groups.SimulatedGroup,
    op: int,
    algorithm: str,
    nbytes: int,
    itemsize: int,
    root: int,
    starts: tuple[int, ...],
) -> Iterator[tuple[str, int, int, int]]:
    from hxcomm.sim import engine

    target = group.target
    name = algorithms.OPS[op]
    rooted = root if root >= 0 else None
    if target.refusal(name, algorithm, rooted) is not None or len(starts) == 1:
        return
    schedule = algorithms.build(name, algorithm, len(starts), rooted)
    timing = engine.time_schedule(
        schedule, target.chip, nbytes, itemsize=itemsize, network=target.network, starts_ps=starts, record=True
    )
    for event in timing.events or ():
        if event.what.startswith("link "):
            yield event.what, event.start_ps, event.end_ps, event.nbytes


def _last(events: list[Event]) -> list[Event]:
    """Of the last collectives of the first rank, in virtual time."""
    starts = sorted(event.start_ps for event in events if event[:3] == ("virtual", 0, "collectives"))
    since = starts[-SHOWN_COLLECTIVES] if len(starts) > SHOWN_COLLECTIVES else 0
    return [event for event in events if event.clock == "virtual" and event.start_ps >= since]
