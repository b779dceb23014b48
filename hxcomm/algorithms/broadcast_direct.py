"""Direct broadcast: every rank reads the root's buffer."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy


def broadcast_direct(world_size: int, root: int) -> Schedule:
    """Every rank but the root copies the root's buffer to its own.

    One round. Of S bytes a rank loads S and stores S; on a ring of chips all of it leaves one chip.
    """
    ranks = range(world_size)

    def rounds() -> Iterator[Round]:
        yield [copy(r, Location(root, "input", 0), Location(r, "output", 0)) for r in ranks if r != root]

    return Schedule("broadcast", "direct", world_size, rounds, root=root)
