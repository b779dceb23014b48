"""A group of ranks on the simulated chips: what links them, and how long its collectives take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from hxcomm import algorithms, environment
from hxcomm.select import Target
from hxcomm.sim import chips, choosing
from hxcomm.sim.interconnect import Interconnect, InterconnectError, interconnect
from hxcomm.sim.legality import IllegalSchedule
from hxcomm.virtual import clock

if TYPE_CHECKING:
    from hxcomm.sim.engine import Timing


@dataclass(frozen=True)
class SimulatedGroup:
    """global_ranks: the chips of its ranks, by their places in the network."""

    name: str
    target: Target
    global_ranks: tuple[int, ...]

    def times(
        self, op: int, algorithm: str, nbytes: int, itemsize: int, root: int, starts_ps: Sequence[int]
    ) -> tuple[tuple[int, ...], int]:
        """When each rank's part ends, and the gap after it. The timer of a process group (csrc/torch/timed_calls.h)."""
        rooted = root if root >= 0 else None
        timing = time(self.target, algorithms.OPS[op], algorithm, nbytes, itemsize, rooted, starts_ps)
        return timing.finish_ps, gap_ps(timing)


def gap_ps(timing: Timing) -> int:
    """How long after its start the group's next collective may start: when the busiest link has carried its part.

    What is left then is latency, during which the links carry the next one.
    """
    return max((link.busy_ps for link in timing.links), default=0)


_groups: dict[str, SimulatedGroup] = {}


class Place(NamedTuple):
    rank: int
    ranks_in_all: int


_place: Place | None = None


def join(name: str, rank: int, global_ranks: Sequence[int], ranks_in_all: int) -> SimulatedGroup:
    """The group of that name on the chips that HXCOMM_SIM names; starts the clock. `ranks_in_all`: each is a chip.

    Raises ValueError where there is no such chip, or its links do not connect the ranks.
    """
    global _place
    clock.start()
    chip = clock.chip()
    group = SimulatedGroup(name, Target(chip, _network(chip, global_ranks, ranks_in_all)), tuple(global_ranks))
    _groups[name] = group
    if _place is None:
        _place = Place(global_ranks[rank], ranks_in_all)
        if (folder := environment.SIM_OUT.get()) is not None:
            from hxcomm.virtual import recording

            recording.forget_older(folder, _place)
    return group


def place() -> Place:
    """Of this process among all; alone where it is in no group."""
    return _place or Place(0, 1)


def joined() -> dict[str, SimulatedGroup]:
    """The groups of this process, by name: of those of one name the last."""
    return dict(_groups)


def _network(chip: chips.Chip, ranks: Sequence[int], ranks_in_all: int) -> Interconnect:
    """What links the ranks: that of all chips, where it is all of them, or their piece of it."""
    whole = interconnect(chip, ranks_in_all)  # also raises where all ranks do not fit
    if (len(ranks) == ranks_in_all and sorted(ranks) == list(ranks)) or len(ranks) == 1:
        return whole if len(ranks) == ranks_in_all else interconnect(chip, 1)
    kinds = {each.kind for each in whole.dimensions if each.size > 1}
    if kinds <= {"switch", "full"} and len(whole.dimensions) == 1:
        return interconnect(chip, len(ranks))
    if kinds <= {"ring", "line"} and len(whole.dimensions) == 1:
        if all(after == before + 1 for before, after in pairwise(ranks)):
            return interconnect(chip, len(ranks), topology=f"line:{len(ranks)}")
        raise InterconnectError(
            f"a group of the ranks {', '.join(map(str, ranks))}: on {whole.text()} the ranks of a group must lie side "
            "by side, in rising order, as messages pass no chip that is not in the group"
        )
    raise InterconnectError(
        f"a group of the ranks {', '.join(map(str, ranks))} of {ranks_in_all}: on {whole.text()} only the group of all "
        "ranks is simulated"
    )


def time(
    target: Target,
    op: str,
    algorithm: str,
    nbytes: int,
    itemsize: int,
    root: int | None,
    starts_ps: Sequence[int] | None = None,
) -> Timing:
    """How long a collective takes that was executed with that algorithm.

    What the chip cannot execute (PREMUL_SUM is staged, by an algorithm of this machine) is timed as the chip would do
    it.
    """
    call = partial(choosing.time_collective, op, nbytes, target.chip, target.network, itemsize=itemsize, root=root)
    try:
        return call(algorithm=algorithm, starts_ps=starts_ps)
    except IllegalSchedule:
        return call(starts_ps=starts_ps)
