"""The trace of a run, for Perfetto (ui.perfetto.dev): what each rank did when, in virtual and in real time.

Both clocks of one run lie in one file, as two groups of processes: a process for each rank, a lane for its ops, its
collectives and each link that leaves it. Each clock begins at 0 with its first event, so the groups can be compared.
Viewers round to nanoseconds; the exact picoseconds stand in the arguments of each event. Knows nothing of where events
come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

Clock: TypeAlias = Literal["virtual", "real"]
CLOCKS: tuple[Clock, ...] = ("virtual", "real")  # in the order in which viewers show them
KINDS = (".json", ".pftrace")
_SEQUENCE = 1  # the writer of a native trace: there is one


class TraceError(ValueError):
    """The trace cannot be written there. The text says what to write instead."""


class Event(NamedTuple):
    """What a rank or one of its links did for a while.

    lane: "ops", "collectives", "link 0->1" (of the rank that sends). Events of a lane that overlap without one lying
    in the other are shown on several rows of the same name.
    """

    clock: Clock
    rank: int
    lane: str
    name: str
    start_ps: int
    duration_ps: int
    args: Mapping[str, Any]

    @property
    def end_ps(self) -> int:
        return self.start_ps + self.duration_ps


class Row(NamedTuple):
    """One row of the viewer: events that lie one after another or one in another, sorted so that outer ones come first.

    `first_ps`: where the clock begins.
    """

    clock: Clock
    rank: int
    lane: str
    first_ps: int
    events: tuple[Event, ...]


def check_path(path: Path | str) -> None:
    """Raises TraceError where `path` has no ending that says what to write, or the package for it is missing.

    To be called before a long run.
    """
    if Path(path).suffix not in KINDS:
        raise TraceError(
            f"{path}: a trace is written as {KINDS[0]} (Chrome's form, which Perfetto opens) or {KINDS[1]} (Perfetto's "
            "own): choose one of these endings"
        )
    if not Path(path).absolute().parent.is_dir():
        raise TraceError(f"{path}: there is no folder {Path(path).parent}")
    if Path(path).suffix == ".pftrace":
        _native_messages()


def write_trace(path: Path | str, events: Iterable[Event]) -> None:
    """Writes the events, in any order, to `path`: Chrome's JSON (.json) or Perfetto's own form (.pftrace).

    Raises TraceError as check_path does, and for an event of another clock, a negative rank or duration.
    """
    check_path(path)
    rows = _rows(events)
    if Path(path).suffix == ".pftrace":
        with Path(path).open("wb") as stream:
            stream.writelines(_native(rows))
    else:
        with Path(path).open("w", encoding="utf-8") as text:
            text.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
            text.write(",\n".join(map(json.dumps, _chrome(rows))))
            text.write("\n]}\n")


def _rows(events: Iterable[Event]) -> list[Row]:
    """Virtual time first, then by rank; in a rank the lanes as they first appear."""
    lanes: dict[tuple[Clock, int, str], list[Event]] = {}
    for event in events:
        if event.clock not in CLOCKS or event.rank < 0 or event.duration_ps < 0:
            raise TraceError(f"{event}: the clock is one of {', '.join(CLOCKS)}, rank and duration are 0 or more")
        lanes.setdefault((event.clock, event.rank, event.lane), []).append(event)
    first = {
        clock: min((each.start_ps for key, lane in lanes.items() if key[0] == clock for each in lane), default=0)
        for clock in CLOCKS
    }
    in_order = sorted(lanes, key=lambda lane: (CLOCKS.index(lane[0]), lane[1]))
    return [Row(*key, first[key[0]], tuple(row)) for key in in_order for row in _apart(lanes[key])]


def _apart(events: Iterable[Event]) -> list[list[Event]]:
    """The fewest rows on which no two events overlap unless one lies in the other, found greedily."""
    rows: list[list[Event]] = []
    ends: list[list[int]] = []  # of each row, of the events that are still open, innermost last
    for event in sorted(events, key=lambda each: (each.start_ps, -each.duration_ps)):
        for open_ends in ends:
            while open_ends and open_ends[-1] <= event.start_ps:
                open_ends.pop()
        free = [i for i, open_ends in enumerate(ends) if not open_ends or event.end_ps <= open_ends[-1]]
        if not free:
            free = [len(rows)]
            rows.append([])
            ends.append([])
        rows[free[0]].append(event)
        ends[free[0]].append(event.end_ps)
    return rows


def _processes(rows: Iterable[Row]) -> dict[tuple[Clock, int], int]:
    """A number for each (clock, rank), from 1 in the order of rows: viewers take 0 for the idle process."""
    keys = dict.fromkeys((row.clock, row.rank) for row in rows)
    return {key: number for number, key in enumerate(keys, 1)}


def _exact(event: Event) -> dict[str, Any]:
    return {**event.args, "start_ps": event.start_ps, "duration_ps": event.duration_ps}


def _chrome(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Trace events as "Trace Event Format" has them (Google, 2016): `ts` and `dur` are microseconds.

    Both are cut to whole nanoseconds, which keeps the order: of two events of a row the first one ends at or before
    the nanosecond in which the second begins, also where a viewer adds `ts` and `dur` in nanoseconds.
    """
    pids = _processes(rows)
    for (clock, rank), pid in pids.items():
        head = {"ph": "M", "ts": 0, "pid": pid}
        yield {"name": "process_name", **head, "args": {"name": f"{clock} time, rank {rank}"}}
        yield {"name": "process_sort_index", **head, "args": {"sort_index": pid}}
    for tid, row in enumerate(rows, 1):
        where = {"pid": pids[row.clock, row.rank], "tid": tid}
        yield {"ph": "M", "name": "thread_name", "ts": 0, **where, "args": {"name": row.lane}}
        yield {"ph": "M", "name": "thread_sort_index", "ts": 0, **where, "args": {"sort_index": tid}}
        for event in row.events:
            start_ns, end_ns = _ns(event.start_ps, row), _ns(event.end_ps, row)
            times = {"ts": _us(start_ns), "dur": _us(end_ns - start_ns)}
            yield {"ph": "X", "name": event.name, "cat": row.clock, **where, **times, "args": _exact(event)}


