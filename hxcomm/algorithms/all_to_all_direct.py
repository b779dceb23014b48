"""Direct all_to_all: every rank reads what is meant for it."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy


def all_to_all_direct(world_size: int) -> Schedule:
    """Rank r copies block r of each rank s's input to block s of its output. Every pair may have its own count.

    One round. Of blocks of S bytes a rank loads n*S and stores n*S. The ranks begin at themselves and go round, so
    that they do not all read the same rank at the same time.
    """
    ranks = range(world_size)

    def rounds() -> Iterator[Round]:
        yield [
            copy(r, Location(s, "input", r), Location(r, "output", s)) for r in ranks for s in (*ranks[r:], *ranks[:r])
        ]

    return Schedule("all_to_all", "direct", world_size, rounds)
