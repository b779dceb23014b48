"""Ring broadcast: pieces of the root's block travel along both arms of the ring."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy


def broadcast_ring(world_size: int, root: int) -> Schedule:
    """2n pieces, each in the round after the one before it; every rank reads a piece from its neighbour on the root's
    side in the round after that has got it.

    2n + n/2 rounds between neighbours only. Of S bytes each hop carries S; all of them are busy at once.
    Source: the pipelined chain of Chan et al., Collective communication: theory, practice, and experience (2007), with
    two chains that begin at the root.
    """
    n, pieces = world_size, 2 * world_size
    arms = [(1, n // 2), (-1, (n - 1) // 2)]  # (direction, ranks)

    def rounds() -> Iterator[Round]:
        for k in range(pieces + n // 2 - 1 if n > 1 else 0):
            yield [
                copy(
                    (root + way * far) % n,
                    Location((root + way * (far - 1)) % n, "input" if far == 1 else "output", k + 1 - far),
                    Location((root + way * far) % n, "output", k + 1 - far),
                )
                for way, ranks in arms
                for far in range(1, ranks + 1)
                if 0 <= k + 1 - far < pieces
            ]

    return Schedule("broadcast", "ring", n, rounds, root=root, pieces=pieces)