def _ns(ps: int, row: Row) -> int:
    return (ps - row.first_ps) // 1000


def _us(ns: int) -> float:
    """As microseconds that are `ns` again, also for a viewer that multiplies by 1000 and drops what is left over."""
    us = ns / 1000
    return us if int(us * 1000) == ns else math.nextafter(us, math.inf)


def _native_messages() -> Any:
    try:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
    except ModuleNotFoundError:
        raise TraceError(
            "a .pftrace needs the package perfetto: pip install 'hxcomm[trace]', or write a .json"
        ) from None
    return perfetto_trace_pb2


def _native(rows: list[Row]) -> Iterator[bytes]:
    """Tracks in tracks: clock, rank, lane. Packets may be in any order; that of equal times is kept."""
    messages = _native_messages()
    tracks: dict[tuple[Any, ...], int] = {}

    def packet() -> Any:
        return messages.TracePacket(trusted_packet_sequence_id=_SEQUENCE)

    def encoded(one: Any) -> bytes:
        return bytes(messages.Trace(packet=[one]).SerializeToString())  # traces may be put one after another

    def track(key: tuple[Any, ...], name: str) -> Iterator[bytes]:
        if key not in tracks:
            tracks[key] = len(tracks) + 1
            made = packet()
            made.track_descriptor.uuid, made.track_descriptor.name = tracks[key], name
            made.track_descriptor.sibling_order_rank = tracks[key]
            made.track_descriptor.child_ordering = messages.TrackDescriptor.EXPLICIT
            if len(key) > 1:
                made.track_descriptor.parent_uuid = tracks[key[:-1]]
            yield encoded(made)

    for number, row in enumerate(rows):
        yield from track((row.clock,), f"{row.clock} time")
        yield from track((row.clock, row.rank), f"rank {row.rank}")
        key = (row.clock, row.rank, number)
        yield from track(key, row.lane)
        for at_ps, event in _edges(row.events):
            made = packet()
            made.timestamp = _ns(at_ps, row)
            made.track_event.track_uuid = tracks[key]
            made.track_event.type = messages.TrackEvent.TYPE_SLICE_END
            if event is not None:
                made.track_event.type = messages.TrackEvent.TYPE_SLICE_BEGIN
                made.track_event.name = event.name
                for name, value in _exact(event).items():
                    note = made.track_event.debug_annotations.add(name=name)
                    if type(value) is int:
                        note.int_value = value
                    else:
                        note.string_value = str(value)
            yield encoded(made)


def _edges(events: Iterable[Event]) -> Iterator[tuple[int, Event | None]]:
    """Beginnings (the event) and ends (None) of a row in the order of time, inner ends first."""
    open_ends: list[int] = []
    for event in events:
        while open_ends and open_ends[-1] <= event.start_ps:
            yield open_ends.pop(), None
        yield event.start_ps, event
        open_ends.append(event.end_ps)
    while open_ends:
        yield open_ends.pop(), None
