"""Times each algorithm at each size on simulated chips. Knows nothing of the command line's words or of printing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from hxcomm import algorithms
from hxcomm.schedule import Schedule
from hxcomm.sim.engine import TimedEvent, Timing, time_schedule
from hxcomm.sim.interconnect import Interconnect
from hxcomm.sim.legality import legal
from hxcomm.sim.trace import Event
from hxcomm.simulate.arguments import Settings, block_bytes

# How much of the data a link of a perfect network would carry: bus bandwidth is algorithm bandwidth times this, so that
# it can be compared with the links' (NCCL-tests, doc/PERFORMANCE.md).
_OF_OTHERS = ("all_gather", "reduce_scatter", "gather", "scatter", "all_to_all")


@dataclass(frozen=True)
class Row:
    """One algorithm at one size. `size` is of the largest buffer, `nbytes` of one block of the call."""

    size: int
    nbytes: int
    algorithm: str
    total_ps: int
    algbw_gbps: float
    busbw_gbps: float


@dataclass(frozen=True)
class Sweep:
    """refused: algorithms that the links cannot execute, with the first transfer and the rule that it breaks."""

    settings: Settings
    rows: tuple[Row, ...]
    refused: tuple[tuple[str, str], ...]
    schedules: dict[str, Schedule]

    def at(self, size: int) -> list[Row]:
        """Fastest first; of equal ones in the order of names."""
        return sorted((row for row in self.rows if row.size == size), key=lambda row: (row.total_ps, row.algorithm))

    @cached_property
    def fastest(self) -> dict[int, Row]:
        return {size: self.at(size)[0] for size in sorted({row.size for row in self.rows})}

    def look_into(self, size: int, algorithm: str) -> Timing:
        """With every event, which tables need not."""
        settings = self.settings
        nbytes = block_bytes(settings.op, size, settings.n, settings.itemsize)
        schedule = self.schedules[algorithm]
        return time_schedule(
            schedule, settings.chip, nbytes, itemsize=settings.itemsize, network=settings.network, record=True
        )


def run(settings: Settings, hosts: tuple[int, ...] | None) -> Sweep:
    """hosts: of each rank, for the algorithms that ask. One that is not legal raises nothing: it is among `refused`."""
    schedules, refused, rows = {}, [], []
    for name in settings.algorithms:
        schedule = algorithms.build(settings.op, name, settings.n, settings.root, hosts)
        wrong = _illegal(schedule, settings)
        if wrong is not None:
            refused.append((name, wrong))
            continue
        schedules[name] = schedule
        rows += [_row(schedule, name, size, settings) for size in settings.sizes or (0,)]
    return Sweep(settings, tuple(rows), tuple(refused), schedules)


def bus_factor(op: str, n: int) -> float:
    if op == "all_reduce":
        return 2 * (n - 1) / n
    return (n - 1) / n if op in _OF_OTHERS else 1.0


def _illegal(schedule: Schedule, settings: Settings) -> str | None:
    """At the largest size, where no chunk is empty."""
    nbytes = block_bytes(settings.op, max(settings.sizes, default=0), settings.n, settings.itemsize)
    return legal(schedule, settings.chip, settings.network, nbytes, settings.itemsize)


def _row(schedule: Schedule, name: str, size: int, settings: Settings) -> Row:
    nbytes = block_bytes(settings.op, size, settings.n, settings.itemsize)
    timing = time_schedule(schedule, settings.chip, nbytes, itemsize=settings.itemsize, network=settings.network)
    algbw = 1000 * size / timing.total_ps if timing.total_ps else 0.0  # bytes a picosecond are 1000 GB/s
    return Row(size, nbytes, name, timing.total_ps, algbw, algbw * bus_factor(settings.op, settings.n))


def events(timing: Timing, network: Interconnect) -> Iterator[Event]:
    """What was recorded, as lanes of a trace: each link is a lane of the chip that sends on it."""
    for each in timing.events or ():
        yield Event("virtual", *_lane(each, network), each.start_ps, each.end_ps - each.start_ps, _arguments(each))


def _lane(event: TimedEvent, network: Interconnect) -> tuple[int, str, str]:
    """(rank, lane, name)."""
    kind, which, *does = event.what.split()
    if kind == "link":
        return int(which.split("->")[0]), event.what, f"round {event.round}"
    return int(which), "collectives", f"{' '.join(does)}, round {event.round}"


def _arguments(event: TimedEvent) -> dict[str, int]:
    return {"round": event.round, "nbytes": event.nbytes}
