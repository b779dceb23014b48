"""Direct scatter: every rank reads its block of the root's input."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy


def scatter_direct(world_size: int, root: int) -> Schedule:
    """Rank r copies block r of the root's input to its output.

    One round. Of blocks of S bytes a rank loads S and stores S.
    """

    def rounds() -> Iterator[Round]:
        yield [copy(r, Location(root, "input", r), Location(r, "output", 0)) for r in range(world_size)]

    return Schedule("scatter", "direct", world_size, rounds, root=root)
