"""Line all_reduce: partial results travel from both ends of a line to its middle, results back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from hxcomm.algorithms.broadcast_ring import broadcast_ring
from hxcomm.algorithms.reduce_ring import reduce_ring
from hxcomm.schedule import Round, Schedule, Transfer


def all_reduce_line(world_size: int) -> Schedule:
    """A ring reduce to the rank in the middle, whose arms then end at the first and the last rank, and the broadcast of
    each piece as soon as it is complete.

    3n + 2 rounds or fewer, between neighbours of an open line only. Of S bytes each hop carries S in either direction,
    the least possible on a line. Reduces each half from its end, not in the order of ranks.
    Source: as broadcast_ring and reduce_ring.
    """
    n = world_size
    middle = (n - 1) // 2
    gathered = reduce_ring(n, middle)
    spread = broadcast_ring(n, middle)

    def rounds() -> Iterator[Round]:
        # Piece p is complete after round p + n // 2 + 2, and round p + 1 of the broadcast is the first to read it.
        waiting: list[Sequence[Transfer]] = [()] * (n // 2 + 1)
        up = [transfers for _, transfers in gathered.numbered_rounds()]
        down = waiting + [transfers for _, transfers in spread.numbered_rounds()]
        yield from ([*first, *second] for first, second in zip_longest(up, down, fillvalue=()))

    return Schedule("all_reduce", "line", n, rounds, pieces=gathered.pieces, scratch=gathered.scratch)
