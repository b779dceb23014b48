"""The algorithm that a chip would use: of those that its links can execute, the one that is done first.

Both the choice and the times are kept, as a run asks for the same few collectives at every step. Times depend on starts
only by their differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from hxcomm import algorithms
from hxcomm.schedule import Rotation, Schedule
from hxcomm.sim.chips import Chip
from hxcomm.sim.engine import Timing, time_schedule
from hxcomm.sim.interconnect import Interconnect
from hxcomm.sim.legality import IllegalSchedule, legal

KEPT = 4096
# What is not made of Rotations is written out: two_shot of 256 ranks that push is 130,000 transfers, 2 s of Python for
# the first time that it is asked for, and of 4,096 ranks would take the memory.
LARGEST_WRITTEN_OUT = 256


class Choice(NamedTuple):
    """others: the other legal ones with their times, fastest first. refused: those that are not, and why."""

    algorithm: str
    timing: Timing
    others: tuple[tuple[str, int], ...]
    refused: tuple[tuple[str, str], ...]


def choose(
    op: str, nbytes: int, chip: Chip, network: Interconnect, *, itemsize: int = 2, root: int | None = None
) -> Choice:
    """The fastest legal algorithm for blocks of nbytes, all ranks coming at once; of equals the first by name.

    Raises IllegalSchedule where the links can execute none, ScheduleError for an unknown op or a wrong root.
    """
    return _choose(op, nbytes, chip, network, itemsize, root, tuple(algorithms.names(op)))


def time_collective(
    op: str,
    nbytes: int,
    chip: Chip,
    network: Interconnect,
    *,
    itemsize: int = 2,
    root: int | None = None,
    algorithm: str | None = None,
    starts_ps: Sequence[int] | None = None,
) -> Timing:
    """By the fastest legal algorithm, or by one that is named. starts_ps: when each rank comes; left out, all at 0.

    Raises IllegalSchedule for one that is named and that the links cannot execute.
    """
    if algorithm is None:
        algorithm = choose(op, nbytes, chip, network, itemsize=itemsize, root=root).algorithm
    starts = (0,) * network.world_size if starts_ps is None else tuple(starts_ps)
    first = min(starts, default=0)
    relative = tuple([start - first for start in starts])
    timing = _timed(op, algorithm, nbytes, chip, network, itemsize, root, relative)
    if not first:
        return timing
    return Timing(
        tuple([finish + first for finish in timing.finish_ps]), timing.total_ps, timing.links, None, timing.folded
    )


@lru_cache(maxsize=KEPT)
def _choose(
    op: str,
    nbytes: int,
    chip: Chip,
    network: Interconnect,
    itemsize: int,
    root: int | None,
    names: tuple[str, ...],  # a registered one is a new choice
) -> Choice:
    timings: dict[str, Timing] = {}
    refused = []
    for name in names:
        if network.world_size > LARGEST_WRITTEN_OUT and not _rotates(op, name):
            refused.append((name, f"not tried above {LARGEST_WRITTEN_OUT} ranks, as it is not made of Rotations"))
            continue
        problem = _problem(op, name, nbytes, chip, network, itemsize, root)
        if problem is None:
            timings[name] = _timed(op, name, nbytes, chip, network, itemsize, root, (0,) * network.world_size)
        else:
            refused.append((name, problem))
    if not timings:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in refused)
        raise IllegalSchedule(f"chip {chip.name} can execute no {op} of {network.world_size} ranks: {reasons}")
    fastest, *others = sorted(timings, key=lambda name: (timings[name].total_ps, name))
    return Choice(fastest, timings[fastest], tuple([(name, timings[name].total_ps) for name in others]), tuple(refused))


@lru_cache(maxsize=KEPT)
def _timed(
    op: str,
    algorithm: str,
    nbytes: int,
    chip: Chip,
    network: Interconnect,
    itemsize: int,
    root: int | None,
    starts: tuple[int, ...],
) -> Timing:
    problem = _problem(op, algorithm, nbytes, chip, network, itemsize, root)
    if problem is not None:
        raise IllegalSchedule(f"chip {chip.name} cannot execute {problem}")
    schedule = _built(op, algorithm, network.world_size, root, network.hosts)
    return time_schedule(schedule, chip, nbytes, itemsize=itemsize, network=network, starts_ps=starts)


@lru_cache(maxsize=KEPT)
def _problem(
    op: str, algorithm: str, nbytes: int, chip: Chip, network: Interconnect, itemsize: int, root: int | None
) -> str | None:
    return legal(_built(op, algorithm, network.world_size, root, network.hosts), chip, network, nbytes, itemsize)


@lru_cache(maxsize=KEPT)
def _rotates(op: str, algorithm: str) -> bool:
    """Whether it is made of Rotations, as a few ranks show."""
    root = 0 if op in algorithms.ROOTED else None
    return all(isinstance(round_, Rotation) for round_ in algorithms.build(op, algorithm, 8, root).rounds())


@lru_cache(maxsize=256)
def _built(op: str, algorithm: str, world_size: int, root: int | None, hosts: tuple[int, ...] | None) -> Schedule:
    return algorithms.build(op, algorithm, world_size, root, hosts)
