"""Direct all_gather: every rank reads every input."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy


def all_gather_direct(world_size: int) -> Schedule:
    """Rank r copies the input of each rank s to block s of its output.

    One round. Of blocks of S bytes a rank loads n*S and stores n*S.
    """
    ranks = range(world_size)

    def rounds() -> Iterator[Round]:
        yield [copy(r, Location(s, "input", 0), Location(r, "output", s)) for r in ranks for s in ranks]

    return Schedule("all_gather", "direct", world_size, rounds)
