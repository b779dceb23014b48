"""Ring reduce: partial results travel along both arms of the ring towards the root."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, Transfer, reduce


def reduce_ring(world_size: int, root: int) -> Schedule:
    """2n pieces, each in the round after the one before it; every rank adds its part to what its neighbour on the far
    side has, the root to one arm's result first and then to the other's.

    2n + n/2 rounds between neighbours only. Of S bytes each hop carries S; all of them are busy at once. Reduces an arm
    from its end, not in the order of ranks.
    Source: as broadcast_ring, the other way round.
    """
    n, pieces = world_size, 2 * world_size
    if n == 1:
        return Schedule(
            "reduce", "ring", 1, lambda: [[reduce(0, [Location(0, "input", 0)], Location(0, "output", 0))]], root=root
        )
    long, short = n // 2, (n - 1) // 2  # ranks of an arm: upwards, downwards

    def partial(way: int, ranks: int, far: int, piece: int) -> Location:
        """What the rank `far` from the root has of a piece, with all behind it. Two slots, as it is read a round on."""
        rank = (root + way * far) % n
        return Location(rank, "input", piece) if far == ranks else Location(rank, "scratch", piece % 2)

    def adds(way: int, ranks: int, far: int, piece: int) -> Transfer:
        rank = (root + way * far) % n
        own = Location(rank, "input", piece)
        return reduce(rank, [partial(way, ranks, far + 1, piece), own], partial(way, ranks, far, piece))

    def rounds() -> Iterator[Round]:
        # The rank `far` adds to piece p in round p + ranks - far; the root, last of the long arm, in p + long, and a
        # round later what the short arm has had ready since round p + short - 1 at the latest.
        for k in range(1, pieces + long + 1):
            found = [
                adds(way, ranks, far, k - last + far)
                for way, ranks, last in ((1, long, long), (-1, short, long + 1))
                for far in range(1, ranks)
                if 0 <= k - last + far < pieces
            ]
            if 0 <= k - long < pieces:
                here = Location(root, "scratch", (k - long) % 2) if short else Location(root, "output", k - long)
                own = Location(root, "input", k - long)
                found.append(reduce(root, [partial(1, long, 1, k - long), own], here))
            if short and 0 <= k - long - 1 < pieces:
                piece = k - long - 1
                sources = [Location(root, "scratch", piece % 2), partial(-1, short, 1, piece)]
                found.append(reduce(root, sources, Location(root, "output", piece)))
            yield found

    return Schedule("reduce", "ring", n, rounds, root=root, pieces=pieces, scratch=2 if n > 2 else 0)
