"""Direct reduce_scatter: every rank reads its block of every input."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, reduce


def reduce_scatter_direct(world_size: int) -> Schedule:
    """Rank r reduces block r of all inputs.

    One round. Of blocks of S bytes a rank loads n*S and stores S. Reduces in rank order.
    """
    ranks = range(world_size)

    def rounds() -> Iterator[Round]:
        yield [reduce(r, [Location(s, "input", r) for s in ranks], Location(r, "output", 0)) for r in ranks]

    return Schedule("reduce_scatter", "direct", world_size, rounds)
