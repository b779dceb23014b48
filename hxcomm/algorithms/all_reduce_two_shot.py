"""Two-shot all_reduce: each rank reduces its share and pushes the result to everybody."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, reduce


def all_reduce_two_shot(world_size: int) -> Schedule:
    """Rank r reduces chunk r of all inputs and stores it to every rank while it is in cache.

    One round in mapped memory, two hand-overs in private memory. Of S bytes a rank loads S and stores S: 2S instead of
    the 3S of a reduce_scatter followed by an all_gather that reads the results again. Reduces in rank order.
    Source: Rabenseifner, Optimization of Collective Reduction Operations (2004), with direct exchange in both halves.
    """
    ranks = range(world_size)

    def rounds() -> Iterator[Round]:
        yield [
            reduce(r, [Location(s, "input", r) for s in ranks], *[Location(d, "output", r) for d in ranks])
            for r in ranks
        ]

    return Schedule("all_reduce", "two_shot", world_size, rounds, pieces=world_size)
