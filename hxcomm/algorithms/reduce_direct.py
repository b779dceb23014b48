"""Direct reduce: the root reads every input."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, reduce


def reduce_direct(world_size: int, root: int) -> Schedule:
    """The root reduces all inputs; the others move nothing.

    One round. Of S bytes the root loads n*S and stores S. Reduces in rank order.
    """

    def rounds() -> Iterator[Round]:
        yield [reduce(root, [Location(s, "input", 0) for s in range(world_size)], Location(root, "output", 0))]

    return Schedule("reduce", "direct", world_size, rounds, root=root)
