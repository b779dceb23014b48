"""Direct gather: the root reads every input."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy


def gather_direct(world_size: int, root: int) -> Schedule:
    """The root copies the input of each rank s to block s of its output; the others move nothing.

    One round. Of blocks of S bytes the root loads n*S and stores n*S.
    """

    def rounds() -> Iterator[Round]:
        yield [copy(root, Location(s, "input", 0), Location(root, "output", s)) for s in range(world_size)]

    return Schedule("gather", "direct", world_size, rounds, root=root)
